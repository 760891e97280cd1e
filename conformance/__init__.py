"""Suites that others wrote, run against a gateway that is started for them: `python -m conformance`."""

"""What a call costs: `make bench`, or `python -m benchmarks --help`.

A mock upstream (`upstream`), a load generator (`load`), and between them one contestant after the other
(`contestants`): nothing, nginx, this gateway in several configurations. `course` runs the same measurements for each,
`report` sets the figures beside what they may be, for `results/`. All processes are on one machine, over loopback.

The figure that survives a noisy machine is CPU time per request, of all processes of the contestant, from /proc: this
runs on Linux only. It is a measurement, never a test: nothing fails because it is slow.
"""

"""One run of the load generator as a child process, and what follows from what it counted."""

from __future__ import annotations

import json
import select
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from subprocess import Popen
from typing import Any

from benchmarks.load import Job
from benchmarks.processes import child, module

SPARE_SECONDS = 60.0
"""How much longer than its job a load generator may take. One that takes more hangs."""


class Load:
    """A load generator at work."""

    def __init__(self, process: Popen[bytes]) -> None:
        self._process = process

    def result(self, seconds: float) -> dict[str, Any] | None:
        """What it has found, with CPU time by what was done; None if it is still at work so long from now.

        Raises RuntimeError if it ended without a result.
        """
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            return None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the load generator ended without a result")
        return _with_shares(json.loads(line))


@contextmanager
def loading(job: Job) -> Iterator[Load]:
    with child(module("benchmarks.load")) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        process.stdin.flush()
        yield Load(process)


def measured(job: Job) -> dict[str, Any]:
    """A whole run. Raises RuntimeError if it did not come to its end."""
    with loading(job) as load:
        result = load.result(
            job.ramp + job.warm_up + job.settle_seconds + job.seconds + job.finish_seconds + SPARE_SECONDS
        )
    if result is None:
        raise RuntimeError("the load generator did not come to an end")
    return result


def _with_shares(result: dict[str, Any]) -> dict[str, Any]:
    done, seconds = result["done"], result["seconds"]
    others = result["machine_cpu"] - result["own_cpu"] - sum(result["cpu"].values())
    return {
        **result,
        "per_second": done / seconds,
        "cpu_us": {name: used / done * 1e6 if done else None for name, used in result["cpu"].items()},
        "load_share": result["own_cpu"] / seconds,
        "others_share": others / seconds,
    }

"""What every contestant goes through, in this order: starts, memory, answers, streams.

Memory comes first: later it would be hidden by what the answers have left in the allocator. A measurement is repeated
`rounds` times, and of those the one is kept during which other programs of the machine were least busy.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from typing import Any

from benchmarks import samples
from benchmarks.contestants import Contestant, Running
from benchmarks.load import Job
from benchmarks.processes import ROOT, child, module, resident_bytes
from benchmarks.stats import median

MIB = 1 << 20
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. `held` is how many streams run at once when memory and gaps are looked at."""

    connections: Sequence[int] = (1, 64, 256)
    streams: int = 64
    held: Sequence[int] = (500, 2000)
    seconds: float = 5.0
    warm_up: float = 1.5
    rounds: int = 3
    starts: int = 3


@dataclass(frozen=True, slots=True)
class Mock:
    """The running upstream."""

    port: int
    pid: int


@contextmanager
def upstream() -> Iterator[Mock]:
    with child(module("benchmarks.upstream")) as process:
        assert process.stdout is not None
        yield Mock(int(process.stdout.readline()), process.pid)


def run(contestant: Contestant, mock: Mock, plan: Plan, say: Say) -> dict[str, Any]:
    """All figures of one contestant, as they go into the JSON report."""
    found: dict[str, Any] = {"title": contestant.title, "answers": {}, "streams": {}, "held": {}}
    with contestant.running(mock.port) as running:
        jobs = _Jobs(running, mock, plan)
        if running.start is not None:
            found["start_seconds"] = median([running.start() for _ in range(plan.starts)])
            say(f"first answer after {found['start_seconds']:.2f} s")
            found["idle_mib"] = _idle_mib(jobs)
        for count in plan.held:
            held = found["held"][str(count)] = jobs.hold(count)
            say(f"{count} streams held: {sum(held['errors'].values())} broken, gap p99 {_ms(held['gap'])}")
        for count in plan.connections:
            done = found["answers"][str(count)] = jobs.answers(count)
            say(f"answers, {count} connections: {_told(done)}, p50 {_ms(done['latency'], 'p50')}")
        done = found["streams"][str(plan.streams)] = jobs.streams(plan.streams)
        say(f"streams, {plan.streams} connections: {_told(done)}, first chunk p99 {_ms(done['first'])}")
    return found


class _Jobs:
    """The measurements on a running contestant."""

    def __init__(self, running: Running, mock: Mock, plan: Plan) -> None:
        self.running = running
        self._mock = mock
        self._plan = plan

    def answers(self, connections: int) -> dict[str, Any]:
        return self._repeated(self._job("json", samples.MODEL, connections))

    def streams(self, connections: int) -> dict[str, Any]:
        job = self._job("stream", samples.MODEL, connections)
        return self._repeated(replace(job, ramp=samples.CHUNKS * samples.CHUNK_SECONDS))

    def hold(self, connections: int) -> dict[str, Any]:
        """So many streams at once, each to its end; what they take of memory by stream."""
        before = self._resident()
        job = self._job("stream", samples.SLOW_MODEL, connections)
        found = measured(replace(job, ramp=5.0, warm_up=0.5, seconds=8.0, finish=True))
        if "self" in found["resident"]:
            found["kib_per_stream"] = (found["resident"]["self"] - before) / 1024 / connections
        return found

    def warm(self) -> None:
        job = self._job("json", samples.MODEL, 16)
        measured(replace(job, seconds=min(2.0, self._plan.seconds)))

    def _resident(self) -> int:
        return resident_bytes(self.running.processes.get("self", ()))

    def _job(self, kind: Any, model: str, connections: int) -> Job:
        is_stream = kind == "stream"
        return Job(
            port=self.running.port,
            kind=kind,
            request=samples.request(self.running.port, self.running.key, model, stream=is_stream).decode(),
            connections=connections,
            seconds=self._plan.seconds,
            warm_up=self._plan.warm_up,
            least=len(samples.completion()),
            events=samples.CHUNKS + 1,
            watched={**self.running.processes, "upstream": [self._mock.pid]},
        )

    def _repeated(self, job: Job) -> dict[str, Any]:
        found = sorted((measured(job) for _ in range(self._plan.rounds)), key=itemgetter("others_share"))
        return {**found[0], "cpu_us_of_rounds": [one["cpu_us"].get("self") for one in found]}


def measured(job: Job) -> dict[str, Any]:
    """One run of the load generator, with CPU time by what was done."""
    given = json.dumps(asdict(job)) + "\n"
    with child(module("benchmarks.load")) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(given.encode())
        process.stdin.flush()
        line = process.stdout.readline()
    if not line:
        raise RuntimeError("the load generator ended without a result")
    result: dict[str, Any] = json.loads(line)
    done = result["done"]
    result["per_second"] = done / result["seconds"]
    result["cpu_us"] = {name: used / done * 1e6 if done else None for name, used in result["cpu"].items()}
    result["load_share"] = result["own_cpu"] / result["seconds"]
    result["others_share"] = (result["machine_cpu"] - result["own_cpu"] - sum(result["cpu"].values())) / result[
        "seconds"
    ]
    return result


def _idle_mib(jobs: _Jobs) -> float:
    jobs.warm()
    return resident_bytes(jobs.running.processes["self"]) / MIB


def _told(result: dict[str, Any]) -> str:
    used, failed = result["cpu_us"].get("self"), sum(result["errors"].values())
    cpu = f", {used:.0f} us CPU each" if used is not None else ""
    return f"{result['per_second']:.0f}/s{cpu}" + (f", {failed} FAILED {result['errors']}" if failed else "")


def _ms(found: dict[str, Any], point: str = "p99") -> str:
    return "-" if found[point] is None else f"{found[point] * 1000:.2f} ms"


def say_to_stderr(who: str) -> Say:
    return lambda text: print(f"{who}: {text}", file=sys.stderr, flush=True)


def commit() -> str | None:
    """Of this checkout, with a plus sign if it holds more than that."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty=+"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()

"""What every contestant goes through, in this order: starts, memory, answers, streams.

Memory comes first: later it would be hidden by what the answers have left in the allocator. A measurement is repeated
`rounds` times, and of those the one is kept during which other programs of the machine were least busy. Each takes a
bounded time, however slow the contestant is; one that was left with work that it could not end is started again.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from benchmarks import samples
from benchmarks.contestants import Contestant, Running
from benchmarks.load import Job
from benchmarks.measure import measured
from benchmarks.processes import child, cpu_seconds, module, resident_bytes
from benchmarks.stats import median

MIB = 1 << 20
QUIET_SECONDS = 15.0
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. `held` is how many streams run at once when memory and gaps are looked at."""

    connections: Sequence[int] = (1, 64, 256)
    streams: Sequence[int] = (1, 64, 256)
    held: Sequence[int] = (500, 2000)
    seconds: float = 5.0
    warm_up: float = 1.5
    settle_seconds: float = 20.0
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
    """All figures of one contestant, as they go into the results; `failed` says why some are not there."""
    found = nothing(contestant)
    try:
        with contestant.running(mock.port) as running:
            _Course(Jobs(running, mock, plan), plan, say, found).run()
    except (RuntimeError, OSError, subprocess.SubprocessError) as failure:
        why = str(failure).partition("\n")[0] if isinstance(failure, RuntimeError) else type(failure).__name__
        say(f"FAILED: {why}")
        found["failed"] = why
    return found


def nothing(contestant: Contestant, failed: str | None = None) -> dict[str, Any]:
    """The figures of one that was not measured (yet)."""
    found: dict[str, Any] = {"title": contestant.title, "answers": {}, "streams": {}, "held": {}, "memory": []}
    return found if failed is None else {**found, "failed": failed}


class Jobs:
    """The measurements on a running contestant."""

    def __init__(self, running: Running, mock: Mock, plan: Plan) -> None:
        self.running = running
        self._mock = mock
        self._plan = plan

    def answers(self, connections: int) -> dict[str, Any]:
        return self._repeated(self.job("json", samples.MODEL, connections))

    def streams(self, connections: int) -> dict[str, Any]:
        job = self.job("stream", samples.MODEL, connections)
        return self._repeated(replace(job, ramp=samples.CHUNKS * samples.CHUNK_SECONDS))

    def hold(self, connections: int) -> dict[str, Any]:
        """So many streams at once, each to its end; what they take of memory by stream."""
        before = self.resident()
        job = self.job("stream", samples.SLOW_MODEL, connections)
        found = self._measured(replace(job, ramp=5.0, warm_up=0.5, seconds=8.0, finish=True))
        if "self" in found["resident"]:
            found["kib_per_stream"] = (found["resident"]["self"] - before) / 1024 / connections
        return found

    def warm(self) -> None:
        job = self.job("json", samples.MODEL, 16)
        self._measured(replace(job, seconds=min(2.0, self._plan.seconds)))

    def resident(self) -> int:
        return resident_bytes(self.running.processes.get("self", ()))

    def job(self, kind: Any, model: str, connections: int) -> Job:
        asked = samples.request(
            self.running.port, self.running.key, model, stream=kind == "stream", headers=self.running.headers
        )
        return Job(
            port=self.running.port,
            kind=kind,
            request=asked.decode(),
            connections=connections,
            seconds=self._plan.seconds,
            warm_up=self._plan.warm_up,
            settle_seconds=self._plan.settle_seconds,
            least=samples.LEAST,
            events=samples.EVENTS,
            watched={**self.running.processes, "upstream": [self._mock.pid]},
        )

    def _measured(self, job: Job) -> dict[str, Any]:
        """Begun once the contestant has nothing left to do from before: less than a tenth of a core."""
        roots, end = self.running.processes.get("self", ()), time.monotonic() + QUIET_SECONDS
        before = cpu_seconds(roots)
        while time.monotonic() < end:
            time.sleep(0.2)
            now = cpu_seconds(roots)
            if now - before <= 0.02:
                break
            before = now
        return measured(job)

    def _repeated(self, job: Job) -> dict[str, Any]:
        """Where nothing was done at all, nothing is repeated."""
        rounds = [self._measured(job)]
        while len(rounds) < self._plan.rounds and rounds[-1]["done"]:
            rounds.append(self._measured(job))
        quietest = min(rounds, key=itemgetter("others_share"))
        return {**quietest, "cpu_us_of_rounds": [one["cpu_us"].get("self") for one in rounds]}


class _Course:
    """Fills `found` step by step, so that what was measured before a failure is not lost."""

    def __init__(self, jobs: Jobs, plan: Plan, say: Say, found: dict[str, Any]) -> None:
        self._jobs = jobs
        self._plan = plan
        self._say = say
        self._found = found
        self._began = time.monotonic()

    def run(self) -> None:
        if self._jobs.running.start is not None:
            self._starts(self._jobs.running.start)
        if self._jobs.running.processes:
            self._idle()
        for count in self._plan.held:
            held = self._found["held"][str(count)] = self._jobs.hold(count)
            self._say(f"{count} streams held: {sum(held['errors'].values())} broken, gap p99 {_ms(held['gap'])}")
            self._after(f"{count} streams held", held)
        for count in self._plan.connections:
            done = self._found["answers"][str(count)] = self._jobs.answers(count)
            self._say(f"answers, {count} connections: {_told(done)}, p50 {_ms(done['latency'], 'p50')}")
            self._after(f"answers, {count}", done)
        for count in self._plan.streams:
            done = self._found["streams"][str(count)] = self._jobs.streams(count)
            self._say(f"streams, {count} connections: {_told(done)}, first chunk p99 {_ms(done['first'])}")
            self._after(f"streams, {count}", done)

    def _starts(self, start: Callable[[], float]) -> None:
        self._found["start_seconds"] = median([start() for _ in range(self._plan.starts)])
        self._say(f"first answer after {self._found['start_seconds']:.2f} s")

    def _idle(self) -> None:
        self._jobs.warm()
        self._found["idle_mib"] = self._jobs.resident() / MIB
        self._remember("idle")

    def _after(self, what: str, result: dict[str, Any]) -> None:
        self._remember(what)
        start = self._jobs.running.start
        if start is not None and (not result["ended"] or "not ended" in result["errors"]):
            self._say("started again")
            start()
            self._remember("a new start")

    def _remember(self, what: str) -> None:
        if resident := self._jobs.resident():
            seconds = round(time.monotonic() - self._began, 1)
            self._found["memory"].append({"after": what, "seconds": seconds, "mib": resident / MIB})


def direct_figures(found: dict[str, Any]) -> dict[str, Any]:
    """Of the run without anything in between: what figures of the same run are compared with."""
    answers = {count: {"latency": one["latency"]} for count, one in found["answers"].items()}
    return {"answers": answers, "streams": {count: {"first": one["first"]} for count, one in found["streams"].items()}}


def _told(result: dict[str, Any]) -> str:
    used, failed = result["cpu_us"].get("self"), sum(result["errors"].values())
    cpu = f", {used:.0f} us CPU each" if used is not None else ""
    return f"{result['per_second']:.0f}/s{cpu}" + (f", {failed} FAILED {result['errors']}" if failed else "")


def _ms(found: dict[str, Any], point: str = "p99") -> str:
    return "-" if found[point] is None else f"{found[point] * 1000:.2f} ms"


def say_to_stderr(who: str) -> Say:
    return lambda text: print(f"{who}: {text}", file=sys.stderr, flush=True)

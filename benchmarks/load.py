"""The load generator, a process of its own: so many connections, each with one request after the other, for so long.

Each asks as soon as it has its answer, or, with a `rate`, when its next turn has come. It reads one `Job` as JSON from
stdin and prints one `Result`. Requests are bytes made before it began; of answers it looks at the status, the length
and the end. What it used of a CPU is in the result: near one core, it was the bottleneck.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import sys
import time
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import uvloop

from benchmarks.processes import busy_seconds, cpu_seconds, resident_bytes
from benchmarks.stats import spread

RECONNECT_SECONDS = 0.1
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_END = b"\r\n0\r\n\r\n"


@dataclass(slots=True)
class Job:
    """`watched` names groups of processes whose CPU time and memory belong into the result. `finish`: at the end no
    request is begun, and those that run are waited for, `finish_seconds` at most. `least` bytes make a whole answer,
    `events` a whole stream. `rate` is how many requests are begun each second; 0: as many as can be.

    The warm-up takes up to `settle_seconds` more until as many requests have ended as there are connections: before
    that, a slow server still works off the beginning."""

    port: int
    kind: Literal["json", "stream"]
    request: str
    connections: int
    seconds: float
    least: int
    events: int
    warm_up: float = 1.0
    ramp: float = 0.5
    finish: bool = False
    finish_seconds: float = 60.0
    rate: float = 0.0
    settle_seconds: float = 20.0
    watched: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(slots=True)
class Result:
    """Of the measured interval; `errors` of the whole run. Times are in seconds, a `Spread` each.

    `done` counts answers, or whole streams by their events: 51 of 102 are half a stream, whichever it belongs to.
    """

    seconds: float
    done: float
    ended: int
    errors: dict[str, int]
    latency: dict[str, Any]
    first: dict[str, Any]
    gap: dict[str, Any]
    cpu: dict[str, float]
    own_cpu: float
    machine_cpu: float
    resident: dict[str, int]


class Tally:
    """What all connections of a run have seen."""

    def __init__(self) -> None:
        self.measuring = False
        self.finishing = False
        self.running = 0
        self.answered = 0
        self.ended = 0
        self.events = 0
        self.latency = array("d")
        self.first = array("d")
        self.gap = array("d")
        self.errors: Counter[str] = Counter()


class Client(asyncio.Protocol):
    """One connection: asks, waits for the end of the answer, asks again. Connects anew after a failure."""

    def __init__(self, job: Job, request: bytes, tally: Tally) -> None:
        self._loop = asyncio.get_running_loop()
        self._job = job
        self._request = request
        self._tally = tally
        self._transport: asyncio.Transport
        self._waiting = False
        self._began = 0.0
        self._period = job.connections / job.rate if job.rate else 0.0
        self._turn = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connect(self) -> None:
        if not self._tally.finishing:
            self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            await self._loop.create_connection(lambda: self, "127.0.0.1", self._job.port)
        except OSError as failure:
            self._tally.errors[f"connect: {type(failure).__name__}"] += 1
            self._loop.call_later(RECONNECT_SECONDS, self.connect)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is one by behaviour only
        self._ask_in_turn()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting:
            self._failed("connection lost")
        if self._timer is not None:
            self._timer.cancel()
        self._loop.call_later(RECONNECT_SECONDS, self.connect)

    def _ask_in_turn(self) -> None:
        if self._turn > self._loop.time():
            self._timer = self._loop.call_at(self._turn, self.ask)
        else:
            self.ask()

    def ask(self) -> None:
        if self._tally.finishing:
            self._transport.close()
            return
        self._reset()
        self._timer = None
        self._waiting = True
        self._tally.running += 1
        self._turn = max(self._turn, self._loop.time()) + self._period
        self._began = time.perf_counter()
        self._transport.write(self._request)

    def _reset(self) -> None:
        raise NotImplementedError

    def _done(self, *, again: bool = True) -> None:
        self._waiting = False
        self._tally.running -= 1
        self._tally.answered += 1
        if not again:
            self._transport.close()
        elif self._period:
            self._ask_in_turn()
        else:
            self.ask()

    def _failed(self, why: str) -> None:
        self._tally.errors[why] += 1
        self._done(again=False)

    def _took(self) -> None:
        if self._tally.measuring:
            self._tally.ended += 1
            self._tally.latency.append(time.perf_counter() - self._began)


class AnswerClient(Client):
    def _reset(self) -> None:
        self._received = b""

    def data_received(self, data: bytes) -> None:
        data = self._received + data if self._received else data
        end = data.find(b"\r\n\r\n") + 4
        length = _LENGTH.search(data, 0, end)
        if end == 3 or (len(data) < end + int(length[1]) if length else not data.endswith(_END)):
            self._received = data
        elif data[9:12] != b"200":
            self._failed(f"status {data[9:12].decode('latin-1')}")
        elif len(data) - end < self._job.least:
            self._failed("short answer")
        else:
            self._took()
            self._done(again=b"\r\nconnection: close" not in data[:end].lower())


class StreamClient(Client):
    def _reset(self) -> None:
        self._tail = b""
        self._events = 0
        self._last = 0.0

    def data_received(self, data: bytes) -> None:
        if not self._tail and data[9:12] != b"200":
            self._failed(f"status {data[9:12].decode('latin-1')}")
            return
        count = data.count(b"\n\n") + (data.startswith(b"\n") and self._tail.endswith(b"\n"))
        self._tail = (self._tail + data)[-64:]
        if count:
            self._count(count)
        if self._tail.endswith(_END):
            if b"data: [DONE]" not in self._tail:
                self._failed("stream without its end mark")
            elif self._events < self._job.events:
                self._failed("stream with missing chunks")
            else:
                self._took()
                self._done()

    def _count(self, count: int) -> None:
        now, tally = time.perf_counter(), self._tally
        if tally.measuring:
            tally.events += count
            if self._events:
                tally.gap.append(now - self._last)
            else:
                tally.first.append(now - self._began)
        self._events += count
        self._last = now


async def run(job: Job) -> Result:
    loop, tally = asyncio.get_running_loop(), Tally()
    kind = AnswerClient if job.kind == "json" else StreamClient
    clients = [kind(job, job.request.encode(), tally) for _ in range(job.connections)]
    gc.disable()
    for index, client in enumerate(clients):
        loop.call_later(job.ramp * index / job.connections, client.connect)
    await asyncio.sleep(job.ramp + job.warm_up)
    await _settle(job, tally)
    before, own, machine, began = _cpu(job), time.process_time(), busy_seconds(), time.perf_counter()
    tally.measuring = True
    resident: Counter[str] = Counter()
    while (left := began + job.seconds - time.perf_counter()) > 0:
        await asyncio.sleep(min(left, 1.0))
        for name, roots in job.watched.items() if job.finish else ():
            resident[name] = max(resident[name], resident_bytes(roots))
    tally.measuring = False
    took, after = time.perf_counter() - began, _cpu(job)
    own, machine = time.process_time() - own, busy_seconds() - machine
    if job.finish:
        await _finish(tally, job.finish_seconds)
    return Result(
        seconds=took,
        done=tally.ended if job.kind == "json" else tally.events / job.events,
        ended=tally.ended,
        errors=dict(tally.errors),
        latency=asdict(spread(tally.latency)),
        first=asdict(spread(tally.first)),
        gap=asdict(spread(tally.gap)),
        cpu={name: after[name] - before[name] for name in after},
        own_cpu=own,
        machine_cpu=machine,
        resident=dict(resident),
    )


async def _settle(job: Job, tally: Tally) -> None:
    for _ in range(0 if job.finish else int(job.settle_seconds / 0.05)):
        if tally.answered >= job.connections:
            return
        await asyncio.sleep(0.05)


async def _finish(tally: Tally, seconds: float) -> None:
    tally.finishing = True
    for _ in range(int(seconds / 0.05)):
        if not tally.running:
            return
        await asyncio.sleep(0.05)
    tally.errors["not ended"] += tally.running


def _cpu(job: Job) -> dict[str, float]:
    return {name: cpu_seconds(roots) for name, roots in job.watched.items()}


def main() -> None:
    job = Job(**json.loads(sys.stdin.readline()))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(asdict(runner.run(run(job)))), flush=True)


if __name__ == "__main__":
    main()

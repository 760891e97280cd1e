"""Clients that come up against limits, with every worker alike, and a look into the book in which these are counted."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.upstream import Record, ScriptedUpstream
from tests_standalone.system.conftest import in_front_of
from tests_standalone.system.http import Answer, answer_of, post_chat, request_bytes

CLIENTS = 50
PAUSE = 0.03


def keyed(upstream: ScriptedUpstream, database_url: str, *, workers: int = 4, **more: Any) -> dict[str, Any]:
    """A configuration for gateways that ask everybody for a key."""
    return in_front_of(upstream, database_url, workers=workers, auth={"mode": "keys"}, **more)


# --- connections that are spread evenly: left alone, one worker may take them all


@dataclass
class Line:
    """A connection that one worker has accepted, for one call after the other, and none of them streamed."""

    pid: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, headers: Mapping[str, str], body: Any) -> Answer:
        """Raises asyncio.IncompleteReadError or OSError if the worker dies."""
        stays = {**headers, "connection": "keep-alive"}
        self.writer.write(request_bytes("POST", "/v1/chat/completions", stays, body))
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(answer_of(head).headers["content-length"])
        return answer_of(head + await self.reader.readexactly(length))


@asynccontextmanager
async def lines(gateways: Sequence[GatewayProcess], count: int) -> AsyncIterator[list[Line]]:
    """That many, as evenly as they go over the workers of all the gateways: neighbours are with different workers."""
    workers = [(gateway, pid) for gateway in gateways for pid in gateway.worker_pids()]
    found: list[list[Line]] = []
    async with AsyncExitStack() as stack:
        for number, (gateway, pid) in enumerate(workers):
            share = len(range(number, count, len(workers)))
            found.append(await _lines_to(gateway, pid, share))
            for line in found[-1]:
                stack.callback(line.writer.close)
        yield [line for turn in range(count) for of_one in found for line in of_one[turn : turn + 1]]


async def _lines_to(gateway: GatewayProcess, pid: int, count: int) -> list[Line]:
    others = [other for other in gateway.worker_pids() if other != pid]
    before = _connections(gateway, pid)
    _signal(others, signal.SIGSTOP)
    try:
        opened = [await asyncio.open_connection("127.0.0.1", gateway.port) for _ in range(count)]
        while _connections(gateway, pid) < before + count:
            await asyncio.sleep(0.005)
    finally:
        _signal(others, signal.SIGCONT)
    return [Line(pid, reader, writer) for reader, writer in opened]


def _connections(gateway: GatewayProcess, pid: int) -> int:
    """How many of its clients' connections a worker has accepted."""
    fields = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    port, established = f":{gateway.port:04X}", "01"
    inodes = {line[9] for line in fields if line[1].endswith(port) and line[3] == established}
    return len(_sockets(pid) & inodes)


def _sockets(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.add(link.readlink().name.removeprefix("socket:[").removesuffix("]"))
    return found


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


# --- keys, and who uses them


@dataclass
class Key:
    """A key of a gateway, and what a client sends with it."""

    gateway: GatewayProcess
    id: str
    headers: Mapping[str, str]

    @classmethod
    async def made(cls, gateway: GatewayProcess, user: str = "ann", **limits: object) -> Key:
        """`limits` are the flags of `gateway keys create`."""
        key_id, key = await asyncio.to_thread(gateway.create_key, user, **limits)
        return cls(gateway, key_id, {"authorization": f"Bearer {key}"})

    @property
    def subject(self) -> str:
        """The name of its account."""
        return f"key:{self.id}"

    async def ask(self, body: Any, **headers: str) -> Answer:
        return await post_chat(self.gateway.port, body, {**self.headers, **headers})

    async def ask_at_once(self, count: int, body: Any) -> list[Answer]:
        """Of all workers, on connections that are there before the first call."""
        async with lines([self.gateway], count) as found:
            return await asyncio.gather(*(line.ask(self.headers, body) for line in found))

    async def update(self, *flags: str) -> None:
        await asyncio.to_thread(self.gateway.run, "keys", "update", self.id, *flags)

    async def revoke(self) -> None:
        await asyncio.to_thread(self.gateway.run, "keys", "revoke", self.id)


@dataclass
class Run:
    """What came of many clients. `seconds` holds all of it; `pressed` is from the first reply to the last request."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    pressed: float = 0.0

    @property
    def admitted(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status == 200]

    @property
    def refused(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status != 200]


async def hammer(gateways: Sequence[GatewayProcess], key: Key, body: Any, seconds: float) -> Run:
    """`CLIENTS` that ask again and again, whatever they are told."""
    run = Run()
    async with lines(gateways, CLIENTS) as found:
        started = time.monotonic()
        first, last = float("inf"), started

        async def client(line: Line) -> None:
            nonlocal first, last
            while (now := time.monotonic()) < started + seconds:
                last = max(last, now)
                run.answers.append(await line.ask(key.headers, body))
                first = min(first, time.monotonic())
                await asyncio.sleep(PAUSE)

        await asyncio.gather(*map(client, found))
        run.seconds, run.pressed = time.monotonic() - started, last - first
    return run


async def held(key: Key, upstream: ScriptedUpstream, count: int, body: Any) -> list[asyncio.Task[Answer]]:
    """That many calls that have come to the upstream, which keeps them until `release`."""
    before = len(upstream.tally)
    calls = [asyncio.create_task(key.ask(body)) for _ in range(count)]
    there = asyncio.create_task(upstream.until(lambda tally: len(tally) >= before + count))
    await asyncio.wait([there, *calls], return_when=asyncio.FIRST_COMPLETED)
    refused = [call.result().body for call in calls if call.done()]
    assert not refused, refused
    await there
    return calls


async def most_at_once(upstream: ScriptedUpstream) -> int:
    """The most calls that were at the upstream at the same time, until this is cancelled."""
    most = 0

    def look(tally: list[Record]) -> bool:
        nonlocal most
        most = max(most, sum(record.outcome is None for record in tally))
        return False

    with suppress(asyncio.CancelledError):
        await upstream.until(look, timeout=3600)
    return most


# --- the book


@dataclass
class Book:
    """What the tables say of an account, once all that is over is entered: what its period has cost, the level of its
    bucket of tokens (in 60,000ths), and what running calls hold."""

    spent: int
    level: int
    slots: int
    tokens: int
    reserved: int

    @property
    def holds(self) -> tuple[int, int, int]:
        return self.slots, self.tokens, self.reserved


_BOOK = """
    SELECT
        COALESCE(SUM(CASE WHEN what = 0 THEN cost ELSE 0 END), 0) AS spent,
        COALESCE(SUM(level), 0) AS level,
        COALESCE(SUM(slots), 0) AS slots,
        COALESCE(SUM(tokens), 0) AS tokens,
        COALESCE(SUM(CASE WHEN what = 1 THEN cost ELSE 0 END), 0) AS reserved
    FROM (
        SELECT 0 AS what, tokens AS level, 0 AS slots, 0 AS tokens, spent_nanousd AS cost
        FROM limit_states WHERE subject = '{subject}'
        UNION ALL
        SELECT 0, 60000 * (tokens_held - tokens_used), -slots, -tokens_held, cost_nanousd
        FROM limit_settlements WHERE subject = '{subject}'
        UNION ALL
        SELECT 1, 0, 0, 0, -cost_held_nanousd FROM limit_settlements WHERE subject = '{subject}'
        UNION ALL
        SELECT 1, 0, slots, tokens, cost_nanousd FROM limit_holds WHERE subject = '{subject}') AS parts"""


async def book(gateway: GatewayProcess, subject: str) -> Book:
    [found] = await asyncio.to_thread(gateway.query, _BOOK.format(subject=subject))
    return Book(*(int(value) for value in found.values()))


async def settled_book(gateway: GatewayProcess, subject: str) -> Book:
    """Once nothing is held: what workers hold ahead goes back when nobody calls any more."""
    while (found := await book(gateway, subject)).holds != (0, 0, 0):
        await asyncio.sleep(0.05)
    return found


async def charged(gateway: GatewayProcess) -> tuple[int, int]:
    """Tokens and nano-dollars of all calls that were charged, by their rows."""
    sums = "COALESCE(SUM(input_tokens + output_tokens), 0) AS tokens, COALESCE(SUM(cost_nanousd), 0) AS cost"
    [row] = await asyncio.to_thread(gateway.query, f"SELECT {sums} FROM usage_rows WHERE charged = 1")
    return int(row["tokens"]), int(row["cost"])

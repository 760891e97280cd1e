"""A lane does what the long way does: the same streams, with it and without it, from the upstream's bytes to the
client's, step by step."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gateway.backends.client_protocol import Connection
from gateway.backends.client_reply import Reply
from gateway.backends.http import HTTPChunkStream
from gateway.backends.openai import OpenAIDecoder
from gateway.backends.transport import Timeouts
from gateway.errors import UpstreamError
from gateway.outbox import Outbox
from gateway.server_cycle import GatewayCycle
from gateway.server_flow import GatewayFlow, Outlet
from gateway.wire import WireError
from gateway.wire.chat import Chunk
from gateway.wire.lane import FindLane, Lane, Source
from gateway.wire.stream import ChatStream, StreamedError

SAMPLES = Path(__file__).parent.parent / "wire_samples"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
IDLE = 5.0
PAUSE, RESUME, LEAVE, RESET, APART = b"(pause)", b"(resume)", b"(leave)", b"(reset)", b"(apart)"
"""Steps beside the reads: the client takes no more, takes more, is gone, is found gone; chunks are taken apart."""

_MADE_UP = re.compile("call_[0-9a-f]{24}")


class Clock:
    """A loop whose time is told by the test."""

    def __init__(self) -> None:
        self.now = 1.0
        self._loop = asyncio.get_running_loop()
        self.call_soon = self._loop.call_soon
        self.create_future = self._loop.create_future

    def time(self) -> float:
        return self.now

    def call_at(self, at: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        return self._loop.call_later(3600, call)


class Transport:
    """What was written to a socket."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closing = False
        self.sock = socket.socket()

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, name: str) -> socket.socket:
        return self.sock

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class Owner:
    def released(self, connection: Connection) -> None: ...

    def dropped(self, connection: Connection, *, leased: bool) -> None: ...

    def closed(self, connection: Connection) -> None: ...


class Run:
    """One stream. `told`: what could be seen after each step."""

    def __init__(self, *, lane: bool, wants_usage: bool, version: str = "1.1") -> None:
        self.clock: Any = Clock()
        self.out: Any = Transport()
        outbox = Outbox(self.clock)
        self.flow = GatewayFlow(self.out, [])
        outlet = Outlet(self.out, outbox, lambda: None)
        scope: Any = {"type": "http", "method": "POST", "http_version": version}
        self.cycle = GatewayCycle(
            *(scope, outlet, self.flow, self.clock, [], lambda: None, {}), expect_100_continue=False, keep_alive=True
        )
        self.upstream: Any = Transport()
        self.connection = Connection(Owner(), self.clock, Outbox(self.clock))
        self.connection.connection_made(self.upstream)
        self.reply = self.connection.begin(b"", None, bodiless=False, timeouts=Timeouts(idle=IDLE), end=math.inf)
        self.stream = HTTPChunkStream(self.reply, OpenAIDecoder(), set())
        self.editor = ChatStream(wants_usage=wants_usage)
        self.find: FindLane | None = self._find if lane else None
        self.taken = 0
        self.failure = ""
        self.told: list[object] = []

    def _find(self, source: Source) -> Lane | None:
        lane = self.editor.lane(self.cycle.pass_chunk, source)

        def counted(data: bytes) -> bool:
            assert lane is not None
            took = lane(data)
            self.taken += took
            return took

        return None if lane is None else counted

    async def play(self, steps: Sequence[bytes | tuple[bytes, ...]]) -> None:
        """What stands together is done in one turn of the loop."""
        await self.cycle.send({"type": "http.response.start", "status": 200, "headers": []})
        task = asyncio.create_task(self._drive())
        for step in (HEAD, *steps):
            self.clock.now += 1.0
            for one in step if isinstance(step, tuple) else (step,):
                self._do(one)
            for _ in range(8):
                await asyncio.sleep(0)
            self.told.append(self._seen())
        self.flow.resume_writing()
        self.connection.connection_lost(None)
        await task
        self.upstream.sock.close()
        self.out.sock.close()

    def _do(self, step: bytes) -> None:
        if step == PAUSE:
            self.flow.pause_writing()
        elif step == RESUME:
            self.flow.resume_writing()
        elif step == LEAVE:
            self.cycle.disconnect()
            self.editor.pass_no_pieces()
        elif step == APART:
            self.editor.pass_no_pieces()
        elif step == RESET:
            self.out.closing = True
        else:
            self.connection.data_received(step)

    async def _drive(self) -> None:
        try:
            while True:
                chunks = await self.stream.read()
                if not chunks:
                    return
                leaving = self.editor.feed(chunks)
                if leaving:
                    await self.cycle.send({"type": "http.response.body", "body": leaving, "more_body": True})
                await self.stream.push(self._take, partial(self.editor.pass_piece, self.cycle.pass_on), self.find)
        except (StreamedError, WireError, UpstreamError) as failure:
            self.failure = f"{type(failure).__name__} {failure} {getattr(failure, 'log', '')}"

    def _take(self, chunks: Sequence[Chunk]) -> bool:
        leaving = self.editor.feed(chunks)
        return (not leaving or self.cycle.pass_on(leaving)) and self.editor.failure is None

    def _seen(self) -> object:
        editor, written = self.editor, b"".join(self.out.written).decode("latin-1")
        texts = [editor.answer.message(index) for index in editor.answer.indexes]
        until = self.reply.overdue(self.clock.now) if self.reply.status else 0
        times = self.cycle.passed_at, until
        written, texts = (_MADE_UP.sub("", text) for text in (written, repr(texts)))
        return written, texts, editor.answer.characters, editor.usage, self.failure, times, self.stream.complete


async def compare(steps: Sequence[bytes | tuple[bytes, ...]], **options: Any) -> Run:
    """The run with the lane, which has told the same as the one without."""
    options = {"wants_usage": False, **options}
    with_it, without = Run(lane=True, **options), Run(lane=False, **options)
    await with_it.play(steps)
    await without.play(steps)
    for place, (one, other) in enumerate(zip(with_it.told, without.told, strict=True)):
        assert one == other, (place, steps[max(0, place - 1)])
    assert with_it.failure == without.failure
    return with_it


def event(delta: object, **more: object) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    data = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps({**data, **more}, separators=(",", ":")).encode() + b"\n\n"


def framed(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


def stream_of(*events: bytes) -> list[bytes]:
    begin = event({"role": "assistant", "content": ""})
    return [framed(one) for one in (begin, *events)]


def texts(*texts: str, **more: object) -> list[bytes]:
    return [event({"content": text}, **more) for text in texts]


WORDS = ("one", "", "two words", "\u00fc", "\U0001f600", 'quo"te', "line\nend", "x" * 100, "x" * 3000, "one", "a\\b")
END = [*stream_of(event({}, usage=None))[1:], framed(b"data: [DONE]\n\n"), b"0\r\n\r\n"]


@pytest.mark.parametrize("more", [{}, {"usage": None}, {"obfuscation": "xyz"}, {"service_tier": "odd"}])
@pytest.mark.parametrize("wants_usage", [False, True])
async def test_usual_chunks(more: dict[str, object], wants_usage: bool) -> None:
    steps = [*stream_of(*texts(*WORDS, **more)), *END]
    run = await compare(steps, wants_usage=wants_usage)
    assert (run.taken >= 5) == ("service_tier" not in more)


@pytest.mark.parametrize("about", [{}, {"usage": None}])
@pytest.mark.parametrize("wants_usage", [False, True])
async def test_padding_of_any_length(about: dict[str, object], wants_usage: bool) -> None:
    lengths = (1, 7, 3, 12, 1, 40, 2, 2, 9, 14, 5)
    events = [
        event({"content": text}, **about, obfuscation="aZ0b"[:length] * length)
        for text, length in zip(WORDS, lengths, strict=True)
    ]
    run = await compare([*stream_of(*events), *END], wants_usage=wants_usage)
    assert run.taken == len(WORDS) - 1


@pytest.mark.parametrize("padding", [b"", b"-", b"a b", b'a","b":"c', b"\\u0061", b"\xc3\xbc", b"a\n", b'a"', b"a\\"])
@pytest.mark.parametrize("text", [b"b", b'b"},"finish_reason":null}],"obfuscation":"c', b'b\\"},"x":"', b"\\"])
async def test_padding_that_is_none(padding: bytes, text: bytes) -> None:
    [usual] = texts("text", obfuscation="padding")
    odd = usual.replace(b'"text"', b'"%b"' % text).replace(b'"padding"', b'"%b"' % padding)
    run = await compare([*stream_of(*[usual] * 4, odd, *[usual] * 4), *END])
    assert run.taken >= 3


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_only_an_answer_in_chunks_has_a_lane(version: str) -> None:
    run = await compare([*stream_of(*texts(*"abcdef")), *END], version=version)
    assert (run.taken > 0) == (version == "1.1")


ODD = [
    event({"content": "a"}, usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}),
    event({"content": "a"}).replace(b'"a"', b' "a"'),
    event({"content": "a"}).replace(b'"a"', b"12345"),
    event({"content": "a"}).replace(b'"a"', b'"\\ud83d"'),
    event({"content": "a"}).replace(b'"a"', b'"\xff"'),
    event({"content": "a"}).replace(b'"a"', b'"a\n"'),
    event({"content": "a"}).replace(b'"a"', b'"a","b":"c"'),
    event({"content": "a"}).replace(b'"a"', b'"'),
    event({"content": "a"}) + event({"content": "b"}),
    event({"content": "a"})[:-1],
    event({"content": "a"})[:40],
    b": a comment\n\n",
    event({"content": "a"}).replace(b"\n\n", b"\r\n\r\n"),
    event({"content": "a"}, error={"message": "broken"}),
    event({"reasoning_content": "thought"}),
    event({"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}]}),
    b'data: {"error":{"message":"overloaded"}}\n\n',
    b"data: no json\n\n",
    b"data: [DONE]\n\n",
]


PADDING: dict[str, object] = {"obfuscation": "aB3"}
PADDED = b',"obfuscation":"aB3"}\n\n'


@pytest.mark.parametrize("place", [3, 6])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("more", [{}, PADDING])
async def test_unusual_ones_between(odd: bytes, place: int, more: dict[str, object]) -> None:
    events = texts(*"abcdefgh", **more)
    events[place] = odd.replace(b"}\n\n", PADDED) if more else odd
    run = await compare([*stream_of(*events), *END])
    assert run.taken >= place - 2


READS: list[Callable[[bytes, bytes], bytes]] = [
    lambda a, abc: a * 2,
    lambda a, abc: a[:-1],
    lambda a, abc: b"0" + a,
    lambda a, abc: a.replace(b"\r\n", b";x=y\r\n", 1),
    lambda a, abc: a[:2].upper() + a[2:],
    lambda a, abc: abc.replace(b'abc"', b'ab"', 1),
    lambda a, abc: abc[:-2] + b"\n\n",
    lambda a, abc: abc.partition(b'"abc"')[0].ljust(len(abc) - 1, b'"') + b"x",
    lambda a, abc: abc.partition(b'abc"')[0].ljust(len(abc) - 1, b"x") + b'"',
    lambda a, abc: b"junk",
]


@pytest.mark.parametrize("more", [{}, PADDING])
@pytest.mark.parametrize("unusual", READS)
async def test_unusual_reads(unusual: Callable[[bytes, bytes], bytes], more: dict[str, object]) -> None:
    read = unusual(*map(framed, texts("a", "abc", **more)))
    run = await compare([*stream_of(*texts(*"abcd", **more)), read, *map(framed, texts(*"efgh", **more)), *END])
    assert run.taken >= 3


@pytest.mark.parametrize("steps", [[PAUSE], [LEAVE], [RESET], [RESET, LEAVE], [PAUSE, LEAVE], [PAUSE, RESUME]])
async def test_a_client_that_is_slow_or_gone(steps: list[bytes]) -> None:
    reads = [*stream_of(*texts(*"abcdefghijkl")), *END]
    for place in range(3, 9):
        for later in (1, 2, 4):
            played = list(reads)
            for number, step in enumerate(steps):
                played.insert(place + number * (later + 1), step)
            await compare(played)


async def test_what_comes_at_once_keeps_its_order() -> None:
    a, b, c, d = map(framed, texts(*"abcd"))
    run = await compare([*stream_of(*texts(*"xyz")), (a, a + b, c, d), (a, b), *END])
    assert run.taken == 2 + 2 + 2


async def test_arguments_of_a_tool_call_take_the_long_way() -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    pieces = [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]} for text in ('{"a"', ":", '"b', '"}')]
    run = await compare([*stream_of(event({"tool_calls": [call]}), *map(event, pieces)), *END])
    assert run.taken == 0


async def test_each_kind_of_chunk_has_its_lane() -> None:
    thoughts = [event({"reasoning_content": text}) for text in "efghij"]
    run = await compare([*stream_of(*texts(*"abcd"), *thoughts, *texts(*"klmnop")), *END])
    assert run.taken >= 3 + 4 + 4


@pytest.mark.parametrize("stop", [LEAVE, APART])
async def test_where_chunks_are_taken_apart_there_is_no_lane(stop: bytes) -> None:
    run = await compare([*stream_of(*texts(*"abcd")), stop, *map(framed, texts(*"efgh")), *END])
    assert run.taken == 3
    assert run.reply.lane is None


async def test_lengths_that_never_come_again() -> None:
    words = ["x" * dice for dice in range(1, 400)]
    run = await compare([*stream_of(*texts(*words)), *END])
    assert run.taken == 128


async def test_an_answer_may_be_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.wire.stream._MOST_CHARACTERS", 20)
    run = await compare([*stream_of(*texts(*["four"] * 8)), *END])
    assert run.taken == 4
    assert "longer than any answer" in run.failure


def recorded() -> Iterator[tuple[str, list[bytes]]]:
    for path in sorted(SAMPLES.glob("*.sse")):
        raw = path.read_bytes()
        events = [part for part in re.split(rb"(?<=\n\n)|(?<=\r\n\r\n)", raw) if part]
        yield path.name, [*map(framed, events), b"0\r\n\r\n"]


RECORDED = dict(recorded())


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("wants_usage", [False, True])
async def test_recorded_streams(name: str, wants_usage: bool) -> None:
    await compare(RECORDED[name], wants_usage=wants_usage)


@pytest.mark.parametrize("more", [{}, PADDING])
async def test_cut_at_every_byte(more: dict[str, object]) -> None:
    reads = [*stream_of(*texts("one", "two", "three", "four", usage=None, **more)), *END]
    wire = b"".join(reads)
    ends = [sum(map(len, reads[:count])) for count in range(len(reads) + 1)]
    for cut in range(ends[1], len(wire)):
        cuts = sorted({*ends, cut})
        await compare([wire[start:end] for start, end in pairwise(cuts)])


@pytest.mark.parametrize("name", RECORDED)
async def test_in_any_reads(name: str) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice, reads = random.Random(seed), RECORDED[name]
    usual = [*stream_of(*texts(*dice.choices(WORDS, k=12), **dice.choice(({}, PADDING)))), *reads]
    for _ in range(10):
        wire, steps, at = b"".join(usual), list[bytes](), 0
        ends = [sum(map(len, usual[:count])) for count in range(1, len(usual) + 1) if dice.random() < 0.9]
        for cut in sorted({*ends, *dice.choices(range(1, len(wire)), k=dice.randrange(4)), len(wire)}):
            steps.append(wire[at:cut])
            at = cut
            if dice.random() < 0.1:
                steps.append(dice.choice((PAUSE, RESUME, RESUME)))
        await compare(steps, wants_usage=dice.random() < 0.3)


async def test_silence_counts_from_what_a_lane_has_taken() -> None:
    run = Run(lane=True, wants_usage=False)
    playing = asyncio.create_task(run.play(stream_of(*texts(*"abcd"))))
    reply: Reply = run.reply
    while run.taken < 2:
        await asyncio.sleep(0)
    assert reply.overdue(run.clock.now) == run.clock.now + IDLE
    assert reply.overdue(run.clock.now + IDLE - 0.1) == run.clock.now + IDLE
    assert math.isinf(reply.overdue(run.clock.now + IDLE))
    await playing
    assert "silence for 5.0 s" in run.failure

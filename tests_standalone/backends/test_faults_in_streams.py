"""Streams that break or are written oddly, of the faults F71 to F84. The table of all faults is in test_faults.py."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import pytest

from tests_standalone.backends.faulty import (
    DONE,
    END,
    SSE,
    USAGE,
    Rig,
    delta,
    event,
    failed_midway,
    finish,
    framed,
    replying,
    whole,
)
from tests_standalone.backends.raw_upstream import Peer
from tests_standalone.system.http import Answer

TEXT = "Grüße, 世界! 👩‍👩‍👧‍👦 𝔘𝔫𝔦"
GZIPPED = SSE[:-2] + b"content-encoding: gzip\r\n\r\n"


def told(answer: Answer) -> str:
    """The text that a client puts together."""
    assert answer.events, (answer.status, answer.body)
    assert (answer.status, answer.clean_end, answer.events[-1]) == (200, True, "[DONE]")
    return "".join(choice["delta"].get("content") or "" for chunk in answer.events[:-1] for choice in chunk["choices"])


def unescaped(text: str) -> bytes:
    """The JSON of one chunk, its text in UTF-8."""
    return json.dumps(json.loads(delta(text)), ensure_ascii=False, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "bad",
    [b'{"id":"c","choices":[{"delta":{"content":"x"', b"{'id': 'c'}", b"\xff\xfe", b'{"choices":[]}{"a":1}', b"[1]",
     b'"text"', b"NaN", b"<html>"],
)  # fmt: skip
async def test_f71_a_chunk_that_is_no_json(rig: Rig, bad: bytes) -> None:
    """It never reaches a client, who may be strict; the answer ends there, and the failure is counted."""
    good = framed(event(delta("so far")))
    async with rig.first(replying(SSE + good, framed(event(bad)), framed(finish() + DONE) + END, pause=0.02)):
        answer = await rig.stream(rig.model())
    assert failed_midway(answer, "so far")["code"] == "upstream_error"
    assert bad not in answer.body
    (row,) = await rig.rows(answer)
    assert (row.status, row.charged, row.counted_by) == ("error", True, "gateway")
    assert await rig.stored(answer) == ("so far", "error")


@pytest.mark.parametrize("size", [1, 2, 3])
async def test_f72_utf_8_split_at_every_byte(rig: Rig, size: int) -> None:
    """In other writes, and in other HTTP chunks."""
    stream = event(unescaped(TEXT)) + finish() + DONE
    pieces = [framed(stream[n : n + size]) for n in range(0, len(stream), size)]
    async with rig.first(replying(SSE, *pieces, END)):
        answer = await rig.stream(rig.alone())
    assert told(answer) == TEXT
    assert TEXT.encode() in answer.body
    assert await rig.stored(answer) == (TEXT, "stop")


async def test_f72_utf_8_cut_by_every_two_writes(rig: Rig) -> None:
    stream = event(unescaped("é世👩")) + finish() + DONE
    start = stream.index("é".encode())
    for cut in range(start, start + len("é世👩".encode()) + 1):
        async with rig.first(replying(SSE + framed(stream[:cut]), framed(stream[cut:]) + END, pause=0.02)):
            answer = await rig.stream(rig.alone())
        assert told(answer) == "é世👩"


async def test_f73_a_surrogate_pair_in_two_deltas(rig: Rig) -> None:
    """Each half passes as the escape that it was; who puts the text together has the character."""
    halves = event(delta("smile: \ud83d")) + event(delta("\ude00!"))
    async with rig.first(replying(SSE, framed(halves + finish() + DONE) + END)):
        answer = await rig.stream(rig.alone())
    assert b"\\ud83d" in answer.body
    assert b"\\ude00" in answer.body
    text = told(answer).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    assert text == "smile: 😀!"
    assert await rig.stored(answer) == ("smile: 😀!", "stop")


@pytest.mark.parametrize("ends", [True, False], ids=["a line of 50 MB", "a line that never ends"])
async def test_f74_a_line_without_end(rig: Rig, ends: bool) -> None:
    sent = 0

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        peer.send(SSE + framed(event(delta("so far"))) + framed(b'data: {"id":"'))
        while not ends or sent < 50 << 20:
            peer.send(framed(b"a" * (1 << 16)))
            sent += 1 << 16
            await peer.drained()
        peer.send(framed(b'"}\n\n' + finish() + DONE) + END)

    before = rig.resident()
    async with rig.first(script):
        answer = await rig.stream(rig.alone())
    assert failed_midway(answer, "so far")["code"] == "upstream_error"
    assert sent < 20 << 20, "it is cut at 1 MiB; the rest is what sockets hold"
    assert rig.resident() - before < 16 << 20


class TestF79:
    """Identity is asked for; what comes compressed all the same is read."""

    STREAM = event(delta("packed")) + finish() + DONE

    async def test_f79_a_stream_flushed_at_each_event(self, rig: Rig) -> None:
        packer, pieces = zlib.compressobj(wbits=31), []
        for part in self.STREAM.split(b"\n\n")[:-1]:
            pieces.append(framed(packer.compress(part + b"\n\n") + packer.flush(zlib.Z_SYNC_FLUSH)))
        async with rig.first(replying(GZIPPED, *pieces, framed(packer.flush()) + END, pause=0.01)) as first:
            answer = await rig.stream(rig.alone())
        assert b"\r\naccept-encoding: identity\r\n" in first.peers[0].head
        assert told(answer) == "packed"

    @pytest.mark.parametrize("coding", ["gzip", "deflate"])
    async def test_f79_a_stream_flushed_late(self, rig: Rig, coding: str) -> None:
        packed = gzip.compress(self.STREAM) if coding == "gzip" else zlib.compress(self.STREAM)
        head = GZIPPED.replace(b"encoding: gzip", b"encoding: " + coding.encode())
        async with rig.first(replying(head, *[framed(bytes([byte])) for byte in packed], END)):
            answer = await rig.stream(rig.alone())
        assert told(answer) == "packed"

    @pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
    async def test_f79_a_bomb(self, rig: Rig, stream: bool) -> None:
        bomb = gzip.compress(b" " * (512 << 20), 9)
        before = rig.resident()
        more = "content-encoding: gzip"
        kind = "text/event-stream" if stream else "application/json"
        async with rig.first(replying(whole(bomb, kind, "200 OK", more))) as first:
            answer = await rig.chat(rig.alone(), stream=stream)
            assert len(first.peers) == 1
        assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_error")
        assert rig.resident() - before < 80 << 20

    async def test_f79_cut_short(self, rig: Rig) -> None:
        packer = zlib.compressobj(wbits=31)
        packed = packer.compress(self.STREAM[:-30]) + packer.flush(zlib.Z_SYNC_FLUSH)
        async with rig.first(replying(GZIPPED, framed(packed) + END)):
            answer = await rig.stream(rig.alone())
        assert failed_midway(answer, "packed")["code"] == "upstream_error"


AFTER_THE_END = [DONE, event(delta("late")), event(delta("late")) + DONE, b"data: {", event(b'{"error":"x"}'), b"x"]


@pytest.mark.parametrize("after", AFTER_THE_END)
@pytest.mark.parametrize("apart", [False, True], ids=["at once", "later"])
async def test_f81_one_end_whatever_follows(rig: Rig, after: bytes, apart: bool) -> None:
    pieces = [SSE + framed(event(delta("one")) + finish() + DONE), framed(after) + END]
    async with rig.first(replying(*(pieces if apart else [b"".join(pieces)]), pause=0.05)) as first:
        for number in range(3):
            answer = await rig.stream(rig.alone())
            assert told(answer) == "one"
            assert answer.events.count("[DONE]") == 1
            (row,) = await rig.rows(answer)
            assert (row.status, row.tokens, row.counted_by) == ("ok", (3, 2), "upstream")
            assert len(first.peers) == number + 1, "who sends more than an answer is not trusted with another call"
            await asyncio.sleep(0.15 if apart else 0)


async def test_f81_blank_lines_after_the_end_are_harmless(rig: Rig) -> None:
    stream = event(delta("one")) + finish() + DONE + b"\n\r\n\n"
    async with rig.first(replying(SSE, framed(stream), END)) as first:
        for _ in range(3):
            assert told(await rig.stream(rig.alone())) == "one"
            await asyncio.sleep(0.1)
        assert len(first.peers) == 1


LATER = {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
END_OF_TEXT = event(delta(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]))


def used(usage: Any) -> bytes:
    return event(delta(choices=[], usage=usage))


@pytest.mark.parametrize(
    ("events", "tokens", "by"),
    [
        (event(delta("a b")) + END_OF_TEXT, None, "gateway"),
        (event(delta("a b")) + END_OF_TEXT + used(None), None, "gateway"),
        (event(delta("a b")) + finish(USAGE) + used(LATER), (3, 9), "upstream"),
        (event(delta("a b", usage=USAGE)) + finish(LATER), (3, 9), "upstream"),
        (used(USAGE) + event(delta("a b")) + END_OF_TEXT, (3, 2), "upstream"),
        (event(delta("a b")) + used(USAGE) + END_OF_TEXT, (3, 2), "upstream"),
    ],
    ids=["missing", "null", "repeated", "running", "before the text", "before the end"],
)
async def test_f82_usage(rig: Rig, events: bytes, tokens: tuple[int, int] | None, by: str) -> None:
    async with rig.first(replying(SSE + framed(events + DONE) + END)):
        asked = await rig.stream(rig.alone(), stream_options={"include_usage": True})
        plain = await rig.stream(rig.alone())
    for answer in (asked, plain):
        assert told(answer) == "a b"
        (row,) = await rig.rows(answer)
        assert (row.status, row.counted_by) == ("ok", by)
        assert row.tokens == tokens if tokens else row.tokens[0] > 0 < row.tokens[1]
        shown = [chunk["usage"] for chunk in answer.events[:-1] if chunk.get("usage")]
        assert [(usage["prompt_tokens"], usage["completion_tokens"]) for usage in shown] == [row.tokens]


@pytest.mark.parametrize(
    "error",
    [
        b'data: {"error":{"message":"it broke","type":"server_error","code":"oh"}}\n\n',
        b'event: error\ndata: {"error":{"message":"it broke"}}\n\n',
        b'event: error\ndata: {"message":"it broke"}\n\n',
        b'data: {"error":"it broke"}\n\n',
        event(delta(choices=[], error={"message": "it broke", "code": 502})),
    ],
)
async def test_f83_an_error_in_the_stream(rig: Rig, error: bytes) -> None:
    """One error event, and nothing of what follows it."""
    rest = framed(error + event(delta("late")) + finish() + DONE) + END
    async with rig.first(replying(SSE + framed(event(delta("so far"))), rest, pause=0.02)):
        answer = await rig.stream(rig.model())
    assert failed_midway(answer, "so far")["message"] == "it broke"
    assert set(answer.events[-1]["error"]) == {"message", "type", "param", "code"}
    (row,) = await rig.rows(answer)
    assert (row.status, row.charged) == ("error", True)
    assert await rig.stored(answer) == ("so far", "error")


def split_over_lines(payload: bytes) -> bytes:
    lines = json.dumps(json.loads(payload), indent=1).encode().split(b"\n")
    return b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"


EVENTS = (event(delta("a\u2028b")) + finish()).replace(b"\\u2028", "\u2028".encode()) + DONE


@pytest.mark.parametrize(
    "stream",
    [
        b": hello\n\n" + EVENTS.replace(b"\n\n", b"\n\n: ping\n\n:\n"),
        EVENTS.replace(b"\n", b"\r"),
        EVENTS.replace(b"\n", b"\r\n"),
        EVENTS.replace(b"\n\n", b"\r\n\n"),
        b"\xef\xbb\xbf" + EVENTS,
        b"".join(split_over_lines(part[6:]) for part in EVENTS.split(b"\n\n")[:-2]) + DONE,
        EVENTS.replace(b"data: ", b"data:"),
        EVENTS.replace(b"data: ", b"event: message\nid: 7\nretry: 10\nfoo: bar\ndata: "),
        b"\n\n\n" + EVENTS.replace(b"\n\n", b"\n\n\n\n"),
        EVENTS[:-2],
    ],
    ids=["comments", "CR", "CRLF", "mixed", "BOM", "lines", "no space", "fields", "blank lines", "no last end"],
)
async def test_f84_the_rules_of_sse(rig: Rig, stream: bytes) -> None:
    async with rig.first(replying(SSE, *[framed(stream[n : n + 7]) for n in range(0, len(stream), 7)], END)):
        answer = await rig.stream(rig.alone())
    assert told(answer) == "a\u2028b"
    assert answer.body.count(b"\n\n") == len(answer.events)
    assert answer.body.count(b"\r") == 0
    (row,) = await rig.rows(answer)
    assert (row.status, row.tokens) == ("ok", (3, 2))


async def test_f84_a_pause_at_a_cr_is_no_second_line_end(rig: Rig) -> None:
    stream = EVENTS.replace(b"\n", b"\r\n")
    pieces = [piece + b"\r" for piece in stream.split(b"\r")]
    pieces[-1] = pieces[-1][:-1]
    async with rig.first(replying(SSE, *[framed(piece) for piece in pieces if piece], END, pause=0.005)):
        answer = await rig.stream(rig.alone())
    assert told(answer) == "a\u2028b"

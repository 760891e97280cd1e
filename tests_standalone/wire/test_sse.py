"""Server-sent events by example: these bytes in, these payloads out, wherever the network cuts them."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire import WireError, sse
from gateway.wire.sse import NOTHING, SSEDecoder, encode
from tests_standalone.wire_samples import sample

DONE = b"[DONE]"
GRAMMAR = {
    "crlf": [b'{"a":1}', b'{"b":2}', DONE],
    "cr": [b'{"a":1}', b'{"b":2}', DONE],
    "mixed_ends": [b'{"a":1}', b'{"b":2}', DONE],
    "bom": [b'{"a":1}', b"\xef\xbb\xbf", DONE],
    "comments": [b'{"a":1}', b'{"b":2}', DONE],
    "multiline": [b'{\n  "a": 1\n}', b"\n", DONE],
    "no_space": [b'{"a":1}', b' {"b":2}', DONE],
    "other_fields": [b'{"a":1}', DONE],
    "unusual_text": ['{"t":"a\u2028b\u2029c\x85"}'.encode(), '{"t":"👩‍💻🇨🇭é"}'.encode(), DONE],
    "no_last_blank_line": [b'{"a":1}', b'{"b":2}'],
    "done_without_line_end": [b'{"a":1}', DONE],
}
VENDORS = {
    "openai_text": 9,
    "openai_tool_calls": 9,
    "deepseek": 7,
    "llama_cpp": 5,
    "two_choices": 9,
    "openrouter_error": 2,
}


def decode(*pieces: bytes, max_line: int = sse.MAX_LINE) -> list[bytes]:
    decoder = SSEDecoder(max_line)
    return [payload for piece in pieces for payload in decoder.feed(piece)] + decoder.flush()


def by_the_book(stream: bytes) -> list[bytes]:
    """The grammar once more, as slowly as it is written in the standard. The last line must be ended."""
    payloads: list[bytes] = []
    data: list[bytes] = []
    for line in re.split(rb"\r\n|\r|\n", stream.removeprefix(b"\xef\xbb\xbf"))[:-1]:
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
        if not line and data:
            payloads.append(b"\n".join(data))
            data = []
    return payloads + ([b"\n".join(data)] if data else [])


@pytest.mark.parametrize(("name", "payloads"), GRAMMAR.items(), ids=list(GRAMMAR))
def test_the_grammar(name: str, payloads: list[bytes]) -> None:
    assert decode(sample(name)) == payloads


@pytest.mark.parametrize(("name", "count"), VENDORS.items(), ids=list(VENDORS))
def test_what_vendors_send(name: str, count: int) -> None:
    payloads = decode(sample(name))
    assert len(payloads) == count
    assert all(json.loads(payload) for payload in payloads if payload != DONE)


@pytest.mark.parametrize("name", [*GRAMMAR, *VENDORS])
def test_a_cut_at_any_byte_changes_nothing(name: str) -> None:
    stream = sample(name)
    whole = decode(stream)
    for cut in range(len(stream) + 1):
        assert decode(stream[:cut], stream[cut:]) == whole, cut


@pytest.mark.parametrize("name", GRAMMAR)
def test_two_cuts_at_any_bytes_change_nothing(name: str) -> None:
    stream = sample(name)
    whole = decode(stream)
    for one, two in itertools.combinations_with_replacement(range(len(stream) + 1), 2):
        assert decode(stream[:one], stream[one:two], stream[two:]) == whole, (one, two)


@pytest.mark.parametrize("name", [*GRAMMAR, *VENDORS])
def test_byte_by_byte_changes_nothing(name: str) -> None:
    stream = sample(name)
    assert decode(*(bytes([byte]) for byte in stream)) == decode(stream)


@pytest.mark.parametrize("name", [*GRAMMAR, *VENDORS])
def test_empty_pieces_change_nothing(name: str) -> None:
    stream = sample(name)
    pieces = [piece for byte in stream for piece in (b"", bytes([byte]), b"")]
    assert decode(*pieces) == decode(stream)


_SHARDS = st.sampled_from(
    [b"data: ", b"data:", b"data", b"x", b" ", b":", b"\n", b"\n\n", b"\r", b"\r\n", b"\xef\xbb\xbf"]
)


@given(st.lists(st.lists(_SHARDS, max_size=6).map(b"".join), max_size=6))
def test_any_stream_in_any_pieces_is_read_by_the_book(pieces: list[bytes]) -> None:
    assert decode(*pieces, b"\n") == by_the_book(b"".join(pieces) + b"\n")


def test_a_payload_comes_with_the_byte_that_completes_it() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: 1\n") == []
    assert decoder.feed(b"\ndata: 2\n\nda") == [b"1", b"2"]
    assert decoder.feed(b"ta: 3\r\n\r") == [b"3"]
    assert decoder.feed(b"\n") == []


class TestLimits:
    def test_a_line_that_never_ends(self) -> None:
        with pytest.raises(WireError, match="longer than 100 bytes"):
            decode(*[b"x"] * 101, max_line=100)

    @pytest.mark.parametrize("ended", [b"\n\n", b"\r\r", b"\n: comment\n\n"])
    def test_a_long_line_in_one_piece(self, ended: bytes) -> None:
        with pytest.raises(WireError, match="line is longer"):
            decode(b"data: " + b"x" * 95 + ended, max_line=100)
        assert decode(b"data: " + b"x" * 94 + ended, max_line=100) == [b"x" * 94]

    def test_a_long_line_behind_whole_events(self) -> None:
        with pytest.raises(WireError, match="line is longer"):
            decode(b"data: 1\n\ndata: " + b"x" * 200 + b"\n\n", max_line=100)

    def test_an_event_of_many_lines(self) -> None:
        with pytest.raises(WireError, match="event is longer"):
            decode(*[b"data: 123456789\n"] * 11, max_line=100)

    @pytest.mark.parametrize("line", [b"data\n", b"data:\n", b"data: \n"])
    def test_an_event_of_empty_lines(self, line: bytes) -> None:
        with pytest.raises(WireError, match="event is longer"):
            decode(*[line] * 101, max_line=100)

    def test_each_event_counts_anew(self) -> None:
        assert len(decode(*[b"data: 12345678\ndata: 12345678\n\n"] * 100, max_line=20)) == 100

    def test_comments_are_not_kept(self) -> None:
        assert decode(*[b": comment of some length\n"] * 1000, b"data: 1\n\n", max_line=50) == [b"1"]

    def test_a_mebibyte_is_the_limit_unless_said_otherwise(self) -> None:
        line = b"data: " + b"x" * ((1 << 20) - 6)
        assert len(decode(line + b"\n\n")) == 1
        with pytest.raises(WireError):
            decode(line + b"x\n\n")


class TestFlush:
    @pytest.mark.parametrize(
        ("left", "payloads"),
        [
            (b"data: 1\n", [b"1"]),
            (b"data: 1\r", [b"1"]),
            (b"data: 1\ndata: 2\n", [b"1\n2"]),
            (b"data: 1", []),
            (b'data: {"cut', []),
            (b"data: [DONE]", [DONE]),
            (b"data:[DONE]", [DONE]),
            (b"data: [DONE] ", [DONE]),
            (b"data: [DON", []),
            (b": comment", []),
            (b"\xef\xbb", []),
            (b"", []),
        ],
    )
    def test_what_is_left_at_the_end(self, left: bytes, payloads: list[bytes]) -> None:
        decoder = SSEDecoder()
        assert decoder.feed(left) == []
        assert decoder.flush() == payloads
        assert decoder.flush() == []


class TestEncode:
    @pytest.mark.parametrize(
        ("payloads", "stream"),
        [
            ([], b""),
            ([b"{}"], b"data: {}\n\n"),
            ([b'{"a":1}', DONE], b'data: {"a":1}\n\ndata: [DONE]\n\n'),
            ([b'{\n"a":\n1}', b"{}"], b'data: { "a": 1}\n\ndata: {}\n\n'),
        ],
    )
    def test_one_line_for_each_payload(self, payloads: list[bytes], stream: bytes) -> None:
        assert encode(payloads) == stream

    @pytest.mark.parametrize("name", [*GRAMMAR, *VENDORS])
    def test_round_trip_of_what_was_read(self, name: str) -> None:
        payloads = decode(sample(name))
        assert decode(encode(payloads)) == [payload.replace(b"\n", b" ") for payload in payloads]

    @given(st.lists(st.binary().map(lambda data: re.sub(rb"[\r\n]", b"", data))))
    def test_round_trip_of_any_lines(self, payloads: list[bytes]) -> None:
        assert decode(encode(payloads)) == payloads

    def test_a_ping_between_events_is_no_event(self) -> None:
        assert decode(sse.PING + encode([b"1"]) + sse.PING + sse.PING + encode([DONE])) == [b"1", DONE]


@pytest.mark.parametrize(
    ("before", "may"),
    [
        ([], False),
        ([b"data: 1\n\n"], True),
        ([b"data: 1\n\ndata: 2\n\n"], True),
        ([b"data: 1\n\n", b"da", b"ta: 2\n\n"], True),
        ([b"data: 1\n\nd"], False),
        ([b"data: 1\n"], False),
        ([b"data: 1\r\n\r\n"], True),
        ([b"data: 1\r\r"], False),
        ([b"data: 1\n\n", b": ping\n"], True),
        ([b"\xef\xbb\xbfdata: 1\n\n"], True),
        ([b"\xef\xbb", b"\xbfdata: 1\n\n"], True),
        ([b"\xef\xbb"], False),
        ([b"data: 1\n\n", b"data: 2\r"], False),
    ],
)
def test_whole_events_may_be_read_by_others_where_nothing_waits(before: list[bytes], may: bool) -> None:
    decoder = SSEDecoder(max_line=20)
    for piece in before:
        decoder.feed(piece)
    assert (len(b"data: 3\n\n") <= decoder.may_pass) is may
    assert decoder.may_pass == (20 if may else NOTHING), "what is longer may be too long"
    assert decoder.feed(b"data: 3\n\n") or not may

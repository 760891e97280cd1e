"""Lines by example: these bytes in, these lines out, wherever the network cuts them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire import WireError
from gateway.wire.ndjson import MAX_LINE, NDJSONDecoder

EXAMPLES = [
    (b'{"a":1}\n{"b":2}\n', [b'{"a":1}', b'{"b":2}']),
    (b'{"a":1}\r\n{"b":2}\r\n', [b'{"a":1}', b'{"b":2}']),
    (b'{"a":1}\n{"b":2}', [b'{"a":1}', b'{"b":2}']),
    (b'{"a":1}\r\n{"b":2}\r', [b'{"a":1}', b'{"b":2}']),
    (b'\n\r\n \n{"a":1}\n\n\t\n', [b'{"a":1}']),
    (b' {"a" : 1}\t\n', [b'{"a" : 1}']),
    ('{"t":"a\u2028b\x85c"}\n'.encode(), ['{"t":"a\u2028b\x85c"}'.encode()]),
    (b"1\r2\n", [b"1\r2"]),
    (b"\xff\xfe\n", [b"\xff\xfe"]),
    (b"", []),
]


def decode(*pieces: bytes, max_line: int = MAX_LINE) -> list[bytes]:
    decoder = NDJSONDecoder(max_line)
    return [line for piece in pieces for line in decoder.feed(piece)] + decoder.flush()


@pytest.mark.parametrize(("stream", "lines"), EXAMPLES)
def test_lines(stream: bytes, lines: list[bytes]) -> None:
    assert decode(stream) == lines


@pytest.mark.parametrize(("stream", "lines"), EXAMPLES)
def test_two_cuts_at_any_bytes_change_nothing(stream: bytes, lines: list[bytes]) -> None:
    for one, two in itertools.combinations_with_replacement(range(len(stream) + 1), 2):
        assert decode(stream[:one], stream[one:two], stream[two:]) == lines, (one, two)


@given(st.lists(st.lists(st.sampled_from([b"x", b"\n", b"\r", b" ", b"{}", b"\xc3"]), max_size=6).map(b"".join)))
def test_any_pieces_are_read_as_one(pieces: list[bytes]) -> None:
    assert decode(*pieces) == decode(b"".join(pieces))
    assert decode(*pieces) == [line for each in b"".join(pieces).split(b"\n") if (line := each.strip(b" \t\r"))]


def test_a_line_comes_with_the_byte_that_ends_it() -> None:
    decoder = NDJSONDecoder()
    assert decoder.feed(b"1") == []
    assert decoder.feed(b"2\n3\n4") == [b"12", b"3"]
    assert decoder.feed(b"\n") == [b"4"]
    assert decoder.flush() == []


def test_flush_gives_the_last_line_once() -> None:
    decoder = NDJSONDecoder()
    assert decoder.feed(b'{"a"') == []
    assert decoder.flush() == [b'{"a"']
    assert decoder.flush() == []


class TestLimits:
    def test_a_line_that_never_ends(self) -> None:
        with pytest.raises(WireError, match="longer than 100 bytes"):
            decode(*[b"x"] * 101, max_line=100)
        assert decode(*[b"x"] * 100, max_line=100) == [b"x" * 100]

    @pytest.mark.parametrize("pieces", [(b"x" * 101 + b"\n",), (b"1\n" + b"x" * 101,), (b"x" * 60, b"x" * 41 + b"\n1")])
    def test_a_long_line(self, pieces: tuple[bytes, ...]) -> None:
        with pytest.raises(WireError, match="a line is longer"):
            decode(*pieces, max_line=100)

    def test_each_line_counts_anew(self) -> None:
        assert len(decode(*[b"x" * 60, b"x" * 40 + b"\n"] * 100, max_line=100)) == 100

    def test_the_limit_unless_said_otherwise(self) -> None:
        assert len(decode(b"x" * MAX_LINE + b"\n")) == 1
        with pytest.raises(WireError):
            decode(b"x" * (MAX_LINE + 1))

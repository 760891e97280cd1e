"""Newline-delimited JSON, read a piece at a time and byte-exact.

A line ends with LF; white space around it, the CR of a CRLF included, is no part of it, and empty lines are dropped.
U+2028 and a lone CR end nothing. Lines stay bytes: a UTF-8 character cut in half by the network never becomes text
here. The last line may lack its end: it is what `flush` gives.
"""

from __future__ import annotations

from gateway.wire import WireError

MAX_LINE = 4 << 20
_SPACE = b" \t\r"


class NDJSONDecoder:
    """`feed` bytes as they come, get the lines that they complete.

    Raises WireError when a line grows past `max_line` bytes.
    """

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max = max_line
        self._parts: list[bytes] = []
        self._waiting = 0

    def feed(self, piece: bytes) -> list[bytes]:
        *ended, rest = piece.split(b"\n")
        if ended:
            ended[0] = b"".join((*self._parts, ended[0]))
            self._parts, self._waiting = [], 0
        if rest:
            self._parts.append(rest)
            self._waiting += len(rest)
        self._check(max(self._waiting, *map(len, ended)) if ended else self._waiting)
        return [line for each in ended if (line := each.strip(_SPACE))]

    def flush(self) -> list[bytes]:
        """The line that lacked its end, when the stream has ended."""
        rest = b"".join(self._parts).strip(_SPACE)
        self._parts, self._waiting = [], 0
        return [rest] if rest else []

    def _check(self, size: int) -> None:
        if size > self._max:
            raise WireError(f"a line is longer than {self._max} bytes")

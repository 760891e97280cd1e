"""Server-sent events, read a piece at a time and byte-exact (WHATWG HTML, section 9.2.6).

A line ends with CR, LF or CRLF and with nothing else: U+2028 is data. A byte order mark at the very start is skipped.
Comments are dropped. Several `data` lines make one payload, joined by LF. An event counts once its blank line has
come; what is left when the stream ends is `flush`ed by those who tolerate servers that forget it.

Payloads stay bytes: a UTF-8 character cut in half by the network never becomes text here.
"""

from __future__ import annotations

from gateway.wire import WireError

BOM = b"\xef\xbb\xbf"
DONE = b"[DONE]"
_CR, _LF = b"\r\n"
_DATA, _BLANK = b"data: ", b"\n\n"
"""A usual event is one line that begins so, and ends so."""
PING = b": ping\n"
MAX_LINE = 1 << 20
NOTHING = -1
"""Not even a piece of no bytes."""


class SSEDecoder:
    """`feed` bytes as they come, get the payloads of the events that they complete.

    Raises WireError when a line, or all data lines of one event, grow past `max_line` bytes.
    """

    __slots__ = ("_after_cr", "_data", "_max", "_parts", "_size", "_start", "_waiting", "may_pass")

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max = max_line
        self._parts: list[bytes] = []
        self._waiting = 0
        self._data: list[bytes] = []
        self._size = 0
        self._start = True
        self._after_cr = False
        self.may_pass = NOTHING
        """Pieces of up to so many bytes may be read by somebody who knows them for whole events, instead of by us:
        nothing of an earlier event waits here, nor does the beginning of the stream, and none of these can be too
        long."""

    @property
    def waiting(self) -> bool:
        """Has the beginning of an event come, and not its end?"""
        return bool(self._parts or self._data)

    def feed(self, piece: bytes) -> list[bytes]:
        if self.may_pass != NOTHING or (self._start and not self._parts):
            payloads = self._whole_events(piece)
            if payloads is not None:
                self._start, self.may_pass = False, self._max
                return payloads
        self.may_pass = NOTHING
        payloads = self._lines(piece)
        if not (self._parts or self._data or self._start or self._after_cr):
            self.may_pass = self._max
        return payloads

    def flush(self) -> list[bytes]:
        """The event that was complete but for its blank line, when the stream has ended."""
        self.may_pass = NOTHING
        rest = b"".join(self._parts).strip()
        if rest in (b"data: " + DONE, b"data:" + DONE):
            self._line(rest)
        self._parts = []
        return self._dispatch()

    def _whole_events(self, piece: bytes) -> list[bytes] | None:
        """The usual case, without looking at lines: whole events of one `data: ` line each, ended by LF LF."""
        if piece[-2:] != _BLANK or _CR in piece:
            return None
        if piece.find(_LF) == len(piece) - 2 <= self._max and piece[:6] == _DATA:
            return [piece[6:-2]]
        payloads: list[bytes] = []
        for event in piece[:-2].split(_BLANK):
            if not event.startswith(_DATA) or _LF in event or len(event) > self._max:
                return None
            payloads.append(event[6:])
        return payloads

    def _lines(self, piece: bytes) -> list[bytes]:
        if not self._start and b"\n" not in piece and b"\r" not in piece:
            self._wait_for_rest(piece)
            return []
        text = b"".join((*self._parts, piece))
        self._parts, self._waiting = [], 0
        if self._start:
            if len(text) < 3 and BOM.startswith(text):
                self._parts = [text]
                return []
            self._start = False
            text = text.removeprefix(BOM)
        if self._after_cr and text:
            self._after_cr = False
            text = text.removeprefix(b"\n")
        # A CR at the end is a line end already; the LF that may belong to it is skipped above, at the next piece.
        self._after_cr = self._after_cr or text.endswith(b"\r")
        lines = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        rest = lines.pop()
        payloads: list[bytes] = []
        for line in lines:
            if line:
                self._line(line)
            else:
                payloads += self._dispatch()
        self._wait_for_rest(rest)
        return payloads

    def _wait_for_rest(self, piece: bytes) -> None:
        if piece:
            self._after_cr = False
            self._parts.append(piece)
            self._waiting += len(piece)
        if self._waiting > self._max:
            raise WireError(f"an event line is longer than {self._max} bytes")

    def _line(self, line: bytes) -> None:
        if len(line) > self._max:
            raise WireError(f"an event line is longer than {self._max} bytes")
        if line == b"data":
            line = b"data:"
        if line.startswith(b"data:"):
            value = line[6:] if line.startswith(b"data: ") else line[5:]
            self._size += len(value) + 1
            if self._size > self._max:
                raise WireError(f"an event is longer than {self._max} bytes")
            self._data.append(value)

    def _dispatch(self) -> list[bytes]:
        if not self._data:
            return []
        payload = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data = []
        self._size = 0
        return [payload]


def encode(payloads: list[bytes]) -> bytes:
    """Events of one `data` line each. JSON that came over several lines is joined by spaces, which JSON allows."""
    if not payloads:
        return b""
    if len(payloads) == 1 and _LF not in payloads[0]:
        return b"data: %b\n\n" % payloads[0]
    body = b"\n\ndata: ".join(payloads)
    if body.count(b"\n") != 2 * (len(payloads) - 1):
        body = b"\n\ndata: ".join(payload.replace(b"\n", b" ") for payload in payloads)
    return b"data: " + body + b"\n\n"

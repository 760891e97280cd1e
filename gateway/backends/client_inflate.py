"""Replies that come compressed although identity was asked for: gzip and deflate, read with a bound.

One `read` expands to at most a piece; the whole to at most `MAX_RATIO` times what came, beyond the first mebibyte.
"""

from __future__ import annotations

import zlib

from gateway.backends.client_reply import Reply, broken, read_whole

PIECE = 1 << 16
FREE = 1 << 20
MAX_RATIO = 200
ENCODINGS = frozenset({"gzip", "x-gzip", "deflate"})
_EITHER = 32 + zlib.MAX_WBITS
"""zlib's own word for gzip or zlib, whichever its header says."""


class Inflater:
    """Pure. Raises ValueError for what is not compressed as told, is cut short, or expands beyond all measure."""

    def __init__(self, encoding: str) -> None:
        self._gzip = encoding != "deflate"
        self._stream = zlib.decompressobj(_EITHER) if self._gzip else None
        self._waiting = b""
        self._more = False
        self._came = 0
        self._made = 0

    def feed(self, piece: bytes) -> None:
        self._came += len(piece)
        self._waiting += piece

    def take(self) -> bytes:
        """The next bytes, not more than a piece; empty: feed more."""
        while not self.dry():
            found = self._step()
            self._more = len(found) == PIECE
            self._made += len(found)
            if self._made > FREE and self._made > self._came * MAX_RATIO:
                raise ValueError(f"{self._came} bytes expand to more than {self._made}")
            if found:
                return found
        return b""

    def dry(self) -> bool:
        """Has all been taken that was fed?"""
        return not (self._waiting or self._more)

    def end(self) -> None:
        if self._came and (self._stream is None or not self._stream.eof):
            raise ValueError("the compressed reply is cut short")

    def _step(self) -> bytes:
        if self._stream is None:
            self._stream = zlib.decompressobj(_EITHER if _has_zlib_header(self._waiting) else -zlib.MAX_WBITS)
        elif self._stream.eof and self._waiting:
            if not self._gzip:
                raise ValueError("bytes follow the compressed reply")
            self._stream = zlib.decompressobj(_EITHER)
        try:
            found = self._stream.decompress(self._waiting, PIECE)
        except zlib.error as failure:
            raise ValueError(str(failure)) from None
        self._waiting = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
        return found


def _has_zlib_header(data: bytes) -> bool:
    """Servers call the bare stream deflate as well as the one with zlib's two bytes before it."""
    return data[0] & 0x0F == 8 and (len(data) == 1 or (data[0] << 8 | data[1]) % 31 == 0)


class InflatedReply:
    """A reply whose body is inflated while it is read."""

    def __init__(self, reply: Reply, encoding: str) -> None:
        self.status = reply.status
        self.headers = reply.headers
        self._reply = reply
        self._inflater = Inflater(encoding)

    async def read(self) -> bytes:
        try:
            while not (found := self._inflater.take()):
                piece = await self._reply.read()
                if not piece:
                    self._inflater.end()
                    break
                self._inflater.feed(piece)
        except ValueError as failure:
            self.close()
            raise broken(str(failure)) from None
        return found

    async def read_all(self, limit: int) -> bytes:
        return await read_whole(self, limit)

    def at_end(self) -> bool:
        return self._reply.at_end() and self._inflater.dry()

    def close(self) -> None:
        self._reply.close()

    def distrust(self) -> None:
        self._reply.distrust()

"""The mock upstream, a process of its own: one answer after 20 ms, or a stream of chunks 5 ms apart.

It must cost far less than anything that is measured in front of it. So it parses nothing but the length of a body,
knows its requests by a few bytes, and writes bytes that were made before it began. One request at a time on a
connection. It prints its port once it listens, and ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import gc
import re
import sys
from collections.abc import Sequence

import uvloop

from benchmarks import samples

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_STREAM = re.compile(rb'"stream" *: *true')
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n"


def _whole(body: bytes) -> bytes:
    return _HEAD % b"application/json" + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _framed(*, with_usage: bool) -> list[bytes]:
    """A stream's writes: the head goes with the first chunk, the closing HTTP chunk with the last."""
    writes = [b"%x\r\n%s\r\n" % (len(event), event) for event in samples.chunks(with_usage=with_usage)]
    writes[0] = _HEAD % b"text/event-stream; charset=utf-8" + b"Transfer-Encoding: chunked\r\n\r\n" + writes[0]
    writes[-1] += b"0\r\n\r\n"
    return writes


ANSWER = _whole(samples.completion())
MODELS = _whole(b'{"object":"list","data":[{"id":"bench","object":"model"},{"id":"bench-slow","object":"model"}]}')
STREAM, STREAM_WITH_USAGE = _framed(with_usage=False), _framed(with_usage=True)
SLOW = f'"{samples.SLOW_MODEL}"'.encode()


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is one by behaviour only

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        data = self._received + data if self._received else data
        end = data.find(b"\r\n\r\n") + 4
        length = _LENGTH.search(data, 0, end)
        if end == 3 or len(data) < end + (int(length[1]) if length else 0):
            self._received = data
            return
        self._received = b""
        if not data.startswith(b"POST"):
            self._transport.write(MODELS)
        elif _STREAM.search(data, end):
            writes = STREAM_WITH_USAGE if b'"include_usage"' in data else STREAM
            gap = samples.SLOW_CHUNK_SECONDS if SLOW in data else samples.CHUNK_SECONDS
            first = self._loop.time() + samples.ANSWER_SECONDS
            self._timer = self._loop.call_at(first, self._write, writes, 0, gap, first)
        else:
            self._timer = self._loop.call_later(samples.ANSWER_SECONDS, self._transport.write, ANSWER)

    def _write(self, writes: Sequence[bytes], index: int, gap: float, due: float) -> None:
        """Each write has its own due time: one that was late does not delay the rest."""
        self._transport.write(writes[index])
        if index + 1 < len(writes):
            due += gap
            self._timer = self._loop.call_at(due, self._write, writes, index + 1, gap, due)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    gc.disable()
    ended = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()
    server.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())

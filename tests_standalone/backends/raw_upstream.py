"""An upstream by the byte: each of its connections runs a script, and the test says every byte, pause and reset.

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await peer.gone()

    async with raw_upstream(script) as upstream:
        response = await client.send("POST", upstream.url, {}, b"{}", Timeouts())

A script that returns closes its connection. What it has to wait for ends when the test does.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from gateway.backends.client import HTTPTransport
from gateway.backends.transport import Response, Timeouts

QUICK = Timeouts(connect=10, first_byte=10, idle=10, total=None)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Peer:
    """The upstream's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number
        self.head = b""
        self.body = b""

    async def request(self) -> bytes:
        """Reads one request; its head."""
        await self.request_head()
        length = [line for line in self.head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        self.body = await self.reader.readexactly(int(length[0].partition(b":")[2])) if length else b""
        return self.head

    async def request_head(self) -> bytes:
        self.head = await self.reader.readuntil(b"\r\n\r\n")
        return self.head

    def send(self, data: bytes) -> None:
        if self.writer.is_closing():
            raise ConnectionResetError
        self.writer.write(data)

    async def drained(self) -> None:
        await self.writer.drain()

    async def gone(self) -> bytes:
        """Waits until the client hangs up; what it sent before."""
        with contextlib.suppress(ConnectionError):
            return await self.reader.read()
        return b""

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


class RawUpstream:
    """Where it is, and its connections in the order they came."""

    def __init__(self, port: int, scheme: str) -> None:
        self.port = port
        self.base = f"{scheme}://127.0.0.1:{port}"
        self.url = f"{self.base}/v1/chat"
        self.peers: list[Peer] = []


@asynccontextmanager
async def raw_upstream(
    script: Script, *, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[RawUpstream]:
    """A script's own mistake fails the test; that its client left does not."""
    tasks: list[asyncio.Task[None]] = []

    async def serve(peer: Peer) -> None:
        try:
            await script(peer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            peer.writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer, len(upstream.peers))
        upstream.peers.append(peer)
        tasks.append(asyncio.create_task(serve(peer)))

    server = await asyncio.start_server(accept, "127.0.0.1", port, ssl=tls, limit=1 << 20)
    upstream = RawUpstream(server.sockets[0].getsockname()[1], "https" if tls else "http")
    try:
        yield upstream
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for peer in upstream.peers:
            peer.writer.transport.abort()
        await asyncio.sleep(0.01)
    mistakes = [failure for failure in ended if isinstance(failure, Exception)]
    assert mistakes == []


def answering(*replies: bytes) -> Script:
    """Answers request after request on each connection, in turn, and then waits."""

    async def script(peer: Peer) -> None:
        for reply in replies:
            await peer.request()
            peer.send(reply)
        await peer.gone()

    return script


async def call(client: HTTPTransport, url: str, body: bytes | None = b"{}", limits: Timeouts = QUICK) -> bytes:
    """One POST (or GET, without a body) to its end."""
    response = await client.send("GET" if body is None else "POST", url, {}, body, limits)
    return await whole(response)


async def whole(response: Response) -> bytes:
    try:
        return await response.read_all(1 << 30)
    finally:
        response.close()


async def assert_whole(client: HTTPTransport) -> None:
    """Nothing is lent out, nobody waits, and every open socket is idle."""
    for _ in range(1000):
        if all(not pool.leases and pool.sockets == set(pool.idle) for pool in client.pools.values()):
            break
        await asyncio.sleep(0.005)
    for pool in client.pools.values():
        assert (pool.leases, len(pool.waiting)) == (0, 0)
        assert pool.sockets == set(pool.idle)
        assert all(connection.open for connection in pool.idle)


@contextmanager
def deaf(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A port that takes no connection: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(4):
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]

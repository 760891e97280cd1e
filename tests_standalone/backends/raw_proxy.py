"""An HTTP proxy by the byte: it answers CONNECT as it is told, and carries what follows to one upstream.

async with raw_proxy(upstream.port) as proxy:
    client = HTTPTransport(Access(proxy=proxy.base))
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests_standalone.backends.raw_upstream import Peer, RawUpstream, raw_upstream

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


@asynccontextmanager
async def raw_proxy(port: int, answer: bytes = ESTABLISHED) -> AsyncIterator[RawUpstream]:
    """Whatever name is asked for, it leads to that port of this machine. An answer without 200 ends the connection."""

    async def script(peer: Peer) -> None:
        await peer.request_head()
        for number in range(len(answer)):
            peer.send(answer[number : number + 1])
            await asyncio.sleep(0)
        if b" 200" in answer:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                await asyncio.gather(_carry(peer.reader, writer), _carry(reader, peer.writer))
            finally:
                writer.transport.abort()

    async with raw_upstream(script) as proxy:
        yield proxy


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(1 << 16):
        writer.write(piece)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()

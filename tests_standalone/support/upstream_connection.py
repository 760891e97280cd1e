"""HTTP/1.1 at the socket: reads requests, and knows what the kernel took and when the client left."""

from __future__ import annotations

import asyncio
import math
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote


class Gone(Exception):
    """The client has closed its side. Who only half-closes counts as gone: no HTTP client does that to us."""


class Cut(Exception):
    """The script breaks the connection."""

    def __init__(self, how: Literal["fin", "rst"] = "fin") -> None:
        self.how = how


class Connection(asyncio.Protocol):
    """A socket that knows at once when the client leaves, and how much of what was written the kernel took."""

    def __init__(self, number: int, serve: Callable[[Connection], Awaitable[None]]) -> None:
        self.number = number
        self.gone = asyncio.Event()
        self._serve = serve
        self._received = bytearray()
        self._news = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self.transport: asyncio.Transport
        self.task: asyncio.Task[None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=0)
        self.task = asyncio.ensure_future(self._serve(self))

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._news.set()

    def eof_received(self) -> bool:
        self._leave()
        return True

    def connection_lost(self, failure: Exception | None) -> None:
        self._leave()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _leave(self) -> None:
        for event in (self.gone, self._news, self._writable):
            event.set()

    async def _more(self) -> None:
        if self.gone.is_set():
            raise Gone
        self._news.clear()
        await self._news.wait()

    async def read_until(self, mark: bytes) -> bytes:
        while (end := self._received.find(mark)) < 0:
            await self._more()
        return (await self.read(end + len(mark)))[: -len(mark)]

    async def read(self, count: int) -> bytes:
        while len(self._received) < count:
            await self._more()
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    async def read_away(self) -> None:
        """Reads until the client leaves: closing with unread bytes would be a reset, which swallows the reply."""
        while not self.gone.is_set():
            self._received.clear()
            self._news.clear()
            await self._news.wait()

    async def send(self, data: bytes) -> None:
        """Returns once the kernel has all of it."""
        if self.gone.is_set():
            raise Gone
        self.transport.write(data)
        await asyncio.sleep(0)
        await self._writable.wait()
        if self.gone.is_set():
            raise Gone

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            return
        try:
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                await self.gone.wait()
        except TimeoutError:
            return
        raise Gone

    async def wait(self, event: asyncio.Event) -> None:
        tasks = [asyncio.ensure_future(each.wait()) for each in (event, self.gone)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        if self.gone.is_set():
            raise Gone

    def set_send_buffer(self, size: int) -> None:
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)

    def close(self, how: Literal["fin", "rst", "abort"]) -> None:
        """`abort` does not wait until the client has read what is under way."""
        if how == "rst":
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if how == "fin":
            self.transport.close()
        else:
            self.transport.abort()


@dataclass(frozen=True)
class Head:
    method: str
    path: str
    headers: dict[str, str]

    @property
    def script_name(self) -> str | None:
        """From the base URL."""
        found = re.search(r"/script/([^/]+)/", self.path)
        return found[1] if found else None


async def read_head(connection: Connection) -> Head:
    first, *lines = (await connection.read_until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        known = headers.get(name.lower())
        headers[name.lower()] = f"{known}, {value.strip()}" if known is not None else value.strip()
    return Head(method, unquote(target.partition("?")[0]), headers)


async def read_body(connection: Connection, head: Head) -> bytes:
    if head.headers.get("expect", "").lower() == "100-continue":
        await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    if "chunked" not in head.headers.get("transfer-encoding", ""):
        return await connection.read(int(head.headers.get("content-length", 0)))
    body = bytearray()
    while size := int((await connection.read_until(b"\r\n")).partition(b";")[0], 16):
        body += await connection.read(size)
        await connection.read_until(b"\r\n")
    while await connection.read_until(b"\r\n"):
        pass
    return bytes(body)

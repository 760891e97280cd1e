"""Backends behind HTTP: one class that owns the connection, and a pure translator for each wire format.

`HTTPBackend` sends, checks status and type of the reply, maps errors and closes. A `Translator` turns a request into
path, headers and body, and bytes into values; it never awaits. Retries and fallbacks are the relay's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gateway.backends.base import ModelInfo
from gateway.backends.transport import Response, Timeouts, Transport
from gateway.errors import UpstreamError
from gateway.wire import WireError
from gateway.wire.chat import ChatRequest, Chunk, Completion

MAX_REPLY = 64 << 20
MAX_ERROR = 64 << 10
TAIL_SECONDS = 1.0
TAIL_READS = 16


@dataclass(frozen=True, slots=True)
class HTTPRequest:
    """What to send. `path` is appended to the backend's base URL."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None


class Decoder(Protocol):
    """Bytes of a streamed reply to chunks. `complete` once the end mark was read; nothing after it counts."""

    complete: bool

    def feed(self, piece: bytes) -> list[Chunk]:
        """Raises WireError."""

    def flush(self) -> list[Chunk]:
        """What is left when the reply has ended."""


class Translator(Protocol):
    """One wire format, both ways. Pure."""

    stream_type: str
    """The media type of a streamed reply."""

    def models_request(self) -> HTTPRequest: ...

    def models(self, body: bytes) -> Sequence[ModelInfo]:
        """Raises WireError."""

    def request(self, request: ChatRequest) -> HTTPRequest: ...

    def completion(self, body: bytes) -> Completion:
        """Raises WireError, or UpstreamError for an error sent with status 200."""

    def decoder(self) -> Decoder: ...

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamError:
        """The failure as our client shall see it."""


class HTTPBackend:
    """A backend made of a transport and a translator."""

    def __init__(
        self,
        name: str,
        base_url: str,
        translator: Translator,
        transport: Transport,
        *,
        headers: Mapping[str, str] | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        self.name = name
        self._base = base_url.rstrip("/")
        self._translator = translator
        self._transport = transport
        self._headers = dict(headers or {})
        self._timeouts = timeouts or Timeouts()
        self._ending: set[asyncio.Task[None]] = set()

    async def models(self) -> Sequence[ModelInfo]:
        body = await self._fetch(self._translator.models_request())
        try:
            return self._translator.models(body)
        except WireError as failure:
            raise _unreadable(failure) from failure

    async def complete(self, request: ChatRequest) -> Completion:
        body = await self._fetch(self._translator.request(request))
        try:
            return self._translator.completion(body)
        except WireError as failure:
            raise _unreadable(failure) from failure

    async def stream(self, request: ChatRequest) -> HTTPChunkStream:
        response = await self._send(self._translator.request(request))
        found = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if found != self._translator.stream_type:
            response.close()
            raise UpstreamError("The upstream did not answer with a stream.", log=f"content-type {found!r}")
        return HTTPChunkStream(response, self._translator.decoder(), self._ending)

    async def aclose(self) -> None:
        """The transport is shared: its owner closes it."""
        for task in self._ending:
            task.cancel()

    async def _fetch(self, request: HTTPRequest) -> bytes:
        response = await self._send(request)
        try:
            return await response.read_all(MAX_REPLY)
        finally:
            response.close()

    async def _send(self, request: HTTPRequest) -> Response:
        headers = {**self._headers, **request.headers}
        url = self._base + request.path
        response = await self._transport.send(request.method, url, headers, request.body, self._timeouts)
        if response.status == 200:
            return response
        try:
            body = await response.read_all(MAX_ERROR)
        except UpstreamError:
            body = b""
        finally:
            response.close()
        raise self._translator.error(response.status, response.headers, body)


class HTTPChunkStream:
    """A streamed reply: bytes through a decoder, one call for each read of the socket.

    The end mark comes before the end of the HTTP body: what is left of it (a last chunk of no bytes) is read aside, in
    a task kept in `ending`, so that the connection can be used again.
    """

    def __init__(self, response: Response, decoder: Decoder, ending: set[asyncio.Task[None]]) -> None:
        self._response = response
        self._decoder = decoder
        self._ending = ending
        self._ended = False
        self._closed = False

    @property
    def complete(self) -> bool:
        return self._decoder.complete

    async def read(self) -> Sequence[Chunk]:
        while not (self._ended or self._decoder.complete):
            piece = await self._response.read()
            try:
                chunks = self._decoder.feed(piece) if piece else self._decoder.flush()
            except WireError as failure:
                raise _unreadable(failure) from failure
            self._ended = not piece
            if chunks:
                return chunks
        return ()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._decoder.complete or self._response.at_end():
            self._response.close()
            return
        task = asyncio.create_task(self._read_tail())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _read_tail(self) -> None:
        try:
            async with asyncio.timeout(TAIL_SECONDS):
                for _ in range(TAIL_READS):
                    if not await self._response.read():
                        break
        except (UpstreamError, TimeoutError):
            pass
        finally:
            self._response.close()


def _unreadable(failure: WireError) -> UpstreamError:
    return UpstreamError("The upstream sent something that is no valid reply.", log=str(failure))

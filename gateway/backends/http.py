"""Backends behind HTTP: one class that owns the connection, and a pure translator for each wire format.

`HTTPBackend` sends, checks status and type of the reply, maps errors and closes. A `Translator` turns a request into
path, headers and body, and bytes into values; it never awaits. Retries and fallbacks are the relay's.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from gateway.backends.base import ModelInfo, OperationReply
from gateway.backends.transport import Response, Timeouts, Transport
from gateway.errors import UpstreamError
from gateway.wire import WireError
from gateway.wire.chat import ChatRequest, Chunk, Completion
from gateway.wire.lane import LONGEST, FindLane, Lane, Source
from gateway.wire.operation import OperationRequest, is_json, may_answer
from gateway.wire.sse import SSEDecoder

MAX_REPLY = 64 << 20
MAX_ERROR = 64 << 10
TAIL_SECONDS = 1.0
_SECRET_LENGTH = 8
_HARMLESS = frozenset({"accept", "accept-encoding", "content-type", "user-agent"})
TAIL_READS = 16
_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{0,9})?")
_UNREAD = SSEDecoder()
"""For decoders of other formats: nothing may pass this one."""


@dataclass(slots=True)
class HTTPRequest:
    """What to send. `path` is appended to the backend's base URL."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None


class Decoder(Protocol):
    """Bytes of a streamed reply to chunks. `complete` once the end mark was read; nothing after it counts."""

    complete: bool
    trailing: bool
    """Did something follow the end mark?"""

    def feed(self, piece: bytes) -> list[Chunk]:
        """Raises WireError."""

    def flush(self) -> list[Chunk]:
        """What is left when the reply has ended."""


class Translator(Protocol):
    """One wire format, both ways. Pure."""

    stream_type: str
    """The media type of a streamed reply."""

    operations: frozenset[str]
    """What it can do, of `wire.operation.OPERATIONS`."""

    def models_request(self) -> HTTPRequest: ...

    def models(self, body: bytes) -> Sequence[ModelInfo]:
        """Raises WireError."""

    def request(self, request: ChatRequest) -> HTTPRequest:
        """Raises BadRequest for what the upstream can never do."""

    def completion(self, request: ChatRequest, body: bytes) -> Completion:
        """Raises WireError, or UpstreamError for an error sent with status 200."""

    def decoder(self, request: ChatRequest) -> Decoder: ...

    def operation_request(self, request: OperationRequest) -> HTTPRequest:
        """Of one of `operations`. Raises BadRequest."""

    def operation_reply(self, request: OperationRequest, body: bytes) -> bytes:
        """A JSON reply in OpenAI's shape; other types pass as they are. Raises WireError, UpstreamError."""

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
        sent = self._translator.request(request)
        response = await self._send(sent)
        if response.status != 200:
            raise await self._failure(sent, response)
        try:
            return self._translator.completion(request, await response.read_all(MAX_REPLY))
        except WireError as failure:
            raise _unreadable(failure) from failure
        finally:
            response.close()

    async def stream(self, request: ChatRequest) -> HTTPChunkStream:
        sent = self._translator.request(request)
        response = await self._send(sent)
        if response.status != 200:
            raise await self._failure(sent, response)
        found = response.headers.get("content-type", "")
        if found != self._translator.stream_type:
            found = found.partition(";")[0].strip().lower()
        if found != self._translator.stream_type:
            response.close()
            raise UpstreamError("The upstream did not answer with a stream.", log=f"content-type {found!r}")
        return HTTPChunkStream(response, self._translator.decoder(request), self._ending)

    @property
    def operations(self) -> frozenset[str]:
        return self._translator.operations

    async def operate(self, request: OperationRequest) -> OperationReply:
        sent = self._translator.operation_request(request)
        response = await self._send(sent)
        if response.status != 200:
            raise await self._failure(sent, response)
        content_type = response.headers.get("content-type", "application/octet-stream")
        if not may_answer(request.operation, content_type):
            response.close()
            kind = content_type.partition(";")[0][:80]
            raise UpstreamError("The upstream sent something that is no valid reply.", log=f"content-type {kind!r}")
        if not is_json(content_type):
            return PassedReply(content_type, response)
        try:
            body = await response.read_all(MAX_REPLY)
            return WholeReply("application/json", self._translator.operation_reply(request, body))
        except WireError as failure:
            raise _unreadable(failure) from failure
        finally:
            response.close()

    async def aclose(self) -> None:
        """The transport is shared: its owner closes it."""
        for task in self._ending:
            task.cancel()

    async def _fetch(self, request: HTTPRequest) -> bytes:
        response = await self._send(request)
        if response.status != 200:
            raise await self._failure(request, response)
        return await _body_of(response)

    def _send(self, request: HTTPRequest) -> Coroutine[Any, Any, Response]:
        """No coroutine of its own: each of them costs whenever a task resumes below it."""
        url = self._base + request.path
        return self._transport.send(request.method, url, self._headers_of(request), request.body, self._timeouts)

    def _headers_of(self, request: HTTPRequest) -> Mapping[str, str]:
        return {**self._headers, **request.headers} if self._headers else request.headers

    async def _failure(self, request: HTTPRequest, response: Response) -> UpstreamError:
        """What a status other than 200 means."""
        try:
            body = await response.read_all(MAX_ERROR)
        except UpstreamError:
            body = b""
        finally:
            response.close()
        failure = self._translator.error(response.status, response.headers, body)
        failure.message = _without_secrets(failure.message, self._headers_of(request))
        failure.retry_after = retry_after({**failure.headers, **_timing(response.headers)})
        return failure


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
            chunks = self._decoded(piece)
            self._ended = not piece
            if chunks:
                return chunks
        return ()

    async def push(
        self,
        take: Callable[[Sequence[Chunk]], bool],
        take_events: Callable[[bytes], bool | None],
        find_lane: FindLane | None = None,
    ) -> None:
        push = getattr(self._response, "push", None)
        if push is None or self._ended or self._decoder.complete:
            return
        events: SSEDecoder = getattr(self._decoder, "events", _UNREAD)

        def piece_came(piece: bytes) -> bool:
            if len(piece) <= events.may_pass:
                goes_on = take_events(piece)
                if goes_on is not None:
                    return goes_on
            chunks = self._decoded(piece)
            return (not chunks or take(chunks)) and not self._decoder.complete

        def lane(source: Source) -> Lane | None:
            return find_lane(source) if find_lane is not None and events.may_pass >= LONGEST else None

        await push(piece_came, lane)

    def _decoded(self, piece: bytes) -> Sequence[Chunk]:
        try:
            return self._decoder.feed(piece) if piece else self._decoder.flush()
        except WireError as failure:
            raise _unreadable(failure) from failure

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._decoder.trailing:
            self._response.distrust()
            return
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
                    piece = await self._response.read()
                    self._decoder.feed(piece)
                    if not piece or self._decoder.trailing:
                        break
        except (UpstreamError, TimeoutError):
            pass
        finally:
            if self._decoder.trailing:
                self._response.distrust()
            self._response.close()


class PassedReply:
    """A reply whose bytes pass as they come."""

    def __init__(self, content_type: str, response: Response) -> None:
        self.content_type = content_type
        self._response = response

    async def read(self) -> bytes:
        return await self._response.read()

    async def close(self) -> None:
        self._response.close()


class WholeReply:
    """A reply that was read and put into OpenAI's shape."""

    def __init__(self, content_type: str, body: bytes) -> None:
        self.content_type = content_type
        self._body = body

    async def read(self) -> bytes:
        body, self._body = self._body, b""
        return body

    async def close(self) -> None:
        pass


async def _body_of(response: Response) -> bytes:
    try:
        return await response.read_all(MAX_REPLY)
    finally:
        response.close()


def _without_secrets(message: str, headers: Mapping[str, str]) -> str:
    """An upstream's words may quote the head of our request, which holds the operator's key."""
    for name, value in headers.items():
        if name.lower() not in _HARMLESS:
            for word in value.split():
                if len(word) >= _SECRET_LENGTH:
                    message = message.replace(word, "***")
    return message


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms`, or from `retry-after` (seconds or an HTTP date); None: it does not say."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        told = headers.get(name, "").strip()
        if _NUMBER.fullmatch(told):
            return float(told) * unit
    try:
        return parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None


def _timing(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in ("retry-after", "retry-after-ms") if name in headers}


def _unreadable(failure: WireError) -> UpstreamError:
    return UpstreamError("The upstream sent something that is no valid reply.", log=str(failure))

"""Everything that speaks OpenAI: OpenAI itself, DeepSeek, vLLM, llama.cpp, LM Studio, OpenRouter, another gateway.

Replies pass as they are. Requests do, too, but for what the settings and the vendor's peculiarities change (`adapt`);
the one thing added is `stream_options.include_usage`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.backends import floats
from gateway.backends.adapt import Adapter
from gateway.backends.base import ModelInfo
from gateway.backends.http import HTTPRequest
from gateway.errors import UpstreamError
from gateway.wire import WireError, sse
from gateway.wire.chat import ChatRequest, Chunk, Completion
from gateway.wire.failures import error_from, error_in, streamed_error
from gateway.wire.jsontext import loads
from gateway.wire.operation import EMBEDDINGS, OPERATIONS, OperationRequest

_LARGE = 256 << 10
"""Bytes of a reply that are not parsed without need: others wait meanwhile."""


class OpenAITranslator:
    """Pure: OpenAI's API over HTTP, in the dialect of one upstream (`adapter`)."""

    stream_type = "text/event-stream"
    operations = OPERATIONS

    def __init__(self, api_key: str = "", adapter: Adapter | None = None, *, max_event: int = sse.MAX_LINE) -> None:
        """`max_event`: bytes of one event of a stream."""
        self._max_event = max_event
        self._adapter = adapter or Adapter()
        self._headers = {"accept-encoding": "identity", **(self._credentials(api_key) if api_key else {})}
        self._whole = {"content-type": "application/json", **self._headers, "accept": "application/json"}
        self._streamed = {**self._whole, "accept": self.stream_type}

    def _credentials(self, api_key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {api_key}"}

    def _path(self, operation: str, model: str) -> str:
        """Where an operation is asked for, behind the base URL. Raises BadRequest."""
        return f"/{operation}"

    def models_request(self) -> HTTPRequest:
        return HTTPRequest("GET", "/models", self._whole)

    def models(self, body: bytes) -> Sequence[ModelInfo]:
        data = _object(body)
        listed = data.get("data")
        if not isinstance(listed, list):
            raise WireError("the list of models has no 'data' array")
        return [
            ModelInfo(
                entry["id"],
                created if isinstance(created := entry.get("created"), int) else None,
                owner if isinstance(owner := entry.get("owned_by"), str) else None,
            )
            for entry in listed
            if isinstance(entry, dict) and isinstance(entry.get("id"), str)
        ]

    def request(self, request: ChatRequest) -> HTTPRequest:
        adapted, headers = self._adapter.apply(request), self._whole
        if request.stream:
            headers = self._streamed
            if self._adapter.asks_usage(request):
                adapted = adapted.asking_for_usage()
        return HTTPRequest("POST", self._path(request.operation, request.model or ""), headers, adapted.raw)

    def completion(self, request: ChatRequest, body: bytes) -> Completion:
        data = _object(body)
        choices = data.get("choices")
        if not choices and (error := error_in(data)) is not None:
            raise streamed_error(error)
        if not isinstance(choices, list):
            raise WireError("the reply has no 'choices' array")
        return Completion(body.strip(), data)

    def decoder(self, request: ChatRequest) -> OpenAIDecoder:
        return OpenAIDecoder(self._max_event)

    def operation_request(self, request: OperationRequest) -> HTTPRequest:
        headers = {**self._headers, "content-type": request.content_type, "accept": "*/*"}
        return HTTPRequest("POST", self._path(request.operation, request.model or ""), headers, request.raw)

    def operation_reply(self, request: OperationRequest, body: bytes) -> bytes:
        encoding = request.data.get("encoding_format")
        if len(body) > _LARGE and (request.operation != EMBEDDINGS or floats.are_as_asked(body, encoding)):
            return body
        data = _object(body)
        if data.get("error") and "data" not in data:
            raise streamed_error(data["error"])
        if request.operation == EMBEDDINGS:
            return floats.as_asked(body, data, encoding)
        return body

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamError:
        try:
            data = loads(body)
        except ValueError:
            data = None
        return error_from(data, status, headers)


class OpenAIDecoder:
    """SSE to chunks; ends at `[DONE]` and ignores what comes after it, but for saying that it came."""

    __slots__ = ("complete", "events", "trailing")

    def __init__(self, max_event: int = sse.MAX_LINE) -> None:
        self.events = sse.SSEDecoder(max_event)
        """Those who know some bytes for whole events may read them instead of this, if it says so (`may_pass`)."""
        self.complete = False
        self.trailing = False

    def feed(self, piece: bytes) -> list[Chunk]:
        if not self.complete:
            return self._chunks(self.events.feed(piece))
        self.trailing = self.trailing or bool(piece.strip(b"\r\n"))
        return []

    def flush(self) -> list[Chunk]:
        return [] if self.complete else self._chunks(self.events.flush())

    def _chunks(self, payloads: list[bytes]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for number, payload in enumerate(payloads, 1):
            if payload[:1] == b"{":
                chunks.append(Chunk(payload))
                continue
            said = payload.strip()
            if said == sse.DONE:
                self.complete = True
                self.trailing = number < len(payloads) or self.events.waiting
                break
            if said:
                chunks.append(Chunk(raw=payload))
        return chunks


def _object(body: bytes) -> dict[str, Any]:
    try:
        data = loads(body)
    except ValueError as failure:
        raise WireError(f"the reply is not valid JSON: {failure}") from None
    if not isinstance(data, dict):
        raise WireError("the reply is not a JSON object")
    return data

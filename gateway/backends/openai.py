"""Everything that speaks OpenAI: OpenAI itself, DeepSeek, vLLM, llama.cpp, LM Studio, OpenRouter, another gateway.

Requests and replies pass as they are. The one thing added is `stream_options.include_usage`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.backends.base import ModelInfo
from gateway.backends.http import HTTPRequest
from gateway.errors import UpstreamError
from gateway.wire import WireError, sse
from gateway.wire.chat import ChatRequest, Chunk, Completion
from gateway.wire.failures import error_from, streamed_error
from gateway.wire.jsontext import loads


class OpenAITranslator:
    """Pure: OpenAI's chat completions over HTTP."""

    stream_type = "text/event-stream"

    def __init__(self, api_key: str = "") -> None:
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def models_request(self) -> HTTPRequest:
        return HTTPRequest("GET", "/models", {**self._headers, "accept": "application/json"})

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
        asked = request.asking_for_usage() if request.stream else request
        accept = self.stream_type if request.stream else "application/json"
        return HTTPRequest("POST", "/chat/completions", {**self._headers, "accept": accept}, asked.raw)

    def completion(self, body: bytes) -> Completion:
        data = _object(body)
        if data.get("error") and not data.get("choices"):
            raise streamed_error(data["error"])
        if not isinstance(data.get("choices"), list):
            raise WireError("the reply has no 'choices' array")
        return Completion(body.strip(), data)

    def decoder(self) -> OpenAIDecoder:
        return OpenAIDecoder()

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamError:
        try:
            data = loads(body)
        except ValueError:
            data = None
        return error_from(data, status, headers)


class OpenAIDecoder:
    """SSE to chunks; ends at `[DONE]` and ignores what comes after it."""

    def __init__(self) -> None:
        self._events = sse.SSEDecoder()
        self.complete = False

    def feed(self, piece: bytes) -> list[Chunk]:
        return [] if self.complete else self._chunks(self._events.feed(piece))

    def flush(self) -> list[Chunk]:
        return [] if self.complete else self._chunks(self._events.flush())

    def _chunks(self, payloads: list[bytes]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for payload in payloads:
            if payload.strip() == sse.DONE:
                self.complete = True
                break
            if payload.strip():
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

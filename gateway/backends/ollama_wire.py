"""Ollama's own API (`/api/...`), which says more than its `/v1`: `num_ctx`, `keep_alive`, thinking, times, loading.

What becomes of a request is in `ollama_request`, of a reply in `ollama_reply` and `ollama_stream`; this is the
translator made of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.backends import ollama_reply, ollama_request, ollama_stream
from gateway.backends.base import LoadState, ModelInfo
from gateway.backends.http import Decoder, HTTPRequest
from gateway.errors import UpstreamError
from gateway.wire import WireError
from gateway.wire.chat import ChatRequest, Completion, CompletionRequest
from gateway.wire.failures import error_from
from gateway.wire.jsontext import dumps, loads
from gateway.wire.operation import CHAT, COMPLETIONS, EMBEDDINGS, OperationRequest


class OllamaTranslator:
    """Pure. `options`, with `num_ctx` among them, and `keep_alive` are for calls that do not say otherwise.

    Without a `num_ctx` Ollama takes one by the size of its memory, and cuts longer prompts without a word.
    """

    stream_type = "application/x-ndjson"
    operations = frozenset({CHAT, COMPLETIONS, EMBEDDINGS})

    def __init__(
        self,
        api_key: str = "",
        *,
        keep_alive: str | float | None = None,
        num_ctx: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        own = dict(options or {}) | ({} if num_ctx is None else {"num_ctx": num_ctx})
        self._defaults: dict[str, Any] = {"options": own} if own else {}
        if keep_alive is not None:
            self._defaults["keep_alive"] = _seconds(keep_alive)

    def models_request(self) -> HTTPRequest:
        return self._get("/api/tags")

    def models(self, body: bytes) -> Sequence[ModelInfo]:
        return [ModelInfo(entry["name"], _whole(entry.get("modified_at")), "ollama") for entry in _listed(body)]

    def request(self, request: ChatRequest) -> HTTPRequest:
        accept = self.stream_type if request.stream else "application/json"
        if isinstance(request, CompletionRequest):
            return self._post("/api/generate", ollama_request.generate(request, self._defaults), accept)
        return self._post("/api/chat", ollama_request.chat(request, self._defaults), accept)

    def completion(self, request: ChatRequest, body: bytes) -> Completion:
        older = isinstance(request, CompletionRequest)
        data = ollama_reply.text_completion(body) if older else ollama_reply.completion(body)
        return Completion(dumps(data), data)

    def decoder(self, request: ChatRequest) -> Decoder:
        return ollama_stream.TextDecoder() if isinstance(request, CompletionRequest) else ollama_stream.ChatDecoder()

    def operation_request(self, request: OperationRequest) -> HTTPRequest:
        return self._post("/api/embed", ollama_request.embed(request, self._defaults))

    def operation_reply(self, request: OperationRequest, body: bytes) -> bytes:
        return dumps(ollama_reply.embeddings(body, request.data.get("encoding_format")))

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamError:
        """Ollama's errors are sentences; the two that programs look for get OpenAI's codes."""
        try:
            data = loads(body)
        except ValueError:
            data = None
        failure = error_from(data, status, headers)
        if status == 404 and "model" in failure.message:
            failure.code, failure.param = "model_not_found", "model"
        elif status == 400 and "context length" in failure.message:
            failure.code, failure.param = "context_length_exceeded", "messages"
        return failure

    # Models in memory

    def load_request(self, model: str) -> HTTPRequest:
        return self._post("/api/chat", ollama_request.load(model, self._defaults))

    def load_embedder_request(self, model: str) -> HTTPRequest:
        """For a model that cannot chat: an embedding of nothing."""
        return self._post("/api/embed", {"model": model, "input": [], **self._defaults})

    def unload_request(self, model: str) -> HTTPRequest:
        return self._post("/api/chat", ollama_request.unload(model))

    def done(self, body: bytes) -> None:
        """The reply to any of these three. Raises WireError, UpstreamError."""
        ollama_reply.parsed(body)

    def load_states_request(self) -> HTTPRequest:
        return self._get("/api/ps")

    def load_states(self, body: bytes) -> dict[str, LoadState]:
        """By the name that `/api/tags` has for it. Raises WireError, UpstreamError."""
        return {entry["name"]: _load_state(entry) for entry in _listed(body)}

    def _get(self, path: str) -> HTTPRequest:
        return HTTPRequest("GET", path, {**self._headers, "accept": "application/json"})

    def _post(self, path: str, body: Mapping[str, Any], accept: str = "application/json") -> HTTPRequest:
        return HTTPRequest("POST", path, {**self._headers, "accept": accept}, dumps(body))


def _listed(body: bytes) -> list[dict[str, Any]]:
    listed = ollama_reply.parsed(body).get("models")
    if not isinstance(listed, list):
        raise WireError("the reply has no 'models' array")
    return [entry for entry in listed if isinstance(entry, dict) and isinstance(entry.get("name"), str)]


def _load_state(entry: Mapping[str, Any]) -> LoadState:
    until = ollama_reply.moment(entry.get("expires_at"))
    sizes = (entry.get(key) for key in ("size_vram", "size"))
    length = entry.get("context_length")
    return LoadState(
        "loaded",
        expires_at=None if until is None else round(until * 1000),
        memory_bytes=next((size for size in sizes if isinstance(size, int) and size > 0), None),
        context_length=length if isinstance(length, int) and length > 0 else None,
    )


def _whole(text: object) -> int | None:
    found = ollama_reply.moment(text)
    return None if found is None else int(found)


def _seconds(keep_alive: str | float) -> str | float:
    """A bare number is seconds, also where a configuration made a text of it; Ollama reads texts as `5m` only."""
    return int(keep_alive) if isinstance(keep_alive, str) and keep_alive.lstrip("-").isdecimal() else keep_alive

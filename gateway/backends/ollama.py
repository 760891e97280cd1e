"""Ollama: a backend that answers, and holds models in memory that can be loaded and unloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from gateway.backends.base import LoadState
from gateway.backends.http import HTTPBackend, HTTPRequest
from gateway.backends.ollama_wire import OllamaTranslator
from gateway.backends.transport import Timeouts, Transport
from gateway.errors import UpstreamError
from gateway.wire import WireError

T = TypeVar("T")


class OllamaBackend(HTTPBackend):
    """Loadable. `base_url` is the server's root: without `/v1`, without `/api`."""

    def __init__(
        self,
        name: str,
        base_url: str,
        translator: OllamaTranslator,
        transport: Transport,
        *,
        headers: Mapping[str, str] | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        super().__init__(name, base_url, translator, transport, headers=headers, timeouts=timeouts)
        self._ollama = translator

    async def load(self, model: str) -> LoadState:
        try:
            await self._ask(self._ollama.load_request(model), self._ollama.done)
        except UpstreamError as failure:
            if failure.upstream_status != 400 or "support" not in failure.message:
                raise
            await self._ask(self._ollama.load_embedder_request(model), self._ollama.done)
        states = await self.load_states()
        return states.get(model) or states.get(f"{model}:latest") or LoadState("loaded")

    async def unload(self, model: str) -> LoadState:
        await self._ask(self._ollama.unload_request(model), self._ollama.done)
        return LoadState("unloaded")

    async def load_states(self) -> dict[str, LoadState]:
        return await self._ask(self._ollama.load_states_request(), self._ollama.load_states)

    async def _ask(self, request: HTTPRequest, read: Callable[[bytes], T]) -> T:
        body = await self._fetch(request)
        try:
            return read(body)
        except WireError as failure:
            raise UpstreamError("The upstream sent something that is no valid reply.", log=str(failure)) from failure

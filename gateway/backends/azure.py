"""Azure OpenAI: OpenAI's wire under other paths and another header.

With a dated `api_version` the path names the deployment; without one it is Azure's v1 form, where the deployment is the
`model` of the body. What Azure lists as models are all base models, deployed or not, so nothing is asked: the
deployments are those of the backend's setting `models`. Tokens of Entra go into the setting `headers`
(`authorization: Bearer ...`), with no key.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from gateway.backends.adapt import Adapter
from gateway.backends.base import ModelInfo
from gateway.backends.http import HTTPBackend
from gateway.backends.openai import OpenAITranslator
from gateway.errors import ModelNotFound
from gateway.wire.sse import MAX_LINE


class AzureTranslator(OpenAITranslator):
    """`api_version` None: the v1 form."""

    def __init__(
        self,
        api_key: str = "",
        adapter: Adapter | None = None,
        *,
        api_version: str | None = None,
        max_event: int = MAX_LINE,
    ) -> None:
        super().__init__(api_key, adapter, max_event=max_event)
        self._query = f"?api-version={quote(api_version, safe='')}" if api_version else None

    def _credentials(self, api_key: str) -> dict[str, str]:
        return {"api-key": api_key}

    def _path(self, operation: str, model: str) -> str:
        if self._query is None:
            return f"/openai/v1/{operation}"
        if model.strip(".") == "":  # would be another path
            raise ModelNotFound(f"The model '{model}' does not exist here: it is no name of a deployment.")
        return f"/openai/deployments/{quote(model, safe='')}/{operation}{self._query}"


class AzureBackend(HTTPBackend):
    """An Azure resource. It lists nothing of itself."""

    async def models(self) -> Sequence[ModelInfo]:
        return ()

"""A key for certain models: what it opens, and by which ways it opens nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests_standalone.api.conftest import App, Launch, at
from tests_standalone.support.upstream import ScriptedUpstream

CHAT = {"model": "cheap", "messages": [{"role": "user", "content": "hi"}]}
EMBEDDINGS = {"model": "cheap", "input": "hi"}


@pytest.fixture
async def app(launch: Launch, upstream: ScriptedUpstream) -> App:
    return await launch(
        backends={"up": at(upstream)},
        models={
            "cheap": {"backend": "up", "model": "m", "aliases": ["small"]},
            "dear": {"backend": "up", "model": "up-dear"},
        },
    )


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/embeddings", EMBEDDINGS)])
@pytest.mark.parametrize("field", ["models", "fallbacks"])
async def test_fields_that_name_other_models_are_not_for_it(
    path: str, body: dict[str, Any], field: str, app: App, upstream: ScriptedUpstream
) -> None:
    key = await app.add_key("cheap")
    assert (await app.call("POST", path, body, key)).status == 200
    refused = await app.call("POST", path, body | {field: ["dear"]}, key)
    assert (refused.status, refused.json["error"]["code"]) == (403, "permission_denied")
    assert (await app.call("POST", path, body | {field: ["dear"]})).status == 200, "who may use all may name them"
    assert len(upstream.tally) == 2


async def test_an_alias_in_the_path_is_as_good_as_in_the_body(app: App) -> None:
    key = await app.add_key("small")
    for path, body, status in (
        ("/v1/embeddings", {"input": "hi", "model": "small"}, 200),
        ("/openai/deployments/small/embeddings", {"input": "hi"}, 200),
        ("/openai/deployments/cheap/embeddings", {"input": "hi"}, 403),
        ("/openai/deployments/dear/embeddings", {"input": "hi"}, 403),
    ):
        assert (await app.call("POST", path, body, key)).status == status, path

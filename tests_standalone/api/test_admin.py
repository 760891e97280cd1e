"""What operators see of the backends, and that nobody else does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.api import admin
from gateway.wire.operation import OPERATIONS
from tests_standalone.api.conftest import App, Launch, at
from tests_standalone.backends.raw_upstream import Peer, raw_upstream
from tests_standalone.conftest import eventually
from tests_standalone.support.ollama import ScriptedOllama
from tests_standalone.support.upstream import ScriptedUpstream

BUSY = {"x-script": json.dumps({"status": 503, "headers": [["retry-after", "600"]]})}


def hello(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}]}


async def backends(app: App) -> dict[str, Any]:
    answer = await app.call("GET", "/admin/backends")
    assert answer.status == 200
    return {backend["name"]: backend for backend in answer.json["data"]}


async def has_status(app: App, name: str, status: str) -> bool:
    return bool((await backends(app))[name]["status"] == status)


async def test_each_backend_and_the_health_of_its_routes(launch: Launch, upstream: ScriptedUpstream) -> None:
    app = await launch(
        backends={"up": at(upstream, models=["a", "b"], headers=BUSY), "echo": {"type": "scripted"}},
        models={"mine": {"backend": "up", "model": "m"}},
    )
    answer = await app.call("GET", "/admin/backends")
    assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
    assert answer.json == {
        "object": "list",
        "data": [
            {
                "name": "up", "status": "ok", "models": 2, "operations": sorted(OPERATIONS), "loaded": None,
                "routes": [
                    {
                        "model": "m", "status": "ok", "retry_in_seconds": None, "calls": 0, "failures": 0,
                        "failures_in_a_row": 0, "last_failure": None, "last_failure_at": None,
                    }
                ],
            },
            {
                "name": "echo", "status": "ok", "models": 1, "operations": ["chat/completions"], "loaded": None,
                "routes": [],
            },
        ],
    }  # fmt: skip

    assert (await app.call("POST", "/v1/chat/completions", hello("mine"))).status == 503
    found = (await backends(app))["up"]
    assert found["status"] == "cooling"
    (route,) = found["routes"]
    assert route["status"] == "cooling"
    assert 300 < route["retry_in_seconds"] <= 600
    assert (route["calls"], route["failures"], route["failures_in_a_row"]) == (2, 2, 2)
    assert route["last_failure"].startswith("the upstream failed with status 503")
    assert "overloaded." not in route["last_failure"], "an upstream's sentence may quote a prompt"


async def test_a_backend_that_does_not_list_its_models_is_failing(launch: Launch) -> None:
    app = await launch(backends={"up": {"type": "openai", "base_url": "http://127.0.0.1:1/v1"}})
    await eventually(lambda: has_status(app, "up", "failing"))
    assert (await backends(app))["up"]["models"] == 0


async def test_models_in_memory(launch: Launch) -> None:
    async with ScriptedOllama() as ollama:
        app = await launch(backends={"local": {"type": "ollama", "base_url": ollama.root_url}})
        assert (await backends(app))["local"]["loaded"] == []
        answer = await app.call("POST", "/v1/chat/completions", hello("local/llama3.1:8b"))
        assert answer.status == 200
        (loaded,) = (await backends(app))["local"]["loaded"]
    assert (loaded["model"], loaded["state"]) == ("llama3.1:8b", "loaded")
    assert loaded.keys() == {"model", "state", "expires_at", "memory_bytes", "context_length"}


async def test_what_lies_in_memory_is_unknown_when_nobody_answers(launch: Launch) -> None:
    app = await launch(backends={"local": {"type": "ollama", "base_url": "http://127.0.0.1:1"}})
    assert (await backends(app))["local"]["loaded"] is None


async def test_nor_does_one_that_hangs_keep_the_others_from_being_told(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(peer: Peer) -> None:
        await peer.gone()

    monkeypatch.setattr(admin, "LOAD_STATE_SECONDS", 0.05)
    async with raw_upstream(silent) as upstream:
        app = await launch(
            backends={"local": {"type": "ollama", "base_url": upstream.base}, "echo": {"type": "scripted"}}
        )
        found = await backends(app)
        assert found["local"]["loaded"] is None
        assert found["local"]["status"] == "unknown"
        assert found["echo"]["status"] == "ok"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [({"authorization": ""}, 401, "invalid_api_key"), ({"authorization": "Bearer sk-wrong"}, 401, "invalid_api_key")],
)
async def test_without_a_key(headers: dict[str, str], status: int, code: str, launch: Launch) -> None:
    answer = await (await launch()).call("GET", "/admin/backends", headers=headers)
    assert (answer.status, answer.json["error"]["code"]) == (status, code)


async def test_a_caller_who_is_no_admin(launch: Launch) -> None:
    app = await launch(auth={})
    answer = await app.call("GET", "/admin/backends", headers={"authorization": ""})
    assert (answer.status, answer.json["error"]["code"]) == (403, "permission_denied")


async def test_it_is_only_read(launch: Launch) -> None:
    answer = await (await launch()).call("POST", "/admin/backends", {})
    assert answer.status == 405

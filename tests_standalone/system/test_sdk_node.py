"""The official Node SDK against the gateway. What its script does is in `tests_standalone/node/sdk.mjs`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.node import run_node
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import PRICE, Start, in_front_of


@pytest.fixture
async def gateway(upstream: ScriptedUpstream, start: Start) -> GatewayProcess:
    return await start(in_front_of(upstream, models={"answer": {"backend": "up", "price": PRICE}}))


async def sdk(gateway: GatewayProcess, *arguments: str) -> dict[str, Any]:
    environment = {"BASE_URL": gateway.base_url, "API_KEY": "any"}
    done = await asyncio.to_thread(run_node, "sdk.mjs", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


async def test_models_and_a_whole_answer(gateway: GatewayProcess) -> None:
    listed = await sdk(gateway, "models")
    assert "answer" in listed["ids"]
    assert listed["first"]["object"] == "model"
    whole = await sdk(gateway, "chat")
    assert whole["completion"]["usage"]["cost"] > 0
    assert whole["completion"]["conversation_id"].startswith("conv_")
    assert whole["request_id"].startswith("req_")


async def test_streams_with_and_without_usage(gateway: GatewayProcess) -> None:
    plain, asked = await asyncio.gather(sdk(gateway, "stream"), sdk(gateway, "stream-usage"))
    assert plain["content"] == asked["content"] != ""
    assert [bool(chunk.get("usage")) for chunk in plain["chunks"]][-2:] == [False, True]
    assert all(chunk["choices"] for chunk in plain["chunks"])
    assert asked["chunks"][-1]["choices"] == []
    for last in (plain["chunks"][-1], asked["chunks"][-1]):
        assert last["usage"]["cost"] > 0
        assert last["conversation_id"].startswith("conv_")


async def test_tools_images_choices_logprobs_and_structured_output(gateway: GatewayProcess) -> None:
    tools, streamed, image, choices, logprobs, parsed = await asyncio.gather(
        *(sdk(gateway, command) for command in ("tools", "tools-stream", "image", "choices", "logprobs", "parse"))
    )
    assert tools["finish_reason"] == streamed["finish_reason"] == "tool_calls"
    assert tools["calls"][0]["function"] == {
        key: streamed["calls"][0]["function"][key] for key in tools["calls"][0]["function"]
    }
    assert tools["answer"]
    assert image["content"]
    assert len(choices["whole"]) == len(choices["streamed"]) == 2
    assert logprobs["content"][0]["top_logprobs"]
    assert set(parsed["parsed"]) == {"name", "age", "tags"}


async def test_errors_are_the_right_class(gateway: GatewayProcess) -> None:
    scripts = {
        "error-400": ("BadRequestError", 400),
        "error-401": ("InternalServerError", 502),
        "error-404": ("NotFoundError", 404),
        "error-429": ("RateLimitError", 429),
        "error-500": ("InternalServerError", 502),
    }
    seen = await sdk(gateway, "errors", *scripts)
    assert {name: (error["class"], error["status"]) for name, error in seen.items()} == scripts
    assert all(error["requestID"].startswith("req_") for error in seen.values())
    broken = await sdk(gateway, "stream-error")
    assert broken["error"]["class"] == "APIError"
    assert broken["content"] != ""


async def test_retries_are_honoured_and_an_abort_is_recorded(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    retried = await sdk(gateway, "retries", "fail-once-429")
    assert retried["status"] == 200
    aborted = await sdk(gateway, "abort")
    assert aborted == {"chunks": 2, "aborted": True}
    query = "SELECT finish_reason FROM usage_view WHERE status = 'client_disconnected'"
    while not await asyncio.to_thread(gateway.query, query):
        await asyncio.sleep(0.05)

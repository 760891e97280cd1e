"""Several routes behind one name, over real sockets: which is taken, what follows a failure, and the rows of attempts.

One gateway serves all tests: each has backends of its own, so that none cools down what another needs.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.upstream import UpstreamProcess
from tests_standalone.system.http import Answer, call, chat

ADMIN = {"authorization": "Bearer sk-admin-of-the-tests"}
KINDS = ("whole", "stream", "embeddings")
FIRST = 10**9
"""A weight beside which a weight of 1 is never drawn."""


def routes(first: str, second: str | None, kind: str) -> dict[str, Any]:
    """Two routes of a model: which script each upstream follows. They belong to this model alone."""
    found = [{"backend": f"{first}.{kind}", "model": first, "weight": FIRST}]
    return {"routes": found + ([{"backend": f"{second}.{kind}", "model": second}] if second else [])}


@pytest.fixture(scope="module")
def upstream() -> Iterator[UpstreamProcess]:
    with UpstreamProcess() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(upstream: UpstreamProcess) -> Iterator[GatewayProcess]:
    plain = {"type": "openai", "base_url": upstream.base_url, "api_key": "sk-upstream"}
    busy = {"status": 429, "headers": [["retry-after", "600"]]}
    backends: dict[str, Any] = {
        "often": plain,
        "seldom": plain,
        "busy": {**plain, "headers": {"x-script": json.dumps(busy)}},
        "calm": plain,
        "only": plain,
    }
    models: dict[str, Any] = {
        "weighted": {
            "routes": [
                {"backend": "often", "model": "answer", "weight": 3},
                {"backend": "seldom", "model": "answer", "weight": 1},
            ]
        },
        "cooled": {
            "routes": [{"backend": "busy", "model": "m", "weight": FIRST}, {"backend": "calm", "model": "answer"}]
        },
        "alone": {"backend": "busy", "model": "m"},
        "once-500": {"backend": "only", "model": "fail-once-500"},
        "once-503": {"backend": "only", "model": "fail-once"},
        "twice": {"backend": "only", "model": "fail-twice"},
    }
    for kind in KINDS:
        for script in ("error-503", "error-400", "error-500", "error-401", "drop", "error-mid-stream", "answer"):
            backends[f"{script}.{kind}"] = plain
        models |= {
            f"down.{kind}": {**routes("error-503", None, kind), "fallbacks": [f"spare.{kind}"]},
            f"spare.{kind}": routes("answer", None, kind),
            f"wrong.{kind}": routes("error-400", "answer", kind),
            f"refused.{kind}": routes("error-401", "answer", kind),
            f"dropped.{kind}": routes("drop", "answer", kind),
            f"broken.{kind}": routes("error-mid-stream", "answer", kind),
            f"all-down.{kind}": routes("error-500", "error-503", kind),
        }
    config = {"backends": backends, "models": models, "auth": {"admin_key": "sk-admin-of-the-tests"}}
    with GatewayProcess(config) as running:
        yield running


class Caller:
    """Makes calls that its test can tell from all others, in the tally and in the books."""

    def __init__(self, gateway: GatewayProcess, upstream: UpstreamProcess) -> None:
        self.name = f"probe{secrets.token_hex(4)}"
        self._gateway = gateway
        self._upstream = upstream

    async def call(self, model: str, kind: str = "whole") -> Answer:
        if kind == "embeddings":
            body: dict[str, Any] = {"model": model, "input": "one two", "user": self.name}
            return await call(self._gateway.port, "POST", "/v1/embeddings", ADMIN, body)
        body = chat(model, user=self.name, stream=kind == "stream")
        return await call(self._gateway.port, "POST", "/v1/chat/completions", ADMIN, body)

    async def rows(self) -> list[tuple[int, str, str, bool]]:
        """Attempt, backend, status, charged; call by call."""
        sql = f"SELECT attempt, backend, status, charged FROM usage_view WHERE end_user = '{self.name}'"
        found = await asyncio.to_thread(self._gateway.query, f"{sql} ORDER BY created_at, request_id, attempt")
        return [(row["attempt"], row["backend"], row["status"], bool(row["charged"])) for row in found]

    async def asked(self) -> list[str]:
        """The names of the models that the upstream was asked for."""
        return [record.model or "" for record in await asyncio.to_thread(self._upstream.of, self.name)]


@pytest.fixture
def caller(gateway: GatewayProcess, upstream: UpstreamProcess) -> Caller:
    return Caller(gateway, upstream)


def said(answer: Answer, kind: str) -> bool:
    """Is it a whole and good answer of that kind?"""
    if answer.status != 200 or not answer.clean_end:
        return False
    if kind == "stream":
        return bool(answer.events[-1] == "[DONE]")
    return "choices" in answer.json if kind == "whole" else len(answer.json["data"]) == 1


async def health(gateway: GatewayProcess, name: str) -> dict[str, Any]:
    answer = await call(gateway.port, "GET", "/admin/backends", ADMIN)
    (found,) = [backend for backend in answer.json["data"] if backend["name"] == name]
    return dict(found)


async def test_weights_decide_how_often_a_route_is_taken(caller: Caller) -> None:
    """200 draws of 3 in 4: 150, and six standard deviations (6.1 each) to both sides."""
    room = asyncio.Semaphore(10)

    async def one(number: int) -> None:
        async with room:
            answer = await caller.call("weighted", KINDS[number % 3])
            assert said(answer, KINDS[number % 3])

    await asyncio.gather(*(one(number) for number in range(200)))
    found = Counter(backend for _, backend, _, _ in await caller.rows())
    assert found.keys() == {"often", "seldom"}
    assert 113 < found["often"] < 187
    assert found.total() == 200


async def test_a_route_that_says_when_to_come_back_is_left_alone_until_then(
    caller: Caller, gateway: GatewayProcess
) -> None:
    first = await caller.call("cooled")
    assert said(first, "whole")
    assert first.headers["x-gateway-backend"] == "calm"
    assert await caller.rows() == [(1, "busy", "error", False), (2, "calm", "ok", True)]

    for kind in (*KINDS, *KINDS):
        assert said(await caller.call("cooled", kind), kind)
    assert (await caller.rows())[2:] == [(1, "calm", "ok", True)] * 6
    assert await caller.asked() == ["m", *["answer"] * 7]

    busy = await health(gateway, "busy")
    assert busy["status"] == "cooling"
    (route,) = busy["routes"]
    assert (route["model"], route["status"], route["calls"], route["failures"]) == ("m", "cooling", 1, 1)
    assert 300 < route["retry_in_seconds"] <= 600
    calm = await health(gateway, "calm")
    assert (calm["status"], calm["routes"][0]["status"], calm["routes"][0]["failures"]) == ("ok", "ok", 0)

    alone = await caller.call("alone")
    assert alone.status == 429, "the last route that is left is tried, and its own words are told"
    assert alone.headers["retry-after"] == "600"
    assert (await caller.rows())[-1] == (1, "busy", "error", False)


@pytest.mark.parametrize("kind", KINDS)
async def test_when_all_routes_fail_the_fallback_answers(kind: str, caller: Caller) -> None:
    answer = await caller.call(f"down.{kind}", kind)
    assert said(answer, kind)
    assert answer.headers["x-gateway-backend"] == f"answer.{kind}"
    assert await caller.rows() == [(1, f"error-503.{kind}", "error", False), (2, f"answer.{kind}", "ok", True)]
    assert await caller.asked() == ["error-503", "answer"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("model", "script"), [("refused", "error-401"), ("dropped", "drop")])
async def test_the_next_route_answers_whatever_is_wrong_with_the_first(
    model: str, script: str, kind: str, caller: Caller
) -> None:
    assert said(await caller.call(f"{model}.{kind}", kind), kind)
    assert await caller.rows() == [(1, f"{script}.{kind}", "error", False), (2, f"answer.{kind}", "ok", True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["once-500", "once-503"])
async def test_the_only_route_is_tried_once_more(model: str, kind: str, caller: Caller) -> None:
    assert said(await caller.call(model, kind), kind)
    assert await caller.rows() == [(1, "only", "error", False), (2, "only", "ok", True)]
    assert len(await caller.asked()) == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_and_not_a_third_time(kind: str, caller: Caller) -> None:
    answer = await caller.call("twice", kind)
    assert answer.status == 503
    assert answer.headers["x-should-retry"] == "false"
    assert await caller.rows() == [(1, "only", "error", False), (2, "only", "error", False)]


@pytest.mark.parametrize("kind", KINDS)
async def test_when_all_are_down_the_last_one_is_heard(kind: str, caller: Caller) -> None:
    answer = await caller.call(f"all-down.{kind}", kind)
    assert (answer.status, answer.headers["x-should-retry"]) == (503, "false")
    assert [backend for _, backend, _, _ in await caller.rows()] == [f"error-500.{kind}", f"error-503.{kind}"]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_clients_own_mistake_is_nobody_elses(kind: str, caller: Caller) -> None:
    for _ in range(2):
        answer = await caller.call(f"wrong.{kind}", kind)
        assert (answer.status, answer.json["error"]["message"]) == (400, "Invalid value: 'robot'.")
    assert await caller.rows() == [(1, f"error-400.{kind}", "error", False)] * 2, "nor does it cool the route down"
    assert await caller.asked() == ["error-400"] * 2


async def test_after_the_first_byte_there_is_no_other_attempt(caller: Caller) -> None:
    answer = await caller.call("broken.stream", "stream")
    assert answer.status == 200
    assert not answer.clean_end
    assert "error" in answer.events[-1]
    assert await caller.asked() == ["error-mid-stream"]
    assert await caller.rows() == [(1, "error-mid-stream.stream", "error", True)]


async def test_the_health_of_routes_is_for_admins(gateway: GatewayProcess) -> None:
    _, key = await asyncio.to_thread(gateway.create_key, "ann")
    answer = await call(gateway.port, "GET", "/admin/backends", {"authorization": f"Bearer {key}"})
    assert (answer.status, answer.json["error"]["code"]) == (403, "permission_denied")

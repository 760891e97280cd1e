"""`GET /metrics` of gateways as they run: all workers as one, numbers that agree with the books, who may read."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.metrics import REQUESTS
from gateway.metrics_numbers import Together
from tests_standalone.conftest import eventually
from tests_standalone.support.gateway import GatewayProcess, free_port
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import PRICE, Start, end, in_front_of
from tests_standalone.system.http import Answer, call, chat, post_chat, request_bytes

CHAT = "/v1/chat/completions"
CLOSED = free_port()


class Numbers:
    """What a scrape has said; names without `gateway_`."""

    def __init__(self, text: str) -> None:
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """The sum of those that have these labels."""
        wanted = labels.items()
        return sum(
            found.value for found in self.samples if found.name == f"gateway_{name}" and found.labels.items() >= wanted
        )

    def values(self, label: str) -> set[str]:
        return {found.labels[label] for found in self.samples if label in found.labels}


async def scrape(gateway: GatewayProcess, headers: Mapping[str, str] | None = None) -> Numbers:
    answer = await call(gateway.port, "GET", "/metrics", headers)
    assert answer.status == 200, answer.body
    return Numbers(answer.body.decode())


async def scraped(gateway: GatewayProcess, name: str, value: float, **labels: str) -> Numbers:
    """The first scrape that says so. A worker counts a request when its reply has gone: its client may be faster."""

    async def asked() -> Numbers | None:
        found = await scrape(gateway)
        return found if found.total(name, **labels) == value else None

    found: Numbers = await eventually(asked)
    return found


def taken(folder: Path) -> dict[str, float]:
    """The chat requests that each worker's file has."""
    found = {}
    for file in folder.glob("*.totals"):
        samples = [
            sample for metric in Together([REQUESTS], [file.read_bytes()]).collect() for sample in metric.samples
        ]
        found[file.name] = sum(sample.value for sample in samples if sample.labels["route"] == CHAT)
    return found


# Several workers


def folder_of(pid: int) -> Path:
    """What a process was told when it was started."""
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return Path(dict(line.split("=", 1) for line in environment if line)["PROMETHEUS_MULTIPROC_DIR"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the workers of `two` keep their numbers."""
    return tmp_path / "metrics"


@pytest.fixture
async def two(upstream: ScriptedUpstream, start: Start, folder: Path) -> GatewayProcess:
    return await start(in_front_of(upstream, workers=2), env={"PROMETHEUS_MULTIPROC_DIR": str(folder)})


async def spread(gateway: GatewayProcess, folder: Path) -> int:
    """Requests, until two workers have had some more; how many."""
    sent = 0
    before = taken(folder)
    while sum(count > before.get(name, 0) for name, count in taken(folder).items()) < 2:
        answers = await asyncio.gather(*(post_chat(gateway.port, chat("answer")) for _ in range(20)))
        assert {answer.status for answer in answers} == {200}
        sent += len(answers)
    return sent


async def test_whoever_is_asked_tells_of_all(two: GatewayProcess, folder: Path, upstream: ScriptedUpstream) -> None:
    sent = await spread(two, folder)
    await scraped(two, "requests_total", sent, route=CHAT)
    for _ in range(20):
        found = await scrape(two)
        assert found.total("requests_total", route=CHAT, status="200") == sent
        assert found.total("request_duration_seconds_count", route=CHAT) == sent
        assert found.total("attempts_total", backend="up", model="answer", status="ok") == sent == len(upstream.tally)
        assert found.total("ledger_turn_wait_seconds_count") == found.total("ledger_batch_turns_sum") == sent
        assert found.total("build_info") == 1


async def test_totals_survive_a_worker_and_its_gauges_do_not(two: GatewayProcess, folder: Path) -> None:
    sent = await spread(two, folder)
    for round_ in range(3):
        victim = two.worker_pids()[round_ % 2]
        os.kill(victim, signal.SIGKILL)
        while victim in two.worker_pids():
            await asyncio.sleep(0.01)
        found = await scrape(two)
        assert found.total("attempts_total", status="ok") == sent
        assert found.total("database_connections_max") in (2, 4), "of one worker, or of two if the next is up"
        sent += await spread(two, folder)
        found = await scraped(two, "requests_total", sent, route=CHAT)
        assert found.total("attempts_total", status="ok") == sent
        assert found.total("database_connections_max") == 4
        await scraped(two, "requests_in_progress", 1)  # the scrape; what others say is up to a second old
    assert taken(folder).keys() == {"0.totals", "1.totals"}


async def test_a_folder_of_its_own_goes_with_the_gateway(
    upstream: ScriptedUpstream, start: Start, tmp_path: Path
) -> None:
    gateway = await start(in_front_of(upstream, workers=2))
    folder = folder_of(gateway.worker_pids()[0])
    assert folder.is_dir()
    assert await end(gateway) == 0
    assert not folder.exists()


# The books


async def test_numbers_agree_with_the_usage_rows(upstream: ScriptedUpstream, start: Start, database_url: str) -> None:
    models = {
        name: {"backend": "up", "model": name, "price": PRICE}
        for name in ("answer", "cached", "reasoning", "no-usage", "cut-fin", "error-429")
    }
    models["second"] = {"routes": [{"backend": "up", "model": "error-503"}], "fallbacks": ["answer"]}
    models["gone"] = {"routes": [{"backend": "nowhere", "model": "x"}]}
    backends = {
        "up": {"type": "openai", "base_url": upstream.base_url, "api_key": "any"},
        "nowhere": {"type": "openai", "base_url": f"http://127.0.0.1:{CLOSED}/v1", "api_key": "any"},
    }
    gateway = await start(in_front_of(upstream, database_url, models=models, backends=backends))
    bodies = [chat(name, stream=stream) for name in models for stream in (False, True)]
    bodies.append(chat("answer-of-no-price"))
    for body in bodies:
        await post_chat(gateway.port, body)

    found = await scrape(gateway)
    rows = await asyncio.to_thread(gateway.query, "SELECT * FROM usage_view")

    def summed(column: str, **where: str) -> float:
        chosen = [row for row in rows if all(row[name] == value for name, value in where.items())]
        return sum(float(row[column] or 0) for row in chosen)

    for kind in ("input", "cached", "output", "reasoning"):
        assert found.total("tokens_total", kind=kind) == summed(f"{kind}_tokens") > 0
        assert found.total("tokens_total", kind=kind, model="cached") == summed(f"{kind}_tokens", model="cached")
    assert found.total("cost_usd_total") == pytest.approx(summed("cost_usd"), abs=1e-12)
    assert found.total("cost_usd_total", model="reasoning") == pytest.approx(summed("cost_usd", model="reasoning"))
    assert found.total("cost_unknown_total") == sum(row["cost_usd"] is None for row in rows) > 0
    for status in ("ok", "error"):
        assert found.total("attempts_total", status=status) == sum(row["status"] == status for row in rows) > 0
    streamed = [row["ttft_ms"] / 1000 for row in rows if row["ttft_ms"] is not None]
    assert found.total("time_to_first_token_seconds_count") == len(streamed) > 0
    assert found.total("time_to_first_token_seconds_sum") == pytest.approx(sum(streamed))
    assert found.total("attempt_duration_seconds_sum") == pytest.approx(summed("duration_ms") / 1000)


async def test_failures_of_upstreams(upstream: ScriptedUpstream, start: Start) -> None:
    backends = {
        "up": {"type": "openai", "base_url": upstream.base_url, "api_key": "any"},
        "nowhere": {"type": "openai", "base_url": f"http://127.0.0.1:{CLOSED}/v1", "api_key": "any"},
    }
    gateway = await start(in_front_of(upstream, backends=backends))
    for body in (chat("error-429"), chat("error-400"), chat("cut-fin", stream=True), chat("nowhere/x")):
        await post_chat(gateway.port, body)
    await call(gateway.port, "POST", "/v1/audio/speech", {}, {"model": "cut-fin", "voice": "alloy", "input": "hi"})
    found = await scrape(gateway)
    reasons = {reason: found.total("upstream_errors_total", backend="up", reason=reason) for reason in (
        "rate_limited", "status_4xx", "broken", "unreachable")}  # fmt: skip
    assert reasons["rate_limited"] >= 1, "once for each try"
    assert (reasons["status_4xx"], reasons["broken"], reasons["unreachable"]) == (1, 2, 0)
    assert found.total("upstream_errors_total", backend="nowhere", reason="unreachable") >= 1


async def test_streams_that_are_open(upstream: ScriptedUpstream, start: Start) -> None:
    gateway = await start(in_front_of(upstream))
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        writer.write(request_bytes("POST", CHAT, None, chat("held", stream=True)))
        await reader.readuntil(b"data: ")
        found = await scraped(gateway, "requests_in_progress", 2)
        assert found.total("event_streams_open") == 1
        upstream.release()
        assert (await reader.read()).endswith(b"0\r\n\r\n")
        found = await scraped(gateway, "requests_in_progress", 1)
        assert found.total("event_streams_open") == 0
    finally:
        writer.close()


# Labels


async def test_labels_hold_nothing_of_clients(upstream: ScriptedUpstream, start: Start) -> None:
    """A102, A103."""
    gateway = await start(in_front_of(upstream))
    key_id, key = await asyncio.to_thread(gateway.create_key, "ann-canary")
    _, admin = await asyncio.to_thread(gateway.create_key, "root", admin=True)
    sends = {"authorization": f"Bearer {key}"}
    answers: list[Answer] = []
    for number in range(100):
        body = chat(f"made-up-canary-{number}", user=f"user-canary-{number}", conversation_id=f"talk-canary-{number}")
        answers.append(await post_chat(gateway.port, body, sends))
        answers.append(await call(gateway.port, "GET", f"/v1/models/canary-{number}", sends))
        answers.append(await call(gateway.port, f"CANARY{number}", f"/canary-{number}?canary={number}", sends))
    assert {answer.status for answer in answers} >= {200, 404}
    text = (await call(gateway.port, "GET", "/metrics", {"authorization": f"Bearer {admin}"})).body.decode()
    assert "canary" not in text.lower()
    for secret in (key_id, key, admin, "sk-upstream-secret", upstream.root_url):
        assert secret not in text
    found = Numbers(text)
    assert found.values("model") == {"other"}
    assert found.values("route") <= {CHAT, "/v1/models/{model}", "other", "/health/ready"}
    assert found.total("attempts_total", model="other") == 100


# Who may read


async def status_of(gateway: GatewayProcess, **headers: str) -> int:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return (await call(gateway.port, "GET", "/metrics", sent)).status


async def test_without_a_key_as_long_as_there_is_none(start: Start) -> None:
    """A13."""
    gateway = await start({})
    assert await status_of(gateway) == 200
    assert await status_of(gateway, x_forwarded_for="10.0.0.1") == 401
    assert await status_of(gateway, host="gateway.example.com") == 401
    assert await status_of(gateway, origin="https://evil.example.com") == 401

    _, user = await asyncio.to_thread(gateway.create_key, "ann")
    _, admin = await asyncio.to_thread(gateway.create_key, "root", admin=True)
    while await status_of(gateway) == 200:  # until this worker knows of the keys
        await asyncio.sleep(0.01)
    assert await status_of(gateway) == 401
    assert await status_of(gateway, authorization=f"Bearer {user}") == 403
    assert await status_of(gateway, authorization=f"Bearer {admin}") == 200
    assert await status_of(gateway, authorization="Bearer sk-nobody") == 401


@pytest.mark.parametrize(
    ("config", "keyless"),
    [
        ({"auth": {"mode": "keys"}}, 401),
        ({"auth": {"mode": "open"}}, 403),
        ({"auth": {"mode": "auto", "admin_key": "sk-admin-of-the-file"}}, 401),
        ({"auth": {"mode": "keys"}, "server": {"metrics": "open"}}, 200),
        ({"auth": {"mode": "open"}, "server": {"metrics": "open"}}, 200),
    ],
)
async def test_without_a_key(start: Start, config: dict[str, Any], keyless: int) -> None:
    assert await status_of(await start(config)) == keyless


@pytest.mark.parametrize("mode", ["keys", "open"])
async def test_the_key_of_the_configuration(start: Start, mode: str) -> None:
    gateway = await start({"auth": {"mode": mode, "admin_key": "sk-admin-of-the-file"}})
    assert await status_of(gateway, x_api_key="sk-admin-of-the-file") == 200


async def test_while_the_database_is_down(start: Start) -> None:
    config = {
        "auth": {"admin_key": "sk-admin-of-the-file"},
        "database": {"url": f"postgresql://nobody@127.0.0.1:{CLOSED}/nothing"},
    }
    gateway = await start(config, ready_path="/health/live")
    assert await status_of(gateway) == 503
    found = await scrape(gateway, {"x-api-key": "sk-admin-of-the-file"})
    assert found.total("database_connections_open") == 0


async def test_other_methods_and_who_asks_how(start: Start) -> None:
    gateway = await start({})
    assert (await call(gateway.port, "POST", "/metrics")).status == 405
    answer = await call(gateway.port, "GET", "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.clean_end
    answer = await call(gateway.port, "GET", "/metrics", {"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.body.endswith(b"# EOF\n")

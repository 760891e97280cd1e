"""What happened in, numbers with bounded labels out; and those of several workers as one."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from gateway.backends.base import ModelInfo
from gateway.backends.scripted import ScriptedBackend
from gateway.catalog import Catalog, Provider
from gateway.errors import NeverSent, UpstreamError, UpstreamTimeout, UpstreamUnreachable
from gateway.ledger import Ledger
from gateway.metrics import MOST_MODELS, Metrics, public_names
from gateway.metrics_numbers import Rows
from gateway.store.database import Database
from gateway.turns import Turn
from tests_standalone.conftest import Unsteady, opened, settle, usage_row
from tests_standalone.support.gateway import ROOT

CHAT = "/v1/chat/completions"


class Numbers(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """The samples of a text, by name (without `gateway_`) and labels."""

    def __init__(self, text: str) -> None:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        super().__init__(
            ((found.name.removeprefix("gateway_"), frozenset(found.labels.items())), found.value) for found in samples
        )
        assert len(samples) == len(self), "a sample is there twice"

    def one(self, name: str, **labels: str) -> float:
        return self[name, frozenset(labels.items())]

    def total(self, name: str, **labels: str) -> float:
        """The sum of those that have these labels."""
        wanted = set(labels.items())
        return sum(value for (found, has), value in self.items() if found == name and has >= wanted)

    def labels(self, label: str) -> set[str]:
        return {value for _, labels in self for name, value in labels if name == label}


def nobody_knows(_name: str) -> bool:
    return False


def all_public(_name: str) -> bool:
    return True


async def numbers(metrics: Metrics) -> Numbers:
    body, _ = await metrics.render()
    return Numbers(body.decode())


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(all_public, "1.2.3")


# Requests


async def test_requests_by_route_and_status(metrics: Metrics) -> None:
    for route, method, status in ((CHAT, "POST", 200), (CHAT, "POST", 200), (CHAT, "POST", 429), ("/", "GET", 200)):
        metrics.request_begun()
        metrics.request_ended(route, method, status, 0.5)
    found = await numbers(metrics)
    assert found.one("requests_total", route=CHAT, method="POST", status="200") == 2
    assert found.one("requests_total", route=CHAT, method="POST", status="429") == 1
    assert found.total("requests_total") == 4
    assert found.one("request_duration_seconds_count", route=CHAT) == 3
    assert found.one("request_duration_seconds_sum", route=CHAT) == 1.5
    assert found.one("request_duration_seconds_bucket", route=CHAT, le="0.25") == 0
    assert found.one("request_duration_seconds_bucket", route=CHAT, le="0.5") == 3


@pytest.mark.parametrize(
    ("route", "label"),
    [("/v1/models/{id:path}", "/v1/models/{id}"), ("/chat/{id}/x", "/chat/{id}/x"), ("", "other")],
)
async def test_a_route_is_named_by_its_template(metrics: Metrics, route: str, label: str) -> None:
    metrics.request_ended(route, "GET", 200, 0.1)
    assert (await numbers(metrics)).labels("route") == {label}


async def test_methods_that_clients_make_up_are_one_label(metrics: Metrics) -> None:
    """A102."""
    for number in range(1000):
        metrics.request_ended("/", f"M{number}", 405, 0.1)
    found = await numbers(metrics)
    assert found.one("requests_total", route="/", method="other", status="405") == 1000
    assert found.labels("method") == {"other"}


# Attempts


async def test_an_attempt_counts_as_its_row_says(metrics: Metrics) -> None:
    row = usage_row(
        backend="up", model="m", input_tokens=100, cached_tokens=40, output_tokens=20, reasoning_tokens=5,
        cost_nanousd=2_500_000, ttft_ms=300, duration_ms=1500,
    )  # fmt: skip
    metrics.attempt_ended(row)
    metrics.attempt_ended(row)
    found, of = await numbers(metrics), {"backend": "up", "model": "m"}
    tokens = {kind: found.one("tokens_total", kind=kind, **of) for kind in ("input", "cached", "output", "reasoning")}
    assert tokens == {"input": 200, "cached": 80, "output": 40, "reasoning": 10}
    assert found.one("cost_usd_total", **of) == pytest.approx(0.005)
    assert found.one("cost_unknown_total", **of) == 0
    assert found.one("time_to_first_token_seconds_sum", **of) == pytest.approx(0.6)
    assert found.one("attempt_duration_seconds_sum", **of) == pytest.approx(3)
    assert found.one("attempts_total", status="ok", **of) == 2
    assert found.total("attempts_total") == 2


async def test_an_unknown_cost_is_not_zero(metrics: Metrics) -> None:
    metrics.attempt_ended(usage_row(cost_nanousd=None, status="error", input_tokens=0, output_tokens=0))
    found = await numbers(metrics)
    assert found.total("cost_unknown_total") == 1
    assert found.total("cost_usd_total") == 0
    assert found.total("attempts_total", status="error") == 1
    assert found.total("time_to_first_token_seconds_count") == 0, "no stream, no first token"


async def test_names_that_nobody_lists_are_one_label() -> None:
    """A102."""
    metrics = Metrics(lambda name: name == "known", "1")
    for number in range(10_000):
        metrics.attempt_ended(usage_row(model=f"made-up-{number}", input_tokens=1))
    metrics.attempt_ended(usage_row(model="known"))
    found = await numbers(metrics)
    assert found.labels("model") == {"known", "other"}
    assert found.one("tokens_total", backend="b", model="other", kind="input") == 10_000


async def test_of_many_public_names_the_first_have_a_label(metrics: Metrics) -> None:
    for number in range(MOST_MODELS + 50):
        for _ in range(2):
            metrics.attempt_ended(usage_row(model=f"m{number}"))
    found = await numbers(metrics)
    assert found.labels("model") == {f"m{number}" for number in range(MOST_MODELS)} | {"other"}
    assert found.total("attempts_total") == 2 * (MOST_MODELS + 50)
    assert found.total("attempts_total", model="other") == 100


async def test_a_name_that_is_listed_later_gets_its_label() -> None:
    listed: set[str] = set()
    metrics = Metrics(listed.__contains__, "1")
    metrics.attempt_ended(usage_row(model="new"))
    listed.add("new")
    metrics.attempt_ended(usage_row(model="new"))
    found = await numbers(metrics)
    assert (found.total("attempts_total", model="other"), found.total("attempts_total", model="new")) == (1, 1)


def test_nothing_is_looked_up_twice(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything() -> None:
        metrics.request_begun()
        metrics.attempt_ended(usage_row(cached_tokens=1, reasoning_tokens=1, ttft_ms=1))
        metrics.committed(1, 0.1)
        metrics.commit_failed()
        metrics.turn_recorded(0.1)
        metrics.turn_refused()
        metrics.request_ended(CHAT, "POST", 200, 0.1)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a look-up")

    everything()
    monkeypatch.setattr(Rows, "cells", refuse)
    everything()
    with pytest.raises(AssertionError, match="a look-up"):
        metrics.request_ended(CHAT, "POST", 201, 0.1)


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("configured", True), ("listed", True), ("org/listed:8b", True), ("up/listed", True),
        ("up/org/listed:8b", True), ("alias", False), ("up/configured", False), ("up/", False),
        ("other/listed", False), ("", False),
    ],
)  # fmt: skip
async def test_public_names(name: str, public: bool) -> None:
    provider = Provider(ScriptedBackend("up"), static=True)
    provider.listed = {listed: ModelInfo(listed) for listed in ("listed", "org/listed:8b")}
    assert public_names(Catalog({"up": provider}), {"configured": 1})(name) is public


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (UpstreamTimeout("silent"), "timeout"),
        (UpstreamUnreachable("nobody there"), "unreachable"),
        (UpstreamError("broke off"), "broken"),
        (UpstreamError("slow down", status=429, upstream_status=429), "rate_limited"),
        (UpstreamError("no", status=400, upstream_status=400), "status_4xx"),
        (UpstreamError("wrong key", upstream_status=401), "status_4xx"),
        (UpstreamError("down", upstream_status=503), "status_5xx"),
    ],
)
async def test_failures_of_upstreams(metrics: Metrics, failure: UpstreamError, reason: str) -> None:
    metrics.upstream_failed("up", failure)
    found = await numbers(metrics)
    assert found.one("upstream_errors_total", backend="up", reason=reason) == 1
    assert found.total("upstream_errors_total") == 1


async def test_what_was_never_sent_is_no_failure_of_an_upstream(metrics: Metrics) -> None:
    metrics.upstream_failed("up", NeverSent("ended first"))
    assert (await numbers(metrics)).total("upstream_errors_total") == 0


# The ledger, the pool, gauges


async def test_the_ledger(metrics: Metrics, sqlite: Database) -> None:
    unsteady = Unsteady(sqlite)
    ledger = Ledger(unsteady, metrics)
    metrics.watch(sqlite, ledger)
    ledger.start()
    try:
        unsteady.hold()
        turns = [asyncio.create_task(ledger.record(Turn([usage_row()]))) for _ in range(5)]
        await settle()
        assert (await numbers(metrics)).one("ledger_turns_waiting") == 5
        unsteady.let_go()
        await asyncio.gather(*turns)
    finally:
        await ledger.aclose()
    found = await numbers(metrics)
    assert found.one("ledger_turns_waiting") == 0
    assert found.one("ledger_batch_turns_sum") == found.one("ledger_turn_wait_seconds_count") == 5
    assert found.one("ledger_commit_seconds_count") == found.one("ledger_batch_turns_count") == 1
    assert found.one("ledger_turn_wait_seconds_sum") >= 5 * found.one("ledger_commit_seconds_sum") > 0
    assert found.one("ledger_commit_failures_total") == found.one("ledger_turns_not_recorded_total") == 0


async def test_the_use_of_the_database(metrics: Metrics, tables_url: str) -> None:
    async with opened(tables_url) as database:
        metrics.watch(database, Ledger(database))
        await database.fetch("SELECT 1")
        idle = await numbers(metrics)
        assert idle.one("database_connections_in_use") == 0
        assert 1 <= idle.one("database_connections_open") <= idle.one("database_connections_max")
        if database.dialect == "postgres":
            async with database.transaction():
                assert (await numbers(metrics)).one("database_connections_in_use") == 1
    assert (await numbers(metrics)).one("database_connections_open") == 0


async def test_requests_and_streams_that_run(metrics: Metrics, sqlite: Database) -> None:
    metrics.watch(sqlite, Ledger(sqlite))
    for _ in range(3):
        metrics.request_begun()
    metrics.stream_begun()
    found = await numbers(metrics)
    assert (found.one("requests_in_progress"), found.one("event_streams_open")) == (3, 1)
    metrics.request_ended(CHAT, "POST", 200, 1, streamed=True)
    metrics.request_ended(CHAT, "POST", 200, 1)
    found = await numbers(metrics)
    assert (found.one("requests_in_progress"), found.one("event_streams_open")) == (1, 0)


async def test_the_version(metrics: Metrics) -> None:
    assert (await numbers(metrics)).one("build_info", version="1.2.3") == 1


# Texts


async def test_two_in_one_process_count_for_themselves() -> None:
    one, other = Metrics(all_public, "1"), Metrics(all_public, "1")
    one.attempt_ended(usage_row())
    assert (await numbers(one)).total("attempts_total") == 1
    assert (await numbers(other)).total("attempts_total") == 0


async def test_every_name_has_our_prefix_and_a_sentence(metrics: Metrics, sqlite: Database) -> None:
    metrics.watch(sqlite, Ledger(sqlite))
    body, kind = await metrics.render()
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(body.decode()))
    assert len(families) > 20
    for family in families:
        assert family.name.startswith("gateway_")
        assert family.documentation[0].isupper()
        assert family.documentation.endswith(".")


async def test_all_metrics_are_in_the_docs(metrics: Metrics, sqlite: Database) -> None:
    metrics.watch(sqlite, Ledger(sqlite))
    body, _ = await metrics.render()
    told = {line.split()[2] for line in body.decode().splitlines() if line.startswith("# TYPE ")}
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    listed = {cell.strip("` ") for line in page.splitlines() if line.startswith("| `") for cell in line.split("|")[1:2]}
    assert listed == told


async def test_open_metrics_for_who_asks_for_it(metrics: Metrics) -> None:
    metrics.attempt_ended(usage_row(model='a "b"\n\\c'))
    body, kind = await metrics.render("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3")
    assert kind.startswith("application/openmetrics-text")
    labels = [sample.labels for family in open_metrics(body.decode()) for sample in family.samples]
    assert 'a "b"\n\\c' in {found.get("model") for found in labels}

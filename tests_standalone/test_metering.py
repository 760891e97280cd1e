"""How an attempt ended in, a usage row out: figures that add up, and costs that nobody has to guess."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gateway.auth import Caller
from gateway.backends.scripted import ScriptedBackend
from gateway.catalog import Route
from gateway.metering import Meter, Outcome, milliseconds_since, nothing, timings, told_tier
from gateway.pricing import NANO, Price, Priced, ServicePrices
from gateway.store.usage import UsageRow
from gateway.wire.chat import Usage
from tests_standalone.conftest import NOON, usage_row

BACKEND = ScriptedBackend("b")
PRICE = Price(2_000_000_000, 8_000_000_000, cached_input=1_000_000_000)


def meter(**changes: Any) -> Meter:
    values: dict[str, Any] = {
        "request_id": "req_1",
        "caller": Caller("ann", "key_1"),
        "end_user": "kid",
        "at": NOON,
        "stream": True,
    }
    return Meter(**values | changes)


def outcome(usage: Usage | None = None, **changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "status": "ok",
        "usage": usage or Usage(10, 5),
        "counted_by": "upstream",
        "finish_reason": "stop",
    }
    return Outcome(**values | changes)


def row_of(price: Priced | None, found: Outcome, **changes: Any) -> UsageRow:
    return meter(**changes).row(Route(BACKEND, "up-m", price), "m", found, time.perf_counter(), charged=True)


def test_a_row_says_who_what_where_and_how_it_ended() -> None:
    usage = Usage(
        *(10, 8),
        cached_tokens=4,
        cache_write_tokens=1,
        audio_input_tokens=2,
        reasoning_tokens=3,
        image_input_tokens=3,
        image_output_tokens=4,
        cache_write_1h_tokens=1,
    )
    row = row_of(PRICE, outcome(usage, ended_by="drain", ttft_ms=12, status="client_disconnected"))
    assert (row.request_id, row.attempt, row.created_at, row.stream, row.charged) == ("req_1", 1, NOON, 1, 1)
    assert (row.user_id, row.key_id, row.end_user) == ("ann", "key_1", "kid")
    assert (row.backend, row.model, row.upstream_model) == ("b", "m", "up-m")
    assert (row.input_tokens, row.cached_tokens, row.cache_write_tokens, row.audio_input_tokens) == (10, 4, 1, 2)
    assert (row.output_tokens, row.reasoning_tokens, row.audio_output_tokens) == (8, 3, 0)
    assert (row.image_input_tokens, row.image_output_tokens, row.cache_write_1h_tokens) == (3, 4, 1)
    assert (row.status, row.finish_reason, row.ended_by, row.ttft_ms) == ("client_disconnected", "stop", "drain", 12)
    assert (row.session_id, row.conversation_id) == (None, None)
    assert row.counted_by == "upstream"


@pytest.mark.parametrize(
    ("price", "usage", "cost", "unknown", "stored"),
    [
        (PRICE, Usage(10, 5), 60_000, 0, '{"input":2000000000,"output":8000000000,"cached_input":1000000000}'),
        (PRICE, Usage(10, 5, cached_tokens=10), 50_000, 0, None),
        (Price(0, 0), Usage(10, 5), 0, 0, '{"input":0,"output":0}'),
        (None, Usage(10, 5), None, 1, None),
        (None, Usage(0, 0), 0, 0, None),
        (Price(1, None), Usage(10, 5), None, 1, '{"input":1}'),
        (Price(1_000_000, None), Usage(10, 0), 10, 0, None),
    ],
    ids=["priced", "cached", "free", "unknown", "unknown but nothing used", "half of it unknown", "the known half"],
)
def test_the_cost(price: Price | None, usage: Usage, cost: int | None, unknown: int, stored: str | None) -> None:
    row = row_of(price, outcome(usage))
    assert (row.cost_nanousd, row.price_unknown) == (cost, unknown)
    if stored is not None or price is None:
        assert row.price == stored


SERVED = ServicePrices(PRICE, {"flex": Price(NANO, 4 * NANO)})


@pytest.mark.parametrize(
    ("priced", "tier", "cost", "stored"),
    [
        (SERVED, None, 60_000, PRICE.to_json()),
        (SERVED, "default", 60_000, PRICE.to_json()),
        (SERVED, "flex", 30_000, '{"input":1000000000,"output":4000000000}'),
        (SERVED, "priority", None, None),
        (PRICE, "priority", 60_000, PRICE.to_json()),
    ],
    ids=["not told", "standard", "its own price", "nobody knows", "configured for all"],
)
def test_the_service_tier_decides(priced: Priced, tier: str | None, cost: int | None, stored: str | None) -> None:
    row = row_of(priced, outcome(service_tier=tier))
    assert (row.cost_nanousd, row.price, row.price_unknown) == (cost, stored, int(cost is None))


def test_nothing_used_costs_nothing_in_any_service_tier() -> None:
    row = row_of(SERVED, outcome(Usage(), service_tier="priority"))
    assert (row.cost_nanousd, row.price_unknown) == (0, 0)


@pytest.mark.parametrize(("told", "tier"), [("flex", "flex"), (None, None), ({"a": 1}, None), (5, None)])
def test_the_service_tier_of_a_reply(told: object, tier: str | None) -> None:
    assert told_tier(told) == tier


def test_attempts_are_counted_and_kept() -> None:
    found = meter()
    route = Route(BACKEND, "up-m", PRICE)
    first = found.row(route, "m", nothing("error"), time.perf_counter(), charged=False)
    second = found.row(route, "other", outcome(), time.perf_counter(), charged=True)
    assert found.rows == [first, second]
    assert first.id != second.id
    assert [(row.attempt, row.model, row.charged, row.cost_nanousd, row.status) for row in found.rows] == [
        (1, "m", 0, 0, "error"),
        (2, "other", 1, 60_000, "ok"),
    ]


def test_nothing_has_no_figures() -> None:
    found = nothing("error")
    assert (found.status, found.usage, found.finish_reason, found.counted_by) == ("error", Usage(), None, "gateway")


@pytest.mark.parametrize("text", ["a\x00b", "\ud800", "x" * 1000])
def test_text_from_outside_is_stored_as_far_as_it_can_be(text: str) -> None:
    """A85. A label must not cost the row."""
    found = meter(end_user=text)
    row = found.row(Route(BACKEND, text, PRICE), text, outcome(finish_reason=text), time.perf_counter(), charged=True)
    for stored in (row.end_user, row.model, row.upstream_model, row.finish_reason):
        assert stored is not None
        assert "\x00" not in stored
        assert len(stored.encode()) <= 256


def test_a_row_takes_at_least_as_long_as_it_took() -> None:
    started = time.perf_counter() - 1.5
    assert 1500 <= milliseconds_since(started) < 10_000
    row = meter().row(Route(BACKEND, "m", None), "m", nothing("error"), started, charged=False)
    assert row.duration_ms >= 1500


@pytest.mark.parametrize(
    ("ttft_ms", "duration_ms", "expected"),
    [
        (200, 1200, {"cache_n": 4, "prompt_n": 100, "prompt_ms": 200, "prompt_per_second": 500.0, "predicted_n": 50,
                     "predicted_ms": 1000, "predicted_per_second": 50.0}),
        (None, 1000, {"cache_n": 4, "prompt_n": 100, "predicted_n": 50, "predicted_ms": 1000,
                      "predicted_per_second": 50.0}),
        (0, 0, {"cache_n": 4, "prompt_n": 100, "prompt_ms": 0, "prompt_per_second": 100_000.0, "predicted_n": 50,
                "predicted_ms": 1, "predicted_per_second": 50_000.0}),
    ],
    ids=["streamed", "whole", "at once"],
)  # fmt: skip
def test_timings(ttft_ms: int | None, duration_ms: int, expected: dict[str, Any]) -> None:
    row = usage_row(input_tokens=100, cached_tokens=4, output_tokens=50, duration_ms=duration_ms)
    assert timings(outcome(ttft_ms=ttft_ms), row) == expected

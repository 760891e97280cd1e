"""How attempts ended, as usage rows: tokens, price, cost, times."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from gateway.auth import Caller
from gateway.catalog import Route
from gateway.ids import ordered_hex
from gateway.store.text import clean
from gateway.store.usage import Status, UsageRow
from gateway.wire.chat import Usage


@dataclass(slots=True)
class Outcome:
    """How an attempt ended. `ended_by` is the disconnect policy that ended it, if one did."""

    status: Status
    usage: Usage
    counted_by: Literal["upstream", "gateway"]
    finish_reason: str | None
    ended_by: str | None = None
    ttft_ms: int | None = None
    cost_unknown: bool = False
    """Something may have been used that nobody reported."""
    service_tier: str | None = None
    """How the upstream served it, in the words of its reply."""


def nothing(status: Status, *, cost_unknown: bool = False) -> Outcome:
    """For an attempt that brought nothing: because it was refused, or (`cost_unknown`) because no answer came."""
    return Outcome(status, Usage(), "gateway", None, cost_unknown=cost_unknown)


def told_tier(told: object) -> str | None:
    """The `service_tier` of a reply. What the request asked for is not believed: it would be the client who says what
    its call costs."""
    return told if isinstance(told, str) else None


@lru_cache(1024)
def _clean_name(model: str) -> str:
    """Once for each model: it comes with every call."""
    return clean(model)


class Meter:
    """Counts the attempts of one logical request. `at` is in milliseconds (UTC)."""

    def __init__(self, request_id: str, caller: Caller, end_user: str | None, at: int, *, stream: bool) -> None:
        self.rows: list[UsageRow] = []
        self._request_id = request_id
        self._caller = caller
        self._end_user = clean(end_user)
        self._at = at
        self._stream = int(stream)

    def row(self, route: Route, model: str, outcome: Outcome, started: float, *, charged: bool) -> UsageRow:
        """The row of the attempt that began at `started` (perf_counter) and is now over; kept in `rows`."""
        usage, caller = outcome.usage, self._caller
        price = route.price.at(self._at, outcome.service_tier) if route.price is not None else None
        spent = usage.input_tokens + usage.output_tokens
        cost = None if outcome.cost_unknown else 0 if not spent else price.cost(usage) if price is not None else None
        unknown = cost is None and not (outcome.cost_unknown and price is not None)
        # By place, in the order of the columns: so many by name take eight times as long.
        row = UsageRow(
            f"use_{ordered_hex()}", self._request_id, len(self.rows) + 1, self._at,
            caller.user_id, caller.key_id, self._end_user, None, None,
            route.backend.name, _clean_name(model), _clean_name(route.upstream_model),
            usage.input_tokens, usage.cached_tokens, usage.cache_write_tokens, usage.audio_input_tokens,
            usage.output_tokens, usage.reasoning_tokens, usage.audio_output_tokens, outcome.counted_by,
            None if price is None else price.to_json(), 1 if unknown else 0, cost, 1 if charged else 0,
            outcome.status, clean(outcome.finish_reason), self._stream, outcome.ended_by,
            outcome.ttft_ms, milliseconds_since(started),
            usage.image_input_tokens, usage.image_output_tokens, usage.cache_write_1h_tokens,
        )  # fmt: skip
        self.rows.append(row)
        return row

    def charged(self) -> tuple[int, int | None]:
        """What counts against the caller's limits: tokens, and nano-dollars; None: something was used, and nobody knows
        what it costs."""
        tokens, cost, unknown = 0, 0, False
        for row in self.rows:
            if row.charged:
                tokens += row.input_tokens + row.output_tokens
                cost += row.cost_nanousd or 0
                unknown = unknown or row.cost_nanousd is None
        return tokens, None if unknown else cost


def timings(outcome: Outcome, row: UsageRow) -> dict[str, float | int]:
    """llama.cpp's figures, as far as they can be told from outside: tokens, milliseconds, tokens per second."""
    prompt_ms, predicted_n = outcome.ttft_ms, row.output_tokens
    predicted_ms = row.duration_ms if prompt_ms is None else row.duration_ms - prompt_ms
    if predicted_ms < 1:
        predicted_ms = 1
    rate = round(predicted_n * 1000 / predicted_ms, 2)
    if prompt_ms is None:
        return {
            "cache_n": row.cached_tokens,
            "prompt_n": row.input_tokens,
            "predicted_n": predicted_n,
            "predicted_ms": predicted_ms,
            "predicted_per_second": rate,
        }
    return {
        "cache_n": row.cached_tokens,
        "prompt_n": row.input_tokens,
        "prompt_ms": prompt_ms,
        "prompt_per_second": round(row.input_tokens * 1000 / (prompt_ms if prompt_ms > 1 else 1), 2),
        "predicted_n": predicted_n,
        "predicted_ms": predicted_ms,
        "predicted_per_second": rate,
    }


def milliseconds_since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)

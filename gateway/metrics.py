"""What Prometheus is told: the numbers of all workers of this host.

Rules:

- A label is a name that the operator or an upstream has given: route, backend, model. Never a user, a key, a
  conversation, or a word that a client made up: model names that nobody configured or lists are `other`.
- What is counted on the hot path is looked up once: the cells of its family for each set of labels. To count is to
  add to them (see `metrics_numbers`): nothing waits anywhere, so nothing is lost, however a worker ends.
- prometheus_client writes the text, and is imported when somebody asks for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Container
from functools import partial
from typing import TYPE_CHECKING

from gateway.errors import NeverSent, UntrueUsage, UpstreamError, UpstreamTimeout, UpstreamUnreachable
from gateway.metrics_files import FOLDER, prepare, read_all, take_place
from gateway.metrics_numbers import Family, Histogram, Rows, Together

if TYPE_CHECKING:
    from gateway.catalog import Catalog
    from gateway.ledger import Ledger
    from gateway.metrics_numbers import Cells
    from gateway.store.database import Database
    from gateway.store.usage import UsageRow

log = logging.getLogger("gateway")

__all__ = ["Metrics", "prepare", "public_names"]

MOST_MODELS = 200
OTHER = "other"
SAMPLE_SECONDS = 1.0

FIRST_TOKEN = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 12, 20, 30, 60)
DURATION = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
COMMIT = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 500)

_counter, _gauge, _histogram = partial(Family, "counter"), partial(Family, "gauge"), partial(Family, "histogram")
_OF = ("backend", "model")

REQUESTS = _counter("requests", "Requests by route and status.", ("route", "method", "status"))
REQUEST_SECONDS = _histogram(
    "request_duration_seconds", "Time from the head of a request to the end of its reply.", ("route",), DURATION
)
UPSTREAM_ERRORS = _counter("upstream_errors", "Failures of upstreams by their kind.", ("backend", "reason"))
ATTEMPTS = _counter("attempts", "Calls to upstreams by how they ended.", (*_OF, "status"))
TOKENS = _counter("tokens", "Tokens by kind; cached ones are part of input, reasoning of output.", (*_OF, "kind"))
COST = _counter("cost_usd", "What calls to upstreams cost, in US dollars.", _OF)
COST_UNKNOWN = _counter("cost_unknown", "Calls to upstreams whose cost nobody knows.", _OF)
FIRST_TOKEN_SECONDS = _histogram(
    "time_to_first_token_seconds", "Time until the first chunk of an upstream's stream.", _OF, FIRST_TOKEN
)
ATTEMPT_SECONDS = _histogram("attempt_duration_seconds", "Time that calls to upstreams took.", _OF, DURATION)
BATCH_TURNS = _histogram("ledger_batch_turns", "Turns in one commit.", bounds=BATCH)
COMMIT_SECONDS = _histogram("ledger_commit_seconds", "Time that a commit took.", bounds=COMMIT)
COMMIT_FAILURES = _counter("ledger_commit_failures", "Commits that failed and are tried again.")
TURN_SECONDS = _histogram(
    "ledger_turn_wait_seconds", "Time that a finished turn waited until it was durable.", bounds=COMMIT
)
TURNS_REFUSED = _counter("ledger_turns_not_recorded", "Turns whose client was told that they are not recorded.")
ADMITTED = _counter("calls_admitted", "Calls that were let in.")
REFUSED = _counter("calls_refused", "Calls that a limit kept out, by its kind.", ("reason",))
TOKENS_RESERVED = _counter(
    "limit_tokens_reserved", "Tokens that calls might have used at most, where those are limited."
)
TOKENS_SETTLED = _counter("limit_tokens_settled", "Tokens that those calls have used.")
USD_RESERVED = _counter("limit_usd_reserved", "US dollars that calls might have cost at most, where there is a budget.")
USD_SETTLED = _counter("limit_usd_settled", "US dollars that those calls have cost.")
ADMISSION_SECONDS = _histogram("admission_wait_seconds", "Time that a call waited to be let in.", bounds=COMMIT)
BUILD_INFO = _gauge("build_info", "The version that runs.", ("version",), combine=max)
REQUESTS_RUNNING = _gauge("requests_in_progress", "Requests that have begun and not ended.")
STREAMS_OPEN = _gauge("event_streams_open", "Replies that are streams of events and not ended.")
TURNS_WAITING = _gauge("ledger_turns_waiting", "Turns that are not durable yet.")
CONNECTIONS_USED = _gauge("database_connections_in_use", "Database connections at work.")
CONNECTIONS_OPEN = _gauge("database_connections_open", "Database connections that are open.")
CONNECTIONS_MOST = _gauge("database_connections_max", "Database connections that may be open.")

FAMILIES = tuple(found for found in list(globals().values()) if isinstance(found, Family))

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})
_STATUSES = ("ok", "error", "client_disconnected", "interrupted")


def public_names(catalog: Catalog, configured: Container[str]) -> Callable[[str], bool]:
    """Is it a model name that the configuration has, or that a backend lists (`backend/model` too)?"""

    def known(name: str) -> bool:
        return name in configured or any(
            name in provider.listed or name.removeprefix(f"{provider.backend.name}/") in provider.listed
            for provider in catalog.providers
        )

    return known


class Metrics:
    """One for each worker, in its running loop. The methods named after events are called when these have happened."""

    def __init__(self, is_public: Callable[[str], bool], version: str) -> None:
        self._folder = os.environ.get(FOLDER)
        self._totals, self._gauges = Rows(), Rows()
        if self._folder:
            try:
                self._totals, self._gauges = take_place(self._folder)
            except OSError as failure:  # no reason for a worker not to start
                log.warning("this worker's metrics are told by nobody else: %s: %s", self._folder, failure.strerror)
                self._folder = None
        self._is_public = is_public
        self._models: set[str] = set()
        self._by_request: dict[tuple[str, str, int], tuple[Cells, Histogram]] = {}
        self._by_model: dict[tuple[str, str], _ModelMetrics] = {}
        self._watched: list[tuple[Cells, Callable[[], float]]] = []
        self._running = 0
        self._streams = 0
        self._one_at_a_time = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._batch_turns = self._totals.histogram(BATCH_TURNS)
        self._commit_seconds = self._totals.histogram(COMMIT_SECONDS)
        self._commit_failures = self._totals.cells(COMMIT_FAILURES)
        self._turn_seconds = self._totals.histogram(TURN_SECONDS)
        self._turns_refused = self._totals.cells(TURNS_REFUSED)
        self._admitted = self._totals.cells(ADMITTED)
        self._admission_seconds = self._totals.histogram(ADMISSION_SECONDS)
        self._reserved = self._totals.cells(TOKENS_RESERVED), self._totals.cells(USD_RESERVED)
        self._settled = self._totals.cells(TOKENS_SETTLED), self._totals.cells(USD_SETTLED)
        self._gauges.cells(BUILD_INFO, version)[0] = 1

    def watch(self, database: Database, ledger: Ledger) -> None:
        """What is looked at when somebody asks, and once a second where another worker may be the one that is asked."""
        reads: dict[Family, Callable[[], float]] = {
            REQUESTS_RUNNING: lambda: self._running,
            STREAMS_OPEN: lambda: self._streams,
            TURNS_WAITING: lambda: ledger.waiting,
            CONNECTIONS_USED: lambda: database.pool_use.busy,
            CONNECTIONS_OPEN: lambda: database.pool_use.open,
            CONNECTIONS_MOST: lambda: database.pool_use.most,
        }
        self._watched = [(self._gauges.cells(family), read) for family, read in reads.items()]
        if self._folder:
            self._keep_sampling()

    def close(self) -> None:
        """What is counted from now on counts as well; the gauges stay as they are."""
        if self._timer is not None:
            self._timer.cancel()

    async def render(self, accept: str = "") -> tuple[bytes, str]:
        """The numbers of all workers as text, and its content type."""
        from prometheus_client.exposition import choose_encoder

        self._sample()
        encode, content_type = choose_encoder(accept)
        async with self._one_at_a_time:
            workers = read_all(self._folder) if self._folder else (self._totals.copy(), self._gauges.copy())
            return await asyncio.to_thread(encode, Together(FAMILIES, workers)), content_type

    def _sample(self) -> None:
        for cells, read in self._watched:
            cells[0] = read()

    def _keep_sampling(self) -> None:
        self._sample()
        self._timer = asyncio.get_running_loop().call_later(SAMPLE_SECONDS, self._keep_sampling)

    # --- requests

    def request_begun(self) -> None:
        self._running += 1

    def stream_begun(self) -> None:
        self._streams += 1

    def request_ended(self, route: str, method: str, status: int, seconds: float, *, streamed: bool = False) -> None:
        """`route` is the path with its parameters' names, empty if there is none for it."""
        self._running -= 1
        self._streams -= streamed
        found = self._by_request.get((route, method, status))
        if found is None:
            found = self._of_request(route, method if method in _METHODS else OTHER, status)
        count, duration = found
        count[0] += 1.0
        duration.observe(seconds)

    def _of_request(self, route: str, method: str, status: int) -> tuple[Cells, Histogram]:
        key, route = (route, method, status), route.replace(":path}", "}") or OTHER
        cells = self._totals.cells(REQUESTS, route, method, str(status))
        found = self._by_request[key] = cells, self._totals.histogram(REQUEST_SECONDS, route)
        return found

    # --- attempts at upstreams

    def attempt_ended(self, row: UsageRow) -> None:
        found = self._by_model.get((row.backend, row.model))
        if found is None:
            found = self._of_model(row.backend, row.model)
        found.ended(row)

    def upstream_failed(self, backend: str, failure: UpstreamError) -> None:
        if not isinstance(failure, NeverSent):
            self._totals.cells(UPSTREAM_ERRORS, backend, _reason(failure))[0] += 1.0

    def _of_model(self, backend: str, model: str) -> _ModelMetrics:
        if model not in self._models:
            if len(self._models) < MOST_MODELS and self._is_public(model):
                self._models.add(model)
            else:
                model = OTHER
        found = self._by_model.get((backend, model))
        if found is None:
            found = self._by_model[backend, model] = _ModelMetrics(self._totals, backend, model)
        return found

    # --- admission

    def admitted(self, seconds: float) -> None:
        self._admitted[0] += 1.0
        self._admission_seconds.observe(seconds)

    def refused(self, reason: str) -> None:
        self._totals.cells(REFUSED, reason)[0] += 1.0

    def reserved(self, tokens: int, nanousd: int) -> None:
        if tokens:
            self._reserved[0][0] += tokens
        if nanousd:
            self._reserved[1][0] += nanousd / 1e9

    def settled(self, tokens: int, nanousd: int) -> None:
        if tokens:
            self._settled[0][0] += tokens
        if nanousd:
            self._settled[1][0] += nanousd / 1e9

    # --- the ledger

    def committed(self, turns: int, seconds: float) -> None:
        self._batch_turns.observe(turns)
        self._commit_seconds.observe(seconds)

    def commit_failed(self) -> None:
        self._commit_failures[0] += 1.0

    def turn_recorded(self, seconds: float) -> None:
        self._turn_seconds.observe(seconds)

    def turn_refused(self) -> None:
        self._turns_refused[0] += 1.0


class _ModelMetrics:
    """The cells of one backend's model, looked up once."""

    def __init__(self, totals: Rows, backend: str, model: str) -> None:
        of = (backend, model)
        self._attempts = {status: totals.cells(ATTEMPTS, *of, status) for status in _STATUSES}
        self._input, self._cached, self._output, self._reasoning = (
            totals.cells(TOKENS, *of, kind) for kind in ("input", "cached", "output", "reasoning")
        )
        self._cost = totals.cells(COST, *of)
        self._cost_unknown = totals.cells(COST_UNKNOWN, *of)
        self._first_token = totals.histogram(FIRST_TOKEN_SECONDS, *of)
        self._seconds = totals.histogram(ATTEMPT_SECONDS, *of)

    def ended(self, row: UsageRow) -> None:
        self._attempts[row.status][0] += 1.0
        self._seconds.observe(row.duration_ms / 1000)
        if row.ttft_ms is not None:
            self._first_token.observe(row.ttft_ms / 1000)
        if tokens := row.input_tokens:
            self._input[0] += tokens
        if tokens := row.cached_tokens:
            self._cached[0] += tokens
        if tokens := row.output_tokens:
            self._output[0] += tokens
        if tokens := row.reasoning_tokens:
            self._reasoning[0] += tokens
        cost = row.cost_nanousd
        if cost is None:
            self._cost_unknown[0] += 1.0
        elif cost:
            self._cost[0] += cost / 1e9


def _reason(failure: UpstreamError) -> str:
    if failure.upstream_status == 429:
        return "rate_limited"
    if failure.upstream_status is not None:
        return f"status_{failure.upstream_status // 100}xx"
    if isinstance(failure, UpstreamTimeout):
        return "timeout"
    if isinstance(failure, UntrueUsage):
        return "usage"
    return "unreachable" if isinstance(failure, UpstreamUnreachable) else "broken"

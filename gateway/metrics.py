"""What Prometheus is told: the numbers of all workers of this host.

Rules:

- A label is a name that the operator or an upstream has given: route, backend, model. Never a user, a key, a
  conversation, or a word that a client made up: model names that nobody configured or lists are `other`.
- What is counted on the hot path is looked up once: a child of its metric for each set of labels.
- prometheus_client is imported when the first `Metrics` is made, not before: see `metrics_files`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING

from gateway.errors import NeverSent, UpstreamError, UpstreamTimeout, UpstreamUnreachable
from gateway.metrics_files import FOLDER, Files, prepare, worker_gone, write_into

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

    from gateway.catalog import Catalog
    from gateway.ledger import Ledger
    from gateway.store.database import Database
    from gateway.store.usage import UsageRow

__all__ = ["Metrics", "prepare", "public_names", "worker_gone"]

MOST_MODELS = 200
OTHER = "other"
SAMPLE_SECONDS = 1.0

FIRST_TOKEN = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 12, 20, 30, 60)
DURATION = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
COMMIT = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 500)

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
        import prometheus_client

        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._folder = os.environ.get(FOLDER)
        if self._folder:
            write_into(self._folder)
        self._registry = prometheus_client.CollectorRegistry()
        self._is_public = is_public
        self._models: set[str] = set()
        self._by_request: dict[tuple[str, str, int], tuple[Callable[[], None], Callable[[float], None]]] = {}
        self._by_model: dict[tuple[str, str], _ModelMetrics] = {}
        self._watched: list[tuple[Gauge, Callable[[], float]]] = []
        self._running = 0
        self._streams = 0
        self._one_at_a_time = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._define_for_requests()
        self._define_for_attempts()
        self._define_for_ledger()
        self._gauge("build_info", "The version that runs.", "version", mode="livemax").labels(version).set(1)

    def watch(self, database: Database, ledger: Ledger) -> None:
        """What is looked at when somebody asks, and once a second where another worker may be the one that is asked."""
        for name, about, read in (
            ("requests_in_progress", "Requests that have begun and not ended.", lambda: self._running),
            ("event_streams_open", "Replies that are streams of events and not ended.", lambda: self._streams),
            ("ledger_turns_waiting", "Turns that are not durable yet.", lambda: ledger.waiting),
            ("database_connections_in_use", "Database connections at work.", lambda: database.pool_use.busy),
            ("database_connections_open", "Database connections that are open.", lambda: database.pool_use.open),
            ("database_connections_max", "Database connections that may be open.", lambda: database.pool_use.most),
        ):
            self._watched.append((self._gauge(name, about), read))
        if self._folder:
            self._keep_sampling()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def render(self, accept: str = "") -> tuple[bytes, str]:
        """The numbers of all workers as text, and its content type."""
        from prometheus_client.exposition import choose_encoder

        self._sample()
        encode, content_type = choose_encoder(accept)
        source = Files(self._folder) if self._folder else self._registry
        async with self._one_at_a_time:
            return await asyncio.to_thread(encode, source), content_type

    # --- requests

    def request_begun(self) -> None:
        self._running += 1

    def stream_begun(self) -> None:
        self._streams += 1

    def request_ended(self, route: str, method: str, status: int, seconds: float, *, streamed: bool = False) -> None:
        """`route` is the path with its parameters' names, empty if there is none for it."""
        self._running -= 1
        self._streams -= streamed
        key = (route, method if method in _METHODS else OTHER, status)
        found = self._by_request.get(key)
        if found is None:
            found = self._by_request[key] = self._of_request(*key)
        count, observe = found
        count()
        observe(seconds)

    def _define_for_requests(self) -> None:
        self._requests = self._counter("requests", "Requests by route and status.", "route", "method", "status")
        self._request_seconds = self._histogram(
            "request_duration_seconds", "Time from the head of a request to the end of its reply.", DURATION, "route"
        )

    def _of_request(self, route: str, method: str, status: int) -> tuple[Callable[[], None], Callable[[float], None]]:
        route = route.replace(":path}", "}") or OTHER
        return self._requests.labels(route, method, str(status)).inc, self._request_seconds.labels(route).observe

    # --- attempts at upstreams

    def attempt_ended(self, row: UsageRow) -> None:
        found = self._by_model.get((row.backend, row.model))
        if found is None:
            found = self._of_model(row.backend, row.model)
        found.ended(row)

    def upstream_failed(self, backend: str, failure: UpstreamError) -> None:
        if not isinstance(failure, NeverSent):
            self._upstream_errors.labels(backend, _reason(failure)).inc()

    def _define_for_attempts(self) -> None:
        of = ("backend", "model")
        self._upstream_errors = self._counter(
            "upstream_errors", "Failures of upstreams by their kind.", "backend", "reason"
        )
        self._attempts = self._counter("attempts", "Calls to upstreams by how they ended.", *of, "status")
        self._tokens = self._counter(
            "tokens", "Tokens by kind; cached ones are part of input, reasoning of output.", *of, "kind"
        )
        self._cost = self._counter("cost_usd", "What calls to upstreams cost, in US dollars.", *of)
        self._cost_unknown = self._counter("cost_unknown", "Calls to upstreams whose cost nobody knows.", *of)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Time until the first chunk of an upstream's stream.", FIRST_TOKEN, *of
        )
        self._attempt_seconds = self._histogram(
            "attempt_duration_seconds", "Time that calls to upstreams took.", DURATION, *of
        )

    def _of_model(self, backend: str, model: str) -> _ModelMetrics:
        if model not in self._models:
            if len(self._models) < MOST_MODELS and self._is_public(model):
                self._models.add(model)
            else:
                model = OTHER
        found = self._by_model.get((backend, model))
        if found is None:
            found = self._by_model[backend, model] = _ModelMetrics(self, backend, model)
        return found

    # --- the ledger

    def committed(self, turns: int, seconds: float) -> None:
        self._batch.observe(turns)
        self._commit_seconds.observe(seconds)

    def commit_failed(self) -> None:
        self._commit_failures.inc()

    def turn_recorded(self, seconds: float) -> None:
        self._turn_seconds.observe(seconds)

    def turn_refused(self) -> None:
        self._refused_turns.inc()

    def _define_for_ledger(self) -> None:
        self._batch = self._histogram("ledger_batch_turns", "Turns in one commit.", BATCH)
        self._commit_seconds = self._histogram("ledger_commit_seconds", "Time that a commit took.", COMMIT)
        self._commit_failures = self._counter("ledger_commit_failures", "Commits that failed and are tried again.")
        self._turn_seconds = self._histogram(
            "ledger_turn_wait_seconds", "Time that a finished turn waited until it was durable.", COMMIT
        )
        self._refused_turns = self._counter(
            "ledger_turns_not_recorded", "Turns whose client was told that they are not recorded."
        )

    # --- definitions and gauges

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        from prometheus_client import Counter

        return Counter(name, about, labels, namespace="gateway", registry=self._registry)

    def _histogram(self, name: str, about: str, buckets: Sequence[float], *labels: str) -> Histogram:
        from prometheus_client import Histogram

        return Histogram(name, about, labels, namespace="gateway", registry=self._registry, buckets=buckets)

    def _gauge(self, name: str, about: str, *labels: str, mode: str = "livesum") -> Gauge:
        from prometheus_client import Gauge

        return Gauge(
            name, about, labels, namespace="gateway", registry=self._registry,
            multiprocess_mode=mode,  # type: ignore[arg-type] # a Literal of its own
        )  # fmt: skip

    def _sample(self) -> None:
        for gauge, read in self._watched:
            gauge.set(read())

    def _keep_sampling(self) -> None:
        self._sample()
        self._timer = asyncio.get_running_loop().call_later(SAMPLE_SECONDS, self._keep_sampling)


class _ModelMetrics:
    """The children of one backend's model, looked up once."""

    def __init__(self, metrics: Metrics, backend: str, model: str) -> None:
        of = (backend, model)
        self._attempts = {status: metrics._attempts.labels(*of, status).inc for status in _STATUSES}
        self._input, self._cached, self._output, self._reasoning = (
            metrics._tokens.labels(*of, kind).inc for kind in ("input", "cached", "output", "reasoning")
        )
        self._cost = metrics._cost.labels(*of).inc
        self._cost_unknown = metrics._cost_unknown.labels(*of).inc
        self._first_token = metrics._first_token.labels(*of).observe
        self._seconds = metrics._attempt_seconds.labels(*of).observe

    def ended(self, row: UsageRow) -> None:
        self._attempts[row.status]()
        self._seconds(row.duration_ms / 1000)
        if row.ttft_ms is not None:
            self._first_token(row.ttft_ms / 1000)
        if row.input_tokens:
            self._input(row.input_tokens)
        if row.cached_tokens:
            self._cached(row.cached_tokens)
        if row.output_tokens:
            self._output(row.output_tokens)
        if row.reasoning_tokens:
            self._reasoning(row.reasoning_tokens)
        if row.cost_nanousd is None:
            self._cost_unknown()
        elif row.cost_nanousd:
            self._cost(row.cost_nanousd / 1e9)


def _reason(failure: UpstreamError) -> str:
    if failure.upstream_status == 429:
        return "rate_limited"
    if failure.upstream_status is not None:
        return f"status_{failure.upstream_status // 100}xx"
    if isinstance(failure, UpstreamTimeout):
        return "timeout"
    return "unreachable" if isinstance(failure, UpstreamUnreachable) else "broken"

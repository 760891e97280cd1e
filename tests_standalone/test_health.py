"""Failures and answers of a route in; when it is left alone, and what operators read about it, out."""

from __future__ import annotations

import time

import pytest

from gateway import health as healths
from gateway.errors import UpstreamError, UpstreamTimeout, UpstreamUnreachable
from gateway.health import LONGEST_PAUSE, LONGEST_RETRY_AFTER, RouteHealth


class Clock:
    """Both clocks of the module, moved by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1_800_000_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(healths, "time", found)
    return found


def failure(status: int | None = 503, retry_after: float | None = None, log: str | None = None) -> UpstreamError:
    found = UpstreamError("It failed.", upstream_status=status, log=log)
    found.retry_after = retry_after
    return found


def pause(health: RouteHealth, clock: Clock) -> float:
    return health.cooling_until - clock.now


def test_a_route_nobody_has_used(clock: Clock) -> None:
    assert not RouteHealth().cooling
    assert RouteHealth().describe() == {
        "status": "ok", "retry_in_seconds": None, "calls": 0, "failures": 0, "failures_in_a_row": 0,
        "last_failure": None, "last_failure_at": None,
    }  # fmt: skip


@pytest.mark.parametrize("status", [None, 401, 402, 403, 429, 500, 502, 503, 504, 529])
def test_the_upstreams_own_failures_cool_it_down(status: int | None, clock: Clock) -> None:
    health = RouteHealth()
    health.failed(failure(status))
    assert health.cooling
    clock.now += 0.9
    assert health.cooling
    clock.now += 0.1
    assert not health.cooling


@pytest.mark.parametrize("kind", [UpstreamTimeout, UpstreamUnreachable])
def test_so_does_silence(kind: type[UpstreamError], clock: Clock) -> None:
    health = RouteHealth()
    health.failed(kind("Nobody answered."))
    assert health.cooling


@pytest.mark.parametrize("status", [400, 404, 408, 409, 413, 415, 422])
def test_the_clients_mistakes_do_not(status: int, clock: Clock) -> None:
    health = RouteHealth()
    health.failed(failure(status, retry_after=60))
    assert not health.cooling
    assert (health.calls, health.failures, health.last_failure) == (1, 0, None)


def test_the_pause_doubles_with_each_failure_in_a_row(clock: Clock) -> None:
    health = RouteHealth()
    pauses = []
    for _ in range(8):
        health.failed(failure())
        pauses.append(pause(health, clock))
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_no_number_of_failures_is_too_large(clock: Clock) -> None:
    health = RouteHealth(failures_in_a_row=10**6)
    health.failed(failure())
    assert pause(health, clock) == LONGEST_PAUSE


def test_an_answer_ends_it(clock: Clock) -> None:
    health = RouteHealth()
    for _ in range(3):
        health.failed(failure())
    health.answered()
    assert not health.cooling
    assert (health.calls, health.failures, health.failures_in_a_row) == (4, 3, 0)
    health.failed(failure())
    assert pause(health, clock) == 1


def test_an_answer_to_a_call_that_began_before_the_failure_does_not(clock: Clock) -> None:
    health = RouteHealth()
    health.failed(failure())
    before = health.failures
    health.failed(failure(429, 60))
    health.answered(before)
    assert health.cooling
    assert (health.calls, health.failures_in_a_row) == (3, 2)
    health.answered(health.failures)
    assert not health.cooling


@pytest.mark.parametrize(
    ("told", "pauses"),
    [(0.05, 0.05), (7, 7), (600, 600), (86_400, LONGEST_RETRY_AFTER), (float("inf"), LONGEST_RETRY_AFTER)],
)
def test_the_upstream_says_how_long(told: float, pauses: float, clock: Clock) -> None:
    health = RouteHealth(failures_in_a_row=5)
    health.failed(failure(429, told))
    assert pause(health, clock) == pytest.approx(pauses)


@pytest.mark.parametrize("told", [0, -30])
def test_a_time_that_has_come_is_no_pause(told: float, clock: Clock) -> None:
    health = RouteHealth()
    health.failed(failure(503, told))
    assert not health.cooling
    assert health.failures == 1


def test_what_operators_read(clock: Clock) -> None:
    health = RouteHealth()
    health.answered()
    health.failed(failure(429, 20, log="the upstream failed with status 429"))
    clock.now += 7.26
    assert health.describe() == {
        "status": "cooling", "retry_in_seconds": 12.7, "calls": 2, "failures": 1, "failures_in_a_row": 1,
        "last_failure": "the upstream failed with status 429", "last_failure_at": 1_800_001_000,
    }  # fmt: skip
    clock.now += 12.74
    described = health.describe()
    assert (described["status"], described["retry_in_seconds"]) == ("ok", None)
    assert described["failures_in_a_row"] == 1


def test_without_words_for_the_log_those_for_the_client_are_told() -> None:
    health = RouteHealth()
    health.failed(failure())
    assert health.last_failure == "It failed."
    assert health.last_failure_at == pytest.approx(time.time(), abs=60)

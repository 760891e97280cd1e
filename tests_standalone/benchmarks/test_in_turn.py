"""Contestants in turn, with the upstream in place of each, and what becomes of the figures."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.contestants import Running
from benchmarks.course import Jobs, Mock, Plan
from benchmarks.in_turn import BASE, DIRECT, KINDS, Kind, added, in_turn, markdown, ratio

TITLES = {DIRECT: "direct", BASE: "nginx", "postgres": "gateway, PostgreSQL"}


def result(cpu_us: float | None, p50: float = 0.02) -> dict[str, Any]:
    times = {"p50": p50, "p99": p50 * 2}
    used = {} if cpu_us is None else {"self": cpu_us}
    return {"cpu_us": used, "per_second": 100.0, "latency": times, "first": times}


def test_a_factor_is_that_of_the_same_round() -> None:
    """The machine was half as fast in the second round, for both."""
    rounds = {BASE: [result(20.0), result(40.0), result(20.0)], "any": [result(180.0), result(360.0), result(200.0)]}

    assert ratio(rounds, "any") == pytest.approx(9.0)


def test_there_is_no_factor_to_nothing() -> None:
    assert ratio({BASE: [result(0.0)], "any": [result(180.0)]}, "any") is None
    assert ratio({BASE: [result(20.0)], DIRECT: [result(None)]}, DIRECT) is None


def test_a_time_is_what_is_added_in_the_same_round() -> None:
    rounds = {DIRECT: [result(None, 0.020), result(None, 0.030)], "any": [result(1.0, 0.022), result(1.0, 0.032)]}

    assert added(rounds, "any", "latency", "p50") == pytest.approx(0.002)
    assert added(rounds, "any", "latency", "p99") == pytest.approx(0.004)


def test_the_page_sets_the_goals_beside_the_factors() -> None:
    rounds = {DIRECT: [result(None)], BASE: [result(25.0)], "postgres": [result(225.0, 0.0215)]}
    page = markdown({"date": "today"}, TITLES, {kind.title: rounds for kind in KINDS})

    assert "Must: 8.7x nginx (200 us where nginx took 23), aim: 4.8x, twice the must: 17.4x." in page
    assert "| gateway, PostgreSQL | **9.00x** | 225 | 225 | 100 | 1.50 | 3.00 |" in page
    assert "| direct | - | - | - | 100 | 0.00 | 0.00 |" in page


def test_each_is_measured_once_a_round_and_once_before(mock: Mock) -> None:
    jobs = Jobs(Running(mock.port, processes={"self": [mock.pid]}), mock, Plan(seconds=0.2, warm_up=0.1, rounds=1))
    order: list[Jobs] = []
    kind = Kind("answers", lambda one: (order.append(one), one.answers(2))[1], "latency")
    other = Jobs(jobs.running, mock, Plan(seconds=0.2, warm_up=0.1, rounds=1))
    found = in_turn(kind, {BASE: jobs, "other": other}, rounds=2)

    assert order == [jobs, other] * 3
    assert {name: len(rounds) for name, rounds in found.items()} == {BASE: 2, "other": 2}
    assert all(result["done"] for rounds in found.values() for result in rounds)


def test_what_cannot_run_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program, path=None: None)
    with pytest.raises(SystemExit, match="--in-turn: nginx, plain proxy: nginx is not installed"):
        main(["--in-turn", "--quick"])

"""The long run, for a short time, and what it makes of its figures."""

from __future__ import annotations

import pytest

from benchmarks.contestants import Running
from benchmarks.course import Jobs, Mock, Plan
from benchmarks.soak import Rates, Sample, growth, half_load, markdown, soak


def line(*points: tuple[float, float]) -> list[Sample]:
    return [Sample(seconds, mib) for seconds, mib in points]


def test_half_load_is_a_quarter_of_the_answers_and_a_quarter_of_a_core_of_streams() -> None:
    assert half_load({"per_second": 4000.0}, {"cpu_us": {"self": 2500.0}}) == Rates(1000.0, 100.0)


def test_growth_leaves_the_warm_up_out() -> None:
    cold = [(float(second), 50.0) for second in range(0, 120, 5)]
    warm = [(float(second), 80.0) for second in range(120, 1000, 5)]
    late = [(float(second), 84.0) for second in range(1000, 1201, 5)]

    assert growth(line(*cold, *warm, *late)) == pytest.approx(0.05)


def test_growth_is_that_of_medians() -> None:
    points = [(float(second), 80.0) for second in range(0, 101, 2)]
    points[11], points[-1] = (22.0, 400.0), (100.0, 400.0)

    assert growth(line(*points)) == 0.0


def test_growth_of_a_short_run_has_a_warm_up_too() -> None:
    assert growth(line((0.0, 10.0), (2.0, 80.0), (5.0, 80.0), (10.0, 88.0))) == pytest.approx(0.1)


def test_a_short_soak_on_the_upstream_itself(mock: Mock) -> None:
    jobs = Jobs(Running(mock.port, processes={"self": [mock.pid]}), mock, Plan(warm_up=0.2))
    rates = Rates(50.0, 10.0)
    memory, results = soak(jobs, rates, seconds=2.5, every=0.5)

    assert len(memory) >= 5
    assert all(sample.mib > 0 for sample in memory)
    assert results["answers"]["errors"] == results["streams"]["errors"] == {}
    assert 0 < results["answers"]["ended"] <= 50 * 2.5
    assert results["streams"]["ended"] > 0

    page = markdown({"gateway": "1.0"}, rates, memory, results)
    assert "**Growth after the warm-up: " in page
    assert "| answers | 50 | " in page

"""Many values to a few figures."""

from __future__ import annotations

import pytest

from benchmarks.stats import Spread, median, percentile, spread


def test_a_spread_is_that_of_its_values_in_any_order() -> None:
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(5, 3.0, 3.0, 4.6, 4.96, pytest.approx(4.996), 5.0)


def test_no_values_have_no_spread() -> None:
    assert spread([]) == Spread(0)


def test_a_percentile_lies_between_its_neighbours() -> None:
    assert percentile([0.0, 10.0], 0.9) == 9.0


@pytest.mark.parametrize(("values", "middle"), [([7.0], 7.0), ([1.0, 2.0], 1.5), ([9.0, 1.0, 2.0], 2.0)])
def test_median(values: list[float], middle: float) -> None:
    assert median(values) == middle

"""Many values to a few figures. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """How values are spread; all of it None where there were none."""

    count: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    p999: float | None = None
    largest: float | None = None


def spread(values: Iterable[float]) -> Spread:
    found = sorted(values)
    if not found:
        return Spread(0)
    half, nine, two_nines, three_nines = (percentile(found, share) for share in (0.5, 0.9, 0.99, 0.999))
    return Spread(len(found), sum(found) / len(found), half, nine, two_nines, three_nines, found[-1])


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values, at least one; between two of them a straight line is drawn."""
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    return percentile(sorted(values), 0.5)

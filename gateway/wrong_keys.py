"""How many wrong keys came from where, so that trying many is slow. Right ones are never counted, and never refused."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

AT_ONCE = 100
PER_SECOND = 10
MOST_ADDRESSES = 10_000


class WrongKeys:
    """A bucket for each address, of the addresses that were last seen."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def count(self, address: str) -> float:
        """One more. Returns 0 if that is not too many, or the seconds after which one more will not be."""
        now = self._clock()
        level, at = self._levels.get(address, (float(AT_ONCE), now))
        level = min(float(AT_ONCE), level + (now - at) * PER_SECOND)
        wait = 0.0 if level >= 1 else (1 - level) / PER_SECOND
        self._levels[address] = (level if wait else level - 1, now)
        self._levels.move_to_end(address)
        if len(self._levels) > MOST_ADDRESSES:
            self._levels.popitem(last=False)
        return wait

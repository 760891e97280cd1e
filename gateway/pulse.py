"""How a worker says that it lives, so that what it holds of limits comes back when it does not."""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway.ids import random_hex
from gateway.limits import DEAD_AFTER


def _awake_or_not() -> float:
    """Seconds that go on while the machine sleeps, where the system counts those."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Pulse:
    """The names under which a worker holds something, and since when it has said without a break that it lives.

    It takes another name when nobody can be sure what the old one holds: after a silence in which others may have taken
    all of it back, and after a statement whose end was not seen. The old one goes on living until its last call is
    over; then it says nothing more, and what was left of it comes back.
    """

    def __init__(self, clock: Callable[[], float] = _awake_or_not) -> None:
        self._clock = clock
        self.name = f"w_{random_hex()}"
        self.is_new = True
        self._open: dict[str, int] = {self.name: 0}
        self._last = self._since = clock()

    @property
    def names(self) -> list[str]:
        return list(self._open)

    @property
    def is_steady(self) -> bool:
        """Has it spoken so long without a break that others, had they lived, would have, too?"""
        return self._clock() - self._since > DEAD_AFTER / 1000

    def check(self) -> None:
        """Takes another name if others may have thought this worker dead."""
        if not self.is_new and self._clock() - self._last > DEAD_AFTER / 1000:
            self.rename()

    def rename(self) -> None:
        if not self._open[self.name]:
            del self._open[self.name]
        self.name, self.is_new = f"w_{random_hex()}", True
        self._open[self.name] = 0
        self.stopped()

    def said(self, name: str) -> None:
        """That is known now. After too long a silence it may have been so before it, and not since."""
        self.check()
        if name == self.name:
            self.is_new = False
        self._last = self._clock()

    def stopped(self) -> None:
        self._since = self._clock()

    def entered(self, name: str) -> None:
        self._open[name] = self._open.get(name, 0) + 1

    def left(self, name: str) -> None:
        """A call under that name holds nothing any more; an old name that holds nothing is given up."""
        if name in self._open:
            self._open[name] -= 1
            if not self._open[name] and name != self.name:
                del self._open[name]

"""The end of a worker: nothing new, what runs may finish, what is left is cut in an orderly way.

`server` drives it from the signal: `begin` at once, `cut` when `drain_seconds` have passed. Running exchanges enter
themselves and are told to stop; each then records its turn as interrupted and says so to its client.
"""

from __future__ import annotations

from collections.abc import Callable


class Drain:
    """Belongs to one worker. `stopping` turns readiness red."""

    def __init__(self) -> None:
        self.stopping = False
        self._cut = False
        self._running: set[Callable[[], None]] = set()

    def begin(self) -> None:
        self.stopping = True

    def cut(self) -> None:
        self.stopping = self._cut = True
        for stop in tuple(self._running):
            stop()

    def enter(self, stop: Callable[[], None]) -> None:
        """Until `leave`, `stop` is called when the time is up (at once if it is already)."""
        if self._cut:
            stop()
        self._running.add(stop)

    def leave(self, stop: Callable[[], None]) -> None:
        self._running.discard(stop)

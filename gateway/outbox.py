"""Writes to sockets, gathered until the loop has run what is ready, and then done one behind the other.

A write to a socket whose reader sleeps wakes it, which costs more than the write. Between two writes that lie apart the
reader goes to sleep again; between two that follow each other it does not.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

logger = logging.getLogger(__name__)


class Holder(Protocol):
    """Who holds bytes back."""

    def flush(self) -> None:
        """Writes them, if they can still be written."""


class Outbox:
    """One for each loop and kind of socket. Whoever is added is flushed once, in the order of adding."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.waiting: list[Holder] = []
        """To be added to by those who do it for every chunk; by the first of them after `wake`."""

    def add(self, holder: Holder) -> None:
        if not self.waiting:
            self.wake()
        self.waiting.append(holder)

    def wake(self) -> None:
        """Somebody waits from now on, and nobody has before."""
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        holders, self.waiting = self.waiting, []
        for holder in holders:
            try:
                holder.flush()
            except Exception:  # one connection must not silence the others
                logger.exception("A write failed in a way that nobody foresaw")

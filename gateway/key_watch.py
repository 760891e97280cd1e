"""Whether any key has changed, known without a round trip for each call.

What was read less than `GOOD_SECONDS` ago counts; then the next caller asks again, and those who come meanwhile wait
with it. So a change of a key reaches every worker within that time, a busy worker asks ten times a second and an idle
one not at all, and a database that falls silent lets nobody in for longer. The age of an answer is counted from the
moment at which it was asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gateway.rounds import Rounds
from gateway.store import keys
from gateway.store.database import Database
from gateway.store.keys import KeyState

GOOD_SECONDS = 0.1
_LONG_AGO = float("-inf")


class KeyWatch:
    """Never goes back: neither the revision, nor that a key was ever made, whatever order the answers come in."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._reads: Rounds[None, KeyState] = Rounds(self._read, "key state")
        self._newest = KeyState(-1, ever_made=False)
        self._known_at = _LONG_AGO
        self._loop: asyncio.AbstractEventLoop | None = None

    def known(self) -> KeyState | None:
        """If that needs no round trip."""
        loop = self._loop
        return self._newest if loop is not None and loop.time() - self._known_at < GOOD_SECONDS else None

    async def state(self) -> KeyState:
        """Raises DatabaseUnavailable."""
        return self.known() or await self.look()

    async def look(self) -> KeyState:
        """How it stands now. Raises DatabaseUnavailable."""
        return await self._reads.answer(None)

    def tell(self, state: KeyState, asked_at: float = _LONG_AGO) -> None:
        """Somebody else has learned it, who asked at that moment (monotonic clock)."""
        self._known_at = max(self._known_at, asked_at)
        known = self._newest
        if state.revision > known.revision or state.ever_made > known.ever_made:
            self._newest = KeyState(max(state.revision, known.revision), state.ever_made or known.ever_made)

    async def aclose(self) -> None:
        await self._reads.aclose()

    async def _read(self, asked: Sequence[None]) -> Sequence[KeyState]:
        loop = self._loop = asyncio.get_running_loop()
        asked_at = loop.time()
        try:
            self.tell(await keys.state(self._database))
        except BaseException:
            self._known_at = _LONG_AGO
            raise
        self._known_at = max(self._known_at, asked_at)
        return [self._newest] * len(asked)

"""The keys that a worker has looked up, and those that are none, until the `revision` of the keys moves.

Look-ups that wait share a query, and after one that found a wrong key the next waits for `PAUSE`, so that many wrong
keys are few questions. Both memories have a bound, and wrong keys never push out right ones.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from gateway.caller import Caller
from gateway.rounds import Rounds
from gateway.store import keys
from gateway.store.database import Database
from gateway.store.keys import KeyState, StoredKey

MOST_REMEMBERED = 10_000
"""Of either kind."""
PAUSE = 0.02
"""Seconds."""
V = TypeVar("V")


class Known(NamedTuple):
    key: StoredKey
    caller: Caller


class KnownKeys:
    """Keys by whole digests."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._look_ups: Rounds[str, StoredKey | None] = Rounds(self._look_up, "key look-up")
        self._found: OrderedDict[str, Known] = OrderedDict()
        self._missing: OrderedDict[str, None] = OrderedDict()
        self._revision = -1
        self._missed_at = float("-inf")

    def found(self, digest: str, state: KeyState) -> Known | None:
        """One that was found under this state, or a later one."""
        return self._found.get(digest) if state.revision <= self._revision else None

    async def find(self, digest: str, state: KeyState) -> Known | None:
        """As it stands under this state, or a later one. Raises DatabaseUnavailable."""
        if state.revision > self._revision:
            self._found.clear()
            self._missing.clear()
            self._revision = state.revision
        known = self._found.get(digest)
        if known is not None or digest in self._missing:
            return known
        revision = self._revision
        key = await self._look_ups.answer(digest)
        known = None if key is None else Known(key, Caller.of(key, digest, revision))
        if revision == self._revision:
            if known is None:
                _remember(self._missing, digest, None)
            else:
                _remember(self._found, digest, known)
        return known

    async def _look_up(self, digests: Sequence[str]) -> Sequence[StoredKey | None]:
        wait = self._missed_at + PAUSE - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        found = await keys.by_digests(self._database, list(dict.fromkeys(digests)), int(time.time() * 1000))
        if len(found) < len(digests):
            self._missed_at = time.monotonic()
        return [found.get(digest) for digest in digests]


def _remember(memory: OrderedDict[str, V], digest: str, value: V) -> None:
    memory[digest] = value
    if len(memory) > MOST_REMEMBERED:
        memory.popitem(last=False)

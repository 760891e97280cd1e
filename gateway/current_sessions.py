"""Which session each user is in, as far as one worker knows: a new conversation joins it, and it is opened if the last
one has been idle."""

from __future__ import annotations

import time
from collections import OrderedDict

from gateway.ids import ordered_hex
from gateway.store import sessions
from gateway.store.database import Database

IDLE_MS = 30 * 60 * 1000
NEWS_SECONDS = 1.0
"""So often it is asked whether a session was opened or ended outside of a turn, by any worker."""
_MOST_USERS = 10_000


class CurrentSessions:
    """`idle_ms`: for how long a user may be silent and still be in the same session."""

    def __init__(self, database: Database, idle_ms: int = IDLE_MS) -> None:
        self._database = database
        self._idle_ms = idle_ms
        self._of: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._revision = -1
        self._looked_at = float("-inf")

    @property
    def is_news_due(self) -> bool:
        return bool(self._of) and time.monotonic() - self._looked_at >= NEWS_SECONDS

    async def look_for_news(self) -> None:
        now = time.monotonic()
        revision = await sessions.revision(self._database)
        if revision != self._revision:
            self._of.clear()
        self._revision, self._looked_at = revision, now

    def known(self, user_id: str, at: int) -> str | None:
        """The session that this worker remembers of the user, if it goes on with a turn at this time."""
        known = self._of.get(user_id)
        if known is None:
            return None
        session_id, active_at = known
        if at - active_at > self._idle_ms:
            return None
        self._of[user_id] = session_id, at
        self._of.move_to_end(user_id)
        return session_id

    def forget(self, user_id: str) -> None:
        """This worker need not wait for the news: it has opened or ended one."""
        self._of.pop(user_id, None)

    async def of(self, user_id: str, now: int) -> str:
        """The user's current session, opened if there is none."""
        session_id = await sessions.current(self._database, user_id, active_since=now - self._idle_ms)
        if session_id is None:
            session_id = f"sess_{ordered_hex()}"
            await sessions.open_session(self._database, session_id, user_id, now)
        self._of.pop(user_id, None)
        self._of[user_id] = (session_id, now)
        if len(self._of) > _MOST_USERS:
            self._of.popitem(last=False)
        return session_id

"""Sessions: a stretch of one user's activity. A session owns conversations and sums what they used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.store.database import Database, Step

_CURRENT = """
    SELECT id FROM sessions
    WHERE user_id = $1 AND ended_at IS NULL AND last_activity >= $2
    ORDER BY last_activity DESC LIMIT 1"""

_OPEN = """
    INSERT INTO sessions (id, user_id, created_at, last_activity, conversation_count, total_tokens, total_cost_nanousd)
    VALUES ($1, $2, $3, $3, 0, 0, 0)"""

ADD = """
    UPDATE sessions SET conversation_count = conversation_count + $2, total_tokens = total_tokens + $3,
        total_cost_nanousd = total_cost_nanousd + $4,
        last_activity = CASE WHEN last_activity < $5 THEN $5 ELSE last_activity END
    WHERE id = $1"""

# Of those that make a conversation under one name at once, only one finds its own `pk` in the table.
COUNT_NAMED = """
    UPDATE sessions SET conversation_count = conversation_count + 1
    WHERE id = $1 AND EXISTS (SELECT 1 FROM conversations WHERE pk = $2)"""


@dataclass(slots=True)
class SessionTotals:
    """What a batch of turns adds to one session."""

    id: str
    conversations: int = 0
    tokens: int = 0
    cost_nanousd: int = 0
    last_activity: int = 0


async def current(database: Database, user_id: str, *, active_since: int) -> str | None:
    """The user's newest session that is not ended and was active since then."""
    rows = await database.fetch(_CURRENT, user_id, active_since)
    return rows[0]["id"] if rows else None


async def open_session(database: Database, session_id: str, user_id: str, now: int) -> None:
    await database.write([(_OPEN, [(session_id, user_id, now)])])


def add_totals(totals: Iterable[SessionTotals]) -> Step:
    """In id order, so that two workers cannot wait for each other in a circle."""
    ordered = sorted(totals, key=lambda total: total.id)
    return ADD, [
        (total.id, total.conversations, total.tokens, total.cost_nanousd, total.last_activity) for total in ordered
    ]


def count_named(made: Iterable[tuple[str, str]]) -> Step:
    """Counts conversations that were to be made under a name: (session, pk), after they were saved."""
    return COUNT_NAMED, sorted(made)

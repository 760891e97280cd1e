"""Sessions: a stretch of one user's activity. A session owns conversations and sums what they used.

A user's current session is the newest that is open and was active lately; new conversations join it. A conversation
stays in its session, and goes on counting there when that has ended. Whoever opens or ends a session outside of a turn
moves `sessions_revision`, by which workers learn that what they remember may be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gateway.store.conversation_reads import MESSAGE_COLUMNS, KeptMessage, NoSuchPlace, Order
from gateway.store.database import Database, Row, Step, Transaction

# The newest that was opened, if it goes on: of a few, for nobody has many open ones of which only an old one is active.
CURRENT = """
    SELECT s.id FROM (
        SELECT id, created_at, last_activity FROM sessions
        WHERE user_id = $1 AND ended_at IS NULL
        ORDER BY created_at DESC LIMIT 20) AS s
    WHERE s.last_activity >= $2
    ORDER BY s.created_at DESC, s.id DESC LIMIT 1"""

_OPEN = """
    INSERT INTO sessions (id, user_id, created_at, last_activity, conversation_count, total_tokens, total_cost_nanousd)
    VALUES ($1, $2, $3, $3, 0, 0, 0)"""

# A conversation that is made in it outside of a turn.
JOIN = """
    UPDATE sessions SET conversation_count = conversation_count + 1,
        last_activity = CASE WHEN last_activity < $3 THEN $3 ELSE last_activity END
    WHERE user_id = $1 AND id = $2 AND ended_at IS NULL
    RETURNING id"""

ADD = """
    UPDATE sessions SET conversation_count = conversation_count + $2, total_tokens = total_tokens + $3,
        total_cost_nanousd = total_cost_nanousd + $4,
        last_activity = CASE WHEN last_activity < $5 THEN $5 ELSE last_activity END
    WHERE id = $1"""

# Of those that make a conversation under one name at once, only one finds its own `pk` in the table.
COUNT_NAMED = """
    UPDATE sessions SET conversation_count = conversation_count + 1
    WHERE id = $1 AND EXISTS (SELECT 1 FROM conversations WHERE pk = $2)"""


REVISION = "SELECT sessions_revision FROM gateway_state WHERE id = 1"

TOUCH = "UPDATE gateway_state SET sessions_revision = sessions_revision + 1 WHERE id = 1"

FIELDS = (
    "id", "user_id", "created_at", "last_activity", "ended_at", "conversation_count", "total_tokens",
    "total_cost_nanousd",
)  # fmt: skip
_COLUMNS = ", ".join(FIELDS)

GET = f"SELECT {_COLUMNS} FROM sessions WHERE user_id = $1 AND id = $2"

END = f"""
    UPDATE sessions SET ended_at = COALESCE(ended_at, $3)
    WHERE user_id = $1 AND id = $2
    RETURNING {_COLUMNS}"""

LISTS = {
    order: f"""
    SELECT {_COLUMNS} FROM sessions
    WHERE user_id || '' = $1 AND (created_at, id) {beyond} ($2, $3)
    ORDER BY created_at {order.upper()}, id {order.upper()} LIMIT $4"""
    for order, beyond in (("asc", ">"), ("desc", "<"))
}

COUNT = "SELECT COUNT(*) AS sessions FROM sessions WHERE user_id || '' = $1"

# The newest messages of each of the newest conversations, so that no more are sorted than could be asked for. What a
# branch shares is its parent's. The conditions are those of a list (conversation_reads), for the same planners. That
# `number > 0` holds for all is not known to PostgreSQL without statistics: it expects fewer, and takes the index.
MESSAGES = f"""
    SELECT {MESSAGE_COLUMNS}
    FROM (
        SELECT c.pk, c.number, c.message_count FROM conversations c
        WHERE c.session_id = $2 AND c.number > 0 AND COALESCE(c.user_id, '') = $1
            AND CASE WHEN c.deleted_at IS NULL THEN 0 ELSE 1 END <> 1
        ORDER BY c.number DESC LIMIT $4) AS n
    JOIN messages m ON m.conversation_pk = n.pk AND m.seq > n.message_count - CAST($3 AS BIGINT)
    ORDER BY m.created_at DESC, n.number DESC, m.seq DESC LIMIT $3"""

_MOST_CONVERSATIONS = 1000
_BEGINNING: tuple[int, str] = (0, "")
_END: tuple[int, str] = (2**62, "")


@dataclass(frozen=True, slots=True)
class Session:
    """A row."""

    id: str
    user_id: str
    created_at: int
    last_activity: int
    ended_at: int | None
    conversation_count: int
    total_tokens: int
    total_cost_nanousd: int

    @classmethod
    def of(cls, row: Row) -> Session:
        return cls(*(row[field] for field in FIELDS))


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
    rows = await database.fetch(CURRENT, user_id, active_since)
    return rows[0]["id"] if rows else None


async def open_session(database: Database, session_id: str, user_id: str, now: int) -> None:
    await database.write([(_OPEN, [(session_id, user_id, now)])])


async def revision(database: Database) -> int:
    """Another number: somebody opened or ended a session outside of a turn."""
    found: int = (await database.fetch(REVISION))[0]["sessions_revision"]
    return found


async def open_in(transaction: Transaction, session_id: str, user_id: str, now: int) -> None:
    """Opened by somebody, not by a turn."""
    await transaction.execute(_OPEN, session_id, user_id, now)


async def get(database: Database, user_id: str, session_id: str) -> Session | None:
    rows = await database.fetch(GET, user_id, session_id)
    return Session.of(rows[0]) if rows else None


async def listed(
    database: Database, user_id: str, *, limit: int, after: str | None = None, order: Order = "desc"
) -> list[Session]:
    """`after` is an id. Raises NoSuchPlace."""
    at = _END if order == "desc" else _BEGINNING
    if after is not None:
        known = await get(database, user_id, after)
        if known is None:
            raise NoSuchPlace(after)
        at = (known.created_at, known.id)
    return [Session.of(row) for row in await database.fetch(LISTS[order], user_id, *at, limit)]


async def count(database: Database, user_id: str) -> int:
    found: int = (await database.fetch(COUNT, user_id))[0]["sessions"]
    return found


async def messages(database: Database, user_id: str, session_id: str, most: int) -> Sequence[KeptMessage]:
    """The newest messages of its newest conversations, in the order of time."""
    rows = await database.fetch(MESSAGES, user_id, session_id, most, _MOST_CONVERSATIONS)
    return [KeptMessage.of(row) for row in reversed(rows)]


async def end(database: Database, user_id: str, session_id: str, now: int) -> Session | None:
    """As it is then; one that has ended keeps its time. None: the user has no such session."""
    async with database.transaction() as transaction:
        rows = await transaction.fetch(END, user_id, session_id, now)
        if rows:
            await transaction.execute(TOUCH)
    return Session.of(rows[0]) if rows else None


def add_totals(totals: Iterable[SessionTotals]) -> Step:
    """In id order, so that two workers cannot wait for each other in a circle."""
    ordered = sorted(totals, key=lambda total: total.id)
    return ADD, [
        (total.id, total.conversations, total.tokens, total.cost_nanousd, total.last_activity) for total in ordered
    ]


def count_named(made: Iterable[tuple[str, str]]) -> Step:
    """Counts conversations that were to be made under a name: (session, pk), after they were saved."""
    return COUNT_NAMED, sorted(made)

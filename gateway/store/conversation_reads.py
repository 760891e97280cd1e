"""What a user is shown of its conversations: one of them, lists, messages, sums. Nothing here writes.

Every statement takes the caller's user. Lists are in the order in which conversations were made (`number`), which no
turn changes, so their cursors are stable. Where a list begins with the user, it asks for `user_id || ''`, which only
the indexes of lists have: see the migrations 0002 and 0009.

The messages of a branch are its own and, before them, those of its parents up to where it left them. `seq` goes on from
parent to branch. A parent that is deleted is still read through a branch that is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gateway.store.database import Database, Row

Order = Literal["asc", "desc"]
Source = Literal["active", "archived", "all", "pinned", "tag", "session"]

FIELDS = (
    "id", "number", "user_id", "session_id", "parent_id", "parent_seq", "title", "summary", "tags", "metadata",
    "image_urls", "pinned_at", "archived_at", "message_count", "total_tokens_input", "total_tokens_output",
    "total_cost_nanousd", "created_at", "last_used",
)  # fmt: skip
_COLUMNS = ", ".join(f"c.{field}" for field in FIELDS)
_LAST = 2**62

GET = f"SELECT {_COLUMNS} FROM conversations c WHERE c.user_id = $1 AND c.id = $2 AND c.deleted_at IS NULL"

# A list goes on after a conversation that was deleted meanwhile, too: who deletes page by page needs that.
PLACE = """
    SELECT COALESCE(
        (SELECT c.number FROM conversations c WHERE c.user_id = $1 AND c.id = $2 AND c.deleted_at IS NULL),
        (SELECT MAX(c.number) FROM conversations c
        WHERE c.user_id || '' = $1 AND c.id = $2 AND c.deleted_at IS NOT NULL)) AS number"""

# Planners take a comparison of two values for one that few rows pass, and then read all rows to sort those few. Of this
# one they expect that nearly all pass, so they read in the order of the list until it is full.
_FILTER = "CASE WHEN {} THEN 0 ELSE 1 END <> 1"
_IS_PINNED = "(CAST({0} AS BIGINT) IS NULL OR CASE WHEN c.pinned_at IS NULL THEN 0 ELSE 1 END = {0})"
_IS_ARCHIVED = "(CAST({0} AS BIGINT) IS NULL OR CASE WHEN c.archived_at IS NULL THEN 0 ELSE 1 END = {0})"
_IS_IN_SESSION = "(CAST({0} AS TEXT) IS NULL OR c.session_id = {0})"
_MARKED = f"{_IS_ARCHIVED.format('$4')} AND {_IS_PINNED.format('$5')}"

_OF_USER = f"""
        SELECT {_COLUMNS} FROM conversations c
        WHERE c.user_id || '' = $1 AND c.deleted_at IS NULL AND c.archived_at IS {{archived}}
            AND c.number {{beyond}} $2 AND {_FILTER.format(_IS_PINNED.format("$4"))}
        ORDER BY c.number {{order}} LIMIT $3"""
_PINNED = f"""
    SELECT {_COLUMNS} FROM conversations c
    WHERE c.user_id || '' = $1 AND c.deleted_at IS NULL AND c.pinned_at IS NOT NULL AND c.number {{beyond}} $2
        AND {_FILTER.format(_IS_ARCHIVED.format("$4"))}
    ORDER BY c.number {{order}} LIMIT $3"""
# `+ 0` keeps a planner from walking all conversations in this order, looking for tags.
_TAGGED = f"""
    SELECT {_COLUMNS} FROM conversation_tags t JOIN conversations c ON c.number = t.number + 0
    WHERE t.user_id = $1 AND t.tag = $6 AND t.number {{beyond}} $2
        AND {_FILTER.format(f"c.deleted_at IS NULL AND {_MARKED} AND {_IS_IN_SESSION.format('$7')}")}
    ORDER BY t.number {{order}} LIMIT $3"""
# No index has the user or the deletion like this: the session is what is looked for.
_OF_SESSION = f"""
    SELECT {_COLUMNS} FROM conversations c
    WHERE c.session_id = $6 AND COALESCE(c.user_id, '') = $1 AND c.number {{beyond}} $2
        AND {_FILTER.format(f"c.deleted_at IS NULL AND {_MARKED}")}
    ORDER BY c.number {{order}} LIMIT $3"""


def _list(source: Source, order: Order) -> str:
    way = {"beyond": "<" if order == "desc" else ">", "order": order.upper()}
    active, archived = (_OF_USER.format(archived=state, **way) for state in ("NULL", "NOT NULL"))
    both = f"""
    SELECT * FROM (SELECT * FROM ({active}) AS a UNION ALL SELECT * FROM ({archived}) AS b) AS c
    ORDER BY c.number {order.upper()} LIMIT $3"""
    return {
        "active": active,
        "archived": archived,
        "all": both,
        "pinned": _PINNED.format(**way),
        "tag": _TAGGED.format(**way),
        "session": _OF_SESSION.format(**way),
    }[source]


_SOURCES: Sequence[Source] = ("active", "archived", "all", "pinned", "tag", "session")
_ORDERS: Sequence[Order] = ("asc", "desc")
LISTS: Mapping[str, str] = {f"{source} {order}": _list(source, order) for source in _SOURCES for order in _ORDERS}

# The conversation and its parents, the nearest first: of each, the messages above `above` up to `upto` count. With `$1`
# once more instead of `l.user_id`, SQLite reads all conversations to make a Bloom filter of them.
LINE = """
    WITH RECURSIVE line (pk, user_id, parent_pk, above, upto) AS (
        SELECT c.pk, c.user_id, c.parent_pk, COALESCE(c.parent_seq, 0), c.message_count
        FROM conversations c WHERE c.user_id = $1 AND c.id = $2 AND c.deleted_at IS NULL
        UNION ALL
        SELECT p.pk, p.user_id, p.parent_pk, COALESCE(p.parent_seq, 0),
            CASE WHEN l.above < l.upto THEN l.above ELSE l.upto END
        FROM line l JOIN conversations p ON p.pk = l.parent_pk AND p.user_id = l.user_id)
    SELECT pk, above, upto FROM line"""

MESSAGE_FIELDS = (
    "id", "seq", "role", "content", "extra", "tokens", "cost_nanousd", "model", "finish_reason", "created_at",
    "omitted_turns",
)  # fmt: skip
MESSAGE_COLUMNS = ", ".join(f"m.{field}" for field in MESSAGE_FIELDS)
MESSAGES: Mapping[str, str] = {
    order: f"""
    SELECT {MESSAGE_COLUMNS} FROM messages m JOIN conversations c ON c.pk = m.conversation_pk
    WHERE c.user_id = $1 AND m.conversation_pk = $2 AND m.seq > $3 AND m.seq <= $4
    ORDER BY m.seq {order.upper()} LIMIT $5"""
    for order in _ORDERS
}

MESSAGE_PLACE = """
    SELECT m.conversation_pk, m.seq FROM messages m JOIN conversations c ON c.pk = m.conversation_pk
    WHERE c.user_id = $1 AND m.id = $2"""

# Shared messages count once. What was deleted counts in the money only.
STATS = """
    SELECT SUM(living) AS conversation_count, SUM(CASE WHEN living = 1 THEN own END) AS message_count,
        SUM(tokens_input) AS tokens_input, SUM(tokens_output) AS tokens_output, SUM(cost) AS cost_nanousd
    FROM (
        SELECT 1 AS living, c.message_count - COALESCE(c.parent_seq, 0) AS own, c.total_tokens_input AS tokens_input,
            c.total_tokens_output AS tokens_output, c.total_cost_nanousd AS cost
        FROM conversations c WHERE c.user_id = $1 AND c.deleted_at IS NULL
        UNION ALL
        SELECT 0, 0, c.total_tokens_input, c.total_tokens_output, c.total_cost_nanousd
        FROM conversations c WHERE c.user_id || '' = $1 AND c.deleted_at IS NOT NULL) AS summed"""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as it lies in the table, without its messages. `tags`, `metadata`, `image_urls` are JSON texts."""

    id: str
    number: int
    user_id: str
    session_id: str | None
    parent_id: str | None
    parent_seq: int | None
    title: str | None
    summary: str | None
    tags: str
    metadata: str
    image_urls: str
    pinned_at: int | None
    archived_at: int | None
    message_count: int
    total_tokens_input: int
    total_tokens_output: int
    total_cost_nanousd: int
    created_at: int
    last_used: int

    @classmethod
    def of(cls, row: Row) -> Conversation:
        return cls(*(row[field] for field in FIELDS))


@dataclass(frozen=True, slots=True)
class KeptMessage:
    """A message as it lies in the table: `content` and `extra` are JSON texts. `omitted_turns`: what the model's window
    could not hold when it was made."""

    id: str
    seq: int
    role: str
    content: str
    extra: str | None
    tokens: int
    cost_nanousd: int | None
    model: str | None
    finish_reason: str | None
    created_at: int
    omitted_turns: int | None

    @classmethod
    def of(cls, row: Row) -> KeptMessage:
        return cls(*(row[field] for field in MESSAGE_FIELDS))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which conversations are listed. None: whether or not."""

    archived: bool | None = False
    pinned: bool | None = None
    tag: str | None = None
    session_id: str | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """What the conversations of a user came to."""

    conversation_count: int
    message_count: int
    total_tokens_input: int
    total_tokens_output: int
    total_cost_nanousd: int


class NoSuchPlace(LookupError):
    """There is nothing by this name, among what is listed, to go on after."""


async def get(database: Database, user_id: str, conversation_id: str) -> Conversation | None:
    rows = await database.fetch(GET, user_id, conversation_id)
    return Conversation.of(rows[0]) if rows else None


async def listed(
    database: Database, user_id: str, wanted: Wanted, *, limit: int, after: str | None = None, order: Order = "desc"
) -> list[Conversation]:
    """`after` is an id. Raises NoSuchPlace."""
    at = _LAST if order == "desc" else 0
    if after is not None:
        at = (await database.fetch(PLACE, user_id, after))[0]["number"]
        if at is None:
            raise NoSuchPlace(after)
    archived, pinned = (None if flag is None else int(flag) for flag in (wanted.archived, wanted.pinned))
    start = (user_id, at, limit)
    if wanted.tag is not None:
        found = await database.fetch(LISTS[f"tag {order}"], *start, archived, pinned, wanted.tag, wanted.session_id)
    elif wanted.session_id is not None:
        found = await database.fetch(LISTS[f"session {order}"], *start, archived, pinned, wanted.session_id)
    elif pinned:
        found = await database.fetch(LISTS[f"pinned {order}"], *start, archived)
    else:
        source = "all" if archived is None else "archived" if archived else "active"
        found = await database.fetch(LISTS[f"{source} {order}"], *start, pinned)
    return [Conversation.of(row) for row in found]


async def messages(
    database: Database,
    user_id: str,
    conversation_id: str,
    *,
    limit: int,
    after: str | None = None,
    order: Order = "asc",
) -> list[KeptMessage] | None:
    """A page, through the parents; `after` is the id of a message. None: no such conversation. Raises NoSuchPlace."""
    rows = await database.fetch(LINE, user_id, conversation_id)
    line: list[tuple[str, int, int]] = [(row["pk"], row["above"], row["upto"]) for row in rows]
    if not line:
        return None
    low, high = 0, _LAST
    if after is not None:
        at = await _place(database, user_id, after, line)
        low, high = (at, high) if order == "asc" else (low, at - 1)
    found: list[KeptMessage] = []
    for pk, above, upto in reversed(line) if order == "asc" else line:
        first, last = max(low, above), min(high, upto)
        if first < last and len(found) < limit:
            rows = await database.fetch(MESSAGES[order], user_id, pk, first, last, limit - len(found))
            found += [KeptMessage.of(row) for row in rows]
    return found


async def _place(database: Database, user_id: str, message_id: str, line: Sequence[tuple[str, int, int]]) -> int:
    rows = await database.fetch(MESSAGE_PLACE, user_id, message_id)
    for row in rows:
        if any(pk == row["conversation_pk"] and above < row["seq"] <= upto for pk, above, upto in line):
            found: int = row["seq"]
            return found
    raise NoSuchPlace(message_id)


async def stats(database: Database, user_id: str) -> Stats:
    row = (await database.fetch(STATS, user_id))[0]
    return Stats(*(int(row[place] or 0) for place in range(5)))

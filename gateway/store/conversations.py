"""Conversations and their messages.

Outside, a conversation is known by its user and its id (unique while not deleted); inside by `pk`, which is never used
again. `seq` counts a conversation's messages from 1. Who only adds to a conversation has it taken from `message_count`
under the row's lock, so two workers never give the same one. Who has read it first (`ConversationTurn.after`) says
which `seq` is next: if somebody was quicker, the unique (conversation_pk, seq) refuses the turn, and the ledger makes a
branch of it.

A branch is a conversation with a parent, whose messages up to `parent_seq` it shares; its own go on from there. Its
`message_count` holds the shared ones, its totals do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gateway.store.database import Database, Row, Step, Value
from gateway.store.turn_leases import Lease

_Row = tuple[Value, ...]

_FIND = """
    SELECT c.pk, c.session_id, c.title, c.message_count, c.parent_pk, m.seq, m.role, m.content, m.extra, m.chain,
        m.finish_reason
    FROM conversations c LEFT JOIN messages m ON m.conversation_pk = c.pk
    WHERE c.user_id = $1 AND c.id = $2 AND c.deleted_at IS NULL
    ORDER BY m.seq"""

# A shared message lies in one of the ancestors, below every point from which one was branched off on the way.
_SHARED = """
    WITH RECURSIVE line (pk, upto) AS (
        SELECT parent_pk, parent_seq FROM conversations WHERE pk = $1 AND user_id = $2
        UNION ALL
        SELECT p.parent_pk, CASE WHEN p.parent_seq < line.upto THEN p.parent_seq ELSE line.upto END
        FROM line JOIN conversations p ON p.pk = line.pk)
    SELECT pk, upto FROM line WHERE pk IS NOT NULL"""
# Not joined with the line: PostgreSQL without statistics reads all messages for that. With a condition on `p` above,
# SQLite reads all conversations to make a Bloom filter of them.
_SHARED_OF = """
    SELECT seq, role, content, extra, chain, finish_reason FROM messages
    WHERE conversation_pk = $1 AND seq <= $2 ORDER BY seq"""

_FIND_CHAINS = """
    SELECT c.pk, c.session_id, c.title, c.message_count, m.seq, m.role, m.chain
    FROM conversations c LEFT JOIN messages m ON m.conversation_pk = c.pk AND m.seq > c.message_count - $3
    WHERE c.user_id = $1 AND c.id = $2 AND c.deleted_at IS NULL"""

PKS_AT_ONCE = 64
_LENGTHS = "SELECT pk, message_count FROM conversations WHERE pk IN ({})".format(
    ", ".join(f"${place}" for place in range(1, PKS_AT_ONCE + 1))
)

_NEWEST = """
    SELECT conversation_pk, seq, {content} AS content, {extra} AS extra, chain, created_at
    FROM messages WHERE chain = {chain} AND role = 'assistant' ORDER BY created_at DESC LIMIT {most}"""
_PLACE = """
    SELECT c.pk, c.id, c.session_id, c.title, c.message_count, m.seq, m.content, m.extra, m.created_at
    FROM ({newest}) AS m JOIN conversations c ON c.pk = m.conversation_pk
    WHERE (c.user_id = $3) IS TRUE AND c.deleted_at IS NULL"""  # no index of the user's: that holds all there are
MOST_PLACES = 20
_NO_TEXT = "CAST(NULL AS TEXT)"
_PLACES = " UNION ALL ".join(
    _PLACE.format(newest=_NEWEST.format(content=content, extra=extra, chain=chain, most=MOST_PLACES))
    for chain, content, extra in (("$1", _NO_TEXT, _NO_TEXT), ("$2", "content", "COALESCE(extra, '{}')"))
)

CREATE = """
    INSERT INTO conversations (pk, id, user_id, key_id, end_user, session_id, created_at, last_used, message_count,
        total_tokens_input, total_tokens_output, total_cost_nanousd, title)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $7, $8, $9, $10, $11, $12)
    ON CONFLICT (user_id, id) WHERE deleted_at IS NULL DO UPDATE SET
        last_used = CASE WHEN conversations.last_used < excluded.last_used THEN excluded.last_used
            ELSE conversations.last_used END,
        message_count = conversations.message_count + excluded.message_count,
        total_tokens_input = conversations.total_tokens_input + excluded.total_tokens_input,
        total_tokens_output = conversations.total_tokens_output + excluded.total_tokens_output,
        total_cost_nanousd = conversations.total_cost_nanousd + excluded.total_cost_nanousd"""

# One that must not be there: a branch, or a name that the turn has found free.
CREATE_ALONE = """
    INSERT INTO conversations (pk, id, user_id, key_id, end_user, session_id, created_at, last_used, message_count,
        total_tokens_input, total_tokens_output, total_cost_nanousd, title, parent_id, parent_pk, parent_seq)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $7, $8, $9, $10, $11, $12, $13, $14, $15)"""

ADD_TO = """
    UPDATE conversations SET message_count = message_count + $2, total_tokens_input = total_tokens_input + $3,
        total_tokens_output = total_tokens_output + $4, total_cost_nanousd = total_cost_nanousd + $5,
        last_used = CASE WHEN last_used < $6 THEN $6 ELSE last_used END
    WHERE pk = $1"""

_INSERT = """
    INSERT INTO messages (id, conversation_pk, seq, role, content, extra, chain, tokens, cost_nanousd, model,
        finish_reason, created_at)
    SELECT CAST($1 AS TEXT), c.pk, {seq}, CAST($3 AS TEXT), CAST($4 AS TEXT),
        CAST($5 AS TEXT), CAST($6 AS TEXT), CAST($7 AS BIGINT), CAST($8 AS BIGINT), CAST($9 AS TEXT),
        CAST($10 AS TEXT), CAST($11 AS BIGINT)
    FROM conversations c WHERE {which}"""
_COUNTED = "c.message_count - CAST($2 AS BIGINT)"

INSERT_BY_PK = _INSERT.format(seq=_COUNTED, which="c.pk = $12")
# A conversation that this batch made: another worker may have made it first, under another pk.
INSERT_BY_OWNER = _INSERT.format(seq=_COUNTED, which="c.user_id = $12 AND c.id = $13 AND c.deleted_at IS NULL")
INSERT_AT = _INSERT.format(seq="CAST($2 AS BIGINT)", which="c.pk = $12")

# What few turns need, and none pays for.
_NAME = "UPDATE conversations SET title = $2 WHERE pk = $1 AND title IS NULL"
_OMITTED = "UPDATE messages SET omitted_turns = $2 WHERE id = $1"


@dataclass(slots=True)
class StoredMessage:
    """A message as it lies in the table: `content` and `extra` are JSON texts.

    `omitted_turns`: on an answer, how many of the oldest turns its upstream was not sent."""

    id: str
    role: str
    content: str
    extra: str | None
    chain: str | None
    tokens: int = 0
    cost_nanousd: int | None = None
    model: str | None = None
    finish_reason: str | None = None
    seq: int = 0
    omitted_turns: int = 0


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A conversation with its messages, oldest first, those that it shares with its ancestors included."""

    pk: str
    session_id: str | None
    messages: Sequence[StoredMessage]
    title: str | None = None
    message_count: int = 0


@dataclass(frozen=True, slots=True)
class StoredChains:
    """A conversation with the chains of its last messages. `last_asked`: that of the last one that is no answer."""

    pk: str
    session_id: str | None
    title: str | None
    message_count: int
    chains: frozenset[str]
    last_asked: str | None


@dataclass(frozen=True, slots=True)
class Place:
    """A stored answer that may be the one a client means. `content` and `extra` (JSON texts): only of a partial one."""

    pk: str
    id: str
    session_id: str | None
    title: str | None
    seq: int
    is_last: bool
    created_at: int
    content: str | None
    extra: str | None


class Parent(NamedTuple):
    """Where a branch begins. `pk` None: nothing is shared."""

    id: str
    pk: str | None
    seq: int


_NO_PARENT = (None, None, None)


@dataclass(slots=True)
class ConversationTurn:
    """What one turn adds to a conversation; it makes the conversation if `is_new`.

    `is_named`: under a name that somebody chose, so that others may be making it at the same time, who then share it.
    `after`: the last `seq` that the turn has seen, 0 if it has found nothing. It goes on there or nowhere.
    `lease`: what ends with the turn. `gives_title`: to a conversation that is there and has none.
    """

    pk: str
    id: str
    user_id: str
    key_id: str | None
    end_user: str | None
    session_id: str | None
    is_new: bool
    title: str | None
    at: int
    messages: Sequence[StoredMessage]
    is_named: bool = False
    tokens_input: int = 0
    tokens_output: int = 0
    cost_nanousd: int = 0
    after: int | None = None
    parent: Parent | None = None
    lease: Lease | None = None
    gives_title: bool = False


async def find(database: Database, user_id: str, conversation_id: str) -> StoredConversation | None:
    rows = await database.fetch(_FIND, user_id, conversation_id)
    if not rows:
        return None
    first = rows[0]
    messages = [_message(row) for row in rows if row["seq"] is not None]
    if first["parent_pk"] is not None:
        for part in await database.fetch(_SHARED, first["pk"], user_id):  # the nearest ancestor first
            shared = await database.fetch(_SHARED_OF, part["pk"], part["upto"])
            messages = [*map(_message, shared), *messages]
    return StoredConversation(first["pk"], first["session_id"], messages, first["title"], first["message_count"])


async def lengths(database: Database, pks: Sequence[str]) -> dict[str, int]:
    """How many messages these conversations have."""
    found: dict[str, int] = {}
    for first in range(0, len(pks), PKS_AT_ONCE):
        asked = pks[first : first + PKS_AT_ONCE]
        rows = await database.fetch(_LENGTHS, *asked, *[""] * (PKS_AT_ONCE - len(asked)))
        found.update((row["pk"], row["message_count"]) for row in rows)
    return found


async def find_chains(database: Database, user_id: str, conversation_id: str, most: int) -> StoredChains | None:
    """The chains of the conversation's own last messages, `most` at the most."""
    rows = await database.fetch(_FIND_CHAINS, user_id, conversation_id, most)
    if not rows:
        return None
    chained = [row for row in rows if row["chain"] is not None]
    asked = [row for row in chained if row["role"] != "assistant"]
    last = max(asked, key=lambda row: int(row["seq"]))["chain"] if asked else None
    chains = frozenset(row["chain"] for row in chained)
    first = rows[0]
    return StoredChains(first["pk"], first["session_id"], first["title"], first["message_count"], chains, last)


async def places(database: Database, user_id: str, whole: str, partial: str) -> list[Place]:
    """The newest answers with one of these chains in conversations that are not deleted."""
    rows = await database.fetch(_PLACES, whole, partial, user_id)
    return [
        Place(
            row["pk"], row["id"], row["session_id"], row["title"], row["seq"], row["seq"] == row["message_count"],
            row["created_at"], row["content"], row["extra"],
        )
        for row in rows
    ]  # fmt: skip


def _message(row: Row) -> StoredMessage:
    return StoredMessage(
        "", row["role"], row["content"], row["extra"], row["chain"], finish_reason=row["finish_reason"], seq=row["seq"]
    )


def save(turns: Sequence[ConversationTurn]) -> list[Step]:
    """The steps that add these turns: totals summed by conversation, rows in one order for all workers.

    Messages follow their conversations at once, for one may be new to one turn and known to another of the same batch.
    """
    new: list[_Row] = []
    alone: list[_Row] = []
    known: list[_Row] = []
    by_pk: list[_Row] = []
    by_owner: list[_Row] = []
    placed: list[_Row] = []
    whose: _Row
    for group in _by_conversation(turns):
        first = group[0]
        count, tokens_input, tokens_output, cost, at, behind = _total_of(first) if len(group) == 1 else _totals(group)
        if not first.is_new:
            known.append((first.pk, count, tokens_input, tokens_output, cost, at))
            rows, whose = by_pk, (first.pk,)
        else:
            row = (
                first.pk, first.id, first.user_id, first.key_id, first.end_user, first.session_id, at,
                count + (first.after or 0), tokens_input, tokens_output, cost, first.title,
            )  # fmt: skip
            if first.after is None:
                new.append(row)
            else:
                alone.append(row + (_NO_PARENT if first.parent is None else first.parent))
            rows, whose = by_owner, (first.user_id, first.id)
        for turn in group:
            if turn.after is None:
                rows += _message_rows(turn, behind - 1, -1, whose)
                behind -= len(turn.messages)
            else:
                placed += _message_rows(turn, turn.after + 1, 1, (turn.pk,))
    steps: list[Step] = [(CREATE, new), (INSERT_BY_OWNER, by_owner), (CREATE_ALONE, alone), (ADD_TO, known)]
    return [*steps, (INSERT_BY_PK, by_pk), (INSERT_AT, placed), *_rarely(turns)]


def _totals(group: Iterable[ConversationTurn]) -> tuple[int, int, int, int, int, int]:
    """The messages, tokens and costs of these turns, when the last one was, and how many of the messages take the next
    `seq`, whatever it is."""
    messages, tokens_input, tokens_output, costs, ats, counted = zip(*map(_total_of, group), strict=True)
    return sum(messages), sum(tokens_input), sum(tokens_output), sum(costs), max(ats), sum(counted)


def _total_of(turn: ConversationTurn) -> tuple[int, int, int, int, int, int]:
    count = len(turn.messages)
    counted = count if turn.after is None else 0
    return count, turn.tokens_input, turn.tokens_output, turn.cost_nanousd, turn.at, counted


def _rarely(turns: Sequence[ConversationTurn]) -> list[Step]:
    named: dict[str, str] = {}
    shortened: list[tuple[str, int]] = []
    for turn in turns:
        if turn.gives_title and turn.title is not None:
            named.setdefault(turn.pk, turn.title)
        if turn.messages and (omitted := turn.messages[-1].omitted_turns):
            shortened.append((turn.messages[-1].id, omitted))
    return [(_NAME, sorted(named.items())), (_OMITTED, sorted(shortened))] if named or shortened else []


def _by_conversation(turns: Sequence[ConversationTurn]) -> list[list[ConversationTurn]]:
    """Those that make one each by themselves, whatever its name, come last."""
    if len(turns) == 1:
        return [[*turns]]
    groups: dict[tuple[int, str, str], list[ConversationTurn]] = {}
    for turn in turns:
        if not turn.is_new:
            key = (0, turn.pk, "")
        elif turn.after is None:
            key = (1, turn.user_id, turn.id)
        else:
            key = (2, turn.user_id, f"{turn.id} {turn.pk}")
        groups.setdefault(key, []).append(turn)
    return [groups[key] for key in sorted(groups)]


def _message_rows(turn: ConversationTurn, place: int, step: int, whose: _Row) -> list[_Row]:
    """`place`: the `seq` of the first message, or how many of its batch come after it; `step`: from one to the next."""
    rows: list[_Row] = []
    at = turn.at
    for message in turn.messages:
        row = (
            message.id, place, message.role, message.content, message.extra, message.chain, message.tokens,
            message.cost_nanousd, message.model, message.finish_reason, at,
        )  # fmt: skip
        rows.append(row + whose)
        place += step
    return rows

"""Conversations and their messages.

Outside, a conversation is known by its user and its id (unique while not deleted); inside by `pk`, which is never used
again. `seq` counts a conversation's messages from 1; it is taken from `message_count` under the row's lock, so two
workers never give the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.store.database import Database, Step

_FIND = """
    SELECT c.pk, c.session_id, m.role, m.content, m.extra, m.chain
    FROM conversations c LEFT JOIN messages m ON m.conversation_pk = c.pk
    WHERE c.user_id = $1 AND c.id = $2 AND c.deleted_at IS NULL
    ORDER BY m.seq"""

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

ADD_TO = """
    UPDATE conversations SET message_count = message_count + $2, total_tokens_input = total_tokens_input + $3,
        total_tokens_output = total_tokens_output + $4, total_cost_nanousd = total_cost_nanousd + $5,
        last_used = CASE WHEN last_used < $6 THEN $6 ELSE last_used END
    WHERE pk = $1"""

_INSERT = """
    INSERT INTO messages (id, conversation_pk, seq, role, content, extra, chain, tokens, cost_nanousd, model,
        finish_reason, created_at)
    SELECT CAST($1 AS TEXT), c.pk, c.message_count - CAST($2 AS BIGINT), CAST($3 AS TEXT), CAST($4 AS TEXT),
        CAST($5 AS TEXT), CAST($6 AS TEXT), CAST($7 AS BIGINT), CAST($8 AS BIGINT), CAST($9 AS TEXT),
        CAST($10 AS TEXT), CAST($11 AS BIGINT)
    FROM conversations c WHERE """

INSERT_BY_PK = _INSERT + "c.pk = $12"
# A conversation that this batch made: another worker may have made it first, under another pk.
INSERT_BY_OWNER = _INSERT + "c.user_id = $12 AND c.id = $13 AND c.deleted_at IS NULL"


@dataclass(slots=True)
class StoredMessage:
    """A message as it lies in the table: `content` and `extra` are JSON texts."""

    id: str
    role: str
    content: str
    extra: str | None
    chain: str | None
    tokens: int = 0
    cost_nanousd: int | None = None
    model: str | None = None
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A conversation with its messages, oldest first."""

    pk: str
    session_id: str | None
    messages: Sequence[StoredMessage]


@dataclass(slots=True)
class ConversationTurn:
    """What one turn adds to a conversation; it makes the conversation if `is_new`.

    `is_named`: under a name that somebody chose, so that others may be making it at the same time.
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


async def find(database: Database, user_id: str, conversation_id: str) -> StoredConversation | None:
    rows = await database.fetch(_FIND, user_id, conversation_id)
    if not rows:
        return None
    messages = [
        StoredMessage("", row["role"], row["content"], row["extra"], row["chain"])
        for row in rows
        if row["role"] is not None
    ]
    return StoredConversation(rows[0]["pk"], rows[0]["session_id"], messages)


def save(turns: Sequence[ConversationTurn]) -> list[Step]:
    """The steps that add these turns: totals summed by conversation, rows in one order for all workers.

    Messages follow their conversations at once, for one may be new to one turn and known to another of the same batch.
    """
    new: list[tuple[str | int | None, ...]] = []
    known: list[tuple[str | int | None, ...]] = []
    by_pk: list[tuple[str | int | None, ...]] = []
    by_owner: list[tuple[str | int | None, ...]] = []
    for group in _by_conversation(turns):
        first = group[0]
        messages = [(message, turn.at) for turn in group for message in turn.messages]
        totals = (
            len(messages),
            sum(turn.tokens_input for turn in group),
            sum(turn.tokens_output for turn in group),
            sum(turn.cost_nanousd for turn in group),
        )
        at = max(turn.at for turn in group)
        if first.is_new:
            owner = (first.pk, first.id, first.user_id, first.key_id, first.end_user, first.session_id)
            new.append((*owner, at, *totals, first.title))
        else:
            known.append((first.pk, *totals, at))
        for index, (message, sent_at) in enumerate(messages):
            row = _message_row(message, len(messages) - 1 - index, sent_at)
            if first.is_new:
                by_owner.append((*row, first.user_id, first.id))
            else:
                by_pk.append((*row, first.pk))
    return [(CREATE, new), (INSERT_BY_OWNER, by_owner), (ADD_TO, known), (INSERT_BY_PK, by_pk)]


def _by_conversation(turns: Sequence[ConversationTurn]) -> list[list[ConversationTurn]]:
    groups: dict[tuple[bool, str, str], list[ConversationTurn]] = {}
    for turn in turns:
        key = (turn.is_new, turn.user_id, turn.id) if turn.is_new else (False, turn.pk, "")
        groups.setdefault(key, []).append(turn)
    return [groups[key] for key in sorted(groups)]


def _message_row(message: StoredMessage, behind: int, at: int) -> tuple[str | int | None, ...]:
    return (
        message.id, behind, message.role, message.content, message.extra, message.chain, message.tokens,
        message.cost_nanousd, message.model, message.finish_reason, at,
    )  # fmt: skip

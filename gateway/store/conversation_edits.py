"""What a user changes of its conversations: make, edit, delete, undelete. Every statement takes the caller's user.

Deleting is soft: the row and its money stay, no reader finds it, and its id is free again. A conversation can be
brought back while nobody has taken its id.

Tags stand twice: in the row, as they are shown, and in `conversation_tags`, by which they are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.store import sessions
from gateway.store.conversation_reads import FIELDS, Conversation
from gateway.store.database import Database, Transaction

_RETURNING = "RETURNING " + ", ".join(FIELDS)

MAKE = f"""
    INSERT INTO conversations (pk, id, user_id, key_id, session_id, created_at, last_used, message_count,
        total_tokens_input, total_tokens_output, total_cost_nanousd, title, tags, metadata)
    VALUES ($1, $2, $3, $4, $5, $6, $6, 0, 0, 0, 0, $7, $8, $9)
    {_RETURNING}"""

EDIT = f"""
    UPDATE conversations SET
        title = CASE WHEN CAST($3 AS BIGINT) = 1 THEN $4 ELSE title END,
        summary = CASE WHEN CAST($5 AS BIGINT) = 1 THEN $6 ELSE summary END,
        tags = COALESCE($7, tags),
        metadata = COALESCE($8, metadata),
        pinned_at = CASE CAST($9 AS BIGINT) WHEN 1 THEN COALESCE(pinned_at, $11) WHEN 0 THEN NULL ELSE pinned_at END,
        archived_at = CASE CAST($10 AS BIGINT) WHEN 1 THEN COALESCE(archived_at, $11) WHEN 0 THEN NULL
            ELSE archived_at END
    WHERE user_id = $1 AND id = $2 AND deleted_at IS NULL
    {_RETURNING}"""

FORGET_TAGS = "DELETE FROM conversation_tags WHERE user_id = $1 AND number = $2"

ADD_TAG = "INSERT INTO conversation_tags (user_id, number, tag) VALUES ($1, $2, $3)"

DELETE = """
    UPDATE conversations SET deleted_at = $3
    WHERE user_id = $1 AND id = $2 AND deleted_at IS NULL
    RETURNING id"""

# Of several that had this id, the last. Of what is about to be removed for good, `deleted_at` is 0.
UNDELETE = f"""
    UPDATE conversations SET deleted_at = NULL
    WHERE number = (
        SELECT MAX(c.number) FROM conversations c
        WHERE c.user_id || '' = $1 AND c.id = $2 AND c.deleted_at > 0)
    {_RETURNING}"""


class NoOpenSession(LookupError):
    """The user has no session by this id, or it has ended."""


@dataclass(frozen=True, slots=True)
class NewConversation:
    """An empty one. `tags` and `metadata` are JSON texts."""

    pk: str
    id: str
    user_id: str
    key_id: str | None
    session_id: str
    at: int
    title: str | None = None
    tags: Sequence[str] = ()
    tags_json: str = "[]"
    metadata: str = "{}"


@dataclass(frozen=True, slots=True)
class Edit:
    """What changes. None leaves a field as it is; `title` and `summary` change if they are named in `changes`."""

    changes: frozenset[str] = frozenset()
    title: str | None = None
    summary: str | None = None
    tags: Sequence[str] | None = None
    tags_json: str | None = None
    metadata: str | None = None
    pinned: bool | None = None
    archived: bool | None = None


async def make(database: Database, new: NewConversation) -> Conversation:
    """Raises AlreadyThere if the user has one of this id, and NoOpenSession."""
    async with database.transaction() as transaction:
        made = await _make(transaction, new)
        if not await transaction.fetch(sessions.JOIN, new.user_id, new.session_id, new.at):
            raise NoOpenSession(new.session_id)
    return made


async def make_with_session(database: Database, new: NewConversation) -> Conversation:
    """In a session of its own, which is opened with it. Raises AlreadyThere."""
    async with database.transaction() as transaction:
        made = await _make(transaction, new)
        await sessions.open_in(transaction, new.session_id, new.user_id, new.at)
        await transaction.execute(sessions.JOIN, new.user_id, new.session_id, new.at)
        await transaction.execute(sessions.TOUCH)
    return made


async def _make(transaction: Transaction, new: NewConversation) -> Conversation:
    rows = await transaction.fetch(
        MAKE, new.pk, new.id, new.user_id, new.key_id, new.session_id, new.at, new.title, new.tags_json, new.metadata
    )
    made = Conversation.of(rows[0])
    await _add_tags(transaction, made, new.tags)
    return made


async def edit(database: Database, user_id: str, conversation_id: str, change: Edit, now: int) -> Conversation | None:
    """As it is afterwards; None: no such conversation."""
    pinned, archived = (None if flag is None else int(flag) for flag in (change.pinned, change.archived))
    async with database.transaction() as transaction:
        rows = await transaction.fetch(
            EDIT, user_id, conversation_id, int("title" in change.changes), change.title,
            int("summary" in change.changes), change.summary, change.tags_json, change.metadata, pinned, archived, now,
        )  # fmt: skip
        if not rows:
            return None
        changed = Conversation.of(rows[0])
        if change.tags is not None:
            await transaction.execute(FORGET_TAGS, user_id, changed.number)
            await _add_tags(transaction, changed, change.tags)
    return changed


async def delete(database: Database, user_id: str, conversation_id: str, now: int) -> bool:
    """False: no such conversation."""
    async with database.transaction() as transaction:
        return bool(await transaction.fetch(DELETE, user_id, conversation_id, now))


async def undelete(database: Database, user_id: str, conversation_id: str) -> Conversation | None:
    """None: none of this id was deleted. Raises AlreadyThere if the id is taken again."""
    async with database.transaction() as transaction:
        rows = await transaction.fetch(UNDELETE, user_id, conversation_id)
    return Conversation.of(rows[0]) if rows else None


async def _add_tags(transaction: Transaction, made: Conversation, tags: Sequence[str]) -> None:
    for tag in tags:
        await transaction.execute(ADD_TAG, made.user_id, made.number, tag)

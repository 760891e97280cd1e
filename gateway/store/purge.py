"""Removing conversations for good, a few rows at a time. What they cost stays in `usage_rows`.

- What is to go is deleted first (`deleted_at`), so that no reader and no new turn finds it. `EXPIRED` is the time of
  what nobody may bring back: it is set before the first message goes, and nothing is taken from what does not have it.
- A turn that is on its way when its conversation goes leaves nothing: it touches the conversation's row before it adds
  messages, and adds them only if that row is there (`store.conversations`). So the row goes first, and the messages in
  the same transaction after it.
- A conversation of which a branch is left stays, deleted: only what the branch does not share is taken from it.
- One with many messages loses them in parts, the row last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gateway.store.database import Database, Row, Step, Value

ROWS_AT_ONCE = 500
"""How many rows a transaction removes at most."""
EXPIRED = 0

_WALK = """
    SELECT number, pk, created_at, last_used, deleted_at FROM conversations
    WHERE number > $1 ORDER BY number LIMIT $2"""

# A turn may have come between, or be running: then it is in use, though `last_used` will only say so in the end.
EXPIRE = """
    UPDATE conversations SET deleted_at = 0, title = NULL, summary = NULL, metadata = '{}', tags = '[]',
        image_urls = '[]'
    WHERE pk = $1 AND last_used < $2 AND deleted_at IS NULL
        AND NOT EXISTS (SELECT 1 FROM turn_leases l
            WHERE l.user_id = conversations.user_id AND l.conversation_id = conversations.id AND l.until > $2)"""

_DUE = """
    SELECT number, pk, deleted_at, session_id, message_count,
        (SELECT MAX(b.parent_seq) FROM conversations b WHERE b.parent_pk = c.pk) AS shared
    FROM conversations c
    WHERE deleted_at IS NOT NULL AND deleted_at < $1 AND (deleted_at, number) > ($2, $3)
    ORDER BY deleted_at, number LIMIT $4"""

# Somebody may have brought it back since it was found, and deleted it again.
CLAIM = "UPDATE conversations SET deleted_at = 0 WHERE pk = $1 AND deleted_at = $2"

TRIM = """
    DELETE FROM messages WHERE conversation_pk = $1 AND seq IN (
        SELECT seq FROM messages WHERE conversation_pk = $1 AND seq > $2 ORDER BY seq LIMIT 500)
    AND EXISTS (SELECT 1 FROM conversations WHERE pk = $1 AND deleted_at = 0)"""

REMOVE = """
    DELETE FROM conversations WHERE pk = $1 AND deleted_at = 0
        AND NOT EXISTS (SELECT 1 FROM conversations b WHERE b.parent_pk = $1)"""

STRIP = """
    UPDATE conversations SET title = NULL, summary = NULL, metadata = '{}', tags = '[]', image_urls = '[]'
    WHERE pk = $1 AND deleted_at = 0
        AND (title IS NOT NULL OR summary IS NOT NULL OR metadata <> '{}' OR tags <> '[]' OR image_urls <> '[]')"""

FORGET_TAGS = """
    DELETE FROM conversation_tags
    WHERE number IN (SELECT number FROM conversations WHERE pk = $1 AND deleted_at = 0)"""

REMOVE_MESSAGES = """
    DELETE FROM messages WHERE conversation_pk = $1 AND NOT EXISTS (SELECT 1 FROM conversations WHERE pk = $1)"""

REMOVE_SESSION = """
    DELETE FROM sessions WHERE id = $1 AND (ended_at IS NOT NULL OR last_activity < $2)
        AND NOT EXISTS (SELECT 1 FROM conversations WHERE session_id = $1)"""

_OLD_COMPLETIONS = "SELECT pk, created_at FROM stored_completions ORDER BY pk LIMIT $1"
FORGET_LABELS = "DELETE FROM stored_labels WHERE completion_pk = $1"
REMOVE_COMPLETION = "DELETE FROM stored_completions WHERE pk = $1"


class Due(NamedTuple):
    """A conversation whose time has come. `shared`: up to which message branches need it; None: there are none."""

    number: int
    pk: str
    deleted_at: int
    session_id: str | None
    message_count: int
    shared: int | None


async def expire(database: Database, after: int, *, unused_since: int) -> int:
    """Deletes what was not used since then, of the next conversations after a number, which are in the order of time.

    Returns the number to go on after; 0: there are no more that are so old.
    """
    found = await database.fetch(_WALK, after, ROWS_AT_ONCE)
    old = [row["pk"] for row in found if row["deleted_at"] is None and row["last_used"] < unused_since]
    await database.write([(EXPIRE, [(pk, unused_since) for pk in sorted(old)])])
    if len(found) < ROWS_AT_ONCE or found[-1]["created_at"] >= unused_since:
        return 0
    return int(found[-1]["number"])


async def due(database: Database, before: int, after: tuple[int, int] = (-1, 0), most: int = 100) -> list[Due]:
    """Of those deleted before then, the ones after this `deleted_at` and `number`."""
    return [_due(row) for row in await database.fetch(_DUE, before, *after, most)]


async def remove(database: Database, batch: Sequence[Due], *, idle_since: int) -> None:
    """What is left of them: rows of theirs, and their sessions, if they are empty and over."""
    claimed = sorted((one.pk, one.deleted_at) for one in batch if one.deleted_at != EXPIRED)
    await database.write([(CLAIM, claimed)])
    for one in batch:
        await _trim(database, one)
    gone: list[Due] = []
    size = 0
    for one in batch:
        if one.shared is not None:
            continue
        gone.append(one)
        size += 1 + min(one.message_count, ROWS_AT_ONCE)
        if size > ROWS_AT_ONCE // 2:
            await _remove(database, gone, idle_since)
            gone, size = [], 0
    await _remove(database, gone, idle_since)


async def remove_completions(database: Database, created_before: int) -> bool:
    """Stored completions that are older, some of them; False: there are none left."""
    found = await database.fetch(_OLD_COMPLETIONS, ROWS_AT_ONCE // 5)
    old: list[Sequence[Value]] = [(row["pk"],) for row in found if row["created_at"] < created_before]
    await database.write([(FORGET_LABELS, old), (REMOVE_COMPLETION, old)])
    return len(old) == ROWS_AT_ONCE // 5


async def _trim(database: Database, one: Due) -> None:
    """What no branch shares; and without branches so much that the rest goes in one transaction."""
    if one.shared is not None:
        await database.write([(FORGET_TAGS, [(one.pk,)]), (STRIP, [(one.pk,)])])
    kept = one.shared or 0
    parts = -(-(one.message_count - kept) // ROWS_AT_ONCE)
    for _ in range(parts if one.shared is not None else parts - 1):
        await database.write([(TRIM, [(one.pk, kept)])])


async def _remove(database: Database, gone: Sequence[Due], idle_since: int) -> None:
    pks: list[Sequence[Value]] = [(pk,) for pk in sorted(one.pk for one in gone)]
    ended = sorted({one.session_id for one in gone if one.session_id is not None})
    steps: list[Step] = [
        (REMOVE, pks),
        (REMOVE_MESSAGES, pks),
        (REMOVE_SESSION, [(session_id, idle_since) for session_id in ended]),
    ]
    await database.write(steps)


def _due(row: Row) -> Due:
    return Due(*(row[name] for name in Due._fields))

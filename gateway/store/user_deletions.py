"""Deleting a user: all that is theirs goes, and what they cost stays without a name.

`begin` ends the keys and writes down who is to go, in one transaction; what follows can be repeated as often as one
likes and by whom one likes, until nothing is found. What belongs to the user by then is told by its time: rows of calls
that began up to `up_to`. Who uses the same name later is somebody else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.ids import random_hex
from gateway.store import keys
from gateway.store.chores import NOW
from gateway.store.database import Database, Row, Step
from gateway.store.keys import Changes
from gateway.store.purge import ROWS_AT_ONCE, Due

KEYS_KNOWN = 5_000
"""Milliseconds for which a worker may still let a call in after its key was ended, clocks that differ included."""
REMEMBERED = 24 * 60 * 60 * 1000
"""Milliseconds after which no call of then is running any more."""

_END_KEYS = "UPDATE api_keys SET revoked_at = COALESCE(revoked_at, $2) WHERE user_id = $1"
_BEGIN = """
    INSERT INTO user_deletions (user_id, anonymous_id, subjects, up_to, until) VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT (user_id) DO UPDATE SET up_to = excluded.up_to, until = excluded.until, subjects = excluded.subjects
    RETURNING user_id, anonymous_id, subjects, up_to, until"""
_FIND = "SELECT user_id, anonymous_id, subjects, up_to, until FROM user_deletions WHERE user_id = $1"
_OPEN = "SELECT user_id, anonymous_id, subjects, up_to, until FROM user_deletions ORDER BY user_id"
_FORGET = "DELETE FROM user_deletions WHERE user_id = $1 AND until = $2"

_LIVING = """
    SELECT pk FROM conversations
    WHERE user_id = $1 AND deleted_at IS NULL AND created_at <= $2 LIMIT $3"""
_TAKE_AWAY = "UPDATE conversations SET deleted_at = 0 WHERE pk = $1 AND deleted_at IS NULL"
# Of all branches the parent, too: none of them is to be read again.
_DELETED = """
    SELECT number, pk, deleted_at, session_id, message_count, CAST(NULL AS BIGINT) AS shared FROM conversations
    WHERE user_id || '' = $1 AND deleted_at IS NOT NULL AND created_at <= $2 LIMIT $3"""
_PART_FROM_PARENT = "UPDATE conversations SET parent_pk = NULL WHERE parent_pk = $1"

_SESSIONS = "SELECT id FROM sessions WHERE user_id || '' = $1 AND created_at <= $2 LIMIT $3"
_REMOVE_SESSION = "DELETE FROM sessions WHERE id = $1"
_SESSIONS_MOVED = "UPDATE gateway_state SET sessions_revision = sessions_revision + 1 WHERE id = 1"

_COMPLETIONS = "SELECT pk FROM stored_completions WHERE user_id = $1 AND created_at <= $2 LIMIT $3"
_FORGET_LABELS = "DELETE FROM stored_labels WHERE completion_pk = $1"
_REMOVE_COMPLETION = "DELETE FROM stored_completions WHERE pk = $1"

_LEASES = {
    engine: f"DELETE FROM turn_leases WHERE user_id = $1 AND until < {now} - CAST($2 AS BIGINT)"
    for engine, now in NOW.items()
}

_USAGE = "SELECT id FROM usage_rows WHERE user_id = $1 AND created_at <= $2 LIMIT $3"
# The one exception from "never changed": the figures stay, and who it was is taken from them.
_ANONYMOUS = """
    UPDATE usage_rows SET user_id = $2, key_id = NULL, end_user = NULL, session_id = NULL, conversation_id = NULL
    WHERE id = $1"""

_OF_SUBJECT = "(subject = $1 OR substr(subject, 1, length(CAST($2 AS TEXT))) = CAST($2 AS TEXT))"
_FORGET_STATES = f"DELETE FROM limit_states WHERE {_OF_SUBJECT}"
_FORGET_HOLDS = f"""
    DELETE FROM limit_holds WHERE {_OF_SUBJECT}
        AND slots = 0 AND tokens = 0 AND cost_nanousd = 0"""

_KNOWN = """
    SELECT 1 WHERE EXISTS (SELECT 1 FROM api_keys WHERE user_id = $1)
        OR EXISTS (SELECT 1 FROM usage_rows WHERE user_id = $1)
        OR EXISTS (SELECT 1 FROM conversations WHERE user_id = $1 AND deleted_at IS NULL)
        OR EXISTS (SELECT 1 FROM conversations WHERE user_id || '' = $1 AND deleted_at IS NOT NULL)
        OR EXISTS (SELECT 1 FROM sessions WHERE user_id || '' = $1)
        OR EXISTS (SELECT 1 FROM stored_completions WHERE user_id = $1)
        OR EXISTS (SELECT 1 FROM user_deletions WHERE user_id = $1)"""

# From one user to the next by the index, however many calls each has made.
_LISTED = """
    WITH RECURSIVE callers (user_id) AS (
        SELECT MIN(user_id) FROM usage_rows WHERE user_id > $1
        UNION ALL
        SELECT (SELECT MIN(u.user_id) FROM usage_rows u WHERE u.user_id > callers.user_id)
        FROM callers WHERE callers.user_id IS NOT NULL),
    found (user_id) AS (
        SELECT user_id FROM (SELECT user_id FROM callers WHERE user_id IS NOT NULL LIMIT $2) AS next
        UNION SELECT user_id FROM api_keys WHERE user_id > $1)
    SELECT user_id,
        (SELECT COUNT(*) FROM api_keys k WHERE k.user_id = found.user_id AND k.revoked_at IS NULL) AS active_keys,
        (SELECT MIN(u.created_at) FROM usage_rows u WHERE u.user_id = found.user_id) AS first_call,
        (SELECT MAX(u.created_at) FROM usage_rows u WHERE u.user_id = found.user_id) AS last_call
    FROM found ORDER BY user_id LIMIT $2"""


@dataclass(frozen=True, slots=True)
class Deletion:
    """A user who goes. `anonymous_id` is the name under which the costs stay."""

    user_id: str
    anonymous_id: str
    subjects: Sequence[str]
    up_to: int
    until: int


@dataclass(frozen=True, slots=True)
class User:
    user_id: str
    active_keys: int
    first_call: int | None
    last_call: int | None


async def begin(changes: Changes, user_id: str, now: int) -> Deletion:
    """Ends the keys, and says who goes. Again for the same user: what came since goes, too, under the same name."""
    transaction, found = changes.transaction, await changes.of(user_id)
    earlier = await transaction.fetch(_FIND, user_id)
    subjects = {f"user:{user_id}", *(f"key:{key.id}" for key in found)}
    subjects |= {subject for row in earlier for subject in json.loads(row["subjects"])}
    up_to = max([now + KEYS_KNOWN if found else now, *(row["up_to"] for row in earlier)])
    await transaction.execute(_END_KEYS, user_id, now)
    rows = await transaction.fetch(
        _BEGIN, user_id, f"deleted-{random_hex()[:12]}", json.dumps(sorted(subjects)), up_to, now + REMEMBERED
    )
    return _deletion(rows[0])


async def running(database: Database) -> list[Deletion]:
    """Of the last day."""
    return [_deletion(row) for row in await database.fetch(_OPEN)]


async def known(database: Database, user_id: str) -> bool:
    return bool(await database.fetch(_KNOWN, user_id))


async def listed(database: Database, after: str, limit: int) -> list[User]:
    """Who has a key or has made a call, by name, from after a name on."""
    rows = await database.fetch(_LISTED, after, limit)
    return [User(row["user_id"], row["active_keys"], row["first_call"], row["last_call"]) for row in rows]


async def remove_keys(database: Database, who: Deletion) -> None:
    """Those that have been ended. What they were is in `subjects`."""
    async with keys.changing(database) as changes:
        await changes.remove_ended(who.user_id, who.up_to)


async def conversations(database: Database, who: Deletion) -> list[Due]:
    """Some of the user's, deleted by then; none: there are none left."""
    living = [row["pk"] for row in await database.fetch(_LIVING, who.user_id, who.up_to, ROWS_AT_ONCE // 5)]
    await database.write([(_TAKE_AWAY, [(pk,) for pk in sorted(living)])])
    rows = await database.fetch(_DELETED, who.user_id, who.up_to, ROWS_AT_ONCE // 5)
    found = [Due(*(row[name] for name in Due._fields)) for row in rows]
    await database.write([(_PART_FROM_PARENT, [(pk,) for pk in sorted(one.pk for one in found)])])
    return found


async def remove_sessions(database: Database, who: Deletion) -> int:
    """Some of them; how many."""
    found = await database.fetch(_SESSIONS, who.user_id, who.up_to, ROWS_AT_ONCE)
    if found:
        await database.write([(_REMOVE_SESSION, [(row["id"],) for row in found]), (_SESSIONS_MOVED, [()])])
    return len(found)


async def remove_completions(database: Database, who: Deletion) -> int:
    """Some of them; how many."""
    found = await database.fetch(_COMPLETIONS, who.user_id, who.up_to, ROWS_AT_ONCE // 5)
    pks = [(row["pk"],) for row in found]
    await database.write([(_FORGET_LABELS, pks), (_REMOVE_COMPLETION, pks)])
    return len(found)


async def make_anonymous(database: Database, who: Deletion) -> int:
    """Some of the usage rows; how many."""
    found = await database.fetch(_USAGE, who.user_id, who.up_to, ROWS_AT_ONCE)
    await database.write([(_ANONYMOUS, [(row["id"], who.anonymous_id) for row in found])])
    return len(found)


async def forget_limits(database: Database, who: Deletion, lease_over: int = 60_000) -> None:
    """Accounts, and leases that have run out for a while."""
    accounts = [(subject, f"{subject}/") for subject in who.subjects]
    steps: list[Step] = [(_FORGET_STATES, accounts), (_FORGET_HOLDS, accounts)]
    await database.write([*steps, (_LEASES[database.dialect], [(who.user_id, lease_over)])])


async def forget(database: Database, who: Deletion) -> None:
    """Nobody knows any more who it was; unless the user was deleted again meanwhile."""
    await database.write([(_FORGET, [(who.user_id, who.until)])])


def _deletion(row: Row) -> Deletion:
    return Deletion(row["user_id"], row["anonymous_id"], json.loads(row["subjects"]), row["up_to"], row["until"])

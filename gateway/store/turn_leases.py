"""Leases of conversations that take one turn at a time: who runs a turn, and until when by the database's clock.

A lease is taken and renewed by statements of their own. It ends in the transaction that writes its turn
(`release_step`), or by itself. All workers touch rows in the order of their keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gateway.store.database import Database, Step
from gateway.wire.jsontext import dumps

SECONDS = 20
LONG_OVER = 10 * 60
"""Seconds after which a lease that has run out, and that nobody has asked for since, is removed."""

_NOW = {
    "postgres": "CAST(floor(date_part('epoch', clock_timestamp()) * 1000) AS BIGINT)",
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
}
_ROWS = {
    "postgres": "json_to_recordset(CAST($1 AS JSON)) AS v(user_id TEXT, conversation_id TEXT, holder TEXT)",
    "sqlite": """(SELECT json_extract(value, '$.user_id') AS user_id,
        json_extract(value, '$.conversation_id') AS conversation_id, json_extract(value, '$.holder') AS holder
        FROM json_each($1)) AS v WHERE true""",
}
# "WHERE true": without it SQLite takes ON for the beginning of a join.
_TAKE = {
    engine: f"""
    INSERT INTO turn_leases (user_id, conversation_id, holder, until)
    SELECT v.user_id, v.conversation_id, v.holder, {now} + {SECONDS * 1000}
    FROM {_ROWS[engine]} ORDER BY v.user_id, v.conversation_id
    ON CONFLICT (user_id, conversation_id) DO UPDATE SET holder = excluded.holder, until = excluded.until
        WHERE turn_leases.until <= {now}
    RETURNING holder"""
    for engine, now in _NOW.items()
}
_RENEW = {
    engine: f"""
    UPDATE turn_leases SET until = {now} + {SECONDS * 1000}
    WHERE user_id = $1 AND conversation_id = $2 AND holder = $3"""
    for engine, now in _NOW.items()
}
_SWEEP = {engine: f"DELETE FROM turn_leases WHERE until < {now} - $1" for engine, now in _NOW.items()}
RELEASE = "DELETE FROM turn_leases WHERE user_id = $1 AND conversation_id = $2 AND holder = $3"


class Lease(NamedTuple):
    """One turn's right to a conversation. `holder` is the turn's own, so no other can end it by mistake."""

    user_id: str
    conversation_id: str
    holder: str


async def take(database: Database, wanted: Sequence[Lease]) -> set[str]:
    """The holders of those that were free, or had run out. No conversation may be in it twice."""
    rows = dumps([lease._asdict() for lease in wanted]).decode()
    if database.dialect == "postgres":
        taken = await database.fetch(_TAKE["postgres"], rows)
    else:  # its `fetch` only reads
        async with database.transaction() as transaction:
            taken = await transaction.fetch(_TAKE["sqlite"], rows)
    return {row["holder"] for row in taken}


async def renew(database: Database, held: Iterable[Lease]) -> None:
    await database.write([(_RENEW[database.dialect], sorted(held))])


async def sweep(database: Database) -> None:
    """Removes what has long run out."""
    await database.write([(_SWEEP[database.dialect], [(LONG_OVER * 1000,)])])


def release_step(leases: Iterable[Lease]) -> Step:
    return RELEASE, sorted(leases)

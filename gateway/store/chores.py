"""Work that one worker at a time does for all that share the database: a row says who, by the database's clock."""

from __future__ import annotations

from gateway.store.database import Database

NOW = {
    "postgres": "CAST(floor(date_part('epoch', clock_timestamp()) * 1000) AS BIGINT)",
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
}

_LOOK = {engine: f"SELECT until, {now} AS now FROM chores WHERE name = $1" for engine, now in NOW.items()}
_TAKE = {
    engine: f"""
    INSERT INTO chores (name, holder, until, place) VALUES ($1, $2, {now} + CAST($3 AS BIGINT), 0)
    ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until
        WHERE chores.until <= {now} OR chores.holder = excluded.holder
    RETURNING place"""
    for engine, now in NOW.items()
}
_GO_ON = {
    engine: f"""
    UPDATE chores SET until = {now} + CAST($3 AS BIGINT), place = $4 WHERE name = $1 AND holder = $2 RETURNING place"""
    for engine, now in NOW.items()
}


async def now(database: Database) -> int:
    """The database's time in milliseconds."""
    return int((await database.fetch(f"SELECT {NOW[database.dialect]}"))[0][0])


async def take(database: Database, name: str, holder: str, seconds: float) -> int | None:
    """How far the work has come, if it is the holder's for so long; None: somebody else does it, or did it just now."""
    found = await database.fetch(_LOOK[database.dialect], name)
    if found and found[0]["until"] > found[0]["now"]:  # mostly so, and nothing is written for it
        return None
    async with database.transaction() as transaction:
        taken = await transaction.fetch(_TAKE[database.dialect], name, holder, int(seconds * 1000))
    return int(taken[0]["place"]) if taken else None


async def go_on(database: Database, name: str, holder: str, seconds: float, place: int) -> bool:
    """It is the holder's for so long from now; False: somebody else has taken it meanwhile."""
    async with database.transaction() as transaction:
        return bool(await transaction.fetch(_GO_ON[database.dialect], name, holder, int(seconds * 1000), place))

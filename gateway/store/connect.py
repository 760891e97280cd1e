"""From a database URL to the driver that speaks to it."""

from __future__ import annotations

from pathlib import Path

from gateway.store.database import Database


def database_at(url: str, *, pool_size: int = 4, statement_cache: bool = True) -> Database:
    """`sqlite:///relative`, `sqlite:////absolute` or `postgresql://...`; not opened yet. Only the one is imported."""
    if url.startswith("sqlite:///"):
        from gateway.store.sqlite import SqliteDatabase

        return SqliteDatabase(Path(url.removeprefix("sqlite:///")))
    from gateway.store.postgres import PostgresDatabase

    return PostgresDatabase(url, pool_size, statement_cache=statement_cache)

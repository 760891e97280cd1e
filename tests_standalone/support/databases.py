"""Fresh databases for any test: an empty SQLite file and an empty database in a real PostgreSQL.

A folder's conftest.py imports the fixtures it needs; however many do, one PostgreSQL serves the whole test run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.store.database import Database
from gateway.store.postgres import PostgresDatabase
from gateway.store.sqlite import SqliteDatabase
from tests_standalone.support.postgres import Postgres, launch


@functools.cache
def running_postgres() -> Postgres:
    """Ends with the test run."""
    return launch()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The PostgreSQL that all tests share: take a database in it, leave the server alone."""
    server = running_postgres()
    yield server
    server.close()
    running_postgres.cache_clear()


@pytest.fixture
def database_urls(tmp_path: Path, postgres: Postgres) -> dict[str, str]:
    """One empty database per engine, as `{"sqlite": url, "postgres": url}`."""
    return {"sqlite": f"sqlite:///{tmp_path / 'gateway.db'}", "postgres": postgres.create_database()}


def database_at(url: str, *, pool_size: int = 4, statement_cache: bool = True) -> Database:
    """The driver for a URL, not yet open."""
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite":
        return SqliteDatabase(Path(rest.removeprefix("/")))
    return PostgresDatabase(url, pool_size, statement_cache=statement_cache)

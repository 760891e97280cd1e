"""`database` is open and empty, and runs its test twice: on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.store.connect import database_at
from gateway.store.database import Database
from tests_standalone.support.databases import database_urls, postgres, sqlite_url

__all__ = ["database_urls", "postgres"]


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return sqlite_url(tmp_path)
    urls: dict[str, str] = request.getfixturevalue("database_urls")
    return urls["postgres"]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = database_at(database_url)
    await database.open()
    yield database
    await database.close()

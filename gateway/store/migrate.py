"""Brings a database to the schema of this code: numbered SQL files, applied once each, in order.

Rules for the files in `gateway/migrations`:

- `0007_name.sql` is for both engines; `0007_name.postgres.sql` stands beside `0007_name.sqlite.sql`.
- Numbers begin at 1 and leave no gap.
- A statement ends with a `;` at the end of a line (a `-- comment` may follow it). A `;` anywhere else ends nothing, so
  the body of a trigger stands on one line. Comments and quoted text may hold any `;`.
- A file that has been released never changes: its digest is in every database. A change is a new file.

All pending files are applied in one transaction, by one process at a time; a failure leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Literal

from gateway.errors import DatabaseUnavailable
from gateway.store.database import Database, Row

Dialect = Literal["postgres", "sqlite"]
DIALECTS: tuple[Dialect, ...] = ("postgres", "sqlite")

ATTEMPTS = 5

HISTORY = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    version INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    applied_at BIGINT NOT NULL
)
"""

# Each engine has its own list of tables.
HAS_HISTORY = {
    "postgres": "SELECT 1 WHERE to_regclass('schema_migrations') IS NOT NULL",
    "sqlite": "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'schema_migrations'",
}

APPLIED = "SELECT version, name, sha256 FROM schema_migrations ORDER BY version"

RECORD = "INSERT INTO schema_migrations (version, name, sha256, applied_at) VALUES ($1, $2, $3, $4)"

FILE_NAME = re.compile(r"(?P<version>\d{4})_(?P<title>[\w-]+)(?:\.(?P<dialect>postgres|sqlite))?\.sql")

# What a `;` may hide in, then the `;` that ends a statement.
TOKEN = re.compile(
    r"""
    --[^\n]* | /\*.*?\*/ | '[^']*' | "[^"]*" | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$
    | (?P<end> ; (?= [ \t]* (?:--[^\n]*)? (?:\n|\Z) ) )
    """,
    re.VERBOSE | re.DOTALL,
)

COMMENTS = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)


class SchemaMismatch(RuntimeError):
    """The database and the code do not belong together. The message is one line and says what to do."""


@dataclass(frozen=True)
class Migration:
    version: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def statements(self) -> list[str]:
        ends = [0, *(token.end() for token in TOKEN.finditer(self.sql) if token["end"]), len(self.sql)]
        pieces = (self.sql[start:end].strip() for start, end in itertools.pairwise(ends))
        return [piece for piece in pieces if COMMENTS.sub("", piece).strip()]


async def migrate(database: Database, folder: Traversable | None = None) -> list[str]:
    """Applies what is pending and returns its names. Tries again while the database is busy."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if not await pending(database, folder):
                return []  # the usual start of a worker: no lock is taken
            return await _apply_pending(database, folder)
        except DatabaseUnavailable:
            if attempt == ATTEMPTS:
                raise
        await asyncio.sleep(random.uniform(0.2, 1))
    raise AssertionError("unreachable")


async def pending(database: Database, folder: Traversable | None = None) -> list[str]:
    """The names that `migrate` would apply. Writes nothing."""
    known = load_migrations(database.dialect, folder)
    has_history = await database.fetch(HAS_HISTORY[database.dialect])
    applied = await database.fetch(APPLIED) if has_history else []
    return [migration.name for migration in _compare(known, applied)]


async def _apply_pending(database: Database, folder: Traversable | None) -> list[str]:
    known = load_migrations(database.dialect, folder)
    async with database.transaction() as transaction:
        if database.migration_lock is not None:
            await transaction.execute(database.migration_lock)
        await transaction.execute(HISTORY)
        todo = _compare(known, await transaction.fetch(APPLIED))
        for migration in todo:
            try:
                for statement in migration.statements:
                    await transaction.execute(statement)
            except DatabaseUnavailable:
                raise
            except Exception as error:
                raise SchemaMismatch(
                    f"migration {migration.name} cannot be applied ({error}): does this database belong to another "
                    "program? Give the gateway one of its own (database.url)"
                ) from error
            now = int(time.time() * 1000)
            await transaction.execute(RECORD, migration.version, migration.name, migration.sha256, now)
    return [migration.name for migration in todo]


def _compare(known: Sequence[Migration], applied: Sequence[Row]) -> Sequence[Migration]:
    """What is still to do. Raises `SchemaMismatch` if the database is not at an earlier state of `known`."""
    if len(applied) > len(known):
        raise SchemaMismatch(
            f"the database is at migration {applied[-1]['name']}, newer than this gateway, which ends at "
            f"{known[-1].name}: run the newer gateway, or restore the backup from before its migration"
        )
    for migration, row in zip(known, applied, strict=False):
        if row["sha256"] != migration.sha256 or row["version"] != migration.version:
            raise SchemaMismatch(
                f"migration {migration.name} is not the one that was applied to the database ({row['name']}): "
                "restore the released file and put the change into a new one"
            )
    return known[len(applied) :]


def load_migrations(dialect: Dialect, folder: Traversable | None = None) -> list[Migration]:
    """All migrations for one engine, in order. A folder that breaks the rules above is a `ValueError`."""
    found: dict[tuple[int, str], Migration] = {}
    for entry in (folder or files("gateway") / "migrations").iterdir():
        if not entry.name.endswith(".sql"):
            continue
        match = FILE_NAME.fullmatch(entry.name)
        if match is None:
            raise ValueError(f"{entry.name} is no name for a migration: use 0007_name.sql or 0007_name.postgres.sql")
        migration = Migration(int(match["version"]), f"{match['version']}_{match['title']}", entry.read_text("utf-8"))
        for one in [match["dialect"]] if match["dialect"] else DIALECTS:
            if found.setdefault((migration.version, one), migration) is not migration:
                raise ValueError(f"two migrations for {one} have the number {migration.version}")
    versions = range(1, 1 + max((version for version, _ in found), default=0))
    if missing := [
        f"{version:04} for {one}" for version in versions for one in DIALECTS if (version, one) not in found
    ]:
        raise ValueError(f"missing migrations: {', '.join(missing)}")
    return [found[version, dialect] for version in versions]

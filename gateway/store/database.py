"""What the rest of the gateway asks of a database: five methods, the same on PostgreSQL and on SQLite.

The SQL is one text for both engines:

- parameters are `$1`, `$2`, ...; write `CAST($1 AS TEXT)` where PostgreSQL cannot infer a type, never `$1::text`;
- `ON CONFLICT ... DO UPDATE`, `RETURNING`, CTEs and partial indexes are fine; no `= ANY($1)`, `FOR UPDATE`, `GREATEST`;
- ids are text made in Python, times are integer milliseconds (UTC), money is integer nano-dollars, flags are 0 or 1.

A statement that needs one engine lives in that engine's driver, with a comment.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, NamedTuple, Protocol

Value = str | int | None
"""What a parameter may be. Flags are 0 or 1."""

Step = tuple[str, Sequence[Sequence[Value]]]
"""One statement and the parameter rows it runs with, in order."""


class Row(Protocol):
    """A row by column name or position."""

    def __getitem__(self, key: str | int, /) -> Any: ...


class PoolUse(NamedTuple):
    """The connections of one database: at work, open, and how many may be."""

    busy: int
    open: int
    most: int


class RowRejected(Exception):
    """The data is at fault, not the database: trying the same again fails the same way."""


class AlreadyThere(RowRejected):
    """A unique constraint holds a row with this key already."""


class Transaction(Protocol):
    """Statements that see each other and take effect together."""

    async def fetch(self, sql: str, *args: Value) -> Sequence[Row]: ...

    async def execute(self, sql: str, *args: Value) -> None: ...


class Database(Protocol):
    """One database. Any method may raise `errors.DatabaseUnavailable`; writing ones also `RowRejected`."""

    dialect: Literal["postgres", "sqlite"]
    migration_lock: str | None
    """A statement that makes a transaction the only migrating one until it ends; None: every transaction is alone."""

    @property
    def pool_use(self) -> PoolUse: ...

    @property
    def is_cut(self) -> bool:
        """Has the server closed a connection that nobody uses? Then it may be gone, whatever it said a moment ago."""

    async def open(self) -> None:
        """Connects. Called again after a failure; once it has returned, connections are renewed by themselves."""

    async def close(self) -> None:
        """Waits for running work, then gives everything back. A closed database can be opened again."""

    async def fetch(self, sql: str, *args: Value) -> Sequence[Row]:
        """Reads. Sees everything that `write` has acknowledged on any worker."""

    async def write(self, steps: Sequence[Step], *, timeout: float | None = None) -> None:
        """Runs the steps in one transaction, each statement once per parameter row; durable once this returns.

        `timeout` in seconds replaces the engine's own where that is too short for what is written. Steps without rows
        are left out. A deadlock or serialization failure is tried again a few times inside.
        """

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """Reads and writes in one transaction; commits at the end, rolls back on any exception."""

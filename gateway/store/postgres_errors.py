"""Whose fault an error of asyncpg's is, by SQLSTATE: the row's (`RowRejected`) or the database's."""

from __future__ import annotations

import asyncpg

from gateway.errors import DatabaseUnavailable
from gateway.store.database import AlreadyThere, RowRejected

FOREIGN = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)

# What an SQLSTATE, or the start of one, means for the caller.
ROW_REJECTED = ("22", "23")
CONFLICT = ("40001", "40P01")
READ_ONLY = ("25006",)
UNAVAILABLE = (
    "08",  # connection lost; pgbouncer has no server
    "25P03",  # we were silent too long inside a transaction
    "26",  # a prepared statement is gone: there is a pooler, and statement_cache is on
    "28",  # password or certificate rejected
    "3D",  # no such database
    "40",  # the other ways to lose a transaction; of some the end is unknown
    "42501",  # no right to the table
    "42P05",  # a prepared statement is already there: as 26
    "53",  # disk full, out of memory, too many connections
    "55P03",  # lock_timeout
    "57",  # shutting down, starting up, crashed, statement_timeout
    "58",  # I/O error
    "XX",  # corrupted
)


class Conflict(DatabaseUnavailable):
    """A deadlock or a serialization failure: another transaction won, and nothing of this one remains."""


class ReadOnly(DatabaseUnavailable):
    """The server takes no writes: it was the primary once, or its disk is full and the provider locked it."""


def translated(error: Exception, alive: bool) -> Exception:
    """Ours for one of FOREIGN, or the same where it shows a mistake in our SQL or call. `alive`: the connection is."""
    if isinstance(error, asyncpg.InterfaceError):
        # "connection is closed"; on a connection that lives it is a mistake in our call.
        return error if alive else DatabaseUnavailable(_said(error))
    if isinstance(error, asyncpg.InvalidCachedStatementError):
        return Conflict(_said(error))  # a migration changed a table under a prepared statement: prepare again
    if not isinstance(error, asyncpg.PostgresError):
        return DatabaseUnavailable(_said(error))
    state = error.sqlstate or ""
    if isinstance(error, asyncpg.UniqueViolationError):
        return AlreadyThere(_said(error))
    if state.startswith(ROW_REJECTED):
        return RowRejected(_said(error))
    if state.startswith(CONFLICT):
        return Conflict(_said(error))
    if state.startswith(READ_ONLY):
        return ReadOnly(_said(error))
    if state.startswith(UNAVAILABLE):
        return DatabaseUnavailable(_said(error))
    return error


def _said(error: Exception) -> str:
    """One line without values: asyncpg's own data errors quote the value between the place and the reason."""
    if type(error) is asyncpg.DataError and error.__cause__ is not None:
        text = f"{str(error.args[0]).partition(':')[0]}: {error.__cause__}"
    elif isinstance(error, asyncpg.PostgresError):
        text = str(error.args[0])
    else:
        text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

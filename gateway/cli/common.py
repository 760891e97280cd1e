"""What commands share: the settings, an open database, times and tables."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

from gateway.config import Settings, load_settings
from gateway.errors import ConfigError
from gateway.logs import escaped
from gateway.store.connect import database_at
from gateway.store.database import Database
from gateway.store.migrate import SchemaMismatch, migrate, pending

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def settings_from(options: argparse.Namespace, **flags: object) -> Settings:
    """Flags beat everything. Raises ConfigError."""
    return load_settings(options.config, overrides={key: value for key, value in flags.items() if value is not None})


@contextlib.asynccontextmanager
async def open_database(settings: Settings) -> AsyncIterator[Database]:
    """Open and migrated (unless `database.auto_migrate` is off). Raises DatabaseUnavailable, ConfigError."""
    database = database_at(settings.database.url, pool_size=1, statement_cache=settings.database.statement_cache)
    try:
        await database.open()
        try:
            if settings.database.auto_migrate:
                await migrate(database)
            elif waiting := await pending(database):
                raise ConfigError([f"database: {len(waiting)} migrations are waiting: run `gateway migrate`"])
        except SchemaMismatch as failure:
            raise ConfigError([f"database: {failure}"]) from None
        yield database
    finally:
        await database.close()


def moment(text: str, flag: str, direction: Literal["ago", "ahead"]) -> int:
    """`2026-01-31`, `2026-01-31T12:00` (UTC) or a distance such as `7d`, in milliseconds. Raises ConfigError."""
    distance = re.fullmatch(r"(\d{1,5})([mhdw])", text)
    now = datetime.now(UTC)
    if distance is not None:
        span = timedelta(**{_UNITS[distance[2]]: int(distance[1])})
        return int((now - span if direction == "ago" else now + span).timestamp() * 1000)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError([f"{flag}: {text!r} is no time: write 2026-01-31, 2026-01-31T12:00 or 7d"]) from None
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1000)


def shown_time(milliseconds: int | None) -> str:
    return "" if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell; those in `right` are figures. Escaped: names come from clients."""
    cells = [list(headings), *[[escaped(str(cell)) for cell in row] for row in rows]]
    widths = [max(len(row[index]) for row in cells) for index in range(len(headings))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)

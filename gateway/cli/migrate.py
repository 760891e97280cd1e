"""`gateway migrate [--check]`"""

from __future__ import annotations

import argparse
import asyncio

from gateway.cli.common import settings_from
from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.store.connect import database_at
from gateway.store.migrate import SchemaMismatch, migrate, pending


def run(options: argparse.Namespace) -> int:
    return asyncio.run(_migrate(settings_from(options), check=options.check))


async def _migrate(settings: Settings, *, check: bool) -> int:
    database = database_at(settings.database.url, pool_size=1, statement_cache=settings.database.statement_cache)
    try:
        await database.open()
        names = await (pending(database) if check else migrate(database))
    except SchemaMismatch as failure:
        raise ConfigError([f"database: {failure}"]) from None
    finally:
        await database.close()
    for name in names:
        print(f"{'waiting' if check else 'applied'}: {name}")
    if not names:
        print("the database is up to date")
    return 1 if check and names else 0

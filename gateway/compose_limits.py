"""From settings to admission: whose limits are whose, and where they are counted."""

from __future__ import annotations

import time

from gateway.admission import Admission
from gateway.allowances import GATEWAY, Allowances
from gateway.auth import Auth
from gateway.caller import Caller, KeyLimits
from gateway.config import Settings
from gateway.key_watch import KeyWatch
from gateway.limits import Account, Batch, Verdict, period_start
from gateway.limits_memory import MemoryBook
from gateway.metrics import Metrics
from gateway.store import limits
from gateway.store.database import Database


class DatabaseBook:
    """Limits counted in the database, for all of its workers and hosts."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._swept_to = ""

    @property
    def is_cut(self) -> bool:
        return self._database.is_cut

    async def admit(self, batch: Batch) -> Verdict:
        return await limits.admit(self._database, batch)

    async def sweep(self, worker: str) -> None:
        self._swept_to = await limits.sweep(self._database, worker, self._swept_to)


def build_admission(settings: Settings, database: Database, auth: Auth, watch: KeyWatch, metrics: Metrics) -> Admission:
    """Defaults and budgets as the settings have them, counted where all who share the database count."""
    given, budgets = settings.limits, settings.budgets
    default = KeyLimits(
        requests_per_minute=given.requests_per_minute,
        request_burst=given.burst,
        tokens_per_minute=given.tokens_per_minute,
        token_burst=given.token_burst,
        max_parallel=given.max_parallel,
        budget_nanousd=budgets.key.nanousd if budgets.key is not None else None,
        budget_period=budgets.key.period if budgets.key is not None else None,
    )
    whole = budgets.gateway
    allowances = Allowances(default) if whole is None else Allowances(default, whole.nanousd, whole.period)

    async def spent(account: Account, caller: Caller) -> int:
        since = period_start(int(time.time() * 1000), account.period)
        if account.subject == GATEWAY:
            return await limits.spent_since(database, user_id=None, key_id=None, since=since)
        return await limits.spent_since(database, user_id=caller.user_id, key_id=caller.key_id, since=since)

    book = DatabaseBook(database) if _counts_in_database(settings, database) else MemoryBook()
    return Admission(allowances, auth, watch, book, spent, metrics, allow_unpriced=budgets.allow_unpriced)


def _counts_in_database(settings: Settings, database: Database) -> bool:
    """Memory is right only for a worker that nobody shares the database with."""
    if settings.limits.store != "auto":
        return settings.limits.store == "database"
    return database.dialect == "postgres" or not settings.alone

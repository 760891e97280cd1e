"""Nobody else loses anything when a user is deleted, and each statement that has a user is needed for that."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.store import keys, user_deletions
from gateway.store.database import Database
from gateway.user_deletion import delete_user
from tests_standalone.conftest import stored_key
from tests_standalone.support.owners import mutants, patch
from tests_standalone.test_user_deletion import NOW, dump, live


async def losses(database: Database, seconds: float = 30) -> list[str]:
    """What others lose by it that bob is deleted, and what is said of somebody whom nobody knows."""
    await live(database, "gone")
    gone, _ = await delete_user(database, "gone", seconds=seconds)
    state = "INSERT INTO limit_states (subject, at, spent_nanousd, full_at) VALUES ('user:gone', 0, 0, 0)"
    await database.write([(state, [()])])  # somebody has the name again
    await live(database, "ann")
    await live(database, "anna")
    await keys.add(database, stored_key(id="key_lost", user_id="ann", created_at=NOW - 1000, revoked_at=NOW))
    before = await dump(database, "gateway_state", "user_deletions")
    await live(database, "bob")
    bob, _ = await delete_user(database, "bob", seconds=seconds)
    await database.write([("DELETE FROM usage_rows WHERE user_id = $1", [(bob.anonymous_id,)])])
    await user_deletions.forget(database, replace(bob, until=gone.until))
    after = await dump(database, "gateway_state", "user_deletions")
    found = [line for line in before.splitlines() if line not in after.splitlines()]
    found += [] if gone in await user_deletions.running(database) else ["gone is not looked after any more"]
    return found + (["nobody is known"] if await user_deletions.known(database, "nobody") else [])


async def test_others_keep_all_of_it(migrated: Database) -> None:
    assert await losses(migrated) == []


STATEMENTS = user_deletions, keys
SETS_IT = {"user_deletions._ANONYMOUS", "keys._PUT"}


@pytest.mark.parametrize(("name", "sql"), list(mutants(STATEMENTS, SETS_IT)))
async def test_a_statement_without_its_user_is_noticed(
    name: str, sql: str, sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(monkeypatch, STATEMENTS, name, sql)
    assert await losses(sqlite, 3) != []  # one of them finds rows for ever

"""Keys in, keys out, and a revision that moves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.store import keys
from gateway.store.database import AlreadyThere, Database
from gateway.store.keys import KeyState
from tests_standalone.conftest import NOON, opened, stored_key

FULL = stored_key(
    name="all of it 🙂", is_admin=True, models=("a", "b/c:d", 'quoted "x"'), requests_per_minute=1, tokens_per_minute=2,
    max_parallel=3, budget_nanousd=2**62, budget_period="month", expires_at=NOON + 1, revoked_at=NOON,
)  # fmt: skip


async def test_a_fresh_database_has_never_held_a_key(migrated: Database) -> None:
    assert await keys.state(migrated) == KeyState(revision=0, ever_made=False)
    assert await keys.listed(migrated) == []
    assert await keys.by_digest(migrated, "0" * 64) is None


@pytest.mark.parametrize("key", [stored_key(), FULL, stored_key(models=())], ids=["plain", "full", "no models"])
async def test_a_key_is_found_by_its_digest_as_it_was_stored(migrated: Database, key: keys.StoredKey) -> None:
    await keys.add(migrated, key)
    assert await keys.by_digest(migrated, key.digest) == key
    assert await keys.by_digest(migrated, key.digest[:-1]) is None
    assert await keys.by_digest(migrated, key.digest.upper()) is None
    assert await keys.listed(migrated) == [key]


async def test_keys_are_listed_oldest_first(migrated: Database) -> None:
    for at in (3, 1, 2):
        await keys.add(migrated, stored_key(id=f"key_{at}", created_at=at))
    assert [key.id for key in await keys.listed(migrated)] == ["key_1", "key_2", "key_3"]


async def test_every_change_moves_the_revision_and_ever_made_never_goes_back(migrated: Database) -> None:
    key = stored_key()
    seen = [await keys.state(migrated)]
    await keys.add(migrated, key)
    seen.append(await keys.state(migrated))
    assert await keys.revoke(migrated, key.id, NOON)
    seen.append(await keys.state(migrated))
    await keys.add(migrated, stored_key())
    seen.append(await keys.state(migrated))
    assert seen == [KeyState(0, False), KeyState(1, True), KeyState(2, True), KeyState(3, True)]


async def test_a_revoked_key_stays_listed_and_keeps_its_first_time(migrated: Database) -> None:
    key, other = stored_key(), stored_key()
    await keys.add(migrated, key)
    await keys.add(migrated, other)
    assert await keys.revoke(migrated, key.id, NOON)
    assert await keys.revoke(migrated, key.id, NOON + 5)
    found = await keys.by_digest(migrated, key.digest)
    assert found is not None
    assert found.revoked_at == NOON
    assert await keys.by_digest(migrated, other.digest) == other


async def test_revoking_what_is_not_there_changes_nothing(migrated: Database) -> None:
    assert not await keys.revoke(migrated, "key_unknown", NOON)
    assert await keys.state(migrated) == KeyState(0, False)


@pytest.mark.parametrize("same", ["id", "digest"])
async def test_an_id_or_a_digest_is_taken_once(migrated: Database, same: str) -> None:
    key = stored_key()
    await keys.add(migrated, key)
    with pytest.raises(AlreadyThere):
        await keys.add(migrated, stored_key(**{same: getattr(key, same)}))
    assert await keys.listed(migrated) == [key]
    assert (await keys.state(migrated)).revision == 1


async def test_two_workers_never_move_the_revision_to_the_same_place(tables_url: str) -> None:
    async with opened(tables_url) as one, opened(tables_url) as two:
        await asyncio.gather(*(keys.add(database, stored_key()) for database in (one, two) for _ in range(10)))
        assert await keys.state(one) == await keys.state(two) == KeyState(20, True)


@pytest.mark.parametrize(
    ("fields", "usable"),
    [
        ({}, True),
        ({"expires_at": NOON + 1}, True),
        ({"expires_at": NOON}, False),
        ({"expires_at": NOON - 1}, False),
        ({"revoked_at": NOON + 1000}, False),
        ({"revoked_at": NOON, "expires_at": NOON + 1}, False),
    ],
)
def test_usable(fields: dict[str, Any], usable: bool) -> None:
    assert stored_key(**fields).usable(NOON) is usable

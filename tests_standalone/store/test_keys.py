"""Keys in, keys out, and a revision that moves."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from gateway.errors import BadRequest, NotFound
from gateway.store import keys
from gateway.store.database import AlreadyThere, Database
from gateway.store.keys import KeyState
from tests_standalone.conftest import NOON, opened, stored_key

SQL = ["' OR '1'='1", "'; DROP TABLE api_keys; --", "created_at", "1) OR (1=1", "$1", "%", "NULL", ""]
FULL = stored_key(
    name="all of it 🙂", is_admin=True, models=("a", "b/c:d", 'quoted "x"'), requests_per_minute=1, tokens_per_minute=2,
    max_parallel=3, budget_nanousd=2**62, budget_period="month", expires_at=NOON + 1, revoked_at=NOON, request_burst=4,
    token_burst=5, per_end_user=True, labels={"team": "blue", "ü": "x"}, created_by="key_maker",
    previous_digest="1" * 64, previous_until=NOON - 1,
)  # fmt: skip


async def test_a_fresh_database_has_never_held_a_key(migrated: Database) -> None:
    assert await keys.state(migrated) == KeyState(revision=0, ever_made=False)
    assert await keys.listed(migrated) == []
    assert await keys.by_digest(migrated, "0" * 64, NOON) is None
    assert await keys.by_id(migrated, "key_none") is None


@pytest.mark.parametrize("key", [stored_key(), FULL, stored_key(models=())], ids=["plain", "full", "no models"])
async def test_a_key_is_found_by_its_digest_as_it_was_stored(migrated: Database, key: keys.StoredKey) -> None:
    await keys.add(migrated, key)
    assert await keys.by_digest(migrated, key.digest, NOON) == key
    assert await keys.by_id(migrated, key.id) == key
    assert await keys.by_digest(migrated, key.digest[:-1], NOON) is None
    assert await keys.by_digest(migrated, key.digest.upper(), NOON) is None
    assert await keys.by_digest(migrated, "", NOON) is None
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
    found = await keys.by_digest(migrated, key.digest, NOON)
    assert found is not None
    assert found.revoked_at == NOON
    assert await keys.by_digest(migrated, other.digest, NOON) == other


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


async def test_many_digests_are_asked_for_at_once(migrated: Database) -> None:
    stored = [stored_key() for _ in range(5)]
    for key in stored:
        await keys.add(migrated, key)
    wrong = [f"{number:064x}" for number in range(2 * keys.DIGESTS_AT_ONCE)]
    asked = [*wrong[:70], *(key.digest for key in stored), *wrong[70:]]
    found = await keys.by_digests(migrated, asked, NOON)
    assert found == {key.digest: key for key in stored}
    assert await keys.by_digests(migrated, [], NOON) == {}


async def test_after_a_rotation_the_old_digest_finds_the_key_for_a_while(migrated: Database) -> None:
    key = stored_key(digest="a" * 64)
    await keys.add(migrated, key)
    rotated = await keys.rotate(migrated, key.id, "b" * 64, "bbbb", NOON + 10)
    assert (rotated.digest, rotated.hint, rotated.previous_digest) == ("b" * 64, "bbbb", "a" * 64)
    both = await keys.by_digests(migrated, ["a" * 64, "b" * 64], NOON + 9)
    assert both == {"a" * 64: rotated, "b" * 64: rotated}
    assert await keys.by_digests(migrated, ["a" * 64, "b" * 64], NOON + 10) == {"b" * 64: rotated}

    again = await keys.rotate(migrated, key.id, "c" * 64, "cccc", NOON + 20)
    found = await keys.by_digests(migrated, ["a" * 64, "b" * 64, "c" * 64], NOON)
    assert found == {"b" * 64: again, "c" * 64: again}, "one old secret at most"
    last = await keys.rotate(migrated, key.id, "d" * 64, "dddd", None)
    assert await keys.by_digests(migrated, [letter * 64 for letter in "abcd"], NOON) == {"d" * 64: last}
    assert (await keys.state(migrated)).revision == 4


async def test_a_change_may_be_of_any_field_and_to_none(migrated: Database) -> None:
    key, other = stored_key(), stored_key()
    await keys.add(migrated, key)
    await keys.add(migrated, other)
    full = replace(FULL, id=key.id)
    assert await keys.update(migrated, key.id, lambda _: full) == full
    assert await keys.by_id(migrated, key.id) == full
    assert await keys.update(migrated, key.id, lambda _: key) == key
    assert await keys.by_id(migrated, key.id) == key
    assert await keys.by_id(migrated, other.id) == other
    assert await keys.state(migrated) == KeyState(4, True)


async def test_a_change_that_fails_changes_nothing_and_moves_nothing(migrated: Database) -> None:
    key = stored_key(id="key_1")
    await keys.add(migrated, key)
    before = await keys.state(migrated)

    def refuse(_: keys.StoredKey) -> keys.StoredKey:
        raise BadRequest("no")

    with pytest.raises(BadRequest):
        await keys.update(migrated, key.id, refuse)
    with pytest.raises(NotFound):
        await keys.update(migrated, "key_none", lambda key: key)
    with pytest.raises(NotFound):
        await keys.rotate(migrated, "key_none", "b" * 64, "bbbb", None)
    async with keys.changing(migrated) as changes:
        await changes.put(replace(key, name="changed"))
        await changes.add(stored_key(id="key_2"))
    with pytest.raises(BadRequest):
        await _half_a_change(migrated, key)
    assert [found.id for found in await keys.listed(migrated)] == ["key_1", "key_2"]
    assert await keys.by_id(migrated, key.id) == replace(key, name="changed")
    assert await keys.state(migrated) == KeyState(before.revision + 1, True)


async def _half_a_change(database: Database, key: keys.StoredKey) -> None:
    async with keys.changing(database) as changes:
        await changes.put(replace(key, name="never"))
        raise BadRequest("no")


async def test_the_first_key_may_be_made_in_a_change(migrated: Database) -> None:
    async with keys.changing(migrated) as changes:
        await changes.add(stored_key())
    assert await keys.state(migrated) == KeyState(1, True)


async def test_changes_come_one_after_the_other(tables_url: str) -> None:
    """Each sees what the one before has done: none is lost, whoever makes them."""
    key = stored_key(max_parallel=0)

    def one_more(found: keys.StoredKey) -> keys.StoredKey:
        return replace(found, max_parallel=(found.max_parallel or 0) + 1)

    async with opened(tables_url) as one, opened(tables_url) as two:
        await keys.add(one, key)
        await asyncio.gather(*(keys.update(database, key.id, one_more) for database in (one, two) for _ in range(10)))
        found = await keys.by_id(one, key.id)
        assert found is not None
        assert found.max_parallel == 20
        assert (await keys.state(two)).revision == 21


async def test_keys_are_listed_in_pages(migrated: Database) -> None:
    for at, name, user in ((1, "a", "ann"), (1, "b", "bob"), (2, "0", "ann"), (3, "c", "bob"), (3, "d", "ann")):
        await keys.add(migrated, stored_key(id=f"key_{name}", created_at=at, user_id=user))

    async def page(**asked: Any) -> str:
        return "".join(key.id[-1] for key in await keys.listed(migrated, **asked))

    assert await page() == "ab0cd"
    assert await page(limit=2) == "ab"
    assert await page(limit=2, after="key_b") == "0c"
    assert await page(limit=2, after="key_d") == ""
    assert await page(after="key_none") == ""
    assert await page(user_id="ann") == "a0d"
    assert await page(user_id="ann", after="key_a", limit=1) == "0"
    assert await page(user_id="nobody") == ""


@pytest.mark.parametrize("value", SQL)
async def test_what_is_listed_by_is_only_compared(migrated: Database, value: str) -> None:
    """A93."""
    await keys.add(migrated, stored_key())
    assert await keys.listed(migrated, after=value) == []
    assert await keys.listed(migrated, user_id=value) == []
    assert await keys.by_id(migrated, value) is None
    assert len(await keys.listed(migrated)) == 1


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

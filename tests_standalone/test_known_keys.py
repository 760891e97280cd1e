"""Digests in, keys out: what is remembered, and until when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gateway import known_keys
from gateway.caller import Caller
from gateway.known_keys import KnownKeys
from gateway.store import keys
from gateway.store.database import Database
from gateway.store.keys import KeyState
from tests_standalone.conftest import Unsteady, settle, stored_key

FIRST = KeyState(1, ever_made=True)
LATER = KeyState(2, ever_made=True)


@pytest.fixture
async def unsteady(sqlite: Database) -> AsyncIterator[Unsteady]:
    found = Unsteady(sqlite)
    yield found
    found.let_go()


async def test_a_key_is_looked_up_once_and_so_is_a_wrong_one(unsteady: Unsteady) -> None:
    key = stored_key()
    await keys.add(unsteady, key)
    known = KnownKeys(unsteady)
    for _ in range(3):
        found = await known.find(key.digest, FIRST)
        assert found is not None
        assert (found.key, found.caller) == (key, Caller("ann", key.id))
        assert await known.find("0" * 64, FIRST) is None
    assert len(unsteady.fetched) == 2


async def test_a_newer_state_forgets_all_and_an_older_one_nothing(unsteady: Unsteady) -> None:
    key = stored_key()
    await keys.add(unsteady, key)
    known = KnownKeys(unsteady)
    await known.find(key.digest, LATER)
    await known.find("0" * 64, LATER)
    assert await known.find(key.digest, FIRST) is not None
    assert await known.find("0" * 64, FIRST) is None
    assert len(unsteady.fetched) == 2
    await keys.update(unsteady, key.id, lambda found: replace(found, user_id="bob"))
    await keys.add(unsteady, stored_key(digest="0" * 64))
    newest = KeyState(3, ever_made=True)
    for digest, user in ((key.digest, "bob"), ("0" * 64, "ann")):
        found = await known.find(digest, newest)
        assert found is not None
        assert (found.caller.user_id, found.caller.revision) == (user, 3)


async def test_what_was_read_under_an_older_state_is_not_remembered_under_a_newer(unsteady: Unsteady) -> None:
    """The answer is on its way when the key is revoked and another call learns of it."""
    key = stored_key()
    await keys.add(unsteady, key)
    known = KnownKeys(unsteady)
    unsteady.hold_answers()
    early = asyncio.create_task(known.find(key.digest, FIRST))
    await asyncio.sleep(0.02)
    await keys.revoke(unsteady, key.id, 5)
    late = asyncio.create_task(known.find(key.digest, LATER))
    await settle()
    unsteady.let_go()
    before, after = await early, await late
    assert before is not None
    assert after is not None
    assert (before.key.revoked_at, before.caller.revision) == (None, 1)
    assert (after.key.revoked_at, after.caller.revision) == (5, 2)
    found = await known.find(key.digest, LATER)
    assert found is not None
    assert found.key.revoked_at == 5


async def test_both_memories_have_a_bound_of_their_own(unsteady: Unsteady, monkeypatch: pytest.MonkeyPatch) -> None:
    """A15. Wrong keys never push out right ones."""
    monkeypatch.setattr(known_keys, "PAUSE", 0.0)
    monkeypatch.setattr(known_keys, "MOST_REMEMBERED", 10)
    key = stored_key()
    await keys.add(unsteady, key)
    known = KnownKeys(unsteady)
    await known.find(key.digest, FIRST)
    await asyncio.gather(*(known.find(f"{number:064}", FIRST) for number in range(50)))
    asked = len(unsteady.fetched)
    await known.find(key.digest, FIRST)
    await known.find(f"{49:064}", FIRST)
    assert len(unsteady.fetched) == asked
    assert len(known._missing) == 10
    for _ in range(50):
        other = stored_key()
        await keys.add(unsteady, other)
        await known.find(other.digest, FIRST)
    assert len(known._found) == 10


async def test_many_at_once_share_queries(unsteady: Unsteady) -> None:
    """A15."""
    key = stored_key()
    await keys.add(unsteady, key)
    known = KnownKeys(unsteady)
    wrong = [f"{number:064}" for number in range(640)]
    found = await asyncio.gather(*(known.find(digest, FIRST) for digest in [*wrong, key.digest, key.digest]))
    assert [one is not None for one in found] == [False] * 640 + [True] * 2
    assert len(unsteady.fetched) == 11


async def test_wrong_keys_one_after_the_other_are_few_queries_too(
    unsteady: Unsteady, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A15. They come while the look-up after a wrong one has to wait, and share the one after that."""
    monkeypatch.setattr(known_keys, "PAUSE", 3600.0)
    known = KnownKeys(unsteady)
    assert await known.find("0" * 64, FIRST) is None
    waiting = []
    for number in range(1, 50):
        waiting.append(asyncio.create_task(known.find(f"{number:064}", FIRST)))
        await asyncio.sleep(0.001)
    assert len(unsteady.fetched) == 1
    for task in waiting:
        task.cancel()


async def test_right_keys_wait_for_nothing(unsteady: Unsteady, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_keys, "PAUSE", 3600.0)
    known = KnownKeys(unsteady)
    for _ in range(5):
        key = stored_key()
        await keys.add(unsteady, key)
        assert await known.find(key.digest, FIRST) is not None
    assert len(unsteady.fetched) == 5


async def test_the_database_sees_whole_digests_and_nothing_of_a_key(
    unsteady: Unsteady, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A5, A6. A look-up by a part of a key would tell by its time how much of it is right."""
    asked: list[object] = []
    fetch = unsteady.fetch

    async def watched(sql: str, *args: str | int | None) -> object:
        asked.extend(args)
        return await fetch(sql, *args)

    monkeypatch.setattr(unsteady, "fetch", watched)
    await KnownKeys(unsteady).find("ab" * 32, FIRST)
    assert {*asked} == {"ab" * 32, ""}

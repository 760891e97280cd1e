"""How the keys stand: from the last answer while it is good, else from the database, never from before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway import key_watch
from gateway.errors import DatabaseUnavailable
from gateway.key_watch import KeyWatch
from gateway.store import keys
from gateway.store.database import Database
from gateway.store.keys import KeyState
from tests_standalone.conftest import Unsteady, settle, stored_key


@pytest.fixture
async def unsteady(sqlite: Database) -> AsyncIterator[Unsteady]:
    found = Unsteady(sqlite)
    yield found
    found.let_go()


@pytest.fixture
async def watch(unsteady: Unsteady) -> AsyncIterator[KeyWatch]:
    found = KeyWatch(unsteady)
    yield found
    unsteady.down = False
    unsteady.let_go()
    await found.aclose()


async def test_a_state_that_is_no_longer_good_is_asked_for(
    watch: KeyWatch, sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_watch, "GOOD_SECONDS", 0.0)
    assert await watch.state() == KeyState(0, False)
    await keys.add(sqlite, stored_key())
    assert await watch.state() == KeyState(1, True)


async def test_calls_of_one_moment_share_a_round_trip(watch: KeyWatch, unsteady: Unsteady) -> None:
    assert await asyncio.gather(*(watch.state() for _ in range(100))) == [KeyState(0, False)] * 100
    assert len(unsteady.fetched) == 1


async def test_who_comes_during_a_round_trip_gets_the_answer_of_a_later_one(
    watch: KeyWatch, unsteady: Unsteady, sqlite: Database
) -> None:
    """The first answer is on its way when a key is made and others come: it would tell them what was true before."""
    unsteady.hold_answers()
    first = asyncio.create_task(watch.state())
    await asyncio.sleep(0.02)
    await keys.add(sqlite, stored_key())
    later = [asyncio.create_task(watch.state()) for _ in range(50)]
    await settle()
    assert len(unsteady.fetched) == 1
    unsteady.let_go()
    assert await first == KeyState(0, False)
    assert await asyncio.gather(*later) == [KeyState(1, True)] * 50
    assert len(unsteady.fetched) == 2


async def test_what_was_read_is_known_without_asking(
    watch: KeyWatch, unsteady: Unsteady, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_watch, "GOOD_SECONDS", 3600.0)
    await watch.state()
    for _ in range(100):
        assert await watch.state() == KeyState(0, False)
    assert len(unsteady.fetched) == 1


async def test_what_was_read_too_long_ago_is_asked_again(
    watch: KeyWatch, unsteady: Unsteady, sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_watch, "GOOD_SECONDS", 0.02)
    await watch.state()
    await keys.add(sqlite, stored_key())
    await asyncio.sleep(0.03)
    assert await watch.state() == KeyState(1, True)


async def test_the_age_of_an_answer_is_counted_from_its_question(
    watch: KeyWatch, unsteady: Unsteady, sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that takes longer than it would be good for is no news."""
    monkeypatch.setattr(key_watch, "GOOD_SECONDS", 0.05)
    unsteady.hold_answers()
    asking = asyncio.create_task(watch.state())
    await asyncio.sleep(0.08)
    await keys.add(sqlite, stored_key())
    unsteady.let_go()
    await asking
    assert await watch.state() == KeyState(1, True)


async def test_a_failed_read_means_that_nothing_is_known(
    watch: KeyWatch, unsteady: Unsteady, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_watch, "GOOD_SECONDS", 3600.0)
    await watch.state()
    unsteady.down = True
    for ask in (watch.look, watch.state):
        with pytest.raises(DatabaseUnavailable):
            await ask()
    unsteady.down = False
    assert await watch.state() == KeyState(0, False)


async def test_what_others_learned_counts_and_nothing_goes_back(
    watch: KeyWatch, unsteady: Unsteady, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_watch, "GOOD_SECONDS", 3600.0)
    await watch.state()
    for told, known in [
        (KeyState(5, False), KeyState(5, False)),
        (KeyState(4, False), KeyState(5, False)),
        (KeyState(3, True), KeyState(5, True)),
        (KeyState(6, False), KeyState(6, True)),
    ]:
        watch.tell(told)
        assert await watch.state() == known


async def test_an_answer_that_is_late_does_not_undo_what_was_told(watch: KeyWatch, unsteady: Unsteady) -> None:
    unsteady.hold_answers()
    asking = asyncio.create_task(watch.state())
    await settle()
    watch.tell(KeyState(9, True))
    unsteady.let_go()
    assert await asking == KeyState(9, True)


async def test_what_is_told_is_no_proof_that_the_database_answers(watch: KeyWatch, unsteady: Unsteady) -> None:
    watch.tell(KeyState(9, True))
    unsteady.down = True
    with pytest.raises(DatabaseUnavailable):
        await watch.state()


async def test_closing_waits_for_the_read(watch: KeyWatch, unsteady: Unsteady) -> None:
    await watch.state()
    unsteady.hold()
    asking = [asyncio.create_task(watch._reads.answer(None)) for _ in range(2)]
    await settle()
    closing = asyncio.create_task(watch.aclose())
    await settle()
    assert not closing.done()
    unsteady.let_go()
    await closing
    assert await asyncio.gather(*asking) == [KeyState(0, False)] * 2
    assert not [task for task in asyncio.all_tasks() if task.get_name() in ("key state",)]


async def test_closing_what_was_never_asked(unsteady: Unsteady) -> None:
    await KeyWatch(unsteady).aclose()

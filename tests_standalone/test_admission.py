"""Callers in, one round trip for all that wait, never an answer from before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.admission import Admission
from gateway.errors import DatabaseUnavailable
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
async def admission(unsteady: Unsteady) -> AsyncIterator[Admission]:
    found = Admission(unsteady)
    yield found
    unsteady.let_go()
    await found.aclose()


async def test_a_caller_gets_the_state_of_the_keys(admission: Admission, sqlite: Database) -> None:
    assert await admission.check() == KeyState(0, False)
    await keys.add(sqlite, stored_key())
    assert await admission.check() == KeyState(1, True)


async def test_callers_of_one_moment_share_a_round_trip(admission: Admission, unsteady: Unsteady) -> None:
    answers = await asyncio.gather(*(admission.check() for _ in range(100)))
    assert answers == [KeyState(0, False)] * 100
    assert len(unsteady.fetched) == 1


async def test_who_comes_during_a_round_trip_gets_the_answer_of_a_later_one(
    admission: Admission, unsteady: Unsteady, sqlite: Database
) -> None:
    """The first answer is on its way when a key is made and others come: it would tell them what was true before."""
    unsteady.hold_answers()
    first = asyncio.create_task(admission.check())
    await asyncio.sleep(0.02)
    await keys.add(sqlite, stored_key())
    later = [asyncio.create_task(admission.check()) for _ in range(50)]
    await settle()
    assert len(unsteady.fetched) == 1

    unsteady.let_go()
    assert await first == KeyState(0, False)
    assert await asyncio.gather(*later) == [KeyState(1, True)] * 50
    assert len(unsteady.fetched) == 2


async def test_a_failure_reaches_all_who_wait_and_the_next_caller_asks_again(
    admission: Admission, unsteady: Unsteady
) -> None:
    unsteady.hold()
    unsteady.down = True
    tasks = [asyncio.create_task(admission.check()) for _ in range(3)]
    await settle()
    tasks += [asyncio.create_task(admission.check()) for _ in range(3)]
    unsteady.let_go()
    told = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(failure) for failure in told] == [DatabaseUnavailable] * 6

    unsteady.down = False
    assert await admission.check() == KeyState(0, False)


async def test_a_failure_of_any_kind_leaves_nobody_waiting(admission: Admission, sqlite: Database) -> None:
    await sqlite.write([("DELETE FROM gateway_state", [()])])
    told = await asyncio.gather(admission.check(), admission.check(), return_exceptions=True)
    assert all(isinstance(failure, Exception) for failure in told)


@pytest.mark.parametrize(("down", "answer"), [(False, KeyState), (True, DatabaseUnavailable)])
async def test_a_caller_that_leaves_harms_nobody(
    admission: Admission, unsteady: Unsteady, down: bool, answer: type
) -> None:
    unsteady.hold()
    unsteady.down = down
    tasks = [asyncio.create_task(admission.check()) for _ in range(6)]
    await settle()
    tasks += [asyncio.create_task(admission.check()) for _ in range(6)]
    await settle()
    for task in tasks[::2]:
        task.cancel()
    unsteady.let_go()
    told = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(found) for found in told] == [asyncio.CancelledError, answer] * 6


async def test_all_may_leave_even_before_a_failure(admission: Admission, unsteady: Unsteady) -> None:
    unsteady.hold()
    unsteady.down = True
    tasks = [asyncio.create_task(admission.check()) for _ in range(3)]
    await settle()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    unsteady.let_go()
    await admission.aclose()
    unsteady.down = False
    assert await admission.check() == KeyState(0, False)


async def test_closing_waits_for_the_round_trip(admission: Admission, unsteady: Unsteady) -> None:
    unsteady.hold()
    asking = asyncio.create_task(admission.check())
    await settle()
    closing = asyncio.create_task(admission.aclose())
    await settle()
    assert not closing.done()
    unsteady.let_go()
    await closing
    assert await asking == KeyState(0, False)


async def test_closing_what_was_never_asked(unsteady: Unsteady) -> None:
    await Admission(unsteady).aclose()

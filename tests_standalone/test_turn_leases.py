"""Conversations asked for in, the right to a turn out; nothing is held longer than the call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway import turn_leases
from gateway.errors import ConversationBusy, DatabaseUnavailable
from gateway.store.database import Database
from gateway.store.turn_leases import release_step
from gateway.turn_leases import TurnLeases
from tests_standalone.conftest import Unsteady, eventually, opened, rows, settle

HELD = "SELECT conversation_id FROM turn_leases ORDER BY conversation_id"


@pytest.fixture
def unsteady(sqlite: Database) -> Unsteady:
    return Unsteady(sqlite)


@pytest.fixture
async def leases(migrated: Database) -> AsyncIterator[TurnLeases]:
    found = TurnLeases(migrated)
    yield found
    await found.aclose()


async def gone(database: Database) -> bool:
    return not await rows(database, HELD)


async def test_a_second_turn_is_refused_until_the_first_has_ended(leases: TurnLeases, migrated: Database) -> None:
    held = await leases.take("ann", "chat")
    for _ in range(2):
        with pytest.raises(ConversationBusy) as caught:
            await leases.take("ann", "chat")
    assert caught.value.headers["retry-after-ms"] == "1000"
    other = await leases.take("ann", "other")
    held.let_go(recorded=False)
    again = await leases.take("ann", "chat")
    held.let_go(recorded=False)
    assert await rows(migrated, HELD) == [("chat",), ("other",)]
    again.let_go(recorded=False)
    other.let_go(recorded=False)
    await leases.aclose()
    assert await gone(migrated)


async def test_what_ended_with_its_turn_is_not_ended_again(leases: TurnLeases, migrated: Database) -> None:
    held = await leases.take("ann", "chat")
    await migrated.write([release_step([held.lease])])
    held.let_go(recorded=True)
    await leases.aclose()
    assert (await leases.take("ann", "chat")).lease.holder != held.lease.holder


async def test_another_worker_is_refused_too(tables_url: str) -> None:
    async with opened(tables_url) as one, opened(tables_url) as two:
        first, second = TurnLeases(one), TurnLeases(two)
        held = await first.take("ann", "chat")
        with pytest.raises(ConversationBusy):
            await second.take("ann", "chat")
        held.let_go(recorded=False)
        await first.aclose()
        (await second.take("ann", "chat")).let_go(recorded=False)
        await second.aclose()


async def test_calls_of_one_moment_share_a_statement(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    take = turn_leases.rows.take

    async def counted(database: Database, wanted: list[turn_leases.Lease]) -> set[str]:
        asked.append(len(wanted))
        return await take(database, wanted)

    monkeypatch.setattr(turn_leases.rows, "take", counted)
    leases = TurnLeases(sqlite)
    held = await asyncio.gather(*(leases.take("ann", f"c{number}") for number in range(20)))
    assert len(asked) <= 2
    assert sum(asked) == 20
    for one in held:
        one.let_go(recorded=False)
    await leases.aclose()
    assert await gone(sqlite)


async def test_of_calls_at_once_one_goes_first_and_all_get_their_turn(migrated: Database) -> None:
    one, two = TurnLeases(migrated, wait=True), TurnLeases(migrated, wait=True)
    running = 0

    async def turn(leases: TurnLeases) -> None:
        nonlocal running
        held = await leases.take("ann", "chat")
        running += 1
        assert running == 1
        await asyncio.sleep(0.01)
        running -= 1
        held.let_go(recorded=False)

    await asyncio.gather(*(turn(leases) for leases in [one, two] * 4))
    await one.aclose()
    await two.aclose()


async def test_nobody_waits_for_ever(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_leases, "LONGEST_WAIT", 0.2)
    leases = TurnLeases(sqlite, wait=True)
    await leases.take("ann", "chat")
    with pytest.raises(ConversationBusy):
        await leases.take("ann", "chat")


async def test_who_waits_in_vain_gives_up(sqlite: Database) -> None:
    """Its client has left, or the worker ends."""
    leases = TurnLeases(sqlite, wait=True)
    held = await leases.take("ann", "chat")
    given_up = asyncio.Event()
    waiting = asyncio.create_task(leases.take("ann", "chat", given_up.is_set))
    await settle()
    assert not waiting.done()
    given_up.set()
    with pytest.raises(ConversationBusy):
        await waiting
    held.let_go(recorded=False)
    await leases.aclose()
    assert await gone(sqlite)


async def test_a_lease_is_renewed_while_it_is_held(migrated: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_leases, "RENEW_SECONDS", 0.02)
    leases = TurnLeases(migrated)
    held = await leases.take("ann", "chat")
    ((until,),) = await rows(migrated, "SELECT until FROM turn_leases")

    async def later() -> bool:
        return bool(await rows(migrated, "SELECT 1 FROM turn_leases WHERE until > $1", until))

    assert await eventually(later)
    held.let_go(recorded=False)
    await leases.aclose()
    assert await gone(migrated)


async def test_a_renewal_that_fails_is_tried_again(unsteady: Unsteady, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_leases, "RENEW_SECONDS", 0.02)
    leases = TurnLeases(unsteady)
    await leases.take("ann", "chat")
    unsteady.down = True
    await asyncio.sleep(0.1)
    unsteady.down = False
    count = len(unsteady.written)

    async def renewed() -> bool:
        return len(unsteady.written) > count

    assert await eventually(renewed)
    await leases.aclose()


async def test_a_call_that_is_cancelled_while_it_asks_holds_nothing(tables_url: str) -> None:
    """At whichever moment."""
    async with opened(tables_url) as database:
        leases = TurnLeases(database)
        for pauses in range(12):
            asking = asyncio.create_task(leases.take("ann", "chat"))
            for _ in range(pauses):
                await asyncio.sleep(0)
            asking.cancel()
            (found,) = await asyncio.gather(asking, return_exceptions=True)
            assert isinstance(found, asyncio.CancelledError)
            (await leases.take("ann", "chat")).let_go(recorded=False)
        await leases.aclose()
        assert await gone(database)


async def test_who_leaves_while_the_database_is_slow_may_come_back_at_once(unsteady: Unsteady) -> None:
    leases = TurnLeases(unsteady)
    unsteady.hold()
    asking = asyncio.create_task(leases.take("ann", "chat"))

    async def asked() -> bool:
        return unsteady.begun > 0

    assert await eventually(asked)
    asking.cancel()
    await asyncio.wait({asking})
    again = asyncio.create_task(leases.take("ann", "chat"))
    await asyncio.sleep(0)
    unsteady.let_go()
    (await again).let_go(recorded=True)
    await leases.aclose()


async def test_what_the_database_does_not_answer_is_not_held(unsteady: Unsteady, sqlite: Database) -> None:
    leases = TurnLeases(unsteady)
    await sqlite.close()
    with pytest.raises(DatabaseUnavailable):
        await leases.take("ann", "chat")
    await settle()
    await sqlite.open()
    (await leases.take("ann", "chat")).let_go(recorded=False)
    await leases.aclose()
    assert await gone(sqlite)

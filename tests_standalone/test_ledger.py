"""Finished turns in, durable rows out: together, exactly once, or the waiter is told."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway import ledger as ledgers
from gateway.current_sessions import IDLE_MS
from gateway.errors import DatabaseUnavailable, NotRecorded
from gateway.ledger import Ledger
from gateway.limits import Settlement
from gateway.store import conversation_edits, conversations, turn_leases, usage
from gateway.store.conversation_edits import NewConversation
from gateway.store.conversations import ConversationTurn, StoredMessage
from gateway.store.database import Database, Step
from gateway.store.turn_leases import Lease
from gateway.store.usage import UsageRow
from gateway.turns import Turn, figures
from tests_standalone.conftest import NOON, Unsteady, eventually, opened, rows, settle, usage_row

TOTALS = "SELECT message_count, total_tokens_input, total_tokens_output, total_cost_nanousd FROM conversations"
SESSIONS = "SELECT conversation_count, total_tokens, total_cost_nanousd FROM sessions"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "RETRY_PAUSE", 0.005)


@pytest.fixture
def unsteady(migrated: Database) -> Unsteady:
    return Unsteady(migrated)


@pytest.fixture
async def ledger(unsteady: Unsteady) -> AsyncIterator[Ledger]:
    async with running(unsteady) as found:
        yield found
    unsteady.let_go()


@asynccontextmanager
async def running(database: Database) -> AsyncIterator[Ledger]:
    ledger = Ledger(database)
    ledger.start()
    try:
        yield ledger
    finally:
        await ledger.aclose(grace=0.01)


def turn(found: ConversationTurn | None = None, **changes: Any) -> Turn:
    """One call: 10 tokens in, 5 out, 1,000 nano-dollars."""
    return Turn([usage_row(**changes)], found)


def talk(name: str = "chat", **changes: Any) -> ConversationTurn:
    """A turn that makes ann's conversation of that name, if it is not there, and adds a question and an answer."""
    question, answer = (
        StoredMessage(f"msg_{secrets.token_hex(16)}", role, '"text"', None, None) for role in ("user", "assistant")
    )
    values: dict[str, Any] = {
        "pk": f"c_{secrets.token_hex(16)}", "id": name, "user_id": "ann", "key_id": None, "end_user": None,
        "session_id": None, "is_new": True, "is_named": True, "title": None, "at": NOON, "messages": [question, answer],
        "tokens_input": 10, "tokens_output": 5, "cost_nanousd": 1000,
    }  # fmt: skip
    return ConversationTurn(**values | changes)


async def usage_ids(database: Database) -> set[str]:
    found = [row[0] for row in await rows(database, "SELECT id FROM usage_rows")]
    assert len(found) == len(set(found))
    return set(found)


def ids(*turns: Turn) -> set[str]:
    return {row.id for found in turns for row in found.usage}


async def held(ledger: Ledger, unsteady: Unsteady, *turns: Turn) -> list[asyncio.Task[None]]:
    """These turns in one batch: they wait behind a commit that is on its way, and which now goes on."""
    unsteady.hold()
    first = asyncio.create_task(ledger.record(turn()))
    await settle()
    tasks = [asyncio.create_task(ledger.record(found)) for found in turns]
    await settle()
    unsteady.let_go()
    await first
    return tasks


def commits(unsteady: Unsteady) -> int:
    """Of turns."""
    return sum(any("usage_rows" in sql for sql, _ in steps) for steps in unsteady.written)


# Durable, and only then acknowledged


async def test_a_turn_is_all_there_when_record_returns(ledger: Ledger, migrated: Database) -> None:
    first, second = usage_row(attempt=1, status="error"), usage_row(attempt=2)
    found = talk()
    await ledger.record(Turn([first, second], found))

    assert await usage_ids(migrated) == {first.id, second.id}
    assert await rows(migrated, TOTALS) == [(2, 10, 5, 1000)]
    assert await rows(migrated, SESSIONS) == [(1, 5, 1000)]
    ((session,),) = await rows(migrated, "SELECT id FROM sessions")
    assert await rows(migrated, "SELECT session_id FROM usage_rows") == [(session,), (session,)]
    assert await rows(migrated, "SELECT session_id FROM conversations") == [(session,)]


async def test_a_call_without_a_conversation_has_no_session(ledger: Ledger, migrated: Database) -> None:
    await ledger.record(turn())
    assert await rows(migrated, "SELECT session_id FROM usage_rows") == [(None,)]
    assert await rows(migrated, SESSIONS) == []


async def test_nothing_is_acknowledged_before_it_is_durable(
    ledger: Ledger, unsteady: Unsteady, migrated: Database
) -> None:
    unsteady.hold()
    found = turn()
    waiting = asyncio.create_task(ledger.record(found))
    await asyncio.sleep(0.03)
    assert not waiting.done()
    assert await usage_ids(migrated) == set()
    unsteady.let_go()
    await waiting
    assert await usage_ids(migrated) == ids(found)


async def test_turns_that_end_during_a_commit_share_the_next_one(
    ledger: Ledger, unsteady: Unsteady, migrated: Database
) -> None:
    turns = [turn() for _ in range(200)]
    await asyncio.gather(*await held(ledger, unsteady, *turns))
    assert len(unsteady.written) == 2
    assert ids(*turns) < await usage_ids(migrated)


async def test_a_batch_has_a_bound(
    ledger: Ledger, unsteady: Unsteady, migrated: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "MOST_IN_BATCH", 10)
    turns = [turn() for _ in range(25)]
    await asyncio.gather(*await held(ledger, unsteady, *turns))
    assert [len(steps[0][1]) for steps in unsteady.written] == [1, 10, 10, 5]
    assert ids(*turns) < await usage_ids(migrated)


async def test_many_at_once_all_become_durable(ledger: Ledger, unsteady: Unsteady, migrated: Database) -> None:
    turns = [turn(talk(f"chat-{number % 20}")) for number in range(400)]

    async def one(found: Turn, pause: float) -> None:
        await asyncio.sleep(pause)
        await ledger.record(found)
        assert ids(found) <= await usage_ids(migrated)

    await asyncio.gather(*(one(found, number / 10_000) for number, found in enumerate(turns)))
    assert await usage_ids(migrated) == ids(*turns)
    assert await rows(migrated, TOTALS) == [(40, 200, 100, 20_000)] * 20
    assert await rows(migrated, SESSIONS) == [(20, 400 * 5, 400_000)]
    assert len(unsteady.written) < 400


# A database that fails


async def test_a_failing_commit_reaches_its_waiters_and_the_turn_is_written_later(
    ledger: Ledger, unsteady: Unsteady, migrated: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "DEADLINE", 0.03)
    unsteady.down = True
    turns = [turn(talk()), turn()]
    told = await asyncio.gather(*(ledger.record(found) for found in turns), return_exceptions=True)
    assert [type(failure) for failure in told] == [NotRecorded, NotRecorded]
    assert await usage_ids(migrated) == set()

    async def all_there() -> bool:  # in one commit, or in two after the batch was halved
        return await usage_ids(migrated) == ids(*turns)

    unsteady.down = False
    await eventually(all_there)
    assert await rows(migrated, TOTALS) == [(2, 10, 5, 1000)]


async def test_a_commit_that_hangs_reaches_its_waiters_too(
    ledger: Ledger, unsteady: Unsteady, migrated: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "DEADLINE", 0.03)
    unsteady.hold()
    found = turn()
    with pytest.raises(NotRecorded):
        await ledger.record(found)
    unsteady.let_go()
    assert await eventually(lambda: usage_ids(migrated)) == ids(found)


async def test_a_short_outage_is_only_a_delay(ledger: Ledger, unsteady: Unsteady, migrated: Database) -> None:
    unsteady.down = True
    found = turn(talk())
    waiting = asyncio.create_task(ledger.record(found))
    await asyncio.sleep(0.03)
    assert not waiting.done()
    unsteady.down = False
    await waiting
    assert await usage_ids(migrated) == ids(found)


@pytest.mark.parametrize("of", ["usage_rows", "INSERT INTO sessions"], ids=["the turns'", "the session's"])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_commit_whose_answer_was_lost_counts_once(
    ledger: Ledger, unsteady: Unsteady, migrated: Database, of: str, times: int
) -> None:
    unsteady.of, unsteady.lose_answers = of, times
    turns = [turn(talk("a")), turn(talk("a")), turn(talk("b")), turn()]
    await asyncio.gather(*(ledger.record(found) for found in turns))

    assert await usage_ids(migrated) == ids(*turns)
    assert await rows(migrated, f"{TOTALS} ORDER BY id") == [(4, 20, 10, 2000), (2, 10, 5, 1000)]
    assert await rows(migrated, SESSIONS) == [(2, 15, 3000)]
    assert await rows(migrated, "SELECT COUNT(*) FROM messages") == [(6,)]


async def test_turns_that_come_while_the_first_are_tried_again(
    ledger: Ledger, unsteady: Unsteady, migrated: Database
) -> None:
    unsteady.lose_answers = 1
    first = [turn(talk()), turn(talk())]
    waiting = [asyncio.create_task(ledger.record(found)) for found in first]
    await eventually(lambda: usage_ids(migrated))
    later = [turn(talk()), turn()]
    waiting += [asyncio.create_task(ledger.record(found)) for found in later]
    await asyncio.gather(*waiting)
    assert await usage_ids(migrated) == ids(*first, *later)
    assert await rows(migrated, TOTALS) == [(6, 30, 15, 3000)]


async def test_a_waiter_that_leaves_takes_nothing_along(ledger: Ledger, unsteady: Unsteady, migrated: Database) -> None:
    leaves, stays = turn(), turn()
    first, second = await held(ledger, unsteady, leaves, stays)
    first.cancel()
    await second
    assert ids(leaves, stays) < await usage_ids(migrated)


# One culprit


CULPRITS = {
    "null": {"model": None},
    "too large": {"input_tokens": 2**63},
    "no text": {"end_user": "\ud800"},
}


@pytest.mark.parametrize("bad", CULPRITS.values(), ids=CULPRITS.keys())
async def test_one_culprit_does_not_cost_the_others_theirs(
    ledger: Ledger, unsteady: Unsteady, migrated: Database, bad: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    good = [turn(talk()) for _ in range(5)]
    culprit = turn(talk(), request_id="req_culprit", **bad)
    tasks = await held(ledger, unsteady, *good[:3], culprit, *good[3:])
    told = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(failure) for failure in told] == [type(None)] * 3 + [NotRecorded] + [type(None)] * 2
    assert ids(*good) < await usage_ids(migrated)
    assert await rows(migrated, TOTALS) == [(10, 50, 25, 5000)]
    ((line,),) = [[record.getMessage() for record in caplog.records if "req_culprit" in record.getMessage()]]
    assert "user=ann" in line


async def test_a_culprit_costs_the_others_few_commits(ledger: Ledger, unsteady: Unsteady, migrated: Database) -> None:
    """Found by halves: not a commit for each of the others."""
    good = [turn(talk()) for _ in range(63)]
    culprit = turn(talk(), model=None)
    before = commits(unsteady) + 1
    await asyncio.gather(*await held(ledger, unsteady, *good[:20], culprit, *good[20:]), return_exceptions=True)
    assert ids(*good) < await usage_ids(migrated)
    assert commits(unsteady) - before <= 2 * 6 + 1


async def test_a_culprit_is_told_once_and_not_kept(ledger: Ledger, unsteady: Unsteady, migrated: Database) -> None:
    with pytest.raises(NotRecorded):
        await ledger.record(turn(model=None))
    tries = len(unsteady.written)
    found = turn()
    await ledger.record(found)
    assert len(unsteady.written) == tries + 1
    assert await usage_ids(migrated) == ids(found)


async def test_a_mistake_of_ours_in_one_turn_is_its_own(
    ledger: Ledger, unsteady: Unsteady, migrated: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Not a data error of the database's, but a value that no code expected."""
    broken = Turn([usage_row(request_id="req_broken")], talk(messages=None))
    good = turn()
    one, other = await held(ledger, unsteady, broken, good)
    await other
    with pytest.raises(NotRecorded):
        await one
    assert ids(good) < await usage_ids(migrated)
    assert [record.exc_info is not None for record in caplog.records if "req_broken" in record.getMessage()] == [True]


async def test_the_committer_outlives_a_look_at_a_conflict_that_fails(
    ledger: Ledger, unsteady: Unsteady, migrated: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*args: Any) -> Any:
        raise RuntimeError("an answer that nobody foresaw")

    twin = usage_row()
    await ledger.record(Turn([twin]))
    with monkeypatch.context() as patched:
        patched.setattr(usage, "existing", fail)
        patched.setattr(usage, "exists", fail)
        good = turn(talk())
        one, other = await held(ledger, unsteady, Turn([twin]), good)
        await other
        with pytest.raises(NotRecorded):
            await one
    after = turn()
    await ledger.record(after)
    assert ids(good, after) < await usage_ids(migrated)


async def test_an_id_that_is_there_already_is_written_once(
    ledger: Ledger, unsteady: Unsteady, migrated: Database
) -> None:
    twin, other = usage_row(), turn(talk())
    tasks = await held(ledger, unsteady, Turn([twin], talk()), Turn([twin], talk()), other)
    await asyncio.gather(*tasks)
    assert ids(other) | {twin.id} < await usage_ids(migrated)
    assert await rows(migrated, TOTALS) == [(4, 20, 10, 2000)]


async def test_a_culprit_and_an_outage_in_one_batch(
    ledger: Ledger, unsteady: Unsteady, migrated: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The batch fails, its turns are tried one by one, and the database goes away in the middle of that."""
    turns = [turn(talk(), model=None, request_id="req_culprit"), turn(talk()), turn(talk()), turn(talk())]
    unsteady.lose_answers = 1
    tasks = [asyncio.create_task(ledger.record(found)) for found in turns]
    told = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(failure) for failure in told] == [NotRecorded, type(None), type(None), type(None)]
    assert await usage_ids(migrated) == ids(*turns[1:])
    assert await rows(migrated, TOTALS) == [(6, 30, 15, 3000)]
    assert caplog.text.count("req_culprit") == 1


# Sessions


@pytest.mark.parametrize(
    ("pause", "sessions"), [(0, 1), (IDLE_MS, 1), (IDLE_MS + 1, 2)], ids=["at once", "in time", "idle"]
)
@pytest.mark.parametrize("same_worker", [True, False], ids=["same worker", "other worker"])
async def test_a_conversation_joins_the_session_unless_its_user_was_idle(
    migrated: Database, pause: int, sessions: int, same_worker: bool
) -> None:
    async with running(migrated) as one, running(migrated) as other:
        await one.record(turn(talk("a", at=NOON)))
        await (one if same_worker else other).record(turn(talk("b", at=NOON + pause)))
    counts = [row[0] for row in await rows(migrated, f"{SESSIONS} ORDER BY created_at")]
    assert counts == {1: [2], 2: [1, 1]}[sessions]


async def test_how_long_a_user_may_be_silent_is_configured(migrated: Database) -> None:
    ledger = Ledger(migrated, session_idle_ms=1000)
    ledger.start()
    for at in (NOON, NOON + 1000, NOON + 2001):
        await ledger.record(turn(talk(f"at-{at}", at=at)))
    await ledger.aclose()
    counts = [row[0] for row in await rows(migrated, f"{SESSIONS} ORDER BY created_at")]
    assert counts == [2, 1]


async def test_users_have_sessions_of_their_own(ledger: Ledger, migrated: Database) -> None:
    await asyncio.gather(*(ledger.record(turn(talk(user_id=user))) for user in ("ann", "bob", "ann")))
    found = await rows(migrated, "SELECT user_id, conversation_count, total_tokens FROM sessions ORDER BY user_id")
    assert found == [("ann", 1, 10), ("bob", 1, 5)]


async def test_a_known_conversation_stays_in_its_session(ledger: Ledger, migrated: Database) -> None:
    first = talk()
    await ledger.record(turn(first))
    later = talk(pk=first.pk, is_new=False, session_id=first.session_id, at=NOON + 10 * IDLE_MS)
    await ledger.record(turn(later))
    assert await rows(migrated, SESSIONS) == [(1, 10, 2000)]
    assert await rows(migrated, "SELECT session_id FROM usage_rows") == [(first.session_id,)] * 2
    assert await rows(migrated, "SELECT last_activity FROM sessions") == [(later.at,)]


# Two workers


async def test_two_workers_on_one_conversation_leave_no_gap(tables_url: str) -> None:
    """Both make it under the same name at the same time, then both go on."""
    async with opened(tables_url) as one, opened(tables_url) as two, running(one) as left, running(two) as right:
        turns = [turn(talk()) for _ in range(60)]
        await asyncio.gather(*(ledger.record(found) for ledger, found in zip([left, right] * 30, turns, strict=True)))

        assert await usage_ids(one) == ids(*turns)
        assert [row[0] for row in await rows(two, "SELECT seq FROM messages ORDER BY seq")] == list(range(1, 121))
        assert await rows(two, TOTALS) == [(120, 600, 300, 60_000)]
        ((conversations, tokens, cost),) = await rows(
            one, "SELECT SUM(conversation_count), SUM(total_tokens), SUM(total_cost_nanousd) FROM sessions"
        )
        assert (conversations, tokens, cost) == (1, 300, 60_000)


async def test_sessions_are_the_sums_of_their_rows(tables_url: str) -> None:
    async with opened(tables_url) as one, opened(tables_url) as two, running(one) as left, running(two) as right:
        turns = [turn(talk(f"chat-{number % 7}", user_id=f"user-{number % 3}")) for number in range(90)]
        await asyncio.gather(*(ledger.record(found) for ledger, found in zip([left, right] * 45, turns, strict=True)))

        sums = """
            SELECT session_id, SUM(output_tokens), SUM(cost_nanousd) FROM usage_rows
            GROUP BY session_id ORDER BY session_id"""
        totals = "SELECT id, total_tokens, total_cost_nanousd FROM sessions WHERE total_tokens > 0 ORDER BY id"
        assert await rows(one, sums) == await rows(two, totals)
        count = "SELECT session_id, COUNT(*) FROM conversations GROUP BY session_id ORDER BY session_id"
        counted = "SELECT id, conversation_count FROM sessions WHERE conversation_count > 0 ORDER BY id"
        assert await rows(one, count) == await rows(two, counted)


# Its end and its bounds


async def test_closing_writes_what_waits(unsteady: Unsteady, migrated: Database) -> None:
    ledger = Ledger(unsteady)
    ledger.start()
    unsteady.hold()
    turns = [turn() for _ in range(3)]
    tasks = [asyncio.create_task(ledger.record(found)) for found in turns]
    await settle()
    closing = asyncio.create_task(ledger.aclose())
    await settle()
    assert not closing.done()
    unsteady.let_go()
    await closing
    await asyncio.gather(*tasks)
    assert await usage_ids(migrated) == ids(*turns)


async def test_closing_logs_what_the_database_does_not_take(
    unsteady: Unsteady, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    ledger = Ledger(unsteady)
    ledger.start()
    unsteady.down = True
    waiting = asyncio.create_task(ledger.record(turn(request_id="req_lost", cost_nanousd=77)))
    await settle()
    await ledger.aclose(grace=0.01)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "request=req_lost" in line
    assert "cost_nanousd=77" in line
    with pytest.raises(NotRecorded):
        await asyncio.wait_for(waiting, ledgers.DEADLINE / 2)


async def test_closing_does_not_call_lost_what_is_written(
    unsteady: Unsteady, migrated: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a batch that is tried turn by turn, the first are written and the database goes away before the last."""
    caplog.set_level(logging.ERROR)
    ledger = Ledger(unsteady)
    ledger.start()
    unsteady.down_after = 2
    turns = [turn(request_id="req_written"), turn(request_id="req_culprit", model=None), turn(request_id="req_lost")]
    tasks = [asyncio.create_task(ledger.record(found)) for found in turns]
    await eventually(lambda: usage_ids(migrated))
    await settle()
    await ledger.aclose(grace=0.01)

    told = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(failure) for failure in told] == [type(None), NotRecorded, NotRecorded]
    assert await usage_ids(migrated) == ids(turns[0])
    said = " ".join(record.getMessage() for record in caplog.records)
    assert [said.count(name) for name in ("req_written", "req_culprit", "req_lost")] == [0, 1, 1]


async def test_a_ledger_that_does_not_run_refuses_at_once(unsteady: Unsteady, migrated: Database) -> None:
    ledger = Ledger(unsteady)
    with pytest.raises(NotRecorded):
        await ledger.record(turn())
    ledger.start()
    await ledger.record(turn())
    await ledger.aclose()
    with pytest.raises(NotRecorded):
        await ledger.record(turn())
    assert len(await usage_ids(migrated)) == 1


async def test_more_than_the_most_is_refused_at_once_and_named_in_the_log(
    ledger: Ledger, unsteady: Unsteady, migrated: Database, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(ledgers, "MOST_WAITING", 2)
    unsteady.hold()
    turns = [turn(), turn()]
    tasks = [asyncio.create_task(ledger.record(found)) for found in turns]
    await settle()
    with pytest.raises(NotRecorded):
        await ledger.record(turn(request_id="req_one_too_many"))
    assert "req_one_too_many" in caplog.text
    unsteady.let_go()
    await asyncio.gather(*tasks)
    more = turn()
    await ledger.record(more)
    assert await usage_ids(migrated) == ids(*turns, more)


async def test_what_a_refused_turn_held_is_given_back(unsteady: Unsteady, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "MOST_WAITING", 1)
    lost: list[Settlement] = []
    ledger = Ledger(unsteady, lost=lost.extend)
    ledger.start()
    unsteady.hold()
    task = asyncio.create_task(ledger.record(turn()))
    await settle()
    held = Settlement("key:a", "w", 1, 100, 5, 80, 7, 0)
    with pytest.raises(NotRecorded):
        await ledger.record(Turn([usage_row()], settlements=[held]))
    assert lost == [held]
    unsteady.let_go()
    await task
    await ledger.aclose()


def test_what_is_logged_of_a_turn_is_no_content() -> None:
    found: UsageRow = usage_row(request_id="req_1", end_user="kid@example.com", finish_reason="stop")
    line = figures(Turn([found], talk()))
    assert line.startswith("request=req_1 attempt=1 user=ann model=m status=ok input=10 output=5 cost_nanousd=1000")
    assert "text" not in line
    assert "kid" not in line


# A database that takes no more than so much at once, or nothing


class Narrow(Unsteady):
    """Times out on more turns than `most` in one commit, as a slow line does."""

    most = 3

    async def write(self, steps: Sequence[Step], *, timeout: float | None = None) -> None:
        if sum(len(rows) for sql, rows in steps if "INTO usage_rows" in sql) > self.most:
            raise DatabaseUnavailable("no answer in time")
        await super().write(steps, timeout=timeout)


async def test_a_batch_that_is_too_much_is_made_smaller_until_it_goes_through(migrated: Database) -> None:
    narrow = Narrow(migrated)
    async with running(narrow) as ledger:
        turns = [turn() for _ in range(40)]
        await asyncio.gather(*await held(ledger, narrow, *turns))
    assert ids(*turns) <= await usage_ids(migrated)


async def test_large_turns_go_in_batches_of_a_bounded_size_and_get_time_for_it(
    ledger: Ledger, unsteady: Unsteady, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "MOST_BATCH_BYTES", 2500)
    large = [talk(f"t{number}") for number in range(6)]
    for found in large:
        found.messages = [StoredMessage(f"msg_{secrets.token_hex(16)}", "user", f'"{"x" * 998}"', None, None)]
    await asyncio.gather(*await held(ledger, unsteady, *(turn(found) for found in large)))
    sizes = [len(step[1]) for steps in unsteady.written for step in steps if "INTO usage_rows" in step[0]]
    assert sizes == [1, 2, 2, 2]


async def test_while_commits_fail_nothing_new_may_start(ledger: Ledger, unsteady: Unsteady) -> None:
    ledger.check()
    unsteady.down = True
    waiting = asyncio.create_task(ledger.record(turn()))
    while ledger.trouble is None:
        await asyncio.sleep(0.001)
    with pytest.raises(DatabaseUnavailable, match="does not answer"):
        ledger.check()
    unsteady.down = False
    await waiting
    ledger.check()


# What it tells


class Told:
    """What a ledger tells, in order; of times only that they passed."""

    def __init__(self) -> None:
        self.words: list[object] = []

    def committed(self, turns: int, seconds: float) -> None:
        assert seconds > 0
        self.words.append(turns)

    def commit_failed(self) -> None:
        self.words.append("failed")

    def turn_recorded(self, seconds: float) -> None:
        assert seconds > 0
        self.words.append("recorded")

    def turn_refused(self) -> None:
        self.words.append("refused")


async def test_commits_and_turns_are_counted(unsteady: Unsteady) -> None:
    told = Told()
    ledger = Ledger(unsteady, told)
    ledger.start()
    await asyncio.gather(*(ledger.record(turn()) for _ in range(3)))
    assert told.words == [3, "recorded", "recorded", "recorded"]
    assert ledger.waiting == 0

    unsteady.down = True
    waiting = asyncio.create_task(ledger.record(turn()))
    await settle()
    assert (told.words[4:5], ledger.waiting) == (["failed"], 1)
    unsteady.down = False
    await waiting
    assert set(told.words[4:-2]) == {"failed"}
    assert told.words[-2:] == [1, "recorded"]
    await ledger.aclose()
    with pytest.raises(NotRecorded):
        await ledger.record(turn())
    assert told.words[-1] == "refused"


async def test_a_turn_that_the_database_rejects_is_refused(unsteady: Unsteady) -> None:
    told = Told()
    ledger = Ledger(unsteady, told)
    ledger.start()
    good, bad = await asyncio.gather(ledger.record(turn()), ledger.record(turn(model=None)), return_exceptions=True)
    assert (good, type(bad)) == (None, NotRecorded)
    assert sorted(map(str, told.words)) == ["2", "recorded", "refused"]
    await ledger.aclose()


# Turns that have seen what they go on from


async def begun(ledger: Ledger, **changes: Any) -> ConversationTurn:
    """ann's conversation `chat`, with a question and an answer."""
    first = talk(title="Hello", **changes)
    await ledger.record(turn(first))
    return first


def later(first: ConversationTurn, **changes: Any) -> ConversationTurn:
    """A turn that has seen both."""
    values: dict[str, Any] = {
        "pk": first.pk, "is_new": False, "is_named": False, "session_id": first.session_id, "after": 2,
        "title": "Hello",
    }  # fmt: skip
    return talk(first.id, **values | changes)


BRANCHES = """
    SELECT id, parent_id, parent_pk, parent_seq, message_count, total_tokens_output, title
    FROM conversations WHERE parent_id IS NOT NULL"""


async def test_who_comes_too_late_gets_a_branch(ledger: Ledger, migrated: Database) -> None:
    first = await begun(ledger)
    await ledger.record(turn(later(first)))
    late = Turn(
        [usage_row(attempt=1, conversation_id="chat"), usage_row(attempt=2, conversation_id="chat")], later(first)
    )
    await ledger.record(late)

    assert late.conversation is not None
    name = late.conversation.id
    assert name.startswith("conv_")
    assert await rows(migrated, BRANCHES) == [(name, "chat", first.pk, 2, 4, 5, "Hello")]
    assert await rows(migrated, "SELECT message_count, total_tokens_output FROM conversations WHERE id = 'chat'") == [
        (4, 10)
    ]
    counts = "SELECT conversation_pk, MIN(seq), MAX(seq), COUNT(*) FROM messages GROUP BY conversation_pk ORDER BY 4"
    assert await rows(migrated, counts) == [(late.conversation.pk, 3, 4, 2), (first.pk, 1, 4, 4)]
    used = "SELECT COUNT(*) FROM usage_rows WHERE conversation_id = $1"
    assert await rows(migrated, used, name) == [(2,)]
    assert await rows(migrated, SESSIONS) == [(2, 15, 3000)]


async def test_those_in_one_batch_do_not_mix(ledger: Ledger, unsteady: Unsteady, migrated: Database) -> None:
    first = await begun(ledger)
    turns = [turn(later(first)) for _ in range(8)]
    await asyncio.gather(*await held(ledger, unsteady, *turns))
    assert len(await rows(migrated, BRANCHES)) == 7
    counts = "SELECT COUNT(*) FROM messages GROUP BY conversation_pk ORDER BY 1"
    assert await rows(migrated, counts) == [(2,)] * 7 + [(4,)]
    assert await usage_ids(migrated) >= ids(*turns)
    assert await rows(migrated, "SELECT SUM(conversation_count), SUM(total_tokens) FROM sessions") == [(8, 45)]


async def test_conflicts_are_sorted_out_for_the_whole_batch_at_once(
    ledger: Ledger, unsteady: Unsteady, migrated: Database
) -> None:
    """Of each kind: the last message is not the last any more, the name is taken, it is durable already."""
    first = await begun(ledger)
    await ledger.record(turn(later(first)))
    written = turn(talk())
    await ledger.record(written)
    late = [turn(later(first)), turn(talk(after=0, is_named=False)), turn(talk("new", after=0, is_named=False))]
    late.append(turn(talk("new", after=0, is_named=False)))
    good = [turn(talk(f"other-{number}")) for number in range(40)]
    other_user = turn(talk(user_id="ben", after=0, is_named=False), user_id="ben")
    again = Turn(written.usage, written.conversation)
    before = commits(unsteady) + 1
    await asyncio.gather(*await held(ledger, unsteady, *good[:9], again, *late, other_user, *good[9:]))

    assert commits(unsteady) - before == 2
    assert await usage_ids(migrated) > ids(*good, *late, written, other_user)
    made = [one.conversation.id for one in (late[0], late[1], late[3]) if one.conversation is not None]
    assert sorted(row[0] for row in await rows(migrated, BRANCHES)) == sorted(made)
    alone = "SELECT user_id, message_count, parent_id FROM conversations WHERE id IN ('new', 'chat') ORDER BY 1, id"
    assert await rows(migrated, alone) == [("ann", 6, None), ("ann", 2, None), ("ben", 2, None)]
    named = "SELECT COUNT(*) FROM usage_rows WHERE conversation_id = $1"
    assert [await rows(migrated, named, name) for name in made] == [[(1,)]] * 3


async def test_an_outage_while_a_batch_is_sorted_out_leaves_rows_with_their_turns(
    ledger: Ledger, unsteady: Unsteady, migrated: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begun(ledger)
    late = [turn(talk(after=0, is_named=False)), turn(talk("other", after=0, is_named=False))]
    find, asked = conversations.find_chains, []

    async def fail_once(*args: Any) -> Any:
        asked.append(args)
        if len(asked) == 2:
            raise DatabaseUnavailable("away for a moment")
        return await find(*args)

    monkeypatch.setattr(conversations, "find_chains", fail_once)
    await asyncio.gather(*await held(ledger, unsteady, *late))
    used = "SELECT c.id, COUNT(*) FROM conversations c JOIN usage_rows u ON u.conversation_id = c.id GROUP BY c.id"
    names = {one.conversation.id for one in late if one.conversation is not None}
    assert {name for name, _ in await rows(migrated, used)} >= names
    assert "chat" not in names


@pytest.mark.parametrize(("title", "shown"), [("Mine", "Mine"), (None, "Hello")])
async def test_an_empty_conversation_that_was_made_meanwhile_is_gone_on_with(
    ledger: Ledger, migrated: Database, title: str | None, shown: str
) -> None:
    new = NewConversation("c_made", "chat", "ann", None, "sess_made", NOON, title=title, tags=["x"], tags_json='["x"]')
    await conversation_edits.make_with_session(migrated, new)
    first, second = (turn(talk(after=0, is_named=False, title="Hello")) for _ in range(2))
    await ledger.record(first)
    made = "SELECT pk, id, session_id, title, tags, message_count, parent_id FROM conversations"
    assert await rows(migrated, made) == [("c_made", "chat", "sess_made", shown, '["x"]', 2, None)]
    assert await rows(migrated, "SELECT conversation_pk, seq FROM messages ORDER BY seq") == [
        ("c_made", 1),
        ("c_made", 2),
    ]
    assert await rows(migrated, "SELECT id, conversation_count FROM sessions") == [("sess_made", 1)]
    assert await rows(migrated, "SELECT session_id FROM usage_rows") == [("sess_made",)]
    await ledger.record(second)
    assert second.conversation is not None
    assert await rows(migrated, BRANCHES) == [(second.conversation.id, "chat", None, 0, 2, 5, "Hello")]


async def test_two_that_find_it_empty_at_once_do_not_mix(
    ledger: Ledger, unsteady: Unsteady, migrated: Database
) -> None:
    await conversation_edits.make_with_session(migrated, NewConversation("c_made", "chat", "ann", None, "sess", NOON))
    turns = [turn(talk(after=0, is_named=False)) for _ in range(4)]
    await asyncio.gather(*await held(ledger, unsteady, *turns))
    counts = "SELECT id = 'chat', message_count FROM conversations ORDER BY id = 'chat'"
    assert [(bool(one), count) for one, count in await rows(migrated, counts)] == [(False, 2)] * 3 + [(True, 2)]


async def test_a_name_that_was_taken_meanwhile_is_left_alone(ledger: Ledger, migrated: Database) -> None:
    await begun(ledger)
    late = turn(talk(after=0, is_named=False))
    await ledger.record(late)
    assert late.conversation is not None
    assert await rows(migrated, BRANCHES) == [(late.conversation.id, "chat", None, 0, 2, 5, None)]
    assert await rows(migrated, "SELECT message_count FROM conversations WHERE id = 'chat'") == [(2,)]


async def test_one_whose_answer_was_lost_is_no_branch(ledger: Ledger, unsteady: Unsteady, migrated: Database) -> None:
    first = await begun(ledger)
    unsteady.lose_answers = 1
    found = turn(later(first))
    await ledger.record(found)
    assert found.conversation is not None
    assert found.conversation.id == "chat"
    assert await rows(migrated, BRANCHES) == []
    assert await rows(migrated, TOTALS) == [(4, 20, 10, 2000)]


async def test_a_branch_that_meets_an_outage_is_written_once(
    ledger: Ledger, unsteady: Unsteady, migrated: Database
) -> None:
    first = await begun(ledger)
    await ledger.record(turn(later(first)))
    unsteady.lose_answers = 1
    late = turn(later(first))
    await ledger.record(late)
    assert len(await rows(migrated, BRANCHES)) == 1
    assert await rows(migrated, "SELECT COUNT(*) FROM messages") == [(6,)]


async def test_a_lease_ends_with_its_turn(ledger: Ledger, migrated: Database) -> None:
    leases = [Lease("ann", name, f"h_{name}") for name in "ab"]
    assert len(await turn_leases.take(migrated, leases)) == 2
    await ledger.record(turn(talk("a", lease=leases[0])))
    assert await rows(migrated, "SELECT holder FROM turn_leases") == [("h_b",)]
    first = await begun(ledger)
    await ledger.record(turn(later(first)))
    await ledger.record(turn(later(first, lease=leases[1])))
    assert await rows(migrated, "SELECT holder FROM turn_leases") == []


async def test_a_turn_that_fails_keeps_its_lease(ledger: Ledger, migrated: Database) -> None:
    """It runs out, or its call gives it back."""
    lease = Lease("ann", "a", "h")
    await turn_leases.take(migrated, [lease])
    with pytest.raises(NotRecorded):
        await ledger.record(turn(talk("a", lease=lease), model=None))
    assert await rows(migrated, "SELECT holder FROM turn_leases") == [("h",)]

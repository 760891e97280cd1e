"""The book in tables: the same grants and rows as by the rules alone, one for all workers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, Literal, cast

import pytest

import gateway.store.limits
from gateway.ids import ordered_hex
from gateway.limits import (
    CLOCK_SET_BACK,
    DAY,
    DEAD_AFTER,
    UNIT,
    Account,
    Batch,
    Claim,
    Grant,
    Hold,
    Settlement,
    Wish,
    held,
)
from gateway.slices import Slices
from gateway.store import keys, limits, limits_sqlite, usage
from gateway.store.connect import database_at
from gateway.store.database import Database, Row, RowRejected, Transaction, Value
from gateway.store.limits import admit, settlement_step, spent_since, sweep
from gateway.store.migrate import migrate
from tests_standalone.conftest import NOON, opened, rows, stored_key, usage_row
from tests_standalone.support.postgres import Postgres
from tests_standalone.test_limits import Model

STATES = "SELECT subject, at, requests, tokens, period, spent_nanousd FROM limit_states ORDER BY subject"
HOLDS = """
    SELECT subject, worker, slots, tokens, cost_nanousd FROM limit_holds
    WHERE slots > 0 OR tokens > 0 OR cost_nanousd > 0 ORDER BY subject, worker"""
ALL_HELD = """
    SELECT subject, worker, slots, tokens, cost_nanousd, requests_ahead, tokens_ahead FROM limit_holds
    WHERE slots > 0 OR tokens > 0 OR cost_nanousd > 0 OR requests_ahead > 0 OR tokens_ahead > 0
    ORDER BY subject, worker"""
WHOLE = Account("gateway", budget=100_000, period="month")


def account(subject: str = "key:a", **limits: Any) -> Account:
    return Account(subject, **limits)


async def ask(
    database: Database, who: Account, *, tokens: int = 0, cost: int = 0, now: int = NOON, **more: Any
) -> Grant:
    [grant] = (await admit(database, Batch("w1", [who], [Claim(tokens, cost, [0])], now=now, **more))).grants
    return grant


def over(who: Account, grant: Grant, *, tokens: int = 0, cost: int = 0, worker: str = "w1", **used: int) -> Settlement:
    """The end of what was asked for by `ask`."""
    return held(Claim(tokens, cost, [0]), who, grant, 0, worker)._replace(**used)  # type: ignore[arg-type]  # numbers


# The same as by the rules


class Story:
    """Batches of three workers by chance, and what becomes of their calls. `batch` is None when time only passes."""

    ACCOUNTS = (
        WHOLE,
        account("key:all", request_rate=120, request_capacity=5, token_rate=6000, token_capacity=900, max_parallel=4,
                budget=9000, period="day", seed=11),
        account("key:requests", request_rate=7, request_capacity=3),
        account("key:tokens", token_rate=10**9, token_capacity=10**9),
        account("key:slots", max_parallel=2),
        account("key:plenty", request_rate=10**6, request_capacity=1000, token_rate=600, token_capacity=10**6,
                max_parallel=200, budget=10**6, period="month", seed=0),
        account('key:"odd\\ 🙂/{},NULL', token_rate=50, token_capacity=100, budget=500),
        account("user:bare"),
    )  # fmt: skip

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.now = 1_798_761_600_000 - 40_000  # the end of a year
        self.running: list[list[Settlement]] = []
        self.names = ["w0", "w1", "w2"]

    def batch(self) -> Batch:
        chance = self._random
        self.now += chance.choice([0, 1, 50, 900, 5000, 16_000, -300, -5000, DAY])
        accounts = chance.sample(self.ACCOUNTS, chance.randrange(len(self.ACCOUNTS) + 1))
        accounts = [one._replace(budget=None) if chance.randrange(9) == 0 else one for one in accounts]
        claims = [self._claim(len(accounts)) for _ in range(chance.choice([0, 1, 1, 2, 6]))]
        alone = self._ended(chance.randrange(2))
        wishing = chance.sample(range(len(accounts)), chance.randrange(len(accounts) + 1))
        return Batch(
            chance.choice(self.names), accounts, claims, alone, beat=chance.randrange(2) == 0,
            judge=chance.randrange(3) == 0, now=self.now, wishes=[self._wish(at) for at in wishing],
        )  # fmt: skip

    def _wish(self, at: int) -> Wish:
        """More or less of what is held ahead, and whatever of it was used."""
        chance = self._random
        return Wish(
            at, chance.choice([0, 1, 3, -2, -100]), chance.choice([0, 5, 10**7, -7, -(10**8)]),
            chance.choice([0, 0, 1, -1]), chance.choice([0, 0, 100, -50, -(10**6)]),
            chance.choice([0, 1, 5]), chance.choice([0, 3, 10**5]),
        )  # fmt: skip

    def _claim(self, accounts: int) -> Claim:
        chance = self._random
        asked = chance.sample(range(accounts), min(accounts, chance.randrange(4)))
        return Claim(chance.choice([0, 10, 200, 5000]), chance.choice([0, 100, 3000]), asked)

    def granted(self, batch: Batch, grants: Sequence[Grant]) -> None:
        for claim, grant in zip(batch.claims, grants, strict=True):
            if not grant.reason:
                asked = [batch.accounts[place] for place in claim.accounts]
                self.running.append([held(claim, one, grant, at, batch.worker) for at, one in enumerate(asked)])

    def _ended(self, count: int) -> list[Settlement]:
        chance, found = self._random, []
        for _ in range(min(count, len(self.running))):
            for one in self.running.pop(chance.randrange(len(self.running))):
                used = chance.randrange(11)
                found.append(one._replace(tokens_used=one.tokens_held * used // 9, cost=one.cost_held * used // 10))
        return found

    def written(self) -> list[Settlement]:
        return self._ended(self._random.choice([0, 0, 1, 1, 2]))


@pytest.mark.parametrize("seed", range(3))
async def test_grants_and_rows_are_those_of_the_rules(migrated: Database, seed: int) -> None:
    story, model = Story(seed), Model()
    reasons, lent_any = set(), False
    for _ in range(200):
        batch = story.batch()
        expected, lent = model.answer(batch)
        verdict = await admit(migrated, batch)
        found = verdict.grants
        assert [_plain(grant) for grant in found] == [_plain(grant) for grant in expected]
        assert list(verdict.ahead) == lent
        reasons |= {grant.reason for grant in found}
        lent_any = lent_any or any(any(ahead[:4]) for ahead in lent)
        story.granted(batch, expected)
        written = story.written()
        model.written += written
        await migrated.write([settlement_step(written)])
        assert await rows(migrated, STATES) == sorted(
            (subject, state.at, state.requests, state.tokens, state.period, state.spent)
            for subject, state in model.states.items()
        )
        assert await rows(migrated, ALL_HELD) == sorted(
            (subject, worker, hold.slots, hold.tokens, hold.cost, hold.requests_ahead, hold.tokens_ahead)
            for subject, holds in model.holds.items()
            for worker, hold in holds.items()
            if hold != Hold()
        )
    assert reasons == {"", "budget", "requests", "tokens", "parallel"}
    assert lent_any


def _plain(grant: Grant) -> Grant:
    return grant._replace(periods=list(grant.periods))


async def test_figures_that_fill_their_columns(migrated: Database) -> None:
    """Rates and idle times whose product no column holds."""
    who = account(token_rate=10**12, token_capacity=10**13, request_rate=10**12, request_capacity=10**13)
    await ask(migrated, who, tokens=10**13)
    later = await ask(migrated, who, tokens=1, now=NOON + 1000 * 365 * DAY)
    assert (later.tokens, later.requests) == ((10**13 - 1) * UNIT, (10**13 - 1) * UNIT)
    assert (await ask(migrated, account("b", budget=2**62), cost=2**62)).reason == ""
    assert (await ask(migrated, account("b", budget=2**62), cost=2**62)).reason == "budget"


async def test_a_claim_for_more_than_a_column_holds_is_a_claim_like_others(migrated: Database) -> None:
    who = account(token_rate=10, token_capacity=100, budget=10**18)
    assert (await ask(migrated, who, tokens=10**30)).tokens == 0
    assert (await ask(migrated, account("b", budget=10**18), cost=10**30)).reason == "budget"


async def test_calls_for_more_than_a_column_holds_harm_nobody_who_waits_with_them(migrated: Database) -> None:
    """Neither by what they claim nor by what a busy worker wishes to hold ahead of the next ones."""
    odd = account(token_rate=10, token_capacity=100, budget=10**18)
    accounts, slices = [odd, account("key:b", max_parallel=1)], Slices()
    slices.wishes("w1", [], {})
    for tokens, cost in [(10**30, 10**30)] * 2 + [(6, 10**18 // 16)] * 90:
        slices.count([odd], tokens, cost)
    wishes = slices.wishes("w1", accounts, {"key:a": 0, "key:b": 1})
    claims = [Claim(10**30, 10**30, [0]), Claim(5, 10**30, [0]), Claim(0, 0, [1])]
    verdict = await admit(migrated, Batch("w1", accounts, claims, now=NOON, wishes=wishes))
    assert [grant.reason for grant in verdict.grants] == ["budget", "budget", ""]


async def test_from_when_on_a_bucket_is_full(migrated: Database) -> None:
    who = account(request_rate=7, request_capacity=3, token_rate=11, token_capacity=100)
    await ask(migrated, who, tokens=60)
    [(full_at,)] = await rows(migrated, "SELECT full_at FROM limit_states")
    assert full_at == NOON + -(-60 * UNIT // 11)
    assert (await ask(migrated, who, now=full_at - 1)).tokens == 100 * UNIT - 8
    assert (await ask(migrated, who, now=full_at)).tokens == 100 * UNIT


# The state of the keys, and the sign of life


async def test_the_state_of_the_keys_comes_along(migrated: Database) -> None:
    free = Claim(5, 5, ())
    for batch in (Batch("w1", claims=[free]), Batch("w1", [account(max_parallel=9)]), Batch("w1", beat=True)):
        before = await admit(migrated, batch)
        await keys.add(migrated, stored_key())
        after = await admit(migrated, batch)
        assert (after.revision, after.ever_made) == (before.revision + 1, True)
    assert (await admit(migrated, Batch("w1", claims=[free, free]))).grants == [Grant("", 0, 0, None, None, ())] * 2
    both = await admit(migrated, Batch("w1", [account(max_parallel=9)], [free, Claim(0, 0, [0])]))
    assert [grant.reason for grant in both.grants] == ["", ""]


@pytest.mark.parametrize("accounts", [(), (account(max_parallel=1),)])
async def test_a_sign_of_life_is_of_the_databases_time_or_of_that_given(
    migrated: Database, accounts: Sequence[Account]
) -> None:
    await admit(migrated, Batch("w1", accounts, beat=True, now=NOON))
    await admit(migrated, Batch("w2", accounts, beat=True))
    await admit(migrated, Batch("w3", accounts))
    [(first, at), (second, now)] = await rows(migrated, "SELECT id, seen_at FROM workers ORDER BY id")
    assert (first, at, second) == ("w1", NOON, "w2")
    assert abs(now - int(ordered_hex()[:12], 16)) < 60_000
    await admit(migrated, Batch("w1", accounts, beat=True, now=NOON - DAY))
    assert await rows(migrated, "SELECT seen_at FROM workers WHERE id = 'w1'") == [(NOON - DAY,)]


# Settlements


async def test_what_was_written_with_a_turn_is_entered_by_the_next_who_asks(migrated: Database) -> None:
    who = account(budget=100, max_parallel=1)
    grant = await ask(migrated, who, cost=80)
    await migrated.write([settlement_step([over(who, grant, cost=80)._replace(cost=30)])])
    assert (await ask(migrated, account("key:b", max_parallel=1))).reason == ""
    assert await rows(migrated, "SELECT COUNT(*) FROM limit_settlements") == [(1,)]
    assert (await ask(migrated, who, cost=71)).reason == "budget"
    assert (await ask(migrated, who, cost=70)).reason == ""
    assert await rows(migrated, "SELECT COUNT(*) FROM limit_settlements") == [(0,)]


async def test_a_turn_that_cannot_be_written_settles_nothing(migrated: Database) -> None:
    who = account(budget=100)
    ended = over(who, await ask(migrated, who, cost=80), cost=80)
    for bad in ([usage_row(model=None)], [usage_row(), usage_row(model=None)]):
        with pytest.raises(RowRejected):
            await migrated.write([usage.insert(bad), settlement_step([ended])])
        assert await rows(migrated, "SELECT id FROM usage_rows") == []
    assert (await ask(migrated, who, cost=80)).reason == "budget"
    await migrated.write([usage.insert([usage_row()]), settlement_step([ended])])
    assert (await ask(migrated, who, cost=80)).reason == ""


async def test_a_dead_workers_holds_come_back_and_what_it_settles_late_counts_what_was_used(migrated: Database) -> None:
    who = account(budget=100, max_parallel=2, token_rate=60, token_capacity=100)
    claim = Claim(70, 70, [0])
    [grant] = (await admit(migrated, Batch("silent", [who], [claim], beat=True, now=NOON))).grants
    assert (await ask(migrated, who, cost=31, now=NOON + DEAD_AFTER, judge=True)).reason == "budget"
    assert (await ask(migrated, who, cost=31, now=NOON + DEAD_AFTER + 1)).reason == "budget"
    assert (await ask(migrated, who, cost=31, now=NOON + DEAD_AFTER + 1, judge=True)).reason == ""
    late = over(who, grant, tokens=70, cost=70, worker="silent")._replace(tokens_used=20, cost=9)
    await migrated.write([settlement_step([late])])
    assert (await ask(migrated, who, cost=61, now=NOON + DEAD_AFTER + 1)).reason == "budget"
    last = await ask(migrated, who, cost=60, now=NOON + DEAD_AFTER + 1)
    assert (last.reason, last.tokens) == ("", 80 * UNIT)


async def test_whoever_asks_lives(migrated: Database) -> None:
    who = account(max_parallel=1)
    await admit(migrated, Batch("w1", [who], [Claim(0, 0, [0])], beat=True, now=NOON))
    assert (await ask(migrated, who, now=NOON + DAY, judge=True)).reason == "parallel"


# Many workers


@pytest.fixture
async def workers(tables_url: str) -> AsyncIterator[list[Database]]:
    """Four on one database."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(opened(tables_url)) for _ in range(4)]


async def everybody(
    workers: Sequence[Database], who: Sequence[Account], claim: Claim, count: int, now: int | None
) -> int:
    """How many of so many claims, each in a batch of its own, are granted."""

    async def one(number: int) -> bool:
        batch = Batch(f"w{number % len(workers)}", who, [claim], beat=number < len(workers), now=now)
        return not (await admit(workers[number % len(workers)], batch)).grants[0].reason

    return sum(await asyncio.gather(*(one(number) for number in range(count))))


async def test_of_200_claims_at_once_a_budget_for_one_lets_in_one(workers: list[Database]) -> None:
    assert await everybody(workers, [account(budget=100)], Claim(0, 51, [0]), 200, None) == 1


@pytest.mark.parametrize(
    ("limit", "granted"),
    [
        ({"request_rate": 1, "request_capacity": 37}, 37),
        ({"token_rate": 1, "token_capacity": 379}, 37),
        ({"max_parallel": 37}, 37),
        ({"budget": 379}, 37),
    ],
    ids=["requests", "tokens", "slots", "money"],
)
async def test_all_workers_together_get_what_there_is_and_all_of_it(
    workers: list[Database], limit: dict[str, int], granted: int
) -> None:
    assert await everybody(workers, [account(**limit), WHOLE], Claim(10, 10, [0, 1]), 80, NOON) == granted


async def test_by_the_databases_clock_no_more_than_capacity_and_refill(workers: list[Database]) -> None:
    who = account(request_rate=60_000, request_capacity=10)
    granted = await everybody(workers, [who], Claim(0, 0, [0]), 120, None)
    [(first,)] = await rows(workers[0], "SELECT MIN(seen_at) FROM workers")
    [(at, level)] = await rows(workers[0], "SELECT at, requests FROM limit_states")
    assert granted >= 10
    assert granted * UNIT + level <= 10 * UNIT + (at - first + 1000) * 60_000


async def test_accounts_asked_in_opposite_order_never_wait_in_a_circle(workers: list[Database]) -> None:
    """While others end calls of the same accounts."""
    pair = [account(f"key:{name}", max_parallel=10**6, budget=10**12) for name in "ab"]

    async def work(number: int) -> None:
        database, order = workers[number % 4], pair if number % 2 else pair[::-1]
        for _ in range(15):
            claims = [Claim(0, 10, [0, 1])]
            [grant] = (await admit(database, Batch(f"w{number}", order, claims, beat=True, judge=True))).grants
            ended = [held(claims[0], one, grant, at, f"w{number}")._replace(cost=3) for at, one in enumerate(order)]
            await database.write([usage.insert([usage_row()]), settlement_step(ended)])

    await asyncio.gather(*(work(number) for number in range(8)))
    await admit(workers[0], Batch("w0", pair))
    assert await rows(workers[0], "SELECT spent_nanousd FROM limit_states") == [(8 * 15 * 3,)] * 2
    assert await rows(workers[0], HOLDS) == []
    assert await rows(workers[0], "SELECT COUNT(*) FROM limit_settlements") == [(0,)]


async def test_a_sweep_among_them_loses_nothing(workers: list[Database]) -> None:
    """Accounts with nothing but slots are always as good as new: they are forgotten and made again all the time."""
    who = [account(f"key:{number}", max_parallel=1000) for number in range(4)]
    later = NOON + 2 * limits.FULL_FOR
    for number in range(3):
        await admit(workers[number], Batch(f"w{number}", beat=True, now=later))
    missing = 0

    async def work(number: int) -> None:
        for step in range(20):
            await admit(workers[number], Batch(f"w{number}", who, [Claim(0, 0, [step % 4])], now=NOON))

    async def clean() -> None:
        nonlocal missing
        for _ in range(15):
            await sweep(workers[3], "w3", now=later)
            missing += 4 - len(await rows(workers[3], STATES))

    await asyncio.gather(*(work(number) for number in range(3)), clean())
    assert missing > 0
    assert await rows(workers[0], "SELECT SUM(slots) FROM limit_holds") == [(60,)]


# Putting away


async def test_settlements_that_nobody_asks_for_are_entered(migrated: Database) -> None:
    who = account(token_rate=60, token_capacity=100, budget=100, max_parallel=3)
    grant = await ask(migrated, who, tokens=80, cost=80)
    ended = over(who, grant, tokens=80, cost=80)._replace(tokens_used=10, cost=5)
    await migrated.write([settlement_step([ended, ended._replace(subject="key:nobody")])])
    written = int(ordered_hex()[:12], 16)
    await sweep(migrated, "w1", now=written + limits.SETTLED_FOR - 1000)
    assert await rows(migrated, "SELECT COUNT(*) FROM limit_settlements") == [(2,)]
    await sweep(migrated, "w1", now=written + limits.SETTLED_FOR + 1000)
    assert await rows(migrated, "SELECT COUNT(*) FROM limit_settlements") == [(0,)]
    assert await rows(migrated, HOLDS) == []
    assert await rows(migrated, STATES) == [
        ("key:a", NOON, None, 90 * UNIT, 0, 5),
        ("key:nobody", written + limits.SETTLED_FOR + 1000, None, None, None, 0),
    ]
    assert (await ask(migrated, who, now=NOON + 1000)).tokens == 91 * UNIT


async def test_what_dead_workers_hold_comes_back_though_nobody_asks(migrated: Database) -> None:
    who = account(max_parallel=1, token_rate=1, token_capacity=5)
    await admit(migrated, Batch("dead", [who], [Claim(5, 0, [0])], beat=True, now=NOON))
    await sweep(migrated, "w1", now=NOON + DEAD_AFTER)
    assert await rows(migrated, HOLDS) == [("key:a", "dead", 1, 5, 0)]
    await sweep(migrated, "w1", now=NOON + DEAD_AFTER + 1)
    assert await rows(migrated, HOLDS) == []
    assert await rows(migrated, "SELECT id FROM workers") == [("dead",)]
    assert (await ask(migrated, who, tokens=5, now=NOON + DEAD_AFTER + 1)).reason == ""


async def test_a_worker_from_the_future_is_not_immortal(migrated: Database) -> None:
    """The clock was set back after it died."""
    who = account(max_parallel=1)
    await admit(migrated, Batch("dead", [who], [Claim(0, 0, [0])], beat=True, now=NOON + DAY))
    await sweep(migrated, "w1", now=NOON)
    assert (await ask(migrated, who, now=NOON + DEAD_AFTER, judge=True)).reason == "parallel"
    assert (await ask(migrated, who, now=NOON + DEAD_AFTER + 1, judge=True)).reason == ""


async def test_accounts_that_are_as_good_as_new_and_workers_long_dead_are_forgotten(migrated: Database) -> None:
    slow = account("key:slow", request_rate=1, request_capacity=60)
    quick = account("key:quick", request_rate=60, request_capacity=60, max_parallel=9)
    money = account("key:money", budget=10)
    asked = [slow] * 60 + [quick]
    for who in [*asked, money]:
        grant = await ask(migrated, who, beat=True)
    await migrated.write([settlement_step([over(quick, grant)])])
    await sweep(migrated, "w2", now=NOON + limits.FULL_FOR)
    assert [row[0] for row in await rows(migrated, STATES)] == ["key:money", "key:quick", "key:slow"]
    await sweep(migrated, "w2", now=NOON + limits.FULL_FOR + 1001)
    assert [row[0] for row in await rows(migrated, STATES)] == ["key:money", "key:slow"]
    assert await rows(migrated, "SELECT id FROM workers") == [("w1",)]
    await sweep(migrated, "w2", now=NOON + limits.GONE_FOR + limits.FULL_FOR + 1)
    assert [row[0] for row in await rows(migrated, STATES)] == ["key:money"]
    assert await rows(migrated, "SELECT id FROM workers") == []
    assert await rows(migrated, "SELECT * FROM limit_holds") == []


async def test_a_sweep_takes_a_part_and_says_where_it_stopped(migrated: Database) -> None:
    many = [account(f"key:{number:04}", request_rate=1, request_capacity=1) for number in range(450)]
    for first in range(0, len(many), 50):
        await admit(migrated, Batch("w1", many[first : first + 50], now=NOON))
    later, after, left = NOON + DAY, "", []
    for _ in range(3):
        after = await sweep(migrated, "w1", after, now=later)
        left += await rows(migrated, "SELECT COUNT(*) FROM limit_states")
    assert left == [(250,), (50,), (0,)]
    assert after == ""


# What was spent


@pytest.mark.parametrize("at_once", [1, 2, 100])
async def test_what_a_key_a_user_and_all_have_spent(
    migrated: Database, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the history is, it is read in slices; rows of one moment stay together."""
    monkeypatch.setattr(gateway.store.limits, "ROWS_AT_ONCE", at_once)
    used = [
        usage_row(cost_nanousd=1),
        usage_row(cost_nanousd=2, created_at=NOON - 1),
        usage_row(cost_nanousd=4, key_id="k"),
        usage_row(cost_nanousd=8, key_id="other"),
        usage_row(cost_nanousd=16, user_id="bob"),
        usage_row(cost_nanousd=32, charged=0),
        usage_row(cost_nanousd=None),
    ]
    await migrated.write([usage.insert(used)])
    assert await spent_since(migrated, user_id="ann", key_id=None, since=NOON) == 1
    assert await spent_since(migrated, user_id="ann", key_id=None, since=NOON - 1) == 3
    assert await spent_since(migrated, user_id="ann", key_id="k", since=NOON) == 4
    assert await spent_since(migrated, user_id=None, key_id=None, since=0) == 31
    assert await spent_since(migrated, user_id="nobody", key_id=None, since=0) == 0


# The statements


class Inside:
    """A database whose reads are part of one transaction."""

    dialect: Literal["postgres", "sqlite"] = "postgres"

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction

    async def fetch(self, sql: str, *args: Value) -> Sequence[Row]:
        return await self._transaction.fetch(sql, *args)


@pytest.fixture
async def on_postgres(postgres: Postgres) -> AsyncIterator[Database]:
    async with opened(postgres.create_database()) as database:
        yield database


async def test_postgres_never_reads_a_whole_table(on_postgres: Database) -> None:
    """Not even an empty one, for which a plan is made that is kept while it grows. Told by the server's own counts."""
    counts = "SELECT relname, seq_scan, COALESCE(idx_scan, 0) AS idx_scan FROM pg_stat_xact_user_tables"
    whos = [account("key:1", request_rate=1, request_capacity=9, max_parallel=9, budget=9), WHOLE]
    await admit(on_postgres, Batch("w0", beat=True, now=0))
    await admit(on_postgres, Batch("w0", whos, [Claim(0, 1, [0, 1])], now=NOON))
    await on_postgres.write([settlement_step([Settlement("key:1", "w9", 1, 1, 1, 1, 1, 0)])])
    async with on_postgres.transaction() as transaction:
        alone = [Settlement("key:2", "w1", 1, 1, 1, 1, 1, 0)]
        batch = Batch("w1", whos, [Claim(0, 1, [0, 1])], alone, beat=True, judge=True, now=NOON)
        before = {row["relname"]: row for row in await transaction.fetch(counts)}
        await admit(cast(Database, Inside(transaction)), batch)
        after = {row["relname"]: row for row in await transaction.fetch(counts)}
    read = {name for name, row in after.items() if row["idx_scan"] > before[name]["idx_scan"]}
    assert read == {"limit_states", "limit_holds", "limit_settlements", "workers", "gateway_state"}
    assert {name for name, row in after.items() if row["seq_scan"] > before[name]["seq_scan"]} == set()


async def test_postgres_looks_at_the_clock_once_it_holds_the_account(on_postgres: Database) -> None:
    """Who waited for it for long must not take the time of his beginning for a clock that was set back."""
    who = account(request_rate=1, request_capacity=9)
    await admit(on_postgres, Batch("w1", [who], [Claim(0, 0, [0])]))
    async with on_postgres.transaction() as transaction:
        await transaction.execute("SELECT 1 FROM limit_states FOR UPDATE")
        waiting = asyncio.create_task(admit(on_postgres, Batch("w2", [who], [Claim(0, 0, [0])])))
        await asyncio.sleep(CLOCK_SET_BACK / 1000 + 0.2)
        [row] = await transaction.fetch(f"UPDATE limit_states SET at = ({limits._NOW['postgres']}) RETURNING at")
    await waiting
    [(at,)] = await rows(on_postgres, "SELECT at FROM limit_states")
    assert at >= row["at"]


async def test_postgres_does_not_wait_for_the_disk_and_does_so_again_afterwards(on_postgres: Database) -> None:
    async with on_postgres.transaction() as transaction:
        await admit(cast(Database, Inside(transaction)), Batch("w1", [WHOLE]))
        assert [tuple(row.values()) for row in await transaction.fetch("SHOW synchronous_commit")] == [("off",)]  # type: ignore[attr-defined]  # asyncpg's
    for setting, value in (("synchronous_commit", "on"), ("enable_seqscan", "on"), ("enable_bitmapscan", "on")):
        assert await rows(on_postgres, f"SHOW {setting}") == [(value,)]


async def test_sqlite_never_reads_a_whole_table(sqlite: Database) -> None:
    statements = [
        (limits_sqlite._READ, 1), (limits_sqlite._SETTLED, 1), (limits_sqlite._TAKEN_BACK, 2),
        (limits_sqlite._PUT_STATES, 1), (limits_sqlite._PUT_HOLDS, 1), (limits_sqlite._BEAT, 2), (limits._STATES, 2),
        (limits._SETTLED, 2), (limits._FORGET_STATE, 2), (limits._FORGET_HOLDS, 1), (limits._FORGET_HOLDS_OF, 1),
        (limits._FORGET_WORKER, 2),
    ]  # fmt: skip
    for sql, count in statements:
        plan = [row[3] for row in await rows(sqlite, f"EXPLAIN QUERY PLAN {sql}", *["[]"] * count)]
        assert [
            step for step in plan if step.startswith("SCAN ") and "json_each" not in step and "found" not in step
        ] == []


async def test_behind_a_pooler_and_in_another_schema(postgres: Postgres) -> None:
    url = postgres.create_database()
    postgres.admin("CREATE SCHEMA elsewhere", database=url.rpartition("/")[2])
    database = database_at(f"{url}?search_path=elsewhere", statement_cache=False)
    await database.open()
    try:
        await migrate(database)
        who = account(max_parallel=1, budget=10)
        assert [(await ask(database, who, cost=1, beat=True, judge=True)).reason for _ in range(2)] == ["", "parallel"]
        assert await rows(database, "SELECT subject FROM elsewhere.limit_states") == [("key:a",)]
        await sweep(database, "w1")
    finally:
        await database.close()

"""Claims in, grants out. The book is a few dicts here; tests_standalone/store/test_limits.py holds the tables to it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.limits import (
    CLOCK_SET_BACK,
    DAY,
    DEAD_AFTER,
    UNIT,
    Account,
    Ahead,
    Batch,
    Claim,
    Grant,
    Hold,
    Settlement,
    State,
    Wish,
    advance,
    decide,
    held,
    period_at,
    period_start,
    settle,
    summed,
    take_back,
)
from gateway.limits_ahead import lend, returned
from tests_standalone.conftest import NOON

MINUTE = 60_000


class Model:
    """The book in memory, by the rules alone."""

    def __init__(self) -> None:
        self.states: dict[str, State] = {}
        self.holds: dict[str, dict[str, Hold]] = {}
        self.written: list[Settlement] = []
        self.seen: dict[str, int] = {}

    def admit(self, batch: Batch) -> list[Grant]:
        return self.answer(batch)[0]

    def answer(self, batch: Batch) -> tuple[list[Grant], list[Ahead]]:
        assert batch.now is not None
        if batch.beat:
            self.seen[batch.worker] = batch.now
        self.written += batch.settlements
        known = {account.subject for account in batch.accounts}
        others = {one.subject for one in batch.settlements} - known
        for account in (*batch.accounts, *map(Account, others)):
            self._bring_up(account, batch, batch.now)
        grants = [self._decided(claim, batch) for claim in batch.claims]
        return grants, [self._lent(wish, batch) for wish in batch.wishes]

    def sweep(self, now: int) -> None:
        """Signs of life from a time that a clock was set back from are of now."""
        self.seen = {worker: min(at, now) for worker, at in self.seen.items()}

    def _bring_up(self, account: Account, batch: Batch, now: int) -> None:
        state = self.states.setdefault(account.subject, State(now))
        holds = self.holds.setdefault(account.subject, {})
        refunds = 0
        for one in [one for one in self.written if one.subject == account.subject]:
            refunds += settle(state, holds.get(one.worker), one)
            self.written.remove(one)
        for worker in [worker for worker in holds if batch.judge and worker != batch.worker]:
            if self.seen.get(worker, 0) < now - DEAD_AFTER:
                refunds += take_back(state, holds.pop(worker))
        for wish in batch.wishes:
            if batch.accounts[wish.at] is account and batch.worker in holds:
                refunds += returned(state, holds[batch.worker], wish)
        advance(state, account, now, refunds)

    def _decided(self, claim: Claim, batch: Batch) -> Grant:
        grant = decide(claim, batch.accounts, self.states)
        for place, at in enumerate(claim.accounts if not grant.reason else ()):
            takes = held(claim, batch.accounts[at], grant, place, batch.worker)
            hold = self.holds[takes.subject].setdefault(batch.worker, Hold())
            hold.slots += takes.slots
            hold.tokens += takes.tokens_held
            hold.cost += takes.cost_held
        return grant

    def _lent(self, wish: Wish, batch: Batch) -> Ahead:
        who = batch.accounts[wish.at]
        hold = self.holds[who.subject].setdefault(batch.worker, Hold())
        return lend(self.states[who.subject], hold, who, wish)


def account(**limits: Any) -> Account:
    return Account("key:a", **limits)


def level(requests: int) -> int:
    """So many requests or tokens, as a level."""
    return requests * UNIT


def ask(model: Model, who: Account, now: int, *, tokens: int = 0, cost: int = 0, **changes: Any) -> Grant:
    [grant] = model.admit(Batch("w1", [who], [Claim(tokens, cost, [0])], now=now, **changes))
    return grant


def taken(who: Account, grant: Grant, *, tokens: int = 0, cost: int = 0, worker: str = "w1") -> Settlement:
    """What the claim of `ask` holds."""
    return held(Claim(tokens, cost, [0]), who, grant, 0, worker)


# --- buckets


def test_a_bucket_is_full_at_first_then_empty_then_refilled_by_its_rate() -> None:
    model, who = Model(), account(request_rate=60, request_capacity=2)
    assert [ask(model, who, NOON).requests for _ in range(2)] == [level(1), 0]
    refused = ask(model, who, NOON)
    assert (refused.reason, refused.wait, refused.requests) == ("requests", 1000, 0)
    assert ask(model, who, NOON + 999).wait == 1
    assert ask(model, who, NOON + 1000).reason == ""


def test_it_holds_no_more_than_its_capacity_however_long_nobody_comes() -> None:
    model, who = Model(), account(request_rate=60, request_capacity=2)
    ask(model, who, NOON)
    assert [ask(model, who, NOON + 30 * DAY).reason for _ in range(3)] == ["", "", "requests"]


def test_every_rate_refills_whole_units_in_every_millisecond() -> None:
    model, who = Model(), account(request_rate=7, request_capacity=1)
    ask(model, who, NOON)
    assert [ask(model, who, NOON + at).requests for at in (1, 2, 1002)] == [7, 14, 7014]


def test_tokens_are_taken_by_the_claim_and_settled_by_what_was_used() -> None:
    model, who = Model(), account(token_rate=100, token_capacity=100)
    grant = ask(model, who, NOON, tokens=80)
    assert grant.tokens == level(20)
    model.written.append(taken(who, grant, tokens=80)._replace(tokens_used=30))
    assert ask(model, who, NOON, tokens=0).tokens == level(70)


def test_more_used_than_claimed_is_a_debt_that_time_pays() -> None:
    model, who = Model(), account(token_rate=60, token_capacity=100)
    grant = ask(model, who, NOON, tokens=100)
    model.written.append(taken(who, grant, tokens=100)._replace(tokens_used=150))
    refused = ask(model, who, NOON, tokens=1)
    assert (refused.reason, refused.tokens, refused.wait) == ("tokens", level(-50), 51_000)


def test_a_claim_larger_than_the_bucket_takes_a_full_one() -> None:
    model, who = Model(), account(token_rate=60, token_capacity=100)
    grant = ask(model, who, NOON, tokens=1_000_000)
    assert (grant.reason, grant.tokens) == ("", 0)
    assert taken(who, grant, tokens=1_000_000).tokens_held == 100
    assert ask(model, who, NOON, tokens=1_000_000).wait == 100_000


def test_the_longer_of_two_waits_is_told() -> None:
    model, who = Model(), account(request_rate=60, request_capacity=1, token_rate=60, token_capacity=10)
    ask(model, who, NOON, tokens=10)
    assert ask(model, who, NOON, tokens=1)[:3] == ("requests", 0, 1000)
    assert ask(model, who, NOON, tokens=2)[:3] == ("tokens", 0, 2000)


# --- clocks


def test_a_clock_that_is_set_back_refills_nothing() -> None:
    model, who = Model(), account(request_rate=60, request_capacity=1)
    ask(model, who, NOON)
    assert ask(model, who, NOON - CLOCK_SET_BACK).requests == 0
    assert ask(model, who, NOON + 500).requests == level(1) // 2
    assert ask(model, who, NOON - DAY).requests == level(1) // 2
    assert ask(model, who, NOON - DAY + 500).reason == ""


# --- slots


def test_slots_are_taken_and_come_back() -> None:
    model, who = Model(), account(max_parallel=2)
    grants = [ask(model, who, NOON) for _ in range(3)]
    assert [grant.reason for grant in grants] == ["", "", "parallel"]
    assert grants[2].wait == 0
    assert ask(model, who, NOON, settlements=[taken(who, grants[0])]).reason == ""


def test_a_dead_workers_slots_come_back_after_its_time() -> None:
    model, who = Model(), account(max_parallel=1, token_rate=1, token_capacity=10, budget=5)
    model.admit(Batch("dead", [who], [Claim(10, 5, [0])], beat=True, now=NOON))
    assert ask(model, who, NOON + DEAD_AFTER, judge=True).reason == "parallel"
    assert ask(model, who, NOON + DEAD_AFTER + 1).reason == "parallel"
    assert ask(model, who, NOON + DEAD_AFTER + 1, tokens=10, cost=5, judge=True).reason == ""


def test_what_is_settled_after_that_counts_what_was_used_only() -> None:
    model, who = Model(), account(max_parallel=2, token_rate=1, token_capacity=10, budget=9)
    [grant] = model.admit(Batch("silent", [who], [Claim(6, 5, [0])], beat=True, now=NOON))
    later = NOON + DEAD_AFTER + 1
    ask(model, who, later, tokens=2, cost=1, judge=True)
    model.written.append(taken(who, grant, tokens=6, cost=5, worker="silent")._replace(tokens_used=3, cost=4))
    model.admit(Batch("w1", [who], now=later))
    state = model.states["key:a"]
    assert (state.slots, state.reserved, state.spent, state.tokens) == (1, 1, 4, level(10 - 2 - 3))


# --- budgets


def test_a_budget_holds_what_may_be_spent_until_it_is_known() -> None:
    model, who = Model(), account(budget=100)
    first = ask(model, who, NOON, cost=60)
    assert ask(model, who, NOON, cost=41)[:3] == ("budget", 0, 0)
    model.written.append(taken(who, first, cost=60)._replace(cost=10))
    assert [ask(model, who, NOON, cost=cost).reason for cost in (91, 90, 1)] == ["budget", "", "budget"]


def test_what_costs_nothing_is_never_refused_for_money() -> None:
    model, who = Model(), account(budget=0)
    assert [ask(model, who, NOON, cost=cost).reason for cost in (0, 1)] == ["", "budget"]


@pytest.mark.parametrize(
    ("period", "before", "after"),
    [
        ("day", 1_798_761_599_999, 1_798_761_600_000),  # 2026-12-31 23:59:59.999 and the next millisecond
        ("month", 1_798_761_599_999, 1_798_761_600_000),
    ],
)
def test_a_period_begins_anew(period: Any, before: int, after: int) -> None:
    model, who = Model(), account(budget=10, period=period)
    grant = ask(model, who, before, cost=10)
    model.written.append(taken(who, grant, cost=10)._replace(cost=10))
    assert ask(model, who, before, cost=1).reason == "budget"
    again = ask(model, who, after, cost=10)
    assert again.reason == ""
    assert again.periods[0] == grant.periods[0] + 1
    assert period_start(after, period) == after
    assert period_at(period_start(before, period), period) == period_at(before, period) == grant.periods[0]


def test_what_a_call_of_the_last_period_costs_counts_there() -> None:
    model, who = Model(), account(budget=10, period="day")
    grant = ask(model, who, NOON, cost=10)
    assert ask(model, who, NOON + DAY, cost=1).reason == "budget"  # it is still reserved
    model.written.append(taken(who, grant, cost=10)._replace(cost=10))
    assert ask(model, who, NOON + DAY, cost=10).reason == ""


def test_an_account_that_is_new_begins_with_what_was_spent_before() -> None:
    model, who = Model(), account(budget=10, seed=9)
    assert [ask(model, who, NOON, cost=cost).reason for cost in (2, 1)] == ["budget", ""]
    model = Model()
    ask(model, who._replace(budget=None), NOON)
    assert ask(model, who, NOON, cost=2).reason == "budget"


# --- several accounts


def test_all_accounts_or_none() -> None:
    model = Model()
    key, gateway = Account("key:a", request_rate=60, request_capacity=5), Account("gateway", budget=10)
    batch = Batch("w1", [key, gateway], [Claim(0, 10, [0, 1]), Claim(0, 10, [0, 1])], now=NOON)
    granted, refused = model.admit(batch)
    assert granted == Grant("", 0, 0, level(4), None, [0, 0])
    assert refused == Grant("budget", 1, 0, level(4), None, [0, 0])


def test_claims_are_decided_in_their_order() -> None:
    model, who = Model(), account(token_rate=60, token_capacity=10)
    grants = model.admit(Batch("w1", [who], [Claim(tokens, 0, [0]) for tokens in (6, 5, 4, 1)], now=NOON))
    assert [grant.reason for grant in grants] == ["", "tokens", "", "tokens"]


def test_an_account_that_is_asked_without_its_limits_is_settled_and_keeps_its_time() -> None:
    model, who = Model(), account(request_rate=60, request_capacity=9, token_rate=60, token_capacity=100, budget=50)
    grant = ask(model, who, NOON, tokens=100, cost=5)
    for second in range(1, 6):
        [] = model.admit(Batch("w2", [account()], now=NOON + 1000 * second))
    model.admit(Batch("w2", settlements=[taken(who, grant, tokens=100, cost=5)._replace(cost=3)], now=NOON + 6000))
    assert model.states["key:a"].spent == 3
    assert model.states["key:a"].reserved == 0
    again = ask(model, who, NOON + 7000)
    assert (again.requests, again.tokens) == (level(8), level(100))


def test_settlements_are_summed_by_subject_worker_and_period() -> None:
    one = Settlement("a", "w", 1, 2, 3, 4, 5, 6)
    assert summed([one._replace(subject="b"), one, one, one._replace(period=7)]) == [
        Settlement("a", "w", 2, 4, 6, 8, 10, 6),
        one._replace(period=7),
        one._replace(subject="b"),
    ]


# --- whatever happens


class World:
    """Workers with running calls before one book. Living workers say so in time, dead ones stay silent."""

    def __init__(self, *accounts: Account) -> None:
        self.model = Model()
        self.accounts = accounts
        self.now, self.forward = NOON, 0
        self.workers = ["w0", "w1", "w2"]
        self.running: list[tuple[str, list[Settlement]]] = []
        self.requests = self.tokens = self.spent = 0
        """What was granted, and used, of the first account."""

    def pass_time(self, milliseconds: int) -> None:
        self.now += milliseconds
        self.forward += max(0, milliseconds)
        self.model.seen |= dict.fromkeys(self.workers, self.now)

    def batch(self, worker: int, claims: Sequence[Claim] = ()) -> Batch:
        return Batch(self.workers[worker], self.accounts, claims, beat=True, judge=True, now=self.now)

    def claim(self, worker: int, tokens: int, cost: int) -> Grant:
        claim = Claim(tokens, cost, range(len(self.accounts)))
        batch = self.batch(worker, [claim])
        [grant] = self.model.admit(batch)
        if not grant.reason:
            holds = [held(claim, who, grant, place, batch.worker) for place, who in enumerate(self.accounts)]
            self.running.append((batch.worker, holds))
            self.requests += 1
            self.tokens += holds[0].tokens_held
        return grant

    def finish(self, which: int, part: int, of: int) -> None:
        """A running call ends; it used that part of what it had claimed."""
        if self.running:
            _, holds = self.running.pop(which % len(self.running))
            used = [
                one._replace(tokens_used=one.tokens_held * part // of, cost=one.cost_held * part // of) for one in holds
            ]
            self.model.written += used
            self.tokens += used[0].tokens_used - used[0].tokens_held
            self.spent += used[0].cost

    def die(self, worker: int) -> None:
        """With all of its calls, which nobody settles; another one starts in its place."""
        name = self.workers[worker]
        self.tokens -= sum(holds[0].tokens_held for owner, holds in self.running if owner == name)
        self.running = [(owner, holds) for owner, holds in self.running if owner != name]
        self.workers[worker] = f"{name}'"
        self.model.seen[f"{name}'"] = self.now

    def check_bounds(self) -> None:
        """The first account never gave more than it had at first and what time brought."""
        who = self.accounts[0]
        if who.request_rate is not None:
            assert level(self.requests - who.request_capacity) <= self.forward * who.request_rate
        if who.token_rate is not None:
            assert level(self.tokens - who.token_capacity) <= self.forward * who.token_rate
        if who.max_parallel is not None:
            assert len(self.running) <= who.max_parallel
        if who.budget is not None:
            assert self.spent + sum(holds[0].cost_held for _, holds in self.running) <= who.budget

    def end(self) -> None:
        """All calls end, all workers die, and their time passes."""
        while self.running:
            self.finish(0, 1, 2)
        for worker in range(len(self.workers)):
            self.die(worker)
        self.model.sweep(self.now)
        self.pass_time(DEAD_AFTER + 1)
        self.model.admit(self.batch(0))


PART = st.integers(0, 10)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), st.integers(0, 2), st.integers(0, 150), st.integers(0, 60)),
        st.tuples(st.just("claim"), st.integers(0, 2), st.integers(0, 150), st.integers(0, 60)),
        st.tuples(st.just("finish"), st.integers(0, 9), PART, st.just(10)),
        st.tuples(st.just("pass_time"), st.integers(0, 5000)),
        st.tuples(st.just("pass_time"), st.sampled_from([-DAY, -1500, -1000, -999, -1, DEAD_AFTER + 1, DAY, 31 * DAY])),
        st.tuples(st.just("die"), st.integers(0, 2)),
    ),
    max_size=40,
)
LIMITS = st.builds(
    Account,
    subject=st.just("key:a"),
    request_rate=st.none() | st.integers(1, 600),
    request_capacity=st.integers(1, 10),
    token_rate=st.none() | st.integers(1, 6000),
    token_capacity=st.integers(1, 200),
    max_parallel=st.none() | st.integers(1, 4),
    budget=st.none() | st.integers(0, 200),
    period=st.just("total"),
    seed=st.just(0),
)


def run(world: World, steps: Sequence[tuple[Any, ...]]) -> None:
    for name, *values in steps:
        getattr(world, name)(*values)


@settings(max_examples=300, deadline=None)
@given(LIMITS, STEPS)
def test_never_more_is_granted_than_capacity_and_refill(who: Account, steps: list[tuple[Any, ...]]) -> None:
    world = World(who)
    for step in steps:
        run(world, [step])
        world.check_bounds()


@settings(max_examples=200, deadline=None)
@given(LIMITS, STEPS)
def test_when_all_is_over_nothing_is_held(who: Account, steps: list[tuple[Any, ...]]) -> None:
    world = World(who, Account("gateway", token_rate=1, token_capacity=10**6, max_parallel=100, budget=10**6))
    run(world, steps)
    world.end()
    for state in world.model.states.values():
        assert (state.slots, state.reserved) == (0, 0)
    assert [hold for holds in world.model.holds.values() for hold in holds.values() if hold != Hold()] == []
    assert world.model.written == []
    if who.budget is not None:
        assert world.model.states["gateway"].spent == world.model.states["key:a"].spent == world.spent


@settings(max_examples=200, deadline=None)
@given(LIMITS, STEPS, st.integers(0, 300), st.integers(0, 300))
def test_a_refused_claim_changes_nothing(who: Account, steps: list[tuple[Any, ...]], tokens: int, cost: int) -> None:
    world = World(who, Account("gateway", budget=150))
    run(world, steps)
    other = deepcopy(world)
    if world.claim(0, tokens, cost).reason:
        other.model.admit(other.batch(0))
        assert world.model.__dict__ == other.model.__dict__


@settings(max_examples=200, deadline=None)
@given(LIMITS, STEPS, st.integers(0, 300))
def test_who_waits_as_told_is_let_in_and_not_before(who: Account, steps: list[tuple[Any, ...]], tokens: int) -> None:
    who = who._replace(max_parallel=None, budget=None)
    world = World(who, Account("gateway", token_rate=600, token_capacity=120))
    run(world, [step for step in steps if step[0] != "die" and (step[0] != "pass_time" or step[1] >= 0)])
    refused = world.claim(0, tokens, 0)
    if refused.reason:
        early, late = deepcopy(world), world
        early.pass_time(refused.wait - 1)
        assert early.claim(0, tokens, 0).reason
        late.pass_time(refused.wait)
        assert late.claim(0, tokens, 0).reason == ""


def test_no_schedule_spends_more_than_the_budget() -> None:
    chance = random.Random(5)
    most = 0
    for _ in range(10_000):
        budget = chance.randrange(1, 100)
        world = World(account(budget=budget, period=chance.choice(["day", "total"])))
        for _ in range(chance.randrange(4, 12)):
            kind = chance.randrange(8)
            if kind < 4:
                world.claim(chance.randrange(3), 0, chance.randrange(60))
            elif kind < 6:
                world.finish(chance.randrange(9), chance.randrange(11), 10)
            elif kind == 6:
                world.die(chance.randrange(3))
            else:
                world.pass_time(chance.choice([1, 20_000, -500]))
            reserved = sum(holds[0].cost_held for _, holds in world.running)
            assert world.spent + reserved <= budget
            most += world.spent + reserved == budget
    assert most > 500  # and what is there can be spent

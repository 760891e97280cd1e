"""Calls that need not ask, because their worker holds something ahead; and that no bound moves by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.limits import AHEAD_SHARE, DAY, DEAD_AFTER, Account, Batch, Claim, Grant, Hold, held
from gateway.slices import GOOD_SECONDS, MOST_ACCOUNTS, Slices
from gateway.store.keys import KeyState
from tests_standalone.conftest import NOON
from tests_standalone.test_limits import LIMITS, PART, Model, World, level, run

PLENTY = Account(
    "key:a", request_rate=60, request_capacity=1000, token_rate=60, token_capacity=100_000, max_parallel=500,
    budget=10**6, seed=None,
)  # fmt: skip
KEYS = KeyState(7, ever_made=True)


class Worker:
    """One worker before a book. Its clock goes by hand, in milliseconds."""

    def __init__(self, model: Model | None = None, name: str = "w1") -> None:
        self.model, self.name, self.now = model or Model(), name, 0
        self.slices = Slices(lambda: self.now / 1000)
        self.asked = 0

    def call(self, *accounts: Account, tokens: int = 10, cost: int = 5) -> Grant:
        """Lets a call in, one way or the other."""
        grant = self.slices.take(self.name, accounts, tokens, cost)
        if grant is None:
            [grant] = self.ask(list(accounts), [Claim(tokens, cost, range(len(accounts)))])
            if not grant.reason:
                self.slices.count(accounts, tokens, cost)
        return grant

    def ask(self, accounts: list[Account], claims: Sequence[Claim] = ()) -> list[Grant]:
        """A batch; what it asks for besides is not delayed."""
        self.asked += 1
        places = {account.subject: place for place, account in enumerate(accounts)}
        asked_at = self.slices.now()
        wishes = self.slices.wishes(self.name, accounts, places)
        known = [account._replace(seed=0) for account in accounts]
        grants, ahead = self.model.answer(Batch(self.name, known, claims, now=NOON + self.now, wishes=wishes))
        self.slices.told(KEYS, asked_at)
        self.slices.entered(accounts, wishes, ahead, asked_at)
        return grants

    def background(self) -> None:
        self.slices.look()
        if self.slices.due:
            self.ask([])

    @property
    def hold(self) -> Hold:
        return self.model.holds["key:a"].get(self.name, Hold())


def busy(worker: Worker, *accounts: Account, calls: int = 20) -> None:
    """So many calls in a moment: from the third on something is held ahead."""
    for _ in range(calls):
        worker.call(*accounts)


def test_a_busy_worker_asks_for_many_calls_at_once() -> None:
    worker, wide = Worker(), PLENTY._replace(request_capacity=10_000, max_parallel=10_000)
    busy(worker, wide, calls=300)
    assert worker.asked < 30
    worker.slices.give_up()
    worker.ask([])
    assert worker.hold == Hold(slots=300, tokens=3000, cost=1500)
    assert worker.model.states["key:a"].requests == level(10_000 - 300)


def test_one_that_calls_now_and_then_asks_each_time_and_holds_nothing_ahead() -> None:
    worker = Worker()
    for _ in range(5):
        worker.call(PLENTY)
        worker.now += 150
        worker.background()
    assert worker.asked == 5
    assert worker.hold == Hold(slots=5, tokens=50, cost=25)


def test_what_is_told_to_clients_is_what_is_left_with_what_is_held_ahead() -> None:
    worker = Worker()
    levels = [worker.call(PLENTY) for _ in range(9)]
    assert [grant.requests for grant in levels] == [level(999 - n) for n in range(9)]
    assert [grant.tokens for grant in levels] == [level(100_000 - 10 * n) for n in range(1, 10)]


def test_it_is_good_for_a_moment_only() -> None:
    worker = Worker()
    busy(worker, PLENTY)
    worker.now += int(GOOD_SECONDS * 1000) - 1
    assert worker.slices.take("w1", [PLENTY], 1, 1) is not None
    worker.now += 1
    assert worker.slices.take("w1", [PLENTY], 1, 1) is None
    assert worker.call(PLENTY).reason == ""
    assert worker.slices.take("w1", [PLENTY], 1, 1) is not None


def test_the_keys_are_as_they_were_when_the_book_was_asked() -> None:
    worker = Worker()
    assert worker.slices.take("w1", [], 1, 1) is None
    worker.ask([])
    assert worker.slices.take("w1", [], 1, 1) == Grant("", 0, 0, None, None, [])
    assert worker.slices.keys == KEYS
    worker.now += int(GOOD_SECONDS * 1000)
    assert worker.slices.take("w1", [], 1, 1) is None


def test_it_is_asked_for_again_before_it_ends_and_before_it_is_used_up() -> None:
    worker = Worker()
    busy(worker, PLENTY)
    worker.slices.take("w1", [PLENTY], 1, 1)
    worker.ask([])
    assert not worker.slices.due
    worker.now += int(GOOD_SECONDS * 1000) // 2 + 1
    worker.slices.take("w1", [PLENTY], 1, 1)
    assert worker.slices.due
    worker.ask([])
    assert not worker.slices.due
    while not worker.slices.due:
        assert worker.slices.take("w1", [PLENTY], 1, 1) is not None
    assert worker.slices.take("w1", [PLENTY], 1, 1) is not None


def test_all_accounts_must_have_it_ahead() -> None:
    worker, whole = Worker(), Account("gateway", budget=10**6, seed=None)
    busy(worker, PLENTY)
    for _ in range(1000):  # it takes nothing of the one that has it
        assert worker.slices.take("w1", [PLENTY, whole], 1, 1) is None
    assert worker.slices.take("w1", [PLENTY], 1, 1) is not None
    busy(worker, PLENTY, whole)
    grant = worker.slices.take("w1", [PLENTY, whole], 1, 1)
    assert grant is not None
    assert len(grant.periods) == 2


def test_a_call_larger_than_what_is_held_ahead_asks() -> None:
    worker = Worker()
    busy(worker, PLENTY)
    assert worker.slices.take("w1", [PLENTY], 50_000, 1) is None
    assert worker.slices.take("w1", [PLENTY], 1, 500_000) is None
    assert worker.slices.take("w1", [PLENTY], 1, 1) is not None


def test_what_is_not_used_goes_back() -> None:
    worker = Worker()
    busy(worker, PLENTY)
    assert worker.hold.requests_ahead > 0
    for _ in range(3):
        worker.now += int(GOOD_SECONDS * 1000)
        worker.background()
    assert worker.hold == Hold(slots=20, tokens=200, cost=100)
    for _ in range(3):
        worker.now += int(GOOD_SECONDS * 1000)
        worker.background()
    assert len(worker.slices) == 0


def test_less_is_held_when_less_is_called() -> None:
    worker = Worker()
    busy(worker, PLENTY, calls=100)
    before = worker.hold.requests_ahead
    for _ in range(40):
        worker.now += 20
        worker.call(PLENTY)
        if worker.slices.due:
            worker.ask([])
    assert 0 < worker.hold.requests_ahead < before / 2


def test_what_a_slow_book_lends_is_known_though_the_account_was_forgotten_meanwhile() -> None:
    worker, accounts = Worker(), [PLENTY]
    worker.ask([])
    worker.slices.count(accounts * 9, 10, 5)
    asked_at = worker.slices.now()
    wishes = worker.slices.wishes("w1", accounts, {"key:a": 0})
    for _ in range(3):
        worker.now += int(GOOD_SECONDS * 1000)
        worker.slices.look()
    assert len(worker.slices) == 0
    _, ahead = worker.model.answer(Batch("w1", [PLENTY._replace(seed=0)], now=NOON, wishes=wishes))
    worker.slices.entered(accounts, wishes, ahead, asked_at)
    assert worker.hold.requests_ahead > 0
    worker.background()
    assert worker.hold == Hold()


def test_what_a_budget_had_cost_once_is_not_told_again_later() -> None:
    """The book would begin anew with it when others have changed the period meanwhile."""
    worker, daily = Worker(), PLENTY._replace(period="day")
    worker.ask([])
    for known in (PLENTY, daily):
        worker.slices.count([known._replace(seed=60)], 10, 5)
        worker.ask([known._replace(seed=60)])
        busy(worker, known)
        worker.slices.give_up()
        accounts: list[Account] = []
        worker.slices.wishes("w1", accounts, {})
        assert accounts == [known]


def test_at_the_end_of_the_worker_all_of_it_goes_back() -> None:
    worker = Worker()
    busy(worker, PLENTY)
    worker.slices.give_up()
    worker.ask([])
    assert worker.hold == Hold(slots=20, tokens=200, cost=100)
    assert not worker.slices.due


def test_and_the_book_hears_what_was_used_of_it() -> None:
    worker, who = Worker(), Account("key:a", token_rate=60, token_capacity=100_000)
    busy(worker, who)
    worker.ask([who])
    assert worker.slices.take("w1", [who], worker.hold.tokens_ahead, 0) is not None
    worker.slices.give_up()
    worker.background()
    assert worker.hold.tokens_ahead == 0


def test_with_other_limits_of_the_key_nothing_that_was_held_counts_and_all_goes_back() -> None:
    worker = Worker()
    busy(worker, PLENTY)
    changed = PLENTY._replace(max_parallel=1)
    assert worker.slices.take("w1", [changed], 1, 1) is None
    assert worker.call(changed).reason == "parallel"
    assert worker.hold == Hold(slots=20, tokens=200, cost=100)


def test_under_another_name_nothing_is_held() -> None:
    worker = Worker()
    busy(worker, PLENTY)
    assert worker.slices.take("w2", [PLENTY], 1, 1) is None
    worker.name = "w2"
    assert worker.call(PLENTY).reason == ""
    assert worker.hold.slots >= 1
    worker.slices.forget()
    assert worker.slices.take("w2", [PLENTY], 1, 1) is None


def test_near_a_limit_nothing_is_held_ahead() -> None:
    worker, tight = Worker(), Account("key:a", max_parallel=AHEAD_SHARE)
    busy(worker, tight, calls=AHEAD_SHARE)
    assert worker.hold.slots == AHEAD_SHARE
    assert worker.call(tight).reason == "parallel"


def test_a_worker_is_lent_a_part_of_what_is_left_at_most() -> None:
    one, many = Worker(), Account("key:a", request_rate=1, request_capacity=160)
    other = Worker(one.model, "w2")
    busy(one, many, calls=30)
    assert one.model.holds["key:a"]["w1"].requests_ahead <= 160 // AHEAD_SHARE
    granted = [other.call(many).reason for _ in range(200)].count("")
    assert granted + 30 >= 160 - 160 // AHEAD_SHARE


@given(st.lists(st.tuples(st.integers(0, 10**40), st.integers(0, 10**40)), max_size=9), st.integers(0, 600))
def test_no_more_is_wished_for_than_the_account_has_when_it_is_full(claims: list[tuple[int, int]], more: int) -> None:
    """Whatever calls ask for: a number that no column holds would fail the batch for all who wait."""
    worker = Worker()
    worker.ask([])
    for tokens, cost in [*claims, *[(6250, 62_500)] * more]:
        worker.slices.count([PLENTY], tokens, cost)
    for wish in worker.slices.wishes("w1", [PLENTY], {"key:a": 0}):
        assert wish.requests <= PLENTY.request_capacity
        assert wish.tokens <= PLENTY.token_capacity
        assert wish.slots <= (PLENTY.max_parallel or 0)
        assert wish.cost <= (PLENTY.budget or 0)


@pytest.mark.parametrize(
    "whole", [Account("gateway", budget=10**6, seed=None), Account("a", token_rate=1, token_capacity=10**6)]
)
def test_a_call_too_large_for_any_slice_takes_nothing_from_others(whole: Account) -> None:
    """Were it wanted ahead, too, nothing would be lent, and each call of everybody would ask."""
    worker = Worker()
    assert worker.call(whole, tokens=2 * 10**5, cost=2 * 10**5).reason == ""
    busy(worker, whole)
    assert worker.asked < 10


def test_several_loans_together_are_never_more_than_a_quarter_of_what_was_free() -> None:
    """Each is an `AHEAD_SHARE`th of what is left; one follows the other while ever more is called."""
    worker, most = Worker(), 0
    worker.ask([])
    many = Account("key:a", max_parallel=16_000)
    for _ in range(800):
        for _ in range(10):
            worker.slices.count([many], 0, 0)
        worker.ask([many])
        most = max(most, worker.hold.slots)
    assert 16_000 // AHEAD_SHARE < most <= 16_000 // 4


def test_too_many_accounts_are_not_watched() -> None:
    worker = Worker()
    for number in range(MOST_ACCOUNTS + 10):
        busy(worker, Account(f"key:{number}", max_parallel=500), calls=1)
    assert len(worker.slices) == MOST_ACCOUNTS
    assert worker.call(Account("key:new", max_parallel=1)).reason == ""


class AheadWorld(World):
    """Workers that hold something ahead, and are killed with it."""

    def __init__(self, *accounts: Account) -> None:
        super().__init__(*accounts)
        self.slices = {name: self._new() for name in self.workers}

    def _new(self) -> Slices:
        return Slices(lambda: self.forward / 1000)

    def calls(self, worker: int, count: int, tokens: int, cost: int) -> None:
        for _ in range(count):
            self.claim(worker, tokens, cost)

    def claim(self, worker: int, tokens: int, cost: int) -> Grant:
        name = self.workers[worker]
        slices = self.slices[name]
        claim = Claim(tokens, cost, range(len(self.accounts)))
        grant = slices.take(name, self.accounts, tokens, cost)
        if grant is None:
            [grant] = self._ask(worker, [claim])
            if not grant.reason:
                slices.count(self.accounts, tokens, cost)
        if not grant.reason:
            holds = [held(claim, who, grant, place, name) for place, who in enumerate(self.accounts)]
            self.running.append((name, holds))
            self.requests += 1
            self.tokens += holds[0].tokens_held
        return grant

    def background(self, worker: int) -> None:
        self.slices[self.workers[worker]].look()
        if self.slices[self.workers[worker]].due:
            self._ask(worker, [])

    def _ask(self, worker: int, claims: Sequence[Claim]) -> list[Grant]:
        slices, accounts = self.slices[self.workers[worker]], list(self.accounts)
        asked_at = slices.now()
        wishes = slices.wishes(self.workers[worker], accounts, {one.subject: at for at, one in enumerate(accounts)})
        grants, ahead = self.model.answer(self.batch(worker, claims)._replace(wishes=wishes))
        slices.told(KEYS, asked_at)
        slices.entered(accounts, wishes, ahead, asked_at)
        return grants

    def die(self, worker: int) -> None:
        super().die(worker)
        self.slices[self.workers[worker]] = self._new()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("calls"), st.integers(0, 2), st.integers(1, 40), st.integers(0, 30), st.integers(0, 30)),
        st.tuples(st.just("calls"), st.integers(0, 2), st.integers(1, 9), st.integers(0, 150), st.integers(0, 60)),
        st.tuples(st.just("background"), st.integers(0, 2)),
        st.tuples(st.just("finish"), st.integers(0, 9), PART, st.just(10)),
        st.tuples(st.just("pass_time"), st.integers(0, 120)),
        st.tuples(st.just("pass_time"), st.sampled_from([-DAY, -1500, -1, 4000, DEAD_AFTER + 1, DAY])),
        st.tuples(st.just("die"), st.integers(0, 2)),
    ),
    max_size=40,
)
WIDER = st.builds(
    lambda who, times: who._replace(
        request_capacity=who.request_capacity * times,
        token_capacity=who.token_capacity * times,
        max_parallel=None if who.max_parallel is None else who.max_parallel * times,
        budget=None if who.budget is None else who.budget * times,
    ),
    LIMITS,
    st.sampled_from([1, 20, 200]),
)


@settings(max_examples=400, deadline=None)
@given(WIDER, STEPS)
def test_no_bound_moves(who: Account, steps: list[tuple[Any, ...]]) -> None:
    world = AheadWorld(who)
    for step in steps:
        run(world, [step])
        world.check_bounds()


@settings(max_examples=100, deadline=None)
@given(WIDER, STEPS)
def test_at_the_end_nothing_is_held(who: Account, steps: list[tuple[Any, ...]]) -> None:
    world = AheadWorld(who)
    run(world, steps)
    world.end()
    state = world.model.states.get(who.subject)
    if state is not None:
        assert (state.slots, state.reserved, state.requests_ahead, state.tokens_ahead) == (0, 0, 0, 0)
        assert all(replace(hold) == Hold() for hold in world.model.holds[who.subject].values())

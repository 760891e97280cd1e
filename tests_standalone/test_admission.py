"""Callers in, one round trip for all that wait; what a call holds is given back exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from gateway.admission import Admission, AdmissionMetrics
from gateway.allowances import Allowances
from gateway.auth import Auth
from gateway.caller import Caller, KeyLimits
from gateway.compose_limits import DatabaseBook
from gateway.errors import (
    DatabaseUnavailable,
    PermissionDenied,
    QuotaExceeded,
    RateLimited,
    Unauthenticated,
    Unavailable,
)
from gateway.key_watch import KeyWatch
from gateway.limits import Account, Batch, Settlement, Verdict
from gateway.limits_memory import MemoryBook
from gateway.pulse import Pulse
from gateway.slices import GOOD_SECONDS
from gateway.store import keys, limits
from gateway.store.database import Database
from gateway.tickets import Demand, Ticket
from tests_standalone.conftest import rows, settle, stored_key

ANN = Caller("ann")


class Line:
    """The book in the database behind a line that a test can hold up, break, or cut after the work is done."""

    def __init__(self, database: Database) -> None:
        self._book = DatabaseBook(database)
        self.is_cut = False
        self._open = asyncio.Event()
        self._open.set()
        self.down = False
        self.lose_answers = 0
        self.forgets = False
        self.batches: list[Batch] = []
        self.held_up: Batch | None = None

    def hold(self) -> None:
        self._open.clear()
        self.held_up = None

    def let_go(self) -> None:
        self._open.set()

    async def admit(self, batch: Batch) -> Verdict:
        if batch.claims or batch.settlements:
            self.batches.append(batch)
        self.held_up = batch
        await self._open.wait()
        if self.down:
            raise DatabaseUnavailable("told to be down")
        if self.forgets:
            batch = batch._replace(accounts=[account._replace(seed=None) for account in batch.accounts])
        verdict = await self._book.admit(batch)
        if self.lose_answers and batch.claims:
            self.lose_answers -= 1
            raise DatabaseUnavailable("the answer was lost")
        return verdict

    async def sweep(self, worker: str) -> None:
        await self._book.sweep(worker)


class Stand:
    """Admission as the application has it, over a database or in memory."""

    def __init__(
        self,
        database: Database,
        default: KeyLimits,
        *,
        memory: bool = False,
        allow: bool = False,
        gateway_budget: int | None = None,
        metrics: AdmissionMetrics | None = None,
    ) -> None:
        self.database = database
        self.watch = KeyWatch(database)
        self.auth = Auth(database, self.watch, mode="keys")
        self.line = Line(database)
        self.seeds: list[str] = []
        self.seed = 0
        book = MemoryBook() if memory else self.line
        self.now = 1000.0
        self.pulse = Pulse(lambda: self.now)
        self.admission = Admission(
            Allowances(default, gateway_budget),
            self.auth,
            self.watch,
            book,
            self._spent,
            metrics,
            allow_unpriced=allow,
            pulse=self.pulse,
        )

    async def _spent(self, account: Account, caller: Caller) -> int:
        self.seeds.append(account.subject)
        return self.seed

    async def admit(self, tokens: int = 0, cost: int | None = 0, caller: Caller = ANN) -> Ticket:
        return await self.admission.admit(caller, None, lambda priced: Demand(tokens, cost))

    def live_on(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.pulse.said(self.pulse.name)

    def give_back(self, ticket: Ticket, tokens: int = 0, cost: int | None = 0) -> None:
        self.admission.release(self.admission.settle(ticket, tokens, cost))

    async def held(self) -> list[tuple[int, int, int]]:
        return await rows(self.database, "SELECT slots, tokens, cost_nanousd FROM limit_holds WHERE slots > 0")


@pytest.fixture(params=["memory", "database"])
async def make(request: pytest.FixtureRequest, migrated: Database) -> AsyncIterator[Callable[[KeyLimits], Stand]]:
    made: list[Stand] = []

    def one(default: KeyLimits, *, allow: bool = False) -> Stand:
        made.append(Stand(migrated, default, memory=request.param == "memory", allow=allow))
        return made[-1]

    yield one
    for stand in made:
        stand.line.let_go()
        await stand.admission.aclose()


@pytest.fixture
async def stand(migrated: Database) -> AsyncIterator[Stand]:
    """Three slots, in the database."""
    found = Stand(migrated, KeyLimits(max_parallel=3))
    yield found
    found.line.let_go()
    await found.admission.aclose()


Make = Callable[..., Stand]


async def test_as_many_are_let_in_as_there_are_slots_and_one_that_is_over_makes_room(make: Make) -> None:
    stand = make(KeyLimits(max_parallel=2))
    first = await stand.admit()
    await stand.admit()
    with pytest.raises(RateLimited):
        await stand.admit()

    stand.give_back(first)
    await stand.admit()
    with pytest.raises(RateLimited):
        await stand.admit()


async def test_a_ticket_gives_back_once(make: Make) -> None:
    stand = make(KeyLimits(max_parallel=1))
    ticket = await stand.admit()
    for _ in range(3):
        stand.give_back(ticket)
    await stand.admit()
    with pytest.raises(RateLimited):
        await stand.admit()


async def test_tokens_are_settled_by_what_was_used(make: Make) -> None:
    stand = make(KeyLimits(tokens_per_minute=100))
    ticket = await stand.admit(tokens=100)
    with pytest.raises(RateLimited) as refused:
        await stand.admit(tokens=50)
    assert refused.value.type == "tokens"

    stand.give_back(ticket, tokens=40)
    await stand.admit(tokens=60)
    with pytest.raises(RateLimited):
        await stand.admit(tokens=10)


async def test_a_budget_is_reserved_and_then_spent(make: Make) -> None:
    stand = make(KeyLimits(budget_nanousd=100, budget_period="total"))
    ticket = await stand.admit(cost=80)
    with pytest.raises(QuotaExceeded):
        await stand.admit(cost=30)
    stand.give_back(ticket, cost=50)
    await stand.admit(cost=50)
    with pytest.raises(QuotaExceeded):
        await stand.admit(cost=1)


async def test_a_cost_that_nobody_knows_is_what_was_reserved(make: Make) -> None:
    stand = make(KeyLimits(budget_nanousd=100, budget_period="total"))
    stand.give_back(await stand.admit(cost=80), cost=None)
    with pytest.raises(QuotaExceeded):
        await stand.admit(cost=21)
    await stand.admit(cost=20)


async def test_what_a_budget_has_cost_before_is_asked_once(make: Make) -> None:
    stand = make(KeyLimits(budget_nanousd=100, budget_period="month"))
    stand.seed = 70
    with pytest.raises(QuotaExceeded):
        await stand.admit(cost=31)
    await stand.admit(cost=30)
    assert stand.seeds == ["user:ann"]


async def test_a_budget_that_a_key_gets_later_begins_with_what_it_has_cost(migrated: Database) -> None:
    stand = Stand(migrated, KeyLimits(requests_per_minute=600), gateway_budget=10**9)
    caller = Caller("ann", "key_1")
    await stand.admit(cost=1, caller=caller)
    stand.seed = 70
    caller = Caller("ann", "key_1", limits=KeyLimits(budget_nanousd=100, budget_period="total"))
    with pytest.raises(QuotaExceeded):
        await stand.admit(cost=31, caller=caller)
    assert stand.seeds == ["gateway", "key:key_1"]
    await stand.admission.aclose()


class Told:
    """What metrics are told."""

    def __init__(self) -> None:
        self.amounts: list[tuple[int, int]] = []

    def admitted(self, seconds: float) -> None: ...

    def refused(self, reason: str) -> None: ...

    def reserved(self, tokens: int, nanousd: int) -> None:
        self.amounts.append((tokens, nanousd))

    def settled(self, tokens: int, nanousd: int) -> None:
        self.amounts.append((tokens, nanousd))


@pytest.mark.parametrize(
    ("limits", "cost", "amounts"),
    [
        (KeyLimits(max_parallel=1), 7, [(0, 0), (0, 0)]),
        (KeyLimits(tokens_per_minute=100), 7, [(50, 0), (5, 0)]),
        (KeyLimits(budget_nanousd=100, budget_period="total"), 7, [(0, 80), (0, 7)]),
        (KeyLimits(budget_nanousd=100, budget_period="total"), None, [(0, 80), (0, 80)]),
    ],
)
async def test_metrics_count_what_is_limited(
    migrated: Database, limits: KeyLimits, cost: int | None, amounts: list[tuple[int, int]]
) -> None:
    told = Told()
    stand = Stand(migrated, limits, metrics=told)
    stand.give_back(await stand.admit(tokens=50, cost=80), 5, cost)
    await stand.admission.aclose()
    assert told.amounts == amounts


async def test_a_budget_whose_period_is_changed_and_changed_back_forgets_nothing(make: Make) -> None:
    stand = make(KeyLimits())
    per = [
        Caller("ann", "key_1", limits=KeyLimits(budget_nanousd=100, budget_period=period))
        for period in ("total", "day", "total")
    ]
    stand.give_back(await stand.admit(cost=60, caller=per[0]), cost=60)
    stand.seed = 60  # as the rows say from now on
    for caller in per:
        with pytest.raises(QuotaExceeded):
            await stand.admit(cost=41, caller=caller)
    assert stand.seeds == ["key:key_1"] * 3


async def test_a_budget_whose_period_others_keep_changing_is_no_rate_limit(stand: Stand) -> None:
    """Whenever this worker knows what has been spent, another has changed the period again."""
    stand.line.forgets = True
    caller = Caller("ann", "key_1", limits=KeyLimits(budget_nanousd=100, budget_period="day"))
    with pytest.raises(Unavailable):
        await stand.admit(cost=1, caller=caller)
    stand.line.forgets = False
    await stand.admit(cost=1, caller=caller)


async def test_callers_of_one_moment_share_the_sum_of_a_budget(make: Make) -> None:
    stand = make(KeyLimits(budget_nanousd=100, budget_period="total"))
    stand.seed = 70
    told = await asyncio.gather(*(stand.admit(cost=20) for _ in range(20)), return_exceptions=True)
    assert sorted(type(found).__name__ for found in told) == ["QuotaExceeded"] * 19 + ["Ticket"]
    assert len(stand.seeds) <= 2


async def test_limits_that_were_changed_hold_for_the_call_that_learns_of_it(stand: Stand) -> None:
    key = stored_key(max_parallel=5)
    await keys.add(stand.database, key)
    state = await stand.watch.state()
    caller = Caller("ann", key.id, limits=KeyLimits(max_parallel=5), revision=state.revision, digest=key.digest)
    await stand.admit(caller=caller)
    await keys.update(stand.database, key.id, lambda known: replace(known, max_parallel=1))

    with pytest.raises(RateLimited):
        await stand.admit(caller=caller)
    assert await stand.held() == [(1, 0, 0)]


async def test_a_model_without_a_price_is_refused_under_a_budget_and_the_message_says_what_to_do(make: Make) -> None:
    stand = make(KeyLimits(budget_nanousd=100, budget_period="total"))
    with pytest.raises(PermissionDenied, match=r"models\.NAME\.price.*budgets\.allow_unpriced") as refused:
        await stand.admit(cost=None)
    assert refused.value.code == "price_unknown"
    await make(KeyLimits(budget_nanousd=100, budget_period="total"), allow=True).admit(cost=None)


async def test_nothing_is_estimated_where_nothing_depends_on_it(make: Make) -> None:
    asked: list[bool] = []

    def estimate(priced: bool) -> Demand:
        asked.append(priced)
        return Demand(1, 1)

    await make(KeyLimits(requests_per_minute=60, max_parallel=3)).admission.admit(ANN, None, estimate)
    assert asked == []
    await make(KeyLimits(tokens_per_minute=60)).admission.admit(ANN, None, estimate)
    assert asked == [False]


async def test_the_reply_is_told_what_is_left(make: Make) -> None:
    ticket = await make(KeyLimits(requests_per_minute=60)).admit()
    told = dict(ticket.headers)
    assert (told[b"x-ratelimit-limit-requests"], told[b"x-ratelimit-remaining-requests"]) == (b"60", b"59")


async def test_callers_of_one_moment_share_a_round_trip(stand: Stand) -> None:
    stand.line.hold()
    first = asyncio.create_task(stand.admit())
    await settle()
    others = [asyncio.create_task(stand.admit()) for _ in range(10)]
    await settle()
    stand.line.let_go()

    told = await asyncio.gather(first, *others, return_exceptions=True)
    assert [type(found) for found in told] == [Ticket] * 3 + [RateLimited] * 8
    assert [len(batch.claims) for batch in stand.line.batches] == [1, 10]


async def test_who_stops_waiting_gives_back_what_was_granted_meanwhile(stand: Stand) -> None:
    stand.line.hold()
    tasks = [asyncio.create_task(stand.admit()) for _ in range(3)]
    await settle()
    for task in tasks[1:]:
        task.cancel()
    await settle()
    stand.line.let_go()
    await tasks[0]
    await asyncio.gather(*(stand.admit() for _ in range(2)))
    with pytest.raises(RateLimited):
        await stand.admit()


async def test_who_is_cancelled_with_the_answer_in_hand_gives_it_back(stand: Stand) -> None:
    for _ in range(50):
        task = asyncio.create_task(stand.admit())
        while not stand.line.batches:
            await asyncio.sleep(0)
        task.cancel()
        told = await asyncio.gather(task, return_exceptions=True)
        if isinstance(told[0], Ticket):
            stand.give_back(told[0])
        stand.line.batches.clear()
    await asyncio.gather(*(stand.admit() for _ in range(3)))
    with pytest.raises(RateLimited):
        await stand.admit()


async def test_a_failure_reaches_all_who_wait_and_the_next_caller_asks_again(stand: Stand) -> None:
    stand.line.hold()
    stand.line.down = True
    tasks = [asyncio.create_task(stand.admit()) for _ in range(3)]
    await settle()
    tasks += [asyncio.create_task(stand.admit()) for _ in range(3)]
    stand.line.let_go()
    told = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(failure) for failure in told] == [DatabaseUnavailable] * 6

    stand.line.down = False
    await stand.admit()


async def test_what_a_lost_answer_may_have_taken_is_held_by_a_name_that_nobody_keeps_alive(stand: Stand) -> None:
    running = await stand.admit()
    stand.line.lose_answers = 1
    with pytest.raises(DatabaseUnavailable):
        await stand.admit()
    await stand.admit()

    names = await rows(stand.database, "SELECT worker, slots FROM limit_holds ORDER BY slots")
    assert [slots for _, slots in names] == [1, 2]
    assert {name for name, _ in names} == {*stand.admission.names, running.holds[0].worker}
    stand.give_back(running)
    assert running.holds == ()
    assert [name for name, slots in names if slots == 1] == stand.admission.names


async def test_a_worker_that_dies_gives_its_slots_to_others(stand: Stand) -> None:
    await asyncio.gather(*(stand.admit() for _ in range(3)))
    [name] = stand.admission.names
    other = Stand(stand.database, KeyLimits(max_parallel=3))
    with pytest.raises(RateLimited):
        await other.admit()

    await stand.database.write([("UPDATE workers SET seen_at = seen_at - 20000 WHERE id = $1", [(name,)])])
    with pytest.raises(RateLimited):  # who has not lived long enough to judge
        await other.admit()
    other.live_on(16)
    await other.admit()
    await other.admission.aclose()


async def test_a_worker_that_stood_still_goes_on_under_another_name(stand: Stand) -> None:
    """What it held may have been taken back, so what ends under the old name must free nothing of the new one."""
    old = await stand.admit()
    stand.line.hold()
    on_its_way = asyncio.create_task(stand.admit())
    await settle()
    stand.now += 16
    stand.line.let_go()
    await on_its_way
    new = await stand.admit()
    assert old.holds[0].worker != new.holds[0].worker == stand.pulse.name
    assert not stand.pulse.is_steady


async def test_of_one_key_calls_with_and_without_an_end_user_in_one_batch(stand: Stand) -> None:
    limits = KeyLimits(max_parallel=1, budget_nanousd=100, budget_period="total", per_end_user=True)
    caller = Caller("ann", "key_1", limits=limits)

    async def admit(end_user: str | None) -> Ticket:
        return await stand.admission.admit(caller, end_user, lambda priced: Demand(1, 1))

    stand.line.hold()
    tasks = [asyncio.create_task(admit(None))]
    await settle()
    tasks += [asyncio.create_task(admit(name)) for name in ("bob", None, "eve")]
    await settle()
    stand.line.let_go()
    told = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in told] == [Ticket, Ticket, RateLimited, Ticket]


async def test_a_revoked_key_is_refused_by_the_statement_that_would_let_it_in(migrated: Database) -> None:
    key = stored_key(max_parallel=1)
    await keys.add(migrated, key)
    stand = Stand(migrated, KeyLimits())
    state = await stand.watch.state()
    caller = Caller("ann", key.id, limits=KeyLimits(max_parallel=1), revision=state.revision, digest=key.digest)
    stand.give_back(await stand.admit(caller=caller))

    await keys.revoke(migrated, key.id, 1)
    with pytest.raises(Unauthenticated):
        await stand.admit(caller=caller)
    await stand.admission.aclose()
    assert await stand.held() == []


async def test_settlements_ride_with_a_turn(stand: Stand) -> None:
    tickets = [await stand.admit() for _ in range(3)]
    written = stand.admission.settle(tickets[0], 5, 7)
    await stand.database.write([limits.settlement_step(written)])
    await stand.admit()
    with pytest.raises(RateLimited):
        await stand.admit()
    assert await rows(stand.database, "SELECT COUNT(*) FROM limit_settlements") == [(0,)]


# --- what is held ahead


@pytest.fixture
async def busy(migrated: Database) -> AsyncIterator[Stand]:
    """So many calls that some of the next ones need not ask."""
    found = Stand(migrated, KeyLimits(requests_per_minute=100_000, max_parallel=1000))
    for _ in range(10):
        found.give_back(await found.admit())
    yield found
    found.line.let_go()
    await found.admission.aclose()


async def test_a_busy_worker_lets_calls_in_without_asking(busy: Stand) -> None:
    busy.line.batches.clear()
    busy.line.hold()
    ticket = await busy.admit()
    assert [held.slots for held in ticket.holds] == [1]
    assert b"x-ratelimit-remaining-requests" in dict(ticket.headers)
    busy.line.let_go()


async def test_a_database_that_closes_its_connections_lets_in_nobody(busy: Stand) -> None:
    await busy.admit()
    busy.line.is_cut = busy.line.down = True
    with pytest.raises(DatabaseUnavailable):
        await busy.admit()
    busy.line.is_cut = busy.line.down = False


async def test_a_silent_database_lets_in_nobody_for_long(busy: Stand) -> None:
    await busy.admit()
    busy.line.down = True
    await asyncio.sleep(GOOD_SECONDS)
    with pytest.raises(DatabaseUnavailable):
        await busy.admit()
    busy.line.down = False
    await busy.admit()


async def test_for_calls_that_are_refused_nothing_is_held_ahead(migrated: Database) -> None:
    """Nor of the budget of all, because of one key that goes on and on."""
    tight = Stand(migrated, KeyLimits(max_parallel=1), gateway_budget=10**9)
    await tight.admit(cost=5)
    for _ in range(20):
        with pytest.raises(RateLimited):
            await tight.admit(cost=5)
    assert await rows(migrated, "SELECT cost_nanousd FROM limit_holds WHERE subject = 'gateway'") == [(5,)]
    await tight.admission.aclose()


async def test_what_is_held_ahead_goes_back_when_nobody_calls_any_more(busy: Stand) -> None:
    assert await busy.held() != []
    while await busy.held():
        await asyncio.sleep(GOOD_SECONDS)


async def test_and_when_the_worker_ends(busy: Stand) -> None:
    ticket = await busy.admit()
    await busy.admission.aclose()
    assert await busy.held() == [(1, 0, 0)]
    assert len(ticket.holds) == 1


async def test_and_what_is_lent_while_it_ends(busy: Stand) -> None:
    """The first loan is on its way: so far nothing is held ahead that could go back."""
    tasks: list[asyncio.Task[Ticket]] = []
    while True:
        while await rows(busy.database, "SELECT 1 FROM limit_holds WHERE requests_ahead > 0"):
            await asyncio.sleep(GOOD_SECONDS)
        for _ in range(2):
            tasks.append(asyncio.create_task(busy.admit()))
            await tasks[-1]
        busy.line.hold()
        tasks.append(asyncio.create_task(busy.admit()))
        await settle()
        if busy.line.held_up is not None and any(wish.requests > 0 for wish in busy.line.held_up.wishes):
            break
        busy.line.let_go()
    closing = asyncio.create_task(busy.admission.aclose())
    await settle()
    busy.line.let_go()
    await closing
    await asyncio.gather(*tasks)
    held = await rows(busy.database, "SELECT slots, requests_ahead FROM limit_holds WHERE slots > 0")
    assert held == [(len(tasks), 0)]


async def test_a_book_that_answers_nothing_does_not_keep_it_from_ending(busy: Stand) -> None:
    busy.line.hold()
    busy.admission.release([Settlement("key:a", "w", 0, 0, 0, 0, 0, 0)])
    await settle()
    await busy.admission.aclose()
    await settle()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "admission"]


async def test_two_calls_for_more_than_a_column_holds_harm_nobody_else(migrated: Database) -> None:
    rich = Stand(migrated, KeyLimits(budget_nanousd=10**18, budget_period="total"))
    await rich.admit(cost=1)
    other = Caller("bob", "key_b", limits=KeyLimits(max_parallel=1))
    rich.line.hold()
    first = asyncio.create_task(rich.admit(cost=2))
    await settle()
    odd = [asyncio.create_task(rich.admit(cost=10**30)) for _ in range(2)]
    innocent = asyncio.create_task(rich.admit(caller=other))
    await settle()
    rich.line.let_go()
    told = await asyncio.gather(first, *odd, innocent, return_exceptions=True)
    assert [type(found) for found in told] == [Ticket, QuotaExceeded, QuotaExceeded, Ticket]
    await rich.admission.aclose()


async def test_after_an_answer_that_was_lost_what_was_held_ahead_counts_no_more(busy: Stand) -> None:
    busy.line.down = True
    await asyncio.sleep(GOOD_SECONDS)
    with pytest.raises(DatabaseUnavailable):
        await busy.admit()
    busy.line.down = False
    before = busy.pulse.names
    ticket = await busy.admit()
    assert [held.worker for held in ticket.holds] == busy.pulse.names
    assert len(before) == 1


async def test_a_call_without_limits_is_proof_that_the_database_answers_for_a_moment(migrated: Database) -> None:
    free = Stand(migrated, KeyLimits())
    await free.admit()
    free.line.down = True
    await free.admit()
    await asyncio.sleep(GOOD_SECONDS)
    with pytest.raises(DatabaseUnavailable):
        await free.admit()
    await free.admission.aclose()

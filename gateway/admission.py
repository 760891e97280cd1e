"""What a call needs before it goes out, taken by all waiting callers of a worker in one round trip.

That is its place in the buckets, the slots and the budgets (`limits`), and the proof that its key still holds and that
the database answers: no upstream is called for a turn that could not be recorded. A worker that is alone on SQLite
keeps the book in its memory and asks nobody; a busy one holds some ahead (`slices`) and asks in the background.

- What a call holds is settled with its turn, in the ledger's transaction; here only for a call that leaves no turn.
- Whoever stops waiting gives back what was granted meanwhile.
- The worker says every few seconds that it lives. One that could not for too long takes another name: what it held has
  been taken back, and what it is settled under the old name frees nothing twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from gateway.allowances import Allowance, Allowances, refusal
from gateway.auth import Auth
from gateway.caller import Caller
from gateway.errors import DatabaseUnavailable, PermissionDenied, Unavailable
from gateway.key_watch import KeyWatch
from gateway.limits import BEAT_EVERY, Account, Batch, Claim, Settlement, Verdict, summed
from gateway.limits_memory import MemoryBook
from gateway.pulse import Pulse
from gateway.slices import GOOD_SECONDS, Slices
from gateway.store.keys import KeyState
from gateway.tickets import NOTHING, Demand, Offer, Ticket, claim_of, most, ticket_for

log = logging.getLogger("gateway.admission")

MOST_CLAIMS = 500
ATTEMPTS = 5
SWEEP_SECONDS = 60.0
CLOSING_SECONDS = 2.0


class AdmissionMetrics(Protocol):
    """Who is told how calls are let in. `reason` is that of a `Grant`; seconds are those that a caller waited."""

    def admitted(self, seconds: float) -> None: ...

    def refused(self, reason: str) -> None: ...

    def reserved(self, tokens: int, nanousd: int) -> None: ...

    def settled(self, tokens: int, nanousd: int) -> None: ...


class Book(Protocol):
    """Where limits are counted for all workers. Both methods raise DatabaseUnavailable."""

    @property
    def is_cut(self) -> bool:
        """May it be gone, whatever it said a moment ago?"""

    async def admit(self, batch: Batch) -> Verdict: ...

    async def sweep(self, worker: str) -> None:
        """Puts away what is over. Called now and then."""


@dataclass(slots=True)
class _Waiting:
    """A caller that waits for its grant. `accounts` are those of its claim."""

    demand: Demand
    accounts: Sequence[Account]
    answer: asyncio.Future[Offer]


class Admission:
    """One for each worker. `spent` tells what an account's present period has cost, for one that is new to the book."""

    def __init__(
        self,
        allowances: Allowances,
        auth: Auth,
        watch: KeyWatch,
        book: Book | MemoryBook,
        spent: Callable[[Account, Caller], Awaitable[int]],
        metrics: AdmissionMetrics | None = None,
        *,
        allow_unpriced: bool = False,
        pulse: Pulse | None = None,
    ) -> None:
        self._allowances = allowances
        self._auth = auth
        self._watch = watch
        self._book = book
        self._spent = spent
        self._metrics = metrics
        self._allow_unpriced = allow_unpriced
        self._sums: dict[tuple[str, str], asyncio.Future[int]] = {}
        self._waiting: list[_Waiting] = []
        self._released: list[Settlement] = []
        self._running: asyncio.Task[None] | None = None
        self._pulse = pulse or Pulse()
        self._slices = Slices()
        self._looking: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        if not isinstance(self._book, MemoryBook):
            self._beating = asyncio.create_task(self._keep_beating(self._book), name="admission")

    async def aclose(self) -> None:
        """Gives back what is held ahead, that too which an exchange on its way is lent. What a silent database does not
        take comes back like that of a killed worker."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait({self._beating})
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_SECONDS):
                await self._at_rest()
                self._slices.give_up()
                if self._released or self._slices.due:
                    self._ensure_running()
                await self._at_rest()
        if self._looking is not None:
            self._looking.cancel()
        if self._running is not None:
            self._running.cancel()

    # --- calls

    async def admit(self, caller: Caller, end_user: str | None, estimate: Callable[[bool], Demand]) -> Ticket:
        """Lets a call in. `estimate(cost)` is asked only where something depends on it. Raises RateLimited,
        QuotaExceeded, PermissionDenied, Unauthenticated, Unavailable."""
        started = time.perf_counter()
        allowance = self._allowances.of(caller, end_user)
        demand = self._demand(allowance, estimate)
        ticket = self._at_once(caller, allowance.accounts, demand)
        if ticket is None:
            ticket = await self._asked(caller, end_user, estimate, allowance.accounts, demand)
        if self._metrics is not None:
            self._metrics.admitted(time.perf_counter() - started)
            self._metrics.reserved(*most(ticket.holds))
        return ticket

    def _at_once(self, caller: Caller, accounts: Sequence[Account], demand: Demand) -> Ticket | None:
        """What needs no round trip: of the book in memory, or of what is held ahead. None: something is in the way."""
        book = self._book
        if isinstance(book, MemoryBook):
            grant = book.admit_one(accounts, demand.tokens, demand.cost or 0)
            return None if grant.reason else ticket_for("", demand, accounts, grant)
        keys = self._slices.keys
        if book.is_cut or (keys is not None and keys.revision != caller.revision):
            return None
        return self._held_ahead(accounts, demand)

    async def _asked(
        self,
        caller: Caller,
        end_user: str | None,
        estimate: Callable[[bool], Demand],
        accounts: Sequence[Account],
        demand: Demand,
    ) -> Ticket:
        """What the book says; for a caller whose keys have changed, of what it asks as they stand by now."""
        for _ in range(ATTEMPTS):
            offer = await self._offer(accounts, demand)
            if not offer.grant.reason and (offer.state is None or offer.state.revision == caller.revision):
                break
            for _ in offer.accounts:
                if offer.grant.reason == "seed":
                    offer = await self._offer(await self._seeded(offer, caller), demand)
            if offer.state is None or offer.state.revision == caller.revision:
                renewed = caller
            else:
                renewed = await self._renewed(caller, offer, offer.state)
            if renewed.limits == caller.limits and offer.grant.reason != "seed":
                break
            self.release(self.settle(offer.ticket, 0, 0))
            caller, allowance = renewed, self._allowances.of(renewed, end_user)
            accounts, demand = allowance.accounts, self._demand(allowance, estimate)
        else:
            raise Unavailable("The limits of this call are changing. Try again in a moment.", retry_after=1)
        if offer.grant.reason:
            raise self._refusal(offer)
        return offer.ticket

    def _refusal(self, offer: Offer) -> Exception:
        grant = offer.grant
        if self._metrics is not None:
            self._metrics.refused(grant.reason)
        told = {name.decode(): value.decode() for name, value in offer.ticket.headers}
        return refusal(grant, offer.accounts[grant.at], told)

    @property
    def names(self) -> list[str]:
        """Those under which this worker holds something, or will."""
        return self._pulse.names

    def settle(self, ticket: Ticket, tokens: int, cost: int | None) -> list[Settlement]:
        """What is to be written with the call's turn. `cost` None: nobody knows, so it is what was reserved. A ticket
        that is settled holds nothing any more."""
        holds, ticket.holds = ticket.holds, ()
        if not holds:
            return []
        if self._metrics is not None:
            counted, reserved = most(holds)
            self._metrics.settled(tokens if counted else 0, reserved if cost is None else cost if reserved else 0)
        if isinstance(self._book, MemoryBook):
            for hold in holds:
                self._book.settle_one(hold, tokens, hold.cost_held if cost is None else cost)
            return []
        self._pulse.left(holds[0].worker)
        settled = []
        for subject, worker, slots, held, _, cost_held, _, period in holds:
            spent = cost_held if cost is None else cost
            settled.append(Settlement(subject, worker, slots, held, tokens, cost_held, spent, period))
        return settled

    def release(self, settlements: Sequence[Settlement]) -> None:
        """Enters settlements that no turn takes along."""
        if settlements:
            self._released += settlements
            self._ensure_running()

    async def _offer(self, accounts: Sequence[Account], demand: Demand) -> Offer:
        """Of the book itself."""
        if isinstance(self._book, MemoryBook):
            grant = self._book.admit_one(accounts, demand.tokens, demand.cost or 0)
            return Offer(grant, ticket_for("", demand, accounts, grant), accounts)
        return await self._granted(demand, accounts)

    async def _seeded(self, offer: Offer, caller: Caller) -> list[Account]:
        """The same accounts, with what that budget has cost which refused. Callers of one moment share the sum."""
        accounts, place = list(offer.accounts), offer.grant.at
        which = (accounts[place].subject, accounts[place].period)
        if which not in self._sums:
            self._sums[which] = asyncio.ensure_future(self._spent(accounts[place], caller))
            self._sums[which].add_done_callback(lambda _: self._sums.pop(which))
        accounts[place] = accounts[place]._replace(seed=await asyncio.shield(self._sums[which]))
        return accounts

    def _demand(self, allowance: Allowance, estimate: Callable[[bool], Demand]) -> Demand:
        if not allowance.counted:
            return NOTHING
        demand = estimate(allowance.priced)
        if demand.cost is not None:
            return demand
        if self._allow_unpriced:
            return Demand(demand.tokens, 0)
        raise PermissionDenied(
            "There is a budget, and nobody knows what this model costs, so the call cannot be held to it. Give the "
            "model a price (models.NAME.price in the configuration), or allow such calls (budgets.allow_unpriced).",
            param="model",
            code="price_unknown",
        )

    async def _renewed(self, caller: Caller, offer: Offer, state: KeyState) -> Caller:
        """The caller as the keys stand by now: the statement that decided has also told that they have changed. What it
        holds goes back if it may not call any more."""
        try:
            return await self._auth.again(caller, state)
        except BaseException:
            self.release(self.settle(offer.ticket, 0, 0))
            raise

    # --- ahead

    def _held_ahead(self, accounts: Sequence[Account], demand: Demand) -> Ticket | None:
        name = self._pulse.name
        grant = self._slices.take(name, accounts, demand.tokens, demand.cost or 0)
        if grant is None:
            return None
        if self._slices.due:
            self._ensure_running()
        ticket = ticket_for(name, demand, accounts, grant)
        if ticket.holds:
            self._pulse.entered(name)
        return ticket

    def _look_after_slices(self) -> None:
        """What nobody takes goes back."""
        self._looking = None
        self._slices.look()
        if self._slices.due:
            self._ensure_running()
        self._keep_looking()

    def _keep_looking(self) -> None:
        if self._looking is None and len(self._slices):
            self._looking = asyncio.get_running_loop().call_later(GOOD_SECONDS, self._look_after_slices)

    # --- batches

    async def _granted(self, demand: Demand, accounts: Sequence[Account]) -> Offer:
        if self._loop is None:  # asking asyncio for it costs a system call each time
            self._loop = asyncio.get_running_loop()
        waiting = _Waiting(demand, accounts, self._loop.create_future())
        self._waiting.append(waiting)
        self._ensure_running()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if waiting.answer.done() and not waiting.answer.cancelled() and waiting.answer.exception() is None:
                self.release(self.settle(waiting.answer.result().ticket, 0, 0))
            raise

    def _ensure_running(self) -> None:
        if self._running is None or self._running.done():
            assert not isinstance(self._book, MemoryBook)
            self._running = asyncio.get_running_loop().create_task(self._run(self._book), name="admission")

    async def _at_rest(self) -> None:
        while self._running is not None and not self._running.done():
            await asyncio.wait({self._running})

    async def _run(self, book: Book) -> None:
        while self._waiting or self._released or self._slices.due:
            batch, self._waiting = self._waiting[:MOST_CLAIMS], self._waiting[MOST_CLAIMS:]
            released, self._released = self._released, []
            try:
                await self._admit(book, batch, released)
            except BaseException as failure:
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(failure)
                if not isinstance(failure, Exception):
                    raise
                self._slices.forget()
                self._pulse.rename()  # it may have been done all the same: what this name then holds must not live on

    async def _admit(self, book: Book, batch: Sequence[_Waiting], released: Sequence[Settlement]) -> None:
        accounts: list[Account] = []
        places: dict[str, int] = {}
        claims: list[Claim] = []
        for waiting in batch:
            claims.append(claim_of(waiting.demand, waiting.accounts, accounts, places))
        self._pulse.check()
        name, asked_at = self._pulse.name, self._slices.now()
        wishes = self._slices.wishes(name, accounts, places)
        asked = Batch(
            name,
            accounts,
            claims,
            summed(released),
            beat=self._pulse.is_new,
            judge=self._pulse.is_steady,
            wishes=wishes,
        )
        verdict = await book.admit(asked)
        if asked.beat:  # nothing else says so to the others
            self._pulse.said(name)
        state = KeyState(verdict.revision, verdict.ever_made)
        self._watch.tell(state, asked_at)
        self._slices.told(state, asked_at)
        self._slices.entered(accounts, wishes, verdict.ahead, asked_at)
        for waiting, claim, grant in zip(batch, claims, verdict.grants, strict=True):
            if grant.reason:
                grant = grant._replace(at=claim.accounts.index(grant.at))
            asked_of = [accounts[place] for place in claim.accounts]  # others may know other limits of the same key
            ticket = ticket_for(name, waiting.demand, asked_of, grant)
            if ticket.holds:
                self._pulse.entered(name)
            if not grant.reason:
                self._slices.count(asked_of, claim.tokens, claim.cost)
            if waiting.answer.done():  # its caller has gone
                self._released += self.settle(ticket, 0, 0)
            else:
                waiting.answer.set_result(Offer(grant, ticket, asked_of, state))
        self._keep_looking()

    # --- signs of life

    async def _keep_beating(self, book: Book) -> None:
        swept = time.monotonic()
        while True:
            self._pulse.check()
            try:
                for name in self._pulse.names:
                    await book.admit(Batch(name, beat=True))
                    self._pulse.said(name)
                if time.monotonic() - swept > SWEEP_SECONDS:
                    swept = time.monotonic()
                    await book.sweep(self._pulse.name)
            except DatabaseUnavailable:
                self._pulse.stopped()
            except Exception:  # whatever it is, the worker must go on saying that it lives
                log.exception("saying that this worker lives failed")
                self._pulse.stopped()
            await asyncio.sleep(BEAT_EVERY / 1000)

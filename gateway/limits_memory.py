"""The book of a worker that is alone with its database: what `store.limits` does, without a round trip."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from gateway.limits import (
    UNIT,
    Account,
    Batch,
    Claim,
    Grant,
    Hold,
    Settlement,
    State,
    advance,
    decide,
    period_at,
    settle,
)

_Left = tuple[int | None, int | None]
"""Units of requests and of tokens, None where they are not limited."""

MOST_ACCOUNTS = 100_000
"""Beyond that, those that were used least recently and hold nothing are forgotten, which fills their buckets."""


def _now() -> int:
    return int(time.time() * 1000)


class MemoryBook:
    """Nobody else's calls are counted, and no worker dies but this one, with all of it."""

    def __init__(self, clock: Callable[[], int] = _now) -> None:
        self._clock = clock
        self._states: OrderedDict[str, State] = OrderedDict()

    def admit(self, batch: Batch) -> list[Grant]:
        now = self._clock() if batch.now is None else batch.now
        self.settle(batch.settlements)
        states = {account.subject: self._present(account, now) for account in batch.accounts}
        return [decide(claim, batch.accounts, states) for claim in batch.claims]

    def admit_one(self, accounts: Sequence[Account], tokens: int, cost: int) -> Grant:
        """The same of one claim on all of these accounts, which are of different subjects: of the usual one, that is
        granted. `admit` decides where something is new, or in the way."""
        now = self._clock()
        left: list[tuple[Account, State, _Left]] = []
        for account in accounts:
            state = self._states.get(account.subject)
            found = None if state is None else _left(state, account, now, tokens, cost)
            if state is None or found is None:
                [grant] = self.admit(Batch("", accounts, [Claim(tokens, cost, range(len(accounts)))], now=now))
                return grant
            left.append((account, state, found))
        periods: list[int] = []
        for account, state, found in left:
            self._states.move_to_end(account.subject)
            periods.append(_take(state, account, now, cost, found))
        requests_left, tokens_left = left[0][2] if left else (None, None)
        return Grant("", 0, 0, requests_left, tokens_left, periods)

    def settle_one(self, held: Settlement, tokens_used: int, cost: int) -> None:
        """`settle` of a call that held this, has used so many tokens and has cost so much."""
        subject, _, slots, tokens_held, _, cost_held, _, period = held
        state = self._states.get(subject)
        if state is None:
            return
        if period == state.period:
            state.spent += cost
        state.slots -= slots
        state.reserved -= cost_held
        if state.tokens is not None:
            state.tokens += (tokens_held - tokens_used) * UNIT

    def settle(self, settlements: Sequence[Settlement]) -> None:
        for one in settlements:
            state = self._states.get(one.subject)
            if state is not None:
                units = settle(state, Hold(one.slots, one.tokens_held, one.cost_held), one)
                if state.tokens is not None:
                    state.tokens += units

    def _present(self, account: Account, now: int) -> State:
        state = self._states.get(account.subject)
        if state is None:
            self._forget()
            state = self._states[account.subject] = State(now)
        self._states.move_to_end(account.subject)
        advance(state, account, now)
        return state

    def _forget(self) -> None:
        while len(self._states) >= MOST_ACCOUNTS:
            subject, state = self._states.popitem(last=False)
            if state.slots or state.reserved or state.period is not None:
                self._states[subject] = state
                return


def _left(state: State, account: Account, now: int, tokens: int, cost: int) -> _Left | None:
    """What a claim would leave of an account, which stays as it is. None: it is not as simple as that."""
    _, request_rate, request_capacity, token_rate, token_capacity, parallel, budget, period, _ = account
    elapsed = now - state.at
    if elapsed < 0 or (parallel is not None and state.slots >= parallel):
        return None
    if budget is not None and (state.spent + state.reserved + cost > budget or state.period != period_at(now, period)):
        return None
    requests_left = tokens_left = None
    if request_rate is not None:
        requests_left = _less(state.requests, elapsed * request_rate, request_capacity, UNIT)
        if requests_left is None:
            return None
    if token_rate is not None:
        tokens_left = _less(state.tokens, elapsed * token_rate, token_capacity, tokens * UNIT)
        if tokens_left is None:
            return None
    return requests_left, tokens_left


def _less(level: int | None, refill: int, capacity: int, wanted: int) -> int | None:
    """The level of a bucket that is refilled and then taken from; None if there is not enough."""
    if level is None:
        return None
    level += refill
    full = capacity * UNIT
    if level > full:
        level = full
    return level - wanted if level >= wanted else None


def _take(state: State, account: Account, now: int, cost: int, left: _Left) -> int:
    """Returns the budget's period."""
    requests_left, tokens_left = left
    if requests_left is not None:
        state.at, state.requests = now, requests_left
    if tokens_left is not None:
        state.at, state.tokens = now, tokens_left
    if account.max_parallel is not None:
        state.slots += 1
    if account.budget is None:
        return 0
    state.reserved += cost
    return state.period or 0

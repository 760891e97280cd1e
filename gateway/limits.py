"""What a call takes before it goes out and gives back when it is over: token buckets, slots, budgets. Pure: without a
clock or a database.

An account is one set of limits that count together: those of a key, of a user without one, of an end user behind a
key, of the whole gateway. A call asks one or more accounts at once and takes from all of them or from none.

- A bucket counts in `UNIT`ths of a request or a token, so that a rate per minute refills whole units every millisecond.
  It never holds more than its capacity. It may be in debt: tokens are taken by an upper bound and settled by what was
  used. A call that asks for more than the capacity takes a full bucket.
- Only what is limited is held: slots where `max_parallel` is set, tokens where a rate is, money where a budget is.
- What running calls hold (slots, reserved tokens and money) is kept for each worker, so that it comes back if the
  worker dies. What is settled after that was held by nobody any more: only what was used still counts.
- A worker may hold some of it ahead of its calls (`Wish`), so that not every call has to ask (`slices`): taken off the
  levels when it is lent, never more than an `AHEAD_SHARE`th of what is left. A bucket and what is held ahead of it are
  never more than its capacity together.
- A clock that is set back refills nothing. After more than `CLOCK_SET_BACK` its time is taken for the new one.
- A budget's period is told by the database's clock: `period_at`. The next one of a kind begins at 0; a budget that is
  new, or has another kind of period, begins with what the rows say (`seed`).

PostgreSQL does the same in `gateway_admit_2` (migrations); the tests hold it to this.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

UNIT = 60_000
CLOCK_SET_BACK = 1_000
"""Milliseconds. Transactions of one moment may see times that differ by less."""
BEAT_EVERY = 3_000
DEAD_AFTER = 15_000
"""Milliseconds between a worker's signs of life, and without one."""

AHEAD_SHARE = 16
"""A worker is lent at most a sixteenth of what is left, so there is plenty for the others."""

DAY = 24 * 60 * 60 * 1000
_KIND = 1_000_000
Period = Literal["day", "month", "total"]
Reason = Literal["", "seed", "budget", "requests", "tokens", "parallel"]
_NONE: Reason = ""
_STRENGTH: dict[Reason, int] = {"seed": 2, "budget": 1, "requests": 0, "tokens": 0, "parallel": 0}
"""Which of several refusals is told; of equal ones the one that takes longest."""


class Account(NamedTuple):
    """Limits that count together, by name. None: no such limit. Rates per minute, capacities in requests and tokens,
    money in nano-dollars. `seed`: what the period has cost so far, for a book that does not know; None: nobody has
    looked."""

    subject: str
    request_rate: int | None = None
    request_capacity: int = 0
    token_rate: int | None = None
    token_capacity: int = 0
    max_parallel: int | None = None
    budget: int | None = None
    period: Period = "total"
    seed: int | None = 0


class Claim(NamedTuple):
    """One call: how many tokens it may use at most, what they may cost, and which accounts (their places in a list) it
    asks."""

    tokens: int
    cost: int
    accounts: Sequence[int]


class Grant(NamedTuple):
    """What came of a claim. `reason` is empty if it was granted; else it names the limit of the account at `at` that
    refused, with the milliseconds after which it may be granted, if nobody else comes (0: unknown). `seed`: it is not
    known what the period of its budget has cost; ask again with a seed.

    `requests` and `tokens` are the levels of its first account in units, None without such a limit. `periods` are those
    of its accounts' budgets, 0 without one.
    """

    reason: Reason
    at: int
    wait: int
    requests: int | None
    tokens: int | None
    periods: Sequence[int]


class Settlement(NamedTuple):
    """A call that is over, for one account: what it held, and what it used. Tokens as they were claimed, money in
    nano-dollars; `period` is that of its grant."""

    subject: str
    worker: str
    slots: int
    tokens_held: int
    tokens_used: int
    cost_held: int
    cost: int
    period: int


class Wish(NamedTuple):
    """How a worker wants what it holds ahead of the account at `at` to change: more, or (negative) less. `used_...` is
    what its calls have taken of it since it asked last."""

    at: int
    requests: int = 0
    tokens: int = 0
    slots: int = 0
    cost: int = 0
    used_requests: int = 0
    used_tokens: int = 0


class Ahead(NamedTuple):
    """What came of a wish: how much more the worker holds ahead (nothing, if it wanted less: that is always done), and
    of the account its levels in units and its budget's period, as in a `Grant`."""

    requests: int
    tokens: int
    slots: int
    cost: int
    request_level: int | None
    token_level: int | None
    period: int


class Batch(NamedTuple):
    """What a worker asks of the book at once, for all callers that wait. `settlements` are of calls that left no turn;
    at most one wish for each account.

    `beat`: say that this worker lives. `judge`: take back what workers hold that have said nothing for `DEAD_AFTER`.
    `now`: the time, instead of the database's (tests).
    """

    worker: str
    accounts: Sequence[Account] = ()
    claims: Sequence[Claim] = ()
    settlements: Sequence[Settlement] = ()
    beat: bool = False
    judge: bool = False
    now: int | None = None
    wishes: Sequence[Wish] = ()


class Verdict(NamedTuple):
    """The answer to a batch: a grant for each claim and what came of each wish, in order, and the state of the keys at
    that moment."""

    grants: Sequence[Grant]
    revision: int
    ever_made: bool
    ahead: Sequence[Ahead] = ()


@dataclass(slots=True)
class Hold:
    """What one worker holds of an account: its running calls, and what it has ahead of the next ones. Requests are held
    ahead only; `tokens_ahead` are those of `tokens` that no call has taken yet, as far as the worker has told."""

    slots: int = 0
    tokens: int = 0
    cost: int = 0
    requests_ahead: int = 0
    tokens_ahead: int = 0


@dataclass(slots=True)
class State:
    """An account as it stands. Levels in units, None: never limited. What is held (from `slots` on) is that of all
    workers."""

    at: int
    requests: int | None = None
    tokens: int | None = None
    period: int | None = None
    spent: int = 0
    slots: int = 0
    reserved: int = 0
    requests_ahead: int = 0
    tokens_ahead: int = 0


def period_at(now: int, period: Period) -> int:
    """The number of the day, the month or the whole that a moment (milliseconds, UTC) belongs to. Later ones of a kind
    are higher, and kinds do not mix."""
    if period == "day":
        return 2 * _KIND + now // DAY
    if period == "month":
        moment = time.gmtime(now / 1000)
        return _KIND + moment.tm_year * 12 + moment.tm_mon - 1
    return 0


def period_start(now: int, period: Period) -> int:
    """When the period of a moment began, in milliseconds (UTC)."""
    if period == "day":
        return now - now % DAY
    if period == "month":
        moment = time.gmtime(now / 1000)
        return calendar.timegm((moment.tm_year, moment.tm_mon, 1, 0, 0, 0)) * 1000
    return 0


def settle(state: State, hold: Hold | None, settlement: Settlement) -> int:
    """Enters a call that is over into its account and its worker's hold (None: it was taken back, or never there).
    Returns the units of tokens to give back, for `advance`."""
    if settlement.period == state.period:
        state.spent += settlement.cost
    if hold is None:
        return -settlement.tokens_used * UNIT
    slots, tokens, cost = (
        min(hold.slots, settlement.slots),
        min(hold.tokens, settlement.tokens_held),
        min(hold.cost, settlement.cost_held),
    )
    hold.slots, hold.tokens, hold.cost = hold.slots - slots, hold.tokens - tokens, hold.cost - cost
    state.slots, state.reserved = state.slots - slots, state.reserved - cost
    return (tokens - settlement.tokens_used) * UNIT


def take_back(state: State, hold: Hold) -> int:
    """Frees what a dead worker held; requests that it held ahead may have been used, and time brings them back. Returns
    the units of tokens to give back, for `advance`."""
    state.slots, state.reserved = state.slots - hold.slots, state.reserved - hold.cost
    state.requests_ahead, state.tokens_ahead = (
        state.requests_ahead - hold.requests_ahead,
        state.tokens_ahead - hold.tokens_ahead,
    )
    return hold.tokens * UNIT


def advance(state: State, account: Account, now: int, refunds: int = 0) -> None:
    """Brings an account to the present: its clock, its levels (with so many units of tokens given back, or taken if it
    is negative), its period."""
    if account.request_rate is not None or account.token_rate is not None:
        _refill(state, account, now, refunds)
    elif state.tokens is not None:  # asked without its rates: they count from the same time, once they are known
        state.tokens += refunds
    if account.budget is not None:
        period = period_at(now, account.period)
        known = state.period
        if known is None or known // _KIND != period // _KIND:
            state.period, state.spent = (None, 0) if account.seed is None else (period, account.seed)
        elif known < period:
            state.period, state.spent = period, 0


def _refill(state: State, account: Account, now: int, refunds: int) -> None:
    elapsed = max(0, now - state.at)
    if now > state.at or now < state.at - CLOCK_SET_BACK:
        state.at = now
    if account.request_rate is not None:
        full = max(0, account.request_capacity - state.requests_ahead) * UNIT
        state.requests = full if state.requests is None else min(full, state.requests + elapsed * account.request_rate)
    if account.token_rate is not None:
        full = max(0, account.token_capacity - state.tokens_ahead) * UNIT
        level = full if state.tokens is None else state.tokens + elapsed * account.token_rate
        state.tokens = min(full, level + refunds)


def decide(claim: Claim, accounts: Sequence[Account], states: Mapping[str, State]) -> Grant:
    """Takes what the claim asks for, if all of its accounts have it. They must be at the present (`advance`)."""
    at, reason, wait = 0, _NONE, 0
    for place in claim.accounts:
        why, after = _refusal(claim, accounts[place], states[accounts[place].subject])
        if why and (not reason or (_STRENGTH[why], after) > (_STRENGTH[reason], wait)):
            at, reason, wait = place, why, after
    if not reason:
        for place in claim.accounts:
            _take(claim, accounts[place], states[accounts[place].subject])
    taken = [accounts[place] for place in claim.accounts]
    first = states[taken[0].subject] if taken else State(0)
    return Grant(
        reason,
        at,
        wait,
        first.requests if taken and taken[0].request_rate is not None else None,
        first.tokens if taken and taken[0].token_rate is not None else None,
        [states[account.subject].period or 0 if account.budget is not None else 0 for account in taken],
    )


def _refusal(claim: Claim, account: Account, state: State) -> tuple[Reason, int]:
    if account.budget is not None and state.period is None:
        return "seed", 0
    if account.budget is not None and claim.cost > 0 and state.spent + state.reserved + claim.cost > account.budget:
        return "budget", 0
    requests = tokens = 0
    if account.request_rate is not None:
        requests = _time_to(UNIT, state.requests or 0, account.request_rate)
    if account.token_rate is not None:
        wanted = min(claim.tokens, account.token_capacity) * UNIT
        tokens = _time_to(wanted, state.tokens or 0, account.token_rate)
    if requests or tokens:
        return ("requests", requests) if requests >= tokens else ("tokens", tokens)
    if account.max_parallel is not None and state.slots >= account.max_parallel:
        return "parallel", 0
    return "", 0


def _time_to(wanted: int, level: int, rate: int) -> int:
    """Milliseconds until the level is reached."""
    return -((level - wanted) // rate) if level < wanted else 0


def _take(claim: Claim, account: Account, state: State) -> None:
    if account.request_rate is not None:
        state.requests = (state.requests or 0) - UNIT
    if account.token_rate is not None:
        state.tokens = (state.tokens or 0) - min(claim.tokens, account.token_capacity) * UNIT
    if account.max_parallel is not None:
        state.slots += 1
    if account.budget is not None:
        state.reserved += claim.cost


def held(claim: Claim, account: Account, grant: Grant, place: int, worker: str) -> Settlement:
    """What a granted claim holds of an account (the one at `place` of the claim's), as a settlement of a call that used
    nothing."""
    return taken(account, claim.tokens, claim.cost, grant.periods[place], worker)


def taken(account: Account, tokens: int, cost: int, period: int, worker: str) -> Settlement:
    """The same of a call with so many tokens and that cost, in the period that it was granted in."""
    subject, _, _, rate, capacity, parallel, budget, _, _ = account
    slots = 0 if parallel is None else 1
    tokens = 0 if rate is None else tokens if tokens < capacity else capacity
    return Settlement(subject, worker, slots, tokens, 0, 0 if budget is None else cost, 0, period)


def summed(settlements: Iterable[Settlement]) -> list[Settlement]:
    """One settlement for each subject, worker and period, in one order for all workers."""
    sums: dict[tuple[str, str, int], Settlement] = {}
    for one in settlements:
        subject, worker, slots, held, used, reserved, cost, period = one
        which = subject, worker, period
        known = sums.get(which)
        if known is not None:
            _, _, more_slots, more_held, more_used, more_reserved, more_cost, _ = known
            one = Settlement(
                subject,
                worker,
                slots + more_slots,
                held + more_held,
                used + more_used,
                reserved + more_reserved,
                cost + more_cost,
                period,
            )
        sums[which] = one
    return [sums[which] for which in sorted(sums)]

"""What a worker holds ahead of its calls, so that a busy one asks for its limits ten times a second and not for each
call. Pure but for its clock.

It is lent by the book of limits (`limits.Wish`), so nothing is counted twice and no bound moves: what is held ahead has
been taken already. Rules:

- Nothing is held ahead for an account that is asked now and then, or that is near a limit: then every call asks.
- It is good for `GOOD_SECONDS` from the moment at which it was asked for, and so is the state of the keys that came
  with it: a changed limit or a revoked key is noticed as fast as without it, and a silent database lets nobody in for
  longer. It is asked for again when half of that is over, or half of it is used, while calls go on.
- A worker holds twice what its calls took in `GOOD_SECONDS`. It is lent at most an `AHEAD_SHARE`th of what is left each
  time it asks, and it asks for more while it has less than half of what it wants, so it holds at most a quarter of what
  was free (and that only while ever more is called). What it does not use goes back within three times that. What a
  killed worker held comes back as that of its calls does (requests: by time).
- Calls that are refused, or are larger than an `AHEAD_SHARE`th of their whole bucket or budget, are not counted: nobody
  else has to ask because of them. No wish is larger than the account, whatever calls claim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gateway.limits import AHEAD_SHARE, UNIT, Account, Ahead, Grant, Wish
from gateway.store.keys import KeyState

GOOD_SECONDS = 0.1
BUSY = 2
"""Calls within `GOOD_SECONDS`, from which on something is held ahead."""
MOST_ACCOUNTS = 1000
MOST_AT_ONCE = 200
"""Accounts that are watched, and that one batch renews."""
_LONG_AGO = float("-inf")

Amounts = tuple[int, int, int, int]
"""Requests, tokens, slots, nano-dollars."""
_NOTHING: Amounts = (0, 0, 0, 0)


@dataclass(slots=True)
class _Slice:
    """One account: what is left of what is held ahead, and what calls take of it."""

    account: Account
    since: float
    requests: int = 0
    tokens: int = 0
    slots: int = 0
    cost: int = 0
    used_requests: int = 0
    used_tokens: int = 0
    """Which the book has not heard of."""
    calls: int = 0
    call_tokens: int = 0
    call_cost: int = 0
    """Of the calls since `since`, whichever way they came in."""
    before: tuple[int, int, int] = (0, 0, 0)
    """The same of the `GOOD_SECONDS` before that."""
    good_until: float = _LONG_AGO
    calls_until_due: int = 0
    request_level: int | None = None
    token_level: int | None = None
    period: int = 0

    @property
    def left(self) -> Amounts:
        return self.requests, self.tokens, self.slots, self.cost

    @property
    def has_news(self) -> bool:
        """Is there something to go back, or to tell the book?"""
        return self.left != _NOTHING or self.used_requests > 0 or self.used_tokens > 0

    def levels(self) -> tuple[int | None, int | None]:
        """Units of requests and of tokens that a call of this worker could still have."""
        requests, tokens = self.request_level, self.token_level
        return (
            None if requests is None else requests + self.requests * UNIT,
            None if tokens is None else tokens + self.tokens * UNIT,
        )

    def is_for(self, account: Account) -> bool:
        """Has it these limits? What it is to begin with does not matter here."""
        return self.account is account or self.account[:-1] == account[:-1]

    def covers(self, tokens: int, cost: int) -> bool:
        _, request_rate, _, token_rate, capacity, parallel, budget, _, _ = self.account
        return (
            (request_rate is None or self.requests > 0)
            and (token_rate is None or self.tokens >= tokens or self.tokens >= capacity)
            and (parallel is None or self.slots > 0)
            and (budget is None or self.cost >= cost)
        )

    def take(self, tokens: int, cost: int, now: float) -> bool:
        """For a call, which is counted. True: it is time to ask for more."""
        _, request_rate, _, token_rate, capacity, parallel, budget, _, _ = self.account
        if request_rate is not None:
            self.requests -= 1
            self.used_requests += 1
        if token_rate is not None:
            taken = tokens if tokens < capacity else capacity
            self.tokens -= taken
            self.used_tokens += taken
        if parallel is not None:
            self.slots -= 1
        if budget is not None:
            self.cost -= cost
        self.count(tokens, cost, now)
        self.calls_until_due -= 1
        return self.calls_until_due <= 0 or now > self.good_until - GOOD_SECONDS / 2

    def count(self, tokens: int, cost: int, now: float) -> None:
        if now - self.since >= GOOD_SECONDS:
            self._roll(now)
        self.calls += 1
        self.call_tokens += tokens
        self.call_cost += cost

    def wanted(self, now: float) -> Amounts:
        """What should be held ahead: twice what the busiest moment of late took, if the account is as large."""
        self._roll(now)
        calls, tokens, cost = map(max, self.before, (self.calls, self.call_tokens, self.call_cost))
        if calls < BUSY:
            return _NOTHING
        account = self.account
        return (
            min(2 * calls, account.request_capacity) if account.request_rate is not None else 0,
            min(2 * tokens, account.token_capacity) if account.token_rate is not None else 0,
            min(2 * calls, account.max_parallel) if account.max_parallel is not None else 0,
            min(2 * cost, account.budget) if account.budget is not None else 0,
        )

    def _roll(self, now: float) -> None:
        passed = now - self.since
        if passed >= GOOD_SECONDS:
            self.before = (self.calls, self.call_tokens, self.call_cost) if passed < 2 * GOOD_SECONDS else (0, 0, 0)
            self.calls = self.call_tokens = self.call_cost = 0
            self.since = now


class Slices:
    """All that one worker holds ahead, under one name of it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of: dict[str, _Slice] = {}
        self._due: dict[str, None] = {}
        self._worker = ""
        self._known_at = _LONG_AGO
        self.keys: KeyState | None = None
        """How the keys stood when the book was asked last."""

    def __len__(self) -> int:
        return len(self._of)

    @property
    def due(self) -> bool:
        """Should the book be asked, though nobody waits?"""
        return bool(self._due)

    def take(self, worker: str, accounts: Sequence[Account], tokens: int, cost: int) -> Grant | None:
        """A call's place, if all of its accounts have it ahead; None: the book must be asked."""
        now = self._clock()
        if worker != self._worker or now - self._known_at >= GOOD_SECONDS:
            return None
        slices = []
        for account in accounts:
            held = self._of.get(account.subject)
            if held is None or now >= held.good_until or not (account is held.account or held.is_for(account)):
                return None
            if not held.covers(tokens, cost):
                return None
            slices.append(held)
        periods = []
        for held in slices:
            if held.take(tokens, cost, now):
                self._due[held.account.subject] = None
            periods.append(held.period)
        requests, tokens_left = slices[0].levels() if slices else (None, None)
        return Grant("", 0, 0, requests, tokens_left, periods)

    def count(self, accounts: Iterable[Account], tokens: int, cost: int) -> None:
        """A call that had to ask the book was let in. Those that it refuses take nothing, so they are not counted."""
        now = self._clock()
        for account in accounts:
            if not _may_be_held(account, tokens, cost):
                continue
            held = self._of.get(account.subject)
            if held is None:
                if len(self._of) >= MOST_ACCOUNTS:
                    continue
                held = self._of[account.subject] = _Slice(_unseeded(account), now)
            held.count(tokens, cost, now)

    def look(self) -> None:
        """Finds what was not asked for of late, so that it goes back; forgets what is not asked for any more."""
        now = self._clock()
        for subject, held in list(self._of.items()):
            if now < held.good_until:
                continue
            if held.has_news:
                self._due[subject] = None
            elif now - held.since > 2 * GOOD_SECONDS:
                del self._of[subject]

    def give_up(self) -> None:
        """All of it is to go back: the worker ends."""
        for subject, held in self._of.items():
            held.calls = held.call_tokens = held.call_cost = 0
            held.before = (0, 0, 0)
            if held.has_news:
                self._due[subject] = None

    def wishes(self, worker: str, accounts: list[Account], places: dict[str, int]) -> list[Wish]:
        """What a batch that asks these accounts (by their places) should ask besides; more are added to it. What it
        gives back is not held any more."""
        if worker != self._worker:
            self.forget()
            self._worker = worker
        for subject in list(self._due)[:MOST_AT_ONCE]:
            del self._due[subject]
            if subject not in places and subject in self._of:
                places[subject] = len(accounts)
                accounts.append(self._of[subject].account)
        now = self._clock()
        asked = ((at, self._of.get(account.subject)) for at, account in enumerate(accounts))
        return [_wish(at, held, accounts[at], now) for at, held in asked if held is not None]

    def entered(
        self, accounts: Sequence[Account], wishes: Sequence[Wish], ahead: Sequence[Ahead], asked_at: float
    ) -> None:
        """What the book has answered."""
        for wish, given in zip(wishes, ahead, strict=True):
            account = accounts[wish.at]
            held = self._of.get(account.subject)
            if held is None:  # forgotten while the book was slow; it has lent all the same
                held = self._of[account.subject] = _Slice(_unseeded(account), self._clock())
            held.requests += given.requests
            held.tokens += given.tokens
            held.slots += given.slots
            held.cost += given.cost
            held.request_level, held.token_level, held.period = given[4:]
            held.good_until = asked_at + GOOD_SECONDS
            held.calls_until_due = max(1, held.calls, held.before[0])

    def told(self, keys: KeyState, asked_at: float) -> None:
        """How the keys stood at that moment, or after it."""
        self.keys, self._known_at = keys, asked_at

    def forget(self) -> None:
        """Nobody knows what is held under the name that it was asked for. Which accounts are asked is remembered."""
        self._of = {subject: _Slice(held.account, held.since) for subject, held in self._of.items()}
        self._due.clear()
        self._known_at = _LONG_AGO

    def now(self) -> float:
        return self._clock()


def _wish(at: int, held: _Slice, account: Account, now: float) -> Wish:
    """More where less than half of what is wanted is left, less where it is more than twice."""
    is_same = held.is_for(account)
    wanted = held.wanted(now) if is_same else _NOTHING
    requests, tokens, slots, cost = [
        want - have if 2 * have < want or have > 2 * want else 0 for want, have in zip(wanted, held.left, strict=True)
    ]
    wish = Wish(at, requests, tokens, slots, cost, held.used_requests, held.used_tokens)
    held.used_requests = held.used_tokens = 0
    held.requests += min(0, wish.requests)
    held.tokens += min(0, wish.tokens)
    held.slots += min(0, wish.slots)
    held.cost += min(0, wish.cost)
    if not is_same:  # its limits have changed
        held.account = _unseeded(account)
    return wish


def _unseeded(account: Account) -> Account:
    """What its period had cost is of that moment: the book would begin anew with it later."""
    return account if account.seed is None else account._replace(seed=None)


def _may_be_held(account: Account, tokens: int, cost: int) -> bool:
    """Is it a call that what is held ahead could let in?"""
    return (account.token_rate is None or AHEAD_SHARE * tokens <= account.token_capacity) and (
        account.budget is None or AHEAD_SHARE * cost <= account.budget
    )

"""Which limits count for whom: the accounts that a call asks, and what its client is told about them.

A key's own limits come before those of the configuration, one by one; a burst of its own goes with a rate of its own.
The buckets and slots of a key that is marked `per_end_user` are those of each of its end users; its budget stays one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gateway.caller import Caller, KeyLimits
from gateway.errors import QuotaExceeded, RateLimited
from gateway.limits import UNIT, Account, Grant, Period
from gateway.pricing import NANO

GATEWAY = "gateway"
PARALLEL_RETRY = 1.0
"""Seconds until a caller without a free slot should come again; nobody knows when a call ends."""
MOST_KNOWN = 10_000
_NONE = KeyLimits()
_REQUESTS = (b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests")
_TOKENS = (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens")


@dataclass(frozen=True, slots=True)
class Allowance:
    """The accounts that a call asks, the one with the buckets first; none: nothing is limited. What must be estimated
    of the call: its tokens (`counted`), and its cost (`priced`)."""

    accounts: tuple[Account, ...]
    counted: bool
    priced: bool

    @classmethod
    def of(cls, *accounts: Account) -> Allowance:
        kept = tuple(account for account in accounts if _limits(account))
        priced = any(account.budget is not None for account in kept)
        return cls(kept, priced or any(account.token_rate is not None for account in kept), priced)


class Allowances:
    """`default`: of every key and of the keyless user. `gateway_budget`: nano-dollars for all calls together."""

    def __init__(self, default: KeyLimits, gateway_budget: int | None = None, gateway_period: Period = "total") -> None:
        self._default = default
        self._gateway = Account(GATEWAY, budget=gateway_budget, period=gateway_period, seed=None)
        self._known: dict[tuple[str | None, str], tuple[KeyLimits | None, Allowance]] = {}
        """By whose they are, with the limits of its own from which they were made."""

    def of(self, caller: Caller, end_user: str | None) -> Allowance:
        own = caller.limits
        if own is not None and own.per_end_user:
            return self._of_end_user(caller, own, end_user)
        who = (caller.key_id, caller.user_id)
        known = self._known.get(who)
        if known is not None and (known[0] is own or known[0] == own):
            return known[1]
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        made = Allowance.of(self._made(_subject(caller), own or _NONE), self._gateway)
        self._known[who] = own, made
        return made

    def _of_end_user(self, caller: Caller, own: KeyLimits, end_user: str | None) -> Allowance:
        """Calls that name nobody share one more bucket: no account may have other limits in the same moment."""
        whole = self._made(_subject(caller), own)
        each = "" if end_user is None else hashlib.sha256(end_user.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        buckets = whole._replace(subject=f"{whole.subject}/{each}", budget=None)
        return Allowance.of(
            buckets, Account(whole.subject, budget=whole.budget, period=whole.period, seed=None), self._gateway
        )

    def _made(self, subject: str, own: KeyLimits) -> Account:
        default = self._default
        requests, burst = own.requests_per_minute, own.request_burst
        tokens, token_burst = own.tokens_per_minute, own.token_burst
        if requests is None:
            requests, burst = default.requests_per_minute, burst or default.request_burst
        if tokens is None:
            tokens, token_burst = default.tokens_per_minute, token_burst or default.token_burst
        budget, period = own.budget_nanousd, own.budget_period
        if budget is None:
            budget, period = default.budget_nanousd, default.budget_period
        return Account(
            subject,
            requests,
            burst or requests or 0,
            tokens,
            token_burst or tokens or 0,
            own.max_parallel or default.max_parallel,
            budget,
            period or "total",
            seed=None,
        )


def _subject(caller: Caller) -> str:
    return f"key:{caller.key_id}" if caller.key_id is not None else f"user:{caller.user_id}"


def headers(account: Account, grant: Grant) -> list[tuple[bytes, bytes]]:
    """OpenAI's `x-ratelimit-*` for the account with the buckets: what it holds when full, what is left, when it is full
    again. Nothing is said of what is not limited."""
    found: list[tuple[bytes, bytes]] = []
    _, request_rate, requests, token_rate, tokens, _, _, _, _ = account
    _, _, _, requests_left, tokens_left, _ = grant
    if request_rate is not None and requests_left is not None:
        found += _told(_REQUESTS, request_rate, requests, requests_left)
    if token_rate is not None and tokens_left is not None:
        found += _told(_TOKENS, token_rate, tokens, tokens_left)
    return found


def _told(names: tuple[bytes, bytes, bytes], rate: int, capacity: int, level: int) -> Sequence[tuple[bytes, bytes]]:
    limit, remaining, reset = names
    left = level // UNIT if level > 0 else 0
    after = -((level - capacity * UNIT) // rate)
    return _limit_header(limit, capacity), (remaining, str(left).encode()), (reset, duration(after).encode())


@lru_cache(maxsize=256)
def _limit_header(name: bytes, capacity: int) -> tuple[bytes, bytes]:
    return name, str(capacity).encode()


def duration(milliseconds: int) -> str:
    """As OpenAI writes it: `20ms`, `8.64s`, `6m0s`, `1h0m12s`."""
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds > 0 else "0ms"
    seconds, rest = milliseconds // 1000, milliseconds % 1000
    parts = f".{rest:03}".rstrip("0") if rest else ""
    if seconds < 60:
        return f"{seconds}{parts}s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    told = f"{minutes}m{seconds}{parts}s"
    return f"{hours}h{told}" if hours else told


def _limits(account: Account) -> bool:
    return any(
        limit is not None for limit in (account.request_rate, account.token_rate, account.max_parallel, account.budget)
    )


def refusal(grant: Grant, account: Account, told: Mapping[str, str]) -> RateLimited | QuotaExceeded:
    """What a client hears whose claim this account did not grant."""
    if grant.reason == "budget":
        whose = "the gateway" if account.subject == GATEWAY else "this key"
        per = {"day": " a day", "month": " a month", "total": " in total"}[account.period]
        amount = f"{(account.budget or 0) / NANO:.9f}".rstrip("0").rstrip(".")
        return QuotaExceeded(
            f"The budget of {whose} ({amount} USD{per}) does not hold what this call may cost. Calls that are running "
            "have reserved what they may cost.",
            headers=told,
        )
    if grant.reason == "parallel":
        why = f"This key has as many calls running as it may ({account.max_parallel})"
        return RateLimited(f"{why}. Try again when one is over.", retry_after=PARALLEL_RETRY, headers=told)
    wait = (grant.wait + 1) / 1000
    rate = account.request_rate if grant.reason == "requests" else account.token_rate
    why = f"The limit of {rate} {grant.reason} per minute is reached"
    return RateLimited(f"{why}. Try again in {wait:.3f} s.", retry_after=wait, type=grant.reason, headers=told)

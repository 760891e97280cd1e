"""A worker that is alone counts in its memory, by the same rules."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway import limits_memory
from gateway.limits import DAY, UNIT, Account, Batch, Claim, Grant, Settlement, held, taken
from gateway.limits_memory import MemoryBook

NOW = 1_800_000_000_000
CLAIM = Claim(10, 100, [0])


def batch(account: Account, *claims: Claim, now: int = NOW) -> Batch:
    return Batch("", [account], claims or [CLAIM], now=now)


def test_a_bucket_gives_what_it_holds_and_refills_with_time() -> None:
    book = MemoryBook()
    account = Account("key:a", request_rate=60, request_capacity=2)

    grants = book.admit(batch(account, CLAIM, CLAIM, CLAIM))
    assert [(grant.reason, grant.wait, grant.requests) for grant in grants] == [
        ("", 0, UNIT),
        ("", 0, 0),
        ("requests", 1000, 0),
    ]
    assert book.admit(batch(account, now=NOW + 999))[0].reason == "requests"
    assert book.admit(batch(account, now=NOW + 1000))[0].reason == ""


def test_what_is_settled_counts_at_once() -> None:
    book = MemoryBook()
    account = Account("key:a", token_rate=60, token_capacity=10, max_parallel=1, budget=150)
    [grant] = book.admit(batch(account))
    [refused] = book.admit(batch(account))
    assert refused.reason == "budget"

    hold = held(CLAIM, account, grant, 0, "")
    assert hold == Settlement("key:a", "", 1, 10, 0, 100, 0, 0)
    book.settle([hold._replace(tokens_used=4, cost=50)])

    [grant] = book.admit(batch(account, Claim(6, 100, [0])))
    assert (grant.reason, grant.tokens) == ("", 0)
    [refused] = book.admit(batch(account, Claim(0, 0, [0])))
    assert refused.reason == "parallel"


def test_tokens_beyond_what_was_reserved_are_a_debt() -> None:
    book = MemoryBook()
    account = Account("key:a", token_rate=60, token_capacity=10)
    [grant] = book.admit(batch(account))
    book.settle([held(CLAIM, account, grant, 0, "")._replace(tokens_used=25)])
    [refused] = book.admit(batch(account, Claim(1, 0, [0])))
    assert (refused.reason, refused.wait, refused.tokens) == ("tokens", 16_000, -15 * UNIT)


def test_what_a_budget_has_cost_before_is_known_by_its_seed_and_counted_once() -> None:
    book = MemoryBook()
    account = Account("key:a", budget=150, seed=60)
    assert book.admit(batch(account))[0].reason == "budget"
    assert book.admit(batch(account, Claim(0, 90, [0])))[0].reason == ""


def test_an_account_that_nobody_uses_is_forgotten_but_not_while_it_holds_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits_memory, "MOST_ACCOUNTS", 3)
    book = MemoryBook()
    busy = Account("key:busy", request_rate=60, request_capacity=1, max_parallel=1)
    book.admit(batch(busy))
    for number in range(10):
        book.admit(batch(Account(f"key:{number}", request_rate=60, request_capacity=1)))

    assert book.admit(batch(busy))[0].reason == "requests"
    assert book.admit(batch(Account("key:0", request_rate=60, request_capacity=1)))[0].reason == ""


ROOMY = Account("a", 600, 5, 600, 50, 3, 150, "day")
LIMITS = {
    "request_rate": st.none() | st.integers(1, 600),
    "request_capacity": st.integers(0, 5),
    "token_rate": st.none() | st.integers(1, 600),
    "token_capacity": st.sampled_from([0, 10, 50]),
    "max_parallel": st.sampled_from([None, 1, 2]),
    "budget": st.sampled_from([None, 0, 30, 150]),
    "period": st.sampled_from(["day", "month", "total"]),
    "seed": st.sampled_from([None, 0, 30]),
}


@dataclass
class Call:
    """One after the other: what each asks, how long after the last, and what it has used before the next one comes;
    None: it goes on."""

    asked: list[Account]
    passed: int = 0
    tokens: int = 10
    cost: int = 10
    used: tuple[int, int] | None = None


@st.composite
def accounts(draw: st.DrawFn) -> list[Account]:
    """Of one call, each another subject's."""
    subjects = draw(st.lists(st.sampled_from("aab"), unique=True, max_size=2))
    changes = st.fixed_dictionaries({}, optional=LIMITS)
    return [ROOMY._replace(subject=subject, **draw(changes)) for subject in subjects]


@st.composite
def calls(draw: st.DrawFn) -> list[Call]:
    """Of two callers."""
    asked = st.sampled_from([draw(accounts()), draw(accounts())])
    passed = st.sampled_from([0, 1, 100, 1000, 60_000, DAY, 31 * DAY, -1, -1000, -1001, -DAY])
    amount = st.sampled_from([0, 10, 30, 60])
    return draw(st.lists(st.builds(Call, asked, passed, amount, amount, st.none() | st.tuples(amount, amount))))


@given(calls())
@example([Call([ROOMY]), Call([ROOMY], -1)])
@example([Call([ROOMY._replace(subject=subject)]) for subject in "aba"])
@example([Call([ROOMY], cost=75), Call([ROOMY], cost=75), Call([ROOMY], cost=1)])
@example([Call([ROOMY], cost=75), Call([ROOMY], cost=76)])
@example([Call([ROOMY._replace(request_rate=None)], passed, tokens=20) for passed in (0, 100, 100)])
def test_one_claim_at_a_time_is_as_a_batch_of_one(calls: list[Call]) -> None:
    now = NOW
    one, batches = MemoryBook(lambda: now), MemoryBook(lambda: now)
    for call in calls:
        now += call.passed
        [expected] = batches.admit(Batch("", call.asked, [Claim(call.tokens, call.cost, range(len(call.asked)))]))
        assert one.admit_one(call.asked, call.tokens, call.cost) == expected
        if not expected.reason and call.used is not None:
            tokens, cost = call.used
            for account, period in zip(call.asked, expected.periods, strict=True):
                hold = taken(account, call.tokens, call.cost, period, "")
                one.settle_one(hold, tokens, cost)
                batches.settle([hold._replace(tokens_used=tokens, cost=cost)])
        assert list(one._states.items()) == list(batches._states.items())


def test_what_is_settled_of_an_account_that_is_forgotten_is_nobodys() -> None:
    book = MemoryBook()
    book.settle_one(Settlement("key:a", "", 1, 10, 0, 100, 0, 0), 10, 100)
    assert book.admit_one([], 1, 1) == Grant("", 0, 0, None, None, [])

"""A worker that is alone counts in its memory, by the same rules."""

from __future__ import annotations

import pytest

from gateway import limits_memory
from gateway.limits import UNIT, Account, Batch, Claim, Settlement, held
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

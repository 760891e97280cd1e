"""Whose limits count, and what a client is told of them."""

from __future__ import annotations

from functools import partial

import pytest

from gateway.allowances import Allowances, duration, headers, refusal
from gateway.caller import Caller, KeyLimits
from gateway.errors import QuotaExceeded, RateLimited
from gateway.limits import UNIT, Account, Grant, Reason

unseeded = partial(Account, seed=None)
"""What has been spent so far is asked only if the book does not know."""

DEFAULT = KeyLimits(requests_per_minute=600)
PERSON = Caller("ann")


def keyed(limits: KeyLimits) -> Caller:
    return Caller("ann", "key_1", limits=limits)


def test_who_has_no_key_is_a_user_with_the_default_limits() -> None:
    assert Allowances(DEFAULT).of(PERSON, None).accounts == (unseeded("user:ann", 600, 600),)


def test_nothing_is_asked_where_nothing_is_limited() -> None:
    assert Allowances(KeyLimits()).of(PERSON, "someone").accounts == ()


@pytest.mark.parametrize(
    ("own", "account"),
    [
        (KeyLimits(), unseeded("key:key_1", 600, 600)),
        (KeyLimits(requests_per_minute=60), unseeded("key:key_1", 60, 60)),
        (KeyLimits(requests_per_minute=60, request_burst=5), unseeded("key:key_1", 60, 5)),
        (KeyLimits(request_burst=5), unseeded("key:key_1", 600, 5)),
        (KeyLimits(tokens_per_minute=1000), unseeded("key:key_1", 600, 600, 1000, 1000)),
        (KeyLimits(tokens_per_minute=1000, token_burst=9), unseeded("key:key_1", 600, 600, 1000, 9)),
        (KeyLimits(max_parallel=3), unseeded("key:key_1", 600, 600, max_parallel=3)),
        (
            KeyLimits(budget_nanousd=10, budget_period="day"),
            unseeded("key:key_1", 600, 600, budget=10, period="day"),
        ),
    ],
)
def test_a_keys_own_limits_come_before_the_defaults(own: KeyLimits, account: Account) -> None:
    assert Allowances(DEFAULT).of(keyed(own), None).accounts == (account,)


def test_the_default_burst_belongs_to_the_default_rate() -> None:
    allowances = Allowances(KeyLimits(requests_per_minute=600, request_burst=50))
    assert allowances.of(PERSON, None).accounts[0].request_capacity == 50
    assert allowances.of(keyed(KeyLimits(requests_per_minute=60)), None).accounts[0].request_capacity == 60


def test_each_end_user_of_a_marked_key_has_its_buckets_and_all_share_its_budget() -> None:
    allowances = Allowances(DEFAULT)
    caller = keyed(KeyLimits(tokens_per_minute=10, per_end_user=True, budget_nanousd=7, budget_period="month"))

    ann, shared = allowances.of(caller, "ann").accounts
    bob, also_shared = allowances.of(caller, "bob").accounts

    assert ann.subject != bob.subject
    assert ann.subject.startswith("key:key_1/")
    assert (ann.request_rate, ann.token_rate, ann.budget) == (600, 10, None)
    assert shared == also_shared == unseeded("key:key_1", budget=7, period="month")


def test_calls_of_a_marked_key_that_name_nobody_share_a_bucket_beside_its_budget() -> None:
    """In one batch an account has one set of limits, whoever asks it."""
    caller = keyed(KeyLimits(tokens_per_minute=10, per_end_user=True, budget_nanousd=7, budget_period="month"))
    nobody, shared = Allowances(DEFAULT).of(caller, None).accounts
    assert nobody == unseeded("key:key_1/", 600, 600, 10, 10, period="month")
    assert shared == Allowances(DEFAULT).of(caller, "ann").accounts[1]


def test_an_end_user_is_only_a_label_of_other_keys() -> None:
    allowances = Allowances(DEFAULT)
    assert allowances.of(keyed(KeyLimits()), "ann") == allowances.of(keyed(KeyLimits()), None)


def test_the_length_of_an_account_does_not_depend_on_what_a_client_sends() -> None:
    caller = keyed(KeyLimits(per_end_user=True))
    for label in ("", "x" * 100_000, "\ud800", "a/b"):
        assert len(Allowances(DEFAULT).of(caller, label).accounts[0].subject) == len("key:key_1/") + 32


def test_the_gateways_budget_is_asked_by_every_call() -> None:
    allowances = Allowances(KeyLimits(), 1000, "day")
    assert allowances.of(PERSON, None).accounts == (unseeded("gateway", budget=1000, period="day"),)


ACCOUNT = Account("key:a", 60, 60, 1000, 2000, 3, 25 * 10**8, "month")


def told(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in headers}


@pytest.mark.parametrize(
    ("own", "counted", "priced"),
    [
        (KeyLimits(requests_per_minute=1, max_parallel=1), False, False),
        (KeyLimits(tokens_per_minute=1), True, False),
        (KeyLimits(budget_nanousd=1), True, True),
    ],
)
def test_only_what_a_limit_depends_on_is_estimated(own: KeyLimits, counted: bool, priced: bool) -> None:
    allowance = Allowances(DEFAULT).of(keyed(own), None)
    assert (allowance.counted, allowance.priced) == (counted, priced)


def test_a_reply_tells_what_is_left_and_when_it_is_full_again() -> None:
    grant = Grant("", 0, 0, 57 * UNIT + 1, 500 * UNIT, [0])
    assert told(headers(ACCOUNT, grant)) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "57",
        "x-ratelimit-reset-requests": "3s",
        "x-ratelimit-limit-tokens": "2000",
        "x-ratelimit-remaining-tokens": "500",
        "x-ratelimit-reset-tokens": "1m30s",
    }


def test_a_debt_leaves_nothing_and_what_is_not_limited_is_not_told() -> None:
    account = Account("key:a", None, 0, 1000, 2000)
    assert told(headers(account, Grant("", 0, 0, None, -500 * UNIT, [0]))) == {
        "x-ratelimit-limit-tokens": "2000",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "2m30s",
    }


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "0ms"),
        (20, "20ms"),
        (999, "999ms"),
        (1000, "1s"),
        (8640, "8.64s"),
        (60_000, "1m0s"),
        (360_000, "6m0s"),
        (61_005, "1m1.005s"),
        (3_612_000, "1h0m12s"),
    ],
)
def test_times_are_written_as_openai_does(milliseconds: int, text: str) -> None:
    assert duration(milliseconds) == text


def refused(reason: Reason, wait: int = 0, account: Account = ACCOUNT) -> RateLimited | QuotaExceeded:
    return refusal(Grant(reason, 0, wait, 0, 0, [0]), account, {"x-ratelimit-remaining-requests": "0"})


def test_a_refusal_says_when_to_come_again() -> None:
    failure = refused("tokens", 1499)
    assert (failure.status, failure.type, failure.code) == (429, "tokens", "rate_limit_exceeded")
    assert failure.headers == {
        "x-ratelimit-remaining-requests": "0",
        "retry-after": "2",
        "retry-after-ms": "1500",
    }
    assert failure.message == "The limit of 1000 tokens per minute is reached. Try again in 1.500 s."


def test_too_many_at_once_are_told_how_many_there_may_be() -> None:
    failure = refused("parallel")
    assert (failure.status, failure.type, failure.code) == (429, "requests", "rate_limit_exceeded")
    assert "(3)" in failure.message


@pytest.mark.parametrize(
    ("account", "words"),
    [
        (ACCOUNT, "The budget of this key (2.5 USD a month)"),
        (Account("gateway", budget=1, period="total"), "The budget of the gateway (0.000000001 USD in total)"),
    ],
)
def test_a_spent_budget_is_not_worth_another_try(account: Account, words: str) -> None:
    failure = refused("budget", account=account)
    assert (failure.status, failure.type, failure.code) == (429, "insufficient_quota", "insufficient_quota")
    assert failure.headers["x-should-retry"] == "false"
    assert failure.message.startswith(words)

"""What may be said of a key, field by field, and what one may give to another."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from gateway.key_rules import Mistake, UnknownField, changed, more_than, new_stored_key, read, usd_text
from tests_standalone.conftest import stored_key

IN_2099 = 4_073_500_800_000


def budget(nano: int, period: str) -> dict[str, Any]:
    return {"budget_nanousd": nano, "budget_period": period}


@pytest.mark.parametrize(
    ("said", "read_as"),
    [
        ({}, {}),
        ({"user": "ann", "name": None, "admin": True}, {"user_id": "ann", "name": None, "is_admin": True}),
        ({"models": ["a", "b", "a"]}, {"models": ("a", "b")}),
        ({"models": None, "labels": None}, {"models": None, "labels": {}}),
        ({"requests_per_minute": 1, "max_parallel": 10**12}, {"requests_per_minute": 1, "max_parallel": 10**12}),
        ({"budget_usd": "12.50"}, {"budget_nanousd": 12_500_000_000}),
        ({"budget_usd": 3}, {"budget_nanousd": 3_000_000_000}),
        ({"budget_usd": Decimal("0.1")}, {"budget_nanousd": 100_000_000}),
        ({"budget_usd": Decimal("123456789.123456789")}, {"budget_nanousd": 123_456_789_123_456_789}),
        ({"budget_usd": Decimal("1e-9")}, {"budget_nanousd": 1}),
        ({"budget_usd": Decimal("2.5e2")}, {"budget_nanousd": 250_000_000_000}),
        ({"budget_usd": 10**9}, {"budget_nanousd": 10**18}),
        ({"expires_at": "2099-01-31"}, {"expires_at": IN_2099}),
        ({"expires_at": "2099-01-31T02:00:00+02:00"}, {"expires_at": IN_2099}),
        ({"expires_at": "2099-01-31T00:00:00.250Z"}, {"expires_at": IN_2099 + 250}),
        ({"expires_at": IN_2099 // 1000}, {"expires_at": IN_2099}),
        ({"expires_at": Decimal(IN_2099 + 1) / 1000}, {"expires_at": IN_2099 + 1}),
        ({"labels": {"team": "blue"}}, {"labels": {"team": "blue"}}),
    ],
)  # fmt: skip
def test_what_can_be_said(said: dict[str, Any], read_as: dict[str, Any]) -> None:
    assert read(said) == read_as


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("user", [None, "", " ", "x" * 257, "a\nb", "a\x00b", "\ud800", 5, ["ann"]]),
        ("name", ["", "a\x1b[31m", "\u202e", 0, {}]),
        ("admin", [None, 0, 1, "true", []]),
        ("per_end_user", [None, 1, "yes"]),
        ("models", [[], "gpt-4o", [""], [None], [["a"]], {"a": 1}, ["a"] * 1001, 0, False]),
        ("requests_per_minute", [0, -1, 1.5, Decimal(2), "5", True, 10**12 + 1, [], {}]),
        ("request_burst", [0, "x"]),
        ("tokens_per_minute", [0, True]),
        ("token_burst", [0, None is None]),
        ("max_parallel", [0, "2"]),
        ("budget_usd", [0, "0", -1, "-1", "", "much", "NaN", "Infinity", "1e5", "1e400", "1_0", "١", " 1", "0x1", True,
                        Decimal("NaN"), Decimal("Infinity"), Decimal("1e-10"), "0.0000000001", 10**9 + 1, [], {}]),
        ("budget_period", ["year", "", 1, ["day"], True]),
        ("labels", ["a=b", [], {"a": 1}, {"a": None}, {"": "x"}, {"a": "b\n"}, {str(n): "x" for n in range(17)}]),
        ("expires_at", ["soon", "", True, 0, -5, 1, "2020-01-01", IN_2099, 10**30, Decimal("1e300"), [], "9999-99-99",
                        "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", {"$gt": 0}]),
    ],
)  # fmt: skip
def test_what_cannot_be_said(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(Mistake) as caught:
            read({"user": "ann", field: value})
        assert (caught.value.field, caught.value.what.isprintable()) == (field, True), value


@pytest.mark.parametrize(
    ("field", "near"),
    [("requests_per_minut", "requests_per_minute"), ("is_admin", "admin"), ("budget", "budget_usd"),
     ("model", "models"), ("user_id", "user"), ("expires", "expires_at"), ("🙂", "")],
)  # fmt: skip
def test_a_field_that_is_not_known(field: str, near: str) -> None:
    with pytest.raises(UnknownField, match=f"did you mean {near}") as caught:
        read({field: 1})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("before", "fields", "after"),
    [
        ({}, {"budget_nanousd": 5}, (5, "total")),
        ({}, {"budget_nanousd": 5, "budget_period": "day"}, (5, "day")),
        ({"budget_nanousd": 5, "budget_period": "day"}, {"budget_nanousd": 7}, (7, "day")),
        ({"budget_nanousd": 5, "budget_period": "day"}, {"budget_period": "month"}, (5, "month")),
        ({"budget_nanousd": 5, "budget_period": "day"}, {"budget_period": None}, (5, "total")),
        ({"budget_nanousd": 5, "budget_period": "day"}, {"budget_nanousd": None}, (None, None)),
        ({"budget_nanousd": 5, "budget_period": "day"}, {"name": "x"}, (5, "day")),
        ({}, {"budget_period": None}, (None, None)),
    ],
)
def test_a_budget_has_a_period(before: dict[str, Any], fields: dict[str, Any], after: tuple[int, str]) -> None:
    key = changed(stored_key(**before), fields)
    assert (key.budget_nanousd, key.budget_period) == after


def test_a_period_has_a_budget() -> None:
    for before in ({}, {"budget_nanousd": 5, "budget_period": "day"}):
        with pytest.raises(Mistake, match="budget_period: goes with a budget"):
            changed(stored_key(**before), {"budget_nanousd": None, "budget_period": "day"})


def test_a_new_key_has_nothing() -> None:
    key = new_stored_key("ann", "0" * 64, "abcd")
    assert more_than(key, key) is None
    assert (key.is_admin, key.labels, key.created_by, key.revoked_at) == (False, {}, None, None)
    assert new_stored_key("ann", "0" * 64, "abcd").id != key.id


@pytest.mark.parametrize(
    ("maker", "key", "more"),
    [
        ({}, {"requests_per_minute": 10**12, "models": ("a",), "budget_nanousd": 5}, None),
        ({}, {"is_admin": True}, "admin"),
        ({"models": ("a", "b")}, {}, "models"),
        ({"models": ("a", "b")}, {"models": ("a",)}, None),
        ({"models": ("a", "b")}, {"models": ()}, None),
        ({"models": ("a", "b")}, {"models": ("a", "c")}, "models"),
        ({"models": ("a", "b")}, {"models": ("A",)}, "models"),
        ({"models": ("*",)}, {"models": ("a",)}, "models"),
        ({"requests_per_minute": 5}, {}, "requests_per_minute"),
        ({"requests_per_minute": 5}, {"requests_per_minute": 6}, "requests_per_minute"),
        ({"requests_per_minute": 5}, {"requests_per_minute": 5}, None),
        ({"requests_per_minute": 5}, {"requests_per_minute": 5, "request_burst": 6}, "request_burst"),
        ({"requests_per_minute": 5, "request_burst": 9}, {"requests_per_minute": 5, "request_burst": 9}, None),
        ({"requests_per_minute": 5, "request_burst": 2}, {"requests_per_minute": 5}, "request_burst"),
        ({"requests_per_minute": 5, "request_burst": 2}, {"requests_per_minute": 1}, None),
        ({"request_burst": 2}, {}, "request_burst"),
        ({"tokens_per_minute": 5}, {"tokens_per_minute": 6}, "tokens_per_minute"),
        ({"tokens_per_minute": 5}, {"tokens_per_minute": 5, "token_burst": 50}, "token_burst"),
        ({"max_parallel": 2}, {}, "max_parallel"),
        ({"max_parallel": 2}, {"max_parallel": 3}, "max_parallel"),
        (budget(5, "day"), {}, "budget_usd"),
        (budget(5, "day"), budget(6, "day"), "budget_usd"),
        (budget(5, "day"), budget(5, "day"), None),
        (budget(5, "month"), budget(5, "day"), "budget_period"),
        (budget(5, "total"), budget(1, "month"), "budget_period"),
        (budget(5, "day"), budget(5, "total"), None),
        ({"expires_at": 10}, {}, "expires_at"),
        ({"expires_at": 10}, {"expires_at": 11}, "expires_at"),
        ({"expires_at": 10}, {"expires_at": 10}, None),
        ({"max_parallel": 2}, {"max_parallel": 2, "per_end_user": True}, "per_end_user"),
        ({"max_parallel": 2, "per_end_user": True}, {"max_parallel": 2, "per_end_user": True}, None),
        (budget(5, "day"), {**budget(5, "day"), "per_end_user": True}, None),
        ({"labels": {"a": "b"}, "name": "x", "user_id": "ann"}, {"user_id": "bob"}, None),
    ],
)  # fmt: skip
def test_no_key_gives_more_than_it_has(maker: dict[str, Any], key: dict[str, Any], more: str | None) -> None:
    """A11."""
    assert more_than(stored_key(**maker), stored_key(**key)) == more


@pytest.mark.parametrize(
    ("nano", "text"),
    [(None, None), (1, "0.000000001"), (12_500_000_000, "12.5"), (10**18, "1000000000"), (100 * 10**9, "100"),
     (123_456_789_123_456_789, "123456789.123456789")],
)  # fmt: skip
def test_money_is_shown_exactly_and_can_be_sent_back(nano: int | None, text: str | None) -> None:
    assert usd_text(nano) == text
    assert read({"budget_usd": text}) == {"budget_nanousd": nano}

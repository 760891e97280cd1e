"""Wrong keys in; how long their address has to wait out."""

from __future__ import annotations

import pytest

from gateway import wrong_keys
from gateway.wrong_keys import WrongKeys


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_hundred_at_once_then_ten_a_second() -> None:
    clock = Clock()
    wrong = WrongKeys(clock)
    assert [wrong.count("a") for _ in range(100)] == [0.0] * 100
    assert [wrong.count("a") for _ in range(50)] == [pytest.approx(0.1)] * 50
    clock.now += 0.05
    assert wrong.count("a") == pytest.approx(0.05)
    clock.now += 1.0
    assert [wrong.count("a") for _ in range(10)] == [0.0] * 10
    assert wrong.count("a") > 0
    clock.now += 3600
    assert [wrong.count("a") for _ in range(101)].count(0.0) == 100


def test_one_address_does_not_wait_for_another() -> None:
    wrong = WrongKeys(Clock())
    for _ in range(101):
        wrong.count("a")
    assert wrong.count("a") > 0
    assert wrong.count("b") == 0.0


def test_only_the_addresses_last_seen_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrong_keys, "MOST_ADDRESSES", 10)
    wrong = WrongKeys(Clock())
    for _ in range(101):
        wrong.count("first")
    for number in range(9):
        wrong.count(f"other {number}")
    assert wrong.count("first") > 0
    for number in range(50):
        wrong.count(f"more {number}")
    assert len(wrong._levels) == 10
    assert wrong.count("first") == 0.0

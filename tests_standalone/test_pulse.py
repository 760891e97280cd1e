"""Under which names a worker lives."""

from __future__ import annotations

from gateway.limits import DEAD_AFTER
from gateway.pulse import Pulse

TOO_LONG = DEAD_AFTER / 1000 + 0.1


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_name_is_new_until_it_was_said() -> None:
    pulse = Pulse(Clock())
    assert pulse.is_new
    pulse.said(pulse.name)
    assert not pulse.is_new
    assert pulse.names == [pulse.name]


def test_it_is_steady_once_it_has_spoken_for_long_without_a_break() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    for _ in range(19):
        assert not pulse.is_steady
        clock.now += 0.8
        pulse.said(pulse.name)
    assert pulse.is_steady

    pulse.stopped()
    assert not pulse.is_steady
    clock.now += TOO_LONG
    assert pulse.is_steady


def test_after_too_long_a_silence_it_takes_another_name() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    pulse.said(pulse.name)
    first = pulse.name

    clock.now += TOO_LONG - 1
    pulse.check()
    assert pulse.name == first

    clock.now += 1
    pulse.check()
    assert pulse.name != first
    assert pulse.is_new
    assert not pulse.is_steady


def test_an_answer_that_comes_after_too_long_a_silence_does_not_hide_it() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    pulse.said(pulse.name)
    first = pulse.name

    clock.now += TOO_LONG
    pulse.said(first)  # asked before the silence
    assert pulse.name != first
    assert pulse.is_new
    assert not pulse.is_steady


def test_an_old_name_lives_until_its_last_call_is_over() -> None:
    pulse = Pulse(Clock())
    first = pulse.name
    pulse.entered(first)
    pulse.entered(first)
    pulse.rename()
    assert pulse.names == [first, pulse.name]

    pulse.left(first)
    assert pulse.names == [first, pulse.name]
    pulse.left(first)
    assert pulse.names == [pulse.name]
    pulse.left(first)  # of a name that is gone nothing is kept
    assert pulse.names == [pulse.name]


def test_a_name_without_calls_is_forgotten_at_once() -> None:
    pulse = Pulse(Clock())
    pulse.rename()
    assert pulse.names == [pulse.name]
    pulse.entered(pulse.name)
    pulse.left(pulse.name)
    assert pulse.names == [pulse.name]

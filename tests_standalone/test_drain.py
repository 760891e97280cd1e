"""Who runs at the end of a worker is told to stop; nobody else is."""

from __future__ import annotations

import pytest

from gateway.drain import Drain


class Exchange:
    def __init__(self) -> None:
        self.stops = 0

    def stop(self) -> None:
        self.stops += 1


def test_the_beginning_only_turns_readiness_red() -> None:
    drain, running = Drain(), Exchange()
    assert not drain.stopping
    with drain.entered(running.stop):
        drain.begin()
        assert drain.stopping
    assert running.stops == 0


def test_the_cut_stops_what_runs_and_not_what_is_over() -> None:
    drain, over, running = Drain(), Exchange(), Exchange()
    with drain.entered(over.stop):
        pass
    with drain.entered(running.stop):
        drain.cut()
    drain.cut()
    assert drain.stopping
    assert (over.stops, running.stops) == (0, 1)


def test_who_comes_after_the_cut_is_stopped_at_once() -> None:
    drain, late = Drain(), Exchange()
    drain.cut()
    with drain.entered(late.stop):
        assert late.stops == 1


def test_who_fails_is_forgotten_too() -> None:
    drain, failing = Drain(), Exchange()
    with pytest.raises(ValueError, match="its own"), drain.entered(failing.stop):
        raise ValueError("its own")
    drain.cut()
    assert failing.stops == 0


def test_stopping_may_end_others() -> None:
    """A `stop` that ends an exchange on the spot changes the set that is being gone through."""
    drain, second = Drain(), Exchange()
    inner = drain.entered(second.stop)

    def stop_first() -> None:
        inner.__exit__(None, None, None)

    with drain.entered(stop_first):
        inner.__enter__()
        drain.cut()
    assert second.stops <= 1

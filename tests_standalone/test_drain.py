"""Who runs at the end of a worker is told to stop; nobody else is."""

from __future__ import annotations

from gateway.drain import Drain


class Exchange:
    def __init__(self) -> None:
        self.stops = 0

    def stop(self) -> None:
        self.stops += 1


def test_the_beginning_only_turns_readiness_red() -> None:
    drain, running = Drain(), Exchange()
    assert not drain.stopping
    drain.enter(running.stop)
    drain.begin()
    assert drain.stopping
    drain.leave(running.stop)
    assert running.stops == 0


def test_the_cut_stops_what_runs_and_not_what_is_over() -> None:
    drain, over, running = Drain(), Exchange(), Exchange()
    drain.enter(over.stop)
    drain.leave(over.stop)
    drain.enter(running.stop)
    drain.cut()
    drain.leave(running.stop)
    drain.cut()
    assert drain.stopping
    assert (over.stops, running.stops) == (0, 1)


def test_who_comes_after_the_cut_is_stopped_at_once() -> None:
    drain, late = Drain(), Exchange()
    drain.cut()
    drain.enter(late.stop)
    assert late.stops == 1


def test_stopping_may_end_others() -> None:
    """A `stop` that ends an exchange on the spot changes the set that is being gone through."""
    drain, second = Drain(), Exchange()

    def stop_first() -> None:
        drain.leave(second.stop)

    drain.enter(stop_first)
    drain.enter(second.stop)
    drain.cut()
    assert second.stops <= 1

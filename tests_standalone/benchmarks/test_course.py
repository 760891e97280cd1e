"""One contestant after the other goes the same way, those that fail included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks import course
from benchmarks.contestants import Running
from benchmarks.course import Mock, Plan

PLAN = Plan(connections=(8,), streams=(2,), held=(), seconds=0.3, warm_up=0.1, rounds=1, starts=1)


@dataclass
class Relay:
    """The upstream itself, as if it were a gateway."""

    mock: Mock
    headers: dict[str, str] = field(default_factory=dict)
    name: str = "relay"
    title: str = "a relay"
    version: str | None = None
    started: int = 0

    def missing(self) -> str | None:
        return None

    def install_mb(self) -> float | None:
        return None

    @contextmanager
    def running(self, upstream: int) -> Iterator[Running]:
        yield Running(upstream, None, {"self": [self.mock.pid]}, self._start, self.headers)

    def _start(self) -> float:
        self.started += 1
        return 0.5


class Broken(Relay):
    @contextmanager
    def running(self, upstream: int) -> Iterator[Running]:
        raise RuntimeError("no answer in time\nand a long log")
        yield


def test_a_contestant_runs_the_whole_course(mock: Mock) -> None:
    said: list[str] = []
    found = course.run(Relay(mock), mock, PLAN, said.append)

    assert "failed" not in found
    assert found["start_seconds"] == 0.5
    assert found["answers"]["8"]["cpu_us"].keys() == {"self", "upstream"}
    assert found["streams"]["2"]["gap"]["p50"] > 0
    assert [one["after"] for one in found["memory"]] == ["idle", "answers, 8", "streams, 2"]
    assert found["idle_mib"] == found["memory"][0]["mib"] > 0
    assert len(said) == 3


def test_one_that_does_not_start_has_a_reason_and_no_figures(mock: Mock) -> None:
    found = course.run(Broken(mock), mock, PLAN, lambda text: None)

    assert found["failed"] == "no answer in time"
    assert found["answers"] == {}


def test_one_that_answers_nothing_is_not_measured_again_and_is_started_again(mock: Mock) -> None:
    """It takes a body of no bytes, so that the upstream sees a second request that is none."""
    relay = Relay(mock, {"Content-Length": "99999"})
    plan = Plan(connections=(2,), streams=(), held=(), seconds=0.2, warm_up=0.1, rounds=3, starts=1, settle_seconds=0.1)
    found = course.run(relay, mock, plan, lambda text: None)

    assert found["answers"]["2"]["ended"] == 0
    assert len(found["answers"]["2"]["cpu_us_of_rounds"]) == 1
    assert found["memory"][-1]["after"] == "a new start"
    assert relay.started == 2


def test_what_others_are_compared_with_is_short(mock: Mock) -> None:
    found = course.run(Relay(mock), mock, PLAN, lambda text: None)

    assert course.direct_figures(found) == {
        "answers": {"8": {"latency": found["answers"]["8"]["latency"]}},
        "streams": {"2": {"first": found["streams"]["2"]["first"]}},
    }

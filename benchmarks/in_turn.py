"""Contestants in turn: all of them run, and each is measured for a few seconds, one behind the other, again and again.

The speed of a virtual machine changes from one minute to the next with what its neighbours do, for one program as for
the other. So figures that were taken minutes apart say little beside each other, and the figures of two machines less.
What survives is the ratio of two that were taken within seconds: here that to nginx as a plain proxy, in the same
round. `GOALS` are those of the budget, by nginx's figures on the machine where they were set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import kept, machine
from benchmarks.contestants import contestants
from benchmarks.course import Jobs, Mock, Plan, say_to_stderr
from benchmarks.stats import median
from benchmarks.tables import milliseconds, number, table

DIRECT, BASE = "direct", "nginx"
NAMES = ("postgres", "sqlite", "two-workers")
ROUNDS = 5
PLAN = Plan(seconds=3.0, warm_up=0.5, rounds=1)


@dataclass(frozen=True, slots=True)
class Kind:
    """What is measured, and which of its times is told. `must` and `aim` in us, where nginx takes `nginx`."""

    title: str
    measure: Callable[[Jobs], dict[str, Any]]
    times: str
    must: float | None = None
    aim: float | None = None
    nginx: float = 1.0


KINDS = (
    Kind("answers, 64 connections", lambda jobs: jobs.answers(64), "latency", 200, 110, 23),
    Kind("answers, 128 connections", lambda jobs: jobs.answers(128), "latency"),
    Kind("streams of 102 chunks, 64 at once", lambda jobs: jobs.streams(64), "first", 2000, 1400, 1000),
    Kind("answers, 1 connection", lambda jobs: jobs.answers(1), "latency"),
)

Rounds = Mapping[str, Sequence[Mapping[str, Any]]]
"""By contestant: what was found in each round."""


def main(names: Iterable[str] | None, rounds: int | None, mock: Mock, *, write: bool) -> str:
    """The page that was made of it. Raises SystemExit for a contestant that is not there or cannot run here."""
    chosen = {one.name: one for one in contestants() if one.name in (DIRECT, BASE, *(names or NAMES))}
    for one in chosen.values():
        if (missing := one.missing()) is not None:
            raise SystemExit(f"--in-turn: {one.title}: {missing}")
    with ExitStack() as stack:
        jobs = {name: Jobs(stack.enter_context(one.running(mock.port)), mock, PLAN) for name, one in chosen.items()}
        found = {kind.title: in_turn(kind, jobs, rounds or ROUNDS) for kind in KINDS}
    about = {"gateway": machine.commit() or "unknown", **machine.about()}
    page = markdown(about, {name: one.title for name, one in chosen.items()}, found)
    if write:
        kept.RESULTS.mkdir(exist_ok=True)
        Path(kept.RESULTS, "in_turn.md").write_text(page)
    return page


def in_turn(kind: Kind, jobs: Mapping[str, Jobs], rounds: int) -> Rounds:
    """One round more than that is run: the first warms."""
    say = say_to_stderr(kind.title)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, one in jobs.items():
            result = kind.measure(one)
            say(f"{name}: {number(_cpu(result))} us CPU each")
            if turn:
                found[name].append(result)
    return found


def ratio(rounds: Rounds, name: str) -> float | None:
    """CPU by that of `BASE` in the same round: the median. None if that is too little to be seen."""
    pairs = [(_cpu(one), _cpu(base)) for one, base in zip(rounds[name], rounds[BASE], strict=True)]
    ratios = [one / base for one, base in pairs if one is not None and base]
    return median(ratios) if ratios else None


def added(rounds: Rounds, name: str, times: str, point: str) -> float:
    """Seconds more than with nothing in between, in the same round: the median."""
    pairs = zip(rounds[name], rounds[DIRECT], strict=True)
    return median([one[times][point] - base[times][point] for one, base in pairs])


def _cpu(result: Mapping[str, Any]) -> float | None:
    """None: nothing is in between."""
    used: float | None = result["cpu_us"].get("self")
    return used


def markdown(about: Mapping[str, Any], titles: Mapping[str, str], found: Mapping[str, Rounds]) -> str:
    parts = [
        "# What a call costs, measured in turn",
        "Made by `make bench ARGS=--in-turn`. CPU of the whole process tree, without PostgreSQL: its factor to nginx's "
        "in the same round (the median), then the median of the figures, and all of them. The goals are those of "
        "`docs/performance.md`, by nginx's figures where they were set. Times are what is added to those without "
        "anything in between, in the same round (the median).",
    ]
    for kind in KINDS:
        parts += [f"## {kind.title}", _goals(kind), _table(kind, titles, found[kind.title])]
    parts += ["## When and where", "\n".join(f"- {name}: {value}" for name, value in about.items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _goals(kind: Kind) -> str:
    if kind.must is None or kind.aim is None:
        return ""
    must, aim = (f"{goal / kind.nginx:.1f}x" for goal in (kind.must, kind.aim))
    return (
        f"Must: {must} nginx ({number(kind.must)} us where nginx took {number(kind.nginx)}), aim: {aim}, "
        f"twice the must: {2 * kind.must / kind.nginx:.1f}x."
    )


def _table(kind: Kind, titles: Mapping[str, str], rounds: Rounds) -> str:
    rows = []
    for name, title in titles.items():
        per_second = number(median([one["per_second"] for one in rounds[name]]))
        times = [milliseconds(added(rounds, name, kind.times, point)) for point in ("p50", "p99")]
        rows.append([title, *_processor(rounds, name), per_second, *times])
    what = "first token" if kind.times == "first" else "answer"
    return table(["", "to nginx", "CPU us", "rounds", "per s", f"{what}: added p50, ms", "p99, ms"], rows)


def _processor(rounds: Rounds, name: str) -> list[str]:
    used = [one["cpu_us"]["self"] for one in rounds[name] if _cpu(one) is not None]
    if not used:
        return ["-", "-", "-"]
    factor = ratio(rounds, name)
    return [f"**{factor:.2f}x**" if factor else "-", number(median(used)), ", ".join(map(number, used))]

"""The command line of the benchmark. A whole run takes about a quarter of an hour."""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import contestants, course, report
from benchmarks.contestants import Contestant
from benchmarks.course import Plan

RESULTS = Path(__file__).parent / "results"
METHOD = (
    "one process each, all on loopback; CPU is that of the contestant's whole process tree, without its database; "
    "fsync and synchronous_commit are on"
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    chosen = _chosen(options.only)
    plan = _plan(options)
    _raise_file_limit()
    signal.signal(signal.SIGTERM, _interrupt)
    found: dict[str, Any] = {"about": _about(options), "contestants": {}}
    with course.upstream() as mock:
        for contestant in chosen:
            say = course.say_to_stderr(contestant.name)
            if (missing := contestant.missing()) is not None:
                say(f"left out, {missing}")
                continue
            found["contestants"][contestant.name] = course.run(contestant, mock, plan, say)
    if not (options.quick or options.only):
        _write(found)
    print(json.dumps(found, indent=1) if options.json else report.markdown(found))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [contestant.name for contestant in contestants.contestants()]
    parser = argparse.ArgumentParser("make bench ARGS=", description="Measures what a call through the gateway costs.")
    parser.add_argument("--quick", action="store_true", help="short, one round; results are printed only")
    parser.add_argument(
        "--only", type=_words, help=f"of {','.join(names)}; direct always runs; results are printed only"
    )
    parser.add_argument("--duration", type=float, help="seconds of each measurement (5)")
    parser.add_argument("--rounds", type=int, help="repetitions of each measurement; the quietest counts (3)")
    parser.add_argument("--connections", type=_numbers, help="for whole answers (1,64,256)")
    parser.add_argument("--held", type=_numbers, help="how many streams at once (500,2000); 0: none")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    options = parser.parse_args(arguments)
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"--only: unknown: {', '.join(sorted(unknown))}")
    return options


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [number for number in map(int, text.split(",")) if number]


def _chosen(only: Sequence[str] | None) -> list[Contestant]:
    every = contestants.contestants()
    return [found for found in every if only is None or found.name in only or found is every[0]]


def _plan(options: argparse.Namespace) -> Plan:
    given = {
        "seconds": options.duration,
        "rounds": options.rounds,
        "connections": options.connections,
        "held": options.held,
    }
    quick = {"seconds": 2.0, "warm_up": 0.5, "rounds": 1, "starts": 1, "held": ()} if options.quick else {}
    return Plan(**{**quick, **{name: value for name, value in given.items() if value is not None}})


def _about(options: argparse.Namespace) -> dict[str, str]:
    about = {"gateway": course.commit() or "unknown", **report.machine(), "method": METHOD}
    if (nginx := contestants.nginx_version()) is not None:
        about["nginx"] = nginx
    return about


def _raise_file_limit() -> None:
    """Two sockets for each stream that is held; children inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _write(found: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "latest.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "latest.md").write_text(report.markdown(found))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)

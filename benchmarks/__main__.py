"""The command line of the benchmark. A whole run takes about three quarters of an hour, the peers' a quarter of one."""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from benchmarks import contestants, course, history, in_turn, instructions, kept, machine, peers, report, soak
from benchmarks.contestants import Contestant, Gateway
from benchmarks.course import Mock, Plan
from benchmarks.installs import NotInstalled


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    _raise_file_limit()
    signal.signal(signal.SIGTERM, _interrupt)
    if options.page:
        kept.write({}, _names())
        return 0
    if options.history:
        print(history.main(options.messages, write=not options.quick))
        return 0
    with course.upstream() as mock:
        if options.soak is not None:
            print(soak.main(options.soak, mock, write=not options.quick))
            return 0
        if options.instructions:
            print(instructions.main(options.only or ["postgres", "sqlite"], mock))
            return 0
        if options.in_turn:
            print(in_turn.main(options.only, options.rounds, mock, write=not options.quick))
            return 0
        found = _measure(options, mock)
    print(json.dumps(found, indent=1) if options.json else report.markdown(found))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("make bench ARGS=", description="Measures what a call through the gateway costs.")
    parser.add_argument("--peers", action="store_true", help="other gateways, which are installed if they are not yet")
    parser.add_argument("--only", type=_words, help=f"of {','.join(_names())}; direct always runs")
    parser.add_argument("--install", action="store_true", help="install the gateway's wheel too, for its size")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="the gateway at half load, and its memory")
    parser.add_argument("--in-turn", action="store_true", help="all at once, a few seconds each in turn, beside nginx")
    parser.add_argument("--instructions", action="store_true", help="count machine instructions (needs valgrind)")
    parser.add_argument("--history", action="store_true", help="look-ups in a database with very many messages")
    parser.add_argument("--messages", type=int, default=history.MESSAGES, help="so many (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="short, one round; results are printed only")
    parser.add_argument("--page", action="store_true", help="measure nothing: make the page again from the figures")
    parser.add_argument("--duration", type=float, help="seconds of each measurement (5)")
    parser.add_argument("--rounds", type=int, help="repetitions of each measurement; the quietest counts (3)")
    parser.add_argument("--connections", type=_numbers, help="for whole answers (1,64,256)")
    parser.add_argument("--streams", type=_numbers, help="streams at once (1,64,256)")
    parser.add_argument("--held", type=_numbers, help="slow streams at once (500,2000); 0: none")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    options = parser.parse_args(arguments)
    if unknown := set(options.only or ()) - set(_names()):
        parser.error(f"--only: unknown: {', '.join(sorted(unknown))}")
    return options


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [number for number in map(int, text.split(",")) if number]


def _names() -> list[str]:
    return [contestant.name for contestant in (*contestants.contestants(), *peers.peers())]


def _chosen(options: argparse.Namespace) -> list[Contestant]:
    """Nothing in between always comes first: the others are compared with it."""
    direct, *own = contestants.contestants()
    if options.only is not None:
        return [direct, *(one for one in (*own, *peers.peers()) if one.name in options.only)]
    return [direct, *(peers.peers() if options.peers else own)]


def _plan(options: argparse.Namespace) -> Plan:
    given = {
        "seconds": options.duration,
        "rounds": options.rounds,
        "connections": options.connections,
        "streams": options.streams,
        "held": options.held,
    }
    quick = {"seconds": 2.0, "warm_up": 0.5, "rounds": 1, "starts": 1, "held": ()} if options.quick else {}
    return Plan(**{**quick, **{name: value for name, value in given.items() if value is not None}})


def _measure(options: argparse.Namespace, mock: Mock) -> dict[str, Any]:
    """Each contestant is written down as soon as it is through."""
    found: dict[str, Any] = {}
    for contestant in _chosen(options):
        found[contestant.name] = _entry(contestant, options, mock)
        if contestant.name != "direct":
            found[contestant.name]["direct"] = course.direct_figures(found["direct"])
        if not options.quick:
            kept.write(found, _names())
    return found


def _entry(contestant: Contestant, options: argparse.Namespace, mock: Mock) -> dict[str, Any]:
    say = course.say_to_stderr(contestant.name)
    about: dict[str, Any] = {"version": contestant.version, "about": machine.about()}
    if isinstance(contestant, Gateway):
        about["about"]["libraries"] = machine.libraries()
    if (missing := contestant.missing()) is not None:
        say(f"left out, {missing}")
        return {**about, **course.nothing(contestant, missing)}
    entry = {**about, **course.run(contestant, mock, _plan(options), say)}
    if options.install or isinstance(contestant, peers.Peer):
        with contextlib.suppress(NotInstalled):
            entry["install_mb"] = contestant.install_mb()
    return entry


def _raise_file_limit() -> None:
    """Two sockets for each stream that is held; children inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)

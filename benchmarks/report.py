"""The results as one page of Markdown: ratios first, absolute figures second, all measurements last. Pure.

It is made from entries by contestant: the figures of `course.run` and, of the same run, `about` (date, machine),
`version` and `direct` (the figures with nothing in between). A figure that is not there is a dash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tables import cell, errors, failure, milliseconds, number, percent, table

Figures = Mapping[str, Any]
OURS = "postgres"
"""The contestant that others are set beside."""
BUDGETED = ("postgres", "sqlite", "usage-only")
"""One worker each: what the budget is for."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure: `path` within the measurement that is at `within`. `over_direct`: what is added to that of the same
    run without a gateway. `must` and `aim` are the budget of `docs/performance.md`'s goals."""

    what: str
    unit: str
    within: tuple[str, ...]
    path: tuple[str, ...]
    scale: float = 1.0
    must: float | None = None
    aim: float | None = None
    over_direct: bool = False

    @property
    def name(self) -> str:
        return f"{self.what}, {self.unit}" if self.unit else self.what


_A1, _A64, _A256 = (("answers", count) for count in ("1", "64", "256"))
_S1, _S64, _S256 = (("streams", count) for count in ("1", "64", "256"))
_H500, _H2000 = (("held", count) for count in ("500", "2000"))
_CPU, _DATABASE, _SUM = ("cpu_us", "self"), ("cpu_us", "postgres"), ("errors", "*")

ANSWER_64 = Measure("CPU per answer, 64 connections", "us", _A64, _CPU, must=200, aim=110)
ANSWER_256 = Measure("CPU per answer, 256 connections", "us", _A256, _CPU)
STREAM_64 = Measure("CPU per stream of 102 chunks, 64 connections", "us", _S64, _CPU, must=2000, aim=1400)
PER_SECOND = Measure("answers per second, 256 connections", "", _A256, ("per_second",))
ADDED = Measure("added p50, 1 connection", "ms", _A1, ("latency", "p50"), 1e3, 2.0, 1.2, True)
FIRST_P50 = Measure("added first token p50, 64 streams", "ms", _S64, ("first", "p50"), 1e3, over_direct=True)
FIRST_P99 = Measure("added first token p99, 64 streams", "ms", _S64, ("first", "p99"), 1e3, 5, 2, True)
IDLE = Measure("memory, idle worker", "MiB", (), ("idle_mib",), must=90, aim=70)
PER_STREAM = Measure("memory, each of 500 open streams", "KiB", _H500, ("kib_per_stream",), must=60, aim=30)
BROKEN = Measure("2,000 streams: broken", "", _H2000, _SUM, must=0, aim=0)
GAP = Measure("2,000 streams: gap p99 (upstream: 100)", "ms", _H2000, ("gap", "p99"), 1e3, must=300)
START = Measure("start to first answer", "s", (), ("start_seconds",), must=1.5, aim=0.8)
INSTALL = Measure("install, without extras", "MB", (), ("install_mb",), must=130, aim=90)

SIDE_BY_SIDE = {
    "CPU us/answer, 64 connections": ANSWER_64,
    "256 connections": ANSWER_256,
    "CPU us/stream": STREAM_64,
    "added p50, ms": ADDED,
    "added first token p50, ms": FIRST_P50,
    "p99, ms": FIRST_P99,
    "answers/s at most": PER_SECOND,
    "2,000 streams: broken": BROKEN,
    "gap p99, ms": GAP,
    "idle, MiB": IDLE,
    "start, s": START,
    "install, MB": INSTALL,
}
BUDGET = (
    Measure("CPU per answer, 1 connection", "us", _A1, _CPU),
    ANSWER_64,
    ANSWER_256,
    Measure("CPU per stream, 1 connection", "us", _S1, _CPU),
    STREAM_64,
    Measure("CPU per stream, 256 connections", "us", _S256, _CPU),
    ADDED, FIRST_P50, FIRST_P99, IDLE, PER_STREAM, BROKEN, GAP, START, INSTALL,
    Measure("PostgreSQL's CPU per answer, 64 connections", "us", _A64, _DATABASE),
    Measure("PostgreSQL's CPU per stream, 64 connections", "us", _S64, _DATABASE),
)  # fmt: skip

LIMITED = ("postgres", "sqlite")
LIMITS = (
    ANSWER_64,
    ANSWER_256,
    STREAM_64,
    *(
        Measure(f"first token {point}, {within[1]} streams", "ms", within, ("first", point), 1e3)
        for within in (_S1, _S64, _S256)
        for point in ("p50", "p99")
    ),
)


def markdown(contestants: Mapping[str, Figures]) -> str:
    parts = [
        "# What a call costs",
        "Made by `make bench` and `make bench-peers`; how, and what the figures mean: `docs/performance.md`.",
        "## Side by side",
        f"Factor to {_title(contestants, OURS)}, then the figure. CPU is that of the whole process tree, without the "
        "database; streams are 64 at once. The gateway checks a key, counts limits, prices and records every turn "
        "durably; the others relay.",
        _side_by_side(contestants),
        *_budget(contestants),
        *_limits(contestants),
        "## Memory over the run, MiB",
        "In the order of the run. A `*` follows a new start, after work that the contestant could not end.",
        _memory(contestants),
        "## All measurements",
        "`load CPU` is what the load generator used of one core, `others` what programs did that have no part in this.",
        _answers(contestants),
        _streams(contestants),
        "## What was measured, when and where",
        _measured(contestants),
    ]
    return "\n\n".join(parts) + "\n"


def figure(measure: Measure, figures: Figures) -> float | str | None:
    """Its value; in words why there is none; None if it was not measured."""
    part = _at(figures, measure.within)
    if part is None and "failed" in figures:
        return failure(figures)
    if measure.within and part is not None and measure is not BROKEN and (why := failure(part)) is not None:
        return why
    value = _at(part, measure.path)
    if value is None or not measure.over_direct:
        return None if value is None else value * measure.scale
    base = _at(figures.get("direct"), (*measure.within, *measure.path))
    return None if base is None else (value - base) * measure.scale


def factor(value: float | str | None, to: float | str | None) -> str:
    """`2.5x`; met or not where the goal is nothing at all."""
    if not isinstance(value, (int, float)) or not isinstance(to, (int, float)):
        return ""
    if to == 0:
        return "met" if value <= 0 else "NOT met"
    return f"{value / to:.2f}x" if to > 0 else ""


def _at(found: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(found, Mapping):
            return None
        found = sum(found.values()) if name == "*" else found.get(name)
    return found


def _title(contestants: Mapping[str, Figures], name: str) -> str:
    return str(contestants[name]["title"]) if name in contestants else name


def _shown(value: float | str | None) -> str:
    return value if isinstance(value, str) else number(value)


def _side_by_side(contestants: Mapping[str, Figures]) -> str:
    ours = contestants.get(OURS, {})
    rows = []
    for figures in contestants.values():
        cells = [_named(figures)]
        if why := _absent(figures):
            cells += [why, *["-"] * (len(SIDE_BY_SIDE) - 1)]
        else:
            cells += [_beside(measure, figures, ours) for measure in SIDE_BY_SIDE.values()]
        rows.append(cells)
    return table(["", *SIDE_BY_SIDE], rows)


def _absent(figures: Figures) -> str | None:
    """Why a contestant has no figures at all."""
    return failure(figures) if "failed" in figures and not (figures["answers"] or figures["held"]) else None


def _beside(measure: Measure, figures: Figures, ours: Figures) -> str:
    value, base = figure(measure, figures), figure(measure, ours)
    comparable = figures is not ours and isinstance(base, (int, float)) and base > 0
    return cell(factor(value, base) if comparable else "", _shown(value))


def _budget(contestants: Mapping[str, Figures]) -> list[str]:
    chosen = [contestants[name] for name in BUDGETED if name in contestants]
    if not chosen:
        return []
    rows = []
    for measure in BUDGET:
        values = [figure(measure, figures) for figures in chosen]
        cells = [cell(factor(value, measure.must), _shown(value)) for value in values]
        rows.append([measure.name, number(measure.must), number(measure.aim), *cells])
    return [
        "## Against the budget",
        "Factor to what it must be (1 or less is met), then the figure. A figure without a goal stands alone.",
        table(["what", "must", "aim", *(figures["title"] for figures in chosen)], rows),
    ]


def _limits(contestants: Mapping[str, Figures]) -> list[str]:
    rows = []
    for engine in LIMITED:
        names = (f"{engine}-unlimited", engine, f"{engine}-budget")
        first, *others = [contestants[name] for name in names if name in contestants] or [{}]
        if not others:
            continue
        rows.append([first["title"], *(_shown(figure(measure, first)) for measure in LIMITS)])
        rows += [[other["title"], *(_more(measure, other, first) for measure in LIMITS)] for other in others]
    if not rows:
        return []
    return [
        "## What limits and budgets add",
        "Without any; then what is added by buckets for requests and tokens, and by those and two budgets.",
        table(["", *(measure.name for measure in LIMITS)], rows),
    ]


def _more(measure: Measure, figures: Figures, base: Figures) -> str:
    value, least = figure(measure, figures), figure(measure, base)
    if not isinstance(value, (int, float)) or not isinstance(least, (int, float)):
        return _shown(value)
    return f"{value - least:+,.0f}" if measure.unit == "us" else f"{value - least:+.2f}"


def _memory(contestants: Mapping[str, Figures]) -> str:
    traces = {figures["title"]: _trace(figures) for figures in contestants.values() if figures.get("memory")}
    steps = list(dict.fromkeys(["idle", *(step for trace in traces.values() for step in trace)]))
    return table(["", *steps], [[title, *(trace.get(step, "-") for step in steps)] for title, trace in traces.items()])


def _trace(figures: Figures) -> dict[str, str]:
    trace, mark = {}, ""
    for one in figures["memory"]:
        if one["after"] == "a new start":
            mark = " *"
        else:
            trace[one["after"]] = f"{one['mib']:.0f}{mark}"
            mark = ""
    return trace


def _answers(contestants: Mapping[str, Figures]) -> str:
    head = ["answers", "connections", "per s", "p50 ms", "p99 ms",
            "CPU us", "PostgreSQL us", "failed", "load CPU", "others"]  # fmt: skip
    rows = [
        [figures["title"], count, number(found["per_second"]), *_points(found, "latency"), *_shared(found)]
        for figures in contestants.values()
        for count, found in figures["answers"].items()
    ]
    return table(head, rows)


def _streams(contestants: Mapping[str, Figures]) -> str:
    head = ["streams", "at once", "per s", "first p50 ms", "first p99 ms", "gap p50 ms", "gap p99 ms",
            "CPU us", "PostgreSQL us", "failed", "load CPU", "others"]  # fmt: skip
    return table(head, [row for figures in contestants.values() for row in _stream_rows(figures)])


def _stream_rows(figures: Figures) -> Iterator[list[str]]:
    held = {f"{count}, slow": found for count, found in figures["held"].items()}
    for count, found in (figures["streams"] | held).items():
        points = [*_points(found, "first"), *_points(found, "gap")]
        yield [figures["title"], count, number(found["per_second"]), *points, *_shared(found)]


def _points(found: Figures, what: str) -> list[str]:
    return [milliseconds(found[what][point]) for point in ("p50", "p99")]


def _shared(found: Figures) -> list[str]:
    """What every measurement has: CPU of the contestant and of its database, failures, and what else was busy."""
    used = found["cpu_us"]
    shares = [percent(found[name]) for name in ("load_share", "others_share")]
    return [number(used.get("self")), number(used.get("postgres")), errors(found), *shares]


def _measured(contestants: Mapping[str, Figures]) -> str:
    columns = list(dict.fromkeys(name for figures in contestants.values() for name in figures.get("about", {})))
    rows = [
        [
            figures["title"],
            figures.get("version") or "-",
            *(figures.get("about", {}).get(name, "-") for name in columns),
        ]
        for figures in contestants.values()
    ]
    return table(["", "version", *columns], rows)


def _named(figures: Figures) -> str:
    version = figures.get("version")
    return (
        f"{figures['title']} {version}" if version and not figures["title"].startswith("gateway") else figures["title"]
    )

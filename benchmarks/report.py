"""Figures beside what they may be, as Markdown: factors first, absolute figures second. Pure but for `machine`.

A report is `{"about": ..., "contestants": {name: figures of course.run}}`. The budget's figures are for one worker with
everything on; where a figure is not there, its cell is a dash.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stats import median

Figures = Mapping[str, Any]
Pick = Callable[[Figures], float | None]
_LIBRARIES = ("uvloop", "httptools", "uvicorn", "orjson", "asyncpg")


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the budget. `over_direct`: the figure is what is added to that of no gateway at all."""

    what: str
    unit: str
    must: float | None
    aim: float | None
    pick: Pick
    over_direct: bool = False


def _at(*path: str, scale: float = 1.0) -> Pick:
    def pick(figures: Figures) -> float | None:
        found: Any = figures
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return None if found is None else found * scale

    return pick


def _ms_of(*path: str) -> Pick:
    return _at(*path, scale=1e3)


def _broken(figures: Figures) -> float | None:
    held = figures["held"].get("2000")
    return None if held is None else float(sum(held["errors"].values()))


GOALS = (
    Goal("CPU per answer, 1 connection", "us", None, None, _at("answers", "1", "cpu_us", "self")),
    Goal("CPU per answer, 64 connections", "us", 200, 110, _at("answers", "64", "cpu_us", "self")),
    Goal("CPU per answer, 256 connections", "us", None, None, _at("answers", "256", "cpu_us", "self")),
    Goal("CPU per stream of 102 chunks, 64 connections", "us", 2000, 1400, _at("streams", "64", "cpu_us", "self")),
    Goal("added p50, 1 connection", "ms", 2.0, 1.2, _ms_of("answers", "1", "latency", "p50"), True),
    Goal("added first token p50, 64 streams", "ms", None, None, _ms_of("streams", "64", "first", "p50"), True),
    Goal("added first token p99, 64 streams", "ms", 5, 2, _ms_of("streams", "64", "first", "p99"), True),
    Goal("memory, idle worker", "MiB", 90, 70, _at("idle_mib")),
    Goal("memory, each of 500 open streams", "KiB", 60, 30, _at("held", "500", "kib_per_stream")),
    Goal("2,000 streams: broken", "", 0, 0, _broken),
    Goal("2,000 streams: gap p99 (upstream: 100)", "ms", 300, None, _ms_of("held", "2000", "gap", "p99")),
    Goal("`gateway serve` to first answer", "s", 1.5, 0.8, _at("start_seconds")),
    Goal("PostgreSQL's CPU per answer, 64 connections", "us", None, None, _at("answers", "64", "cpu_us", "postgres")),
    Goal("PostgreSQL's CPU per stream, 64 connections", "us", None, None, _at("streams", "64", "cpu_us", "postgres")),
)  # fmt: skip


def markdown(report: Mapping[str, Any]) -> str:
    contestants: Mapping[str, Figures] = report["contestants"]
    parts = [
        "# What a call costs",
        "Made by `make bench`; how, and what the figures mean: `benchmarks/__init__.py`.",
        _about(report["about"]),
        "## Against the budget",
        "Factor to what it must be (1 or less is met), then the figure. A figure without a goal stands alone.",
        _budget(contestants),
        "## All measurements",
        "`load CPU` is what the load generator used of one core, `others` what programs did that have no part in this.",
        _answers(contestants),
        _streams(contestants),
    ]
    return "\n\n".join(parts) + "\n"


def figure(goal: Goal, figures: Figures, direct: Figures | None) -> float | None:
    found = goal.pick(figures)
    if found is None or not goal.over_direct:
        return found
    base = goal.pick(direct) if direct is not None else None
    return None if base is None or figures is direct else found - base


def factor(value: float | None, must: float | None) -> str:
    """`2.5x` of what it must be; met or not where that is nothing at all."""
    if value is None or must is None:
        return ""
    if must == 0:
        return "met" if value <= 0 else "NOT met"
    return f"{value / must:.2f}x"


def _budget(contestants: Mapping[str, Figures]) -> str:
    direct = contestants.get("direct")
    rows = []
    for goal in GOALS:
        cells = [f"{goal.what}, {goal.unit}" if goal.unit else goal.what, _number(goal.must), _number(goal.aim)]
        for figures in contestants.values():
            value = figure(goal, figures, direct)
            cells.append(_cell(factor(value, goal.must), _number(value)))
        rows.append(cells)
    return _table(["what", "must", "aim", *(figures["title"] for figures in contestants.values())], rows)


def _cell(factor: str, value: str) -> str:
    return f"**{factor}** ({value})" if factor else value


def _answers(contestants: Mapping[str, Figures]) -> str:
    head = [
        "answers",
        "connections",
        "per s",
        "p50 ms",
        "p99 ms",
        "CPU us",
        "PostgreSQL us",
        "failed",
        "load CPU",
        "others",
    ]
    rows = [
        [figures["title"], count, f"{found['per_second']:.0f}", _ms(found, "latency", "p50"), _ms(found, "latency"),
         *_shared(found)]
        for figures in contestants.values() for count, found in figures["answers"].items()
    ]  # fmt: skip
    return _table(head, rows)


def _streams(contestants: Mapping[str, Figures]) -> str:
    head = ["streams", "at once", "per s", "first p50 ms", "first p99 ms", "gap p50 ms", "gap p99 ms", "CPU us",
            "PostgreSQL us", "failed", "load CPU", "others"]  # fmt: skip
    rows = []
    for figures in contestants.values():
        held = {f"{count}, slow": found for count, found in figures["held"].items()}
        for count, found in (figures["streams"] | held).items():
            rows.append([
                figures["title"], count, f"{found['per_second']:.1f}", _ms(found, "first", "p50"), _ms(found, "first"),
                _ms(found, "gap", "p50"), _ms(found, "gap"), *_shared(found),
            ])  # fmt: skip
    return _table(head, rows)


def _shared(found: Figures) -> list[str]:
    """What every measurement has: CPU of the contestant and of its database, failures, and what else was busy."""
    used = found["cpu_us"]
    shares = [f"{found[name] * 100:.0f} %" for name in ("load_share", "others_share")]
    return [_number(used.get("self")), _number(used.get("postgres")), str(sum(found["errors"].values())), *shares]


def _ms(found: Figures, what: str, point: str = "p99") -> str:
    value = found[what][point]
    return "-" if value is None else f"{value * 1000:.2f}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def _about(about: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in about.items())


def machine() -> dict[str, str]:
    """Where and with what this runs, in words."""
    versions = ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES if _version(name))
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{_cpu_model()}, {os.cpu_count()} cores, Linux {platform.release().partition('-')[0]}",
        "load average before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "a small write to disk (8 KiB, fdatasync)": f"{_sync_seconds() * 1000:.2f} ms",
        "python": f"{platform.python_version()}, {versions}",
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _sync_seconds() -> float:
    """What every durable commit waits for at least, where PostgreSQL will have its files."""
    with tempfile.TemporaryFile() as file:
        times = []
        for _ in range(100):
            began = time.perf_counter()
            os.pwrite(file.fileno(), b"x" * 8192, 0)
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return median(times)

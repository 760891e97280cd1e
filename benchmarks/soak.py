"""The long run: this gateway on PostgreSQL at half of what it can carry, answers and streams mixed, and its memory.

What it can carry is measured first: answers per second at 256 connections, and as many streams per second as one core
has CPU time for. A quarter of each is then asked for, evenly over time, until the minutes are over. What counts is how
much more memory the gateway holds at the end than it held once it was warm.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks import kept, machine, samples
from benchmarks.contestants import contestants
from benchmarks.course import MIB, Jobs, Mock, Plan, say_to_stderr
from benchmarks.load import Job
from benchmarks.measure import SPARE_SECONDS, Load, loading
from benchmarks.stats import median
from benchmarks.tables import errors, milliseconds, number, percent, table

NAME = "postgres"
SAMPLE_SECONDS = 5.0
ROWS = 12
CAPACITY = Plan(seconds=5.0, rounds=1)


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory of the gateway's processes, so long after the load began."""

    seconds: float
    mib: float


@dataclass(frozen=True, slots=True)
class Rates:
    """Requests begun each second."""

    answers: float
    streams: float


def main(minutes: float, mock: Mock, *, write: bool, folder: Path = kept.RESULTS) -> str:
    """The page that was made of it."""
    say = say_to_stderr("soak")
    contestant = next(one for one in contestants() if one.name == NAME)
    about = {"gateway": contestant.version or "unknown", "configuration": contestant.title, **machine.about()}
    with contestant.running(mock.port) as running:
        jobs = Jobs(running, mock, CAPACITY)
        rates = half_load(jobs.answers(256), jobs.streams(64))
        say(f"{rates.answers:.0f} answers/s and {rates.streams:.1f} streams/s for {minutes:g} minutes")
        memory, results = soak(jobs, rates, minutes * 60, SAMPLE_SECONDS)
    page = markdown(about, rates, memory, results)
    if write:
        folder.mkdir(exist_ok=True)
        (folder / "soak.md").write_text(page)
    return page


def half_load(answers: Mapping[str, Any], streams: Mapping[str, Any]) -> Rates:
    """From what was measured at full load."""
    return Rates(answers["per_second"] / 4, 1e6 / streams["cpu_us"]["self"] / 4)


def soak(jobs: Jobs, rates: Rates, seconds: float, every: float) -> tuple[list[Sample], dict[str, dict[str, Any]]]:
    """Memory over time, and what the two load generators have found."""
    stream_seconds = samples.ANSWER_SECONDS + samples.CHUNKS * samples.CHUNK_SECONDS
    wanted = {
        "answers": _paced(jobs.job("json", samples.MODEL, 1), rates.answers, 0.05, seconds),
        "streams": _paced(jobs.job("stream", samples.MODEL, 1), rates.streams, stream_seconds, seconds),
    }
    found: list[Sample] = []
    with ExitStack() as stack:
        began = time.monotonic()
        loads = {name: stack.enter_context(loading(job)) for name, job in wanted.items()}
        while (now := time.monotonic() - began) < seconds:
            found.append(Sample(now, jobs.resident() / MIB))
            time.sleep(min(every, seconds - now))
        results = {name: _ended(load, wanted[name]) for name, load in loads.items()}
    return found, results


def _paced(job: Job, rate: float, each: float, seconds: float) -> Job:
    """With twice the connections that the rate needs, their beginnings spread over a round of all of them."""
    connections = ceil(rate * each * 2) + 4
    ramp = connections / rate
    left = max(seconds - ramp - job.warm_up, 1.0)
    return replace(job, connections=connections, rate=rate, ramp=ramp, seconds=left, finish=True)


def _ended(load: Load, job: Job) -> dict[str, Any]:
    result = load.result(job.ramp + job.finish_seconds + SPARE_SECONDS)
    if result is None:
        raise RuntimeError("the load generator did not come to an end")
    return result


def growth(found: Sequence[Sample]) -> float:
    """The share by which memory grew: the last tenth of the time beside a tenth that follows the warm-up.

    The warm-up is two minutes, a fifth of the time at most.
    """
    end = found[-1].seconds
    warm, tenth = min(120.0, end / 5), end / 10
    first = median([sample.mib for sample in found if warm <= sample.seconds <= warm + tenth])
    last = median([sample.mib for sample in found if sample.seconds >= end - tenth])
    return last / first - 1


def markdown(
    about: Mapping[str, str], rates: Rates, found: Sequence[Sample], results: Mapping[str, Mapping[str, Any]]
) -> str:
    parts = [
        "# The long run",
        "Made by `make soak`: this gateway at half of its load, answers and streams at once. The budget: memory grows "
        "by less than 5 % in an hour after the warm-up.",
        "\n".join(f"- {name}: {value}" for name, value in about.items()),
        f"**Growth after the warm-up: {growth(found) * 100:+.1f} %** in {found[-1].seconds / 60:.1f} minutes, "
        f"{number(sum(result['ended'] for result in results.values()))} calls, "
        f"{number(sum(sum(result['errors'].values()) for result in results.values()))} of them failed.",
        table(["minute", "memory, MiB"], _rows(found)),
        table(
            ["load", "asked per s", "done per s", "p50 ms", "p99 ms", "first p99 ms", "gap p99 ms", "failed"],
            [_load_row(name, getattr(rates, name), result) for name, result in results.items()],
        ),
        _shares(results["answers"]),
    ]
    return "\n\n".join(parts) + "\n"


def _rows(found: Sequence[Sample]) -> list[list[str]]:
    """A few of them, evenly, the first and the last included."""
    last = len(found) - 1
    chosen = dict.fromkeys(round(last * row / (ROWS - 1)) for row in range(ROWS))
    return [[f"{found[index].seconds / 60:.1f}", f"{found[index].mib:.1f}"] for index in chosen]


def _load_row(name: str, rate: float, result: Mapping[str, Any]) -> list[str]:
    latency = [milliseconds(result["latency"][point]) for point in ("p50", "p99")]
    spreads = [milliseconds(result[what]["p99"]) for what in ("first", "gap")]
    return [name, number(rate), number(result["per_second"]), *latency, *spreads, errors(result)]


def _shares(result: Mapping[str, Any]) -> str:
    shares = ", ".join(f"{name} {percent(used / result['seconds'])}" for name, used in sorted(result["cpu"].items()))
    return f"CPU of one core, all of the load included: {shares}."

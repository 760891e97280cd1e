"""Rows of cells: they stay where they are, are taken up by the next worker, and add up with those of others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from gateway.metrics_numbers import Family, Rows, Together
from tests_standalone.support.gateway import ROOT

HITS = Family("counter", "hits", "Hits.", ("of",))
SECONDS = Family("histogram", "seconds", "Seconds.", bounds=(0.5, 1, 2.5))
LEVEL = Family("gauge", "level", "Level.", combine=max)


def file_at(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT)


def told(*workers: bytes, families: Iterable[Family] = (HITS, SECONDS, LEVEL)) -> dict[str, float]:
    """`name{labels' values}` and its value."""
    samples = [sample for metric in Together(families, workers).collect() for sample in metric.samples]
    return {f"{found.name}{{{','.join(found.labels.values())}}}": found.value for found in samples}


def test_a_counter() -> None:
    rows = Rows()
    rows.cells(HITS, "a")[0] += 2
    rows.cells(HITS, "a")[0] += 0.5
    rows.cells(HITS, "b")
    assert told(rows.copy()) == {"gateway_hits_total{a}": 2.5, "gateway_hits_total{b}": 0}


def test_a_histogram() -> None:
    rows = Rows()
    for value in (0, 0.5, 0.51, 1, 3, 1000):
        rows.histogram(SECONDS).observe(value)
    assert told(rows.copy()) == {
        "gateway_seconds_bucket{0.5}": 2,
        "gateway_seconds_bucket{1.0}": 4,
        "gateway_seconds_bucket{2.5}": 4,
        "gateway_seconds_bucket{+Inf}": 6,
        "gateway_seconds_count{}": 6,
        "gateway_seconds_sum{}": 1005.01,
    }


def test_those_of_several_workers_are_one() -> None:
    workers = []
    for count in (1, 5, 2):
        rows = Rows()
        rows.cells(HITS, "a")[0] += count
        rows.cells(HITS, str(count))[0] += 1
        rows.cells(LEVEL)[0] = count
        workers.append(rows.copy())
    assert told(*workers) == {
        "gateway_hits_total{a}": 8,
        "gateway_hits_total{1}": 1,
        "gateway_hits_total{5}": 1,
        "gateway_hits_total{2}": 1,
        "gateway_level{}": 5,
    }


def test_families_without_rows_are_named() -> None:
    assert [metric.name for metric in Together((HITS, LEVEL), ()).collect()] == ["gateway_hits", "gateway_level"]


def test_other_versions_rows_are_left_out() -> None:
    rows = Rows()
    rows.cells(HITS, "a")[0] += 1
    rows.histogram(SECONDS).observe(1)
    other_bounds = Family("histogram", "seconds", "Seconds.", bounds=(0.5, 1, 3))
    other_labels = Family("counter", "hits", "Hits.", ("of", "kind"))
    assert told(rows.copy(), families=(other_bounds, other_labels)) == {}


@pytest.mark.parametrize("label", ["", "a", "1234567", "é🙂", 'a"\\\n\x00', "x" * 100_000])
def test_any_label_in_memory_and_in_a_file(tmp_path: Path, label: str) -> None:
    for rows in (Rows(), Rows(file_at(tmp_path / "rows"))):
        rows.cells(HITS, label)[0] += 1
        rows.cells(HITS, "next")[0] += 2
        assert told(rows.copy()) == {f"gateway_hits_total{{{label}}}": 1, "gateway_hits_total{next}": 2}
    assert told((tmp_path / "rows").read_bytes()) == told(rows.copy())


def test_half_of_a_character_is_no_obstacle() -> None:
    rows = Rows()
    rows.cells(HITS, "\ud83d")[0] += 1
    assert told(rows.copy()) == {"gateway_hits_total{?}": 1}


def test_a_row_stays_where_it_is(tmp_path: Path) -> None:
    """Over many pages, each of which is in the file as soon as it is counted in."""
    path = tmp_path / "rows"
    for rows in (Rows(), Rows(file_at(path))):
        cells = [rows.cells(HITS, f"{number:0100}") for number in range(2000)]
        for number, found in enumerate(cells):
            found[0] += number
        assert sorted(told(rows.copy()).values()) == list(range(2000))
    assert told(path.read_bytes()) == told(rows.copy())


def test_the_next_one_counts_on(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    for generation in range(1, 4):
        rows = Rows(file_at(path))
        for number in range(1000):
            rows.cells(HITS, str(number))[0] += 1
        rows.cells(HITS, f"of {generation}")[0] += 1
        rows.histogram(SECONDS).observe(0.5)
        found = told(path.read_bytes())
        assert {found[f"gateway_hits_total{{{number}}}"] for number in range(1000)} == {generation}
        assert found["gateway_seconds_sum{}"] == generation / 2
        assert found["gateway_hits_total{of 1}"] == 1


def test_a_killed_worker_has_lost_nothing(tmp_path: Path) -> None:
    source = f"""
import os, signal
from tests_standalone.test_metrics_numbers import HITS, Path, Rows, file_at
rows = Rows(file_at(Path({str(tmp_path / "rows")!r})))
for number in range(3000):
    rows.cells(HITS, str(number % 1000))[0] += 1
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT).returncode < 0
    found = told((tmp_path / "rows").read_bytes())
    assert (len(found), set(found.values())) == (1000, {3.0})


def test_a_page_that_is_not_whole_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    Rows(file_at(path)).cells(HITS, "a")[0] += 1
    whole = path.read_bytes()
    for end in (b"\0", bytes(100), b"\xff" * 100, whole[:-1]):
        path.write_bytes(whole + end)
        assert told(path.read_bytes()) == {"gateway_hits_total{a}": 1}
        rows = Rows(file_at(path))
        for number in range(2000):
            rows.cells(HITS, f"{number:0100}")[0] += 1
        assert len(told(path.read_bytes())) == 2001


def test_a_row_that_was_not_finished_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    Rows(file_at(path)).cells(HITS, "a")[0] += 1
    page = path.read_bytes()
    path.write_bytes(page.rstrip(b"\0").ljust(len(page), b"\xff"))
    Rows(file_at(path)).cells(HITS, "b")[0] += 2
    assert told(path.read_bytes()) == {"gateway_hits_total{a}": 1, "gateway_hits_total{b}": 2}


def test_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    """What has a place goes on to count, the rest is missing."""
    source = f"""
import logging, resource
from tests_standalone.test_metrics_numbers import HITS, Path, Rows, file_at
logging.basicConfig(format="%(message)s")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
rows = Rows(file_at(Path({str(tmp_path / "rows")!r})))
for _ in range(2):
    for number in range(1500):
        rows.cells(HITS, f"{{number:0100}}")[0] += 1
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the metrics takes nothing more" in done.stderr
    found = told((tmp_path / "rows").read_bytes())
    assert 0 < len(found) < 1500
    assert set(found.values()) == {2.0}

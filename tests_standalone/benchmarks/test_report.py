"""Figures to a page, and a page from those of several runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kept
from benchmarks.kept import merged
from benchmarks.report import ADDED, ANSWER_64, BROKEN, START, factor, figure, markdown

ABOUT = {"date": "2026-11-21 12:00 UTC", "machine": "a machine"}
SPREAD = {"count": 1, "mean": 0.02, "p50": 0.02, "p90": 0.02, "p99": 0.02, "p999": 0.02, "largest": 0.02}


def measurement(cpu_us: float | None, errors: dict[str, int] | None = None) -> dict[str, Any]:
    done = 0 if cpu_us is None else 100
    used = {"self": cpu_us}
    spreads = dict.fromkeys(("latency", "first", "gap"), SPREAD)
    shares = {"per_second": done / 5, "load_share": 0.1, "others_share": 0.0}
    return {"done": done, "ended": done, "errors": errors or {}, "cpu_us": used, **spreads, **shares}


def entry(title: str, cpu_us: float | None, **more: Any) -> dict[str, Any]:
    measured = {"64": measurement(cpu_us, {} if cpu_us else {"status 500": 7})}
    figures = {"title": title, "version": "1.0", "about": ABOUT, "answers": measured, "streams": {}, "held": {}}
    return {**figures, "memory": [], **more}


def row(page: str, section: str, title: str) -> list[str]:
    lines = page.partition(f"## {section}")[2].partition("\n## ")[0].splitlines()
    return next([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith(f"| {title}"))


@pytest.mark.parametrize(
    ("value", "to", "said"),
    [
        (300.0, 200.0, "1.50x"),
        (0.0, 0.0, "met"),
        (2.0, 0.0, "NOT met"),
        (None, 200.0, ""),
        (5.0, None, ""),
        ("fails here: status 500 (7)", 200.0, ""),
    ],
)
def test_a_factor(value: float | str | None, to: float | None, said: str) -> None:
    assert factor(value, to) == said


def test_what_is_added_is_the_difference_to_direct_of_the_same_run() -> None:
    direct, ours = ({"answers": {"1": {"latency": {"p50": seconds}}}} for seconds in (0.020, 0.0215))
    ours["answers"]["1"] |= measurement(1.0) | {"latency": {"p50": 0.0215}}

    assert figure(ADDED, {**ours, "direct": direct}) == pytest.approx(1.5)
    assert figure(ADDED, ours) is None


def test_where_nothing_was_done_the_figure_says_why() -> None:
    assert figure(ANSWER_64, entry("any", None)) == "fails here: status 500 (7)"
    assert figure(START, entry("any", None)) is None


def test_what_was_not_reached_before_a_failure_says_why() -> None:
    assert figure(BROKEN, entry("any", 5.0, failed="it ended")) == "fails here: it ended"
    assert figure(ANSWER_64, entry("any", 5.0, failed="it ended")) == 5.0


def test_streams_that_broke_are_counted_though_none_was_done() -> None:
    assert figure(BROKEN, entry("any", 5.0, held={"2000": measurement(None, {"a": 1, "b": 2})})) == 3


def test_others_stand_beside_the_gateway_on_postgresql() -> None:
    page = markdown({"postgres": entry("gateway, PostgreSQL", 100.0), "litellm": entry("LiteLLM", 8000.0)})

    assert row(page, "Side by side", "gateway, PostgreSQL")[1] == "100"
    assert row(page, "Side by side", "LiteLLM 1.0")[1] == "**80.00x** (8,000)"
    assert row(page, "Against the budget", "CPU per answer, 64")[3:] == ["**0.50x** (100)"]


def test_limits_are_shown_by_what_they_add() -> None:
    page = markdown(
        {
            "postgres": entry("gateway, PostgreSQL", 120.0),
            "postgres-unlimited": entry("gateway, PostgreSQL, no limits", 100.0),
            "postgres-budget": entry("gateway, PostgreSQL, budgets too", None),
        }
    )
    section = "What limits and budgets add"
    assert row(page, section, "gateway, PostgreSQL, no limits")[1] == "100"
    assert row(page, section, "gateway, PostgreSQL ")[1] == "+20"
    assert row(page, section, "gateway, PostgreSQL, budgets too")[1] == "fails here: status 500 (7)"
    assert section not in markdown({"postgres": entry("gateway, PostgreSQL", 120.0)})


def test_one_that_is_not_there_has_a_row_that_says_so() -> None:
    absent = entry("Portkey", 1.0, answers={}, failed="portkey is not installed: its installation failed")
    page = markdown({"portkey": absent})

    assert (
        row(page, "Side by side", "Portkey 1.0")[1] == "fails here: portkey is not installed: its installation failed"
    )


def test_memory_is_shown_in_the_order_of_the_run_with_new_starts() -> None:
    steps = [("idle", 50.0), ("500 streams held", 80.0), ("a new start", 51.0), ("answers, 1", 52.0)]
    memory = [{"after": after, "seconds": 1.0, "mib": mib} for after, mib in steps]
    page = markdown({"any": entry("any", 1.0, memory=memory)})

    assert row(page, "Memory over the run", "any") == ["any", "50", "80", "52 *"]


# What is kept


def test_a_run_replaces_what_it_measured_and_nothing_else() -> None:
    old = {"direct": entry("direct", 1.0), "litellm": entry("LiteLLM", 8000.0), "gone": entry("gone", 2.0)}
    new = {"direct": entry("direct", 1.1), "postgres": entry("gateway", 100.0)}

    found = merged(old, new, ["direct", "postgres", "sqlite", "litellm"])
    assert list(found) == ["direct", "postgres", "litellm"]
    assert found["direct"] is not old["direct"]
    assert found["litellm"] is old["litellm"]
    assert found["direct"]["answers"]["64"]["cpu_us"]["self"] == 1.1


def test_the_size_of_an_installation_is_kept_until_it_is_measured_again() -> None:
    old, plain = {"postgres": entry("gateway", 1.0, install_mb=61.0)}, {"postgres": entry("gateway", 2.0)}

    assert merged(old, plain, ["postgres"])["postgres"]["install_mb"] == 61.0
    newer = {"postgres": entry("gateway", 2.0, install_mb=62.0)}
    assert merged(old, newer, ["postgres"])["postgres"]["install_mb"] == 62.0


def test_runs_come_together_in_a_folder(tmp_path: Path) -> None:
    order = ["postgres", "litellm"]
    kept.write({"litellm": entry("LiteLLM", 8000.0)}, order, tmp_path)
    kept.write({"postgres": entry("gateway", 100.0)}, order, tmp_path)

    assert list(kept.read(tmp_path)) == order
    assert (tmp_path / "latest.md").read_text() == markdown(kept.read(tmp_path))


def test_the_stored_page_is_the_one_that_its_figures_make() -> None:
    stored = json.loads((kept.RESULTS / "latest.json").read_text())["contestants"]

    assert markdown(stored) == (kept.RESULTS / "latest.md").read_text()

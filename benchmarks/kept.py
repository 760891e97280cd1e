"""What is kept of whole runs: `results/latest.json`, and `latest.md` made from it.

An entry for each contestant, each with its own date, machine and version: what a run measures replaces what was there
of the same contestants, and the rest stays. So peers need not be measured again whenever this gateway is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import report

RESULTS = Path(__file__).parent / "results"
_KEPT = ("install_mb",)
"""Measured on request only: kept from an older entry if the newer has none."""


def read(folder: Path = RESULTS) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads((folder / "latest.json").read_text())["contestants"]
    except FileNotFoundError:
        return {}
    return {name: entry for name, entry in stored.items() if "about" in entry}


def merged(stored: Mapping[str, Any], found: Mapping[str, Any], order: Iterable[str]) -> dict[str, Any]:
    """In the order of all contestants that there are; those that are no more are dropped."""
    return {name: _entry(stored.get(name), found.get(name)) for name in order if name in stored or name in found}


def write(found: Mapping[str, Any], order: Iterable[str], folder: Path = RESULTS) -> None:
    contestants = merged(read(folder), found, order)
    folder.mkdir(exist_ok=True)
    (folder / "latest.json").write_text(json.dumps({"contestants": contestants}, indent=1) + "\n")
    (folder / "latest.md").write_text(report.markdown(contestants))


def _entry(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if new is None:
        assert old is not None
        return old
    return {**{name: old[name] for name in _KEPT if old and name in old}, **new}

"""Figures as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:.2f}"


def percent(value: float) -> str:
    return f"{value * 100:.0f} %"


def cell(factor: str, value: str) -> str:
    """The factor first, the figure second."""
    return f"**{factor}** ({value})" if factor else value


def failure(found: Mapping[str, Any]) -> str | None:
    """Why a measurement has no figures; None if it has some."""
    if "failed" in found:
        return f"fails here: {found['failed']}"
    if "done" in found and not found["done"]:
        return f"fails here: {errors(found) if found['errors'] else 'no answer in time'}"
    return None


def errors(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{why} ({count:,})" for why, count in sorted(found["errors"].items())) or "0"

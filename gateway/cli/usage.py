"""`gateway usage`: what was used and what it cost."""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime

from gateway.cli.common import moment, open_database, settings_from, table
from gateway.config import Settings
from gateway.pricing import NANO
from gateway.store import usage

_HEADINGS = ("calls", "input tokens", "output tokens", "cost USD", "unpriced calls")


def run(options: argparse.Namespace) -> int:
    since = None if options.since is None else moment(options.since, "--since", "ago")
    print(asyncio.run(_usage(settings_from(options), options.by, options.user, since)))
    return 0


async def _usage(settings: Settings, by: usage.Grouping, user: str | None, since: int | None) -> str:
    async with open_database(settings) as database:
        rows = await usage.summary(database, by, user_id=user, since=since)
    lines: list[tuple[object, ...]] = [
        (
            _day(row["what"]) if by == "day" else row["what"] or "(no key)",
            row["calls"],
            row["input_tokens"],
            row["output_tokens"],
            dollars(row["cost_nanousd"]),
            row["price_unknown"] or "",
        )
        for row in rows
    ]
    total = [sum(int(row[name]) for row in rows) for name in ("calls", "input_tokens", "output_tokens", "cost_nanousd")]
    lines.append(("total", *total[:3], dollars(total[3]), ""))
    return table((by, *_HEADINGS), lines, right=(1, 2, 3, 4, 5))


def dollars(nano: int) -> str:
    """To the nano-dollar, without a float."""
    return f"{nano // NANO}.{nano % NANO:09d}"


def _day(number: int) -> str:
    return datetime.fromtimestamp(number * 86_400, UTC).strftime("%Y-%m-%d")

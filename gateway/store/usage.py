"""Usage rows: one for each call to an upstream, written once, never changed but for a user who is deleted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from gateway.store.database import Database, Row, Step

Status = Literal["ok", "error", "client_disconnected", "interrupted"]
Grouping = Literal["model", "user", "key", "day"]


@dataclass(slots=True)
class UsageRow:
    """The columns of `usage_rows`, in their order. Flags are 0 or 1, times milliseconds, money nano-dollars."""

    id: str
    request_id: str
    attempt: int
    created_at: int
    user_id: str
    key_id: str | None
    end_user: str | None
    session_id: str | None
    conversation_id: str | None
    backend: str
    model: str
    upstream_model: str
    input_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    audio_input_tokens: int
    output_tokens: int
    reasoning_tokens: int
    audio_output_tokens: int
    counted_by: Literal["upstream", "gateway"]
    price: str | None
    price_unknown: int
    cost_nanousd: int | None
    charged: int
    status: Status
    finish_reason: str | None
    stream: int
    ended_by: str | None
    ttft_ms: int | None
    duration_ms: int
    image_input_tokens: int
    image_output_tokens: int
    cache_write_1h_tokens: int


COLUMNS = [column.name for column in fields(UsageRow)]
NUMBERS = [column.name for column in fields(UsageRow) if column.type in ("int", "int | None")]

# Plain on purpose, without ON CONFLICT: a turn that is written twice must fail as a whole, totals included.
INSERT = "INSERT INTO usage_rows ({}) VALUES ({})".format(
    ", ".join(COLUMNS), ", ".join(f"${index}" for index in range(1, len(COLUMNS) + 1))
)

_GROUPS: dict[Grouping, str] = {
    "model": "model",
    "user": "user_id",
    "key": "COALESCE(key_id, '')",
    "day": "created_at / 86400000",
}


def insert(rows: Iterable[UsageRow]) -> Step:
    """Spelled out, in the order of the columns: to ask for so many by their names takes four times as long."""
    return INSERT, [
        (
            row.id, row.request_id, row.attempt, row.created_at,
            row.user_id, row.key_id, row.end_user, row.session_id, row.conversation_id,
            row.backend, row.model, row.upstream_model,
            row.input_tokens, row.cached_tokens, row.cache_write_tokens, row.audio_input_tokens,
            row.output_tokens, row.reasoning_tokens, row.audio_output_tokens, row.counted_by,
            row.price, row.price_unknown, row.cost_nanousd, row.charged,
            row.status, row.finish_reason, row.stream, row.ended_by, row.ttft_ms, row.duration_ms,
            row.image_input_tokens, row.image_output_tokens, row.cache_write_1h_tokens,
        )
        for row in rows
    ]  # fmt: skip


IDS_AT_ONCE = 64
_EXISTING = "SELECT id FROM usage_rows WHERE id IN ({})".format(
    ", ".join(f"${place}" for place in range(1, IDS_AT_ONCE + 1))
)


async def exists(database: Database, row_id: str) -> bool:
    return bool(await database.fetch("SELECT 1 FROM usage_rows WHERE id = $1", row_id))


async def existing(database: Database, row_ids: Sequence[str]) -> set[str]:
    """Those of the rows that are there."""
    found: set[str] = set()
    for first in range(0, len(row_ids), IDS_AT_ONCE):
        asked = row_ids[first : first + IDS_AT_ONCE]
        rows = await database.fetch(_EXISTING, *asked, *[""] * (IDS_AT_ONCE - len(asked)))
        found.update(row["id"] for row in rows)
    return found


async def summary(database: Database, by: Grouping, *, user_id: str | None, since: int | None) -> list[Row]:
    """Calls, tokens and cost by model, user, key or UTC day; biggest cost first, days in order."""
    order = "1" if by == "day" else "5 DESC, 1"
    sql = f"""
        SELECT {_GROUPS[by]} AS what, COUNT(*) AS calls, CAST(SUM(input_tokens) AS BIGINT) AS input_tokens,
            CAST(SUM(output_tokens) AS BIGINT) AS output_tokens,
            CAST(COALESCE(SUM(cost_nanousd), 0) AS BIGINT) AS cost_nanousd,
            CAST(SUM(CASE WHEN cost_nanousd IS NULL THEN 1 ELSE 0 END) AS BIGINT) AS price_unknown
        FROM usage_rows
        WHERE (CAST($1 AS TEXT) IS NULL OR user_id = $1) AND created_at >= $2
        GROUP BY {_GROUPS[by]}
        ORDER BY {order}"""
    return list(await database.fetch(sql, user_id, since or 0))

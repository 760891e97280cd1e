"""Stored chat completions: rows of a user, in the order of their calls, found by id, by model and by metadata.

`pk` is in the order of time and never used again. A label stands for a pair of the metadata or for a model
(`gateway.stored`); each that a completion has is a row of its own. Nothing here is written or read for a call that
is not to be stored.

`(user_id = $1) IS TRUE` is for rows that are found by their own key: no index can be used for it. A planner without
statistics takes one that begins with the user for as good, and reads all that the user has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gateway.store.database import Database, Row, Step, Transaction

Order = Literal["asc", "desc"]

INSERT = """
    INSERT INTO stored_completions (pk, id, user_id, key_id, conversation_id, created_at, model, metadata, completion,
        messages)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"""

INSERT_LABEL = "INSERT INTO stored_labels (completion_pk, label, user_id) VALUES ($1, $2, $3)"

_FIND = """
    SELECT pk, id, conversation_id, metadata, completion FROM stored_completions
    WHERE id = $2 AND (user_id = $1) IS TRUE"""

_MESSAGES = "SELECT messages FROM stored_completions WHERE id = $2 AND (user_id = $1) IS TRUE"

_PLACE = "SELECT pk FROM stored_completions WHERE id = $2 AND (user_id = $1) IS TRUE"

_LIST = """
    SELECT pk, id, conversation_id, metadata, completion FROM stored_completions
    WHERE user_id = $1 AND pk {} $2
    ORDER BY pk {} LIMIT $3"""
LIST: dict[Order, str] = {"asc": _LIST.format(">", "ASC"), "desc": _LIST.format("<", "DESC")}

# A label is walked in the order of the list, so that no more of its rows are read than are shown. A planner must not
# take it for one of few rows, and read and sort all of them. Without statistics it does so where columns are equal to
# something, so what is asked for is what lies between two rows of the index. With statistics it does so where the user
# is the first or the last, so it does not see who it is.
_WALK = """
        SELECT l.completion_pk AS pk FROM stored_labels l
        WHERE (l.user_id, l.label, l.completion_pk) {beyond} ((SELECT CAST($1 AS TEXT)), $4, $2)
            AND (l.user_id, l.label, l.completion_pk) {before} ((SELECT CAST($1 AS TEXT)), $4, $5) {also}
        ORDER BY l.user_id {order}, l.label {order}, l.completion_pk {order} LIMIT $3"""

# Further labels are looked up one by one: with EXISTS, PostgreSQL may join all that have them first. Of a comparison
# like this one planners expect that most rows pass it (see conversation_reads).
_LABELLED = f"""
    SELECT c.pk, c.id, c.conversation_id, c.metadata, c.completion
    FROM ({_WALK}
    ) AS found JOIN stored_completions c ON c.pk = found.pk AND (c.user_id = $1) IS TRUE
    ORDER BY c.pk {{order}}"""
ALSO_LABELLED = """
    AND CASE WHEN (SELECT 1 FROM stored_labels o
        WHERE o.completion_pk = l.completion_pk AND o.label = ${} AND (o.user_id = $1) IS TRUE) = 1
        THEN 0 ELSE 1 END <> 1"""

_REACH = f"""
    SELECT COUNT(*) AS many, {{last}}(pk) AS reach FROM ({_WALK}
    ) AS walked"""

_WAYS: dict[Order, dict[str, str]] = {
    "asc": {"beyond": ">", "before": "<", "order": "ASC", "last": "MAX"},
    "desc": {"beyond": "<", "before": ">", "order": "DESC", "last": "MIN"},
}
LABELLED: dict[Order, str] = {order: _LABELLED.format(also="{also}", **way) for order, way in _WAYS.items()}
REACH: dict[Order, str] = {order: _REACH.format(also="", **way) for order, way in _WAYS.items()}

# Changes nothing, and holds the row until the transaction ends.
_HOLD = """
    UPDATE stored_completions SET metadata = metadata WHERE id = $2 AND (user_id = $1) IS TRUE
    RETURNING pk, id, conversation_id, metadata, completion"""

_SET_METADATA = "UPDATE stored_completions SET metadata = $3 WHERE id = $2 AND (user_id = $1) IS TRUE"

_DROP_LABEL = "DELETE FROM stored_labels WHERE completion_pk = $2 AND label = $3 AND (user_id = $1) IS TRUE"

_DELETE = "DELETE FROM stored_completions WHERE id = $2 AND (user_id = $1) IS TRUE RETURNING pk"

_DROP_LABELS = "DELETE FROM stored_labels WHERE completion_pk = $2 AND (user_id = $1) IS TRUE"

_ENDS: dict[Order, tuple[str, str]] = {"asc": ("", "s_g"), "desc": ("s_g", "")}
"""Before the first row and behind the last: a `pk` is `s_` and hexadecimal digits."""
_WALKED = 100


@dataclass(slots=True)
class StoredCompletion:
    """A row, and its labels. `metadata`, `completion` and `messages` are JSON texts."""

    pk: str
    id: str
    user_id: str
    key_id: str | None
    created_at: int
    model: str
    metadata: str
    completion: str
    messages: str
    labels: Sequence[str]

    @property
    def size(self) -> int:
        return len(self.completion) + len(self.messages)


@dataclass(frozen=True, slots=True)
class Found:
    """What is shown of one. Both texts are JSON objects; `completion` is without metadata and conversation."""

    pk: str
    id: str
    conversation_id: str | None
    metadata: str
    completion: str


def save(completions: Iterable[tuple[StoredCompletion, str | None]]) -> list[Step]:
    """The steps that add them, each with the id of its conversation."""
    rows: list[tuple[str | int | None, ...]] = []
    labels: list[tuple[str, str, str]] = []
    for kept, conversation_id in completions:
        about = (kept.pk, kept.id, kept.user_id, kept.key_id, conversation_id, kept.created_at, kept.model)
        rows.append((*about, kept.metadata, kept.completion, kept.messages))
        labels += [(kept.pk, label, kept.user_id) for label in kept.labels]
    return [(INSERT, rows), (INSERT_LABEL, labels)]


async def find(database: Database, user_id: str, completion_id: str) -> Found | None:
    rows = await database.fetch(_FIND, user_id, completion_id)
    return _found(rows[0]) if rows else None


async def messages(database: Database, user_id: str, completion_id: str) -> str | None:
    """The messages' rows as a JSON array."""
    rows = await database.fetch(_MESSAGES, user_id, completion_id)
    return rows[0]["messages"] if rows else None


async def place(database: Database, user_id: str, completion_id: str) -> str | None:
    """Its `pk`."""
    rows = await database.fetch(_PLACE, user_id, completion_id)
    return rows[0]["pk"] if rows else None


async def listed(
    database: Database, user_id: str, *, labels: Sequence[str], after: str | None, limit: int, order: Order
) -> list[Found]:
    """Those that have all the labels, beyond the `pk` of `after`."""
    begin, end = _ENDS[order]
    begin = begin if after is None else after
    if not labels:
        return [_found(row) for row in await database.fetch(LIST[order], user_id, begin, limit)]
    rarest, *others = await _rarest_first(database, user_id, labels, begin, order)
    also = "".join(ALSO_LABELLED.format(place) for place in range(6, 6 + len(others)))
    sql = LABELLED[order].format(also=also)
    return [_found(row) for row in await database.fetch(sql, user_id, begin, limit, rarest, end, *others)]


async def _rarest_first(
    database: Database, user_id: str, labels: Sequence[str], begin: str, order: Order
) -> Sequence[str]:
    """With the one in front that fewest have from there on: the one of which as many rows reach farthest."""
    if len(labels) == 1:
        return labels
    reach: dict[str, tuple[int, str]] = {}
    for label in labels:
        row = (await database.fetch(REACH[order], user_id, begin, _WALKED, label, _ENDS[order][1]))[0]
        reach[label] = row["many"], row["reach"] or ""
    farthest = sorted(labels, key=lambda label: reach[label][1], reverse=order == "asc")
    return sorted(farthest, key=lambda label: reach[label][0])


async def hold(transaction: Transaction, user_id: str, completion_id: str) -> Found | None:
    """The row, which nobody else changes until the transaction ends."""
    rows = await transaction.fetch(_HOLD, user_id, completion_id)
    return _found(rows[0]) if rows else None


async def set_metadata(
    transaction: Transaction,
    user_id: str,
    completion_id: str,
    held: Found,
    metadata: str,
    *,
    gone: Iterable[str],
    come: Iterable[str],
) -> None:
    """Of a row that is held; with the labels that it loses and gets."""
    await transaction.execute(_SET_METADATA, user_id, completion_id, metadata)
    for label in gone:
        await transaction.execute(_DROP_LABEL, user_id, held.pk, label)
    for label in come:
        await transaction.execute(INSERT_LABEL, held.pk, label, user_id)


async def delete(database: Database, user_id: str, completion_id: str) -> bool:
    """False: there is none."""
    async with database.transaction() as transaction:
        rows = await transaction.fetch(_DELETE, user_id, completion_id)
        for row in rows:
            await transaction.execute(_DROP_LABELS, user_id, row["pk"])
    return bool(rows)


def _found(row: Row) -> Found:
    return Found(row["pk"], row["id"], row["conversation_id"], row["metadata"], row["completion"])

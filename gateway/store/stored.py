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

# The labels are walked in the order of the list, so that no more of them are read than are shown. Further labels are
# looked up one by one: with EXISTS, PostgreSQL may join all that have them first.
_LABELLED = """
    SELECT c.pk, c.id, c.conversation_id, c.metadata, c.completion
    FROM (
        SELECT l.completion_pk AS pk FROM stored_labels l
        WHERE l.user_id = $1 AND l.label = $4 AND l.completion_pk {0} $2 {{also}}
        ORDER BY l.completion_pk {1} LIMIT $3
    ) AS found JOIN stored_completions c ON c.pk = found.pk AND (c.user_id = $1) IS TRUE
    ORDER BY c.pk {1}"""
LABELLED: dict[Order, str] = {"asc": _LABELLED.format(">", "ASC"), "desc": _LABELLED.format("<", "DESC")}
ALSO_LABELLED = """
    AND (SELECT 1 FROM stored_labels o
        WHERE o.completion_pk = l.completion_pk AND o.label = ${} AND (o.user_id = $1) IS TRUE) = 1"""

# In the order of the index: else PostgreSQL may read the table from its beginning until it has met so many.
_HOW_MANY = """
    SELECT COUNT(*) AS many FROM (
        SELECT 1 FROM stored_labels WHERE user_id = $1 AND label = $2 ORDER BY completion_pk LIMIT $3
    ) AS counted"""

# Changes nothing, and holds the row until the transaction ends.
_HOLD = """
    UPDATE stored_completions SET metadata = metadata WHERE id = $2 AND (user_id = $1) IS TRUE
    RETURNING pk, id, conversation_id, metadata, completion"""

_SET_METADATA = "UPDATE stored_completions SET metadata = $3 WHERE id = $2 AND (user_id = $1) IS TRUE"

_DROP_LABEL = "DELETE FROM stored_labels WHERE completion_pk = $2 AND label = $3 AND (user_id = $1) IS TRUE"

_DELETE = "DELETE FROM stored_completions WHERE id = $2 AND (user_id = $1) IS TRUE RETURNING pk"

_DROP_LABELS = "DELETE FROM stored_labels WHERE completion_pk = $2 AND (user_id = $1) IS TRUE"

_FIRST: dict[Order, str] = {"asc": "", "desc": "s_g"}
"""Before the first row: a `pk` is `s_` and hexadecimal digits."""
_COUNTED = 1000


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
    begin = _FIRST[order] if after is None else after
    if not labels:
        return [_found(row) for row in await database.fetch(LIST[order], user_id, begin, limit)]
    rarest, *others = await _rarest_first(database, user_id, labels)
    also = "".join(ALSO_LABELLED.format(place) for place in range(5, 5 + len(others)))
    sql = LABELLED[order].format(also=also)
    return [_found(row) for row in await database.fetch(sql, user_id, begin, limit, rarest, *others)]


async def _rarest_first(database: Database, user_id: str, labels: Sequence[str]) -> Sequence[str]:
    """With the one in front that fewest have: that many are looked at."""
    if len(labels) == 1:
        return labels
    counts = {label: (await database.fetch(_HOW_MANY, user_id, label, _COUNTED))[0]["many"] for label in labels}
    return sorted(counts, key=lambda label: counts[label])


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

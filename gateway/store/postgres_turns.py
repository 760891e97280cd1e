"""A batch of finished turns as one PostgreSQL statement: one round trip, one implicit transaction, one plan.

`as_one` knows the usual steps of `usage`, `conversations`, `sessions`, `limits` and `turn_leases` by their SQL and says
the same in CTEs that change data. What differs from running them one after the other:

- All parts see the tables as they were before, so a message learns its conversation's `pk` and `message_count` from
  what the other part returns.
- PostgreSQL runs the parts that nobody reads in no order that we choose. So the last line reads those that lock
  conversations first, and sessions are locked after them, as by the steps.
- A join does not say in which order it locks rows. Where there are several they are locked first, by a subquery for
  each in the order in which the steps have them, which is one for all workers.
- A plan that was made for a small table is kept when it has grown. `= ANY (ARRAY[...])` leaves the planner no join
  other than a look into the index for each row.
- No row can be changed twice. A conversation that is made and known in one batch (somebody made it between two looks)
  ends the statement with a cardinality violation: then nothing is done, and the steps must run one after the other.

A batch of a single turn, which is what most of them are, binds its values one by one: PostgreSQL starts it in two
thirds of the time. Larger ones travel as JSON, one array of rows for each part, without the names of the columns: of
eight turns that is half the text that objects take, half the time here and two thirds of it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import orjson

from gateway.store import conversations, limits, sessions, turn_leases, usage
from gateway.store.database import RowRejected, Step, Value

_MANY = -1
_SEVERAL = 5
"""More rows than any part binds one by one."""


@dataclass(frozen=True)
class _Part:
    """A step that may be in a batch: what its rows are called here, and up to how many are bound one by one."""

    name: str
    sql: str
    columns: Sequence[str]
    few: int

    def source(self, count: int, first: int) -> str:
        """Something to read the rows from, whose first parameter is `$first`."""
        if count == _MANY:
            named = ", ".join(_member(place, column) for place, column in enumerate(self.columns))
            return f"(SELECT {named} FROM jsonb_array_elements(CAST(${first} AS JSONB)) AS e) AS v"
        places = iter(range(first, first + count * len(self.columns)))
        rows = [
            ", ".join(f"CAST(${place} AS {_type(column)})" for column, place in zip(self.columns, places, strict=False))
            for _ in range(count)
        ]
        return f"(VALUES ({'), ('.join(rows)})) AS v({', '.join(self.columns)})"


_MESSAGE = (
    "id", "behind", "role", "content", "extra", "chain", "tokens", "cost_nanousd", "model", "finish_reason", "at",
)  # fmt: skip
_TOTALS = ("messages", "tokens_input", "tokens_output", "cost_nanousd")

# In the order in which they may stand in a batch.
_PARTS = (
    _Part("usage", usage.INSERT, usage.COLUMNS, 2),
    _Part(
        "made",
        conversations.CREATE,
        ("pk", "id", "user_id", "key_id", "end_user", "session_id", "at", *_TOTALS, "title"),
        1,
    ),
    _Part("by_owner", conversations.INSERT_BY_OWNER, (*_MESSAGE, "user_id", "conversation_id"), 4),
    _Part(
        "alone",
        conversations.CREATE_ALONE,
        (
            *("pk", "id", "user_id", "key_id", "end_user", "session_id", "at", *_TOTALS, "title"),
            *("parent_id", "parent_pk", "parent_seq"),
        ),
        1,
    ),
    _Part("added", conversations.ADD_TO, ("pk", *_TOTALS, "at"), 1),
    _Part("by_pk", conversations.INSERT_BY_PK, (*_MESSAGE, "conversation_pk"), 4),
    _Part("placed", conversations.INSERT_AT, (_MESSAGE[0], "seq", *_MESSAGE[2:], "conversation_pk"), 4),
    _Part("totals", sessions.ADD, ("id", "conversations", "tokens", "cost_nanousd", "at"), 1),
    _Part("named", sessions.COUNT_NAMED, ("session_id", "pk"), 1),
    _Part("settlements", limits.INSERT, limits.COLUMNS, 3),
    _Part("ended", turn_leases.RELEASE, ("user_id", "conversation_id", "holder"), 1),
)
_PLACES = {part.sql: place for place, part in enumerate(_PARTS)}
_NUMBERS = {
    *(*usage.NUMBERS, *limits.NUMBERS, *_TOTALS, "at", "behind", "seq", "parent_seq", "tokens", "conversations"),
}


def as_one(work: Sequence[Step]) -> tuple[str, list[Value]] | None:
    """One statement and its parameters for steps that have rows; None if it does not know one of them.

    Raises RowRejected for what JSON cannot hold.
    """
    shape = tuple([(sql, len(rows[0]), len(rows) if len(rows) < _SEVERAL else _SEVERAL) for sql, rows in work])
    found = _planned(shape)
    if found is None or not _all_sessions(work):
        return None
    statement, one_by_one = found
    return statement, _values(work) if one_by_one else [_json(rows) for _, rows in work]


@lru_cache(1024)
def _planned(work: Sequence[tuple[str, int, int]]) -> tuple[str, bool] | None:
    """For steps with so many columns and rows: the statement, and whether its values are bound one by one."""
    shape = [0] * len(_PARTS)
    last, few = -1, True
    for sql, columns, count in work:
        place = _PLACES.get(sql, -1)
        if place <= last:
            return None
        part = _PARTS[place]
        if columns != len(part.columns):
            raise ValueError(f"Rows of {columns} values where {part.name} has other columns.")
        shape[place], last = count, place
        few = few and count <= part.few
    if not _complete(shape):
        return None
    if few and _one_conversation(shape):
        return _statement(tuple(shape)), True
    return _statement(tuple([_MANY if count else 0 for count in shape])), False


def _values(work: Sequence[Step]) -> list[Value]:
    """One by one."""
    values: list[Value] = []
    for _, rows in work:
        for row in rows:
            values += row
    return values


def _one_conversation(shape: Sequence[int]) -> bool:
    _, made, _, alone, added, *_ = shape
    return made + alone + added < 2


def _complete(shape: Sequence[int]) -> bool:
    """Whether each part that reads what another returns finds that one in the batch."""
    _, made, by_owner, alone, added, by_pk, placed, totals, named, *_ = shape
    if (by_owner and not made) or (by_pk and not added) or (placed and not (alone or added)):
        return False
    return not named or bool(made and totals)


def _all_sessions(work: Sequence[Step]) -> bool:
    """Whether each session in which conversations are counted gets its totals, too."""
    rows = dict(work)
    if sessions.COUNT_NAMED not in rows:
        return True
    return {row[0] for row in rows[sessions.COUNT_NAMED]} <= {row[0] for row in rows[sessions.ADD]}


def _json(rows: Sequence[Sequence[Value]]) -> str:
    try:
        return orjson.dumps(rows, default=_plain).decode()
    except TypeError as error:  # orjson's words, which show no value: half a surrogate pair, a number too large
        raise RowRejected(str(error)) from None


def _plain(row: object) -> tuple[object, ...]:
    """For rows that are tuples with names, and nothing else."""
    if isinstance(row, tuple):
        return tuple(row)
    raise TypeError(f"Type is not JSON serializable: {type(row).__name__}")


def _member(place: int, column: str) -> str:
    return f"CAST(e->>{place} AS {_type(column)}) AS {column}"


def _type(column: str) -> str:
    return "BIGINT" if column in _NUMBERS else "TEXT"


@cache
def _statement(shape: Sequence[int]) -> str:
    sources: dict[str, str] = {}
    place = 1
    for part, count in zip(_PARTS, shape, strict=True):
        if count:
            sources[part.name] = part.source(count, place)
            place += 1 if count == _MANY else count * len(part.columns)
    ordered = _MANY in shape
    parts = [*_usage(sources), *_conversations(sources, ordered), *_messages(sources), *_sessions(sources, ordered)]
    parts += [*_settlements(sources), *_ended(sources, ordered)]
    return f"WITH {', '.join(parts)} {_reading(sources)}"


def _usage(sources: Mapping[str, str]) -> list[str]:
    if "usage" not in sources:
        return []
    columns = ", ".join(usage.COLUMNS)
    return [f"usage AS (INSERT INTO usage_rows ({columns}) SELECT {columns} FROM {sources['usage']})"]


def _conversations(sources: Mapping[str, str], ordered: bool) -> list[str]:
    parts = []
    if "made" in sources:
        parts.append(f"""made AS (
            INSERT INTO conversations AS c (pk, id, user_id, key_id, end_user, session_id, created_at, last_used,
                message_count, total_tokens_input, total_tokens_output, total_cost_nanousd, title)
            SELECT pk, id, user_id, key_id, end_user, session_id, at, at, messages, tokens_input, tokens_output,
                cost_nanousd, title
            FROM {sources["made"]}
            ON CONFLICT (user_id, id) WHERE deleted_at IS NULL DO UPDATE SET
                last_used = GREATEST(c.last_used, excluded.last_used),
                message_count = c.message_count + excluded.message_count,
                total_tokens_input = c.total_tokens_input + excluded.total_tokens_input,
                total_tokens_output = c.total_tokens_output + excluded.total_tokens_output,
                total_cost_nanousd = c.total_cost_nanousd + excluded.total_cost_nanousd
            RETURNING c.pk, c.user_id, c.id, c.message_count)""")
    if "alone" in sources:
        parts.append(f"""alone AS (
            INSERT INTO conversations (pk, id, user_id, key_id, end_user, session_id, created_at, last_used,
                message_count, total_tokens_input, total_tokens_output, total_cost_nanousd, title, parent_id, parent_pk,
                parent_seq)
            SELECT pk, id, user_id, key_id, end_user, session_id, at, at, messages, tokens_input, tokens_output,
                cost_nanousd, title, parent_id, parent_pk, parent_seq
            FROM {sources["alone"]}
            RETURNING pk)""")
    if "added" in sources:
        source = f"known AS MATERIALIZED (SELECT v.* FROM {sources['added']})"
        held = """held_conversations AS (
            SELECT v.* FROM known v, LATERAL (SELECT FROM conversations WHERE pk = v.pk FOR NO KEY UPDATE) AS held)"""
        parts += [source, held] if ordered else []
        parts.append(f"""added AS (
            UPDATE conversations c SET message_count = c.message_count + v.messages,
                total_tokens_input = c.total_tokens_input + v.tokens_input,
                total_tokens_output = c.total_tokens_output + v.tokens_output,
                total_cost_nanousd = c.total_cost_nanousd + v.cost_nanousd, last_used = GREATEST(c.last_used, v.at)
            FROM {"held_conversations v" if ordered else sources["added"]}
            WHERE c.pk = ANY (ARRAY[v.pk])
            RETURNING c.pk, c.message_count)""")
    return parts


def _messages(sources: Mapping[str, str]) -> list[str]:
    there = " UNION ALL ".join(f"SELECT pk FROM {name}" for name in ("alone", "added") if name in sources)
    joins = {
        "by_owner": ("c.message_count - v.behind", "made c ON c.user_id = v.user_id AND c.id = v.conversation_id"),
        "by_pk": ("c.message_count - v.behind", "added c ON c.pk = v.conversation_pk"),
        "placed": ("v.seq", f"({there}) AS c ON c.pk = v.conversation_pk"),
    }
    return [
        f"""{name} AS (
            INSERT INTO messages (id, conversation_pk, seq, role, content, extra, chain, tokens, cost_nanousd, model,
                finish_reason, created_at)
            SELECT v.id, c.pk, {seq}, v.role, v.content, v.extra, v.chain, v.tokens,
                v.cost_nanousd, v.model, v.finish_reason, v.at
            FROM {sources[name]} JOIN {joined})"""
        for name, (seq, joined) in joins.items()
        if name in sources
    ]


def _sessions(sources: Mapping[str, str], ordered: bool) -> list[str]:
    """`counted` holds the conversations that were made and not only found under their name."""
    if "totals" not in sources:
        return []
    parts = []
    if "named" in sources:
        parts.append(f"""counted AS MATERIALIZED (
            SELECT v.session_id, COUNT(*) AS made FROM {sources["named"]} JOIN made c ON c.pk = v.pk
            GROUP BY v.session_id)""")
    if ordered:
        parts.append(f"""held_sessions AS (
            SELECT v.* FROM {sources["totals"]},
                LATERAL (SELECT FROM sessions WHERE id = v.id FOR NO KEY UPDATE) AS held)""")
    made = " + COALESCE(n.made, 0)" if "named" in sources else ""
    parts.append(f"""totals AS (
            UPDATE sessions s SET conversation_count = s.conversation_count + v.conversations{made},
                total_tokens = s.total_tokens + v.tokens, total_cost_nanousd = s.total_cost_nanousd + v.cost_nanousd,
                last_activity = GREATEST(s.last_activity, v.at)
            FROM {"held_sessions v" if ordered else sources["totals"]}
            {"LEFT JOIN counted n ON n.session_id = v.id" if "named" in sources else ""}
            WHERE s.id = ANY (ARRAY[v.id]))""")
    return parts


def _settlements(sources: Mapping[str, str]) -> list[str]:
    if "settlements" not in sources:
        return []
    columns = ", ".join(limits.COLUMNS)
    return [
        f"settlements AS (INSERT INTO limit_settlements ({columns}) SELECT {columns} FROM {sources['settlements']})"
    ]


def _ended(sources: Mapping[str, str], ordered: bool) -> list[str]:
    if "ended" not in sources:
        return []
    held = f"""held_leases AS (
            SELECT v.* FROM {sources["ended"]}, LATERAL (
                SELECT FROM turn_leases WHERE user_id = v.user_id AND conversation_id = v.conversation_id
                    AND holder = v.holder FOR UPDATE) AS held)"""
    ended = f"""ended AS (
            DELETE FROM turn_leases t USING {"held_leases v" if ordered else sources["ended"]}
            WHERE t.user_id = ANY (ARRAY[v.user_id]) AND t.conversation_id = ANY (ARRAY[v.conversation_id])
                AND t.holder = v.holder)"""
    return [held, ended] if ordered else [ended]


def _reading(sources: Mapping[str, str]) -> str:
    """The last line: it runs those parts first that lock conversations."""
    reads = [f"(SELECT COUNT(*) FROM {name})" for name in ("made", "added") if name in sources]
    if len(reads) == 2:  # "more than one row returned by a subquery", if one conversation is made and known
        reads.insert(1, "(SELECT 1 FROM made JOIN known USING (pk), (VALUES (1), (2)) AS twice)")
    return f"SELECT {', '.join(reads) or '1'}"

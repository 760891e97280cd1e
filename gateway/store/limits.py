"""The book of limits that all workers share: what `gateway.limits` decides, kept in tables.

- A batch is decided in one transaction: on PostgreSQL by one statement, `gateway_admit_2` (migrations), on SQLite
  between BEGIN IMMEDIATE and COMMIT (`limits_sqlite`). Both lock accounts before they read what is held of them.
- Accounts are locked in the order of their subjects, as Python has it, by all workers.
- What a call used is written with its turn (`settlement_step`), which locks nothing. It is entered by the next batch
  that asks for its subject, or by `sweep` if nobody does.
- A worker that asks lives, whatever its last sign of life says.
- On PostgreSQL a batch is not waited for to be on disk. Settlements are, and nothing that takes them is there before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.ids import ordered_hex
from gateway.limits import DEAD_AFTER, UNIT, Account, Ahead, Batch, Grant, Period, Reason, Settlement, Verdict, Wish
from gateway.store import keys, limits_sqlite
from gateway.store.database import Database, Row, Step, Value

_ADMIT = "SELECT gateway_admit_2(CAST(CAST($1 AS TEXT) AS TEXT[]), CAST(CAST($2 AS TEXT) AS BIGINT[]))"

COLUMNS = (
    "subject", "id", "worker", "slots", "tokens_held", "tokens_used", "cost_held_nanousd", "cost_nanousd", "period",
)  # fmt: skip
NUMBERS = COLUMNS[3:]
INSERT = f"INSERT INTO limit_settlements ({', '.join(COLUMNS)}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)"

_REASONS: Sequence[Reason] = ("", "budget", "requests", "tokens", "parallel", "seed")
_FREE = Grant("", 0, 0, None, None, ())
_NO_WISH = Wish(0)[1:]
_KINDS: dict[Period, int] = {"total": 0, "month": 1, "day": 2}
_MOST_TOKENS = 10**14
_MOST_COST = 2**63 - 1
"""More than any bucket or budget holds, and a claim may ask for what no column can."""

SETTLED_FOR = 60_000
"""Milliseconds that a settlement waits for a call of its account, before `sweep` enters it."""
GONE_FOR = 60 * 60 * 1000
FULL_FOR = 10 * 60 * 1000
"""Milliseconds after which a dead worker is forgotten, and an account that is as good as new."""
SUBJECTS_AT_ONCE = 200
ROWS_AT_ONCE = 50_000
_ENTERED_AT_ONCE = 20

_NOW = {
    "postgres": "SELECT CAST(floor(date_part('epoch', clock_timestamp()) * 1000) AS BIGINT)",
    "sqlite": "SELECT CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
}

_STATES = "SELECT subject, period, full_at FROM limit_states WHERE subject > $1 ORDER BY subject LIMIT $2"

# From one subject to the next by the index, however many settlements each has.
_SETTLED = """
    WITH RECURSIVE found (subject) AS (
        SELECT MIN(subject) FROM limit_settlements WHERE subject > $1
        UNION ALL
        SELECT (SELECT MIN(s.subject) FROM limit_settlements s WHERE s.subject > found.subject)
        FROM found WHERE found.subject IS NOT NULL)
    SELECT subject, (SELECT MIN(id) FROM limit_settlements s WHERE s.subject = found.subject) AS first_id
    FROM found WHERE subject IS NOT NULL LIMIT $2"""

_HELD_BY_DEAD = """
    SELECT h.subject FROM workers w JOIN limit_holds h ON h.worker = w.id
    WHERE w.seen_at < $1 AND (h.slots > 0 OR h.tokens > 0 OR h.cost_nanousd > 0) LIMIT $2"""
# Of a time that the clock was set back from: nobody would think that worker dead before it is reached again.
_OF_THE_FUTURE = "UPDATE workers SET seen_at = CAST($1 AS BIGINT) WHERE seen_at > CAST($1 AS BIGINT) + 1000"
_GONE = "SELECT id FROM workers WHERE seen_at < $1 LIMIT $2"

_FORGET_STATE = "DELETE FROM limit_states WHERE subject = $1 AND period IS NULL AND full_at < $2"
_FORGET_HOLDS = """
    DELETE FROM limit_holds WHERE subject = $1 AND slots = 0 AND tokens = 0 AND cost_nanousd = 0
        AND NOT EXISTS (SELECT 1 FROM limit_states WHERE subject = $1)"""
_FORGET_HOLDS_OF = "DELETE FROM limit_holds WHERE worker = $1 AND slots = 0 AND tokens = 0 AND cost_nanousd = 0"
_FORGET_WORKER = """
    DELETE FROM workers WHERE id = $1 AND seen_at < $2 AND NOT EXISTS (SELECT 1 FROM limit_holds WHERE worker = $1)"""

_SPENT = "SELECT CAST(COALESCE(SUM(cost_nanousd), 0) AS BIGINT) AS spent FROM usage_rows WHERE charged = 1 AND "


async def admit(database: Database, batch: Batch) -> Verdict:
    """Decides a batch. Its accounts have one subject each. If it raises, nobody knows whether it was done.

    Claims that ask no account cost a look at the state of the keys.
    """
    if not batch.accounts and not batch.settlements and (not batch.beat or database.dialect == "sqlite"):
        if batch.beat:
            await limits_sqlite.beat(database, batch)
        state = await keys.state(database)
        return Verdict([_FREE] * len(batch.claims), state.revision, state.ever_made)
    asked = batch._replace(accounts=_asked(batch)) if batch.settlements else batch
    if database.dialect == "sqlite":
        return await limits_sqlite.admit(database, asked)
    order = sorted(range(len(asked.accounts)), key=lambda place: asked.accounts[place].subject)
    found = await database.fetch(_ADMIT, *_question(asked, order))
    return _verdict(asked, order, found[0][0])


def settlement_step(settlements: Iterable[Settlement]) -> Step:
    """For the transaction of the turns that the calls left."""
    return INSERT, [
        (
            one.subject, ordered_hex(), one.worker, one.slots, one.tokens_held, one.tokens_used, one.cost_held,
            one.cost, one.period,
        )
        for one in settlements
    ]  # fmt: skip


async def spent_since(database: Database, *, user_id: str | None, key_id: str | None, since: int) -> int:
    """What calls have cost since a moment: those of a key, of a user without a key, or of all (`user_id` None).

    Summed up in slices of `ROWS_AT_ONCE` rows, however long the history is: no read may take long.
    """
    whose = "" if user_id is None else " AND user_id = $2"
    key = "" if user_id is None else " AND key_id IS NULL" if key_id is None else " AND key_id = $3"
    user: list[Value] = [] if user_id is None else [user_id]
    values = [*user, *([] if user_id is None or key_id is None else [key_id])]
    border = f"SELECT created_at FROM usage_rows WHERE created_at > $1{whose} ORDER BY created_at LIMIT 1"
    total = 0
    while True:
        found = await database.fetch(f"{border} OFFSET {ROWS_AT_ONCE}", since, *user)
        until = found[0]["created_at"] if found else None
        part = "" if until is None else f" AND created_at < {int(until)}"
        total += int((await database.fetch(f"{_SPENT} created_at >= $1{part}{whose}{key}", since, *values))[0]["spent"])
        if until is None:
            return total
        since = until


async def sweep(database: Database, worker: str, after: str = "", *, now: int | None = None) -> str:
    """Puts away what is over, a part at a time: enters settlements that nobody asked for, takes back what dead workers
    hold, forgets workers that are long dead, and accounts that are as good as new.

    Begins behind the subject `after`; returns where to go on, "" for the beginning.
    """
    if now is None:
        now = int((await database.fetch(_NOW[database.dialect]))[0][0])
    await database.write([(_OF_THE_FUTURE, [(now,)])])
    states = await database.fetch(_STATES, after, SUBJECTS_AT_ONCE)
    settled = await database.fetch(_SETTLED, after, SUBJECTS_AT_ONCE)
    left = await database.fetch(_HELD_BY_DEAD, now - DEAD_AFTER, SUBJECTS_AT_ONCE)
    late = f"{now - SETTLED_FOR:012x}"
    subjects = {row["subject"] for row in settled if row["first_id"] < late} | {row["subject"] for row in left}
    await _enter(database, worker, sorted(subjects), now)
    idle = [row["subject"] for row in states if row["period"] is None and row["full_at"] < now - FULL_FOR]
    await database.write(
        [
            (_FORGET_STATE, [(subject, now - FULL_FOR) for subject in sorted(idle)]),
            (_FORGET_HOLDS, [(subject,) for subject in sorted(idle)]),
        ]
    )
    gone = [row["id"] for row in await database.fetch(_GONE, now - GONE_FOR, SUBJECTS_AT_ONCE)]
    await database.write(
        [(_FORGET_HOLDS_OF, [(name,) for name in gone]), (_FORGET_WORKER, [(name, now - GONE_FOR) for name in gone])]
    )
    return _next([states, settled])


async def _enter(database: Database, worker: str, subjects: Sequence[str], now: int) -> None:
    """Asks accounts without a claim and without their limits, which nobody knows here: their levels stay as they are,
    but for what is given back."""
    for first in range(0, len(subjects), _ENTERED_AT_ONCE):
        accounts = [Account(subject) for subject in subjects[first : first + _ENTERED_AT_ONCE]]
        await admit(database, Batch(worker, accounts, judge=True, now=now))


def _next(parts: Sequence[Sequence[Row]]) -> str:
    """The subject up to which all parts have been seen; "" if they were seen to their ends."""
    return min((part[-1]["subject"] for part in parts if len(part) == SUBJECTS_AT_ONCE), default="")


def _asked(batch: Batch) -> list[Account]:
    """The accounts of a batch, those too that it only settles."""
    known = {account.subject for account in batch.accounts}
    return [*batch.accounts, *map(Account, sorted({one.subject for one in batch.settlements} - known))]


def _question(batch: Batch, order: Sequence[int]) -> tuple[str, str]:
    """The arguments of `gateway_admit_2`, which says what they are, as text."""
    accounts = [batch.accounts[place] for place in order]
    texts = [batch.worker, *(account.subject for account in accounts)]
    numbers: list[int | None] = [int(batch.beat), int(batch.judge), batch.now]
    numbers += len(accounts), len(batch.settlements), len(batch.claims)
    wished = {wish.at: wish[1:] for wish in batch.wishes}
    for place, account in zip(order, accounts, strict=True):
        _, request_rate, requests, token_rate, tokens, parallel, budget, period, seed = account
        numbers += request_rate, requests * UNIT, token_rate, tokens * UNIT, parallel, budget, _KINDS[period], seed
        numbers += wished.get(place, _NO_WISH)
    places = {place: number for number, place in enumerate(order, 1)}
    if batch.settlements:
        number_of = {account.subject: number for number, account in enumerate(accounts, 1)}
        for one in batch.settlements:
            texts.append(one.worker)
            numbers += number_of[one.subject], len(texts), *one[2:]
    for tokens, cost, asked in batch.claims:
        numbers += min(tokens, _MOST_TOKENS) * UNIT, min(cost, _MOST_COST), len(asked)
        numbers += [places[place] for place in asked]
    quoted = '","'.join(texts) if '"' not in (said := "".join(texts)) and "\\" not in said else _escaped(texts)
    return f'{{"{quoted}"}}', f"{{{str(numbers)[1:-1]}}}".replace("None", "NULL")


def _escaped(texts: Sequence[str]) -> str:
    return '","'.join(text.replace("\\", "\\\\").replace('"', '\\"') for text in texts)


def _verdict(batch: Batch, order: Sequence[int], answer: Sequence[int]) -> Verdict:
    revision, ever_made = answer[0], answer[1]
    at = 2 + 7 * len(order)
    period_of = dict(zip(order, answer[2:at:7], strict=True))
    grants = []
    for claim in batch.claims:
        reason, place, wait, requests, tokens = answer[at : at + 5]
        at += 5
        grants.append(
            Grant(
                _REASONS[reason],
                order[place - 1] if reason else 0,
                wait,
                requests,
                tokens,
                [period_of[asked] for asked in claim.accounts],
            )
        )
    return Verdict(grants, revision, bool(ever_made), _ahead(batch, order, answer))


def _ahead(batch: Batch, order: Sequence[int], answer: Sequence[int]) -> list[Ahead]:
    if not batch.wishes:
        return []
    found = []
    number_of = {place: number for number, place in enumerate(order)}
    for wish in batch.wishes:
        at = 2 + 7 * number_of[wish.at]
        period, requests, tokens, slots, cost, request_level, token_level = answer[at : at + 7]
        found.append(Ahead(requests, tokens, slots, cost, request_level, token_level, period))
    return found

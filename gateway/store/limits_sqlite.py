"""The book of limits on SQLite: read, decided by `gateway.limits`, and written back by the one transaction that writes.

Every statement is one way to a thread and back, so there are few, and they take many rows as JSON.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gateway.limits import (
    DAY,
    DEAD_AFTER,
    UNIT,
    Account,
    Ahead,
    Batch,
    Grant,
    Hold,
    Settlement,
    State,
    Verdict,
    Wish,
    advance,
    decide,
    held,
    settle,
    take_back,
)
from gateway.limits_ahead import lend, returned
from gateway.store.database import Database, Row, Transaction
from gateway.wire.jsontext import dumps

_BEAT = """
    INSERT INTO workers (id, seen_at) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET seen_at = excluded.seen_at"""

_READ = """
    SELECT 'state' AS what, subject, '' AS worker, at AS a, requests AS b, tokens AS c, period AS d, spent_nanousd AS e,
        full_at AS f
    FROM limit_states WHERE subject IN (SELECT value FROM json_each($1))
    UNION ALL
    SELECT 'hold', h.subject, h.worker, h.slots, h.tokens, h.cost_nanousd, w.seen_at, h.requests_ahead, h.tokens_ahead
    FROM limit_holds h LEFT JOIN workers w ON w.id = h.worker WHERE h.subject IN (SELECT value FROM json_each($1))
    UNION ALL
    SELECT 'settlement', subject, worker, slots, tokens_held, tokens_used, cost_held_nanousd, cost_nanousd, period
    FROM limit_settlements WHERE subject IN (SELECT value FROM json_each($1))
    UNION ALL
    SELECT 'keys', '', '', revision, keys_ever_made, NULL, NULL, NULL, NULL FROM gateway_state WHERE id = 1"""

_SETTLED = "DELETE FROM limit_settlements WHERE subject IN (SELECT value FROM json_each($1))"
_TAKEN_BACK = "DELETE FROM limit_holds WHERE subject = $1 AND worker = $2"


def _of_json(places: int) -> str:
    return ", ".join(f"json_extract(value, '$[{place}]')" for place in range(places))


# "WHERE true": without it SQLite takes ON for the beginning of a join.
_PUT_STATES = f"""
    INSERT INTO limit_states (subject, at, requests, tokens, period, spent_nanousd, full_at)
    SELECT {_of_json(7)} FROM json_each($1) WHERE true
    ON CONFLICT (subject) DO UPDATE SET at = excluded.at, requests = excluded.requests, tokens = excluded.tokens,
        period = excluded.period, spent_nanousd = excluded.spent_nanousd, full_at = excluded.full_at"""
_PUT_HOLDS = f"""
    INSERT INTO limit_holds (subject, worker, slots, tokens, cost_nanousd, requests_ahead, tokens_ahead)
    SELECT {_of_json(7)} FROM json_each($1) WHERE true
    ON CONFLICT (subject, worker) DO UPDATE SET slots = excluded.slots, tokens = excluded.tokens,
        cost_nanousd = excluded.cost_nanousd, requests_ahead = excluded.requests_ahead,
        tokens_ahead = excluded.tokens_ahead"""


@dataclass(slots=True)
class _Entry:
    """An account in the book, with what each worker holds of it. `full_at`: when its buckets are full again."""

    state: State
    full_at: int
    holds: dict[str, Hold] = field(default_factory=dict)
    settlements: list[Settlement] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)
    taken_back: list[str] = field(default_factory=list)


async def beat(database: Database, batch: Batch) -> None:
    """Says that a worker lives."""
    await database.write([(_BEAT, [(batch.worker, _now(batch))])])


async def admit(database: Database, batch: Batch) -> Verdict:
    subjects = dumps([account.subject for account in batch.accounts]).decode()
    async with database.transaction() as transaction:
        if batch.beat:
            await transaction.execute(_BEAT, batch.worker, _now(batch))
        found = await transaction.fetch(_READ, subjects)
        now = _now(batch)
        book, seen = _book(found, batch.accounts, now)
        for one in batch.settlements:
            book[one.subject].settlements.append(one)
        wishes = {wish.at: wish for wish in batch.wishes}
        for at, account in enumerate(batch.accounts):
            _bring_up(book[account.subject], account, batch, seen, now, wishes.get(at))
        grants = [_decided(claim_at, batch, book) for claim_at in range(len(batch.claims))]
        ahead = [_lent(book, batch, wish) for wish in batch.wishes]
        await _write(transaction, batch.accounts, book, subjects, any(row["what"] == "settlement" for row in found))
    state = next(row for row in found if row["what"] == "keys")
    return Verdict(grants, state["a"], bool(state["b"]), ahead)


def _now(batch: Batch) -> int:
    """SQLite has no other clock than the machine's."""
    return time.time_ns() // 1_000_000 if batch.now is None else batch.now


def _book(
    found: Iterable[Row], accounts: Sequence[Account], now: int
) -> tuple[dict[str, _Entry], dict[str, int | None]]:
    """The accounts as the tables have them, and when each worker that holds something was seen."""
    book = {account.subject: _Entry(State(now), now) for account in accounts}
    seen: dict[str, int | None] = {}
    for row in found:
        entry = book.get(row["subject"])
        if entry is None:
            continue
        if row["what"] == "state":
            state = entry.state
            state.at, state.requests, state.tokens, state.period = row["a"], row["b"], row["c"], row["d"]
            state.spent, entry.full_at = row["e"], row["f"]
        elif row["what"] == "hold":
            hold = entry.holds[row["worker"]] = Hold(row["a"], row["b"], row["c"], row["e"], row["f"])
            entry.state.slots += hold.slots
            entry.state.reserved += hold.cost
            entry.state.requests_ahead += hold.requests_ahead
            entry.state.tokens_ahead += hold.tokens_ahead
            seen[row["worker"]] = row["d"]
        else:
            entry.settlements.append(
                Settlement(
                    row["subject"], row["worker"], row["a"], row["b"], row["c"], row["d"], row["e"], row["f"]
                )
            )  # fmt: skip
    return book, seen


def _bring_up(
    entry: _Entry, account: Account, batch: Batch, seen: Mapping[str, int | None], now: int, wish: Wish | None
) -> None:
    """Enters what is over, takes back what the dead hold and the worker does not want any more, then brings the account
    to the present."""
    refunds = 0
    for one in entry.settlements:
        refunds += settle(entry.state, entry.holds.get(one.worker), one)
        if one.worker in entry.holds:
            entry.changed.add(one.worker)
    for worker in list(entry.holds) if batch.judge else ():
        last = seen[worker]
        if worker != batch.worker and (last is None or last < now - DEAD_AFTER):
            refunds += take_back(entry.state, entry.holds.pop(worker))
            entry.changed.discard(worker)
            entry.taken_back.append(worker)
    if wish is not None and batch.worker in entry.holds:
        refunds += returned(entry.state, entry.holds[batch.worker], wish)
        entry.changed.add(batch.worker)
    if refunds < 0 and entry.state.tokens is not None and account.request_rate is None and account.token_rate is None:
        entry.full_at = max(entry.full_at, now) + 31 * DAY  # nobody knows here how long a debt takes
    advance(entry.state, account, now, refunds)


def _decided(claim_at: int, batch: Batch, book: Mapping[str, _Entry]) -> Grant:
    claim = batch.claims[claim_at]
    asked = {place: batch.accounts[place] for place in claim.accounts}
    states = {account.subject: book[account.subject].state for account in asked.values()}
    grant = decide(claim, batch.accounts, states)
    if grant.reason:
        return grant
    for place, account in enumerate(asked.values()):
        takes = held(claim, account, grant, place, batch.worker)
        if takes.slots or takes.tokens_held or takes.cost_held:
            entry = book[account.subject]
            hold = entry.holds.setdefault(batch.worker, Hold())
            hold.slots += takes.slots
            hold.tokens += takes.tokens_held
            hold.cost += takes.cost_held
            entry.changed.add(batch.worker)
    return grant


def _lent(book: Mapping[str, _Entry], batch: Batch, wish: Wish) -> Ahead:
    account = batch.accounts[wish.at]
    entry = book[account.subject]
    hold = entry.holds.get(batch.worker, Hold())
    ahead = lend(entry.state, hold, account, wish)
    if any(ahead[:4]):
        entry.holds[batch.worker] = hold
        entry.changed.add(batch.worker)
    return ahead


async def _write(
    transaction: Transaction,
    accounts: Sequence[Account],
    book: Mapping[str, _Entry],
    subjects: str,
    settled: bool,
) -> None:
    if settled:
        await transaction.execute(_SETTLED, subjects)
    for subject, entry in book.items():
        for worker in entry.taken_back:
            await transaction.execute(_TAKEN_BACK, subject, worker)
    states, holds = [], []
    for account in accounts:
        entry = book[account.subject]
        state = entry.state
        full_at = _full_at(entry, account)
        states.append(
            (account.subject, state.at, state.requests, state.tokens, state.period, state.spent, full_at)
        )  # fmt: skip
        for worker in entry.changed:
            hold = entry.holds[worker]
            holds.append(
                (account.subject, worker, hold.slots, hold.tokens, hold.cost, hold.requests_ahead, hold.tokens_ahead)
            )
    await transaction.execute(_PUT_STATES, dumps(states).decode())
    if holds:
        await transaction.execute(_PUT_HOLDS, dumps(holds).decode())


def _full_at(entry: _Entry, account: Account) -> int:
    if account.request_rate is None and account.token_rate is None:
        return entry.full_at
    state, times = entry.state, [0]
    if account.request_rate is not None:
        times.append(-(((state.requests or 0) - account.request_capacity * UNIT) // account.request_rate))
    if account.token_rate is not None:
        times.append(-(((state.tokens or 0) - account.token_capacity * UNIT) // account.token_rate))
    return state.at + max(times)

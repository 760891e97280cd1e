"""What one logical request leaves behind, and what is written of it. Who writes it, and when: `ledger`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.limits import Settlement, summed
from gateway.store import conversations, limits, sessions, stored, turn_leases, usage
from gateway.store.conversations import ConversationTurn
from gateway.store.database import Step
from gateway.store.sessions import SessionTotals
from gateway.store.stored import StoredCompletion
from gateway.store.turn_leases import Lease
from gateway.store.usage import UsageRow


@dataclass(slots=True)
class Turn:
    """What one logical request leaves behind."""

    usage: Sequence[UsageRow]
    conversation: ConversationTurn | None = None
    settlements: Sequence[Settlement] = ()
    """What becomes of what it held of its limits."""
    stored: StoredCompletion | None = None
    """Its answer, if it was asked for with `store: true`."""
    settled: bool = field(default=False, compare=False)
    """It is durable, or never will be."""
    waiter: asyncio.Future[None] | None = field(default=None, compare=False)
    given_at: float = field(default=0.0, compare=False)
    """When the ledger got it, by the loop's clock: a waiter is told when it takes too long."""

    size: int = field(default=0, compare=False)
    """Bytes of content, about; known once it is recorded."""


def name_rows(turn: Turn) -> None:
    """After its conversation may have become another one."""
    if turn.conversation is not None:
        for row in turn.usage:
            row.conversation_id = turn.conversation.id


def steps(batch: Sequence[Turn]) -> list[Step]:
    """What is written of these turns, in the order in which it must be."""
    rows: list[UsageRow] = []
    settlements: list[Settlement] = []
    talks: list[ConversationTurn] = []
    named: list[tuple[str, str]] = []
    leases: list[Lease] = []
    completions: list[tuple[StoredCompletion, str | None]] = []
    for turn in batch:
        rows += turn.usage
        settlements += turn.settlements
        talk = turn.conversation
        if turn.stored is not None:
            completions.append((turn.stored, None if talk is None else talk.id))
        if talk is None:
            continue
        talks.append(talk)
        if talk.is_named and talk.is_new and talk.session_id is not None:
            named.append((talk.session_id, talk.pk))
        if talk.lease is not None:
            leases.append(talk.lease)
    work = [usage.insert(rows)]
    if talks:
        work += conversations.save(talks)
        work.append(sessions.add_totals(_session_totals(talks)))
    if named:
        work.append(sessions.count_named(named))
    if settlements:
        work.append(limits.settlement_step(summed(settlements)))
    if completions:
        work += stored.save(completions)
    if leases:
        work.append(turn_leases.release_step(leases))
    return work


def size_of(turn: Turn) -> int:
    """Bytes of content, about."""
    size = 0 if turn.stored is None else turn.stored.size
    if turn.conversation is not None:
        for message in turn.conversation.messages or ():
            size += len(message.content) + len(message.extra or "")
    return size


def _session_totals(turns: Sequence[ConversationTurn]) -> list[SessionTotals]:
    totals: dict[str, SessionTotals] = {}
    for turn in turns:
        session_id = turn.session_id
        if session_id is None:
            continue
        total = totals.get(session_id)
        if total is None:
            total = totals[session_id] = SessionTotals(session_id)
        if turn.is_new and not turn.is_named:
            total.conversations += 1
        total.tokens += turn.tokens_output
        total.cost_nanousd += turn.cost_nanousd
        if turn.at > total.last_activity:
            total.last_activity = turn.at
    return list(totals.values())


def figures(turn: Turn) -> str:
    """A turn for the log: figures and ids, never content."""
    return "; ".join(
        f"request={row.request_id} attempt={row.attempt} user={row.user_id} model={row.model} status={row.status} "
        f"input={row.input_tokens} output={row.output_tokens} cost_nanousd={row.cost_nanousd}"
        for row in turn.usage
    )

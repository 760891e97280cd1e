"""Turns that somebody was quicker than, told apart for a whole batch: one conflict must not make all the others of its
batch wait for a commit each.

A turn of rules 2 and 3 goes on from the last message that it has seen, without a lease. If another one has gone on from
there meanwhile, or has taken the name that was free, it becomes a branch; into an empty conversation of its name it
goes.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.store import conversations
from gateway.store.conversations import ConversationTurn, StoredChains
from gateway.store.database import Database
from gateway.talks import OWN_ID, branched


async def sort_out(database: Database, talks: Sequence[ConversationTurn]) -> int:
    """Changes those of one batch, in its order, that would meet another of it or what is there. Gives how many."""
    late = [talk for talk in talks if talk.after is not None and talk.parent is None]
    ends = await conversations.lengths(database, sorted({talk.pk for talk in late if not talk.is_new}))
    changed = 0
    for talk in late:
        if talk.is_new and not OWN_ID.fullmatch(talk.id):
            found = await conversations.find_chains(database, talk.user_id, talk.id, 1)
            changed += found is not None and (_joins(talk, found) or branched(talk))
    return changed + _told_apart(late, ends)


async def joined(database: Database, talk: ConversationTurn) -> bool:
    """Is it now the first turn of an empty conversation, which somebody has made under its name meanwhile?"""
    if not talk.is_new or talk.after != 0 or talk.parent is not None:
        return False
    found = await conversations.find_chains(database, talk.user_id, talk.id, 1)
    return found is not None and _joins(talk, found)


def _joins(talk: ConversationTurn, found: StoredChains) -> bool:
    if talk.after or found.message_count:
        return False
    talk.pk, talk.session_id, talk.is_new = found.pk, found.session_id, False
    talk.gives_title = found.title is None
    return True


def _told_apart(late: Sequence[ConversationTurn], ends: dict[str, int]) -> int:
    """`ends`: how many messages the conversations have; grows by those of the turns that may stay."""
    changed, names = 0, set()
    for talk in late:
        if talk.parent is not None or talk.after is None:
            continue  # a branch by now
        if talk.is_new:
            met = (talk.user_id, talk.id) in names
            names.add((talk.user_id, talk.id))
        else:
            met = talk.after < ends.get(talk.pk, 0)
            if not met:
                ends[talk.pk] = talk.after + len(talk.messages)
        changed += met and branched(talk)
    return changed

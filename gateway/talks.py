"""A conversation while one turn runs on it, and what the turn adds to it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Protocol

from gateway.caller import Caller
from gateway.ids import ordered_hex, random_hex
from gateway.store.conversations import ConversationTurn, Parent, StoredMessage
from gateway.store.text import clean
from gateway.store.turn_leases import Lease
from gateway.threads import NOT_CHAINED, PARTIAL, PLAIN_ROLES, linked, partial
from gateway.wire.chat import Message, text_of
from gateway.wire.jsontext import dumps

TITLE_LENGTH = 80
LONGEST_CLOSE = 2.0
OWN_ID = re.compile(r"conv_[0-9a-f]{32}")


class Hold(Protocol):
    """What a turn keeps others from while it runs."""

    def let_go(self, recorded: bool) -> asyncio.Future[object] | None:
        """`recorded`: its turn is durable. What is given back, if that takes a while, by when all workers know."""


class Talk(ConversationTurn):
    """A conversation while one turn runs on it; `close` it when the call is over, however it ended.

    `asked` are the new messages of the client, `history` the stored ones that are sent before the client's. `preface`
    is sent and stored, `reminder` only sent. `chain` is that before the first new message. `is_empty`: it is there, and
    nothing was said yet. `recorded`: its turn is durable; as a branch, if somebody else was quicker, which has given it
    another id.
    """

    __slots__ = (
        "asked", "caller", "chain", "history", "hold", "is_empty", "keeps_content", "omitted_turns", "preface",
        "recorded", "reminder",
    )  # fmt: skip

    def __init__(
        self,
        id: str,
        pk: str,
        caller: Caller,
        end_user: str | None,
        is_new: bool,
        asked: Sequence[Message],
        session_id: str | None = None,
        chain: str = "",
        after: int | None = None,
        is_named: bool = False,
    ) -> None:
        """Sets what it is as a turn, too, field by field: each call makes one."""
        self.pk = pk
        self.id = id
        self.user_id = caller.user_id
        self.key_id = caller.key_id
        self.end_user = end_user
        self.session_id = session_id
        self.is_new = is_new
        self.is_named = is_named
        self.title: str | None = None
        self.messages: Sequence[StoredMessage] = ()
        self.at = 0
        self.tokens_input = 0
        self.tokens_output = 0
        self.cost_nanousd = 0
        self.after = after
        self.parent: Parent | None = None
        self.lease: Lease | None = None
        self.gives_title = False
        self.caller = caller
        self.asked = asked
        self.chain = chain
        self.history: Sequence[StoredMessage] = ()
        self.preface: Message | None = None
        self.reminder: Message | None = None
        self.hold: Hold | None = None
        self.is_empty = False
        self.recorded = False
        self.keeps_content = True
        self.omitted_turns = 0

    @property
    def begins(self) -> bool:
        """Is this its first turn?"""
        return self.is_empty or (self.is_new and self.parent is None)

    def turn(
        self,
        answer: Message | None,
        at: int,
        *,
        model: str,
        finish_reason: str | None,
        input_tokens: int,
        output_tokens: int,
        cost_nanousd: int,
    ) -> ConversationTurn:
        """What this turn adds, for the ledger: the new messages of the client and, if there is one, the answer."""
        stored: list[StoredMessage] = []
        chain = self.chain
        asked = [self.preface, *self.asked] if self.preface is not None else self.asked
        for message in asked:
            content = dumps(message.get("content"))
            chain = linked(chain, message, content)
            stored.append(_stored(message, content, chain))
        if answer is not None:
            if not isinstance(answer.get("role"), str):  # an upstream's slip must not cost the turn
                answer = {**answer, "role": "assistant"}
            content = dumps(answer.get("content"))
            chain = partial(chain) if finish_reason in PARTIAL else linked(chain, answer, content)
            said = _stored(answer, content, chain)
            said.tokens, said.cost_nanousd, said.omitted_turns = output_tokens, cost_nanousd, self.omitted_turns
            said.model, said.finish_reason = clean(model), clean(finish_reason)
            stored.append(said)
        self.gives_title = self.is_empty and self.title is None
        if not self.keeps_content:
            for kept in stored:
                kept.content, kept.extra, kept.chain = "null", None, None
        elif self.title is None and self.begins:
            self.title = _title(self.asked)
        self.at = at
        self.messages = stored
        self.tokens_input = input_tokens
        self.tokens_output = output_tokens
        self.cost_nanousd = cost_nanousd
        self.asked = self.history = ()  # it may wait long for the database, with no more than its rows
        return self

    def branch_off(self) -> None:
        """It goes on from what it has seen, in a conversation of its own."""
        assert self.after is not None
        self.parent = Parent(self.id, self.pk, self.after)
        self.id, self.pk, self.is_new, self.session_id = new_id(), new_pk(), True, None

    def close(self) -> asyncio.Future[object] | None:
        """Lets others have what it held."""
        hold, self.hold = self.hold, None
        return hold.let_go(self.recorded) if hold is not None else None

    async def aclose(self) -> None:
        """The same, and waits until all workers know: a client that is told of a failure may come back at once."""
        under_way = self.close()
        if under_way is not None:
            await asyncio.wait({under_way}, timeout=LONGEST_CLOSE)


def new_id() -> str:
    return f"conv_{random_hex()}"


def new_pk() -> str:
    return f"c_{ordered_hex()}"


def branched(turn: ConversationTurn) -> bool:
    """Makes a turn that somebody was quicker than one of a branch, which goes on from what the turn has seen. False: it
    is no turn that somebody could be quicker than."""
    if turn.after is None or turn.parent is not None:
        return False
    turn.parent = Parent(turn.id, None if turn.is_new else turn.pk, turn.after)
    turn.id, turn.pk, turn.session_id = new_id(), new_pk(), None
    turn.is_new, turn.gives_title = True, False
    return True


def _stored(message: Message, content: bytes, chain: str) -> StoredMessage:
    role: str = message["role"]
    extra = None
    if len(message) > 2 or "content" not in message:
        rest = {**message}
        del rest["role"]
        rest.pop("content", None)
        extra = dumps(rest).decode() if rest else None
    if role not in PLAIN_ROLES:
        chain, role = "" if role in NOT_CHAINED else chain, clean(role)
    return StoredMessage(f"msg_{ordered_hex()}", role, content.decode(), extra, chain or None)


def _title(messages: Sequence[Message]) -> str | None:
    """The start of the first thing the user said."""
    said = ""
    for item in messages:
        if item.get("role") == "user":
            content = item.get("content")
            said = content if type(content) is str else text_of(content)
            break
    begin = said[: TITLE_LENGTH + 1]
    if begin.isprintable() and "  " not in begin and begin.strip() == begin:  # then this is what comes out below
        return begin[:TITLE_LENGTH] or None
    words = said[: 8 * TITLE_LENGTH].split(None, TITLE_LENGTH // 2 + 1)  # more do not fit
    return clean(" ".join(words), TITLE_LENGTH) or None

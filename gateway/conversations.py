"""Turns of a conversation: load what was said, put it before what is asked, keep what is answered.

To which conversation a call belongs (contract, section 5):

1. `conversation_id` in the body: the stored history is prepended. A client that sends the history itself is recognised,
   and only what is new is stored; where it goes on from an earlier message than the last, a branch does. An id of the
   gateway's own form that the caller does not own is 404, any other unknown one is made under that name. One turn runs
   at a time.
2. A header: the client has the history itself, and only says which conversation it is.
3. Nothing: the last answer in the client's messages is looked up by its chain (`threads`) among the stored ones of the
   same user, key and end user. It goes on there, or in a branch if somebody else does so already. Without an answer, or
   if none is found, it is a new conversation.

`threading: explicit` records only the first two, `off` none. What a frontend asks for itself (titles, tags) is no turn.

A turn of the first and third kind goes on from the message that it has seen, or in a branch: `ConversationTurn.after`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from gateway import threads, window
from gateway.auth import Caller
from gateway.catalog import Model
from gateway.errors import BadRequest, NotFound
from gateway.store import conversations as rows
from gateway.store.conversations import Place, StoredConversation, StoredMessage
from gateway.store.database import Database
from gateway.store.text import clean
from gateway.talks import OWN_ID, Talk, new_id, new_pk
from gateway.threads import NOT_CHAINED, as_json
from gateway.tokens import TokenCounter
from gateway.turn_leases import TurnLeases
from gateway.wire.chat import ChatRequest, Message
from gateway.wire.jsontext import dumps

__all__ = ["Conversations", "Threading", "given_id", "new_id"]

Threading = Literal["auto", "explicit", "off"]
LAST_CHAINS = 200
"""How far back a conversation that a header names is searched for what the client resends."""
_GIVEN_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


class Conversations:
    """Opens conversations for turns. One for each worker.

    `system_prompt` goes first where a request has no system message. `wait`: for a conversation that is busy, instead
    of refusing. `counter` None: histories are sent whole, whatever the window of the model.
    """

    def __init__(
        self,
        database: Database,
        *,
        threading: Threading = "auto",
        system_prompt: str | None = None,
        store_content: bool = True,
        wait: bool = False,
        counter: TokenCounter | None = None,
    ) -> None:
        self._database = database
        self._threading = threading
        self._system = {"role": "system", "content": system_prompt} if system_prompt else None
        self._store_content = store_content
        self._leases = TurnLeases(database, wait=wait)
        self._counter = counter
        self._taken: set[tuple[str, int]] = set()
        """Last messages from which a call of this worker goes on."""

    async def open(
        self,
        caller: Caller,
        request: ChatRequest,
        end_user: str | None,
        group: str | None = None,
        in_vain: Callable[[], bool] = lambda: False,
    ) -> Talk | None:
        """None: this call is no turn. `group`: the id that a header gives, "" where it says that this is no chat.
        `in_vain`: need nobody wait any more? Raises BadRequest, NotFound, ConversationBusy, DatabaseUnavailable."""
        wanted, end_user = request.data.get("conversation_id"), clean(end_user)
        if self._threading == "off":
            return None
        if wanted is not None:
            talk = await self._named(caller, wanted, request, end_user, in_vain)
        elif group == "" or threads.is_background(request):
            return None
        elif group is not None:
            talk = await self._grouped(caller, group, request, end_user)
        elif self._threading == "explicit":
            return None
        elif not self._store_content or (last := threads.last_answer(request.messages)) is None:
            talk = _begun(caller, request, end_user)
        else:
            talk = await self._threaded(caller, request, end_user, last)
        talk.keeps_content = self._store_content
        if self._system is not None and not talk.history and not _has_system(request.messages):
            if talk.begins:
                talk.preface = self._system
            else:
                talk.reminder = self._system
        return talk

    async def fit(self, talk: Talk | None, request: ChatRequest, model: Model) -> None:
        """Leaves out what of the history the model's window cannot hold."""
        if talk is None or not talk.history or self._counter is None:
            return
        size = model.context_window
        if size is None:
            return
        talk.history, talk.omitted_turns = await window.fit(
            talk.history,
            request.messages,
            window=size,
            reserve=window.reserved(request.data, size),
            model=model.routes[0].upstream_model if model.routes else model.name,
            counter=self._counter,
        )

    def prepare(self, request: ChatRequest, talk: Talk | None) -> ChatRequest:
        """The request as the upstream shall see it: history first, our own field taken out."""
        if "conversation_id" in request.data:
            request = request.with_fields(conversation_id=None)
        if talk is not None:
            lead, history = talk.preface or talk.reminder, talk.history
        else:
            lead, history = None if _has_system(request.messages) else self._system, ()
        if lead is None and not history:
            return request
        if history and request.messages[0].get("role") in NOT_CHAINED:
            return _behind_its_system(request, history)
        before = [as_json(message) for message in history]
        return request.with_history([*before, dumps(lead)] if lead is not None else before)

    async def aclose(self) -> None:
        await self._leases.aclose()

    # --- rule 1

    async def _named(
        self, caller: Caller, wanted: str, request: ChatRequest, end_user: str | None, in_vain: Callable[[], bool]
    ) -> Talk:
        _check_id(wanted, "'conversation_id'")
        held = await self._leases.take(caller.user_id, wanted, in_vain)
        try:
            found = await rows.find(self._database, caller.user_id, wanted)
            start = threads.seed(caller.user_id, caller.key_id, end_user)
            if found is None:
                _check_foreign(wanted)
                talk = Talk(wanted, new_pk(), caller, end_user, True, request.messages, chain=start, after=0)
            else:
                talk = _continued(wanted, found, caller, end_user, request.messages, start)
                await self._into_its_branch(talk)
        except BaseException:
            held.let_go(recorded=False)
            raise
        talk.lease, talk.hold = held.lease, held
        return talk

    async def _into_its_branch(self, talk: Talk) -> None:
        """A history that left the conversation earlier, and was answered since, goes on in the branch of that time."""
        last = threads.last_answer(talk.asked) if talk.parent is not None else None
        if last is not None and (found := await self._place(talk.caller, talk.chain, talk.asked, last)) is not None:
            whole, place = found
            talk.id, talk.pk, talk.is_new, talk.parent = place.id, place.pk, False, None
            talk.session_id, talk.asked, talk.chain = place.session_id, talk.asked[last + 1 :], whole
            talk.after, talk.title = place.seq, place.title
            if not threads.is_free(place, self._taken):
                talk.branch_off()

    # --- rule 2

    async def _grouped(self, caller: Caller, wanted: str, request: ChatRequest, end_user: str | None) -> Talk:
        start = threads.seed(caller.user_id, caller.key_id, end_user)
        found = await rows.find_chains(self._database, caller.user_id, wanted, LAST_CHAINS)
        if found is None:
            _check_foreign(wanted)
            return Talk(wanted, new_pk(), caller, end_user, True, request.messages, chain=start, is_named=True)
        if not found.message_count:
            known = threads.Known(0, start)
        else:
            known = threads.grouped(start, found.chains, found.last_asked, request.messages)
        asked = request.messages[known.place :]
        talk = Talk(wanted, found.pk, caller, end_user, False, asked, found.session_id, chain=known.chain)
        talk.title, talk.is_empty = found.title, not found.message_count
        return talk

    # --- rule 3

    async def _threaded(self, caller: Caller, request: ChatRequest, end_user: str | None, last: int) -> Talk:
        """`last`: where the last answer stands."""
        messages = request.messages
        start = threads.seed(caller.user_id, caller.key_id, end_user)
        if (found := await self._place(caller, start, messages, last)) is None:
            return _begun(caller, request, end_user)
        whole, place = found
        talk = Talk(place.id, place.pk, caller, end_user, False, messages[last + 1 :], place.session_id, chain=whole)
        talk.after, talk.title = place.seq, place.title
        if threads.is_free(place, self._taken):
            talk.hold = _Taken(self._taken, (place.pk, place.seq))
        else:
            talk.branch_off()
        return talk

    async def _place(
        self, caller: Caller, start: str, messages: Sequence[Message], last: int
    ) -> tuple[str, Place] | None:
        """The chain after the last answer of these messages, which is the one at `last`, and where it is stored. None:
        nobody has given it."""
        before = threads.chain_of(start, messages[:last])
        whole = threads.link(before, messages[last])
        found = await rows.places(self._database, caller.user_id, whole, threads.partial(before))
        place = threads.best(found, messages[last], self._taken)
        return None if place is None else (whole, place)


class _Taken:
    """The end of a conversation, while a call of this worker goes on from it."""

    def __init__(self, taken: set[tuple[str, int]], end: tuple[str, int]) -> None:
        self._taken, self._end = taken, end
        taken.add(end)

    def let_go(self, recorded: bool) -> None:
        self._taken.discard(self._end)  # its successor is in the database by now, or there is none


def given_id(text: str) -> str | None:
    """The id of a conversation as a frontend's header has it, perhaps with a model behind it; None if it is none."""
    found = text.partition("::")[0].strip()
    return found if _GIVEN_ID.fullmatch(found) else None


def _begun(caller: Caller, request: ChatRequest, end_user: str | None) -> Talk:
    start = threads.seed(caller.user_id, caller.key_id, end_user)
    return Talk(new_id(), new_pk(), caller, end_user, True, request.messages, None, start, 0)  # an id of ours is free


def _continued(
    wanted: str,
    found: StoredConversation,
    caller: Caller,
    end_user: str | None,
    messages: Sequence[Message],
    start: str,
) -> Talk:
    """A turn of a conversation that is there."""
    talk = Talk(wanted, found.pk, caller, end_user, False, messages, found.session_id)
    talk.after, talk.title = found.message_count, found.title
    talk.is_empty = not found.message_count
    stored = [message for message in found.messages if not _is_hidden(message)]
    systems = [message for message in stored if message.role in NOT_CHAINED]
    known = None
    if stored and threads.last_answer(messages) is not None:
        known = threads.recognised(start, stored, messages)
    if known is None:
        talk.history, talk.chain = stored, _last_chain(found, start)
        talk.asked = _without_known_system(messages, systems)
        if (begin := threads.shortened(stored, messages)) is not None:
            last = threads.last_answer(messages)
            assert last is not None
            talk.asked = messages[last + 1 :]
            talk.history = [*stored[:begin], *(message for message in stored[begin:] if message.role in NOT_CHAINED)]
        return talk
    talk.asked, talk.chain = messages[known.place :], known.chain
    talk.history = [] if _has_system(messages) else systems[:1]
    if known.seq < found.message_count:
        talk.after = known.seq
        talk.branch_off()
    return talk


def _is_hidden(message: StoredMessage) -> bool:
    """Was it stored without its content?"""
    return message.content == "null" and message.extra is None and message.chain is None


def _last_chain(found: StoredConversation, start: str) -> str:
    for message in reversed(found.messages):
        if message.role not in NOT_CHAINED:
            return message.chain or threads.hidden(found.pk)
    return start


def _without_known_system(messages: Sequence[Message], systems: Sequence[StoredMessage]) -> Sequence[Message]:
    """What a client sends with every call is not stored with every one."""
    known = {message.content for message in systems}
    for place, message in enumerate(messages):
        if message.get("role") not in NOT_CHAINED or dumps(message.get("content")).decode() not in known:
            return messages[place:]
    return []


def _behind_its_system(request: ChatRequest, history: Sequence[StoredMessage]) -> ChatRequest:
    """The client's own system message comes first, and in place of the stored one: many models take none later."""
    own = request.messages
    count = next((place for place, item in enumerate(own) if item.get("role") not in NOT_CHAINED), len(own))
    stored = [as_json(message) for message in history if message.role not in NOT_CHAINED]
    texts = [*map(dumps, own[:count]), *stored, *map(dumps, own[count:])]
    return request.with_fields(messages=b"[" + b",".join(texts) + b"]")


def _check_id(wanted: str, what: str) -> None:
    if _GIVEN_ID.fullmatch(wanted) is None:
        raise BadRequest(
            f"{what} must be 1 to 128 letters, digits, '-' or '_'.", param="conversation_id", code="invalid_value"
        )


def _check_foreign(wanted: str) -> None:
    """An id of our own form that the caller does not have is nobody's to take."""
    if OWN_ID.fullmatch(wanted):
        raise NotFound(f"The conversation '{wanted}' does not exist.", param="conversation_id")


def _has_system(messages: Sequence[Message]) -> bool:
    return any(message.get("role") in NOT_CHAINED for message in messages)

"""Turns of a conversation: load what was said, put it before what is asked, keep what is answered.

With `conversation_id` in the body the stored history is prepended (contract, section 5, rule 1): an id of the gateway's
own form that the caller does not own is 404, any other unknown one is made under that name. Without one, every call is
a new conversation. `threading: explicit` records only the first kind, `off` neither.

Each stored message carries a `chain`: a hash over the user, assistant and tool messages so far, normalised (no
reasoning, white space trimmed, parts as text), by which a resent history can be recognised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

from gateway.auth import Caller
from gateway.errors import BadRequest, NotFound
from gateway.ids import ordered_hex, random_hex
from gateway.store import conversations as rows
from gateway.store.conversations import ConversationTurn, StoredMessage
from gateway.store.database import Database
from gateway.store.text import clean
from gateway.wire.chat import ChatRequest, Message, text_of
from gateway.wire.jsontext import dumps

Threading = Literal["auto", "explicit", "off"]
TITLE_LENGTH = 80
_OWN_ID = re.compile(r"conv_[0-9a-f]{32}")
_UNCHAINED = ("system", "developer")
_PLAIN_ROLES = ("user", "assistant")
_GIVEN_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(slots=True)
class Talk:
    """A conversation while one turn runs on it. `history` are stored messages as JSON texts."""

    id: str
    pk: str
    caller: Caller
    end_user: str | None
    is_new: bool
    asked: Sequence[Message]
    session_id: str | None = None
    history: Sequence[bytes] = ()
    chain: str = ""
    preface: Message | None = field(default=None)

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
        """What this turn adds: the new messages of the client and, if there is one, the answer."""
        stored: list[StoredMessage] = []
        chain = self.chain
        asked = [self.preface, *self.asked] if self.preface is not None else self.asked
        for message in asked:
            content = dumps(message.get("content"))
            chain = _linked(chain, message, content)
            stored.append(_stored(message, content, chain))
        if answer is not None:
            if not isinstance(answer.get("role"), str):  # an upstream's slip must not cost the turn
                answer = {**answer, "role": "assistant"}
            content = dumps(answer.get("content"))
            chain = _linked(chain, answer, content)
            stored.append(_stored(answer, content, chain, output_tokens, cost_nanousd, clean(model), finish_reason))
        return ConversationTurn(
            pk=self.pk,
            id=self.id,
            user_id=self.caller.user_id,
            key_id=self.caller.key_id,
            end_user=self.end_user,
            session_id=self.session_id,
            is_new=self.is_new,
            title=_title(self.asked) if self.is_new else None,
            at=at,
            messages=stored,
            is_named=_OWN_ID.fullmatch(self.id) is None,
            tokens_input=input_tokens,
            tokens_output=output_tokens,
            cost_nanousd=cost_nanousd,
        )


class Conversations:
    """Opens conversations for turns. `system_prompt` goes first where a request has no system message."""

    def __init__(self, database: Database, *, threading: Threading = "auto", system_prompt: str | None = None) -> None:
        self._database = database
        self._threading = threading
        self._system = {"role": "system", "content": system_prompt} if system_prompt else None

    async def open(self, caller: Caller, request: ChatRequest, end_user: str | None) -> Talk | None:
        """None: this call is no turn. Raises BadRequest, NotFound, DatabaseUnavailable."""
        wanted, end_user = request.data.get("conversation_id"), clean(end_user)
        if self._threading == "off" or (wanted is None and self._threading == "explicit"):
            return None
        talk = (
            await self._find(caller, wanted, request, end_user)
            if wanted is not None
            else Talk(new_id(), f"c_{ordered_hex()}", caller, end_user, True, request.messages)
        )
        if self._system is not None and not talk.history and not _has_system(request.messages):
            talk.preface = self._system
        return talk

    def prepare(self, request: ChatRequest, talk: Talk | None) -> ChatRequest:
        """The request as the upstream shall see it: history first, our own field taken out."""
        if talk is None:
            before = [dumps(self._system)] if self._system and not _has_system(request.messages) else []
        else:
            before = [*talk.history, *([dumps(talk.preface)] if talk.preface is not None else [])]
        if "conversation_id" in request.data:
            request = request.with_fields(conversation_id=None)
        return request.with_history(before)

    async def _find(self, caller: Caller, wanted: str, request: ChatRequest, end_user: str | None) -> Talk:
        if _GIVEN_ID.fullmatch(wanted) is None:
            raise BadRequest(
                "'conversation_id' must be 1 to 128 letters, digits, '-' or '_'.",
                param="conversation_id",
                code="invalid_value",
            )
        found = await rows.find(self._database, caller.user_id, wanted)
        if found is None:
            if _OWN_ID.fullmatch(wanted):
                raise NotFound(f"The conversation '{wanted}' does not exist.", param="conversation_id")
            return Talk(wanted, f"c_{ordered_hex()}", caller, end_user, True, request.messages)
        chains = [message.chain for message in found.messages if message.chain]
        return Talk(
            wanted,
            found.pk,
            caller,
            end_user,
            False,
            request.messages,
            found.session_id,
            [as_json(message) for message in found.messages],
            chains[-1] if chains else "",
        )


def new_id() -> str:
    return f"conv_{random_hex()}"


def link(previous: str, message: Message) -> str:
    """The chain after this message. A system message does not count."""
    return _linked(previous, message, dumps(message.get("content")))


def _linked(previous: str, message: Message, content: bytes) -> str:
    """`content`: that of the message, as JSON."""
    role = message.get("role")
    if role in _UNCHAINED:
        return previous
    said = _plainly_said(role, message, content) or dumps(_said(role, message))
    return blake2b(previous.encode() + said, digest_size=16).hexdigest()


def _said(role: object, message: Message) -> list[object]:
    content, made = message.get("content"), message.get("tool_calls")
    parts = content if isinstance(content, list) else []
    others = [part for part in parts if not (isinstance(part, dict) and "text" in part)]
    calls = [call.get("function") or call for call in made if isinstance(call, dict)] if isinstance(made, list) else []
    return [role, text_of(content).strip(), others, calls, message.get("tool_call_id")]


def _plainly_said(role: object, message: Message, content: bytes) -> bytes | None:
    """The same as JSON, for a message that has a text and nothing else that counts; None for another one."""
    text = message.get("content")
    if role not in _PLAIN_ROLES or type(text) is not str or message.get("tool_calls") or "tool_call_id" in message:
        return None
    if (bare := text.strip()) != text:
        content = dumps(bare)
    return (b'["user",' if role == "user" else b'["assistant",') + content + b",[],[],null]"


def as_json(message: StoredMessage) -> bytes:
    """A stored message as the upstream shall read it."""
    rest = "," + message.extra[1:-1] if message.extra else ""
    text = f'{{"role":{dumps(message.role).decode()},"content":{message.content}{rest}}}'
    return text.encode()


def _stored(
    message: Message,
    content: bytes,
    chain: str,
    tokens: int = 0,
    cost_nanousd: int | None = None,
    model: str | None = None,
    finish_reason: str | None = None,
) -> StoredMessage:
    role: str = message["role"]
    extra = {key: value for key, value in message.items() if key != "role" and key != "content"}
    return StoredMessage(
        f"msg_{ordered_hex()}",
        role if role in _PLAIN_ROLES else clean(role),
        content.decode(),
        dumps(extra).decode() if extra else None,
        chain or None,
        tokens,
        cost_nanousd,
        model,
        clean(finish_reason),
    )


def _title(messages: Sequence[Message]) -> str | None:
    """The start of the first thing the user said."""
    said = next((text_of(item.get("content")) for item in messages if item.get("role") == "user"), "")
    begin = said[: TITLE_LENGTH + 1]
    if begin.isprintable() and "  " not in begin and begin.strip() == begin:  # then this is what comes out below
        return begin[:TITLE_LENGTH] or None
    words = said[: 8 * TITLE_LENGTH].split(None, TITLE_LENGTH // 2 + 1)  # more do not fit
    return clean(" ".join(words), TITLE_LENGTH) or None


def _has_system(messages: Sequence[Message]) -> bool:
    return any(message.get("role") in ("system", "developer") for message in messages)

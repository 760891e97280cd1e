"""Which stored conversation a client's messages go on with: pure, by hash chains.

A chain is a hash over the user, assistant and tool messages up to one of them. It begins with whose they are (`seed`),
so equal words of two callers never meet. What clients do to a history on its way does not count:

- white space around a text; a text as a string or as parts; null, nothing or an empty list
- reasoning and all other fields that are not said to anybody; system and developer messages
- the ids of tool calls; white space and the order of keys in their arguments

An answer that broke off is stored whole as far as it came, and its client may have seen less of it. So its chain does
not hold its text: `partial` of the chain before. It is the one that is meant if one of the two texts begins with the
other (`goes_on_with`). What follows it is chained as the client has it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from gateway.store.conversations import Place, StoredMessage
from gateway.wire.chat import ChatRequest, Message, text_of
from gateway.wire.jsontext import dumps, loads

PARTIAL = frozenset({"client_disconnected", "interrupted", "error"})
"""The `finish_reason` of an answer that may be more or less than its client has."""
NOT_CHAINED = frozenset({"system", "developer"})
PLAIN_ROLES = frozenset({"user", "assistant"})
_NOTHING_SAID = blake2b(digest_size=16)
_TASK = "### Task:"
_MAY_BEGIN_TASK = "# \t\r\n"


@lru_cache(4096)
def seed(user_id: str, key_id: str | None, end_user: str | None) -> str:
    """The chain before the first message."""
    return _hash(dumps([user_id, key_id, end_user]))


def hidden(pk: str) -> str:
    """In place of a chain that is not kept: nobody's words lead to it."""
    return _hash(b"hidden" + pk.encode())


def link(previous: str, message: Message) -> str:
    """The chain after this message."""
    return linked(previous, message, dumps(message.get("content")))


def linked(previous: str, message: Message, content: bytes) -> str:
    """The same; `content` is the message's, as JSON."""
    role = message.get("role")
    text, begin = message.get("content"), _BEGINS.get(role)
    if begin is not None and type(text) is str and (len(message) == 2 or _NOT_PLAIN.isdisjoint(message)):
        if (bare := text.strip()) != text:
            content = dumps(bare)
        return _hash(b"".join((previous.encode(), begin, content, _NOTHING_ELSE)))  # `_said` as JSON
    return previous if role in NOT_CHAINED else _hash(previous.encode() + dumps(_said(role, message)))


def partial(previous: str) -> str:
    """The chain after an answer that broke off."""
    return _hash(b"partial" + previous.encode())


def goes_on_with(message: Message, stored: Message) -> bool:
    """May this be what a client has of a stored answer that broke off?"""
    one, other = text_of(message.get("content")).strip(), text_of(stored.get("content")).strip()
    made = _calls(message)
    return (one.startswith(other) or other.startswith(one)) and (not made or made == _calls(stored))


def last_answer(messages: Sequence[Message]) -> int | None:
    """Where the last assistant message stands."""
    for place in range(len(messages) - 1, -1, -1):
        if messages[place].get("role") == "assistant":
            return place
    return None


def chain_of(start: str, messages: Sequence[Message]) -> str:
    for message in messages:
        start = link(start, message)
    return start


def best(found: Sequence[Place], answer: Message, taken: Collection[tuple[str, int]]) -> Place | None:
    """The place to go on from, of those with the chain of this answer: a whole answer before one that broke off, the
    end of a conversation that nobody has `taken` before any other, the newest."""
    fitting = [
        place
        for place in found
        if place.content is None or goes_on_with(answer, _message("assistant", place.content, place.extra))
    ]
    return max(
        fitting,
        key=lambda place: (place.content is None, is_free(place, taken), place.created_at, place.pk),
        default=None,
    )


def is_free(place: Place, taken: Collection[tuple[str, int]]) -> bool:
    """May the conversation itself go on from here? Otherwise a branch does."""
    return place.is_last and (place.pk, place.seq) not in taken


@dataclass(frozen=True, slots=True)
class Known:
    """How far a client's messages are known: those before `place`. `seq` is that of the last answer among them (0 if
    nobody asked for it), `chain` the chain after them."""

    place: int
    chain: str
    seq: int = 0


def recognised(start: str, stored: Sequence[StoredMessage], messages: Sequence[Message]) -> Known | None:
    """The last answer of a client's history that is a stored one, with all before it the same. None: none is."""
    if (known := _by_stored_chain(start, stored, messages)) is not None:
        return known
    whole, broken = _answers(start, stored)
    meant, own, known = start, start, None
    for place, message in enumerate(messages, 1):
        before, content = meant, dumps(message.get("content"))
        meant, own = linked(meant, message, content), linked(own, message, content)
        if message.get("role") != "assistant":
            continue
        if meant in whole:
            known = Known(place, own, whole[meant])
        elif before in broken and goes_on_with(message, broken[before][1]):
            seq, _, meant = broken[before]
            known = Known(place, own, seq)
    return known


def _by_stored_chain(start: str, stored: Sequence[StoredMessage], messages: Sequence[Message]) -> Known | None:
    """The same, if the client's last answer is one: then the stored messages need not be read. Chains that were made
    for another key or end user are none of this client's."""
    last = last_answer(messages)
    if last is None:
        return None
    own = chain_of(start, messages[: last + 1])
    for kept in reversed(stored):
        if kept.chain == own and kept.role == "assistant":
            return Known(last + 1, own, kept.seq)
    return None


def shortened(stored: Sequence[StoredMessage], messages: Sequence[Message]) -> int | None:
    """Where in the stored history begins what a client sends that has left out older messages: all of it up to its last
    answer are the newest that are stored. None: they are not."""
    last = last_answer(messages)
    sent = [message for message in messages[: (last or 0) + 1] if message.get("role") not in NOT_CHAINED]
    said = [place for place, kept in enumerate(stored) if kept.role not in NOT_CHAINED]
    if last is None or len(sent) > len(said):
        return None
    begin = len(said) - len(sent)
    same = all(_is_it(message, stored[place]) for message, place in zip(sent, said[begin:], strict=True))
    return said[begin] if same else None


def _is_it(message: Message, kept: StoredMessage) -> bool:
    stored = _message(kept.role, kept.content, kept.extra)
    if kept.finish_reason in PARTIAL and message.get("role") == kept.role:
        return goes_on_with(message, stored)
    return link("", message) == link("", stored)


def _answers(
    start: str, stored: Sequence[StoredMessage]
) -> tuple[Mapping[str, int], Mapping[str, tuple[int, Message, str]]]:
    """Stored answers: the `seq` of whole ones by the chain after them; broken ones by the chain before them."""
    whole: dict[str, int] = {}
    broken: dict[str, tuple[int, Message, str]] = {}
    chain = start
    for kept in stored:
        message = _message(kept.role, kept.content, kept.extra)
        before, chain = chain, linked(chain, message, kept.content.encode())
        if kept.role == "assistant":
            if kept.finish_reason in PARTIAL:
                broken[before] = kept.seq, message, chain
            else:
                whole[chain] = kept.seq
    return whole, broken


def grouped(start: str, chains: Collection[str], last_asked: str | None, messages: Sequence[Message]) -> Known:
    """For a client that resends its history and says which conversation it is: what of it is there, by the chains of
    that conversation's last messages. If nothing is, all up to the client's last answer is taken to be. A question that
    is asked anew after others (`last_asked`) counts as new, so that its answer stands behind it."""
    known = None
    links = [start]
    for place, message in enumerate(messages, 1):
        before, chain = links[-1], link(links[-1], message)
        links.append(chain)
        if message.get("role") in NOT_CHAINED:
            continue
        if chain in chains or (message.get("role") == "assistant" and partial(before) in chains):
            known = Known(place, chain)
    last = last_answer(messages)
    behind_answer = 0 if last is None else last + 1
    if known is None or (behind_answer < known.place and known.chain != last_asked):
        known = Known(behind_answer, links[behind_answer])
    return known


def is_background(request: ChatRequest) -> bool:
    """Is it a chat frontend itself that asks, for a title, tags or follow-ups? (Open WebUI's default templates.)"""
    messages = request.messages
    if len(messages) != 1 or request.stream:
        return False
    said = messages[0].get("content")
    if type(said) is str and said[:1] not in _MAY_BEGIN_TASK:
        return False
    return messages[0].get("role") == "user" and text_of(said).lstrip().startswith(_TASK)


def as_json(message: StoredMessage) -> bytes:
    """A stored message as the upstream shall read it."""
    rest = "," + message.extra[1:-1] if message.extra and message.extra != "{}" else ""
    text = f'{{"role":{dumps(message.role).decode()},"content":{message.content}{rest}}}'
    return text.encode()


def _message(role: str, content: str, extra: str | None) -> Message:
    rest: Message = loads(extra.encode()) if extra else {}
    return {"role": role, "content": loads(content.encode()), **rest}


def _hash(said: bytes) -> str:
    hashed = _NOTHING_SAID.copy()
    hashed.update(said)
    return hashed.hexdigest()


# A message that has a text and nothing else that counts.
_BEGINS: Mapping[object, bytes] = {"user": b'["user",', "assistant": b'["assistant",'}
_NOTHING_ELSE = b",[],[],null]"
_OF_A_CALL = frozenset({"id", "index"})
_NOT_PLAIN = frozenset({"tool_calls", "function_call", "tool_call_id", "audio"})


def _said(role: object, message: Message) -> list[object]:
    content, audio = message.get("content"), message.get("audio")
    parts = content if isinstance(content, list) else []
    others = [part for part in parts if not (isinstance(part, dict) and "text" in part)]
    if isinstance(audio, dict) and "id" in audio:  # said aloud: clients send back the id alone
        others.append({"audio": audio["id"]})
    return [role, text_of(content).strip(), others, _calls(message), message.get("tool_call_id")]


def _calls(message: Message) -> list[object]:
    made, older = message.get("tool_calls"), message.get("function_call")
    calls = [_call(call) for call in made if isinstance(call, dict)] if isinstance(made, list) else []
    return [*calls, _respaced(older)] if older else calls


def _call(call: Mapping[str, object]) -> object:
    named = call.get("function") or call.get("custom")
    return _respaced(named or {key: value for key, value in call.items() if key not in _OF_A_CALL})


def _respaced(call: object) -> object:
    """The call with its arguments as a value, if they are JSON: clients write them anew."""
    if not isinstance(call, dict) or "arguments" not in call:
        return call
    arguments = call["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = loads(arguments.encode())
        except ValueError:
            return [call.get("name"), arguments]
    return [call.get("name"), None, _in_order(arguments)]


def _in_order(value: object) -> object:
    if isinstance(value, dict):
        return {key: _in_order(value[key]) for key in sorted(value)}
    return [_in_order(item) for item in value] if isinstance(value, list) else value

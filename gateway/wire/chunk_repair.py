"""The chunks of a broken upstream put right: the rules of `wire.repair`, with a memory for what came before.

Rules: a choice says its role first and only once; a tool call says its id, type and name once, with its first piece,
and its index with every piece; it has arguments, `{}` if nobody gave any; a choice ends once. The name of a stream
(`id`, `created`, `model`) is that of the first chunk that has one.

Which call a piece belongs to: by its `index`; where an upstream leaves that out, an id or a name that is new opens a
call, and what has neither belongs to the last one. Upstreams that count all their calls as 0 are found out by a name
with another id after arguments that were complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.wire import repair
from gateway.wire.jsontext import loads
from gateway.wire.operation import CHAT
from gateway.wire.repair import Json, is_count, same

_TOLD = {"id": str, "created": int, "model": str}
"""What an upstream names its stream by."""
_PLAIN_CHOICE = frozenset({"index", "delta", "text", "finish_reason", "logprobs"})


@dataclass(slots=True)
class _Call:
    """A tool call in the making. `key`: the index that its upstream gives it; `told_id`: the id."""

    index: int
    key: int | None
    told_id: object
    name: object
    id: str = ""
    kind: str = "function"
    arguments: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        try:
            loads("".join(self.arguments).encode("utf-8", "surrogatepass"))
        except ValueError:
            return False
        return True


@dataclass(slots=True)
class _Choice:
    """What a choice has told so far."""

    begun: bool = False
    finished: bool = False
    calls: list[_Call] = field(default_factory=list)


class ChunkRepair:
    """Give it the chunks of one stream in their order. `model` and `at` (Unix seconds) name one that has no name; `id`,
    if given, is what all of them are called instead of what the upstream calls them."""

    __slots__ = ("_about", "_chat", "_choices", "_id", "_own_name", "_told_name")

    def __init__(self, operation: str = CHAT, *, model: str = "", at: int = 0, id: str = "") -> None:
        self._chat = operation == CHAT
        self._about = (operation, model, at)
        self._id = id
        self._own_name: Json | None = None
        self._told_name: Json = {"id": id} if id else {}
        self._choices: dict[int, _Choice] = {}

    @property
    def name(self) -> Json:
        """`id`, `object`, `created` and `model`, as far as they are known, for a chunk of our own."""
        return {key: value for key, value in self._name.items() if value}

    @property
    def _name(self) -> Json:
        if self._own_name is None:
            self._own_name = repair.new_name(*self._about, stream=True)
        return {**self._own_name, **self._told_name}

    def named(self, data: Json) -> Json:
        """The chunk with its name and a `service_tier` of OpenAI's; the same object if it has them."""
        if self._id and data.get("id") != self._id:
            data = {**data, "id": self._id}
        if repair.is_named(data):
            if len(self._told_name) < len(_TOLD):
                self._told_name = {key: data[key] for key in _TOLD} | self._told_name
            return data
        missing = repair.missing_name(data, self._name) | repair.tier(data)
        for key, kind in _TOLD.items():
            told = missing.get(key, data.get(key))
            if told and type(told) is kind:
                self._told_name.setdefault(key, told)
        return {**data, **missing} if missing else data

    def chunk(self, data: Json) -> Json | None:
        """The chunk put right, the same object if it was; None if nothing is left of it. Its `choices` are a list.

        Raises StreamedError if the upstream says that it gave up.
        """
        told: list[Any] = data["choices"]
        if len(told) == 1 and self._takes_as_it_is(told[0]):
            named = len(self._told_name) == len(_TOLD) and not self._id and repair.is_named(data)
            return data if named else self.named(data)
        choices: list[Json] = []
        for place, choice in enumerate(told):
            right = self._choice(place, choice) if isinstance(choice, dict) else None
            if right is not None:
                choices.append(right)
        if not choices:
            return None
        data = self.named(data)
        return data if same(choices, told) else {**data, "choices": choices}

    def begin(self, name: Json) -> None:
        """Notes a first chunk that was right: it has this name, and one choice that begins."""
        self._told_name = name
        self._choices[0] = _Choice(begun=True)

    def end(self) -> bool:
        """Notes a chunk that was right and ends the only choice. False, and nothing was noted: look closer."""
        state = self._choices.get(0)
        if state is None or len(self._choices) > 1 or state.finished or state.calls:
            return False
        state.finished = True
        return True

    def next(self, data: Json) -> Json | None:
        """What `chunk` would make of a chunk that came next, and went on with what has begun."""
        calls = [call.arguments for choice in self._choices.values() for call in choice.calls]
        lengths = [len(arguments) for arguments in calls]
        right = self.chunk(data)
        for arguments, length in zip(calls, lengths, strict=True):
            del arguments[length:]
        return right

    def arguments(self, index: int, call: int) -> list[str]:
        """The pieces of a call's arguments, for those who add more of them."""
        return next(known.arguments for known in self._choices[index].calls if known.index == call)

    def closing(self, index: int, reason: str) -> Json:
        """The finishing choice for an upstream that never said why it ended."""
        right = self._choice(index, {"index": index, **self._nothing_said(), "finish_reason": reason})
        return right or {"index": index, **self._nothing_said(), "finish_reason": reason}

    def _nothing_said(self) -> Json:
        return {"delta": {}} if self._chat else {"text": ""}

    # --- choices

    def _takes_as_it_is(self, choice: object) -> bool:
        """Text or its end, with nothing to put right, is noted and needs no closer look. False: nothing was done."""
        if type(choice) is not dict or type(delta := choice.get("delta")) is not dict or not self._chat:
            return False
        index, said = choice.get("index"), choice.get("finish_reason")
        if type(index) is not int or index < 0 or "tool_calls" in delta or delta.get("reasoning"):
            return False
        state = self._choices.get(index)
        if delta.get("role") != ("assistant" if state is None else None):
            return False
        if said is not None and (type(said) is not str or said not in repair.REASONS):
            return False
        if state is None:
            self._choices[index] = _Choice(begun=True, finished=said is not None)
        elif said is not None:
            if state.finished or state.calls:
                return False
            state.finished = True
        return True

    def _choice(self, place: int, choice: Json) -> Json | None:
        changes: Json = {}
        told_index = choice.get("index")
        index = told_index if is_count(told_index) else place
        if index is not told_index:
            changes["index"] = index
        state = self._choices.get(index)
        if state is None:
            state = self._choices[index] = _Choice()
        delta, said = choice.get("delta"), choice.get("finish_reason")
        speaks = isinstance(said, str) and said != ""
        ends, again = speaks and not state.finished, speaks and state.finished
        if self._chat:
            right = self._delta(state, delta, choice, ends=ends)
            if right is not delta:
                changes["delta"] = right
        elif "delta" in choice or not isinstance(choice.get("text"), str):
            changes["text"] = _text(choice, delta)
        reason = repair.finish_reason(said, choice, calls=bool(state.calls)) if ends else None
        state.finished = state.finished or ends
        if reason != said:
            changes["finish_reason"] = reason
        if not changes:
            return choice
        choice = {**choice, **changes}
        if not self._chat:
            choice.pop("delta", None)
        elif not isinstance(delta, dict):
            choice.pop("message", None)
        return None if again and _is_empty(choice) else choice

    def _delta(self, state: _Choice, delta: object, choice: Mapping[str, Any], *, ends: bool) -> Json:
        """Some send a whole `message` in its place."""
        told = delta if isinstance(delta, dict) else choice.get("message")
        told = told if isinstance(told, dict) else {}
        changes = repair.reasoning(told)
        gone: set[str] = set()
        role = told.get("role")
        if not state.begun:
            state.begun = True
            if role != "assistant":
                changes["role"] = "assistant"
        elif role is not None:
            gone.add("role")
        self._change_calls(state, told, changes, gone, ends=ends)
        if not changes and not gone:
            return told
        return {key: value for key, value in {**told, **changes}.items() if key not in gone}

    @staticmethod
    def _change_calls(state: _Choice, delta: Json, changes: Json, gone: set[str], *, ends: bool) -> None:
        told = delta.get("tool_calls")
        listed = told if isinstance(told, list) else []
        pieces = [_piece(state, piece) for piece in listed if isinstance(piece, dict)]
        if pieces and delta.get("content") == "":
            changes["content"] = None
        if ends and state.calls:
            _complete_calls(state, pieces)
        if pieces and not same(pieces, listed):
            changes["tool_calls"] = pieces
        elif not pieces and told not in (None, []):
            gone.add("tool_calls")


def _text(choice: Json, delta: object) -> str:
    """The text of an older completion; some upstreams answer as if they had been asked for a chat."""
    told = choice.get("text") or (delta.get("content") if isinstance(delta, dict) else "")
    return told if isinstance(told, str) else ""


def _is_empty(choice: Json) -> bool:
    """Does a choice that says for the second time how it ended say anything else?"""
    delta = choice.get("delta") or {}
    said = choice.get("text") or any(value for key, value in delta.items() if key != "role")
    return not said and not any(value for key, value in choice.items() if key not in _PLAIN_CHOICE)


# --- tool calls


def _piece(state: _Choice, piece: Json) -> Json:
    call = _call_of(state.calls, piece)
    opens = call is None
    if call is None:
        call = _open(state.calls, piece)
    changes: Json = {} if piece.get("index") == call.index and is_count(piece["index"]) else {"index": call.index}
    gone: set[str] = set()
    if opens:
        changes |= repair.call_head(piece, [other.id for other in state.calls])
        call.id = changes.get("id") or piece["id"]
    else:
        gone = {key for key in ("id", "type") if piece.get(key) is not None}
    for kind in ("function", "custom"):
        told = piece.get(kind)
        if isinstance(told, dict) or (opens and kind == "function" and "custom" not in piece):
            right = _said(call, told if isinstance(told, dict) else {}, kind, opens=opens)
            if right is not told:
                changes[kind] = right
    if not changes and not gone:
        return piece
    return {key: value for key, value in {**piece, **changes}.items() if key not in gone}


def _said(call: _Call, told: Json, kind: str, *, opens: bool) -> Json:
    """The `function` of a piece: its name once, its arguments as text."""
    key = "arguments" if kind == "function" else "input"
    changes: Json = {}
    gone: set[str] = set()
    name = told.get("name")
    if not opens and name is not None:
        repeated = call.name and (name == call.name or any(call.arguments) or not isinstance(name, str))
        if repeated or not name:
            gone.add("name")
        else:  # the rest of it, from one that sends names in pieces
            call.name = f"{call.name}{name}" if call.name else name
    text = told.get(key)
    if text == {} and opens:  # pieces of text follow
        text = changes[key] = ""
    if not isinstance(text, str) and (opens or key in told):
        text = changes[key] = repair.arguments(text)
    if isinstance(text, str) and text:
        call.arguments.append(text)
    if not changes and not gone:
        return told
    return {inner: value for inner, value in {**told, **changes}.items() if inner not in gone}


def _call_of(calls: list[_Call], piece: Json) -> _Call | None:
    """The call that goes on with this piece; None if the piece opens one."""
    key, told_id, name = piece.get("index"), piece.get("id") or None, _name(piece)
    if is_count(key):
        call = next((call for call in reversed(calls) if call.key == key), None)
        another = call is not None and name and told_id not in (None, call.told_id)
        if call is not None and another and (call.complete or (name != call.name and not any(call.arguments))):
            return None
        return call
    if told_id is not None:
        return next((call for call in calls if call.told_id == told_id), None)
    if not calls or (name and (name != calls[-1].name or calls[-1].complete)):
        return None
    return calls[-1]


def _open(calls: list[_Call], piece: Json) -> _Call:
    key = piece.get("index") if is_count(piece.get("index")) else None
    taken = {call.index for call in calls}
    index = max(taken, default=-1) + 1
    kind = "custom" if isinstance(piece.get("custom"), dict) else "function"
    call = _Call(index, key, piece.get("id") or None, _name(piece), kind=kind)
    calls.append(call)
    return call


def _name(piece: Json) -> object:
    for kind in ("function", "custom"):
        told = piece.get(kind)
        if isinstance(told, dict) and told.get("name"):
            return told["name"]
    return None


def _complete_calls(state: _Choice, pieces: list[Json]) -> None:
    """`{}` for calls without arguments, in the piece that comes with the end or in one more. Changes `pieces`."""
    for call in state.calls:
        if any(call.arguments) or call.kind != "function":
            continue
        call.arguments.append("{}")
        place = next((at for at, piece in enumerate(pieces) if piece["index"] == call.index), None)
        if place is None:
            pieces.append({"index": call.index, "function": {"arguments": "{}"}})
        else:
            function = pieces[place].get("function") or {}
            pieces[place] = {**pieces[place], "function": {**function, "arguments": "{}"}}


# --- usage

_OF_ANSWER = ("completion_tokens", "completion_tokens_details")


def no_less(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What was used once cannot become unused: of each of the two counts the larger one, with what is told about it."""
    asked, said = (
        before if (before.get(key) or 0) > (now.get(key) or 0) else now for key in ("prompt_tokens", _OF_ANSWER[0])
    )
    usage = {key: value for key, value in asked.items() if key not in _OF_ANSWER}
    usage.update((key, said[key]) for key in _OF_ANSWER if key in said)
    return {**usage, "total_tokens": (usage.get("prompt_tokens") or 0) + (usage.get("completion_tokens") or 0)}

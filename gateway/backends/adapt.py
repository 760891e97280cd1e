"""A request in the words of one upstream: the peculiarities of `vendors.Quirks`, applied. Pure.

Order: fields are renamed, then dropped, then defaults put in (so a field in both `drop` and `defaults` is fixed); of
messages: roles, arrays, reasoning, ids, then what may be sent at all. What needs no change keeps its bytes, and a
request that needs none is returned as it is.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, TypeVar

from gateway.backends.vendors import CallIds, Quirks
from gateway.errors import BadRequest
from gateway.wire.chat import ChatRequest, Message, text_of
from gateway.wire.jsontext import dumps

R = TypeVar("R", bound=ChatRequest)
Edit = Callable[[Message], Message]
Keys = tuple[str, ...]

_REASONING = frozenset({"reasoning_content", "reasoning", "reasoning_details"})
_MOST_MODELS = 1000


class Adapter:
    """The peculiarities of one backend, prepared once."""

    def __init__(self, quirks: Quirks | None = None) -> None:
        self._quirks = quirks or Quirks()
        self._general = None if self._quirks.by_model else _Rules(self._quirks)
        self._by_model: dict[str, _Rules] = {}

    def apply(self, request: R) -> R:
        """The request as the upstream wants it. Raises BadRequest for what it can never do."""
        return (self._general or self._rules_of(request.model or "")).apply(request)

    def asks_usage(self, request: ChatRequest) -> bool:
        """May `stream_options` be sent?"""
        return (self._general or self._rules_of(request.model or "")).asks_usage

    def _rules_of(self, model: str) -> _Rules:
        rules = self._by_model.get(model)
        if rules is None:
            if len(self._by_model) >= _MOST_MODELS:  # names may come from clients
                self._by_model.clear()
            rules = self._by_model[model] = _Rules(self._quirks.for_model(model))
        return rules


class _Rules:
    def __init__(self, quirks: Quirks) -> None:
        self.asks_usage = quirks.usage_in_stream is not False
        paths = [tuple(path.split(".")) for path in quirks.drop or ()]
        self._renamed = dict(quirks.rename or {})
        self._dropped = {path[0] for path in paths if len(path) == 1}
        if not self.asks_usage:
            self._dropped.add("stream_options")
        self._nested = [path for path in paths if len(path) > 1 and path[0] != "messages"]
        self._touched = frozenset({*self._renamed, *self._dropped, *(path[0] for path in self._nested)})
        self._defaults = {name: dumps(value) for name, value in (quirks.defaults or {}).items() if value is not None}
        self._most_choices = quirks.most_choices
        self._ids = quirks.tool_call_ids if quirks.tool_call_ids != CallIds() else None
        inside = [path[1:] for path in paths if len(path) > 1 and path[0] == "messages"]
        self._edits = list(_edits(quirks, inside))
        self._last_edit = partial(_only, allowed=frozenset(quirks.message_fields)) if quirks.message_fields else None
        self._edits_messages = bool(self._edits) or self._ids is not None or self._last_edit is not None
        changes = self._touched or self._defaults or self._edits_messages
        self._changes_nothing = not changes and self._most_choices is None

    def apply(self, request: R) -> R:
        if self._changes_nothing:
            return request
        self._check_choices(request)
        data = request.data
        changes: dict[str, bytes | None] = {}
        if not self._touched.isdisjoint(data):
            changes = self._changed_fields(data)
        for name, text in self._defaults.items():
            if (changes[name] if name in changes else data.get(name)) is None:
                changes[name] = text
        if self._edits_messages:
            self._change_messages(data.get("messages"), changes)
        return request.with_fields(**changes) if changes else request

    def _check_choices(self, request: ChatRequest) -> None:
        most = self._most_choices
        if most is not None and request.choice_count > most:
            allowed = "only 1" if most == 1 else f"at most {most}"
            raise BadRequest(
                f"'n' is {request.choice_count}, but the upstream of this model gives {allowed}.",
                param="n",
                code="unsupported_value",
            )

    def _changed_fields(self, data: Mapping[str, Any]) -> dict[str, bytes | None]:
        values: dict[str, Any] = {}  # None: taken out
        for old, new in self._renamed.items():
            if old in data:
                values[old] = None
                if data[old] is not None and data.get(new) is None:
                    values[new] = data[old]
        for name in self._dropped:
            if name in data or name in values:
                values[name] = None
        for head, *rest in self._nested:
            value = values[head] if head in values else data.get(head)
            changed = _without(value, tuple(rest))
            if changed is not value:
                values[head] = changed
        return {name: None if value is None else dumps(value) for name, value in values.items()}

    def _change_messages(self, messages: Any, changes: dict[str, bytes | None]) -> None:
        if not isinstance(messages, list):
            return
        changed = messages
        for edit in (*self._edits, *self._last_edits(messages)):
            changed = [edit(message) for message in changed]
        if changed is not messages and any(new is not old for new, old in zip(changed, messages, strict=True)):
            changes["messages"] = dumps(changed)

    def _last_edits(self, messages: Sequence[Message]) -> Sequence[Edit]:
        """Ids, with what is remembered of them in one request, and then what may be sent at all."""
        edits: list[Edit] = []
        if self._ids is not None and any("tool_calls" in each or "tool_call_id" in each for each in messages):
            edits.append(_CallIdMap(self._ids).edit)
        return edits if self._last_edit is None else [*edits, self._last_edit]


def _edits(quirks: Quirks, dropped: Sequence[Keys]) -> Sequence[Edit]:
    edits: list[Edit] = []
    if quirks.roles:
        edits.append(partial(_with_role, roles=quirks.roles))
    if quirks.flatten:
        edits.append(partial(_flat, roles=frozenset(quirks.flatten)))
    if quirks.tool_call_reasoning == "fill":
        edits.append(_with_reasoning)
    elif quirks.tool_call_reasoning == "strip":
        edits.append(_without_reasoning)
    return [*edits, *(partial(_without, path=path) for path in dropped)]


# Edits of one message: the same object where nothing is to be done


def _with_role(message: Message, roles: Mapping[str, str]) -> Message:
    role = roles.get(message["role"])
    return message if role is None else {**message, "role": role}


def _flat(message: Message, roles: Collection[str]) -> Message:
    content = message.get("content")
    if message["role"] not in roles or not isinstance(content, list):
        return message
    only_text = all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in content)
    return {**message, "content": text_of(content)} if only_text else message


def _with_reasoning(message: Message) -> Message:
    if message["role"] != "assistant" or not message.get("tool_calls") or message.get("reasoning_content") is not None:
        return message
    other = message.get("reasoning")
    return {**message, "reasoning_content": other if isinstance(other, str) else ""}


def _without_reasoning(message: Message) -> Message:
    if _REASONING.isdisjoint(message):
        return message
    return {key: value for key, value in message.items() if key not in _REASONING}


def _only(message: Message, allowed: frozenset[str]) -> Message:
    return message if message.keys() <= allowed else {key: message[key] for key in message if key in allowed}


def _without(value: Any, path: Keys) -> Any:
    """The value without what stands at the path; of a list, each of its entries."""
    if isinstance(value, list):
        entries = [_without(entry, path) for entry in value]
        return value if all(new is old for new, old in zip(entries, value, strict=True)) else entries
    if not isinstance(value, dict) or path[0] not in value:
        return value
    if len(path) == 1:
        return {key: value[key] for key in value if key != path[0]}
    inner = _without(value[path[0]], path[1:])
    return value if inner is value[path[0]] else {**value, path[0]: inner}


# Ids of tool calls

_ALPHANUMERIC = string.ascii_letters + string.digits
_SYMBOLS = {"any": _ALPHANUMERIC, "alphanumeric": _ALPHANUMERIC, "word": _ALPHANUMERIC + "_-"}
_CLASSES = {"any": r".", "alphanumeric": r"[A-Za-z0-9]", "word": r"[A-Za-z0-9_-]"}
_MADE_LENGTH = 24


class _CallIdMap:
    """The ids of one request. One that fits stays; the others are hashed, so a call and its result stay together, in
    this turn and in the next ones. Two ids never become one."""

    def __init__(self, rule: CallIds) -> None:
        count = f"{{{rule.length}}}" if rule.length else f"{{1,{rule.max_length or ''}}}"
        self._fits = re.compile(_CLASSES[rule.alphabet] + count, re.DOTALL).fullmatch
        self._symbols = _SYMBOLS[rule.alphabet]
        self._length = rule.length or min(rule.max_length or _MADE_LENGTH, _MADE_LENGTH)
        self._owners: dict[str, str] = {}

    def edit(self, message: Message) -> Message:
        changed = message
        if "tool_call_id" in message:
            mapped = self._mapped(message["tool_call_id"])
            if mapped is not message["tool_call_id"]:
                changed = {**changed, "tool_call_id": mapped}
        calls = message.get("tool_calls")
        if isinstance(calls, list) and calls:
            entries = [self._call(call) for call in calls]
            if any(new is not old for new, old in zip(entries, calls, strict=True)):
                changed = {**changed, "tool_calls": entries}
        return changed

    def _call(self, call: Any) -> Any:
        if not isinstance(call, dict) or "id" not in call:
            return call
        mapped = self._mapped(call["id"])
        return call if mapped is call["id"] else {**call, "id": mapped}

    def _mapped(self, id: Any) -> Any:
        if not isinstance(id, str):
            return id
        found = id if self._fits(id) else self._hashed(id, 0)
        tries = 0
        while self._owners.setdefault(found, id) != id:
            tries += 1
            found = self._hashed(id, tries)
        return found

    def _hashed(self, id: str, tries: int) -> str:
        digest = blake2b(f"{tries}:{id}".encode("utf-8", "surrogatepass"), digest_size=64).digest()
        number, made = int.from_bytes(digest), ""
        for _ in range(self._length):
            number, place = divmod(number, len(self._symbols))
            made += self._symbols[place]
        return made

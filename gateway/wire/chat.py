"""The canonical exchange: OpenAI's chat JSON, kept as the bytes that came, read only where somebody looks.

A field that the gateway does not know rides along. A request is changed by splicing (`wire.splice`), so what was not
changed stays as it was, to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from gateway.errors import BadRequest
from gateway.wire import splice
from gateway.wire.body import check_members, parsed
from gateway.wire.jsontext import dumps, loads

Message = dict[str, Any]

MOST_TOKENS = 10**9
_TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
_FIELDS: Sequence[tuple[str, type | tuple[type, ...], str]] = (
    ("model", str, "a string"),
    ("stream", bool, "true or false"),
    ("stream_options", dict, "an object"),
    ("conversation_id", str, "a string"),
    ("user", str, "a string"),
    ("safety_identifier", str, "a string"),
    ("tools", list, "an array"),
    ("logit_bias", dict, "an object"),
    ("stop", (str, list), "a string or an array of strings"),
)
_USUAL_KINDS: Mapping[str, type | tuple[type, ...]] = {key: kind for key, kind, _ in _FIELDS}
_LIMITS = {
    **dict.fromkeys(_TOKEN_LIMITS, (-MOST_TOKENS, MOST_TOKENS)),
    "n": (1, 128),
    "top_logprobs": (0, 20),
}


_PLAIN_KINDS: Mapping[str, type] = {
    "messages": list,
    **dict.fromkeys(("model", "user", "conversation_id", "safety_identifier", "service_tier", "reasoning_effort"), str),
    "stream": bool,
    **dict.fromkeys(_TOKEN_LIMITS, int),
    **dict.fromkeys(("temperature", "top_p"), float),
}


class ChatRequest:
    """A request to `/chat/completions`: `raw` as received, `data` as parsed; both describe one object, for good."""

    __slots__ = ("data", "model", "raw", "stream")
    operation: ClassVar[str] = "chat/completions"

    def __init__(self, raw: bytes, data: dict[str, Any]) -> None:
        self.raw = raw
        self.data = data
        self.model: str | None = data.get("model")
        self.stream: bool = data.get("stream") is True

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Checks what the gateway acts on; everything else is the upstream's to judge. Raises BadRequest."""
        data = parsed(raw)
        request = cls(raw, data)
        if _is_plain(data):
            return request
        check_members(raw, data)
        cls._check(data)
        if "max_tokens" not in data and "max_completion_tokens" not in data:
            return request
        gone = [key for key in _TOKEN_LIMITS if data.get(key) is not None and data[key] <= 0]
        return request.with_fields(**dict.fromkeys(gone)) if gone else request

    @classmethod
    def _check(cls, data: Mapping[str, Any]) -> None:
        _check_messages(data)
        _check_fields(data)

    def with_fields(self, /, **changes: bytes | None) -> Self:
        """A request with top-level members set to JSON texts, or taken out (None)."""
        data = dict(self.data)
        for key, text in changes.items():
            if text is None:
                data.pop(key, None)
            else:
                data[key] = loads(text)
        return type(self)(splice.edit(self.raw, self.data, changes), data)

    def with_model(self, name: str) -> Self:
        """The same request for the model of that name."""
        return self.with_fields(model=dumps(name))

    def with_history(self, stored: Sequence[bytes]) -> Self:
        """The same request with stored messages (JSON texts) before its own."""
        if not stored:
            return self
        own = [self.raw[place.value : place.end] for place in splice.members(self.raw) if place.key == "messages"]
        inner = own[0][1:-1] if len(own) == 1 else b",".join(dumps(message) for message in self.messages)
        return self.with_fields(messages=b"[" + b",".join((*stored, inner)) + b"]")

    @property
    def messages(self) -> list[Message]:
        messages: list[Message] = self.data["messages"]
        return messages

    @property
    def choice_count(self) -> int:
        return self.data.get("n") or 1

    @property
    def wants_usage(self) -> bool:
        """Did the client ask for the usage chunk of a stream?"""
        options = self.data.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    def asking_for_usage(self) -> Self:
        """The same streamed request, with usage asked for."""
        if self.wants_usage:
            return self
        options = {**(self.data.get("stream_options") or {}), "include_usage": True}
        return self.with_fields(stream_options=dumps(options))


class CompletionRequest(ChatRequest):
    """A request to the older `/completions`: a prompt instead of messages, answered with text. No turn of a talk."""

    __slots__ = ()
    operation: ClassVar[str] = "completions"

    @classmethod
    def _check(cls, data: Mapping[str, Any]) -> None:
        prompt = data.get("prompt")
        if prompt is not None and not isinstance(prompt, (str, list)):
            raise BadRequest("'prompt' must be a string or an array.", param="prompt", code="invalid_type")
        _check_fields(data)

    @property
    def messages(self) -> list[Message]:
        return []


def take_apart(value: object) -> tuple[list[str], int]:
    """A `prompt` or an `input`: its texts, and how many tokens it holds as numbers."""
    if isinstance(value, str):
        return [value], 0
    if not isinstance(value, list):
        return [], 0
    numbers = sum(isinstance(item, int) for item in value)
    inside = [take_apart(item) for item in value if not isinstance(item, int)]
    return [text for texts, _ in inside for text in texts], numbers + sum(count for _, count in inside)


def _check_messages(data: Mapping[str, Any]) -> None:
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("'messages' must be an array with at least one message.", param="messages")
    for index, message in enumerate(messages):
        if not _is_usual_message(message):
            _check_message(message, f"messages[{index}]")


def _is_plain(data: Mapping[str, Any]) -> bool:
    """Is it a chat of texts and nothing else that could be wrong? Told in one look; False: look closer."""
    messages = data.get("messages")
    if not messages:
        return False
    for key, value in data.items():
        kind = type(value)
        if key not in _PLAIN_KINDS or kind is not _PLAIN_KINDS[key]:
            return False
        if (kind is int or kind is float) and not 0 < value <= MOST_TOKENS:
            return False
    return all(map(_is_plain_message, messages))


def _is_plain_message(message: object) -> bool:
    return type(message) is dict and len(message) == 2 and _is_usual_message(message)


def _is_usual_message(message: object) -> bool:
    """Told in no time; whatever is not of this kind is looked at again."""
    if type(message) is not dict:
        return False
    role = message.get("role")
    return type(role) is str and role != "" and type(message.get("content")) is str


def _has_usual_fields(data: Mapping[str, Any]) -> bool:
    for key, value in data.items():
        if key in _USUAL_KINDS:
            if not isinstance(value, _USUAL_KINDS[key]):
                return False
        elif key in _LIMITS:
            least, most = _LIMITS[key]
            if type(value) is not int or not least <= value <= most:
                return False
    return True


def _check_fields(data: Mapping[str, Any]) -> None:
    if _has_usual_fields(data):
        return
    for key, kind, words in _FIELDS:
        if data.get(key) is not None and not isinstance(data[key], kind):
            raise BadRequest(f"'{key}' must be {words}.", param=key, code="invalid_type")
    for key in (*_TOKEN_LIMITS, "n", "top_logprobs"):
        value = data.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or abs(value) > MOST_TOKENS):
            raise BadRequest(f"'{key}' must be a whole number.", param=key, code="invalid_type")
    for key, (least, most) in _LIMITS.items():
        if data.get(key) is not None and not least <= data[key] <= most:
            raise BadRequest(f"'{key}' must be between {least} and {most}.", param=key, code="invalid_value")


def _check_message(message: object, path: str) -> None:
    if not isinstance(message, dict):
        raise BadRequest(f"'{path}' must be an object.", param=path, code="invalid_type")
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise BadRequest(f"'{path}.role' must be a string such as 'user'.", param=f"{path}.role")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise BadRequest(f"'{path}.content' must be a string or an array of parts.", param=f"{path}.content")
    for index, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            where = f"{path}.content[{index}]"
            raise BadRequest(f"'{where}' must be an object with a 'type'.", param=where)


class Chunk:
    """One chunk of a stream: `raw` JSON bytes or parsed `data`, each made from the other on first use."""

    __slots__ = ("_data", "_raw")

    def __init__(self, raw: bytes | None = None, data: dict[str, Any] | None = None) -> None:
        self._raw = raw
        self._data = data

    @property
    def raw(self) -> bytes:
        if self._raw is None:
            self._raw = dumps(self._data)
        return self._raw

    @property
    def data(self) -> dict[str, Any]:
        """Raises ValueError if the bytes are no JSON object."""
        if self._data is None:
            data = loads(self._raw or b"")
            if not isinstance(data, dict):
                raise ValueError("it is not a JSON object")
            self._data = data
        return self._data


@dataclass(slots=True)
class Completion:
    """A whole reply: the upstream's bytes and what they parse to. `usage`: what it told, if that has been looked at."""

    raw: bytes
    data: dict[str, Any]
    usage: Usage | None = None


@dataclass(slots=True)
class Usage:
    """Token counts. The details are parts of the two totals, never beside them, and no token is in two of them, apart
    from `cache_write_1h_tokens`, which are some of `cache_write_tokens`.

    Nobody says which of the cached tokens were sound or pictures. They count as cached, and only what is then left of
    the total can be sound or pictures.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    audio_input_tokens: int = 0
    reasoning_tokens: int = 0
    audio_output_tokens: int = 0
    image_input_tokens: int = 0
    image_output_tokens: int = 0
    cache_write_1h_tokens: int = 0

    @classmethod
    def read(cls, data: object) -> Usage | None:
        """From OpenAI's `usage` object, in chat's words or in those of pictures and sound (`input_tokens`); None if its
        totals are missing or cannot be true."""
        if not isinstance(data, dict):
            return None
        prompt, completion = _count(data.get("prompt_tokens")), _count(data.get("completion_tokens", 0))
        inside, outside = data.get("prompt_tokens_details"), data.get("completion_tokens_details")
        if prompt is None and "input_tokens" in data:
            prompt, completion = _count(data["input_tokens"]), _count(data.get("output_tokens", 0))
            inside = data.get("input_tokens_details", data.get("input_token_details"))
            outside = data.get("output_tokens_details", data.get("output_token_details"))
            if outside is None and isinstance(inside, dict) and "image_tokens" in inside:
                outside = {"image_tokens": completion}  # gpt-image-1, which makes nothing but pictures
        if prompt is None or completion is None:
            return None
        if not (_tells(inside) or _tells(outside) or "prompt_cache_hit_tokens" in data):
            return cls(prompt, completion)
        cached = _part(inside, "cached_tokens", prompt) or _part(data, "prompt_cache_hit_tokens", prompt)
        written = _part(inside, "cache_write_tokens", prompt - cached)
        heard = _part(inside, "audio_tokens", prompt - cached - written)
        reasoning = _part(outside, "reasoning_tokens", completion)
        spoken = _part(outside, "audio_tokens", completion - reasoning)
        seen = _part(inside, "image_tokens", prompt - cached - written - heard)
        drawn = _part(outside, "image_tokens", completion - reasoning - spoken)
        lasting = _part(data.get("cache_creation"), "ephemeral_1h_input_tokens", written)
        return cls(prompt, completion, cached, written, heard, reasoning, spoken, seen, drawn, lasting)

    def to_openai(self) -> dict[str, Any]:
        """The `usage` object for a reply whose upstream sent none."""
        return {
            "prompt_tokens": self.input_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.input_tokens + self.output_tokens,
        }


def _count(value: object) -> int | None:
    if type(value) is int:
        return value if 0 <= value <= MOST_TOKENS else None
    return _count(int(value)) if type(value) is float and value.is_integer() else None


def _tells(details: object) -> bool:
    return isinstance(details, dict) and any(details.values())


def _part(details: object, key: str, most: int) -> int:
    told = details.get(key) if isinstance(details, dict) else None
    return min(_count(told) or 0, most) if told else 0


def text_of(content: object) -> str:
    """The text of a message's content: the string, or its text parts joined by line ends."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "\n".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))

"""What the scripted upstream says to a request: replies and chunks as JSON values, with their usage."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests_standalone.support.upstream_scripts import Json, Script

CREATED = 1_741_000_000
IMAGE_TOKENS = 85
FINGERPRINT = "fp_b376dfbbd5"


@dataclass(frozen=True)
class Usage:
    """Tokens, as the upstream reported them. `cached` is a part of `prompt`, `reasoning` one of `completion`."""

    prompt: int
    completion: int
    cached: int = 0
    reasoning: int = 0

    def as_openai(self) -> Json:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    @classmethod
    def from_openai(cls, value: object) -> Usage | None:
        if not isinstance(value, dict):
            return None
        return cls(
            value.get("prompt_tokens", 0),
            value.get("completion_tokens", 0),
            (value.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            (value.get("completion_tokens_details") or {}).get("reasoning_tokens", 0),
        )


@dataclass(frozen=True)
class _Choice:
    pieces: Sequence[str]
    reasoning: Sequence[str]
    refusal: Sequence[str]
    tools: Sequence[Json]
    finish_reason: str | None

    @property
    def reasoning_tokens(self) -> int:
        return _words("".join(self.reasoning))

    @property
    def tokens(self) -> int:
        called = sum(_words(tool["function"]["name"]) + _words(tool["function"]["arguments"]) for tool in self.tools)
        return sum(map(_words, (*self.pieces, *self.refusal))) + self.reasoning_tokens + called


class Answer:
    """What a script says to a request, as JSON values."""

    def __init__(self, number: int, request: Json, script: Script) -> None:
        self._request = request
        self._script = script
        self._number = number
        self._head = {"id": f"chatcmpl-{number:029d}", "created": CREATED + number, "model": request["model"]}
        tier = request.get("service_tier") or "default"
        tier = {"auto": "default", "fast": "priority"}.get(tier, tier)
        self._tail = {"service_tier": script.service_tier or tier, "system_fingerprint": FINGERPRINT}
        self._choices = [self._choice(index) for index in range(request.get("n") or 1)]
        self.usage = self._count()

    def completion(self) -> Json:
        choices = []
        for index, choice in enumerate(self._choices):
            content = "".join(choice.pieces)
            message: Json = {
                "role": "assistant",
                "content": None if choice.tools or choice.refusal else content,
                "refusal": "".join(choice.refusal) or None,
                "annotations": [],
            }
            if choice.reasoning:
                message["reasoning_content"] = "".join(choice.reasoning)
            if choice.tools:
                message["tool_calls"] = choice.tools
            message |= self._script.vendor.get("delta", {})
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(choice.pieces),
                    "finish_reason": choice.finish_reason,
                    **self._script.vendor.get("choice", {}),
                }
            )
        usage = {} if self._script.usage == "never" else {"usage": self._usage_object(self.usage)}
        head = {"id": self._head["id"], "object": "chat.completion", **self._head}
        return {**head, "choices": choices, **usage, **self._tail, **self._script.vendor.get("top", {})}

    def chunks(self) -> Iterator[Json]:
        yield from (self._chunk([]) | chunk for chunk in self._script.prelude)
        if self._script.usage == "early":
            yield self._chunk([], usage=self.usage)
        said = 0
        for deltas in itertools.zip_longest(*map(self._deltas, self._choices)):
            for index, delta in enumerate(deltas):
                if delta is not None:
                    said += 1 if "role" not in delta else 0
                    running = dataclasses.replace(self.usage, completion=min(said, self.usage.completion), reasoning=0)
                    usage = running if self._script.usage == "running" else None
                    yield self._chunk([self._delta(index, delta)], usage=usage)
        for index, choice in enumerate(self._choices):
            last = index == len(self._choices) - 1
            usage = self.usage if last and self._script.usage in ("finish", "twice", "running") else None
            yield self._chunk([self._delta(index, {}, choice.finish_reason)], usage=usage)
        if self._script.usage in ("always", "twice") or (self._script.usage == "asked" and self._asked_for_usage):
            yield self._chunk([], usage=self.usage)

    @property
    def _asked_for_usage(self) -> bool:
        return bool((self._request.get("stream_options") or {}).get("include_usage"))

    def _chunk(self, choices: list[Json], usage: Usage | None = None) -> Json:
        head = {"id": self._head["id"], "object": "chat.completion.chunk", **self._head, **self._tail}
        chunk: Json = {**head, "choices": choices}
        if usage:
            chunk["usage"] = self._usage_object(usage)
        elif self._asked_for_usage and self._script.usage != "never":
            chunk["usage"] = None
        if (self._request.get("stream_options") or {}).get("include_obfuscation") is not False:
            chunk["obfuscation"] = "aB3dE6gH9jK2mN"[: 14 - len(str(choices)) % 11]
        return {**chunk, **self._script.vendor.get("top", {})}

    def _delta(self, index: int, delta: Json, finish_reason: str | None = None) -> Json:
        ended = delta == {}
        vendor = {} if ended else self._script.vendor.get("delta", {})
        pieces = [delta["content"]] if delta.get("content") else []
        return {
            "index": index,
            "delta": {**delta, **vendor},
            "logprobs": None if ended else self._logprobs(pieces),
            "finish_reason": finish_reason,
            **self._script.vendor.get("choice", {}),
        }

    def _deltas(self, choice: _Choice) -> Iterator[Json]:
        """The first says who speaks and, as OpenAI does it, holds the first tool call."""
        first: Json = {
            "role": "assistant",
            "content": None if choice.tools or choice.reasoning else "",
            "refusal": None,
        }
        calls = [list(_tool_deltas(index, tool)) for index, tool in enumerate(choice.tools)]
        if calls:
            first = {"role": "assistant", "content": None, **calls[0].pop(0), "refusal": None}
        yield first
        for piece in choice.reasoning:
            yield {"content": None, "reasoning_content": piece}
        if not choice.tools and not choice.refusal:
            yield from ({"content": piece} for piece in choice.pieces)
        yield from ({"refusal": piece} for piece in choice.refusal)
        yield from itertools.chain.from_iterable(calls)

    def _choice(self, index: int) -> _Choice:
        script, mark = self._script, f"({index}) " if index else ""
        reasoning, refusal = _split(script.reasoning), _split(script.refusal)
        if script.tool_calls and self._request["messages"][-1].get("role") != "tool":
            tools = [self._tool(index, each) for each in range(script.tool_calls)]
            return _Choice([], reasoning, [], tools, "tool_calls")
        pieces: Sequence[str] = [] if refusal else script.pieces
        if script.words and not refusal:
            word = " " + "x" * (script.word_bytes - 1)
            pieces = [word] * script.words if script.word_bytes else [f"word{each} " for each in range(script.words)]
        elif not pieces and not refusal:
            pieces = _split(mark + self._text())
        return _Choice(pieces, reasoning, refusal, [], script.finish_reason)

    def _text(self) -> str:
        request, script = self._request, self._script
        if script.text is not None:
            return script.text
        if script.echo:
            return json.dumps({name: value for name, value in request.items() if name != "messages"})
        said = _said(request["messages"])
        wanted = request.get("response_format") or {}
        if wanted.get("type") == "json_schema":
            return json.dumps(_example(wanted["json_schema"].get("schema") or {}, "value"))
        if wanted.get("type") == "json_object":
            return json.dumps({"answer": said})
        pictures = len(images(request["messages"]))
        return f"I see {pictures} image{'s' * (pictures > 1)}. {said}" if pictures else said

    def _tool(self, choice: int, index: int) -> Json:
        functions = [tool["function"] for tool in self._request.get("tools") or [] if tool.get("function")]
        function: Json = functions[index % len(functions)] if functions else {"name": "get_weather"}
        arguments = self._script.arguments
        if arguments is None:
            wanted: Json = function.get("parameters") or {"properties": {"location": {"type": "string"}}}
            arguments = json.dumps(_example(wanted, "value"))
        name = f"call_{self._number:016d}{choice:03d}{index:03d}"
        return {"id": name, "type": "function", "function": {"name": function["name"], "arguments": arguments}}

    def _logprobs(self, pieces: Sequence[str]) -> Json | None:
        if not self._request.get("logprobs"):
            return None
        wanted = self._request.get("top_logprobs") or 0
        entries = []
        for piece in pieces:
            token = {"token": piece, "logprob": -0.25, "bytes": list(piece.encode("utf-8", "surrogatepass"))}
            others = [{**token, "logprob": -0.25 - rank} for rank in range(wanted)]
            entries.append({**token, "top_logprobs": others})
        return {"content": entries, "refusal": None}

    def _usage_object(self, usage: Usage) -> Json:
        extra: Json = dict(self._script.vendor.get("usage", {}))
        if self._script.usage == "finish":
            extra |= {"prompt_cache_hit_tokens": usage.cached, "prompt_cache_miss_tokens": usage.prompt - usage.cached}
        return usage.as_openai() | extra

    def _count(self) -> Usage:
        messages = self._request["messages"]
        prompt = sum(_words(_text_of(message)) for message in messages) + IMAGE_TOKENS * len(images(messages))
        return Usage(
            prompt=prompt,
            completion=sum(choice.tokens for choice in self._choices),
            cached=int(prompt * self._script.cached_share),
            reasoning=sum(choice.reasoning_tokens for choice in self._choices),
        )


def _words(text: str) -> int:
    return len(text.split())


def _split(text: str) -> list[str]:
    """One piece for each word, with the white space before it."""
    return re.findall(r"\s*\S+(?:\s+$)?", text)


def _tool_deltas(index: int, tool: Json) -> Iterator[Json]:
    named = {**tool, "function": {"name": tool["function"]["name"], "arguments": ""}}
    yield {"tool_calls": [{"index": index, **named}]}
    arguments = tool["function"]["arguments"]
    for start in range(0, len(arguments), 6):
        yield {"tool_calls": [{"index": index, "function": {"arguments": arguments[start : start + 6]}}]}


def _parts(message: Json) -> list[Json]:
    content = message.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _text_of(message: Json) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in _parts(message) if isinstance(part.get("text"), str))


def images(messages: Sequence[Json]) -> list[Json]:
    return [part for message in messages for part in _parts(message) if part.get("type") == "image_url"]


def last_user_text(messages: Sequence[Json]) -> str:
    return next((_text_of(message) for message in reversed(messages) if message.get("role") == "user"), "")


def _said(messages: Sequence[Json]) -> str:
    """The answer of a script that has none of its own: the first fifty words of the question."""
    if messages[-1].get("role") == "tool":
        return f"The tool said: {_text_of(messages[-1])}"
    probe, _, rest = take_apart(last_user_text(messages))
    words = [f"probe:{probe}"] * bool(probe) + rest.split()[:50]
    return "You said: " + (" ".join(words) or "nothing at all")


def take_apart(text: str) -> tuple[str | None, Json | None, str]:
    """`probe:ID {"script": ...} the rest`, of which all are optional."""
    probe = None
    if found := re.match(r"\s*probe:(\S+)\s*", text):
        probe, text = found[1], text[found.end() :]
    if text.lstrip().startswith("{"):
        try:
            value, end = json.JSONDecoder().raw_decode(text.lstrip())
        except ValueError:
            return probe, None, text
        if "script" in value:
            return probe, value, text.lstrip()[end:]
    return probe, None, text


def _example(schema: Json, name: str, root: Json | None = None) -> Any:
    """The plainest value that a JSON schema allows. A string is the name of its property."""
    root = schema if root is None else root
    if "$ref" in schema:
        target: Any = root
        for step in schema["$ref"].removeprefix("#").strip("/").split("/"):
            target = target[step] if step else target
        return _example(target, name, root)
    if "const" in schema or "enum" in schema:
        return schema.get("const", next(iter(schema.get("enum", ())), None))
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return _example(choices[0], name, root)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {each: _example(inner, each, root) for each, inner in schema.get("properties", {}).items()}
    if kind == "array":
        return [_example(schema.get("items", {}), name, root)]
    return {"string": name, "integer": 1, "number": 1.5, "boolean": True}.get(kind)

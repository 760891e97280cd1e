"""A backend that answers by script, in this process: the built-in `echo` model, demos, and tests of the core.

`echo` streams the last user message back word by word. A word, with the white space after it, is its token, so its
usage is exact. A script (see `ScriptSettings` in the configuration) adds delays, failures before and after the first
chunk, tool calls, missing usage and cut streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.backends.base import ModelInfo
from gateway.errors import ModelNotFound, UpstreamError
from gateway.wire.chat import ChatRequest, Chunk, Completion, Message, Usage, text_of
from gateway.wire.jsontext import dumps

ECHO = "echo"


@dataclass(frozen=True, slots=True)
class Script:
    """How a model answers. Times are seconds; counts are chunks that leave before something happens."""

    reply: str | None = None
    reasoning: str | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    delay: float = 0
    first_delay: float = 0
    usage: str = "exact"
    finish_reason: str | None = None
    error_status: int | None = None
    error_message: str = "The script says so."
    fail_after: int | None = None
    cut_after: int | None = None


@dataclass(slots=True)
class _Answer:
    """What one choice will say."""

    text: list[str]
    reasoning: list[str]
    calls: list[dict[str, Any]]
    finish_reason: str
    usage: Usage = field(default_factory=Usage)


class ScriptedBackend:
    """`scripts` by model name; without any, the only model is `echo`."""

    def __init__(self, name: str, scripts: Mapping[str, Script] | None = None) -> None:
        self.name = name
        self._scripts = dict(scripts or {ECHO: Script()})

    async def models(self) -> Sequence[ModelInfo]:
        return [ModelInfo(name, owned_by="gateway") for name in self._scripts]

    async def complete(self, request: ChatRequest) -> Completion:
        script = self._script(request)
        await asyncio.sleep(script.first_delay)
        answer = _answer(script, request)
        if script.fail_after is not None or script.cut_after is not None:
            raise UpstreamError("The connection to the upstream broke.", log="scripted cut")
        await asyncio.sleep(script.delay * len(answer.text))
        choices = [_whole_choice(index, answer) for index in range(request.choice_count)]
        data = _named("chat.completion", request) | {"choices": choices}
        if script.usage == "exact":
            data["usage"] = _usage(answer, request)
        return Completion(dumps(data), data)

    async def stream(self, request: ChatRequest) -> ScriptedStream:
        script = self._script(request)
        return ScriptedStream(script, _chunks(script, _answer(script, request), request))

    async def aclose(self) -> None:
        """Nothing is held."""

    def _script(self, request: ChatRequest) -> Script:
        script = self._scripts.get(request.model or "")
        if script is None:
            raise ModelNotFound(f"The model '{request.model}' does not exist.")
        if script.error_status is not None:
            raise UpstreamError(
                script.error_message, status=script.error_status, upstream_status=script.error_status, log="scripted"
            )
        return script


class ScriptedStream:
    """One chunk for each read, after its delay."""

    def __init__(self, script: Script, chunks: Iterator[Chunk]) -> None:
        self.complete = False
        self._script = script
        self._chunks = chunks
        self._sent = 0
        self._closed = asyncio.Event()

    async def read(self) -> Sequence[Chunk]:
        await self._pause(self._script.delay if self._sent else self._script.first_delay)
        if self._closed.is_set():
            raise UpstreamError("The connection to the upstream broke.", log="closed")
        if self._sent == self._script.fail_after:
            raise UpstreamError(self._script.error_message, log="scripted failure")
        if self._sent == self._script.cut_after:
            return ()
        chunk = next(self._chunks, None)
        self._sent += 1
        if chunk is None:
            self.complete = True
            return ()
        return (chunk,)

    async def _pause(self, seconds: float) -> None:
        if not seconds:
            await asyncio.sleep(0)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), seconds)

    async def close(self) -> None:
        self._closed.set()


def words(text: str) -> list[str]:
    """The text in pieces of one word each; joined they are the text."""
    return re.findall(r"\s*\S+(?:\s+$)?|^\s+$", text)


def _answer(script: Script, request: ChatRequest) -> _Answer:
    text = words(_last_user_text(request.messages) if script.reply is None else script.reply)
    reasoning = words(script.reasoning or "")
    calls = [_call(index, call) for index, call in enumerate(script.tool_calls)]
    if calls and script.reply is None:
        text = []
    reason = script.finish_reason or ("tool_calls" if calls else "stop")
    most = request.data.get("max_completion_tokens") or request.data.get("max_tokens")
    if most is not None and len(reasoning) + len(text) > most:
        reasoning, text, calls = reasoning[:most], text[: max(0, most - len(reasoning))], []
        reason = "length"
    said = len(reasoning) + len(text) + sum(len(words(call["function"]["arguments"])) for call in calls)
    count = request.choice_count
    prompt = sum(len(words(text_of(message.get("content")))) for message in request.messages)
    usage = Usage(input_tokens=prompt, output_tokens=said * count, reasoning_tokens=len(reasoning) * count)
    return _Answer(text, reasoning, calls, reason, usage)


def _chunks(script: Script, answer: _Answer, request: ChatRequest) -> Iterator[Chunk]:
    """As OpenAI streams it: the role first, then the pieces, then the reason, then usage with no choice."""
    name = _named("chat.completion.chunk", request)
    for index in range(request.choice_count):
        for delta in _deltas(answer):
            yield Chunk(data=name | {"choices": [_choice(index, delta, None)]})
        yield Chunk(data=name | {"choices": [_choice(index, {}, answer.finish_reason)]})
    if script.usage == "exact":
        yield Chunk(data=name | {"choices": [], "usage": _usage(answer, request)})


def _deltas(answer: _Answer) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": "" if not answer.calls else None, "refusal": None}
    for piece in answer.reasoning:
        yield {"reasoning_content": piece}
    for piece in answer.text:
        yield {"content": piece}
    for index, call in enumerate(answer.calls):
        head = {"index": index, "id": call["id"], "type": "function"}
        yield {"tool_calls": [head | {"function": {"name": call["function"]["name"], "arguments": ""}}]}
        yield {"tool_calls": [{"index": index, "function": {"arguments": call["function"]["arguments"]}}]}


def _choice(index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _whole_choice(index: int, answer: _Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(answer.text), "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = "".join(answer.reasoning)
    if answer.calls:
        message |= {"content": "".join(answer.text) or None, "tool_calls": answer.calls}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}


def _usage(answer: _Answer, request: ChatRequest) -> dict[str, Any]:
    details = {"reasoning_tokens": answer.usage.reasoning_tokens}
    return answer.usage.to_openai() | {"completion_tokens_details": details}


def _named(kind: str, request: ChatRequest) -> dict[str, Any]:
    made = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}
    return made | {"model": request.model}


def _call(index: int, call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call.get("arguments", {})
    text = arguments if isinstance(arguments, str) else dumps(arguments).decode()
    name = call.get("name", f"tool_{index}")
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": text}}


def _last_user_text(messages: Sequence[Message]) -> str:
    asked = [message for message in messages if message.get("role") == "user"] or messages
    return text_of(asked[-1].get("content"))

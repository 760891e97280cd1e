"""A chat stream on its way to the client: what leaves at once, what is held, what the end carries.

Rules (contract, section 4). Not asked for usage: each `usage: null` that we caused is taken out, and the last choice's
`finish_reason` chunk is held until the turn is durable; it then carries `usage` with `cost`, `timings` and
`conversation_id`. Asked: the usage chunk is the held one. All other chunks leave as they came. Chunks with an empty
`choices` array that nobody asked for are dropped. Usage appears once: where an upstream sends it on other chunks too,
it is null there. `[DONE]` appears once. An upstream that never says why it ended gets a `finish_reason` chunk from us.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gateway.wire import WireError, splice, sse
from gateway.wire.assemble import Assembler
from gateway.wire.chat import Chunk, Usage
from gateway.wire.jsontext import dumps

_NULL_USAGE = re.compile(rb',\s*"usage"\s*:\s*null|"usage"\s*:\s*null\s*,\s*')
_MOST_CHARACTERS = 32 << 20
"""Of one answer. What streams past this is a broken upstream, not an answer."""


class StreamedError(Exception):
    """The upstream sent an error object in the middle of its stream."""

    def __init__(self, error: object) -> None:
        super().__init__("the upstream reported an error in its stream")
        self.error = error


class ChatStream:
    """Feed it the upstream's chunks; it gives the bytes that may leave now and remembers what the record needs."""

    def __init__(self, *, wants_usage: bool) -> None:
        self._wants_usage = wants_usage
        self._held: Chunk | None = None
        self._last: dict[str, Any] = {}
        self._usage_data: Mapping[str, Any] | None = None
        self.answer = Assembler()
        self.usage: Usage | None = None
        self.timings: object = None
        self.failure: StreamedError | WireError | None = None

    def feed(self, chunks: Iterable[Chunk]) -> bytes:
        """Raises StreamedError, or WireError for a chunk that is none. What came before it in the same read leaves
        first: the failure is then kept in `failure`, to be raised instead of reading on."""
        if self.failure is not None:
            raise self.failure
        leaving: list[bytes] = []
        try:
            for chunk in chunks:
                self._one(chunk, leaving)
            if self.answer.characters > _MOST_CHARACTERS:
                raise WireError("the answer is longer than any answer can be")
        except (StreamedError, WireError) as failure:
            if not leaving:
                raise
            self.failure = failure
        return sse.encode(leaving)

    def _one(self, chunk: Chunk, leaving: list[bytes]) -> None:
        try:
            data = chunk.data
        except ValueError as failure:
            raise WireError(f"a chunk is not valid JSON: {failure}") from None
        if data.get("error") or data.get("object") == "error":
            raise StreamedError(data.get("error") or data)
        choices = data.get("choices")
        usage = data.get("usage")
        told = Usage.read(usage)
        if told is not None:
            self._usage_data, self.usage = usage, told
        if "timings" in data:
            self.timings = data["timings"]
        if not isinstance(choices, list) or not choices:
            self._hold_usage_chunk(chunk, usage)
            return
        self._last = data
        self.answer.add(choices)
        self._pass(chunk, choices, usage, leaving)

    def _hold_usage_chunk(self, chunk: Chunk, usage: object) -> None:
        if self._wants_usage and isinstance(usage, dict):
            self._held = chunk

    def _pass(self, chunk: Chunk, choices: list[Any], usage: object, leaving: list[bytes]) -> None:
        if self._wants_usage:
            told = isinstance(usage, dict)
            leaving.append(splice.edit(chunk.raw, chunk.data, {"usage": b"null"}) if told else chunk.raw)
            return
        if self._held is not None:
            leaving.append(self._clean(self._held))
            self._held = None
        if any(_finish_reason(choice) for choice in choices):
            self._held = chunk
        else:
            leaving.append(self._clean(chunk))

    @staticmethod
    def _clean(chunk: Chunk) -> bytes:
        if "usage" not in chunk.data:
            return chunk.raw
        if chunk.data["usage"] is None and chunk.raw.count(b'"usage"') == 1:
            return _NULL_USAGE.sub(b"", chunk.raw, count=1)
        return splice.edit(chunk.raw, chunk.data, {"usage": None})

    @property
    def finished(self) -> bool:
        """Has every choice seen so far got its `finish_reason`?"""
        return bool(self.answer.finish_reasons) and set(self.answer.indexes) <= set(self.answer.finish_reasons)

    @property
    def finish_reason(self) -> str | None:
        return self.answer.finish_reasons.get(0)

    @property
    def assumed_finish_reason(self) -> str:
        """For an upstream that ended its stream properly and never said why."""
        return "tool_calls" if "tool_calls" in self.answer.message() else "stop"

    def end(self, usage: Usage, cost: object, extra: Mapping[str, Any]) -> bytes:
        """The held chunk with usage, cost and `extra` members in it, then `[DONE]`."""
        counted = {**usage.to_openai(), **(self._usage_data or {}), "cost": cost}
        reason = self.finish_reason or self.assumed_finish_reason
        finish = self._made_up_chunk([{"index": 0, "delta": {}, "finish_reason": reason}])
        chunk = self._held or (self._made_up_chunk([]) if self._wants_usage else finish)
        changes = {"usage": dumps(counted), **{key: dumps(value) for key, value in extra.items()}}
        if not isinstance(chunk.data.get("choices"), list):
            changes["choices"] = b"[]"
        leaving = [splice.edit(chunk.raw, chunk.data, changes), sse.DONE]
        if self._wants_usage and not self.answer.finish_reasons:
            leaving.insert(0, finish.raw)
        return sse.encode(leaving)

    def _made_up_chunk(self, choices: list[Any]) -> Chunk:
        """For an upstream that never sent it: a chunk in its own name."""
        name: dict[str, Any] = {key: self._last[key] for key in ("id", "created", "model") if key in self._last}
        return Chunk(data={**name, "object": "chat.completion.chunk", "choices": choices})


def _finish_reason(choice: object) -> str | None:
    reason = choice.get("finish_reason") if isinstance(choice, dict) else None
    return reason if isinstance(reason, str) and reason else None

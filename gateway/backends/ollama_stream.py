"""Ollama's streams, line by line, as OpenAI's chunks. Pure.

A stream ends with a line that is `done`, and with nothing else. A line with `error` passes as the chunk of an error.
A chunk is made as bytes and as value at once, so that nobody has to parse it again.
"""

from __future__ import annotations

from gateway.backends.ollama_reply import (
    JSON,
    NewId,
    calls_of,
    counted,
    finish_reason,
    head_of,
    json_object,
    logprobs,
    message_of,
    new_id,
    text_logprobs,
    text_of,
)
from gateway.wire import WireError
from gateway.wire.chat import Chunk
from gateway.wire.jsontext import dumps
from gateway.wire.ndjson import NDJSONDecoder


class OllamaDecoder:
    """The lines of a streamed answer to chunks; ends at the one that is `done` and ignores what comes after it."""

    prefix = "chatcmpl-"
    object = "chat.completion.chunk"

    def __init__(self, new_id: NewId = new_id) -> None:
        self.complete = False
        self.trailing = False
        self._lines = NDJSONDecoder()
        self._new_id = new_id
        self._head: JSON = {}
        self._raw_head = b""
        self._said = False
        self._failure: WireError | None = None

    def feed(self, piece: bytes) -> list[Chunk]:
        return [] if self.complete else self._chunks(self._lines.feed(piece))

    def flush(self) -> list[Chunk]:
        return [] if self.complete else self._chunks(self._lines.flush())

    def _chunks(self, lines: list[bytes]) -> list[Chunk]:
        """What came in the same read before a broken line leaves first; the failure is kept for the next call."""
        if self._failure is not None:
            raise self._failure
        chunks: list[Chunk] = []
        try:
            for line in lines:
                self._line(line, chunks)
                if self.complete:
                    break
        except WireError as failure:
            if not chunks:
                raise
            self._failure = failure
        return chunks

    def _line(self, raw: bytes, chunks: list[Chunk]) -> None:
        line = json_object(raw)
        if line.get("error"):
            chunks.append(Chunk(raw, line))
            return
        if not self._raw_head:
            self._head = {"id": self._new_id(self.prefix), "object": self.object, **head_of(line)}
            self._raw_head = dumps(self._head)[:-1]
        self._say(line, chunks)
        if line.get("done") is True:
            self.complete = True
            chunks.append(self._choice(self._last(line)))
            if told := counted(line, said=self._said):
                data = {**self._head, "choices": [], **told}
                chunks.append(Chunk(dumps(data), data))

    def _say(self, line: JSON, chunks: list[Chunk]) -> None:
        raise NotImplementedError

    def _last(self, line: JSON) -> JSON:
        raise NotImplementedError

    def _choice(self, choice: JSON) -> Chunk:
        """A chunk of that choice. Only the choice is encoded anew; the rest is the same in all of a stream."""
        raw = b'%b,"choices":[%b]}' % (self._raw_head, dumps(choice))
        return Chunk(raw, {**self._head, "choices": [choice]})


class ChatDecoder(OllamaDecoder):
    """Of `/api/chat`. What a line holds of thinking, text and tool calls leaves as chunks of their own."""

    def __init__(self, new_id: NewId = new_id) -> None:
        super().__init__(new_id)
        self._called = 0

    def _say(self, line: JSON, chunks: list[Chunk]) -> None:
        message, odds = message_of(line), logprobs(line)
        for delta in self._deltas(message, odds is not None):
            if not self._said:
                self._said = True
                delta = {"role": "assistant", **delta}
            chunks.append(self._choice({"index": 0, "delta": delta, "logprobs": odds, "finish_reason": None}))
            odds = None

    def _deltas(self, message: JSON, has_odds: bool) -> list[JSON]:
        deltas: list[JSON] = []
        if message.get("thinking"):
            deltas.append({"reasoning_content": message["thinking"]})
        if message.get("content"):
            deltas.append({"content": message["content"]})
        calls = calls_of(message, self._new_id)
        if calls:
            indexed = [{"index": self._called + number, **call} for number, call in enumerate(calls)]
            self._called += len(calls)
            deltas.append({"tool_calls": indexed})
        return deltas or ([{"content": ""}] if has_odds else [])

    def _last(self, line: JSON) -> JSON:
        delta = {} if self._said else {"role": "assistant", "content": ""}
        reason = finish_reason(line, called=self._called > 0)
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


class TextDecoder(OllamaDecoder):
    """Of `/api/generate`. Its thinking has no place in OpenAI's older completions."""

    prefix = "cmpl-"
    object = "text_completion"

    def __init__(self, new_id: NewId = new_id) -> None:
        super().__init__(new_id)
        self._length = 0

    def _say(self, line: JSON, chunks: list[Chunk]) -> None:
        text, odds = text_of(line), text_logprobs(line, self._length)
        self._length += len(text)
        self._said = self._said or bool(text or line.get("thinking"))
        if text or odds:
            chunks.append(self._choice({"text": text, "index": 0, "logprobs": odds, "finish_reason": None}))

    def _last(self, line: JSON) -> JSON:
        return {"text": "", "index": 0, "logprobs": None, "finish_reason": finish_reason(line, called=False)}

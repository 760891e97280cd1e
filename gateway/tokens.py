"""Token counts for turns whose upstream reported none: an estimate, and the row says so (`counted_by` = gateway)."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.wire.chat import Message, Usage, text_of
from gateway.wire.jsontext import dumps

CHARACTERS_PER_TOKEN = 4


def estimate(messages: Sequence[Message], answer_characters: int) -> Usage:
    """Characters divided by four, rounded up. Pictures and sound count nothing: their bytes say nothing of tokens."""
    prompt = sum(_characters(message) for message in messages)
    return Usage(input_tokens=_tokens(prompt), output_tokens=_tokens(answer_characters))


def answer_characters(message: Message) -> int:
    """The characters of an assistant message: its text, its reasoning, its tool calls."""
    return _characters(message)


def _characters(message: Message) -> int:
    count = len(text_of(message.get("content")))
    for key in ("reasoning_content", "reasoning", "refusal"):
        value = message.get(key)
        count += len(value) if isinstance(value, str) else 0
    calls = message.get("tool_calls")
    return count + (len(dumps(calls)) if isinstance(calls, list) and calls else 0)


def _tokens(characters: int) -> int:
    return -(-characters // CHARACTERS_PER_TOKEN)

"""Estimates by example: these messages in, this many tokens out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.tokens import answer_characters, estimate
from gateway.wire.chat import Usage


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content} | more


@pytest.mark.parametrize(
    ("messages", "answer", "usage"),
    [
        ([], 0, Usage()),
        ([said("")], 0, Usage()),
        ([said("1")], 1, Usage(1, 1)),
        ([said("1234")], 4, Usage(1, 1)),
        ([said("12345")], 5, Usage(2, 2)),
        ([said("12"), said("34")], 8, Usage(1, 2)),
        ([said("👩‍💻")], 3, Usage(1, 1)),
    ],
)
def test_characters_divided_by_four_rounded_up(messages: list[dict[str, Any]], answer: int, usage: Usage) -> None:
    assert estimate(messages, answer) == usage


@pytest.mark.parametrize(
    ("message", "characters"),
    [
        (said("12345"), 5),
        (said(None), 0),
        ({}, 0),
        (said([{"type": "text", "text": "123"}, {"type": "text", "text": "456"}]), 7),
        (said([{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1000}}]), 0),
        (said([{"type": "input_audio", "input_audio": {"data": "A" * 1000}}]), 0),
        (said("12", reasoning_content="345"), 5),
        (said("12", reasoning="345", refusal="6"), 6),
        (said("12", reasoning_content=None, refusal=7), 2),
        (said(None, tool_calls=[]), 0),
        (said(None, tool_calls="x"), 0),
        (said(None, tool_calls=[{"id": "c"}]), len('[{"id":"c"}]')),
        (said("\ud83d"), 1),
        (said("", tool_calls=["\ud83d"]), len('["\\ud83d"]')),
    ],
)
def test_what_counts(message: dict[str, Any], characters: int) -> None:
    assert answer_characters(message) == characters


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["content", "tool_calls", "reasoning", "refusal"]), _JSON))
def test_any_message_has_an_estimate_that_is_not_negative(message: dict[str, Any]) -> None:
    usage = estimate([message], answer_characters(message))
    assert usage.input_tokens == usage.output_tokens >= 0

"""What a call may use at most."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from gateway import estimates
from gateway.backends.scripted import ScriptedBackend
from gateway.catalog import Route
from gateway.pricing import Price, Priced, Tier, configured
from gateway.wire.chat import ChatRequest, CompletionRequest
from gateway.wire.operation import OperationRequest


def chat(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return ChatRequest.parse(json.dumps({"model": "m", "messages": messages, **fields}).encode())


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("request_", "tokens"),
    [
        (chat(user("four")), 4 + 8),
        (chat(user("é🙂")), 6 + 8),
        (chat(user("a"), {"role": "assistant", "content": None}, user("b")), 2 + 3 * 8),
        (chat(user([{"type": "text", "text": "four"}, {"type": "text", "text": "two"}])), 7 + 8),
        (chat(user([{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}])), 2008),
        (chat(user("four"), tools=[{"type": "function"}]), 12 + len('[{"type":"function"}]')),
        (chat({"role": "tool", "content": "four", "tool_call_id": "x"}), 12 + len('"x"')),
        (chat(user("a"), {"role": "assistant", "tool_calls": [{"id": "x"}]}), 1 + 2 * 8 + len('[{"id":"x"}]')),
        (CompletionRequest.parse(b'{"model": "m", "prompt": ["four", [1, 2, 3]]}'), 7),
        (CompletionRequest.parse(b'{"model": "m", "prompt": "four", "suffix": "two"}'), 7),
        (OperationRequest.parse("embeddings", "application/json", b'{"model": "m", "input": ["four", "two"]}'), 7),
        (OperationRequest.parse("images/generations", "application/json", b'{"prompt": "a cat"}'), 5),
    ],
)
def test_no_token_is_shorter_than_a_byte(request_: ChatRequest | OperationRequest, tokens: int) -> None:
    assert estimates.input_tokens(request_) == tokens


def test_sound_is_not_counted_by_its_bytes() -> None:
    part = {"type": "input_audio", "input_audio": {"data": "A" * 50_000, "format": "wav"}}
    assert 100 <= estimates.input_tokens(chat(user([part]))) < 120


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 4096),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 9, "max_tokens": 7}, 9),
        ({"max_tokens": 0}, 4096),
        ({"max_tokens": 7, "n": 3}, 21),
    ],
)
def test_an_answer_is_as_long_as_it_may_be(fields: dict[str, int], tokens: int) -> None:
    assert estimates.output_tokens(chat(user("hi"), **fields), 4096) == tokens


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [("four", 1), (["four"], 1), (["four", "two"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2), ([], 1), (None, 1)],
)
def test_each_prompt_of_a_list_has_an_answer(prompt: Any, answers: int) -> None:
    request = CompletionRequest.parse(json.dumps({"model": "m", "prompt": prompt, "max_tokens": 7, "n": 3}).encode())
    assert estimates.output_tokens(request, 4096) == 3 * 7 * answers


def test_each_picture_counts() -> None:
    request = OperationRequest.parse("images/generations", "application/json", b'{"prompt": "a cat", "n": 4}')
    assert estimates.output_tokens(request, 1000) == 4000


def test_a_vector_is_no_output() -> None:
    request = OperationRequest.parse("embeddings", "application/json", b'{"model": "m", "input": "x"}')
    assert estimates.output_tokens(request, 4096) == 0


def route(price: Priced | None) -> Route:
    return Route(ScriptedBackend("b", {}), "m", price, "drain")


def test_a_cost_is_that_of_the_dearest_route_and_kind_of_token() -> None:
    cheap = route(Price(input=1_000_000, output=2_000_000))
    written = route(Price(input=1_000_000, output=2_000_000, cache_write=1_250_000))
    tiered = route(Price(input=1, output=1, tiers=(Tier(1000, Price(input=9_000_000, output=1)),)))
    assert estimates.cost([cheap], 0, 10, 100, None) == 10 + 200
    assert estimates.cost([cheap, written], 0, 10, 100, None) == 13 + 200
    assert estimates.cost([cheap, tiered], 0, 10, 100, None) == 10 + 200
    assert estimates.cost([tiered], 0, 10, 100, None) == 91


def test_a_service_tier_that_is_asked_for_counts() -> None:
    priced = route(configured({"input": Decimal(1), "output": Decimal(2), "service_tiers": {"priority": Decimal(2)}}))
    assert estimates.cost([priced], 0, 1000, 0, None) == 1_000_000
    assert estimates.cost([priced], 0, 1000, 0, "priority") == 2_000_000
    assert estimates.cost([priced], 0, 1000, 0, "flex") is None


def test_a_price_that_nobody_knows_is_no_price() -> None:
    known = route(Price(input=1, output=1))
    assert estimates.cost([known, route(None)], 0, 1, 1, None) is None
    assert estimates.cost([replace(known, price=Price(input=1, output=None))], 0, 1, 1, None) is None
    assert estimates.cost([replace(known, price=Price(input=1, output=None))], 0, 1, 0, None) == 1

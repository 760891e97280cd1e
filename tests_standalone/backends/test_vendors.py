"""The table of vendors: this address, that vendor; this request, what the vendor gets."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from gateway.backends.adapt import Adapter
from gateway.backends.vendors import NOBODY, VENDORS, CallIds, Quirks, quirks_of, vendor_of
from gateway.wire.chat import ChatRequest


@pytest.mark.parametrize(
    ("url", "vendor"),
    [
        ("https://api.openai.com/v1", "openai"),
        ("https://eu.api.openai.com/v1", "openai"),
        ("https://API.OpenAI.com:443", "openai"),
        ("https://api.openai.com./v1", "openai"),
        ("https://user:pass@api.groq.com/openai/v1", "groq"),
        ("https://my-name.openai.azure.com", "azure"),
        ("https://api.deepseek.com/beta", "deepseek"),
        ("https://api.mistral.ai/v1", "mistral"),
        ("https://eu-west-1.api.x.ai/v1", "x-ai"),
        ("https://openrouter.ai/api/v1", "openrouter"),
        ("https://generativelanguage.googleapis.com/v1beta/openai", "google"),
        ("https://bedrock-runtime.eu-west-1.amazonaws.com/openai/v1", "aws"),
        ("https://router.huggingface.co/groq/openai/v1", "huggingface_groq"),
        ("https://router.huggingface.co/groq", "huggingface_groq"),
        ("https://router.huggingface.co/groqq", None),
        ("https://router.huggingface.co/v1", None),
        ("https://api.openai.com.example.org/v1", None),
        ("https://xapi.openai.com/v1", None),
        ("https://example.org/api.openai.com", None),
        ("http://127.0.0.1:8000/v1", None),
        ("", None),
        (None, None),
    ],
)
def test_vendors_are_told_by_their_host(url: str | None, vendor: str | None) -> None:
    assert vendor_of(url) == vendor


def test_every_vendor_has_a_place_of_its_own() -> None:
    places = [place for vendor in VENDORS.values() for place in vendor.places]
    assert len(places) == len({*places})
    assert all(places)
    assert NOBODY not in VENDORS
    for name, vendor in VENDORS.items():
        for place in vendor.places:
            assert vendor_of("https://" + place.replace("*", "one")) == name


@pytest.mark.parametrize("vendor", [None, NOBODY, "openrouter", "somebody"])
def test_nobody_has_no_peculiarities(vendor: str | None) -> None:
    assert quirks_of(vendor) == Quirks()


class TestLayers:
    LOW = Quirks(drop=("a",), rename={"b": "c"}, most_choices=1, tool_call_ids=CallIds(length=9))

    def test_what_is_said_replaces_what_is_below(self) -> None:
        over = Quirks(drop=(), roles={"x": "y"}, most_choices=2)
        assert over.over(self.LOW) == replace(self.LOW, drop=(), roles={"x": "y"}, most_choices=2)
        assert Quirks().over(self.LOW) == self.LOW

    @pytest.mark.parametrize(
        ("model", "expected"),
        [
            ("one-1", replace(LOW, drop=("a", "d"), rename={"b": "c", "e": "f"}, most_choices=3)),
            ("one", replace(LOW, defaults={"x": 1})),
            ("two", LOW),
        ],
    )
    def test_a_model_adds_to_the_rest(self, model: str, expected: Quirks) -> None:
        models = {
            "one-*": Quirks(drop=("d",), rename={"e": "f"}, most_choices=3),
            "on*": Quirks(defaults={"x": 1}),
        }
        assert replace(self.LOW, by_model=models).for_model(model) == replace(expected, by_model=models)


CALL = {"id": "call_abcdefghijklmnopqrstuv", "type": "function", "function": {"name": "f", "arguments": "{}"}}
LONG_CALL = CALL | {"id": "x" * 41}
MAPPED = "HKjQEke1Z"


def user(text: str = "Hi", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def calling(call: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [call], **more}


def changes(vendor: str, request: dict[str, Any]) -> dict[str, Any]:
    """What the vendor gets otherwise: members with their new values, None for those that are gone."""
    before = {"messages": [user()], **request}
    after = Adapter(quirks_of(vendor)).apply(ChatRequest.parse(json.dumps(before).encode())).data
    return {key: after.get(key) for key in before.keys() | after.keys() if after.get(key) != before.get(key)}


@pytest.mark.parametrize(
    ("vendor", "request_", "expected"),
    [
        ("openai", {"model": "gpt-4o", "max_tokens": 5, "stop": "x", "n": 3}, {}),
        ("openai", {"model": "o3-mini", "max_tokens": 5}, {"max_tokens": None, "max_completion_tokens": 5}),
        ("openai", {"model": "gpt-5.1", "max_tokens": 5}, {"max_tokens": None, "max_completion_tokens": 5}),
        ("openai", {"model": "gpt-4o", "messages": [calling(CALL)]}, {}),
        ("azure", {"model": "o3", "max_tokens": 5}, {}),
        ("deepseek", {"model": "m", "max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": None}),
        (
            "deepseek",
            {"model": "m", "messages": [user() | {"role": "developer"}, calling(CALL), {"role": "assistant"}]},
            {"messages": [user() | {"role": "system"}, calling(CALL, reasoning_content=""), {"role": "assistant"}]},
        ),
        (
            "mistral",
            {"model": "m", "max_completion_tokens": 5, "seed": 7, "user": "u", "store": False, "stop": "x"},
            {
                "max_completion_tokens": None,
                "max_tokens": 5,
                "seed": None,
                "random_seed": 7,
                "user": None,
                "store": None,
            },
        ),
        (
            "mistral",
            {"model": "m", "stream": True, "stream_options": {"include_usage": True}},
            {"stream_options": None},
        ),
        (
            "mistral",
            {"model": "m", "messages": [user(name="n"), calling(CALL, reasoning_content="r"), user(prefix=True)]},
            {"messages": [user(), calling(CALL | {"id": MAPPED}), user(prefix=True)]},
        ),
        (
            "groq",
            {"model": "m", "messages": [user(name="n", timestamp=1), calling(CALL, reasoning_content="r")], "n": 1},
            {"messages": [user(), calling(CALL)]},
        ),
        (
            "x-ai",
            {"model": "grok-4-0709", "presence_penalty": 0, "frequency_penalty": 0, "stop": None, "top_p": 1},
            {"presence_penalty": None, "frequency_penalty": None},
        ),
        ("x-ai", {"model": "grok-3-mini-fast", "stop": ["x"]}, {"stop": None}),
        ("x-ai", {"model": "grok-3", "stop": ["x"]}, {}),
        ("x-ai", {"model": "grok-4-fast-non-reasoning", "stop": ["x"]}, {}),
        (
            "cerebras",
            {"model": "m", "messages": [user(), calling(CALL, reasoning_content="r", reasoning="q")]},
            {"messages": [user(), calling(CALL, reasoning="q")]},
        ),
        ("openrouter", {"model": "m", "max_completion_tokens": 5, "messages": [calling(LONG_CALL, x=1)]}, {}),
    ],
)
def test_what_a_vendor_gets(vendor: str, request_: dict[str, Any], expected: dict[str, Any]) -> None:
    assert changes(vendor, request_) == expected


@pytest.mark.parametrize("vendor", ["openai", "azure"])
def test_ids_of_other_vendors_may_be_too_long(vendor: str) -> None:
    result = {"role": "tool", "content": "1", "tool_call_id": LONG_CALL["id"]}
    call, answer = changes(vendor, {"model": "m", "messages": [calling(LONG_CALL), result]})["messages"]
    assert call["tool_calls"][0]["id"] == answer["tool_call_id"]
    assert len(answer["tool_call_id"]) <= 40

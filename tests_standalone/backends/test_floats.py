"""Embeddings as they come, and as they were asked for."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends.floats import are_as_asked, as_asked, to_base64, to_numbers
from gateway.wire import WireError

NUMBERS = [0.5, -1.25, 3.0]
PACKED = base64.b64encode(struct.pack("<3f", *NUMBERS)).decode()


def reply(*embeddings: Any) -> bytes:
    data = [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(embeddings)]
    return json.dumps({"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 3}}, indent=1).encode()


def asked(body: bytes, encoding: object) -> bytes:
    return as_asked(body, json.loads(body), encoding)


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_there_and_back(numbers: list[float]) -> None:
    assert to_numbers(to_base64(numbers)) == numbers


def test_what_other_readers_make_of_it() -> None:
    assert to_base64(NUMBERS) == PACKED
    assert to_base64([1, 0.1]) == base64.b64encode(struct.pack("<2f", 1, 0.1)).decode()


@pytest.mark.parametrize("numbers", [["a"], [None], [[0.5]], [1e39], [10**400]])
def test_what_no_float_holds(numbers: list[Any]) -> None:
    with pytest.raises(WireError):
        to_base64(numbers)


@pytest.mark.parametrize("text", ["no base64", "AAAA", "AAAAAAA", "ä", "AAAA\nAA=="])
def test_what_is_no_base64_of_floats(text: str) -> None:
    with pytest.raises(WireError):
        to_numbers(text)


@pytest.mark.parametrize(
    ("came", "encoding", "left"),
    [
        (NUMBERS, "base64", PACKED),
        (PACKED, "float", NUMBERS),
        (PACKED, None, NUMBERS),
    ],
)
def test_the_other_encoding_is_turned_and_nothing_else(came: Any, encoding: str | None, left: Any) -> None:
    assert json.loads(asked(reply(came, came), encoding)) == json.loads(reply(left, left))


def test_only_those_that_need_it_are_turned() -> None:
    assert json.loads(asked(reply(PACKED, NUMBERS), "base64")) == json.loads(reply(PACKED, PACKED))


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (reply(NUMBERS, NUMBERS), None),
        (reply(NUMBERS), "float"),
        (reply(PACKED), "base64"),
        (reply(), "base64"),
        (reply(PACKED), "ubinary"),
        (reply(NUMBERS), ["odd"]),
        (b'{"data":null}', "base64"),
        (b'{"data":{"embedding":[1]}}', "base64"),
        (b'{ "object":"list" }', None),
    ],
)
def test_bytes_that_fit_stay_as_they_came(body: bytes, encoding: object) -> None:
    assert asked(body, encoding) is body


@pytest.mark.parametrize("embedding", [None, {"int8": [1]}, 7, "no base64", ["a"], [[0.5]]])
def test_an_entry_that_is_no_embedding(embedding: Any) -> None:
    encoding = "float" if isinstance(embedding, str) else "base64"
    with pytest.raises(WireError):
        asked(reply(NUMBERS, embedding), encoding)


@pytest.mark.parametrize(
    ("body", "encoding", "fits"),
    [
        (reply(NUMBERS), None, True),
        (reply(NUMBERS), "float", True),
        (reply(NUMBERS), "base64", False),
        (reply(PACKED), "base64", True),
        (reply(PACKED), "float", False),
        (reply(PACKED), None, False),
        (reply(PACKED), "ubinary", True),
        (reply(), "base64", False),
        (b'{"data":[{"object":"embedding","embedding":[1]}]}', "float", True),
        (b'{"x":"%b","data":[{"embedding":[1]}]}' % (b"x" * 5000), "float", False),
    ],
)
def test_a_look_at_the_first_one(body: bytes, encoding: object, fits: bool) -> None:
    assert are_as_asked(body, encoding) is fits

"""A JSON body in, its object out; or whose fault it is that there is none."""

from __future__ import annotations

import pytest

from gateway.errors import BadRequest, BodyTooLarge
from gateway.wire.body import read_object


@pytest.mark.parametrize(
    ("raw", "data"),
    [
        (b"{}", {}),
        (b' \r\n{ "a" : [1, 2.5, null] }\t', {"a": [1, 2.5, None]}),
        ('{"ä":"世界"}'.encode(), {"ä": "世界"}),
        (b'{"a":1,"a":2}', {"a": 2}),
        (b'{"a":"1e999, [NaN]"}', {"a": "1e999, [NaN]"}),
    ],
)
def test_an_object(raw: bytes, data: object) -> None:
    assert read_object(raw) == data


@pytest.mark.parametrize(
    "raw",
    [b"", b" ", b"{", b"{}{}", b"{'a':1}", b'{"a":}', b'{"a":"\xff"}', b"\xef\xbb\xbf{}", b"[" * 100_000],
)
def test_no_json(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="not valid JSON") as caught:
        read_object(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("raw", [b"[]", b"null", b'"text"', b"7", b"true"])
def test_no_object(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="must be a JSON object") as caught:
        read_object(raw)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"NaN", b"-Infinity"])
def test_a_number_that_nobody_can_hold(number: bytes) -> None:
    with pytest.raises(BadRequest, match=r"The number at 'a\.b' is out of range") as caught:
        read_object(b'{"a":{"b":%b}}' % number)
    assert (caught.value.param, caught.value.code) == ("a.b", "invalid_value")


@pytest.mark.parametrize(
    "value", [b"[]," * 500_001, b"{}," * 500_001, b"1," * 2_000_001], ids=["lists", "objects", "1"]
)
def test_more_values_than_can_be_read_while_others_wait(value: bytes) -> None:
    with pytest.raises(BodyTooLarge) as caught:
        read_object(b'{"a":[%b0]}' % value)
    assert caught.value.status == 413


def test_many_members() -> None:
    with pytest.raises(BodyTooLarge):
        read_object(b'{%b"a":1}' % (b'"a":1,' * 500_001))


def test_a_long_text_is_no_trouble() -> None:
    text = "[,{" * 100_000
    assert read_object(b'{"a":"%b"}' % text.encode()) == {"a": text}


@pytest.mark.parametrize("key", ["Model", "MODEL", "mODEL"])
@pytest.mark.parametrize("before", ["", '"model":"cheap",'])
def test_a_model_that_only_some_upstreams_would_find(before: str, key: str) -> None:
    with pytest.raises(BadRequest, match="must be written 'model'") as caught:
        read_object(f'{{{before}"{key}":"dear"}}'.encode())
    assert (caught.value.status, caught.value.param) == (400, key)

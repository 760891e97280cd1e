"""JSON text by example: a value or a ValueError, whatever comes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.jsontext import MAX_DEPTH, dumps, loads, numbers_out_of_range

LONE = b'"\\ud83d"'
"""What makes orjson refuse the text, so that the standard library reads it."""


def nested(depth: int, inner: bytes = b"1") -> bytes:
    return b"[" * depth + inner + b"]" * depth


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'{"a": [1, 2.5, true, null, "x"]}', {"a": [1, 2.5, True, None, "x"]}),
        (LONE, "\ud83d"),
        (b'"\\uDE00\\uD83D"', "\ude00\ud83d"),
        (b'"\\ud83d\\ude00"', "😀"),
        (b'["\\\\ud83d"]', ["\\ud83d"]),
        (b'{"\\ud83d": 1, "b": [1.5, -1e3, 18446744073709551615]}', {"\ud83d": 1, "b": [1.5, -1e3, 2**64 - 1]}),
        (b'"\\u0000"', "\0"),
        (b'"\\uffff \xef\xbf\xbf"', "\uffff \uffff"),
        (b'"\xe2\x80\xa8"', "\u2028"),
        (b'{"a":1,"a":2}', {"a": 2}),
        (b"18446744073709551615", 2**64 - 1),
        (b"-9223372036854775808", -(2**63)),
        (b"18446744073709551616", 2.0**64),
        (b"1e-400", 0.0),
    ],
)
def test_values(raw: bytes, value: object) -> None:
    assert loads(raw) == value
    assert type(loads(raw)) is type(value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" ",
        b"{",
        b'{"a"}',
        b"{'a': 1}",
        b'{"a": 1,}',
        b"01",
        b"+1",
        b".5",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e400",
        b"-1e400",
        b"1" * 400,
        b"1" * 5000,
        b'"\x00"',
        b'"\n"',
        b"\x00",
        b"\xff",
        b'"\xc0\xaf"',
        b'"\xed\xa0\x80"',
        b'"\xf0\x9f\x98"',
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        '{"a": 1}'.encode("utf-16-le"),
        '{"a": 1}'.encode("utf-32"),
        b'"\\x"',
        b'"\\u12"',
        b"[1] [2]",
    ],
)
@pytest.mark.parametrize("with_a_lone_surrogate", [False, True])
def test_refused(raw: bytes, with_a_lone_surrogate: bool) -> None:
    raw = b"[" + LONE + b"," + raw + b"]" if with_a_lone_surrogate else raw
    with pytest.raises(ValueError, match=r"."):
        loads(raw)


@pytest.mark.parametrize("inner", [b"1", LONE])
@pytest.mark.parametrize("wrap", [nested, lambda depth, inner: b'{"a":' * depth + inner + b"}" * depth])
def test_depth(wrap: Callable[[int, bytes], bytes], inner: bytes) -> None:
    assert loads(wrap(MAX_DEPTH, inner))
    with pytest.raises(ValueError, match="nested too deeply"):
        loads(wrap(MAX_DEPTH + 1, inner))


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 254, 255, 500, 900, 1000, 1024, 1025, 10**5])
@pytest.mark.parametrize("inner", [b"1", LONE, b"18446744073709551616"])
@pytest.mark.parametrize("closed", [True, False])
def test_too_deep_is_a_value_error_at_any_depth(depth: int, inner: bytes, closed: bool) -> None:
    raw = nested(depth, inner) if closed else b"[" * depth + inner
    with pytest.raises(ValueError, match=r"."):
        loads(raw)
    assert numbers_out_of_range(raw) in (None, "[0]" * depth)


def test_many_brackets_side_by_side_are_not_deep() -> None:
    assert len(loads(b"[" + b",".join([b"[{}]"] * 10_000) + b"]")) == 10_000
    assert loads(b'"' + b"[" * 1000 + b'"') == "[" * 1000


@pytest.mark.parametrize("raw", [b'{"a": nope}', b'["\\ud83d", nope]'])
def test_a_refusal_names_the_place(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"line 1 column \d+ \(char \d+\)$"):
        loads(raw)


def test_what_was_read_can_be_written_and_read_again() -> None:
    for inner in (b"1", LONE, b'"\\u0000"'):
        value = loads(nested(MAX_DEPTH, inner))
        assert loads(dumps(value)) == value


@given(st.binary() | st.text().map(str.encode) | st.text('[]{}",:\\ud8eE+-019 ntf.').map(str.encode))
def test_any_bytes(raw: bytes) -> None:
    try:
        value = loads(raw)
    except ValueError:
        pass
    else:
        assert loads(dumps(value)) == value
    numbers_out_of_range(raw)


_SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
)
_ANY_TEXT = st.text(st.characters(codec=None))  # lone surrogates too
_JSON = st.recursive(
    _SCALARS | _ANY_TEXT, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_ANY_TEXT, inner, max_size=4)
)


@given(_JSON)
def test_round_trip(value: Any) -> None:
    assert loads(dumps(value)) == value


@given(_JSON)
def test_json_and_we_read_the_same(value: Any) -> None:
    assert json.loads(dumps(value)) == value
    assert loads(json.dumps(value).encode()) == value


class TestWriting:
    @pytest.mark.parametrize(
        ("value", "raw"),
        [
            ({"a": [1, None, "é"]}, '{"a":[1,null,"é"]}'.encode()),
            ("\ud83d", b'"\\ud83d"'),
            ({"é": "\ud83d"}, b'{"\\u00e9":"\\ud83d"}'),
            ("\0", b'"\\u0000"'),
            (2**70, b"1180591620717411303424"),
            (0.1, b"0.1"),
        ],
    )
    def test_compact(self, value: object, raw: bytes) -> None:
        assert dumps(value) == raw


class TestNumbersOutOfRange:
    @pytest.mark.parametrize(
        ("raw", "path"),
        [
            (b'{"n": 18446744073709551615}', None),
            (b'{"n": 18446744073709551616}', "n"),
            (b'{"n": -9223372036854775808}', None),
            (b'{"n": -9223372036854775809}', "n"),
            (b'{"n": ' + b"7" * 70 + b"}", "n"),
            (b'{"n": ' + b"7" * 5000 + b"}", "n"),
            (b'{"n": ' + b"0." + b"7" * 5000 + b"}", None),
            (b'{"n": 1e400}', "n"),
            (b'{"n": 1E+400}', "n"),
            (b'{"n": -1.5e400}', "n"),
            (b'{"n": 1e-400}', "n"),
            (b'{"n": 0e-400}', None),
            (b'{"n": 1e308}', None),
            (b'{"n": 5e-324}', None),
            (b'{"n": NaN}', "n"),
            (b'{"n": [1, -Infinity]}', "n[1]"),
            (b'{"a": {"b": [0, {"c": 1e999}]}}', "a.b[1].c"),
            (b'{"a": 1, "b": 1e999, "c": 1e999}', "b"),
            (b"[0, 1e999]", "[1]"),
            (b"1e999", "body"),
            (b'{"\\ud83d": 1e999}', "\ud83d"),
            (b'{"t": "7777777777777777777777 and 1e999 and NaN"}', None),
            (b'{"n": 1e999', None),
            (b"", None),
        ],
    )
    def test_the_path_of_the_first(self, raw: bytes, path: str | None) -> None:
        assert numbers_out_of_range(raw) == path

    @given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**64 - 1))
    def test_what_fits_is_not_named(self, number: float) -> None:
        assert numbers_out_of_range(dumps({"n": number})) is None

    @given(st.integers(min_value=2**64) | st.integers(max_value=-(2**63) - 1))
    def test_what_does_not_fit_is(self, number: int) -> None:
        assert numbers_out_of_range(json.dumps({"n": [number]}).encode()) == "n[0]"

    @given(st.from_regex(r"-?(0|[1-9][0-9]{0,3})(\.[0-9]{1,3})?[eE][+-]?[0-9]{1,5}", fullmatch=True))
    def test_a_float_is_named_if_it_becomes_infinite_or_vanishes(self, number: str) -> None:
        value, digits = float(number), number.lower().partition("e")[0]
        lost = math.isinf(value) or (value == 0 and any(digit in digits for digit in "123456789"))
        assert numbers_out_of_range(b"[" + number.encode() + b"]") == ("[0]" if lost else None)

    @given(
        st.recursive(
            st.sampled_from(
                ["1", "0", "-0.0", "0.0", "0.7", "1e5", "1e999", "-1e-999", "1e-320", '"1e999"', "true", "null"]
            )
            | st.sampled_from(
                ["9223372036854775807", "-9223372036854775808", "18446744073709551615", "1" * 20, "-" + "1" * 30]
            ),
            lambda inner: (
                st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
                | st.lists(st.tuples(st.sampled_from("abc"), inner), max_size=3).map(
                    lambda items: "{" + ",".join(f'"{key}":{value}' for key, value in items) + "}"
                )
            ),
        ),
        st.sampled_from(["1", '"\\ud83d"']),
        st.sampled_from([0, 70_000]),
    )
    def test_whether_the_value_is_known_or_not(self, text: str, beside: str, padding: int) -> None:
        raw = f'[{beside},"{"x" * padding}",{text}]'.encode()
        try:
            value = loads(raw)
        except ValueError:
            return
        assert numbers_out_of_range(raw, value) == numbers_out_of_range(raw)

    @pytest.mark.parametrize(
        ("text", "path"), [(b"[1e-999]", "[0]"), (b'{"a":[-1e-999]}', "a[0]"), (b"[0.0, -0.0]", None)]
    )
    def test_what_vanished_is_not_taken_for_a_zero(self, text: bytes, path: str | None) -> None:
        assert numbers_out_of_range(text, loads(text)) == path

    def test_in_a_value_of_many(self) -> None:
        raw = b"[%b1e-999]" % (b"1," * 5000)
        assert numbers_out_of_range(raw, loads(raw)) == "[5000]"

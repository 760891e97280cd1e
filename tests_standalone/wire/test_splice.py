"""Members of a JSON object set, added and cut out; every byte that was not meant stays."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire import splice
from gateway.wire.jsontext import dumps, loads
from gateway.wire.splice import edit, extended, members, sole_value


def edited(raw: bytes, **changes: bytes | None) -> bytes:
    return edit(raw, json.loads(raw), changes)


class TestExamples:
    @pytest.mark.parametrize(
        ("before", "changes", "after"),
        [
            (b'{"a":1,"b":2}', {"a": b"9"}, b'{"a":9,"b":2}'),
            (b'{ "a" : 1.0 , "b":2 }', {"a": b"9"}, b'{ "a" : 9 , "b":2 }'),
            (b'{"a":[1, {"b": 2}],"b":2}', {"b": b'"x"'}, b'{"a":[1, {"b": 2}],"b":"x"}'),
            (b'{"s":"\\"b\\":1,}","b":2}', {"b": b"3"}, b'{"s":"\\"b\\":1,}","b":3}'),
            (b'{"\\u0062":2,"c":1}', {"b": b"3"}, b'{"\\u0062":3,"c":1}'),
            (b'\n{"a":1}\n', {"a": b"2"}, b'\n{"a":2}\n'),
        ],
    )
    def test_set(self, before: bytes, changes: dict[str, bytes | None], after: bytes) -> None:
        assert edited(before, **changes) == after

    @pytest.mark.parametrize(
        ("before", "key", "after"),
        [
            (b'{"a":1,"b":2,"c":3}', "a", b'{"b":2,"c":3}'),
            (b'{"a":1,"b":2,"c":3}', "b", b'{"a":1,"c":3}'),
            (b'{"a":1,"b":2,"c":3}', "c", b'{"a":1,"b":2}'),
            (b'{"a": 1, "b": 2, "c": 3}', "b", b'{"a": 1, "c": 3}'),
            (b'{"a": 1, "b": 2, "c": 3 }', "c", b'{"a": 1, "b": 2 }'),
            (b'{\n  "a": 1,\n  "b": 2\n}', "b", b'{\n  "a": 1\n}'),
            (b'{"a":1}', "a", b"{}"),
            (b'{"a":1}', "b", b'{"a":1}'),
            (b'{"b":{"b":1},"c":",\\"b\\":1"}', "b", b'{"c":",\\"b\\":1"}'),
        ],
    )
    def test_take_out(self, before: bytes, key: str, after: bytes) -> None:
        assert edited(before, **{key: None}) == after

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (b"{}", b'{"n":0}'),
            (b"{ }", b'{"n":0}'),
            (b'{"a":1}', b'{"a":1,"n":0}'),
            (b'{"a":{"n":1}}', b'{"a":{"n":1},"n":0}'),
            (b'{"a":"}"} ', b'{"a":"}","n":0} '),
        ],
    )
    def test_add(self, before: bytes, after: bytes) -> None:
        assert edited(before, n=b"0") == after

    def test_several_at_once(self) -> None:
        raw = b'{"a": 1, "b": 2, "c": 3, "d": 4}'
        assert edited(raw, a=None, b=b"[ ]", d=None, e=b"5") == b'{"b": [ ], "c": 3,"e":5}'
        assert edited(raw, c=None, d=None) == b'{"a": 1, "b": 2}'
        assert edited(raw, **dict.fromkeys("abcd"), e=b"5") == b'{"e":5}'

    def test_a_key_that_needs_escaping_is_added_escaped(self) -> None:
        assert edit(b"{}", {}, {'"\n': b"1"}) == b'{"\\"\\n":1}'

    def test_what_json_readers_lose_stays(self) -> None:
        raw = b'{"big": 123456789012345678901234567890, "float": 1.10e+2, "esc": "\\u00e9\\/", "a": 1}'
        assert edited(raw, a=b"2") == raw.replace(b'"a": 1', b'"a": 2')


class TestDoubledKeys:
    @pytest.mark.parametrize("text", [b"9", None])
    def test_among_the_changed_ones_the_object_is_written_anew(self, text: bytes | None) -> None:
        raw = b'{"a": 1, "b": 2, "a": 3, "c": 4, "c": 5}'
        assert edited(raw, a=text) == (b'{"a":9,"b":2,"c":5}' if text else b'{"b":2,"c":5}')

    def test_written_as_an_escape_it_is_the_same_key(self) -> None:
        assert edited(b'{"a":1,"\\u0061":2}', a=b"9") == b'{"a":9}'

    def test_elsewhere_they_stay(self) -> None:
        assert edited(b'{"a":1,"a":2,"b":3}', b=b"9") == b'{"a":1,"a":2,"b":9}'
        assert edited(b'{"a":1,"a":2}', b=b"9") == b'{"a":1,"a":2,"b":9}'

    def test_the_only_member_doubled_and_taken_out(self) -> None:
        assert edited(b'{"a":1,"a":2}', a=None) == b"{}"
        assert edited(b'{"a":1,"a":2}', a=None, b=b"1") == b'{"b":1}'


def test_members_stand_where_they_say() -> None:
    raw = b' { "a" : [1, 2] ,"\\u0062":"x" , "c":null} '
    assert [(place.key, raw[place.value : place.end]) for place in members(raw)] == [
        ("a", b"[1, 2]"),
        ("b", b'"x"'),
        ("c", b"null"),
    ]
    assert [raw[place.start : place.start + 1] for place in members(raw)] == [b'"'] * 3


# --- any object, any change: what json reads from the result is what was asked for

_KEYS = st.sampled_from(["a", "b", "usage", "", '"', "\\", "é", "\u2028", "\ud800", "a b", ",", "}", ":"]) | st.text(
    max_size=3
)
_LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3), max_leaves=6
)
_SPACES = st.sampled_from(["", "", " ", "\n", "\t\r\n "])


@st.composite
def _objects(draw: st.DrawFn, keys: st.SearchStrategy[list[str]]) -> bytes:
    """JSON objects as people write them: any spacing, keys and strings escaped or not."""

    def text(value: Any) -> str:
        return json.dumps(value, ensure_ascii=draw(st.booleans()) or _has_surrogate(value), indent=draw(_INDENTS))

    def spaced(part: str) -> str:
        return draw(_SPACES) + part + draw(_SPACES)

    inner = ",".join(spaced(text(key)) + ":" + spaced(text(draw(_VALUES))) for key in draw(keys))
    return spaced("{" + (inner or draw(_SPACES)) + "}").encode()


_INDENTS = st.sampled_from([None, None, 0, 2])
_CHANGES = st.dictionaries(_KEYS, st.none() | _VALUES.map(lambda value: dumps(value)), max_size=4)


def _has_surrogate(value: Any) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in json.dumps(value, ensure_ascii=False))


def _wanted(data: dict[str, Any], changes: dict[str, bytes | None]) -> dict[str, Any]:
    kept = {key: value for key, value in data.items() if changes.get(key, b"") is not None}
    return kept | {key: json.loads(text) for key, text in changes.items() if text is not None}


@given(_objects(st.lists(_KEYS, unique=True, max_size=5)), _CHANGES)
def test_json_reads_what_was_asked_for_and_nothing_else_moved(raw: bytes, changes: dict[str, bytes | None]) -> None:
    data = json.loads(raw)
    result = edit(raw, data, changes)
    assert json.loads(result) == _wanted(data, changes)
    assert list(json.loads(result)) == list(_wanted(data, changes))

    def untouched(text: bytes) -> list[tuple[str, bytes]]:
        return [(place.key, text[place.start : place.end]) for place in members(text) if place.key not in changes]

    assert untouched(result) == untouched(raw)


@given(
    _objects(st.lists(st.sampled_from("abc"), max_size=6)),
    st.dictionaries(st.sampled_from("abcd"), st.none() | st.just(b"0")),
)
def test_doubled_keys_leave_one_reading(raw: bytes, changes: dict[str, bytes | None]) -> None:
    data = loads(raw)
    result = edit(raw, data, changes)
    assert json.loads(result) == _wanted(json.loads(dumps(data)), changes)
    keys = [place.key for place in members(result)]
    assert all(keys.count(key) == 1 for key in changes if key in keys)


@given(_objects(st.lists(_KEYS, unique=True, max_size=5)))
def test_no_change_is_no_change(raw: bytes) -> None:
    assert edit(raw, json.loads(raw), {}) == raw


@given(_objects(st.lists(_KEYS, unique=True, min_size=1, max_size=5)), st.data())
def test_setting_one_member_changes_its_value_only(raw: bytes, data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(members(raw)))
    assert edit(raw, json.loads(raw), {place.key: b"[0]"}) == raw[: place.value] + b"[0]" + raw[place.end :]


# --- what one match finds is what a walk over all tokens finds


@given(_objects(st.lists(_KEYS, max_size=5)))
def test_members_of_the_usual_kind_and_of_any_kind(raw: bytes) -> None:
    assert members(raw) == splice._any_members(raw)


_FRAGMENTS = [
    '"usage"',
    ":",
    ",",
    "{",
    "}",
    "[",
    "]",
    " ",
    "\n",
    '"',
    "\\",
    "1",
    "null",
    '"a"',
    '"x\\"y"',
    "\v",
    "usage",
]


@given(st.lists(st.sampled_from(_FRAGMENTS), max_size=20), st.lists(st.sampled_from(_FRAGMENTS), max_size=20))
def test_a_value_in_any_text_even_if_it_is_no_json(before: list[str], after: list[str]) -> None:
    raw = "".join([*before, '"usage":', *after]).encode()
    found = sole_value(raw, "usage")
    if found is not None:
        assert found == splice._any_value(raw, found[0])


@pytest.mark.parametrize("depth", [1, 7, 8, 9, 10, 100])
def test_however_deep(depth: int) -> None:
    value = b"[" * depth + b'{"]":"}"}' + b"]" * depth
    raw = b'{"a":1, "usage" : %b ,"c":3}' % value
    assert sole_value(raw, "usage") == (raw.index(b"["), raw.index(value) + len(value))
    assert [raw[place.value : place.end] for place in members(raw)] == [b"1", value, b"3"]
    assert edited(raw, usage=b"0", c=b"4") == b'{"a":1, "usage" : 0 ,"c":4}'


@given(
    _objects(st.lists(st.sampled_from(["cost", "usage", "model"]), max_size=5)),
    st.dictionaries(st.sampled_from(["cost", "usage", "model"]), st.sampled_from([b"0", b'{"a":[]}']), max_size=3),
)
def test_new_values_in_their_places_or_after_a_look_at_all(raw: bytes, changes: dict[str, bytes]) -> None:
    data = loads(raw)
    replaced = {key: text for key, text in changes.items() if key in data}
    if replaced:
        quickly = splice._with_values(raw, data, replaced)
        assert quickly in (None, splice._rewritten(raw, data, replaced))


# --- new members in one step are those of two edits


def _in_one_step(raw: bytes) -> bytes | None:
    return extended(raw, loads(raw), "usage", [b',"in":', b"1"], [b',"out":', b"2", b',"more":', b"[]"])


def _in_two_steps(raw: bytes) -> bytes:
    data = loads(raw)
    told = data["usage"]
    return edit(raw, data, {"usage": lambda text: edit(text, told, {"in": b"1"}), "out": b"2", "more": b"[]"})


_SAID = st.dictionaries(_KEYS | st.just('\\"usage":{}'), _VALUES | st.just('"usage":{}'), max_size=3)


@given(_SAID, _SAID, _SAID, st.sampled_from([(",", ":"), (",", ":"), (", ", ": ")]), st.booleans(), _SPACES)
def test_new_members_in_one_step_or_two(
    before: dict[str, Any], told: dict[str, Any], after: dict[str, Any], marks: tuple[str, str], ascii: bool, end: str
) -> None:
    data = {**before, "usage": told, **{key: value for key, value in after.items() if key != "usage"}}
    raw = json.dumps(data, separators=marks, ensure_ascii=ascii or _has_surrogate(data)).encode() + end.encode()
    assert _in_one_step(raw) in (None, _in_two_steps(raw))


def test_new_members_in_one_step() -> None:
    assert _in_one_step(b'{"a":1,"usage":{"n":[1]}}') == b'{"a":1,"usage":{"n":[1],"in":1},"out":2,"more":[]}'
    assert _in_one_step(b'{"usage":{"n":{}},"a":"\\n"}') == b'{"usage":{"n":{},"in":1},"a":"\\n","out":2,"more":[]}'


@pytest.mark.parametrize(
    "raw",
    [
        b'{"usage":{"n":1},"usage":{"n":1}}',
        b'{"usage":{"n":1},"\\u0075sage":{"n":1}}',
        b'{"usage": {"n":1}}',
        b'{"usage":{"n":1.0e1}}',
        b'{"usage":{"n":1} }',
        b'{"usage":{"n":1}}\n',
        b'{"usage":{"n":1},"a":["usage"]}',
        b'{"a":{"usage":{"n":1}},"\\u0075sage":{"n":1}}',
        b'{"usage":{}}',
        b'{"usage":null}',
        b'{"n":1}',
    ],
)
def test_what_takes_a_closer_look(raw: bytes) -> None:
    assert _in_one_step(raw) is None

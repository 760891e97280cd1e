"""Deltas by example: these in, this message out."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.assemble import Assembler
from gateway.wire.jsontext import dumps

Delta = dict[str, Any]


def assembled(*deltas: Delta) -> Assembler:
    answer = Assembler()
    for delta in deltas:
        answer.add([{"index": 0, "delta": delta, "finish_reason": None}])
    return answer


def message(*deltas: Delta) -> dict[str, Any]:
    return assembled(*deltas).message()


def call(index: int | None, arguments: str | None = None, **more: Any) -> Delta:
    function = {"arguments": arguments} | ({"name": more.pop("name")} if "name" in more else {})
    return {"tool_calls": [{"index": index, "function": function, **more}]}


class TestText:
    def test_pieces_are_joined(self) -> None:
        deltas = [{"role": "assistant", "content": ""}, {"content": "Hello"}, {"content": ", "}, {"content": "you"}, {}]
        assert message(*deltas) == {"role": "assistant", "content": "Hello, you"}

    def test_nothing_said(self) -> None:
        assert message() == {"role": "assistant", "content": None}
        assert message({"role": "assistant", "content": None}) == {"role": "assistant", "content": None}
        assert message({"content": ""}) == {"role": "assistant", "content": ""}

    def test_the_role_is_ours(self) -> None:
        assert message({"role": ""}, {"role": "model", "content": "x"})["role"] == "assistant"

    def test_reasoning_and_refusal(self) -> None:
        deltas = [
            {"reasoning_content": "hm", "content": None},
            {"reasoning_content": "m.", "content": None},
            {"reasoning": "a"},
            {"reasoning": "b", "refusal": "No"},
            {"refusal": "."},
        ]
        assert message(*deltas) == {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hmm.",
            "reasoning": "ab",
            "refusal": "No.",
        }

    def test_parts_before_text_are_kept_with_it(self) -> None:
        thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
        deltas = [
            {"content": ""},
            {"content": [thinking]},
            {"content": [thinking]},
            {"content": "Yes"},
            {"content": "."},
        ]
        assert message(*deltas)["content"] == [thinking, thinking, {"type": "text", "text": "Yes."}]


class TestSurrogates:
    def test_a_pair_torn_apart_is_joined(self) -> None:
        assert message({"content": "a\ud83d"}, {"content": "\ude00b"})["content"] == "a😀b"
        assert message({"reasoning_content": "\ud83d"}, {"reasoning_content": "\ude00"})["reasoning_content"] == "😀"

    @pytest.mark.parametrize("text", ["\ud83d", "low \ude00", "\ude00\ud83d", "a\ud83db", "😀\ud83d"])
    def test_one_that_stays_alone_is_kept(self, text: str) -> None:
        assert message(*({"content": char} for char in text))["content"] == text

    def test_in_arguments(self) -> None:
        found = message(call(0, '"\ud83d', id="c"), call(0, '\ude00"'))
        assert found["tool_calls"][0]["function"]["arguments"] == '"😀"'


class TestToolCalls:
    WHOLE = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"a":"é"}'}}

    def test_as_openai_sends_them(self) -> None:
        deltas = [
            {"role": "assistant", "content": None, **call(0, "", id="c1", type="function", name="get")},
            call(0, '{"a"'),
            call(0, ':"é"}'),
        ]
        assert message(*deltas) == {"role": "assistant", "content": None, "tool_calls": [self.WHOLE]}

    @pytest.mark.parametrize("cuts", list(itertools.combinations(range(10), 2)))
    def test_arguments_cut_anywhere(self, cuts: tuple[int, int]) -> None:
        text, (one, two) = '{"a":"é"}', cuts
        pieces = [call(0, piece) for piece in (text[:one], text[one:two], text[two:])]
        assert message(call(0, "", id="c1", type="function", name="get"), *pieces)["tool_calls"] == [self.WHOLE]

    def test_ids_types_and_names_repeated_are_not_joined(self) -> None:
        pieces = [call(0, piece, id="c1", type="function", name="get") for piece in ('{"a"', ':"é"', "}")]
        assert message(*pieces)["tool_calls"] == [self.WHOLE]

    def test_null_is_absent(self) -> None:
        pieces = [
            call(0, None, id="c1", type="function", name="get"),
            call(0, '{"a":"é"}', id=None, type=None, name=None),
        ]
        assert message(*pieces)["tool_calls"] == [self.WHOLE]

    def test_several_interleaved(self) -> None:
        pieces = [call(1, "b", id="c2", name="two"), call(0, "a", id="c1", name="one"), call(1, "B"), call(0, "A")]
        calls = message(*pieces)["tool_calls"]
        assert [(item["id"], item["function"]) for item in calls] == [
            ("c2", {"arguments": "bB", "name": "two"}),
            ("c1", {"arguments": "aA", "name": "one"}),
        ]

    def test_several_in_one_delta(self) -> None:
        one, two = (call(index, "{}", id=f"c{index}", name="f")["tool_calls"][0] for index in (0, 1))
        assert [item["id"] for item in message({"tool_calls": [one, two]})["tool_calls"]] == ["c0", "c1"]

    def test_without_index_an_id_opens_a_call(self) -> None:
        pieces = [
            call(None, "a", id="c1"),
            call(None, "A"),
            call(None, "b", id="c2"),
            call(None, "B"),
            call(None, "!", id="c1"),
        ]
        calls = message(*pieces)["tool_calls"]
        assert [(item["id"], item["function"]["arguments"]) for item in calls] == [("c1", "aA!"), ("c2", "bB")]

    def test_custom_ones(self) -> None:
        start = {"index": 0, "id": "c1", "type": "custom", "custom": {"name": "run", "input": "ec"}}
        more = {"index": 0, "custom": {"input": "ho"}}
        assert message({"tool_calls": [start]}, {"tool_calls": [more]})["tool_calls"] == [
            {"id": "c1", "type": "custom", "custom": {"name": "run", "input": "echo"}}
        ]

    @pytest.mark.parametrize("pieces", [[""], [None], ["", ""], []])
    def test_arguments_that_nobody_gave_are_those_that_clients_get(self, pieces: list[str | None]) -> None:
        first = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f"}}
        calls = message({"tool_calls": [first]}, *(call(0, piece) for piece in pieces))["tool_calls"]
        assert calls == [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]

    def test_empty_text_beside_them_is_null(self) -> None:
        assert message({"content": ""}, call(0, "{}", id="c1"))["content"] is None
        assert message({"content": "Let me look."}, call(0, "{}", id="c1"))["content"] == "Let me look."


class TestUnknownFields:
    def test_by_the_same_rules(self) -> None:
        deltas: list[Delta] = [
            {"x_text": "a", "x_list": [1], "x_number": 1, "x_object": {"t": "a", "deep": {"l": [1]}}},
            {"x_text": "b", "x_list": [2], "x_number": 2, "x_object": {"t": "b", "deep": {"l": [2]}}, "x_late": True},
            {"x_text": None, "x_list": None, "x_number": None, "x_object": None, "x_late": None},
        ]
        assert message(*deltas) == {
            "role": "assistant",
            "content": None,
            "x_text": "ab",
            "x_list": [1, 2],
            "x_number": 2,
            "x_object": {"t": "ab", "deep": {"l": [1, 2]}},
            "x_late": True,
        }

    def test_audio(self) -> None:
        deltas = [
            {"audio": {"id": "au", "transcript": "Hel"}},
            {"audio": {"id": "au", "transcript": "lo", "expires_at": 9}},
        ]
        assert message(*deltas)["audio"] == {"id": "au", "transcript": "Hello", "expires_at": 9}


class TestChoices:
    def test_each_has_its_message_and_reason(self) -> None:
        answer = Assembler()
        answer.add([{"index": 1, "delta": {"content": "u"}}, {"index": 0, "delta": {"content": "o"}}])
        answer.add([{"index": 1, "delta": {"content": "no"}, "finish_reason": "stop"}])
        answer.add([{"index": 0, "delta": {"content": "ne"}, "finish_reason": "length"}])
        assert [answer.message(index)["content"] for index in answer.indexes] == ["one", "uno"]
        assert answer.finish_reasons == {0: "length", 1: "stop"}

    def test_one_that_has_only_told_its_role_counts(self) -> None:
        answer = Assembler()
        answer.add([{"index": 0, "delta": {"role": "assistant"}}, {"index": 1, "delta": {"role": "assistant"}}])
        assert answer.indexes == [0, 1]

    @pytest.mark.parametrize("index", [None, "0", [0], {}, 0.0])
    def test_without_a_whole_number_it_is_the_first(self, index: object) -> None:
        answer = Assembler()
        answer.add([{"index": index, "delta": {"content": "x"}, "finish_reason": "stop"}])
        answer.add([{"delta": {"content": "y"}}])
        assert answer.indexes == [0]
        assert answer.message()["content"] == "xy"

    @pytest.mark.parametrize("reason", [None, "", 5, {}])
    def test_no_reason(self, reason: object) -> None:
        answer = Assembler()
        answer.add([{"index": 0, "delta": {}, "finish_reason": reason}])
        assert answer.finish_reasons == {}


class TestPieces:
    """For those who know where more text goes."""

    def test_content(self) -> None:
        answer = assembled({"content": "a"})
        answer.pieces(0, "content").append("b")
        answer.pieces(1, "content").append("c")
        assert (answer.message()["content"], answer.message(1)["content"]) == ("ab", "c")

    def test_other_texts(self) -> None:
        answer = assembled({"reasoning": "a", "x": 1})
        for key in ("reasoning", "x", "y"):
            answer.pieces(0, key).append("b")
        found = answer.message()
        assert (found["reasoning"], found["x"], found["y"]) == ("ab", "b", "b")

    def test_arguments(self) -> None:
        answer = assembled(call(0, "a", id="c1"), call(1, "b", id="c2"))
        answer.arguments(0, 0).append("A")
        answer.arguments(0, 1).append("B")
        assert [item["function"]["arguments"] for item in answer.message()["tool_calls"]] == ["aA", "bB"]

    def test_pairs_torn_apart_by_the_two_ways(self) -> None:
        answer = assembled({"content": "\ud83d"})
        answer.pieces(0, "content").append("\ude00")
        assert answer.message()["content"] == "😀"


def test_the_text_of_the_older_completions_is_content() -> None:
    answer = Assembler()
    answer.add([{"index": 0, "text": "a", "finish_reason": None}, {"index": 1, "text": "b"}])
    answer.add([{"index": 0, "text": "c", "finish_reason": "stop"}])
    assert [answer.message(index)["content"] for index in answer.indexes] == ["ac", "b"]
    assert answer.finish_reasons == {0: "stop"}
    assert answer.characters == 3


def test_characters_are_those_of_all_that_was_said() -> None:
    answer = assembled(
        {"role": "assistant", "content": "12345"},
        {"reasoning_content": "123"},
        call(0, "12", id="not counted", type="function", name="get"),
        call(0, "345"),
        {"audio": {"id": "x", "transcript": "1234"}},
        {"audio": {"transcript": "5"}},
    )
    assert answer.characters == 5 + 3 + 5 + 5


_KEYS = st.sampled_from(["role", "content", "tool_calls", "function", "index", "id", "name", "arguments", "x"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)
_DELTAS = st.dictionaries(_KEYS, _JSON, max_size=4)
_CHOICES = st.fixed_dictionaries({"delta": _DELTAS | _JSON}, optional={"index": _JSON, "finish_reason": _JSON}) | _JSON


@given(st.lists(st.lists(_CHOICES, max_size=3), max_size=4))
def test_anything_is_put_together_somehow_and_left_as_it_was(chunks: list[list[Any]]) -> None:
    before = copy.deepcopy(chunks)
    answer = Assembler()
    for choices in chunks:
        answer.add(choices)
    for index in (0, *answer.indexes):
        assert answer.message(index)["role"] == "assistant"
        dumps(answer.message(index))
    assert chunks == before
    assert answer.characters >= 0

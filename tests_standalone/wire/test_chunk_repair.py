"""The chunks of broken upstreams by example: these in, those out.

The rows are those of the table "What clients break on" in the notes on OpenAI's wire contract.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.assemble import Assembler
from gateway.wire.chunk_repair import ChunkRepair
from gateway.wire.failures import StreamedError, streamed_error
from tests_standalone.wire.test_repair import REASONS

Json = dict[str, Any]

NAME: Json = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
MADE_CALL = re.compile(r"call_[0-9a-f]{24}")


def chunk(delta: object, reason: object = None, index: object = 0, **more: Any) -> Json:
    return NAME | {"choices": [{"index": index, "delta": delta, "finish_reason": reason}]} | more


BEGIN = chunk({"role": "assistant", "content": None})
NEXT = chunk({"content": None})


def piece(index: object, arguments: object = None, **more: Any) -> Json:
    """One piece of a tool call. None is left out."""
    function = {"name": more.pop("name", None), "arguments": arguments}
    found = {"index": index, **more, "function": {key: value for key, value in function.items() if value is not None}}
    return {key: value for key, value in found.items() if value is not None}


def calls(*pieces: Json, reason: object = None) -> Json:
    return chunk({"tool_calls": list(pieces)}, reason)


def repaired(*chunks: Json, operation: str = "chat/completions", **name: Any) -> list[Json]:
    """What leaves for the chunks of a stream. What came is left as it was."""
    repair = ChunkRepair(operation, **name)
    before = copy.deepcopy(chunks)
    found = [right for item in chunks if (right := repair.chunk(item)) is not None]
    assert chunks == before
    return found


def deltas(*chunks: Json) -> list[Json]:
    """What leaves for chunks behind the one that begins the answer."""
    return [item["choices"][0]["delta"] for item in repaired(BEGIN, *chunks)[1:]]


def pieces(*chunks: Json) -> list[Json]:
    return [found for delta in deltas(*chunks) for found in delta.get("tool_calls", ())]


def reasons(*chunks: Json) -> list[object]:
    return [item["choices"][0]["finish_reason"] for item in repaired(BEGIN, *chunks)[1:]]


FIRST = piece(0, "", id="c1", type="function", name="f")

RIGHT: dict[str, list[Json]] = {
    "text": [BEGIN, chunk({"content": "a"}), chunk({"content": ""}), chunk({}, "stop")],
    "tool calls": [
        BEGIN,
        calls(FIRST),
        calls(piece(0, '{"a":')),
        calls(piece(0, "1}")),
        calls(piece(1, "{}", id="c2", type="function", name="f")),
        chunk({}, "tool_calls"),
    ],
    "several calls in one chunk": [
        BEGIN,
        calls(FIRST, piece(1, "", id="c2", type="function", name="g")),
        calls(piece(1, "{}"), piece(0, "{}")),
        chunk({}, "tool_calls"),
    ],
    "a custom call": [
        BEGIN,
        calls({"index": 0, "id": "c1", "type": "custom", "custom": {"name": "f", "input": ""}}),
        calls({"index": 0, "custom": {"input": "x"}}),
        chunk({}, "tool_calls"),
    ],
    "a custom call without input": [
        BEGIN,
        calls({"index": 0, "id": "c1", "type": "custom", "custom": {"name": "f", "input": ""}}),
        chunk({}, "tool_calls"),
    ],
    "nulls": [
        chunk({"role": "assistant", "content": None, "tool_calls": None, "reasoning": None}),
        chunk({"role": None, "content": "a", "tool_calls": None, "reasoning_content": None}),
        chunk({"content": None, "tool_calls": [piece(0, "{}", id="c1", type="function", name="f")]}),
        chunk({"tool_calls": [{"index": 0, "id": None, "type": None, "function": {"name": None, "arguments": ""}}]}),
    ],
    "two choices": [BEGIN, chunk({"role": "assistant"}, None, 1), chunk({}, "stop", 1), chunk({}, "length")],
    "a filter that says more": [BEGIN, chunk({}, x_filter={"hate": {}}), chunk({"content": "a"})],
    "reasoning": [chunk({"role": "assistant", "content": None, "reasoning_content": "hm", "reasoning": ""})],
    "other names later": [BEGIN, NEXT | {"id": "d", "created": 2, "model": "n"}],
    "service tiers": [BEGIN | {"service_tier": "priority"}, NEXT | {"service_tier": None}],
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_passed_on_untouched(name: str) -> None:
    repair = ChunkRepair()
    for item in RIGHT[name]:
        assert repair.chunk(item) is item


class TestChoices:
    @pytest.mark.parametrize("index", [None, "0", -1, True, {}])
    def test_row_4_index(self, index: object) -> None:
        assert repaired(chunk(BEGIN["choices"][0]["delta"], index=index)) == [BEGIN]

    def test_row_4_index_missing(self) -> None:
        two = [{"delta": {"role": "assistant"}, "finish_reason": None}] * 2
        [found] = repaired(NAME | {"choices": two})
        assert [choice["index"] for choice in found["choices"]] == [0, 1]

    def test_what_is_no_choice_is_left_out(self) -> None:
        assert repaired(BEGIN | {"choices": [None, *BEGIN["choices"]]}) == [BEGIN]
        assert repaired(BEGIN | {"choices": ["x"]}) == []

    @pytest.mark.parametrize("delta", [None, "x", []])
    def test_no_delta_is_an_empty_one(self, delta: object) -> None:
        assert repaired(BEGIN, chunk(delta)) == [BEGIN, chunk({})]

    def test_delta_missing(self) -> None:
        """Azure's asynchronous filter."""
        told = {"index": 0, "finish_reason": None, "content_filter_results": {"hate": {"filtered": False}}}
        prelude = {"id": "", "object": "", "created": 0, "model": "", "choices": [told]}
        assert repaired(BEGIN, prelude)[1] == NAME | {"choices": [told | {"delta": {}}]}

    def test_a_whole_message_in_place_of_the_delta(self) -> None:
        message = {"role": "assistant", "content": "Hi"}
        told = NAME | {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        assert repaired(told) == [chunk(message, "stop")]

    def test_row_10_the_first_delta_has_the_role(self) -> None:
        for told in ({}, {"role": ""}, {"role": None}, {"role": "model"}):
            first, second = repaired(chunk({"content": "a"} | told), chunk({"content": "b"}))
            assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
            assert second == chunk({"content": "b"})

    def test_row_10_each_choice_has_it(self) -> None:
        found = repaired(chunk({"content": "a"}, index=1), chunk({"content": "b"}, index=0))
        assert [item["choices"][0]["delta"]["role"] for item in found] == ["assistant"] * 2

    @pytest.mark.parametrize("role", ["", "model", "tool"])
    def test_row_10_another_role_later_is_taken_out(self, role: str) -> None:
        assert deltas(chunk({"role": role, "content": "a"})) == [{"content": "a"}]

    def test_row_6_empty_content_beside_tool_calls(self) -> None:
        assert deltas(chunk({"content": "", "tool_calls": [FIRST]})) == [{"content": None, "tool_calls": [FIRST]}]

    def test_row_16_reasoning(self) -> None:
        told = {"reasoning": "hm", "content": ""}
        assert deltas(chunk(told)) == [told | {"reasoning_content": "hm"}]
        assert deltas(chunk(told | {"reasoning_content": None})) == [told | {"reasoning_content": "hm"}]
        assert deltas(chunk(told | {"reasoning_content": "ah"})) == [told | {"reasoning_content": "ah"}]


class TestToolCalls:
    def test_row_1_without_index_an_id_opens_a_call(self) -> None:
        found = pieces(
            calls(piece(None, "", id="c1", type="function", name="f")),
            calls(piece(None, '{"a"')),
            calls(piece(None, ":1}")),
            calls(piece(None, "{}", id="c2", type="function", name="f")),
            calls(piece(None, "", id="c1")),
        )
        assert found == [
            FIRST,
            piece(0, '{"a"'),
            piece(0, ":1}"),
            FIRST | piece(1, "{}", id="c2", name="f"),
            piece(0, ""),
        ]

    def test_row_1_without_index_and_id_a_name_opens_a_call(self) -> None:
        found = pieces(calls(piece(None, "{", name="f")), calls(piece(None, "}")), calls(piece(None, "{}", name="g")))
        assert [item["index"] for item in found] == [0, 0, 1]
        assert [MADE_CALL.fullmatch(item.get("id", "")) is not None for item in found] == [True, False, True]

    def test_row_1_whole_calls_of_one_function(self) -> None:
        found = pieces(calls(piece(None, "{}", name="f"), piece(None, '{"a":1}', name="f")))
        assert [(item["index"], item["function"]) for item in found] == [
            (0, {"name": "f", "arguments": "{}"}),
            (1, {"name": "f", "arguments": '{"a":1}'}),
        ]
        assert len({item["id"] for item in found}) == 2

    def test_row_1_the_same_name_again_before_the_arguments_are_complete(self) -> None:
        found = pieces(calls(piece(None, '{"a"', name="f")), calls(piece(None, ":1}", name="f")))
        assert found[1] == piece(0, ":1}")

    @pytest.mark.parametrize("index", ["0", -1, True, 0.0])
    def test_row_1_an_index_that_is_none(self, index: object) -> None:
        assert pieces(calls(FIRST | {"index": index})) == [FIRST]

    def test_row_1_all_calls_are_counted_as_0(self) -> None:
        one, two = (piece(0, '{"a":1}', id=f"c{number}", type="function", name="f") for number in (1, 2))
        assert pieces(calls(one, two)) == [one, two | {"index": 1}]
        assert pieces(calls(one), calls(two), calls(piece(0, " "))) == [one, two | {"index": 1}, piece(1, " ")]

    def test_row_2_id_type_and_name_are_told_once(self) -> None:
        again = FIRST | {"function": {"name": "f", "arguments": '{"a"'}}
        assert pieces(calls(FIRST), calls(again), calls(again)) == [FIRST, piece(0, '{"a"'), piece(0, '{"a"')]

    def test_row_2_empty_ones_as_well(self) -> None:
        again = {"index": 0, "id": "", "type": "function", "function": {"name": "", "arguments": "{}"}}
        assert pieces(calls(FIRST), calls(again)) == [FIRST, piece(0, "{}")]

    def test_row_2_another_id_for_the_same_index_is_the_first(self) -> None:
        assert pieces(calls(FIRST), calls(piece(0, "{}", id="c9"))) == [FIRST, piece(0, "{}")]

    def test_row_2_a_name_that_comes_later(self) -> None:
        late = calls({"index": 0, "function": {"name": "f"}})
        found = pieces(calls({"index": 0, "id": "c1", "type": "function"}), late, late)
        assert found[0] == {"index": 0, "id": "c1", "type": "function", "function": {"arguments": ""}}
        assert [item["function"] for item in found[1:]] == [{"name": "f"}, {}]

    def test_row_5_arguments_that_are_an_object(self) -> None:
        assert pieces(calls(FIRST | {"function": {"name": "f", "arguments": {"a": "é"}}})) == [
            FIRST | {"function": {"name": "f", "arguments": '{"a":"é"}'}}
        ]

    @pytest.mark.parametrize("told", [{}, {"arguments": None}])
    def test_row_5_the_first_piece_has_arguments(self, told: Json) -> None:
        assert pieces(calls(FIRST | {"function": {"name": "f"} | told})) == [FIRST]

    def test_row_5_null_later_is_empty(self) -> None:
        told = {"index": 0, "function": {"arguments": None}}
        assert pieces(calls(FIRST), calls(told), calls({"index": 0})) == [FIRST, piece(0, ""), {"index": 0}]

    def test_row_5_no_arguments_at_all_with_the_end(self) -> None:
        two = FIRST | {"index": 1, "id": "c2"}
        assert pieces(calls(FIRST, two), calls(piece(1, "{}")), chunk({}, "tool_calls")) == [
            FIRST,
            two,
            piece(1, "{}"),
            piece(0, "{}"),
        ]

    def test_row_5_no_arguments_in_a_piece_that_comes_with_the_end(self) -> None:
        assert pieces(calls(FIRST, reason="tool_calls")) == [FIRST | {"function": {"name": "f", "arguments": "{}"}}]

    @pytest.mark.parametrize("told", [None, "", "null", 5])
    def test_an_id_is_made(self, told: object) -> None:
        [found] = pieces(calls(FIRST | {"id": told}))
        assert MADE_CALL.fullmatch(found["id"])

    def test_an_id_of_another_call_is_made_anew(self) -> None:
        found = pieces(calls(FIRST), calls(FIRST | {"index": 1}))
        assert MADE_CALL.fullmatch(found[1]["id"])

    def test_what_is_no_call_is_left_out(self) -> None:
        for told in (["x"], "x", "", False, {}):
            assert deltas(chunk({"tool_calls": told})) == [{}]
        assert pieces(calls(FIRST, "x")) == [FIRST]  # type: ignore[arg-type]

    @pytest.mark.parametrize("arguments", ["", "{}"])
    def test_calls_that_all_have_the_number_0_stay_apart(self, arguments: str) -> None:
        """Also if the first one has no arguments."""
        found = pieces(
            calls(piece(0, arguments, id="c1", type="function", name="f")),
            calls(piece(0, "", id="c2", type="function", name="g")),
            calls(piece(0, '{"a":1}')),
        )
        assert [(item["index"], item.get("id"), item["function"].get("name")) for item in found] == [
            (0, "c1", "f"),
            (1, "c2", "g"),
            (1, None, None),
        ]


class TestFinishReasons:
    def test_row_8_empty_is_null(self) -> None:
        assert reasons(chunk({"content": "a"}, ""), chunk({}, 5)) == [None, None]

    def test_row_8_missing_is_left(self) -> None:
        told = NAME | {"choices": [{"index": 0, "delta": {"content": "a"}}]}
        assert repaired(BEGIN, told)[1] is told

    def test_row_8_stop_after_tool_calls(self) -> None:
        whole = piece(0, "{}", id="c", type="function", name="f")
        assert reasons(calls(whole), chunk({}, "stop")) == [None, "tool_calls"]
        assert reasons(calls(whole, reason="stop")) == ["tool_calls"]
        assert reasons(calls(whole), chunk({}, "length")) == [None, "length"]

    def test_row_8_of_that_choice_only(self) -> None:
        whole = piece(0, "{}", id="c", type="function", name="f")
        assert reasons(calls(whole), chunk({"role": "assistant"}, "stop", 1), chunk({}, "stop", 0)) == [
            None,
            "stop",
            "tool_calls",
        ]

    @pytest.mark.parametrize(("word", "right"), REASONS)
    def test_row_9_foreign_words(self, word: str, right: str) -> None:
        assert reasons(chunk({}, word)) == [right]

    @pytest.mark.parametrize("word", ["insufficient_system_resource", "error", "aborted", "ABORT"])
    def test_an_upstream_that_gives_up(self, word: str) -> None:
        with pytest.raises(StreamedError) as caught:
            repaired(BEGIN, chunk({}, word))
        assert streamed_error(caught.value.error).upstream_status == 503

    def test_a_second_one_is_dropped(self) -> None:
        assert repaired(BEGIN, chunk({}, "stop"), chunk({}, "stop"), chunk({"role": "assistant"}, "length")) == [
            BEGIN,
            chunk({}, "stop"),
        ]

    def test_but_not_what_it_says(self) -> None:
        filtered = {"content_filter_results": {"hate": {}}}
        late = chunk({}, "stop")
        late["choices"][0] |= filtered
        found = repaired(BEGIN, chunk({}, "stop"), chunk({"content": "b"}, "stop"), late)
        assert [item["choices"][0]["finish_reason"] for item in found] == [None, "stop", None, None]
        assert found[2]["choices"][0]["delta"] == {"content": "b"}
        assert found[3]["choices"][0]["content_filter_results"] == {"hate": {}}


class TestNames:
    def test_empty_ones_are_those_of_the_first_that_has_them(self) -> None:
        bare = {"id": "", "object": "", "created": 0, "model": "", "choices": [{"index": 0, "delta": {}}]}
        gone = {"choices": bare["choices"]}
        for item in repaired(BEGIN, bare, gone)[1:]:
            assert item == gone | NAME

    def test_where_there_are_none_they_are_made(self) -> None:
        found = repaired({"choices": BEGIN["choices"]}, {"choices": NEXT["choices"]}, model="m", at=7)
        assert re.fullmatch(r"chatcmpl-[0-9a-f]{24}", found[0]["id"])
        assert found[0] == found[1] | {"choices": BEGIN["choices"]}
        assert found[0].items() >= {"object": "chat.completion.chunk", "created": 7, "model": "m"}.items()

    def test_what_nobody_knows_comes_with_the_chunk_that_has_it(self) -> None:
        told = {"id": "c", "object": "chat.completion.chunk", "choices": BEGIN["choices"]}
        more = told | {"choices": NEXT["choices"]}
        first, second, third = repaired(told, more | {"created": 5, "model": "m"}, more)
        assert first == told
        assert second == third == more | {"created": 5, "model": "m"}

    def test_seconds_are_whole_in_all(self) -> None:
        found = repaired(*[BEGIN | {"created": 1767225600.0}] * 3)
        assert [(item["created"], type(item["created"])) for item in found] == [(1767225600, int)] * 3

    def test_row_9_service_tier(self) -> None:
        assert repaired(BEGIN, NEXT | {"service_tier": "on_demand"})[1] == NEXT | {"service_tier": "default"}

    def test_an_id_of_our_own_takes_the_place_of_theirs(self) -> None:
        bare = {"choices": NEXT["choices"]}
        assert repaired(BEGIN, NEXT, bare, NEXT | {"id": "another"}, id="ours") == [
            BEGIN | {"id": "ours"},
            *[NEXT | {"id": "ours"}] * 3,
        ]
        assert ChunkRepair(id="ours").named(NEXT | {"id": "ours"}) == NEXT | {"id": "ours"}

    def test_for_a_chunk_of_our_own(self) -> None:
        repair = ChunkRepair(model="m", at=7)
        repair.chunk(BEGIN | {"model": ""})
        assert repair.name == NAME


def test_row_10_a_role_that_is_told_again_and_again_is_told_once() -> None:
    found = repaired(*[chunk({"role": "assistant", "content": "a"})] * 3)
    assert [item["choices"][0]["delta"].get("role") for item in found] == ["assistant", None, None]


def test_indexes_begin_at_nought_and_count_calls_alone() -> None:
    found = repaired(BEGIN, calls(piece(1, "{}", id="a", name="f")), calls(piece(3, "{}", id="b", name="g")))
    assert [item["choices"][0]["delta"]["tool_calls"][0]["index"] for item in found[1:]] == [0, 1]


def test_a_name_in_pieces_is_not_a_repeated_one() -> None:
    found = repaired(
        BEGIN, calls(piece(0, id="a", name="get_")), calls(piece(0, name="weather")), calls(piece(0, "{}"))
    )
    names = [item["choices"][0]["delta"]["tool_calls"][0]["function"].get("name") for item in found[1:]]
    assert names == ["get_", "weather", None]


def test_an_empty_object_before_pieces_of_text_is_no_argument() -> None:
    found = repaired(BEGIN, calls(piece(0, {}, id="a", name="f")), calls(piece(0, '{"x":1}')))
    told = [item["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"] for item in found[1:]]
    assert told == ["", '{"x":1}']


class TestClosing:
    """For an upstream that never says why it ended."""

    def test_a_text(self) -> None:
        repair = ChunkRepair()
        repair.chunk(BEGIN)
        assert repair.closing(0, "stop") == {"index": 0, "delta": {}, "finish_reason": "stop"}

    def test_nothing_at_all(self) -> None:
        closing = {"index": 0, "delta": {"role": "assistant"}, "finish_reason": "stop"}
        assert ChunkRepair().closing(0, "stop") == closing

    def test_row_5_a_call_without_arguments(self) -> None:
        repair = ChunkRepair()
        repair.chunk(BEGIN)
        repair.chunk(calls(FIRST))
        assert repair.closing(0, "stop") == {
            "index": 0,
            "delta": {"tool_calls": [piece(0, "{}")]},
            "finish_reason": "tool_calls",
        }

    def test_a_choice_that_has_ended_says_so_again(self) -> None:
        repair = ChunkRepair()
        repair.chunk(chunk({}, "stop"))
        assert repair.closing(0, "stop") == {"index": 0, "delta": {}, "finish_reason": "stop"}


class TestTexts:
    """The older completions: no delta, no role."""

    def test_all_at_once(self) -> None:
        name = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}
        told = [
            name | {"choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]},
            name | {"id": "", "object": "", "choices": [{"text": "b"}]},
            name | {"choices": [{"index": 0, "text": None, "finish_reason": "eos"}]},
            name | {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]},
        ]
        found = repaired(*told, operation="completions")
        assert found[0] is told[0]
        assert found[1:] == [
            name | {"choices": [{"text": "b", "index": 0}]},
            name | {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]},
        ]

    def test_an_upstream_that_answers_as_in_a_chat(self) -> None:
        found = repaired(chunk({"role": "assistant", "content": "a"}), chunk({}, "stop"), operation="completions")
        assert [item["choices"] for item in found] == [
            [{"index": 0, "text": "a", "finish_reason": None}],
            [{"index": 0, "text": "", "finish_reason": "stop"}],
        ]

    def test_names(self) -> None:
        [found] = repaired({"choices": [{"index": 0, "text": "a"}]}, operation="completions", model="m", at=7)
        assert re.fullmatch(r"cmpl-[0-9a-f]{24}", found["id"])
        assert found["object"] == "text_completion"

    def test_closing(self) -> None:
        repair = ChunkRepair("completions")
        assert repair.closing(0, "stop") == {"index": 0, "text": "", "finish_reason": "stop"}


def test_what_is_recorded_is_what_left() -> None:
    answer = Assembler()
    told = [piece(None, "{", name="f"), piece(None, "}", name="f"), piece(None, {"a": 1}, name="g")]
    for item in repaired(*(calls(one) for one in told)):
        answer.add(item["choices"])
    assert [call["function"] for call in answer.message()["tool_calls"]] == [
        {"name": "f", "arguments": "{}"},
        {"name": "g", "arguments": '{"a":1}'},
    ]


_WORDS = st.none() | st.sampled_from(["", "a", "b", "{}", "{", "stop", "tool_calls", "assistant", "null", "eos"])
_ODD = _WORDS | st.integers(-1, 2) | st.booleans() | st.just({}) | st.just([]) | st.just({"a": 1})
_PIECES = st.fixed_dictionaries(
    {},
    optional={
        "index": st.integers(0, 2) | _ODD,
        "id": _ODD,
        "type": _ODD,
        "function": st.fixed_dictionaries({}, optional={"name": _WORDS, "arguments": _ODD}) | _ODD,
        "custom": st.fixed_dictionaries({}, optional={"name": _WORDS, "input": _ODD}) | _ODD,
    },
)
_DELTAS = st.fixed_dictionaries(
    {},
    optional={
        "role": _ODD,
        "content": _ODD,
        "reasoning": _ODD,
        "reasoning_content": _ODD,
        "tool_calls": st.lists(_PIECES | _ODD, max_size=3) | _ODD,
    },
)
_CHUNK_CHOICES = st.fixed_dictionaries(
    {},
    optional={"index": st.integers(0, 1) | _ODD, "delta": _DELTAS | _ODD, "message": _DELTAS, "finish_reason": _ODD},
)
_CHUNKS = st.fixed_dictionaries(
    {"choices": st.lists(_CHUNK_CHOICES | _ODD, max_size=2)},
    optional=dict.fromkeys(("id", "object", "created", "model", "service_tier"), _ODD),
)
_USUAL_CHUNKS = st.builds(
    lambda chunk, choice, changes: chunk | {"choices": [chunk["choices"][0] | choice]} | changes,
    st.sampled_from([*RIGHT["text"], *RIGHT["tool calls"]]),
    st.just({}) | _CHUNK_CHOICES,
    st.just({}) | st.dictionaries(st.sampled_from(["id", "object", "created", "model", "service_tier"]), _ODD),
)
_MADE = re.compile(r"(?:call_|mpl-)[0-9a-f]{24}")


@given(st.lists(_CHUNKS | _USUAL_CHUNKS, max_size=6), st.sampled_from(["chat/completions", "completions"]))
def test_what_is_taken_as_it_is_has_nothing_to_repair(chunks: list[Json], operation: str) -> None:
    found = repaired(*chunks, operation=operation, model="m", at=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkRepair, "_takes_as_it_is", lambda self, choice: False)
        looked_at = repaired(*chunks, operation=operation, model="m", at=5)
    assert _MADE.sub("", repr(found)) == _MADE.sub("", repr(looked_at))


def test_a_stream_keeps_the_name_that_it_got() -> None:
    repair = ChunkRepair()
    repair.chunk({**BEGIN, "created": None})
    repair.chunk(NEXT | {"id": "other", "model": "other"})
    assert repair.name == NAME


def test_the_usual_chunks_are_taken_as_they_are() -> None:
    repair = ChunkRepair()
    assert all(repair._takes_as_it_is(item["choices"][0]) for item in RIGHT["text"])
    assert not repair._takes_as_it_is(chunk({}, "stop")["choices"][0])


@given(st.lists(_CHUNKS, max_size=6), st.sampled_from(["chat/completions", "completions"]))
def test_anything_becomes_a_stream_in_which_nothing_has_to_be_repaired(chunks: list[Json], operation: str) -> None:
    found = repaired(*chunks, operation=operation, model="m", at=5)
    again = ChunkRepair(operation, model="other", at=6)
    for item in found:
        assert again.chunk(item) is item
    told = [choice for item in found for choice in item["choices"]]
    for choice in told:
        assert type(choice["index"]) is int
        assert choice.get("finish_reason") in {None, "stop", "length", "tool_calls", "content_filter", "function_call"}
    ends = [choice["index"] for choice in told if choice.get("finish_reason")]
    assert len(ends) == len(set(ends))
    for index in {choice["index"] for choice in told} if operation == "chat/completions" else ():
        deltas = [choice["delta"] for choice in told if choice["index"] == index]
        assert deltas[0]["role"] == "assistant"
        calls = [piece for delta in deltas for piece in delta.get("tool_calls") or ()]
        opened = [piece["index"] for piece in calls if piece.get("id")]
        assert len(opened) == len(set(opened)) == len({piece["id"] for piece in calls if piece.get("id")})
        assert {piece["index"] for piece in calls} == set(opened)

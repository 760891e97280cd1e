"""Both ends of a stream, known again without parsing: they leave, and are recorded, as if they had been parsed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.wire import known as known_module
from gateway.wire.chat import Chunk, Usage
from gateway.wire.known import Known, _Shapes
from gateway.wire.stream import ChatStream
from tests_standalone.wire.test_template import _MADE, Watched, compact, told

Json = dict[str, Any]

NAME: Json = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_760_000_000, "model": "m"}
COUNTS: Json = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
DETAILS: Json = {"prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 1}}


def chunk(delta: object, reason: object = None, **more: Any) -> Json:
    return NAME | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]} | more


def usage(counts: object, **more: Any) -> Json:
    return NAME | {"choices": [], "usage": counts} | more


ROLE: Json = {"role": "assistant", "content": ""}
BEGIN, STOP, COUNTED = chunk(ROLE, usage=None), chunk({}, "stop", usage=None), usage(COUNTS)
OPENINGS: list[Json] = [
    BEGIN,
    chunk(ROLE),
    chunk(ROLE | {"refusal": None}, service_tier="default", system_fingerprint="fp", usage=None),
    chunk(ROLE | {"content": None}, usage=None),
    chunk({"role": "assistant"}),
    {"usage": None} | chunk(ROLE),
    {"created": NAME["created"]} | chunk(ROLE),
    {key: NAME[key] for key in ("id", "created", "model", "object")} | chunk(ROLE),
    chunk(ROLE | {"reasoning_content": None}, usage=None),
    chunk(ROLE | {"reasoning": ""}, usage=None),
    chunk(ROLE | {"tool_calls": None}),
    chunk(ROLE | {"content": "a"}, usage=None),
    chunk(ROLE | {"role": "model"}),
    chunk(ROLE | {"role": ["assistant"]}),
    chunk(ROLE, "stop"),
    chunk(ROLE, ""),
    chunk(ROLE, ["stop"]),
    chunk(ROLE, usage=COUNTS),
    chunk(ROLE, x=1),
    chunk(ROLE, timings={"predicted_n": 1}),
    chunk(ROLE, service_tier="on_demand"),
    chunk(ROLE, service_tier=7),
    chunk(ROLE, usage=None, obfuscation="aZ0"),
    chunk(ROLE, obfuscation="specimen"),
    chunk(ROLE, obfuscation=""),
    chunk(ROLE, obfuscation="a-b"),
    chunk(ROLE, obfuscation="a", x=1),
    chunk(ROLE | {"obfuscation": "a"}, obfuscation="b"),
    {"obfuscation": "a"} | chunk(ROLE),
    chunk(ROLE, obfuscation="a", usage=None),
    chunk(ROLE, object="chunk"),
    chunk(ROLE, model=""),
    chunk(ROLE, model=None),
    chunk(None),
    chunk(ROLE, choices=None),
    chunk(ROLE, choices={}),
    chunk(ROLE, choices=[1]),
    chunk(ROLE, choices=[{"index": 1, "delta": ROLE, "finish_reason": None}]),
    chunk(ROLE, choices=[{"index": True, "delta": ROLE, "finish_reason": None}]),
    chunk(ROLE, choices=[{"delta": ROLE}]),
    chunk(ROLE, choices=[{"index": 0, "delta": ROLE, "logprobs": {"content": []}}]),
    chunk(ROLE, choices=[{"index": 0, "delta": ROLE, "x": 1}]),
    chunk(ROLE, choices=[{"index": at, "delta": ROLE} for at in (0, 1)]),
    usage(None),
]
MIDDLES: list[Json] = [
    chunk({"content": "a"}, usage=None),
    chunk({"content": "b"}),
    chunk({"content": ""}, usage=None),
    chunk({"content": '\\"é\n'}, usage=None),
    chunk({"content": "c"}, service_tier="default", system_fingerprint="fp", usage=None),
    chunk({"reasoning_content": "d"}, usage=None),
    chunk({"content": "pad"}, usage=None, obfuscation="b1"),
    chunk({"content": "ded"}, obfuscation="Cc2"),
    chunk({"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}),
    chunk({"content": "e"}, choices=[{"index": 1, "delta": {"content": "f"}, "finish_reason": None}]),
    chunk({"content": "g"}, id="another"),
]
ENDINGS: list[Json] = [
    STOP,
    chunk({}, "length"),
    chunk({"content": ""}, "stop", usage=None),
    chunk({"content": "", "reasoning_content": None}, "stop", usage=None),
    chunk({"content": "h"}, "stop"),
    chunk({"role": "assistant"}, "stop"),
    chunk({}, "tool_calls", usage=None),
    chunk({}, "end_turn"),
    chunk({}, "stop", usage=COUNTS),
    chunk({}, "stop", timings={"predicted_n": 4}),
    chunk({}, "stop", service_tier="flex", system_fingerprint="fp", usage=None),
    {"usage": None} | chunk({}, "stop"),
    chunk({}, "stop", usage=None, obfuscation="aB3"),
    chunk({}, "stop", obfuscation="aB3", usage=None),
    chunk({}, "stop", obfuscation="aB3"),
    chunk({}, "stop", usage=None, obfuscation=""),
    chunk({}, "stop", usage=0, more=0),
    chunk({}, "stop", id="chatcmpl-2"),
    chunk({}, "stop", choices=[{"index": 1, "delta": {}, "finish_reason": "stop"}]),
    chunk({}, "stop", choices=[{"index": at, "delta": {}, "finish_reason": "stop"} for at in (0, 1)]),
]
USAGES: list[Json] = [
    COUNTED,
    usage(COUNTS | DETAILS, service_tier="default", system_fingerprint="fp"),
    usage(COUNTS | {"completion_tokens": 2}),
    usage(COUNTS, obfuscation=""),
    usage(COUNTS | DETAILS, obfuscation="Z"),
    usage(COUNTS, obfuscation=None),
    usage(COUNTS | {"obfuscation": "a"}),
    {"obfuscation": "a"} | usage(COUNTS),
    usage(COUNTS | {"completion_tokens": None}),
    usage(COUNTS | {"prompt_tokens": None}),
    usage({"completion_tokens": 9, "prompt_tokens": 8}),
    usage(COUNTS | {"x": {"y": [1, {"z": "}}"}]}}),
    usage(COUNTS | {"x": "x" * 500}),
    usage({}),
    usage([]),
    usage(COUNTS, service_tier="scale", x=1),
    usage(COUNTS, choices=None),
    {"usage": COUNTS} | usage(COUNTS),
    usage(COUNTS, id="chatcmpl-2"),
    usage(COUNTS, error={"message": "no"}),
]
ALL = [*OPENINGS, *MIDDLES, *ENDINGS, *USAGES]
STYLES: list[Json] = [{"separators": (",", ":")}, {}, {"separators": (",", " :")}]


def outcome(chunks: list[bytes], *, at_once: bool, known: bool, **options: Any) -> list[object]:
    """All that a stream does with chunks, up to the first that it refuses."""
    with pytest.MonkeyPatch.context() as patch:
        if not known:
            patch.setattr(Known, "of", lambda raw: None)
        stream = ChatStream(wants_usage=False, **options)
        out: list[bytes] = []
        failures: list[str] = []
        for read in [chunks] if at_once else [[raw] for raw in chunks]:
            try:
                out.append(stream.feed([Chunk(raw=raw) for raw in read]))
            except Exception as failure:
                failures.append(repr(failure))
                break
        rest = [stream.service_tier, stream.usage_doubted, stream.answer.characters, stream.finish_reason]
        last = stream.end(stream.usage or Usage(1, 2), 0.5, {"conversation_id": "c", "timings": {"predicted_n": 1}})
        return [*told(stream, out), _MADE.sub(b"", last), *rest, failures]


def assert_same(chunks: list[bytes], *, at_once: bool) -> None:
    """For the third time: in the first two streams openings, then ends, were new."""
    for _ in range(2):
        outcome(chunks, at_once=at_once, known=True)
    quick = outcome(chunks, at_once=at_once, known=True)
    assert quick == outcome(chunks, at_once=at_once, known=False)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("opening", OPENINGS)
def test_known_and_read_are_the_same(opening: Json, ending: Json, style: Json) -> None:
    for more in ([], [COUNTED], [MIDDLES[0]], [ending], [STOP], [MIDDLES[8]], [MIDDLES[10]]):
        raws = [json.dumps(item, **style).encode() for item in (opening, *MIDDLES[:2], ending, *more)]
        assert_same(raws, at_once=False)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("counted", USAGES)
@pytest.mark.parametrize("before", [[], [BEGIN], [BEGIN, STOP], [BEGIN, STOP, COUNTED], [BEGIN, COUNTED]])
def test_usage_that_is_known_and_that_is_read(before: list[Json], counted: Json, style: Json) -> None:
    assert_same([json.dumps(item, **style).encode() for item in (*before, counted, STOP)], at_once=False)


@given(
    st.sampled_from(OPENINGS[:10]) | st.sampled_from(ALL),
    st.lists(st.sampled_from(ALL) | st.sampled_from(MIDDLES), max_size=8),
    st.sampled_from(STYLES),
    st.booleans(),
)
@example(BEGIN, [MIDDLES[8], MIDDLES[9], STOP], STYLES[0], True)
@example(BEGIN, [STOP, MIDDLES[0], STOP, COUNTED], STYLES[0], True)
def test_chunks_in_any_order(first: Json, others: list[Json], style: Json, at_once: bool) -> None:
    assert_same([json.dumps(item, **style).encode() for item in (first, *others)], at_once=at_once)


HEAD = b'{"id":"c","object":"chat.completion.chunk","created":1760000000,"model":"m",'
DELTA = b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]'
END = b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]'


@pytest.mark.parametrize(
    "raw",
    [
        HEAD + DELTA,
        HEAD + DELTA + b"}}",
        HEAD + DELTA + b',"id":"d"}',
        HEAD + DELTA + b',"created":1}',
        HEAD + DELTA + b',"object":"error"}',
        HEAD + DELTA + b',"error":{"message":"no"}}',
        HEAD + DELTA + b',"usage":null,"usage":{"prompt_tokens":1,"completion_tokens":1}}',
        HEAD + DELTA + b"," + DELTA.replace(b'""', b'"x"') + b"}",
        HEAD + DELTA + b',"system_fingerprint":"' + b"x" * 1000 + b'"}',
        HEAD + DELTA + b',"model":"\xff"}',
        HEAD + DELTA + b',\n"usage":null}',
        HEAD + DELTA + b',"obfuscation":"specimen","obfuscation":"b"}',
        HEAD + DELTA + b',"obfuscation":"a","error":{"message":"no"},"x":"b"}',
        HEAD + DELTA + b',"obfuscation":"a\\"}',
        HEAD.replace(b'"c"', b'"\xff"') + DELTA + b"}",
        HEAD.replace(b'"c"', b'"a\\"b"') + DELTA + b"}",
        HEAD.replace(b'"c"', b'""') + DELTA + b"}",
        HEAD.replace(b"1760000000", b"0760000000") + DELTA + b"}",
        HEAD.replace(b"1760000000", b"1760000000.5") + DELTA + b"}",
        HEAD.replace(b'"object":"chat.completion.chunk",', b"") + DELTA + b"}",
    ],
)
def test_bytes_that_are_to_be_read(raw: bytes) -> None:
    assert [Known.of(raw) for _ in range(2)] == [None, None]
    assert_same([raw, HEAD + END + b"}"], at_once=False)


def test_usage_that_is_doubled() -> None:
    raw = HEAD + DELTA + b',"usage":{"prompt_tokens":1,"completion_tokens":1},"usage":null}'
    assert_same([raw, HEAD + END + b"}"], at_once=False)


@pytest.mark.parametrize(
    "raw",
    [
        HEAD + END + b',"usage":null }',
        HEAD + END + b',"usage": null}',
        HEAD + END + b',"usage":null,"model":"m"}',
        HEAD + END + b',"usage":null,"usage":null}',
        HEAD + END + b',"system_fingerprint":"\\"usage\\":"}',
        HEAD + END + b',"choices":[]}',
        HEAD + END + b' , "system_fingerprint" : "" } ',
        HEAD + END,
        HEAD + b'"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1},"usage":{"prompt_tokens":2}}',
        HEAD + b'"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}}',
        HEAD + b'"choices":[],"x":{"usage":{"prompt_tokens":1,"completion_tokens":1}}',
        HEAD + b'"choices":[],"x":{"usage":{"prompt_tokens":1,"completion_tokens":1}}}',
        HEAD + b'"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1,"x":"\\ud83d"}}',
        HEAD + b'"choices":[],"usage":{"prompt_tokens":1,"prompt_tokens":2,"completion_tokens":1}}',
        HEAD + b'"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1} }',
    ],
)
def test_ends_in_odd_bytes(raw: bytes) -> None:
    assert_same([HEAD + DELTA + b"}", raw], at_once=False)
    assert_same([HEAD + DELTA + b"}", HEAD + END + b"}", raw], at_once=True)


def unparsed(*chunks: Json) -> list[bool]:
    """Of the first stream, the second and the third."""
    for _ in range(3):
        watched = [Watched(compact(item)) for item in chunks]
        stream = ChatStream(wants_usage=False)
        for item in watched:
            stream.feed([item])
        stream.end(stream.usage or Usage(1, 2), None, {})
    return [not item.parsed for item in watched]


@pytest.mark.parametrize("first", [*OPENINGS[:3], OPENINGS[7]])
@pytest.mark.parametrize("padding", [{}, {"obfuscation": "x"}])
def test_what_is_known_is_not_parsed(first: Json, padding: Json) -> None:
    about = {key: first[key] for key in first if key != "choices"}
    texts = [chunk({"content": text}) | about for text in "ab"]
    ends = [chunk({}, "stop") | about, usage(COUNTS) | about | {"choices": [], "usage": COUNTS}]
    assert unparsed(*({**first, **item} | padding for item in (first, *texts, *ends))) == [True] * 5


@pytest.mark.parametrize("options", [{"wants_usage": True}, {"wants_usage": False, "id": "x"}])
def test_where_chunks_leave_otherwise_all_are_parsed(options: Json) -> None:
    watched = [Watched(compact(item)) for item in (BEGIN, STOP)]
    stream = ChatStream(**options)
    for item in watched:
        stream.feed([item])
    assert all(item.parsed for item in watched)


class TestShapes:
    def test_one_is_judged_when_it_comes_again(self) -> None:
        asked: list[bytes] = []
        shapes = _Shapes(lambda about, shape: asked.append(shape) or (shape if about else None))
        for _ in range(3):
            told = [shapes[b"a", b"x"], shapes[b"", b"y"]]
        assert told == [b"x", None]
        assert asked == [b"x", b"y"]

    def test_what_never_comes_again_pushes_nothing_out(self) -> None:
        asked: list[bytes] = []
        shapes = _Shapes(lambda about, shape: asked.append(shape) or shape)
        shapes[b"", b"x"]
        for number in range(10_000):
            shapes[b"", b"%d" % number]
            assert shapes[b"", b"x"] == b"x"
        assert asked == [b"x"]
        assert len(shapes._met) <= known_module._MOST_MET

    def test_of_what_cannot_be_known_nothing_is_kept_and_nothing_asked_again(self) -> None:
        """It may hold somebody's text."""
        asked: list[bytes] = []
        shapes = _Shapes[bytes](lambda about, shape: asked.append(shape))
        for _ in range(4):
            assert shapes[b"", b"a secret"] is None
        assert asked == [b"a secret"]
        assert dict(shapes) == {}
        assert all(isinstance(trace, int) for trace in shapes._met)

    def test_no_more_are_remembered_than_that(self) -> None:
        shapes = _Shapes(lambda about, shape: shape)
        for number in range(known_module._SHAPES + 10):
            for _ in range(2):
                told = shapes[b"", b"%d" % number]
            assert told == b"%d" % number
        assert len(shapes) == known_module._SHAPES


def test_an_end_in_every_chunk_is_looked_at_once_in_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    monkeypatch.setattr(known_module, "_endings", _Shapes(lambda about, shape: asked.append(shape)))
    says_its_end = [chunk({"content": text}, "stop") for text in ("a", "b", "a", "b", "a", "b")]
    for _ in range(4):
        assert unparsed(BEGIN, *says_its_end) == [True, *[False] * 6]
    assert len(asked) == 1

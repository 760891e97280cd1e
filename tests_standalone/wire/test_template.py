"""Chunks that are not parsed: they leave, and are recorded, as if they had been."""

from __future__ import annotations

import json
import re
from itertools import zip_longest
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.wire import WireError
from gateway.wire import stream as stream_module
from gateway.wire import template as template_module
from gateway.wire.chat import Chunk, Usage
from gateway.wire.sse import SSEDecoder
from gateway.wire.stream import ChatStream, StreamedError
from gateway.wire.template import MARK, Probe, Template, around_text, plain_parts

Json = dict[str, Any]

NAME: Json = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}


class Watched(Chunk):
    """Knows whether somebody wanted it parsed."""

    __slots__ = ("parsed",)

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw=raw)
        self.parsed = False

    @property
    def data(self) -> Json:
        self.parsed = True
        return super().data


def compact(data: Json) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def chunk(delta: Json, **more: Any) -> Json:
    return NAME | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} | more


def parsed(*chunks: bytes, wants_usage: bool = False, operation: str = "chat/completions") -> list[bool]:
    """Which of them were parsed."""
    stream = ChatStream(wants_usage=wants_usage, operation=operation)
    watched = [Watched(raw) for raw in chunks]
    for item in watched:
        stream.feed([item])
    return [item.parsed for item in watched]


BEGIN = compact(chunk({"role": "assistant", "content": ""}))


@pytest.mark.parametrize(
    ("before", "behind", "left"),
    [
        (b"", b"", (b"", b"")),
        (b"", b',"usage":null', (b"", b"")),
        (b',"usage":null', b"", (b"", b"")),
        (b',"usage":null', b',"usage":null', None),
        (b"", b',"usage": null', None),
        (b"", b',"usage":null,"x":{"usage":1}', None),
    ],
)
@pytest.mark.parametrize("padding", [b"", b',"obfuscation":"a"'])
def test_usage_that_does_not_leave(
    before: bytes, behind: bytes, left: tuple[bytes, bytes] | None, padding: bytes
) -> None:
    def around(before: bytes, behind: bytes) -> bytes:
        return b'{"id":"c"%b,"choices":[{"index":0,"delta":{"content":"b"}}]%b%b}' % (before, behind, padding)

    raw = around(before, behind)
    plain = plain_parts(raw, json.loads(raw), without_usage=True)
    if left is None or plain is None:
        assert left is plain
        return
    key, parts, leaving = plain
    texts = (b"b", b"a")[: len(parts) - 1]
    assert key == "content"
    assert len(parts) == len(leaving) == (3 if padding else 2)
    for joined, whole in ((parts, raw), (leaving, around(*left))):
        assert b"".join(part + text for part, text in zip_longest(joined, texts, fillvalue=b"")) == whole


class TestWhatIsNotParsed:
    @pytest.mark.parametrize(
        "text", ["", "b", " ", 'a "quoted\\ word"', "\n\t", "é😀\u2028", "\x7f", "usage", '"usage']
    )
    @pytest.mark.parametrize("ascii_only", [False, True])
    def test_another_text(self, text: str, ascii_only: bool) -> None:
        chunks = [json.dumps(chunk({"content": item}), ensure_ascii=ascii_only).encode() for item in ("a", text)]
        assert parsed(BEGIN, *chunks) == [True, True, False]

    @pytest.mark.parametrize("wants_usage", [False, True])
    def test_beside_the_usage_that_we_caused_and_padding(self, wants_usage: bool) -> None:
        chunks = [
            compact(chunk({"content": text}, usage=None, obfuscation=padding))
            for text, padding in (("a", "x"), ('"}', "yyy"), ("c", "Z0"))
        ]
        assert parsed(BEGIN, *chunks, wants_usage=wants_usage) == [True, True, False, False]

    def test_arguments(self) -> None:
        call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
        pieces = [{"index": 0, "function": {"arguments": text}} for text in ('{"', "a", '":1}')]
        chunks = [compact(chunk({"tool_calls": [piece]})) for piece in (call, *pieces)]
        assert parsed(BEGIN, *chunks) == [True, True, True, False, False]

    def test_repaired_ones(self) -> None:
        chunks = [compact(chunk({"role": "", "reasoning": text}, service_tier="on_demand")) for text in "abc"]
        assert parsed(BEGIN, *chunks) == [True, True, False, False]

    def test_older_completions(self) -> None:
        chunks = [compact(NAME | {"choices": [{"index": 0, "text": text, "finish_reason": None}]}) for text in "abc"]
        assert parsed(chunks[0], *chunks, operation="completions") == [True, True, False, False]


A = compact(chunk({"content": "a"}))


class TestWhatIsParsed:
    @pytest.mark.parametrize(
        "other",
        [
            compact(chunk({"content": None})),
            compact(chunk({"content": 1})),
            compact(chunk({"content": "a", "x": 1})),
            compact(chunk({"content": "a"}, x="x")),
            compact(chunk({"content": "a"}, usage=None)),
            A.replace(b'"a"', b'"a","content":"b"'),
            A.replace(b'"a"', b'"\\ud83d"'),
            A.replace(b'"a"', b'"a'),
            A.replace(b'"a"', b'"\\"'),
            A.replace(b'"a"', b'"\\x"'),
            A.replace(b'"a"', b'"\n"'),
            A.replace(b'"a"', b'"\xff"'),
            A.replace(b'"a"', b""),
            A[: A.index(b'"a"') + 1],
            A[:-1],
        ],
    )
    def test_anything_else(self, other: bytes) -> None:
        stream = ChatStream(wants_usage=False)
        stream.feed([Chunk(raw=BEGIN), Chunk(raw=A)])
        watched = Watched(other)
        try:
            stream.feed([watched])
        except ValueError:
            assert other not in (BEGIN, A)
        assert watched.parsed

    def test_padding_that_is_none(self) -> None:
        right, wrong = (compact(chunk({"content": "a"}, obfuscation=text)) for text in ("ab", 'a","x":"b'))
        assert parsed(BEGIN, right, wrong) == [True, True, True]

    def test_what_comes_after_something_else(self) -> None:
        assert parsed(BEGIN, A, A, compact(chunk({})), A, A) == [True, True, False, True, True, False]

    def test_an_upstream_that_never_sends_the_same_twice_is_not_learned_for_ever(self) -> None:
        chunks = [compact(chunk({"content": "a"}, x=number)) for number in range(40)]
        assert all(parsed(BEGIN, *chunks))
        assert parsed(BEGIN, *chunks, chunks[-1], chunks[-1])[-2:] == [True, True]

    def test_one_that_does_so_now_and_then_is(self) -> None:
        """Such as Ollama, whose `created` is the time of the chunk."""
        chunks = [compact(chunk({"content": "a"}, created=number // 10)) for number in range(10, 400)]
        assert parsed(BEGIN, *chunks).count(True) == 1 + 39


class TestProbe:
    @pytest.mark.parametrize(
        "data",
        [
            chunk({"content": "a"}) | {"choices": []},
            chunk({"content": "a"}) | {"choices": chunk({})["choices"] * 2},
            chunk({"content": "a"}, usage={"prompt_tokens": 1}),
            chunk({}),
            chunk({"content": None}),
            chunk({"content": "a", "reasoning_content": "b"}),
            chunk({"content": "a", "x": ["b"]}),
            chunk({"content": ["a"]}),
            chunk({"x": "a"}),
            chunk({"tool_calls": [{"index": 0, "id": "x", "function": {"arguments": "a"}}]}),
            chunk({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "a"}}]}),
            chunk({"tool_calls": [{"index": 0, "function": {"arguments": "a"}}] * 2}),
            {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]},
        ],
    )
    def test_of_chunks_that_the_next_one_will_not_be_like(self, data: Json) -> None:
        assert Probe.of(compact(data), data) is None

    @pytest.mark.parametrize(
        "raw",
        [
            b'{"content":"x","choices":[{"index":0,"delta":{"content":"a"}}]}',
            b'{"my\\"content":"x","choices":[{"index":0,"delta":{"content":"a"}}]}',
            b'{"choices":[{"index":0,"delta":{"content":"x","content":"a"}}]}',
            b'{"choices":[{"index":0,"delta":{"c\\u006fntent":"a"}}]}',
        ],
    )
    def test_of_a_text_that_is_not_where_it_seems(self, raw: bytes) -> None:
        assert Probe.of(raw, json.loads(raw)) is None

    def test_its_mark_stands_for_the_text(self) -> None:
        probe = Probe.of(A, json.loads(A))
        assert probe is not None
        assert probe.data == chunk({"content": MARK})
        assert b'"a"'.join([probe.parts[0][:-1], probe.parts[1][1:]]) == A


class TestAroundText:
    """Where it is certain without a probe."""

    @pytest.mark.parametrize(
        ("data", "key", "parts"),
        [
            (chunk({"content": "a"}), "content", [b'"delta":{"content":"', b'"},"finish_reason":null}]}']),
            (
                chunk({"content": None, "reasoning_content": "usage"}, usage=None),
                "reasoning_content",
                [b'"reasoning_content":"', b'"},"finish_reason":null}],"usage":null}'],
            ),
            (
                chunk({"content": "content"}, obfuscation="aB3", x=1),
                "content",
                [b'"content":"', b'"},"finish_reason":null}],"obfuscation":"', b'","x":1}'],
            ),
        ],
    )
    def test_of_the_usual(self, data: Json, key: str, parts: list[bytes]) -> None:
        found = around_text(compact(data), data)
        assert found is not None
        assert found[0] == key
        assert found[1][0].endswith(parts[0])
        assert found[1][1:] == parts[1:]

    @pytest.mark.parametrize(
        "raw",
        [
            b'{"content":"x","choices":[{"index":0,"delta":{"content":"a"}}]}',
            b'{"content" :"x","choices":[{"index":0,"delta":{"content":"a"}}]}',
            b'{"choices":[{"index":0,"delta":{"content":"x","content":"a"}}]}',
            b'{"choices":[{"index":0,"delta":{"content":"a"},"delta":{"content":"b"}}]}',
            b'{"choices":[{"index":0,"delta":{"content":"a"}}],"x":{"content":1}}',
            b'{"choices":[{"index":0,"delta":{"c\\u006fntent":"a"}}],"x":{"content":"b"}}',
            b'{"choices":[{"index":0,"delta":{"content":"a\\n"}}]}',
            b'{"choices":[{"index":0,"delta":{"content": "a"}}]}',
            b'{"choices":[{"index":0,"delta":{"content":""}}]}',
            b'{"choices":[{"index":0,"delta":{"content":"a"}}],"x":{"obfuscation":"b"}}',
            b'{"obfuscation":"b","choices":[{"index":0,"delta":{"content":"a"}}],"x":{"obfuscation":"b"}}',
            b'{"choices":[{"index":0,"delta":{"content":"a"}}],"obfuscation":"-"}',
        ],
    )
    def test_of_what_is_not_certain(self, raw: bytes) -> None:
        assert around_text(raw, json.loads(raw)) is None


# --- both ways are the same

_TEXT = st.text(max_size=6) | st.sampled_from(
    ["", '"', "\\", "usage", '"usage', ',"usage":null', "\ud83d", "\ude00", "}"]
)
_PADDING = st.text("aZ0", max_size=3) | st.sampled_from(["", "-", '"'])
_TEMPLATES: list[Json] = [
    chunk({"content": 0}),
    chunk({"role": "assistant", "content": 0, "refusal": None}),
    chunk({"content": 0}, usage=None),
    chunk({"content": 0}, usage=None, obfuscation=1),
    chunk({"content": 0}, obfuscation=1, usage=None),
    {"usage": None} | chunk({"content": 0}),
    {"usage": None, "obfuscation": 1} | chunk({"content": 0}),
    {"usage": None} | chunk({"content": 0}, x={"y": 1, "usage": None}),
    chunk({"content": 0}, usage=None, x={"usage": None}),
    chunk({"content": 0}, service_tier="on_demand", usage=None),
    chunk({"content": 0}, x=[{"content": "b"}], system_fingerprint=MARK),
    {"x": {"content": "b"}} | chunk({"content": 0}),
    chunk({"reasoning": 0, "content": None}),
    chunk({"reasoning": 0, "content": "", "role": ""}, usage=None),
    chunk({"reasoning_content": 0, "content": ""}),
    chunk({"content": 0, "reasoning": "", "tool_calls": [], "x": 1, "y": {}, "z": True}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": 0}}]}),
    chunk({"content": "", "tool_calls": [{"function": {"arguments": 0}, "type": "function", "id": ""}]}, usage=None),
    chunk({"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": 0}}]}),
    chunk({"tool_calls": [{"index": 0, "id": "c2", "type": "function", "function": {"name": "g", "arguments": 0}}]}),
    chunk({"tool_calls": [{"function": {"name": "f", "arguments": 0}}]}),
    chunk({"content": 0}, timings={"predicted_n": 1}, x_groq={"usage": {"prompt_tokens": 1, "completion_tokens": 1}}),
    chunk({"content": 0}, usage={"prompt_tokens": 3, "completion_tokens": 1}),
    chunk({"content": 0}, id="", created=0),
    NAME | {"choices": [{"delta": {"content": 0}}]},
    NAME | {"choices": [{"index": 1, "delta": {"content": 0}, "finish_reason": None}]},
    NAME | {"choices": [{"index": 0, "text": 0, "finish_reason": None}]},
    NAME | {"choices": [{"index": 0, "delta": {"content": 0}, "finish_reason": "stop"}]},
    NAME | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "x": 0}], "usage": None},
    NAME | {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
]
_STYLES: list[Json] = [
    {"separators": (",", ":"), "ensure_ascii": False},
    {"separators": (", ", ": "), "ensure_ascii": True},
    {"separators": (",", " : "), "ensure_ascii": False},
    {"indent": 1},
]
_RUNS = st.lists(
    st.tuples(st.sampled_from(_TEMPLATES), st.lists(st.tuples(_TEXT, _PADDING), min_size=1, max_size=4)), max_size=5
)


def raws(runs: list[tuple[Json, list[tuple[str, str]]]], style: Json) -> list[bytes]:
    """The chunks of a stream: runs of chunks that have one template each, with 0 for the text and 1 for the padding."""
    return [_filled(template, text, padding, style) for template, texts in runs for text, padding in texts]


def _filled(template: Json, text: str, padding: str, style: Json) -> bytes:
    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: (text if item == 0 and key in _TEXT_KEYS else padding if key == "obfuscation" else fill(item))
                for key, item in value.items()
            }
        return [fill(item) for item in value] if isinstance(value, list) else value

    raw = json.dumps(fill(template), **(style | {"ensure_ascii": True}))
    if style.get("ensure_ascii") is False:  # but a lone surrogate has no other form
        raw = re.sub(r"(?<!\\)((?:\\\\)*)\\u(?!d[89a-f]|00[01]|0022|005c)([0-9a-f]{4})", _character, raw)
    return raw.encode()


_MADE = re.compile(rb"(call_|cmpl-)[0-9a-f]{24}")
_TEXT_KEYS = {"content", "reasoning", "reasoning_content", "arguments", "text", "x"}


def _character(found: re.Match[str]) -> str:
    return found[1] + chr(int(found[2], 16))


def outcome(chunks: list[bytes], *, wants_usage: bool, operation: str, most: int) -> list[object]:
    """All that a stream does with chunks, one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "_MOST_PROBES", most)
        stream = ChatStream(wants_usage=wants_usage, operation=operation)
        out = [stream.feed([Chunk(raw=raw)]) for raw in chunks]
        return told(stream, out)


def told(stream: ChatStream, out: list[bytes]) -> list[object]:
    """All that a stream has given and remembers, but for ids that it made up."""
    record = [stream.answer.message(index) for index in stream.answer.indexes]
    end = stream.end(stream.usage or Usage(1, 2), None, {})
    for message in record:
        for call in message.get("tool_calls") or ():
            call["id"] = _MADE.sub(b"", call.get("id", "").encode())
    return [
        [_MADE.sub(b"", item) for item in (*out, end)],
        record,
        stream.usage,
        stream.timings,
        stream.answer.finish_reasons,
        stream.finished,
    ]


@given(
    _RUNS,
    st.sampled_from(_STYLES),
    st.booleans(),
    st.sampled_from(["chat/completions"] * 4 + ["completions"]),
)
@example([(_TEMPLATES[2], [("a", ""), ("usage", ""), ('"usage', "")])], _STYLES[2], False, "chat/completions")
@example([(_TEMPLATES[0], [("\ud83d", ""), ("\ude00", ""), ("a", ""), ("b", "")])], _STYLES[1], False, "completions")
def test_parsed_and_not_parsed_are_the_same(
    runs: list[tuple[Json, list[tuple[str, str]]]], style: Json, wants_usage: bool, operation: str
) -> None:
    chunks = raws(runs, style)
    fast = outcome(chunks, wants_usage=wants_usage, operation=operation, most=10**6)
    slow = outcome(chunks, wants_usage=wants_usage, operation=operation, most=0)
    assert fast == slow


@pytest.mark.parametrize("wants_usage", [False, True])
@pytest.mark.parametrize("style", range(len(_STYLES)))
@pytest.mark.parametrize("number", range(len(_TEMPLATES)))
def test_each_kind_of_chunk(number: int, style: int, wants_usage: bool) -> None:
    texts = [
        ("a", "x"),
        ("b", "yy"),
        ('"\\ é\n', "z"),
        ("\ud83d", "z"),
        ("\ude00", "z"),
        ("c", "z"),
        ("d", "z"),
        ("", "z"),
    ]
    chunks = raws([(_TEMPLATES[1], texts[:1]), (_TEMPLATES[number], texts)], _STYLES[style])
    for operation in ("chat/completions", "completions"):
        fast = outcome(chunks, wants_usage=wants_usage, operation=operation, most=10**6)
        assert fast == outcome(chunks, wants_usage=wants_usage, operation=operation, most=0)


@given(st.sampled_from(_TEMPLATES), st.sampled_from(_STYLES), _TEXT, _PADDING)
@example(_TEMPLATES[3], _STYLES[0], "a", "x")
@example(_TEMPLATES[0], _STYLES[0], "content", "")
def test_what_is_certain_a_probe_would_find_too(template: Json, style: Json, text: str, padding: str) -> None:
    raw = _filled(template, text, padding, style)
    data = json.loads(raw)
    found = around_text(raw, data) if data["choices"] else None
    if found is not None and MARK.encode() not in raw:
        probe = Probe.of(raw, data)
        assert probe is not None
        assert probe.parts == found[1]


# --- pieces as they come from a socket


def events(*chunks: bytes) -> bytes:
    return b"".join(b"data: " + raw.replace(b"\n", b"\ndata: ") + b"\n\n" for raw in chunks)


def passed_piece(stream: ChatStream, piece: bytes) -> bytes | None:
    """What `pass_piece` has written; None if it has left the piece alone."""
    written: list[bytes] = []

    def write(data: bytes) -> bool:
        written.append(data)
        return True

    if stream.pass_piece(write, piece) is None:
        return None
    (leaving,) = written
    return leaving


def passed(pieces: list[bytes], *, wants_usage: bool, operation: str, whole: bool) -> list[object]:
    """All that a stream does with pieces; `whole`: they may pass it without being taken apart."""
    decoder, stream = SSEDecoder(), ChatStream(wants_usage=wants_usage, operation=operation)
    out: list[bytes] = []
    for piece in pieces:
        leaving = passed_piece(stream, piece) if whole and len(piece) <= decoder.may_pass else None
        try:
            if leaving is None:
                leaving = stream.feed([Chunk(raw=payload) for payload in decoder.feed(piece)])
        except (StreamedError, WireError) as failure:
            return [[_MADE.sub(b"", item) for item in out], str(failure), stream.answer.characters]
        out.append(leaving)
    return [*told(stream, out), stream.answer.characters, repr(stream.failure)]


class TestPieces:
    A, B, QUOTED = (compact(chunk({"content": text})) for text in ("a", "", '"b\n"'))

    def stream(self, **more: Any) -> ChatStream:
        stream = ChatStream(wants_usage=False)
        stream.feed([Chunk(raw=BEGIN), Chunk(raw=compact(chunk({"content": "a"}, **more)))])
        return stream

    def knowing(self, template: Template) -> ChatStream:
        stream = ChatStream(wants_usage=False)
        stream._template, stream._texts = template, [[]]
        return stream

    @pytest.mark.parametrize("chunks", [[A], [B], [QUOTED], [A, B], [A, A, B, A], [QUOTED, QUOTED]])
    def test_usual_ones_leave_as_the_very_same_bytes(self, chunks: list[bytes]) -> None:
        stream, piece = self.stream(), events(*chunks)
        assert passed_piece(stream, piece) is piece
        texts = [json.loads(raw)["choices"][0]["delta"]["content"] for raw in chunks]
        assert stream.answer.message()["content"] == "".join(["a", *texts])
        assert stream.answer.characters == len("".join(["a", *texts]))

    @pytest.mark.parametrize("texts", [["b"], ["b", ""], ["b", '"', "c"]])
    @pytest.mark.parametrize("more", [{"usage": None}, {"usage": None, "obfuscation": "x"}, {"service_tier": "odd"}])
    def test_so_do_those_that_are_changed(self, texts: list[str], more: Json) -> None:
        stream, long_way = self.stream(**more), self.stream(**more)
        chunks = [compact(chunk({"content": text}, **more)) for text in texts if text or "service_tier" not in more]
        assert passed_piece(stream, events(*chunks)) == long_way.feed([Chunk(raw=raw) for raw in chunks])

    @pytest.mark.parametrize(
        "piece",
        [
            b"",
            b"\n\n",
            events(A)[:-1],
            events(A)[1:],
            events(A)[1:-1],
            events(A) + b"\n",
            b": ping\n\n" + events(A),
            events(A, compact(chunk({"content": None}))),
            events(compact(chunk({"content": None})), A),
            events(A, b"[DONE]"),
            events(A, A[:-1]),
            events(A).replace(b"\n\n", b"\r\n\r\n"),
            events(A).replace(b'"a"', b'"a\n"'),
            events(A).replace(b'"a"', b'"a","b":"c"'),
            events(A).replace(b'"a"', b'"'),
            events(A).replace(b'"a"', b""),
            events(A).replace(b'"a"', b'"\\ud83d"'),
            events(A.replace(b'"a"', b'"a","b"'), A.replace(b'"a"', b'"a\\"')),
            events(A, A.replace(b'"a"', b'"a\\"'), A.replace(b'"a"', b'","c"')),
            events(A.replace(b'"a"', b'"a","b"'), A),
            events(A.replace(b'"a"', b'"\xc3"'), A.replace(b'"a"', b'"\xa9"')),
        ],
    )
    def test_others_do_not_pass_and_change_nothing(self, piece: bytes) -> None:
        stream = self.stream()
        assert passed_piece(stream, piece) is None
        assert stream.answer.message()["content"] == "a"
        assert stream.answer.characters == 1
        assert passed_piece(stream, events(A)) is not None, "the next one does"

    def test_chunks_of_several_lines_are_not_for_those_who_know_lines_only(self) -> None:
        stream = ChatStream(wants_usage=False)
        lines = json.dumps(chunk({"content": "a"}), indent=1).encode()
        stream.feed([Chunk(raw=BEGIN), Chunk(raw=lines)])
        assert passed_piece(stream, b"data: " + lines + b"\n\n") is None
        assert passed_piece(stream, events(lines)) is None

    def test_nothing_passes_before_a_chunk_was_read_or_after_a_failure(self) -> None:
        assert passed_piece(ChatStream(wants_usage=False), events(A)) is None
        stream = self.stream()
        stream.feed([Chunk(raw=A), Chunk(raw=b"{")])
        assert stream.failure is not None
        assert passed_piece(stream, events(A)) is None

    @pytest.mark.parametrize("count", [1, 2])
    def test_an_event_takes_one_way_alone_and_another_in_company(self, count: int) -> None:
        """Both give the same."""
        parts = [b'{"t":"', b'","u":null}']
        for leaving in (parts, [b'{"t":"', b'"}']):
            template = Template(parts, leaving, rewritten=False)
            piece = events(*[b'{"t":"a\\n\xc3\xa9","u":null}'] * count)
            stream, all_of_them = self.knowing(template), template.events(piece)
            assert all_of_them is not None
            assert passed_piece(stream, piece) == all_of_them[1]
            assert stream._texts == [all_of_them[0]]

    @pytest.mark.parametrize("inside", [b"a\n", b'"', b'a","b":"c', b"\\", b"\\ud83d", b"\xc3", b'" ', b' "'])
    def test_what_is_no_text_is_no_event(self, inside: bytes) -> None:
        template = Template([b'{"t":"', b'"}'], [b'{"t":"', b'"}'], rewritten=False)
        assert passed_piece(self.knowing(template), b'data: {"t":"%b"}\n\n' % inside) is None

    @pytest.mark.parametrize("value", [b"null", b"1", b'["a"]', b'{"a":"b"}', b'\n"a"', b'"a"\n', b' "a"', b""])
    def test_nor_is_another_value_or_one_with_blanks(self, value: bytes) -> None:
        template = Template([b'{"t":"', b'"}'], [b'{"t":"', b'"}'], rewritten=False)
        assert passed_piece(self.knowing(template), b'data: {"t":%b}\n\n' % value) is None

    def test_an_answer_that_is_too_long_takes_the_long_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_module, "_MOST_CHARACTERS", 3)
        stream = self.stream()
        assert passed_piece(stream, events(A, A)) is not None
        assert passed_piece(stream, events(A)) is None
        assert stream.answer.characters == 3


_JUNK = st.sampled_from(
    [b'"', b"\\", b'","', b"\n", b"\r", b"\n\n", b"data: ", b"\xc3", b"{", b": ping\n\n", b"[DONE]"]
)


@given(
    _RUNS,
    st.sampled_from(_STYLES),
    st.booleans(),
    st.sampled_from(["chat/completions"] * 4 + ["completions"]),
    st.lists(st.integers(0, 40), max_size=20),
    st.lists(st.tuples(st.integers(0, 9000), _JUNK), max_size=1),
    st.lists(st.integers(0, 9000), max_size=3),
)
def test_pieces_and_chunks_are_the_same(
    runs: list[tuple[Json, list[tuple[str, str]]]],
    style: Json,
    wants_usage: bool,
    operation: str,
    together: list[int],
    junk: list[tuple[int, bytes]],
    cuts: list[int],
) -> None:
    """Some events come together, some are cut; some are broken."""
    found = [events(raw) for raw in raws(runs, style)]
    for place in together:
        found[place : place + 2] = [b"".join(found[place : place + 2])] if place < len(found) else []
    for place, text in junk:
        at = place % (len(found) + 1)
        found[at : at + 1] = [piece[:place] + text + piece[place:] for piece in found[at : at + 1]]
    for place in cuts:
        at = place % (len(found) + 1)
        found[at : at + 1] = [part for piece in found[at : at + 1] for part in (piece[:place], piece[place:]) if part]
    fast = passed(found, wants_usage=wants_usage, operation=operation, whole=True)
    assert fast == passed(found, wants_usage=wants_usage, operation=operation, whole=False)


def test_the_mark_is_nobodys_text() -> None:
    assert re.fullmatch(r"/[0-9a-f]{16}", template_module.MARK)

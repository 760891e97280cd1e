"""Scripted answers by example: this request and script in, these chunks and this usage out."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.backends.scripted import Script, ScriptedBackend, ScriptedStream, words
from gateway.errors import ModelNotFound, UpstreamError
from gateway.wire.assemble import Assembler
from gateway.wire.chat import ChatRequest, Usage
from gateway.wire.jsontext import dumps

Json = dict[str, Any]
WEATHER = {"name": "get_weather", "arguments": {"city": "Zürich"}}


def request(content: Any = "one two three", **fields: Any) -> ChatRequest:
    return ChatRequest.parse(dumps({"model": "m", "messages": [{"role": "user", "content": content}]} | fields))


def backend(**script: Any) -> ScriptedBackend:
    return ScriptedBackend("local", {"m": Script(**script)})


async def streamed(asked: ChatRequest, **script: Any) -> list[Json]:
    stream = await backend(**script).stream(asked)
    found = []
    while chunks := await stream.read():
        found += [chunk.data for chunk in chunks]
    assert stream.complete
    return found


def answer(chunks: list[Json]) -> Assembler:
    assembler = Assembler()
    for chunk in chunks:
        assembler.add(chunk["choices"])
    return assembler


class TestWords:
    @pytest.mark.parametrize(
        ("text", "pieces"),
        [
            ("", []),
            ("one", ["one"]),
            ("one two  three", ["one", " two", "  three"]),
            (" one\n", [" one\n"]),
            ("one\n\ntwo \n", ["one", "\n\ntwo \n"]),
            (" \n", [" \n"]),
            ("你好 👩‍💻", ["你好", " 👩‍💻"]),
        ],
    )
    def test_pieces(self, text: str, pieces: list[str]) -> None:
        assert words(text) == pieces

    @settings(deadline=None)
    @given(st.text(st.sampled_from(" \n\t\u2028\u00a0ab😀")) | st.text())
    def test_joined_they_are_the_text(self, text: str) -> None:
        assert "".join(words(text)) == text
        assert len(words(text)) == max(len(text.split()), bool(text))


class TestEcho:
    async def test_is_there_without_scripts(self) -> None:
        assert [model.id for model in await ScriptedBackend("local").models()] == ["echo"]
        completion = await ScriptedBackend("local").complete(request(model="echo"))
        assert completion.data["choices"][0]["message"]["content"] == "one two three"

    async def test_whole_as_openai_answers(self) -> None:
        completion = await backend().complete(request())
        reply = ChatCompletion.model_validate_json(completion.raw, strict=True)
        assert reply.choices[0].message.content == "one two three"
        assert reply.choices[0].finish_reason == "stop"
        assert (reply.model, reply.object) == ("m", "chat.completion")
        assert Usage.read(completion.data["usage"]) == Usage(3, 3)

    async def test_streamed_as_openai_answers(self) -> None:
        chunks = await streamed(request())
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk, strict=True)
        assert [choice["delta"] for chunk in chunks for choice in chunk["choices"]] == [
            {"role": "assistant", "content": "", "refusal": None},
            {"content": "one"},
            {"content": " two"},
            {"content": " three"},
            {},
        ]
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-1]["choices"] == []
        assert Usage.read(chunks[-1]["usage"]) == Usage(3, 3)
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1

    @pytest.mark.parametrize(
        ("messages", "text"),
        [
            ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "b"),
            ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "a"),
            ([{"role": "system", "content": "a"}], "a"),
            ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}], "a"),
            ([{"role": "user", "content": None}], ""),
            ([{"role": "user", "content": "\ud83d"}], "\ud83d"),
        ],
    )
    async def test_the_last_user_message_is_said(self, messages: list[Json], text: str) -> None:
        asked = request(messages=messages)
        assert (await backend().complete(asked)).data["choices"][0]["message"]["content"] == text
        assert answer(await streamed(asked)).message()["content"] == text

    async def test_all_messages_count_as_input(self) -> None:
        asked = request(messages=[{"role": "system", "content": "be nice"}, {"role": "user", "content": "a b c"}])
        assert Usage.read((await backend().complete(asked)).data["usage"]) == Usage(5, 3)


class TestScripts:
    async def test_a_reply_with_reasoning(self) -> None:
        script = {"reply": "It is so.", "reasoning": "Let me think"}
        reply = (await backend(**script).complete(request())).data
        assert reply["choices"][0]["message"]["content"] == "It is so."
        assert reply["choices"][0]["message"]["reasoning_content"] == "Let me think"
        assert Usage.read(reply["usage"]) == Usage(3, 6, reasoning_tokens=3)
        message = answer(await streamed(request(), **script)).message()
        assert message == {"role": "assistant", "content": "It is so.", "reasoning_content": "Let me think"}

    async def test_tool_calls(self) -> None:
        calls = [WEATHER, {"name": "now", "arguments": "{}"}, {}]
        functions = [
            {"name": "get_weather", "arguments": '{"city":"Zürich"}'},
            {"name": "now", "arguments": "{}"},
            {"name": "tool_2", "arguments": "{}"},
        ]
        choice = (await backend(tool_calls=calls).complete(request())).data["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        assert [call["function"] for call in choice["message"]["tool_calls"]] == functions
        said = answer(await streamed(request(), tool_calls=calls))
        assert said.finish_reasons == {0: "tool_calls"}
        assert [call["function"] for call in said.message()["tool_calls"]] == functions
        assert all(call["id"].startswith("call_") for call in said.message()["tool_calls"])

    async def test_text_beside_tool_calls(self) -> None:
        said = answer(await streamed(request(), reply="Let me look.", tool_calls=[WEATHER])).message()
        assert said["content"] == "Let me look."
        assert len(said["tool_calls"]) == 1

    async def test_each_choice_is_said_and_counted(self) -> None:
        chunks = await streamed(request(n=3))
        said = answer(chunks)
        assert [said.message(index)["content"] for index in said.indexes] == ["one two three"] * 3
        assert said.finish_reasons == {0: "stop", 1: "stop", 2: "stop"}
        assert Usage.read(chunks[-1]["usage"]) == Usage(3, 9)
        assert len((await backend().complete(request(n=3))).data["choices"]) == 3

    @pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
    async def test_cut_at_the_limit(self, key: str) -> None:
        chunks = await streamed(request(**{key: 2}))
        assert answer(chunks).message()["content"] == "one two"
        assert answer(chunks).finish_reasons == {0: "length"}
        assert Usage.read(chunks[-1]["usage"]) == Usage(3, 2)
        assert answer(await streamed(request(**{key: 3}))).finish_reasons == {0: "stop"}

    async def test_reasoning_counts_towards_the_limit(self) -> None:
        said = answer(await streamed(request(max_tokens=4), reasoning="a b c")).message()
        assert (said["reasoning_content"], said["content"]) == ("a b c", "one")
        said = answer(await streamed(request(max_tokens=2), reasoning="a b c")).message()
        assert (said["reasoning_content"], said["content"]) == ("a b", "")

    async def test_another_finish_reason(self) -> None:
        assert answer(await streamed(request(), finish_reason="content_filter")).finish_reasons == {0: "content_filter"}

    async def test_no_usage(self) -> None:
        assert not any("usage" in chunk for chunk in await streamed(request(), usage="none"))
        assert "usage" not in (await backend(usage="none").complete(request())).data

    @pytest.mark.parametrize("model", ["nobody", None, ""])
    async def test_an_unknown_model(self, model: str | None) -> None:
        for call in (backend().complete, backend().stream):
            with pytest.raises(ModelNotFound):
                await call(request(model=model))


class TestFailing:
    async def test_at_once(self) -> None:
        for call in (backend(error_status=503).complete, backend(error_status=503, error_message="Too much.").stream):
            with pytest.raises(UpstreamError) as caught:
                await call(request())
            assert caught.value.status == caught.value.upstream_status == 503

    @pytest.mark.parametrize("count", [0, 1, 3])
    async def test_after_some_chunks(self, count: int) -> None:
        stream = await backend(fail_after=count, error_message="Enough.").stream(request())
        for _ in range(count):
            assert await stream.read()
        with pytest.raises(UpstreamError, match="Enough"):
            await stream.read()
        assert not stream.complete

    @pytest.mark.parametrize("count", [0, 1, 3])
    async def test_cut_after_some_chunks(self, count: int) -> None:
        stream = await backend(cut_after=count).stream(request())
        for _ in range(count):
            assert await stream.read()
        assert await stream.read() == ()
        assert not stream.complete

    @pytest.mark.parametrize("script", [{"fail_after": 1}, {"cut_after": 1}])
    async def test_a_whole_reply_breaks(self, script: Json) -> None:
        with pytest.raises(UpstreamError):
            await backend(**script).complete(request())


class TestClosing:
    async def test_nothing_comes_after_it(self) -> None:
        stream = await backend().stream(request())
        assert await stream.read()
        await stream.close()
        await stream.close()
        with pytest.raises(UpstreamError):
            await stream.read()

    @pytest.mark.parametrize("script", [{"first_delay": 3600}, {"delay": 3600}])
    async def test_a_waiting_read_ends(self, script: Json) -> None:
        stream = await backend(**script).stream(request())
        if "delay" in script:
            assert await stream.read()
        reading = asyncio.create_task(_read(stream))
        await asyncio.sleep(0)
        await stream.close()
        assert await reading == "broke"

    async def test_after_the_end_there_is_nothing(self) -> None:
        stream = await backend().stream(request())
        while await stream.read():
            pass
        assert await stream.read() == ()
        assert stream.complete


async def _read(stream: ScriptedStream) -> str:
    with contextlib.suppress(UpstreamError):
        await stream.read()
        return "answered"
    return "broke"

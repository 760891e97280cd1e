"""Requests by example: this in OpenAI's words, that in Ollama's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.backends import ollama_request
from gateway.errors import BadRequest
from gateway.wire.chat import ChatRequest, CompletionRequest
from gateway.wire.operation import EMBEDDINGS, OperationRequest

HELLO = [{"role": "user", "content": "Hello"}]
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


def chat(defaults: dict[str, Any] | None = None, /, **fields: Any) -> dict[str, Any]:
    raw = json.dumps({"model": "m", "messages": HELLO, **fields}).encode()
    return ollama_request.chat(ChatRequest.parse(raw), defaults or {})


def messages(*given: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = chat(messages=list(given))["messages"]
    return found


def generate(**fields: Any) -> dict[str, Any]:
    raw = json.dumps({"model": "m", "prompt": "Once", **fields}).encode()
    return ollama_request.generate(CompletionRequest.parse(raw), {})


def embed(defaults: dict[str, Any] | None = None, /, **fields: Any) -> dict[str, Any]:
    raw = json.dumps({"model": "m", **fields}).encode()
    return ollama_request.embed(OperationRequest.parse(EMBEDDINGS, "application/json", raw), defaults or {})


def refusal(**fields: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    return caught.value


def test_the_least() -> None:
    assert chat() == {"model": "m", "messages": HELLO, "stream": False}
    assert chat(stream=True)["stream"] is True


class TestMessages:
    @pytest.mark.parametrize(
        ("given", "sent"),
        [
            ({"role": "user", "content": "Hi", "name": "ann"}, {"role": "user", "content": "Hi"}),
            ({"role": "developer", "content": "Be kind"}, {"role": "system", "content": "Be kind"}),
            ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
            ({"role": "user"}, {"role": "user", "content": ""}),
            (
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "user", "content": "a\nb"},
            ),
            (
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                {"role": "assistant", "content": "No."},
            ),
            (
                {"role": "assistant", "content": "4", "reasoning_content": "2+2"},
                {"role": "assistant", "content": "4", "thinking": "2+2"},
            ),
            (
                {"role": "assistant", "content": "4", "reasoning": "2+2"},
                {"role": "assistant", "content": "4", "thinking": "2+2"},
            ),
            ({"role": "assistant", "content": "4", "reasoning": {}}, {"role": "assistant", "content": "4"}),
            ({"role": "user", "content": "4", "reasoning": "x"}, {"role": "user", "content": "4"}),
            ({"role": "function", "name": "f", "content": "1"}, {"role": "tool", "content": "1", "tool_name": "f"}),
        ],
    )
    def test_one(self, given: dict[str, Any], sent: dict[str, Any]) -> None:
        assert messages(given) == [sent]

    def test_tools_called_and_answered(self) -> None:
        call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "é"]}'}}
        assert messages(
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "7"},
            {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "8"}]},
            {"role": "tool", "name": "g", "tool_call_id": "call_1", "content": "9"},
        ) == [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "call_1", "function": {"index": 0, "name": "f", "arguments": {"a": [1, "é"]}}},
                ],
            },
            {"role": "tool", "content": "7", "tool_name": "f", "tool_call_id": "call_1"},
            {"role": "tool", "content": "8", "tool_call_id": "call_2"},
            {"role": "tool", "content": "9", "tool_name": "g", "tool_call_id": "call_1"},
        ]

    @pytest.mark.parametrize(
        ("arguments", "sent"),
        [
            ("{}", {}),
            ("", {}),
            ("  ", {}),
            (None, {}),
            ("null", {}),
            ({"a": 1}, {"a": 1}),
            ('{"a": 1', {"arguments": '{"a": 1'}),
            ("Paris", {"arguments": "Paris"}),
            ("[1]", {"arguments": [1]}),
            ('"x"', {"arguments": "x"}),
            ("\ud83d", {"arguments": "\ud83d"}),
        ],
    )
    def test_arguments_are_always_an_object(self, arguments: object, sent: dict[str, Any]) -> None:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        said = messages({"role": "assistant", "tool_calls": [call]})
        assert said[0]["tool_calls"][0]["function"]["arguments"] == sent

    def test_calls_of_other_kinds_stay_readable(self) -> None:
        custom = {"id": "c", "type": "custom", "custom": {"name": "sql", "input": "SELECT 1"}}
        said = messages({"role": "assistant", "tool_calls": [custom, {"id": "d"}]})
        assert [call["function"] for call in said[0]["tool_calls"]] == [
            {"index": 0, "name": "sql", "arguments": {"arguments": "SELECT 1"}},
            {"index": 1, "name": "", "arguments": {}},
        ]
        old = messages({"role": "assistant", "function_call": {"name": "f", "arguments": '{"a":1}'}})
        assert old[0]["tool_calls"] == [{"function": {"index": 0, "name": "f", "arguments": {"a": 1}}}]

    @pytest.mark.parametrize(
        "url",
        [
            f"data:image/png;base64,{PIXEL}",
            f"data:;base64,{PIXEL}",
            f"DATA:image/svg+xml;charset=utf-8;BASE64,{PIXEL}",
            f" data:image/png;base64, {PIXEL}\n",
        ],
    )
    def test_images_lose_their_prefix(self, url: str) -> None:
        parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url, "detail": "low"}}]
        assert messages({"role": "user", "content": parts}) == [{"role": "user", "content": "What?", "images": [PIXEL]}]
        assert messages({"role": "user", "content": [{"type": "image_url", "image_url": url}]})[0]["images"] == [PIXEL]

    @pytest.mark.parametrize(
        ("part", "words"),
        [
            ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "URLs are not fetched"),
            ({"type": "image_url", "image_url": {"url": "data:image/png,raw"}}, "send it as data:"),
            ({"type": "image_url", "image_url": {"url": PIXEL}}, "send it as data:"),
            ({"type": "image_url", "image_url": {}}, "must be an object with a 'url'"),
            ({"type": "image_url"}, "must be an object with a 'url'"),
            ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "of type 'input_audio'"),
            ({"type": "file", "file": {"file_id": "f"}}, "of type 'file'"),
            ({"type": "text", "text": 5}, "of type 'text'"),
        ],
    )
    def test_parts_that_cannot_be_sent(self, part: dict[str, Any], words: str) -> None:
        failure = refusal(messages=[*HELLO, {"role": "user", "content": [{"type": "text", "text": "a"}, part]}])
        assert failure.param == "messages[1].content[1]"
        assert failure.param in failure.message
        assert words in failure.message


class TestOptions:
    def test_by_openais_names(self) -> None:
        given = {"temperature": 0.5, "top_p": 1, "seed": 7, "presence_penalty": 0.1, "frequency_penalty": -0.1}
        assert chat(**given)["options"] == given

    def test_by_ollamas_names(self) -> None:
        given = {"top_k": 5, "min_p": 0.1, "typical_p": 0.9, "repeat_penalty": 1.1, "repeat_last_n": 64, "num_keep": 4}
        given |= {"num_ctx": 8192, "num_gpu": 1, "num_batch": 2, "num_thread": 3, "main_gpu": 0, "use_mmap": False}
        assert chat(**given)["options"] == given

    @pytest.mark.parametrize(
        ("given", "options"),
        [
            ({"max_tokens": 5}, {"num_predict": 5}),
            ({"max_completion_tokens": 6, "max_tokens": 5}, {"num_predict": 6}),
            ({"stop": "END"}, {"stop": ["END"]}),
            ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
            ({"stop": None, "temperature": None, "seed": 0}, {"seed": 0}),
            ({"options": {"temperature": 0, "mirostat": 1, "seed": None}, "temperature": 1},
             {"temperature": 0, "mirostat": 1}),
        ],
    )  # fmt: skip
    def test_other_names(self, given: dict[str, Any], options: dict[str, Any]) -> None:
        assert chat(**given)["options"] == options

    @pytest.mark.parametrize("given", [{"stop": []}, {"options": {}}, {"logit_bias": {"5": 1}}, {"user": "ann"}])
    def test_none_where_nothing_is_said(self, given: dict[str, Any]) -> None:
        assert "options" not in chat(**given)

    def test_the_backends_are_defaults(self) -> None:
        own = {"options": {"num_ctx": 8192, "temperature": 0.1}, "keep_alive": "1h"}
        assert chat(own)["options"] == own["options"]
        assert chat(own)["keep_alive"] == "1h"
        body = chat(own, temperature=0.9, keep_alive=0, options={"num_ctx": 4096, "top_k": 1})
        assert body["options"] == {"num_ctx": 4096, "temperature": 0.9, "top_k": 1}
        assert body["keep_alive"] == 0
        assert own == {"options": {"num_ctx": 8192, "temperature": 0.1}, "keep_alive": "1h"}

    def test_ollamas_own_fields_pass(self) -> None:
        body = chat(truncate=False, shift=False, keep_alive="5m")
        assert (body["truncate"], body["shift"], body["keep_alive"]) == (False, False, "5m")

    def test_options_that_are_none(self) -> None:
        assert refusal(options=[1]).param == "options"


class TestFormat:
    @pytest.mark.parametrize(
        ("given", "sent"),
        [
            ({"type": "json_object"}, "json"),
            ({"type": "json_object", "schema": {"type": "object"}}, {"type": "object"}),
            (
                {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "array"}}},
                {"type": "array"},
            ),
            ({"type": "json_schema", "json_schema": {"name": "x"}}, "json"),
        ],
    )
    def test_of_the_response(self, given: dict[str, Any], sent: object) -> None:
        assert chat(response_format=given)["format"] == sent

    def test_text_is_no_format(self) -> None:
        assert "format" not in chat(response_format={"type": "text"})
        assert "format" not in chat(response_format=None)

    def test_ollamas_own(self) -> None:
        assert chat(format={"type": "object"})["format"] == {"type": "object"}
        assert chat(format="x", response_format={"type": "json_object"})["format"] == "json"

    @pytest.mark.parametrize("given", [{"type": "grammar"}, {}, "json", {"type": "json_schema"}])
    def test_others(self, given: object) -> None:
        assert refusal(response_format=given).param == "response_format"


class TestThink:
    @pytest.mark.parametrize(
        ("given", "sent"),
        [
            ({"reasoning_effort": "none"}, False),
            ({"reasoning_effort": "minimal"}, "low"),
            ({"reasoning_effort": "low"}, "low"),
            ({"reasoning_effort": "medium"}, "medium"),
            ({"reasoning_effort": "high"}, "high"),
            ({"reasoning_effort": "xhigh"}, "max"),
            ({"reasoning": {"effort": "low"}}, "low"),
            ({"think": False, "reasoning_effort": "high"}, False),
            ({"think": "max"}, "max"),
        ],
    )
    def test_effort(self, given: dict[str, Any], sent: object) -> None:
        assert chat(**given)["think"] == sent

    @pytest.mark.parametrize("given", [{}, {"reasoning_effort": None}, {"reasoning": {}}, {"think": None}])
    def test_left_to_the_model(self, given: dict[str, Any]) -> None:
        assert "think" not in chat(**given)

    def test_unknown(self) -> None:
        assert refusal(reasoning_effort="huge").param == "reasoning_effort"
        assert refusal(reasoning={"effort": 5}).param == "reasoning.effort"


class TestTools:
    def test_pass_as_they_are(self) -> None:
        strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item] # a mapping
        assert chat(tools=[strict, TIME])["tools"] == [strict, TIME]

    def test_without_parameters(self) -> None:
        tool = {"type": "function", "function": {"name": "get_time", "parameters": None}}
        assert chat(tools=[tool])["tools"] == [TIME]

    @pytest.mark.parametrize(
        ("choice", "offered"),
        [
            (None, ["get_weather", "get_time"]),
            ("auto", ["get_weather", "get_time"]),
            ("required", ["get_weather", "get_time"]),
            ({"type": "function", "function": {"name": "get_time"}}, ["get_time"]),
            ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [WEATHER]}}, ["get_weather"]),
        ],
    )
    def test_choice(self, choice: object, offered: list[str]) -> None:
        body = chat(tools=[WEATHER, TIME], tool_choice=choice)
        assert [tool["function"]["name"] for tool in body["tools"]] == offered
        assert "tool_choice" not in body

    def test_none_and_nothing(self) -> None:
        assert "tools" not in chat(tools=[WEATHER], tool_choice="none")
        assert "tools" not in chat(tools=[])

    @pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "no"}}, {"type": "custom"}, {}])
    def test_a_choice_of_none_of_them(self, choice: object) -> None:
        assert refusal(tools=[WEATHER], tool_choice=choice).param == "tool_choice"

    @pytest.mark.parametrize("tool", [{"type": "custom", "custom": {"name": "x"}}, {"type": "web_search"}, "x"])
    def test_other_kinds(self, tool: object) -> None:
        assert refusal(tools=[WEATHER, tool]).param == "tools[1]"

    def test_the_older_functions(self) -> None:
        assert refusal(functions=[{"name": "f"}]).param == "functions"


def test_several_choices_are_refused() -> None:
    assert (refusal(n=2).param, refusal(n=2).code) == ("n", "unsupported_value")
    assert "n" not in chat(n=1)


def test_logprobs() -> None:
    body = chat(logprobs=True, top_logprobs=3)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 3)
    assert chat(logprobs=True)["top_logprobs"] == 0
    assert "logprobs" not in chat(logprobs=False)


class TestGenerate:
    @pytest.mark.parametrize("prompt", ["Once", ["Once"]])
    def test_a_prompt(self, prompt: object) -> None:
        assert generate(prompt=prompt) == {"model": "m", "prompt": "Once", "stream": False}

    def test_with_everything(self) -> None:
        assert generate(suffix="end", raw=True, max_tokens=5, stop="\n", stream=True, logprobs=2, keep_alive=-1) == {
            "model": "m",
            "prompt": "Once",
            "suffix": "end",
            "raw": True,
            "stream": True,
            "logprobs": True,
            "top_logprobs": 2,
            "keep_alive": -1,
            "options": {"num_predict": 5, "stop": ["\n"]},
        }

    @pytest.mark.parametrize(
        ("given", "param"),
        [
            ({"prompt": ["a", "b"]}, "prompt"),
            ({"prompt": [1, 2]}, "prompt"),
            ({"prompt": [[1, 2]]}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": None}, "prompt"),
            ({"n": 2}, "n"),
            ({"best_of": 2}, "best_of"),
            ({"echo": True}, "echo"),
        ],
    )
    def test_what_it_cannot_do(self, given: dict[str, Any], param: str) -> None:
        with pytest.raises(BadRequest) as caught:
            generate(**given)
        assert caught.value.param == param


class TestEmbed:
    @pytest.mark.parametrize("texts", ["a", ["a", "b"], ""])
    def test_texts(self, texts: object) -> None:
        assert embed(input=texts) == {"model": "m", "input": texts}

    def test_with_everything(self) -> None:
        own = {"options": {"num_ctx": 512}}
        assert embed(own, input="a", dimensions=8, truncate=False, encoding_format="base64", user="u") == {
            "model": "m",
            "input": "a",
            "dimensions": 8,
            "truncate": False,
            "options": {"num_ctx": 512},
        }

    @pytest.mark.parametrize("texts", [None, [], 5, [1, 2], [[1], [2]], ["a", 1]])
    def test_what_is_no_text(self, texts: object) -> None:
        with pytest.raises(BadRequest) as caught:
            embed(input=texts)
        assert caught.value.param == "input"


class TestMemory:
    def test_loading_uses_the_options_of_later_calls(self) -> None:
        own = {"options": {"num_ctx": 8192}, "keep_alive": "1h"}
        assert ollama_request.load("m", own) == {"model": "m", "messages": [], "stream": False, **own}

    def test_loading_is_never_unloading(self) -> None:
        assert ollama_request.load("m", {"keep_alive": 0})["keep_alive"] == "5m"

    def test_unloading(self) -> None:
        assert ollama_request.unload("m") == {"model": "m", "messages": [], "stream": False, "keep_alive": 0}

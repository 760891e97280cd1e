"""LangChain's `ChatOpenAI`."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from conftest import Gateway
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def chat(gateway: Gateway, model: str = "answer", **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model=model, base_url=gateway.base_url, api_key=SecretStr(gateway.api_key), **options)


def test_invokes(gateway: Gateway) -> None:
    reply = chat(gateway).invoke([SystemMessage("be kind"), HumanMessage("hello there")])
    assert reply.content == "You said: hello there"
    assert reply.usage_metadata
    assert (reply.usage_metadata["input_tokens"], reply.usage_metadata["output_tokens"]) == (4, 4)
    assert reply.response_metadata["finish_reason"] == "stop"
    roles = [message["role"] for message in gateway.upstream_requests()[-1]["messages"]]
    assert roles == ["system", "user"]


def test_streams_with_usage(gateway: Gateway) -> None:
    chunks = list(chat(gateway, stream_usage=True).stream("hello there"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert isinstance(whole, AIMessageChunk)
    assert whole.content == "You said: hello there"
    assert len([chunk for chunk in chunks if chunk.content]) > 1
    assert whole.usage_metadata
    assert (whole.usage_metadata["input_tokens"], whole.usage_metadata["output_tokens"]) == (2, 4)


def test_streams_without_usage(gateway: Gateway) -> None:
    chunks = list(chat(gateway, stream_usage=False).stream("hello there"))
    assert "".join(str(chunk.content) for chunk in chunks) == "You said: hello there"


async def _streamed(gateway: Gateway) -> str:
    return "".join([str(chunk.content) async for chunk in chat(gateway).astream("hello there")])


def test_streams_asynchronously(gateway: Gateway) -> None:
    assert asyncio.run(_streamed(gateway)) == "You said: hello there"


@pytest.mark.parametrize("streaming", [False, True])
def test_calls_tools(gateway: Gateway, streaming: bool) -> None:
    model = chat(gateway, "parallel-tools", streaming=streaming).bind_tools([weather])
    asked = HumanMessage("weather please")
    called = model.invoke([asked])
    assert isinstance(called, AIMessage)
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("weather", {"city": "city"})] * 2
    results = [weather.invoke(call) for call in called.tool_calls]
    assert all(isinstance(result, ToolMessage) for result in results)
    assert model.invoke([asked, called, *results]).content == "The tool said: sunny in city"


def test_structured_output_by_schema(gateway: Gateway) -> None:
    answer = chat(gateway).with_structured_output(Person, method="json_schema").invoke("a person")
    assert answer == Person(name="name", age=1)
    assert gateway.upstream_requests()[-1]["response_format"]["json_schema"]["name"] == "Person"


def test_structured_output_by_function(gateway: Gateway) -> None:
    answer = chat(gateway, "tools").with_structured_output(Person, method="function_calling").invoke("a person")
    assert answer == Person(name="name", age=1)


def test_turns_are_one_conversation(gateway: Gateway) -> None:
    before = len(gateway.conversations())
    history: list[Any] = [HumanMessage("the first turn")]
    history += [chat(gateway).invoke(history), HumanMessage("the second turn")]
    chat(gateway).invoke(history)
    assert [len(messages) for messages in gateway.conversations()[before:]] == [4]


def test_errors_are_of_the_right_class(gateway: Gateway) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        chat(gateway, "nobody-has-this").invoke("hello")
    with pytest.raises(openai.RateLimitError):
        chat(gateway, "error-429-quota", max_retries=0).invoke("hello")

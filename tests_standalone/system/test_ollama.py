"""The official Python SDK against a gateway in front of an Ollama, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam
from pydantic import BaseModel

from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.ollama import ScriptedOllama
from tests_standalone.system.conftest import PRICE, Start
from tests_standalone.system.http import chat, post_chat

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello there"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
MODELS = ("llama3.1:8b", "odd", "thinker", "parallel-tools", "no-counts", "slow")


@pytest.fixture
async def ollama() -> AsyncIterator[ScriptedOllama]:
    async with ScriptedOllama() as server:
        yield server


@pytest.fixture
async def gateway(ollama: ScriptedOllama, start: Start) -> GatewayProcess:
    backend = {"type": "ollama", "base_url": ollama.root_url, "num_ctx": 8192, "keep_alive": "1h"}
    models = {name: {"backend": "local", "price": PRICE} for name in MODELS}
    return await start({"backends": {"local": backend}, "default_backend": "local", "models": models})


@pytest.fixture
async def client(gateway: GatewayProcess) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="any", max_retries=0) as sdk:
        yield sdk


async def row(gateway: GatewayProcess) -> dict[str, Any]:
    """The one usage row, once it is there."""
    while not (rows := gateway.query("SELECT * FROM usage_view")):
        await asyncio.sleep(0.02)
    assert len(rows) == 1
    return rows[0]


async def streamed(client: AsyncOpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    return [chunk async for chunk in await client.chat.completions.create(stream=True, **fields)]


async def test_models_are_listed(client: AsyncOpenAI) -> None:
    names = [model.id async for model in await client.models.list()]
    while "embedder:latest" not in names:
        await asyncio.sleep(0.05)
        names = [model.id async for model in await client.models.list()]
    assert "llama3.1:8b" in names


async def test_a_whole_answer_with_usage_cost_and_times(
    client: AsyncOpenAI, gateway: GatewayProcess, ollama: ScriptedOllama
) -> None:
    answer = await client.chat.completions.create(model="llama3.1:8b", messages=HELLO, max_tokens=50, stop="END")
    assert answer.choices[0].message.content == "You said: Hello there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 4)
    cost = (2 * 2.0 + 4 * 8.0) / 1e6
    assert answer.usage.model_extra == {"cost": cost}
    assert answer.model_extra is not None
    assert answer.model_extra["timings"]["load_ms"] == 1500
    assert ollama.last["options"] == {"num_ctx": 8192, "num_predict": 50, "stop": ["END"]}
    assert ollama.last["keep_alive"] == "1h"
    booked = await row(gateway)
    assert (booked["input_tokens"], booked["output_tokens"], booked["counted_by"]) == (2, 4, "upstream")
    assert booked["cost_usd"] == cost
    assert (booked["backend"], booked["upstream_model"]) == ("local", "llama3.1:8b")


@pytest.mark.parametrize("include_usage", [False, True])
async def test_a_stream(client: AsyncOpenAI, gateway: GatewayProcess, include_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = await streamed(client, model="odd", messages=HELLO, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == 'a < b & c > d "é" 👩‍💻 \u2028 end'
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert bool(chunks[-1].choices) != include_usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["timings"]["predicted_per_second"] == 100
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert (await row(gateway))["status"] == "ok"


async def test_thinking(client: AsyncOpenAI) -> None:
    chunks = await streamed(client, model="thinker", messages=HELLO, reasoning_effort="high")
    thought = "".join((chunk.choices[0].delta.model_extra or {}).get("reasoning_content") or "" for chunk in chunks)
    assert thought == "First I think. "
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Then I answer."


async def test_a_tool_round_trip(client: AsyncOpenAI, ollama: ScriptedOllama) -> None:
    messages: list[Any] = [{"role": "user", "content": "Weather and time in Paris?"}]
    async with client.chat.completions.stream(model="parallel-tools", messages=messages, tools=[WEATHER]) as stream:
        final = await stream.get_final_completion()
    said = final.choices[0].message
    assert final.choices[0].finish_reason == "tool_calls"
    calls = said.tool_calls or []
    assert [call.function.name for call in calls] == ["get_weather", "get_time"]
    assert json.loads(calls[0].function.arguments) == {"city": "Paris", "days": 2, "exact": True}
    messages.append(said.model_dump(exclude_unset=True, exclude={"parsed"}))
    messages += [{"role": "tool", "tool_call_id": call.id, "content": f"{call.function.name}: ok"} for call in calls]
    answer = await client.chat.completions.create(model="parallel-tools", messages=messages, tools=[WEATHER])
    assert answer.choices[0].finish_reason == "stop"
    sent = ollama.last["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool", "tool"]
    assert [message.get("tool_name") for message in sent[2:]] == ["get_weather", "get_time"]
    assert sent[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris", "days": 2, "exact": True}


async def test_images_as_data_urls(client: AsyncOpenAI, ollama: ScriptedOllama) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    parts: Any = [{"type": "text", "text": "What is it?"}, image]
    answer = await client.chat.completions.create(model="llama3.1:8b", messages=[{"role": "user", "content": parts}])
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3 + 85
    assert ollama.last["messages"][0]["images"] == [PIXEL]


async def test_images_behind_urls_are_refused_with_their_place(client: AsyncOpenAI, ollama: ScriptedOllama) -> None:
    parts: Any = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
    with pytest.raises(openai.BadRequestError, match="URLs are not fetched") as caught:
        await client.chat.completions.create(model="llama3.1:8b", messages=[{"role": "user", "content": parts}])
    assert caught.value.param == "messages[0].content[0]"
    assert ollama.of("/api/chat") == []


async def test_structured_output(client: AsyncOpenAI) -> None:
    class Weather(BaseModel):
        city: str
        degrees: float

    parsed = await client.chat.completions.parse(model="llama3.1:8b", messages=HELLO, response_format=Weather)
    assert parsed.choices[0].message.parsed == Weather(city="Paris", degrees=1.5)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
async def test_embeddings(client: AsyncOpenAI, encoding: Any) -> None:
    asked = {} if encoding is None else {"encoding_format": encoding}
    found = await client.embeddings.create(model="embedder", input=["a", "bc"], dimensions=2, **asked)
    vectors: list[Any] = [entry.embedding for entry in found.data]
    packed = ["AAAAPgAAgD4=", "AACAPgAAwD4="]
    assert vectors == (packed if encoding == "base64" else [[0.125, 0.25], [0.25, 0.375]])
    assert found.usage.prompt_tokens == 2


async def test_older_completions(client: AsyncOpenAI) -> None:
    whole = await client.completions.create(model="llama3.1:8b", prompt="def f():", suffix="return 1")
    assert whole.choices[0].text == "Continuing: def f(): ... return 1"
    stream = await client.completions.create(model="llama3.1:8b", prompt="def f():", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream if chunk.choices]) == "Continuing: def f():"


@pytest.mark.parametrize(
    ("model", "error", "code"),
    [
        ("nobody:7b", openai.NotFoundError, "model_not_found"),
        ("error-400", openai.BadRequestError, "context_length_exceeded"),
        ("error-401", openai.InternalServerError, "upstream_error"),
        ("error-500", openai.InternalServerError, "upstream_error"),
        ("queue-full", openai.InternalServerError, "upstream_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_the_right_class(
    client: AsyncOpenAI, model: str, error: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    with pytest.raises(error) as caught:
        await client.chat.completions.create(model=model, messages=HELLO, stream=stream)
    assert caught.value.code == code


async def test_an_error_line_in_mid_stream_reaches_the_client_with_its_words(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.APIError, match="an error was encountered while running the model") as caught:
        await streamed(client, model="error-mid-stream", messages=HELLO)
    assert not isinstance(caught.value, openai.APIStatusError)


@pytest.mark.parametrize("model", ["no-done", "cut"])
async def test_a_stream_without_its_last_line_is_never_a_stop(gateway: GatewayProcess, model: str) -> None:
    answer = await post_chat(gateway.port, chat(model, stream=True))
    assert answer.events[-1]["error"]["type"] == "upstream_error"
    assert not answer.clean_end
    assert (await row(gateway))["status"] == "error"


async def test_a_model_that_does_not_count_is_estimated(client: AsyncOpenAI, gateway: GatewayProcess) -> None:
    answer = await client.chat.completions.create(model="no-counts", messages=HELLO)
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    booked = await row(gateway)
    assert booked["counted_by"] == "gateway"
    assert booked["cost_usd"] > 0


async def test_leaving_closes_the_connection_and_so_stops_the_model(
    client: AsyncOpenAI, gateway: GatewayProcess, ollama: ScriptedOllama
) -> None:
    stream = await client.chat.completions.create(model="hang", messages=HELLO, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await ollama.until(lambda tally: any(seen.outcome == "client_closed" for seen in tally))
    booked = await row(gateway)
    assert (booked["status"], booked["counted_by"]) == ("client_disconnected", "gateway")

"""The official Python SDK against the gateway, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import PRICE, Start, in_front_of

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello there"}]


@pytest.fixture
async def gateway(upstream: ScriptedUpstream, start: Start) -> GatewayProcess:
    return await start(in_front_of(upstream, models={"answer": {"backend": "up", "price": PRICE}}))


@pytest.fixture
async def client(gateway: GatewayProcess) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="any", max_retries=0) as sdk:
        yield sdk


async def test_models_are_listed_and_retrieved(client: AsyncOpenAI) -> None:
    names = [model.id async for model in await client.models.list()]
    assert "answer" in names
    assert (await client.models.retrieve("answer")).id == "answer"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("no/such:model")
    assert caught.value.code == "model_not_found"


async def test_a_whole_answer_with_usage_cost_and_conversation(client: AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(model="answer", messages=HELLO)
    answer = raw.parse()
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2
    cost = (2 * 2.0 + answer.usage.completion_tokens * 8.0) / 1e6
    assert answer.usage.model_extra == {"cost": cost}
    assert answer.model_extra is not None
    assert answer.model_extra["cost"] == cost
    assert answer.model_extra["conversation_id"] == raw.headers["x-conversation-id"]
    assert float(raw.headers["x-gateway-cost"]) == cost
    assert raw.headers["x-gateway-backend"] == "up"
    assert answer._request_id == raw.headers["x-request-id"]


async def test_a_stream_without_include_usage_carries_it_on_the_finish_chunk(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="answer", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices for chunk in chunks)
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.model_extra is not None
    assert chunks[-1].usage.model_extra["cost"] > 0
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["conversation_id"].startswith("conv_")
    whole = await client.chat.completions.create(model="answer", messages=HELLO)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


async def test_a_stream_with_include_usage_ends_with_the_usage_chunk(client: AsyncOpenAI) -> None:
    options = {"include_usage": True}
    stream = await client.chat.completions.create(
        model="answer",
        messages=HELLO,
        stream=True,
        stream_options=options,  # type: ignore[call-overload] # a plain dict, as users write it
    )
    chunks = [chunk async for chunk in stream]
    assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.model_extra["cost"] > 0


async def test_tools_whole_and_streamed(client: AsyncOpenAI) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
    whole = await client.chat.completions.create(model="parallel-tools", messages=HELLO, tools=[tool])  # type: ignore[list-item] # plain dicts
    calls = whole.choices[0].message.tool_calls or []
    assert whole.choices[0].finish_reason == "tool_calls"
    assert len(calls) == 2
    async with client.chat.completions.stream(model="parallel-tools", messages=HELLO, tools=[tool]) as stream:  # type: ignore[list-item] # plain dicts
        final = await stream.get_final_completion()
    streamed = final.choices[0].message.tool_calls or []
    assert [call.function.name for call in streamed] == [call.function.name for call in calls]  # type: ignore[union-attr] # function calls
    assert [call.function.arguments for call in streamed] == [call.function.arguments for call in calls]  # type: ignore[union-attr] # function calls


async def test_images_as_data_urls_reach_the_upstream(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    await client.chat.completions.create(model="answer", messages=[{"role": "user", "content": parts}])  # type: ignore[list-item,misc] # plain dicts
    assert upstream.tally[-1].images == 1
    assert upstream.tally[-1].request["messages"][0]["content"] == parts


async def test_several_choices_and_logprobs(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="answer", messages=HELLO, n=3, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(choice.logprobs is not None and choice.logprobs.content for choice in answer.choices)
    stream = await client.chat.completions.create(model="answer", messages=HELLO, n=2, stream=True)
    chunks = [chunk async for chunk in stream]
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}
    assert sum(chunk.usage is not None for chunk in chunks) == 1
    assert sum(chunk.choices[0].finish_reason == "stop" for chunk in chunks) == 2


async def test_structured_output(client: AsyncOpenAI) -> None:
    class Answer(BaseModel):
        city: str
        degrees: float

    parsed = await client.chat.completions.parse(model="answer", messages=HELLO, response_format=Answer)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


@pytest.mark.parametrize(
    ("script", "error", "status"),
    [
        ("error-400", openai.BadRequestError, 400),
        ("error-401", openai.InternalServerError, 502),
        ("error-404", openai.NotFoundError, 404),
        ("error-409", openai.ConflictError, 409),
        ("error-422", openai.UnprocessableEntityError, 422),
        ("error-429", openai.RateLimitError, 429),
        ("error-500", openai.InternalServerError, 502),
        ("error-503", openai.InternalServerError, 503),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_the_right_class(
    client: AsyncOpenAI, script: str, error: type[openai.APIStatusError], status: int, stream: bool
) -> None:
    with pytest.raises(error) as caught:
        await client.chat.completions.create(model=script, messages=HELLO, stream=stream)
    assert caught.value.status_code == status
    assert caught.value.request_id is not None
    assert caught.value.request_id.startswith("req_")


async def test_an_error_in_mid_stream_is_raised_with_its_text(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="error-mid-stream", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError) as caught:
        async for _ in stream:
            pass
    assert not isinstance(caught.value, openai.APIStatusError)
    assert caught.value.message


async def test_the_sdk_retries_what_the_gateway_says_it_may(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="any", max_retries=2) as sdk:
        await sdk.chat.completions.create(model="fail-once-429", messages=HELLO, user="patient")
        with pytest.raises(openai.InternalServerError):
            await sdk.chat.completions.create(model="error-500", messages=HELLO, user="hopeless")
    assert len(upstream.of("patient")) == 2
    assert len(upstream.of("hopeless")) == 2  # the gateway's own second try; then `x-should-retry: false`


async def test_a_failure_before_the_first_chunk_is_hidden_by_the_gateways_own_second_try(
    client: AsyncOpenAI, gateway: GatewayProcess
) -> None:
    raw = await client.chat.completions.with_raw_response.create(model="fail-once", messages=HELLO, user="u")
    rows = gateway.query(
        f"SELECT * FROM usage_view WHERE request_id = '{raw.headers['x-request-id']}' ORDER BY attempt"
    )
    assert [(row["attempt"], row["status"], bool(row["charged"])) for row in rows] == [
        (1, "error", False),
        (2, "ok", True),
    ]


async def test_leaving_in_mid_stream_is_recorded_with_exact_usage(
    client: AsyncOpenAI, gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    script = '{"script": "answer", "words": 40, "delay": 0.005}'
    stream = await client.chat.completions.create(
        model="answer", messages=[{"role": "user", "content": script}], stream=True
    )
    async for _ in stream:
        break
    await stream.close()
    record = (await upstream.settled())[0]
    row = await _row(gateway)
    assert record.usage is not None
    assert row["status"] == row["finish_reason"] == "client_disconnected"
    assert (row["input_tokens"], row["output_tokens"]) == (record.usage.prompt, record.usage.completion)
    assert row["counted_by"] == "upstream"


async def test_a_conversation_goes_on_by_its_id(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    first = await client.chat.completions.create(
        model="answer", messages=[{"role": "user", "content": "My name is Ada"}]
    )
    assert first.model_extra is not None
    await client.chat.completions.create(
        model="answer",
        messages=[{"role": "user", "content": "What is my name?"}],
        extra_body={"conversation_id": first.model_extra["conversation_id"]},
    )
    sent = upstream.tally[-1].request
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "user"]
    assert sent["messages"][0] == {"role": "user", "content": "My name is Ada"}
    assert sent["messages"][1]["content"] == first.choices[0].message.content
    assert "conversation_id" not in sent


async def _row(gateway: GatewayProcess) -> dict[str, object]:
    """The one usage row, once it is there."""
    while not (rows := gateway.query("SELECT * FROM usage_view")):
        await asyncio.sleep(0.02)
    assert len(rows) == 1
    return rows[0]

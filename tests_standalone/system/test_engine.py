"""A real inference engine behind the gateway, official SDKs in front. What it says is checked by counting: one word of
the engine's is one token."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionMessageParam

from tests_standalone.support.engine import ANSWER_TOKENS, CONTEXT_TOKENS, DIMENSIONS, TinyEngine
from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.node import run_node
from tests_standalone.system.conftest import PRICE

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello there"}]
SAME_EACH_TIME: dict[str, Any] = {"temperature": 0, "seed": 1, "extra_body": {"cache_prompt": False}}
ENDLESS = CONTEXT_TOKENS - 1000


@pytest.fixture(scope="module")
def engine() -> Iterator[TinyEngine]:
    with TinyEngine() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(engine: TinyEngine) -> Iterator[GatewayProcess]:
    backend = {"type": "openai", "base_url": engine.base_url, "api_key": engine.api_key}
    tiny = {"backend": "engine", "model": "tiny", "price": PRICE}
    models = {"tiny": tiny, "tiny-cancel": {**tiny, "on_disconnect": "cancel"}}
    with GatewayProcess({"backends": {"engine": backend}, "models": models}) as running:
        yield running


@pytest.fixture
async def client(gateway: GatewayProcess) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="any", max_retries=0) as sdk:
        yield sdk


async def booked(gateway: GatewayProcess, column: str, value: str) -> dict[str, Any]:
    """The one usage row of a call, as soon as it is there."""
    while True:
        rows = await asyncio.to_thread(gateway.query, f"SELECT * FROM usage_rows WHERE {column} = '{value}'")
        if rows:
            assert len(rows) == 1
            return rows[0]
        await asyncio.sleep(0.05)


def check(row: dict[str, Any], usage: CompletionUsage | None) -> None:
    """The row says what the client saw, and what that costs."""
    assert usage is not None
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    counted = (row["input_tokens"], row["cached_tokens"], row["output_tokens"])
    assert counted == (usage.prompt_tokens, cached, usage.completion_tokens)
    assert row["counted_by"] == "upstream"
    assert row["cost_nanousd"] == nano_dollars(row)
    assert usage.model_extra == {"cost": row["cost_nanousd"] / 1e9}


def nano_dollars(row: dict[str, Any]) -> int:
    """`PRICE`, for a million tokens in dollars, is so many thousand nano-dollars for one."""
    cached: int = row["cached_tokens"]
    fresh: int = row["input_tokens"] - cached
    said: int = row["output_tokens"]
    return fresh * 2000 + cached * 1000 + said * 8000


class TestPythonSDK:
    async def test_a_whole_answer(self, client: AsyncOpenAI, gateway: GatewayProcess, engine: TinyEngine) -> None:
        raw = await client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO, **SAME_EACH_TIME)
        answer = raw.parse()
        words = answer.choices[0].message.content.split()
        assert len(words) == answer.usage.completion_tokens == ANSWER_TOKENS
        assert answer.choices[0].finish_reason == "length"
        assert answer.model_extra["timings"]["predicted_n"] == ANSWER_TOKENS
        check(await booked(gateway, "request_id", raw.headers["x-request-id"]), answer.usage)
        async with AsyncOpenAI(base_url=engine.base_url, api_key=engine.api_key, max_retries=0) as direct:
            same = await direct.chat.completions.create(model="tiny", messages=HELLO, **SAME_EACH_TIME)
        assert same.choices[0].message.content == answer.choices[0].message.content
        assert same.usage.prompt_tokens == answer.usage.prompt_tokens

    @pytest.mark.parametrize("asked", [True, False])
    async def test_a_stream(self, client: AsyncOpenAI, gateway: GatewayProcess, asked: bool) -> None:
        options: dict[str, Any] = {"stream_options": {"include_usage": True}} if asked else {}
        raw = await client.chat.completions.with_raw_response.create(
            model="tiny", messages=HELLO, max_tokens=25, stream=True, **options
        )
        chunks = [chunk async for chunk in raw.parse()]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        usage = chunks[-1].usage
        assert len(text.split()) == usage.completion_tokens == 25
        assert bool(chunks[-1].choices) is not asked
        row = await booked(gateway, "request_id", raw.headers["x-request-id"])
        check(row, usage)
        assert (row["stream"], row["finish_reason"]) == (1, "length")

    async def test_a_stop_word_ends_the_answer(self, client: AsyncOpenAI) -> None:
        options = {"model": "tiny", "messages": HELLO, **SAME_EACH_TIME}
        whole = await client.chat.completions.create(**options)
        words = whole.choices[0].message.content.split(" ")
        assert words[0] == ""  # the first word brings its space, too
        first = words.index(words[10])
        cut = await client.chat.completions.create(**options, stop=[words[10]])
        assert cut.choices[0].finish_reason == "stop"
        assert cut.choices[0].message.content.split(" ")[:first] == words[:first]
        assert cut.usage.completion_tokens == first

    async def test_the_older_completions(self, client: AsyncOpenAI, gateway: GatewayProcess) -> None:
        raw = await client.completions.with_raw_response.create(model="tiny", prompt="Hello there", max_tokens=12)
        answer = raw.parse()
        assert answer.usage is not None
        assert len(answer.choices[0].text.split()) == answer.usage.completion_tokens == 12
        check(await booked(gateway, "request_id", raw.headers["x-request-id"]), answer.usage)

    async def test_a_conversation_is_carried_on(self, client: AsyncOpenAI, gateway: GatewayProcess) -> None:
        first = await client.chat.completions.create(model="tiny", messages=HELLO)
        extra = {"conversation_id": (first.model_extra or {})["conversation_id"]}
        second = await client.chat.completions.create(model="tiny", messages=HELLO, extra_body=extra)
        assert first.usage is not None
        assert second.usage is not None
        assert second.usage.prompt_tokens > first.usage.total_tokens
        assert second.usage.prompt_tokens_details is not None
        assert second.usage.prompt_tokens_details.cached_tokens  # the engine has not forgotten the first turn
        check(await booked(gateway, "request_id", second._request_id or ""), second.usage)

    async def test_what_the_engine_refuses_is_the_clients_error(self, client: AsyncOpenAI) -> None:
        too_long: list[ChatCompletionMessageParam] = [{"role": "user", "content": "x" * 2 * CONTEXT_TOKENS}]
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=str(CONTEXT_TOKENS)):
                await client.chat.completions.create(model="tiny", messages=too_long, stream=stream)


class TestNodeSDK:
    async def test_a_whole_answer(self, gateway: GatewayProcess) -> None:
        answer = await self._sdk(gateway, "chat")
        usage = CompletionUsage.model_validate(answer["completion"]["usage"])
        content = answer["completion"]["choices"][0]["message"]["content"]
        assert len(content.split()) == usage.completion_tokens == ANSWER_TOKENS
        check(await booked(gateway, "request_id", answer["request_id"]), usage)

    @pytest.mark.parametrize("command", ["stream", "stream-usage"])
    async def test_a_stream(self, gateway: GatewayProcess, command: str) -> None:
        answer = await self._sdk(gateway, command)
        last = answer["chunks"][-1]
        usage = CompletionUsage.model_validate(last["usage"])
        assert len(answer["content"].split()) == usage.completion_tokens == ANSWER_TOKENS
        check(await booked(gateway, "conversation_id", last["conversation_id"]), usage)

    @staticmethod
    async def _sdk(gateway: GatewayProcess, command: str) -> dict[str, Any]:
        environment = {"BASE_URL": gateway.base_url, "API_KEY": "any"}
        done = await asyncio.to_thread(run_node, "sdk.mjs", command, "tiny", env=environment)
        assert done.returncode == 0, done.stderr
        printed: dict[str, Any] = json.loads(done.stdout)
        return printed


class TestEmbeddings:
    async def test_floats_and_base64_are_the_same_numbers(self, client: AsyncOpenAI) -> None:
        texts = ["hello", "something else"]
        kinds: tuple[dict[str, Any], ...] = ({}, {"encoding_format": "float"}, {"encoding_format": "base64"})
        decoded, floats, encoded = [
            [entry.embedding for entry in (await client.embeddings.create(model="tiny", input=texts, **kind)).data]
            for kind in kinds
        ]
        unpacked = [struct.unpack(f"<{DIMENSIONS}f", base64.b64decode(text)) for text in encoded]  # type: ignore[arg-type] # it is text
        for vectors in (decoded, unpacked):
            for vector, expected in zip(vectors, floats, strict=True):
                assert list(vector) == pytest.approx(expected, abs=1e-6)
        assert floats[0] != floats[1]
        assert [sum(number**2 for number in vector) for vector in floats] == pytest.approx([1, 1], abs=1e-5)

    async def test_usage_and_cost_are_recorded(self, client: AsyncOpenAI, gateway: GatewayProcess) -> None:
        raw = await client.embeddings.with_raw_response.create(model="tiny", input=["hello", "hello there"])
        told = raw.parse().usage
        row = await booked(gateway, "request_id", raw.headers["x-request-id"])
        assert told.prompt_tokens == told.total_tokens > 2
        assert (row["input_tokens"], row["output_tokens"]) == (told.prompt_tokens, 0)
        assert (row["counted_by"], row["status"]) == ("upstream", "ok")
        assert row["cost_nanousd"] == nano_dollars(row)
        assert float(raw.headers["x-gateway-cost"]) == row["cost_nanousd"] / 1e9


class TestAClientThatLeaves:
    async def test_the_engine_stops_where_the_policy_is_cancel(
        self, client: AsyncOpenAI, gateway: GatewayProcess, engine: TinyEngine
    ) -> None:
        before = await asyncio.to_thread(engine.steps)
        request_id = await self._leave(client, "tiny-cancel", ENDLESS)
        while await asyncio.to_thread(engine.busy):
            await asyncio.sleep(0.05)
        assert await asyncio.to_thread(engine.steps) - before < ENDLESS
        row = await booked(gateway, "request_id", request_id)
        assert (row["status"], row["finish_reason"]) == ("client_disconnected", "client_disconnected")
        assert (row["ended_by"], row["counted_by"]) == ("cancel", "gateway")
        assert row["cost_nanousd"] == nano_dollars(row) > 0

    async def test_what_is_left_is_counted_where_the_policy_is_drain(
        self, client: AsyncOpenAI, gateway: GatewayProcess
    ) -> None:
        row = await booked(gateway, "request_id", await self._leave(client, "tiny", 1200))
        assert (row["counted_by"], row["output_tokens"]) == ("upstream", 1200)
        assert row["cost_nanousd"] == nano_dollars(row)

    @staticmethod
    async def _leave(client: AsyncOpenAI, model: str, most: int) -> str:
        """After two words. The id of the request."""
        raw = await client.chat.completions.with_raw_response.create(
            model=model, messages=HELLO, max_tokens=most, stream=True
        )
        stream = raw.parse()
        heard = ""
        async for chunk in stream:
            heard += chunk.choices[0].delta.content or ""
            if len(heard.split()) >= 2:
                break
        await stream.close()
        request_id: str = raw.headers["x-request-id"]
        return request_id

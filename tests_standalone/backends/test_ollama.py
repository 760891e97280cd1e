"""Ollama by example: the translator without a network, the backend against a scripted Ollama on a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.backends.base import Loadable, LoadState, ModelInfo, Operator, operations_of
from gateway.backends.client import HTTPTransport
from gateway.backends.ollama import OllamaBackend
from gateway.backends.ollama_wire import OllamaTranslator
from gateway.backends.transport import Timeouts
from gateway.errors import BadRequest, UpstreamError
from gateway.wire import WireError
from gateway.wire.assemble import Assembler
from gateway.wire.chat import ChatRequest, Chunk, CompletionRequest
from gateway.wire.operation import COMPLETIONS, EMBEDDINGS, OperationRequest
from tests_standalone.support.ollama import ScriptedOllama

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


def chat(model: str = "llama3.1:8b", content: Any = "Hello there", **fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": content}]
    return ChatRequest.parse(json.dumps({"model": model, "messages": messages, **fields}).encode())


def embed(**fields: Any) -> OperationRequest:
    return OperationRequest.parse(EMBEDDINGS, "application/json", json.dumps({"model": "embedder", **fields}).encode())


class TestTranslator:
    def test_whole(self) -> None:
        sent = OllamaTranslator("secret").request(chat())
        assert (sent.method, sent.path) == ("POST", "/api/chat")
        assert sent.headers == {
            "content-type": "application/json",
            "accept-encoding": "identity",
            "authorization": "Bearer secret",
            "accept": "application/json",
        }
        assert json.loads(sent.body or b"") == {
            "model": "llama3.1:8b",
            "messages": [{"role": "user", "content": "Hello there"}],
            "stream": False,
        }

    def test_streamed(self) -> None:
        sent = OllamaTranslator().request(chat(stream=True))
        assert sent.headers["accept"] == "application/x-ndjson"
        assert "authorization" not in sent.headers

    @pytest.mark.parametrize(
        ("keep_alive", "sent"),
        [("5m", "5m"), ("300", 300), ("-1", -1), (-1, -1), (0, 0), ("0", 0), ("24h", "24h")],
    )
    def test_keep_alive(self, keep_alive: str | int, sent: str | int) -> None:
        body = OllamaTranslator(keep_alive=keep_alive).request(chat()).body
        assert json.loads(body or b"")["keep_alive"] == sent

    def test_num_ctx_beats_the_options(self) -> None:
        body = OllamaTranslator(num_ctx=8192, options={"num_ctx": 1, "top_k": 2}).request(chat()).body
        assert json.loads(body or b"")["options"] == {"num_ctx": 8192, "top_k": 2}

    def test_older_completions(self) -> None:
        request = CompletionRequest.parse(b'{"model":"m","prompt":"Once","stream":true}')
        sent = OllamaTranslator().request(request)
        assert sent.path == "/api/generate"
        assert json.loads(sent.body or b"") == {"model": "m", "prompt": "Once", "stream": True}

    @pytest.mark.parametrize(
        ("entries", "models"),
        [
            ([], []),
            (
                [{"name": "llama3.1:8b", "modified_at": "2025-05-04T17:37:44.706015396-07:00"}, {"name": "b"}],
                [ModelInfo("llama3.1:8b", 1746405464, "ollama"), ModelInfo("b", None, "ollama")],
            ),
            ([None, {}, {"name": 5}, {"name": "a", "modified_at": "x"}], [ModelInfo("a", None, "ollama")]),
        ],
    )
    def test_models(self, entries: list[Any], models: list[ModelInfo]) -> None:
        assert OllamaTranslator().models(json.dumps({"models": entries}).encode()) == models

    @pytest.mark.parametrize("body", [b"", b"Ollama is running", b"[]", b"{}", b'{"models":null}'])
    def test_no_models(self, body: bytes) -> None:
        with pytest.raises(WireError):
            OllamaTranslator().models(body)

    @pytest.mark.parametrize(
        ("entry", "state"),
        [
            (
                {"expires_at": "2026-03-01T12:05:00.5+00:00", "size": 6, "size_vram": 5, "context_length": 4096},
                LoadState("loaded", 1772366700500, 5, 4096),
            ),
            ({"expires_at": "0001-01-01T00:00:00Z", "size": 6, "size_vram": 0}, LoadState("loaded", None, 6, None)),
            ({}, LoadState("loaded")),
        ],
    )
    def test_load_states(self, entry: dict[str, Any], state: LoadState) -> None:
        body = json.dumps({"models": [{"name": "m:latest", **entry}]}).encode()
        assert OllamaTranslator().load_states(body) == {"m:latest": state}

    @pytest.mark.parametrize(
        ("status", "body", "seen", "code", "message"),
        [
            (404, b'{"error":"model \'x\' not found"}', 404, "model_not_found", "model 'x' not found"),
            (404, b"404 page not found", 404, None, "The upstream refused the request with status 404."),
            (
                400,
                b'{"error":"the input length exceeds the context length"}',
                400,
                "context_length_exceeded",
                "the input length exceeds the context length",
            ),
            (400, b'{"error":"x does not support tools"}', 400, None, "x does not support tools"),
            (401, b'{"error":"unauthorized","signin_url":"https://x"}', 502, "upstream_error", "operator"),
            (500, b'{"error":"/home/me/.ollama broke"}', 502, "upstream_error", "status 500"),
            (503, b'{"error":"server busy"}', 503, "upstream_error", "overloaded"),
        ],
    )
    def test_errors(self, status: int, body: bytes, seen: int, code: str | None, message: str) -> None:
        failure = OllamaTranslator().error(status, {}, body)
        assert (failure.status, failure.code, failure.upstream_status) == (seen, code, status)
        assert message in failure.message
        assert "/home" not in failure.message


@pytest.fixture
async def ollama() -> AsyncIterator[ScriptedOllama]:
    async with ScriptedOllama() as server:
        yield server


@pytest.fixture
async def backend(ollama: ScriptedOllama) -> AsyncIterator[OllamaBackend]:
    transport = HTTPTransport()
    yield OllamaBackend("ollama", ollama.root_url, OllamaTranslator(num_ctx=8192), transport)
    await transport.aclose()


async def streamed(backend: OllamaBackend, request: ChatRequest) -> tuple[list[Chunk], bool]:
    stream = await backend.stream(request)
    chunks: list[Chunk] = []
    try:
        while read := await stream.read():
            chunks += read
    finally:
        await stream.close()
    return chunks, stream.complete


def assembled(chunks: list[Chunk]) -> Assembler:
    answer = Assembler()
    for chunk in chunks:
        answer.add(chunk.data["choices"])
    return answer


class TestChat:
    async def test_whole(self, backend: OllamaBackend, ollama: ScriptedOllama) -> None:
        data = (await backend.complete(chat(max_tokens=100))).data
        assert data["choices"][0]["message"]["content"] == "You said: Hello there"
        assert data["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
        assert data["timings"]["load_ms"] == 1500
        assert ollama.last["options"] == {"num_ctx": 8192, "num_predict": 100}

    @pytest.mark.parametrize("model", ["llama3.1:8b", "odd", "thinker", "tools", "parallel-tools", "length"])
    async def test_a_stream_says_what_a_whole_reply_says(self, backend: OllamaBackend, model: str) -> None:
        whole = (await backend.complete(chat(model, tools=[WEATHER]))).data
        chunks, complete = await streamed(backend, chat(model, tools=[WEATHER], stream=True))
        assert complete
        message = whole["choices"][0]["message"]
        assert assembled(chunks).message() == {key: message[key] for key in message if key != "refusal"}
        assert assembled(chunks).finish_reasons == {0: whole["choices"][0]["finish_reason"]}
        assert chunks[-1].data["usage"] == whole["usage"]
        assert chunks[-1].data["timings"] == whole["timings"]

    async def test_the_connection_is_used_again_after_a_stream(
        self, backend: OllamaBackend, ollama: ScriptedOllama
    ) -> None:
        for _ in range(3):
            assert (await streamed(backend, chat(stream=True)))[1]
            while backend._ending:
                await asyncio.sleep(0)
        assert {seen.connection for seen in ollama.tally} == {1}

    async def test_a_tool_round_trip(self, backend: OllamaBackend, ollama: ScriptedOllama) -> None:
        first = (await backend.complete(chat("tools-without-ids", "Weather in Paris?", tools=[WEATHER]))).data
        said = first["choices"][0]["message"]
        assert first["choices"][0]["finish_reason"] == "tool_calls"
        assert json.loads(said["tool_calls"][0]["function"]["arguments"]) == {"city": "Paris", "days": 2, "exact": True}
        call_id = said["tool_calls"][0]["id"]
        messages = [
            {"role": "user", "content": "Weather in Paris?"},
            said,
            {"role": "tool", "tool_call_id": call_id, "content": "Sunny"},
        ]
        second = (await backend.complete(chat("tools-without-ids", tools=[WEATHER], messages=messages))).data
        assert second["choices"][0]["message"]["content"] == "You said: Sunny"
        called, answered = ollama.last["messages"][1:]
        assert called["tool_calls"][0]["function"]["arguments"] == {"city": "Paris", "days": 2, "exact": True}
        assert answered == {
            "role": "tool",
            "content": "Sunny",
            "tool_name": "get_weather",
            "tool_call_id": call_id,
        }

    async def test_images(self, backend: OllamaBackend, ollama: ScriptedOllama) -> None:
        parts = [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
        ]
        data = (await backend.complete(chat(content=parts))).data
        assert data["usage"]["prompt_tokens"] == 3 + 85
        assert ollama.last["messages"][0]["images"] == [PIXEL]

    async def test_thinking_can_be_turned_off(self, backend: OllamaBackend) -> None:
        thought = (await backend.complete(chat("thinker", reasoning_effort="high"))).data["choices"][0]["message"]
        plain = (await backend.complete(chat("thinker", reasoning_effort="none"))).data["choices"][0]["message"]
        assert thought["reasoning_content"] == "First I think. "
        assert "reasoning_content" not in plain
        assert thought["content"] == plain["content"] == "Then I answer."

    async def test_a_schema(self, backend: OllamaBackend) -> None:
        schema = {"type": "object", "properties": {"city": {"type": "string"}, "degrees": {"type": "number"}}}
        wanted = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}}
        data = (await backend.complete(chat(response_format=wanted))).data
        assert json.loads(data["choices"][0]["message"]["content"]) == {"city": "Paris", "degrees": 1.5}

    async def test_logprobs(self, backend: OllamaBackend) -> None:
        data = (await backend.complete(chat(logprobs=True, top_logprobs=1))).data
        found = data["choices"][0]["logprobs"]["content"]
        assert "".join(token["token"] for token in found) == "You said: Hello there"
        assert all(len(token["top_logprobs"]) == 1 for token in found)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_model_that_does_not_count_leaves_usage_out(self, backend: OllamaBackend, stream: bool) -> None:
        request = chat("no-counts", stream=stream)
        said = (await streamed(backend, request))[0] if stream else [await backend.complete(request)]
        assert not any("usage" in part.data for part in said)
        assert said[-1].data["choices"][0]["finish_reason"] == "stop"

    async def test_a_cold_load_is_waited_for(self, backend: OllamaBackend, ollama: ScriptedOllama) -> None:
        assert ollama.loaded == {}
        assert (await streamed(backend, chat("cold", stream=True)))[1]
        assert list(ollama.loaded) == ["cold:latest"]


class TestFailure:
    @pytest.mark.parametrize(
        ("model", "status", "code"),
        [
            ("nobody:7b", 404, "model_not_found"),
            ("error-400", 400, "context_length_exceeded"),
            ("error-401", 502, "upstream_error"),
            ("error-500", 502, "upstream_error"),
            ("queue-full", 503, "upstream_error"),
            ("embedder", 400, None),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    async def test_before_the_answer(
        self, backend: OllamaBackend, model: str, status: int, code: str | None, stream: bool
    ) -> None:
        with pytest.raises(UpstreamError) as caught:
            await (backend.stream(chat(model, stream=True)) if stream else backend.complete(chat(model)))
        assert (caught.value.status, caught.value.code) == (status, code)

    async def test_tools_that_a_model_cannot_use(self, backend: OllamaBackend) -> None:
        with pytest.raises(UpstreamError, match="does not support tools") as caught:
            await backend.complete(chat("no-tools", tools=[WEATHER]))
        assert caught.value.status == 400

    async def test_an_error_line(self, backend: OllamaBackend) -> None:
        chunks, complete = await streamed(backend, chat("error-mid-stream", stream=True))
        assert chunks[-1].data == {"error": "an error was encountered while running the model"}
        assert not complete

    async def test_an_end_without_done(self, backend: OllamaBackend) -> None:
        chunks, complete = await streamed(backend, chat("no-done", stream=True))
        assert len(chunks) == 3
        assert not complete

    @pytest.mark.parametrize("model", ["cut", "garbage"])
    async def test_a_stream_that_breaks(self, backend: OllamaBackend, model: str) -> None:
        with pytest.raises(UpstreamError):
            await streamed(backend, chat(model, stream=True))

    async def test_a_request_that_cannot_be_translated_is_not_sent(
        self, backend: OllamaBackend, ollama: ScriptedOllama
    ) -> None:
        with pytest.raises(BadRequest):
            await backend.complete(chat(n=2))
        assert ollama.tally == []

    async def test_closing_a_stream_closes_the_connection(self, backend: OllamaBackend, ollama: ScriptedOllama) -> None:
        stream = await backend.stream(chat("hang", stream=True))
        assert await stream.read()
        await stream.close()
        await ollama.until(lambda tally: tally[0].outcome is not None)
        assert ollama.disconnects == 1

    async def test_a_silence_is_a_timeout(self, ollama: ScriptedOllama) -> None:
        transport = HTTPTransport()
        backend = OllamaBackend(
            "ollama", ollama.root_url, OllamaTranslator(), transport, timeouts=Timeouts(first_byte=0.1)
        )
        with pytest.raises(UpstreamError) as caught:
            await backend.stream(chat("cold", stream=True))
        assert caught.value.status == 504
        await transport.aclose()


class TestOperations:
    def test_which(self, backend: OllamaBackend) -> None:
        assert isinstance(backend, Operator)
        assert operations_of(backend) == {"chat/completions", COMPLETIONS, EMBEDDINGS}

    async def test_older_completions(self, backend: OllamaBackend) -> None:
        fields = {"model": "llama3.1:8b", "prompt": "def f():", "suffix": "return 1"}
        whole = await backend.complete(CompletionRequest.parse(json.dumps(fields).encode()))
        assert whole.data["object"] == "text_completion"
        assert whole.data["choices"][0]["text"] == "Continuing: def f(): ... return 1"
        request = CompletionRequest.parse(json.dumps({**fields, "stream": True}).encode())
        chunks, complete = await streamed(backend, request)
        assert complete
        texts = [choice["text"] for chunk in chunks for choice in chunk.data["choices"]]
        assert "".join(texts) == whole.data["choices"][0]["text"]
        assert chunks[-1].data["usage"] == whole.data["usage"]

    @pytest.mark.parametrize(
        ("encoding", "vectors"),
        [("float", [[0.125, 0.25], [0.25, 0.375]]), ("base64", ["AAAAPgAAgD4=", "AACAPgAAwD4="])],
    )
    async def test_embeddings(self, backend: OllamaBackend, encoding: str, vectors: list[Any]) -> None:
        reply = await backend.operate(embed(input=["a", "bc"], dimensions=2, encoding_format=encoding))
        assert reply.content_type == "application/json"
        data = json.loads(await reply.read())
        await reply.close()
        assert [entry["embedding"] for entry in data["data"]] == vectors
        assert data["usage"] == {"prompt_tokens": 2, "total_tokens": 2}

    async def test_embeddings_of_tokens(self, backend: OllamaBackend) -> None:
        with pytest.raises(BadRequest, match="no arrays of tokens"):
            await backend.operate(embed(input=[1, 2]))


class TestModels:
    async def test_listed(self, backend: OllamaBackend) -> None:
        found = {model.id: model for model in await backend.models()}
        assert found["llama3.1:8b"] == ModelInfo("llama3.1:8b", 1746405464, "ollama")

    async def test_loaded_and_unloaded(self, backend: OllamaBackend, ollama: ScriptedOllama) -> None:
        assert isinstance(backend, Loadable)
        assert await backend.load_states() == {}
        state = LoadState("loaded", expires_at=1772366700500, memory_bytes=5_000_000_000, context_length=8192)
        assert await backend.load("cold") == state
        assert await backend.load_states() == {"cold:latest": state}
        assert await backend.unload("cold") == LoadState("unloaded")
        assert await backend.load_states() == {}

    async def test_a_loaded_model_is_not_loaded_again_by_the_first_call(
        self, backend: OllamaBackend, ollama: ScriptedOllama
    ) -> None:
        await backend.load("cold")
        await backend.complete(chat("cold"))
        assert ollama.loads == ["cold:latest"]
        await backend.complete(chat("cold", num_ctx=4096))
        assert ollama.loads == ["cold:latest"] * 2

    async def test_a_model_that_only_embeds(self, backend: OllamaBackend, ollama: ScriptedOllama) -> None:
        assert (await backend.load("embedder")).state == "loaded"
        assert list(ollama.loaded) == ["embedder:latest"]
        await backend.unload("embedder")
        assert ollama.loaded == {}

    @pytest.mark.parametrize(("model", "status"), [("nobody", 404), ("error-500", 502), ("error-400", 400)])
    async def test_what_cannot_be_loaded(self, backend: OllamaBackend, model: str, status: int) -> None:
        with pytest.raises(UpstreamError) as caught:
            await backend.load(model)
        assert caught.value.status == status

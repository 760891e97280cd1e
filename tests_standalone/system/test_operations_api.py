"""Everything that is not chat, with the official SDK in front of a scripted upstream: what comes back, and its row."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Mapping
from typing import Any

import openai
import pytest
from openai import AsyncAzureOpenAI, AsyncOpenAI

from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.support.upstream_operations import PICTURE, SOUND, vector
from tests_standalone.system.conftest import PRICE, Start, in_front_of
from tests_standalone.system.http import call

NAMES = ("text", "vectors", "judge", "painter", "speaker", "listener")


@pytest.fixture
async def gateway(upstream: ScriptedUpstream, start: Start, database_url: str) -> GatewayProcess:
    models = {name: {"backend": "up", "model": f"up-{name}", "price": PRICE} for name in NAMES}
    models["broken"] = {"routes": [{"backend": "up", "model": "error-503"}], "fallbacks": ["vectors"]}
    return await start(in_front_of(upstream, database_url, models=models))


@pytest.fixture
async def client(gateway: GatewayProcess) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="any", max_retries=0) as sdk:
        yield sdk


async def usage_rows(gateway: GatewayProcess) -> list[dict[str, Any]]:
    return await asyncio.to_thread(gateway.query, "SELECT * FROM usage_view ORDER BY created_at, attempt")


def dollars(tokens_in: int, tokens_out: int = 0) -> float:
    return (tokens_in * PRICE["input"] + tokens_out * PRICE["output"]) / 1e6


async def only_row(gateway: GatewayProcess, **expected: Any) -> Mapping[str, Any]:
    (row,) = await usage_rows(gateway)
    assert {key: row[key] for key in expected} == expected
    return row


async def test_embeddings_as_the_sdk_asks_for_them(
    client: AsyncOpenAI, gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    raw = await client.embeddings.with_raw_response.create(model="vectors", input=["one two", "three"])
    answer = raw.parse()
    assert [entry.embedding for entry in answer.data] == [vector("one two"), vector("three")]
    assert answer.usage.prompt_tokens == 3
    assert upstream.tally[0].request == {
        "input": ["one two", "three"], "model": "up-vectors", "encoding_format": "base64"
    }  # fmt: skip
    assert float(raw.headers["x-gateway-cost"]) == dollars(3)
    row = await only_row(gateway, model="vectors", upstream_model="up-vectors", input_tokens=3, output_tokens=0)
    assert (row["counted_by"], row["status"], row["charged"]) == ("upstream", "ok", True)
    assert float(row["cost_usd"]) == dollars(3)
    assert row["request_id"] == raw.headers["x-request-id"]


async def test_embeddings_as_numbers(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    numbers = await client.embeddings.create(model="vectors", input="a b", encoding_format="float")
    assert numbers.data[0].embedding == vector("a b")
    assert upstream.tally[-1].request["encoding_format"] == "float"


async def test_dimensions_and_tokens_pass(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    answer = await client.embeddings.create(model="vectors", input=[[1, 2, 3], [4]], dimensions=4)
    assert [len(entry.embedding) for entry in answer.data] == [4, 4]
    assert upstream.tally[0].request["input"] == [[1, 2, 3], [4]]


async def test_moderations_without_a_model(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="any", max_retries=0) as client:
        answer = await client.moderations.create(input=["a bad word", "a good one"])
    assert [result.flagged for result in answer.results] == [True, False]
    assert upstream.tally[0].request == {"input": ["a bad word", "a good one"]}
    row = await only_row(gateway, model="omni-moderation-latest", output_tokens=0, counted_by="gateway")
    assert row["cost_usd"] is None


async def test_a_picture(client: AsyncOpenAI, gateway: GatewayProcess) -> None:
    answer = await client.images.generate(model="painter", prompt="A cat")
    assert answer.data is not None
    assert base64.b64decode(answer.data[0].b64_json or "") == PICTURE
    row = await only_row(gateway, input_tokens=10, output_tokens=100)
    assert float(row["cost_usd"]) == dollars(10, 100)


async def test_a_picture_in_events(client: AsyncOpenAI, gateway: GatewayProcess) -> None:
    stream = await client.images.generate(model="painter", prompt="A cat", stream=True, partial_images=1)
    events = [event async for event in stream]
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    await only_row(gateway, input_tokens=10, output_tokens=100, counted_by="upstream", stream=True)


async def test_a_form_with_files_gets_the_upstreams_model_name(
    client: AsyncOpenAI, gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    pictures = [("a.png", PICTURE), ("b.png", PICTURE + b"\r\n--not-the-boundary\r\n")]
    answer = await client.images.edit(model="painter", image=pictures, prompt="Füge eine Katze hinzu")
    assert answer.usage is not None
    body = upstream.tally[0].body
    assert upstream.tally[0].model == "up-painter"
    assert all(file in body for _, file in pictures)
    assert "Füge eine Katze hinzu".encode() in body


async def test_a_form_without_a_model_passes_as_it_is(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    with pytest.warns(DeprecationWarning, match="deprecated"):
        await client.images.create_variation(image=("a.png", PICTURE))
    assert upstream.tally[0].model is None


async def test_speech_is_passed_on_as_it_comes(client: AsyncOpenAI, gateway: GatewayProcess) -> None:
    async with client.audio.speech.with_streaming_response.create(
        model="speaker", voice="alloy", input="say these words"
    ) as answer:
        assert answer.headers["content-type"] == "audio/mpeg"
        assert await answer.read() == SOUND
    row = await only_row(gateway, model="speaker", counted_by="gateway", output_tokens=0)
    assert row["cost_usd"] is None, "nobody said what the sound cost"
    assert not row["price_unknown"]


@pytest.mark.parametrize(("form", "expected"), [("json", "a.wav has 5 bytes"), ("text", "a.wav has 5 bytes\n")])
async def test_a_transcript(client: AsyncOpenAI, gateway: GatewayProcess, form: Any, expected: str) -> None:
    answer = await client.audio.transcriptions.create(model="listener", file=("a.wav", b"RIFF."), response_format=form)
    assert (answer if isinstance(answer, str) else answer.text) == expected


async def test_a_transcript_in_events(client: AsyncOpenAI, gateway: GatewayProcess) -> None:
    stream = await client.audio.transcriptions.create(model="listener", file=("a.wav", b"RIFF."), stream=True)
    assert [event.type async for event in stream][-1] == "transcript.text.done"
    row = await only_row(gateway, input_tokens=7, output_tokens=4, counted_by="upstream")
    assert float(row["cost_usd"]) == dollars(7, 4)


@pytest.mark.parametrize("asked", [True, False])
async def test_the_older_completions_in_a_stream(client: AsyncOpenAI, gateway: GatewayProcess, asked: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if asked else {}
    stream = await client.completions.create(model="text", prompt="one two three", stream=True, **options)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "one two three"
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 6
    assert bool(chunks[-1].choices) is not asked
    row = await only_row(gateway, input_tokens=3, output_tokens=3, finish_reason="stop", conversation_id=None)
    assert float(row["cost_usd"]) == dollars(3, 3)


async def test_the_older_completions_whole(
    client: AsyncOpenAI, gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    """They belong to no conversation, and a field of ours is none of the upstream's."""
    options: dict[str, Any] = {"extra_body": {"conversation_id": "x"}}
    answer = await client.completions.create(model="text", prompt=["one two", "three"], **options)
    assert "conversation_id" not in upstream.tally[0].request
    assert answer.choices[0].text == "one two three"
    assert answer.usage is not None
    assert answer.usage.model_extra == {"cost": dollars(3, 3)}
    await only_row(gateway, input_tokens=3, output_tokens=3, counted_by="upstream")


async def test_a_route_that_fails_is_followed_by_the_next(client: AsyncOpenAI, gateway: GatewayProcess) -> None:
    answer = await client.embeddings.create(model="broken", input="one two")
    assert answer.data[0].embedding == vector("one two")
    rows = await usage_rows(gateway)
    assert [(row["attempt"], row["status"], row["charged"]) for row in rows] == [(1, "error", False), (2, "ok", True)]


async def test_azure_clients_find_their_paths(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    async with AsyncAzureOpenAI(azure_endpoint=gateway.root_url, api_key="any", api_version="2024-10-21") as client:
        answer = await client.embeddings.create(model="vectors", input="one")
        assert answer.data[0].embedding == vector("one")
        spoken = await client.audio.speech.create(model="speaker", voice="alloy", input="hi")
        assert spoken.content == SOUND
        painted = await client.images.generate(model="painter", prompt="A cat")
        assert painted.data is not None
    assert [record.model for record in upstream.tally] == ["up-vectors", "up-speaker", "up-painter"]


async def test_an_upstream_that_says_no(client: AsyncOpenAI, gateway: GatewayProcess) -> None:
    with pytest.raises(openai.BadRequestError):
        await client.embeddings.create(model="error-400", input="one")
    await only_row(gateway, status="error", input_tokens=0, charged=False)


async def test_a_model_that_only_chats_has_no_embeddings(start: Start) -> None:
    gateway = await start({})
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="any", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="no backend that answers /v1/embeddings"):
            await client.embeddings.create(model="echo", input="one")
    assert await usage_rows(gateway) == []


@pytest.mark.parametrize(
    ("path", "kind", "body", "status", "says"),
    [
        ("/v1/embeddings", "application/json", b'{"model":"vectors"}', 400, "'input' is missing"),
        ("/v1/embeddings", "application/json", b'{"model":"vectors","input":""}', 400, "'input' is missing"),
        ("/v1/embeddings", "application/json", b'{"model":7,"input":"a"}', 400, "'model' must be a string"),
        ("/v1/embeddings", "text/plain", b"{}", 415, "Send the body as JSON"),
        ("/v1/audio/transcriptions", "application/json", b"{}", 415, "Send the body as a form"),
        ("/v1/audio/transcriptions", "multipart/form-data", b"x", 400, "names no boundary"),
        ("/v1/audio/transcriptions", "multipart/form-data; boundary=b", b"x", 400, "does not begin"),
        ("/v1/images/generations", "application/json", b"[]", 400, "must be a JSON object"),
        ("/v1/completions", "application/json", b'{"model":"text","prompt":7}', 400, "'prompt' must be"),
    ],
)
async def test_what_no_upstream_is_asked(
    gateway: GatewayProcess, upstream: ScriptedUpstream, path: str, kind: str, body: bytes, status: int, says: str
) -> None:
    answer = await call(gateway.port, "POST", path, {"content-type": kind}, body)
    assert answer.status == status
    assert says in answer.json["error"]["message"]
    assert upstream.tally == []


async def test_speech_that_breaks_off_is_no_clean_end(gateway: GatewayProcess) -> None:
    body = {"model": "cut-fin", "voice": "alloy", "input": "hi"}
    answer = await call(gateway.port, "POST", "/v1/audio/speech", {}, body)
    assert answer.status == 200
    assert not answer.clean_end
    assert len(answer.body) < len(SOUND)
    await only_row(gateway, status="error")

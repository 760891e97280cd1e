"""The scripted upstream, driven by raw sockets and by the official SDKs."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from tests_standalone.support.node import run_node
from tests_standalone.support.upstream import SCRIPTS, Script, ScriptedUpstream, UpstreamProcess, Usage

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello to Ann"}]
SAID = "You said: Say hello to Ann"
WITH_USAGE: Any = {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        yield upstream


@pytest.fixture
async def sdk(upstream: ScriptedUpstream) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=upstream.base_url, api_key="any", max_retries=0) as client:
        yield client


class Client:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def ask(self, model: str, path: str = "/v1/chat/completions", header: str = "", **members: Any) -> None:
        body = json.dumps({"model": model, "messages": HELLO, **members}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\n{header}Content-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)

    async def head(self) -> tuple[str, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        return lines[0], {name: value for name, _, value in (line.partition(": ") for line in lines[1:])}

    async def chunks(self) -> list[bytes]:
        """The HTTP chunks, to their end. Raises IncompleteReadError if they have none."""
        parts = []
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            parts.append((await self.reader.readexactly(size + 2))[:-2])
        await self.reader.readuntil(b"\r\n")
        return parts

    async def reply(self, model: str, **members: Any) -> bytes:
        """Asks, and reads a whole body by whatever frames it."""
        self.ask(model, **members)
        _, headers = await self.head()
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        return b"".join(await self.chunks()) if "transfer-encoding" in headers else await self.reader.read()


@pytest.fixture
async def client(upstream: ScriptedUpstream) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port, limit=1 << 23)
    yield Client(reader, writer)
    writer.close()


def said(stream: bytes) -> str:
    """The content of a stream with one line to an event."""
    lines = [line.removeprefix("data: ") for line in stream.decode().split("\n") if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


# As OpenAI writes it


async def test_a_reply_and_its_record(upstream: ScriptedUpstream, client: Client) -> None:
    body = await client.reply("gpt-4o", user="probe-1", metadata={"a": "b"})

    assert body.startswith(b'{\n  "id": "chatcmpl-00000000000000000000000000001",\n  "object": "chat.completion",\n')
    reply = json.loads(body)
    message: Any = {"role": "assistant", "content": SAID, "refusal": None, "annotations": []}
    assert reply["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (4, 6)

    [record] = await upstream.settled()
    assert (record.model, record.script, record.probe, record.stream) == ("gpt-4o", "answer", "probe-1", False)
    assert (record.status, record.outcome) == (200, "finished")
    assert record.usage == Usage(prompt=4, completion=6)
    assert record.request["metadata"] == {"a": "b"}
    assert record.headers["host"] == "test"
    assert record.reply == body
    assert record.bytes_written > len(body)


async def test_a_stream_without_usage(client: Client) -> None:
    events = (await client.reply("answer", stream=True, stream_options={"include_obfuscation": False})).split(b"\n\n")

    head = '{"id":"chatcmpl-00000000000000000000000000001","object":"chat.completion.chunk","created":1741000001,'
    head += '"model":"answer","service_tier":"default","system_fingerprint":"fp_b376dfbbd5","choices":[{"index":0,'
    deltas = ['{"role":"assistant","content":"","refusal":null}', '{"content":"You"}', '{"content":" said:"}']
    for event, delta in zip(events, deltas, strict=False):
        assert event.decode() == f'data: {head}"delta":{delta},"logprobs":null,"finish_reason":null}}]}}'
    assert events[-3].decode() == f'data: {head}"delta":{{}},"logprobs":null,"finish_reason":"stop"}}]}}'
    assert events[-2:] == [b"data: [DONE]", b""]


async def test_usage_comes_in_a_chunk_of_its_own_where_it_is_asked_for(
    upstream: ScriptedUpstream, client: Client
) -> None:
    await client.reply("answer", **WITH_USAGE)

    [record] = await upstream.settled()
    *chunks, last = map(json.loads, record.events[:-1])
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 10
    assert record.usage == Usage(prompt=4, completion=6)


@pytest.mark.parametrize(
    ("model", "asked", "places"),
    [
        ("answer", False, []),
        ("answer", True, ["alone"]),
        ("usage-always", False, ["alone"]),
        ("usage-on-finish", False, ["finish"]),
        ("usage-on-finish", True, ["finish"]),
        ("usage-twice", False, ["finish", "alone"]),
        ("usage-early", False, ["alone"]),
        ("usage-running", False, ["delta"] * 7 + ["finish"]),
        ("no-usage", True, []),
    ],
)
async def test_where_the_usage_is(
    upstream: ScriptedUpstream, client: Client, model: str, asked: bool, places: list[str]
) -> None:
    await client.reply(model, stream=True, stream_options={"include_usage": asked})

    [record] = await upstream.settled()
    chunks = [json.loads(event) for event in record.events if event != "[DONE]"]
    with_usage = [chunk["choices"] for chunk in chunks if chunk.get("usage")]
    finishes = [choices and choices[0]["finish_reason"] for choices in with_usage]
    assert [("finish" if finish else "delta") if finish != [] else "alone" for finish in finishes] == places
    assert record.usage == (Usage(prompt=4, completion=6) if places else None)


async def test_tool_calls_are_named_once(client: Client) -> None:
    events = (await client.reply("parallel-tools", stream=True)).decode().split("\n\n")

    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    first, *deltas, last = [choice["delta"] for choice in choices]
    assert (first["role"], first["content"], last) == ("assistant", None, {})
    calls = [call for delta in (first, *deltas) for call in delta["tool_calls"]]
    assert all(set(call) == {"index", "function"} for call in calls if "id" not in call)
    assert [(call["index"], call["function"]) for call in calls if "id" in call] == [
        (0, {"name": "get_weather", "arguments": ""}),
        (1, {"name": "get_weather", "arguments": ""}),
    ]
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_pictures_and_reasoning_count(upstream: ScriptedUpstream, client: Client) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    content = [{"type": "text", "text": "What is this?"}, picture, picture]
    await client.reply("reasoning", messages=[{"role": "user", "content": content}])

    [record] = await upstream.settled()
    message: Any = json.loads(record.reply)["choices"][0]["message"]
    assert message["reasoning_content"] == "First I think, then I answer."
    assert message["content"] == "I see 2 images. You said: What is this?"
    assert record.images == 2
    assert record.usage == Usage(prompt=3 + 2 * 85, completion=6 + 9, reasoning=6)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_only_this_vendor_has_is_the_same_bytes_each_time(client: Client, stream: bool) -> None:
    odd = await client.reply("odd-json", stream=stream)
    assert b'"big" : 123456789012345678901234567890,"float":1.0e+02 , "tiny":1E-7,"negative_zero":-0.0' in odd
    assert b'"escapes":"\\u0041\\/\\u00e9\\t"' in odd
    own = await client.reply("vendor-fields", stream=stream)
    assert "naïve".encode() in own
    assert own.count(b"native_finish_reason") == own.count(b'"index"')


async def test_models(upstream: ScriptedUpstream, sdk: AsyncOpenAI) -> None:
    listed = [model.id async for model in sdk.models.list()]
    assert listed == list(SCRIPTS)
    assert (await sdk.models.retrieve("cut-fin")).owned_by == "scripted"
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("nobody/has:this")
    with pytest.raises(openai.InternalServerError):
        await sdk.with_options(base_url=upstream.script_url("error-503")).models.list()


# How a request chooses


async def test_the_four_ways_to_choose_a_script(upstream: ScriptedUpstream, client: Client) -> None:
    wish = 'probe:p2 {"script": "length", "text": "In the message", "cached_share": 0.5}'
    await client.reply("refusal", header='x-script: {"script": "cached", "words": 3, "probe": "p1"}\r\n')
    await client.reply(
        "refusal", messages=[{"role": "user", "content": wish}], path="/script/cached/v1/chat/completions"
    )
    await client.reply("refusal", path="/script/cached/v1/chat/completions")
    await client.reply("refusal")

    records = await upstream.settled(4)
    assert [record.script for record in records] == ["cached", "length", "cached", "refusal"]
    assert [record.probe for record in records] == ["p1", "p2", None, None]
    assert records[0].usage == Usage(prompt=4, completion=3, cached=2)
    assert json.loads(records[1].reply)["choices"][0]["message"]["content"] == "In the message"


@pytest.mark.parametrize("wish", ['{"script": "nobodys"}', '{"script": "answer", "nothing_like_it": 1}'])
async def test_a_mistake_in_a_test_is_told(upstream: ScriptedUpstream, sdk: AsyncOpenAI, wish: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"nobodys|nothing_like_it"):
        await sdk.chat.completions.create(model="answer", messages=[{"role": "user", "content": wish}])
    assert upstream.tally[0].script == "mistake"


async def test_a_test_may_bring_its_own_script() -> None:
    mine = Script(events=('{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}', "[DONE]"))
    async with ScriptedUpstream(scripts={"mine": mine}) as upstream:
        reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
        body = await Client(reader, writer).reply("mine", stream=True)
        writer.close()
    assert body == b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
    assert upstream.tally[0].usage == Usage(prompt=1, completion=2)


NEVER_ENDING = {name for name, script in SCRIPTS.items() if script.head_delay or script.then in ("hang", "hold")}
HUGE = {"endless-line", "flood", "gzip-bomb"}


@pytest.mark.parametrize("stream", [False, True])
async def test_every_script_can_be_played(upstream: ScriptedUpstream, stream: bool) -> None:
    names = sorted(set(SCRIPTS) - NEVER_ENDING - HUGE - {"slow-start", "slow-chunks"})
    for name in names:
        reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
        Client(reader, writer).ask(name, stream=stream, header="Connection: close\r\n")
        try:
            await reader.read()
        except ConnectionResetError:
            assert name == "cut-rst"
        writer.close()
    records = await upstream.settled(len(names))
    assert {record.script for record in records if record.outcome == "cut"} == {
        "drop", "cut-fin", "cut-rst", "cut-in-event", "cut-at-once", "fail-once-drop", "short-body",
    }  # fmt: skip
    assert {record.outcome for record in records} == {"cut", "finished"}


# Errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (402, openai.APIStatusError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (408, openai.APIStatusError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (502, openai.InternalServerError),
        (503, openai.InternalServerError),
        (529, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_come_in_openais_shape(
    upstream: ScriptedUpstream, sdk: AsyncOpenAI, status: int, kind: type[openai.APIStatusError], stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        await sdk.chat.completions.create(model=f"error-{status}", messages=HELLO, stream=stream)
    assert caught.value.status_code == upstream.tally[0].status == status
    assert set(json.loads(caught.value.response.text)["error"]) == {"message", "type", "param", "code"}
    assert caught.value.request_id == "req_00000000000000000000000000000001"
    assert ("retry-after" in caught.value.response.headers) == (status == 429)
    assert upstream.tally[0].usage is None


async def test_a_probe_fails_once_and_another_one_fails_for_itself(
    upstream: ScriptedUpstream, sdk: AsyncOpenAI
) -> None:
    patient = sdk.with_options(max_retries=1)
    for probe in ("one", "two"):
        await patient.chat.completions.create(model="fail-once-429", messages=HELLO, user=probe)
    assert [record.status for record in upstream.tally] == [429, 200, 429, 200]
    assert [record.usage is None for record in upstream.of("two")] == [True, False]


@pytest.mark.parametrize("model", ["error-mid-stream", "error-event-mid-stream"])
async def test_an_error_after_the_first_chunks(upstream: ScriptedUpstream, sdk: AsyncOpenAI, model: str) -> None:
    stream = await sdk.chat.completions.create(model=model, messages=HELLO, stream=True)
    contents = [(await anext(stream)).choices[0].delta.content for _ in range(3)]
    assert contents == ["", "word0 ", "word1 "]
    with pytest.raises(openai.APIError, match="The server had an error"):
        await anext(stream)
    assert upstream.tally[0].outcome == "finished"


# Connections


@pytest.mark.parametrize("model", ["cut-fin", "cut-in-event"])
async def test_the_connection_ends_inside_a_stream(upstream: ScriptedUpstream, client: Client, model: str) -> None:
    client.ask(model, stream=True)
    await client.head()
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await client.chunks()
    assert caught.value.partial == b""
    [record] = await upstream.settled()
    assert record.outcome == "cut"
    assert len(record.events) == (3 if model == "cut-fin" else 4)
    assert bytes(record.reply).endswith(b"\n\n") == (model == "cut-fin")


async def test_the_connection_is_reset_inside_a_stream(upstream: ScriptedUpstream, client: Client) -> None:
    client.ask("cut-rst", stream=True)
    await client.head()
    with pytest.raises(ConnectionResetError):
        await client.chunks()
    assert upstream.tally[0].outcome == "cut"


async def test_no_byte_of_a_reply(upstream: ScriptedUpstream, client: Client) -> None:
    client.ask("drop")
    assert await client.reader.read() == b""
    assert (upstream.tally[0].status, upstream.tally[0].bytes_written, upstream.tally[0].outcome) == (None, 0, "cut")


async def test_a_connection_is_kept_and_may_end_after_any_reply(upstream: ScriptedUpstream, client: Client) -> None:
    await client.reply("answer")
    await client.reply("answer", stream=True)
    await client.reply("close-silent")
    assert await client.reader.read() == b""
    assert [record.connection for record in upstream.tally] == [1, 1, 1]


async def test_a_connection_may_end_when_it_is_used_again(upstream: ScriptedUpstream, client: Client) -> None:
    await client.reply("close-next")
    client.ask("answer")
    assert await client.reader.read() == b""
    assert [(record.script, record.outcome) for record in upstream.tally] == [
        ("close-next", "finished"),
        ("close-next", "cut"),
    ]


async def test_a_reply_before_the_body_is_sent(upstream: ScriptedUpstream, client: Client) -> None:
    client.writer.write(b"POST /script/early-reply/v1/chat/completions HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
    status, headers = await client.head()
    assert (status.split()[1], headers["connection"]) == ("413", "close")
    assert upstream.tally[0].outcome == "finished"


async def test_interim_replies_and_trailers(client: Client) -> None:
    client.ask("interim")
    assert [(await client.head())[0] for _ in range(3)] == [
        "HTTP/1.1 102 Processing",
        "HTTP/1.1 103 Early Hints",
        "HTTP/1.1 200 OK",
    ]
    client.ask("trailers", header="Connection: close\r\n")
    assert (await client.reader.read()).endswith(b"\r\n0\r\nx-checksum: abc\r\n\r\n")


async def test_a_redirect_leads_back_here(upstream: ScriptedUpstream, client: Client) -> None:
    client.ask("redirect")
    status, headers = await client.head()
    assert status == "HTTP/1.1 307 Temporary Redirect"
    client.ask("answer", path=headers["location"])
    assert [record.path for record in await upstream.settled(2)][1] == "/redirected/v1/chat/completions"


async def test_a_request_may_come_in_chunks_and_pieces(upstream: ScriptedUpstream, client: Client) -> None:
    body = json.dumps({"model": "answer", "messages": HELLO}).encode()
    request = b"POST /any/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    request += b"5\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (body[:5], len(body) - 5, body[5:])
    for byte in request:
        client.writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert (await client.head())[0] == "HTTP/1.1 200 OK"
    assert upstream.tally[0].body == body


# Bodies


@pytest.mark.parametrize("stream", [False, True])
async def test_bodies_have_all_the_ends_that_http_knows(
    upstream: ScriptedUpstream, client: Client, stream: bool
) -> None:
    for model, header in [
        ("chunked", {"transfer-encoding": "chunked"}),
        ("content-length", {"content-length"}),
        ("close-delimited", {"connection": "close"}),
    ]:
        client.ask(model, stream=stream)
        _, headers = await client.head()
        framing = {"transfer-encoding", "content-length", "connection"} & set(headers)
        assert framing == set(header)
        if model == "chunked":
            await client.chunks()
        elif model == "content-length":
            await client.reader.readexactly(int(headers["content-length"]))
        else:
            await client.reader.read()
    assert len({bytes(record.reply).count(b"said") for record in upstream.tally}) == 1


async def test_a_wrong_length(client: Client) -> None:
    client.ask("short-body")
    _, headers = await client.head()
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await client.reader.readexactly(int(headers["content-length"]))
    assert caught.value.expected is not None
    assert caught.value.expected - len(caught.value.partial) == 100


@pytest.mark.parametrize(("model", "chunks_of_one_event"), [("gzip", True), ("gzip-late", False)])
async def test_gzip_though_nobody_asked(client: Client, model: str, chunks_of_one_event: bool) -> None:
    client.ask(model, stream=True)
    _, headers = await client.head()
    chunks = await client.chunks()
    assert headers["content-encoding"] == "gzip"
    assert said(gzip.decompress(b"".join(chunks))) == SAID
    assert (len(chunks) > 5) == chunks_of_one_event


async def test_what_is_no_completion(client: Client) -> None:
    assert (await client.reply("html")).startswith(b"<!DOCTYPE html>")
    assert await client.reply("empty-body") == b""
    assert json.loads(await client.reply("json-not-stream", stream=True))["object"] == "chat.completion"
    assert said(await client.reply("stream-not-json")) == SAID
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(await client.reply("invalid-json"))
    assert b'"delta":{"content":\n\ndata: {' in await client.reply("invalid-json", stream=True)


# Server-sent events


@pytest.mark.parametrize(
    "model", ["crlf", "cr", "no-space", "bom", "sse-fields", "multi-line", "no-done", "double-done"]
)
async def test_the_official_sdk_reads_the_same_from_all_ways_to_write_events(sdk: AsyncOpenAI, model: str) -> None:
    stream = await sdk.chat.completions.create(model=model, messages=HELLO, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == SAID


async def test_how_events_are_written(client: Client) -> None:
    async def start(model: str) -> bytes:
        return (await client.reply(model, stream=True))[:40]

    assert (await start("bom")).startswith(b'\xef\xbb\xbfdata: {"id"')
    assert (await start("no-space")).startswith(b'data:{"id"')
    assert (await start("comments")).startswith(b": OPENROUTER PROCESSING\n\n: ping\ndata: {")
    assert (await start("sse-fields")).startswith(b"event: message\nid: 7\nretry: 1000\ndata: {")
    assert (await start("multi-line")).startswith(b'data: {\ndata:  "id": "chatcmpl-')
    assert (await client.reply("crlf", stream=True)).endswith(b"data: [DONE]\r\n\r\n")
    assert (await client.reply("cr", stream=True)).endswith(b"data: [DONE]\r\r")
    assert (await client.reply("after-done", stream=True)).endswith(b'data: [DONE]\n\ndata: {"late":true}\n\n')


@pytest.mark.parametrize(("model", "size"), [("bytewise", 1), ("split-7", 7)])
async def test_bytes_may_come_in_any_pieces(client: Client, model: str, size: int) -> None:
    client.ask(model, stream=True)
    await client.head()
    chunks = await client.chunks()
    assert max(map(len, chunks)) == size
    assert said(b"".join(chunks)) == SCRIPTS["unicode"].text


async def test_difficult_text(client: Client) -> None:
    assert said(await client.reply("unicode", stream=True)) == SCRIPTS["unicode"].text
    assert said(await client.reply("line-separators", stream=True)) == SCRIPTS["line-separators"].text
    assert said(await client.reply("nul", stream=True)) == "before \x00 after"
    assert "\u2028".encode() in await client.reply("line-separators")
    assert b'"half: \\ud83d end"' in await client.reply("lone-surrogate")
    halves = await client.reply("surrogate-pair-split", stream=True)
    assert b'{"content":"\\ud83d"}' in halves
    assert b'{"content":"\\ude00"}' in halves


async def test_sizes(client: Client) -> None:
    long = await client.reply("long-line", stream=True)
    assert max(map(len, long.split(b"\n"))) > 2 << 20
    assert (await client.reply("thousand", stream=True)).count(b"data: ") == 1 + 1000 + 1 + 1


# Time


async def test_a_held_stream_goes_on_when_it_is_released(upstream: ScriptedUpstream, client: Client) -> None:
    client.ask("held", stream=True, user="p")
    await upstream.until(lambda tally: bool(tally and len(tally[0].events) == 2))
    upstream.release("p")
    await client.head()
    assert b"".join(await client.chunks()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("model", ["never", "never-after-headers", "hang-mid-stream", "slow-headers", "held"])
async def test_a_client_that_leaves_is_noticed_at_once(upstream: ScriptedUpstream, client: Client, model: str) -> None:
    client.ask(model, stream=True)
    await upstream.until(lambda tally: bool(tally and (tally[0].status or SCRIPTS[model].head_delay)))
    client.writer.close()
    [record] = await upstream.settled()
    assert (record.outcome, record.usage) == ("client_closed", None)


async def test_a_client_that_does_not_read_stops_the_stream(upstream: ScriptedUpstream, client: Client) -> None:
    client.ask("flood", stream=True)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined] # every socket's transport has it
    await upstream.until(lambda tally: bool(tally and tally[0].bytes_written))
    await asyncio.sleep(0.5)
    client.writer.close()
    [record] = await upstream.settled()
    assert record.outcome == "client_closed"
    assert record.bytes_written < 50_000_000


# The official SDKs


async def test_the_python_sdk(upstream: ScriptedUpstream, sdk: AsyncOpenAI) -> None:
    class Person(BaseModel):
        name: str
        age: int

    reply = await sdk.chat.completions.create(model="answer", messages=HELLO, n=2, logprobs=True, top_logprobs=1)
    assert [choice.message.content for choice in reply.choices] == [SAID, "(1) " + SAID]
    assert reply.choices[0].logprobs
    assert [entry.token for entry in reply.choices[0].logprobs.content or []][:2] == ["You", " said:"]
    assert reply.usage
    assert reply.usage.completion_tokens == 6 + 7

    parsed = await sdk.chat.completions.parse(model="answer", messages=HELLO, response_format=Person)
    assert parsed.choices[0].message.parsed == Person(name="name", age=1)

    async with sdk.chat.completions.stream(model="parallel-tools", messages=HELLO) as stream:
        calls = (await stream.get_final_completion()).choices[0].message.tool_calls or []
    assert [call.function.name for call in calls] == ["get_weather", "get_weather"]
    assert [record.outcome for record in await upstream.settled(3)] == ["finished"] * 3


@pytest.fixture(scope="module")
def process() -> Iterator[UpstreamProcess]:
    with UpstreamProcess() as process:
        yield process


def node(process: UpstreamProcess, *arguments: str) -> Any:
    process.reset()
    done = run_node("sdk.mjs", *arguments, env={"BASE_URL": process.base_url, "API_KEY": "any"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_tally_of_a_process(process: UpstreamProcess) -> None:
    completion = node(process, "chat")["completion"]
    [record] = process.settled()
    assert record.headers["authorization"] == "Bearer any"
    assert record.request["model"] == "answer"
    assert json.loads(record.reply) == completion
    assert record.usage == Usage(prompt=4, completion=6)
    assert base64.b64decode(record.as_json()["body"]) == record.body


def test_the_node_sdk(process: UpstreamProcess) -> None:
    assert node(process, "models")["first"]["id"] == "answer"
    assert node(process, "stream")["content"] == SAID
    assert node(process, "stream-usage")["chunks"][-1]["usage"]["total_tokens"] == 10
    assert node(process, "tools")["answer"] == "The tool said: sunny"
    assert node(process, "tools-stream", "parallel-tools")["events"] == [
        {"name": "get_weather", "text": '{"city": "city"}'},
        {"name": "get_weather", "text": '{"city": "city"}'},
    ]
    assert node(process, "image")["content"] == "I see 1 image. You said: What is this?"
    assert node(process, "choices")["streamed"] == [SAID, "(1) " + SAID]
    assert node(process, "logprobs")["content"][0]["token"] == "You"
    assert node(process, "parse")["parsed"] == {"name": "name", "age": 1.5, "tags": ["tags"]}


def test_the_node_sdk_meets_errors(process: UpstreamProcess) -> None:
    errors = node(process, "errors", "error-400", "error-401", "error-404", "error-429", "error-500")
    assert {name: (error["class"], error["status"], error["code"]) for name, error in errors.items()} == {
        "error-400": ("BadRequestError", 400, "invalid_value"),
        "error-401": ("AuthenticationError", 401, "invalid_api_key"),
        "error-404": ("NotFoundError", 404, "model_not_found"),
        "error-429": ("RateLimitError", 429, "rate_limit_exceeded"),
        "error-500": ("InternalServerError", 500, None),
    }
    assert all(error["requestID"].startswith("req_") for error in errors.values())
    assert node(process, "stream-error")["error"]["class"] == "APIError"
    assert node(process, "stream-error", "cut-fin")["error"] == {"class": "TypeError", "message": "terminated"}


def test_the_node_sdk_tries_again(process: UpstreamProcess) -> None:
    assert node(process, "retries", "fail-twice")["status"] == 200
    assert [record.status for record in process.settled(3)] == [503, 503, 200]


def test_the_node_sdk_breaks_off(process: UpstreamProcess) -> None:
    assert node(process, "abort") == {"chunks": 2, "aborted": True}
    assert [record.outcome for record in process.settled()] == ["client_closed"]

"""Azure's paths and headers by example, and one call over a real socket."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from gateway.backends.adapt import Adapter
from gateway.backends.azure import AzureBackend, AzureTranslator
from gateway.backends.client import HTTPTransport
from gateway.backends.http import HTTPRequest
from gateway.backends.vendors import Quirks
from gateway.errors import ModelNotFound, UpstreamError
from gateway.wire.chat import ChatRequest, CompletionRequest
from gateway.wire.jsontext import dumps
from gateway.wire.operation import OperationRequest
from tests_standalone.support.upstream import ScriptedUpstream

DATED = AzureTranslator("key", api_version="2024-10-21")
V1 = AzureTranslator("key")


def chat(model: str = "my-gpt", more: bytes = b"") -> ChatRequest:
    return ChatRequest.parse(b'{"model":%b,"messages":[{"role":"user","content":"Hi"}]%b}' % (dumps(model), more))


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("my-gpt", "/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21"),
        ("gpt 4/o?x=1#é", "/openai/deployments/gpt%204%2Fo%3Fx%3D1%23%C3%A9/chat/completions?api-version=2024-10-21"),
        ("../chat", "/openai/deployments/..%2Fchat/chat/completions?api-version=2024-10-21"),
        ("a.b_c-1", "/openai/deployments/a.b_c-1/chat/completions?api-version=2024-10-21"),
    ],
)
def test_a_dated_version_has_the_deployment_in_the_path(model: str, path: str) -> None:
    sent = DATED.request(chat(model))
    assert (sent.method, sent.path, sent.body) == ("POST", path, chat(model).raw)


@pytest.mark.parametrize("model", ["", ".", "..", "..."])
def test_what_cannot_be_a_deployment_reaches_no_other_path(model: str) -> None:
    with pytest.raises(ModelNotFound):
        DATED.request(chat(model))


def test_without_a_date_the_deployment_is_the_model() -> None:
    sent = V1.request(chat("gpt 4/o"))
    assert (sent.method, sent.path, sent.body) == ("POST", "/openai/v1/chat/completions", chat("gpt 4/o").raw)


@pytest.mark.parametrize(
    ("translator", "before", "after"),
    [(DATED, "/openai/deployments/d/", "?api-version=2024-10-21"), (V1, "/openai/v1/", "")],
)
def test_other_operations(translator: AzureTranslator, before: str, after: str) -> None:
    older = CompletionRequest.parse(b'{"model":"d","prompt":"a"}')
    assert translator.request(older).path == f"{before}completions{after}"
    for operation in ("embeddings", "images/generations", "audio/speech"):
        request = OperationRequest.parse(operation, "application/json", b'{"model":"d"}')
        assert translator.operation_request(request).path == f"{before}{operation}{after}"


def test_the_key_has_a_header_of_its_own() -> None:
    assert dict(DATED.request(chat()).headers) == {
        "content-type": "application/json",
        "accept-encoding": "identity",
        "api-key": "key",
        "accept": "application/json",
    }
    assert DATED.request(chat(more=b',"stream":true')).headers["accept"] == "text/event-stream"


def test_without_a_key() -> None:
    assert not {"api-key", "authorization"} & AzureTranslator(api_version="2024-10-21").request(chat()).headers.keys()


def test_peculiarities() -> None:
    translator = AzureTranslator(adapter=Adapter(Quirks(drop=("stop",), usage_in_stream=False)))
    sent: HTTPRequest = translator.request(chat(more=b',"stream":true,"stop":"x"'))
    assert sent.body == chat(more=b',"stream":true').raw


async def test_over_the_wire() -> None:
    async with ScriptedUpstream() as upstream, contextlib.AsyncExitStack() as stack:
        transport = HTTPTransport()
        stack.push_async_callback(transport.aclose)
        backend = AzureBackend("azure", upstream.root_url, V1, transport)
        completion = await backend.complete(chat("a/b"))
        stream = await backend.stream(chat("a/b", b',"stream":true'))
        while await stream.read():
            pass
        assert stream.complete
        await stream.close()
        assert list(await backend.models()) == []
        records = await upstream.settled(2)
    assert completion.data["choices"][0]["message"]["content"]
    assert [(record.path, record.headers["api-key"], record.model) for record in records] == [
        ("/openai/v1/chat/completions", "key", "a/b")
    ] * 2


async def test_a_deployment_reaches_the_wire_in_one_segment_of_the_path() -> None:
    lines: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines.append(await reader.readline())
        writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, contextlib.AsyncExitStack() as stack:
        transport = HTTPTransport()
        stack.push_async_callback(transport.aclose)
        port = server.sockets[0].getsockname()[1]
        backend = AzureBackend("azure", f"http://127.0.0.1:{port}", DATED, transport)
        for model in ("../x", "a%2e/b c", "é?d#e"):
            with pytest.raises(UpstreamError):
                await backend.complete(chat(model))
    paths = [line.split()[1].decode() for line in lines]
    query = "/chat/completions?api-version=2024-10-21"
    assert paths == [
        f"/openai/deployments/..%2Fx{query}",
        f"/openai/deployments/a%252e%2Fb%20c{query}",
        f"/openai/deployments/%C3%A9%3Fd%23e{query}",
    ]

"""OpenAI's API beyond chat, as far as it is this dialect's: what is read, what is refused, which headers leave."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests_standalone.api.conftest import App, Launch, at
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.support.upstream_operations import SOUND, vector

FORM = "multipart/form-data; boundary=b"
PRICE = {"input": 2.0, "output": 8.0}
MESSAGE: dict[str, Any] = {"type": "http.request", "body": b"x" * 500, "more_body": True}
GONE = {"type": "http.disconnect"}
UNREAD = {"type": "http.request", "body": b""}
"""If it were read, the body would be complete, and broken rather than too large."""


def form(**texts: str) -> bytes:
    parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in texts.items()]
    file = '--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF.\r\n'
    return ("".join(parts) + file + "--b--\r\n").encode()


@pytest.fixture
async def app(launch: Launch, upstream: ScriptedUpstream) -> App:
    return await launch(
        backends={"up": at(upstream, refuse=["forbidden"])},
        default_backend="up",
        models={"vectors": {"backend": "up", "model": "up-vectors", "price": PRICE}},
        files={"max_request_mb": 0.001},
        server={"max_body_mb": 0.002},
    )


async def test_a_reply_that_came_whole(app: App) -> None:
    answer = await app.call("POST", "/v1/embeddings", {"model": "vectors", "input": "one two"})
    assert answer.status == 200
    assert answer.json["data"][0]["embedding"] == vector("one two")
    assert int(answer.headers["content-length"]) == len(answer.body)
    expected = {
        "content-type": "application/json", "cache-control": "no-store", "x-gateway-model": "vectors",
        "x-gateway-backend": "up", "x-gateway-cost": "0.000004000",
    }  # fmt: skip
    assert answer.headers.items() >= expected.items()
    assert answer.headers["x-request-id"]
    assert answer.json["usage"]["cost"] == 0.000004


async def test_a_reply_that_passes_as_it_comes(app: App) -> None:
    answer = await app.call("POST", "/v1/audio/speech", {"model": "m", "voice": "alloy", "input": "hi"})
    assert (answer.status, answer.body, answer.finished) == (200, SOUND, True)
    assert answer.headers["content-type"] == "audio/mpeg"
    assert answer.headers["cache-control"] == "no-store"
    assert not answer.headers.keys() & {"content-length", "x-gateway-cost"}


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/moderations", {"input": "a"}, "omni-moderation-latest"),
        ("/v1/images/generations", {"prompt": "A cat"}, "dall-e-2"),
        ("/v1/images/edits", {"prompt": "A cat"}, "dall-e-2"),
        ("/v1/embeddings", {"input": "a"}, "vectors"),
    ],
    ids=["moderations", "a picture", "a changed picture", "the default model"],
)
async def test_the_model_of_a_request_that_names_none(path: str, body: Any, model: str, app: App) -> None:
    answer = await app.call("POST", path, body)
    assert (answer.status, answer.headers["x-gateway-model"]) == (200, model)


@pytest.mark.parametrize("path", ["/embeddings", "/v1/embeddings/", "//v1/embeddings", "/v1/v1/embeddings"])
async def test_other_ways_to_write_the_path(path: str, app: App) -> None:
    assert (await app.call("POST", path, {"model": "vectors", "input": "a"})).status == 200


async def test_a_deployment_in_the_path_is_the_model(app: App, upstream: ScriptedUpstream) -> None:
    for body in ({"input": "a"}, {"input": "a", "model": "in-the-body"}):
        await app.call("POST", "/openai/deployments/vectors/embeddings", body, query_string=b"api-version=2024-10-21")
    assert [record.model for record in upstream.tally] == ["up-vectors", "in-the-body"]


async def test_a_form_gets_the_upstreams_name_of_the_model(app: App, upstream: ScriptedUpstream) -> None:
    for texts in ({"model": "vectors", "language": "de"}, {"language": "de"}):
        answer = await app.call("POST", "/v1/audio/transcriptions", form(**texts), {"content-type": FORM})
        assert (answer.status, answer.json["text"]) == (200, "a.wav has 5 bytes")
    assert [record.model for record in upstream.tally] == ["up-vectors", "up-vectors"]
    assert b'name="language"\r\n\r\nde\r\n' in upstream.tally[0].body


async def test_the_callers_label_is_recorded(app: App) -> None:
    await app.call("POST", "/v1/embeddings", {"model": "vectors", "input": "a", "user": "kid"})
    assert await app.rows("SELECT end_user, status FROM usage_rows") == [("kid", "ok")]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"model": "vectors"}, "input"),
        ("/v1/embeddings", {"model": "vectors", "input": []}, "input"),
        ("/v1/moderations", {"input": None}, "input"),
        ("/v1/audio/speech", {"model": "m", "input": ""}, "input"),
        ("/v1/images/generations", {"model": "m"}, "prompt"),
    ],
)
async def test_what_no_upstream_needs_to_be_asked_for(
    path: str, body: Any, param: str, app: App, upstream: ScriptedUpstream
) -> None:
    answer = await app.call("POST", path, body)
    assert answer.status == 400
    assert answer.json["error"].items() >= {"param": param, "code": "missing_required_parameter"}.items()
    assert upstream.tally == []


async def test_a_field_that_the_backend_refuses(app: App, upstream: ScriptedUpstream) -> None:
    answer = await app.call("POST", "/v1/embeddings", {"model": "vectors", "input": "a", "forbidden": None})
    assert (answer.status, answer.json["error"]["code"]) == (400, "unsupported_parameter")
    in_a_form = form(model="vectors", forbidden="1")
    answer = await app.call("POST", "/v1/audio/transcriptions", in_a_form, {"content-type": FORM})
    assert (answer.status, answer.json["error"]["param"]) == (400, "forbidden")
    assert upstream.tally == []


async def test_without_a_key_nothing_is_read(app: App) -> None:
    answer = await app.call("POST", "/v1/embeddings", headers={"authorization": ""}, messages=[UNREAD])
    assert answer.status == 401


# Bodies


async def test_a_form_that_is_too_large_is_refused_before_it_is_read(app: App) -> None:
    headers = {"content-type": FORM, "content-length": "1049"}
    answer = await app.call("POST", "/v1/audio/transcriptions", headers=headers, messages=[UNREAD])
    assert (answer.status, answer.json["error"]["code"]) == (413, "request_too_large")
    assert "files.max_request_mb" in answer.json["error"]["message"]


async def test_or_while_it_is_read(app: App) -> None:
    messages = [MESSAGE, MESSAGE, MESSAGE, UNREAD]
    answer = await app.call("POST", "/v1/audio/transcriptions", headers={"content-type": FORM}, messages=messages)
    assert answer.status == 413


async def test_a_form_of_just_that_size_is_taken(app: App) -> None:
    empty = form(model="vectors", prompt="")
    body = form(model="vectors", prompt="x" * (1048 - len(empty)))
    assert len(body) == 1048
    messages = [MESSAGE | {"body": body[:500]}, {"type": "http.request", "body": body[500:]}]
    answer = await app.call("POST", "/v1/audio/transcriptions", headers={"content-type": FORM}, messages=messages)
    assert answer.status == 200


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/images/edits"])
async def test_json_has_a_limit_of_its_own(path: str, app: App) -> None:
    body = {"model": "vectors", "input": "x" * 1500, "prompt": "x"}
    assert len(json.dumps(body)) < 2097
    assert (await app.call("POST", path, body)).status == 200
    answer = await app.call("POST", path, body | {"more": "x" * 600})
    assert answer.status == 413
    assert "server.max_body_mb" in answer.json["error"]["message"]


async def test_compressed_bodies(app: App) -> None:
    headers = {"content-type": FORM, "content-encoding": "gzip"}
    answer = await app.call("POST", "/v1/audio/transcriptions", form(model="vectors"), headers)
    assert answer.status == 415


async def test_a_client_that_leaves_while_it_sends(app: App, upstream: ScriptedUpstream) -> None:
    answer = await app.call(
        "POST", "/v1/audio/transcriptions", headers={"content-type": FORM}, messages=[MESSAGE, GONE]
    )
    assert answer.status == 400
    assert upstream.tally == []


@pytest.mark.parametrize(
    ("path", "kind", "says"),
    [
        ("/v1/embeddings", FORM, "Send the body as JSON"),
        ("/v1/images/generations", FORM, "Send the body as JSON"),
        ("/v1/images/edits", "text/plain", "Send the body as JSON"),
        ("/v1/images/variations", "application/json", "Send the body as a form"),
        ("/v1/audio/translations", "", "Send the body as a form"),
    ],
)
async def test_bodies_of_the_wrong_type(path: str, kind: str, says: str, app: App) -> None:
    answer = await app.call("POST", path, form(model="vectors"), {"content-type": kind})
    assert (answer.status, answer.json["error"]["code"]) == (415, "unsupported_media_type")
    assert says in answer.json["error"]["message"]


@pytest.mark.parametrize("length", [None, 10, 60])
async def test_a_form_that_is_not_whole(length: int | None, app: App, upstream: ScriptedUpstream) -> None:
    body = form(model="vectors")[:length] if length else b""
    answer = await app.call("POST", "/v1/audio/transcriptions", body, {"content-type": FORM})
    assert (answer.status, answer.json["error"]["code"]) == (400, "invalid_form")
    assert upstream.tally == []

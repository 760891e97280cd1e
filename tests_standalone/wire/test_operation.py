"""Requests that are not chat: what is read of them, and what the upstream's name of the model changes."""

from __future__ import annotations

import pytest

from gateway.errors import BadRequest
from gateway.wire.operation import CHAT, OPERATIONS, OperationRequest

FORM_TYPE = 'multipart/form-data; boundary="b"'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n'


def json_request(raw: bytes, operation: str = "embeddings") -> OperationRequest:
    return OperationRequest.parse(operation, "application/json; charset=utf-8", raw)


def form_request(**texts: str) -> OperationRequest:
    parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in texts.items()]
    return OperationRequest.parse("audio/transcriptions", FORM_TYPE, "".join(parts).encode() + FILE + b"--b--\r\n")


@pytest.mark.parametrize(
    ("raw", "model", "stream"),
    [
        (b"{}", None, False),
        (b'{"model":null}', None, False),
        (b'{"model":""}', None, False),
        (b'{"model":"m","stream":false}', "m", False),
        (b'{"model":"org/m:8b","stream":true}', "org/m:8b", True),
        (b'{"model":"m","stream":"true"}', "m", False),
        (b'{"model":"m","stream":null}', "m", False),
        (b'{"model":"m","stream":{"a":[]}}', "m", False),
    ],
)
def test_json(raw: bytes, model: str | None, stream: bool) -> None:
    request = json_request(raw)
    assert (request.model, request.stream, request.raw, request.form) == (model, stream, raw, None)


@pytest.mark.parametrize(
    ("texts", "model", "stream"),
    [
        ({}, None, False),
        ({"model": ""}, None, False),
        ({"model": "m", "stream": "false"}, "m", False),
        ({"model": "m", "stream": "true"}, "m", True),
        ({"model": "7", "stream": "True"}, "7", True),
    ],
)
def test_a_form(texts: dict[str, str], model: str | None, stream: bool) -> None:
    request = form_request(**texts)
    assert (request.model, request.stream, request.data) == (model, stream, texts)
    assert request.content_type == FORM_TYPE


def test_the_type_of_a_form_in_any_case() -> None:
    request = OperationRequest.parse("images/edits", "Multipart/Form-Data ; boundary=b", FILE + b"--b--")
    assert request.form is not None


@pytest.mark.parametrize("model", [b"7", b"[]", b"{}", b"true"])
def test_a_model_that_is_no_text(model: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        json_request(b'{"model":%b}' % model)
    assert (caught.value.param, caught.value.code) == ("model", "invalid_type")


@pytest.mark.parametrize("filename", ["", "model.txt"])
def test_a_model_that_is_a_file(filename: str) -> None:
    """Some upstreams take it for a text if its file has no name."""
    file = f'--b\r\nContent-Disposition: form-data; name="model"; filename="{filename}"\r\n\r\ndear\r\n'
    text = '--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ncheap\r\n'
    with pytest.raises(BadRequest, match="must be a text"):
        OperationRequest.parse("audio/transcriptions", FORM_TYPE, f"{text}{file}--b--".encode())


@pytest.mark.parametrize(("raw", "code"), [(b"", "invalid_json"), (b"[]", "invalid_json")])
def test_a_body_that_is_none(raw: bytes, code: str) -> None:
    with pytest.raises(BadRequest) as caught:
        json_request(raw)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("raw", "sent"),
    [
        (b'{ "model" : "m", "x": 1.0 }', b'{ "model" : "up/\\"1", "x": 1.0 }'),
        (b'{"x":1.0}', b'{"x":1.0,"model":"up/\\"1"}'),
        (b"{ }", b'{"model":"up/\\"1"}'),
        (b'{"model":null}', b'{"model":"up/\\"1"}'),
        (b'{"model":"a","x":{"model":"b"},"model":"m"}', b'{"model":"up/\\"1","x":{"model":"b"}}'),
    ],
    ids=["changed", "added", "added to nothing", "null", "twice"],
)
def test_the_upstreams_name_in_json(raw: bytes, sent: bytes) -> None:
    renamed = json_request(raw).with_model('up/"1')
    assert renamed.raw == sent
    assert renamed.model == 'up/"1'
    assert renamed.data == json_request(sent).data


@pytest.mark.parametrize("texts", [{"model": "m", "language": "de"}, {"language": "de"}])
def test_the_upstreams_name_in_a_form(texts: dict[str, str]) -> None:
    request = form_request(**texts)
    renamed = request.with_model("up-näme")
    assert renamed.model == "up-näme"
    assert renamed.data == texts | {"model": "up-näme"}
    assert OperationRequest.parse(request.operation, FORM_TYPE, renamed.raw) == renamed
    assert FILE in renamed.raw
    assert request.data == texts


def test_chat_is_an_operation_of_its_own_name() -> None:
    assert CHAT in OPERATIONS
    assert "models" not in OPERATIONS


@pytest.mark.parametrize("names", [["model", "model"], ["model", "Model"], ["MODEL"]], ids=" and ".join)
def test_a_form_names_one_model_in_small_letters(names: list[str]) -> None:
    texts = "".join(f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\nm\r\n' for name in names)
    with pytest.raises(BadRequest, match="must name one 'model'") as caught:
        OperationRequest.parse("audio/transcriptions", FORM_TYPE, texts.encode() + FILE + b"--b--\r\n")
    assert (caught.value.status, caught.value.param) == (400, "model")

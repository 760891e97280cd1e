"""OpenAI's API beyond chat: embeddings, moderations, images, audio. Relayed to the backend that has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.routing import BaseRoute, Route

from gateway.api.common import (
    call_headers,
    check_refused,
    cost_header,
    end_user,
    find_model,
    identify,
    media_type,
    read_form_body,
    read_json_body,
    services,
)
from gateway.call import Job
from gateway.errors import BadRequest, UnsupportedMediaType
from gateway.middleware import header
from gateway.operations import OperationExchange
from gateway.responses import JSON_TYPE, NO_STORE, STREAM_HEADERS, VARY, Header, Receive, Scope, Send, StreamResponse
from gateway.wire.operation import EMBEDDINGS, MODERATIONS, SPEECH, OperationRequest

_FORMS = frozenset({"images/edits", "images/variations", "audio/transcriptions", "audio/translations"})
_ASSUMED = {
    MODERATIONS: "omni-moderation-latest",
    "images/generations": "dall-e-2",
    "images/edits": "dall-e-2",
    "images/variations": "dall-e-2",
}
"""The models that OpenAI's API takes for requests that name none."""


class Operation:
    """One of the operations: reads the request, relays it, passes the reply on in the type that it has."""

    operation = EMBEDDINGS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, found = time.perf_counter(), services(scope)
        caller = await identify(scope)
        found.relay.ledger.check()
        request = await self._request(scope, receive)
        _check(request)
        assumed = None if request.model or scope["state"].get("deployment") else _ASSUMED.get(self.operation)
        model = await find_model(scope, caller, request.model, assumed)
        check_refused(found, caller, model, request.data)
        named = end_user(scope, request.data)
        request_id = scope["state"]["request_id"]
        job = Job(request_id, caller, named, model, request, None, assumed_model=assumed, started=started)
        exchange = OperationExchange(found.relay, job)
        response = StreamResponse(exchange, found.drain, lambda: _headers(exchange), first_chunk_wait=None)
        try:
            await response(receive, send)
        finally:
            scope["state"]["client_left"] = exchange.stopped == "client_disconnected"

    async def _request(self, scope: Scope, receive: Receive) -> OperationRequest:
        kind = (header(scope, b"content-type") or b"").decode("latin-1")
        if self.operation in _FORMS and media_type(scope) == "multipart/form-data":
            body = await read_form_body(scope, receive)
        elif self.operation in _FORMS and self.operation != "images/edits":
            raise UnsupportedMediaType("Send the body as a form, with `Content-Type: multipart/form-data`.")
        else:
            body = await read_json_body(scope, receive)
        return OperationRequest.parse(self.operation, kind, body)


def _endpoint(name: str) -> type[Operation]:
    return type("Operation", (Operation,), {"operation": name})


ENDPOINTS: Sequence[tuple[str, str, Callable[[], Any], str]] = (
    ("POST", "/v1/embeddings", _endpoint(EMBEDDINGS), "Texts as vectors"),
    ("POST", "/v1/moderations", _endpoint(MODERATIONS), "Is a text harmful?"),
    ("POST", "/v1/images/generations", _endpoint("images/generations"), "A picture from a text"),
    ("POST", "/v1/images/edits", _endpoint("images/edits"), "A picture from pictures and a text"),
    ("POST", "/v1/images/variations", _endpoint("images/variations"), "A picture like another"),
    ("POST", "/v1/audio/speech", _endpoint(SPEECH), "A text, spoken"),
    ("POST", "/v1/audio/transcriptions", _endpoint("audio/transcriptions"), "What was said, as text"),
    ("POST", "/v1/audio/translations", _endpoint("audio/translations"), "What was said, as English text"),
)


def routes() -> list[BaseRoute]:
    return [Route(path, endpoint(), methods=[method]) for method, path, endpoint, _ in ENDPOINTS]


def _headers(exchange: OperationExchange) -> list[Header]:
    if exchange.length is not None:
        length = (b"content-length", b"%d" % exchange.length)
        return [JSON_TYPE, length, NO_STORE, VARY, *call_headers(exchange), *cost_header(exchange.cost)]
    kind = (b"content-type", exchange.content_type.encode("latin-1", "replace"))
    return [kind, *STREAM_HEADERS, *call_headers(exchange)]


def _check(request: OperationRequest) -> None:
    """What no upstream needs to be asked for."""
    wanted = {EMBEDDINGS: "input", MODERATIONS: "input", SPEECH: "input", "images/generations": "prompt"}
    name = wanted.get(request.operation)
    if name is not None and request.data.get(name) in (None, "", []):
        raise BadRequest(f"'{name}' is missing or empty.", param=name, code="missing_required_parameter")

"""OpenAI's API: `/v1/chat/completions` and `/v1/models`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.routing import BaseRoute, Route

from gateway.api.common import Services, identify, read_json_body, services
from gateway.auth import Caller
from gateway.backends.base import ModelInfo
from gateway.catalog import Model
from gateway.errors import BadRequest, ModelNotFound
from gateway.middleware import header
from gateway.relay import Exchange, Job, StreamExchange
from gateway.responses import Header, Receive, Scope, Send, StreamResponse, drive, header_value, send_json
from gateway.wire.chat import ChatRequest, text_of
from gateway.wire.jsontext import dumps


class ChatCompletions:
    """`POST /v1/chat/completions`, JSON and SSE (contract, section 4)."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, found = time.perf_counter(), services(scope)
        caller = await identify(scope)
        found.relay.ledger.check()
        request = ChatRequest.parse(await read_json_body(scope, receive))
        job = await self._job(scope, found, caller, request, started)
        exchange = found.relay.stream(job) if request.stream else found.relay.exchange(job)
        try:
            if isinstance(exchange, StreamExchange):
                await self._stream(exchange, found, started, receive, send)
            else:
                await self._whole(exchange, started, receive, send)
        finally:
            scope["state"]["client_left"] = exchange.stopped == "client_disconnected"

    async def _stream(
        self, exchange: StreamExchange, found: Services, started: float, receive: Receive, send: Send
    ) -> None:
        wait = found.settings.server.first_chunk_wait
        response = StreamResponse(exchange, found.drain, lambda: _headers(exchange, started), first_chunk_wait=wait)
        await response(receive, send)

    async def _whole(self, exchange: Exchange, started: float, receive: Receive, send: Send) -> None:
        reply = await drive(exchange, receive)
        cost = [] if reply.cost is None else [(b"x-gateway-cost", f"{reply.cost:.9f}".encode())]
        await send_json(send, 200, reply.body, [*_headers(exchange, started), *cost])

    async def _job(self, scope: Scope, found: Services, caller: Caller, request: ChatRequest, started: float) -> Job:
        model = await found.catalog.resolve(request.model or scope["state"].get("deployment"))
        scope["state"]["model"] = model.name
        caller.check_model(model.name, request.model)
        _check_policy(found, model, request)
        end_user = _end_user(scope, request)
        talk = await found.conversations.open(caller, request, end_user)
        outgoing = found.conversations.prepare(request, talk)
        state = scope["state"]
        return Job(state["request_id"], caller, end_user, model, outgoing, talk, request.wants_usage, started=started)


class Models:
    """`GET /v1/models`: from memory, never waits for an upstream."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await identify(scope)
        listed = [info for info in services(scope).catalog.listed() if _may_see(caller, info.id)]
        await send_json(send, 200, dumps({"object": "list", "data": [_model(info) for info in listed]}))


class OneModel:
    """`GET /v1/models/{id}`; the id may hold slashes and colons."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await identify(scope)
        name = scope["path_params"]["model"]
        if not _may_see(caller, name):
            raise ModelNotFound(f"The model '{name}' does not exist here. GET /v1/models lists those that do.")
        await send_json(send, 200, dumps(_model(services(scope).catalog.describe(name))))


ENDPOINTS: Sequence[tuple[str, str, Callable[[], Any], str]] = (
    ("POST", "/v1/chat/completions", ChatCompletions, "Chat, whole or streamed"),
    ("GET", "/v1/models", Models, "The models that can be asked for"),
    ("GET", "/v1/models/{model:path}", OneModel, "One model"),
)


def routes() -> list[BaseRoute]:
    return [Route(path, endpoint(), methods=[method]) for method, path, endpoint, _ in ENDPOINTS]


def _headers(exchange: Exchange, started: float) -> list[Header]:
    found = [
        (b"x-gateway-model", header_value(exchange.job.model.name)),
        (b"openai-processing-ms", b"%d" % ((time.perf_counter() - started) * 1000)),
        (b"openai-version", b"2020-10-01"),
    ]
    if exchange.route is not None:
        found.append((b"x-gateway-backend", header_value(exchange.route.backend.name)))
    if exchange.conversation_id is not None:
        found.append((b"x-conversation-id", exchange.conversation_id.encode()))
    return found


def _check_policy(found: Services, model: Model, request: ChatRequest) -> None:
    """What this gateway's configuration refuses."""
    settings = found.settings
    refused = next((key for route in found.catalog.routes(model) for key in route.refuse & request.data.keys()), None)
    if refused is not None:
        raise BadRequest(f"'{refused}' is not accepted by this gateway.", param=refused, code="unsupported_parameter")
    if request.stream and not settings.stream_responses:
        raise BadRequest("This gateway does not stream (stream_responses: false).", param="stream")
    if settings.max_input_length is not None:
        asked = [message for message in request.messages if message["role"] == "user"]
        length = len(text_of(asked[-1].get("content"))) if asked else 0
        if length > settings.max_input_length:
            raise BadRequest(
                f"The last user message has {length} characters; {settings.max_input_length} are allowed.",
                param="messages",
                code="string_above_max_length",
            )


def _end_user(scope: Scope, request: ChatRequest) -> str | None:
    """A label from the client for whom it asks; never a right."""
    named = request.data.get("safety_identifier") or request.data.get("user")
    if named:
        return str(named)
    told = header(scope, b"x-openwebui-user-id")
    return told.decode("latin-1") if told else None


def _may_see(caller: Caller, name: str) -> bool:
    return caller.models is None or name in caller.models


def _model(info: ModelInfo) -> dict[str, Any]:
    return {"id": info.id, "object": "model", "created": info.created, "owned_by": info.owned_by}

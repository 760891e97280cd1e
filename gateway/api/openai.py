"""OpenAI's API: chat, the older completions, and models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import lru_cache, partial
from typing import Any

from starlette.routing import BaseRoute, Route

from gateway import stored
from gateway.api.common import (
    Services,
    call_headers,
    check_refused,
    configured_model,
    cost_header,
    end_user,
    find_model,
    identify,
    json_at_hand,
    read_json_body,
    recognized,
    services,
)
from gateway.auth import Caller
from gateway.backends.base import ModelInfo
from gateway.call import Job
from gateway.conversations import given_id
from gateway.drain import Drain
from gateway.errors import BadRequest, ModelNotFound
from gateway.middleware import headers_by_name
from gateway.relay import Exchange, StreamExchange
from gateway.responses import (
    EVENT_STREAM,
    STREAM_HEADERS,
    Header,
    Receive,
    Scope,
    Send,
    StreamResponse,
    drive,
    send_json,
    way_out,
    when_gone,
)
from gateway.talks import Talk
from gateway.wire.chat import ChatRequest, CompletionRequest, text_of
from gateway.wire.jsontext import dumps

_GROUP_HEADERS = (b"x-conversation-id", b"x-openwebui-chat-id", b"chatui-conversation-id")


class ChatCompletions:
    """`POST /v1/chat/completions`, JSON and SSE (contract, section 4)."""

    request_type: type[ChatRequest] = ChatRequest
    has_turns = True
    """May a call be a turn of a conversation?"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, found = time.perf_counter(), services(scope)
        caller = recognized(scope) or await identify(scope)
        found.relay.ledger.check()
        body = json_at_hand(scope, receive)
        request = self.request_type.parse(await read_json_body(scope, receive) if body is None else body)
        job = await self._job(scope, receive, found, caller, request, started)
        try:
            exchange = StreamExchange(found.relay, job) if job.request.stream else Exchange(found.relay, job)
            try:
                if isinstance(exchange, StreamExchange):
                    await self._stream(exchange, found, scope, receive, send)
                else:
                    reply = await drive(exchange, receive)
                    await send_json(send, 200, reply.body, [*call_headers(exchange), *cost_header(reply.cost)])
            finally:
                scope["state"]["client_left"] = exchange.stopped == "client_disconnected"
        finally:
            if job.talk is not None and job.talk.hold is not None:
                await job.talk.aclose()

    def _stream(
        self, exchange: StreamExchange, found: Services, scope: Scope, receive: Receive, send: Send
    ) -> Coroutine[Any, Any, None]:
        response = StreamResponse(
            exchange,
            found.drain,
            lambda: _stream_headers(exchange),
            first_chunk_wait=found.settings.server.first_chunk_wait,
            way_out=way_out(scope),
        )
        return response(receive, send)

    async def _job(
        self, scope: Scope, receive: Receive, found: Services, caller: Caller, request: ChatRequest, started: float
    ) -> Job[ChatRequest]:
        request_id = scope["state"]["request_id"]
        model = configured_model(scope, caller, request.model) or await find_model(scope, caller, request.model)
        check_refused(found, caller, model, request.data)
        _check_policy(found, request)
        keep = stored.wanted(request, request_id, allowed=found.settings.conversations.store_content)
        named = end_user(scope, request.data)
        talk = await _talk(scope, receive, found, caller, request, named) if self.has_turns else None
        try:
            if talk is not None and talk.history:
                await found.conversations.fit(talk, request, model)
            shown = request if keep is None else stored.for_upstream(request)
            outgoing = found.conversations.prepare(shown, talk) if self.has_turns else _without_id(shown)
        except BaseException:
            if talk is not None:
                await talk.aclose()
            raise
        return Job(request_id, caller, named, model, outgoing, talk, request.wants_usage, keep=keep, started=started)


class Completions(ChatCompletions):
    """`POST /v1/completions`: a prompt, answered with text. Metered like chat; no turn of a conversation."""

    request_type = CompletionRequest
    has_turns = False


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
    ("POST", "/v1/completions", Completions, "Text that goes on from a prompt, whole or streamed"),
    ("GET", "/v1/models", Models, "The models that can be asked for"),
    ("GET", "/v1/models/{model:path}", OneModel, "One model"),
)


def routes() -> list[BaseRoute]:
    return [Route(path, endpoint(), methods=[method]) for method, path, endpoint, _ in ENDPOINTS]


def _talk(
    scope: Scope,
    receive: Receive,
    found: Services,
    caller: Caller,
    request: ChatRequest,
    end_user: str | None,
) -> Coroutine[Any, Any, Talk | None]:
    """The conversation that a call is a turn of. If it has to wait for another turn, then until its client leaves."""
    group = _group(scope, found.settings.conversations.header)
    opened = partial(found.conversations.open, caller, request, end_user, group)
    if found.settings.conversations.busy != "wait" or "conversation_id" not in request.data:
        return opened()
    return _in_turn(scope, receive, found.drain, opened)


async def _in_turn(
    scope: Scope,
    receive: Receive,
    drain: Drain,
    opened: Callable[[Callable[[], bool]], Coroutine[Any, Any, Talk | None]],
) -> Talk | None:
    left = asyncio.Event()
    forget = when_gone(receive, left.set)
    try:
        return await opened(lambda: left.is_set() or drain.stopping)
    finally:
        forget()
        scope["state"]["client_left"] = left.is_set()


def _without_id(request: ChatRequest) -> ChatRequest:
    """As it came, but for a field of ours that no upstream knows."""
    return request.with_fields(conversation_id=None) if "conversation_id" in request.data else request


def _stream_headers(exchange: StreamExchange) -> list[Header]:
    return [EVENT_STREAM, *STREAM_HEADERS, *call_headers(exchange)]


def _check_policy(found: Services, request: ChatRequest) -> None:
    """What this gateway's configuration refuses."""
    settings = found.settings
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


def _group(scope: Scope, extra: str | None) -> str | None:
    """The conversation that a header names (contract, section 5, rule 2); "": a frontend says that there is none. A
    frontend's own word for a chat that it does not keep may be anything, and is none."""
    names = _group_names(extra)
    if headers_by_name(scope).keys().isdisjoint(names):
        return None
    told = {name: value.decode("latin-1") for name, value in scope["headers"] if name in names}
    if told.get(b"x-conversation-id") and given_id(told[b"x-conversation-id"]) is None:
        raise BadRequest(
            "'X-Conversation-Id' must be 1 to 128 letters, digits, '-' or '_'.",
            param="x-conversation-id",
            code="invalid_value",
        )
    named = [given_id(told[name]) for name in names if told.get(name)]
    found = next((one for one in named if one is not None), None)
    # chat-ui has an id for every chat, and sends an empty one when it asks for a title.
    return "" if found is None and told.get(b"chatui-conversation-id") == "" else found


@lru_cache(maxsize=8)
def _group_names(extra: str | None) -> tuple[bytes, ...]:
    return _GROUP_HEADERS if extra is None else (*_GROUP_HEADERS, extra.lower().encode())


def _may_see(caller: Caller, name: str) -> bool:
    return caller.models is None or name in caller.models


def _model(info: ModelInfo) -> dict[str, Any]:
    return {"id": info.id, "object": "model", "created": info.created, "owned_by": info.owned_by}

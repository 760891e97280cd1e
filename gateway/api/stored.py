"""Stored chat completions (`store: true`): list, get, change, delete, and the messages that were asked.

All of it is per user: an id of somebody else is 404 like one that nobody has. `limit=0` counts as not said: the SDKs'
own tests send it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from starlette.routing import BaseRoute, Route

from gateway.api.common import identify, read_json_body, services
from gateway.errors import BadRequest
from gateway.responses import Receive, Scope, Send, send_json
from gateway.store.stored import Order
from gateway.stored import MOST_PAIRS, StoredCompletions, read_metadata, shown
from gateway.wire.body import read_object
from gateway.wire.jsontext import dumps

_LISTED = 20
_MOST_LISTED = 100
_ORDERS: Mapping[str, Order] = {"asc": "asc", "desc": "desc"}


class ListStored:
    """`GET /v1/chat/completions[?model=&metadata[key]=value&after=&limit=&order=]`"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stored = await _stored(scope)
        page = _Page.read(scope)
        found = await stored.listed(
            model=page.model, metadata=page.metadata, after=page.after, limit=page.limit + 1, order=page.order
        )
        texts = [shown(one) for one in found[: page.limit]]
        await send_json(send, 200, _list(texts, [one.id for one in found[: page.limit]], len(found) > page.limit))


class ShowStored:
    """`GET /v1/chat/completions/{id}`"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stored = await _stored(scope)
        await send_json(send, 200, await stored.get(scope["path_params"]["id"]))


class ChangeStored:
    """`POST /v1/chat/completions/{id}`: its `metadata` becomes what is sent; nothing else can be changed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stored = await _stored(scope)
        said = read_object(await read_json_body(scope, receive))
        if "metadata" not in said:
            raise BadRequest("Say what 'metadata' shall be.", param="metadata", code="missing_required_parameter")
        metadata = read_metadata(said["metadata"])
        await send_json(send, 200, await stored.change(scope["path_params"]["id"], metadata))


class DeleteStored:
    """`DELETE /v1/chat/completions/{id}`: it is gone; its costs stay."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stored = await _stored(scope)
        completion_id = scope["path_params"]["id"]
        await stored.delete(completion_id)
        await send_json(send, 200, dumps({"object": "chat.completion.deleted", "id": completion_id, "deleted": True}))


class ListMessages:
    """`GET /v1/chat/completions/{id}/messages[?after=&limit=&order=]`"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stored = await _stored(scope)
        page = _Page.read(scope)
        messages = await stored.messages(scope["path_params"]["id"])
        if page.order == "desc":
            messages.reverse()
        if page.after is not None:
            ids = [message["id"] for message in messages]
            if page.after not in ids:
                raise _wrong("There is no message with this id to begin after.", "after")
            messages = messages[ids.index(page.after) + 1 :]
        listed = messages[: page.limit]
        texts = [dumps(message) for message in listed]
        await send_json(send, 200, _list(texts, [message["id"] for message in listed], len(messages) > page.limit))


ENDPOINTS: Sequence[tuple[str, str, Callable[[], Any], str]] = (
    ("GET", "/v1/chat/completions", ListStored, "Chat completions that were stored"),
    ("GET", "/v1/chat/completions/{id}", ShowStored, "A stored chat completion"),
    ("POST", "/v1/chat/completions/{id}", ChangeStored, "Change the metadata of a stored chat completion"),
    ("DELETE", "/v1/chat/completions/{id}", DeleteStored, "Delete a stored chat completion"),
    ("GET", "/v1/chat/completions/{id}/messages", ListMessages, "The messages of a stored chat completion"),
)


def routes() -> list[BaseRoute]:
    return [Route(path, endpoint(), methods=[method]) for method, path, endpoint, _ in ENDPOINTS]


@dataclass(frozen=True, slots=True)
class _Page:
    """What a query says; what it says beside this is not looked at."""

    after: str | None
    limit: int
    order: Order
    model: str | None
    metadata: Sequence[tuple[str, str]]

    @classmethod
    def read(cls, scope: Scope) -> _Page:
        pairs = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        said = dict(pairs)
        metadata = [(name[9:-1], value) for name, value in pairs if name.startswith("metadata[") and name[-1] == "]"]
        if len(metadata) > MOST_PAIRS:
            raise _wrong(f"{len(metadata)} pairs of metadata are asked for; {MOST_PAIRS} are allowed.", "metadata")
        limit = said.get("limit") or "0"
        if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and int(limit) <= _MOST_LISTED):
            raise _wrong(f"'limit' must be 1 to {_MOST_LISTED}.", "limit")
        order = _ORDERS.get(said.get("order") or "asc")
        if order is None:
            raise _wrong("'order' must be 'asc' or 'desc'.", "order")
        return cls(said.get("after") or None, int(limit) or _LISTED, order, said.get("model") or None, metadata)


async def _stored(scope: Scope) -> StoredCompletions:
    caller = await identify(scope)
    return StoredCompletions(services(scope).database, caller.user_id)


def _list(texts: Sequence[bytes], ids: Sequence[str], more: bool) -> bytes:
    """OpenAI's list of rows that are JSON texts."""
    ends = dumps({"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None, "has_more": more})
    return b'{"object":"list","data":[%b],%b' % (b",".join(texts), ends[1:])


def _wrong(sentence: str, param: str) -> BadRequest:
    return BadRequest(sentence, param=param, code="invalid_value")

"""`/conversations`: what a user sees and changes of its conversations. Seed 3's paths, and what people expect beside.

Everything is the caller's own: what is not there for it is 404, whoever else has it. Costs are USD, times ISO 8601.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from starlette.routing import BaseRoute, Route

from gateway.api.common import Services, services
from gateway.api.own_body import (
    PAGE,
    Reader,
    choice_reader,
    flag_reader,
    is_id,
    is_shown,
    list_of,
    metadata_reader,
    name_reader,
    page_of,
    read_fields,
    read_query,
    text_reader,
)
from gateway.api.shapes import entered, new_conversation, no_such_place, shown, shown_message
from gateway.auth import Caller
from gateway.errors import Conflict, NotFound
from gateway.responses import Receive, Scope, Send, send_json
from gateway.store import conversation_edits, conversation_reads
from gateway.store.conversation_edits import Edit, NoOpenSession
from gateway.store.conversation_reads import Conversation, NoSuchPlace, Wanted
from gateway.store.database import AlreadyThere
from gateway.wire.jsontext import dumps

_GIVEN_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_OWN_ID = re.compile(r"conv_[0-9a-f]{32}")
_MOST_TAGS, _LONGEST_TAG = 32, 64
_TRIES = 5
_READ_ONLY = frozenset(
    {"object", "number", "user_id", "parent_id", "parent_seq", "image_urls", "message_count", "total_tokens_input"}
    | {"total_tokens_output", "total_cost", "created_at", "last_used"}
)


class MakeConversation:
    """`POST /conversations`: an empty one, in the session that is named, or in the current one."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await entered(scope)
        fields = await read_fields(scope, receive, _NEW, _READ_ONLY)
        try:
            made = await self._made(services(scope), caller, fields)
        except AlreadyThere:
            raise Conflict("You have a conversation with this id already.", param="id", code="already_exists") from None
        await send_json(send, 200, dumps(shown(made)))

    async def _made(self, found: Services, caller: Caller, fields: Mapping[str, Any]) -> Conversation:
        """In the current session; if somebody ends that just now, in the next one."""
        named, now = fields.get("session_id"), int(time.time() * 1000)
        for _ in range(1 if named else _TRIES):
            session_id = named or await found.relay.ledger.sessions.of(caller.user_id, now)
            with suppress(NoOpenSession):
                return await conversation_edits.make(found.database, new_conversation(caller, session_id, now, fields))
        raise NotFound("There is no open session with this id.", param="session_id")


class ListConversations:
    """`GET /conversations[?limit=&after=&order=&archived=&pinned=&tag=&session_id=]`: newest first, without archived
    ones."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await entered(scope)
        query = read_query(scope, _LIST)
        page = page_of(query)
        wanted = Wanted(query.get("archived", False), query.get("pinned"), query.get("tag"), query.get("session_id"))
        try:
            found = await conversation_reads.listed(
                services(scope).database,
                caller.user_id,
                wanted,
                limit=page.limit + 1,
                after=page.after,
                order=page.order,
            )
        except NoSuchPlace:
            raise no_such_place("conversation") from None
        await send_json(send, 200, list_of([shown(one) for one in found], page.limit))


class ShowConversation:
    """`GET /conversations/{id}`"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await entered(scope)
        found = await conversation_reads.get(services(scope).database, caller.user_id, conversation_id(scope))
        await send_json(send, 200, dumps(shown(_there(found))))


class ChangeConversation:
    """`PATCH /conversations/{id}`: the fields that are sent; null takes one away."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await entered(scope)
        asked = conversation_id(scope)
        fields = await read_fields(scope, receive, _CHANGED, _READ_ONLY | {"id", "session_id"})
        tags = fields.get("tags")
        change = Edit(
            frozenset(fields),
            fields.get("title"),
            fields.get("summary"),
            tags,
            None if tags is None else dumps(tags).decode(),
            fields.get("metadata"),
            fields.get("pinned"),
            fields.get("archived"),
        )
        now = int(time.time() * 1000)
        found = await conversation_edits.edit(services(scope).database, caller.user_id, asked, change, now)
        await send_json(send, 200, dumps(shown(_there(found))))


class DeleteConversation:
    """`DELETE /conversations/{id}`: gone for every reader; what it cost stays, and it can be brought back."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await entered(scope)
        asked, now = conversation_id(scope), int(time.time() * 1000)
        if not await conversation_edits.delete(services(scope).database, caller.user_id, asked, now):
            raise _missing()
        await send_json(send, 200, dumps({"id": asked, "object": "conversation.deleted", "deleted": True}))


class UndeleteConversation:
    """`POST /conversations/{id}/undelete`: the last one of this id that was deleted. Again, it changes nothing."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await entered(scope)
        asked, database = conversation_id(scope), services(scope).database
        try:
            found = await conversation_edits.undelete(database, caller.user_id, asked)
        except AlreadyThere:
            raise Conflict(
                "The id is taken by another conversation of yours. Delete that one first.", param="id"
            ) from None
        if found is None:
            found = await conversation_reads.get(database, caller.user_id, asked)
        await send_json(send, 200, dumps(shown(_there(found))))


class ListMessages:
    """`GET /conversations/{id}/messages[?limit=&after=&order=]`: oldest first; those of a branch begin with what it
    shares with its parents."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await entered(scope)
        page = page_of(read_query(scope, PAGE), order="asc")
        try:
            found = await conversation_reads.messages(
                services(scope).database,
                caller.user_id,
                conversation_id(scope),
                limit=page.limit + 1,
                after=page.after,
                order=page.order,
            )
        except NoSuchPlace:
            raise no_such_place("message of this conversation") from None
        if found is None:
            raise _missing()
        await send_json(send, 200, list_of([shown_message(one) for one in found], page.limit))


ENDPOINTS: Sequence[tuple[str, str, Callable[[], Any], str]] = (
    ("POST", "/conversations", MakeConversation, "Make a conversation"),
    ("GET", "/conversations", ListConversations, "Your conversations, newest first"),
    ("GET", "/conversations/{id}", ShowConversation, "A conversation and what it cost"),
    ("PATCH", "/conversations/{id}", ChangeConversation, "Rename, tag, pin, archive a conversation"),
    ("POST", "/conversations/{id}", ChangeConversation, "Rename, tag, pin, archive a conversation"),
    ("DELETE", "/conversations/{id}", DeleteConversation, "Delete a conversation"),
    ("POST", "/conversations/{id}/undelete", UndeleteConversation, "Bring a deleted conversation back"),
    ("GET", "/conversations/{id}/messages", ListMessages, "The messages of a conversation"),
)


def routes() -> list[BaseRoute]:
    return [Route(path, endpoint(), methods=[method]) for method, path, endpoint, _ in ENDPOINTS]


def conversation_id(scope: Scope) -> str:
    found: str = scope["path_params"]["id"]
    if not is_id(found):
        raise _missing()
    return found


def _there(found: Conversation | None) -> Conversation:
    if found is None:
        raise _missing()
    return found


def _missing() -> NotFound:
    return NotFound("There is no conversation with this id.", param="id")


def _id_reader(value: Any) -> str:
    if not isinstance(value, str) or _GIVEN_ID.fullmatch(value) is None:
        raise ValueError("must be 1 to 128 letters, digits, '-' or '_'")
    if _OWN_ID.fullmatch(value):
        raise ValueError("has the form that the gateway gives: choose another one, or leave it out")
    return value


def _session_reader(value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and is_id(value)):
        raise ValueError("must be the id of a session of yours, or null")
    return value


def _tags_reader(value: Any) -> list[str]:
    tags = [] if value is None else value
    if not (
        isinstance(tags, list)
        and len(tags) <= _MOST_TAGS
        and all(isinstance(tag, str) and 0 < len(tag) <= _LONGEST_TAG and is_shown(tag) for tag in tags)
    ):
        raise ValueError(f"must be a list of up to {_MOST_TAGS} texts of 1 to {_LONGEST_TAG} printable characters")
    return list(dict.fromkeys(tags))


_COMMON: Mapping[str, Reader] = {"title": text_reader(500), "tags": _tags_reader, "metadata": metadata_reader}
_NEW: Mapping[str, Reader] = {**_COMMON, "session_id": _session_reader, "id": _id_reader}
_CHANGED: Mapping[str, Reader] = {
    **_COMMON,
    "summary": text_reader(10_000),
    "pinned": flag_reader,
    "archived": flag_reader,
}
_LIST: Mapping[str, Reader] = {
    **PAGE,
    "archived": choice_reader(true=True, false=False, all=None),
    "pinned": choice_reader(true=True, false=False),
    "tag": name_reader,
    "session_id": name_reader,
}

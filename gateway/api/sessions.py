"""`/sessions` and `/users`: seeds 0's and 3's paths. A session owns conversations and sums what they used.

A user sees itself only, under its own name or as `me`; an admin key sees the statistics and the sessions of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.routing import BaseRoute, Route

from gateway.api.common import services
from gateway.api.own_body import (
    PAGE,
    Reader,
    is_id,
    list_of,
    metadata_reader,
    page_of,
    read_fields,
    read_query,
    text_reader,
    usd,
)
from gateway.api.shapes import entered, new_conversation, no_such_place, shown_message, shown_session
from gateway.auth import Caller
from gateway.errors import NotFound
from gateway.ids import ordered_hex
from gateway.responses import Receive, Scope, Send, send_json
from gateway.store import conversation_edits, conversation_reads, sessions
from gateway.store.conversation_reads import NoSuchPlace
from gateway.store.sessions import Session
from gateway.wire.jsontext import dumps

MOST_MESSAGES = 1000
_NEW: Mapping[str, Reader] = {"title": text_reader(500), "metadata": metadata_reader}


class OpenSession:
    """`POST /sessions`: opens one, with a conversation in it, which has the title and the metadata that are sent. It is
    the user's current session from now on; others stay open."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await entered(scope)
        fields = await read_fields(scope, receive, _NEW)
        found, session_id = services(scope), f"sess_{ordered_hex()}"
        new = new_conversation(caller, session_id, int(time.time() * 1000), fields)
        made = await conversation_edits.make_with_session(found.database, new)
        found.relay.ledger.sessions.forget(caller.user_id)
        opened = Session(session_id, caller.user_id, new.at, new.at, None, 1, 0, 0)
        await send_json(send, 200, dumps({**shown_session(opened), "conversation_id": made.id, "messages": []}))


class ShowSession:
    """`GET /sessions/{id}`: with the newest messages of its conversations, `MOST_MESSAGES` at most, in the order of
    time."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await entered(scope)
        asked, database = _session_id(scope), services(scope).database
        found = await sessions.get(database, caller.user_id, asked)
        if found is None:
            raise _missing()
        said = await sessions.messages(database, caller.user_id, asked, MOST_MESSAGES + 1)
        data = [shown_message(message) for message in said[-MOST_MESSAGES:]]
        left_out = len(said) > MOST_MESSAGES
        await send_json(send, 200, dumps({**shown_session(found), "messages": data, "messages_left_out": left_out}))


class EndSession:
    """`POST /sessions/{id}/end`: new conversations go into another one. Again, it changes nothing."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await entered(scope)
        await read_fields(scope, receive, {})
        asked, found, now = _session_id(scope), services(scope), int(time.time() * 1000)
        ended = await sessions.end(found.database, caller.user_id, asked, now)
        if ended is None:
            raise _missing()
        found.relay.ledger.sessions.forget(caller.user_id)
        await send_json(send, 200, dumps(shown_session(ended)))


class ListSessions:
    """`GET /users/{id}/sessions[?limit=&after=&order=]`: newest first."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        user_id = _user(scope, await entered(scope))
        page = page_of(read_query(scope, PAGE))
        try:
            found = await sessions.listed(
                services(scope).database, user_id, limit=page.limit + 1, after=page.after, order=page.order
            )
        except NoSuchPlace:
            raise no_such_place("session") from None
        await send_json(send, 200, list_of([shown_session(one) for one in found], page.limit))


class ShowStats:
    """`GET /users/{id}/stats`: what there is, and what all that there was has cost."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        user_id = _user(scope, await entered(scope))
        database = services(scope).database
        found = await conversation_reads.stats(database, user_id)
        told = {
            "user_id": user_id,
            "conversation_count": found.conversation_count,
            "session_count": await sessions.count(database, user_id),
            "message_count": found.message_count,
            "total_tokens_input": found.total_tokens_input,
            "total_tokens_output": found.total_tokens_output,
            "total_cost": usd(found.total_cost_nanousd),
        }
        await send_json(send, 200, dumps(told))


ENDPOINTS: Sequence[tuple[str, str, Callable[[], Any], str]] = (
    ("POST", "/sessions", OpenSession, "Open a session with one conversation"),
    ("GET", "/sessions/{id}", ShowSession, "A session, what it cost, and its messages"),
    ("POST", "/sessions/{id}/end", EndSession, "End a session"),
    ("GET", "/users/{id}/sessions", ListSessions, "A user's sessions, newest first"),
    ("GET", "/users/{id}/stats", ShowStats, "What a user has, and what it cost"),
)


def routes() -> list[BaseRoute]:
    return [Route(path, endpoint(), methods=[method]) for method, path, endpoint, _ in ENDPOINTS]


def _user(scope: Scope, caller: Caller) -> str:
    """Whose data is asked for. Raises NotFound for another's, unless an admin asks."""
    asked: str = scope["path_params"]["id"]
    if asked in (caller.user_id, "me"):
        return caller.user_id
    if caller.is_admin and is_id(asked):
        return asked
    raise NotFound("There is no user of this name that you may see; 'me' is yourself.", param="id")


def _session_id(scope: Scope) -> str:
    found: str = scope["path_params"]["id"]
    if not is_id(found):
        raise _missing()
    return found


def _missing() -> NotFound:
    return NotFound("There is no session with this id.", param="id")

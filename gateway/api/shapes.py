"""What conversations, their messages and sessions look like to their users. Costs are USD, times ISO 8601."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gateway.api.common import identify
from gateway.api.own_body import detailed_error, iso_time, usd
from gateway.auth import Caller
from gateway.errors import BadRequest
from gateway.ids import ordered_hex
from gateway.responses import Scope
from gateway.store.conversation_edits import NewConversation
from gateway.store.conversation_reads import Conversation, KeptMessage
from gateway.store.sessions import Session
from gateway.talks import new_id
from gateway.wire.jsontext import dumps, loads


async def entered(scope: Scope) -> Caller:
    """Who is asking. From here on failures are told in the manner of these paths."""
    scope["state"]["error_body"] = detailed_error
    return await identify(scope)


def new_conversation(caller: Caller, session_id: str, now: int, fields: Mapping[str, Any]) -> NewConversation:
    """Of fields as they were read."""
    tags = fields.get("tags", [])
    return NewConversation(
        f"c_{ordered_hex()}",
        fields.get("id") or new_id(),
        caller.user_id,
        caller.key_id,
        session_id,
        now,
        fields.get("title"),
        tags,
        dumps(tags).decode(),
        fields.get("metadata", "{}"),
    )


def shown(found: Conversation) -> dict[str, Any]:
    row = asdict(found)
    return {
        "id": found.id,
        "object": "conversation",
        **{
            name: row[name]
            for name in ("number", "user_id", "session_id", "parent_id", "parent_seq", "title", "summary")
        },
        **{name: loads(row[name].encode()) for name in ("tags", "metadata", "image_urls")},
        "pinned": found.pinned_at is not None,
        "archived": found.archived_at is not None,
        **{name: row[name] for name in ("message_count", "total_tokens_input", "total_tokens_output")},
        "total_cost": usd(found.total_cost_nanousd),
        "created_at": iso_time(found.created_at),
        "last_used": iso_time(found.last_used),
    }


def shown_message(found: KeptMessage) -> dict[str, Any]:
    """What was sent beside its content (`tool_calls`) stands beside ours, which win."""
    beside: dict[str, Any] = loads(found.extra.encode()) if found.extra else {}
    ours = {
        "id": found.id,
        "object": "conversation.message",
        "seq": found.seq,
        "role": found.role,
        "content": loads(found.content.encode()),
    }
    more: dict[str, Any] = {
        "tokens": found.tokens,
        "cost": usd(found.cost_nanousd),
        "model": found.model,
        "finish_reason": found.finish_reason,
        "created_at": iso_time(found.created_at),
    }
    if found.omitted_turns is not None:
        more["omitted_turns"] = found.omitted_turns
    return {**ours, **{name: value for name, value in beside.items() if name not in ours and name not in more}, **more}


def no_such_place(what: str) -> BadRequest:
    return BadRequest(f"There is no {what} with this id to begin after.", param="after", code="invalid_value")


def shown_session(found: Session) -> dict[str, Any]:
    return {
        "id": found.id,
        "object": "session",
        "user_id": found.user_id,
        "created_at": iso_time(found.created_at),
        "last_activity": iso_time(found.last_activity),
        "ended_at": iso_time(found.ended_at),
        "total_tokens": found.total_tokens,
        "total_cost": usd(found.total_cost_nanousd),
        "conversation_count": found.conversation_count,
        "is_active": found.ended_at is None,
    }

"""Stored chat completions, as OpenAI has them: what is kept of a call with `store: true`, and how it is shown again.

- Kept is an answer that came to its end: the whole object as the client saw it (put together, if it was streamed), what
  the request asked for, and its own messages. A conversation's history, put before them by us, is not among them.
- The id is the gateway's own, and leaves with the answer. What an upstream calls an answer may be anything, and the
  same again for the next one.
- `store` and `metadata` are ours then and do not reach the upstream. Without `store: true` both pass as they came.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar

from gateway.auth import Caller
from gateway.errors import BadRequest, NotFound
from gateway.ids import ordered_hex
from gateway.store import stored as rows
from gateway.store.database import Database
from gateway.store.stored import Found, Order, StoredCompletion
from gateway.store.text import clean
from gateway.wire.chat import ChatRequest, Message, text_of
from gateway.wire.jsontext import dumps, loads
from gateway.wire.operation import CHAT

Metadata = Mapping[str, str]
T = TypeVar("T")

MOST_PAIRS = 16
LONGEST_KEY = 64
LONGEST_VALUE = 512
_LARGEST_IMAGE = 8 * 1024 * 1024 * 4 // 3
"""8 MB, in base64."""
_SHOWN = (
    "tool_choice", "seed", "top_p", "temperature", "presence_penalty", "frequency_penalty", "tools", "response_format",
)  # fmt: skip
"""What OpenAI shows of the request."""
_OWN_ID = re.compile(r"chatcmpl-([0-9a-f]{44})")
_ANY_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class Keep:
    """What a request with `store: true` wants kept. `id` is that of its completion."""

    id: str
    request: ChatRequest
    """As the client sent it."""
    metadata: Metadata
    request_id: str

    def completed(self, answer: Mapping[str, Any], caller: Caller, model: str, at: int) -> StoredCompletion:
        """The row: `answer` as the client sees it, from the model that it asked for."""
        asked = self.request.data
        about = {"request_id": self.request_id, "input_user": asked.get("user")}
        about |= {key: asked.get(key) for key in _SHOWN}
        shown = {**about, **answer, "id": self.id, "object": "chat.completion"}
        for apart in ("metadata", "conversation_id"):
            shown.pop(apart, None)
        models = {model, answer.get("model")}
        return StoredCompletion(
            pk=_pk(self.id) or "",
            id=self.id,
            user_id=caller.user_id,
            key_id=caller.key_id,
            created_at=at,
            model=clean(model),
            metadata=dumps(self.metadata).decode(),
            completion=dumps(shown).decode(),
            messages=dumps(_message_rows(self.id, self.request.messages)).decode(),
            labels=[*labels(self.metadata), *(model_label(name) for name in models if isinstance(name, str))],
        )


def wanted(request: ChatRequest, request_id: str, *, allowed: bool) -> Keep | None:
    """None: it is not to be stored. Raises BadRequest."""
    store = request.data.get("store")
    if not store or request.operation != CHAT:
        return None
    if store is not True:
        raise _wrong("'store' must be true or false.", "store")
    if not allowed:
        raise BadRequest(
            "This gateway stores no content (conversations.store_content: false), so 'store' cannot be true.",
            param="store",
            code="unsupported_value",
        )
    metadata = read_metadata(request.data.get("metadata"))
    return Keep(f"chatcmpl-{ordered_hex()}", request, metadata, request_id)


def for_upstream(request: ChatRequest) -> ChatRequest:
    """A request that is to be stored, without what the upstream would store it by."""
    return request.with_fields(store=None, metadata=None)


def read_metadata(value: object) -> Metadata:
    """Checked. Raises BadRequest."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong("'metadata' must be an object of strings.", "metadata")
    if len(value) > MOST_PAIRS:
        raise _wrong(f"'metadata' has {len(value)} pairs; {MOST_PAIRS} are allowed.", "metadata")
    for key, text in value.items():
        if not 0 < len(key) <= LONGEST_KEY:
            raise _wrong(f"A key of 'metadata' must have 1 to {LONGEST_KEY} characters.", "metadata")
        if not isinstance(text, str):
            raise _wrong(f"'metadata.{key}' must be a string.", f"metadata.{key}")
        if len(text) > LONGEST_VALUE:
            raise _wrong(
                f"'metadata.{key}' has {len(text)} characters; {LONGEST_VALUE} are allowed.", f"metadata.{key}"
            )
    return value


def labels(metadata: Metadata) -> list[str]:
    """What the pairs can be found by."""
    return [_digest([key, value]) for key, value in metadata.items()]


def model_label(name: str) -> str:
    return _digest([name])


class StoredCompletions:
    """Those of one user. An id that is not one of them is NotFound, whoever else may have it."""

    def __init__(self, database: Database, user_id: str) -> None:
        self._database = database
        self._user_id = user_id

    async def get(self, completion_id: str) -> bytes:
        """The completion as JSON."""
        found = await rows.find(self._database, self._user_id, _checked(completion_id))
        return shown(_there(found, completion_id))

    async def listed(
        self, *, model: str | None, metadata: Sequence[tuple[str, str]], after: str | None, limit: int, order: Order
    ) -> list[Found]:
        """Raises BadRequest for an `after` that nobody gave out."""
        begin = None if after is None else _pk(after) or await self._place(after)
        wanted = {_digest([key, value]) for key, value in metadata} | ({model_label(model)} if model else set())
        return await rows.listed(
            self._database, self._user_id, labels=sorted(wanted), after=begin, limit=limit, order=order
        )

    async def messages(self, completion_id: str) -> list[Message]:
        """The rows of its messages, in their order."""
        found = await rows.messages(self._database, self._user_id, _checked(completion_id))
        messages: list[Message] = loads(_there(found, completion_id).encode())
        return messages

    async def change(self, completion_id: str, metadata: Metadata) -> bytes:
        """Replaces the metadata. The completion as JSON."""
        _checked(completion_id)
        async with self._database.transaction() as transaction:
            held = _there(await rows.hold(transaction, self._user_id, completion_id), completion_id)
            before, after = set(labels(loads(held.metadata.encode()))), set(labels(metadata))
            text = dumps(metadata).decode()
            await rows.set_metadata(
                transaction, self._user_id, completion_id, held, text, gone=before - after, come=after - before
            )
        return shown(Found(held.pk, held.id, held.conversation_id, text, held.completion))

    async def delete(self, completion_id: str) -> None:
        if not await rows.delete(self._database, self._user_id, _checked(completion_id)):
            raise _unknown(completion_id)

    async def _place(self, completion_id: str) -> str:
        known = _ANY_ID.fullmatch(completion_id) is not None
        found = await rows.place(self._database, self._user_id, completion_id) if known else None
        if found is None:
            raise _wrong("There is no stored completion with this id to begin after.", "after")
        return found


def shown(found: Found) -> bytes:
    """One as JSON: put together from texts, for none of them has changed since it was written."""
    where = b"" if found.conversation_id is None else b',"conversation_id":' + dumps(found.conversation_id)
    return b'%b%b,"metadata":%b}' % (found.completion.encode()[:-1], where, found.metadata.encode())


def _pk(completion_id: str) -> str | None:
    """Of an id that the gateway gave: also when its row is gone."""
    own = _OWN_ID.fullmatch(completion_id)
    return None if own is None else f"s_{own[1]}"


def _message_rows(completion_id: str, messages: Sequence[Message]) -> list[Message]:
    """As OpenAI lists them: the text as `content`, and the parts, if there were any, beside it."""
    found = []
    for number, message in enumerate(messages):
        content = message.get("content")
        parts = None
        if isinstance(content, list):
            parts = [part for part in content if not _is_too_large(part)]
            content = text_of(content) or None
        row = {"id": f"{completion_id}-{number}", "role": message["role"], "content": content, "content_parts": parts}
        found.append({**message, "name": message.get("name"), **row})
    return found


def _is_too_large(part: object) -> bool:
    """OpenAI keeps no picture of more than 8 MB."""
    image = part.get("image_url") if isinstance(part, dict) else None
    url = image.get("url") if isinstance(image, dict) else None
    return isinstance(url, str) and len(url) > _LARGEST_IMAGE


def _digest(words: Sequence[str]) -> str:
    return blake2b(dumps(words), digest_size=16).hexdigest()


def _checked(completion_id: str) -> str:
    if _ANY_ID.fullmatch(completion_id) is None:
        raise _unknown(completion_id)
    return completion_id


def _there(found: T | None, completion_id: str) -> T:
    if found is None:
        raise _unknown(completion_id)
    return found


def _unknown(completion_id: str) -> NotFound:
    return NotFound(
        f"You have no stored chat completion '{clean(completion_id, 128)}'. Those made with 'store: true' are kept.",
        param="completion_id",
    )


def _wrong(sentence: str, param: str) -> BadRequest:
    return BadRequest(sentence, param=param, code="invalid_value")

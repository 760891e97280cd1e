"""What of a stored history fits into the window of a model: the oldest whole turns are left out.

    kept, omitted = await fit(found.messages, request.messages, window=model.context_window,
                              reserve=reserved(request.data, window), model=upstream_model, counter=counter)

Rules:

- A turn is a user message and everything up to the next one. What comes before the first belongs to the first turn. A
  turn that answers tool calls of an earlier one is one turn with it: no result without its call.
- System and developer messages stay, wherever they stand. What is asked stays, too, and so does the last turn of the
  history if what is asked goes on with it (a tool's result, say) instead of beginning a turn.
- No token is shorter than a byte. What fits by its bytes is not counted at all.
- Models whose encoding the package has (`tokens`) are counted; for all others a token is taken to have three bytes of
  the message's JSON text, which is somewhat too many for English and about right for most other scripts. A picture
  counts `estimates.PICTURE`, sound and files by their size.
- Counting begins at the newest turn and ends at the one that does not fit, so its work is bounded by the window and not
  by the length of the history.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from gateway import estimates
from gateway.store.conversations import StoredMessage
from gateway.tokens import TokenCounter
from gateway.wire.chat import Message
from gateway.wire.jsontext import dumps, loads

BYTES_A_TOKEN = 3
AROUND_MESSAGE = 8
SHORTEST_ANSWER = 1024
_SYSTEM = frozenset({"system", "developer"})
_ALSO_READ = ("tools", "functions", "response_format")
_LARGE = 1 << 18


async def fit(
    history: Sequence[StoredMessage],
    asked: Sequence[Message],
    *,
    window: int | None,
    reserve: int,
    model: str,
    counter: TokenCounter,
) -> tuple[Sequence[StoredMessage], int]:
    """The part of the history that is sent with what is asked, and how many turns it leaves out (0: all is kept).

    `window` in tokens; None: nobody knows it, and nothing is cut. `reserve`: tokens that something else takes, as
    `reserved` says. `model`: the upstream's name for it.
    """
    if window is None or all(message.role in _SYSTEM for message in history):
        return history, 0
    room = window - reserve
    fixed = [_opened(message) for message in history if message.role in _SYSTEM]
    said = sum(_bytes_of(message) for message in history) + sum(map(_bytes_bound, asked))
    if said <= room:
        return history, 0
    scale = _Counted(model, counter) if await counter.knows(model) else _Estimated()
    room -= await scale.count([*fixed, *asked])
    starts = _turns(history)
    last = len(starts) - 1 if _goes_on(asked) else len(starts)
    kept = await _first_kept(history, starts, last, room, scale)
    if kept == 0:
        return history, 0
    begin = starts[kept] if kept < len(starts) else len(history)
    return [*(message for message in history[:begin] if message.role in _SYSTEM), *history[begin:]], kept


def reserved(data: Mapping[str, Any], window: int | None) -> int:
    """Tokens of the window that the messages cannot have: the answer, as long as the request lets it be, else a quarter
    of the window or `SHORTEST_ANSWER`, whichever is less; and the definitions of its tools."""
    if window is None:
        return 0
    told = [_count(data.get(key)) for key in ("max_completion_tokens", "max_tokens")]
    answer = max(told) or min(SHORTEST_ANSWER, window // 4)
    return answer + sum(_tokens_of(len(dumps(data[key]))) for key in _ALSO_READ if data.get(key))


async def _first_kept(
    history: Sequence[StoredMessage], starts: Sequence[int], last: int, room: int, scale: _Counted | _Estimated
) -> int:
    """The oldest turn that is kept, by its place in `starts`; those from `last` on are kept in any case."""
    ends = [*starts[1:], len(history)]
    for turn in range(last, len(starts)):
        room -= await scale.count(_said(history[starts[turn] : ends[turn]]))
    kept = last
    while kept > 0 and room >= 0:
        batch: list[Message] = []
        size, first = 0, kept
        while first > 0:  # what fits by its bytes is taken together, and counted together
            turn_said = _said(history[starts[first - 1] : ends[first - 1]])
            bound = sum(map(_bytes_bound, turn_said))
            if batch and (size + bound > room or size + bound > _LARGE):
                break
            batch += turn_said
            size += bound
            first -= 1
            if size > room:
                break
        room -= await scale.count(batch)
        if room >= 0:
            kept = first
        await asyncio.sleep(0)
    return kept


class _Counted:
    """By the model's own encoding."""

    def __init__(self, model: str, counter: TokenCounter) -> None:
        self._model, self._counter = model, counter

    async def count(self, messages: Sequence[Message]) -> int:
        beside = sum(_beside_text(message.get("content")) for message in messages)
        return beside + (await self._counter.usage(self._model, messages, ())).input_tokens if messages else 0


class _Estimated:
    async def count(self, messages: Sequence[Message]) -> int:
        return sum(
            AROUND_MESSAGE + _tokens_of(_text_bytes(message)) + _beside_text(message.get("content"))
            for message in messages
        )


# --- turns


def _turns(history: Sequence[StoredMessage]) -> list[int]:
    """Where turns begin. One pass: each tool call and each of its results is looked at once."""
    starts = [0]
    called: dict[str, int] = {}
    begun = False
    for place, message in enumerate(history):
        if message.role == "user":
            if begun:
                starts.append(place)
            begun = True
        if message.extra is None or '"tool_call' not in message.extra:
            continue
        extra = loads(message.extra.encode())
        for call_id in _calls(extra.get("tool_calls")):
            called[call_id] = place
        answered = called.get(answer) if isinstance(answer := extra.get("tool_call_id"), str) else None
        while answered is not None and starts[-1] > answered:
            starts.pop()
    return starts


def _calls(calls: object) -> list[str]:
    found = [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [call_id for call_id in found if isinstance(call_id, str)]


def _goes_on(asked: Sequence[Message]) -> bool:
    """Does what is asked belong to the turn before it?"""
    first = next((message.get("role") for message in asked if message.get("role") not in _SYSTEM), None)
    return first != "user"


# --- sizes


def _bytes_of(message: StoredMessage) -> int:
    """No fewer than the tokens it has. A picture may be larger than its address."""
    pictures = message.content.count('"image_url"') if message.content.startswith("[") else 0
    return AROUND_MESSAGE + _length(message.content) + _length(message.extra or "") + pictures * estimates.PICTURE


def _length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _bytes_bound(message: Message) -> int:
    """No fewer than the tokens it has."""
    return AROUND_MESSAGE + _text_bytes(message) + _beside_text(message.get("content"))


def _text_bytes(message: Message) -> int:
    content = message.get("content")
    size = sum(len(dumps(value)) for key, value in message.items() if key not in ("role", "content"))
    if isinstance(content, list):
        return size + sum(len(dumps(part)) for part in content if _is_text(part))
    return size + len(dumps(content))


def _beside_text(content: object) -> int:
    """Tokens of pictures, sound and files."""
    if not isinstance(content, list):
        return 0
    return sum(estimates.of_part(part) for part in content if isinstance(part, dict) and not _is_text(part))


def _is_text(part: object) -> bool:
    return not isinstance(part, dict) or "text" in part or "refusal" in part


def _tokens_of(size: int) -> int:
    return -(-size // BYTES_A_TOKEN)


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _opened(message: StoredMessage) -> Message:
    extra: Message = loads(message.extra.encode()) if message.extra else {}
    return {"role": message.role, "content": loads(message.content.encode()), **extra}


def _said(messages: Sequence[StoredMessage]) -> list[Message]:
    """Those that may be left out."""
    return [_opened(message) for message in messages if message.role not in _SYSTEM]

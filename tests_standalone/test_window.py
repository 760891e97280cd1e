"""What of a long history is still sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from gateway.store.conversations import StoredMessage
from gateway.tokens import TokenCounter
from gateway.window import fit, reserved

KNOWN, UNKNOWN = "gpt-4o", "a-model-of-ours"
WORDS = "twelve words that cost about twelve tokens when somebody counts them well "


@pytest.fixture
async def counter() -> AsyncIterator[TokenCounter]:
    counter = TokenCounter()
    yield counter
    counter.close()


def stored(role: str, content: Any, **extra: Any) -> StoredMessage:
    return StoredMessage("", role, json.dumps(content), json.dumps(extra) if extra else None, None)


def called(call_id: str) -> StoredMessage:
    call = {"id": call_id, "type": "function", "function": {"name": "look", "arguments": "{}"}}
    return stored("assistant", None, tool_calls=[call])


def turns(count: int, text: str = WORDS) -> list[StoredMessage]:
    return [
        message
        for number in range(count)
        for message in (stored("user", f"q{number} {text}"), stored("assistant", f"a{number} {text}"))
    ]


def shown(messages: Sequence[StoredMessage]) -> list[str]:
    """Roles, and the first word of what was said."""
    found = []
    for message in messages:
        content = json.loads(message.content)
        found.append(f"{message.role[0]}:{content.split()[0] if isinstance(content, str) else ''}")
    return found


ASKED = [{"role": "user", "content": "and now?"}]


async def test_a_history_that_fits_is_the_same_object(counter: TokenCounter) -> None:
    history = turns(3)
    assert await fit(history, ASKED, window=10_000, reserve=100, model=KNOWN, counter=counter) == (history, 0)
    assert (await fit(history, ASKED, window=10_000, reserve=100, model=KNOWN, counter=counter))[0] is history


async def test_nothing_is_cut_where_nobody_knows_the_window(counter: TokenCounter) -> None:
    history = turns(3)
    kept, omitted = await fit(history, ASKED, window=None, reserve=10**9, model=KNOWN, counter=counter)
    assert kept is history
    assert omitted == 0


@pytest.mark.parametrize("model", [KNOWN, UNKNOWN])
async def test_the_oldest_whole_turns_go_and_the_system_message_stays(model: str, counter: TokenCounter) -> None:
    history = [stored("system", "be brief"), *turns(10)]
    kept, omitted = await fit(history, ASKED, window=300, reserve=50, model=model, counter=counter)
    assert 0 < omitted < 10
    left = [f"{role}{number}" for number in range(omitted, 10) for role in ("u:q", "a:a")]
    assert shown(kept) == ["s:be", *left]


async def test_what_is_counted_fits_and_one_turn_more_would_not(counter: TokenCounter) -> None:
    history, window, reserve = turns(200), 3_000, 500

    async def tokens(messages: Sequence[StoredMessage]) -> int:
        said = [{"role": message.role, "content": json.loads(message.content)} for message in messages]
        return (await counter.usage(KNOWN, [*said, *ASKED], ())).input_tokens

    kept, omitted = await fit(history, ASKED, window=window, reserve=reserve, model=KNOWN, counter=counter)
    assert omitted == 200 - len(kept) // 2
    assert await tokens(kept) <= window - reserve
    assert await tokens(history[-len(kept) - 2 :]) > window - reserve - 100


async def test_what_fits_only_when_it_is_counted_is_kept(counter: TokenCounter) -> None:
    history = turns(10)
    said = sum(len(message.content) for message in history)
    kept, omitted = await fit(history, ASKED, window=said // 2, reserve=0, model=KNOWN, counter=counter)
    assert kept is history
    assert omitted == 0


async def test_a_system_message_in_the_middle_stays_in_its_place(counter: TokenCounter) -> None:
    history = [*turns(4), stored("developer", "from now on in French"), *turns(4)]
    kept, omitted = await fit(history, ASKED, window=250, reserve=50, model=UNKNOWN, counter=counter)
    assert omitted > 4
    assert shown(kept)[0] == "d:from"
    assert shown(kept)[1].startswith("u:")


async def test_without_room_for_any_turn_system_and_question_are_sent(counter: TokenCounter) -> None:
    history = [stored("system", "be brief"), *turns(3)]
    kept, omitted = await fit(history, ASKED, window=20, reserve=19, model=KNOWN, counter=counter)
    assert (shown(kept), omitted) == (["s:be"], 3)


async def test_where_only_system_messages_are_stored_no_turn_is_left_out(counter: TokenCounter) -> None:
    """The rest is the client's own."""
    history = [stored("system", "be brief")]
    assert await fit(history, ASKED, window=20, reserve=19, model=KNOWN, counter=counter) == (history, 0)


async def test_a_turn_with_tool_calls_goes_or_stays_as_a_whole(counter: TokenCounter) -> None:
    tools = [
        stored("user", f"weather? {WORDS}"),
        called("c1"),
        stored("tool", WORDS * 20, tool_call_id="c1"),
        stored("assistant", "sunny"),
    ]
    history = [*turns(2), *tools, *turns(1)]
    for window in range(10, 700, 7):
        kept, omitted = await fit(history, ASKED, window=window, reserve=0, model=UNKNOWN, counter=counter)
        assert len(kept) in (0, 2, 6, 8, 10)
        assert omitted == {0: 4, 2: 3, 6: 2, 8: 1, 10: 0}[len(kept)]


async def test_a_result_that_comes_after_another_question_keeps_its_call(counter: TokenCounter) -> None:
    history = [
        stored("user", "first"),
        called("c1"),
        stored("user", "are you still there?"),
        stored("tool", "12 degrees", tool_call_id="c1"),
        stored("assistant", WORDS),
    ]
    for window in range(10, 200, 3):
        kept, omitted = await fit(history, ASKED, window=window, reserve=0, model=UNKNOWN, counter=counter)
        assert (len(kept), omitted) in ((0, 1), (5, 0))


async def test_a_result_that_is_asked_keeps_the_turn_of_its_call(counter: TokenCounter) -> None:
    history = [*turns(3), stored("user", "weather?"), called("c1")]
    asked = [{"role": "tool", "tool_call_id": "c1", "content": WORDS * 10}]
    kept, omitted = await fit(history, asked, window=20, reserve=0, model=KNOWN, counter=counter)
    assert (shown(kept), omitted) == (["u:weather?", "a:"], 3)


async def test_a_greeting_belongs_to_the_first_turn(counter: TokenCounter) -> None:
    history = [stored("assistant", "hello"), *turns(2)]
    kept, omitted = await fit(history, ASKED, window=120, reserve=20, model=UNKNOWN, counter=counter)
    assert (shown(kept), omitted) == (["u:q1", "a:a1"], 1)


async def test_a_picture_counts_though_its_address_is_short(counter: TokenCounter) -> None:
    picture = {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}
    history = [stored("user", [{"type": "text", "text": "see"}, picture]), *turns(1)]
    for model in (KNOWN, UNKNOWN):
        kept, omitted = await fit(history, ASKED, window=1_500, reserve=0, model=model, counter=counter)
        assert (len(kept), omitted) == (2, 1)


async def test_a_large_picture_does_not_count_by_its_bytes(counter: TokenCounter) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    history = [stored("user", [picture]), *turns(1)]
    for model in (KNOWN, UNKNOWN):
        kept, omitted = await fit(history, ASKED, window=8_000, reserve=0, model=model, counter=counter)
        assert (kept, omitted) == (history, 0)


async def test_other_scripts_are_not_taken_for_english(counter: TokenCounter) -> None:
    history = turns(1, "語" * 1_000)
    _, omitted = await fit(history, ASKED, window=1_000, reserve=0, model=UNKNOWN, counter=counter)
    assert omitted == 1


@pytest.mark.parametrize("model", [KNOWN, UNKNOWN])
async def test_ten_thousand_messages_let_others_run(model: str, counter: TokenCounter) -> None:
    await counter.usage(KNOWN, ASKED, ())  # reads the encoding
    others = 0

    async def work() -> None:
        nonlocal others
        while True:
            await asyncio.sleep(0)
            others += 1

    working = asyncio.create_task(work())
    history = turns(5_000, WORDS * 3)
    kept, omitted = await fit(history, ASKED, window=128_000, reserve=1_000, model=model, counter=counter)
    working.cancel()
    assert 0 < omitted < 5_000
    assert len(kept) == 2 * (5_000 - omitted)
    assert others > 3


@pytest.mark.parametrize(
    ("data", "window", "room"),
    [
        ({}, 128_000, 1_024),
        ({}, 2_000, 500),
        ({"max_tokens": 300}, 128_000, 300),
        ({"max_tokens": 300, "max_completion_tokens": 700}, 128_000, 700),
        ({"max_tokens": None}, 128_000, 1_024),
        ({"tools": ["x" * 296]}, 128_000, 1_124),
        ({"max_tokens": 300}, None, 0),
    ],
)
def test_room_for_the_answer(data: dict[str, Any], window: int | None, room: int) -> None:
    assert reserved(data, window) == room

"""Which conversation a call belongs to, over real sockets and several workers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest

from tests_standalone.conftest import eventually
from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import Start, in_front_of
from tests_standalone.system.http import Answer, call, post_chat, request_bytes

Message = dict[str, Any]


@pytest.fixture
async def gateway(upstream: ScriptedUpstream, start: Start, database_url: str, workers: int) -> GatewayProcess:
    return await start(in_front_of(upstream, database_url, workers=workers))


def user(text: str) -> Message:
    return {"role": "user", "content": text}


async def say(gateway: GatewayProcess, *messages: Message | str, model: str = "answer", **more: Any) -> Answer:
    said = [user(item) if isinstance(item, str) else item for item in messages]
    headers = more.pop("headers", None)
    return await post_chat(gateway.port, {"model": model, "messages": said, **more}, headers)


async def talk(gateway: GatewayProcess, history: list[Message], text: str, **more: Any) -> Answer:
    """One round of a loop as people write it, whose history grows."""
    history.append(user(text))
    answer = await say(gateway, *history, **more)
    assert answer.status == 200, answer.body
    history.append(answer.json["choices"][0]["message"])
    return answer


async def query(gateway: GatewayProcess, sql: str) -> list[dict[str, Any]]:
    return await asyncio.to_thread(gateway.query, sql)


async def stored(gateway: GatewayProcess, conversation: str) -> list[str]:
    """The conversation's own messages, each with its place."""
    sql = f"SELECT seq, content FROM messages_view WHERE conversation_id = '{conversation}' ORDER BY seq"
    return [f"{row['seq']} {row['content']}" for row in await query(gateway, sql)]


async def ids(gateway: GatewayProcess) -> set[str]:
    return {row["id"] for row in await query(gateway, "SELECT id FROM conversations_view")}


def id_of(answer: Answer) -> str:
    named: str = answer.json["conversation_id"]
    assert answer.headers["x-conversation-id"] == named
    return named


async def sent(upstream: ScriptedUpstream) -> list[str]:
    """What the upstream was sent last, as texts."""
    return [message["content"] for message in upstream.tally[-1].request["messages"]]


async def test_calls_without_an_id_find_their_conversation(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    """A loop is one conversation. Two that begin alike are two. One that goes on in two ways, or is edited in the
    middle, has a branch. What comes is never mixed."""
    system = {"role": "system", "content": "Be kind."}
    loop = [system]
    seen = {id_of(await talk(gateway, loop, f"question {number}")) for number in range(4)}
    (name,) = seen
    assert await ids(gateway) == seen
    assert [line.split()[0] for line in await stored(gateway, name)] == [str(number) for number in range(1, 10)]

    first, second = [id_of(await say(gateway, system, "the same")) for _ in range(2)]
    assert len({name, first, second}) == 3

    edited = [*loop[:3], user("another question 1")]
    branch = id_of(await say(gateway, *edited))
    assert await query(gateway, f"SELECT parent_id, message_count FROM conversations_view WHERE id = '{branch}'") == [
        {"parent_id": name, "message_count": 5}
    ]
    own = await stored(gateway, branch)
    assert (own[0], len(own)) == ("4 another question 1", 2)
    assert len(await stored(gateway, name)) == 9

    regenerated = await say(gateway, *loop[:-1])
    assert id_of(regenerated) not in {name, branch, first, second}
    assert [line.split()[0] for line in await stored(gateway, id_of(regenerated))] == ["8", "9"]

    await say(gateway, "and now?", conversation_id=branch)
    texts = await sent(upstream)
    assert [texts[0], texts[1], texts[3], texts[5]] == ["Be kind.", "question 0", "another question 1", "and now?"]
    assert len(texts) == 6


async def test_eight_calls_at_once_that_go_on_from_one_answer(gateway: GatewayProcess) -> None:
    history: list[Message] = []
    name = id_of(await talk(gateway, history, "begin"))
    answers = await asyncio.gather(*(say(gateway, *history, "go on") for _ in range(8)))
    assert [answer.status for answer in answers] == [200] * 8
    found = [answer.json["conversation_id"] for answer in answers]
    assert len(set(found)) == 8
    assert name in found
    for other in found:
        lines = await stored(gateway, other)
        assert [line.split()[0] for line in lines][-2:] == ["3", "4"]
        assert len(lines) == (4 if other == name else 2)
    rows = await query(gateway, "SELECT conversation_id, COUNT(*) AS n FROM usage_view GROUP BY conversation_id")
    assert {row["conversation_id"]: row["n"] for row in rows} == {other: 1 + (other == name) for other in found}
    sessions = await query(gateway, "SELECT SUM(conversation_count) AS n FROM sessions_view")
    assert sessions == [{"n": 8}]


async def test_what_broke_off_is_known_by_what_its_client_has_of_it(gateway: GatewayProcess) -> None:
    broken = await say(gateway, "tell me", model="cut-fin", stream=True)
    text = "".join(
        choice["delta"].get("content") or ""
        for event in broken.events
        if isinstance(event, dict)
        for choice in event.get("choices", ())
    )
    assert text
    name = broken.headers["x-conversation-id"]
    for seen in (text, text[: len(text) // 2]):
        resent = [user("tell me"), {"role": "assistant", "content": seen}, user(f"go on after {len(seen)}")]
        answer = await say(gateway, *resent)
        row = await query(gateway, f"SELECT id, parent_id FROM conversations_view WHERE id = '{id_of(answer)}'")
        assert name in (row[0]["id"], row[0]["parent_id"])
    other = await say(gateway, "tell me", {"role": "assistant", "content": "not that"}, "go on")
    assert (await query(gateway, f"SELECT parent_id FROM conversations_view WHERE id = '{id_of(other)}'")) == [
        {"parent_id": None}
    ]


async def test_a_conversation_that_is_named_takes_one_turn_at_a_time(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    held = [asyncio.create_task(say(gateway, "one", model="slow-headers", conversation_id="chat-1")) for _ in range(6)]
    answers = await asyncio.gather(*held)
    assert sorted(answer.status for answer in answers) == [200, *[409] * 5]
    busy = next(answer for answer in answers if answer.status == 409)
    assert busy.json["error"]["code"] == "conversation_busy"
    assert int(busy.headers["retry-after-ms"]) > 0
    assert len(upstream.tally) == 1

    for _ in range(3):  # whatever ends a call ends its lease, too
        assert (await say(gateway, "two", model="error-400", conversation_id="chat-1")).status == 400
    assert (await say(gateway, "three", conversation_id="chat-1", model="no such model", stream=7)).status == 400
    assert (await say(gateway, "four", conversation_id="chat-1")).status == 200
    assert [text for text in await sent(upstream) if text in ("one", "two", "three", "four")] == ["one", "four"]

    history = [
        user("one"),
        await _answer_at(gateway, "chat-1", 2),
        user("four"),
        await _answer_at(gateway, "chat-1", 4),
    ]
    again = await say(gateway, *history, "five", conversation_id="chat-1")
    assert again.status == 200
    assert len(await sent(upstream)) == 5
    assert len(await stored(gateway, "chat-1")) == 6
    edited = await say(gateway, *history[:2], "another four", conversation_id="chat-1")
    assert await query(gateway, f"SELECT parent_id FROM conversations_view WHERE id = '{id_of(edited)}'") == [
        {"parent_id": "chat-1"}
    ]
    assert len(await stored(gateway, "chat-1")) == 6


async def test_a_client_that_leaves_lets_the_next_one_in(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    for stream in (True, False):
        for model in ("never", "hang-mid-stream"):
            body = {"model": model, "stream": stream, "conversation_id": f"chat-{stream}-{model}"}
            text = request_bytes("POST", "/v1/chat/completions", body={**body, "messages": [user("one")]})
            seen = len(upstream.tally)
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(text)
            await writer.drain()

            async def arrived(seen: int = seen) -> bool:
                return len(upstream.tally) > seen

            await eventually(arrived)
            if stream and model == "hang-mid-stream":
                await reader.readuntil(b"data: ")
            writer.close()

            async def served(body: dict[str, Any] = body) -> bool:
                return (await say(gateway, "two", conversation_id=body["conversation_id"])).status == 200

            await eventually(served)
    assert await query(gateway, "SELECT COUNT(*) AS n FROM turn_leases") == [{"n": 0}]


async def _answer_at(gateway: GatewayProcess, conversation: str, seq: int) -> Message:
    sql = f"SELECT content FROM messages_view WHERE conversation_id = '{conversation}' AND seq = {seq}"
    return {"role": "assistant", "content": (await query(gateway, sql))[0]["content"]}


async def test_a_header_groups_and_refuses_nobody(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    header = {"x-openwebui-chat-id": "7c5a::m"}
    history: list[Message] = []
    await talk(gateway, history, "one", headers=header)
    await talk(gateway, history, "two", headers=header)
    title = await say(gateway, "### Task:\nGenerate a title", headers=header)
    assert title.status == 200
    assert "conversation_id" not in title.json
    of_chat_ui = await say(gateway, 'User message: "one"', headers={"chatui-conversation-id": ""})
    assert of_chat_ui.status == 200
    assert "conversation_id" not in of_chat_ui.json
    assert await ids(gateway) == {"7c5a"}
    assert [line.split()[0] for line in await stored(gateway, "7c5a")] == ["1", "2", "3", "4"]
    same = [say(gateway, *history, "three", model="slow-headers", headers=header) for _ in range(4)]
    assert {answer.status for answer in await asyncio.gather(*same)} == {200}
    assert [line.split()[0] for line in await stored(gateway, "7c5a")] == [str(number) for number in range(1, 13)]
    assert (await say(gateway, "x", headers={"x-conversation-id": "a/b"})).status == 400
    assert (await say(gateway, "x", headers={"x-conversation-id": "conv_" + "0" * 32})).status == 404


async def test_a_turn_can_wait_for_the_one_before(upstream: ScriptedUpstream, start: Start, database_url: str) -> None:
    small = {"backend": "up", "model": "answer", "context_window": 1000}
    more: dict[str, Any] = {"conversations": {"busy": "wait", "header": "X-Chat"}, "models": {"small": small}}
    gateway = await start(in_front_of(upstream, database_url, workers=2, **more))
    asked = [say(gateway, f"q{number}", model="slow-headers", conversation_id="chat") for number in range(4)]
    assert {answer.status for answer in await asyncio.gather(*asked)} == {200}
    lines = [line.split() for line in await stored(gateway, "chat")]
    assert [line[0] for line in lines] == [str(number) for number in range(1, 9)]
    assert sorted(line[1] for line in lines[::2]) == ["q0", "q1", "q2", "q3"]
    assert max(len(record.request["messages"]) for record in upstream.tally) == 7

    assert id_of(await say(gateway, "hi", headers={"x-chat": "mine"})) == "mine"
    named = {"x-chat": "mine", "chatui-conversation-id": "theirs", "x-conversation-id": "told"}
    assert id_of(await say(gateway, "hi", headers=named)) == "told"
    assert id_of(await say(gateway, "hi", headers=named, conversation_id="body")) == "body"

    for number in range(6):
        answer = await say(gateway, f"{number} " + "word " * 100, model="small", conversation_id="long", max_tokens=10)
        assert answer.status == 200
    omitted = int(answer.headers["x-gateway-omitted-turns"])
    assert (await sent(upstream))[0].startswith(f"{omitted} word")
    rows = await query(gateway, "SELECT omitted_turns FROM messages WHERE omitted_turns > 0 ORDER BY created_at DESC")
    assert rows[0] == {"omitted_turns": omitted}


async def test_what_the_window_cannot_hold_is_left_out_and_told(
    upstream: ScriptedUpstream, start: Start, database_url: str
) -> None:
    """The oldest turns, whole: a result goes with its call. The system message stays."""
    small = {"backend": "up", "model": "answer", "context_window": 1000}
    gateway = await start(in_front_of(upstream, database_url, models={"small": small}))
    look = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    seen = {}
    for number in range(8):
        said: list[Message] = [user(f"question {number}")]
        if number == 0:
            said.insert(0, {"role": "system", "content": "Be kind."})
        if number == 2:
            said.append({"role": "assistant", "content": None, "tool_calls": [look]})
            said.append({"role": "tool", "tool_call_id": "call_1", "content": "found " * 60})
        said[-1]["content"] += " word" * 60
        answer = await say(gateway, *said, model="small", conversation_id="long", max_tokens=10)
        assert answer.status == 200
        omitted = int(answer.headers.get("x-gateway-omitted-turns", "0"))
        seen[number] = omitted
        roles = [message["role"] for message in upstream.tally[-1].request["messages"]]
        texts = [text for text in await sent(upstream) if text is not None]
        assert (roles[0], texts[0]) == ("system", "Be kind.")
        kept = [text.split()[1] for text in texts if text.startswith("question")]
        assert kept == [str(turn) for turn in range(omitted, number + 1)]
        assert roles.count("tool") == (2 in range(omitted, number + 1))
        assert roles.count("assistant") == len(kept) - 1 + roles.count("tool")
    assert seen[0] == 0
    assert seen[7] >= 3, "the turn with the tool is left out"
    assert any(0 < omitted < 3 for omitted in seen.values()), "and was kept while older ones were not"
    listed = await call(gateway.port, "GET", "/conversations/long/messages?limit=100")
    answers = [message for message in listed.json["data"] if message["role"] == "assistant"]
    assert [one.get("omitted_turns", 0) for one in answers if "tool_calls" not in one] == list(seen.values())


async def test_who_waits_gives_up_with_its_client_or_its_worker(upstream: ScriptedUpstream, start: Start) -> None:
    gateway = await start(in_front_of(upstream, conversations={"busy": "wait"}))
    running = asyncio.create_task(say(gateway, "one", model="held-headers", conversation_id="chat"))
    await eventually(lambda: query(gateway, "SELECT 1 AS found FROM turn_leases"))
    asked = {"model": "answer", "conversation_id": "chat", "messages": [user("two")]}
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(request_bytes("POST", "/v1/chat/completions", body=asked))
    await asyncio.sleep(0.2)
    writer.close()

    async def logged() -> bool:
        return '"status":499' in gateway.logs()

    assert await eventually(logged)
    waiting = asyncio.create_task(say(gateway, "three", conversation_id="chat"))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    gateway.terminate()
    assert (await waiting).status == 409
    assert not running.done()
    upstream.release()
    assert (await running).status == 200
    assert len(upstream.tally) == 1


async def test_the_lease_of_a_worker_that_is_killed_runs_out(
    upstream: ScriptedUpstream, start: Start, database_url: str
) -> None:
    gateway = await start(in_front_of(upstream, database_url, workers=2))
    hanging = asyncio.create_task(say(gateway, "one", model="never", conversation_id="chat"))
    await eventually(lambda: query(gateway, "SELECT 1 AS found FROM turn_leases"))
    assert (await say(gateway, "two", conversation_id="chat")).status == 409
    for pid in gateway.worker_pids():
        os.kill(pid, signal.SIGKILL)
    await asyncio.wait({hanging})
    killed, status = time.monotonic(), 0
    while status != 200 and time.monotonic() < killed + 60:
        await asyncio.sleep(0.25)
        try:
            status = (await say(gateway, "three", conversation_id="chat")).status
        except (OSError, IndexError):  # no worker is back yet
            continue
        assert status in (200, 409, 503)
    assert status == 200
    assert time.monotonic() - killed < 30

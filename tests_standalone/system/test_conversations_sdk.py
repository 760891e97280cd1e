"""Chats of the official SDKs, which know nothing of conversations: what comes of them, on every kind of backend.

The same steps in Python and in Node (`node/conversations.mjs`). Each gives the chats as the client has them, and of
every call the conversation and the usage that it was told; then the gateway is asked, and the upstream's own tally.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests_standalone.support.engine import TinyEngine
from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.node import run_node
from tests_standalone.support.ollama import ScriptedOllama
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import PRICE, Start
from tests_standalone.system.http import call

Json = dict[str, Any]
Tally = tuple[int, int]
"""Tokens in and out, as the upstream counted them."""
SYSTEM = {"role": "system", "content": "Be brief"}


@dataclass
class Place:
    """A gateway in front of one kind of upstream. `tally` where the upstream keeps one."""

    gateway: GatewayProcess
    model: str
    tally: Callable[[], Tally] | None = None


@pytest.fixture(scope="module")
def engine() -> Iterator[TinyEngine]:
    with TinyEngine() as running:
        yield running


@pytest.fixture(params=["echo-sqlite", "openai-postgres", "ollama-sqlite", "engine-postgres"])
async def place(request: pytest.FixtureRequest, start: Start, database_urls: dict[str, str]) -> AsyncIterator[Place]:
    """Each kind once, two on each database."""
    kind, _, engine_of_rows = request.param.partition("-")

    async def behind(model: str, backend: Json, tally: Callable[[], Tally] | None = None) -> Place:
        models = {model: {"backend": "up", "price": PRICE}}
        server, database = {"workers": 2}, {"url": database_urls[engine_of_rows]}
        config = {"backends": {"up": backend}, "models": models, "server": server, "database": database}
        return Place(await start(config), model, tally)

    match kind:
        case "echo":
            yield await behind("echo", {"type": "scripted"})
        case "openai":
            async with ScriptedUpstream() as upstream:
                backend = {"type": "openai", "base_url": upstream.base_url, "api_key": "any"}
                yield await behind("answer", backend, lambda: _told_by_openai(upstream))
        case "ollama":
            async with ScriptedOllama() as ollama:
                backend = {"type": "ollama", "base_url": ollama.root_url}
                yield await behind("llama3.1:8b", backend, lambda: _told_by_ollama(ollama))
        case "engine":
            running: TinyEngine = request.getfixturevalue("engine")
            yield await behind("tiny", {"type": "openai", "base_url": running.base_url, "api_key": running.api_key})


def _told_by_openai(upstream: ScriptedUpstream) -> Tally:
    used = [record.usage for record in upstream.tally if record.usage is not None]
    return sum(usage.prompt for usage in used), sum(usage.completion for usage in used)


def _told_by_ollama(ollama: ScriptedOllama) -> Tally:
    """Its tokens are words, and it says `You said:` and the question."""
    asked = [[text["content"] for text in seen.request["messages"]] for seen in ollama.of("/api/chat")]
    return (
        sum(len(text.split()) for texts in asked for text in texts),
        sum(len(texts[-1].split()) + 2 for texts in asked),
    )


# --- the steps


@dataclass
class Talker:
    """The Python SDK's user. Every other call is streamed; none is repeated, so a 409 would be an error."""

    sdk: AsyncOpenAI
    model: str
    calls: list[Json] = field(default_factory=list)

    async def ask(self, messages: Sequence[Json], **more: Any) -> Json:
        """The chat that an answer makes of these messages."""
        made: Json = {}
        self.calls.append(made)
        options: Json = {"model": self.model, "messages": messages, "max_tokens": 12, "extra_body": more}
        if len(self.calls) % 2 == 0:
            content = ""
            async for chunk in await self.sdk.chat.completions.create(stream=True, **options):
                content += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            last: Any = chunk
        else:
            last = await self.sdk.chat.completions.create(**options)
            content = last.choices[0].message.content
        usage = last.usage
        made |= {"id": last.conversation_id, "input": usage.prompt_tokens, "output": usage.completion_tokens}
        made["cost"] = usage.cost
        return {"id": last.conversation_id, "messages": [*messages, {"role": "assistant", "content": content}]}

    async def next(self, chat: Json, content: str) -> Json:
        return await self.ask([*chat["messages"], _user(content)])


def _user(content: str) -> Json:
    return {"role": "user", "content": content}


async def _at_once(count: int, work: Callable[[int], Awaitable[Json]]) -> list[Json]:
    return list(await asyncio.gather(*(work(index) for index in range(count))))


async def python_talks(place: Place) -> Json:
    async with AsyncOpenAI(base_url=place.gateway.base_url, api_key="any", max_retries=0) as sdk:
        talker = Talker(sdk, place.model)
        loop = [await talker.ask([SYSTEM, _user("first of all")])]
        for more in ("and then", "and in the end"):
            loop.append(await talker.next(loop[-1], more))
        openings = [await talker.ask([SYSTEM, _user("one chat")]) for _ in range(2)]
        eight = await _at_once(8, lambda _: talker.ask([SYSTEM, _user("all the same")]))
        once = await talker.ask([SYSTEM, _user("only once")])
        eight_more = await _at_once(8, lambda _: talker.next(once, "still the same"))
        opening = await talker.ask([_user("two ways from here")])
        begun = await _at_once(2, lambda index: talker.next(opening, f"way {index}"))
        ways = await _at_once(2, lambda index: talker.next(begun[index], f"on way {index}"))
        edited = [await talker.ask([*loop[0]["messages"], _user("or rather")])]
        edited.append(await talker.next(edited[0], "and on"))
        continued = await talker.ask([_user("by its id")], conversation_id=loop[-1]["id"])
        whole = [{"id": continued["id"], "messages": [*loop[-1]["messages"], *continued["messages"]]}]
    steps = {"loop": loop, "openings": openings, "eight": eight, "eight_more": eight_more, "ways": ways}
    steps |= {"edited": edited, "continued": whole, "before": [opening, once]}
    return {"steps": steps, "calls": talker.calls}


async def node_talks(place: Place) -> Json:
    environment = {"BASE_URL": place.gateway.base_url, "API_KEY": "any"}
    done = await asyncio.to_thread(run_node, "conversations.mjs", place.model, env=environment)
    assert done.returncode == 0, done.stderr
    printed: Json = json.loads(done.stdout)
    return printed


# --- what has come of them


async def _get(gateway: GatewayProcess, path: str) -> Json:
    answer = await call(gateway.port, "GET", path)
    assert answer.status == 200, answer.body
    found: Json = answer.json
    return found


@pytest.mark.parametrize("talks", [python_talks, node_talks])
async def test_chats_become_conversations(place: Place, talks: Callable[[Place], Awaitable[Json]]) -> None:
    said = await talks(place)
    steps = {name: [chat["id"] for chat in chats] for name, chats in said["steps"].items()}

    assert len(set(steps["loop"])) == 1
    assert len(set(steps["openings"])) == 2
    assert len(set(steps["eight"])) == 8
    assert len(set(steps["eight_more"])) == 8
    assert len(set(steps["ways"])) == 2
    assert len(set(steps["edited"])) == 1
    assert steps["continued"] == steps["loop"][:1] != steps["edited"][:1]

    for name in ("continued", "openings", "eight_more", "ways", "edited"):
        for chat in said["steps"][name][-8:]:
            kept = await _get(place.gateway, f"/conversations/{chat['id']}/messages?limit=100")
            seen = [(message["role"], message["content"]) for message in chat["messages"]]
            if chat is not said["steps"]["edited"][0]:
                assert [(message["role"], message["content"]) for message in kept["data"]] == seen, name
            assert [message["seq"] for message in kept["data"]] == list(range(1, len(kept["data"]) + 1))
    await _branches(place.gateway, said["steps"])
    await _totals(place, said["calls"])


async def _branches(gateway: GatewayProcess, steps: dict[str, list[Json]]) -> None:
    edited = await _get(gateway, f"/conversations/{steps['edited'][0]['id']}")
    assert (edited["parent_id"], edited["parent_seq"]) == (steps["loop"][0]["id"], 3)
    opening, once = (chat["id"] for chat in steps["before"])
    ways = [await _get(gateway, f"/conversations/{chat['id']}") for chat in steps["ways"]]
    assert {way["parent_id"] if way["id"] != opening else opening for way in ways} == {opening}
    tips = Counter(chat["id"] == once for chat in steps["eight_more"])
    assert tips == {True: 1, False: 7}, "one goes on where it was, the others beside it"


async def _totals(place: Place, calls: Sequence[Json]) -> None:
    """What clients were told, what the upstream counted, and what is kept are the same."""
    tokens_in, tokens_out = (sum(call[way] for call in calls) for way in ("input", "output"))
    if place.tally is not None:
        assert place.tally() == (tokens_in, tokens_out)
    listed = await _get(place.gateway, "/conversations?limit=100")
    assert not listed["has_more"]
    assert {one["id"] for one in listed["data"]} == {call["id"] for call in calls}
    for one in listed["data"]:
        own = [call for call in calls if call["id"] == one["id"]]
        assert one["total_tokens_input"] == sum(call["input"] for call in own)
        assert one["total_tokens_output"] == sum(call["output"] for call in own)
        assert one["total_cost"] == pytest.approx(sum(call["cost"] for call in own), abs=1e-9)
    stats = await _get(place.gateway, "/users/me/stats")
    assert (stats["conversation_count"], stats["total_tokens_input"], stats["total_tokens_output"]) == (
        len(listed["data"]),
        tokens_in,
        tokens_out,
    )

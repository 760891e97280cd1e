"""Clients that talk, leave, change their mind and tidy up, and log what they did and saw; an upstream each of whose
answers can be told from all others."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tests_standalone.support.upstream import Script, ScriptedUpstream
from tests_standalone.support.upstream_connection import Head
from tests_standalone.system.history_checker import Log, Read, Said, marks
from tests_standalone.system.http import Answer, answer_of, call, request_bytes

Json = dict[str, Any]
MODELS = ("drained", "cancelled")
LONGEST = 8
"""Turns of a chat; then its client begins another one."""


class MarkingUpstream(ScriptedUpstream):
    """Answers `a/ann/17/9 and some words` to `q/ann/17`, in its ninth call."""

    def _select(self, head: Head, request: Json) -> tuple[str, Script, str | None]:
        name, script, probe = super()._select(head, request)
        _, user, asked, _ = marks(texts(request["messages"])[-1])[-1]
        said = f"a/{user}/{asked}/{len(self.tally)} and so it goes on for a while"
        delay = 0.003 if request.get("max_tokens") == 99 else 0
        return name, dataclasses.replace(script, text=said, delay=delay), probe

    def prompts(self) -> dict[int, list[str]]:
        return {number: texts(json.loads(record.body)["messages"]) for number, record in enumerate(self.tally, 1)}


def texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    return [message["content"] or "" for message in messages]


@dataclass
class Club:
    """All clients of one run. `left` operations are still to be done."""

    port: int
    left: int
    log: Log = field(default_factory=Log)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))


@dataclass
class Client:
    """One chat window of a user. `shared`: others write into its conversation, too. `group`: it names its chat in a
    header. `named`: in the body. Otherwise nothing tells its chats apart but what is in them."""

    club: Club
    user: str
    key: str
    chance: random.Random
    named: bool = False
    group: bool = False
    shared: str | None = None
    manages: bool = True
    conversation: str | None = None
    told: str | None = None
    history: list[str] = field(default_factory=list)
    sure: bool = True
    refused: int = 0

    async def run(self) -> None:
        self._begin()
        while self.club.left > 0:
            self.club.left -= 1
            if len(self.history) >= 2 * LONGEST or self.refused > 5:
                self._begin()
            try:
                await self._one()
            except (OSError, asyncio.IncompleteReadError, IndexError):  # its worker was killed
                self.sure = self.sure and not self.named
                await asyncio.sleep(0.05)

    def _begin(self) -> None:
        self.history, self.sure, self.refused, self.told = [], True, 0, None
        number = next(self.club.numbers)
        prefix = "group" if self.group else "named"
        self.conversation = self.shared or (f"{prefix}-{self.user}-{number}" if self.named or self.group else None)

    async def _one(self) -> None:
        """An operation by chance; what needs a history asks something new where there is none."""
        kinds = [self._ask, self._leave, self._edit, self._again, self._fork, self._manage, self._read]
        weights = [10, 1, 1, 1, 1, 1, 2]
        if self.shared is not None:
            kinds, weights = [self._ask, self._leave, self._manage], [14, 1, int(self.manages)]
        elif self.named:  # where a lone question goes to the end
            weights[2:5] = [2, 2, 0] if len(self.history) >= 4 else [0, 0, 0]
        kind = self.chance.choices(kinds, weights)[0]
        await (kind if len(self.history) >= 2 or kind == self._leave else self._ask)()

    # What it says

    async def _ask(self) -> None:
        self._note(await self._turn(self._question(), self.history))

    async def _leave(self) -> None:
        """In the middle of the answer; then it sends what it has seen of it, or asks as if nothing had been."""
        said = await self._turn(self._question(), self.history, leave=self.chance.randint(100, 2500))
        self.sure = self.sure and said.complete
        self._note(said, keep_partial=self.chance.random() < 0.5)

    async def _edit(self) -> None:
        """An earlier question is put otherwise."""
        turn = self.chance.randrange(int(self.named), len(self.history) // 2)
        self._note(await self._turn(self._question(), self.history[: 2 * turn]), self.history[: 2 * turn])

    async def _again(self) -> None:
        """Another answer to the last question."""
        before = self.history[:-2]
        self._note(await self._turn(self.history[-2], before), before)

    async def _fork(self) -> None:
        """The same history goes on in two or three ways at once; the client stays with one."""
        before = list(self.history)
        same = self._question()
        asked = [same if self.chance.random() < 0.3 else self._question() for _ in range(self.chance.randint(2, 3))]
        turns = await asyncio.gather(*(self._turn(each, before) for each in asked), return_exceptions=True)
        whole = [turn for turn in turns if isinstance(turn, Said) and turn.complete]
        if len(whole) < len(turns):
            self.sure = False
        if whole:
            self._note(self.chance.choice(whole), before)

    def _question(self) -> str:
        return f"q/{self.user}/{next(self.club.numbers)} what about it?"

    def _note(self, said: Said, before: Sequence[str] | None = None, *, keep_partial: bool = False) -> None:
        if said.status == 409:
            self.refused += 1
        if said.complete or (keep_partial and said.answer):
            self.refused = 0
            self.history = [*(self.history if before is None else before), said.question, said.answer]
            self.told = said.conversation or self.told
        elif self.named and said.status != 409:
            self.sure = False  # it may be stored or not

    async def _turn(self, question: str, before: Sequence[str], *, leave: int | None = None) -> Said:
        alone = self.shared is not None or (self.named and bool(before) and self.chance.random() < 0.6)
        if self.named and before != self.history:
            alone = False  # edited: only a history says so
        sent = [question] if alone else [*before, question]
        roles = itertools.cycle(("user", "assistant"))
        body: Json = {
            "model": self.chance.choice(MODELS),
            "messages": [{"role": role, "content": text} for role, text in zip(roles, sent, strict=False)],
            "stream": leave is not None or self.chance.random() < 0.5,
        }
        headers = {"authorization": f"Bearer {self.key}"}
        if leave is not None:
            body["max_tokens"] = 99
        if self.named:
            body["conversation_id"] = self.told or self.conversation
        elif self.group:
            headers["x-conversation-id"] = self.conversation or ""
        knows = self.shared is None and not self.group and (self.sure or not (alone or self.named))
        said = Said(
            user=self.user,
            question=question,
            began=time.monotonic(),
            before=tuple(before) if knows else None,
            sure=self.sure,
        )
        self.club.log.said.append(said)
        try:
            if leave is not None:
                _hear(said, await self._beginning(headers, body, leave), True)
            else:
                _hear(said, await call(self.club.port, "POST", "/v1/chat/completions", headers, body), body["stream"])
        finally:
            said.ended = time.monotonic()
        if said.status == 409:
            await asyncio.sleep(self.chance.uniform(0, 0.1))
        return said

    async def _beginning(self, headers: Mapping[str, str], body: Json, size: int) -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.club.port)
        received = b""
        try:
            writer.write(request_bytes("POST", "/v1/chat/completions", headers, body))
            with suppress(asyncio.IncompleteReadError):
                received = await reader.readuntil(b"\r\n\r\n")
                while len(received) < size and (more := await reader.read(size - len(received))):
                    received += more
            return answer_of(received)
        finally:
            writer.close()

    # What it does with its conversation

    async def _manage(self) -> None:
        name = self.told or self.conversation
        if name is None:
            return
        place = (self.user, name)
        deleted = self.club.log.deleted.get(place, False)
        what = self.chance.choice(["rename", "rename", "undelete" if deleted else "delete"])
        if what == "rename":
            title = f"title {next(self.club.numbers)}"
            self.club.log.titles.pop(place, None)
            if (await self._call("PATCH", f"/conversations/{name}", {"title": title})).status == 200:
                self.club.log.titles[place] = title
            return
        self.club.log.deleted.pop(place, None)
        self.sure = False
        method, path = ("DELETE", "") if what == "delete" else ("POST", "/undelete")
        if (await self._call(method, f"/conversations/{name}{path}")).status == 200:
            self.club.log.deleted[place] = what == "delete"
            if what == "delete":
                self.club.log.titles.pop(place, None)

    async def _read(self) -> None:
        name = self.told
        if name is None or not self.sure or len(self.history) < 2:
            return
        answer = await self._call("GET", f"/conversations/{name}/messages?limit=100&order=desc")
        found = texts(answer.json["data"]) if answer.status == 200 else []
        self.club.log.reads.append(
            Read(user=self.user, conversation=name, status=answer.status, texts=found, answer=self.history[-1])
        )

    async def _call(self, method: str, path: str, body: Json | None = None) -> Answer:
        answer = await call(self.club.port, method, path, {"authorization": f"Bearer {self.key}"}, body)
        if not answer.clean_end:
            raise ConnectionError("cut")
        self.club.log.seen |= {(self.user, owner) for _, owner, _, _ in marks(answer.body.decode())}
        return answer


def _hear(said: Said, answer: Answer, stream: bool) -> None:
    said.status = answer.status
    said.conversation = answer.headers.get("x-conversation-id")
    if answer.status != 200:
        return
    if not stream:
        if answer.clean_end:
            said.answer = answer.json["choices"][0]["message"]["content"]
            said.conversation = answer.json["conversation_id"]
            said.complete = True
        return
    for line in _whole_lines(answer):
        if line == "[DONE]":
            said.complete = True
            return
        event = json.loads(line)
        said.conversation = event.get("conversation_id", said.conversation)
        for choice in event.get("choices", ()):
            said.answer += choice["delta"].get("content") or ""


def _whole_lines(answer: Answer) -> list[str]:
    """The events of a body that may be cut anywhere; each is in an HTTP chunk of its own or shares one."""
    data = b"".join(_chunks(answer.raw_body))
    events = data.split(b"\n\n")[:-1]
    return [event.decode().removeprefix("data: ") for event in events if event.startswith(b"data: ")]


def _chunks(raw: bytes) -> Iterator[bytes]:
    while raw:
        size, found, raw = raw.partition(b"\r\n")
        if not found or not size or int(size, 16) == 0:
            return
        yield raw[: int(size, 16)]
        raw = raw[int(size, 16) + 2 :]

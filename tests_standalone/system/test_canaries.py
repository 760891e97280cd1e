"""A30: 500 users, a canary each, on four workers and PostgreSQL, who leave at any moment: no byte of another's canary.

A user's canary is in its name, questions, titles, tags, metadata and request ids, and the upstream puts all canaries of
a request into its answer. Names of conversations, and the words that some of them begin with, are the same for all. A
client reads to the end and uses its connection again, or leaves: before it sends, in the body, before the head of the
reply, after its first bytes, midway in a stream. Looked at is every byte that came (read or not), every request that
reached the upstream, and at the end every row of every table.

CANARY_SECONDS=600 goes on for so long instead of doing OPERATIONS. CANARY_SEED=n makes the choices of an earlier run: a
run that fails tells its seed. Which calls meet in a worker is chance all the same.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import random
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import asyncpg

from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.upstream import Record, Script, ScriptedUpstream
from tests_standalone.support.upstream_connection import Head
from tests_standalone.system.conftest import PRICE, Start, end, in_front_of
from tests_standalone.system.http import Answer, answer_of, call, request_bytes

Json = dict[str, Any]

CLIENTS = 500
OPERATIONS = 2000
SECONDS = float(os.environ.get("CANARY_SECONDS", "0"))
SEED = int(os.environ.get("CANARY_SEED") or random.randrange(1 << 32))
ADMIN = "sk-admin-of-this-test"
MODELS = ("drained", "cancelled")
CANARY = re.compile("canary-[0-9a-f]{0,32}")
"""Or the beginning of one that is cut."""
OPENER = "Hello, parrot!"
"""Of many conversations of everybody."""
MOMENTS = ("before sending", "in the body", "before the head", "after the first bytes", "midway")
END = "the end"


def canaries(text: str | bytes) -> set[str]:
    return set(CANARY.findall(text if isinstance(text, str) else text.decode("latin-1")))


def foreign(text: str | bytes, own: str) -> set[str]:
    return {found for found in canaries(text) if not own.startswith(found)}


class RepeatingUpstream(ScriptedUpstream):
    """Says the last question again, and every canary that it was sent. `mixed`: what more than one user's is in."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[str] = []
        self._chance = random.Random(f"{SEED} upstream")

    def _record(self, connection: Any, head: Head, body: bytes, script: str | None = None) -> Record:
        """Kept is none: a long run has many."""
        record = super()._record(connection, head, body, script)
        self.tally.clear()
        self._held.clear()
        return record

    def _select(self, head: Head, request: Json) -> tuple[str, Script, str | None]:
        name, script, probe = super()._select(head, request)
        told = canaries(json.dumps(request) + json.dumps(head.headers))
        if len(told) != 1:
            self.mixed.append(f"the upstream was sent {sorted(told)}")
        text = " ".join(["You said:", request["messages"][-1]["content"], "and I heard", *sorted(told)])
        pauses = self._chance.choice((0.0, 0.002, 0.01))
        slow = self._chance.choice((0.0, 0.0, 0.02))
        return name, dataclasses.replace(script, text=text, delay=pauses, head_delay=slow), probe


class Ear(asyncio.StreamReaderProtocol):
    """Keeps every byte that comes, whether somebody reads it or not."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)
        self.heard = bytearray()

    def data_received(self, data: bytes) -> None:
        self.heard += data
        super().data_received(data)


class Line:
    """A connection, used for one call after the other."""

    def __init__(self, reader: asyncio.StreamReader, ear: Ear, transport: asyncio.WriteTransport) -> None:
        self.reader, self.ear, self._transport = reader, ear, transport
        self.calls = 0

    @classmethod
    async def to(cls, port: int) -> Self:
        reader = asyncio.StreamReader()
        ear = Ear(reader)
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: ear, "127.0.0.1", port)
        return cls(reader, ear, transport)

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    async def answer(self, head: bytes = b"") -> Answer:
        """To its end, which is where the next one begins."""
        raw = head or await self.head()
        headers = answer_of(raw).headers
        if "content-length" in headers:
            return answer_of(raw + await self.reader.readexactly(int(headers["content-length"])))
        size = -1
        while size:
            line = await self.reader.readuntil(b"\r\n")
            size = int(line, 16)
            raw += line + await self.reader.readexactly(size + 2)
        return answer_of(raw)

    async def head(self) -> bytes:
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert re.match(rb"HTTP/1\.1 \d{3} ", head), f"no reply begins like this: {head!r}"
        return head

    def leave(self, *, abruptly: bool) -> None:
        if abruptly:
            linger = struct.pack("ii", 1, 0)
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._transport.abort()
        else:
            self._transport.close()


@dataclass
class Club:
    """All clients of one run, and what they have seen. `wrong` is what nobody may ever see."""

    port: int
    left: int = OPERATIONS
    began: float = field(default_factory=time.monotonic)
    members: list[Client] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ended: Counter[tuple[str, int]] = field(default_factory=Counter)
    left_at: Counter[tuple[str, str]] = field(default_factory=Counter)
    again: int = 0
    """Calls on a connection that another one had used before, read to their end."""
    stale: int = 0
    cut: int = 0
    """Streams that the gateway broke off: with a 503, the way in which it may say that it has too much to do."""
    bytes: int = 0

    def goes_on(self) -> bool:
        self.left -= 1
        return time.monotonic() - self.began < SECONDS if SECONDS else self.left >= 0


@dataclass
class Wish:
    """A call: what may come of it, and what is looked at then."""

    kind: str
    method: str
    path: str
    body: Json | None = None
    statuses: Sequence[int] = (200,)
    heard: Callable[[Answer], None] = lambda answer: None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Client:
    """One user. `known` and `stored` are ids that the gateway gave to what is its own for certain."""

    club: Club
    canary: str
    key: str
    chance: random.Random
    line: Line | None = None
    known: list[str] = field(default_factory=list)
    deleted: set[str] = field(default_factory=set)
    stored: list[str] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    history: list[Json] = field(default_factory=list)
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    usual: float = 0.02
    """Seconds that its last call took."""

    async def run(self) -> None:
        try:
            while self.club.goes_on():
                await self._call(self._wish())
        except Exception as failure:  # one of all these is enough, but all of them are told
            self._wrong(f"{type(failure).__name__}: {str(failure)[:500]}")
        finally:
            self._part(abruptly=False)

    async def _call(self, wish: Wish) -> None:
        number, began = next(self.numbers), time.monotonic()
        request_id = f"{self.canary}-{number}"
        headers: dict[str, str | None] = {"authorization": f"Bearer {self.key}", "x-request-id": request_id}
        headers |= {"connection": None, **wish.headers}
        raw = request_bytes(wish.method, wish.path, headers, wish.body)  # type: ignore[arg-type]  # None leaves it out
        self.line = self.line or await Line.to(self.club.port)
        self.line.calls += 1
        try:
            moment, answer = await self._until(self.line, self._moment(wish), raw)
        except (ConnectionError, asyncio.IncompleteReadError):
            if b"text/event-stream" in self.line.ear.heard:
                self.club.cut += 1
            elif self.line.ear.heard or self.line.calls == 1:
                raise
            else:
                self.club.stale += 1  # closed while nobody used it
            self._part(abruptly=False)
            return
        self.usual = time.monotonic() - began
        if answer is None:
            self.club.left_at[wish.kind, moment] += 1
            self._part(abruptly=self.chance.random() < 0.5)
            return
        self._search(bytes(self.line.ear.heard))
        self.line.ear.heard.clear()
        self.club.ended[wish.kind, answer.status] += 1
        self.club.again += self.line.calls > 1
        assert answer.headers["x-request-id"] == request_id, (answer.headers, request_id)
        assert answer.status in (*wish.statuses, 503), (wish.kind, wish.path, answer.status, answer.body)
        if answer.status == 200:
            wish.heard(answer)
        if answer.headers.get("connection") == "close" or self.line.calls > 8:
            self._part(abruptly=False)

    def _part(self, *, abruptly: bool) -> None:
        if self.line is not None:
            self.line.leave(abruptly=abruptly)
            self._search(bytes(self.line.ear.heard))
            self.line = None

    def _search(self, heard: bytes) -> None:
        self.club.bytes += len(heard)
        for other in foreign(heard, self.canary):
            at = heard.find(other.encode())
            self._wrong(f"heard {other}: {heard[max(0, at - 200) : at + 80]!r}")

    def _wrong(self, what: str) -> None:
        self.club.wrong.append(f"{self.canary}: {what}")

    # When it leaves

    def _moment(self, wish: Wish) -> str:
        fits = {"in the body": wish.body is not None, "midway": wish.body is not None and wish.body.get("stream")}
        moments = [moment for moment in MOMENTS if fits.get(moment, True)]
        return self.chance.choices([END, *moments], [6, *[1] * len(moments)])[0]

    async def _until(self, line: Line, moment: str, raw: bytes) -> tuple[str, Answer | None]:
        """When it left, or what it read to the end."""
        chance = self.chance
        if moment == "before sending":
            await asyncio.sleep(chance.choice((0, self.usual * chance.random())))
            return moment, None
        if moment == "in the body":
            size = len(raw.partition(b"\r\n\r\n")[2])
            line.write(raw[: -chance.randint(1, size)])
            await asyncio.sleep(chance.choice((0, self.usual * chance.random())))
            return moment, None
        line.write(raw)
        if moment == "before the head":
            await asyncio.sleep(chance.choice((0, self.usual * chance.random())))
            return ("after the first bytes" if line.ear.heard else moment), None
        if moment == "after the first bytes":
            await line.reader.readexactly(chance.randint(1, 100))
            return moment, None
        head = await line.head()
        if moment == "midway" and b"text/event-stream" in head:
            for _ in range(chance.randint(1, 6)):
                await line.reader.readuntil(b"\n\n")
            return moment, None
        return END, await line.answer(head)

    # What it wants

    def _wish(self) -> Wish:
        wishes: list[tuple[int, Callable[[], Wish], object]] = [
            (30, self._chat, True),
            (4, self._conversations, True),
            (3, self._make, True),
            (2, self._sessions, True),
            (1, self._stats, True),
            (3, self._completions, True),
            (9, self._messages, self.known),
            (9, self._rename, self.known),
            (2, self._delete, self.known),
            (12, self._completion, self.stored),
            (12, self._change, self.stored),
            (3, self._session, self.sessions),
            (3, self._trespass, any(other.known for other in self.club.members[:20])),
        ]
        possible = [(weight, wish) for weight, wish, has in wishes if has]
        return self.chance.choices([wish for _, wish in possible], [weight for weight, _ in possible])[0]()

    def _chat(self) -> Wish:
        chance, number = self.chance, next(self.numbers)
        question = f"{self.canary} asks number {number}, which {self.canary} has never asked"
        body: Json = {"model": chance.choice(MODELS), "user": self.canary, "stream": chance.random() < 0.55}
        headers = {}
        before: list[Json] = [{"role": "system", "content": "You are a parrot."}]
        named = f"chat-{number // 16}"
        match chance.choice(("alone", "history", "named", "header", "known")):
            case "history":
                before += self.history
                question = OPENER if not self.history and chance.random() < 0.5 else question
            case "named":
                body["conversation_id"] = named
            case "header":
                headers["x-conversation-id"] = named
            case "known" if self.known:
                body["conversation_id"] = chance.choice(self.known)
        body["messages"] = [*before, {"role": "user", "content": question}]
        if store := chance.random() < 0.35:
            body |= {"store": True, "metadata": {"of": self.canary}}

        def heard(answer: Answer) -> None:
            said, chat_id, completion_id = _said(answer, stream=body["stream"])
            assert question in said, (question, said)
            assert canaries(said) == {self.canary}, said
            if (chat_id or "").startswith("conv_") and chat_id not in self.deleted:
                self._learn(self.known, str(chat_id))
            if store:
                self._learn(self.stored, completion_id)
            said_now = [body["messages"][-1], {"role": "assistant", "content": said}]
            self.history = [*before[1:], *said_now] if len(before) < 6 else []

        kind = f"{'stored ' * store}{'stream' if body['stream'] else 'JSON'}"
        return Wish(kind, "POST", "/v1/chat/completions", body, (200, 409), heard, headers)

    def _learn(self, ids: list[str], one: str) -> None:
        if one not in ids:
            ids.append(one)
            del ids[:-10]

    def _conversations(self) -> Wish:
        more = self.chance.choice(("", "&order=asc", "&archived=all", f"&tag={self.canary}", "&session_id="))
        if more == "&session_id=":
            more += self.chance.choice(self.sessions or ["none"])
        path = f"/conversations?limit={self.chance.randint(1, 40)}{more}"
        return Wish("conversations", "GET", path)

    def _make(self) -> Wish:
        body = {"id": f"chat-{next(self.numbers) // 16}"} if self.chance.random() < 0.5 else {}
        return Wish("make", "POST", "/conversations", {**body, **self._about()}, (200, 409))

    def _about(self) -> Json:
        return {"title": f"title {self.canary}", "tags": [self.canary], "metadata": {"of": self.canary}}

    def _rename(self) -> Wish:
        return Wish("rename", "PATCH", f"/conversations/{self.chance.choice(self.known)}", self._about())

    def _messages(self) -> Wish:
        more = self.chance.choice(("/messages", "/messages?order=desc&limit=3", ""))
        return Wish("messages", "GET", f"/conversations/{self.chance.choice(self.known)}{more}", heard=self._is_mine)

    def _delete(self) -> Wish:
        """It is not known any more, whether or not the call goes through, and when."""
        gone = self.known.pop(self.chance.randrange(len(self.known)))
        self.deleted.add(gone)
        return Wish("delete", "DELETE", f"/conversations/{gone}")

    def _sessions(self) -> Wish:
        def heard(answer: Answer) -> None:
            self.sessions = [one["id"] for one in answer.json["data"]]

        return Wish("sessions", "GET", "/users/me/sessions?limit=5", heard=heard)

    def _session(self) -> Wish:
        return Wish("session", "GET", f"/sessions/{self.chance.choice(self.sessions)}", heard=self._is_mine)

    def _stats(self) -> Wish:
        return Wish("stats", "GET", "/users/me/stats", heard=self._is_mine)

    def _completions(self) -> Wish:
        more = self.chance.choice(("", "&order=desc", f"&metadata[of]={self.canary}", "&model=drained"))
        return Wish("completions", "GET", f"/v1/chat/completions?limit={self.chance.randint(1, 20)}{more}")

    def _completion(self) -> Wish:
        path = f"/v1/chat/completions/{self.chance.choice(self.stored)}"
        if self.chance.random() < 0.5:
            return Wish("completion", "GET", f"{path}/messages")
        return Wish("completion", "GET", path, heard=self._is_mine)

    def _change(self) -> Wish:
        path = f"/v1/chat/completions/{self.chance.choice(self.stored)}"
        return Wish("change", "POST", path, {"metadata": {"of": self.canary, "n": str(next(self.numbers))}})

    def _is_mine(self, answer: Answer) -> None:
        assert self.canary in canaries(answer.body), answer.body

    def _trespass(self) -> Wish:
        """What is another's is not there."""
        other = self.chance.choice([one for one in self.club.members if one.known and one is not self] or [self])
        if other is self:
            return self._stats()
        theirs = self.chance.choice(other.known)
        turn = {"model": "drained", "user": self.canary, "messages": [{"role": "user", "content": self.canary}]}
        wishes = [
            Wish("trespass", "GET", f"/conversations/{theirs}", None, (404,)),
            Wish("trespass", "GET", f"/conversations/{theirs}/messages", None, (404,)),
            Wish("trespass", "PATCH", f"/conversations/{theirs}", self._about(), (404,)),
            Wish("trespass", "GET", f"/conversations?after={theirs}", None, (400,)),
            Wish("trespass", "POST", "/v1/chat/completions", {**turn, "conversation_id": theirs}, (404,)),
        ]
        if other.stored:
            path = f"/v1/chat/completions/{self.chance.choice(other.stored)}"
            wishes += [Wish("trespass", "GET", path, None, (404,)), Wish("trespass", "DELETE", path, None, (404,))]
        return self.chance.choice(wishes)


def _said(answer: Answer, *, stream: bool) -> tuple[str, str | None, str]:
    """The text, the conversation's id, the completion's id."""
    if not stream:
        found = answer.json
        return found["choices"][0]["message"]["content"], found.get("conversation_id"), found["id"]
    *events, done = answer.events
    assert done == "[DONE]", answer.body
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    return text, events[-1].get("conversation_id"), events[-1]["id"]


async def test_a30_nobody_ever_gets_anothers_canary(start: Start, database_urls: dict[str, str]) -> None:
    print(f"CANARY_SEED={SEED}")
    models = {name: {"backend": "up", "model": "answer", "price": PRICE} for name in MODELS}
    models["cancelled"]["on_disconnect"] = "cancel"
    auth = {"mode": "keys", "admin_key": ADMIN}
    async with RepeatingUpstream() as upstream:
        url = database_urls["postgres"]
        gateway = await start(in_front_of(upstream, url, workers=4, models=models, auth=auth))
        club = await _club(gateway)
        await asyncio.gather(*(client.run() for client in club.members))
        assert await end(gateway) == 0
    wrong, kept = await _kept(url)
    _tell(club, kept)
    wrong = [*club.wrong, *upstream.mixed, *wrong]
    assert not wrong, "\n".join([f"CANARY_SEED={SEED}: {len(wrong)} times", *wrong[:20]])
    _enough(club, kept)


async def _club(gateway: GatewayProcess) -> Club:
    room, chance = asyncio.Semaphore(20), random.Random(SEED)

    async def member(number: int) -> Client:
        canary = f"canary-{chance.randbytes(16).hex()}"
        async with room:
            admin = {"authorization": f"Bearer {ADMIN}"}
            made = await call(gateway.port, "POST", "/admin/keys", admin, {"user": f"user-{canary}"})
        return Client(club, canary, made.json["key"], random.Random(f"{SEED} {number}"))

    club = Club(gateway.port)
    club.members += await asyncio.gather(*map(member, range(CLIENTS)))
    club.began = time.monotonic()
    return club


# What is kept


async def _kept(url: str) -> tuple[list[str], Counter[str]]:
    """Rows in which somebody's canary is that does not own them, and in how many rows of each column there is one."""
    connection = await asyncpg.connect(url)
    wrong: list[str] = []
    kept: Counter[str] = Counter()
    try:
        owners = dict(map(tuple, await connection.fetch("SELECT pk, user_id FROM conversations")))
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        for (table,) in tables:
            async with connection.transaction():
                async for row in connection.cursor(f"SELECT * FROM {table}", prefetch=500):
                    told = {column: found for column, value in row.items() if (found := canaries(str(value)))}
                    kept.update(f"{table}.{column}" for column in told)
                    owner = row.get("user_id") or owners.get(row.get("conversation_pk")) or str(tuple(row))
                    own = max(canaries(owner), key=len, default="")
                    wrong += [f"{table}.{column} of {own}: {row}" for column in told if foreign(str(row[column]), own)]
    finally:
        await connection.close()
    return wrong, kept


def _tell(club: Club, kept: Counter[str]) -> None:
    seconds = time.monotonic() - club.began
    print(f"{sum(club.ended.values())} read to the end, {sum(club.left_at.values())} left, {seconds:.0f} s")
    print(f"{club.bytes:,} bytes searched, {club.again} calls on a used connection, {club.stale} found theirs closed")
    print(f"{_refused(club)} answers 503, {club.cut} streams cut: too much to do")
    print("ended:", dict(sorted(club.ended.items())))
    print("left:", dict(sorted(club.left_at.items())))
    print("kept:", dict(sorted(kept.items())))


def _refused(club: Club) -> int:
    return sum(count for (_, status), count in club.ended.items() if status == 503)


def _enough(club: Club, kept: Counter[str]) -> None:
    """All kinds of things have happened, or nothing was proven."""
    well = Counter({kind: count for (kind, status), count in club.ended.items() if status == 200})
    chats = {name: well[name] for name in ("JSON", "stream", "stored JSON", "stored stream")}
    assert min(chats.values()) > OPERATIONS / 60, chats
    assert _refused(club) + club.cut < sum(chats.values()) / 20, "turns wait too long for their commit"
    others = ("conversations", "messages", "make", "rename", "sessions", "completions", "completion", "change", "stats")
    assert min(well[name] for name in others) > OPERATIONS / 500, well
    assert club.ended["trespass", 404] > OPERATIONS / 500
    assert club.again > OPERATIONS / 10
    moments: Counter[str] = Counter()
    for (_, moment), count in club.left_at.items():
        moments[moment] += count
    assert min(moments[moment] for moment in MOMENTS) > OPERATIONS / 100, moments
    columns = (
        *("messages.content", "conversations.title", "conversations.metadata", "conversations.tags"),
        *("stored_completions.completion", "stored_completions.messages", "stored_completions.metadata"),
    )
    assert min(kept[column] for column in columns) > OPERATIONS / 500, kept

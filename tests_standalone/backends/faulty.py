"""A gateway between a client that sees bytes and two upstreams by the byte: one that a test breaks, and another one.

async def test_it(rig: Rig) -> None:
    async with rig.first(script), rig.second() as second:
        answer = await rig.chat(rig.model())
    assert await rig.rows(answer) == [...]
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests_standalone.backends.raw_upstream import Peer, RawUpstream, Script, raw_upstream
from tests_standalone.support.gateway import GatewayProcess, free_port
from tests_standalone.system.http import Answer, call, chat

MODELS = 1000
FIRST = 10**9
"""A weight beside which a weight of 1 is never drawn."""
PRICE = {"input": 2.0, "output": 8.0}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
LIMITS = {"connect": 0.5, "first_byte": 0.8, "idle": 0.8}
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


def delta(text: str | None = None, **more: Any) -> bytes:
    """The JSON of one chunk."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": None}
    fields = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return json.dumps(fields | more, separators=(",", ":")).encode()


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def framed(data: bytes) -> bytes:
    """As one HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def finish(usage: dict[str, Any] | None = USAGE) -> bytes:
    """The events that end an answer, but for `[DONE]`."""
    end = event(delta(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]))
    return end if usage is None else end + event(delta(choices=[], usage=usage))


def whole(body: bytes, kind: str = "application/json", status: str = "200 OK", *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", f"content-length: {len(body)}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


def completion(text: str) -> bytes:
    """The JSON of a whole answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps(
        {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": USAGE}
    ).encode()


async def answer_well(peer: Peer) -> None:
    """What a good upstream does, call after call."""
    while True:
        await peer.request()
        if json.loads(peer.body).get("stream"):
            peer.send(SSE + framed(event(delta("good"))) + framed(finish() + DONE) + END)
        else:
            peer.send(whole(completion("good")))


def replying(*pieces: bytes, pause: float = 0, end: str = "kept") -> Script:
    """That reply in these writes, to every request on a connection; then, if not `kept`, a `fin` or an `rst`."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            for piece in pieces:
                peer.send(piece)
                await asyncio.sleep(pause)
            if end == "rst":
                await peer.drained()
                await asyncio.sleep(0.05)
                peer.reset()
            if end != "kept":
                return

    return script


@dataclass(frozen=True)
class Row:
    """What the books say of one attempt."""

    backend: str
    status: str
    charged: bool
    counted_by: str
    tokens: tuple[int, int]
    cost: float | None
    milliseconds: int


class Rig:
    """Every `model()` and `alone()` is a fresh one, so that no test finds a route that another has cooled down."""

    def __init__(self, gateway: GatewayProcess, first: int, second: int) -> None:
        self.gateway = gateway
        self.first_port = first
        self._second = second
        self._numbers = itertools.count()

    def model(self) -> str:
        """Goes to the first upstream and then to the second."""
        return f"both{next(self._numbers)}"

    def alone(self) -> str:
        """Goes to the first upstream only."""
        return f"alone{next(self._numbers)}"

    def first(self, script: Script) -> Any:
        return raw_upstream(script, port=self.first_port)

    @asynccontextmanager
    async def second(self) -> AsyncIterator[RawUpstream]:
        async with raw_upstream(answer_well, port=self._second) as upstream:
            yield upstream

    async def chat(self, model: str, **more: Any) -> Answer:
        return await call(self.gateway.port, "POST", "/v1/chat/completions", body=chat(model, **more))

    async def stream(self, model: str, **more: Any) -> Answer:
        return await self.chat(model, stream=True, **more)

    async def rows(self, answer: Answer) -> list[Row]:
        found = await self._query("SELECT * FROM usage_view WHERE request_id = '{}' ORDER BY attempt", answer)
        return [
            Row(
                row["backend"], row["status"], bool(row["charged"]), row["counted_by"],
                (row["input_tokens"], row["output_tokens"]),
                None if row["cost_usd"] is None else float(row["cost_usd"]), row["duration_ms"],
            )
            for row in found
        ]  # fmt: skip

    async def stored(self, answer: Answer) -> tuple[str, str]:
        """What the conversation keeps of the answer: content and finish_reason."""
        sql = (
            "SELECT content, finish_reason FROM messages_view WHERE role = 'assistant' AND conversation_id ="
            " (SELECT conversation_id FROM usage_view WHERE request_id = '{}' LIMIT 1)"
        )
        ((content, reason),) = [tuple(row.values()) for row in await self._query(sql, answer)]
        return content, reason

    def resident(self) -> int:
        """Bytes of memory."""
        return int(Path(f"/proc/{self.gateway.pid}/statm").read_text().split()[1]) * 4096

    async def _query(self, sql: str, answer: Answer) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self.gateway.query, sql.format(answer.headers["x-request-id"]))


@pytest.fixture(scope="package")
def rig() -> Iterator[Rig]:
    first, second = free_port(), free_port()
    plain = {"type": "openai", "api_key": "sk-upstream-secret", "timeouts": LIMITS}
    backends: dict[str, Any] = {
        "first": {**plain, "base_url": f"http://127.0.0.1:{first}/v1", "models": ["m"]},
        "second": {**plain, "base_url": f"http://127.0.0.1:{second}/v1", "models": ["m"]},
        "nowhere": {**plain, "base_url": "http://no-such-host.invalid/v1", "models": ["m"]},
        "hurried": {
            **plain, "base_url": f"http://127.0.0.1:{first}/v1", "models": ["m"], "timeouts": {**LIMITS, "total": 0.3},
        },
    }  # fmt: skip
    models: dict[str, Any] = {"hurried": {"backend": "hurried", "price": PRICE}}
    for name in ("nowhere0", "nowhere1"):
        models[name] = {"backend": "nowhere", "price": PRICE, "fallbacks": ["m"]}
    models["m"] = {"backend": "second", "price": PRICE}
    for number in range(MODELS):
        spare = {"backend": "second", "model": f"m{number}"}
        main = {"backend": "first", "model": f"m{number}", "weight": FIRST}
        models[f"both{number}"] = {"routes": [main, spare], "price": PRICE}
        models[f"alone{number}"] = {"backend": "first", "model": f"m{number}", "price": PRICE}
    config = {"backends": backends, "models": models, "server": {"first_chunk_wait": 3}}
    with GatewayProcess(config) as gateway:
        yield Rig(gateway, first, second)


def failed_midway(answer: Answer, said: str) -> Any:
    """The error of a stream that ended in the only way a failed one may: what came, one error, and no clean end."""
    assert (answer.status, answer.clean_end) == (200, False)
    assert "[DONE]" not in answer.events
    *passed, last = answer.events
    text = "".join(choice["delta"].get("content") or "" for chunk in passed for choice in chunk["choices"])
    assert text == said
    assert set(last) == {"error"}
    return last["error"]

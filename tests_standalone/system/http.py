"""A client that sees bytes: one request on a socket of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """A reply as it came: `raw_body` with its framing, `body` without."""

    status: int
    headers: Mapping[str, str]
    raw_body: bytes

    @property
    def clean_end(self) -> bool:
        """Did the last HTTP chunk come, or all the bytes that were promised?"""
        if "content-length" in self.headers:
            return len(self.raw_body) == int(self.headers["content-length"])
        return self.raw_body.endswith(b"0\r\n\r\n")

    @property
    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.raw_body
        rest, parts = self.raw_body, []
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            parts.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        return b"".join(parts)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The payloads of the stream's events, parsed; `[DONE]` is text."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


def request_bytes(method: str, path: str, headers: Mapping[str, str] | None = None, body: Any = None) -> bytes:
    """`body` other than bytes is sent as JSON. `Host` is localhost unless given; None leaves a header out."""
    text = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    fields: dict[str, str | None] = {"host": "localhost", "connection": "close", "content-type": "application/json"}
    fields |= {"content-length": str(len(text))} | dict(headers or {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + text


def answer_of(received: bytes) -> Answer:
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1)[:1] + line.split(": ", 1)[1:] for line in lines[1:])
    return Answer(int(lines[0].split()[1]), headers, body)


async def call(
    port: int,
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    body: Any = None,
    *,
    host: str = "127.0.0.1",
) -> Answer:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request_bytes(method, path, headers, body))
        return answer_of(await reader.read())
    finally:
        writer.close()


def chat(model: str, content: Any = "hello there", **more: Any) -> dict[str, Any]:
    """A request body."""
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


async def post_chat(port: int, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
    return await call(port, "POST", "/v1/chat/completions", headers, body)

"""How the scripted upstream's replies reach the socket, byte for byte, and the record of how far they came."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal

from tests_standalone.support.upstream_answer import Answer, Usage
from tests_standalone.support.upstream_connection import Connection, Cut, Gone
from tests_standalone.support.upstream_operations import OperationAnswer
from tests_standalone.support.upstream_scripts import DONE, Json, Script, error_body

Outcome = Literal["finished", "client_closed", "cut"]
PHRASES = {status.value: status.phrase for status in HTTPStatus}
KEPT_REPLY = 4 << 20
ENDLESS = 256 << 20


@dataclass(kw_only=True)
class Record:
    """One request to `.../chat/completions` or another operation, and how far its reply came."""

    number: int
    connection: int
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes
    operation: str = "chat/completions"
    model: str | None = None
    script: str | None = None
    probe: str | None = None
    """The request's `metadata.probe`, else its `user`, else ID where the last user message begins with `probe:ID`."""
    stream: bool = False
    images: int = 0
    status: int | None = None
    usage: Usage | None = None
    """What the client was told, once the bytes that hold it were given to the kernel."""
    bytes_written: int = 0
    """Everything that the kernel took, heads and framing too."""
    reply: bytearray = field(default_factory=bytearray)
    """The first 4 MiB of the reply's body: no framing, no compression."""
    outcome: Outcome | None = None
    """None while it runs. `cut`: the script broke the connection, or the upstream was stopped."""

    @property
    def request(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The data of the reply's events, as sent. For streams that are written one line to an event."""
        return [line.removeprefix("data: ") for line in self.reply.decode().split("\n") if line.startswith("data: ")]

    def as_json(self) -> Json:
        return {
            **dataclasses.asdict(self),
            "body": base64.b64encode(self.body).decode(),
            "reply": base64.b64encode(self.reply).decode(),
        }

    @classmethod
    def from_json(cls, value: Json) -> Record:
        decoded = {
            "body": base64.b64decode(value["body"]),
            "reply": bytearray(base64.b64decode(value["reply"])),
            "usage": value["usage"] and Usage(**value["usage"]),
        }
        return cls(**(value | decoded))


class Reply:
    """Writes one reply as its script says, and notes in the record how far it came."""

    def __init__(
        self,
        connection: Connection,
        record: Record,
        script: Script,
        released: asyncio.Event,
        changed: Callable[[], None],
    ) -> None:
        self.keep_alive = record.headers.get("connection", "").lower() != "close"
        self._connection = connection
        self._record = record
        self._script = script
        self._released = released
        self._changed = changed
        self._chunked = False
        self._gzip = zlib.compressobj(wbits=31) if script.gzip else None

    async def write(self, answer: Answer | OperationAnswer | Json) -> None:
        """Sets the record's outcome, whatever happens. Raises Gone or Cut if the connection is of no more use."""
        script, record = self._script, self._record
        try:
            if script.send_buffer:
                self._connection.set_send_buffer(script.send_buffer)
            await self._connection.sleep(script.head_delay)
            if script.then == "drop":
                raise Cut
            if script.then == "hold" and script.after < 0:
                await self._connection.wait(self._released)
            if script.status >= 400 and script.body is None:
                await self._whole(error_body(script.status))
            elif script.body is not None:
                await self._whole(script.body.encode(), _usage_in(script.body))
            elif isinstance(answer, OperationAnswer):
                await self._whole(answer.body, answer.usage, answer.content_type)
            elif isinstance(answer, Answer) and (
                script.streams_always or (record.stream and not script.ignores_stream)
            ):
                await self._stream(answer)
            elif isinstance(answer, Answer):
                await self._answer_whole(answer)
            else:
                await self._whole(self._encode(answer, indent=2))
            record.outcome = "finished"
        except Gone:
            record.outcome = "client_closed"
            raise
        except (Cut, asyncio.CancelledError):
            record.outcome = "cut"
            raise
        finally:
            self._changed()

    # Bodies

    async def _answer_whole(self, answer: Answer) -> None:
        completion = answer.completion()
        if self._script.then in ("error", "error-event"):
            await self._whole(error_body(500))
            return
        body = self._encode(completion, indent=None if self._script.spaced else 2)
        if self._script.then == "garbage":
            body = body[: len(body) // 2]
        await self._whole(body, Usage.from_openai(completion.get("usage")))

    async def _whole(self, body: bytes, usage: Usage | None = None, kind: str = "application/json") -> None:
        body = self._script.prefix.encode() + body
        await self._head(self._script.content_type or kind, len(body))
        if self._script.then in ("fin", "rst", "tear", "hang", "hold", "endless"):
            half = len(body) // 2 if self._script.after else 0
            await self._body(body[:half])
            await self._trouble(b"")
            body = body[half:]
        await self._body(body)
        await self._end()
        self._report(usage)

    async def _stream(self, answer: Answer) -> None:
        script = self._script
        frames: Iterator[tuple[bytes, Usage | None]] = self._frames(answer)
        total = None
        if script.framing == "length":
            frames = iter(whole := list(frames))
            total = len(script.prefix.encode()) + sum(len(frame) for frame, _ in whole)
        await self._head(script.content_type or "text/event-stream; charset=utf-8", total)
        await self._body(script.prefix.encode())
        await self._connection.sleep(script.first_delay)
        waiting = script.then is not None
        for number, (frame, usage) in enumerate(frames):
            if waiting and (number == script.after or frame.rstrip().endswith(DONE.encode())):
                waiting = False
                if not await self._trouble(frame):
                    return
            await self._connection.sleep(script.delay if number else 0)
            await self._body(frame)
            self._report(usage)
        if waiting and not await self._trouble(b""):
            return
        await self._end()

    def _frames(self, answer: Answer) -> Iterator[tuple[bytes, Usage | None]]:
        script = self._script
        if script.events:
            for data in script.events:
                yield self._event(data.encode()), _usage_in(data)
            return
        for chunk in answer.chunks():
            encoded = self._encode(chunk, indent=1 if script.multi_line else None)
            yield self._event(encoded), Usage.from_openai(chunk.get("usage"))
        for data in script.ending:
            yield self._event(data.encode()), None

    def _event(self, data: bytes, name: str = "") -> bytes:
        newline, space = self._script.newline.encode(), self._script.space.encode()
        before = self._script.before.replace("\n", self._script.newline).encode()
        named = b"event:" + space + name.encode() + newline if name else b""
        lines = [b"data:" + space + line + newline for line in data.split(b"\n")]
        return before + named + b"".join(lines) + newline

    def _encode(self, value: Json, indent: int | None) -> bytes:
        separators = (" , ", " : ") if self._script.spaced else (",", ": ") if indent else (",", ":")
        text = json.dumps(value, ensure_ascii=self._script.ascii, indent=indent, separators=separators)
        if self._script.raw:
            text = f"{text[:-1]},{self._script.raw}}}"
        return text.encode()

    async def _trouble(self, frame: bytes) -> bool:
        """Does what `then` says, in place of or before the next event. False: the reply is over."""
        match self._script.then:
            case "fin" | "rst" as how:
                raise Cut(how)
            case "tear":
                await self._body(frame[: len(frame) // 2])
                raise Cut
            case "hang":
                await self._connection.sleep(math.inf)
            case "hold":
                await self._connection.wait(self._released)
            case "error" | "error-event" as kind:
                error = json.dumps(json.loads(error_body(500)), separators=(",", ":")).encode()
                await self._body(self._event(error, "error" if kind == "error-event" else ""))
                await self._end()
                return False
            case "garbage":
                await self._body(self._event(b'{"id":"chatcmpl-broken","choices":[{"index":0,"delta":{"content":'))
            case "endless":
                await self._body(b'data: {"id":"')
                for _ in range(ENDLESS >> 16):
                    await self._body(b"a" * (1 << 16))
                raise Cut
        return True

    # Bytes

    async def _head(self, content_type: str, length: int | None) -> None:
        script, status = self._script, self._script.status
        for code in script.interim:
            await self._send(f"HTTP/1.1 {code} {PHRASES[code]}\r\n\r\n".encode())
        self._chunked = script.framing == "chunked" or (
            script.framing == "auto" and (length is None or self._gzip is not None)
        )
        headers = [
            ("content-type", content_type),
            ("x-request-id", f"req_{self._record.number:032x}"),
            ("openai-version", "2020-10-01"),
            ("openai-processing-ms", "42"),
            ("x-ratelimit-limit-requests", "10000"),
            ("x-ratelimit-remaining-requests", "9999"),
            ("x-ratelimit-reset-requests", "6ms"),
        ]
        if self._gzip:
            headers.append(("content-encoding", "gzip"))
        if self._chunked:
            headers.append(("transfer-encoding", "chunked"))
        elif script.framing != "close" and length is not None:
            headers.append(("content-length", str(length + script.length_error)))
        if script.framing == "close" or script.close == "announced" or not self.keep_alive:
            headers.append(("connection", "close"))
        if script.framing == "close" or script.close in ("announced", "silent") or script.length_error:
            self.keep_alive = False
        lines = [
            f"HTTP/1.1 {status} {PHRASES.get(status, 'Unknown')}",
            *(f"{name}: {value}" for name, value in (*headers, *script.headers)),
        ]
        self._record.status = status
        await self._send("\r\n".join([*lines, "\r\n"]).encode())

    async def _body(self, data: bytes) -> None:
        if len(self._record.reply) < KEPT_REPLY:
            self._record.reply += data[: KEPT_REPLY - len(self._record.reply)]
        if self._gzip:
            flushed = self._gzip.flush(zlib.Z_SYNC_FLUSH) if data and self._script.gzip == "flushed" else b""
            data = self._gzip.compress(data) + flushed
        await self._pieces(data)

    async def _end(self) -> None:
        if self._gzip:
            await self._pieces(self._gzip.flush())
        if self._chunked:
            trailers = "".join(f"{name}: {value}\r\n" for name, value in self._script.trailers)
            await self._send(f"0\r\n{trailers}\r\n".encode())
        if self._script.length_error > 0:
            raise Cut

    async def _pieces(self, data: bytes) -> None:
        size = self._script.split or len(data) or 1
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            await self._send(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)

    async def _send(self, data: bytes) -> None:
        await self._connection.send(data)
        self._record.bytes_written += len(data)
        self._changed()

    def _report(self, usage: Usage | None) -> None:
        if usage:
            self._record.usage = usage


def _usage_in(data: str) -> Usage | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return Usage.from_openai(value.get("usage")) if isinstance(value, dict) else None

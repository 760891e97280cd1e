"""A scripted Ollama: its own API (`/api/...`) byte for byte as its Go server writes it, and a tally.

What a request gets is the script of its model (ollama_scripts.py); an unknown one is 404. `name` means `name:latest`.
Requests that the Go structs would not take are refused with its words: a `content` that is no string, `arguments` that
are no object, pictures that are no base64, options of a wrong type. A token is a word; a picture is 85.

    async with ScriptedOllama() as ollama:
        HTTPBackend("ollama", ollama.root_url, ...)
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

from tests_standalone.support.ollama_answer import Answer, Talk, Text, go_json, listed, load_line, words
from tests_standalone.support.ollama_scripts import LOAD_NS, SCRIPTS, Json, OllamaScript
from tests_standalone.support.upstream_connection import Connection, Cut, Gone, Head, read_body, read_head

__all__ = ["OllamaScript", "ScriptedOllama", "Seen"]

PHRASES = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 500: "Internal Server Error"}
PHRASES |= {405: "Method Not Allowed", 503: "Service Unavailable"}
FLOATS = {"temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty"}
WHOLE = {"num_keep", "seed", "num_predict", "top_k", "repeat_last_n", "num_ctx", "num_batch", "num_gpu", "main_gpu"}


class Refused(Exception):
    """A request that Ollama would not take."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status
        self.error = error


@dataclass(kw_only=True)
class Seen:
    """One request, and how far its reply came."""

    connection: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int | None = None
    lines: int = 0
    outcome: Literal["finished", "client_closed", "cut"] | None = None

    @property
    def request(self) -> Any:
        return json.loads(self.body)


class ScriptedOllama:
    """Open it with `async with`; `loaded` are the models in its memory, `loads` the names of all it ever loaded."""

    def __init__(self, port: int = 0, **scripts: OllamaScript) -> None:
        self.port = port
        self.tally: list[Seen] = []
        self.loaded: dict[str, Json] = {}
        self.loads: list[str] = []
        self._scripts = {**SCRIPTS, **{f"{name}:latest": script for name, script in scripts.items()}}
        self._connections: set[Connection] = set()
        self._connected = itertools.count(1)
        self._failures: list[Exception] = []
        self._change = asyncio.Event()
        self._server: asyncio.Server

    @property
    def root_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(next(self._connected), self._serve), "127.0.0.1", self.port
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Breaks off what runs. Raises what went wrong here and was nobody's script."""
        self._server.close()
        running = list(self._connections)
        for connection in running:
            connection.task.cancel()
        await asyncio.gather(*(connection.task for connection in running), return_exceptions=True)
        await self._server.wait_closed()
        if self._failures and exception[0] is None:
            raise self._failures[0]

    # What tests ask

    def of(self, path: str) -> list[Seen]:
        return [seen for seen in self.tally if seen.path == path]

    @property
    def last(self) -> Any:
        """The last request that had a body."""
        return [seen for seen in self.tally if seen.body][-1].request

    @property
    def disconnects(self) -> int:
        return sum(seen.outcome == "client_closed" for seen in self.tally)

    async def until(self, condition: Callable[[list[Seen]], bool]) -> list[Seen]:
        """The tally, once the condition holds for it."""
        async with asyncio.timeout(60):
            while not condition(self.tally):
                await self._change.wait()
        return self.tally

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    # Connections

    async def _serve(self, connection: Connection) -> None:
        self._connections.add(connection)
        how: Literal["fin", "abort"] = "abort"
        try:
            while True:
                await self._exchange(connection)
        except Cut:
            how = "fin"
        except Gone:
            pass
        except Exception as failure:
            self._failures.append(failure)
            raise
        finally:
            connection.close(how)
            self._connections.discard(connection)

    async def _exchange(self, connection: Connection) -> None:
        head = await read_head(connection)
        body = await read_body(connection, head)
        seen = Seen(connection=connection.number, method=head.method, path=head.path, headers=head.headers, body=body)
        self.tally.append(seen)
        self._changed()
        reply = _Reply(connection, seen)
        try:
            await self._answer(head, seen, reply)
            seen.outcome = "finished"
        except Refused as refused:
            await reply.whole({"error": refused.error}, refused.status)
            seen.outcome = "finished"
        except Gone:
            seen.outcome = "client_closed"
            raise
        except (Cut, asyncio.CancelledError):
            seen.outcome = "cut"
            raise
        finally:
            self._changed()

    async def _answer(self, head: Head, seen: Seen, reply: _Reply) -> None:
        match head.method, head.path:
            case (("GET" | "HEAD"), "/"):
                await reply.text("Ollama is running")
            case "GET", "/api/version":
                await reply.whole({"version": "0.12.6"})
            case "GET", "/api/tags":
                await reply.whole({"models": [listed(name) for name in self._scripts]})
            case "GET", "/api/ps":
                await reply.whole({"models": list(self.loaded.values())})
            case "POST", "/api/show":
                await self._show(seen, reply)
            case "POST", "/api/chat":
                await self._chat(seen, reply)
            case "POST", "/api/generate":
                await self._generate(seen, reply)
            case "POST", "/api/embed":
                await self._embed(seen, reply)
            case _:
                await reply.text("404 page not found", 404)

    # The API

    def _model(self, request: Json) -> tuple[str, OllamaScript]:
        if not isinstance(request.get("model"), str) or not request["model"]:
            raise Refused(400, "model is required")
        name = request["model"] if ":" in request["model"] else f"{request['model']}:latest"
        if name not in self._scripts:
            raise Refused(404, f"model '{request['model']}' not found")
        return name, self._scripts[name]

    async def _load(self, name: str, script: OllamaScript, request: Json, connection: Connection) -> None:
        """Into memory, with its options; other options load it anew."""
        options = request.get("options") or {}
        _check_options(options)
        length = options.get("num_ctx", 4096)
        if self.loaded.get(name, {}).get("context_length") != length:
            self.loads.append(name)
            await connection.sleep(script.load_delay)
        keep = request.get("keep_alive", "5m")
        expires = "2318-06-01T00:00:00Z" if str(keep).startswith("-") else "2026-03-01T12:05:00.5+00:00"
        vram = 5_000_000_000
        self.loaded[name] = {**listed(name), "expires_at": expires, "size_vram": vram, "context_length": length}
        del self.loaded[name]["modified_at"]

    async def _show(self, seen: Seen, reply: _Reply) -> None:
        name, script = self._model(_read(seen))
        info = {"general.architecture": "llama", "llama.context_length": 131072, "llama.embedding_length": 4096}
        details = listed(name)["details"]
        await reply.whole({"details": details, "model_info": info, "capabilities": list(script.capabilities)})

    async def _chat(self, seen: Seen, reply: _Reply) -> None:
        request = _read(seen)
        name, script = self._model(request)
        messages = request.get("messages") or []
        for message in messages:
            _check_message(message)
        if not messages and request.get("keep_alive") == 0:
            self.loaded.pop(name, None)
            await reply.whole(load_line(request, "unload"))
            return
        _check_capabilities(name, script, request, "chat")
        await self._load(name, script, request, reply.connection)
        if script.status != 200:
            raise Refused(script.status, script.error)
        if not messages:
            await reply.whole(load_line(request, "load"))
            return
        await self._write(Talk(request, script), script, request, reply)

    async def _generate(self, seen: Seen, reply: _Reply) -> None:
        request = _read(seen)
        name, script = self._model(request)
        if not isinstance(request.get("prompt", ""), str):
            raise Refused(
                400, "json: cannot unmarshal array into Go struct field GenerateRequest.prompt of type string"
            )
        _check_capabilities(name, script, request, "generate")
        await self._load(name, script, request, reply.connection)
        if script.status != 200:
            raise Refused(script.status, script.error)
        await self._write(Text(request, script), script, request, reply)

    async def _embed(self, seen: Seen, reply: _Reply) -> None:
        request = _read(seen)
        name, script = self._model(request)
        texts = request.get("input", [])
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Refused(400, "invalid input type")
        await self._load(name, script, request, reply.connection)
        size = request.get("dimensions") or 4
        vectors = [[round((len(text) + place) / 8, 7) for place in range(size)] for text in texts]
        told = {"total_duration": LOAD_NS, "load_duration": 1000, "prompt_eval_count": sum(map(words, texts))}
        await reply.whole({"model": request["model"], "embeddings": vectors, **(told if texts else {})})

    async def _write(self, answer: Answer, script: OllamaScript, request: Json, reply: _Reply) -> None:
        if request.get("stream") is False:
            if script.then in ("error", "cut"):
                raise Refused(500, script.error) if script.then == "error" else Cut
            await reply.whole(answer.whole())
            return
        await reply.stream_head()
        for number, line in enumerate(answer.lines()):
            if number == script.after and script.then is not None and not await reply.trouble(script):
                return
            await reply.connection.sleep(script.delay if number else 0)
            await reply.line(line)
        await reply.stream_end()


class _Reply:
    """One reply on its way to the socket."""

    def __init__(self, connection: Connection, seen: Seen) -> None:
        self.connection = connection
        self._seen = seen

    async def whole(self, value: Json, status: int = 200) -> None:
        await self._send_whole(go_json(value), "application/json; charset=utf-8", status)

    async def text(self, text: str, status: int = 200) -> None:
        await self._send_whole(text.encode(), "text/plain" if status == 404 else "text/plain; charset=utf-8", status)

    async def stream_head(self) -> None:
        await self._head(200, "application/x-ndjson", "Transfer-Encoding: chunked")

    async def line(self, value: Json) -> None:
        await self._chunk(go_json(value) + b"\n")
        self._seen.lines += 1

    async def stream_end(self) -> None:
        await self.connection.send(b"0\r\n\r\n")

    async def trouble(self, script: OllamaScript) -> bool:
        """False: the reply is over."""
        match script.then:
            case "error":
                await self.line({"error": script.error})
                await self.stream_end()
                return False
            case "no-done":
                await self.stream_end()
                return False
            case "cut":
                await self._chunk(b'{"model":"cut","created_at":"2026-03-0')
                raise Cut
            case "garbage":
                await self._chunk(b"<html>Bad gateway</html>\n")
            case "hang":
                await self.connection.sleep(math.inf)
        return True

    async def _send_whole(self, body: bytes, content_type: str, status: int) -> None:
        await self._head(status, content_type, f"Content-Length: {len(body)}")
        await self.connection.send(b"" if self._seen.method == "HEAD" else body)

    async def _head(self, status: int, content_type: str, framing: str) -> None:
        self._seen.status = status
        lines = [f"HTTP/1.1 {status} {PHRASES[status]}", f"Content-Type: {content_type}"]
        lines += ["Date: Sun, 01 Mar 2026 12:00:00 GMT", framing, "", ""]
        await self.connection.send("\r\n".join(lines).encode())

    async def _chunk(self, data: bytes) -> None:
        await self.connection.send(b"%x\r\n%b\r\n" % (len(data), data))


def _read(seen: Seen) -> Json:
    try:
        request = json.loads(seen.body)
    except ValueError:
        raise Refused(400, "invalid character looking for beginning of value") from None
    assert isinstance(request, dict)
    if seen.headers.get("content-type") != "application/json":
        raise Refused(400, "the content type is not JSON")  # ours: Ollama does not look
    return request


def _check_message(message: Json) -> None:
    field = "Go struct field ChatRequest.messages"
    for key in ("role", "content", "thinking", "tool_name", "tool_call_id"):
        if not isinstance(message.get(key, ""), str):
            raise Refused(400, f"json: cannot unmarshal array into {field}.{key} of type string")
    if message.get("role") not in ("system", "user", "assistant", "tool"):
        raise Refused(400, f"a role of {message.get('role')}")  # ours: templates just leave such messages out
    for call in message.get("tool_calls") or ():
        if not isinstance(call["function"]["arguments"], dict):
            raise Refused(400, f"json: cannot unmarshal string into {field}.tool_calls.function.arguments")
    for image in message.get("images") or ():
        try:
            base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            raise Refused(400, "illegal base64 data at input byte 4") from None


def _check_options(options: Json) -> None:
    for key, value in options.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in FLOATS and not number:
            raise Refused(400, f'option "{key}" must be of type float32')
        if key in WHOLE and not number:
            raise Refused(400, f'option "{key}" must be of type integer')
        if key == "stop" and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            raise Refused(400, 'option "stop" must be of an array of strings')


def _check_capabilities(name: str, script: OllamaScript, request: Json, verb: str) -> None:
    think = request.get("think")
    if think not in (None, True, False, "low", "medium", "high", "max"):
        raise Refused(400, f'invalid think value: "{think}"')
    if think and "thinking" not in script.capabilities:
        raise Refused(400, f'"{request["model"]}" does not support thinking')
    if "completion" not in script.capabilities:
        raise Refused(400, f'"{request["model"]}" does not support {verb}')
    if request.get("tools") and "tools" not in script.capabilities:
        raise Refused(400, f"registry.ollama.ai/library/{name} does not support tools")

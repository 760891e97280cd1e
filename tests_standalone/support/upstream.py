"""A scripted upstream: OpenAI's wire format byte for byte, every way of breaking it, and a tally of its own.

Below is how it chats; its other operations (embeddings, pictures, sound...) are in `upstream_operations`.

What a request gets is a `Script`, by the first of these that is there:

- header `x-script`: the name of a script, or a JSON object;
- a JSON object with the member `script` at the start of the last user message;
- the base URL: `http://host:port/script/NAME/v1` (for `GET /models` too);
- the name of the model. Any name that is not a script gets `answer`.

The JSON object may set every field of Script: `{"script": "cut-fin", "after": 5, "words": 20}`. What nobody knows is
answered with a 400 that says so. In a message, `probe:ID ` may stand before it; see Record.probe.

A token is a word: what stands between white space, in the texts of the prompt and in the answer's content, reasoning,
refusal, and names and arguments of tools; and 85 for each image. So usage is exact and can be foretold.

In a test's own loop: `async with ScriptedUpstream() as upstream`. For tests that block, and for gateways that outlive a
loop, as a process: `with UpstreamProcess() as upstream`, or `python -m tests_standalone.support.upstream --port 0`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self
from urllib.request import ProxyHandler, Request, build_opener

from tests_standalone.support.upstream_answer import CREATED, Answer, Usage, images, last_user_text, take_apart
from tests_standalone.support.upstream_connection import Connection, Cut, Gone, Head, read_body, read_head
from tests_standalone.support.upstream_operations import answer, fields_of, operation_of
from tests_standalone.support.upstream_reply import Outcome, Record, Reply
from tests_standalone.support.upstream_scripts import SCRIPTS, Json, Script, ScriptError, error_body

__all__ = ["SCRIPTS", "Outcome", "Record", "Script", "ScriptedUpstream", "UpstreamProcess", "Usage"]


class ScriptedUpstream:
    """Open it with `async with`; the tally is there afterwards, too."""

    def __init__(self, port: int = 0, scripts: Mapping[str, Script] | None = None, models: Sequence[str] = ()) -> None:
        """`scripts` come on top of SCRIPTS. `models` are listed besides the names of scripts."""
        self.port = port
        self.tally: list[Record] = []
        self._scripts = {**SCRIPTS, **(scripts or {})}
        self._models = [*models, *self._scripts]
        self._connections: set[Connection] = set()
        self._connected = itertools.count(1)
        self._received = itertools.count(1)
        self._attempts: Counter[tuple[str, str | None]] = Counter()
        self._held: dict[int, asyncio.Event] = {}
        self._failures: list[Exception] = []
        self._change = asyncio.Event()
        self._server: asyncio.Server

    @property
    def root_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return self.root_url + "/v1"

    def script_url(self, name: str) -> str:
        """A base URL where every request gets this script, whatever its model."""
        return f"{self.root_url}/script/{name}/v1"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(next(self._connected), self._serve), "127.0.0.1", self.port, backlog=1024
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

    def of(self, probe: str) -> list[Record]:
        return [record for record in self.tally if record.probe == probe]

    async def until(self, condition: Callable[[list[Record]], bool], timeout: float = 20) -> list[Record]:
        """The tally, once the condition holds for it."""
        async with asyncio.timeout(timeout):
            while not condition(self.tally):
                await self._change.wait()
        return self.tally

    async def settled(self, count: int = 1, timeout: float = 20) -> list[Record]:
        """The tally, once that many requests have come and none is running."""
        return await self.until(lambda tally: len(tally) >= count and all(record.outcome for record in tally), timeout)

    def release(self, probe: str | None = None) -> None:
        """Lets the requests go on that `hold` holds now or will hold: those with this probe, or all so far."""
        for record in self.tally:
            if probe in (None, record.probe):
                self._held[record.number].set()

    def reset(self) -> None:
        """Forgets what was. What still runs, runs on."""
        self.tally.clear()
        self._attempts.clear()

    # Connections

    async def _serve(self, connection: Connection) -> None:
        self._connections.add(connection)
        how: Literal["fin", "rst", "abort"] = "abort"
        try:
            while await self._exchange(connection):
                pass
            how = "fin"
        except Gone:
            pass
        except Cut as cut:
            how = cut.how
        except Exception as failure:
            self._failures.append(failure)
            raise
        finally:
            connection.close(how)
            self._connections.discard(connection)

    async def _exchange(self, connection: Connection) -> bool:
        """One request and its reply. True: the connection stays open for the next."""
        head = await read_head(connection)
        chat = head.method == "POST" and head.path.rstrip("/").endswith("/chat/completions")
        if chat and (early := self._early(head)):
            name, script = early
            record = self._record(connection, head, b"", script=name)
            await self._reply(connection, record, dataclasses.replace(script, close="announced")).write({})
            await connection.read_away()
            return False
        body = await read_body(connection, head)
        if chat:
            return await self._chat(connection, head, body)
        if head.method == "POST" and (operation := operation_of(head.path)):
            return await self._operation(connection, head, body, operation)
        return await self._other(connection, head)

    def _early(self, head: Head) -> tuple[str, Script] | None:
        name = head.headers.get("x-script") or head.script_name or ""
        script = self._scripts.get(name)
        return (name, script) if script and script.early else None

    async def _chat(self, connection: Connection, head: Head, body: bytes) -> bool:
        record = self._record(connection, head, body)
        try:
            request = _understand(body)
            record.model, record.stream = request["model"], bool(request.get("stream"))
            record.images = len(images(request["messages"]))
            record.script, script, record.probe = self._select(head, request)
        except (ValueError, ScriptError) as mistake:
            record.script = "mistake"
            refused = Script(status=400, body=error_body(400, str(mistake)).decode())
            await self._reply(connection, record, refused).write({})
            return True
        attempt = (record.script, record.probe)
        self._attempts[attempt] += 1
        if script.fail_first and self._attempts[attempt] > script.fail_first:
            script = script.sound()
        self._changed()
        reply = self._reply(connection, record, script)
        await reply.write(Answer(record.number, request, script))
        if script.close == "next" and reply.keep_alive:
            await self._cut_next(connection)
        return reply.keep_alive

    async def _operation(self, connection: Connection, head: Head, body: bytes, operation: str) -> bool:
        """The script is that of the header, the base URL or the model's name."""
        record = self._record(connection, head, body)
        fields = fields_of(head.headers.get("content-type", ""), body)
        record.operation, record.model, record.probe = operation, fields.get("model"), fields.get("user")
        record.stream = fields.get("stream") in (True, "true")
        named = head.headers.get("x-script") or head.script_name or record.model or ""
        record.script = named if named in self._scripts else "answer"
        script = self._scripts[record.script]
        attempt = (record.script, record.probe)
        self._attempts[attempt] += 1
        if script.fail_first and self._attempts[attempt] > script.fail_first:
            script = script.sound()
        self._changed()
        reply = self._reply(connection, record, script)
        await reply.write(answer(operation, fields))
        return reply.keep_alive

    async def _cut_next(self, connection: Connection) -> None:
        head = await read_head(connection)
        record = self._record(connection, head, await read_body(connection, head), script="close-next")
        record.outcome = "cut"
        self._changed()
        raise Cut

    def _record(self, connection: Connection, head: Head, body: bytes, script: str | None = None) -> Record:
        number = next(self._received)
        record = Record(
            number=number, connection=connection.number, path=head.path, headers=head.headers, body=body, script=script
        )
        self._held[number] = asyncio.Event()
        self.tally.append(record)
        self._changed()
        return record

    def _reply(self, connection: Connection, record: Record, script: Script) -> Reply:
        released = self._held.get(record.number) or asyncio.Event()
        return Reply(connection, record, script, released, self._changed)

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _select(self, head: Head, request: Json) -> tuple[str, Script, str | None]:
        """The name of the script, the script with what the request set in it, and the probe."""
        probe, wish, _ = take_apart(last_user_text(request["messages"]))
        header = head.headers.get("x-script", "")
        if header.startswith("{"):
            wish = json.loads(header)
        fields = dict(wish or {})
        named = header if header and not header.startswith("{") else fields.pop("script", None) or head.script_name
        fields.pop("script", None)
        probe = fields.pop("probe", None) or probe
        if named is None:
            named = request["model"] if request["model"] in self._scripts else "answer"
        if named not in self._scripts:
            raise ScriptError(f"there is no script {named}")
        script = self._scripts[named].with_fields(fields)
        metadata = request.get("metadata")
        asked = metadata.get("probe") if isinstance(metadata, dict) else None
        return named, script, asked or request.get("user") or probe

    # Everything but chat

    async def _other(self, connection: Connection, head: Head) -> bool:
        script, answer = self._scripts.get(head.script_name or "answer", SCRIPTS["answer"]), self._answer(head)
        if answer is None:
            script = Script(status=404, body=error_body(404, f"There is no {head.method} {head.path}").decode())
        record = Record(number=0, connection=connection.number, path=head.path, headers=head.headers, body=b"")
        reply = self._reply(connection, record, script)
        await reply.write({} if answer is None else answer)
        return reply.keep_alive

    def _answer(self, head: Head) -> Json | None:
        match head.method, head.path:
            case "GET", "/__tally":
                return {"requests": [record.as_json() for record in self.tally]}
            case "POST", "/__reset":
                self.reset()
                return {}
            case "POST", path if path.startswith("/__release"):
                self.release(path.removeprefix("/__release").strip("/") or None)
                return {}
        found = re.search(r"/models(?:/(.+))?$", head.path)
        if head.method != "GET" or not found:
            return None
        if found[1] is None:
            return {"object": "list", "data": [_model(name) for name in self._models]}
        return _model(found[1]) if found[1] in self._models else None


def _model(name: str) -> Json:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "scripted"}


def _understand(body: bytes) -> Json:
    """Raises ValueError for what OpenAI would not take either."""
    try:
        request = json.loads(body)
    except ValueError:
        raise ValueError("We could not parse the JSON body of your request.") from None
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        raise ValueError("you must provide a model parameter")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise ValueError("Invalid 'messages': a non-empty array of objects is needed.")
    return request


class UpstreamProcess:
    """The same upstream in a process of its own, for tests that block. It ends with the test run, whatever happens."""

    def __init__(self) -> None:
        self._http = build_opener(ProxyHandler({}))
        self._process: subprocess.Popen[bytes]
        self.port = 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests_standalone.support.upstream", "--port", "0", "--stop-with-stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the upstream did not start: exit code {self._process.wait()}")
        self.port = int(line)
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()

    @property
    def root_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return self.root_url + "/v1"

    def script_url(self, name: str) -> str:
        return f"{self.root_url}/script/{name}/v1"

    @property
    def tally(self) -> list[Record]:
        return [Record.from_json(record) for record in self._call("GET", "/__tally")["requests"]]

    def of(self, probe: str) -> list[Record]:
        return [record for record in self.tally if record.probe == probe]

    def until(self, condition: Callable[[list[Record]], bool], timeout: float = 20) -> list[Record]:
        end = time.monotonic() + timeout
        while not condition(tally := self.tally):
            if time.monotonic() > end:
                raise TimeoutError("the tally never came to that")
            time.sleep(0.02)
        return tally

    def settled(self, count: int = 1, timeout: float = 20) -> list[Record]:
        return self.until(lambda tally: len(tally) >= count and all(record.outcome for record in tally), timeout)

    def release(self, probe: str | None = None) -> None:
        self._call("POST", f"/__release/{probe}" if probe else "/__release")

    def reset(self) -> None:
        self._call("POST", "/__reset")

    def _call(self, method: str, path: str) -> Json:
        with self._http.open(Request(self.root_url + path, method=method), timeout=30) as reply:
            answer: Json = json.load(reply)
            return answer


async def _run(port: int, stop_with_stdin: bool) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    if stop_with_stdin:
        loop.add_reader(sys.stdin, stopped.set)
    async with ScriptedUpstream(port) as upstream:
        print(upstream.port, flush=True)
        await stopped.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A scripted upstream; prints its port.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--stop-with-stdin", action="store_true", help="end when standard input is closed")
    arguments = parser.parse_args()
    asyncio.run(_run(arguments.port, arguments.stop_with_stdin))


if __name__ == "__main__":
    main()

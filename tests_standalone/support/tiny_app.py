"""A small ASGI application behind `gateway.serving.serve`, run by test_server.py in processes of its own.

    python -m tests_standalone.support.tiny_app '{"workers": 2, "limits": {"head_seconds": 0.3}}'

Prints one JSON line per event: {"event": "listening", "port": ...} first, then what the application and its drain see.
Every path is one behaviour of an application, and the method of that name below is its description.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from functools import partial
from typing import Any

CHUNK = b"x" * 1000


def say(event: str, **more: Any) -> None:
    line = json.dumps({"event": event, "pid": os.getpid(), **more}) + "\n"
    os.write(1, line.encode())  # one write, so that the lines of several workers do not mix


class TinyDrain:
    def __init__(self) -> None:
        self.ending = asyncio.Event()

    def begin(self) -> None:
        say("drain.begin")

    def cut(self) -> None:
        say("drain.cut")
        self.ending.set()


class TinyApp:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.drain = TinyDrain()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.lifespan(receive, send)
        else:
            handler = getattr(self, scope["path"].strip("/").replace("-", "_") or "echo")
            await handler(scope, receive, send)

    async def lifespan(self, receive: Any, send: Any) -> None:
        await receive()
        if self.options.get("fail"):
            await send({"type": "lifespan.startup.failed", "message": "told to fail"})
            return
        await asyncio.sleep(self.options.get("startup_seconds", 0))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        say("lifespan.shutdown")
        await asyncio.sleep(self.options.get("shutdown_seconds", 0))
        await send({"type": "lifespan.shutdown.complete"})

    async def echo(self, scope: Any, receive: Any, send: Any) -> None:
        """Reads the whole request and says what it was."""
        length = await read(receive)
        if length is None:
            say("disconnect", path=scope["path"])
            return
        headers = [[name.decode(), value.decode("latin-1")] for name, value in scope["headers"]]
        seen = {"method": scope["method"], "query": scope["query_string"].decode(), "headers": headers}
        await answer(send, 200, json.dumps({**seen, "length": length, "pid": os.getpid()}).encode())

    async def busy(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers after as many seconds as the query says."""
        say("running", path=scope["path"])
        await asyncio.sleep(float(scope["query_string"]))
        await self.echo(scope, receive, send)

    async def waiting(self, scope: Any, receive: Any, send: Any) -> None:
        """Writes nothing, and says when it hears that the client is gone."""
        say("waiting")
        await wait_for_disconnect(receive)
        say("disconnect", path=scope["path"])

    async def refuse(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers before the body was read, as a check of the key or of the declared length does."""
        await answer(send, 413, b"too large", [(b"connection", b"close")])

    async def ignore(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers before the body was read, and says nothing about the connection."""
        await answer(send, 200, b"whatever")

    async def dawdle(self, scope: Any, receive: Any, send: Any) -> None:
        """Takes its time before it reads the body."""
        await asyncio.sleep(float(scope["query_string"]))
        await self.echo(scope, receive, send)

    async def stream(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends chunks until the client leaves or the drain is cut, as many a second as the query says."""
        gone = asyncio.create_task(wait_for_disconnect(receive))
        ending = asyncio.create_task(self.drain.ending.wait())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        say("streaming")
        while not (gone.done() or ending.done()):
            pause = 1 / float(scope["query_string"] or 100)
            await asyncio.wait([gone, ending], timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
        say("stream over", gone=gone.done())
        await send({"type": "http.response.body", "body": b"last", "more_body": False})
        gone.cancel()
        ending.cancel()

    async def flood(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends as fast as it may, and says how much that was when the client is gone."""
        gone = asyncio.create_task(wait_for_disconnect(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sent = 0
        while not gone.done():
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
            sent += len(CHUNK)
            await asyncio.sleep(0)
        say("flood over", sent=sent)

    async def silent(self, scope: Any, receive: Any, send: Any) -> None:
        """Begins an answer, writes one chunk more when told, and says when it hears that the client is gone."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await asyncio.sleep(float(scope["query_string"]))
        await send({"type": "http.response.body", "body": b"ping", "more_body": True})
        await wait_for_disconnect(receive)
        say("disconnect", path=scope["path"])

    async def abort(self, scope: Any, receive: Any, send: Any) -> None:
        """Ends a stream early, on purpose."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(200):
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})

    async def stubborn(self, scope: Any, receive: Any, send: Any) -> None:
        """Does not end, whatever it is told."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        say("running", path=scope["path"])
        await asyncio.sleep(3600)

    async def fail(self, scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("secret detail")

    async def nothing(self, scope: Any, receive: Any, send: Any) -> None:
        return


async def read(receive: Any) -> int | None:
    length = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        length += len(message["body"])
        if not message["more_body"]:
            return length


async def wait_for_disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(send: Any, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    headers = [*(headers or []), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def make_app(options: dict[str, Any]) -> TinyApp:
    from gateway.server import GatewayServer
    from gateway.server_protocol import GatewayProtocol

    for name, value in options.get("limits", {}).items():
        setattr(GatewayProtocol if hasattr(GatewayProtocol, name) else GatewayServer, name, value)
    return TinyApp(options)


def main() -> int:
    from gateway import serving

    options = json.loads(sys.argv[1])
    if options.get("loop") == "asyncio":
        sys.modules["uvloop"] = None  # type: ignore[assignment]  # as if it were not installed
    serving.KEEP_ALIVE_SECONDS = options.get("keep_alive_seconds", serving.KEEP_ALIVE_SECONDS)
    return serving.serve(
        partial(make_app, options),
        host=options.get("host", "127.0.0.1"),
        port=options.get("port", 0),
        workers=options.get("workers", 1),
        drain_seconds=options.get("drain_seconds", 5.0),
        on_started=lambda port: say("listening", port=port),
    )


if __name__ == "__main__":
    sys.exit(main())

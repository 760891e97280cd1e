"""Connections that the kernel has accepted and the server has not, when its end begins."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import uvloop

from gateway.server import GatewayServer
from gateway.serving import listen, server_config

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """A server sets the collector of cycles for its whole process."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


async def hello(scope, receive, send):  # type: ignore[no-untyped-def]
    """Answers every request; its lifespan has nothing to do."""
    if scope["type"] == "lifespan":
        for _ in range(2):
            step = (await receive())["type"]
            await send({"type": f"{step}.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.mark.parametrize("make_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_they_are_answered(make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    listener = listen("127.0.0.1", 0)
    address = listener.getsockname()
    clients: list[socket.socket] = []

    async def end_with_connections_waiting() -> None:
        config = server_config(hello)
        config.load()
        server = GatewayServer(config, drain_seconds=5)
        server.lifespan = config.lifespan_class(config)
        await server.startup([listener])
        for _ in range(5):  # without an await, so the loop has seen none of them
            clients.append(socket.create_connection(address))
            clients[-1].sendall(GET)
        await server.shutdown([listener])

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(end_with_connections_waiting())
    for client in clients:
        with client:
            answer = b"".join(iter(partial(client.recv, 65536), b""))
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.endswith(b"hello")

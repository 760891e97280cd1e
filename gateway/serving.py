"""From an application and an address to a running server: `serve`, in this process or in workers."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from gateway.errors import ConfigError
from gateway.server import GatewayServer
from gateway.server_protocol import GatewayProtocol
from gateway.supervisor import GatewaySupervisor

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75


def serve(
    app_factory: Callable[[], ASGIApp],
    *,
    host: str,
    port: int,
    workers: int,
    drain_seconds: float,
    on_started: Callable[[int], None] | None = None,
    sock: socket.socket | None = None,
) -> int:
    """Serves until a signal ends it, and returns the exit status: 0, or 1 if it could not. Port 0 picks a free one;
    `sock` listens already.

    `on_started(port)` is called once, when the server answers. With more than one worker `app_factory` is pickled.
    """
    sock = sock or listen(host, port)
    started = partial(on_started, sock.getsockname()[1]) if on_started is not None else None
    config = server_config(
        app_factory, factory=True, workers=workers, backlog=BACKLOG, keep_alive_seconds=KEEP_ALIVE_SECONDS
    )
    try:
        if workers > 1:
            supervisor = GatewaySupervisor(config, [sock], drain_seconds=drain_seconds, on_started=started)
            supervisor.run()
            return 1 if supervisor.exit_code else 0
        GatewayServer(config, drain_seconds=drain_seconds, on_started=started).run([sock])
    except asyncio.CancelledError:  # a second signal while the application was starting
        return 1
    except SystemExit as exit_:  # uvicorn's way to say that the application did not start
        return 1 if exit_.code else 0
    finally:
        sock.close()
    return 0


def server_config(
    app: ASGIApp | Callable[[], ASGIApp],
    *,
    factory: bool = False,
    workers: int = 1,
    backlog: int = BACKLOG,
    keep_alive_seconds: int = KEEP_ALIVE_SECONDS,
    max_requests: int | None = None,
) -> uvicorn.Config:
    """How our server runs an application, whoever starts the process: `serve`, or gunicorn."""
    return uvicorn.Config(
        app,
        factory=factory,
        interface="asgi3",
        lifespan="on",
        http=GatewayProtocol,
        loop="auto",  # uvloop where it is installed
        ws="none",
        workers=workers,
        backlog=backlog,
        timeout_keep_alive=keep_alive_seconds,
        limit_max_requests=max_requests,
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections notice a vanished peer within a minute."""
    try:
        found = socket.getaddrinfo(host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    except OSError as exc:
        raise ConfigError([f"server.host: {host!r} is not an address of this machine ({exc.strerror})"]) from exc
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and address[0] == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        set_inherited_options(sock)
        sock.bind(address)
        sock.listen(BACKLOG)  # at once: two that have only bound the port would both believe that they own it
    except OSError as exc:
        sock.close()
        raise ConfigError([_why_not(exc, host, port)]) from exc
    return sock


def set_inherited_options(sock: socket.socket) -> None:
    """What accepted TCP connections take over from the socket that listens for them."""
    for level, option, value in _inherited_options():
        sock.setsockopt(level, option, value)


def _inherited_options() -> list[tuple[int, int, int]]:
    """Where the platform knows them."""
    wanted = [
        ("TCP_NODELAY", 1),
        ("TCP_KEEPIDLE", 15),
        ("TCP_KEEPINTVL", 15),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 60_000),
        ("TCP_NOTSENT_LOWAT", 64 * 1024),  # the kernel hides no megabytes from our own write limits
    ]
    tcp = [(socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in wanted if hasattr(socket, name)]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *tcp]


def _why_not(exc: OSError, host: str, port: int) -> str:
    if exc.errno == errno.EADDRINUSE:
        return (
            f"server.port: port {port} on {host} is in use. "
            "Stop the program that uses it, or choose another with --port or GATEWAY_PORT"
        )
    if exc.errno == errno.EACCES:
        return f"server.port: port {port} needs more rights than this user has. Choose one above 1023"
    if exc.errno == errno.EADDRNOTAVAIL:
        return f"server.host: {host} is not an address of this machine"
    return f"server.port: cannot listen on {host}, port {port}: {exc.strerror}"

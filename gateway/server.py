"""Runs the application on a socket: in this process, or in workers under a supervisor. Ends without dropping work.

The end, for a process that serves (the first SIGTERM or SIGINT, or a supervisor that is gone):

    begin      `drain.begin()` is called; nothing is accepted any more; idle connections close
    drain      what runs goes on for up to `drain_seconds`; every answer says `connection: close`
    cut        `drain.cut()` is called; the streams end themselves within `cut_seconds`
    cancel     tasks that are still there are cancelled, their connections aborted
    lifespan   the application's shutdown, at most `lifespan_seconds`

A second signal goes on to the cut at once and shortens all that follows; a watchdog sees to it that the process is
gone within three seconds.

`drain` is an optional attribute of the ASGI application, see `Drain`. The exit status is 0 after any of these ends.

The supervisor talks with its workers over one pipe each: "ready" comes up, "cut" goes down, and its end tells a worker
that the supervisor is dead. Workers do not listen to SIGINT, and take a repeated SIGTERM for the same one: terminals
and service managers signal the whole group, so a worker cannot know a second signal from an echo of the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from functools import partial
from multiprocessing import connection
from types import FrameType
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from .errors import ConfigError
from .server_protocol import GatewayProtocol

__all__ = ["Drain", "GatewayServer", "GatewaySupervisor", "GatewayWorker", "serve"]

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75


class Drain(Protocol):
    """What an application may offer as its attribute `drain` to have a say in how it ends. Both return at once."""

    def begin(self) -> None:
        """The end has begun, the sockets are still open: readiness turns red, nothing new is started."""

    def cut(self) -> None:
        """Time is up: streams end themselves with an error in band and record their turns."""


class GatewayServer(uvicorn.Server):
    """One serving process. `on_started` is called once it answers; `supervisor` is a worker's end of the pipe."""

    settle_seconds = 0.02
    cut_seconds = 5.0
    cancel_seconds = 1.0
    lifespan_seconds = 5.0

    hurried_cut_seconds = 1.0
    hurried_cancel_seconds = 0.2
    hurried_lifespan_seconds = 1.0
    watchdog_seconds = 2.6

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain_seconds: float,
        on_started: Callable[[], None] | None = None,
        supervisor: connection.Connection | None = None,
    ) -> None:
        super().__init__(config)
        self.drain_seconds = drain_seconds
        self.on_started = on_started
        self.supervisor = supervisor
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[Any] | None = None
        self._drain_begun = False
        self._watchdog: threading.Timer | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            super().run(sockets)
        finally:
            if self._watchdog is not None:
                self._watchdog.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()
        if self.supervisor is not None:
            self._loop.add_reader(self.supervisor.fileno(), self._supervisor_spoke)
        await super().startup(sockets)
        if self.on_started is not None:
            self.on_started()

    # -- how the end is noticed ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        with super().capture_signals():
            try:
                yield
            finally:
                self._captured_signals.clear()  # uvicorn would raise them again, and the exit status be -15

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.supervisor is None and self.should_exit:
            self._hurry()
        elif self.supervisor is None or sig != signal.SIGINT:
            self._stop()

    def _supervisor_spoke(self) -> None:
        assert self.supervisor is not None
        assert self._loop is not None
        try:
            self.supervisor.recv_bytes()
        except (EOFError, OSError):
            self._loop.remove_reader(self.supervisor.fileno())
            logger.warning("The supervisor is gone, so this worker ends too")
        else:
            self._hurry()
        self._stop()

    def _stop(self) -> None:
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain)  # we may be inside a signal handler

    def _hurry(self) -> None:
        if self.force_exit:
            return
        self.force_exit = True
        self._watchdog = threading.Timer(self.watchdog_seconds, os._exit, (1,))
        self._watchdog.daemon = True
        self._watchdog.start()
        if not self.started and self._loop is not None and self._main is not None:
            self._loop.call_soon_threadsafe(self._main.cancel)

    # -- the end, step by step -----------------------------------------------------------------------------------

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._begin_drain()
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        await asyncio.sleep(self.settle_seconds)  # requests that have arrived already are read, and so not idle
        for open_connection in list(self.server_state.connections):
            open_connection.shutdown()
        if not await self._all_done(self.drain_seconds, 0):
            self._call_drain("cut")
            if not await self._all_done(self.cut_seconds, self.hurried_cut_seconds):
                await self._cancel_all()
        await self._end_lifespan()

    def _begin_drain(self) -> None:
        if not self._drain_begun:
            self._drain_begun = True
            logger.info("Ending: %d requests are running", len(self.server_state.tasks))
            self._call_drain("begin")

    def _call_drain(self, step: str) -> None:
        drain: Drain | None = getattr(getattr(self.config, "loaded_app", None), "drain", None)
        if drain is None:
            return
        try:
            drain.begin() if step == "begin" else drain.cut()
        except Exception:
            logger.exception("The application failed in drain.%s()", step)

    async def _all_done(self, seconds: float, hurried_seconds: float) -> bool:
        """Whether all requests have ended in this time. A second signal shortens it."""
        began = time.monotonic()
        while self.server_state.connections or self.server_state.tasks:
            if time.monotonic() - began >= (hurried_seconds if self.force_exit else seconds):
                return False
            await asyncio.sleep(0.02)
        return True

    async def _cancel_all(self) -> None:
        requests, connections = len(self.server_state.tasks), len(self.server_state.connections)
        logger.error("Not ended in time, and cut off: %d requests, %d connections", requests, connections)
        for task in list(self.server_state.tasks):
            task.cancel("the drain is over")
        await self._all_done(self.cancel_seconds, self.hurried_cancel_seconds)
        for open_connection in list(self.server_state.connections):
            open_connection.transport.abort()

    async def _end_lifespan(self) -> None:
        seconds = self.hurried_lifespan_seconds if self.force_exit else self.lifespan_seconds
        try:
            async with asyncio.timeout(seconds):
                await self.lifespan.shutdown()
        except TimeoutError:
            logger.error("The application's shutdown did not end within %g s", seconds)


class GatewayWorker(Process):
    """A process that runs a `GatewayServer`. Spawned, so all that it holds when it starts must pickle."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], drain_seconds: float) -> None:
        self.drain_seconds = drain_seconds
        self.ready = False
        super().__init__(config, sockets)

    def __getstate__(self) -> dict[str, Any]:
        # Without our end of the pipe: were it open in the worker too, the worker could not see us go.
        return {name: value for name, value in vars(self).items() if name not in ("parent_conn", "process")}

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        def tell() -> None:
            with contextlib.suppress(OSError):
                self.child_conn.send_bytes(b"ready")

        server = GatewayServer(
            self.config, drain_seconds=self.drain_seconds, on_started=tell, supervisor=self.child_conn
        )
        server.run(sockets)

    def start(self) -> None:
        super().start()
        self.child_conn.close()

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def has_reported(self) -> bool:
        """Whether the worker has said, by now, that it is ready."""
        with contextlib.suppress(EOFError, OSError):
            if self.parent_conn.poll():
                self.ready = self.parent_conn.recv_bytes() == b"ready"
        return self.ready

    def terminate(self) -> None:
        self.process.terminate()

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self.parent_conn.send_bytes(b"cut")


class GatewaySupervisor(Multiprocess):
    """Keeps `config.workers` workers running and hands signals on. SIGHUP replaces them one by one, new before old.

    Nothing here waits for one worker alone: a worker that drains for an hour does not keep another from being
    replaced. If no worker ever becomes ready, the supervisor gives up with the status of a failed start.
    """

    tick_seconds = 0.2
    first_retry_seconds = 0.5
    last_retry_seconds = 3.0
    kill_after_seconds = 15.0  # more than what a worker takes after its drain: cut, cancel and lifespan
    hurried_kill_after_seconds = 2.8

    processes: list[GatewayWorker]  # type: ignore[assignment]  # uvicorn's list holds its own kind

    def __init__(
        self,
        config: uvicorn.Config,
        sockets: list[socket.socket],
        *,
        drain_seconds: float,
        on_started: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(config, sockets)
        self.drain_seconds = drain_seconds
        self.on_started = on_started
        self.exit_code = 0
        self._served = False  # a worker has been ready
        self._failures = 0  # workers in a row that died before they were ready
        self._not_before = 0.0
        self._outdated: list[GatewayWorker] = []  # to be replaced, after SIGHUP
        self._successor: GatewayWorker | None = None
        self._leaving: list[GatewayWorker] = []
        self._kill_at = math.inf

    def run(self) -> None:
        logger.info("Supervisor %d starts %d workers", os.getpid(), self.processes_num)
        self.init_processes()
        while not self.should_exit.is_set():
            self._wait()
            self.handle_signals()
            self.keep_subprocess_alive()
            self._go_on_restarting()
        self._end_all()

    def init_processes(self) -> None:
        while len(self.processes) < self.processes_num:
            self.processes.append(self._spawn())

    def _spawn(self) -> GatewayWorker:
        worker = GatewayWorker(self.config, self.sockets, self.drain_seconds)
        worker.start()
        return worker

    def _everyone(self) -> list[GatewayWorker]:
        return [*self.processes, *self._leaving, *([self._successor] if self._successor else [])]

    def _wait(self) -> None:
        """Returns when a worker dies or becomes ready, or after a tick."""
        everyone = self._everyone()
        signs: list[Any] = [worker.process.sentinel for worker in everyone]
        signs += [worker.parent_conn for worker in everyone if not worker.ready]
        connection.wait(signs, self.tick_seconds)
        for worker in everyone:
            if not worker.ready and worker.has_reported():
                self._failures = 0
                if not self._served and self.on_started is not None:
                    self.on_started()
                self._served = True

    def keep_subprocess_alive(self) -> None:
        if self.should_exit.is_set():
            return
        self._leaving = [worker for worker in self._leaving if worker.alive]
        for worker in [worker for worker in self.processes if not worker.alive]:
            self.processes.remove(worker)
            logger.error("Worker %s died, exit status %s", worker.pid, worker.exitcode)
            if not self._served and (worker.exitcode or 0) > 0:
                logger.error("No worker could start, so the gateway ends")
                self.exit_code = STARTUP_FAILURE
                self.should_exit.set()
                return
            if not worker.ready:
                self._failures += 1
                pause = self.first_retry_seconds * 2 ** min(self._failures, 10)
                self._not_before = time.monotonic() + min(pause, self.last_retry_seconds)
        if time.monotonic() >= self._not_before:
            self.init_processes()

    def _go_on_restarting(self) -> None:
        self._outdated = [worker for worker in self._outdated if worker in self.processes]
        if self._successor is None:
            if self._outdated and not self.should_exit.is_set():
                self._successor = self._spawn()
        elif self._successor.ready:
            if self._outdated:
                old = self._outdated.pop(0)
                self.processes[self.processes.index(old)] = self._successor
                self._retire(old)
            else:  # the old one has died meanwhile, and was replaced
                self._retire(self._successor)
            self._successor = None
        elif not self._successor.alive:
            logger.error("A new worker did not start, so the restart ends here and the old ones stay")
            self._outdated.clear()
            self._successor = None

    def _retire(self, worker: GatewayWorker) -> None:
        worker.terminate()
        self._leaving.append(worker)

    def _end_all(self) -> None:
        logger.info("Supervisor %d ends its workers", os.getpid())
        for sock in self.sockets:
            sock.close()
        for worker in self._everyone():
            worker.terminate()
        self._kill_at = min(self._kill_at, time.monotonic() + self.drain_seconds + self.kill_after_seconds)
        while workers := [worker for worker in self._everyone() if worker.alive]:
            connection.wait([worker.process.sentinel for worker in workers], self.tick_seconds)
            self.handle_signals()
            if time.monotonic() >= self._kill_at:
                for worker in workers:
                    worker.process.kill()

    # -- signals, called by uvicorn's handle_signals() -----------------------------------------------------------

    def handle_term(self) -> None:
        if not self.should_exit.is_set():
            self.should_exit.set()
            return
        self._kill_at = min(self._kill_at, time.monotonic() + self.hurried_kill_after_seconds)
        for worker in self._everyone():
            worker.cut()

    handle_int = handle_term

    def handle_hup(self) -> None:
        logger.info("Replacing all workers")
        self._outdated = list(self.processes)

    def handle_ttin(self) -> None:
        self.processes_num += 1

    def handle_ttou(self) -> None:
        if self.processes_num > 1 and self.processes:
            self.processes_num -= 1
            self._retire(self.processes.pop())


def serve(
    app_factory: Callable[[], ASGIApp],
    *,
    host: str,
    port: int,
    workers: int,
    drain_seconds: float,
    on_started: Callable[[int], None] | None = None,
) -> int:
    """Serves until a signal ends it, and returns the exit status. Port 0 picks a free one.

    `on_started(port)` is called once, when the server answers. With more than one worker `app_factory` is pickled.
    """
    sock = listen(host, port)
    started = partial(on_started, sock.getsockname()[1]) if on_started is not None else None
    config = uvicorn.Config(
        app_factory,
        factory=True,
        interface="asgi3",
        lifespan="on",
        http=GatewayProtocol,
        loop="auto",  # uvloop where it is installed
        ws="none",
        workers=workers,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
    )
    try:
        if workers > 1:
            supervisor = GatewaySupervisor(config, [sock], drain_seconds=drain_seconds, on_started=started)
            supervisor.run()
            return supervisor.exit_code
        GatewayServer(config, drain_seconds=drain_seconds, on_started=started).run([sock])
    except asyncio.CancelledError:  # a second signal while the application was starting
        return 1
    except SystemExit as exit_:  # uvicorn's way to say that the application did not start
        return exit_.code if isinstance(exit_.code, int) else 1
    finally:
        sock.close()
    return 0


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
        for level, option, value in _inherited_options():
            sock.setsockopt(level, option, value)
        sock.bind(address)
        sock.listen(BACKLOG)  # at once: two that have only bound the port would both believe that they own it
    except OSError as exc:
        sock.close()
        raise ConfigError([_why_not(exc, host, port)]) from exc
    return sock


def _inherited_options() -> list[tuple[int, int, int]]:
    """What an accepted socket takes over from the listening one, where the platform knows it."""
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

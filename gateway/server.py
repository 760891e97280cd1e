"""Runs the application in this process, and ends without dropping work.

The end, for a process that serves (the first SIGTERM or SIGINT, or a supervisor that is gone):

    begin      `drain.begin()` is called; nothing is accepted any more; idle connections close
    drain      what runs goes on for up to `drain_seconds`; every answer says `connection: close`
    cut        `drain.cut()` is called; the streams end themselves within `cut_seconds`
    cancel     tasks that are still there are cancelled, their connections aborted
    lifespan   the application's shutdown, at most `lifespan_seconds`

A second signal goes on to the cut at once and shortens all that follows; a watchdog sees to it that the process is
gone within three seconds.

`drain` is an optional attribute of the ASGI application, see `Drain`. The exit status is 0 after any of these ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable
from multiprocessing import connection
from types import FrameType
from typing import Any, Protocol

import uvicorn

__all__ = ["Drain", "GatewayServer"]

logger = logging.getLogger(__name__)


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
        _set_aside_what_stays()
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
        last = _accepted_by_the_kernel(sockets or [], self.config.backlog)
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        for sock in last:
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().connect_accepted_socket(self._protocol, sock)
        await asyncio.sleep(self.settle_seconds)  # requests that have arrived already are read, and so not idle
        for open_connection in list(self.server_state.connections):
            open_connection.shutdown()
        if not await self._all_done(self.drain_seconds, 0):
            self._call_drain("cut")
            if not await self._all_done(self.cut_seconds, self.hurried_cut_seconds):
                await self._cancel_all()
        await self._end_lifespan()

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

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


def _set_aside_what_stays() -> None:
    """Has the collector of cycles look for what requests leave behind, seldom, and never again through what was made
    by the start. A request leaves none, so all that a longer wait can cost is what connections and failures leave."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _accepted_by_the_kernel(listeners: Iterable[socket.socket], most: int) -> list[socket.socket]:
    """Connections that wait for us. They would be reset with the listening socket, and a balancer that has sent its
    request there may not repeat it elsewhere."""
    found = []
    for listener in listeners:
        listener.setblocking(False)
        with contextlib.suppress(OSError):  # nobody is left
            for _ in range(most):
                found.append(listener.accept()[0])
                found[-1].setblocking(False)
    return found

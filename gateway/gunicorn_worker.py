"""gunicorn's worker that runs our own server: `worker_class` in gunicorn.conf.py.

What gunicorn tells a worker, and what it does:

    SIGTERM         the end of `server`, from `begin` on; gunicorn repeats it while a replaced worker drains, so a
                    second one hurries nothing
    SIGQUIT, SIGINT the same, but streams are cut at once and the rest is hurried: gunicorn may kill two seconds later
    SIGABRT         the loop has been stuck for `timeout`: where, goes to the log, and the worker ends
    SIGUSR1         gunicorn's log files are opened anew
    SIGHUP          nothing: a terminal sends it to the whole group, and the master replaces the workers
    master gone     as SIGTERM

A timer in the loop tells gunicorn that the worker lives. So `timeout` measures a loop that is stuck, while a stream, a
drain or a slow start may take as long as it does. The drain takes `graceful_timeout` less `END_SECONDS`, so that
streams are told and turns recorded before gunicorn kills.

A worker that cannot start ends with gunicorn's WORKER_BOOT_ERROR, upon which gunicorn ends instead of trying for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any, ClassVar

import uvicorn
from gunicorn.arbiter import Arbiter
from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.workers.base import Worker
from starlette.types import ASGIApp

from gateway.errors import ConfigError
from gateway.server import GatewayServer
from gateway.serving import server_config, set_inherited_options

__all__ = ["END_SECONDS", "GatewayWorker"]

logger = logging.getLogger("gateway")

END_SECONDS = 15
"""More than what a worker takes after its drain: cut, cancel and lifespan."""

_BEAT_SECONDS = 1.0


class GatewayWorker(Worker):
    """`make_app` is what makes the application, if the master has settled that; else the module that gunicorn was
    given is asked."""

    make_app: ClassVar[Callable[[], ASGIApp] | None] = None

    _server: _Server | None = None

    @staticmethod
    def check_config(cfg: Config, log: Logger) -> None:
        """Raises RuntimeError, which gunicorn prints as one line."""
        if cfg.is_ssl:
            raise RuntimeError(
                "the gateway's worker speaks no TLS: leave certfile and keyfile out, and let the proxy do it"
            )

    def load_wsgi(self) -> None:
        make = type(self).make_app
        try:
            self.wsgi: Any = make() if make is not None else self.app.wsgi()
        except ConfigError as failure:
            for problem in failure.problems:
                print(f"error: {problem}", file=sys.stderr, flush=True)
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    def run(self) -> None:
        """Serves until it is told to end. Leaves by SystemExit if the application does not start."""
        config = server_config(
            self.wsgi,
            backlog=self.cfg.backlog,
            keep_alive_seconds=self.cfg.keepalive,
            max_requests=self.max_requests if self.cfg.max_requests else None,
        )
        sockets: list[socket.socket] = [getattr(listener, "sock", listener) for listener in self.sockets]
        for sock in sockets:
            if sock.family != socket.AF_UNIX:
                set_inherited_options(sock)
        self._server = _Server(config, max(0, self.cfg.graceful_timeout - END_SECONDS), self._beat)
        if self.alive:  # nobody told it to end while it was loading
            with contextlib.suppress(asyncio.CancelledError):  # hurried while it was starting
                self._server.run(sockets)

    def _beat(self) -> None:
        """Called by a timer in the loop."""
        self.notify()
        assert self._server is not None
        if not self.alive:  # gunicorn's reloader says so in this way
            self._server.end()
        elif os.getppid() != self.ppid:
            self.alive = False
            logger.warning("gunicorn's master is gone, so this worker ends too")
            self._server.end()

    # -- signals -------------------------------------------------------------------------------------------------

    def init_signals(self) -> None:
        super().init_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)  # it is the loop's

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.alive = False
        if self._server is not None:
            self._server.end()

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        self.alive = False
        self.cfg.worker_int(self)
        if self._server is None:
            sys.exit(0)
        self._server.end_quickly()

    def handle_abort(self, sig: int, frame: FrameType | None) -> None:
        stack = "".join(traceback.format_stack(frame))
        logger.critical("The loop is stuck, so this worker ends. It was here:\n%s", stack)
        super().handle_abort(sig, frame)


class _Server(GatewayServer):
    """Leaves the signals to the worker. `beat` is called in the loop, every second until it ends."""

    hurried_cut_seconds = 0.8
    hurried_lifespan_seconds = 0.6
    watchdog_seconds = 1.9

    def __init__(self, config: uvicorn.Config, drain_seconds: float, beat: Callable[[], None]) -> None:
        super().__init__(config, drain_seconds=drain_seconds)
        self._beat = beat

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._keep_beating(asyncio.get_running_loop())
        await super().startup(sockets)

    def _keep_beating(self, loop: asyncio.AbstractEventLoop) -> None:
        self._beat()
        loop.call_later(_BEAT_SECONDS, self._keep_beating, loop)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def end(self) -> None:
        self._stop()

    def end_quickly(self) -> None:
        self._hurry()
        self._stop()

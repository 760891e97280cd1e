"""Workers, and the process that keeps them running.

The supervisor talks with its workers over one pipe each: "ready" comes up, "cut" goes down, and its end tells a worker
that the supervisor is dead. Workers do not listen to SIGINT, and take a repeated SIGTERM for the same one: terminals
and service managers signal the whole group, so a worker cannot know a second signal from an echo of the first.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from gateway.server import GatewayServer

logger = logging.getLogger(__name__)


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

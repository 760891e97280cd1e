"""What is measured: one class for each kind of program that can stand between a client and the upstream.

A contestant is entered by `running`, answers on a port until that ends, and leaves nothing behind. Gateways of others
are in `peers`.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks import installs, machine, samples
from benchmarks.processes import child
from tests_standalone.support.gateway import GatewayProcess, free_port
from tests_standalone.support.postgres import OwnPostgres

START_SECONDS = 60
NGINX = """
daemon off; pid nginx.pid; error_log stderr; worker_processes 1; worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi; keepalive_requests 100000000;
    upstream mock {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://mock; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
        }}
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Running:
    """A contestant that answers. `processes` are the roots of its trees by group; `self` is what is measured, others
    (a database) are told apart. `start` starts it again and returns the seconds to its first answer. `headers` are what
    its clients send besides."""

    port: int
    key: str | None = None
    processes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    start: Callable[[], float] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Contestant(Protocol):
    @property
    def name(self) -> str:
        """Short, for options and results."""

    @property
    def title(self) -> str: ...

    @property
    def version(self) -> str | None: ...

    def missing(self) -> str | None:
        """Why it cannot run here; None: it can."""

    def install_mb(self) -> float | None:
        """Size of what is installed, in millions of bytes; None: there is no such thing. May install it afresh."""

    def running(self, upstream: int) -> contextlib.AbstractContextManager[Running]:
        """With the upstream on this port of 127.0.0.1."""


class Direct:
    """Nothing in between: what the upstream and the load generator take by themselves."""

    name = "direct"
    title = "direct"
    version = None

    def missing(self) -> str | None:
        return None

    def install_mb(self) -> float | None:
        return None

    @contextlib.contextmanager
    def running(self, upstream: int) -> Iterator[Running]:
        yield Running(upstream)


class Nginx:
    """A plain reverse proxy with one worker: the physical limit."""

    name = "nginx"
    title = "nginx, plain proxy"

    @property
    def version(self) -> str | None:
        program = self._program()
        if program is None:
            return None
        said = subprocess.run([program, "-v"], capture_output=True, text=True, check=False).stderr
        return said.strip().rpartition("/")[2]

    def missing(self) -> str | None:
        return None if self._program() else "nginx is not installed"

    def install_mb(self) -> float | None:
        return None

    @contextlib.contextmanager
    def running(self, upstream: int) -> Iterator[Running]:
        program, port = self._program(), free_port()
        assert program is not None
        with tempfile.TemporaryDirectory(prefix="benchmark-nginx-") as folder:
            os.chmod(folder, 0o755)  # its worker is another user where we are root
            config = Path(folder, "nginx.conf")
            config.write_text(NGINX.format(upstream=upstream, port=port))
            with child([program, "-p", folder, "-c", str(config), "-e", "stderr"]) as process:
                wait_for_answer(port, None, process.poll)
                yield Running(port, processes={"self": [process.pid]})

    @staticmethod
    def _program() -> str | None:
        return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


@dataclass(slots=True)
class Gateway:
    """This gateway: keys, prices, limits, access log, and every turn durable before its reply ends."""

    name: str
    title: str
    engine: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    under: Sequence[str] = ()
    """A program that runs it."""

    @property
    def version(self) -> str | None:
        return machine.commit()

    def missing(self) -> str | None:
        return None

    def install_mb(self) -> float | None:
        return installs.megabytes(installs.this_gateway())

    @contextlib.contextmanager
    def running(self, upstream: int) -> Iterator[Running]:
        with contextlib.ExitStack() as stack:
            config, processes = self._config(upstream), dict[str, Sequence[int]]()
            if self.engine == "postgres":
                postgres = stack.enter_context(contextlib.closing(OwnPostgres(durable=True)))
                config["database"] = {"url": postgres.create_database()}
                processes["postgres"] = [
                    int((postgres.socket_folder / "data" / "postmaster.pid").read_text().split()[0])
                ]
            gateway = GatewayProcess(config, under=self.under)
            stack.callback(gateway.close)
            _, key = gateway.create_key(user="benchmark")

            def start() -> float:
                with contextlib.suppress(RuntimeError):  # it was not started yet
                    gateway.terminate()
                    gateway.wait()
                began = time.perf_counter()
                gateway.launch()
                wait_for_answer(gateway.port, key, gateway.process.poll)
                processes["self"] = [gateway.pid]
                return time.perf_counter() - began

            start()
            yield Running(gateway.port, key, processes, start)

    def _config(self, upstream: int) -> dict[str, Any]:
        """The limits are there to be counted against, not to be met."""
        price = {"input": 2.50, "cached_input": 1.25, "output": 10.00}
        backend = {"type": "openai", "base_url": f"http://127.0.0.1:{upstream}/v1", "api_key": "any"}
        return {
            "server": {"drain_seconds": 1, "workers": self.workers},
            "auth": {"mode": "keys"},
            "backends": {"upstream": backend},
            "models": {name: {"backend": "upstream", "price": price} for name in (samples.MODEL, samples.SLOW_MODEL)},
            "limits": {"requests_per_minute": 100_000_000, "tokens_per_minute": 1_000_000_000_000},
            **self.settings,
        }


def contestants() -> list[Contestant]:
    """In the order of the table. The first one is what the others are compared with."""
    return [
        Direct(),
        Nginx(),
        Gateway("postgres", "gateway, PostgreSQL", "postgres"),
        Gateway("sqlite", "gateway, SQLite", "sqlite"),
        Gateway(
            "usage-only",
            "gateway, PostgreSQL, usage rows only (threading: off)",
            "postgres",
            {"conversations": {"threading": "off"}},
        ),
        *(limited for engine in ("postgres", "sqlite") for limited in _limited(engine)),
        Gateway("two-workers", "gateway, PostgreSQL, 2 workers", "postgres", workers=2),
    ]


def _limited(engine: str) -> list[Gateway]:
    """Without limits, and with all of them: what `Gateway` has by itself lies between."""
    name = {"postgres": "PostgreSQL", "sqlite": "SQLite"}[engine]
    none = {"limits": {"requests_per_minute": None}}
    budget = {"usd": 1_000_000_000, "period": "month"}
    budgets = {"budgets": {"key": budget, "gateway": budget}}
    return [
        Gateway(f"{engine}-unlimited", f"gateway, {name}, no limits", engine, none),
        Gateway(f"{engine}-budget", f"gateway, {name}, budgets too", engine, budgets),
    ]


def wait_for_answer(
    port: int, key: str | None, ended: Callable[[], int | None], headers: Mapping[str, str] | None = None
) -> None:
    """Returns with the first whole answer to a chat call. Raises RuntimeError if the program ends instead."""
    deadline = time.monotonic() + START_SECONDS
    while not _answers(port, key, headers):
        if ended() is not None or time.monotonic() > deadline:
            raise RuntimeError("a contestant ended, or gave no answer in time")
        time.sleep(0.01)


def _answers(port: int, key: str | None, headers: Mapping[str, str] | None) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    head, _, body = samples.request(port, key, headers=headers).partition(b"\r\n\r\n")
    sent = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    try:
        connection.request("POST", "/v1/chat/completions", body, sent)
        answer = connection.getresponse()
        return answer.status == 200 and bool(answer.read())
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

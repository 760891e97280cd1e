"""Other gateways, each as a plain relay of OpenAI's chat to the mock upstream: no database, no cache, no keys of its
own, one process, as little logging as it offers. `docs/performance.md` says why each option is set.

Versions are pinned here and nowhere else. A peer is installed when it is asked for (`make bench-peers`).
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import installs, samples
from benchmarks.contestants import Contestant, Running, wait_for_answer
from benchmarks.processes import child
from tests_standalone.support.gateway import clean_environment, free_port
from tests_standalone.support.node import find_node

SGLANG_ROUTER = "0.3.2"
LITELLM = "1.106.2"
PORTKEY = "1.15.2"
PORTKEY_SERVER = "1.14.1"
"""Of `@hono/node-server`. With a newer one, which npm takes by itself, every stream is a 500: its issue 1389."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer runs: what is installed, a folder for its files, its port, and that of the upstream."""

    installed: Path
    folder: Path
    port: int
    upstream: int

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.upstream}/v1"


@dataclass(frozen=True, slots=True)
class Peer:
    """A gateway of others. `prepare` writes what it reads, `headers` are those that its clients send."""

    name: str
    title: str
    version: str
    install: Callable[[], Path]
    command: Callable[[Place], Sequence[str]]
    prepare: Callable[[Place], None] = lambda place: None
    headers: Callable[[Place], Mapping[str, str]] = lambda place: {}
    environment: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> str | None:
        try:
            self.install()
        except installs.NotInstalled as failure:
            return str(failure)
        return None

    def install_mb(self) -> float:
        return installs.megabytes(self.install())

    @contextlib.contextmanager
    def running(self, upstream: int) -> Iterator[Running]:
        with tempfile.TemporaryDirectory(prefix=f"benchmark-{self.name}-") as folder, contextlib.ExitStack() as life:
            place = Place(self.install(), Path(folder), free_port(), upstream)
            headers, processes = self.headers(place), dict[str, Sequence[int]]()
            self.prepare(place)

            def start() -> float:
                life.close()
                began = time.perf_counter()
                processes["self"] = [life.enter_context(self._answering(place, headers))]
                return time.perf_counter() - began

            start()
            yield Running(place.port, processes=processes, start=start, headers=headers)

    @contextlib.contextmanager
    def _answering(self, place: Place, headers: Mapping[str, str]) -> Iterator[int]:
        log = place.folder / "log"
        environment = clean_environment(place.folder) | dict(self.environment)
        del environment["PYTHONPATH"]  # of this checkout
        with child(self.command(place), folder=place.folder, environment=environment, log=log) as process:
            try:
                wait_for_answer(place.port, None, process.poll, headers)
            except RuntimeError:
                print(log.read_text(errors="replace")[-3000:], file=sys.stderr, flush=True)
                raise
            yield process.pid


def peers() -> list[Contestant]:
    return [
        Peer(
            "sglang-router",
            "sglang-router (Rust)",
            SGLANG_ROUTER,
            lambda: installs.python_packages("sglang-router", f"sglang-router=={SGLANG_ROUTER}"),
            _sglang_router,
        ),
        Peer(
            "portkey",
            "Portkey (Node)",
            PORTKEY,
            lambda: installs.node_packages(
                "portkey", {"@portkey-ai/gateway": PORTKEY}, {"@hono/node-server": PORTKEY_SERVER}
            ),
            _portkey,
            headers=_portkey_headers,
            environment={"NODE_ENV": "production"},
        ),
        Peer(
            "litellm",
            "LiteLLM proxy (Python)",
            LITELLM,
            lambda: installs.python_packages("litellm", f"litellm[proxy]=={LITELLM}"),
            _litellm,
            _litellm_config,
            environment={"LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        ),
    ]


def _sglang_router(place: Place) -> list[str]:
    return [
        *(str(place.installed / "bin" / "python"), "-m", "sglang_router.launch_router"),
        *("--host", "127.0.0.1", "--port", str(place.port)),
        *("--worker-urls", f"http://127.0.0.1:{place.upstream}", "--worker-startup-check-interval", "1"),
        *("--policy", "round_robin", "--disable-retries", "--disable-circuit-breaker", "--log-level", "error"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
    ]


def _portkey(place: Place) -> list[str]:
    program = place.installed / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    return [str(find_node().binary), str(program), "--headless", f"--port={place.port}"]


def _portkey_headers(place: Place) -> dict[str, str]:
    return {"Authorization": "Bearer any", "x-portkey-provider": "openai", "x-portkey-custom-host": place.base_url}


def _litellm(place: Place) -> list[str]:
    return [
        *(str(place.installed / "bin" / "litellm"), "--config", "config.yaml"),
        *("--host", "127.0.0.1", "--port", str(place.port), "--num_workers", "1", "--telemetry", "False"),
    ]


def _litellm_config(place: Place) -> None:
    """YAML, in the form of JSON."""
    models = [
        {
            "model_name": name,
            "litellm_params": {"model": f"openai/{name}", "api_base": place.base_url, "api_key": "any"},
        }
        for name in (samples.MODEL, samples.SLOW_MODEL)
    ]
    config = {
        "model_list": models,
        "litellm_settings": {"num_retries": 0},
        "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},  # it would not start without a key
    }
    (place.folder / "config.yaml").write_text(json.dumps(config))

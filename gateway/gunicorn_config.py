"""gunicorn's configuration, made from the gateway's. A gunicorn.conf.py takes it over and adds what it likes:

    from gateway.gunicorn_config import configuration
    globals().update(configuration())

The master reads the settings, when it starts and on SIGHUP; workers get them from it. So all workers run with the same
settings, and a mistake in the file is found before a worker is replaced: gunicorn itself would end, and with it every
worker. On SIGHUP a configuration with mistakes is refused, with a line for each, and the old one stays in force.

What is given to gunicorn itself (`--bind`, `--workers`, `--graceful-timeout`...) is stronger than what stands here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from gunicorn.arbiter import Arbiter
from gunicorn.config import Config
from gunicorn.glogging import Logger

from gateway import logs, metrics
from gateway.cli import serve
from gateway.compose import with_local_ollama
from gateway.config import Settings, load_settings
from gateway.errors import ConfigError, GatewayError
from gateway.gunicorn_worker import END_SECONDS, GatewayWorker
from gateway.serving import BACKLOG, KEEP_ALIVE_SECONDS, set_inherited_options

__all__ = ["configuration"]

logger = logging.getLogger("gateway")


class Log(Logger):
    """gunicorn's own lines go where the gateway's go, in the same form, unless it was given a file for them."""

    def setup(self, cfg: Config) -> None:
        super().setup(cfg)
        if cfg.errorlog == "-":
            self.error_log.handlers.clear()
            self.error_log.propagate = True


class _Master:
    """What must outlive the configuration file, which gunicorn runs anew on SIGHUP."""

    settings: Settings | None = None


def configuration() -> dict[str, Any]:
    """Settings of gunicorn's by name. Ends the process if the gateway's have mistakes, unless it is serving already."""
    settings = _read()
    _Master.settings = settings
    GatewayWorker.make_app = partial(serve.worker, settings)
    logs.configure(settings.server.log_format, settings.server.log_level)
    host = settings.server.host.strip("[]")
    return {
        "worker_class": GatewayWorker,
        "bind": f"[{host}]:{settings.server.port}" if ":" in host else f"{host}:{settings.server.port}",
        "workers": settings.server.workers,
        "backlog": BACKLOG,
        "keepalive": KEEP_ALIVE_SECONDS,
        "timeout": 30,  # of a loop that is stuck; a stream may last as long as it does
        "graceful_timeout": math.ceil(settings.server.drain_seconds) + END_SECONDS,
        "preload_app": False,
        "proc_name": settings.server.name,
        "accesslog": None,  # the gateway writes its own
        "logger_class": Log,
        "loglevel": settings.server.log_level,
        "forwarded_allow_ips": "",  # server.trusted_proxies decides
        "control_socket_disable": True,
        "on_starting": on_starting,
        "when_ready": when_ready,
    }


def _read() -> Settings:
    try:
        return with_local_ollama(load_settings(overrides=_workers(os.environ)))
    except ConfigError as failure:
        if _Master.settings is None:
            _say(failure.problems)
            sys.exit(1)
        for problem in failure.problems:
            logger.error("The new configuration is refused, and the old one stays: %s", problem)
        return _Master.settings


def _workers(environ: Mapping[str, str]) -> dict[str, str]:
    """WEB_CONCURRENCY, as hosting services set it, beats the file; the gateway's own names beat both."""
    told = environ.get("WEB_CONCURRENCY")
    ours = environ.get("GATEWAY_WORKERS") or environ.get("GATEWAY__SERVER__WORKERS")
    return {"server.workers": told} if told and not ours else {}


# What gunicorn calls, in the master


def on_starting(arbiter: Arbiter) -> None:
    try:
        metrics.prepare(max(2, arbiter.cfg.workers))  # while a worker is replaced there are two
    except ConfigError as failure:
        _say_and_end(failure.problems, arbiter)


def when_ready(arbiter: Arbiter) -> None:
    """Migrates, makes the first admin key where strangers could call, and prints what `gateway serve` prints."""
    settings = _in_effect(arbiter)
    for listener in arbiter.LISTENERS:
        if isinstance(listener.getsockname(), tuple):
            set_inherited_options(listener.sock)
    try:
        about_keys = asyncio.run(serve.prepare(settings))
    except ConfigError as failure:
        _say_and_end(failure.problems, arbiter)
    except GatewayError as failure:
        _say_and_end([failure.log or failure.message], arbiter)
    else:
        serve.print_banner(settings, about_keys, settings.server.port)


def _say_and_end(problems: Iterable[str], arbiter: Arbiter) -> None:
    _say(problems)
    arbiter.halt(exit_status=1)


def _say(problems: Iterable[str]) -> None:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)


def _in_effect(arbiter: Arbiter) -> Settings:
    """With the first address and the number of workers that gunicorn has settled on."""
    settings = _Master.settings
    assert settings is not None
    changes: dict[str, Any] = {"workers": arbiter.cfg.workers}
    for listener in arbiter.LISTENERS:
        if isinstance(address := listener.getsockname(), tuple):
            changes |= {"host": address[0], "port": address[1]}
            break
    return settings.model_copy(update={"server": settings.server.model_copy(update=changes)})

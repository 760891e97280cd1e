"""`gateway serve`: one process, or a supervisor with workers."""

from __future__ import annotations

import argparse
import asyncio
import functools
import ipaddress
import logging

from gateway import logs, metrics
from gateway.app import Gateway, create_app
from gateway.auth import ADMIN_USER
from gateway.cli.common import open_database, settings_from
from gateway.cli.keys import make_key
from gateway.compose import fixed_models, with_local_ollama
from gateway.config import Settings, mask_url
from gateway.errors import DatabaseUnavailable
from gateway.serving import listen, serve
from gateway.store import keys

log = logging.getLogger("gateway")

_NOT_READY = "  database    DOES NOT ANSWER: every call is 503 until it does"


def run(options: argparse.Namespace) -> int:
    flags = {"server.host": options.host, "server.port": options.port, "server.workers": options.workers}
    settings = with_local_ollama(settings_from(options, **flags))
    settings = settings.model_copy(update={"alone": settings.server.workers == 1})
    logs.configure(settings.server.log_format, settings.server.log_level)
    sock = listen(settings.server.host, settings.server.port)  # before a key is made that nobody would see
    with sock:
        about_keys = asyncio.run(prepare(settings))
        metrics.prepare(settings.server.workers)
        return serve(
            functools.partial(worker, settings),
            host=settings.server.host,
            port=settings.server.port,
            workers=settings.server.workers,
            drain_seconds=settings.server.drain_seconds,
            on_started=functools.partial(print_banner, settings, about_keys),
            sock=sock,
        )


def worker(settings: Settings) -> Gateway:
    """The application in a process of its own."""
    logs.configure(settings.server.log_format, settings.server.log_level)
    return create_app(settings)


async def prepare(settings: Settings) -> str:
    """Migrates before the workers start, and makes the first admin key where strangers could call; returns what the
    banner says about keys. A database that does not answer is no reason not to start: the workers wait for it."""
    try:
        async with open_database(settings) as database:
            ever_made = (await keys.state(database)).ever_made
            if not _needs_first_key(settings) or ever_made:
                return _about_keys(settings, ever_made=ever_made)
            _, secret = await make_key(database, ADMIN_USER, name="first admin key", is_admin=True)
            return f"  admin key   {secret}\n              Shown this once. Others: gateway keys create --user NAME"
    except DatabaseUnavailable as failure:
        log.error("the database does not answer, starting anyway: %s", failure.cause)
        return _NOT_READY


def _needs_first_key(settings: Settings) -> bool:
    exposed = not _is_loopback(settings.server.host) and settings.auth.mode != "open"
    return exposed and not settings.auth.admin_key.get_secret_value()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def print_banner(settings: Settings, about_keys: str, port: int) -> None:
    host = settings.server.host
    shown = f"[{host}]" if ":" in host else host
    lines = [
        f"{settings.server.name} is {'up, but not ready' if about_keys == _NOT_READY else 'ready'}.",
        f"  base URL    http://{shown}:{port}/v1",
        f"  database    {settings.database.safe_url}",
        f"  attachments {settings.storage.url}",
    ]
    for name, backend in settings.backends.items():
        lines.append(
            f"  backend     {name} ({backend.type}{f', {mask_url(backend.base_url)}' if backend.base_url else ''})"
        )
    names = [*settings.models, *[name for backend in settings.backends.values() for name in fixed_models(backend)]]
    asked = " and those that the backends list (GET /v1/models)" if _lists_more(settings) else ""
    lines.append(f"  models      {', '.join(dict.fromkeys(names))}{asked}".replace("       and", "       "))
    lines += [f"  note        {note}" for note in settings.notes]
    lines.append(about_keys)
    print("\n".join(lines), flush=True)


def _lists_more(settings: Settings) -> bool:
    return any(not fixed_models(backend) for backend in settings.backends.values())


def _about_keys(settings: Settings, *, ever_made: bool) -> str:
    if settings.auth.mode == "open":
        return "  keys        none are asked for (auth.mode: open)"
    keyless = settings.auth.mode == "auto" and not ever_made and not settings.auth.admin_key.get_secret_value()
    if keyless and _is_loopback(settings.server.host):
        return "  keys        none needed on this machine until you make one: gateway keys create --user NAME"
    return "  keys        every call needs one: gateway keys create --user NAME"

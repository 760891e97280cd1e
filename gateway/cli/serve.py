"""`gateway serve`: one process, or a supervisor with workers."""

from __future__ import annotations

import argparse
import asyncio
import functools
import ipaddress
import logging

from gateway import logs
from gateway.app import Gateway, create_app, fixed_models
from gateway.auth import ADMIN_USER
from gateway.cli.common import open_database, settings_from
from gateway.cli.keys import make_key
from gateway.config import Settings, mask_url
from gateway.errors import DatabaseUnavailable
from gateway.serving import serve
from gateway.store import keys

log = logging.getLogger("gateway")


def run(options: argparse.Namespace) -> int:
    flags = {"server.host": options.host, "server.port": options.port, "server.workers": options.workers}
    settings = settings_from(options, **flags)
    logs.configure(settings.server.log_format, settings.server.log_level)
    first_key = asyncio.run(_prepare(settings))
    return serve(
        functools.partial(worker, settings),
        host=settings.server.host,
        port=settings.server.port,
        workers=settings.server.workers,
        drain_seconds=settings.server.drain_seconds,
        on_started=functools.partial(_print_banner, settings, first_key),
    )


def worker(settings: Settings) -> Gateway:
    """The application in a process of its own."""
    logs.configure(settings.server.log_format, settings.server.log_level)
    return create_app(settings)


async def _prepare(settings: Settings) -> str | None:
    """Migrates before the workers start, and makes the first admin key where strangers could call. A database that
    does not answer is no reason not to start: the workers wait for it."""
    try:
        async with open_database(settings) as database:
            if not _needs_first_key(settings) or (await keys.state(database)).ever_made:
                return None
            _, secret = await make_key(database, ADMIN_USER, name="first admin key", is_admin=True)
            return secret
    except DatabaseUnavailable as failure:
        log.error("the database does not answer, starting anyway: %s", failure.cause)
        return None


def _needs_first_key(settings: Settings) -> bool:
    exposed = not _is_loopback(settings.server.host) and settings.auth.mode != "open"
    return exposed and not settings.auth.admin_key.get_secret_value()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _print_banner(settings: Settings, first_key: str | None, port: int) -> None:
    host = settings.server.host
    shown = f"[{host}]" if ":" in host else host
    lines = [
        f"{settings.server.name} is ready.",
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
    lines.append(_about_keys(settings, first_key))
    print("\n".join(lines), flush=True)


def _lists_more(settings: Settings) -> bool:
    return any(not fixed_models(backend) for backend in settings.backends.values())


def _about_keys(settings: Settings, first_key: str | None) -> str:
    if first_key is not None:
        return f"  admin key   {first_key}\n              Shown this once. Others: gateway keys create --user NAME"
    if settings.auth.mode == "open":
        return "  keys        none are asked for (auth.mode: open)"
    if settings.auth.mode == "auto" and _is_loopback(settings.server.host):
        return "  keys        none needed on this machine until you make one: gateway keys create --user NAME"
    return "  keys        every call needs one: gateway keys create --user NAME"

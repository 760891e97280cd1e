"""The command line. What a command needs is imported when it runs, so `--version` and `--help` answer at once.

Exit codes: 0 done, 1 failed (a configuration with mistakes too), 2 wrong use. Every error is one line on stderr that
says what to do.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gateway import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = _parser().parse_args(argv)
    from gateway.errors import ConfigError, DatabaseUnavailable, GatewayError
    from gateway.store.database import RowRejected

    command = importlib.import_module(f"gateway.cli.{options.module}")
    try:
        code: int = command.run(options)
        sys.stdout.flush()
        return code
    except ConfigError as failure:
        for problem in failure.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 1
    except DatabaseUnavailable as failure:
        advice = "Check database.url (DATABASE_URL) and that the database runs."
        print(f"error: the database cannot be used: {failure.cause}. {advice}", file=sys.stderr)
        return 1
    except GatewayError as failure:
        print(f"error: {failure.log or failure.message}", file=sys.stderr)
        return 1
    except RowRejected as failure:
        print(f"error: the database cannot take what was given: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as of `| head`; what is left in the buffer must not fail once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")


def _parser() -> _Parser:
    parser = _Parser(prog="gateway", description="A drop-in OpenAI-compatible gateway that records every token.")
    parser.add_argument("--version", action="version", version=f"gateway {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--config", metavar="FILE", help="configuration file (default: config.yaml, or GATEWAY_CONFIG)")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", parents=[common], help="run the gateway")
    serve.add_argument("--host", help="address to listen on")
    serve.add_argument("--port", type=int, help="port to listen on; 0 picks a free one")
    serve.add_argument("--workers", type=int, help="number of worker processes")
    serve.set_defaults(module="serve")

    migrate = commands.add_parser("migrate", parents=[common], help="bring the database's tables up to date")
    migrate.add_argument("--check", action="store_true", help="only say what waits; exit 1 if anything does")
    migrate.set_defaults(module="migrate")

    check = commands.add_parser("check-config", parents=[common], help="show the effective settings, or every mistake")
    check.set_defaults(module="check_config")

    usage = commands.add_parser("usage", parents=[common], help="tokens and costs as a table")
    usage.add_argument("--user", help="only this user")
    usage.add_argument("--since", metavar="WHEN", help="2026-01-31, 2026-01-31T12:00 (UTC), or 7d, 12h, 30m ago")
    usage.add_argument(
        "--by", choices=["model", "user", "key", "day"], default="model", help="one row for each of these"
    )
    usage.set_defaults(module="usage")

    _add_keys(commands, common)
    _add_users(commands, common)
    return parser


def _add_keys(commands: argparse._SubParsersAction[_Parser], common: _Parser) -> None:
    keys = commands.add_parser("keys", help="make, change, list and revoke API keys")
    actions = keys.add_subparsers(title="actions", metavar="ACTION", required=True)
    create = actions.add_parser("create", parents=[common], help="make a key; it is shown once")
    create.add_argument("--user", required=True, help="whose conversations and costs these are")
    _add_fields(create, int)
    create.add_argument("--admin", action="store_true", default=argparse.SUPPRESS, help="may use /admin")
    create.set_defaults(module="keys", action="create")
    update = actions.add_parser("update", parents=[common], help="change a key; `none` lifts a limit")
    update.add_argument("id", metavar="ID", help="as `keys list` shows it")
    update.add_argument("--user", default=argparse.SUPPRESS, help="whose conversations and costs these are")
    _add_fields(update, number_or_none)
    update.add_argument(
        "--admin", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help="may it use /admin?"
    )
    update.set_defaults(module="keys", action="update")
    rotate = actions.add_parser("rotate", parents=[common], help="give a key a new secret; it is shown once")
    rotate.add_argument("id", metavar="ID", help="as `keys list` shows it")
    rotate.add_argument("--overlap", metavar="TIME", help="how long the old secret stays good, such as 1h (default: 0)")
    rotate.set_defaults(module="keys", action="rotate")
    listing = actions.add_parser("list", parents=[common], help="all keys, without their secrets")
    listing.set_defaults(module="keys", action="list")
    revoke = actions.add_parser("revoke", parents=[common], help="end a key")
    revoke.add_argument("id", metavar="ID", help="as `keys list` shows it")
    revoke.set_defaults(module="keys", action="revoke")


def _add_users(commands: argparse._SubParsersAction[_Parser], common: _Parser) -> None:
    users = commands.add_parser("users", help="list users, or delete one with all that is theirs")
    actions = users.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", parents=[common], help="who has a key or has made a call")
    listing.set_defaults(module="users", action="list")
    delete = actions.add_parser("delete", parents=[common], help="keys and content go; costs stay without the name")
    delete.add_argument("user", metavar="USER", help="as `users list` shows it")
    delete.add_argument("--yes", action="store_true", help="it is meant; nothing can be brought back")
    delete.set_defaults(module="users", action="delete")


def _add_fields(command: _Parser, count: Callable[[str], int | str]) -> None:
    """What a key can have. A flag that is not given is not among the options."""

    def add(flag: str, field: str, **more: Any) -> None:
        command.add_argument(flag, dest=field, default=argparse.SUPPRESS, **more)

    yes_or_no = argparse.BooleanOptionalAction
    add("--name", "name", help="what the key is for")
    add("--rpm", "requests_per_minute", type=count, metavar="N", help="requests per minute")
    add("--burst", "request_burst", type=count, metavar="N", help="requests at once (default: those of a minute)")
    add("--tpm", "tokens_per_minute", type=count, metavar="N", help="tokens per minute")
    add("--token-burst", "token_burst", type=count, metavar="N", help="tokens at once (default: those of a minute)")
    add("--max-parallel", "max_parallel", type=count, metavar="N", help="calls at the same time")
    add("--budget", "budget_usd", metavar="USD", help="money it may spend in each --period")
    add("--period", "budget_period", choices=["day", "month", "total"], help="what the budget is for (default: total)")
    add("--models", "models", metavar="A,B", help="the only models it may use")
    add("--per-end-user", "per_end_user", action=yes_or_no, help="its rates hold for each end user")
    add("--label", "labels", action="append", metavar="NAME=TEXT", help="may be given several times")
    add("--expires", "expires_at", metavar="WHEN", help="2026-12-31, 2026-12-31T12:00 (UTC), or 30d, 12h from now")


def number_or_none(text: str) -> int | str:
    return text if text == "none" else int(text)

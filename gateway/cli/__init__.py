"""The command line. What a command needs is imported when it runs, so `--version` and `--help` answer at once.

Exit codes: 0 done, 1 failed (a configuration with mistakes too), 2 wrong use. Every error is one line on stderr that
says what to do.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

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
    return parser


def _add_keys(commands: argparse._SubParsersAction[_Parser], common: _Parser) -> None:
    keys = commands.add_parser("keys", help="make, list and revoke API keys")
    actions = keys.add_subparsers(title="actions", metavar="ACTION", required=True)
    create = actions.add_parser("create", parents=[common], help="make a key; it is shown once")
    create.add_argument("--user", required=True, help="whose conversations and costs these are")
    create.add_argument("--name", help="what the key is for")
    create.add_argument("--rpm", type=int, metavar="N", help="requests per minute")
    create.add_argument("--tpm", type=int, metavar="N", help="tokens per minute")
    create.add_argument("--max-parallel", type=int, metavar="N", help="calls at the same time")
    create.add_argument("--budget", metavar="USD", help="money it may spend in each --period")
    create.add_argument("--period", choices=["day", "month", "total"], help="what the budget is for (default: total)")
    create.add_argument("--models", metavar="A,B", help="the only models it may use")
    create.add_argument("--expires", metavar="WHEN", help="2026-12-31, 2026-12-31T12:00 (UTC), or 30d, 12h from now")
    create.add_argument("--admin", action="store_true", help="may use /admin")
    create.set_defaults(module="keys", action="create")
    listing = actions.add_parser("list", parents=[common], help="all keys, without their secrets")
    listing.set_defaults(module="keys", action="list")
    revoke = actions.add_parser("revoke", parents=[common], help="end a key")
    revoke.add_argument("id", metavar="ID", help="as `keys list` shows it")
    revoke.set_defaults(module="keys", action="revoke")

"""The command line: arguments in; an exit code, lines on stdout and lines on stderr out."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gateway import __version__
from gateway.auth import digest
from gateway.cli import main
from gateway.cli import serve as serving
from gateway.cli.common import shown_time, table
from gateway.store import keys, usage
from gateway.store.usage import UsageRow
from tests_standalone.conftest import NOON, opened, stored_key, usage_row

DAY = 86_400_000
SECRETS = {
    "GATEWAY_ADMIN_KEY": "canary-admin",
    "UPSTREAM_KEY": "canary-upstream",
    "S3_SECRET": "canary-s3",
    "DB_PASSWORD": "canary-db",
}
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error."""
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        return self.err.removeprefix("error: ").removesuffix("\n")


Run = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration file, and none of the developer's settings."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if re.match(r"GATEWAY_|OPENAI_|DEEPSEEK_|DATABASE_|S3_|APP_", name):
            monkeypatch.delenv(name)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def one(*arguments: str) -> Ended:
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse's way
            code = int(end.code or 0)
        said = capsys.readouterr()
        return Ended(code, said.out, said.err)

    return one


def query(sql: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect("data/gateway.db") as connection:
        found = connection.execute(sql).fetchall()
    connection.close()
    return found


def add_usage(*found: UsageRow) -> None:
    async def write() -> None:
        async with opened("sqlite:///data/gateway.db") as database:
            await database.write([usage.insert(found)])

    asyncio.run(write())


# Answers at once


HEAVY = ("starlette", "tiktoken", "asyncpg", "pydantic", "uvicorn", "orjson", "yaml", "asyncio", "gateway.config")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["keys", "create", "--help"]])
def test_version_and_help_import_nothing_that_takes_time(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "gateway", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "gateway.cli" in imported
    assert [name for name in HEAVY if name in imported] == []
    assert ended.stdout.startswith(f"gateway {__version__}" if arguments == ["--version"] else "usage: gateway")


@pytest.mark.parametrize(
    "command",
    [
        "serve", "migrate", "check-config", "usage", "keys create", "keys update", "keys rotate", "keys list",
        "keys revoke",
        "users list",
        "users delete",
    ],
)  # fmt: skip
def test_every_command_explains_itself_and_takes_a_configuration(run: Run, command: str) -> None:
    ended = run(*command.split(), "--help")
    assert ended.code == 0
    assert "--config FILE" in ended.out


# Wrong use


@pytest.mark.parametrize(
    "command",
    [
        "", "nothing", "keys", "keys create", "keys revoke", "keys nothing", "--unknown", "serve --port x",
        "serve --workers 1.5", "usage --by planet", "keys create --user u --rpm many",
        "keys create --user u --period year", "keys list extra", "migrate --check now", "check-config --config",
        "usage --since", "keys update", "keys rotate", "keys update key_1 --rpm many",
        "keys create --user u --rpm none", "keys update key_1 --period none", "keys list --sort digest",
    ],
)  # fmt: skip
def test_wrong_use_is_exit_code_2_and_one_line(run: Run, command: str) -> None:
    ended = run(*command.split())
    assert ended.code == 2
    assert "--help" in ended.error


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("keys create --user u --rpm 0", "--rpm: must be 1 to"),
        ("keys create --user u --tpm -5", "--tpm: must be 1 to"),
        ("keys create --user u --max-parallel 0", "--max-parallel: must be 1 to"),
        ("keys create --user u --rpm 99999999999999999999", "--rpm: "),
        ("keys create --user u --period day", "--period: goes with a budget"),
        ("keys create --user u --budget 0", "--budget: must be an amount"),
        ("keys create --user u --budget -1", "--budget: must be an amount"),
        ("keys create --user u --budget much", "--budget: must be an amount"),
        ("keys create --user u --budget NaN", "--budget: must be an amount"),
        ("keys create --user u --budget Infinity", "--budget: must be an amount"),
        ("keys create --user u --budget 1e400", "--budget: must be an amount"),
        ("keys create --user u --budget 0.0000000001", "nine decimals"),
        ("keys create --user u --models ,", "--models: must be a list that names at least one"),
        ("keys create --user u --expires soon", "--expires: 'soon' is no time"),
        ("keys create --user u --expires 2020-01-01", "--expires: lies in the past"),
        ("keys create --user u --expires 5y", "--expires: '5y' is no time"),
        ("usage --since yesterday", "--since: 'yesterday' is no time"),
        ("keys create --user u --label team", "--label: write NAME=TEXT"),
        ("keys create --user u --label =blue", "--label: must be 1 to 256"),
        ("keys create --user u --burst 0", "--burst: must be 1 to"),
        ("keys create --user u --token-burst 0", "--token-burst: must be 1 to"),
        ("keys revoke key_unknown", "gateway keys list"),
        ("keys update key_unknown --rpm 1", "gateway keys list"),
        ("keys update key_unknown", "nothing to change"),
        ("keys update key_unknown --tpm 0", "--tpm: must be 1 to"),
        ("keys rotate key_unknown", "gateway keys list"),
        ("keys rotate key_unknown --overlap soon", "--overlap: 'soon' is no time"),
        ("keys rotate key_unknown --overlap 31d", "--overlap: must be"),
        ("keys rotate key_unknown --overlap 2020-01-01", "--overlap: must be"),
        ("keys list --config missing.yaml", "missing.yaml"),
        ("serve --port 70000", "server.port"),
        ("serve --workers 0", "server.workers"),
    ],
)
def test_what_cannot_be_done_is_exit_code_1_and_one_line(run: Run, command: str, words: str) -> None:
    ended = run(*command.split())
    assert ended.code == 1
    assert words in ended.error


@pytest.mark.parametrize("user", ["", "  ", "x" * 257, "a\nb", "a\x1b[31m", "a\u202eb", "\udcff"])
@pytest.mark.parametrize("flag", ["--user", "--name"])
def test_names_that_would_break_a_list(run: Run, flag: str, user: str) -> None:
    names = {"--user": "u", "--name": "n", flag: user}
    ended = run("keys", "create", *[word for pair in names.items() for word in pair])
    assert ended.code == 1
    assert ended.error.startswith(f"{flag}: ")


def test_an_id_that_would_break_a_line(run: Run) -> None:
    for command in (["revoke"], ["rotate"], ["update", "--rpm", "1"]):
        assert run("keys", *command, "key\n\x1b[31m").error.isprintable()


def test_a_user_is_deleted_only_if_it_is_meant(run: Run, tmp_path: Path) -> None:
    run("keys", "create", "--user", "ann", "--name", "laptop")
    run("keys", "create", "--user", "bob")
    refused = run("users", "delete", "ann")
    assert refused.code == 1
    assert "say --yes" in refused.error
    assert [line.split()[:2] for line in run("users", "list").out.splitlines()[1:]] == [["ann", "1"], ["bob", "1"]]
    done = run("users", "delete", "ann", "--yes")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"ann is deleted; what it cost is listed under deleted-[0-9a-f]{12}\n", done.out)
    assert [line.split()[0] for line in run("users", "list").out.splitlines()[1:]] == ["bob"]
    assert "`gateway users list` shows them" in run("users", "delete", "nobody", "--yes").error


@pytest.mark.parametrize(
    "command", [["users", "delete", "\udcff", "--yes"], ["keys", "revoke", "\udcff"], ["usage", "--user", "\udcff"]]
)
def test_arguments_that_are_no_text(run: Run, command: list[str]) -> None:
    ended = run(*command)
    assert ended.code == 1
    assert ended.error.isprintable()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite:///afile/gateway.db", "afile"),
        ("sqlite:///garbage.db", "garbage.db"),
        ("postgresql://ann:canary-db@127.0.0.1:1/nothing", ""),
    ],
)
@pytest.mark.parametrize("command", ["keys list", "keys create --user u", "usage", "migrate", "migrate --check"])
def test_a_database_that_cannot_be_used(run: Run, url: str, words: str, command: str) -> None:
    Path("afile").touch()
    Path("garbage.db").write_bytes(b"this is no database " * 500)
    Path("config.yaml").write_text(f"database: {{url: '{url}'}}\n")
    ended = run(*command.split())
    assert ended.code == 1
    assert words in ended.error
    assert "canary" not in ended.err


@pytest.mark.parametrize("command", ["keys list", "usage", "migrate", "migrate --check"])
def test_a_database_of_a_newer_gateway(run: Run, command: str) -> None:
    assert run("migrate").code == 0
    with sqlite3.connect("data/gateway.db") as connection:
        connection.execute("INSERT INTO schema_migrations VALUES (99, '0099_future', 'x', 1)")
    connection.close()
    ended = run(*command.split())
    assert ended.code == 1
    assert "newer" in ended.error


# Keys


def test_a_key_is_shown_once_on_stdout_and_stored_as_its_digest(run: Run) -> None:
    ended = run("keys", "create", "--user", "ann")
    assert ended.code == 0
    key = ended.out.strip()
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43,}", key)
    assert re.findall(r"\bsk-", ended.out + ended.err) == ["sk-"]
    ((key_id, stored, hint, user),) = query("SELECT id, digest, hint, user_id FROM api_keys")
    assert (stored, hint, user) == (digest(key), key[-4:], "ann")
    assert key_id in ended.err
    for file in Path("data").iterdir():
        assert key.encode() not in file.read_bytes()


def test_all_that_a_key_can_have(run: Run) -> None:
    flags = (
        "--name laptop --rpm 10 --burst 20 --tpm 2000 --token-burst 4000 --max-parallel 3 --budget 12.50 "
        "--period month --models a,b/c:d, --admin --per-end-user --label team=blue --label use=a=b"
    )
    before = int(time.time() * 1000)
    assert run("keys", "create", "--user", "ann", *flags.split(), "--expires", "30d").code == 0
    ((*values, created, expires, revoked),) = query(
        "SELECT name, is_admin, models, requests_per_minute, tokens_per_minute, max_parallel, budget_nanousd, "
        "budget_period, request_burst, token_burst, per_end_user, labels, created_by, created_at, "
        "expires_at, revoked_at FROM api_keys"
    )
    assert values == [
        "laptop", 1, '["a","b/c:d"]', 10, 2000, 3, 12_500_000_000, "month", 20, 4000, 1,
        '{"team":"blue","use":"a=b"}', None,
    ]  # fmt: skip
    assert before <= created <= time.time() * 1000
    assert before <= expires - 30 * DAY <= time.time() * 1000
    assert revoked is None
    listed = run("keys", "list").out
    rights = (
        "admin; models a,b/c:d; 10 requests/min; 20 requests at once; 2000 tokens/min; 4000 tokens at once; "
        "3 parallel; 12.500000000 USD/month; for each end user; team=blue; use=a=b"
    )
    assert rights in listed


@pytest.mark.parametrize(
    ("expires", "at"), [("2099-01-31", 4_073_500_800_000), ("2099-01-31T12:00", 4_073_544_000_000),
                        ("2099-01-31T12:00+02:00", 4_073_536_800_000)],
)  # fmt: skip
def test_when_a_key_expires(run: Run, expires: str, at: int) -> None:
    run("keys", "create", "--user", "ann", "--expires", expires)
    assert query("SELECT expires_at FROM api_keys") == [(at,)]


def test_a_budget_without_a_period_is_for_ever(run: Run) -> None:
    run("keys", "create", "--user", "ann", "--budget", "0.000000001")
    assert query("SELECT budget_nanousd, budget_period FROM api_keys") == [(1, "total")]


def test_keys_are_listed_without_their_secrets(run: Run) -> None:
    secrets = [run("keys", "create", "--user", user).out.strip() for user in ("ann", "bob")]
    ended = run("keys", "list")
    assert ended.code == 0
    head, *lines = ended.out.splitlines()
    assert head.split() == ["id", "key", "user", "name", "state", "rights", "and", "limits"]
    assert [line.split()[1:4] for line in lines] == [
        [f"...{secrets[0][-4:]}", "ann", "active"],
        [f"...{secrets[1][-4:]}", "bob", "active"],
    ]
    assert "sk-" not in ended.out
    assert all(secret[:-4] not in ended.out for secret in secrets)


def test_a_key_is_revoked_by_its_id(run: Run) -> None:
    run("keys", "create", "--user", "ann")
    ((key_id,),) = query("SELECT id FROM api_keys")
    assert run("keys", "revoke", key_id) == Ended(0, f"{key_id} is revoked\n", "")
    ((revoked, revision),) = query("SELECT revoked_at, revision FROM api_keys, gateway_state")
    assert revision == 2
    assert f"revoked {shown_time(revoked)}" in run("keys", "list").out
    assert run("keys", "revoke", key_id).code == 0
    assert query("SELECT revoked_at FROM api_keys") == [(revoked,)]


def only_key() -> str:
    ((key_id,),) = query("SELECT id FROM api_keys")
    return str(key_id)


def test_a_key_is_changed_flag_by_flag_and_none_lifts(run: Run) -> None:
    run("keys", "create", "--user", "ann", "--rpm", "5", "--budget", "3", "--period", "day", "--models", "a")
    key_id = only_key()
    given = ["--rpm", "7", "--burst", "9", "--name", "laptop", "--label", "a=b", "--admin", "--per-end-user"]
    ended = run("keys", "update", key_id, *given)
    rights = "admin; models a; 7 requests/min; 9 requests at once; 3.000000000 USD/day; for each end user; a=b"
    assert ended == Ended(0, f"{key_id} is changed: {rights}\n", "")
    assert rights in run("keys", "list").out

    run("keys", "update", key_id, "--budget", "4")
    assert query("SELECT budget_nanousd, budget_period FROM api_keys") == [(4_000_000_000, "day")]
    flags = "--rpm none --burst none --name none --label none --models none --budget none --expires none --no-admin"
    ended = run("keys", "update", key_id, *flags.split(), "--no-per-end-user", "--user", "none")
    assert ended.out == f"{key_id} is changed: no limits of its own\n"
    columns = "name, models, requests_per_minute, request_burst, budget_nanousd, budget_period, expires_at, labels"
    assert query(f"SELECT {columns} FROM api_keys") == [(None,) * 8]
    assert query("SELECT is_admin, per_end_user, user_id, revision FROM api_keys, gateway_state") == [(0, 0, "none", 4)]


def test_a_period_needs_a_budget_that_is_there(run: Run) -> None:
    run("keys", "create", "--user", "ann")
    assert "--period: goes with a budget" in run("keys", "update", only_key(), "--period", "day").error
    run("keys", "update", only_key(), "--budget", "1")
    assert run("keys", "update", only_key(), "--period", "day").code == 0
    assert query("SELECT budget_period FROM api_keys") == [("day",)]


def test_a_rotated_key_has_a_new_secret_alone_on_stdout(run: Run) -> None:
    old = run("keys", "create", "--user", "ann", "--rpm", "5").out.strip()
    key_id = only_key()
    before = int(time.time() * 1000)
    ended = run("keys", "rotate", key_id, "--overlap", "1h")
    new = ended.out.strip()
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43,}", new)
    assert new != old
    assert re.findall(r"\bsk-", ended.out + ended.err) == ["sk-"]
    ((stored, hint, previous, until, rpm),) = query(
        "SELECT digest, hint, previous_digest, previous_until, requests_per_minute FROM api_keys"
    )
    assert (stored, hint, previous, rpm) == (digest(new), new[-4:], digest(old), 5)
    assert before <= until - 3_600_000 <= time.time() * 1000
    assert f"good until {shown_time(until)}" in ended.err

    ended = run("keys", "rotate", key_id)
    assert "is void" in ended.err
    assert query("SELECT digest, previous_digest, previous_until FROM api_keys") == [
        (digest(ended.out.strip()), None, None)
    ]


def test_a_revoked_key_stays_as_it_is(run: Run) -> None:
    run("keys", "create", "--user", "ann")
    run("keys", "revoke", only_key())
    for command in (["rotate", only_key()], ["update", only_key(), "--rpm", "1"]):
        assert "revoked for good" in run("keys", *command).error
    assert query("SELECT revision FROM gateway_state") == [(2,)]


def test_an_expired_key_is_listed_as_such(run: Run) -> None:
    async def add() -> None:
        async with opened("sqlite:///data/gateway.db") as database:
            for key in (stored_key(id="over", expires_at=1), stored_key(id="later", expires_at=4_073_500_800_000)):
                await keys.add(database, key)

    asyncio.run(add())
    shown = run("keys", "list").out
    assert "expired 1970-01-01 00:00" in shown
    assert "until 2099-01-31 00:00" in shown


def test_no_keys_is_an_empty_table(run: Run) -> None:
    assert run("keys", "list").out.count("\n") == 1


# Usage


def test_no_usage(run: Run) -> None:
    ended = run("usage")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == (
        "model  calls  input tokens  output tokens     cost USD  unpriced calls\n"
        "total      0             0              0  0.000000000\n"
    )


def test_usage_is_a_table_with_exact_dollars(run: Run) -> None:
    big = usage_row(model="big", input_tokens=1_000_000, output_tokens=5, cost_nanousd=12_345_678_901)
    add_usage(big, usage_row(model="small"), usage_row(model="small", cost_nanousd=None, price_unknown=1))
    assert run("usage").out == (
        "model  calls  input tokens  output tokens      cost USD  unpriced calls\n"
        "big        1       1000000              5  12.345678901\n"
        "small      2            20             10   0.000001000               1\n"
        "total      3       1000020             15  12.345679901\n"
    )


@pytest.mark.parametrize(
    ("arguments", "first_column"),
    [
        (["--by", "user"], ["user", "bob", "ann", "total"]),
        (["--by", "key"], ["key", "(no", "key_1", "total"]),
        (["--by", "day"], ["day", "2027-01-15", "2027-01-16", "total"]),
        (["--user", "ann"], ["model", "m", "total"]),
        (["--user", "nobody"], ["model", "total"]),
        (["--since", "2027-01-16", "--by", "day"], ["day", "2027-01-16", "total"]),
        (["--since", "2027-01-16T08:00", "--by", "day"], ["day", "2027-01-16", "total"]),
        (["--since", "2027-01-16T08:01", "--by", "day"], ["day", "total"]),
        (["--since", "1d", "--user", "late"], ["model", "late", "total"]),
    ],
)
def test_usage_by_and_since(run: Run, arguments: list[str], first_column: list[str]) -> None:
    add_usage(
        usage_row(user_id="ann"),
        usage_row(user_id="bob", cost_nanousd=5000),
        usage_row(user_id="ann", key_id="key_1", created_at=NOON + DAY),
        usage_row(user_id="late", model="late", created_at=int(time.time() * 1000) - DAY // 2, cost_nanousd=0),
        usage_row(user_id="late", model="early", created_at=int(time.time() * 1000) - 2 * DAY, cost_nanousd=0),
    )
    if not {"--user", "--since"} & {*arguments}:
        arguments = [*arguments, "--since", "2027-01-01"]
    lines = run("usage", *arguments).out.splitlines()
    assert [line.split()[0] for line in lines] == first_column


def test_names_from_outside_cannot_act_on_a_terminal(run: Run) -> None:
    """Any client can ask for a model of any name."""
    add_usage(usage_row(model="\x1b[31mred\nforged 1 1 1"))
    shown = run("usage").out
    assert "\x1b" not in shown
    assert shown.count("\n") == 3


@pytest.mark.parametrize(
    ("rows", "right", "expected"),
    [
        ([], (), "a  bb"),
        ([("xxx", 1)], (1,), "a    bb\nxxx   1"),
        ([("x", ""), ("", "y")], (), "a  bb\nx\n   y"),
    ],
)
def test_a_table(rows: list[tuple[object, ...]], right: Iterable[int], expected: str) -> None:
    assert table(("a", "bb"), rows, right=tuple(right)) == expected


# Migrations


def test_migrations_wait_then_are_applied_then_are_done(run: Run) -> None:
    waiting = run("migrate", "--check")
    assert waiting.code == 1
    assert waiting.err == ""
    names = re.findall(r"waiting: (\d{4}_\w+)\n", waiting.out)
    assert names[0] == "0001_initial"
    applied = run("migrate")
    assert (applied.code, applied.out) == (0, "".join(f"applied: {name}\n" for name in names))
    done = Ended(0, "the database is up to date\n", "")
    assert [run("migrate", "--check"), run("migrate")] == [done, done]


@pytest.mark.parametrize("command", ["keys list", "keys create --user u", "usage"])
def test_commands_migrate_by_themselves_unless_told_not_to(run: Run, command: str) -> None:
    Path("config.yaml").write_text("database: {auto_migrate: false}\n")
    ended = run(*command.split())
    assert ended.code == 1
    assert "gateway migrate" in ended.error
    Path("config.yaml").unlink()
    assert run(*command.split()).code == 0


# The configuration


CONFIG = """
auth: {mode: keys}
backends:
  up: {type: openai, base_url: "https://up.example/v1", api_key: "${UPSTREAM_KEY}", headers: {x-team: "${UPSTREAM_KEY}"}}
models:
  m: {backend: up, price: {input: 1}}
database: {url: "postgresql://ann:${DB_PASSWORD}@db.example/gateway?password=${DB_PASSWORD}"}
storage: {url: "s3://bucket/x", access_key: "${S3_SECRET}", secret_key: "${S3_SECRET}"}
"""  # noqa: E501  # a line of YAML


def test_the_settings_are_shown_without_secrets(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    Path("config.yaml").write_text(CONFIG)
    ended = run("check-config")
    assert (ended.code, ended.err) == (0, "")
    assert "canary" not in ended.out
    assert "mode: keys" in ended.out
    assert "up.example/v1" in ended.out


def test_every_mistake_of_the_configuration_is_a_line(run: Run) -> None:
    Path("config.yaml").write_text("server: {port: no, prot: 1}\nmodels: {m: {backend: gone}}\n")
    ended = run("check-config")
    assert ended.code == 1
    lines = ended.err.splitlines()
    assert {line.split(": ")[1] for line in lines} == {"server.prot", "server.port", "models.m.backend"}
    assert len(lines) == 3


def test_without_a_backend_a_note_says_who_answers(run: Run) -> None:
    assert "# note: the built-in model `echo` answers" in run("check-config").out


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_the_configuration_file_can_be_named(run: Run, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("other.yaml").write_text("server: {port: 1234}\n")
    if how == "environment":
        monkeypatch.setenv("GATEWAY_CONFIG", "other.yaml")
        ended = run("check-config")
    else:
        ended = run("check-config", "--config", "other.yaml")
    assert "port: 1234" in ended.out


# serve, up to the point where it would listen


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch, own_logging: None) -> list[dict[str, Any]]:
    """`serve` says that it has started and ends at once."""
    calls: list[dict[str, Any]] = []

    def serve(app: object, **options: Any) -> int:
        calls.append(options)
        options["on_started"](options["port"])
        return 0

    monkeypatch.setattr(serving, "serve", serve)
    monkeypatch.setattr(serving, "listen", lambda host, port: socket.socket())
    return calls


KEY = re.compile(r"\bsk-[\w-]+")


def test_flags_beat_the_environment_which_beats_the_file(
    run: Run, listening: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("config.yaml").write_text("server: {port: 1, workers: 2, host: localhost}\n")
    monkeypatch.setenv("GATEWAY_PORT", "3")
    monkeypatch.setenv("GATEWAY_WORKERS", "4")
    assert run("serve", "--port", "5").code == 0
    ((host, port, workers),) = [(call["host"], call["port"], call["workers"]) for call in listening]
    assert (host, port, workers) == ("localhost", 5, 4)


@pytest.mark.usefixtures("listening")
def test_the_start_says_where_it_is_and_what_it_has(run: Run) -> None:
    said = run("serve").out
    assert "http://127.0.0.1:8000/v1" in said
    assert "sqlite:///data/gateway.db" in said
    assert "data/files" in said
    assert "echo" in said
    assert "gateway keys create --user NAME" in said
    assert KEY.findall(said) == []


@pytest.mark.usefixtures("listening")
def test_the_first_admin_key_is_made_where_strangers_could_call_and_shown_once(run: Run) -> None:
    said = run("serve", "--host", "0.0.0.0")
    (key,) = KEY.findall(said.out + said.err)
    assert query("SELECT digest, is_admin, user_id FROM api_keys") == [(digest(key), 1, "admin")]
    again = run("serve", "--host", "0.0.0.0")
    assert KEY.findall(again.out + again.err) == []
    assert len(query("SELECT id FROM api_keys")) == 1


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize(
    ("host", "config"),
    [
        ("127.0.0.1", ""), ("localhost", ""), ("::1", ""), ("0.0.0.0", "auth: {admin_key: canary}"),
        ("0.0.0.0", "auth: {mode: open}"),
    ],
)  # fmt: skip
def test_elsewhere_no_key_is_made(run: Run, host: str, config: str) -> None:
    Path("config.yaml").write_text(config + "\n")
    said = run("serve", "--host", host)
    assert said.code == 0
    assert KEY.findall(said.out + said.err) == []
    assert "canary" not in said.out + said.err
    assert query("SELECT id FROM api_keys") == []


@pytest.mark.usefixtures("listening")
def test_a_database_that_is_down_does_not_keep_it_from_starting(run: Run) -> None:
    Path("config.yaml").write_text("database: {url: 'postgresql://ann:canary@127.0.0.1:1/x'}\n")
    said = run("serve")
    assert said.code == 0
    assert "canary" not in said.out + said.err
    assert "starting anyway" in said.err


# The process


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_reader_that_leaves_is_no_error(unbuffered: str) -> None:
    """`gateway check-config | head -0`"""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "gateway", "check-config", "--config", os.devnull]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, env=env, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_exit_code_is_that_of_the_command() -> None:
    command = [sys.executable, "-m", "gateway", "keys", "revoke"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 2

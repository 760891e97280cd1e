"""Migrations: the files, their rules, and what they leave in both engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway.errors import DatabaseUnavailable
from gateway.store.connect import database_at
from gateway.store.database import Database, Row, Value
from gateway.store.migrate import DIALECTS, Dialect, Migration, SchemaMismatch, load_migrations, migrate, pending
from tests_standalone.support.databases import in_processes

ALL = [
    *("0001_initial", "0002_conversations", "0003_views", "0004_usage_image_tokens", "0005_keys_and_limits"),
    *("0006_admit", "0007_slices", "0008_threads", "0009_management", "0010_stored_completions", "0011_privacy"),
]


def folder(tmp_path: Path, **texts: str) -> Path:
    """A folder with these migrations; `__` in a name stands for a dot."""
    made = tmp_path / "migrations"
    made.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (made / f"{name.removeprefix('n').replace('__', '.')}.sql").write_text(text)
    return made


async def tables(database: Database) -> set[str]:
    ours = {
        "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
        "postgres": "SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'",
    }
    return {row["name"] for row in await database.fetch(ours[database.dialect])}


def values(rows: Sequence[Row]) -> list[tuple[Value, ...]]:
    return [tuple(row) for row in rows]  # type: ignore[arg-type]  # both engines' rows can be iterated


# Files


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_migrations_of_the_package(dialect: Dialect) -> None:
    assert [migration.name for migration in load_migrations(dialect)] == ALL


def test_a_file_per_engine_or_one_for_both(tmp_path: Path) -> None:
    made = folder(tmp_path, n0001_a="both", n0002_b__sqlite="light", n0002_b__postgres="heavy")
    (made / "README").write_text("not a migration")
    assert [migration.sql for migration in load_migrations("sqlite", made)] == ["both", "light"]
    assert [migration.sql for migration in load_migrations("postgres", made)] == ["both", "heavy"]


def test_names_that_are_refused(tmp_path: Path) -> None:
    for number, (texts, complaint) in enumerate(
        [
            ({"n0002_b": ""}, "missing migrations: 0001 for postgres, 0001 for sqlite"),
            ({"n0001_a": "", "n0003_c": ""}, "missing migrations: 0002 for postgres, 0002 for sqlite"),
            ({"n0001_a__sqlite": ""}, "missing migrations: 0001 for postgres"),
            ({"n0001_a": "", "n0001_b": ""}, "two migrations for postgres have the number 1"),
            ({"n0001_a": "", "n0001_a__sqlite": ""}, "two migrations for sqlite have the number 1"),
            ({"n0001_a__mysql": ""}, "0001_a.mysql.sql is no name"),
            ({"n1_a": ""}, "1_a.sql is no name"),
        ]
    ):
        with pytest.raises(ValueError, match=complaint):
            load_migrations("sqlite", folder(tmp_path / str(number), **texts))


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        ("", []),
        ("-- only; \n/* comments; */\n", []),
        ("SELECT 1", ["SELECT 1"]),
        ("SELECT 1;\nSELECT 2;", ["SELECT 1;", "SELECT 2;"]),
        ("SELECT\n1\n;  -- one\nSELECT 2;\n-- the end\n", ["SELECT\n1\n;", "-- one\nSELECT 2;"]),
        ("SELECT 1; SELECT 2;", ["SELECT 1; SELECT 2;"]),
        ("SELECT ';\n', 'it''s;\n', \"a;\nb\";\nSELECT 2;", ["SELECT ';\n', 'it''s;\n', \"a;\nb\";", "SELECT 2;"]),
        ("-- don't;\nSELECT 1;\n/* don't;\n */ SELECT 2;", ["-- don't;\nSELECT 1;", "/* don't;\n */ SELECT 2;"]),
        ("DO $$ BEGIN\nNULL;\nEND $$;\nDO $a$ $$;\n $a$;", ["DO $$ BEGIN\nNULL;\nEND $$;", "DO $a$ $$;\n $a$;"]),
    ],
)
def test_a_statement_ends_with_a_semicolon_at_a_line_end(text: str, statements: list[str]) -> None:
    assert Migration(1, "0001_a", text).statements == statements


def test_line_ends_make_no_difference(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (one / "0001_a.sql").write_bytes(b"SELECT 1;\nSELECT 2;\n")
    (other / "0001_a.sql").write_bytes(b"SELECT 1;\r\nSELECT 2;\r\n")
    assert load_migrations("sqlite", one)[0].sha256 == load_migrations("sqlite", other)[0].sha256


# Databases


async def test_migrations_are_applied_once(database: Database) -> None:
    assert await pending(database) == ALL
    assert await tables(database) == set()

    assert await migrate(database) == ALL
    assert await migrate(database) == []

    assert await pending(database) == []
    history = await database.fetch("SELECT version, name, sha256, applied_at FROM schema_migrations ORDER BY version")
    assert [row["name"] for row in history] == ALL
    assert [row["sha256"] for row in history] == [known.sha256 for known in load_migrations(database.dialect)]
    assert all(row["applied_at"] > 1_700_000_000_000 for row in history)


async def test_a_later_release_adds_its_own(database: Database, tmp_path: Path) -> None:
    made = folder(tmp_path, n0001_a="CREATE TABLE a (x TEXT);")
    assert await migrate(database, made) == ["0001_a"]
    folder(tmp_path, n0002_b="CREATE TABLE b (x TEXT);\nINSERT INTO a (x) VALUES ('one;\ntwo');")
    assert await pending(database, made) == ["0002_b"]
    assert await migrate(database, made) == ["0002_b"]
    assert values(await database.fetch("SELECT x FROM a")) == [("one;\ntwo",)]


async def test_an_applied_file_must_not_change(database: Database, tmp_path: Path) -> None:
    await migrate(database, folder(tmp_path, n0001_a="CREATE TABLE a (x TEXT);"))
    edited = folder(tmp_path, n0001_a="CREATE TABLE a (x TEXT, y TEXT);", n0002_b="CREATE TABLE b (x TEXT);")
    for refused in (migrate, pending):
        with pytest.raises(SchemaMismatch, match="0001_a is not the one that was applied") as caught:
            await refused(database, edited)
        assert str(caught.value).endswith("restore the released file and put the change into a new one")
    assert "b" not in await tables(database)


async def test_a_database_that_is_newer_than_the_code(database: Database, tmp_path: Path) -> None:
    await migrate(database, folder(tmp_path, n0001_a="CREATE TABLE a (x TEXT);", n0002_b="CREATE TABLE b (x TEXT);"))
    older = folder(tmp_path / "older", n0001_a="CREATE TABLE a (x TEXT);")
    for refused in (migrate, pending):
        with pytest.raises(SchemaMismatch, match="at migration 0002_b, newer than this gateway") as caught:
            await refused(database, older)
        assert "run the newer gateway, or restore" in str(caught.value)


async def test_a_failing_file_leaves_nothing_behind(database: Database, tmp_path: Path) -> None:
    texts = {
        "n0001_a": "CREATE TABLE a (x TEXT);",
        "n0002_b": "CREATE TABLE b (x TEXT);\nINSERT INTO nowhere DEFAULT VALUES;",
    }
    with pytest.raises(SchemaMismatch, match="nowhere") as caught:
        await migrate(database, folder(tmp_path, **texts))
    assert "0002_b cannot be applied" in str(caught.value)
    assert await tables(database) == set()

    folder(tmp_path, n0002_b="CREATE TABLE b (x TEXT);")
    assert await migrate(database, tmp_path / "migrations") == ["0001_a", "0002_b"]


def migrate_in_process(_number: int, url: str) -> list[str]:
    async def run() -> list[str]:
        database = database_at(url, pool_size=1)
        await database.open()
        applied = await migrate(database)
        await database.close()
        return applied

    return asyncio.run(run())


def test_of_four_processes_exactly_one_applies(database_url: str) -> None:
    assert sorted(in_processes(4, migrate_in_process, database_url)) == [[], [], [], ALL]


async def test_a_table_in_use_delays_a_migration(
    database_urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In PostgreSQL, where an ALTER that waits holds up every query behind it, and so must not wait for long."""
    database = database_at(database_urls["postgres"])
    await database.open()
    await migrate(database, folder(tmp_path, n0001_a="CREATE TABLE a (x TEXT);"))
    monkeypatch.setattr(type(database), "migration_lock", str(database.migration_lock).replace("2s", "50ms"))
    made = folder(tmp_path, n0002_b="ALTER TABLE a ADD COLUMN y TEXT;")

    async with database.transaction() as transaction:
        await transaction.fetch("SELECT x FROM a")
        migrating = asyncio.create_task(migrate(database, made))
        await asyncio.sleep(0.3)
        assert not migrating.done()
    assert await migrating == ["0002_b"]
    await database.close()


async def test_a_table_in_use_for_ever(
    database_urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = database_at(database_urls["postgres"])
    await database.open()
    await migrate(database, folder(tmp_path, n0001_a="CREATE TABLE a (x TEXT);"))
    monkeypatch.setattr(type(database), "migration_lock", str(database.migration_lock).replace("2s", "50ms"))
    monkeypatch.setattr("gateway.store.migrate.ATTEMPTS", 2)
    async with database.transaction() as transaction:
        await transaction.fetch("SELECT x FROM a")
        with pytest.raises(DatabaseUnavailable) as caught:
            await migrate(database, folder(tmp_path, n0002_b="ALTER TABLE a ADD COLUMN y TEXT;"))
    assert "lock timeout" in caught.value.cause
    await database.close()


# Rows of the first release

USAGE = {
    "id": "'1'", "request_id": "'r'", "attempt": "1", "created_at": "1500", "user_id": "'u'", "backend": "'b'",
    "model": "'m'", "upstream_model": "'m'", "input_tokens": "10", "cached_tokens": "0",
    "cache_write_tokens": "0", "audio_input_tokens": "0", "output_tokens": "30", "reasoning_tokens": "0",
    "audio_output_tokens": "0", "counted_by": "'upstream'", "price_unknown": "0", "cost_nanousd": "5",
    "charged": "1", "status": "'ok'", "stream": "1", "ttft_ms": "100", "duration_ms": "1100",
}  # fmt: skip
ADD_USAGE = (f"INSERT INTO usage_rows ({', '.join(USAGE)}) VALUES ({', '.join(USAGE.values())})", [()])


async def test_rows_from_before_0004_have_no_pictures(database: Database, tmp_path: Path) -> None:
    shipped = {known.name: known.sql for known in load_migrations(database.dialect)}
    before = {f"n{name}__{other}": shipped[name] for name in ALL[:3] for other in DIALECTS}
    await migrate(database, folder(tmp_path, **before))
    await database.write([ADD_USAGE])
    assert await migrate(database) == ALL[3:]
    found = "SELECT input_tokens, image_input_tokens, image_output_tokens, cache_write_1h_tokens FROM usage_rows"
    assert values(await database.fetch(found)) == [(10, 0, 0, 0)]
    assert len(await database.fetch("SELECT * FROM usage_view")) == 1


# Views

CONTENTS = {
    "null": None,
    '"hello"': "hello",
    '""': "",
    '"line\\nbreak and \\"quotes\\""': 'line\nbreak and "quotes"',
    '"emoji 🙂"': "emoji 🙂",
    '"escaped emoji \\ud83d\\ude42"': "escaped emoji 🙂",
    '"a\\u0000b"': '"a\\u0000b"',
    '"\\ud800"': '"\\ud800"',
    '"\\udc00"': '"\\udc00"',
    '"\\ude42\\ud83d"': '"\\ude42\\ud83d"',
    '"\\ud83d\\ud83d\\ude42"': '"\\ud83d\\ud83d\\ude42"',
    '"literal backslash: \\\\u0000"': "literal backslash: \\u0000",
    '"literal backslash: \\\\ud800"': "literal backslash: \\ud800",
    '"both: \\\\\\u0000"': '"both: \\\\\\u0000"',
    '[{"type":"text","text":"\\u0000"}]': '[{"type":"text","text":"\\u0000"}]',
    '{"a": 1}': '{"a": 1}',
    "12": "12",
}


async def with_a_conversation(database: Database) -> None:
    await migrate(database)
    totals = "created_at, last_used, message_count, total_tokens_input, total_tokens_output, total_cost_nanousd"
    await database.write(
        [(f"INSERT INTO conversations (pk, id, user_id, {totals}) VALUES ($1, $2, $3, 1500, 2500, 2, 3, 4, $4)",
          [("p", "c", "u", 1_500_000_000)])]
    )  # fmt: skip


async def test_messages_can_be_read_by_people(database: Database) -> None:
    await with_a_conversation(database)
    add = (
        "INSERT INTO messages (id, conversation_pk, seq, role, content, tokens, created_at) "
        "VALUES ($1, 'p', $2, 'user', $3, 0, 1500)"
    )
    await database.write([(add, [(str(seq), seq, content) for seq, content in enumerate(CONTENTS)])])

    rows = await database.fetch("SELECT conversation_id, content FROM messages_view ORDER BY seq")

    assert {row["conversation_id"] for row in rows} == {"c"}
    assert [row["content"] for row in rows] == list(CONTENTS.values())


async def test_conversations_and_sessions_can_be_read_by_people(database: Database) -> None:
    await with_a_conversation(database)
    await database.write([("INSERT INTO sessions VALUES ('s', 'u', 1500, 2500, NULL, 1, 7, 250000000)", [()])])

    conversation = (await database.fetch("SELECT * FROM conversations_view"))[0]
    session = (await database.fetch("SELECT * FROM sessions_view"))[0]

    assert (conversation["id"], conversation["number"], float(conversation["total_cost"])) == ("c", 1, 1.5)
    assert not conversation["is_deleted"]
    assert (session["id"], float(session["total_cost"]), session["conversation_count"]) == ("s", 0.25, 1)
    assert session["is_active"]
    for readable in (conversation["created_at"], session["created_at"]):
        assert str(readable).replace(" ", "T").startswith("1970-01-01T00:00:01.5")


async def test_usage_can_be_read_by_people(database: Database) -> None:
    await migrate(database)
    await database.write([ADD_USAGE])

    row = (await database.fetch("SELECT * FROM usage_view"))[0]

    assert (row["request_id"], float(row["cost_usd"]), float(row["tokens_per_second"])) == ("r", 5e-9, 30.0)
    assert (bool(row["charged"]), bool(row["price_unknown"]), bool(row["stream"])) == (True, False, True)

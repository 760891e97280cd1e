"""A record in, one line out that nobody can forge."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import logs
from gateway.logs import GatheringHandler, JSONFormatter, TextFormatter

pytestmark = pytest.mark.usefixtures("own_logging")

AT = 1_800_000_000.25
ESC_RED = "\x1b[31mred"


def record(message: str = "request", *args: object, level: int = logging.INFO, **fields: Any) -> logging.LogRecord:
    found = logging.LogRecord("gateway.access", level, __file__, 1, message, args, None)
    found.created = AT
    found.fields = fields
    return found


def failing_record(cause: str = "the cause") -> logging.LogRecord:
    try:
        raise ValueError(cause)
    except ValueError:
        return logging.LogRecord("gateway", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())


def test_a_json_line() -> None:
    line = JSONFormatter().format(record("took %d", 5, path="/v1/models", status=200, ms=1.5, user=None))
    assert line == (
        '{"time":"2027-01-15T08:00:00.250Z","level":"info","logger":"gateway.access","message":"took 5",'
        '"path":"/v1/models","status":200,"ms":1.5,"user":null}'
    )


def test_a_text_line() -> None:
    line = TextFormatter().format(record("took %d", 5, path="/v1/models", status=200, user=None))
    assert line == "08:00:00 INFO    took 5 path=/v1/models status=200"


def test_a_record_without_fields() -> None:
    plain = logging.LogRecord("x", logging.WARNING, __file__, 1, "words", (), None)
    assert json.loads(JSONFormatter().format(plain))["message"] == "words"
    assert TextFormatter().format(plain).endswith("WARNING words")


def test_a_traceback_is_shown() -> None:
    assert "ValueError: the cause" in json.loads(JSONFormatter().format(failing_record()))["traceback"]
    assert TextFormatter().format(failing_record()).endswith("ValueError: the cause")
    assert "\n" not in JSONFormatter().format(failing_record())


def test_a_traceback_holds_no_control_characters() -> None:
    line = TextFormatter().format(failing_record(ESC_RED))
    assert line.endswith(r"ValueError: \x1b[31mred")


FORGERIES = [
    '/x\n{"level":"error"}', "/x\r\n12:00:00 ERROR forged", ESC_RED, "\x00", "\x7f", "\x9b31m", "\x85next",
    "\u2028next", "\u2029next", "\u202eetadpu", "\u2066x\u2069", "\ud800", "\ufeff", "\u200b",
]  # fmt: skip


@pytest.mark.parametrize("text", FORGERIES, ids=[ascii(text) for text in FORGERIES])
def test_control_characters_are_escaped(text: str) -> None:
    """A66. In the message and in fields; nothing that a terminal or a reader of lines acts on is left."""
    for formatter in (JSONFormatter(), TextFormatter()):
        line = formatter.format(record(text, path=text))
        assert [ascii(char) for char in line if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")] == []
        line.encode("utf-8")
    told = json.loads(JSONFormatter().format(record(text, path=text)))
    assert (told["message"], told["path"]) == (text, text)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "path=plain"),
        ("two words", 'path="two words"'),
        ("José 🙂", 'path="José 🙂"'),
        ('/x" status=200 y="', r'path="/x\" status=200 y=\""'),
        ('"', r'path="\""'),
        ("a\\nb", r'path="a\\nb"'),
        ("a\nb", r'path="a\nb"'),
        ("a\u00a0status=200", r'path="a\xa0status=200"'),
        ("", 'path=""'),
        ("a=b", 'path="a=b"'),
        (5, "path=5"),
    ],
)
def test_a_field_cannot_end_itself(value: object, shown: str) -> None:
    assert TextFormatter().format(record("m", path=value)) == f"08:00:00 INFO    m {shown}"


@given(st.text(st.characters(exclude_categories=())), st.text())
def test_any_text_is_one_line_that_can_be_read_back(message: str, path: str) -> None:
    line = JSONFormatter().format(record(message, path=path))
    assert len(line.splitlines()) == 1
    assert json.loads(line)["path"] == path
    assert len(TextFormatter().format(record(message, path=path)).splitlines()) == 1


# configure


@pytest.mark.parametrize(
    ("kind", "terminal", "is_json"),
    [("auto", False, True), ("auto", True, False), ("json", True, True), ("text", False, False)],
)
def test_people_get_text_and_machines_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: Any, terminal: bool, is_json: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    logs.configure(kind, "info")
    logging.getLogger("gateway").info("words")
    assert capsys.readouterr().err.startswith("{") is is_json


def test_the_level_is_the_least_that_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "warning")
    logging.getLogger("gateway").info("not this")
    logging.getLogger("gateway").warning("but this")
    shown = capsys.readouterr().err
    assert "but this" in shown
    assert "not this" not in shown


def test_configuring_twice_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "info")
    logs.configure("text", "info")
    logging.getLogger("gateway").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_the_server_says_only_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "info")
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.error").warning("Invalid request")
    logging.getLogger("asyncpg").error("its own words about a lost connection")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "Invalid request" in shown


# when lines leave


class Writes(io.StringIO):
    """A stream that remembers each write."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []

    def write(self, text: str) -> int:
        self.all.append(text)
        return super().write(text)


def gathering() -> tuple[logging.Logger, Writes]:
    stream = Writes()
    handler = GatheringHandler(stream)
    handler.setFormatter(TextFormatter())
    log = logging.Logger("test")
    log.addHandler(handler)
    return log, stream


def words(text: str) -> list[str]:
    return [line.split()[-1] for line in text.splitlines()]


async def test_lines_leave_together_in_their_order() -> None:
    log, stream = gathering()
    for number in range(3):
        log.info("%d", number)
    assert stream.all == []
    while not stream.all:
        await asyncio.sleep(0.01)
    assert words(stream.all[0]) == ["0", "1", "2"]
    log.info("3")
    while len(stream.all) < 2:
        await asyncio.sleep(0.01)
    assert words(stream.all[1]) == ["3"]


async def test_a_warning_leaves_at_once_and_takes_along_what_waits() -> None:
    log, stream = gathering()
    log.info("first")
    log.warning("second")
    assert [words(text) for text in stream.all] == [["first", "second"]]


async def test_no_write_is_larger_than_what_the_kernel_takes_as_one() -> None:
    log, stream = gathering()
    for number in range(200):
        log.info("🙂 %s %d", "é" * 50, number)
    log.warning("the end")
    assert words("".join(stream.all)) == [*map(str, range(200)), "end"]
    assert max(len(text.encode()) for text in stream.all) <= logs.WRITE_BYTES
    assert len(stream.all) < 100


async def test_a_line_that_is_longer_than_that_leaves_alone_and_whole() -> None:
    log, stream = gathering()
    log.info("before")
    log.info("x" * 2 * logs.WRITE_BYTES)
    log.info("after")
    log.warning("end")
    assert [len(words(text)) for text in stream.all] == [1, 1, 2]


def test_without_a_loop_lines_leave_at_once() -> None:
    log, stream = gathering()
    log.info("first")
    log.info("second")
    assert [words(text) for text in stream.all] == [["first"], ["second"]]


async def test_a_line_of_a_thread_takes_along_what_waits() -> None:
    log, stream = gathering()
    log.info("first")
    await asyncio.to_thread(log.info, "second")
    assert [words(text) for text in stream.all] == [["first", "second"]]


def test_a_loop_that_has_ended_does_not_keep_a_later_one_from_writing() -> None:
    log, stream = gathering()

    async def one(message: str, *, until_it_left: bool = False) -> None:
        log.info(message)
        while until_it_left and not stream.all:
            await asyncio.sleep(0.01)

    asyncio.run(one("first"))
    asyncio.run(one("second", until_it_left=True))
    assert words(stream.all[0]) == ["first", "second"]


@pytest.mark.parametrize("end", ["return", "raise SystemExit(0)", "signal.raise_signal(signal.SIGTERM)"])
def test_what_waits_leaves_when_the_process_ends(end: str) -> None:
    program = f"""
import asyncio, logging, signal, sys
from gateway import logs
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
async def main():
    logging.getLogger("x").info("last words")
    {end}
logs.configure("text", "info")
asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert words(ended.stderr) == ["words"]

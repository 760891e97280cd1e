"""A record in, one line out that nobody can forge."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
import unicodedata
from collections.abc import Callable
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


# the access log


REQUEST: dict[str, Any] = {
    "request_id": "req_1", "method": "POST", "path": "/v1/models", "status": 200, "seconds": 0.01234,
    "client": "10.0.0.1", "user": "ann", "model": None,
}  # fmt: skip


def by_a_record(**told: Any) -> None:
    """What `logs.access` does where somebody else may look at the record."""
    ms = round(told.pop("seconds") * 1000, 1)
    fields = {name: ms if name == "ms" else told[name] for name in (
        "request_id", "method", "path", "status", "ms", "client", "user", "model")}  # fmt: skip
    logging.getLogger("gateway.access").info("request", extra={"fields": fields})


def written(call: Callable[..., None], kind: Any, monkeypatch: pytest.MonkeyPatch, **told: Any) -> str:
    monkeypatch.setattr(sys, "stderr", Writes())
    monkeypatch.setattr("time.time", lambda: AT)
    logs.configure(kind, "info")
    call(**REQUEST | told)
    text: str = sys.stderr.getvalue()  # type: ignore[attr-defined] # `Writes`
    return text


def test_a_line_of_the_access_log(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(logs.access, "json", monkeypatch) == (
        '{"time":"2027-01-15T08:00:00.250Z","level":"info","logger":"gateway.access","message":"request",'
        '"request_id":"req_1","method":"POST","path":"/v1/models","status":200,"ms":12.3,"client":"10.0.0.1",'
        '"user":"ann","model":null}\n'
    )
    assert written(logs.access, "text", monkeypatch) == (
        "08:00:00 INFO    request request_id=req_1 method=POST path=/v1/models status=200 ms=12.3 "
        "client=10.0.0.1 user=ann\n"
    )


@pytest.mark.parametrize("kind", ["json", "text"])
@pytest.mark.parametrize("text", [*FORGERIES, "", "a b", 'a"b', "a=b", "a\\b", "é🙂", "%s%"], ids=ascii)
def test_it_is_the_line_that_a_record_makes(monkeypatch: pytest.MonkeyPatch, kind: str, text: str) -> None:
    """A66. Whatever a client sends."""
    for field in ("request_id", "method", "path", "client", "user", "model"):
        straight = written(logs.access, kind, monkeypatch, **{field: text})
        assert straight == written(by_a_record, kind, monkeypatch, **{field: text})
        assert len(straight.splitlines()) == 1


@pytest.mark.parametrize("seconds", [0, 0.00004, 0.0123456, 12.3, 1e9, 1e20])
def test_a_time_is_written_as_a_record_writes_it(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for kind in ("json", "text"):
        of_record = written(by_a_record, kind, monkeypatch, seconds=seconds)
        assert written(logs.access, kind, monkeypatch, seconds=seconds) == of_record


async def test_its_lines_keep_their_place_among_others(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    log = logging.getLogger("gateway")
    for number in range(50):
        log.info("%d", 2 * number)
        logs.access(**REQUEST | {"request_id": str(2 * number + 1)})
    log.warning("end")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line.get("request_id", line["message"]) for line in lines] == [*map(str, range(100)), "end"]


async def test_it_tells_when_a_request_ended_and_not_when_the_line_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Writes())
    logs.configure("json", "info")
    monkeypatch.setattr("time.time", lambda: AT)
    logs.access(**REQUEST)
    monkeypatch.setattr("time.time", lambda: AT + 100)
    assert stream.all == []
    logging.getLogger("gateway").warning("out")
    assert [json.loads(line)["time"] for line in stream.getvalue().splitlines()] == [
        "2027-01-15T08:00:00.250Z", "2027-01-15T08:01:40.250Z"]  # fmt: skip


async def test_no_line_is_lost_between_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Writes())
    logs.configure("json", "info")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def talk(number: int) -> None:
            for count in range(300):
                logging.getLogger("gateway").info("%d", number * 300 + count)

        talking = [asyncio.create_task(asyncio.to_thread(talk, number)) for number in range(4)]
        for number in range(1200, 4000):
            logs.access(**REQUEST | {"request_id": str(number)})
            if number % 100 == 0:
                await asyncio.sleep(0)
        await asyncio.gather(*talking)
    finally:
        sys.setswitchinterval(interval)
    logging.getLogger("gateway").warning("4000")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    told = [int(line.get("request_id", line["message"])) for line in lines]
    assert sorted(told) == list(range(4001))
    assert [number for number in told if number >= 1200] == list(range(1200, 4001))


@pytest.mark.parametrize("name", ["", "gateway", "gateway.access"])
def test_a_level_that_is_above_it_keeps_it_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    logs.configure("json", "info")
    log = logging.getLogger(name)
    level = log.level
    try:
        log.setLevel(logging.WARNING)
        logs.access(**REQUEST)
    finally:
        log.setLevel(level)
    assert capsys.readouterr().err == ""
    logs.access(**REQUEST)
    assert capsys.readouterr().err.count("\n") == 1
    logs.configure("json", "warning")
    logs.access(**REQUEST)
    assert capsys.readouterr().err == ""


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.mark.parametrize("name", ["", "gateway", "gateway.access"])
@pytest.mark.parametrize("propagate", [True, False])
def test_who_else_listens_gets_a_record(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, propagate: bool
) -> None:
    """As an application does that runs the gateway inside, or a library that sends logs elsewhere."""
    logs.configure("json", "info")
    log, kept = logging.getLogger(name), Kept()
    monkeypatch.setattr(log, "handlers", [*log.handlers, kept])
    monkeypatch.setattr(log, "propagate", propagate)
    logs.access(**REQUEST)
    (found,) = kept.records
    assert (found.name, found.levelname, found.getMessage()) == ("gateway.access", "INFO", "request")
    assert vars(found)["fields"] == {
        "request_id": "req_1", "method": "POST", "path": "/v1/models", "status": 200, "ms": 12.3,
        "client": "10.0.0.1", "user": "ann", "model": None,
    }  # fmt: skip
    assert capsys.readouterr().err.count("\n") == (propagate or not name)


@pytest.mark.parametrize("name", ["gateway", "gateway.access"])
def test_where_nothing_is_handed_on_nothing_is_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    logs.configure("json", "info")
    monkeypatch.setattr(logging.getLogger(name), "propagate", False)
    logs.access(**REQUEST)
    assert capsys.readouterr().err == ""


def refuse(_record: object) -> bool:
    return False


@pytest.mark.parametrize("where", ["logger", "handler"])
def test_a_filter_is_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    logs.configure("json", "info")
    filtered = logging.getLogger("gateway.access") if where == "logger" else logging.getLogger().handlers[0]
    monkeypatch.setattr(filtered, "filters", [refuse])
    logs.access(**REQUEST)
    assert capsys.readouterr().err == ""


def test_what_others_have_set_up_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    """A formatter, a factory of records, a handler's level."""
    logs.configure("json", "info")
    handler = logging.getLogger().handlers[0]
    handler.setFormatter(logging.Formatter("mine %(levelname)s %(message)s"))
    logs.access(**REQUEST)
    assert capsys.readouterr().err == "mine INFO request\n"

    logs.configure("text", "info")
    logging.setLogRecordFactory(lambda *_, **__: logging.LogRecord("x", logging.INFO, "", 0, "made", (), None))
    try:
        logs.access(**REQUEST)
    finally:
        logging.setLogRecordFactory(logging.LogRecord)
    assert " made " in capsys.readouterr().err

    logging.getLogger().handlers[0].setLevel(logging.WARNING)
    logs.access(**REQUEST)
    assert capsys.readouterr().err == ""


def test_a_stream_that_is_gone_is_no_failure_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Writes())
    logs.configure("json", "info")
    stream.close()
    monkeypatch.setattr(sys, "stderr", told := Writes())
    logs.access(**REQUEST)
    assert "Logging error" in told.getvalue()


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


async def test_a_line_that_cannot_be_made_costs_no_other() -> None:
    logger, writes = gathering()
    handler = logger.handlers[0]
    assert isinstance(handler, GatheringHandler)
    for line in (lambda: "one", lambda: str(1 // 0), lambda: "three"):
        handler.put(line)
    handler.flush()
    first, error, last = writes.getvalue().splitlines()
    assert (first, last) == ("one", "three")
    assert "ZeroDivisionError" in error


async def test_no_write_is_larger_than_what_the_kernel_takes_as_one() -> None:
    log, stream = gathering()
    for number in range(200):
        log.info("🙂 %s %d", "é" * 50, number)
    log.warning("the end")
    assert words("".join(stream.all)) == [*map(str, range(200)), "end"]
    assert max(len(text.encode()) for text in stream.all) <= logs.WRITE_BYTES
    assert len(stream.all) < 100


async def test_lines_of_a_loop_that_is_busy_do_not_pile_up() -> None:
    log, stream = gathering()
    for number in range(logs.MOST_WAITING):
        assert stream.all == []
        log.info("%d", number)
    assert words("".join(stream.all)) == [*map(str, range(logs.MOST_WAITING))]


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


def test_a_forked_child_writes_its_own_lines_only() -> None:
    """At once: the loop, and what waits in it, are its parent's."""
    program = """
import asyncio, logging, os
from gateway import logs
async def main():
    logging.getLogger("x").info("parent")
    child = os.fork()
    if not child:
        logging.getLogger("x").info("child")
        os._exit(0)
    os.waitpid(child, 0)
    logging.getLogger("x").info("end")
logs.configure("text", "info")
asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert words(ended.stderr) == ["child", "parent", "end"]

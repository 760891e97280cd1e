"""Log lines for machines (JSON) or for people. Ids, figures and causes; never a prompt, an answer or a secret.

In a running loop, lines up to INFO wait a moment for others, so that many leave in one write. A process that is killed
takes with it what waits: `WAIT_SECONDS` of the access log at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from threading import get_ident
from typing import Any, Literal, TextIO

from gateway.wire.jsontext import dumps

Format = Literal["auto", "text", "json"]

WAIT_SECONDS = 0.2
WRITE_BYTES = getattr(select, "PIPE_BUF", 4096)
"""What the kernel takes as one: the lines of workers that share a pipe do not mix."""

MOST_WAITING = 64

_PLAIN_WORD = re.compile(r"[!#-<>-\[\]-~]+")
_ONE_WORD = re.compile(r'[^\s"=\\]+')

_MILLISECONDS = tuple(f".{number:03d}Z" for number in range(1000))

_ACCESS_FIELDS = ("request_id", "method", "path", "status", "ms", "client", "user", "model")

gateway_log = logging.getLogger("gateway")
access_log = logging.getLogger("gateway.access")


def access(
    request_id: str,
    method: str,
    path: str,
    status: int,
    seconds: float,
    client: str | None,
    user: str | None,
    model: str | None,
) -> None:
    """The line of a request that has ended, in the access log. Where nobody but our handler would see the record that
    a line usually is, there is none: it costs several times what the line does."""
    if not access_log.isEnabledFor(logging.INFO):
        return
    told = (request_id, method, path, status, seconds, client, user, model)
    handler = _only_handler()
    if handler is not None:
        handler.put(partial(handler.formatter.access_line, time.time(), told))
    else:
        access_log.info("request", extra={"fields": _access_fields(told)})


def _access_fields(told: tuple[Any, ...]) -> dict[str, object]:
    """Of what `access` is told, in its order."""
    fields = dict(zip(_ACCESS_FIELDS, told, strict=True))
    fields["ms"] = round(fields["ms"] * 1000, 1)
    return fields


def _only_handler() -> GatheringHandler | None:
    """Ours, if a record of the access log would go through nothing but it: logging is as `configure` has left it."""
    handlers = access_log.root.handlers
    if len(handlers) != 1 or type(handler := handlers[0]) is not GatheringHandler:
        return None
    if (
        (handler.filters or handler.level or access_log.filters or access_log.handlers or gateway_log.handlers)
        or not (access_log.propagate and gateway_log.propagate)
        or logging.getLogRecordFactory() is not logging.LogRecord
    ):
        return None
    made_by = type(handler.formatter)
    return handler if made_by is JSONFormatter or made_by is TextFormatter else None


class JSONFormatter(logging.Formatter):
    """One object a line. Control characters are escaped, so no input can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        if record.exc_info:
            fields = {**fields, "traceback": self.formatException(record.exc_info)}
        return self.line(record.created, record.levelname, record.name, record.getMessage(), fields)

    def line(self, created: float, level: str, logger: str, message: str, fields: Mapping[str, object]) -> str:
        told = {"time": _utc(created), "level": level.lower(), "logger": logger, "message": message, **fields}
        return _one_line(dumps(told))

    def access_line(self, created: float, told: tuple[Any, ...]) -> str:
        """What `line` makes of what `access` is told."""
        request_id, method, path, status, seconds, client, user, model = told
        template = _access_template(method, path, client, user, model)
        ms = f"{seconds * 1000:.1f}" if 0 < seconds < 1e9 else dumps(round(seconds * 1000, 1)).decode()
        return template % (_utc(created), _one_line(dumps(request_id)), status, ms)


class TextFormatter(logging.Formatter):
    """One readable line; what came from outside is shown escaped."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        line = self.line(record.created, record.levelname, record.name, record.getMessage(), fields)
        if not record.exc_info:
            return line
        return "\n".join([line, *map(escaped, self.formatException(record.exc_info).split("\n"))])

    def line(self, created: float, level: str, _logger: str, message: str, fields: Mapping[str, object]) -> str:
        shown = " ".join([f"{key}={_word(value)}" for key, value in fields.items() if value is not None])
        return f"{_utc(created)[11:19]} {level:<7} {escaped(message)} {shown}".rstrip()

    def access_line(self, created: float, told: tuple[Any, ...]) -> str:
        return self.line(created, "INFO", "gateway.access", "request", _access_fields(told))


class GatheringHandler(logging.StreamHandler[TextIO]):
    """Writes lines in the order they came: at once from WARNING on or outside of a loop, else with those that follow.

    `logging.shutdown`, which Python calls when the process ends, writes what waits then.
    """

    formatter: JSONFormatter | TextFormatter

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._waiting: list[str | Callable[[], str]] = []
        self._loop: asyncio.AbstractEventLoop
        self._thread = 0  # of the loop, as long as that is about to flush

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.append(self.format(record))
            if record.levelno >= logging.WARNING or not self._may_wait():
                self.flush()
        except Exception:
            self.handleError(record)

    def put(self, line: Callable[[], str]) -> None:
        """For what is below WARNING: the line is made when it leaves. Many made in a row are cheaper than one each
        time, when the processor has forgotten how."""
        try:
            self._waiting.append(line)
            if not self._may_wait():
                self.flush()
        except Exception:
            self.handleError(logging.makeLogRecord({"msg": "a line that is lost"}))

    def flush(self) -> None:
        self.acquire()
        try:
            waiting = self._waiting[:]
            del self._waiting[: len(waiting)]  # without a lock others append
            for text in _in_one_write(map(_made, waiting)):
                self.stream.write(text)
            super().flush()
        finally:
            self.release()

    def _may_wait(self) -> bool:
        """If there is a running loop, which then flushes. It is remembered: to ask which one runs is slow."""
        if len(self._waiting) >= MOST_WAITING:
            return False
        if self._thread == get_ident() and self._loop.is_running():
            return True
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        if not self._thread or self._loop is not loop:
            self._loop, self._thread = loop, get_ident()
            loop.call_later(WAIT_SECONDS, self._flush_now)
        return True

    def _flush_now(self) -> None:
        self._thread = 0
        with contextlib.suppress(OSError, ValueError):  # nowhere is left where this could be said
            self.flush()

    def forget(self) -> None:
        """In a child that was forked: what waits is its parent's to write, and so is the loop."""
        self._waiting, self._thread = [], 0


def configure(kind: Format, level: str) -> None:
    """Sends all logs of this process to stderr. `auto`: readable on a terminal, JSON elsewhere."""
    handler = GatheringHandler(sys.stderr)
    readable = kind == "text" or (kind == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextFormatter() if readable else JSONFormatter())
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=handler.forget)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.logThreads = logging.logMultiprocessing = False  # asked for each line, never shown
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("asyncpg").setLevel(logging.CRITICAL)  # its reconnecting: our own lines say what is down
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, root.level))


def _made(line: str | Callable[[], str]) -> str:
    """A line that cannot be made must not cost the others theirs."""
    if isinstance(line, str):
        return line
    try:
        return line()
    except Exception as failure:
        return dumps({"level": "error", "message": f"a line that cannot be made: {type(failure).__name__}"}).decode()


def _in_one_write(lines: Iterable[str]) -> Iterator[str]:
    """As many as the kernel takes as one, or one that is longer."""
    together: list[str] = []
    size = 0
    for line in lines:
        more = 1 + (len(line) if line.isascii() else len(line.encode(errors="replace")))
        if together and size + more > WRITE_BYTES:
            yield "".join(together)
            together, size = [], 0
        together += (line, "\n")
        size += more
    if together:
        yield "".join(together)


def _utc(seconds: float) -> str:
    return _utc_second(int(seconds)) + _MILLISECONDS[int(seconds % 1 * 1000)]


@lru_cache(maxsize=4)
def _utc_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _word(value: object) -> str:
    """Quoted where it could be taken for more than one word."""
    text = str(value)
    if _PLAIN_WORD.fullmatch(text):
        return text
    if _ONE_WORD.fullmatch(text) and text.isprintable():
        return text
    return '"' + escaped(text.replace("\\", r"\\").replace('"', r"\"")) + '"'


def escaped(text: str) -> str:
    """Without what a terminal or a reader of lines would act on."""
    return text if text.isprintable() else "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _one_line(raw: bytes) -> str:
    """A JSON text without what a reader of lines would act on."""
    text = raw.decode()
    if raw.isascii() and "\x7f" not in text:  # JSON has escaped the other ones
        return text
    return text if text.isprintable() else "".join(map(_in_json, text))


@lru_cache(maxsize=256)
def _access_template(method: str, path: str, client: str | None, user: str | None, model: str | None) -> str:
    """A line of the access log but for its time, the request's id, its status and its milliseconds. All else is as in
    the call before, mostly."""
    said = {"level": "info", "logger": "gateway.access", "message": "request"}
    asked, by = {"method": method, "path": path}, {"client": client, "user": user, "model": model}
    before, route, after = (_one_line(dumps(fields))[1:-1].replace("%", "%%") for fields in (said, asked, by))
    return f'{{"time":"%s",{before},"request_id":%s,{route},"status":%d,"ms":%s,{after}}}'


def _in_json(char: str) -> str:
    return char if char.isprintable() else json.dumps(char)[1:-1]

"""Log lines for machines (JSON) or for people. Ids, figures and causes; never a prompt, an answer or a secret.

In a running loop, lines up to INFO wait a moment for others, so that many leave in one write. A process that is killed
takes with it what waits: `WAIT_SECONDS` of the access log at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import select
import sys
import time
from functools import lru_cache
from typing import Any, Literal, TextIO

from gateway.wire.jsontext import dumps

Format = Literal["auto", "text", "json"]

WAIT_SECONDS = 0.2
WRITE_BYTES = getattr(select, "PIPE_BUF", 4096)
"""What the kernel takes as one: the lines of workers that share a pipe do not mix."""

_ONE_WORD = re.compile(r'[^\s"=\\]+')


class JSONFormatter(logging.Formatter):
    """One object a line. Control characters are escaped, so no input can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        text = dumps(line).decode()
        return text if text.isprintable() else "".join(map(_in_json, text))


class TextFormatter(logging.Formatter):
    """One readable line; what came from outside is shown escaped."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        shown = " ".join(f"{key}={_word(value)}" for key, value in fields.items() if value is not None)
        message = escaped(record.getMessage())
        lines = [f"{_utc(record.created)[11:19]} {record.levelname:<7} {message} {shown}".rstrip()]
        if record.exc_info:
            lines += map(escaped, self.formatException(record.exc_info).split("\n"))
        return "\n".join(lines)


class GatheringHandler(logging.StreamHandler[TextIO]):
    """Writes lines in the order they came: at once from WARNING on or outside of a loop, else with those that follow.

    `logging.shutdown`, which Python calls when the process ends, writes what waits then.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + self.terminator
            size = len(line.encode(errors="replace"))
            if self._size + size > WRITE_BYTES:
                self.flush()
            self._lines.append(line)
            self._size += size
            if record.levelno >= logging.WARNING or not self._will_be_flushed():
                self.flush()
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        self.acquire()
        try:
            lines, self._lines, self._size = self._lines, [], 0
            if lines:
                self.stream.write("".join(lines))
            super().flush()
        finally:
            self.release()

    def _will_be_flushed(self) -> bool:
        """Sees to it that the running loop does, if there is one."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        if self._timer is None or self._loop is not loop:
            self._loop, self._timer = loop, loop.call_later(WAIT_SECONDS, self._flush_now)
        return True

    def _flush_now(self) -> None:
        self._timer = None
        with contextlib.suppress(OSError, ValueError):  # nowhere is left where this could be said
            self.flush()


def configure(kind: Format, level: str) -> None:
    """Sends all logs of this process to stderr. `auto`: readable on a terminal, JSON elsewhere."""
    handler = GatheringHandler(sys.stderr)
    readable = kind == "text" or (kind == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextFormatter() if readable else JSONFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.logThreads = logging.logMultiprocessing = False  # asked for each line, never shown
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("asyncpg").setLevel(logging.CRITICAL)  # its reconnecting: our own lines say what is down
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, root.level))


def _utc(seconds: float) -> str:
    return f"{_utc_second(int(seconds))}.{int(seconds % 1 * 1000):03d}Z"


@lru_cache(maxsize=4)
def _utc_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _word(value: object) -> str:
    """Quoted where it could be taken for more than one word."""
    text = str(value)
    if _ONE_WORD.fullmatch(text) and text.isprintable():
        return text
    return '"' + escaped(text.replace("\\", r"\\").replace('"', r"\"")) + '"'


def escaped(text: str) -> str:
    """Without what a terminal or a reader of lines would act on."""
    return text if text.isprintable() else "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _in_json(char: str) -> str:
    return char if char.isprintable() else json.dumps(char)[1:-1]

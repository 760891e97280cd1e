"""Log lines for machines (JSON) or for people. Ids, figures and causes; never a prompt, an answer or a secret."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any, Literal

from gateway.wire.jsontext import dumps

Format = Literal["auto", "text", "json"]

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


def configure(kind: Format, level: str) -> None:
    """Sends all logs of this process to stderr. `auto`: readable on a terminal, JSON elsewhere."""
    handler = logging.StreamHandler(sys.stderr)
    readable = kind == "text" or (kind == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextFormatter() if readable else JSONFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("asyncpg").setLevel(logging.CRITICAL)  # its reconnecting: our own lines say what is down
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, root.level))


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


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

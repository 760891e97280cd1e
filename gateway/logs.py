"""Log lines for machines (JSON) or for people. Ids, figures and causes; never a prompt, an answer or a secret."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Literal

from gateway.wire.jsontext import dumps

Format = Literal["auto", "text", "json"]


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
        return dumps(line).decode()


class TextFormatter(logging.Formatter):
    """One readable line; what came from outside is shown escaped."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        shown = " ".join(f"{key}={_word(value)}" for key, value in fields.items() if value is not None)
        message = record.getMessage().translate(_ESCAPES)
        text = f"{_utc(record.created)[11:19]} {record.levelname:<7} {message} {shown}".rstrip()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(32), 127, *range(128, 160), 0x2028, 0x2029)}


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
    text = str(value).translate(_ESCAPES)
    return f'"{text}"' if " " in text else text

"""Embeddings as the SDKs ask for them: numbers, or base64 of little-endian 32-bit floats (`encoding_format`)."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping
from typing import Any

from gateway.wire import WireError
from gateway.wire.jsontext import dumps


def to_base64(numbers: list[float]) -> str:
    """Raises WireError for what no 32-bit float holds."""
    try:
        return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
    except (struct.error, OverflowError) as failure:
        raise WireError(f"an embedding holds what is no number: {failure}") from None


def to_numbers(text: str) -> list[float]:
    """Raises WireError."""
    try:
        packed = base64.b64decode(text, validate=True)
        return list(struct.unpack(f"<{len(packed) // 4}f", packed))
    except (ValueError, struct.error) as failure:
        raise WireError(f"an embedding is no base64 of floats: {failure}") from None


_FIRST = re.compile(rb'"embedding"\s*:\s*(["\[])')


def are_as_asked(body: bytes, encoding: object) -> bool:
    """By a look at the first one, for replies that are too large to be parsed for it."""
    if encoding not in (None, "float", "base64"):
        return True
    found = _FIRST.search(body, 0, 4096)
    return found is not None and (found[1] == b'"') == (encoding == "base64")


def as_asked(body: bytes, data: Mapping[str, Any], encoding: object) -> bytes:
    """The reply `body`, which parses to `data`, with its embeddings in the encoding that was asked for. A server that
    did so itself gets its bytes through as they are, and so does one that knows encodings of its own."""
    if encoding not in (None, "float", "base64"):
        return body
    wanted = str if encoding == "base64" else list
    entries = data.get("data")
    if not isinstance(entries, list) or all(isinstance(_embedding(entry), wanted) for entry in entries):
        return body
    turned = [
        entry if isinstance(_embedding(entry), wanted) else {**entry, "embedding": _turned(_embedding(entry))}
        for entry in entries
        if isinstance(entry, dict)
    ]
    return dumps({**data, "data": turned})


def _embedding(entry: object) -> object:
    return entry.get("embedding") if isinstance(entry, dict) else None


def _turned(value: object) -> object:
    if isinstance(value, str):
        return to_numbers(value)
    if isinstance(value, list):
        return to_base64(value)
    raise WireError("an entry of the list has no embedding")

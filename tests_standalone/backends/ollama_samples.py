"""What Ollama sends, by name: streams of lines, and the same as one whole reply."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests_standalone import wire_samples

FOLDER = Path(wire_samples.__file__).parent


def sample(name: str) -> bytes:
    return (FOLDER / f"ollama_{name}.ndjson").read_bytes()


def counting() -> Callable[[str], str]:
    """Ids that can be foretold."""
    made: Counter[str] = Counter()

    def new_id(prefix: str) -> str:
        made[prefix] += 1
        return f"{prefix}{made[prefix]}"

    return new_id


def as_one(stream: bytes) -> bytes:
    """The lines of a stream, put together as `stream: false` would have sent them."""
    lines = [json.loads(line) for line in stream.split(b"\n") if line.strip()]
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for line in lines:
        for key, value in line["message"].items():
            if key != "role":
                message[key] = message[key] + value if key in message else value
    return json.dumps(lines[-1] | {"message": message}).encode()

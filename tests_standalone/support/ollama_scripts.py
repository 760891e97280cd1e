"""What the scripted Ollama's models do, by name, and the values it answers with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]

CREATED_AT = "2026-03-01T12:00:00.123456789Z"
IMAGE_TOKENS = 85
LOAD_NS = 1_500_000_000
TOKEN_NS = 10_000_000


@dataclass(frozen=True)
class OllamaScript:
    """One model. Delays are seconds; `after` counts lines that leave before `then` happens."""

    capabilities: tuple[str, ...] = ("completion", "tools", "vision", "insert")
    answer: str | None = None
    """None: `You said: ` and the last user message."""
    thinking: str = ""
    calls: tuple[Json, ...] = ()
    call_ids: bool = True
    done_reason: str = "stop"
    counts: bool = True
    load_delay: float = 0
    """Before the first byte of the call that finds it not loaded."""
    delay: float = 0
    """Between lines."""
    after: int = 3
    then: Literal["error", "cut", "no-done", "garbage", "hang"] | None = None
    status: int = 200
    error: str = ""

    def with_(self, **changes: Any) -> OllamaScript:
        return dataclasses.replace(self, **changes)


WEATHER = {"name": "get_weather", "arguments": {"city": "Paris", "days": 2, "exact": True}}
TIME = {"name": "get_time", "arguments": {}}
THINKS = ("completion", "tools", "thinking")

SCRIPTS: dict[str, OllamaScript] = {
    "llama3.1:8b": OllamaScript(),
    "odd:latest": OllamaScript(answer='a < b & c > d "é" 👩‍💻 \u2028 end'),
    "tools:latest": OllamaScript(calls=(WEATHER,)),
    "parallel-tools:latest": OllamaScript(calls=(WEATHER, TIME), answer="Let me look. "),
    "tools-without-ids:latest": OllamaScript(calls=(WEATHER,), call_ids=False),
    "no-tools:latest": OllamaScript(capabilities=("completion",)),
    "thinker:latest": OllamaScript(capabilities=THINKS, thinking="First I think. ", answer="Then I answer."),
    "length:latest": OllamaScript(done_reason="length"),
    "no-counts:latest": OllamaScript(counts=False),
    "cold:latest": OllamaScript(load_delay=0.4),
    "slow:latest": OllamaScript(answer="word " * 200, delay=0.02),
    "error-mid-stream:latest": OllamaScript(then="error", error="an error was encountered while running the model"),
    "cut:latest": OllamaScript(then="cut"),
    "no-done:latest": OllamaScript(then="no-done"),
    "garbage:latest": OllamaScript(then="garbage"),
    "hang:latest": OllamaScript(then="hang"),
    "error-400:latest": OllamaScript(status=400, error="the input length exceeds the context length"),
    "error-401:latest": OllamaScript(status=401, error="unauthorized"),
    "error-500:latest": OllamaScript(status=500, error="llama runner process has terminated: exit status 2"),
    "queue-full:latest": OllamaScript(
        status=503, error="server busy, please try again.  maximum pending requests exceeded"
    ),
    "embedder:latest": OllamaScript(capabilities=("embedding",)),
}

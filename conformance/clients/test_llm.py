"""The command `llm`: once with its command for any endpoint, once with the gateway's models configured in it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Gateway

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
FUNCTION = 'def weather(city: str) -> str:\n    """The weather in a city."""\n    return f"sunny in {city}"\n'

LLM = Callable[..., str]


@pytest.fixture
def llm(gateway: Gateway, tmp_path: Path) -> LLM:
    """Runs it to its end, in a folder of its own that names three models of the gateway, and returns what it said."""
    models = [
        {
            "model_id": f"my-{name}",
            "model_name": name,
            "api_base": gateway.base_url,
            "api_key_name": "gateway",
            "supports_tools": True,
            "supports_schema": True,
            "vision": True,
        }
        for name in ("answer", "tools", "echo")
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))
    (tmp_path / "keys.json").write_text(json.dumps({"gateway": gateway.api_key}))

    def run(*arguments: str, stdin: str = "") -> str:
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
        done = subprocess.run(
            ["llm", *arguments], input=stdin, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_lists_models(gateway: Gateway, llm: LLM) -> None:
    listed = llm("openai", "endpoint", gateway.base_url, "--models", "--key", gateway.api_key)
    assert {"answer", "tools", "echo"} <= set(listed.split())


def test_prompts_any_endpoint(gateway: Gateway, llm: LLM) -> None:
    said = llm("openai", "endpoint", gateway.base_url, "-m", "answer", "--key", gateway.api_key, "hello there")
    assert said == "You said: hello there\n"


def test_streams(gateway: Gateway, llm: LLM) -> None:
    assert llm("-m", "my-answer", "hello there", "--usage") == "You said: hello there\n"
    assert [request["stream"] for request in gateway.upstream_requests()] == [True]
    logged = json.loads(llm("logs", "--json"))[0]
    assert (logged["input_tokens"], logged["output_tokens"]) == (2, 4)


def test_does_not_stream(gateway: Gateway, llm: LLM) -> None:
    assert llm("-m", "my-answer", "hello there", "--no-stream") == "You said: hello there\n"
    assert [request.get("stream", False) for request in gateway.upstream_requests()] == [False]


def test_built_in_model_answers(llm: LLM) -> None:
    assert llm("-m", "my-echo", "say this again") == "say this again\n"


def test_chat_sends_what_was_said(gateway: Gateway, llm: LLM) -> None:
    said = llm("chat", "-m", "my-answer", stdin="my first turn\nmy second turn\nexit\n")
    assert "You said: my first turn" in said
    assert "You said: my second turn" in said
    sent = [(message["role"], message["content"]) for message in gateway.upstream_requests()[-1]["messages"]]
    assert sent == [("user", "my first turn"), ("assistant", "You said: my first turn"), ("user", "my second turn")]


def test_prompt_continues_the_last_one(gateway: Gateway, llm: LLM) -> None:
    llm("-m", "my-answer", "how it began")
    assert llm("-c", "how it goes on") == "You said: how it goes on\n"
    assert len(gateway.upstream_requests()[-1]["messages"]) == 3


def test_chat_is_one_conversation(gateway: Gateway, llm: LLM) -> None:
    before = len(gateway.conversations())
    llm("chat", "-m", "my-answer", stdin="turn one\nturn two\nexit\n")
    stored = [("user", "turn one"), ("assistant", "You said: turn one")]
    stored += [("user", "turn two"), ("assistant", "You said: turn two")]
    assert gateway.conversations()[before:] == [stored]


def test_attaches_an_image(gateway: Gateway, llm: LLM, tmp_path: Path) -> None:
    image = tmp_path / "pixel.png"
    image.write_bytes(PIXEL)
    assert llm("-m", "my-answer", "what is this", "-a", str(image)) == "I see 1 image. You said: what is this\n"
    parts = gateway.upstream_requests()[-1]["messages"][-1]["content"]
    url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    assert base64.b64decode(url.removeprefix("data:image/png;base64,")) == PIXEL


def test_calls_a_function(gateway: Gateway, llm: LLM) -> None:
    assert llm("-m", "my-tools", "--functions", FUNCTION, "weather please") == "The tool said: sunny in city\n"
    roles = [message["role"] for message in gateway.upstream_requests()[-1]["messages"]]
    assert roles == ["user", "assistant", "tool"]


def test_answers_by_schema(gateway: Gateway, llm: LLM) -> None:
    answer = json.loads(llm("-m", "my-answer", "--schema", "name, age int", "a person"))
    assert answer == {"name": "name", "age": 1}
    assert gateway.upstream_requests()[-1]["response_format"]["type"] == "json_schema"


def test_error_is_told(gateway: Gateway, llm: LLM) -> None:
    with pytest.raises(AssertionError, match="does not exist"):
        llm("openai", "endpoint", gateway.base_url, "-m", "nobody-has-this", "--key", gateway.api_key, "hello")
    assert gateway.upstream_requests() == []

"""The suites: one row each. A suite says what it needs, and leaves its result as JUnit's XML."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance import environments
from conformance.stand import Stand, run
from tests_standalone.support.node import find_node

CLIENTS = environments.HERE / "clients"
RESULT = "result.xml"

# openai-python's cases for what the gateway serves. Those for speech would answer themselves (`plugins/unmocked.py`);
# with aiohttp they are skipped for that.
_SDK_FILES = (
    "chat/test_completions.py",
    "test_completions.py",
    "test_embeddings.py",
    "test_moderations.py",
    "test_images.py",
    "test_models.py",
    "audio/test_speech.py",
    "audio/test_transcriptions.py",
    "audio/test_translations.py",
)
_STORED = "test_messages or test_completions and (list or retrieve or update or delete)"
_SDK_CASES = f"not ({_STORED}) and not (test_speech and aiohttp)"
_STORED_FILES = ("chat/test_completions.py", "chat/completions/test_messages.py")


@dataclass(frozen=True)
class Suite:
    """`prepare` installs what it needs; `run` runs it and returns what it printed."""

    name: str
    prepare: Callable[[], object]
    run: Callable[[Stand], str]
    mock: bool = False


def _openai_python(plugin: str, cases: str, names: Sequence[str]) -> Callable[[Stand], str]:
    def run_cases(stand: Stand) -> str:
        sources = environments.sources("openai-python", "openai")
        files = [f"tests/api_resources/{name}" for name in names]
        python = environments.python_environment("openai-python")
        options = ["-p", plugin, "-o", "addopts=", "--tb=short", "--show-capture=no", "-k", cases]
        env = {"TEST_API_BASE_URL": stand.gateway.base_url, "PYTHONPATH": str(environments.HERE / "plugins")}
        return run(stand, [*_pytest(python, stand), *options, *files], env=env, folder=sources)

    return run_cases


def _in_python(environment: str, script: str) -> Callable[[Stand], str]:
    def run_script(stand: Stand) -> str:
        python = environments.python_environment(environment)
        options = ["-c", os.devnull, f"--rootdir={CLIENTS}", "-W", "error"]
        _, key = stand.gateway.create_key(user=environment)
        path = os.pathsep.join([str(python.parent), stand.environment.get("PATH", os.defpath)])
        env = {"GATEWAY_API_KEY": key, "PATH": path}
        return run(stand, [*_pytest(python, stand), *options, str(CLIENTS / script)], env=env)

    return run_script


def _in_node(script: str) -> Callable[[Stand], str]:
    def run_script(stand: Stand) -> str:
        folder = environments.node_packages()
        copied = shutil.copy(CLIENTS / script, folder)  # Node looks for packages where the script is
        result = stand.folder / RESULT
        reporters = ["--test-reporter=junit", f"--test-reporter-destination={result}"]
        _, key = stand.gateway.create_key(user="node")
        command = [str(find_node().binary), "--test", *reporters, str(copied)]
        return run(stand, command, env={"GATEWAY_API_KEY": key}, folder=folder)

    return run_script


def _pytest(python: Path, stand: Stand) -> list[str]:
    return [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={stand.folder / RESULT}"]


def _openai_sources() -> object:
    return environments.sources("openai-python", "openai")


SUITES: Sequence[Suite] = (
    Suite("openai-python", _openai_sources, _openai_python("unmocked", _SDK_CASES, _SDK_FILES), mock=True),
    Suite("openai-python-stored", _openai_sources, _openai_python("seeded", _STORED, _STORED_FILES)),
    Suite("llm", lambda: environments.python_environment("llm"), _in_python("llm", "test_llm.py")),
    Suite(
        "langchain", lambda: environments.python_environment("langchain"), _in_python("langchain", "test_langchain.py")
    ),
    Suite("vercel-ai", environments.node_packages, _in_node("vercel_ai.test.mjs"), mock=True),
)

"""The wheel in an empty folder: it carries its migrations and starts from site-packages."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests_standalone.support.gateway import ROOT, clean_environment, free_port
from tests_standalone.system.http import Answer, call, chat


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the unpacked wheel and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.startswith("dropin_gateway-")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
        assert "gateway/migrations/0001_initial.sql" in archive.namelist()
    return folder / "site"


async def test_an_installed_wheel_serves_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    port = free_port()
    environment = {**clean_environment(tmp_path), "PYTHONPATH": str(installed)}
    arguments = ["-P", "-m", "gateway", "serve", "--port", str(port)]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, cwd=tmp_path, env=environment)
    try:
        answer = await _answer(port)
        assert answer.json["choices"][0]["message"]["content"] == "hello there"
        assert (tmp_path / "data" / "gateway.db").exists()
    finally:
        process.terminate()
        assert await process.wait() == 0


async def test_gunicorns_way_of_making_the_application_works(tmp_path: Path) -> None:
    """`create_app()` without arguments under a server that is not ours."""
    port = free_port()
    environment = {**clean_environment(tmp_path), "GATEWAY__SERVER__LOG_LEVEL": "error"}
    arguments = ["-m", "uvicorn", "--factory", "gateway.app:create_app", "--port", str(port), "--log-level", "error"]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, cwd=tmp_path, env=environment)
    try:
        assert (await _answer(port)).status == 200
    finally:
        process.terminate()
        await process.wait()


async def _answer(port: int) -> Answer:
    while True:
        try:
            return await call(port, "POST", "/v1/chat/completions", body=chat("echo"))
        except OSError:
            await asyncio.sleep(0.05)


def test_the_version_needs_nothing_but_the_command_line() -> None:
    code = "import sys; from gateway.cli import main\ntry: main(['--version'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=dict(os.environ)
    )
    loaded = set(done.stdout.split())
    assert done.stdout.startswith("gateway ")
    assert not loaded & {"asyncio", "pydantic", "starlette", "tiktoken", "asyncpg", "uvicorn", "yaml"}

"""A backend type from a package of somebody else's, installed as users do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from tests_standalone.support.gateway import ROOT, GatewayProcess, clean_environment

EXAMPLE = ROOT / "examples" / "shouting_backend"
CONFIG = {"backends": {"loud": {"type": "shouting", "options": {"mark": "?!"}}}}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the example is installed, and nothing else."""
    folder = tmp_path_factory.mktemp("plugin")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--target", str(folder), str(EXAMPLE)], check=True, cwd=folder)
    return folder


async def test_an_installed_type_is_one_like_any_other(site: Path) -> None:
    async with (
        GatewayProcess(CONFIG, env={"PYTHONPATH": f"{site}:{ROOT}"}) as gateway,
        AsyncOpenAI(base_url=gateway.base_url, api_key="any", max_retries=0) as client,
    ):
        assert [model.id async for model in client.models.list()] == ["shout"]
        question = {"role": "user", "content": "is this loud"}
        whole = await client.chat.completions.create(model="shout", messages=[question])  # type: ignore[list-item]
        assert whole.choices[0].message.content == "IS THIS LOUD?!"
        stream = await client.chat.completions.create(model="loud/shout", messages=[question], stream=True)  # type: ignore[list-item]
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "IS THIS LOUD?! "
        assert chunks[-1].choices[0].finish_reason == "stop"
        rows = gateway.query("SELECT backend, upstream_model, counted_by, status FROM usage_view")
        assert [tuple(row.values()) for row in rows] == [("loud", "shout", "gateway", "ok")] * 2


def test_a_type_that_is_not_installed_is_a_mistake_that_names_the_others(tmp_path: Path, site: Path) -> None:
    (tmp_path / "config.yaml").write_text("backends: {loud: {type: shoutin}}")
    environment = {**clean_environment(tmp_path), "PYTHONPATH": f"{site}:{ROOT}"}
    command = [sys.executable, "-m", "gateway", "check-config"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "backends.loud.type" in done.stderr + done.stdout
    assert "shouting" in done.stderr + done.stdout


def test_a_package_that_cannot_make_its_backend_ends_the_start_with_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "site" / "broken_backend-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-backend\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[gateway.backends]\nbroken = broken_backend:make\n")
    (folder.parent / "broken_backend.py").write_text("def make(*_): raise ValueError('no region was given')\n")
    (tmp_path / "config.yaml").write_text("backends: {mine: {type: broken}}\nserver: {port: 0}\n")
    environment = {**clean_environment(tmp_path), "PYTHONPATH": f"{folder.parent}:{ROOT}"}
    command = [sys.executable, "-m", "gateway", "serve"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    told = [line for line in (done.stdout + done.stderr).splitlines() if "backends.mine" in line]
    assert len(told) == 1
    assert "ValueError: no region was given" in told[0]
    assert "Traceback" not in done.stdout + done.stderr

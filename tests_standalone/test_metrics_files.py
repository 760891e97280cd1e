"""Workers that count in one folder: how it is made, what stays of them in it, what goes."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from gateway.errors import ConfigError
from gateway.ledger import Ledger
from gateway.metrics import Metrics
from gateway.metrics_files import FOLDER, prepare
from tests_standalone.conftest import opened, usage_row
from tests_standalone.support.databases import in_processes, sqlite_url
from tests_standalone.support.gateway import ROOT
from tests_standalone.test_metrics import CHAT, Numbers, all_public, numbers


def in_a_process(source: str, environment: Mapping[str, str] | None = None) -> str:
    """What a Python of its own prints."""
    kept = {name: value for name, value in os.environ.items() if name != FOLDER}
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, env=kept | dict(environment or {}), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_one_worker_needs_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "")
    prepare(1)
    assert FOLDER not in os.environ


def test_the_folder_is_private_and_goes_with_the_process_that_made_it() -> None:
    source = f"""
import os
from gateway.metrics import prepare
prepare(2)
folder = os.environ["{FOLDER}"]
if not os.fork():
    raise SystemExit
os.wait()
print(folder, oct(os.stat(folder).st_mode), end="")
"""
    folder, mode = in_a_process(source).split()
    assert stat.S_IMODE(int(mode, 8)) == 0o700
    assert not Path(folder).exists()


def test_a_folder_whose_maker_was_killed_goes_when_the_next_gateway_starts() -> None:
    source = f"""
import os, sys
from gateway.metrics import prepare
prepare(2)
print(os.environ["{FOLDER}"], flush=True)
sys.stdin.read()
"""
    with (
        subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stdin=PIPE, stdout=PIPE, text=True) as killed,
        subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stdin=PIPE, stdout=PIPE, text=True) as living,
    ):
        assert killed.stdout is not None
        assert living.stdout is not None
        left, kept = Path(killed.stdout.readline().strip()), Path(living.stdout.readline().strip())
        killed.kill()
        killed.wait()
        assert left.is_dir()
        in_a_process("from gateway.metrics import prepare; prepare(2)")
        assert not left.exists()
        assert kept.is_dir()
    assert not kept.exists()


def test_a_folder_that_is_named_is_made_and_stays(tmp_path: Path) -> None:
    named = str(tmp_path / "a" / "b")
    in_a_process("from gateway.metrics import prepare; prepare(1)", {FOLDER: named})
    assert Path(named).is_dir()


def test_a_folder_of_another_gateway_is_left_to_it(tmp_path: Path) -> None:
    """As a gunicorn inherits it that another one has started to take its place."""
    source = f"from gateway.metrics import prepare; import os; prepare(2); print(os.environ['{FOLDER}'], end='')"
    made = in_a_process(source, {FOLDER: str(tmp_path / "gateway-metrics-of-another")})
    assert Path(made).name.startswith("gateway-metrics-")
    assert Path(made).name != "gateway-metrics-of-another"


def test_a_folder_that_cannot_be_made_is_a_mistake_in_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(FOLDER, str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=FOLDER):
        prepare(2)


def test_nor_may_it_be_one_that_takes_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "/proc/self")
    with pytest.raises(ConfigError, match=FOLDER):
        prepare(2)


async def test_a_worker_whose_folder_takes_no_file_counts_for_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(FOLDER, "/proc/self")
    metrics = Metrics(lambda name: True, "1")
    metrics.request_ended("/v1/models", "GET", 200, 0.1)
    assert b'gateway_requests_total{method="GET",route="/v1/models",status="200"} 1.0' in (await metrics.render())[0]
    assert "/proc/self" in caplog.text


def test_the_library_waits_until_it_is_needed() -> None:
    source = """
import asyncio, sys, gateway.cli
from gateway.metrics import Metrics
async def count():
    Metrics(str, "1").request_ended("/", "GET", 200, 1)
asyncio.run(count())
print('prometheus_client' in sys.modules, end='')
"""
    assert in_a_process(source) == "False"


def work(number: int, folder: str, database_url: str, requests: int) -> dict[Any, float]:
    """A worker that counts, leaves a request unfinished, and is asked."""
    os.environ[FOLDER] = folder

    async def run() -> Numbers:
        metrics = Metrics(all_public, "1")
        async with opened(database_url) as database:
            metrics.watch(database, Ledger(database))
            for _ in range(requests):
                metrics.request_begun()
                metrics.attempt_ended(usage_row())
                metrics.request_ended(CHAT, "POST", 200, 0.1)
            metrics.request_begun()
            found = await numbers(metrics)
            metrics.close()
            return found

    return dict(asyncio.run(run()))


def test_totals_outlive_workers_and_gauges_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    for generation in range(1, 4):
        in_processes(3, work, str(folder), sqlite_url(tmp_path), 10)
        assert len(list(folder.glob("*.lock"))) <= 4, "places of the dead are taken again"
        (found,) = in_processes(1, work, str(folder), sqlite_url(tmp_path), 0)
        assert found["requests_total", frozenset({"route": CHAT, "method": "POST", "status": "200"}.items())] == (
            30 * generation
        )
        assert found["tokens_total", frozenset({"backend": "b", "model": "m", "kind": "input"}.items())] == (
            300 * generation
        )
        assert found["request_duration_seconds_count", frozenset({("route", CHAT)})] == 30 * generation
        assert found["requests_in_progress", frozenset()] == 1, "its own"
        assert found["build_info", frozenset({("version", "1")})] == 1


def test_a_file_that_a_worker_died_over_is_no_obstacle(tmp_path: Path) -> None:
    """Nor is somebody else's, here the database, nor a place that has no files yet."""
    for name in ("0.totals", "0.gauges", "7.lock", "7.totals", "8.lock"):
        (tmp_path / name).touch()
    (found,) = in_processes(1, work, str(tmp_path), sqlite_url(tmp_path), 2)
    assert sum(value for (name, _), value in found.items() if name == "requests_total") == 2


def test_what_a_worker_counts_is_told_at_once_by_others(tmp_path: Path) -> None:
    """And stays if it is killed, while its gauges go."""
    source = """
import asyncio, sys
from gateway.metrics import Metrics
async def count():
    metrics = Metrics(str, "1.0")
    for line in sys.stdin:
        metrics.request_ended("/", "GET", 200, 1)
        print("counted", flush=True)
asyncio.run(count())
"""
    environment = os.environ | {FOLDER: str(tmp_path)}
    version = ("build_info", frozenset({("version", "1.0")}))
    with subprocess.Popen(
        [sys.executable, "-c", source], cwd=ROOT, env=environment, stdin=PIPE, stdout=PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        for _ in range(3):
            other.stdin.write("\n")
            other.stdin.flush()
            other.stdout.readline()
        (found,) = in_processes(1, work, str(tmp_path), sqlite_url(tmp_path), 0)
        assert found["request_duration_seconds_count", frozenset({("route", "/")})] == 3
        assert found[version] == 1
        other.kill()
    (found,) = in_processes(1, work, str(tmp_path), sqlite_url(tmp_path), 0)
    assert found["request_duration_seconds_count", frozenset({("route", "/")})] == 3
    assert version not in found

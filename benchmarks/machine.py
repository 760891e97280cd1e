"""Where a measurement was made, with what, and when: in words, for those who compare."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.processes import ROOT
from benchmarks.stats import median

_LIBRARIES = ("uvloop", "httptools", "uvicorn", "orjson", "asyncpg")


def about() -> dict[str, str]:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{_cpu_model()}, {os.cpu_count()} cores, Linux {platform.release().partition('-')[0]}",
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "small write to disk": f"{_sync_seconds() * 1000:.2f} ms",
        "python": platform.python_version(),
    }


def libraries() -> str:
    """Those that the gateway's figures hang on."""
    return ", ".join(f"{name} {found}" for name in _LIBRARIES if (found := _version(name)))


def commit() -> str | None:
    """Of this checkout, with a plus sign if it holds more than that."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty=+"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _sync_seconds() -> float:
    """8 KiB and fdatasync: what every durable commit waits for at least, where PostgreSQL will have its files."""
    with tempfile.TemporaryFile() as file:
        times = []
        for _ in range(100):
            began = time.perf_counter()
            os.pwrite(file.fileno(), b"x" * 8192, 0)
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return median(times)

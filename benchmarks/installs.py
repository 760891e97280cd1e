"""Environments for what is measured from the outside: peers, and this gateway as its users install it.

One folder each below `build/peers`, made once by pip or npm as the user has configured them, and again when its pins
change. Nothing here runs unless a peer was asked for. What goes wrong is told on stderr as it was printed; into results
goes no more than that it did.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.processes import ROOT
from tests_standalone.support.node import find_node

FOLDER = ROOT / "build" / "peers"


class NotInstalled(Exception):
    """Says why in one line."""


def python_packages(name: str, *requirements: str, fresh: bool = False, within: Path = FOLDER) -> Path:
    """A virtual environment that holds these, and not even pip besides. `fresh`: made again though it is there."""
    folder = within / name

    def make() -> None:
        if importlib.util.find_spec("pip") is None:
            raise NotInstalled(f"{name} is not installed: this Python has no pip")
        _call(name, [sys.executable, "-m", "venv", "--without-pip", str(folder)])
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
        _call(name, [*pip, "install", "--quiet", *requirements])

    _once(folder, [*requirements, f"{sys.version_info.major}.{sys.version_info.minor}"], make, fresh)
    return folder


def node_packages(name: str, packages: Mapping[str, str], overrides: Mapping[str, str], within: Path = FOLDER) -> Path:
    """A folder with `node_modules`. `overrides` are versions of packages that these need themselves."""
    folder = within / name
    wanted = json.dumps({"private": True, "dependencies": packages, "overrides": overrides})

    def make() -> None:
        try:
            node = find_node()
        except RuntimeError as failure:
            raise NotInstalled(f"{name} is not installed: there is no Node that is new enough, with npm") from failure
        (folder / "package.json").write_text(wanted)
        quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        _call(name, [*node.npm, "install", *quiet], folder, {"PATH": node.path})

    _once(folder, [wanted], make)
    return folder


@functools.cache
def this_gateway() -> Path:
    """A virtual environment with this checkout's wheel, without extras: made afresh, once for each run."""
    return python_packages("gateway", str(ROOT), fresh=True)


def megabytes(folder: Path) -> float:
    """What the files of an environment take, in millions of bytes. The interpreter is not among them."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()) / 1e6


def _once(folder: Path, pins: Sequence[str], make: Callable[[], None], fresh: bool = False) -> None:
    """Fills an empty folder, unless it was filled from the same pins."""
    wanted = hashlib.sha256("\n".join(pins).encode()).hexdigest()
    stamp = folder / ".installed"
    if stamp.exists() and stamp.read_text() == wanted and not fresh:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{folder.name}: installing", file=sys.stderr, flush=True)
    make()
    stamp.write_text(wanted)


def _call(
    name: str, command: Sequence[str], folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> None:
    """With the whole environment of the user: it holds how package registries are reached."""
    more = environment or {}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **more}, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr, flush=True)
        raise NotInstalled(f"{name} is not installed: its installation failed")

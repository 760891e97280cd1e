"""What the suites run in: virtual environments, an SDK's sources, a folder of Node packages.

Everything is made once, in `.conformance` of the checkout, by pip and npm as the user has configured them; again
whenever its pins change. The pins are `requirements/*.txt`, `package.json` and its lock file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests_standalone.support.node import find_node

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".conformance"


def python_environment(name: str) -> Path:
    """The Python that has what `requirements/NAME.txt` says."""
    pins = HERE / "requirements" / f"{name}.txt"
    folder = CACHE / name

    def make() -> None:
        print(f"installing {name} ...", flush=True)
        _call([sys.executable, "-m", "venv", str(folder / "venv")])
        _call([str(_python(folder)), "-m", "pip", "install", "--quiet", "--requirement", str(pins)])

    _once(folder, [pins], make)
    return _python(folder)


def sources(name: str, package: str) -> Path:
    """The unpacked source distribution of a package, in the version that `requirements/NAME.txt` names."""
    pins = HERE / "requirements" / f"{name}.txt"
    found = re.search(rf"^{re.escape(package)}(?:\[[^]]*])?==(\S+)", pins.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{pins.name} does not pin {package}")
    folder = CACHE / f"{name}-sources"
    python = python_environment(name)

    def make() -> None:
        wanted = [f"{package}=={found[1]}", "--no-deps", "--no-binary", package, "--dest", str(folder)]
        _call([str(python), "-m", "pip", "download", "--quiet", *wanted])
        archive = next(folder.glob("*.tar.gz"))
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")

    _once(folder, [pins], make)
    return folder / f"{package}-{found[1]}"


def node_packages() -> Path:
    """A folder whose `node_modules` is what `package-lock.json` says."""
    pins = [HERE / "package.json", HERE / "package-lock.json"]
    folder = CACHE / "node"
    node = find_node()

    def make() -> None:
        print("installing Node packages ...", flush=True)
        for file in pins:
            shutil.copy(file, folder)
        quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        _call([*node.npm, "ci", *quiet], folder=folder, path=node.path)

    _once(folder, pins, make)
    return folder


def _python(folder: Path) -> Path:
    return folder / "venv" / "bin" / "python"


def _once(folder: Path, pins: Sequence[Path], make: Callable[[], None]) -> None:
    """Fills an empty folder, unless it was filled from the same pins by the same Python. Runs side by side wait."""
    read = b"".join(file.read_bytes() for file in pins)
    wanted = f"{hashlib.sha256(read).hexdigest()} {sys.version_info.major}.{sys.version_info.minor}"
    stamp = folder / ".installed"
    with _turn(folder):
        if stamp.exists() and stamp.read_text() == wanted:
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make()
        stamp.write_text(wanted)


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    with (CACHE / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _call(command: Sequence[str], *, folder: Path | None = None, path: str | None = None) -> None:
    """With the whole environment: it holds how the user reaches the package registries."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **({"PATH": path} if path else {})}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}")

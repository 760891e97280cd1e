"""The folder in which the workers of a host keep their numbers, so that any of them can tell those of all.

Rules:

- The files of a worker bear the number of a place, which it holds by a lock as long as it lives: `3.lock`, `3.totals`,
  `3.gauges`. The next one to take the place counts on from there. So totals never go down, and there are never more
  files than workers at one time.
- Gauges of a place that nobody holds are nobody's: they are not read, and whoever takes the place begins anew.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator

from gateway.errors import ConfigError
from gateway.metrics_numbers import Rows

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The name is the one that prometheus_client has made known."""

_MEMORY = "/dev/shm"
_PREFIX = "gateway-metrics-"
_MAKER = "maker"


def prepare(workers: int) -> None:
    """Before workers are started, in the process that starts them: makes the folder that they share, which goes when
    this process ends. A folder that the environment names is taken as it is, unless it is another gateway's, from
    whom we have inherited the environment. Raises ConfigError."""
    given = os.environ.get(FOLDER)
    try:
        if given and not os.path.basename(given).startswith(_PREFIX):
            os.makedirs(given, mode=0o700, exist_ok=True)
        elif workers > 1 and os.name == "posix":
            in_memory = os.path.isdir(_MEMORY) and os.access(_MEMORY, os.W_OK | os.X_OK)
            os.environ[FOLDER] = _make_folder(_MEMORY if in_memory else tempfile.gettempdir())
        else:
            os.environ.pop(FOLDER, None)
        if os.environ.get(FOLDER):
            with tempfile.TemporaryFile(dir=os.environ[FOLDER]):
                pass
    except OSError as failure:
        raise ConfigError(
            [f"{FOLDER}: the workers need a folder for their metrics, and none can be made ({failure.strerror})"]
        ) from None


def take_place(folder: str) -> tuple[Rows, Rows]:
    """Totals and gauges of a place of our own. It is ours until this process ends, however it ends."""
    os.makedirs(folder, mode=0o700, exist_ok=True)
    place = next(place for place in itertools.count() if _lock(os.path.join(folder, f"{place}.lock")) is not None)
    totals = os.open(os.path.join(folder, f"{place}.totals"), os.O_RDWR | os.O_CREAT, 0o600)
    gauges = os.open(os.path.join(folder, f"{place}.gauges"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    return Rows(totals), Rows(gauges)


def read_all(folder: str) -> Iterator[bytes]:
    """The rows of all places, and the gauges of those that somebody holds."""
    for lock in glob.glob(os.path.join(glob.escape(folder), "*.lock")):
        place = lock.removesuffix(".lock")
        with contextlib.suppress(FileNotFoundError):  # a worker has just taken it
            yield _read(f"{place}.totals")
            if _is_held(lock):
                yield _read(f"{place}.gauges")


def _make_folder(parent: str) -> str:
    """A new one. It goes when this process ends, or, if that was killed, when the next gateway starts."""
    for left in glob.glob(os.path.join(glob.escape(parent), f"{_PREFIX}*", _MAKER)):
        with contextlib.suppress(OSError):  # another user's
            lock = _lock(left)
            if lock is not None:
                shutil.rmtree(os.path.dirname(left), ignore_errors=True)
                os.close(lock)
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
    _lock(os.path.join(folder, _MAKER))  # as long as we live
    atexit.register(_remove, folder, os.getpid())
    return folder


def _lock(file: str) -> int | None:
    """An open file that nobody else has locked, or None."""
    import fcntl

    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _is_held(file: str) -> bool:
    """Asked by a lock that others who ask can have too."""
    import fcntl

    lock = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _read(file: str) -> bytes:
    with open(file, "rb") as opened:
        return opened.read()


def _remove(folder: str, maker: int) -> None:
    if os.getpid() == maker:  # a forked worker has inherited the duty, not the right
        shutil.rmtree(folder, ignore_errors=True)

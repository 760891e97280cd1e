"""The folder in which the workers of a host keep their numbers, so that any of them can tell those of all.

Rules:

- prometheus_client decides how it keeps values when it is imported, by the environment: hence imports in functions.
- The files of a worker bear the number of a place, which it holds by a lock as long as it lives. The next one to take
  the place counts on from there. So totals never go down, and there are never more files than workers at one time.
- Gauges of a place that nobody holds are dropped by whoever is asked next.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gateway.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import Metric

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The name is prometheus_client's."""

_MEMORY = "/dev/shm"
_PREFIX = "gateway-metrics-"
_MAKER = "maker"
_FILE = re.compile(r"(counter|gauge|histogram)_.+\.db")


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
    except OSError as failure:
        raise ConfigError(
            [f"{FOLDER}: the workers need a folder for their metrics, and none can be made ({failure.strerror})"]
        ) from None


def worker_gone(pid: int) -> None:
    """A worker has ended: its gauges go at once, its totals stay. Nobody has to call it, for whoever is asked next
    sees to it by himself, whatever the pid."""
    folder = os.environ.get(FOLDER)
    if folder:
        _forget_the_dead(folder)


def write_into(folder: str) -> None:
    """From now on values are made in the files of a place of our own."""
    from prometheus_client import values

    os.makedirs(folder, mode=0o700, exist_ok=True)
    place = _take_place(folder)
    values.ValueClass = values.MultiProcessValue(lambda: place)  # type: ignore[no-untyped-call]


class Files:
    """The numbers of all workers, as a collector."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.multiprocess import MultiProcessCollector

        _forget_the_dead(self._folder)
        return MultiProcessCollector.merge(_written(self._folder))  # type: ignore[no-any-return, no-untyped-call]


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


def _take_place(folder: str) -> int:
    """The first that nobody holds. It is held until this process ends, however it ends."""
    from prometheus_client.multiprocess import mark_process_dead

    for place in itertools.count():
        if _lock(os.path.join(folder, f"{place}.lock")) is not None:
            mark_process_dead(place, folder)  # type: ignore[no-untyped-call]
            break
    return place


def _forget_the_dead(folder: str) -> None:
    from prometheus_client.multiprocess import mark_process_dead

    for file in glob.glob(os.path.join(glob.escape(folder), "*.lock")):
        lock = _lock(file)
        if lock is not None:
            try:
                mark_process_dead(os.path.basename(file).removesuffix(".lock"), folder)  # type: ignore[no-untyped-call]
            finally:
                os.close(lock)


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


def _written(folder: str) -> list[str]:
    """Without those that a worker has just made, or died over: the library cannot read an empty file."""
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if _FILE.fullmatch(entry.name) and _size(entry)]


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # gauges of a worker that is gone
        return 0


def _remove(folder: str, maker: int) -> None:
    if os.getpid() == maker:  # a forked worker has inherited the duty, not the right
        shutil.rmtree(folder, ignore_errors=True)

"""Processes as /proc shows them: what a whole tree has used of CPU and memory; and children that never outlive us."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
ROOT = Path(__file__).resolve().parents[1]


def cpu_seconds(roots: Iterable[int]) -> float:
    """User and system time of these processes and all their descendants, ended ones that were waited for included."""
    return sum(sum(map(int, _stat(pid)[11:15])) for pid in tree(roots)) / _TICK


def resident_bytes(roots: Iterable[int]) -> int:
    """Memory of the tree that is in RAM. Pages that processes share are counted for each of them."""
    return sum(_resident_pages(pid) for pid in tree(roots)) * _PAGE


def busy_seconds() -> float:
    """CPU time of the whole machine, idle and waiting time left out."""
    fields = Path("/proc/stat").read_text().partition("\n")[0].split()
    user, nice, system, _idle, _waiting, irq, soft_irq = map(int, fields[1:8])
    return (user + nice + system + irq + soft_irq) / _TICK


def tree(roots: Iterable[int]) -> list[int]:
    """These processes and their descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int(_stat(int(folder.name))[1])
    found = [pid for pid in dict.fromkeys(roots) if pid in parents]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid and child not in found]
    return found


@contextlib.contextmanager
def child(
    command: Sequence[str],
    *,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own group that is ended when we leave. Its stdin stays open for as long as we live.

    What it prints is for us to read, or goes into `log`, errors too.
    """
    with contextlib.ExitStack() as stack:
        output = subprocess.PIPE if log is None else stack.enter_context(log.open("ab"))
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=None if log is None else subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of this checkout."""
    return [sys.executable, "-m", name, *arguments]


def _stat(pid: int) -> list[str]:
    """The fields after the name: state, parent, ...; the four times are at 11 to 14."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["X", *["0"] * 40]  # it has just ended


def _resident_pages(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0

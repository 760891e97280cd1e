"""Processes that use what they are told to, and what /proc says of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.processes import child, cpu_seconds, resident_bytes, tree

BURN = """
import time
held = b"x" * 50_000_000
while time.process_time() < 0.3:
    pass
print("burnt", flush=True)
input()
"""


def test_cpu_time_and_memory_are_those_of_a_whole_tree() -> None:
    outer = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"burnt\n"

        assert len(tree([process.pid])) == 2
        assert cpu_seconds([process.pid]) >= 0.28
        assert resident_bytes([process.pid]) > 50_000_000
        process.communicate(b"\n")


def test_the_cpu_time_of_a_child_that_has_ended_is_not_lost() -> None:
    outer = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}], input=b'\\n')\ninput()"
    with subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"burnt\n"
        while len(tree([process.pid])) > 1:
            pass

        assert cpu_seconds([process.pid]) >= 0.28
        process.communicate(b"\n")


def test_what_a_child_prints_goes_into_its_log(tmp_path: Path) -> None:
    script = "import os, sys\nprint(os.getcwd(), os.environ['GIVEN'], flush=True)\nsys.exit('the end')"
    log = tmp_path / "log"
    with child([sys.executable, "-c", script], folder=tmp_path, environment={"GIVEN": "x"}, log=log) as process:
        process.wait()

    assert log.read_text() == f"{tmp_path} x\nthe end\n"

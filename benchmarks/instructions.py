"""How many machine instructions a call costs the gateway, counted by valgrind's callgrind: a figure that is the same in
a slow hour of a shared machine as in a fast one, so that small steps can be told apart.

The gateway runs about thirty times slower meanwhile; the upstream's chunks still come in a read each where one stream
runs at a time. System calls count as the instructions that lead to them.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks import samples
from benchmarks.contestants import Gateway, contestants
from benchmarks.course import Mock, say_to_stderr
from benchmarks.tables import number, table

EVENTS = ("Ir", "I1mr", "D1mr")
CACHES = ("--I1=32768,8,64", "--D1=32768,8,64", "--LL=1048576,8,64")
"""Of one core of a server."""


class Course(NamedTuple):
    """So many calls, `at_once` of them."""

    title: str
    stream: bool
    at_once: int
    calls: int


COURSES = (
    Course("an answer, 1 connection", stream=False, at_once=1, calls=100),
    Course("an answer, 16 connections", stream=False, at_once=16, calls=480),
    Course("a stream, 1 connection", stream=True, at_once=1, calls=20),
)


class Counted(NamedTuple):
    """Per call: instructions, and what the first caches of one core would have missed."""

    instructions: float
    misses: float
    data_misses: float


def main(names: list[str], mock: Mock) -> str:
    """A page of what each of these configurations of the gateway takes. Raises SystemExit without valgrind."""
    if shutil.which("valgrind") is None:
        raise SystemExit("--instructions needs the program valgrind (Debian's package of that name)")
    gateways = {one.name: one for one in contestants() if isinstance(one, Gateway)}
    if unknown := set(names) - set(gateways):
        raise SystemExit(f"--instructions counts gateways only, not {', '.join(sorted(unknown))}")
    rows = []
    for name in names:
        say = say_to_stderr(name)
        for course, counted in zip(COURSES, count(gateways[name], mock, COURSES), strict=True):
            say(f"{course.title}: {counted.instructions:,.0f} instructions")
            rows.append([name, course.title, *(number(figure) for figure in counted)])
    return table(["", "", "instructions", "missed, instructions", "missed, data"], rows)


def count(gateway: Gateway, mock: Mock, courses: tuple[Course, ...]) -> list[Counted]:
    """Each course is run twice, and counted the second time."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--cache-sim=yes", *CACHES]
        slow = replace(gateway, under=(*tool, f"--callgrind-out-file={out}"))
        found = []
        with slow.running(mock.port) as running:
            (pid,) = running.processes["self"]
            for place, course in enumerate(courses, 1):
                request = samples.request(running.port, running.key, stream=course.stream)
                asyncio.run(_ask(running.port, request, course))
                _control(pid, "--instr=on")
                asyncio.run(_ask(running.port, request, course))
                _control(pid, "--instr=off")
                _control(pid, "--dump")
                found.append(read(Path(f"{out}.{place}").read_text(), course.calls))
    return found


def _control(pid: int, what: str) -> None:
    subprocess.run(["callgrind_control", what, str(pid)], check=True, capture_output=True)


def read(dump: str, calls: int) -> Counted:
    """What callgrind has written down of so many calls."""
    lines = (line.partition(": ") for line in dump.splitlines())
    told = {name: text.split() for name, _, text in lines if name in ("events", "totals")}
    totals = dict(zip(told["events"], map(int, told["totals"]), strict=True))
    return Counted(*(totals[event] / calls for event in EVENTS))


async def _ask(port: int, request: bytes, course: Course) -> None:
    each, rest = divmod(course.calls, course.at_once)
    assert not rest
    await asyncio.gather(*(_connection(port, request, each) for _ in range(course.at_once)))


async def _connection(port: int, request: bytes, calls: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(calls):
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in head:
            raise RuntimeError(head.decode())
        if length := head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]:
            await reader.readexactly(int(length))
        else:
            await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()

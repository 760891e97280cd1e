"""Ids that nobody can foretell and nobody gives twice."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from gateway.ids import ordered_hex, random_hex
from tests_standalone.support.gateway import ROOT


def test_they_have_128_bits() -> None:
    assert re.fullmatch("[0-9a-f]{32}", random_hex())


def test_ordered_ones_say_when_they_were_made() -> None:
    before = time.time_ns() // 1_000_000
    made = ordered_hex()
    assert re.fullmatch("[0-9a-f]{44}", made)
    assert before <= int(made[:12], 16) <= time.time_ns() // 1_000_000


def test_ordered_ones_of_one_millisecond_differ() -> None:
    assert len({ordered_hex() for _ in range(10_000)}) == 10_000


def test_none_comes_twice_whoever_asks() -> None:
    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(random_hex) for _ in range(10_000)]
    assert len({each.result() for each in found}) == 10_000


_FORK = """
import os
from gateway.ids import random_hex
random_hex()  # the parent has some in store
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, random_hex().encode())
    os._exit(0)
print(os.read(reader, 100).decode(), *[random_hex() for _ in range(200)])
"""


def test_a_child_gets_none_of_its_parents() -> None:
    done = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, check=True, cwd=ROOT)
    theirs, *ours = done.stdout.split()
    assert theirs not in ours

"""The count of machine instructions; valgrind itself is not needed here."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import main
from benchmarks.instructions import Counted, read

DUMP = """\
version: 1
events: Ir Dr Dw I1mr D1mr D1mw
summary: 0

fn=(1) main
16 400 100 50 8 4 2
totals: 3000 900 400 60 30 20
"""


def test_a_dump_is_read_by_the_names_of_its_columns() -> None:
    assert read(DUMP, calls=10) == Counted(instructions=300, misses=6, data_misses=3)


def test_what_is_no_gateway_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: program)
    with pytest.raises(SystemExit, match="gateways only, not nginx"):
        main(["--instructions", "--only", "nginx,postgres"])


def test_without_valgrind_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(SystemExit, match="needs the program valgrind"):
        main(["--instructions"])

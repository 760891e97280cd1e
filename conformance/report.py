"""What a suite found, against what was expected: pure.

A case that fails is `new` unless `known_failures.toml` lists it. The list has to stay true, so a listed case that
passes, and a listed name that no case has, fail the run like a new failure. A skipped case counts as failed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

COLUMNS = ("suite", "passed", "failed", "known", "new")


@dataclass(frozen=True)
class Case:
    """`trouble` is empty for a case that passed."""

    name: str
    trouble: str = ""

    def goes_by(self, listed: str) -> bool:
        """With its parameters, or without them for all of them: `test_list[strict]`, `test_list`."""
        return listed in (self.name, self.name.partition("[")[0])


@dataclass(frozen=True)
class Report:
    """One suite, judged. `wrong` are sentences; a suite without any is as expected."""

    suite: str
    passed: int
    failed: int
    known: int
    new: Sequence[Case]
    wrong: Sequence[str]

    @property
    def row(self) -> tuple[str, ...]:
        return (self.suite, *map(str, (self.passed, self.failed, self.known, len(self.new))))


def judge(suite: str, cases: Sequence[Case], known: Mapping[str, str], doubts: Sequence[str] = ()) -> Report:
    """`known` says why for each listed name. `doubts` are what is wrong besides the cases."""
    failed = [case for case in cases if case.trouble]
    new = [case for case in failed if not any(map(case.goes_by, known))]
    wrong = [f"failed: {case.name}\n{_indented(case.trouble)}" for case in new]
    for listed in known:
        meant = [case for case in cases if case.goes_by(listed)]
        wrong += [f"listed as a known failure, but passes: {case.name}" for case in meant if not case.trouble]
        if not meant:
            wrong.append(f"listed as a known failure, but there is no such case: {listed}")
    if not cases:
        wrong.append("no case was run")
    return Report(suite, len(cases) - len(failed), len(failed), len(failed) - len(new), new, [*wrong, *doubts])


def read_known(text: str, suites: Iterable[str]) -> dict[str, dict[str, str]]:
    """Reasons by case by suite. Raises ValueError for a suite that there is not."""
    listed = tomllib.loads(text)
    if unknown := sorted(listed.keys() - set(suites)):
        raise ValueError(f"known failures are listed for {', '.join(unknown)}, which is no suite")
    return listed


def read_junit(text: str) -> list[Case]:
    """JUnit's XML as pytest and Node's test runner write it."""
    return [_case(element) for element in ElementTree.fromstring(text).iter("testcase")]


def table(reports: Sequence[Report]) -> str:
    rows = [COLUMNS, *(report.row for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def _case(element: ElementTree.Element) -> Case:
    module = element.get("classname", "")
    name = ".".join(filter(None, [module if module != "test" else "", element.get("name")]))
    for kind in ("failure", "error", "skipped"):
        found = element.find(kind)
        if found is not None:
            words = [kind if kind == "skipped" else "", found.get("message") or "", found.text or ""]
            return Case(name, "\n".join(filter(None, words)).strip() or kind)
    return Case(name)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())

"""Runs the suites, prints what they found, and ends with 1 if that is not as expected."""

from __future__ import annotations

import argparse
import shutil
import sys

from conformance import environments
from conformance.report import Report, judge, read_junit, read_known, table
from conformance.stand import Doubts, stand
from conformance.suites import RESULT, SUITES, Suite

KNOWN = environments.HERE / "known_failures.toml"


def run_suite(suite: Suite, known: dict[str, str], keep: bool) -> Report:
    try:
        return _run(suite, known, keep)
    except RuntimeError as failure:
        return Report(suite.name, 0, 0, 0, [], [f"it could not be run: {failure}"])


def _run(suite: Suite, known: dict[str, str], keep: bool) -> Report:
    """What it left behind is kept if something is wrong."""
    suite.prepare()
    print(f"running {suite.name} ...", flush=True)
    folder = environments.CACHE / "runs" / suite.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    doubts, printed = [], ""
    try:
        with stand(folder, mock=suite.mock) as running:
            printed = suite.run(running)
    except Doubts as found:
        doubts = [f"the mock server doubts what it was asked:\n{found}"]
    result = folder / RESULT
    if not result.exists():
        return Report(suite.name, 0, 0, 0, [], [f"it left no result:\n{printed}", *doubts])
    report = judge(suite.name, read_junit(result.read_text(encoding="utf-8")), known, doubts)
    if not keep and not report.wrong:
        shutil.rmtree(folder)
    return report


def main() -> int:
    names = [suite.name for suite in SUITES]
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__)
    parser.add_argument("--only", metavar="NAME", action="append", choices=names, help=", ".join(names))
    parser.add_argument("--keep", action="store_true", help="keep logs and results of suites that went well, too")
    arguments = parser.parse_args()
    known = read_known(KNOWN.read_text(encoding="utf-8"), names)
    wanted = [suite for suite in SUITES if suite.name in (arguments.only or names)]
    reports = [run_suite(suite, known.get(suite.name, {}), arguments.keep) for suite in wanted]
    for report in reports:
        for sentence in report.wrong:
            print(f"\n{report.suite}: {sentence}")
        if (environments.CACHE / "runs" / report.suite).exists():
            print(f"\n{report.suite}: logs and results are in {environments.CACHE.name}/runs/{report.suite}")
    print(f"\n{table(reports)}")
    return 1 if any(report.wrong for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())

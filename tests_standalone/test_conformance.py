"""How `make conformance` judges what a suite found."""

from __future__ import annotations

import pytest

from conformance.__main__ import KNOWN
from conformance.report import Case, judge, read_junit, read_known, table
from conformance.suites import SUITES

GOOD = Case("test_a.test_list")
BAD = [Case("test_a.test_get[loose]", "500"), Case("test_a.test_get[strict]", "500")]


def test_all_is_well() -> None:
    report = judge("sdk", [GOOD], {})
    assert (report.passed, report.failed, report.known, report.wrong) == (1, 0, 0, [])


def test_a_new_failure_is_wrong() -> None:
    report = judge("sdk", [GOOD, BAD[0]], {})
    assert (report.passed, report.failed, report.known, report.new) == (1, 1, 0, [BAD[0]])
    assert report.wrong == ["failed: test_a.test_get[loose]\n    500"]


def test_a_known_failure_is_not_wrong() -> None:
    report = judge("sdk", [GOOD, *BAD], {"test_a.test_get[loose]": "why", "test_a.test_get[strict]": "why"})
    assert (report.failed, report.known, report.new, report.wrong) == (2, 2, [], [])


def test_a_name_without_parameters_means_all_of_them() -> None:
    assert judge("sdk", [GOOD, *BAD], {"test_a.test_get": "why"}).wrong == []


def test_a_name_with_parameters_means_no_other() -> None:
    assert judge("sdk", BAD, {"test_a.test_get[loose]": "why"}).new == [BAD[1]]


def test_a_known_failure_that_passes_is_wrong() -> None:
    report = judge("sdk", [GOOD], {GOOD.name: "why"})
    assert report.wrong == ["listed as a known failure, but passes: test_a.test_list"]


def test_a_known_failure_that_is_gone_is_wrong() -> None:
    report = judge("sdk", [GOOD], {"test_a.test_gone": "why"})
    assert report.wrong == ["listed as a known failure, but there is no such case: test_a.test_gone"]


def test_a_suite_without_cases_is_wrong() -> None:
    assert judge("sdk", [], {}).wrong == ["no case was run"]


def test_doubts_are_wrong() -> None:
    assert judge("sdk", [GOOD], {}, ["the mock has doubts"]).wrong == ["the mock has doubts"]


def test_reads_what_pytest_writes() -> None:
    written = """<testsuites><testsuite>
        <testcase classname="tests.test_a.TestA" name="test_good[strict]"/>
        <testcase classname="tests.test_a" name="test_bad"><failure message="E1">line 1\nline 2</failure></testcase>
        <testcase classname="" name="tests.test_b"><error message="collection failure">no module</error></testcase>
        <testcase classname="tests.test_a" name="test_left_out"><skipped message="no network"/></testcase>
    </testsuite></testsuites>"""
    assert read_junit(written) == [
        Case("tests.test_a.TestA.test_good[strict]"),
        Case("tests.test_a.test_bad", "E1\nline 1\nline 2"),
        Case("tests.test_b", "collection failure\nno module"),
        Case("tests.test_a.test_left_out", "skipped\nno network"),
    ]


def test_reads_what_node_writes() -> None:
    written = """<testsuites>
        <testcase name="streams text" time="0.1" classname="test"/>
        <testcase name="calls tools" classname="test"><failure type="testCodeFailure" message="no"/></testcase>
    </testsuites>"""
    assert read_junit(written) == [Case("streams text"), Case("calls tools", "no")]


def test_known_failures_belong_to_suites() -> None:
    assert read_known('[sdk]\n"test_a.test_get" = "why"\n', ["sdk"]) == {"sdk": {"test_a.test_get": "why"}}
    with pytest.raises(ValueError, match="skd, which is no suite"):
        read_known("[skd]\n", ["sdk"])


def test_every_known_failure_has_a_reason() -> None:
    listed = read_known(KNOWN.read_text(encoding="utf-8"), [suite.name for suite in SUITES])
    assert all(reason.strip() for cases in listed.values() for reason in cases.values())


def test_table() -> None:
    reports = [judge("openai-python", [GOOD, *BAD], {"test_a.test_get": "why"}), judge("llm", [GOOD], {})]
    assert table(reports).splitlines() == [
        "suite          passed  failed  known  new",
        "openai-python       1       2      2    0",
        "llm                 1       0      0    0",
    ]

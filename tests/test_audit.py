"""The audit: a vulnerability fails it, and what could not be asked is never taken for good."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAW = {"id": "PYSEC-1", "fix_versions": ["2.1"], "aliases": [], "description": ""}
GOOD = {"name": "good", "version": "1.0", "vulns": []}
BAD = {"name": "bad", "version": "2.0", "vulns": [FLAW]}
UNKNOWN = {"name": "own", "skip_reason": "Dependency not found on PyPI"}


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.report


def answer(*packages):
    return json.dumps({"dependencies": packages, "fixes": []})


def test_a_vulnerability_fails(report):
    assert report(answer(GOOD, BAD), "") == (
        ["2 packages checked, 1 known vulnerabilities", "bad 2.0: PYSEC-1, mended in 2.1"],
        False,
    )


def test_none_is_well_and_what_was_not_asked_is_named(report):
    assert report(answer(GOOD), "") == (["1 packages checked, 0 known vulnerabilities"], True)
    assert report(answer(GOOD, UNKNOWN), "")[0][-1] == "not checked: own"


@pytest.mark.parametrize("said", ["", "half an answ", "[]"])
def test_without_an_answer_nothing_is_checked(report, said):
    lines, well = report(said, "noise\nConnectionError: no network\n")
    assert lines == ["not checked: ConnectionError: no network"] and well


def test_where_no_database_answers_nothing_is_checked(report):
    assert report(answer(UNKNOWN, UNKNOWN), "") == (["not checked: no database knows any of 2 packages"], True)

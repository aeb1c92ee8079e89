"""README.md's table of support holds what tests have shown."""

from __future__ import annotations

import json

import pytest

from lvlm_edge.exporter import families
from tests import support
from tests.conftest import CLAIMED, HERE

REPORT = """<testsuites><testsuite>
<testcase name="a"><properties><property name="claim" value="llava none equal"/></properties></testcase>
<testcase name="b"><properties><property name="claim" value="llava none equal"/></properties><failure/></testcase>
<testcase name="c"><properties><property name="claim" value="llava fastv equal"/></properties></testcase>
<testcase name="d"><properties><property name="claim" value="llava yopo equal"/></properties><skipped/></testcase>
<testcase name="e"/></testsuite></testsuites>"""


def test_the_page_holds_what_the_results_say():
    page = support.PAGE.read_text("utf-8")
    results = json.loads(support.RESULTS.read_text("utf-8"))["results"]

    assert support.written(page, support.table(results)) == page


def test_every_family_has_a_row():
    listed = [family for names, _, _ in support.ROWS for family in names.split()]

    assert sorted(listed) == sorted(families.names())


def test_every_cell_has_a_test_that_claims_it(request):
    claimed = request.config.stash[CLAIMED]
    if set(HERE.rglob("test_*.py")) - set(claimed):
        pytest.skip("only a part of the tests was collected; run all to compare their claims with the table")
    results = json.loads(support.RESULTS.read_text("utf-8"))["results"]
    cells = {
        f"{family} {method} {claim}"
        for names, methods, _ in support.ROWS
        for family in names.split()
        for method in methods.split()
        for claim in support.CLAIMS
    }

    assert cells == set().union(*claimed.values())
    assert set(results) <= cells


def test_a_claim_with_a_failed_test_fails_and_one_that_was_skipped_was_not_run(tmp_path):
    (tmp_path / "r.xml").write_text(REPORT, "utf-8")

    found = support.outcomes(tmp_path / "r.xml")

    assert found == {"llava none equal": "failed", "llava fastv equal": "passed"}
    assert "| `fastv`; failed: `none`; not run: `yopo` | not run: `none` `fastv` `yopo` |" in support.table(found)[2]

"""What a certificate says of a bundle, and who asks for one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lvlm_edge.runtime.bundle import certificate, sha256
from lvlm_edge.runtime.errors import BundleError
from tests.tiny import write_json

GOOD: dict[str, Any] = {"passed": True, "cases": [1, 2, 3], "steps": [4, 9, 2], "not_judged": ["pictures"]}


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A folder with a manifest, of which nothing but its hash is read."""
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "manifest.keep-0.25.json").write_text("[]")
    return tmp_path


def certify(bundle: Path, manifest: str = "manifest.json", **changed: Any) -> None:
    content = GOOD | {"manifest_sha256": sha256(bundle / manifest)} | changed
    write_json(bundle / manifest.replace("manifest", "certificate"), content)


@pytest.mark.parametrize("manifest", ["manifest.json", "manifest.keep-0.25.json"])
def test_a_certificate_says_how_much_was_compared(manifest, bundle):
    certify(bundle, manifest)

    found = certificate.read(bundle, manifest)

    assert found is not None and found.holds and found.state() == "passed"
    assert (found.cases, found.steps, found.not_judged) == (3, 9, ("pictures",))
    other = {"manifest.json", "manifest.keep-0.25.json"} - {manifest}
    assert certificate.read(bundle, other.pop()) is None


STATES: dict[str, tuple[dict[str, Any], str]] = {
    "failed": ({"passed": False}, "FAILED"),
    "of another": ({"manifest_sha256": "0" * 64}, "passed, but of another manifest"),
    "failed, of another": ({"passed": False, "manifest_sha256": "0"}, "FAILED, but of another manifest"),
    "passed is a number": ({"passed": 1}, "damaged"),
    "no steps": ({"steps": []}, "damaged"),
    "steps are none": ({"steps": ["x"]}, "damaged"),
    "no cases": ({"cases": None}, "damaged"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_certificate_that_does_not_hold_is_warned_of_and_refused_where_it_is_required(name, bundle, caplog):
    changed, state = STATES[name]
    certify(bundle, **changed)
    said = f"{bundle}: certificate.json says: {state}; check the bundle: lvlm-edge check {bundle} --against CHECKPOINT"

    certificate.consult(bundle, "manifest.json", required=False)
    with pytest.raises(BundleError) as caught:
        certificate.consult(bundle, "manifest.json", required=True)

    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.WARNING, said)]
    assert str(caught.value) == said


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"passed": true}'])
def test_a_certificate_that_cannot_be_read_says_nothing(content, bundle):
    (bundle / "certificate.json").write_text(content)

    found = certificate.read(bundle, "manifest.json")

    assert found == certificate.Certificate(passed=None, of_this_bundle=False, cases=0, steps=0, not_judged=())
    assert not found.holds and found.state() == "damaged"


def test_a_bundle_without_a_certificate_is_refused_only_where_it_is_required(bundle, caplog):
    certificate.consult(bundle, "manifest.json", required=False)

    with pytest.raises(BundleError, match=r"certificate.keep-0.25.json is missing; check the bundle: lvlm-edge check"):
        certificate.consult(bundle, "manifest.keep-0.25.json", required=True)
    assert not caplog.records


def test_one_that_holds_is_no_news(bundle, caplog):
    certify(bundle)

    certificate.consult(bundle, "manifest.json", required=True)
    certificate.consult(bundle, "manifest.json", required=False)

    assert not caplog.records

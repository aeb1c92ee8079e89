"""Damaged input ends in an answer or in one error; `make fuzz` runs more cases of the same kinds."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest

from lvlm_edge.runtime.pictures import sources
from lvlm_edge.runtime.prompt import chat
from tests import fuzz, tiny

CASES = {
    "pictures": 60,
    "prompts": 50,
    "options": 30,
    "tokenizers": 45,
    "templates": 40,
    "manifests": 45,
    "configs": 40,
    "exports": 15,
}


@pytest.fixture(scope="module")
def subject(checkpoint_once, eager_once, tmp_path_factory) -> fuzz.Subject:
    checkpoint, bundle = tiny.checkpoint(checkpoint_once), tiny.bundle(checkpoint_once, eager_once, "fastv")
    return fuzz.subject(checkpoint, bundle, tmp_path_factory.mktemp("scratch"))


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damage_ends_in_an_answer_or_in_one_error(kind, subject):
    answered = [fuzz.case(subject, kind, seed) for seed in range(CASES[kind])]

    assert 0 < sum(answered) < len(answered)  # both happen, else the cases say nothing


def test_a_case_is_the_same_when_it_is_rerun(subject):
    first, again = ([fuzz.case(subject, "configs", seed) for seed in range(20)] for _ in range(2))

    assert first == again


def test_a_traceback_is_a_fault_that_says_how_to_rerun_it(subject, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(sources, "open_image", broken)

    with pytest.raises(fuzz.FaultError) as caught:
        fuzz.case(subject, "pictures", 17)

    assert "ValueError: a bug" in str(caught.value)
    assert "rerun it: python tests/fuzz.py --kind pictures --first 17 --cases 1" in str(caught.value)


def test_a_case_without_end_is_a_fault(subject, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(sources, "open_image", lambda *_, **__: time.sleep(60))

    with pytest.raises(fuzz.FaultError, match="takes longer than 1 s"):
        fuzz.case(subject, "pictures", 0)


def test_another_answer_to_what_is_not_damaged_is_a_fault(subject, monkeypatch):
    right = chat.compile_template

    def misread(source: str, path: Path) -> object:
        return right(source.replace("{#", "{{ 'w9 w9' }}{#"), path)

    monkeypatch.setattr(chat, "compile_template", misread)

    assert "another answer to what is not damaged" in first_fault(subject, "templates", 100)


def test_two_lines_of_an_error_are_a_fault(subject, monkeypatch):
    from lvlm_edge.exporter.commands import errors

    monkeypatch.setattr(errors, "print_error", lambda message: print(message, "more", sep="\n"))

    assert "exit code 2, " in first_fault(subject, "options", 20)


def test_a_warning_is_a_fault(subject, monkeypatch):
    right = sources.open_image
    monkeypatch.setattr(sources, "open_image", lambda *a, **b: (warnings.warn("odd", stacklevel=1), right(*a, **b))[1])

    assert "odd" in first_fault(subject, "pictures", 1)


def first_fault(subject: fuzz.Subject, kind: str, cases: int) -> str:
    """What is said of the first case that is a fault."""
    for seed in range(cases):
        try:
            fuzz.case(subject, kind, seed)
        except fuzz.FaultError as error:
            return str(error)
    return ""

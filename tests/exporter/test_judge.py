"""The bounds that `check` judges by: what passes, what fails, and what is said of it, on numbers written here."""

from __future__ import annotations

import hashlib
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lvlm_edge.exporter.proof import as_run, cases, judge, parity
from lvlm_edge.exporter.references import Reference
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.errors import BundleError
from tests import eager, tiny


def array(*values: Any) -> np.ndarray:
    return np.array(values, np.float32)


def reference(logits: np.ndarray) -> Reference:
    empty = torch.zeros(0)
    tokens = logits.argmax(-1).tolist()
    return Reference(image_features=empty, image_embeds=empty, logits=torch.from_numpy(logits), tokens=tokens)


# Errors.


def test_an_error_is_that_of_the_worst_row_over_the_rows_own_size():
    wanted = array([1, -4, 2], [0.5, 0.25, 0.1])

    assert judge.error_of(wanted, wanted) == 0
    assert judge.error_of(wanted + array([0.4, 0, 0], [0, 0, 0]), wanted) == pytest.approx(0.1)
    assert judge.error_of(wanted + array([0.4, 0, 0], [0, 0, -0.1]), wanted) == pytest.approx(0.2)
    assert judge.error_of(wanted[:0], wanted[:0]) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_an_enormous_error(value):
    assert judge.error_of(array([1, value]), array([1, 2])) == sys.float_info.max


def test_a_row_of_zeros_must_be_zeros():
    assert judge.error_of(array([0, 0]), array([0, 0])) == 0
    assert judge.error_of(array([0, 1e-6]), array([0, 0])) > 1


@pytest.mark.parametrize(("found", "passed"), [(2.25, True), (2.25 + 1e-6, False), (1.75, True), (np.nan, False)])
def test_an_error_at_the_bound_passes(found, passed):
    row = judge.close("short", "vision", array([found]), array([2.0]), 0.125)

    assert (row.case, row.stage, row.bound, row.passed) == ("short", "vision", 0.125, passed)


# Kept sets.

SCORES = array(0.5, 0.1, 0.4, 0.2, 0.3)  # the best three are 0, 2, 4; the margin at the cut is 0.1


@pytest.mark.parametrize(
    ("kept", "error", "passed", "lost"),
    [
        ([0, 2, 4], 0.0, True, 0),
        ([4, 0, 2], 0.0, True, 0),
        ([0, 2, 3], 0.051, True, 1),
        ([0, 2, 3], 0.049, False, 1),
        ([0, 1, 2], 0.06, False, 1),
        ([0, 1, 3], 0.149, False, 2),
        ([0, 1, 3], 0.151, True, 2),
        ([0, 2, 2], 1.0, False, 1),
        ([0, 2], 1.0, False, 1),
        ([0, 2, 3, 4], 1.0, False, 0),
    ],
    ids=str,
)
def test_tokens_change_places_only_within_twice_the_error_of_their_scores(kept, error, passed, lost):
    row = judge.kept_set("short", np.array(kept), SCORES, np.array([0, 2, 4]), error)

    assert (row.stage, row.passed, row.figure, row.bound) == ("kept set", passed, lost, 0)
    assert row.note == "margin at the cut 1.00e-01" + (f", {lost} swapped" if lost else "")


def test_all_tokens_kept_have_no_cut():
    row = judge.kept_set("short", np.arange(5), SCORES, np.arange(5), 0.0)

    assert row.passed and row.note == "margin at the cut inf"


# Answers.

LOGITS = array([4, 1, 0, 0], [0, 3, 2.5, 0], [1, 0, 0, 2])  # tokens 0, 1, 3


def test_equal_tokens_and_logits_pass():
    rows = judge.answers("short", reference(LOGITS), LOGITS, [0, 1, 3], 1e-4)

    assert [row.stage for row in rows] == ["prefill logits", "decode logits", "tokens"]
    assert all(row.passed and row.figure == 0 for row in rows)
    assert [row.note for row in rows] == ["", "3 steps", "3 equal"]


def test_logits_of_the_first_step_and_of_later_ones_are_told_apart():
    later = LOGITS + array([0, 0, 0, 0], [0, 0, 0, 0], [0.5, 0, 0, 0])
    first = LOGITS + array([0, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0])

    passed = [
        [row.passed for row in judge.answers("short", reference(LOGITS), logits, [0, 1, 3], 0.1)]
        for logits in (later, first)
    ]

    assert passed == [[True, False, True], [False, False, True]]


@pytest.mark.parametrize(
    ("up", "down", "passed"), [(0.25, 0.25, True), (0.5, 0, True), (0.2, 0.2, False), (0, 0, False), (-0.3, -0.3, True)]
)
def test_another_token_needs_errors_of_the_two_logits_that_explain_it(up, down, passed):
    found = LOGITS + array([0, 0, 0, 0], [0, -down, up, 0], [0, 0, 0, 0])

    tokens = judge.answers("short", reference(LOGITS), found, [0, 2, 3], 1.0)[-1]

    assert (tokens.stage, tokens.figure, tokens.passed) == ("tokens", 0.5, passed)
    assert tokens.bound == pytest.approx(abs(up) + abs(down) + 4e-6, abs=1e-6)
    assert tokens.note == "token 1 is 2, expected 1; their logits differ by 5.00e-01"


def test_an_answer_that_is_shorter_is_compared_as_far_as_it_goes():
    assert judge.answers("short", reference(LOGITS), LOGITS, [0], 0.1)[-1].note == "1 equal"


@pytest.mark.parametrize(("tokens", "same"), [([0, 1, 3], 3), ([0, 1, 2], 2), ([0, 2, 3], 1), ([1, 1, 3], 0)])
def test_answers_are_apart_by_the_logits_up_to_the_first_other_token(tokens, same):
    found = LOGITS.copy()
    found[same:] += 1  # of the step of the first other token, and of those after it

    error, count = judge.apart(tokens, found, [0, 1, 3], LOGITS)

    assert count == same
    assert error == (0 if same == 3 else pytest.approx(1 / LOGITS[same].max()))


def test_scores_are_read_of_the_graph_that_has_them():
    """Of several graphs below the prune layer the last one has scores."""
    graphs = [
        SimpleNamespace(name=f"prefill_{i}", outputs=[SimpleNamespace(name=name)])
        for i, name in enumerate(("hidden", "score", "kept_visual"))
    ]
    held = {("prefill_1", "score"): SCORES[None] + array(0, 0, 0, 0, 0.01)}
    pipe: Any = SimpleNamespace(
        manifest=SimpleNamespace(role=lambda role: graphs if role == "prefill" else [], method_config={}),
        buffer=lambda graph, name: SimpleNamespace(read=lambda: held[graph, name]),
    )
    expected = replace(reference(LOGITS), score=torch.from_numpy(SCORES), kept=torch.tensor([0, 2, 4]))

    scores, kept = as_run._selection(pipe, SimpleNamespace(name="short"), expected, np.array([0, 2, 4]), 0.03)

    assert (scores.stage, scores.passed, kept.passed) == ("scores", True, True)
    assert (scores.figure, scores.bound) == (pytest.approx(0.01), pytest.approx(0.03 * 0.5))
    assert not as_run._selection(pipe, SimpleNamespace(name="short"), expected, np.array([0, 2, 4]), 0.01)[0].passed


@pytest.mark.parametrize(
    ("name", "index", "wrong"),
    [("kept_hidden", (0, slice(1, 3), 0), 2), ("kept_position_ids", (slice(None), 3), 1), ("kept_last_index", 0, 1)],
)
def test_rows_that_are_not_the_kept_ones_are_counted(name, index, wrong):
    """Three axes of positions; of visual rows 1 to 4 the first and the third are kept."""
    hidden = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    inputs = {"text_index": np.array([0, 5, 6]), "visual_index": np.array([1, 2, 3, 4]), "last_index": np.array([5])}
    inputs["position_ids"] = np.stack([np.arange(7), np.arange(7) + 20, np.arange(7) * 2])
    slots, kept = [0, 1, 3, 5, 6], np.array([0, 2])
    select = {"kept_hidden": hidden[None, slots], "kept_position_ids": inputs["position_ids"][:, slots]}
    select["kept_last_index"] = np.array([3])
    case: Any = SimpleNamespace(name="short")
    right = parity._order(case, select, inputs, hidden, kept)
    assert (right.stage, right.figure, right.passed) == ("kept order", 0, True)

    select[name] = select[name].copy()
    select[name][index] += 1

    found = parity._order(case, select, inputs, hidden, kept)
    assert (found.figure, found.passed) == (wrong, False)
    assert parity._order(case, select, inputs, hidden, kept[::-1]).figure == wrong + 2


# Verdicts.


def row(passed: bool) -> judge.Row:
    return judge.Row(case="short", stage="vision", figure=0, bound=0, passed=passed)


def test_one_row_that_fails_fails_all_and_the_first_is_named():
    rows = (row(True), row(False), row(False))

    assert judge.Verdict(rows=rows[:1]).passed and judge.Verdict(rows=rows[:1]).first_failure is None
    assert not judge.Verdict(rows=rows).passed
    assert judge.Verdict(rows=rows).first_failure is rows[1]


def test_a_graph_that_cannot_be_run_is_a_row_that_fails():
    def broken(*_: Any) -> list[judge.Row]:
        raise BundleError("decode.onnx: no")

    (found,) = judge.judged(broken, None, None, SimpleNamespace(name="full"), 3)

    assert (found.case, found.stage, found.passed, found.figure, found.bound) == ("full", "runs", False, 1, 0)
    assert found.note == "decode.onnx: no"


# What is compared.


def of(text: int, images: int = 1, new: int = 8) -> Any:
    """A pipeline as `synthetic` reads it, with rows of text for so many tokens."""
    counts = SimpleNamespace(text_tokens=text, new_tokens=new)
    how = SimpleNamespace(crop=(28, 42), resize_to=None, shortest_edge=28)
    seen = [SimpleNamespace(count=i + 1, how=how) for i in range(images)]
    pictures = [SimpleNamespace(views=views, token_id=159) for views in seen]
    embedding = SimpleNamespace(vocab=160)
    manifest = SimpleNamespace(counts=counts, pictures=pictures, placeholders={159: "image"}, embedding=embedding)
    return SimpleNamespace(manifest=manifest)


@pytest.mark.parametrize(
    ("room", "texts", "before"),
    [
        (1, [1, 2, 1], [0, 0, 0]),
        (2, [2, 2, 2], [1, 0, 1]),
        (24, [6, 12, 24], [1, 6, 5]),
        (200, [6, 100, 200], [1, 35, 5]),
    ],
)
@pytest.mark.parametrize("images", [1, 2])
def test_prompts_are_short_and_long_with_their_images_at_several_places(room, texts, before, images):
    found = cases.synthetic(of(room, images), seed=3)

    assert [case.name for case in found] == ["short", "middle", "full"]
    for case, text, start in zip(found, texts, before, strict=True):
        at = [i for i, token in enumerate(case.prompt) if token == 159]
        apart = 2 if text - start > 1 else 1  # a text token between two images, where there is one more behind them
        assert (len(case.prompt), at) == (text + images, [start + apart * i for i in range(images)])
        assert all(0 <= token < 160 for token in case.prompt)
        assert case.pixels.shape == (images * (images + 1) // 2, 3, 28, 42) and case.pixels.dtype == np.float32
    again = cases.synthetic(of(room, images), seed=3)
    assert [case.prompt for case in again] == [case.prompt for case in found]
    assert room < 3 or cases.synthetic(of(room, images), seed=4)[0].prompt != found[0].prompt


def test_one_case_is_decoded_to_the_end_of_the_capacity():
    found = cases.synthetic(of(24, new=9))

    assert parity._steps(of(24, new=9), found, 4) == [4, 4, 9]
    assert parity._steps(of(24, new=9), found, 40) == [9, 9, 9]


def test_a_certificate_says_what_was_decoded_and_of_what(checkpoint_once, eager_once, tmp_path):
    bundle = shutil.copytree(tiny.bundle(checkpoint_once, eager_once, "none"), tmp_path / "bundle")
    eager.moved(tiny.bundle(checkpoint_once, eager_once, "none"), bundle)
    checkpoint = tiny.checkpoint(checkpoint_once)

    verdict = parity.check(bundle, checkpoint, steps=3, seed=5)

    said = tiny.read_json(bundle / "certificate.json")
    wanted = cases.synthetic(Pipeline.load(bundle), 5)
    assert (said["passed"], said["steps"], said["seed"], said["backend"]) == (verdict.passed, [3, 3, 8], 5, "ort")
    assert [(case["name"], tuple(case["prompt"])) for case in said["cases"]] == [(c.name, c.prompt) for c in wanted]
    assert [c["pixels_sha256"] for c in said["cases"]] == [
        hashlib.sha256(c.pixels.tobytes()).hexdigest() for c in wanted
    ]
    assert len(said["rows"]) == len(verdict.rows)
    assert said["against_config_sha256"] == hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()
    assert said["manifest_sha256"] == hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()

"""The bounds that `check` judges by: what passes, what fails, and what is said of it, on numbers written here."""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.proof import as_run, cases, certificate, judge, parity, polygraphy, vision
from lvlm_edge.exporter.references import Reference
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.backends import Highest
from lvlm_edge.runtime.bundle import open_bundle
from lvlm_edge.runtime.errors import BundleError, UsageError
from lvlm_edge.runtime.pictures.image import Preprocessing
from lvlm_edge.runtime.pictures.layout import Picture, Run
from lvlm_edge.runtime.pictures.views import Canvas, Views
from lvlm_edge.runtime.pipeline.inputs import Media
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
    assert [(row.case, row.bound, row.note) for row in rows] == [
        ("short", 1e-4, ""),
        ("short", 1e-4, "3 steps"),
        ("short", 0, "3 equal"),
    ]


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


def test_a_tie_may_fall_either_way():
    """Logits that are all 0 leave no room for errors, and none is needed."""
    nothing = np.zeros((2, 4), np.float32)

    tokens = judge.answers("short", reference(nothing), nothing, [0, 3], 0.1)[-1]

    assert (tokens.figure, tokens.bound, tokens.passed) == (0, 0, True)


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
    held["prefill_1", "score"] = SCORES[None]
    assert as_run._selection(pipe, SimpleNamespace(name="short"), expected, np.array([0, 2, 4]), 0.0)[0].passed


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
    assert (right.case, right.stage, right.figure, right.bound, right.passed) == ("short", "kept order", 0, 0, True)

    select[name] = select[name].copy()
    select[name][index] += 1

    found = parity._order(case, select, inputs, hidden, kept)
    assert (found.figure, found.passed) == (wrong, False)
    assert parity._order(case, select, inputs, hidden, kept[::-1]).figure == wrong + 2


# Caches: rows and heads that stand in another order.


def cached(heads: int, rows: int, seed: int = 0) -> list[np.ndarray]:
    """Keys and values, [heads, rows, 4]."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(heads, rows, 4)).astype(np.float32) for _ in range(2)]


def test_cached_rows_that_differ_at_most_by_the_bound_are_told_as_they_are():
    wanted = cached(2, 5)
    own = [part.copy() for part in wanted]
    own[0][1, 3] += np.abs(wanted[0][1, 3]).max() * 0.25
    own[1][0, 0] -= np.abs(wanted[1][0, 0]).max() * 0.5

    assert parity._unordered(own, wanted, 0.5) == [pytest.approx(0.25), pytest.approx(0.5)]


def test_an_error_at_the_bound_is_that_of_the_row_in_its_place():
    """The first key is nearer to the second one's place, where its value would be wrong."""
    wanted = [array([[1, 0], [0.375, 0]]), array([[1, 0], [8, 0]])]
    own = [array([[0.5, 0], [0.375, 0]]), wanted[1].copy()]

    assert parity._unordered(own, wanted, 0.5) == [0.5, 0]
    assert parity._unordered(own, wanted, 0.25)[1] > 0.5


def test_fewer_rows_and_copied_heads_are_compared_with_those_that_they_are():
    wanted = cached(3, 6)
    own = [part[[2, 0, 2, 1]][:, [4, 1, 5]].copy() for part in wanted]  # of heads the last row tells them apart

    assert parity._unordered(own, wanted, 1e-6) == [0, 0]

    for part in (0, 1):
        spoilt = [each.copy() for each in own]
        spoilt[part][3, 1, 2] += 0.5
        errors = parity._unordered(spoilt, wanted, 1e-6)
        assert errors[part] > 0.05 and errors[1 - part] == 0


@pytest.mark.parametrize("surplus", [1, 3])
def test_rows_that_the_reference_does_not_have_are_counted(surplus):
    assert parity._unordered(cached(2, 4 + surplus), cached(2, 4), 1e-4) == [surplus, surplus]


def test_a_row_in_the_place_of_another_is_lost():
    wanted = cached(1, 4)
    own = [part[:, [0, 1, 1, 3]].copy() for part in wanted]

    errors = parity._unordered(own, wanted, 1e-4)

    assert errors[0] > 0.1 and errors[1] == 0
    fewer = [part[:, [0, 1, 1]].copy() for part in wanted]  # where rows may be left out, the logits tell
    assert parity._unordered(fewer, wanted, 1e-4) == [0, 0]


def test_values_are_silent_row_by_row_and_head_by_head():
    """Zeros count for nothing where a whole row of a head is zero, and nowhere else."""
    wanted = cached(2, 4)
    own = [part[:, ::-1].copy() for part in wanted]
    own[1][1, 2] = 0
    assert parity._unordered(own, wanted, 1e-4) == [0, 0]

    own[1][0, 1, :3] = 0

    assert parity._unordered(own, wanted, 1e-4)[1] > 0.1


def pipe_of(*caches: str, dtype: str = "float32", **more: Any) -> Any:
    """A pipeline of some caches, as far as rows are made of it."""
    found = [SimpleNamespace(name=name, heads=1, head_dim=4, capacity=9, dropped=0) for name in caches]
    return SimpleNamespace(manifest=SimpleNamespace(**{"cache": found, "dtype": dtype, "method_config": {}} | more))


@pytest.mark.parametrize(
    ("errors", "figure", "passed", "note"),
    [
        ([[0.0, 0.0], [1e-4, 5e-5]], 1e-4, True, ""),
        ([[0.0, 2e-4], [0.5, 0.1]], 0.5, False, "first in layer 3, values"),
        ([[1e-4, 1e-4], [1.1e-4, 0.3]], 0.3, False, "first in layer 4.kept, keys"),
    ],
)
def test_one_row_for_several_caches_names_the_first_that_is_wrong(errors, figure, passed, note):
    pipe = pipe_of("3", "4.kept")

    row = parity._worst(
        pipe, SimpleNamespace(name="full"), "caches", list(zip(pipe.manifest.cache, errors, strict=True))
    )

    assert (row.case, row.stage, row.figure, row.bound) == ("full", "caches", figure, 1e-4)
    assert (row.passed, row.note) == (passed, note)


@pytest.mark.parametrize(("dtype", "bound", "scores"), [("float32", 1e-4, 1e-4), ("float16", 2e-2, 1e-2)])
def test_bounds_are_those_of_the_precision_and_wider_where_activations_are_rounded(dtype, bound, scores):
    pipe = pipe_of(dtype=dtype)

    assert as_run._bound(pipe, judge.TOLERANCE, rounds=False) == bound
    assert as_run._bound(pipe, judge.SCORE_TOLERANCE, rounds=False) == scores
    assert as_run._bound(pipe, judge.TOLERANCE, rounds=True) == 0.1
    assert as_run._bound(pipe, {dtype: 0.3}, rounds=True) == 0.3


# Graphs fed with what PyTorch had.


def graph(name: str, role: str, inputs: str, outputs: str) -> Any:
    found = ([SimpleNamespace(name=each) for each in names.split()] for names in (inputs, outputs))
    return SimpleNamespace(name=name, role=role, **dict(zip(("inputs", "outputs"), found, strict=True)))


def running(pipe: Any, graphs: list[Any], returned: dict[str, dict[str, Any]]) -> list[tuple[str, list[str], Any]]:
    """Let a pipeline's graphs return given values; what was asked of it."""
    asked: list[tuple[str, list[str], Any]] = []

    def run_graph(name: str, given: dict[str, Any], *, length: int | None = None) -> dict[str, Any]:
        asked.append((name, sorted(given), length))
        return returned[name]

    pipe.run_graph, pipe.manifest.graphs = run_graph, graphs
    pipe.manifest.role = lambda role: [each for each in graphs if each.role == role]
    return asked


CASE: Any = SimpleNamespace(name="short")


@pytest.mark.parametrize(
    ("dropped", "rows", "whole"),
    [(0, 4, True), (0, 4, False), (2, 2, True), (2, 2, False), (-3, 4, True), (-3, 4, False)],
)
def test_the_prompts_rows_are_compared_wherever_they_are_in_a_cache(dropped, rows, whole):
    """A prompt of four rows; a graph returns whole caches of nine rows, with noise around, or the prompt's rows."""
    pipe = pipe_of("0", "1")
    pipe.manifest.cache[1].dropped = dropped
    wanted = [cached(2, 4, 1), cached(2, rows, 2)]
    outputs: dict[str, Any] = {}
    for i, start in enumerate((0, max(0, -dropped))):
        for name, part in zip(("key", "value"), wanted[i], strict=True):
            held = np.full((1, 2, 9, 4), 5, np.float32)
            held[0, :, start : start + part.shape[1]] = part
            padded = np.concatenate([part, np.full((2, 2, 4), 5, np.float32)], 1)[None]
            outputs[f"present.{i}.{name}"] = held if whole else padded
    graphs = [graph("vision", "image", "pixels", ""), graph("prefill", "prefill", "x last_index", "y")]
    asked = running(pipe, graphs, {"prefill": outputs})
    expected = replace(reference(LOGITS), cache=[tuple(map(torch.from_numpy, pair)) for pair in wanted])
    inputs = {"x": array(1), "last_index": np.array([3]), "more": array(1)}

    (row,) = parity._caches(pipe, CASE, expected, inputs)

    assert (row.case, row.stage, row.figure, row.passed) == ("short", "prefill caches", 0, True)
    assert asked == [("prefill", ["last_index", "x"], 0)]
    for place in (0, rows - 1):
        right = outputs["present.1.value"].copy()
        outputs["present.1.value"][0, 1, max(0, -dropped) * whole + place, 2] += 1
        (spoilt,) = parity._caches(pipe, CASE, expected, inputs)
        assert (spoilt.passed, spoilt.note) == (False, "first in layer 1, values")
        outputs["present.1.value"] = right
    assert parity._caches(pipe, CASE, replace(expected, cache=None), inputs) == []
    running(pipe, graphs, {"prefill": {"y": array(1)}})
    assert parity._caches(pipe, CASE, expected, inputs) == []  # a graph without caches has no row


def test_what_caches_hold_of_images_is_made_of_pytorchs_features():
    pipe = pipe_of("0", "1", pictures=[SimpleNamespace(graphs=("vision",))])
    kv = torch.from_numpy(np.stack([np.stack(cached(2, 3, seed)) for seed in (1, 2)]))  # layers, keys and values
    outputs = {}
    for i in range(2):
        for j, name in enumerate(("key", "value")):
            outputs[f"present.{i}.{name}"] = np.concatenate([kv[i, j].numpy(), cached(2, 2)[0]], 1)[None]
    graphs = [
        graph("vision", "image", "pixels", "f"),
        graph("image_kv", "image", "image_features write_index more", ""),
    ]
    given: list[dict[str, Any]] = []
    asked = running(pipe, graphs, {"image_kv": outputs})
    run_graph = pipe.run_graph
    pipe.run_graph = lambda name, inputs, **options: given.append(inputs) or run_graph(name, inputs, **options)
    features = torch.arange(12.0).reshape(2, 3, 2)
    expected = replace(reference(LOGITS), image_kv=kv, image_features=features)

    (row,) = parity._image_kv(pipe, CASE, expected)

    assert (row.stage, row.figure, row.passed) == ("image K/V", 0, True)
    assert asked == [("image_kv", ["image_features", "write_index"], 0)]
    assert given[0]["image_features"].tolist() == [features.reshape(6, 2).tolist()]
    assert given[0]["write_index"].tolist() == [0]
    outputs["present.1.key"][0, 0, 1, 1] += 1
    (spoilt,) = parity._image_kv(pipe, CASE, expected)
    assert (spoilt.passed, spoilt.note) == (False, "first in layer 1, keys")
    assert parity._image_kv(pipe, CASE, replace(expected, image_kv=None)) == []


@pytest.mark.parametrize(("error", "passed"), [(0.9e-4, True), (1.1e-4, False)])
def test_scores_are_those_of_the_graph_before_the_selection(error, passed):
    """Of the largest score, 0.5: the bound of float32 is 1e-4 of it."""
    names = ["prefill_head.0", "prefill_head.1", "select", "prefill_tail"]
    graphs = [
        graph("vision", "image", "", ""),
        graph(names[0], "prefill", "x", "h"),
        graph(names[1], "prefill", "h", "hidden score"),
        graph(names[2], "prefill", "score", "kept_visual"),
        graph(names[3], "prefill", "", "logits"),
    ]
    hidden = np.random.default_rng(0).normal(size=(1, 6, 3)).astype(np.float32)
    kept, slots = np.array([0, 2, 4]), [0, 1, 3, 5]
    score = SCORES.copy()
    score[3] += error * 0.5
    select = {"kept_visual": kept, "kept_hidden": hidden[:, slots], "kept_position_ids": np.array([slots])}
    select["kept_last_index"] = np.array([2])
    pipe = pipe_of()
    asked = running(
        pipe, graphs, {names[0]: {"h": 1}, names[1]: {"hidden": hidden, "score": score[None]}, "select": select}
    )
    inputs = {"text_index": np.array([0]), "visual_index": np.arange(1, 6), "last_index": np.array([4]), "x": array(1)}
    inputs |= {"position_ids": np.arange(6)[None], "score": array(1), "h": array(1)}
    expected = replace(
        reference(LOGITS),
        hidden=torch.tensor(hidden[0, :5]),
        score=torch.from_numpy(SCORES),
        kept=torch.tensor([0, 2, 4]),
    )

    rows, found = parity._selection(pipe, CASE, expected, inputs)

    assert [row.stage for row in rows] == ["head", "scores", "kept set", "kept order"]
    assert [row.passed for row in rows] == [True, passed, True, True]
    assert (rows[1].figure, rows[1].bound) == (pytest.approx(error * 0.5, rel=1e-2), pytest.approx(0.5e-4))
    assert found is kept and [name for name, *_ in asked] == names[:3]
    zeros = replace(expected, score=torch.zeros(5))
    score[:] = 0
    assert parity._selection(pipe, CASE, zeros, inputs)[0][1].passed  # of nothing, by nothing
    hidden[0, 4] += 1
    assert not parity._selection(pipe, CASE, expected, inputs)[0][0].passed  # the last real row
    hidden[0, 4] -= 1
    hidden[0, 5] += 1
    assert parity._selection(pipe, CASE, expected, inputs)[0][0].passed  # padding


# Views.


@pytest.mark.parametrize("separated", [False, True])
def test_rows_of_views_are_compared_without_separators(separated):
    """Two pictures of one view each, of which every one returns two visual rows, and a separator's."""
    runs = [Run(kind="visual", rows=2)] + [Run(kind="separator", rows=1)] * separated
    how = Views(canvas=Canvas(size=(2, 1)), how=Preprocessing(resize_to=(1, 2)))
    pictures = [Picture(token_id=9, graphs=(name,), views=how, runs=tuple(runs)) for name in ("vision.0", "vision.1")]
    manifest = SimpleNamespace(pictures=pictures, image_rows={"image_embeds": "x", "deep": "y"}, fewer_pictures=False)
    manifest.placeholders = {9: "image"}
    manifest.graph = lambda name: graph(name, "image", "pixel_values", "")
    features = array([[1, 2], [3, 4]], [[5, 6], [7, 8]])
    embeds = array([[10], [11], [90]], [[12], [13], [90]])[:, : 2 + separated]
    seen: list[Any] = []

    def run_graph(name: str, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((name, given["pixel_values"]))
        i = int(name[-1])
        return {"image_features": features[[i]], "image_embeds": embeds[[i]], "deep": embeds[[i]] * 2}

    pipe: Any = SimpleNamespace(manifest=manifest, run_graph=run_graph)
    pixels = np.arange(12, dtype=np.float32).reshape(2, 3, 1, 2)
    case: Any = SimpleNamespace(name="short", pixels=pixels, prompt=(5, 9, 9))
    expected = replace(
        reference(LOGITS),
        image_features=torch.tensor(features),
        image_embeds=torch.tensor([[10.0], [11], [12], [13]]),
        injected={"deep": torch.tensor(embeds.reshape(-1, 1) * 2)},
    )

    rows = vision.compare(pipe, case, expected, 0.125)

    assert [(row.stage, row.figure, row.passed, row.bound) for row in rows] == [
        (name, 0, True, 0.125) for name in ("vision", "projector", "deep")
    ]
    assert [name for name, _ in seen] == ["vision.0", "vision.1"]
    assert all(np.array_equal(given, pixels[[i]]) for i, (_, given) in enumerate(seen))
    features[1, 1, 0], embeds[0, 1, 0] = 9, 13
    assert [row.passed for row in vision.compare(pipe, case, expected, 0.125)] == [False, False, False]
    manifest.image_rows = {}
    assert [row.stage for row in vision.compare(pipe, case, expected, 0.125)] == ["vision"]


def test_what_follows_the_views_runs_once_on_all_that_they_gave():
    graphs = {
        "encoder": graph("encoder", "image", "pixel_values", "states image_features"),
        "projector": graph("projector", "image", "states", "image_embeds"),
    }
    asked: list[Any] = []

    def run_graph(name: str, given: dict[str, Any]) -> dict[str, Any]:
        asked.append((name, {key: value.tolist() for key, value in given.items()}))
        if name == "projector":
            return {"image_embeds": given["states"] + 100}
        value = float(given["pixel_values"][0, 0, 0, 0])
        return {"states": array([[value], [value + 1]]), "image_features": array([[value]])}

    how = Views(canvas=Canvas(size=(1, 1)), tiles=(1, 1), how=Preprocessing(resize_to=(1, 1)))
    picture = Picture(token_id=9, graphs=tuple(graphs), views=how, runs=(Run(kind="visual", rows=4),))
    pipe: Any = SimpleNamespace(manifest=SimpleNamespace(graph=graphs.__getitem__), run_graph=run_graph)
    pixels = np.repeat(array(10, 20), 3).reshape(2, 3, 1, 1)

    found = vision._outputs(pipe, Media(picture, pixels))

    assert asked == [
        ("encoder", {"pixel_values": pixels[:1].tolist()}),
        ("encoder", {"pixel_values": pixels[1:].tolist()}),
        ("projector", {"states": [[[10], [11], [20], [21]]]}),
    ]
    assert {name: [part.reshape(-1).tolist() for part in parts] for name, parts in found.items()} == {
        "states": [[10, 11], [20, 21]],
        "image_features": [[10], [20]],
        "image_embeds": [[110, 111, 120, 121]],
    }


# Commands for polygraphy.


def test_a_graph_is_compared_by_the_largest_of_each_output_and_whole_numbers_exactly():
    outputs = {"y": array(1, -4, 2), "half": np.array([0.5], np.float16), "index": np.array([7, 9])}

    said = polygraphy.command(Path("b/g.onnx"), Path("out"), "g", outputs, 1e-4)

    assert said == (
        "polygraphy run b/g.onnx --onnxrt --load-inputs out/g.inputs.json --load-outputs out/g.outputs.json "
        "--rtol 0 --atol y:0.0004 half:5e-05 index:0"
    )


def test_outputs_are_written_as_polygraphy_reads_them(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2]

    polygraphy._write(tmp_path / "a.json", polygraphy._results({"y": values}))

    said = tiny.read_json(tmp_path / "a.json")
    ((runner, (result,)),) = said["lst"]
    assert (runner, said["polygraphy_class"]) == ("lvlm-edge check", "RunResults")
    assert {key: result[key] for key in ("runtime", "runner_name", "polygraphy_class")} == {
        "runtime": 0, "runner_name": "lvlm-edge check", "polygraphy_class": "IterationResult"
    }  # fmt: skip
    output = result["outputs"]["y"]
    assert (output["polygraphy_class"], output["values"]["polygraphy_class"]) == ("LazyArray", "ndarray")
    read = np.load(io.BytesIO(base64.b64decode(output["values"]["array"])), allow_pickle=False)
    assert read.dtype == np.float32 and read.tolist() == [[0, 2], [3, 5]]


def test_graphs_read_what_they_read_of_a_prompt_and_of_the_token_behind_it():
    graphs = [
        graph("decode", "decode", "x", "y"),
        graph("vision", "image", "p", "f"),
        graph("tail", "prefill", "f x", "y"),
    ]
    pipe = pipe_of(graphs=graphs)
    told: list[Any] = []
    buffers: dict[Any, np.ndarray] = {(each.name, t.name): array(0) for each in graphs for t in each.inputs}

    def generate_tokens(prompt: Any, pixels: Any, **options: Any) -> None:
        told.append((prompt, pixels, options))
        for values in buffers.values():
            values += 1

    pipe.forget_images = lambda: told.append("forget")
    pipe.generate_tokens = generate_tokens
    pipe.buffer = lambda graph, name: SimpleNamespace(read=lambda: buffers[graph, name])
    case: Any = SimpleNamespace(prompt=(5,), pixels="pixels")

    found = polygraphy._inputs(pipe, case)

    steps = [((5,), "pixels", {"max_new_tokens": n, "ignore_eos": True}) for n in (1, 2)]
    assert told == ["forget", *steps]
    assert [(of.name, {name: values.tolist() for name, values in given.items()}) for of, given in found] == [
        ("vision", {"p": [1]}),
        ("tail", {"f": [1], "x": [1]}),
        ("decode", {"x": [2]}),
    ]


@pytest.mark.parametrize("there", ["folder", "link", "nothing"])
def test_a_place_for_files_must_be_free(there, tmp_path):
    place = tmp_path / "saved"
    if there == "folder":
        place.mkdir()
    elif there == "link":
        place.symlink_to(tmp_path / "nowhere")

    if there == "nothing":
        polygraphy.check_target(place, "ort")
        with pytest.raises(UsageError, match=r"--save-polygraphy has the outputs of ort, not of trt; leave --backend"):
            polygraphy.check_target(place, "trt")
    else:
        with pytest.raises(UsageError, match=r"saved: exists; give another folder"):
            polygraphy.check_target(place, "ort")


# Prompts whose logits are not finite.


@pytest.mark.parametrize(
    ("spoilt", "where"),
    [
        ({"present.1.value": np.nan}, "first in layer 1"),
        ({"present.2.key": np.inf, "present.1.key": -np.inf}, "first in layer 1"),
        ({"present.0.key": np.nan, "present.2.value": np.nan}, "first in layer 0"),
        ({}, "behind the last layer"),
    ],
    ids=str,
)
def test_the_first_layer_whose_caches_are_not_finite_is_named(spoilt, where):
    graphs = [
        SimpleNamespace(name=name, inputs=[SimpleNamespace(name=read)]) for name, read in (("a", "x"), ("b", "y"))
    ]
    made = {"a": ["present.0.key", "present.0.value", "present.1.key", "y"], "b": ["present.1.value", "present.2.key"]}
    made["b"].append("present.2.value")
    given = []

    def run_graph(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
        given.append((name, sorted(inputs)))
        return {output: array(1, spoilt.get(output, 2)) for output in made[name]}

    pipe = pipe_of("0", "1", "2", dtype="float16", role=lambda role: graphs if role == "prefill" else [])
    pipe.run_graph = run_graph

    row = parity._overflow(pipe, SimpleNamespace(name="full"), {"x": array(1)})

    assert given == [("a", ["x"]), ("b", ["y"])]  # what one graph returns the next one reads
    assert (row.case, row.stage, row.passed, row.figure, row.bound) == ("full", "finite", False, 1, 0)
    assert row.note == f"{where}; activations left the range of float16: export with --dtype bfloat16 or float32"


# The highest logits, as a backend finds them.


@pytest.mark.parametrize(
    ("ids", "scores", "wrong"),
    [
        ([1, 3], [4, 3], 0),
        ([1, 3], [4, 2.5], 1),
        ([0, 3], [4, 3], 1),  # another's score
        ([2, 3], [1, 3], 1),  # token 1 is above the lowest
        ([0, 2], [0, 1], 2),  # and token 3
        ([0, 1, 3], [0, 4, 3], 0),
    ],
)
def test_logits_that_are_called_the_highest_are_and_none_is_above(ids, scores, wrong):
    """Tokens 0 to 3 have logits 0, 4, 1 and 3; equal to the lowest of the highest is not above it."""
    logits = array(0, 4, 1, 3) if len(ids) == 2 else array(0, 4, 0, 3)
    wrong += int(ids == [0, 3])  # token 1 is above 3, too
    pipe = pipe_of(role=lambda role: [graph("early", role, "", ""), graph("last", role, "", "")])
    pipe.highest = lambda: Highest(np.array(ids), array(*scores))
    pipe.buffer = lambda *of: {("last", "logits"): SimpleNamespace(read=lambda: logits[None, None])}[of]

    (row,) = parity._highest(pipe, CASE)

    assert (row.stage, row.figure, row.bound, row.passed) == ("highest logits", wrong, 0, wrong == 0)
    pipe.highest = lambda: None
    assert parity._highest(pipe, CASE) == []


# What rounded weights cost.


def test_a_loss_is_told_and_not_judged():
    found = LOGITS + array([0, 0, 0, 0], [0, -1, 1, 0], [0, 0, 0, 0])
    asked = []

    def generate_tokens(prompt: Any, pixels: Any, **options: Any) -> Any:
        asked.append((prompt, pixels, options))
        return SimpleNamespace(token_ids=[0, 2, 3], logits=found)

    case: Any = SimpleNamespace(name="short", prompt=(5, 6), pixels="pixels")

    (row,) = parity._losses(SimpleNamespace(generate_tokens=generate_tokens), [case], [reference(LOGITS)])  # type: ignore[arg-type]

    assert asked == [((5, 6), "pixels", {"max_new_tokens": 3, "ignore_eos": True})]
    assert (row.case, row.stage, row.bound, row.passed) == ("short", "loss", None, True)
    assert row.figure == pytest.approx(1 / 3)  # of the second step, whose largest logit is 3
    assert row.note == "1 of 3 tokens are the checkpoint's"


# Rows of images.


@pytest.mark.parametrize("separated", [False, True])
def test_rows_of_images_are_pytorchs_and_separators_the_bundles(separated):
    kinds = (
        [("text", 2), ("visual", 3), ("separator", 1), ("visual", 2)] if separated else [("visual", 3), ("visual", 2)]
    )
    pictures = [SimpleNamespace(runs=[SimpleNamespace(kind=kind, rows=rows) for kind, rows in kinds])]
    pipe = pipe_of(pictures=pictures, image_rows={"image_embeds": "x"}, embedding=SimpleNamespace(hidden=2))
    left = np.arange(12, dtype=np.float32).reshape(1, 6, 2)  # as the vision graph left it: the last row separates
    pipe.buffer = lambda graph, name: (
        SimpleNamespace(read=lambda: left) if (graph, name) == ("vision", "image_embeds") else None
    )
    embeds, injected = torch.arange(10.0).reshape(5, 2) + 50, torch.ones(5, 2)

    found = parity._image_rows(
        pipe, replace(reference(LOGITS), image_embeds=embeds, injected={"deep": injected}), pictures
    )

    rows = embeds.numpy()
    wanted = np.concatenate([rows[:3], left[0, -1:], rows[3:]]) if separated else rows
    assert np.array_equal(found["image_embeds"], wanted)
    assert np.array_equal(found["deep"], injected.numpy()) and set(found) == {"image_embeds", "deep"}


def test_images_without_rows_have_none():
    assert parity._image_rows(pipe_of(image_rows={}), reference(LOGITS), ()) == {}


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


# Kept tokens that differ within the error of their scores: PyTorch goes on with the bundle's.


class Answers:
    """A pipeline that keeps given tokens, and notes what it is asked."""

    def __init__(self, kept: Any, logits: Any) -> None:
        self.kept, self.logits, self.asked = kept, logits, list[Any]()
        self.manifest = SimpleNamespace(
            method="fastv", method_config={"a": 1}, dtype="float32", formats=None, image_rows={}, cache=[],
            pictures=(), placeholders={}, fewer_pictures=True,
        )  # fmt: skip
        self.bundle, self.forgotten, self.backend = None, 0, SimpleNamespace(name="trt")

    def generate_tokens(self, prompt: Any, pixels: Any, **options: Any) -> Any:
        self.asked.append(("generate", prompt, options))
        return SimpleNamespace(kept_visual=self.kept, token_ids=[0, 1, 3], logits=self.logits)

    def score_tokens(self, prompt: Any, pixels: Any, tokens: Any) -> Any:
        self.asked.append(("score", prompt, tokens))
        return self.logits

    def prefill_inputs(self, prompt: Any, rows: Any, pictures: Any = ()) -> Any:
        return {"last_index": np.array([0])}

    def forget_images(self) -> None:
        self.forgotten += 1

    def highest(self) -> None:
        return None


ASKED: Any = SimpleNamespace(name="short", prompt=(5, 6), pixels=[], sizes=((7, 8),))
LAST = ("generate", (5, 6), {"max_new_tokens": 3, "ignore_eos": True})


@pytest.mark.parametrize(
    ("kept", "passed", "again"),
    [([0, 2], True, False), ([0, 3], True, True), ([0, 3], False, False), (None, True, False)],
)
@pytest.mark.parametrize("as_it_runs", [False, True])
def test_the_reference_goes_on_with_tokens_that_are_as_good(kept, passed, again, as_it_runs, monkeypatch):
    runs: list[Any] = []
    expected = replace(reference(LOGITS), kept=None if kept is None else torch.tensor([0, 2]))

    def run(model: Any, config: Any, prompt: Any, pixels: Any, steps: int, kept: Any = None) -> Reference:
        assert pixels == "pixels of ((7, 8),)"  # references read the sizes of the pictures too
        runs.append((prompt, steps, None if kept is None else kept.tolist()))
        return expected

    chosen = None if kept is None else np.array(kept)
    pipe: Any = Answers(chosen, LOGITS)
    seen = [row(passed)]
    for module in (parity, as_run):
        monkeypatch.setattr(module.references, "module", lambda name: SimpleNamespace(run=run))
        monkeypatch.setattr(module.references, "given", lambda model, pixels, sizes: f"pixels of {sizes}")
        monkeypatch.setattr(module.vision, "compare", lambda *given: list(seen))
    monkeypatch.setattr(parity, "_selection", lambda *given: ([row(True)], chosen))
    monkeypatch.setattr(as_run, "_selection", lambda *given: [row(True)])

    rows = as_run._case(pipe, None, ASKED, 3, False) if as_it_runs else parity.compare(pipe, None, ASKED, 3)

    assert runs == [((5, 6), 3, None)] + [((5, 6), 3, kept)] * again
    assert [each.stage for each in rows][-3:] == ["prefill logits", "decode logits", "tokens"]
    assert len(rows) == 1 + (kept is not None) + 3
    assert pipe.asked[-2:] == ([("score", (5, 6), [0, 1, 3]), LAST])
    if as_it_runs:
        assert pipe.asked[0] == ("generate", (5, 6), {"max_new_tokens": 1})
    else:
        assert pipe.forgotten == 1  # caches may hold what PyTorch made of the images


def test_logits_that_are_not_finite_are_looked_for_in_the_caches(monkeypatch):
    monkeypatch.setattr(parity.references, "module", lambda name: SimpleNamespace(run=lambda *given: reference(LOGITS)))
    monkeypatch.setattr(parity.references, "given", lambda *given: None)
    monkeypatch.setattr(parity.vision, "compare", lambda *given: [])
    monkeypatch.setattr(parity, "_overflow", lambda *given: row(False))
    spoilt = LOGITS.copy()
    spoilt[0, 2] = np.inf

    found = [parity.compare(Answers(None, logits), None, ASKED, 3) for logits in (LOGITS, spoilt)]  # type: ignore[arg-type]

    assert [len(rows) for rows in found] == [3, 4]


def test_where_activations_are_rounded_graphs_are_judged_without_that_too(monkeypatch):
    called: list[Any] = []

    def judged(compare: Any, pipe: Any, model: Any, case: Any, steps: int, rounds: bool) -> list[judge.Row]:
        called.append((case.name, steps, rounds))
        return [row(True)]

    monkeypatch.setattr(as_run, "judged", judged)
    monkeypatch.setattr(as_run, "Pipeline", lambda bundle, backend: backend.problems.extend(problems))
    pipe: Any = SimpleNamespace(bundle=None, backend=SimpleNamespace(name="ort"))
    pipe.manifest = SimpleNamespace(formats=SimpleNamespace(quantized=True))

    problems = ["a.onnx: x", "b.onnx: y"]
    a, b, c = (SimpleNamespace(name=name) for name in "abc")
    rows = as_run.compare(pipe, None, [a, b, c], [2, 9, 3])  # type: ignore[list-item]

    assert called == [("a", 2, True), ("b", 9, True), ("c", 3, True), ("b", 9, False)]
    assert [each.stage for each in rows] == [
        *["as run: vision"] * 3, "as run, unrounded: vision", "as run, unrounded: rounding"
    ]  # fmt: skip
    assert (rows[-1].figure, rows[-1].passed, rows[-1].note) == (2, False, "a.onnx: x, 2 in all")
    problems = []
    last = as_run.compare(pipe, None, [a], [2])[-1]  # type: ignore[list-item]
    assert (last.figure, last.bound, last.passed, last.note) == (0, 0, True, "")

    floats = SimpleNamespace(formats=SimpleNamespace(quantized=False))
    for other in ({"backend": SimpleNamespace(name="ort-cuda")}, {"manifest": floats}):
        called.clear()
        rows = as_run.compare(SimpleNamespace(**vars(pipe) | other), None, [a], [2])  # type: ignore[arg-type, list-item]
        assert [each.stage for each in rows] == ["as run: vision"]
        assert called == [("a", 2, False)]  # and no run more


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
    default, zero = (cases.synthetic(of(room, images), *seed) for seed in ((), (0,)))
    assert [case.prompt for case in default] == [case.prompt for case in zero]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(default, zero, strict=True))
    again = cases.synthetic(of(room, images), seed=3)
    assert [case.prompt for case in again] == [case.prompt for case in found]
    assert room < 3 or cases.synthetic(of(room, images), seed=4)[0].prompt != found[0].prompt


def test_made_up_pictures_are_of_the_sizes_asked_for_or_fill_their_canvas():
    canvases = [Canvas(size=(28, 42)), Canvas(size=(56, 28), rule="multiple", factor=28), Canvas(size=(28, 42))]
    pictures = [SimpleNamespace(views=SimpleNamespace(canvas=canvas)) for canvas in canvases]
    pipe: Any = SimpleNamespace(manifest=SimpleNamespace(pictures=pictures))
    asked: Any = SimpleNamespace(sizes=(None, None, (9, 7)), num_videos=0)

    assert cases.planned_sizes(pipe, asked) == ((301, 207), (56, 28), (9, 7))


def test_cases_know_the_sizes_of_their_pictures_and_join_those_of_one_size():
    pipe = of(24, 2)
    other = SimpleNamespace(crop=(14, 14), resize_to=None, shortest_edge=14)
    pipe.manifest.pictures[1].views.how = other

    found = cases.synthetic(pipe, sizes=((5, 6), (7, 8)))

    assert all(case.sizes == ((5, 6), (7, 8)) for case in found)
    assert [[part.shape for part in case.pixels] for case in found] == [[(1, 3, 28, 42), (2, 3, 14, 14)]] * 3


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


def test_pictures_of_several_sizes_are_hashed_one_after_the_other():
    first, other = np.arange(12, dtype=np.float32).reshape(2, 2, 3), np.ones((1, 5), np.float32)
    bytes_ = first.tobytes()

    assert certificate._digest(first) == hashlib.sha256(bytes_).hexdigest()
    assert certificate._digest(first[:, ::-1]) != certificate._digest(first)
    assert certificate._digest([first, other]) == hashlib.sha256(bytes_ + other.tobytes()).hexdigest()


@pytest.fixture
def bundle(checkpoint_once, eager_once, tmp_path) -> Path:
    """A copy of a bundle, to write a certificate into."""
    right = tiny.bundle(checkpoint_once, eager_once, "none")
    copied = Path(shutil.copytree(right, tmp_path / "bundle"))
    eager.moved(right, copied)
    return copied


def test_a_question_is_compared_too_and_a_certificate_may_be_left_out(bundle, checkpoint_once, tmp_path):
    picture = tiny.picture(tmp_path / "a.png")
    case = cases.synthetic(Pipeline.load(bundle))[0]
    checkpoint = tiny.checkpoint(checkpoint_once)

    verdict = parity.check(bundle, checkpoint, cases=[case], question=("w5 w6", [picture]), steps=2, store=False)

    assert verdict.passed and verdict.unwritten == "" and not (bundle / "certificate.json").exists()
    compared = [row.case for row in verdict.rows if row.stage == "tokens"]
    assert compared == ["short", "question"]
    assert not [row.stage for row in verdict.rows if row.stage == "loss" or row.stage.startswith("as run")]
    alone = parity.check(bundle, checkpoint, cases=[], question=("w5 w6", [picture]), steps=2)
    assert {row.case for row in alone.rows} == {"checkpoint", "question"}
    said = tiny.read_json(bundle / "certificate.json")
    assert (said["steps"], [each["name"] for each in said["cases"]]) == ([8], ["question"])


def test_a_certificate_that_cannot_be_written_is_told_and_the_figures_with_it(bundle, checkpoint_once, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parity.certificate, "write", full)
    case = cases.synthetic(Pipeline.load(bundle))[0]

    verdict = parity.check(bundle, tiny.checkpoint(checkpoint_once), cases=[case], steps=1)

    assert verdict.passed and verdict.rows
    assert verdict.unwritten == (
        f"{bundle}: the certificate cannot be written (No space left on device); free some space, or correct the "
        "folder's mode"
    )


def test_at_least_one_case_is_compared():
    with pytest.raises(UsageError, match=r"^check: no cases are given, expected at least one; leave `cases` out for"):
        parity.check("nowhere", "nothing", cases=[])


def test_the_seed_and_the_steps_are_those_of_the_documentation():
    assert parity.Settings() == parity.Settings(steps=16, backend="ort", engines=None, keep_ratio=None, seed=0)
    assert parity.Settings().save_polygraphy is None


OTHERS: dict[str, tuple[Any, str]] = {
    "vocabulary": (lambda m: {"embedding": replace(m.embedding, vocab=161)}, "vocabulary: 160, the bundle has 161"),
    "hidden size": (lambda m: {"embedding": replace(m.embedding, hidden=33)}, "hidden size: 32, the bundle has 33"),
    "layers": (lambda m: {"cache": m.cache[:1]}, "layers: 2, the bundle has 1"),
    "placeholders": (
        lambda m: {"pictures": (replace(m.pictures[0], token_id=7),)},
        "placeholders: [159], the bundle has [7]",
    ),
    "visual tokens": (lambda m: {"counts": replace(m.counts, visual_tokens=5)}, "visual tokens: 4, the bundle has 5"),
    "projector": (lambda m: {"image_rows": {}}, "projector: True, the bundle has False"),
    "separators": (
        lambda m: {"pictures": (replace(m.pictures[0], runs=(Run(kind="separator", rows=1),)),)},
        "separators: False, the bundle has True",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_other_sizes_is_not_the_bundles(name, bundle, checkpoint_once):
    change, said = OTHERS[name]
    opened, folder = open_bundle(bundle), tiny.checkpoint(checkpoint_once)
    parity.check_fits(opened, folder)

    with pytest.raises(CheckpointError) as caught:
        parity.check_fits(replace(opened, manifest=replace(opened.manifest, **change(opened.manifest))), folder)

    assert str(caught.value) == f"{folder}: {said}; give the checkpoint that was exported"

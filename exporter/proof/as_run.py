"""The graphs that a backend runs, from pixels to tokens, against PyTorch that rounds activations where they do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lvlm_edge.exporter import references
from lvlm_edge.exporter.proof import unrounded, vision
from lvlm_edge.exporter.proof.cases import Case, ranked
from lvlm_edge.exporter.proof.judge import (
    ROUNDED,
    SCORE_TOLERANCE,
    TOLERANCE,
    Row,
    answers,
    judged,
    kept_set,
)
from lvlm_edge.exporter.references import Reference
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.backends.ort import library


def compare(pipe: Pipeline, model: Any, cases: Sequence[Case], steps: Sequence[int]) -> list[Row]:
    """Features, scores, kept set, logits and tokens of every case; stages are named `as run: ...`.

    Where ONNX Runtime rounds activations, its graphs are also judged without that, as closely as floats are, behind the
    prompt with the most steps: stages are named `as run, unrounded: ...`.

    Args:
        pipe: the bundle as it is run.
        model: the reference, with the weights that the bundle stands for.
        steps: tokens of every case.
    """
    rounds = pipe.backend.name == "ort" and pipe.manifest.formats.quantized
    rows = [row for case, n in zip(cases, steps, strict=True) for row in judged(_case, pipe, model, case, n, rounds)]
    rows = [replace(row, stage=f"as run: {row.stage}") for row in rows]
    if rounds:
        rows += _unrounded(pipe, model, *max(zip(cases, steps, strict=True), key=lambda pair: pair[1]))
    return rows


def _unrounded(pipe: Pipeline, model: Any, case: Case, steps: int) -> list[Row]:
    backend = unrounded.Unrounded(library())
    rows = judged(_case, Pipeline(pipe.bundle, backend), model, case, steps, False)
    problems = backend.problems
    note = f"{problems[0]}, {len(problems)} in all" if problems else ""
    rows.append(Row(case=case.name, stage="rounding", figure=len(problems), bound=0, passed=not problems, note=note))
    return [replace(row, stage=f"as run, unrounded: {row.stage}") for row in rows]


def _case(pipe: Pipeline, model: Any, case: Case, steps: int, rounds: bool) -> list[Row]:
    with _products(pipe, model, rounds):
        expected = _reference(pipe, model, case, steps)
        rows = vision.compare(pipe, case, expected, _bound(pipe, TOLERANCE, rounds))
        kept = pipe.generate_tokens(case.prompt, case.pixels, max_new_tokens=1).kept_visual
        if kept is not None and expected.kept is not None:
            rows += _selection(
                pipe, case, expected, kept, _bound(pipe, SCORE_TOLERANCE, rounds)
            )  # before graphs of later tokens write scores of their own
            if not np.array_equal(kept, expected.kept.numpy()) and all(row.passed for row in rows):
                expected = _reference(pipe, model, case, steps, torch.from_numpy(kept))
    forced = pipe.score_tokens(case.prompt, case.pixels, expected.tokens)
    found = pipe.generate_tokens(case.prompt, case.pixels, max_new_tokens=steps, ignore_eos=True)
    return rows + answers(case.name, expected, forced, found.token_ids, _bound(pipe, TOLERANCE, rounds))


def _products(pipe: Pipeline, model: Any, rounds: bool) -> AbstractContextManager[None]:
    """PyTorch's products as the backend computes them: ONNX Runtime alone has formats of prompts, and rounds."""
    formats = pipe.manifest.formats
    if rounds or (pipe.backend.name == "ort" and formats.prompt is not None):
        return references.quantised.as_run(model, formats, rounds=rounds)
    return nullcontext()


def _reference(pipe: Pipeline, model: Any, case: Case, steps: int, kept: torch.Tensor | None = None) -> Reference:
    run, pixels = references.module(pipe.manifest.method).run, references.given(model, case.pixels, case.sizes)
    found: Reference = run(model, pipe.manifest.method_config, case.prompt, pixels, steps, kept=kept)
    return found


def _selection(pipe: Pipeline, case: Case, expected: Reference, kept: Any, bound: float) -> list[Row]:
    """The scores of the last prompt and the tokens that were kept by them."""
    assert expected.score is not None and expected.kept is not None
    graph = next(g for g in pipe.manifest.role("prefill") if any(t.name == "score" for t in g.outputs))
    score, wanted = pipe.buffer(graph.name, "score").read()[0].astype(np.float32), expected.score.numpy()
    error, bound = float(np.abs(score - wanted).max()), bound * float(wanted.max())
    return [
        Row(case=case.name, stage="scores", figure=error, bound=bound, passed=error <= bound),
        kept_set(case.name, kept, wanted, expected.kept.numpy(), error, ranked(pipe, case)),
    ]


def _bound(pipe: Pipeline, bounds: dict[str, float], rounds: bool) -> float:
    own = bounds[pipe.manifest.dtype]
    return max(own, ROUNDED) if rounds else own

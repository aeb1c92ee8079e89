"""Figures of a comparison, the bounds they must keep, and the verdict."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvlm_edge.exporter.references import Reference
from lvlm_edge.runtime.errors import BundleError

Array = NDArray[Any]

CHECKPOINT = "checkpoint"  # the case of what no prompt is needed for

# Largest error of a row over its reference's largest magnitude (for scores, of all scores).
# float32: rounding of sums in another order, seen at 5e-6. float16: 11 bits over some dozen layers, seen at 8e-3.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
SCORE_TOLERANCE = {"float32": 1e-4, "float16": 1e-2}
# Where activations are rounded too: 1e-7, until a value lies between two steps and falls to the other one, which layers
# after it spread. Seen up to 0.065 in YOPO's bundles of random weights, 0.05 in others'.
ROUNDED = 0.1
EQUAL = 1e-6  # of the largest logit: what two runs of one graph may differ by


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: what, the figure found, the bound it must keep (None: it is only told), and the verdict."""

    case: str
    stage: str
    figure: float
    bound: float | None
    passed: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All rows, and whether every one passed.

    Attributes:
        not_judged: what the checkpoint gave nothing to judge by.
        unwritten: why the certificate could not be written; empty if it was, or was not to be.
    """

    rows: tuple[Row, ...]
    not_judged: tuple[str, ...] = ()
    unwritten: str = ""

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def first_failure(self) -> Row | None:
        """The first stage that differs: where to look."""
        return next((row for row in self.rows if not row.passed), None)


def judged(compare: Callable[..., list[Row]], pipe: Any, model: Any, case: Any, *more: Any) -> list[Row]:
    """The rows of a comparison; one that says why where a graph cannot be run to its end."""
    try:
        return compare(pipe, model, case, *more)
    except BundleError as error:
        return [Row(case=case.name, stage="runs", figure=1, bound=0, passed=False, note=str(error))]


def kept_set(case: str, kept: Array, score: Array, wanted: Array, error: float, parts: int = 1) -> Row:
    """The kept set. Tokens may change places only when their scores are closer than twice the error of the scores.

    Args:
        kept, wanted: indices of kept visual tokens, [k]: those found, and the reference's.
        score: the reference's importance of every visual token, [V].
        error: largest error of the scores found.
        parts: of equal length, in which the tokens are ranked.
    """
    mine, theirs = set(kept.tolist()), set(wanted.tolist())
    lost, gained = sorted(theirs - mine), sorted(mine - theirs)
    size, count = len(score) // parts, len(wanted) // parts
    margin, widest, complete = float("inf"), 0.0, len(kept) == len(mine) == len(theirs)
    for i in range(parts):
        order = np.sort(score[i * size : (i + 1) * size])[::-1]
        margin = min(margin, float(order[count - 1] - order[count]) if count < size else float("inf"))
        out, into = ([index for index in side if index // size == i] for side in (lost, gained))
        complete &= len(out) == len(into)
        widest = max(widest, float(score[out].max() - score[into].min())) if out and into else widest
    note = f"margin at the cut {margin:.2e}" + (f", {len(lost)} swapped" if lost else "")
    passed = complete and widest <= 2 * error
    return Row(case=case, stage="kept set", figure=len(lost), bound=0, passed=passed, note=note)


def answers(case: str, expected: Reference, forced: Array, tokens: list[int], bound: float) -> list[Row]:
    """Logits of every step after the reference's own tokens, and the tokens of an answer of its own.

    A token may differ where the errors of its logit and of the reference's token's explain it.

    Args:
        forced: logits found after the prompt and the reference's tokens before each step, float32 [steps, vocab].
        tokens: found without being told any, at most as many.
        bound: of the error of the logits.
    """
    reference = expected.logits.numpy()
    rows = [
        close(case, "prefill logits", forced[:1], reference[:1], bound),
        replace(close(case, "decode logits", forced, reference, bound), note=f"{len(forced)} steps"),
    ]
    flip = next((t for t, token in enumerate(tokens) if token != expected.tokens[t]), None)
    if flip is None:
        return [*rows, Row(case=case, stage="tokens", figure=0, bound=0, passed=True, note=f"{len(tokens)} equal")]
    pair = [expected.tokens[flip], tokens[flip]]
    gap = float(reference[flip, pair[0]] - reference[flip, pair[1]])
    most = float(np.abs(forced[flip, pair] - reference[flip, pair]).sum()) + EQUAL * float(np.abs(reference).max())
    note = f"token {flip} is {pair[1]}, expected {pair[0]}; their logits differ by {gap:.2e}"
    return [*rows, Row(case=case, stage="tokens", figure=gap, bound=most, passed=gap <= most, note=note)]


def apart(tokens: list[int], logits: Array | None, wanted: list[int], reference: Array) -> tuple[float, int]:
    """Error of the logits as long as the tokens before them are equal, and how many tokens are."""
    assert logits is not None
    same = next((t for t, (a, b) in enumerate(zip(tokens, wanted, strict=True)) if a != b), len(wanted))
    return error_of(logits[: same + 1], reference[: same + 1]), same


def error_of(found: Array, reference: Array) -> float:
    """Largest error of a row over the row's own largest magnitude; enormous where something is not finite.

    Args:
        found, reference: [..., n]; rows are those of the last axis.
    """
    apart = np.abs(found.astype(np.float32) - reference).max(-1)
    errors = apart / np.maximum(np.abs(reference).max(-1), np.finfo(np.float32).tiny)
    error = float(errors.max(initial=0.0))
    return error if np.isfinite(error) else sys.float_info.max  # JSON knows no infinity


def close(case: str, stage: str, found: Array, expected: Array, bound: float) -> Row:
    """A tensor against the reference's."""
    figure = error_of(found, expected)
    return Row(case=case, stage=stage, figure=figure, bound=bound, passed=bool(figure <= bound))

"""Figures of a comparison, the bounds they must keep, and the verdict."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvlm_edge.exporter.references import Reference

Array = NDArray[Any]

# Largest error of a tensor over its reference's largest magnitude (at least 1; for scores, the largest score).
# float32: rounding of sums in another order, seen at 1e-6. float16: 11 bits over some dozen layers, seen at 5e-3.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
SCORE_TOLERANCE = {"float32": 1e-4, "float16": 1e-2}


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


def kept_set(case: str, kept: Array, score: Array, wanted: Array, error: float) -> Row:
    """The kept set. Tokens may change places only when their scores are closer than twice the error of the scores.

    Args:
        kept, wanted: indices of kept visual tokens, [k]: those found, and the reference's.
        score: the reference's importance of every visual token, [V].
        error: largest error of the scores found.
    """
    mine, theirs = set(kept.tolist()), set(wanted.tolist())
    lost, gained = sorted(theirs - mine), sorted(mine - theirs)
    order = np.sort(score)[::-1]
    margin = float(order[len(wanted) - 1] - order[len(wanted)]) if len(wanted) < len(score) else float("inf")
    widest = float(score[lost].max() - score[gained].min()) if lost and gained else 0.0
    complete = len(kept) == len(mine) == len(theirs)
    note = f"margin at the cut {margin:.2e}" + (f", {len(lost)} swapped" if lost else "")
    passed = complete and widest <= 2 * error
    return Row(case=case, stage="kept set", figure=len(lost), bound=0, passed=passed, note=note)


def answers(case: str, expected: Reference, tokens: list[int], logits: Array, bound: float) -> list[Row]:
    """First logits, then every later step as long as the tokens agree; a flip is allowed only in a near tie.

    Args:
        tokens, logits: those found, float32 [steps, vocab]; row t gave token t.
        bound: of the error of the logits.
    """
    reference, steps = expected.logits.numpy(), len(expected.tokens)
    flip = next((t for t in range(steps) if tokens[t] != expected.tokens[t]), None)
    shown = steps if flip is None else flip + 1
    rows = [
        close(case, "prefill logits", logits[:1], reference[:1], bound),
        close(case, "decode logits", logits[:shown], reference[:shown], bound),
    ]
    if flip is None:
        return [*rows, Row(case=case, stage="tokens", figure=0, bound=0, passed=True, note=f"{steps} equal")]
    gap = float(reference[flip, expected.tokens[flip]] - reference[flip, tokens[flip]])
    most = 2 * bound * max(1.0, float(np.abs(reference[flip]).max()))
    note = f"token {flip} is {tokens[flip]}, expected {expected.tokens[flip]}; their logits differ by {gap:.2e}"
    return [*rows, Row(case=case, stage="tokens", figure=gap, bound=most, passed=gap <= most, note=note)]


def apart(tokens: list[int], logits: Array | None, wanted: list[int], reference: Array) -> tuple[float, int]:
    """Error of the logits as long as the tokens before them are equal, and how many tokens are."""
    assert logits is not None
    same = next((t for t, (a, b) in enumerate(zip(tokens, wanted, strict=True)) if a != b), len(wanted))
    return error_of(logits[: same + 1], reference[: same + 1]), same


def error_of(found: Array, reference: Array) -> float:
    """Largest error over the reference's largest magnitude, at least 1; enormous where something is not finite."""
    error = float(np.abs(found.astype(np.float32) - reference).max()) / max(1.0, float(np.abs(reference).max()))
    return error if np.isfinite(error) else sys.float_info.max  # JSON knows no infinity


def close(case: str, stage: str, found: Array, expected: Array, bound: float) -> Row:
    """A tensor against the reference's."""
    figure = error_of(found, expected)
    return Row(case=case, stage=stage, figure=figure, bound=bound, passed=bool(figure <= bound))

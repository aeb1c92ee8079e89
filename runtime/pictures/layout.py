"""What a placeholder stands for, and where a prompt's rows are; the only file that expands placeholders.

A `Picture` is decided by the model's family at export and written into the manifest as data. This file interprets it
and knows no family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvlm_edge.runtime.pictures.views import Views

KINDS = ("visual", "separator", "text", "cached")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Consecutive rows of one kind.

    Attributes:
        kind: `visual` (visual tokens), `separator` (a learned row), `text` (tokens of the vocabulary), or `cached`
            (visual tokens that have no rows in the prompt: the decoder's layers read their features from caches).
        rows: number of rows.
        ids: token ids of a `text` run.
        grid: (rows, columns) of the cells that visual tokens lie on, row-major; None where they lie on none.
        leading: visual tokens before those of the grid, which belong to no cell (a class token).
        missing: cells at the front of the grid that have no visual token.
        row_ends: visual tokens behind each row of the grid, which belong to no cell (a newline).
    """

    kind: str
    rows: int
    ids: tuple[int, ...] = ()
    grid: tuple[int, int] | None = None
    leading: int = 0
    missing: int = 0
    row_ends: int = 0


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What one placeholder stands for: a picture, or a video.

    Attributes:
        token_id: the placeholder's token; below 0 where the tokenizer has none.
        graphs: names of the graphs that run for this picture, in order. A graph with `pixel_values` runs once per
            view; one without runs once on the outputs of the graph before it, joined in view order.
        views: how an image file becomes `pixel_values`.
        runs: the rows that replace the placeholder, in prompt order.
    """

    token_id: int
    graphs: tuple[str, ...]
    views: Views
    runs: tuple[Run, ...]

    @property
    def kind(self) -> str:
        """`image` or `video`."""
        return "video" if self.views.frames else "image"

    def rows(self, *kinds: str) -> int:
        """Rows of some kinds; of all that stand in the prompt where none is named."""
        return sum(run.rows for run in self.runs if run.kind in (kinds or ("visual", "separator", "text")))

    @property
    def visual_tokens(self) -> int:
        return self.rows("visual", "cached")


@dataclass(frozen=True)
class Rows:
    """A prompt's rows.

    Attributes:
        ids: token ids of the text rows, int64 [t].
        text: the text rows, int64 [t].
        image: rows that take an image graph's output, int64 [i].
        visual: rows of visual tokens, int64 [v].
        positions: of every row, int64 [axes, rows].
        next: position of the first generated token.
    """

    ids: NDArray[Any]
    text: NDArray[Any]
    image: NDArray[Any]
    visual: NDArray[Any]
    positions: NDArray[Any]
    next: int

    @property
    def count(self) -> int:
        return int(self.positions.shape[1])


def lay_out(prompt: Sequence[int], pictures: Sequence[Picture], axes: int = 1) -> Rows:
    """The rows of a prompt.

    Args:
        prompt: token ids, in which each picture's placeholder stands once, in the order of `pictures`.
        pictures: what the placeholders stand for.
        axes: 1, or 3 for positions of time, row and column: the cells of a grid then share a time, and the position
            after a picture is its first one plus the longer side of its grid (`get_rope_index` of Qwen2-VL).

    Source: Qwen2-VL (arXiv:2409.12191) for three axes.
    """
    waiting, at = list(pictures), 0
    kinds: list[NDArray[Any]] = []
    ids: list[int] = []
    positions: list[NDArray[Any]] = []
    for token in prompt:
        found = bool(waiting) and token == waiting[0].token_id
        for run in waiting.pop(0).runs if found else (Run(kind="text", rows=1, ids=(int(token),)),):
            if run.kind == "cached":
                continue
            kinds.append(np.full(run.rows, KINDS.index(run.kind)))
            ids += run.ids
            where, step = _positions(run, axes)
            positions.append(at + where)
            at += step
    kind = np.concatenate(kinds) if kinds else np.zeros(0, np.int64)
    return Rows(
        ids=np.array(ids, np.int64),
        text=np.flatnonzero(kind == KINDS.index("text")),
        image=np.flatnonzero(kind != KINDS.index("text")),
        visual=np.flatnonzero(kind == KINDS.index("visual")),
        positions=np.concatenate(positions, 1) if positions else np.zeros((axes, 0), np.int64),
        next=at,
    )


def _positions(run: Run, axes: int) -> tuple[NDArray[Any], int]:
    """Positions of a run's rows from its first, [axes, rows], and how far the next run begins behind it."""
    index = np.arange(run.rows)
    if axes == 1 or run.grid is None:
        return np.tile(index, (axes, 1)), run.rows
    row, column = np.divmod(index, run.grid[1])
    return np.stack([0 * row, row, column]), max(run.grid)


def positions_of(pictures: Sequence[Picture], axes: int) -> int:
    """Positions that pictures take of a prompt; at most their rows."""
    return sum(_positions(run, axes)[1] if run.rows else 0 for p in pictures for run in p.runs if run.kind != "cached")


def is_complete(run: Run) -> bool:
    """Whether a run's rows fill its grid, and its ids its rows."""
    if run.kind not in KINDS or run.rows < 1 or min(run.leading, run.missing, run.row_ends) < 0:
        return False
    if run.kind == "text":
        return len(run.ids) == run.rows and min(run.ids) >= 0
    if run.grid is None:
        return True
    rows, columns = run.grid
    return run.rows == rows * (columns + run.row_ends) + run.leading - run.missing

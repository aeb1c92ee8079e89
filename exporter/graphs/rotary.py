"""Rotary positions of a graph's rows: tables by one position, or frequencies that turn by time, row and column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lvlm_edge.exporter.checkpoints.spec import DecoderSpec
    from lvlm_edge.exporter.graphs.parts import Parts


@dataclass(frozen=True)
class Rotation:
    """How heads are turned to their positions.

    Attributes:
        cos, sin: tables [positions, D_h / 2], or values of each row [1, rows, D_h / 2] where `positions` is None.
        positions: original positions of the rows, [1, rows], int64.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor | None


def rotation(parts: Parts, positions: Tensor) -> Rotation:
    """The rotation of rows at some positions; to be made once per graph.

    Args:
        positions: [1, rows], int64; or [3, rows] of time, row and column, where each frequency turns by one of them.
    """
    if positions.shape[0] == 1:
        return Rotation(parts.rope_cos, parts.rope_sin, positions)
    axes = float_constant(sections(parts.spec.decoder), parts.rope_cos)  # [3, 1, D_h / 2]
    rows = positions.shape[1]
    found = [
        (table.index_select(0, positions.reshape(-1)).reshape(3, rows, -1) * axes).sum(0, keepdim=True)
        for table in (parts.rope_cos, parts.rope_sin)
    ]
    return Rotation(found[0], found[1], None)


def last_rows(rotation: Rotation, rows: int) -> Rotation:
    """The rotation of the last rows alone."""
    cos, sin, positions = rotation.cos, rotation.sin, rotation.positions
    if (cos if positions is None else positions).shape[1] == rows:
        return rotation
    if positions is None:
        return Rotation(cos[:, -rows:], sin[:, -rows:], None)
    return Rotation(cos, sin, positions[:, -rows:])


def sections(d: DecoderSpec) -> list[list[list[float]]]:
    """1 where a frequency turns by an axis, [3, 1, D_h / 2].

    Source: `apply_multimodal_rotary_pos_emb` of Qwen2-VL, `apply_interleaved_mrope` of Qwen3-VL.
    """
    count, (time, row, column) = d.head_dim // 2, d.rope_sections
    if d.rope_interleaved:
        by_row, by_column = range(1, 3 * row, 3), range(2, 3 * column, 3)
    else:
        by_row, by_column = range(time, time + row), range(time + row, time + row + column)
    axis = [1 if j in by_row else 2 if j in by_column else 0 for j in range(count)]
    return [[[float(a == wanted) for a in axis]] for wanted in range(3)]


def turned(parts: Parts, heads: Tensor, rotation: Rotation) -> Tensor:
    """Heads [1, H, rows, D_h] turned to their positions, in the rotate-half convention."""
    return parts.ops.rotate(heads, rotation.cos, rotation.sin, rotation.positions)


def float_constant(values: Sequence[object], like: Tensor) -> Tensor:
    """Numbers known at export, in the dtype of a tensor."""
    import torch

    return torch.tensor(values).to(like.dtype)

"""The Qwen-VL line's encoder as modules: patches in merge order, 2-D rotary embedding, attention in segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lvlm_edge.exporter.families._qwen import EPS, MERGE, VisionSpec, Windows, angles
from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.graphs.parts import Linear, Norm, activation
from lvlm_edge.exporter.planning import Lowering

Grid = tuple[int, int]
# Attention of every head of rows [1, H, N, e] inside segments, given queries, keys and values.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class RMSNorm(Norm):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, width: int, ops: Lowering) -> None:
        super().__init__(width)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, EPS)


class LayerNorm(Norm):
    """(x - mean) / deviation * weight + bias over the last axis."""

    def __init__(self, width: int, ops: Lowering) -> None:
        super().__init__(width, bias=True)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return self.ops.layer_norm(x, self.weight, self.bias, EPS)


AnyNorm = type[RMSNorm] | type[LayerNorm]


class Patch(nn.Module):
    """Convolution of patch size and stride on one frame, its rows in merge order: [1, 3, H, W] to [1, N, E]."""

    def __init__(self, v: VisionSpec, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(v.hidden, 3, v.patch, v.patch))
        self.bias = nn.Parameter(torch.empty(v.hidden)) if bias else None
        self.stride = v.patch

    def forward(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        x = F.conv2d(pixels, self.weight, self.bias, stride=self.stride)
        width, (rows, columns) = x.shape[1], grid
        cells = x.reshape(width, rows, MERGE, columns, MERGE).permute(1, 3, 2, 4, 0)
        return cells.reshape(1, rows * columns * MERGE**2, width)


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, ffn: int, act: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = Linear(width, ffn, True), Linear(ffn, width, True), activation(act)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.fc2(self.act(self.fc1(x)))
        return hidden


class GatedMlp(nn.Module):
    """activation(gate) * up, then down; all with a bias."""

    def __init__(self, width: int, ffn: int, act: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(width, ffn, True), Linear(width, ffn, True)
        self.down_proj, self.act = Linear(ffn, width, True), activation(act)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return hidden


class Block(nn.Module):
    """A pre-norm encoder block. Weights of its MLP are the block's own, by their names in the checkpoint."""

    def __init__(self, v: VisionSpec, ops: Lowering, norm: AnyNorm, mlp: type[Mlp] | type[GatedMlp]) -> None:
        super().__init__()
        self.heads, self.ops = v.heads, ops
        self.norm1, self.norm2 = norm(v.hidden, ops), norm(v.hidden, ops)
        self.q, self.k, self.v = (Linear(v.hidden, v.hidden, True) for _ in range(3))
        self.proj = Linear(v.hidden, v.hidden, True)
        self.mlp = mlp(v.hidden, v.ffn, v.mlp_act)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Rows [1, N, E] through the block.

        Args:
            turn: cosine and sine of the rows' rotary angles, [1, N, e / 2].
            attend: attention inside the block's segments.
        """
        normed = self.norm1(x)
        query, key, value = (blocks.split_heads(part(normed), self.heads) for part in (self.q, self.k, self.v))
        query, key = (self.ops.rotate(heads, *turn, None) for heads in (query, key))
        x = x + self.proj(blocks.join_heads(attend(query, key, value)))
        hidden: Tensor = x + self.mlp(self.norm2(x))
        return hidden


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What an encoder of the line has.

    Attributes:
        norm: of the blocks and the merger.
        mlp: of the blocks.
        bias: the patch embedding has one.
        windows: grid -> windows of the blocks that are not `full`; None where all see every patch.
        full: blocks that see every patch.
        taps: blocks whose outputs are injected into the decoder.
        grids: of visual tokens, for which the encoder has positions that are learnt; none where it has none.
    """

    norm: AnyNorm
    mlp: type[Mlp] | type[GatedMlp]
    bias: bool = False
    windows: Callable[[Grid], Windows] | None = None
    full: tuple[int, ...] = ()
    taps: tuple[int, ...] = ()
    grids: tuple[Grid, ...] = ()


class Encoder(nn.Module):
    """Patches through the blocks."""

    def __init__(self, v: VisionSpec, ops: Lowering, kind: Kind) -> None:
        super().__init__()
        self.spec, self.ops, self.kind = v, ops, kind
        self.patch = Patch(v, bias=kind.bias)
        self.blocks = nn.ModuleList(Block(v, ops, kind.norm, kind.mlp) for _ in range(v.layers))
        if kind.grids:  # a table of each grid, interpolated at export
            sizes = {name_of(grid): (grid[0] * grid[1] * MERGE**2, v.hidden) for grid in kind.grids}
            self.positions = nn.ParameterDict({n: nn.Parameter(torch.empty(size)) for n, size in sizes.items()})

    def forward(self, pixels: Tensor, grid: Grid) -> tuple[Tensor, list[Tensor]]:
        """Pixels of a canvas to what the merger reads, [1, N, E] in merge order, and what the other mergers read.

        Args:
            grid: (rows, columns) of visual tokens.
        """
        x, angle = self.patch(pixels, grid), angles(self.spec, grid)
        if self.kind.grids:
            x = x + self.positions[name_of(grid)]
        windows = self.kind.windows(grid) if self.kind.windows else None
        if windows is not None:
            order = np.array(windows.order)
            x = _cells(x, order)
            angle = angle.reshape(len(order), MERGE**2, -1)[order].reshape(angle.shape)
        turn = self._turn(angle, x)
        tapped = []
        for i, block in enumerate(self.blocks):
            inside = windows is not None and i not in self.kind.full
            x = block(x, turn, partial(self._inside, windows) if windows is not None and inside else self._whole)
            tapped += [x] if i in self.kind.taps else []
        return x if windows is None else _cells(x, np.argsort(windows.order)), tapped

    def _turn(self, angle: NDArray[np.float32], like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of angles [N, e / 2], [1, N, e / 2] each, in the dtype of a tensor."""
        return torch.tensor(np.cos(angle)[None]).to(like.dtype), torch.tensor(np.sin(angle)[None]).to(like.dtype)

    def _whole(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Every patch attends to every patch."""
        return self.ops.attend(query, key, value, False)

    def _inside(self, windows: Windows, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Patches attend to those of their window; windows of one size are a batch."""
        found, start = [], 0
        for count, cells in windows.groups:
            size = cells * MERGE**2
            rows = slice(start, start + count * size)
            batch = [_batched(heads[:, :, rows], count) for heads in (query, key, value)]
            attended = self.ops.attend(batch[0], batch[1], batch[2], False)
            number, width = attended.shape[1], attended.shape[3]
            found.append(attended.transpose(0, 1).reshape(1, number, count * size, width))
            start = rows.stop
        return found[0] if len(found) == 1 else torch.cat(found, 2)


def name_of(grid: Grid) -> str:
    """Name of a grid's learnt positions."""
    return f"{grid[0]}x{grid[1]}"


def _cells(x: Tensor, order: NDArray[np.int64]) -> Tensor:
    """Rows [1, N, E], four to a cell, with their cells in another order."""
    _, rows, width = x.shape
    cells = x.reshape(len(order), MERGE**2 * width).index_select(0, torch.tensor(order))
    return cells.reshape(1, rows, width)


def _batched(heads: Tensor, count: int) -> Tensor:
    """[1, H, count * size, e] to [count, H, size, e]."""
    _, number, rows, width = heads.shape
    return heads.reshape(number, count, rows // count, width).transpose(0, 1)


class Merger(nn.Module):
    """Four rows of a visual token side by side, linear, GELU, linear; the norm before merging, or after it."""

    def __init__(self, v: VisionSpec, hidden: int, ops: Lowering, norm: AnyNorm, *, after: bool = False) -> None:
        super().__init__()
        wide = v.hidden * MERGE**2
        self.wide, self.after = wide, after
        self.norm = norm(wide if after else v.hidden, ops)
        self.linear_1, self.linear_2 = Linear(wide, wide, True), Linear(wide, hidden, True)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.after else self.norm(x)
        x = x.reshape(1, -1, self.wide)
        x = self.norm(x) if self.after else x
        rows: Tensor = self.linear_2(F.gelu(self.linear_1(x)))
        return rows


class Projector(Merger):
    """The merger, and those of features that are injected into the decoder."""

    def __init__(self, v: VisionSpec, hidden: int, ops: Lowering, norm: AnyNorm, *, injected: int = 0) -> None:
        super().__init__(v, hidden, ops, norm)
        if injected:
            self.deepstack = nn.ModuleList(Merger(v, hidden, ops, norm, after=True) for _ in range(injected))

    def forward(self, features: Tensor, injected: Sequence[Tensor] = ()) -> list[Tensor]:  # type: ignore[override]
        """Rows of the visual tokens, row-major, [1, V, D]: the prompt's, then those that are injected."""
        others = [merger(x) for merger, x in zip(self.deepstack, injected, strict=True)] if injected else []
        return [super().forward(features), *others]

"""The Qwen-VL line's encoder as modules: patches in merge order, 2-D rotary embedding, attention in segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lvlm_edge.exporter.families._qwen import EPS, MERGE, VisionSpec, angles
from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.graphs.parts import Linear, Norm, activation
from lvlm_edge.exporter.planning import Lowering

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


class Encoder(nn.Module):
    """The encoder without positions that are learnt and without windows."""

    def __init__(
        self, v: VisionSpec, ops: Lowering, norm: AnyNorm, mlp: type[Mlp] | type[GatedMlp], *, bias: bool = False
    ) -> None:
        super().__init__()
        self.spec, self.ops = v, ops
        self.patch = Patch(v, bias=bias)
        self.blocks = nn.ModuleList(Block(v, ops, norm, mlp) for _ in range(v.layers))

    def forward(self, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
        """Pixels of a canvas to what the merger reads, [1, N, E] in merge order, and what others read.

        Args:
            grid: (rows, columns) of visual tokens.
        """
        x = self.patch(pixels, grid)
        turn = self.turn(angles(self.spec, grid), x)
        for block in self.blocks:
            x = block(x, turn, self.whole)
        return x, []

    def turn(self, found: NDArray[np.float32], like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of angles [N, e / 2], [1, N, e / 2] each, in the dtype of a tensor."""
        cos, sin = (torch.tensor(table(found)[None]).to(like.dtype) for table in (np.cos, np.sin))
        return cos, sin

    def whole(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Every patch attends to every patch."""
        return self.ops.attend(query, key, value, False)


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

"""CLIP and SigLIP vision encoders, and the two-layer projector, as modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvlm_edge.exporter.checkpoints.encoders import EncoderSpec
from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.graphs.parts import Linear, Norm, activation
from lvlm_edge.exporter.planning import Lowering


class VisionLayer(nn.Module):
    """A pre-norm encoder layer of CLIP or SigLIP."""

    def __init__(self, v: EncoderSpec, ops: Lowering) -> None:
        super().__init__()
        self.spec, self.act, self.ops = v, activation(v.mlp_act), ops
        self.layer_norm1, self.layer_norm2 = Norm(v.hidden, bias=True), Norm(v.hidden, bias=True)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(v.hidden, v.hidden, bias=True) for _ in range(4))
        self.fc1, self.fc2 = Linear(v.hidden, v.ffn, bias=True), Linear(v.ffn, v.hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        normed = self._norm(x, self.layer_norm1)
        q, k, v = (blocks.split_heads(p(normed), self.spec.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.out_proj(blocks.join_heads(self.ops.attend(q, k, v, False)))
        hidden: Tensor = x + self.fc2(self.act(self.fc1(self._norm(x, self.layer_norm2))))
        return hidden

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        assert norm.bias is not None
        return self.ops.layer_norm(x, norm.weight, norm.bias, self.spec.eps)


class PatchEmbedding(nn.Module):
    """Convolution of patch size and stride, weight [D, channels, P, P] as in the checkpoint."""

    def __init__(self, width: int, channels: int, patch: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, patch, patch))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.stride = patch

    def forward(self, pixels: Tensor) -> Tensor:
        """[1, C, H, W] to [1, patches, D], row by row."""
        return F.conv2d(pixels, self.weight, self.bias, stride=self.stride).flatten(2).transpose(1, 2)


class Table(nn.Module):
    """A learned table [rows, D], added as a whole."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))


class _Encoder(nn.Module):
    """The layers up to the highest feature layer; layers above are not built."""

    def __init__(self, v: EncoderSpec, ops: Lowering, *, bias: bool) -> None:
        super().__init__()
        self.spec, self.ops = v, ops
        self.patch_embedding = PatchEmbedding(v.hidden, v.channels, v.patch_size, bias=bias)
        self.position_embedding = Table(v.positions, v.hidden)
        self.layers = nn.ModuleList(VisionLayer(v, ops) for _ in range(max(v.feature_layers)))
        self.post_layernorm = Norm(v.hidden, bias=True) if v.post_norm else None

    def forward(self, pixels: Tensor) -> Tensor:
        """pixel_values [1, C, H, W] to the features the projector reads, [1, V, D * number of feature layers]."""
        states = [self.embed(pixels)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        if self.post_layernorm is not None:
            norm = self.post_layernorm
            assert norm.bias is not None
            states[-1] = self.ops.layer_norm(states[-1], norm.weight, norm.bias, self.spec.eps)
        chosen = [states[i][:, 1:] if self.spec.drop_first else states[i] for i in self.spec.feature_layers]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, -1)

    def embed(self, pixels: Tensor) -> Tensor:
        """The rows that enter the first layer."""
        raise NotImplementedError


class Clip(_Encoder):
    """A class token before the patches, and a LayerNorm before the layers."""

    def __init__(self, v: EncoderSpec, ops: Lowering) -> None:
        super().__init__(v, ops, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(v.hidden))
        self.pre_layrnorm = Norm(v.hidden, bias=True)  # spelled as in every CLIP checkpoint

    def embed(self, pixels: Tensor) -> Tensor:
        x = torch.cat([self.class_embedding.reshape(1, 1, -1), self.patch_embedding(pixels)], 1)
        x = x + self.position_embedding.weight
        assert self.pre_layrnorm.bias is not None
        return self.ops.layer_norm(x, self.pre_layrnorm.weight, self.pre_layrnorm.bias, self.spec.eps)


class Siglip(_Encoder):
    """Patches with a bias, and nothing before the layers."""

    def __init__(self, v: EncoderSpec, ops: Lowering) -> None:
        super().__init__(v, ops, bias=True)

    def embed(self, pixels: Tensor) -> Tensor:
        embedded: Tensor = self.patch_embedding(pixels) + self.position_embedding.weight
        return embedded


ENCODERS: dict[str, type[Clip] | type[Siglip]] = {"clip": Clip, "siglip": Siglip}


def cells_to_channels(x: Tensor, grid: int, merge: int) -> Tensor:
    """Patches [1, grid^2, E] to cells of merge x merge, [1, (grid / merge)^2, merge^2 * E].

    Cells stand row by row; inside of one the order is row, column, channel.
    """
    side, width = grid // merge, x.shape[-1]
    cells = x.reshape(side, merge, side, merge, width).permute(0, 2, 1, 3, 4)
    return cells.reshape(1, side * side, merge * merge * width)


class Projector(nn.Module):
    """Linear, activation, linear: vision features to visual tokens, and a learned separator behind them."""

    def __init__(self, wide: int, hidden: int, act: str, *, bias: bool, newline: bool) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(wide, hidden, bias), Linear(hidden, hidden, bias)
        self.act = activation(act)
        self.newline = nn.Parameter(torch.empty(hidden)) if newline else None

    def forward(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return tokens if self.newline is None else torch.cat([tokens, self.newline[None, None]], 1)

"""InternViT and its projector as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lvlm_edge.exporter.families._intern import PROJECTOR_EPS, QK_EPS, VisionSpec
from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.graphs.encoders import PatchEmbedding, cells_to_channels
from lvlm_edge.exporter.graphs.parts import Linear, Norm, activation
from lvlm_edge.exporter.planning import Lowering


class Block(nn.Module):
    """A pre-norm encoder layer whose two branches are scaled per channel."""

    def __init__(self, v: VisionSpec, ops: Lowering) -> None:
        super().__init__()
        self.spec, self.act, self.ops = v, activation(v.mlp_act), ops
        bias = v.norm == "layer_norm"
        self.layernorm_before, self.layernorm_after = Norm(v.hidden, bias), Norm(v.hidden, bias)
        self.q_proj, self.k_proj, self.v_proj = (Linear(v.hidden, v.hidden, v.qkv_bias) for _ in range(3))
        self.projection_layer = Linear(v.hidden, v.hidden, bias=True)
        if v.qk_norm:
            self.q_norm, self.k_norm = Norm(v.hidden), Norm(v.hidden)
        self.fc1, self.fc2 = Linear(v.hidden, v.ffn, bias=True), Linear(v.ffn, v.hidden, bias=True)
        self.lambda_1, self.lambda_2 = (nn.Parameter(torch.empty(v.hidden)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        normed = self._norm(x, self.layernorm_before)
        q, k, v = self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)
        if self.spec.qk_norm:
            q, k = self.ops.rms_norm(q, self.q_norm.weight, QK_EPS), self.ops.rms_norm(k, self.k_norm.weight, QK_EPS)
        q, k, v = (blocks.split_heads(part, self.spec.heads) for part in (q, k, v))
        x = x + self.lambda_1 * self.projection_layer(blocks.join_heads(self.ops.attend(q, k, v, False)))
        hidden: Tensor = x + self.lambda_2 * self.fc2(self.act(self.fc1(self._norm(x, self.layernorm_after))))
        return hidden

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        if norm.bias is None:
            return self.ops.rms_norm(x, norm.weight, self.spec.eps)
        return self.ops.layer_norm(x, norm.weight, norm.bias, self.spec.eps)


class InternViT(nn.Module):
    """A class token before the patches, a learned table, the layers; cells of patches without the class token."""

    def __init__(self, v: VisionSpec, ops: Lowering) -> None:
        super().__init__()
        self.spec, self.ops = v, ops
        self.patch_embedding = PatchEmbedding(v.hidden, 3, v.patch, bias=True)
        self.cls_token = nn.Parameter(torch.empty(1, 1, v.hidden))
        self.position_embeddings = nn.Parameter(torch.empty(1, v.grid**2 + 1, v.hidden)) if v.positions else None
        self.layers = nn.ModuleList(Block(v, ops) for _ in range(v.layers))
        self.layernorm = Norm(v.hidden, bias=True) if v.last_norm else None

    def forward(self, pixels: Tensor) -> Tensor:
        """pixel_values [1, 3, s, s] to what the projector reads, [1, cells, E * merge^2]."""
        x = torch.cat([self.cls_token, self.patch_embedding(pixels)], 1)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings
        for layer in self.layers:
            x = layer(x)
        if self.layernorm is not None:
            assert self.layernorm.bias is not None
            x = self.ops.layer_norm(x, self.layernorm.weight, self.layernorm.bias, self.spec.eps)
        cells = cells_to_channels(x[:, 1:], self.spec.grid, self.spec.merge)
        if self.spec.by_columns:
            side = self.spec.cells
            cells = cells.reshape(1, side, side, -1).transpose(1, 2).flatten(1, 2)
        return cells


class Projector(nn.Module):
    """Norm, linear, activation, linear."""

    def __init__(self, v: VisionSpec, hidden: int, ops: Lowering) -> None:
        super().__init__()
        wide = v.merge**2 * v.hidden
        self.norm, self.ops = Norm(wide, bias=True), ops
        self.linear_1, self.linear_2 = Linear(wide, hidden, bias=True), Linear(hidden, hidden, bias=True)
        self.act = activation(v.projector_act)

    def forward(self, features: Tensor) -> Tensor:
        assert self.norm.bias is not None
        normed = self.ops.layer_norm(features, self.norm.weight, self.norm.bias, PROJECTOR_EPS)
        tokens: Tensor = self.linear_2(self.act(self.linear_1(normed)))
        return tokens

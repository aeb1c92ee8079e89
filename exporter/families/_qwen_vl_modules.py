"""Qwen-VL-Chat's encoder and resampler as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lvlm_edge.exporter.families.qwen import EPS, HEAD, TABLE, VisionSpec
from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.graphs.encoders import PatchEmbedding
from lvlm_edge.exporter.graphs.parts import Linear, Norm, activation
from lvlm_edge.exporter.planning import Lowering


def _normed(x: Tensor, norm: Norm, ops: Lowering) -> Tensor:
    assert norm.bias is not None
    return ops.layer_norm(x, norm.weight, norm.bias, EPS)


class Layer(nn.Module):
    """A pre-norm layer of the encoder."""

    def __init__(self, v: VisionSpec, ops: Lowering) -> None:
        super().__init__()
        self.heads, self.act, self.ops = v.heads, activation("gelu"), ops
        self.ln_1, self.ln_2 = Norm(v.hidden, bias=True), Norm(v.hidden, bias=True)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(v.hidden, v.hidden, bias=True) for _ in range(4))
        self.c_fc, self.c_proj = Linear(v.hidden, v.ffn, bias=True), Linear(v.ffn, v.hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = _normed(x, self.ln_1, self.ops)
        q, k, v = (blocks.split_heads(part(rows), self.heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.out_proj(blocks.join_heads(self.ops.attend(q, k, v, False)))
        hidden: Tensor = x + self.c_proj(self.act(self.c_fc(_normed(x, self.ln_2, self.ops))))
        return hidden


class Encoder(nn.Module):
    """Patches without a class token, a table of positions, a norm, and the layers."""

    def __init__(self, v: VisionSpec, ops: Lowering) -> None:
        super().__init__()
        self.ops = ops
        self.patch_embedding = PatchEmbedding(v.hidden, 3, v.patch, bias=False)
        self.positions = nn.Parameter(torch.empty(v.grid**2, v.hidden))
        self.ln_pre = Norm(v.hidden, bias=True)
        self.layers = nn.ModuleList(Layer(v, ops) for _ in range(v.layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixel_values [1, 3, s, s] to features [1, patches, E]."""
        x = _normed(self.patch_embedding(pixels) + self.positions, self.ln_pre, self.ops)
        for layer in self.layers:
            x = layer(x)
        return x


class Resampler(nn.Module):
    """Learned queries that attend to the features, a norm and a matrix."""

    def __init__(self, v: VisionSpec, ops: Lowering) -> None:
        super().__init__()
        d = v.output
        self.heads, self.ops = d // HEAD, ops
        self.kv_proj = Linear(v.hidden, d) if v.joined else None
        self.ln_q, self.ln_kv, self.ln_post = (Norm(d, bias=True) for _ in range(3))
        self.query, self.pos_embed = (nn.Parameter(torch.empty(TABLE**2, d)) for _ in range(2))
        self.key_positions = nn.Parameter(torch.empty(v.grid**2, d))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(d, d, bias=True) for _ in range(4))
        self.proj = nn.Parameter(torch.empty(d, d))  # [in, out], as the checkpoint has it

    def forward(self, features: Tensor) -> Tensor:
        """Features [1, patches, E] to rows [1, 256, D]."""
        x = _normed(features if self.kv_proj is None else self.kv_proj(features), self.ln_kv, self.ops)
        asked = _normed(self.query[None], self.ln_q, self.ops) + self.pos_embed
        q, k, v = (
            blocks.split_heads(part(rows), self.heads)
            for part, rows in ((self.q_proj, asked), (self.k_proj, x + self.key_positions), (self.v_proj, x))
        )
        rows = self.out_proj(blocks.join_heads(self.ops.attend(q, k, v, False)))
        found: Tensor = _normed(rows, self.ln_post, self.ops) @ self.proj
        return found

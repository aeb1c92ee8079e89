"""Qwen-VL-Chat's encoder and resampler as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lvlm_edge.exporter.families._qwen_modules import LayerNorm
from lvlm_edge.exporter.families.qwen import HEAD, TABLE, VisionSpec
from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.graphs.encoders import PatchEmbedding
from lvlm_edge.exporter.graphs.parts import Linear, activation
from lvlm_edge.exporter.planning import Lowering


class Layer(nn.Module):
    """A pre-norm layer of the encoder."""

    def __init__(self, v: VisionSpec, ops: Lowering) -> None:
        super().__init__()
        self.heads, self.act, self.ops = v.heads, activation("gelu"), ops
        self.ln_1, self.ln_2 = LayerNorm(v.hidden, ops), LayerNorm(v.hidden, ops)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(v.hidden, v.hidden, bias=True) for _ in range(4))
        self.c_fc, self.c_proj = Linear(v.hidden, v.ffn, bias=True), Linear(v.ffn, v.hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.ln_1(x)
        q, k, v = (blocks.split_heads(part(rows), self.heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.out_proj(blocks.join_heads(self.ops.attend(q, k, v, False)))
        hidden: Tensor = x + self.c_proj(self.act(self.c_fc(self.ln_2(x))))
        return hidden


class Encoder(nn.Module):
    """Patches without a class token, a table of positions, a norm, and the layers."""

    def __init__(self, v: VisionSpec, ops: Lowering) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(v.hidden, 3, v.patch, bias=False)
        self.positions = nn.Parameter(torch.empty(v.grid**2, v.hidden))
        self.ln_pre = LayerNorm(v.hidden, ops)
        self.layers = nn.ModuleList(Layer(v, ops) for _ in range(v.layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixel_values [1, 3, s, s] to features [1, patches, E]."""
        x: Tensor = self.ln_pre(self.patch_embedding(pixels) + self.positions)
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
        self.ln_q, self.ln_kv, self.ln_post = (LayerNorm(d, ops) for _ in range(3))
        self.query, self.pos_embed = (nn.Parameter(torch.empty(TABLE**2, d)) for _ in range(2))
        self.key_positions = nn.Parameter(torch.empty(v.grid**2, d))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(d, d, bias=True) for _ in range(4))
        self.proj = nn.Parameter(torch.empty(d, d))  # [in, out], as the checkpoint has it

    def forward(self, features: Tensor) -> Tensor:
        """Features [1, patches, E] to rows [1, 256, D]."""
        x = self.ln_kv(features if self.kv_proj is None else self.kv_proj(features))
        asked = self.ln_q(self.query[None]) + self.pos_embed
        q, k, v = (
            blocks.split_heads(part(rows), self.heads)
            for part, rows in ((self.q_proj, asked), (self.k_proj, x + self.key_positions), (self.v_proj, x))
        )
        rows = self.out_proj(blocks.join_heads(self.ops.attend(q, k, v, False)))
        found: Tensor = self.ln_post(rows) @ self.proj
        return found

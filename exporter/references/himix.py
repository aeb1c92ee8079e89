"""HiMix after its released code: each layer has keys and values of its own of the raw vision features.

Visual tokens never enter the stack. Their keys are not turned, all text sees them, and positions count text only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lvlm_edge.exporter.references import Reference, original
from lvlm_edge.exporter.references.original import Cache, Original


@torch.no_grad()
def run(
    model: Any,
    method_config: dict[str, Any],
    prompt: Sequence[int],
    pixels: Tensor,
    steps: int,
    kept: Tensor | None = None,
) -> Reference:
    """Greedy tokens with HiMix, end-of-sequence ignored. Where an image stands in the prompt makes no difference."""
    m = original.view(model)
    features, embeds = m.see(pixels)
    ids = [token for token in prompt if token != m.image_token_id]
    image_kv = torch.stack([torch.stack(image_keys(m, i, embeds)) for i in range(len(m.decoder.layers))])

    cache: Cache = []
    last = _forward(m, image_kv, m.embed(ids), torch.arange(len(ids)), cache)
    prefill = original.stored(m, cache)
    logits, tokens = [m.logits(last)], []
    for step in range(steps):
        tokens.append(int(logits[-1].argmax()))
        if step + 1 < steps:
            row, at = m.embed(tokens[-1:]), torch.tensor([len(ids) + step])
            logits.append(m.logits(_forward(m, image_kv, row, at, cache)))
    return Reference(
        image_features=features,
        image_embeds=embeds,
        logits=torch.stack(logits),
        tokens=tokens,
        cache=prefill,
        image_kv=image_kv,
    )


def image_keys(m: Original, i: int, image: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the images' features [N, D_v] in a layer, each [H_kv, N, d]."""
    config = m.language.config
    name = f"layers.{i}."
    normed = original.rms_norm(image, m.extra[f"{name}input_layernorm_img.weight"], config.rms_norm_eps)
    found = []
    for part in ("k_proj_img", "v_proj_img"):
        weight, bias = (m.extra.get(f"{name}self_attn.{part}.{kind}") for kind in ("weight", "bias"))
        assert weight is not None
        flat = F.linear(normed, weight, bias)
        found.append(flat.view(len(image), config.num_key_value_heads, -1).transpose(0, 1))
    return found[0], found[1]


def _forward(m: Original, image_kv: Tensor, rows: Tensor, at: Tensor, cache: Cache) -> Tensor:
    """Text rows through every layer; what the cache holds came before them."""
    prefill = not cache
    for i, layer in enumerate(m.decoder.layers):
        q, k, v = original.qkv(layer, layer.input_layernorm(rows))
        q, k = original.rope(m.decoder, q, at), original.rope(m.decoder, k, at)
        if not prefill:
            k, v = torch.cat([cache[i][0], k], 1), torch.cat([cache[i][1], v], 1)
        cache[i : i + 1] = [(k, v)]
        image_k, image_v = (original.repeat(part, len(q)) for part in image_kv[i])
        causal = at[:, None] >= torch.arange(k.shape[1])[None]
        sees = torch.cat([torch.ones(len(rows), image_k.shape[1], dtype=torch.bool), causal], 1)
        heads = original.softmax(q, torch.cat([image_k, k], 1), sees) @ torch.cat([image_v, v], 1)
        rows = original.feed_forward(layer, rows + original.join(layer, heads))
    return rows

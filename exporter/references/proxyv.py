"""ProxyV after its released code: one packed sequence, one mask, every row by every row.

From the start layer on a proxy stands in for a block of visual tokens in attention and FFN, and what it learns there
goes back to the block by a small MLP. Decoding is plain: proxies leave nothing behind.
"""

from __future__ import annotations

import math
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
    """Greedy tokens with ProxyV, end-of-sequence ignored.

    Args:
        method_config: `start_layer`, `reduce_factor`, `learn_proxy`.
        prompt: with exactly one image.
        pixels: all crops of the image, the base view first.
    """
    m = original.view(model)
    start, factor, learnt = (method_config[name] for name in ("start_layer", "reduce_factor", "learn_proxy"))
    features, embeds = m.see(pixels)
    crops, each = features.shape[:2]
    side = math.isqrt(each)
    assert list(prompt).count(m.image_token_id) == 1 and side**2 == each and side % factor == 0
    before = list(prompt).index(m.image_token_id)
    after = len(prompt) - before - 1
    place = positions(before, after, crops, each, each // factor**2)

    full, newline = embeds, m.extra["image_newline"].expand(crops, -1)
    text = m.embed([*prompt[:before], *prompt[before + 1 :]])
    cache: Cache = []
    for i in range(start):
        kinds = {"full": full, "newline": newline, "text": text}
        full, newline, text = _layer(m, i, kinds, place, cache, queries=("full", "newline", "text"))

    scores = None
    if start < len(m.decoder.layers):
        if learnt:
            proxy, scores = _learnt_proxies(m, full.view(crops, each, -1))
        else:
            proxy = _pooled_proxies(full.view(crops, side, side, -1), factor)
    for i in range(start, len(m.decoder.layers)):
        kinds = {"full": full, "proxy": proxy, "newline": newline, "text": text}
        proxy, newline, text = _layer(m, i, kinds, place, cache, queries=("proxy", "newline", "text"))
        full = _update(m, f"vision_mlp_layers.{i - start}.", full, proxy, crops, side, factor, scores)

    prefill = original.stored(m, cache)
    logits, tokens = [m.logits(text)], []
    for step in range(steps):
        tokens.append(int(logits[-1].argmax()))
        if step + 1 < steps:
            at = before + (each + 1) * crops + after + step
            logits.append(m.logits(_decode(m, m.embed(tokens[-1:]), at, cache)))
    return Reference(
        image_features=features, image_embeds=embeds, logits=torch.stack(logits), tokens=tokens, cache=prefill
    )


def positions(before: int, after: int, crops: int, each: int, proxies: int) -> dict[str, Tensor]:
    """Positions of each kind of row.

    Args:
        before: text tokens before the image.
        after: text tokens after it.
        each: visual tokens per crop.
        proxies: proxy tokens per crop.
    """
    full = [before + (each + 1) * crop + j for crop in range(crops) for j in range(each)]
    # Every later crop's newline stands one crop too early in the released code, and weights were trained so.
    newline = [before + (each + 1) * max(0, crop - 1) + each for crop in range(crops)]
    suffix = before + (each + 1) * crops
    return {
        "full": torch.tensor(full),
        "proxy": torch.arange(before, before + crops * proxies),
        "newline": torch.tensor(newline),
        "text": torch.tensor([*range(before), *range(suffix, suffix + after)]),
    }


def visible(queries: Sequence[str], keys: Sequence[str], place: dict[str, Tensor]) -> Tensor:
    """Which keys each query sees, both packed in the order of the kinds, [queries, keys]."""
    blocks = []
    for q in queries:
        row = []
        for k in keys:
            sees = place[q][:, None] >= place[k][None]
            if (q == "proxy" and k == "full") or (q in ("newline", "text") and k == "proxy"):
                sees = torch.zeros_like(sees)
            row.append(sees)
        blocks.append(torch.cat(row, 1))
    return torch.cat(blocks)


def _layer(
    m: Original, i: int, kinds: dict[str, Tensor], place: dict[str, Tensor], cache: Cache, queries: tuple[str, ...]
) -> list[Tensor]:
    """One decoder layer: the new rows of the kinds that query. Keys and values of all but proxies are cached."""
    layer = m.decoder.layers[i]
    sizes = [len(rows) for rows in kinds.values()]
    rows, at = torch.cat(list(kinds.values())), torch.cat([place[kind] for kind in kinds])
    q, k, v = original.qkv(layer, layer.input_layernorm(rows))
    q, k = original.rope(m.decoder, q, at), original.rope(m.decoder, k, at)
    asks = torch.cat([torch.full((n,), kind in queries) for kind, n in zip(kinds, sizes, strict=True)])
    stays = torch.cat([torch.full((n,), kind != "proxy") for kind, n in zip(kinds, sizes, strict=True)])
    heads = original.softmax(q[:, asks], k, visible(queries, list(kinds), place)) @ v
    out = original.feed_forward(layer, rows[asks] + original.join(layer, heads))
    cache.append((k[:, stays], v[:, stays]))
    return list(torch.split(out, [len(kinds[kind]) for kind in queries]))


def _pooled_proxies(grid: Tensor, factor: int) -> Tensor:
    """Proxies by bilinear interpolation of each crop's grid [crops, side, side, D], [crops * P, D]."""
    small = F.interpolate(grid.movedim(-1, 1), scale_factor=1 / factor, mode="bilinear", align_corners=False)
    return small.movedim(1, -1).flatten(0, 2)


def _learnt_proxies(m: Original, full: Tensor) -> tuple[Tensor, Tensor]:
    """Proxies as learnt queries' mixtures of each crop's tokens, [crops * P, D], and their scores [crops, P, V]."""
    asked, key = m.extra["proxyv_initializer.proxyv_tokens"], m.extra["proxyv_initializer.Wk.weight"]
    scores = asked @ (full @ key.T).transpose(1, 2) * asked.shape[1] ** -0.5
    return (scores.softmax(-1) @ full).flatten(0, 1), scores


def _update(
    m: Original, name: str, full: Tensor, proxy: Tensor, crops: int, side: int, factor: int, scores: Tensor | None
) -> Tensor:
    """Full tokens after the guided update by this layer's proxies."""
    w = {key: m.extra[f"{name}{key}.weight"] for key in ("context_proj", "input_proj", "proj.0", "proj.2")}
    if scores is None:
        few = side // factor
        guide = (proxy @ w["context_proj"].T).view(crops, few, few, -1)
        guide = guide.repeat_interleave(factor, 1).repeat_interleave(factor, 2).flatten(0, 2)
    else:
        share = scores.transpose(1, 2).softmax(-1)  # [crops, V, P]
        guide = (share @ proxy.view(crops, -1, proxy.shape[-1])).flatten(0, 1) @ w["context_proj"].T
    inside = torch.cat([full @ w["input_proj"].T, guide], -1)
    total = F.silu(inside @ w["proj.0"].T) @ w["proj.2"].T + full
    return original.rms_norm(total, m.extra[f"{name}layernorm_post.weight"], m.language.config.rms_norm_eps)


def _decode(m: Original, row: Tensor, at: int, cache: Cache) -> Tensor:
    """One token through every layer, seeing all that is cached, [1, D]."""
    place = torch.tensor([at])
    for i, layer in enumerate(m.decoder.layers):
        q, k, v = original.qkv(layer, layer.input_layernorm(row))
        q, k = original.rope(m.decoder, q, place), original.rope(m.decoder, k, place)
        k, v = torch.cat([cache[i][0], k], 1), torch.cat([cache[i][1], v], 1)
        cache[i] = (k, v)
        heads = original.softmax(q, k, torch.ones(1, k.shape[1], dtype=torch.bool)) @ v
        row = original.feed_forward(layer, row + original.join(layer, heads))
    return row

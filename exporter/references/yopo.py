"""YOPO in both semantics, on full sequences with full masks.

`released` is the released code, a simulation: visual columns are zeroed after the softmax, in pruned heads and, from
the cutoff on, in all. `dropped` is what it stands for: those keys are gone before the softmax, and so are the visual
tokens from the cutoff on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
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
    """Greedy tokens with YOPO, end-of-sequence ignored.

    Args:
        method_config: `semantics`, `window`, `cutoff`, `ffn_ratio`, and `head_mask`, a string per layer in which 1
            is a head that stays for visual tokens.
        prompt: with exactly one image.
        pixels: the image, one crop.
    """
    m = original.view(model)
    assert list(prompt).count(m.image_token_id) == 1 and len(pixels) == 1 and m.newline is None
    features, embeds, rows, visual = m.read(prompt, pixels)
    forward = {"released": _released, "dropped": _dropped}[method_config["semantics"]]
    head_mask = torch.tensor([[c == "1" for c in row] for row in method_config["head_mask"]])

    cache: Cache = []
    at = torch.arange(len(rows))
    last = forward(m, method_config, head_mask, rows, at, visual, cache)
    prefill = original.stored(m, cache)
    logits, tokens = [m.logits(last)], []
    for step in range(steps):
        tokens.append(int(logits[-1].argmax()))
        if step + 1 < steps:
            place = torch.tensor([len(at) + step])
            logits.append(m.logits(forward(m, method_config, head_mask, m.embed(tokens[-1:]), place, visual, cache)))
    return Reference(
        image_features=features, image_embeds=embeds, logits=torch.stack(logits), tokens=tokens, cache=prefill
    )


def neighbours(side: int, window: int) -> Tensor:
    """Which visual tokens see each other: those at most half a window apart in rows and in columns, [V, V]."""
    reach = int((window - 1) / 2)
    at = torch.arange(side**2)
    row, column = at // side, at % side
    near = (row[:, None] - row[None]).abs() <= reach
    return near & ((column[:, None] - column[None]).abs() <= reach)


def visible(visual: Tensor, window: int) -> Tensor:
    """Causal, but for visual tokens among themselves, who see their neighbours on either side, [n, n]."""
    n, where = len(visual), visual.nonzero()[:, 0]
    sees = torch.ones(n, n, dtype=torch.bool).tril()
    sees[where[:, None], where[None]] = neighbours(math.isqrt(len(where)), window)
    return sees


def channels(m: Original, method_config: dict[str, Any]) -> int:
    """FFN channels that visual tokens use."""
    return int(m.language.config.intermediate_size / method_config["ffn_ratio"])


def released_probabilities(q: Tensor, k: Tensor, sees: Tensor, removed: Tensor) -> Tensor:
    """Probabilities [H, queries, keys] with removed keys [H, 1, keys] set to zero after the softmax."""
    return original.softmax(q, k, sees).masked_fill(removed, 0)


def _released(
    m: Original,
    method_config: dict[str, Any],
    head_mask: Tensor,
    rows: Tensor,
    at: Tensor,
    visual: Tensor,
    cache: Cache,
) -> Tensor:
    """The whole prompt, or one token after it: rows of the last layer. `visual` are the prompt's visual rows, [n]."""
    prefill = not cache
    new = visual if prefill else torch.tensor([False])  # visual rows among the rows at hand
    for i, layer in enumerate(m.decoder.layers):
        q, k, v = original.qkv(layer, layer.input_layernorm(rows))
        q, k = original.rope(m.decoder, q, at), original.rope(m.decoder, k, at)
        if not prefill:
            k, v = torch.cat([cache[i][0], k], 1), torch.cat([cache[i][1], v], 1)
        cache[i : i + 1] = [(k, v)]
        columns = torch.cat([visual, torch.zeros(k.shape[1] - len(visual), dtype=torch.bool)])
        sees = visible(visual, method_config["window"]) if prefill else torch.ones(1, len(columns), dtype=torch.bool)
        pruned = ~head_mask[i][:, None, None]  # [H, 1, 1]
        removed = (pruned | torch.tensor(i >= method_config["cutoff"])) & columns
        heads = released_probabilities(q, k, sees, removed) @ v
        heads = heads.masked_fill(pruned & new[:, None], 0)  # visual rows of pruned heads
        rows = rows + original.join(layer, heads)
        few = original.feed_forward(layer, rows, channels(m, method_config))
        rows = torch.where(new[:, None], few, original.feed_forward(layer, rows))
    return rows


def _dropped(
    m: Original,
    method_config: dict[str, Any],
    head_mask: Tensor,
    rows: Tensor,
    at: Tensor,
    visual: Tensor,
    cache: Cache,
) -> Tensor:
    """The whole prompt, or one token after it: text rows of the last layer."""
    prefill = not cache
    new = visual if prefill else torch.tensor([False])
    sees = visible(visual, method_config["window"])
    for i, layer in enumerate(m.decoder.layers):
        if i == method_config["cutoff"]:  # visual tokens leave
            rows, at, sees = rows[~new], at[~new], sees[~visual][:, ~visual]
            new, visual = torch.zeros(len(rows), dtype=torch.bool), torch.zeros(int((~visual).sum()), dtype=torch.bool)
        q, k, v = original.qkv(layer, layer.input_layernorm(rows))
        q, k = original.rope(m.decoder, q, at), original.rope(m.decoder, k, at)
        if not prefill:
            k, v = torch.cat([cache[i][0], k], 1), torch.cat([cache[i][1], v], 1)
        cache[i : i + 1] = [(k, v)]
        columns = torch.cat([visual, torch.zeros(k.shape[1] - len(visual), dtype=torch.bool)])
        heads = []
        for h in range(len(q)):
            allowed = sees if prefill else torch.ones(1, len(columns), dtype=torch.bool)
            if not head_mask[i, h]:
                allowed = allowed & ~columns[None]
            out = torch.zeros_like(q[h])
            asks = ~new if not head_mask[i, h] else torch.ones_like(new)  # a visual row of a pruned head is zero
            out[asks] = (original.softmax(q[h : h + 1, asks], k[h : h + 1], allowed[asks]) @ v[h : h + 1])[0]
            heads.append(out)
        rows = rows + original.join(layer, torch.stack(heads))
        few = original.feed_forward(layer, rows, channels(m, method_config))
        rows = torch.where(new[:, None], few, original.feed_forward(layer, rows))
    return rows

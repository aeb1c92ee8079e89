"""FastV on transformers' own layers, after the released code: eager attention, rank once, gather, keep positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lvlm_edge.exporter.references import Reference, original


@torch.no_grad()
def run(
    model: Any,
    method_config: dict[str, Any],
    prompt: Sequence[int],
    pixels: Any,
    steps: int,
    kept: Tensor | None = None,
) -> Reference:
    """Greedy tokens of the pruned model, end-of-sequence ignored. An image's newlines are ranked like its tokens.

    Args:
        method_config: `prune_layer`, `keep_tokens` or `keep_ratio`, and `rank`.
        kept: ascending indices of visual tokens to keep instead of the best ones, [k].
    """
    from transformers import DynamicCache

    m = original.view(model)
    decoder, read = m.decoder, m.lay_out(prompt, pixels)
    images, visual = read.images, read.images.nonzero()[:, 0]
    added = [_spread(rows, images) for rows in read.injected]

    k, cache = method_config["prune_layer"], DynamicCache()
    with original.recorded(decoder.layers[k - 1].self_attn, lambda i, o: o[1]) as attention:
        hidden = _layers(decoder, range(k), read.rows[None], read.positions, cache, added)
    score = attention[0][0, :, -1].mean(0)[visual]
    images_apart = method_config.get("rank") == "per-image"
    named = getattr(m, "placeholders", (m.image_token_id,))
    parts = sum(token in named for token in prompt) if images_apart else 1
    best = _best(score, parts, method_config["keep_tokens"], method_config["keep_ratio"])
    chosen = best if kept is None else kept
    stays = ~images
    stays[visual[chosen]] = True
    added = [rows[stays] for rows in added]
    positions = read.positions[..., stays]
    last = _layers(decoder, range(k, len(decoder.layers)), hidden[:, stays], positions, cache, added)

    logits, tokens = [], []
    for step in range(steps):
        logits.append(m.logits(last[0]))
        tokens.append(int(logits[-1].argmax()))
        if step + 1 < steps:
            row, position = m.embed(tokens[-1:])[None], m.at(read.next + step)
            last = _layers(decoder, range(len(decoder.layers)), row, position, cache, [])
    return Reference(
        image_features=read.features,
        image_embeds=read.embeds,
        logits=torch.stack(logits),
        tokens=tokens,
        hidden=hidden[0],
        score=score,
        kept=best,
        injected={f"deepstack.{i}": rows for i, rows in enumerate(read.injected)},
    )


def _best(score: Tensor, parts: int, count: int | None, ratio: float) -> Tensor:
    """Ascending indices of the highest scores: so many, or a share, of each of some parts of equal length."""
    size = len(score) // parts
    count = round(size * ratio) if count is None else count
    found = [
        part.sort(descending=True, stable=True).indices[:count] + i * size
        for i, part in enumerate(torch.split(score, size))
    ]
    return torch.cat(found).sort().values


def _spread(rows: Tensor, images: Tensor) -> Tensor:
    """Rows of images among those of the whole prompt, [n, D]; zeros at text."""
    found = torch.zeros(len(images), rows.shape[1], dtype=rows.dtype)
    found[images] = rows
    return found


def _layers(decoder: Any, layers: range, x: Tensor, positions: Tensor, cache: Any, added: Sequence[Tensor]) -> Tensor:
    """Some layers of the decoder over rows x, which come after what the cache holds.

    Args:
        added: what is added to the rows after layers 0, 1, ..., [n, D] each.
    """
    n = x.shape[1]
    mask = torch.full((n, n), float("-inf")).triu(1)[None, None] if n > 1 else None
    rope = decoder.rotary_emb(x, positions)
    for i in layers:
        x = decoder.layers[i](
            x, attention_mask=mask, position_ids=positions, past_key_values=cache, position_embeddings=rope
        )
        if i < len(added):
            x = x + added[i]
    return x

"""FastV on transformers' own layers, after the released code: eager attention, rank once, gather, keep positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lvlm_edge.exporter.references import Reference, expand, recorded


@torch.no_grad()
def run(
    model: Any,
    method_config: dict[str, Any],
    prompt: Sequence[int],
    pixels: Tensor,
    steps: int,
    kept: Tensor | None = None,
) -> Reference:
    """Greedy tokens of the pruned model, end-of-sequence ignored.

    Args:
        method_config: `prune_layer`, and `keep_tokens` or `keep_ratio`.
        kept: ascending indices of visual tokens to keep instead of the best ones, [k].
    """
    from transformers import DynamicCache

    core, decoder = model.model, model.model.language_model
    projector = core.multi_modal_projector
    with recorded(projector, lambda i, o: i[0]) as features:
        images = torch.cat(list(core.get_image_features(pixels).pooler_output))
    ids = expand(model, prompt, features[0].shape[1])
    rows = core.get_input_embeddings()(ids).clone()
    visual = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
    rows[0, visual] = images

    k, cache = method_config["prune_layer"], DynamicCache()
    positions = torch.arange(ids.shape[1])[None]
    with recorded(decoder.layers[k - 1].self_attn, lambda i, o: o[1]) as attention:
        hidden = _layers(decoder, range(k), rows, positions, cache)
    score = attention[0][0, :, -1].mean(0)[visual]
    count = method_config["keep_tokens"]
    count = round(len(visual) * method_config["keep_ratio"]) if count is None else count
    best = score.sort(descending=True, stable=True).indices[:count].sort().values
    chosen = best if kept is None else kept
    stays = torch.ones(ids.shape[1], dtype=torch.bool)
    stays[visual] = False
    stays[visual[chosen]] = True
    last = _layers(decoder, range(k, len(decoder.layers)), hidden[:, stays], positions[:, stays], cache)

    logits, tokens = [], []
    for step in range(steps):
        logits.append(model.lm_head(decoder.norm(last[:, -1])))
        tokens.append(int(logits[-1].argmax()))
        if step + 1 < steps:
            row = core.get_input_embeddings()(torch.tensor([tokens[-1:]]))
            last = _layers(decoder, range(len(decoder.layers)), row, torch.tensor([[ids.shape[1] + step]]), cache)
    return Reference(
        image_features=features[0],
        image_embeds=images,
        logits=torch.cat(logits),
        tokens=tokens,
        hidden=hidden[0],
        score=score,
        kept=best,
    )


def _layers(decoder: Any, layers: range, x: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Some layers of the decoder over rows x, which come after what the cache holds."""
    n = x.shape[1]
    mask = torch.full((n, n), float("-inf")).triu(1)[None, None] if n > 1 else None
    rope = decoder.rotary_emb(x, positions)
    for i in layers:
        x = decoder.layers[i](
            x, attention_mask=mask, position_ids=positions, past_key_values=cache, position_embeddings=rope
        )
    return x

"""No reduction: transformers' own `generate`."""

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
    pixels: Tensor,
    steps: int,
    kept: Tensor | None = None,
) -> Reference:
    """Greedy tokens of stock `generate`, end-of-sequence ignored."""
    from transformers import GenerationConfig

    m = original.view(model)
    features, embeds, rows, _ = m.read(prompt, pixels)
    settings = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    if isinstance(m, original.Hub):
        model.generation_config, count = GenerationConfig(), features.shape[1]
        ids = torch.tensor([[t for i in prompt for t in ([i] * count if i == m.image_token_id else [i])]])
        given = {"input_ids": ids, "pixel_values": pixels}
    else:
        m.language.generation_config = GenerationConfig()
        model, given = m.language, {"inputs_embeds": rows[None]}
    mask = torch.ones(1, len(rows), dtype=torch.int64)
    out = model.generate(**given, attention_mask=mask, generation_config=settings)
    return Reference(
        image_features=features,
        image_embeds=embeds,
        logits=torch.cat(out.logits),
        tokens=out.sequences[0, -steps:].tolist(),
    )

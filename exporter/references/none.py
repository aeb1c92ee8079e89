"""No reduction: transformers' own `generate`."""

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
    """Greedy tokens of stock `generate`, end-of-sequence ignored."""
    from transformers import GenerationConfig

    core, projector = model.model, model.model.multi_modal_projector
    with recorded(projector, lambda i, o: i[0]) as features:
        images = torch.cat(list(core.get_image_features(pixels).pooler_output))
    ids = expand(model, prompt, features[0].shape[1])
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, generation_config=settings
    )
    return Reference(
        image_features=features[0],
        image_embeds=images,
        logits=torch.cat(out.logits),
        tokens=out.sequences[0, ids.shape[1] :].tolist(),
    )

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
    pixels: Any,
    steps: int,
    kept: Tensor | None = None,
) -> Reference:
    """Greedy tokens of stock `generate`, end-of-sequence ignored."""
    m = original.view(model)
    read = m.lay_out(prompt, pixels)
    tokens, logits = m.answer(prompt, pixels, steps)
    return Reference(
        image_features=read.features,
        image_embeds=read.embeds,
        logits=logits,
        tokens=tokens,
        injected={f"deepstack.{i}": rows for i, rows in enumerate(read.injected)},
    )

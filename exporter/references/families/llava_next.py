"""LLaVA-NeXT on stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lvlm_edge.exporter.references.families import _stock


class Next(_stock.Stock):
    """The parts of a stock model, whose rows depend on the pictures' sizes."""

    def given(self, pixels: Any) -> dict[str, Any]:
        sizes = [(height, width) for width, height in self.sizes]
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def load(folder: Path) -> Next:
    """A checkpoint's stock model."""
    from transformers import LlavaNextForConditionalGeneration

    whole = _stock.load(LlavaNextForConditionalGeneration, folder)
    return Next(whole, tower=whole.model.vision_tower, projector=whole.model.multi_modal_projector)

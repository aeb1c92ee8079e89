"""LLaVA-OneVision on stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lvlm_edge.exporter.references.families import _stock


class OneVision(_stock.Stock):
    """The parts of a stock model, whose rows depend on the pictures' sizes and on how many they are."""

    def given(self, pixels: Any) -> dict[str, Any]:
        sizes = [(height, width) for width, height in self.sizes]
        given = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        several = len(sizes) > 1 and len(pixels) == len(sizes)
        return given | ({"pixel_values": pixels[:, None], "batch_num_images": [len(sizes)]} if several else {})


def load(folder: Path) -> OneVision:
    """A checkpoint's stock model."""
    from transformers import LlavaOnevisionForConditionalGeneration

    whole = _stock.load(LlavaOnevisionForConditionalGeneration, folder)
    return OneVision(whole, tower=whole.model.vision_tower, projector=whole.model.multi_modal_projector)

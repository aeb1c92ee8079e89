"""InternVL on stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lvlm_edge.exporter.references.families import _stock


class Intern(_stock.Stock):
    """The parts of a stock model, whose pictures stand between two tokens.

    Attributes:
        tokenizer, processor: the checkpoint's.
    """

    processed: ClassVar[dict[str, Any] | None] = {"crop_to_patches": True}

    def __init__(self, whole: Any, tokenizer: Any, processor: Any) -> None:
        super().__init__(whole, tower=whole.model.vision_tower, projector=whole.model.multi_modal_projector)
        self.tokenizer, self.processor = tokenizer, processor

    def given(self, pixels: Any) -> dict[str, Any]:
        return {"pixel_values": pixels}

    def embeds(self, given: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        views, seen = super().embeds(given)
        counts = [self.processor.get_number_of_image_patches(h, w, self.processed) for w, h in self.sizes]
        return [torch.cat(part) for part in _shared(views, counts)], seen

    def frame(self, index: int, count: int) -> list[int]:
        before, behind = self.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
        return [before, *super().frame(index, count), behind]


def _shared(views: list[Tensor], counts: list[int]) -> list[list[Tensor]]:
    """Views of all pictures, picture by picture."""
    left = iter(views)
    return [[next(left) for _ in range(count)] for count in counts]


def load(folder: Path) -> Intern:
    """A checkpoint's stock model."""
    from transformers import AutoImageProcessor, AutoTokenizer, InternVLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    return Intern(_stock.load(InternVLForConditionalGeneration, folder), tokenizer, processor)

"""InternVL on stock transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lvlm_edge.exporter.references import original
from lvlm_edge.exporter.references.families import _stock


class Intern(_stock.Stock):
    """The parts of a stock model, whose pictures stand between two tokens.

    Attributes:
        around: the two tokens.
        views: (height, width) of a picture -> how many views are made of it.
    """

    processed: ClassVar[dict[str, Any] | None] = {"crop_to_patches": True}

    def __init__(self, whole: Any, around: Sequence[int], views: Callable[[int, int], int]) -> None:
        super().__init__(whole, tower=whole.model.vision_tower, projector=whole.model.multi_modal_projector)
        self.around, self.views = around, views

    def given(self, pixels: Any) -> dict[str, Any]:
        return {"pixel_values": pixels}

    def embeds(self, given: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        found, seen = super().embeds(given)
        left = iter(found)
        return [torch.cat([next(left) for _ in range(self.views(h, w))]) for w, h in self.sizes], seen

    def grids(self, pictures: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
        views = [self.views(height, width) for width, height in self.sizes]
        each = sum(map(len, pictures)) // sum(views)
        return original.squares(sum(views), each)

    def frame(self, index: int, count: int) -> list[int]:
        before, behind = self.around
        return [before, *super().frame(index, count), behind]


def load(folder: Path) -> Intern:
    """A checkpoint's stock model."""
    from transformers import AutoImageProcessor, AutoTokenizer, InternVLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    return Intern(
        _stock.load(InternVLForConditionalGeneration, folder),
        tokenizer.convert_tokens_to_ids(["<img>", "</img>"]),
        lambda height, width: processor.get_number_of_image_patches(height, width, Intern.processed),
    )

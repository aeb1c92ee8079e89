"""SmolVLM and Idefics3 on stock transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvlm_edge.exporter.references import original
from lvlm_edge.exporter.references.families import _stock


class Smol(_stock.Stock):
    """The parts of a stock model, whose views stand between texts.

    Attributes:
        tokenizer, processor: the checkpoint's.
    """

    def __init__(self, whole: Any, tokenizer: Any, processor: Any) -> None:
        model = whole.model
        projector = model.connector.modality_projection
        super().__init__(whole, tower=model.vision_model, projector=projector, decoder=model.text_model)
        self.tokenizer, self.processor = tokenizer, processor
        self.grid = lru_cache(maxsize=None)(self._grid)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tiles of a picture of (width, height); (0, 0) where it has none."""
        from PIL import Image

        found = self.processor([Image.new("RGB", size)], return_row_col_info=True)
        return found["rows"][0][0], found["cols"][0][0]

    def given(self, pixels: Any) -> dict[str, Any]:
        return {"pixel_values": pixels[None]}

    def embeds(self, given: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        found, seen = super().embeds(given)
        views = [rows * columns + 1 for rows, columns in map(self.grid, self.sizes)]
        each = len(found[0]) // sum(views)
        return list(torch.split(found[0], [each * count for count in views])), seen

    def grids(self, pictures: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
        views = sum(rows * columns + 1 for rows, columns in map(self.grid, self.sizes))
        return original.squares(views, sum(map(len, pictures)) // views)

    def frame(self, index: int, count: int) -> list[int]:
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        rows, columns = self.grid(self.sizes[index])
        tokens = {
            "fake_token_around_image": "<fake_token_around_image>",
            "image_token": "<image>",
            "global_image_token": "<global-img>",
        }
        text = get_image_prompt_string(rows, columns, count // (rows * columns + 1), **tokens)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def load(kind: Any, folder: Path) -> Smol:
    """A checkpoint's stock model of a class."""
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    return Smol(_stock.load(kind, folder), tokenizer, processor)

"""Video-LLaVA on stock transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lvlm_edge.exporter.references import original
from lvlm_edge.exporter.references.families import _stock


class Video(_stock.Stock):
    """The parts of a stock model, which has a tower for images and one for the frames of videos.

    Attributes:
        order: placeholders of the prompt at hand.
    """

    processed: ClassVar[dict[str, Any] | None] = {"return_legacy_image_output": False}

    def __init__(self, whole: Any) -> None:
        super().__init__(whole, tower=whole.model.image_tower, projector=whole.model.multi_modal_projector)
        self.order: list[int] = []

    @property
    def placeholders(self) -> tuple[int, ...]:
        return self.image_token_id, self.whole.config.video_token_id

    def of_prompt(self, prompt: Sequence[int], pixels: Any) -> dict[str, Any]:
        """Images are one view each; what is left of the views are the frames of the videos, each as many."""
        self.order = [token for token in prompt if token in self.placeholders]
        images = self.order.count(self.image_token_id)
        videos = len(self.order) - images
        frames = (len(pixels) - images) // max(videos, 1)
        parts = torch.split(pixels, [1 if token == self.image_token_id else frames for token in self.order])
        pairs = list(zip(self.order, parts, strict=True))
        given = {}
        if images:
            given["pixel_values"] = torch.cat([part for token, part in pairs if token == self.image_token_id])
        if videos:
            given["pixel_values_videos"] = torch.stack([part for t, part in pairs if t != self.image_token_id])
        return given

    def embeds(self, given: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        model, found, read = self.whole.model, dict[int, list[Tensor]](), dict[int, list[Tensor]]()
        image, video = self.placeholders
        with original.recorded(self.projector, lambda i, o: i[0]) as seen:
            if "pixel_values" in given:
                found[image] = list(model.get_image_features(given["pixel_values"]).pooler_output)
                read[image] = list(seen.pop())
            if "pixel_values_videos" in given:
                videos = given["pixel_values_videos"]
                rows = model.get_video_features(videos).pooler_output
                found[video] = list(rows.reshape(len(videos), -1, rows.shape[-1]))
                features = seen.pop()
                read[video] = list(features.reshape(len(videos), -1, features.shape[-1]))
        pairs = [(found[token].pop(0), read[token].pop(0)) for token in self.order]
        return [rows for rows, _ in pairs], [features for _, features in pairs]

    def grids(self, pictures: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
        return tuple(grid for rows in pictures for grid in original.squares(1, len(rows)))

    def expanded(self, prompt: Sequence[int], counts: Sequence[int]) -> list[int]:
        left = iter(counts)
        return [t for token in prompt for t in ([token] * next(left) if token in self.placeholders else [token])]


def load(folder: Path) -> Video:
    """A checkpoint's stock model."""
    from transformers import VideoLlavaForConditionalGeneration

    return Video(_stock.load(VideoLlavaForConditionalGeneration, folder))

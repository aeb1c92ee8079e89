"""Qwen2.5-VL on stock transformers, whose encoder has patches window by window."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from lvlm_edge.exporter.references.families import _qwen, _stock


class Windowed(_qwen.Qwen):
    """The parts of a stock Qwen2.5-VL."""

    def features(self, seen: Tensor, grids: Tensor) -> Tensor:
        config = self.whole.config.vision_config
        order, _ = get_vision_window_index(grids, config.spatial_merge_size, config.window_size, config.patch_size)
        cells = seen.reshape(len(order), -1, seen.shape[-1])
        return cells[torch.argsort(order)].flatten(0, 1)


def load(folder: Path) -> Windowed:
    """A checkpoint's stock model."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Windowed(_stock.load(Qwen2_5_VLForConditionalGeneration, folder))

"""Qwen3-VL on stock transformers, with the features that its decoder's first layers add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvlm_edge.exporter.references.families import _qwen, _stock


class Injecting(_qwen.Qwen):
    """The parts of a stock Qwen3-VL."""

    def injected(self, out: Any) -> tuple[Tensor, ...]:
        return tuple(torch.cat(list(features)) for features in out.deepstack_features)


def load(folder: Path) -> Injecting:
    """A checkpoint's stock model."""
    from transformers import Qwen3VLForConditionalGeneration

    return Injecting(_stock.load(Qwen3VLForConditionalGeneration, folder))

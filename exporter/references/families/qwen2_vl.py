"""Qwen2-VL on stock transformers."""

from __future__ import annotations

from pathlib import Path

from lvlm_edge.exporter.references.families import _qwen, _stock


def load(folder: Path) -> _qwen.Qwen:
    """A checkpoint's stock model."""
    from transformers import Qwen2VLForConditionalGeneration

    return _qwen.Qwen(_stock.load(Qwen2VLForConditionalGeneration, folder))

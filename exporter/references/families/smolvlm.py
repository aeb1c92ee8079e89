"""SmolVLM on stock transformers."""

from __future__ import annotations

from pathlib import Path

from lvlm_edge.exporter.references.families import _smol


def load(folder: Path) -> _smol.Smol:
    """A checkpoint's stock model."""
    from transformers import SmolVLMForConditionalGeneration

    return _smol.load(SmolVLMForConditionalGeneration, folder)

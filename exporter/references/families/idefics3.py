"""Idefics3 on stock transformers."""

from __future__ import annotations

from pathlib import Path

from lvlm_edge.exporter.references.families import _smol


def load(folder: Path) -> _smol.Smol:
    """A checkpoint's stock model."""
    from transformers import Idefics3ForConditionalGeneration

    return _smol.load(Idefics3ForConditionalGeneration, folder)

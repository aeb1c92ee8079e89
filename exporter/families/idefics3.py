"""Idefics3 and the first SmolVLM in Hugging Face hub layout (`model_type: idefics3`): the layout of `smolvlm`."""

from __future__ import annotations

from dataclasses import replace

from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.families import smolvlm
from lvlm_edge.exporter.families.smolvlm import VisionSpec


def read(of: Checkpoint) -> ModelSpec[VisionSpec]:
    """The spec from config.json, see `smolvlm.read`."""
    return smolvlm.read(of, "idefics3")


FAMILY = replace(smolvlm.FAMILY, name="idefics3", read=read)

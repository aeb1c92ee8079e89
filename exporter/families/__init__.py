"""One file per model family; the record `planning.Family` says what a family has."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from typing import Any

from lvlm_edge.exporter.checkpoints import configs, integers, spec
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.planning import Family
from lvlm_edge.runtime.errors import UnsupportedError

# Names that another family's file serves.
ALIASES = dict.fromkeys(("llava_qwen", "llava_phi", "llava_phi3", "llava_mistral"), "llava_llama")


def names() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]


def load(name: str) -> Family[Any]:
    """A family by `model_type`.

    Raises:
        UnsupportedError: there is none of that name.
    """
    known = names()
    if ALIASES.get(name, name) not in known:
        known += ALIASES
        advice = configs.advice(name, known)
        raise UnsupportedError(f"family: model_type is {name!r}, which is not supported; {advice}")
    found = importlib.import_module(f"{__name__}.{ALIASES.get(name, name)}").FAMILY
    assert isinstance(found, Family)
    return found


def of(checkpoint: Checkpoint) -> Family[Any]:
    """The family of a checkpoint."""
    name = checkpoint.config["model_type"]
    if name == "llava" and "mm_vision_tower" in checkpoint.config and "text_config" not in checkpoint.config:
        name = "llava_llama"  # LLaVA-1.5's first releases had the name that the hub layout has now
    try:
        return load(name)
    except UnsupportedError as error:
        if "auto_map" not in checkpoint.config:
            raise
        raise UnsupportedError(f"{error}; the checkpoint's own code (auto_map) is not run") from error


def read(checkpoint: Checkpoint) -> ModelSpec[Any]:
    """The spec of a checkpoint; only its configs need to be there.

    Raises:
        CheckpointError: fields that are not valid or contradict each other.
        UnsupportedError: a family, a feature or a way of quantising that this version does not know.
    """
    path = checkpoint.folder / "config.json"
    found = of(checkpoint).read(checkpoint)
    spec.check(found, path)
    return replace(found, prequantised=integers.read(checkpoint.config, path))

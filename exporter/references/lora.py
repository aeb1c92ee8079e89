"""An adapter of peft on a reference's modules: added matrix by matrix, as its configuration says.

Modules are found by their names without the words that layouts and versions put in front of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, read_json

WORDS = {"base_model", "model", "language_model", "vision_tower", "_vision_tower", "vision_model", "visual"}
WORDS |= {"multi_modal_projector", "mm_projector", "connector", "_connector", "default"}


@torch.no_grad()
def add(m: Any, folder: Path) -> None:
    """Add an adapter to a reference, in place.

    Args:
        m: an `original.Original`.

    Raises:
        CheckpointError: the reference has no such module.
    """
    config = read_json(folder / "adapter_config.json")
    modules: dict[str, Any] = {}
    for part in (m.language, m.tower, m.projector):
        if part is not None:
            modules |= {_plain(name): one for name, one in part.named_modules() if isinstance(one, nn.Linear)}
    file = next(
        folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()
    )
    tensors = {_plain(name): tensor.read().float() for name, tensor in checkpoint.headers(file).items()}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module, rank = modules.get(name.removesuffix(".lora_A.weight")), config["r"]
        if module is None:
            raise CheckpointError(f"{folder}: is for {name}, which the model has not")
        low, high = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
        factor = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        module.weight += factor * (high @ low)


def _plain(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in WORDS)

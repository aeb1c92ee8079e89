"""Writes the quantised checkpoint: `compressed-tensors` in its format `pack-quantized`, and copies of all else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import Stored
from lvlm_edge.runtime.errors import LvlmEdgeError

_WEIGHTS = re.compile(r"^(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$")
_INDEX = "model.safetensors.index.json"


@dataclass
class Made:
    """What becomes of a checkpoint.

    Attributes:
        tensors: of the decoder's layers, by their names in the checkpoint.
        blocks: input channels of a scale, by the names of the modules whose matrices are small.
        others: names of the other linear modules.
        kept: those of them that would be small, but that no block divides their input channels.
        smoothed: layers in which AWQ's factors are used, by the first matrix that they multiply.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    smoothed: dict[str, int] = field(default_factory=dict)


def packed(key: str, integers: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """A matrix in `pack-quantized`: eight integers to an int32, the first in the lowest bits, each with 8 added."""
    rows, columns = integers.shape
    nibbles = (integers.to(torch.int32) + 8).view(rows, columns // 8, 8) << torch.arange(0, 32, 4, dtype=torch.int32)
    return {
        f"{key}_packed": nibbles.sum(-1, dtype=torch.int32),
        f"{key}_scale": scale,
        f"{key}_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }


def write(folder: Path, out: Path, stored: Mapping[str, Stored], made: Made, config: dict[str, Any]) -> None:
    """All files of the checkpoint: weights file by file as they lie there, config.json, copies of the rest."""
    _dump(config | {"quantization_config": described(made)}, out / "config.json")
    places: dict[str, str] = {}
    size = 0
    for file in sorted({tensor.file for tensor in stored.values()}):
        tensors = _tensors([key for key, tensor in stored.items() if tensor.file == file], stored, made.tensors)
        place = out / re.sub(r"^(pytorch_)?(.*)\.bin$", r"\2.safetensors", file.name)
        if file.parent != folder:  # of a model in several folders
            place = out / f"{file.parent.name}-{place.name}"
        try:
            save_file(tensors, place, metadata={"format": "pt"})
        except SafetensorError as error:
            raise LvlmEdgeError(f"{out.parent}: cannot be written ({error}); free some space") from error
        shutil.copymode(out / "config.json", place)  # it is made for its owner alone
        places |= dict.fromkeys(tensors, place.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(places.values())) > 1:
        _dump({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}, out / _INDEX)
    files = {tensor.file for tensor in stored.values()}
    taken = {file.name if file.parent == folder else file.parent.name for file in files}
    _copy(folder, out, taken | {"config.json"})


def _tensors(keys: Sequence[str], stored: Mapping[str, Stored], made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What stands for some tensors of a checkpoint; each has its own memory."""
    found: dict[str, Tensor] = {}
    for key in keys:
        small = {name: made[name] for name in (f"{key}_packed", f"{key}_scale", f"{key}_shape") if name in made}
        found |= small or {key: made[key] if key in made else checkpoint.read(stored[key])}
    return {key: tensor.contiguous().clone() for key, tensor in found.items()}


def _copy(folder: Path, out: Path, written: set[str]) -> None:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in written or _WEIGHTS.match(path.name):
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)


def _dump(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def described(made: Made) -> dict[str, Any]:
    """`quantization_config`, as the library compressed-tensors writes it; a group for every block size."""
    sizes = sorted(set(made.blocks.values()), reverse=True)
    named = {size: [path for path, block in made.blocks.items() if block == size] for size in sizes}
    return {
        "config_groups": {
            f"group_{i}": _scheme(named[size] if len(sizes) > 1 else ["Linear"], size) for i, size in enumerate(sizes)
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": made.others,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _scheme(targets: list[str], size: int) -> dict[str, Any]:
    return {
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": targets,
        "weights": {
            "dynamic": False,
            "group_size": size,
            "num_bits": 4,
            "strategy": "group",
            "symmetric": True,
            "type": "int",
        },
    }

"""What a checkpoint's tensors stand for, also where they are integers: read plainly from the formats' definitions.

Shares nothing with the exporter's reading of them: integers are taken out of their words one place after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, read_json

Array = NDArray[Any]
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # the channel that stands at each place of a word
ENDS = ("qweight", "weight_packed")


def quantised(folder: Path) -> dict[str, Any] | None:
    """What config.json says of integers in a checkpoint; None where it says nothing."""
    config = read_json(folder / "config.json")
    inside = config.get("text_config")
    found = config.get("quantization_config") or (inside or {}).get("quantization_config")
    return found if isinstance(found, dict) else None


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of integers, so that transformers does not look for any."""
    inside = config.get("text_config")
    found = {key: value for key, value in config.items() if key != "quantization_config"}
    return found | {"text_config": plain(inside)} if isinstance(inside, dict) else found


def state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name, float32.

    Raises:
        CheckpointError: a matrix lacks a tensor.
    """
    stored = {name: checkpoint.read(one) for name, one in checkpoint.index(folder).items()}
    config = quantised(folder)
    if config is None:
        return {name: tensor.float() for name, tensor in stored.items()}
    found = {}
    modules = sorted(name.rpartition(".")[0] for name in stored if _is_first(name, stored))
    for module in modules:
        own = {name.removeprefix(f"{module}."): stored.pop(name) for name in list(stored) if _owns(module, name)}
        bias = own.pop("bias", None)
        try:
            found[f"{module}.weight"] = torch.from_numpy(_matrix(config, own))
        except KeyError as error:
            raise CheckpointError(f"{folder}: {module} has no {error.args[0]}; download it again") from error
        if bias is not None:
            found[f"{module}.bias"] = bias
    found = {name: tensor.float() for name, tensor in (stored | found).items()}
    real = {m.rpartition(".")[2] for m in modules if f"{m}.bias" in found and found[f"{m}.bias"].any()}
    empty = {f"{m}.bias" for m in modules if m.rpartition(".")[2] not in real}  # AutoGPTQ's, of matrices that have none
    return {name: tensor for name, tensor in found.items() if name not in empty}


def _is_first(name: str, stored: dict[str, Tensor]) -> bool:
    """Whether a tensor is the one that says that its module is quantised."""
    module, _, end = name.rpartition(".")
    return end in ENDS or (end == "weight" and stored[name].dtype == torch.int8 and f"{module}.weight_scale" in stored)


def _owns(module: str, name: str) -> bool:
    return name.rpartition(".")[0] == module


def _matrix(config: dict[str, Any], own: dict[str, Tensor]) -> Array:
    """A module's weight, float32 [out, in]: scale * (integer - zero point), channel by channel of the input."""
    tensors = {
        end: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy() for end, tensor in own.items()
    }
    method = config["quant_method"]
    if method == "awq":
        values = _columns(tensors["qweight"], 4, AWQ).T
        zeros = _columns(tensors["qzeros"], 4, AWQ).T if "qzeros" in tensors else np.array([[8]])
        scales = tensors["scales"].T
    elif method == "gptq":
        bits = int(config["bits"])
        values = _columns(tensors["qweight"].T, bits)
        scales, zeros = tensors["scales"].T, np.array([[1 << (bits - 1)]])
        if "qzeros" in tensors:
            v2 = "gptq_v2" in (config.get("checkpoint_format"), config.get("format"))
            less = 0 if v2 else sum(1 << place for place in range(0, 32, bits))
            words = (tensors["qzeros"].astype(np.int64) + less) % (1 << 32)
            zeros = _columns(words, bits).T
    else:
        values, zeros, scales = _compressed(config, tensors)
    scales = scales.reshape(len(values), -1)
    group = tensors.get("g_idx", tensors.get("weight_g_idx"))
    if group is None or (group == -1).all():
        groups, inputs = scales.shape[1], values.shape[1]
        size = _group(config) or inputs
        if -(-inputs // size) != groups:  # one of several config_groups
            size = inputs // groups
        group = np.minimum(np.arange(inputs) // size, groups - 1)
    zeros = np.broadcast_to(zeros, scales.shape)
    found = np.empty(values.shape, np.float32)
    for i, g in enumerate(group):
        found[:, i] = scales[:, g] * (values[:, i] - zeros[:, g])
    return found


def _group(config: dict[str, Any]) -> int | None:
    """Input channels that share a scale; None for all of them."""
    if config["quant_method"] != "compressed-tensors":
        size = config.get("group_size", config.get("q_group_size", 128))
    else:
        size = next(iter(config["config_groups"].values()))["weights"].get("group_size")
    return None if size in (None, -1) else int(size)


def _compressed(config: dict[str, Any], tensors: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Integers [out, in], zero points [out, groups] and scales of compressed-tensors, around 0."""
    none = np.zeros((1, 1), np.int64)
    if "weight" in tensors:
        zeros = tensors.get("weight_zero_point", none)
        return (
            tensors["weight"].astype(np.int64),
            zeros.astype(np.int64).reshape(len(zeros), -1),
            tensors["weight_scale"],
        )
    bits = int(next(iter(config["config_groups"].values()))["weights"]["num_bits"])
    rows, columns = (int(n) for n in tensors["weight_shape"])
    middle = 1 << (bits - 1)
    values = _columns(tensors["weight_packed"], bits)[:, :columns] - middle
    zeros = none
    if "weight_zero_point" in tensors:
        zeros = _columns(tensors["weight_zero_point"].T, bits).T[:rows] - middle
    return values, zeros, tensors["weight_scale"]


def _columns(words: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """The integers of words [rows, n] side by side, int64; `order`: the column that stands at each place of a word."""
    each = 32 // bits
    found = np.empty((words.shape[0], words.shape[1] * each), np.int64)
    for place in range(each):
        column = place if order is None else order[place]
        found[:, column::each] = (words.astype(np.int64) >> (bits * place)) % (1 << bits)
    return found

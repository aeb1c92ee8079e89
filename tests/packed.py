"""Checkpoints that are quantised already, packed slowly from the formats' public definitions; nothing of ours in it.

- AWQ (AutoAWQ's `WQLinear_GEMM`): `qweight` int32 [in, out / 8], eight output channels to a word, of which place `i`
  from the lowest bits on holds channel ORDER[i]; `qzeros` int32 [groups, out / 8] the same way; `scales` [groups, out].
- GPTQ: `qweight` int32 [in * bits / 32, out], neighbouring input channels to a word; `qzeros` int32
  [groups, out * bits / 32], 1 less than they are but in `gptq_v2`; `scales` [groups, out]; `g_idx` int32 [in].
- compressed-tensors: `weight_packed` int32 [out, in * bits / 32], neighbouring input channels, 2 ** (bits - 1) more
  than they are; `weight_scale` [out, groups]; `weight_shape`; `weight_zero_point` packed along the output channels.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

Array = NDArray[Any]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
DECODER = r"^(?!.*vision).*layers\.\d+\.(self_attn|mlp)\.\w+_proj"


@dataclass(frozen=True)
class Rounded:
    """A matrix [out, in] as integers from 0 on, zero points and scales [out, groups], and what they stand for."""

    integers: Array
    zeros: Array
    scales: Array
    weight: Array


def rounded(weight: Array, bits: int, group: int | None, symmetric: bool) -> Rounded:
    """Rounded to nearest, group by group, with scales in float16."""
    outputs, inputs = weight.shape
    size = group or inputs
    integers = np.zeros((outputs, inputs), np.int64)
    zeros, scales = (np.zeros((outputs, math.ceil(inputs / size)), kind) for kind in (np.int64, np.float16))
    found, top = np.zeros((outputs, inputs), np.float32), 2**bits - 1
    for o in range(outputs):
        for g in range(scales.shape[1]):
            part = weight[o, g * size : (g + 1) * size]
            if symmetric:
                scale, zero = np.float16(np.abs(part).max() / (top // 2)), (top + 1) // 2
            else:
                low, high = min(part.min(), 0), max(part.max(), 0)
                scale = np.float16((high - low) / top)
                zero = int(np.clip(np.round(-low / np.float32(scale)), 0, top))
            whole = np.clip(np.round(part / np.float32(scale)) + zero, 0, top).astype(np.int64)
            integers[o, g * size : (g + 1) * size], zeros[o, g], scales[o, g] = whole, zero, scale
            found[o, g * size : (g + 1) * size] = np.float32(scale) * (whole - zero)
    return Rounded(integers, zeros, scales, found)


def words(values: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Integers [rows, n] in words [rows, n * bits / 32], int32; at place i of a word stands the one of `order[i]`."""
    each = 32 // bits
    rows, columns = values.shape
    found = np.zeros((rows, math.ceil(columns / each)), np.uint32)
    for r in range(rows):
        for w in range(found.shape[1]):
            for i in range(each):
                column = w * each + (i if order is None else order[i])
                if column < columns:
                    found[r, w] |= np.uint32(int(values[r, column]) << (bits * i))
    return found.view(np.int32)


def awq(name: str, r: Rounded, bits: int) -> dict[str, Array]:
    return {
        f"{name}.qweight": words(r.integers.T, bits, ORDER),
        f"{name}.qzeros": words(r.zeros.T, bits, ORDER),
        f"{name}.scales": r.scales.T,
    }


def gptq(name: str, r: Rounded, bits: int, *, less: int = 1) -> dict[str, Array]:
    inputs, groups = r.integers.shape[1], r.scales.shape[1]
    ones = sum(less << place for place in range(0, 32, bits))
    stored = (words(r.zeros.T, bits).view(np.uint32).astype(np.int64) - ones) % (1 << 32)
    return {
        f"{name}.qweight": words(r.integers, bits).T,
        f"{name}.qzeros": stored.astype(np.uint32).view(np.int32),
        f"{name}.scales": r.scales.T,
        f"{name}.g_idx": (np.arange(inputs) * groups // inputs).astype(np.int32),
    }


def gptq_v2(name: str, r: Rounded, bits: int) -> dict[str, Array]:
    return gptq(name, r, bits, less=0)


def packed(name: str, r: Rounded, bits: int) -> dict[str, Array]:
    found = {
        f"{name}.weight_packed": words(r.integers, bits),
        f"{name}.weight_scale": r.scales,
        f"{name}.weight_shape": np.array(r.integers.shape),
    }
    if (r.zeros != 2 ** (bits - 1)).any():
        found[f"{name}.weight_zero_point"] = words(r.zeros.T, bits).T
    return found


def plain(name: str, r: Rounded, bits: int) -> dict[str, Array]:
    middle = 2 ** (bits - 1)
    found = {f"{name}.weight": (r.integers - middle).astype(np.int8), f"{name}.weight_scale": r.scales}
    if (r.zeros != middle).any():
        found[f"{name}.weight_zero_point"] = (r.zeros - middle).astype(np.int8)
    return found


def compressed(kind: str, bits: int, group: int | None, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    """compressed-tensors' quantization_config; `more` goes to its top."""
    strategy = "channel" if group is None else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | {"dynamic": False}}},
        "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
        **more,
    }


@dataclass(frozen=True)
class Scheme:
    """A way of quantising: what config.json says, and how a matrix is packed."""

    pack: Callable[[str, Rounded, int], dict[str, Array]]
    bits: int
    group: int | None
    symmetric: bool
    config: dict[str, Any]


def _gptq(bits: int, group: int, sym: bool, form: str) -> Scheme:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": False}
    pack = gptq_v2 if form == "gptq_v2" else gptq
    return Scheme(pack, bits, None if group == -1 else group, sym, config | {"checkpoint_format": form})


def _awq(group: int) -> Scheme:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Scheme(awq, 4, group, False, config | {"modules_to_not_convert": ["vision_tower", "multi_modal_projector"]})


def _compressed(kind: str, bits: int, group: int | None, symmetric: bool = True) -> Scheme:
    pack = packed if kind == "pack-quantized" else plain
    return Scheme(pack, bits, group, symmetric, compressed(kind, bits, group, symmetric))


SCHEMES = {
    "awq": _awq(32),
    "awq, groups of 64": _awq(64),
    "gptq": _gptq(4, 32, True, "gptq"),
    "gptq, zero points": _gptq(4, 32, False, "gptq"),
    "gptq_v2, zero points": _gptq(4, 32, False, "gptq_v2"),
    "gptq, one scale per channel": _gptq(4, -1, True, "gptq"),
    "gptq of 8 bits": _gptq(8, -1, True, "gptq"),
    "gptq of 8 bits, zero points": _gptq(8, -1, False, "gptq"),
    "packed": _compressed("pack-quantized", 4, 32),
    "packed, zero points": _compressed("pack-quantized", 4, 32, False),
    "packed, one scale per channel": _compressed("pack-quantized", 4, None),
    "packed, 8 bits": _compressed("pack-quantized", 8, None),
    "int-quantized": _compressed("int-quantized", 8, None),
    "naive-quantized": _compressed("naive-quantized", 4, 32),
}


@dataclass(frozen=True)
class Made:
    """A quantised checkpoint, its plain twin with the same values in floats, and every matrix by its name."""

    folder: Path
    twin: Path
    matrices: dict[str, Rounded]
    scheme: Scheme


def build(source: Path, out: Path, scheme: Scheme, which: str = DECODER) -> Made:
    """Pack the matrices of a checkpoint whose names have `which` in them."""
    import re

    folder, twin = out / "quantised", out / "twin"
    for place in (folder, twin):
        shutil.copytree(source, place)
    stored, matrices = load_file(source / "model.safetensors"), {}
    floats, tensors = dict(stored), dict(stored)
    for name in sorted(stored):
        module = name.removesuffix(".weight")
        if re.search(which + "$", module):
            one = rounded(stored[name].float().numpy(), scheme.bits, scheme.group, scheme.symmetric)
            matrices[module], floats[name] = one, torch.from_numpy(one.weight)
            del tensors[name]
            pieces = scheme.pack(module, one, scheme.bits)
            tensors |= {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in pieces.items()}
    assert matrices
    save_file(floats, twin / "model.safetensors", {"format": "pt"})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme.config}))
    return Made(folder, twin, matrices, scheme)

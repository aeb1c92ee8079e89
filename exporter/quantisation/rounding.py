"""Matrices to INT4: to nearest, or by GPTQ (arXiv:2210.17323), which lets the columns that are not rounded yet make up
for those that are. nvidia-modelopt searches, one matrix at a time.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_edge.exporter.checkpoints import quantise
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.checkpoints.quantise import Format
from lvlm_edge.exporter.quantisation.layer import groups_of
from lvlm_edge.runtime.errors import LvlmEdgeError

ALGORITHMS: dict[str, Any] = {"awq": {"method": "awq_lite", "alpha_step": 0.1}, "gptq": {"method": "gptq"}}


@torch.no_grad()
def by_nearest(linears: Mapping[str, nn.Linear], block: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Integers int8 [out, in] and scales [out, in / block] in `dtype` of matrices, each rounded to nearest."""
    formats = {name: format_of(linear.weight, block) for name, linear in linears.items()}
    return {name: to_nearest(linears[name].weight, how, dtype) for name, how in formats.items() if how is not None}


@torch.no_grad()
def by_gptq(
    linears: Mapping[str, nn.Linear], rows: Mapping[str, Tensor], block: int, dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    """Integers int8 [out, in] and scales [out, in / block] in `dtype` of matrices, rounded by GPTQ.

    Args:
        rows: what the matrices read, [n, in], by a group's first name.

    Raises:
        LvlmEdgeError: GPTQ cannot do with these rows.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for names in groups_of(linears):
        weight = torch.cat([linears[name].weight for name in names])  # rows of a matrix are rounded each by itself
        how = format_of(weight, block)
        if how is None:
            continue
        linear = searched(weight, rows[names[0]], how, "gptq")
        scale = (linear.weight_quantizer.amax.view(len(weight), -1) / quantise.LARGEST[4]).to(dtype)
        scale = scale.clamp_min(torch.finfo(dtype).tiny)
        integers = quantise.integers(linear.weight.T, scale.T, how).T
        sizes = [linears[name].out_features for name in names]
        cut = zip(torch.split(integers, sizes), torch.split(scale, sizes), strict=True)
        found |= dict(zip(names, cut, strict=True))
    return found


def format_of(weight: Tensor, block: int) -> Format | None:
    """INT4 with the block size that divides a matrix's [out, in] input channels; None where none does."""
    how = quantise.fitting("int4", weight.shape[1], block)
    return how if how is not None and how.bits == 4 else None


def to_nearest(weight: Tensor, how: Format, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Integers int8 [out, in] and scales [out, in / block] of a float32 matrix, as `export --weights int4` rounds."""
    matrix = weight.T
    scale = quantise.scales(matrix, how, dtype)
    if not scale.isfinite().all():
        raise CheckpointError(f"quantize: a matrix has weights that are not finite or too large for {dtype}; check it")
    return quantise.integers(matrix, scale, how).T, scale.T


def dequantised(integers: Tensor, scale: Tensor) -> Tensor:
    return integers * scale.float().repeat_interleave(integers.shape[1] // scale.shape[1], 1)


def searched(weight: Tensor, rows: Tensor, how: Format, algorithm: str) -> Any:
    """What nvidia-modelopt makes of a matrix [out, in] that reads rows [n, in]: its own kind of linear module.

    Raises:
        LvlmEdgeError: GPTQ cannot do with these rows.
    """
    import modelopt.torch.quantization as mtq

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    weights = {"num_bits": 4, "block_sizes": {-1: how.block, "type": "static"}}
    settings = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weights},
    ]
    whole = nn.Sequential(linear)
    with silent() as said:
        mtq.quantize(whole, {"quant_cfg": settings, "algorithm": ALGORITHMS[algorithm]}, lambda model: model(rows))
    if "not positive definite" in said.getvalue():
        raise LvlmEdgeError("quantize: GPTQ learns too little from these pictures; give more of them, or choose awq")
    return whole[0]


@contextmanager
def silent() -> Iterator[io.StringIO]:
    """What nvidia-modelopt prints, kept from stdout, where --json may be; its warnings are about other uses."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()) as said:
        warnings.simplefilter("ignore")
        yield said

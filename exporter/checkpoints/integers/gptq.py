"""GPTQ's two layouts: int32 words along the input channels; the first version stores zero points less 1.

Source: GPTQModel's `convert_gptq_v1_to_v2_format_module`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.checkpoints.integers.config import entries, expect, flag, group_size
from lvlm_edge.exporter.checkpoints.integers.packed import (
    FLOATS,
    INDICES,
    Format,
    Layout,
    Packed,
    Pieces,
    Wanted,
    group_count,
    signed,
    unpacked,
)
from lvlm_edge.exporter.checkpoints.spec import Prequantised
from lvlm_edge.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

ONES = {4: 0x11111111, 8: 0x01010101}  # an int32 of ones, by the bits of each


def read(config: Mapping[str, Any], where: str) -> Prequantised:
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    expect(where, "checkpoint_format", layout, ("gptq", "gptq_v2"))
    expect(where, "is_marlin_format", bool(config.get("is_marlin_format")), (False,))
    bits: Any = config.get("bits")
    expect(where, "bits", bits, (4, 8))
    for pattern, other in entries(where, config, "dynamic").items():
        if not str(pattern).startswith("-:"):  # those are left as they are, which their tensors say too
            raise UnsupportedError(
                f"{where}: dynamic has {other!r} for {pattern!r}, expected the same bits and groups for every matrix; "
                "quantise without it"
            )
    group = group_size(where, config.get("group_size", 128))
    parts = ("decoder", "head") if flag(where, config, "lm_head", False) else ("decoder",)
    symmetric = flag(where, config, "sym", True)
    return Prequantised(layout=layout, bits=int(bits), group=group, symmetric=symmetric, parts=parts)


def size(module: str, pieces: Pieces, how: Prequantised) -> tuple[int, int]:
    rows, columns = pieces["qweight"].shape
    return columns, rows * (32 // how.bits)


def wanted(outputs: int, inputs: int, how: Prequantised) -> tuple[Wanted, ...]:
    groups, each = group_count(inputs, how), 32 // how.bits
    return (
        Wanted("qweight", ((-(-inputs // each), outputs),), ("int32",)),
        Wanted("qzeros", ((groups, -(-outputs // each)),), ("int32",)),
        Wanted("scales", ((groups, outputs),), FLOATS),
        Wanted("g_idx", ((inputs,),), INDICES),
    )


def integers(matrix: Packed) -> Tensor:
    return signed(unpacked(matrix.piece("qweight").t(), matrix.how.bits), matrix.how.bits)


def scales(matrix: Packed) -> Tensor:
    return matrix.piece("scales").float().t()


def zero_points(matrix: Packed, stored: Tensor) -> Tensor:
    return signed(unpacked(stored, matrix.how.bits), matrix.how.bits).t()


def zero_points_less_1(matrix: Packed, stored: Tensor) -> Tensor:
    """1 was taken from each, in whole words: what is borrowed of the next one comes back with it."""
    return zero_points(matrix, stored + ONES[matrix.how.bits])


V2 = Layout(
    ends=("qweight", "qzeros", "scales", "g_idx"),
    needed=("scales",),
    zeros="qzeros",
    size=size,
    wanted=wanted,
    integers=integers,
    scales=scales,
    zero_points=zero_points,
)
FORMAT = Format(read=read, layouts={"gptq": replace(V2, zero_points=zero_points_less_1), "gptq_v2": V2})

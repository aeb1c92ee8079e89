"""AWQ's layout `gemm`: int32 words along the output channels, which stand in an order of their own.

Source: AutoAWQ's `WQLinear_GEMM`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.checkpoints.integers.config import expect, flag, group_size
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

if TYPE_CHECKING:
    from torch import Tensor

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the channels of an int32 stand in it


def read(config: Mapping[str, Any], where: str) -> Prequantised:
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    expect(where, "version", version, ("gemm",))
    expect(where, "backend", str(config.get("backend") or "autoawq").lower(), ("autoawq", "auto"))
    bits = config.get("bits", config.get("w_bit", 4))
    expect(where, "bits", bits, (4,))
    group = group_size(where, config.get("group_size", config.get("q_group_size", 128)))
    symmetric = not flag(where, config, "zero_point", True)
    return Prequantised(layout="awq", bits=int(bits), group=group, symmetric=symmetric, parts=("decoder",))


def size(module: str, pieces: Pieces, how: Prequantised) -> tuple[int, int]:
    rows, columns = pieces["qweight"].shape
    return columns * (32 // how.bits), rows


def wanted(outputs: int, inputs: int, how: Prequantised) -> tuple[Wanted, ...]:
    groups, words = group_count(inputs, how), -(-outputs // (32 // how.bits))
    return (
        Wanted("qweight", ((inputs, words),), ("int32",)),
        Wanted("qzeros", ((groups, words),), ("int32",)),
        Wanted("scales", ((groups, outputs),), FLOATS),
        Wanted("g_idx", ((inputs,),), INDICES),
    )


def integers(matrix: Packed) -> Tensor:
    return _values(matrix, matrix.piece("qweight"))


def scales(matrix: Packed) -> Tensor:
    return matrix.piece("scales").float().t()


def zero_points(matrix: Packed, stored: Tensor) -> Tensor:
    return _values(matrix, stored)


def _values(matrix: Packed, words: Tensor) -> Tensor:
    """The values in int32 [n, out / 8] around 0, int8 [out, n]."""
    values = unpacked(words, matrix.how.bits)
    ordered = values.reshape(len(values), -1, len(ORDER))[:, :, list(ORDER)].reshape(len(values), -1)
    return signed(ordered, matrix.how.bits).t()


FORMAT = Format(
    read=read,
    layouts={
        "awq": Layout(
            ends=("qweight", "qzeros", "scales"),
            needed=("scales",),
            zeros="qzeros",
            size=size,
            wanted=wanted,
            integers=integers,
            scales=scales,
            zero_points=zero_points,
        )
    },
)

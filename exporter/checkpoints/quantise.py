"""Weights as small integers: INT8 with a scale per output channel, INT4 with a scale per block of input channels.

Matrices are [in, out], as the graphs multiply. A weight is integer * scale; there are no zero points. In graphs it is
a plain `DequantizeLinear` in front of the product, which TensorRT keeps at its bits per weight and ONNX Runtime fuses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lvlm_edge.runtime.bundle import WIDTHS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCKS = (32, 128)  # what ONNX Runtime and TensorRT both take
LARGEST = {8: 127, 4: 7}  # the range is symmetric, but that INT4 also has -8
# The largest magnitude of an INT4 block over its scale: at 7 no weight is cut off, above it a finer grid may be worth
# cutting the largest. Which of these is nearest to the weights is tried block by block.
SPANS = (7.0, 7.5, 8.0, 8.75)
PIECE = 1 << 24  # weights that are converted at a time


@dataclass(frozen=True)
class Format:
    """How a matrix [in, out] is kept.

    Attributes:
        bits: 8 or 4.
        block: input channels that share a scale; None where an output channel has one scale.
    """

    bits: int
    block: int | None = None

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales: [out], or [in / block, out]."""
        rows, columns = shape
        return (columns,) if self.block is None else (rows // self.block, columns)

    def integer_bytes(self, shape: tuple[int, ...]) -> int:
        return -(-math.prod(shape) * self.bits // 8)

    def scale_bytes(self, shape: tuple[int, ...], dtype: str) -> int:
        return math.prod(self.scales(shape)) * WIDTHS[dtype]


def fitting(name: str, rows: int, block: int) -> Format | None:
    """The format for a matrix of so many input channels.

    INT4 takes the block size that is asked for or, where that does not divide them, the smaller one; INT8 is what is
    left where neither does.

    Args:
        name: `as-is`, `float`, `int8` or `int4`.
    """
    if name in ("as-is", "float"):
        return None
    sizes = [size for size in (block, BLOCKS[0]) if rows % size == 0] if name == "int4" else []
    return Format(4, sizes[0]) if sizes else Format(8)


def scales(matrix: Tensor, how: Format, dtype: torch.dtype) -> Tensor:
    """The scales of a matrix [in, out] of any floating dtype, [out] or [in / block, out] in `dtype`.

    Not finite where the matrix is not, or where `dtype` cannot hold them.
    """
    import torch

    if how.block is None:
        return _scale(torch.stack([piece.abs().amax(0) for piece in _pieces(matrix)]).amax(0), LARGEST[8], dtype)
    return torch.cat([blockwise(piece, how.block, dtype) for piece in _pieces(matrix, how.block)])


def packed(matrix: Tensor, how: Format, scale: Tensor) -> Iterator[Tensor]:
    """A matrix's integers from first row to last, uint8 [bytes], a few rows at a time."""
    start = 0
    for piece in _pieces(matrix, how.block or 1):
        rows = scale if how.block is None else scale[start : start + len(piece) // how.block]
        start += len(piece) // (how.block or 1)
        yield stored(integers(piece, rows, how), how)


def stored(values: Tensor, how: Format) -> Tensor:
    """Integers int8 [in, out] as they lie in the file, uint8 [bytes]; INT4 two to a byte, the lower half first."""
    import torch

    flat = values.reshape(-1).view(torch.uint8)
    if how.bits == 4:
        flat = (flat[0::2] & 15) | ((flat[1::2] & 15) << 4)
    return flat.contiguous()


def _pieces(matrix: Tensor, multiple: int = 1) -> Iterator[Tensor]:
    """Rows of a matrix as float32, a multiple at a time."""
    step = max(1, PIECE // matrix.shape[1] // multiple) * multiple
    for start in range(0, matrix.shape[0], step):
        yield matrix[start : start + step].float()


def blockwise(matrix: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Scales [in / block, out] of the nearest of a few INT4 grids for each block of float32 [in, out]."""
    import torch

    blocks = matrix.reshape(-1, block, matrix.shape[1])
    largest = blocks.abs().amax(1)
    best, least = None, None
    for span in SPANS:
        scale = _scale(largest, span, dtype)
        wide = scale.float()[:, None]
        error = ((blocks / wide).round().clamp(-8, 7) * wide - blocks).square().sum(1)
        if best is None or least is None:
            best, least = scale, error
        else:
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    assert best is not None
    return best


def integers(matrix: Tensor, scale: Tensor, how: Format) -> Tensor:
    """The nearest integers of float32 [in, out], int8 [in, out]."""
    import torch

    wide = scale.float()
    if how.block is not None:
        wide = wide.repeat_interleave(how.block, 0)
    top = LARGEST[how.bits]
    return (matrix / wide).round().clamp(-8 if how.bits == 4 else -top, top).to(torch.int8)


def _scale(largest: Tensor, span: float, dtype: torch.dtype) -> Tensor:
    """Largest magnitudes over the span, in `dtype`, and never 0: a scale of 0 would make no finite integer."""
    import torch

    smallest = torch.finfo(dtype).tiny
    return (largest / span).to(dtype).clamp_min(smallest)

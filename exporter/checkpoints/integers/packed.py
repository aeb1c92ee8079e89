"""A matrix that a checkpoint stores as integers, and what a format of such checkpoints says of it.

A format is a file: it ends with one `Format`, which reads its `quantization_config` and names its layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, Stored
from lvlm_edge.exporter.checkpoints.spec import Prequantised

if TYPE_CHECKING:
    from torch import Tensor

INTEGERS = {"I8": "int8", "I32": "int32", "I64": "int64"}  # safetensors' names
FLOATS = ("float64", "float32", "float16", "bfloat16")
INDICES = ("int32", "int64")

Pieces = Mapping[str, Stored]  # the tensors of a matrix by the ends of their names


@dataclass(frozen=True)
class Wanted:
    """What a tensor of a matrix must be, if it is there.

    Attributes:
        end: of its name.
        shapes: any of which it may have.
        dtypes: any of which it may have.
    """

    end: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the integers of a matrix lie in its tensors.

    Attributes:
        ends: ends of the names of its tensors. A module with a tensor of the first is such a matrix.
        needed: ends that must be there besides.
        zeros: the end of its zero points, which must be there unless config.json says that all are 0.
        dtype: of the tensor of the first end, where other tensors of the checkpoint may have that end too.
        size: output and input channels, from the module's name, the tensors, and what config.json says.
        wanted: its tensors, from output and input channels and what config.json says.
        integers: around 0, int8 [out, in].
        scales: float32 [out, groups].
        zero_points: from their tensor, their distances from the middle of the integers' range, int8 [out, groups].
    """

    ends: tuple[str, ...]
    needed: tuple[str, ...]
    zeros: str
    dtype: str | None = None
    size: Callable[[str, Pieces, Prequantised], tuple[int, int]]
    wanted: Callable[[int, int, Prequantised], tuple[Wanted, ...]]
    integers: Callable[[Packed], Tensor]
    scales: Callable[[Packed], Tensor]
    zero_points: Callable[[Packed, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A `quant_method` of config.json.

    Attributes:
        read: its `quantization_config`; the second argument is what messages begin with. Raises UnsupportedError for a
            setting that is not read here, CheckpointError for a field of the wrong kind.
        layouts: by `Prequantised.layout`.
    """

    read: Callable[[Mapping[str, Any], str], Prequantised]
    layouts: Mapping[str, Layout]


@dataclass(frozen=True)
class Packed(Stored):
    """A matrix [out, in] that is stored as integers; shape and dtype are those of what reading it gives.

    Attributes:
        how: what config.json says of it.
        layout: how its integers lie in its tensors.
        pieces: its tensors by the ends of their names.
    """

    how: Prequantised = field(kw_only=True)
    layout: Layout = field(kw_only=True, hash=False)
    pieces: Pieces = field(kw_only=True, hash=False)

    def read(self) -> Tensor:
        """What the integers stand for, float32 [out, in].

        Raises:
            CheckpointError: an input channel is of a group that does not exist.
        """
        values, zeros, of = self.integers().float(), self.zero_points(), self.groups()
        if zeros is not None:
            values -= zeros.float()[:, of]
        return values * self.scales()[:, of]

    def integers(self) -> Tensor:
        """The checkpoint's integers around 0, int8 [out, in]."""
        import torch

        return self._cut(self.layout.integers(self)).to(torch.int8)

    def scales(self) -> Tensor:
        """The checkpoint's scales, float32 [out, groups]."""
        return self._cut(self.layout.scales(self))

    def zero_points(self) -> Tensor | None:
        """Distances of the zero points from the middle, int16 [out, groups]; None where all are 0."""
        import torch

        if self.layout.zeros not in self.pieces:
            return None
        found = self._cut(self.layout.zero_points(self, self.piece(self.layout.zeros))).to(torch.int16)
        return found if bool(found.any()) else None

    def groups(self) -> Tensor:
        """The group of every input channel, int64 [in].

        Raises:
            CheckpointError: one that does not exist.
        """
        stored = self.pieces.get("g_idx", self.pieces.get("weight_g_idx"))
        plain = self.neighbours()
        if stored is None:
            return plain
        found = checkpoint.read(stored).long()
        if bool((found == -1).all()):  # compressed-tensors' word for none
            return plain
        if int(found.min()) < 0 or int(found.max()) > int(plain[-1]):
            raise CheckpointError(
                f"{stored.file}: {stored.key} names group {int(found.max())} of {int(plain[-1]) + 1}; download it again"
            )
        return found

    def neighbours(self) -> Tensor:
        """The group of every input channel where those of a group are neighbours, int64 [in]."""
        import torch

        inputs = self.shape[1]
        return torch.arange(inputs) // (self.how.group or inputs)

    def piece(self, end: str) -> Tensor:
        """One of its tensors."""
        return checkpoint.read(self.pieces[end])

    def _cut(self, values: Tensor) -> Tensor:
        """Rows of a matrix that was cut out of a taller one."""
        return values[slice(*self.rows)] if self.rows else values


def dtype_of(stored: Stored) -> str:
    return INTEGERS.get(stored.dtype, stored.dtype)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The values in int32 [rows, n], lowest bits first, uint8 [rows, n * 32 / bits]."""
    import torch

    values = words.reshape(-1).view(torch.uint8)
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], -1)
    return values.reshape(len(words), -1)


def signed(values: Tensor, bits: int) -> Tensor:
    """Values around the middle of their range, int8."""
    import torch

    return (values.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def group_count(inputs: int, how: Prequantised) -> int:
    """Scales of an output channel."""
    return 1 if how.group is None else -(-inputs // how.group)

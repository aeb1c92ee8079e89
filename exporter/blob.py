"""The file of weights: each once, in the layout the graphs read, written in pieces from the mapped checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from lvlm_edge.exporter import checkpoint, quantise
from lvlm_edge.exporter.graph import Place
from lvlm_edge.exporter.parts import DTYPES, Weight
from lvlm_edge.exporter.planning import BYTES, Plan
from lvlm_edge.exporter.spec import CheckpointError
from lvlm_edge.runtime.bundle import FileInfo

PAGE, LINE = 4096, 64  # borders that large and small tensors begin at, so that they can be mapped


@dataclass(frozen=True)
class Placed:
    """A weight in the file, and where its content comes from (None: computed)."""

    place: Place
    weight: Weight
    source: checkpoint.Stored | None

    def end(self, dtype: str) -> int:
        """Offset after its last byte."""
        shape, how = self.weight.shape, self.place.how
        if how is None:
            return self.place.offset + self.weight.count * BYTES[dtype]
        return self.place.scales + how.scale_bytes(shape, dtype)


def place(
    order: Sequence[str], known: Mapping[str, Weight], sources: Mapping[str, checkpoint.Stored], plan: Plan
) -> dict[str, Placed]:
    """Weights one after the other; matrices in the plan's formats, their scales behind them."""
    placed: dict[str, Placed] = {}
    end = 0
    for name in order:
        weight = known[name]
        how = quantise.fitting(plan.format_of(name), weight.shape[0], plan.formats.block) if weight.transposed else None
        size = weight.count * BYTES[plan.dtype] if how is None else how.integer_bytes(weight.shape)
        begin = _up(end, PAGE if size >= 1 << 20 else LINE)
        scales = 0 if how is None else _up(begin + size, LINE)
        placed[name] = Placed(Place(begin, how, scales), weight, sources.get(name))
        end = placed[name].end(plan.dtype)
    return placed


def _up(offset: int, border: int) -> int:
    return -(-offset // border) * border


def write(
    path: Path,
    placed: Mapping[str, Placed],
    computed: Mapping[str, Tensor],
    dtype: str,
    progress: Callable[[str, int, int], None],
) -> FileInfo:
    """Write every weight at its offset, one at a time and in pieces.

    Args:
        computed: contents of weights that have no source.

    Raises:
        CheckpointError: a value that `dtype` cannot hold.
    """
    digest, at = hashlib.sha256(), 0
    size = max(p.end(dtype) for p in placed.values())
    with path.open("wb") as file:
        for name, one in placed.items():
            progress("writing weights", at, size)
            for data in chain([bytes(one.place.offset - at)], _pieces(name, one, computed, DTYPES[dtype])):
                file.write(data)
                digest.update(data)
                at += len(data)
    progress("writing weights", size, size)
    assert at == size, (at, size)
    return FileInfo(size, digest.hexdigest())


def _pieces(name: str, one: Placed, computed: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[memoryview | bytes]:
    """The bytes of a weight as the graphs read it, a few rows at a time."""
    tensor = computed[name] if one.source is None else checkpoint.read(one.source)
    if one.weight.transposed:
        tensor = tensor.t()
    assert tuple(tensor.shape) == one.weight.shape, name
    key = name if one.source is None else one.source.key
    if one.place.how is not None:
        yield from _quantised(key, one, tensor, dtype)
        return
    flat = tensor if tensor.dim() > 1 else tensor.reshape(1, -1)
    step = max(1, quantise.PIECE // max(1, one.weight.count // flat.shape[0]))
    for start in range(0, flat.shape[0], step):
        rows = flat[start : start + step]
        piece = rows.to(dtype).contiguous()
        if not bool(piece.isfinite().all()):
            raise _unfit(key, rows, dtype)
        yield _bytes(piece.view(torch.uint8))


def _quantised(key: str, one: Placed, matrix: Tensor, dtype: torch.dtype) -> Iterator[memoryview | bytes]:
    """Integers, padding, scales."""
    how = one.place.how
    assert how is not None
    scale = quantise.scales(matrix, how, dtype)
    if not bool(scale.isfinite().all()):
        raise _unfit(key, matrix, dtype)
    for piece in quantise.packed(matrix, how, scale):
        yield _bytes(piece)
    yield bytes(one.place.scales - one.place.offset - how.integer_bytes(one.weight.shape))
    yield _bytes(scale.contiguous().view(torch.uint8))


def _bytes(values: Tensor) -> memoryview:
    return values.numpy().data.cast("B")


def _unfit(key: str, values: Tensor, dtype: torch.dtype) -> CheckpointError:
    """What is wrong with values that are not finite in the bundle's dtype."""
    if not bool(values.isfinite().all()):
        return CheckpointError(f"{key}: holds values that are infinite or not a number; download the checkpoint again")
    largest, name = float(values.abs().max()), str(dtype).removeprefix("torch.")
    return CheckpointError(f"{key}: holds {largest:.3g}, too large for {name}; export with --dtype float32")

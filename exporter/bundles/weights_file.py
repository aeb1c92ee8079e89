"""The file of weights: each once, in the layout the graphs read, written in pieces from the mapped checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from lvlm_edge.exporter import planning
from lvlm_edge.exporter.checkpoints import integers, quantise
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, Source
from lvlm_edge.exporter.checkpoints.integers.packed import Packed
from lvlm_edge.exporter.checkpoints.quantise import Format
from lvlm_edge.exporter.graphs.graph import Place
from lvlm_edge.exporter.graphs.parts import DTYPES, Weight
from lvlm_edge.exporter.planning import BYTES, Plan
from lvlm_edge.runtime.bundle import FileInfo, WeightFormats
from lvlm_edge.runtime.errors import UnsupportedError

PAGE, LINE = 4096, 64  # borders that large and small tensors begin at, so that they can be mapped


@dataclass(frozen=True)
class Placed:
    """A weight in the file.

    Attributes:
        source: where its content comes from; None where it is computed.
        own: the source again, where its integers are kept.
        dtype: of its values, or of its scales.
    """

    place: Place
    weight: Weight
    source: Source | None
    own: Packed | None
    dtype: str

    @property
    def end(self) -> int:
        """Offset after its last byte."""
        shape, how = self.weight.shape, self.place.how
        if how is None:
            return self.place.offset + self.weight.count * BYTES[self.dtype]
        last = self.place.scales if self.place.shifts is None else self.place.shifts
        return last + how.scale_bytes(shape, self.dtype)


def place(
    order: Sequence[str], known: Mapping[str, Weight], sources: Mapping[str, Source], plan: Plan
) -> dict[str, Placed]:
    """Weights one after the other; matrices in their formats, their scales and zero points behind them."""
    placed: dict[str, Placed] = {}
    end = 0
    for name in order:
        weight, source, dtype = known[name], sources.get(name), plan.dtype_of(name)
        how = format_of(name, weight, source, plan)
        size = weight.count * BYTES[dtype] if how is None else how.integer_bytes(weight.shape)
        begin = _up(end, PAGE if size >= 1 << 20 else LINE)
        scales = 0 if how is None else _up(begin + size, LINE)
        shifts, own = None, _own(name, weight, source, plan)
        if how is not None and own is not None and own.zero_points() is not None:
            shifts = _up(scales + how.scale_bytes(weight.shape, dtype), LINE)
        placed[name] = Placed(Place(begin, how, scales, shifts), weight, source, own, dtype)
        end = placed[name].end
    return placed


def format_of(name: str, weight: Weight, source: Source | None, plan: Plan) -> Format | None:
    """The format of a weight: that of the checkpoint's own integers, or what is asked for; None for floats.

    Raises:
        UnsupportedError: integers of the checkpoint's that graphs do not hold.
    """
    own = _own(name, weight, source, plan)
    if own is not None:
        if plan.formats.prompt is not None and own.zero_points() is not None:
            raise UnsupportedError(
                f"{source.key if source else name}: has zero points, which --prompt-weights does not take; leave it "
                "out, or give --weights int4"
            )
        return Format(own.how.bits, integers.held(own))
    return (
        quantise.fitting(plan.requested_of(name), weight.shape[0], plan.settings.block_size)
        if weight.transposed
        else None
    )


def formats(sources: Mapping[str, Source], requested: WeightFormats) -> WeightFormats:
    """The formats of the weights: what is asked for, and the checkpoint's own integers where they are kept `as-is`.

    Args:
        sources: by name in `Parts`.

    Raises:
        UnsupportedError: integers of the checkpoint's that graphs do not hold.
    """
    found = {part: getattr(requested, part) for part in ("decoder", "vision", "head")}
    blocks = set()
    for name, source in sources.items():
        part = planning.part_of(name)
        if isinstance(source, Packed) and getattr(requested, part) == "as-is":
            how = Format(source.how.bits, integers.held(source))
            found[part] = how.name
            blocks.add(how.block or 0)
    found = {part: "as-is" if kind == planning.FLOAT else kind for part, kind in found.items()}
    prompt = planning.prompt_format(requested, found["decoder"])
    return WeightFormats(**found, block=max(blocks, default=0) or requested.block, prompt=prompt)


def _own(name: str, weight: Weight, source: Source | None, plan: Plan) -> Packed | None:
    """The checkpoint's integers of a matrix that keeps them."""
    kept = weight.transposed and plan.requested_of(name) == "as-is"
    return source if kept and isinstance(source, Packed) else None


def _up(offset: int, border: int) -> int:
    return -(-offset // border) * border


def write(
    path: Path,
    placed: Mapping[str, Placed],
    computed: Mapping[str, Tensor],
    progress: Callable[[str, int, int], None],
) -> FileInfo:
    """Write every weight at its offset, one at a time and in pieces.

    Args:
        computed: contents of weights that have no source.

    Raises:
        CheckpointError: a value that a weight's dtype cannot hold.
    """
    digest, at = hashlib.sha256(), 0
    size = max(p.end for p in placed.values())
    with path.open("wb") as file:
        for name, one in placed.items():
            progress("writing weights", at, size)
            for data in chain([bytes(one.place.offset - at)], _pieces(name, one, computed)):
                file.write(data)
                digest.update(data)
                at += len(data)
    progress("writing weights", size, size)
    assert at == size, (at, size)
    return FileInfo(size, digest.hexdigest())


def _pieces(name: str, one: Placed, computed: Mapping[str, Tensor]) -> Iterator[memoryview | bytes]:
    """The bytes of a weight as the graphs read it, a few rows at a time."""
    dtype = DTYPES[one.dtype]
    if one.own is not None:
        yield from _kept(one.own, one, dtype)
        return
    tensor = computed[name] if one.source is None else one.source.read()
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


def _kept(source: Packed, one: Placed, dtype: torch.dtype) -> Iterator[memoryview | bytes]:
    """The checkpoint's own integers, its scales, and what its zero points add, with the padding between them."""
    how, place, shape = one.place.how, one.place, one.weight.shape
    assert how is not None
    values = source.integers().t()
    assert tuple(values.shape) == shape, source.key
    yield _bytes(quantise.stored(values, how))
    yield bytes(place.scales - place.offset - how.integer_bytes(shape))
    scale = source.scales()
    written = _bytes(_blocks(source, scale, how, dtype).reshape(-1).view(torch.uint8))
    yield written
    if place.shifts is not None:
        zeros = source.zero_points()
        assert zeros is not None
        yield bytes(place.shifts - place.scales - len(written))
        shift = -zeros.float() * scale * (how.block or shape[0])
        yield _bytes(_blocks(source, shift, how, dtype).reshape(-1).view(torch.uint8))


def _blocks(source: Packed, values: Tensor, how: Format, dtype: torch.dtype) -> Tensor:
    """Values of groups [out, groups] as a graph's of blocks, [blocks, out] in `dtype`.

    Raises:
        CheckpointError: one that `dtype` cannot hold.
    """
    inputs = source.shape[1]
    group = source.how.group or inputs
    found = values.repeat_interleave(group // (how.block or group), 1)[:, : inputs // (how.block or inputs)].t()
    made = found.to(dtype).contiguous()
    if not bool(made.isfinite().all()):
        raise _unfit(source.key, found, dtype)
    return made


def _bytes(values: Tensor) -> memoryview:
    return values.numpy().data.cast("B")


def _unfit(key: str, values: Tensor, dtype: torch.dtype) -> CheckpointError:
    """What is wrong with values that are not finite in the bundle's dtype."""
    if not bool(values.isfinite().all()):
        return CheckpointError(f"{key}: holds values that are infinite or not a number; download the checkpoint again")
    largest, name = float(values.abs().max()), str(dtype).removeprefix("torch.")
    return CheckpointError(f"{key}: holds {largest:.3g}, too large for {name}; export with --dtype float32")

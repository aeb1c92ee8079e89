"""Checkpoints that are quantised already: AWQ, GPTQ and compressed-tensors, one file per format.

Their tensors stand in an index as one float matrix `X.weight` [out, in] each, so that families know of none of this.
Reading it dequantises in float32; `integers`, `scales` and `zero_points` are the checkpoint's own, for graphs that keep
them. Inside, integers are signed: zero is the middle of their range, and a zero point is its distance from there.

Activations that a checkpoint means to be rounded too (W8A8) are not: the weights are what it stores, and products with
activations that are not rounded are what rounding them approximates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError, Stored
from lvlm_edge.exporter.checkpoints.integers import awq, compressed, gptq
from lvlm_edge.exporter.checkpoints.integers.packed import FLOATS, Format, Layout, Packed, Pieces, dtype_of
from lvlm_edge.exporter.checkpoints.spec import Prequantised
from lvlm_edge.runtime.errors import UnsupportedError, nearest

if TYPE_CHECKING:
    from torch import Tensor

# By `quant_method` of config.json. A new format is a file, and its line here.
FORMATS: Mapping[str, Format] = {"awq": awq.FORMAT, "gptq": gptq.FORMAT, "compressed-tensors": compressed.FORMAT}
LAYOUTS: Mapping[str, Layout] = {name: layout for one in FORMATS.values() for name, layout in one.layouts.items()}
BLOCKS = (128, 64, 32)  # input channels that may share a scale in a graph, of INT4
MODELOPT = "hf_quant_config.json"  # where modelopt writes what it did, with nothing in config.json
UNQUANTISED = "give the checkpoint that it was made from"
ADVICE = "choose --weights int8 or float, and for other parts --vision-weights and --head-weights likewise"
ACTIVATIONS = re.compile(r"\.(input|output)_(scale|zero_point|global_scale|g_idx)$")  # of activations to be rounded


def read(config: Mapping[str, Any], path: Path) -> Prequantised | None:
    """What a config.json says of integers in its checkpoint; None where it says nothing.

    Args:
        path: of the file, for messages.

    Raises:
        UnsupportedError: a method, format or setting that is not read here.
        CheckpointError: a field of the wrong kind.
    """
    outer, inner = ((part or {}).get("quantization_config") for part in (config, config.get("text_config")))
    found = outer or inner
    if not found:
        _refuse_modelopt(path.parent / MODELOPT)
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: quantization_config is {found!r}, expected a JSON object; restore the file")
    where = f"{path}: quantization_config"
    method = found.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        if isinstance(method, str) and method.startswith("modelopt"):
            raise _by_modelopt(where, found.get("quant_algo"))
        raise UnsupportedError(f"{where}: quant_method is {method!r}; {nearest(str(method), FORMATS)}; {UNQUANTISED}")
    how = FORMATS[method].read(found, where)
    return how if outer else replace(how, parts=tuple(part for part in how.parts if part != "vision"))


def _refuse_modelopt(path: Path) -> None:
    """Raise UnsupportedError where modelopt says in a file of its own that it quantised the checkpoint."""
    if not path.is_file():
        return
    found = checkpoint.read_json(path)
    inside = found.get("quantization")
    algorithm = (inside if isinstance(inside, dict) else found).get("quant_algo")
    if algorithm is not None:
        raise _by_modelopt(str(path), algorithm)


def _by_modelopt(where: str, algorithm: Any) -> UnsupportedError:
    return UnsupportedError(
        f"{where}: the checkpoint is quantised to {algorithm} by modelopt, which is not supported; known: "
        f"{', '.join(sorted(FORMATS))}; {UNQUANTISED}"
    )


def block(how: Prequantised, rows: int | None = None) -> int | None:
    """Input channels that share a scale in a graph that keeps the integers; None for INT8, whose channels do.

    Args:
        rows: input channels of a matrix; None for what can be said without them.

    Raises:
        UnsupportedError: graphs cannot hold such integers.
    """
    size = how.group or rows or BLOCKS[0]
    if how.bits == 8 and (how.group is None or how.group == rows):
        return None
    found = next((b for b in BLOCKS if size % b == 0 and (rows is None or rows % b == 0)), None)
    if how.bits == 8 or found is None:
        raise UnsupportedError(
            f"quantization_config: {how.bits}-bit integers with a scale per {size} input channels, which graphs do not "
            f"hold; expected groups of 32, 64 or 128 of 4 bits, or one scale per output channel of 8; {ADVICE}"
        )
    return found


def held(matrix: Packed) -> int | None:
    """Input channels that share a scale in a graph that keeps a matrix's integers; None for INT8.

    Raises:
        UnsupportedError: graphs cannot hold them.
    """
    if not bool((matrix.groups() == matrix.neighbours()).all()):
        raise UnsupportedError(
            f"{matrix.file}: the input channels of {matrix.key} are grouped in another order (g_idx, desc_act), which "
            f"graphs do not hold; expected neighbours; {ADVICE}"
        )
    return block(matrix.how, matrix.shape[1])


def index(of: Checkpoint) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by its name, with one `Packed` matrix for the tensors it is stored as.

    Raises:
        CheckpointError: no weights, or damaged ones; pieces of a matrix missing or misshapen.
        UnsupportedError: config.json says that they are quantised in a way that is not read here.
    """
    folder, stored = of.folder, dict(of.stored)
    how = read(of.config, folder / "config.json")
    if how is None:
        unsaid = sorted(name for name in stored if name.endswith((".qweight", ".weight_packed")))
        if unsaid:
            raise CheckpointError(
                f"{folder}: is quantised ({unsaid[0]}), but config.json has no quantization_config; restore it there"
            )
        eight = sorted(name for name, one in stored.items() if one.dtype.startswith(("F8_", "float8")))
        if eight:
            raise CheckpointError(
                f"{folder}: is quantised to FP8 ({eight[0]} is {stored[eight[0]].dtype}), which no file there speaks "
                f"of; {UNQUANTISED}"
            )
        return stored
    layout = LAYOUTS[how.layout]
    modules = sorted(_modules(stored, layout))
    if not modules:
        raise CheckpointError(
            f"{folder}: config.json says that it is quantised, but it holds no {layout.ends[0]}; correct config.json"
        )
    taken: set[str] = set()
    found: dict[str, Stored] = {}
    for module in modules:
        pieces = {end: stored[f"{module}.{end}"] for end in layout.ends if f"{module}.{end}" in stored}
        taken |= {f"{module}.{end}" for end in pieces}
        found[f"{module}.weight"] = _matrix(module, pieces, how, layout)
    taken |= _empty_biases(modules, stored)
    rest = {name: one for name, one in stored.items() if name not in taken and not ACTIVATIONS.search(name)}
    for name in rest:
        if name.rpartition(".")[2] in layout.ends and name.rpartition(".")[2] != "weight":
            raise CheckpointError(f"{folder}: holds {name} without {layout.ends[0]}; download the checkpoint again")
    return rest | found


def _empty_biases(modules: Iterable[str], stored: Mapping[str, Stored]) -> set[str]:
    """Biases that are 0 in every layer: AutoGPTQ wrote them for matrices that have none."""
    found: dict[str, list[str]] = {}
    for module in modules:
        if f"{module}.bias" in stored:
            found.setdefault(module.rpartition(".")[2], []).append(f"{module}.bias")
    return {n for names in found.values() if not any(checkpoint.read(stored[n]).any() for n in names) for n in names}


def _modules(stored: Mapping[str, Stored], layout: Layout) -> set[str]:
    """Names of modules whose weight is integers."""
    end = f".{layout.ends[0]}"
    return {
        name.removesuffix(end)
        for name, one in stored.items()
        if name.endswith(end) and layout.dtype in (None, dtype_of(one))
    }


def _matrix(module: str, pieces: Pieces, how: Prequantised, layout: Layout) -> Packed:
    """A matrix of its tensors.

    Raises:
        CheckpointError: one is missing, or not of the shape or dtype that the others and config.json make it.
    """
    first = pieces[layout.ends[0]]
    lost = [end for end in layout.needed if end not in pieces]
    lost += [layout.zeros] if not how.symmetric and layout.zeros not in pieces else []
    if lost:
        raise CheckpointError(f"{first.file}: lacks {module}.{lost[0]}; download the checkpoint again")
    if len(first.shape) != 2:
        raise CheckpointError(f"{first.file}: {first.key} is {list(first.shape)}, expected a matrix; download it again")
    outputs, inputs = layout.size(module, pieces, how)
    how = _of_matrix(how, inputs, pieces)
    for wanted in layout.wanted(outputs, inputs, how):
        one = pieces.get(wanted.end)
        if one is not None and (one.shape not in wanted.shapes or dtype_of(one) not in wanted.dtypes):
            kind = "floats" if wanted.dtypes == FLOATS else wanted.dtypes[0]
            found, expected = f"{dtype_of(one)} {list(one.shape)}", f"{kind} {list(wanted.shapes[0])}"
            raise CheckpointError(
                f"{one.file}: {module}.{wanted.end} is {found}, expected {expected}; "
                "download the checkpoint again, or correct quantization_config"
            )
    key = f"{module}.weight"
    return Packed(first.file, key, (outputs, inputs), "float32", how=how, layout=layout, pieces=pieces)


def _of_matrix(how: Prequantised, inputs: int, pieces: Mapping[str, Stored]) -> Prequantised:
    """What config.json says, with the size of group that a matrix's scales tell of where it names several."""
    if not how.smaller:
        return how
    scales = pieces["weight_scale"].shape
    sizes = [size for size in (how.group, *how.smaller) if size and scales[1:] == (-(-inputs // size),)]
    return replace(how, group=sizes[0] if sizes else how.group, smaller=())


def tensor(stored: Stored) -> Tensor:
    """One tensor; a matrix of integers as what they stand for, float32 [out, in]."""
    return stored.read() if isinstance(stored, Packed) else checkpoint.read(stored)


def integers(matrix: Packed) -> Tensor:
    """The checkpoint's integers around 0, int8 [out, in]."""
    return matrix.integers()


def scales(matrix: Packed) -> Tensor:
    """The checkpoint's scales, float32 [out, groups]."""
    return matrix.scales()


def zero_points(matrix: Packed) -> Tensor | None:
    """Distances of the zero points from the middle, int16 [out, groups]; None where all are 0."""
    return matrix.zero_points()

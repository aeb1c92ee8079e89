"""Every tensor that the graphs read from the file of weights, against the checkpoint's own: one pass over the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lvlm_edge.exporter import references
from lvlm_edge.exporter.bundles import graph_set, pack
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, Source
from lvlm_edge.exporter.planning import PROMPT, Model, Plan
from lvlm_edge.exporter.proof.judge import CHECKPOINT, Array, Row
from lvlm_edge.runtime import Pipeline

ROPE = ("rope_cos", "rope_sin")  # the tables of rotary values, [positions, D_h / 2]
EMBEDDED = 4096  # rows of the embedding that are compared at a time
SCALE, SHIFT = ".scale", ".shift"  # end the names of what belongs to a matrix of integers
# Rotary values: float32 tables are transformers' own to the last bits; others are rounded once.
TURNS = {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# A checkpoint's own integers: scales, and what zero points add, are rounded once to the bundle's precision.
KEPT = {"float32": 2.0**-20, "float16": 2.0**-8, "bfloat16": 2.0**-5}

Tensors = Mapping[str, ir.ExternalTensor]
Wrong = tuple[str, list[int]]  # name of a tensor and its rows that differ


def compare(pipe: Pipeline, of: Checkpoint, plan: Plan, model: Any) -> list[Row]:
    """Weights, rotary tables and token embedding of a bundle; and whether its graphs read nothing but those.

    Args:
        of: the checkpoint.
        plan: of the bundle, made from it.
        model: the reference, whose embedding and rotary positions are the checkpoint's own.
    """
    known = graph_set.weights(plan)
    named, stray = _read_by_graphs(pipe, known)
    _, sources = pack.sources(of, Model(plan.family, plan.spec, plan.pictures), plan.settings.adapter)
    wrong = _wrong_weights(named, known, sources, plan)
    return [
        _row("weights", wrong),
        _row("rotary", _wrong_turns(named, plan, model)),
        _row("embedding", _wrong_embeddings(pipe, model)),
        _row("weights of graphs", ((name, [0]) for name in stray)),
    ]


def _row(stage: str, found: Iterator[Wrong]) -> Row:
    """How many rows of all tensors differ, and where the first is."""
    wrong = [(name, rows) for name, rows in found if rows]
    figure = sum(len(rows) for _, rows in wrong)
    note = f"first in {wrong[0][0]}, row {wrong[0][1][0]}" if wrong else ""
    return Row(case=CHECKPOINT, stage=stage, figure=figure, bound=0, passed=not wrong, note=note)


def _read_by_graphs(pipe: Pipeline, known: Mapping[str, Any]) -> tuple[dict[str, ir.ExternalTensor], list[str]]:
    """The tensors that graphs read from the file of weights, by name; and those that are no weight of that name.

    Graphs for one backend may name a weight anew; what they read must be where a portable graph has a weight.
    """
    manifest = pipe.bundle.manifest
    found, stray = dict[str, ir.ExternalTensor](), list[str]()
    files = {g.file for graphs in (manifest.graphs, *manifest.variants.values()) for g in graphs}
    renamed = list[tuple[str, ir.ExternalTensor]]()
    for file in sorted(files, key=lambda name: (not name.endswith(".onnx"), name)):
        for name, value in ir.load(pipe.bundle.folder / file).graph.initializers.items():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if str(tensor.location) != manifest.weights:
                stray.append(f"{file}: {name}, of {tensor.location}")
            elif name.removesuffix(SCALE).removesuffix(SHIFT) not in known:
                renamed.append((f"{file}: {name}", tensor))
            elif _place(found.setdefault(name, tensor)) != _place(tensor):
                stray.append(f"{file}: {name}")
    places = {_place(tensor) for tensor in found.values()}
    return found, stray + [name for name, tensor in renamed if _place(tensor) not in places]


def _place(tensor: ir.ExternalTensor) -> tuple[Any, ...]:
    return tensor.offset or 0, tensor.dtype, tuple(int(n) for n in tensor.shape.numpy())


def _wrong_weights(
    named: Tensors, known: Mapping[str, Any], sources: Mapping[str, Source], plan: Plan
) -> Iterator[Wrong]:
    """Output channels of matrices, and entries of the first axis of other tensors, that are not the checkpoint's."""
    for name in (name for name in known if name in named and name not in ROPE):
        of = name.removesuffix(PROMPT)
        source = sources["embed.weight" if of == "lm_head.weight" and of not in sources else of]
        wanted, dtype = source.read(), plan.dtype_of(name)
        if f"{name}{SCALE}" in named:
            yield name, _wrong_integers(named, name, wanted.float(), plan)
            continue
        found = _array(named[name])
        found = found.T if known[name].transposed else found
        same = found.shape == tuple(wanted.shape)
        yield name, _rows(found != _floats(wanted.to(getattr(torch, dtype)))) if same else [0]


def _wrong_integers(named: Tensors, name: str, wanted: Tensor, plan: Plan) -> list[int]:
    """Output channels whose integers do not stand for what they should.

    The checkpoint's own integers stand for its values. Others stand for values as near to the checkpoint's, block by
    block, as plain rounding is.
    """
    matrix, scale = _array(named[name]).astype(np.float32), _array(named[f"{name}{SCALE}"])
    blocks = len(scale) if scale.ndim > 1 else 1
    size = len(matrix) // blocks
    found = matrix * np.repeat(scale.reshape(blocks, -1), size, 0)
    if f"{name}{SHIFT}" in named:
        found += np.repeat(_array(named[f"{name}{SHIFT}"]).reshape(blocks, -1) / size, size, 0)
    found, values, dtype = found.T, wanted.numpy(), plan.dtype_of(name)
    if found.shape != values.shape:
        return [0]
    if plan.requested_of(name) == "as-is":
        return _rows(np.abs(found - values) > KEPT[dtype] * np.abs(values).max(1, keepdims=True))
    plain = references.quantised.rounded(
        wanted, plan.requested_of(name), plan.formats.block, getattr(torch, dtype)
    ).numpy()
    off, least = (_errors(made, values, blocks) for made in (found, plain))
    return _rows(off > least * 1.0001)


def _errors(made: Array, values: Array, blocks: int) -> Array:
    """Squared errors of the blocks of every output channel, [out, blocks]."""
    squares: Array = np.square(made.astype(np.float64) - values).reshape(len(values), blocks, -1).sum(-1)
    return squares


def _wrong_turns(named: Tensors, plan: Plan, model: Any) -> Iterator[Wrong]:
    """Positions whose cosines or sines are not those of the reference's own rotary embedding."""
    decoder = references.view(model).decoder
    for name, part in zip(ROPE, (0, 1), strict=True):
        if name not in named:
            continue
        found = _array(named[name])
        positions = torch.arange(len(found))[None]
        if plan.axes > 1:
            positions = positions[None].expand(plan.axes, -1, -1)
        with torch.no_grad():
            turns = decoder.rotary_emb(torch.zeros(1), positions)[part]
        wanted = turns.reshape(-1, *turns.shape[-2:])[0, :, : found.shape[1]].numpy()
        same = found.shape == wanted.shape
        yield name, _rows(np.abs(found - wanted) > TURNS[plan.dtype]) if same else [0]


def _wrong_embeddings(pipe: Pipeline, model: Any) -> Iterator[Wrong]:
    """Rows of the token embedding that are not the reference's in the bundle's precision."""
    m, vocab = references.view(model), pipe.manifest.embedding.vocab
    for start in range(0, vocab, EMBEDDED):
        ids = range(start, min(start + EMBEDDED, vocab))
        with torch.no_grad():
            wanted = _floats(m.embed(ids).to(getattr(torch, pipe.manifest.embedding.dtype)))
        differ = pipe.embed(np.array(ids)).astype(np.float32) != wanted
        yield "the embedding", [start + row for row in _rows(differ)]


def _array(tensor: ir.ExternalTensor) -> Array:
    """A tensor's values, float32."""
    return tensor.numpy().astype(np.float32)


def _floats(values: Tensor) -> Array:
    found: Array = values.float().numpy()
    return found


def _rows(differ: Array) -> list[int]:
    """Which entries of the first axis differ anywhere."""
    return [int(i) for i in np.flatnonzero(differ.reshape(len(differ), -1).any(1))]

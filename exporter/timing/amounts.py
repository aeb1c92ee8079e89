"""Amounts of work of a graph file, node by node, by the rates that they go at (`planning.rates`).

Portable graphs are counted, whose shapes are known; ONNX Runtime runs forms of them (`exporter.ort`). So operators that
are part of another one there are left out: what rotates, transposes and writes the rows of an attention to caches, its
mask and softmax, the sigmoid of an activation, and what only renames dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from lvlm_edge.exporter.checkpoints.quantise import Format
from lvlm_edge.exporter.planning import rates
from lvlm_edge.runtime.bundle import Bundle, Graph

RENAMING = {"Reshape", "Squeeze", "Unsqueeze", "Shape", "Cast", "Identity", "DequantizeLinear"}
FUSED = {"Sigmoid", "Softmax", "Where", "Greater"}
CACHED = {"Transpose", "RotaryEmbedding", "TensorScatter"}  # in graphs that write caches
BITS = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}


def of(path: Path, *, integers: int | None = None) -> dict[str, float] | None:
    """The work of a graph with static shapes; None where it is of other numbers than float32 and integers.

    Args:
        integers: bits of the integers that ONNX Runtime reads instead of the graph's own; None where it reads these.
    """
    graph = ir.load(path).graph
    if any(_float16(value) for value in graph.initializers.values()):
        return None
    left_out = RENAMING | FUSED | (CACHED if any(n.op_type == "TensorScatter" for n in graph) else set())
    seen: set[tuple[ir.Value | None, str]] = set()
    return rates.total(part for node in graph if node.op_type not in left_out for part in _node(node, seen, integers))


def is_open(bundle: Bundle, graph: Graph, backend: str) -> bool:
    """Whether a backend computes the rows of a prompt that are in use, in what it runs as a prefill graph."""
    run = [g for g in bundle.manifest.variants.get(backend, ()) if g.name == graph.name]
    if graph.role != "prefill" or not run:
        return False
    inputs = ir.load(bundle.path(run[0].file)).graph.inputs
    return any(value.shape is None or not value.shape.is_static() for value in inputs)


def _float16(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _node(node: ir.Node, seen: set[tuple[ir.Value | None, str]], integers: int | None) -> Iterator[dict[str, float]]:
    """What a node does; `seen` are rows that products of a format have read already."""
    if node.op_type == "Attention":
        _, heads, queries, size = _shape(node.inputs[0])
        keys, wide = _shape(node.inputs[1])[2], _shape(node.inputs[2])[3]
        yield rates.attention(2 * heads * queries * keys * (size + wide), queries)
    elif node.op_type == "Conv":
        outputs, *inner = _shape(node.inputs[1])
        yield rates.product((math.prod(inner), outputs), math.prod(_shape(node.outputs[0])[2:]), None)
    elif node.op_type in ("MatMul", "Gemm"):
        yield from _product(node, seen, integers)
    else:
        read = [_shape(v) for v in node.inputs if v is not None and v.const_value is None]
        made = [_shape(v) for v in node.outputs]
        yield rates.elements(sum(map(math.prod, read + made)), 1)


def _product(node: ir.Node, seen: set[tuple[ir.Value | None, str]], integers: int | None) -> Iterator[dict[str, float]]:
    x, weight = node.inputs[:2]
    width = _shape(x)[-1]
    rows, outputs = math.prod(_shape(node.outputs[0])[:-1]), _shape(node.outputs[0])[-1]
    made = None if weight is None else weight.producer()
    if made is None:
        how = None
    elif made.op_type == "DequantizeLinear":
        assert made.inputs[0] is not None and made.inputs[0].dtype is not None
        how = Format(BITS[made.inputs[0].dtype], made.attributes.get_int("block_size", 0) or None)
        how = Format(integers) if integers is not None and rows > 1 else how
    else:  # of two results: attention, node by node
        queries = _shape(node.outputs[0])[-2]
        yield rates.attention(2 * rows * outputs * width, queries)
        return
    found = rates.product((width, outputs), rows, how)
    name = rates.format_of(how)
    again, alone = (x, name) in seen, rows == 1
    seen.add((x, name))
    if alone and how is not None and again:
        found[rates.START[name]] = 0  # joined, see `ort.joined`
    if not alone and name == "int8" and not again:
        yield rates.rounding(rows, width)
    yield found


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None and value.shape is not None
    return tuple(int(d) for d in value.shape.numpy())

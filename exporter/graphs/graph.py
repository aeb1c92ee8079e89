"""Checks and small rewrites of ONNX graphs, and the FLOPs they contain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from lvlm_edge.exporter.checkpoints.quantise import Format
from lvlm_edge.exporter.graphs.zero_points import Shifts
from lvlm_edge.exporter.planning import PROMPT, GraphSpec
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.errors import LvlmEdgeError

# Operators that no target takes, or that make shapes depend on data (`tensorrt` cannot parse or build them).
TRAPS = frozenset({"NonZero", "Compress", "Unique", "Loop", "If", "Scan", "BitShift", "DynamicQuantizeLinear"})
IR_VERSION = 10
_INTEGERS = {8: ir.DataType.INT8, 4: ir.DataType.INT4}
_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
}


@dataclass(frozen=True)
class Place:
    """Where a weight lies in the file of weights; what its integers and scales are where it is quantised.

    Attributes:
        offset: of its first byte.
        how: its format; None for plain values.
        scales: offset of its scales.
        shifts: offset of what zero points add, a value per scale; None where there are no zero points.
    """

    offset: int
    how: Format | None = None
    scales: int = 0
    shifts: int | None = None


def finish(model: ir.Model, spec: GraphSpec, opset: int, location: str, places: Mapping[str, Place]) -> ir.Model:
    """The traced model as it is shipped: weights by reference into one file, opset and names checked.

    Args:
        location: file name of the weights, beside the graph.
        places: of every weight by name.
    """
    model.ir_version = IR_VERSION
    model.producer_name = "lvlm-edge"
    model.producer_version = None
    model.graph.name = spec.name
    model.metadata_props.clear()
    _name_outputs(model, spec)
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    shifts = Shifts(model.graph)
    for name, value in list(model.graph.initializers.items()):
        value.metadata_props.clear()
        if name in places and places[name].how is not None:
            _dequantise(model.graph, value, location, places[name], shifts)
        elif name in places:
            assert value.dtype is not None and value.shape is not None
            value.const_value = _external(name, location, places[name].offset, value.dtype, value.shape)
    check(model, spec, opset)
    return model


def _external(name: str, location: str, offset: int, dtype: ir.DataType, shape: ir.Shape) -> ir.ExternalTensor:
    length = math.ceil(math.prod(shape.numpy()) * dtype.itemsize)
    return ir.ExternalTensor(location, offset, length, dtype, shape=shape, name=name)


def _dequantise(graph: ir.Graph, weight: ir.Value, location: str, place: Place, added: Shifts) -> None:
    """Put integers and scales where the weight was, and the node in front that makes the weight of them."""
    name, uses = weight.name, list(weight.uses())
    assert name is not None and place.how is not None
    node = _dequantising(graph, name, location, place, weight)
    weight.replace_all_uses_with(node.outputs[0])
    graph.insert_before(graph[0], node)
    if place.shifts is not None:
        sizes, dtype = node.inputs[1].shape, node.inputs[1].dtype  # type: ignore[union-attr]
        assert sizes is not None and dtype is not None
        rows = sizes if place.how.block is not None else ir.Shape([1, *sizes])
        shifts = _initializer(graph, f"{name}.shift", location, place.shifts, dtype, rows)
        added.add([(use.node, use.idx) for use in uses], shifts)


def for_prompts(model: ir.Model, location: str, places: Mapping[str, Place]) -> None:
    """Let a finished graph read the matrices that prompts have in a format of their own, where there are such."""
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        stored, made = node.inputs[0], node.outputs[0]
        name = f"{stored.name}{PROMPT}" if stored is not None else ""
        if name in places:
            again = _dequantising(model.graph, name, location, places[name], made)
            made.replace_all_uses_with(again.outputs[0])
            model.graph.insert_before(node, again)


def _dequantising(graph: ir.Graph, name: str, location: str, place: Place, like: ir.Value) -> ir.Node:
    """A node, not in the graph yet, that makes a weight of its integers and scales, which are initializers then.

    Args:
        like: a value of the weight's shape and dtype.
    """
    how, dtype, shape = place.how, like.dtype, like.shape
    assert how is not None and dtype is not None and shape is not None
    integers = _initializer(graph, name, location, place.offset, _INTEGERS[how.bits], shape)
    sizes = ir.Shape(how.scales(tuple(int(n) for n in shape.numpy())))
    scales = _initializer(graph, f"{name}.scale", location, place.scales, dtype, sizes)
    options = {"axis": 1} if how.block is None else {"axis": 0, "block_size": how.block}
    node = ir.node("DequantizeLinear", [integers, scales], attributes=options)
    (made,) = node.outputs
    made.name, made.shape, made.type = f"{name}.dequantized", shape, like.type
    return node


def _initializer(
    graph: ir.Graph, name: str, location: str, offset: int, dtype: ir.DataType, shape: ir.Shape
) -> ir.Value:
    """A weight of the graph, in the place of one that had its name."""
    graph.initializers.pop(name, None)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
    value.const_value = _external(name, location, offset, dtype, shape)
    graph.register_initializer(value)
    return value


def _name_outputs(model: ir.Model, spec: GraphSpec) -> None:
    """Give outputs their names; what is an input, a weight or an output already keeps its own, and is copied."""
    outputs = list(model.graph.outputs)
    made = [value.producer() is not None for value in outputs]
    for i, value in enumerate(outputs):  # out of the way of each other first: exporters swap names of equal values
        if made[i]:
            value.name = f"output.{i}"
    for i, info in enumerate(spec.outputs):
        value = outputs[i]
        if made[i] and value not in outputs[:i]:
            value.name = info.name
            continue
        copy = ir.node("Identity", [value])
        copy.outputs[0].name = info.name
        copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
        model.graph.append(copy)
        model.graph.outputs[i] = copy.outputs[0]


def check(model: ir.Model, spec: GraphSpec, opset: int) -> None:
    """Raise unless a bundle may hold the graph: plain ai.onnx of one opset, shapes fixed, names as planned."""
    problems = []
    if dict(model.opset_imports) != {"": opset}:
        problems.append(f"opsets {dict(model.opset_imports)}")
    problems += [f"operator {n.domain}::{n.op_type}" for n in model.graph if n.domain or n.op_type in TRAPS]
    problems += [f"{n.op_type} with {len(n.outputs)} outputs" for n in model.graph if _extra_outputs(n)]
    for kind, values, wanted in (
        ("input", model.graph.inputs, spec.inputs),
        ("output", model.graph.outputs, spec.outputs),
    ):
        found = [describe(value, spec.dynamic_rows) for value in values]
        problems += [f"{kind} {f}, planned {w}" for f, w in zip(found, wanted, strict=True) if f != w]
    for node in model.graph:
        for value in node.outputs:
            if spec.dynamic_rows is None and (value.shape is None or not value.shape.is_static()):
                problems.append(f"{node.op_type} output {value.name} of shape {value.shape}")
    if problems:
        raise AssertionError(f"{spec.name}: the traced graph has {'; '.join(problems[:5])}")


def _extra_outputs(node: ir.Node) -> bool:
    return node.op_type == "Attention" and len(node.outputs) > 1


def describe(value: ir.Value, rows: int | None = None) -> TensorInfo:
    """Name, dtype and shape of a graph's input or output; `rows` stands for a size given at run time."""
    assert value.name is not None and value.dtype is not None and value.shape is not None
    shape = tuple(size if isinstance(size, int) else rows or -1 for size in value.shape)
    return TensorInfo(value.name, _DTYPES.get(value.dtype, str(value.dtype)), shape)


def weight_names(model: ir.Model, known: Mapping[str, object]) -> list[str]:
    """Names of the known weights that a traced model reads."""
    return [name for name, value in model.graph.initializers.items() if name in known and value.uses()]


def save(model: ir.Model, path: Path) -> None:
    """Write a finished model; its weights stay where they are."""
    ir.save(model, path)


def flops(path: Path) -> int:
    """FLOPs of a graph file, node by node: 2 x multiply-accumulate of matrix products and convolutions.

    Raises:
        LvlmEdgeError: the file cannot be read.
    """
    try:
        model = ir.load(path)
    except Exception as error:
        raise LvlmEdgeError(f"{path}: cannot be read as ONNX ({error})") from error
    return sum(_node_flops(node) for node in model.graph)


def _node_flops(node: ir.Node) -> int:
    def shape(value: ir.Value | None) -> tuple[int, ...]:
        assert value is not None and value.shape is not None
        return tuple(int(d) for d in value.shape.numpy())

    if node.op_type == "MatMul":
        return 2 * math.prod(shape(node.outputs[0])) * shape(node.inputs[0])[-1]
    if node.op_type == "Gemm":
        transposed = node.attributes.get_int("transA", 0)
        return 2 * math.prod(shape(node.outputs[0])) * shape(node.inputs[0])[0 if transposed else -1]
    if node.op_type == "Conv":
        return 2 * math.prod(shape(node.outputs[0])) * math.prod(shape(node.inputs[1])[1:])
    if node.op_type == "Attention":
        _, heads, rows, size = shape(node.inputs[0])
        keys = shape(node.inputs[1])[2]
        return 2 * heads * rows * keys * (size + shape(node.inputs[2])[3])
    return 0

"""Graphs for ONNX Runtime with activations left as they are: what they compute but for their rounding.

Integers are deterministic, but a value that lies between two steps falls to one or the other by the last bit of a sum,
so that a graph that rounds activations can be judged only loosely. Its rounding is judged here by its form, operator by
operator, and the rest by its figures, as closely as any other graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lvlm_edge.exporter.ort.nodes import CONTRIB, Nodes, made_by, replace, single_reader
from lvlm_edge.runtime.backends.ort import OrtBackend
from lvlm_edge.runtime.bundle import Bundle

PRODUCT = "MatMulIntegerToFloat"
STEP, ZERO = np.float32(1 / 127), 128  # of rounded activations


class Unrounded(OrtBackend):
    """ONNX Runtime on graphs whose activations are not rounded.

    Attributes:
        problems: where a graph does not round as it should.
    """

    def __init__(self, runtime: Any) -> None:
        super().__init__(runtime, 0, True)
        self.problems: list[str] = []

    def content(self, bundle: Bundle, file: str) -> bytes:
        model = ir.from_proto(onnx.ModelProto.FromString(bundle.graph(file)))
        self.problems += [f"{file}: {problem}" for problem in unround(model)]
        found: bytes = ir.to_proto(model).SerializeToString()
        return found


def unround(model: ir.Model) -> list[str]:
    """Put a product of floats where activations are rounded and multiplied as integers.

    Returns:
        products whose rounding is another than that of every row by its own largest magnitude.
    """
    nodes, problems = Nodes(model.graph, "unrounded"), []
    for node in [node for node in model.graph if node.op_type == PRODUCT and node.domain == CONTRIB]:
        wide, scaled = _rounded(node), _scaled(node)
        if wide is None or scaled is None:
            problems.append(f"{node.outputs[0].name} rounds in another way")
            continue
        weight = nodes.add(node, "DequantizeLinear", [node.inputs[1], node.inputs[3]], axis=1)
        replace(scaled.outputs[0], nodes.add(node, "MatMul", [wide, weight]))
    RemoveUnusedNodesPass()(model)
    return problems


def _rounded(product: ir.Node) -> ir.Value | None:
    """The activations that a product reads rounded row by row; None where they are not."""
    rounding = made_by(product.inputs[0], "QuantizeLinear")
    if rounding is None or not _all(product.inputs[2], 1) or not _all(product.inputs[4], ZERO):
        return None
    wide, flat, zeros = rounding.inputs
    scale, spread = made_by(flat, "Reshape"), made_by(zeros, "Expand")
    if wide is None or scale is None or spread is None or rounding.attributes.get_int("axis", 1) != 1:
        return None
    right = _all(spread.inputs[0], ZERO) and _is_scale(scale.inputs[0], wide)
    return wide if right and len(product.inputs) == 5 else None


def _is_scale(scale: ir.Value | None, wide: ir.Value) -> bool:
    """Whether a value is the largest magnitude of every row over 127."""
    times = made_by(scale, "Mul")
    most = made_by(times.inputs[0], "ReduceMax") if times else None
    size = made_by(most.inputs[0], "Abs") if most else None
    if times is None or most is None or size is None:
        return False
    by_row = _all(most.inputs[1], -1) and most.attributes.get_int("keepdims", 1) == 1
    return by_row and _all(times.inputs[1], STEP) and size.inputs[0] is wide


def _scaled(product: ir.Node) -> ir.Node | None:
    """The multiplication of a product's rows by the scales of their activations, which alone reads it."""
    node, rounding = single_reader(product.outputs[0]), made_by(product.inputs[0], "QuantizeLinear")
    flat = made_by(rounding.inputs[1], "Reshape") if rounding else None
    if node is None or node.op_type != "Mul" or flat is None:
        return None
    return node if node.inputs[1] is flat.inputs[0] else None


def _all(value: ir.Value | None, wanted: Any) -> bool:
    """Whether a value is known and has this one element, or this one alone."""
    known = None if value is None else value.const_value
    return known is not None and bool((known.numpy() == wanted).all()) and known.size > 0

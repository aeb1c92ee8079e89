"""Graphs for ONNX Runtime alone: products with INT8 weights are computed on integers.

Left to itself ONNX Runtime makes floats of INT8 weights block by block, which is no faster than float32 weights where
there are many rows. Here each row of activations is rounded to 8 bits by its own largest magnitude, once for all
products that read it, multiplied by the weights as integers, and scaled back. Activations are unsigned around 128,
because processors multiply unsigned by signed bytes; the operator takes that offset out again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lvlm_edge.exporter.ort.nodes import CONTRIB, Nodes, made_by, replace

ZERO, STEPS = 128, 127  # of unsigned activations: where 0 is, and how many steps there are to the largest magnitude


@dataclass(frozen=True)
class Rounded:
    """A tensor of activations [1, rows, in] as integers, and the scale of every row, [1, rows, 1] float32."""

    integers: ir.Value
    scale: ir.Value


class _Rewriter:
    """Adds what products of integers need in front of one node of a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        nodes = Nodes(graph, "integer")
        self.graph, self.read = graph, set[ir.Value]()
        self.node, self.constant = nodes.add, nodes.constant
        self.rounded: dict[ir.Value, Rounded] = {}
        self.zeros: dict[Any, ir.Value] = {}

    def rows(self, before: ir.Node, x: ir.Value) -> Rounded:
        """Activations rounded row by row, once for all that read them."""
        if x not in self.rounded:
            wide = x if x.dtype == ir.DataType.FLOAT else self.node(before, "Cast", [x], to=ir.DataType.FLOAT)
            size = self.node(before, "Abs", [wide])
            most = self.node(before, "ReduceMax", [size, self.constant("axis", np.array([-1]))], keepdims=1)
            scale = self.node(before, "Mul", [most, self.constant("step", np.array([1 / STEPS], np.float32))])
            flat = self.node(before, "Reshape", [scale, self.constant("flat", np.array([-1]))])
            zeros = self._zeros(before, x, flat)
            self.rounded[x] = Rounded(self.node(before, "QuantizeLinear", [wide, flat, zeros], axis=1), scale)
        return self.rounded[x]

    def own(self, before: ir.Node, weight: ir.Value) -> ir.Value:
        """A weight, under a name of its own for each product that reads it; the bytes in the file stay the same ones.

        ONNX Runtime 1.31.1 makes unsigned weights of signed ones product by product where processors need it, and fails
        at the second product of one weight.
        """
        if weight not in self.read:
            self.read.add(weight)
            return weight
        stored = weight.const_value
        if not isinstance(stored, ir.ExternalTensor):
            return self.node(before, "Identity", [weight])  # folded as a constant where the weight is one
        name = f"{weight.name}.{len(self.graph.initializers)}"
        again = ir.Value(name=name, shape=weight.shape, type=weight.type)
        place = (stored.location, stored.offset, stored.length, stored.dtype)
        again.const_value = ir.ExternalTensor(*place, shape=stored.shape, name=name, base_dir=stored.base_dir)
        self.graph.register_initializer(again)
        return again

    def _zeros(self, before: ir.Node, x: ir.Value, flat: ir.Value) -> ir.Value:
        """As many times the offset as there are rows; one tensor for all activations of as many rows."""
        assert x.shape is not None
        rows = x.shape[1] if isinstance(x.shape[1], int) else str(x.shape[1])
        if rows not in self.zeros:
            count = self.node(before, "Shape", [flat])
            self.zeros[rows] = self.node(before, "Expand", [self.constant("zero", np.array([ZERO], np.uint8)), count])
        return self.zeros[rows]


def rewrite(model: ir.Model) -> None:
    """Put integer products where a graph multiplies by dequantised INT8 weights; what they replace is unused then."""
    made = _Rewriter(model.graph)
    for node in list(model.graph):
        weight = _int8(node)
        if weight is None:
            continue
        integers, scale = weight
        assert node.inputs[0] is not None
        row, integers = made.rows(node, node.inputs[0]), made.own(node, integers)
        if scale.dtype != ir.DataType.FLOAT:
            scale = made.node(node, "Cast", [scale], to=ir.DataType.FLOAT)
        one = made.constant("one", np.array([1], np.float32))
        offset = made.constant("offset", np.array(ZERO, np.uint8))
        # As one operator: ONNX Runtime 1.31.1 makes it of MatMulInteger, Cast and Mul by itself, and then scales every
        # row like the first. Its own scale of activations is one number, so that rows are scaled after it.
        wide = made.node(node, f"{CONTRIB}::MatMulIntegerToFloat", [row.integers, integers, one, scale, offset])
        result = made.node(node, "Mul", [wide, row.scale])
        if node.outputs[0].dtype != ir.DataType.FLOAT:
            result = made.node(node, "Cast", [result], to=node.outputs[0].dtype)
        replace(node.outputs[0], result)


def _int8(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Integers and scales of the INT8 weight that a node multiplies activations [1, rows, in] by."""
    made = made_by(node.inputs[1], "DequantizeLinear") if node.op_type == "MatMul" else None
    if made is None or node.inputs[0] is None:
        return None
    integers, scale = made.inputs[0], made.inputs[1]
    x = node.inputs[0].shape
    small = integers is not None and integers.dtype == ir.DataType.INT8
    if not small or scale is None or integers is None or x is None or len(x) != 3 or x[0] != 1:
        return None
    return integers, scale

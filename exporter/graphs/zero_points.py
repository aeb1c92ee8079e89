"""Zero points of integer weights, as nodes of a graph that the rest of it need not know of.

TensorRT takes no zero points. But what one adds to a weight is the same in a whole block of input channels, so that it
adds to a product the mean of the activations in each block times one row per block: a small product of its own, beside
integers that stay as they are. Means are no larger than activations are, where sums could leave float16.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

Size = int | ir.SymbolicDim  # of an axis; symbolic where it is given at run time


class Shifts:
    """Adds nodes to one graph; blocks of activations that several products read are averaged once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.count = graph, 0
        self.means: dict[tuple[ir.Value, int], ir.Value] = {}

    def add(self, uses: Iterable[tuple[ir.Node, int]], shifts: ir.Value) -> None:
        """Add what zero points make of a weight [in, out], to the products with it or else to the weight itself.

        Args:
            uses: nodes that read the weight without them, each with its place among the node's inputs.
            shifts: block size * scale * (middle - zero point), [blocks, out].
        """
        for node, place in uses:
            if node.op_type == "MatMul" and place == 1:
                self._to_product(node, shifts)
            else:
                self._to_weight(node, place, shifts)

    def _to_product(self, node: ir.Node, shifts: ir.Value) -> None:
        x, result = node.inputs[0], node.outputs[0]
        assert x is not None and result.name is not None
        more = self._node("MatMul", [self._mean(x, _rows(shifts)), shifts], result.shape)
        total = self._node("Add", [result, more.outputs[0]], result.shape)
        result.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
        total.replace_input_with(0, result)
        result.name, total.outputs[0].name = f"{result.name}.unshifted", result.name
        self.graph.insert_after(node, [more, total])

    def _mean(self, x: ir.Value, blocks: int) -> ir.Value:
        """Means [.., blocks] of activations [.., in]."""
        if (x, blocks) not in self.means:
            assert x.shape is not None
            *rows, inputs = x.shape
            assert isinstance(inputs, int)
            apart = self._reshaped(x, (*rows, blocks, inputs // blocks), (*[0] * len(rows), blocks, inputs // blocks))
            axis = self._constant("shift.axis", ir.tensor(np.array([-1])))
            mean = self._node("ReduceMean", [apart.outputs[0], axis], (*rows, blocks), keepdims=0)
            producer = x.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], [apart, mean])
            else:
                self.graph.insert_after(producer, [apart, mean])
            self.means[x, blocks] = mean.outputs[0]
        return self.means[x, blocks]

    def _to_weight(self, node: ir.Node, place: int, shifts: ir.Value) -> None:
        weight = node.inputs[place]
        assert weight is not None and weight.shape is not None and shifts.dtype is not None
        inputs, outputs = (int(n) for n in weight.shape.numpy())
        blocks = _rows(shifts)
        share = self._constant(f"shift.share.{inputs}.{blocks}", ir.tensor([blocks / inputs], dtype=shifts.dtype))
        each = self._node("Mul", [shifts, share], shifts.shape)
        single, several = (blocks, 1, outputs), (blocks, inputs // blocks, outputs)
        row = self._reshaped(each.outputs[0], single, single)
        apart = self._reshaped(weight, several, several)
        whole = self._node("Add", [apart.outputs[0], row.outputs[0]], several)
        joined = self._reshaped(whole.outputs[0], (inputs, outputs), (inputs, outputs))
        self.graph.insert_before(node, [each, row, apart, whole, joined])
        node.replace_input_with(place, joined.outputs[0])

    def _reshaped(self, x: ir.Value, shape: Sequence[Size], target: tuple[int, ...]) -> ir.Node:
        """A reshape; `target` is what the operator is told, in which 0 leaves a size as it is."""
        to = self._constant("shift.shape." + ".".join(map(str, target)), ir.tensor(np.array(target)))
        return self._node("Reshape", [x, to], shape)

    def _node(self, kind: str, inputs: Sequence[ir.Value], shape: Iterable[Size] | None, **attributes: int) -> ir.Node:
        """A node that is in no graph yet; its output has the dtype of its first input."""
        made = ir.node(kind, list(inputs), attributes=attributes)
        self.count += 1
        made.outputs[0].name = f"shift.{self.count}"
        assert shape is not None
        made.outputs[0].shape, made.outputs[0].type = ir.Shape(shape), inputs[0].type
        return made

    def _constant(self, name: str, content: ir.TensorProtocol) -> ir.Value:
        if name not in self.graph.initializers:
            shape = ir.Shape(content.shape.numpy())
            value = ir.Value(name=name, const_value=content, shape=shape, type=ir.TensorType(content.dtype))
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


def _rows(shifts: ir.Value) -> int:
    assert shifts.shape is not None
    return int(shifts.shape.numpy()[0])

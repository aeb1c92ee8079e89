"""Products of one row for ONNX Runtime alone: those that read the same row become one.

A token's products are small, so that starting them takes a good part of their time. Weights are joined when the graph
is loaded, from where they lie in the file. What the joined product reads stays `DequantizeLinear`, of which ONNX
Runtime makes `MatMulNBits`: its kernel for one row reads integers of 4 and 8 bits and rounds the row to 8 bits block by
block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lvlm_edge.exporter.ort.nodes import Nodes, made_by, replace, single_reader


@dataclass(frozen=True)
class _Product:
    """A product with integers, and what is made of it.

    Attributes:
        made: the node that dequantises its weight [in, out].
        result: the product, or the sum with its bias.
        bias: added to it, [out]; None where there is none.
    """

    node: ir.Node
    made: ir.Node
    result: ir.Value
    bias: ir.Value | None

    @property
    def kind(self) -> tuple[object, ...]:
        """What products that can be joined have in common, beside the row that they read."""
        integers, scales = self.made.inputs[:2]
        assert integers is not None and scales is not None
        options = self.made.attributes
        block = options.get_int("block_size", 0)
        return integers.dtype, scales.dtype, options.get_int("axis", 1), block, self.bias is None

    @property
    def width(self) -> int:
        weight = self.made.inputs[0]
        assert weight is not None and weight.shape is not None and isinstance(weight.shape[1], int)
        return weight.shape[1]


def rewrite(model: ir.Model) -> None:
    """Join products that read the same rows; what this leaves behind is unused."""
    nodes, groups = Nodes(model.graph, "joined"), dict[object, list[_Product]]()
    for node in model.graph:
        product = _product(node)
        if product is not None:
            groups.setdefault((node.inputs[0], product.kind), []).append(product)
    for group in groups.values():
        if len(group) > 1:
            _join(nodes, group)


def _product(node: ir.Node) -> _Product | None:
    made = made_by(node.inputs[1], "DequantizeLinear") if node.op_type == "MatMul" else None
    if made is None or any(value is None or value.const_value is None for value in made.inputs):
        return None
    reader, result = single_reader(node.outputs[0]), node.outputs[0]
    others = [] if reader is None or reader.op_type != "Add" else [v for v in reader.inputs if v is not result]
    if reader is not None and len(others) == 1 and others[0] is not None and _is_vector(others[0]):
        return _Product(node, made, reader.outputs[0], others[0])
    return _Product(node, made, result, None)


def _is_vector(value: ir.Value) -> bool:
    return value.const_value is not None and value.shape is not None and len(value.shape) == 1


def _join(nodes: Nodes, group: Sequence[_Product]) -> None:
    first = group[0].node
    integers, scales = ([product.made.inputs[i] for product in group] for i in (0, 1))
    weight = _concatenated(nodes, first, integers)
    attributes = {name: attribute.value for name, attribute in group[0].made.attributes.items()}
    scale = nodes.add(first, "Concat", scales, axis=1 if "block_size" in attributes else 0)
    row = nodes.add(
        first, "MatMul", [first.inputs[0], nodes.add(first, "DequantizeLinear", [weight, scale], **attributes)]
    )
    if group[0].bias is not None:
        row = nodes.add(first, "Add", [row, nodes.add(first, "Concat", [p.bias for p in group], axis=0)])
    attention = _attention(group)
    if attention is not None:
        for i, value in enumerate((row, None, None)):
            attention.replace_input_with(i, value)
        return
    widths = np.array([product.width for product in group])
    sizes = nodes.constant("_".join(map(str, ("sizes", *widths))), widths)
    parts = nodes.several(first, "Split", [row, sizes], len(group), axis=-1)
    for product, part in zip(group, parts, strict=True):
        replace(product.result, part)


def _concatenated(nodes: Nodes, before: ir.Node, integers: Sequence[ir.Value | None]) -> ir.Value:
    """Matrices [in, out] side by side. `Concat` takes no integers of 4 bits, which are made wider for it."""
    kind = None if integers[0] is None else integers[0].dtype
    if kind == ir.DataType.INT8:
        return nodes.add(before, "Concat", integers, axis=1)
    wide = [nodes.add(before, "Cast", [one], to=ir.DataType.INT8) for one in integers]
    return nodes.add(before, "Cast", [nodes.add(before, "Concat", wide, axis=1)], to=kind)


def _attention(group: Sequence[_Product]) -> ir.Node | None:
    """The attention that takes queries, keys and values as one, where a group is these and nothing else reads them."""
    reader = single_reader(group[0].result)
    if reader is None or reader.op_type != "GroupQueryAttention" or len(group) != 3:
        return None
    together = [product.result for product in group] == list(reader.inputs[:3])
    alone = all(single_reader(product.result) is reader for product in group)
    return reader if together and alone else None

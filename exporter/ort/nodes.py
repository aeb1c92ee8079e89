"""Adding nodes to a finished graph, and putting them in the place of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

CONTRIB = "com.microsoft"


class Nodes:
    """New nodes and constants of a graph, whose names begin with a prefix."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self.prefix, self.count = graph, prefix, 0

    def add(self, before: ir.Node, kind: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        """The output of a new node; its kind is an operator of ONNX, or `domain::operator`."""
        return self.several(before, kind, inputs, 1, **attributes)[0]

    def several(
        self, before: ir.Node, kind: str, inputs: Sequence[ir.Value | None], outputs: int, **attributes: Any
    ) -> Sequence[ir.Value]:
        """The outputs of a new node."""
        domain, _, operator = kind.rpartition("::")
        node = ir.node(operator, list(inputs), attributes=attributes, domain=domain, num_outputs=outputs)
        self.graph.insert_before(before, node)
        for value in node.outputs:
            self.count += 1
            value.name = f"{self.prefix}.{self.count}"
        if domain:
            self.graph.opset_imports[domain] = 1
        return node.outputs

    def constant(self, name: str, values: Any) -> ir.Value:
        """A constant of the graph, the same at every call with its name."""
        name = f"{self.prefix}.{name}"
        if name not in self.graph.initializers:
            value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
            value.shape, value.type = ir.Shape(values.shape), ir.TensorType(value.const_value.dtype)  # type: ignore[union-attr]
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads a value read another, which gets its name, shape and dtype."""
    new.shape, new.type = old.shape, old.type
    old.name, new.name = f"{new.name}.plain", old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def made_by(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The node that makes a value, if it is of one of these operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in kinds else None


def single_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value; None where none or several do, or it is an output of the graph."""
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None

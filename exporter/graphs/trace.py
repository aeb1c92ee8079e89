"""Module and shapes to an ONNX model on fake tensors; the only caller of torch.export."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from lvlm_edge.exporter.graphs import conversion
from lvlm_edge.exporter.graphs.parts import DTYPES, Parts
from lvlm_edge.exporter.planning import GraphSpec, Plan
from lvlm_edge.runtime.bundle import TensorInfo

_TORCH = {**DTYPES, "int64": torch.int64}


class _Traced(nn.Module):
    def __init__(self, graph: GraphSpec, parts: Parts, plan: Plan) -> None:
        super().__init__()
        self.graph, self.parts, self.plan = graph, parts, plan

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        names = [info.name for info in self.graph.inputs]
        outputs = self.graph.body(self.parts, self.plan, dict(zip(names, tensors, strict=True)))
        return tuple(outputs[info.name] for info in self.graph.outputs)


def trace(graph: GraphSpec, parts: Parts, plan: Plan, mode: Any) -> ir.Model:
    """One graph as an ONNX model whose weights are still fake, named as in `Parts`."""
    with mode:
        inputs = tuple(_empty(info) for info in graph.inputs)
    module = _Traced(graph, parts, plan).eval()
    with _uncollected(), torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=_dynamic(graph), strict=False)
        model = conversion.to_onnx(program, plan.lowering.opset)
        for value, info in zip(model.graph.inputs, graph.inputs, strict=True):
            value.name = info.name
        return _optimise(model)


def _optimise(model: ir.Model) -> ir.Model:
    """Fold constants and drop what is not needed, with the weights as inputs so that no pass looks into them."""
    graph = model.graph
    weights = [value for name, value in list(graph.initializers.items()) if name.startswith("parts.")]
    fake = [value.const_value for value in weights]
    for value in weights:
        assert value.name is not None
        graph.initializers.pop(value.name)
        value.name, value.const_value = value.name.removeprefix("parts."), None
        graph.inputs.append(value)
    conversion.simplify(model)
    for value, content in zip(weights, fake, strict=True):
        graph.inputs.remove(value)
        if value.uses():
            value.const_value = content
            graph.register_initializer(value)
    return model


def _dynamic(graph: GraphSpec) -> Any:
    """Which axes have their size given at run time; None where none has."""
    if graph.dynamic_rows is None:
        return None
    rows = torch.export.Dim("rows", min=2, max=graph.dynamic_rows)
    axes = [graph.row_axes.get(info.name) for info in graph.inputs]
    return {"tensors": tuple({} if axis is None else {axis: rows} for axis in axes)}


def _empty(info: TensorInfo) -> Tensor:
    return torch.empty(info.shape, dtype=_TORCH[info.dtype])


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected meanwhile: most of what a trace makes stays until its end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

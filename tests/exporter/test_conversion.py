"""Programs as ONNX models: what PyTorch computes, and without tracing the graphs of a bundle twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from lvlm_edge.exporter.bundles import graph_set, plans
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.graphs import conversion
from tests import tiny

pytestmark = pytest.mark.export

FLOATS = torch.tensor([[-1.5, 0.0, 2.25], [0.5, 3.0, -0.125]])
HALVES = FLOATS.half()
INTEGERS = torch.tensor([[3, -7, 0], [2, 5, 40]])


class Body(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def program(function: Callable[..., Any], *given: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(Body(function), given, strict=False)


def computed(model: ir.Model, *given: Tensor) -> list[Any]:
    names = [value.name for value in model.graph.inputs]
    values = [tensor.numpy() for tensor in given]
    return list(ReferenceEvaluator(ir.to_proto(model)).run(None, dict(zip(names, values, strict=True))))


AS_THEY_ARE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "another dtype": (lambda x: x.float() + 1, (HALVES,)),
    "the same dtype": (lambda x: x.float() * 2, (FLOATS,)),
    "integers of floats": (lambda x: x.long() - 1, (FLOATS,)),
    "a square": (lambda x: x.square() + 1, (FLOATS,)),
    "both of two conditions": (lambda x, y: (x > 0) & (y > 2), (FLOATS, INTEGERS)),
    "a constant": (lambda x: x + torch.tensor([1.0, 2.0, 3.0]), (FLOATS,)),
    "a choice": (lambda x, y: torch.where(y > 2, x, 0 * x), (FLOATS, INTEGERS)),
    "a pair": (lambda x: x.topk(2), (FLOATS,)),
    "halves of each row": (lambda x: torch.cat(x.chunk(2, 0)[::-1]), (FLOATS,)),
}
NOT_AS_THEY_ARE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "integers and a fraction": (lambda x: x * 0.5, (INTEGERS,)),
    "integers against a fraction": (lambda x: x > 2.5, (INTEGERS,)),
    "integers and floats": (lambda x, y: x + y, (INTEGERS, FLOATS)),
    "floats of two widths": (lambda x, y: x * y, (HALVES, FLOATS)),
    "compared in two widths": (lambda x, y: x < y, (HALVES, FLOATS)),
    "a choice of two widths": (lambda x, y: torch.where(x > 0, x, y), (HALVES, FLOATS)),
    "a square and integers": (lambda x, y: x.square() + y, (FLOATS, INTEGERS)),
    "an operator without a form": (lambda x: torch.heaviside(x, torch.tensor([0.5])), (FLOATS,)),
}


@pytest.mark.parametrize("opset", [18, 24])
@pytest.mark.parametrize("case", AS_THEY_ARE | NOT_AS_THEY_ARE)
def test_a_model_computes_what_its_program_does(case, opset):
    function, given = (AS_THEY_ARE | NOT_AS_THEY_ARE)[case]
    expected = function(*given)

    model = conversion.to_onnx(program(function, *given), opset)

    assert model.opset_imports[""] == opset
    found = computed(model, *given)
    for value, wanted in zip(found, expected if isinstance(expected, tuple) else [expected], strict=True):
        assert value.dtype == wanted.numpy().dtype
        assert np.array_equal(value, wanted.numpy())


@pytest.mark.parametrize("case", AS_THEY_ARE)
def test_a_program_of_operators_with_a_form_is_not_traced_again(monkeypatch, case):
    function, given = AS_THEY_ARE[case]
    of = program(function, *given)
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", traced_again)

    assert conversion.to_onnx(of, 24)


def traced_again(*_: Any) -> None:
    raise AssertionError("traced again")


@pytest.mark.parametrize("options", [{"lowering": "modern"}, {"lowering": "legacy", "dtype": "float16"}], ids=str)
def test_graphs_of_a_bundle_are_traced_once(monkeypatch, checkpoint_once, options):
    checkpoint = Checkpoint.open(tiny.checkpoint(checkpoint_once))
    capacity = {"max_text_tokens": 24, "max_new_tokens": 8, "prune_layer": 1}
    plan = plans.plan_of(checkpoint, method="fastv", options=capacity | options)
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", traced_again)

    found = graph_set.trace_graphs(plan, lambda *_: None, ort=True)

    assert {wanted.name for wanted, _ in found.models} >= {"vision", "prefill_head", "select", "prefill_tail", "decode"}


def test_another_version_of_torch_goes_the_long_way_and_says_so(monkeypatch, caplog):
    def other(opset: int) -> Any:
        raise AttributeError("no attribute 'ONNXRegistry'")

    monkeypatch.setattr(conversion, "_private", other)
    conversion._torch.cache_clear()
    try:
        model = conversion.to_onnx(program(lambda x: x + 1, FLOATS), 24)
    finally:
        conversion._torch.cache_clear()

    (added,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {model.graph.inputs[0].name: FLOATS.numpy()})
    np.testing.assert_array_equal(added, FLOATS.numpy() + 1)
    assert "not the ONNX exporter of torch 2.9 to 2.13" in caplog.text

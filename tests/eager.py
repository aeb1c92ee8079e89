"""Bundles whose graphs are run by PyTorch, body by body, and never traced: what a graph computes, without its export.

`export` writes a bundle as the exporter does, with empty graphs in the place of traced ones. While `running` is in
force, ONNX Runtime's backend runs the bodies of those graphs instead, on the weights of the bundle's own file.
That a traced graph computes what its body does is for the tests that run traced graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from lvlm_edge.exporter import export as export_bundle
from lvlm_edge.exporter.graphs import trace
from lvlm_edge.exporter.graphs.parts import Parts
from lvlm_edge.exporter.lowerings import modern
from lvlm_edge.exporter.planning import GraphSpec, Plan
from lvlm_edge.runtime.backends.ort import OrtBackend
from lvlm_edge.runtime.errors import BundleError

Mistake = Callable[[pytest.MonkeyPatch], None]
TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "int64": ir.DataType.INT64}


@dataclass(frozen=True)
class Body:
    """A graph that is run as PyTorch, with what was patched when it was planned."""

    graph: GraphSpec
    plan: Plan
    mistake: Mistake | None


BODIES: dict[Path, Body] = {}  # by the file in whose place they run


def export(checkpoint: Path, output: Path, *, mistake: Mistake | None = None, **options: Any) -> Path:
    """A bundle of empty graphs, whose bodies run while `running` is in force.

    Args:
        mistake: patches the exporter, while it plans and whenever a body runs.
    """
    assert not options.get("share_weights"), "bodies have fixed shapes"
    found: list[Body] = []

    def trace_nothing(graph: GraphSpec, parts: Parts, plan: Plan, mode: Any) -> ir.Model:
        found.append(Body(graph, plan, mistake))
        return empty(graph, parts, plan, mode)

    with mistaken(mistake) as patch:
        patch.setattr(trace, "trace", trace_nothing)
        export_bundle(checkpoint, output, ort=False, **options)
    BODIES.update({(output / f"{body.graph.name}.onnx").resolve(): body for body in found})
    return output


@contextmanager
def mistaken(mistake: Mistake | None) -> Iterator[pytest.MonkeyPatch]:
    """The exporter with a mistake."""
    with pytest.MonkeyPatch.context() as patch:
        if mistake is not None:
            mistake(patch)
        yield patch


def empty(graph: GraphSpec, parts: Parts, plan: Plan, mode: Any) -> ir.Model:
    """In the place of `trace`: the inputs, outputs and weights of a body, and nothing between them."""
    inputs = [typed(ir.Value(name=info.name), info.shape, info.dtype) for info in graph.inputs]
    nodes, outputs, weights = [], [], []
    for info in graph.outputs:
        shape = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(info.shape, np.int64))})
        zero = ir.Tensor(np.zeros(1, info.dtype), dtype=TYPES[info.dtype])
        made = ir.node("ConstantOfShape", shape.outputs, attributes={"value": zero})
        typed(shape.outputs[0], (len(info.shape),), "int64")
        outputs.append(typed(made.outputs[0], info.shape, info.dtype))
        nodes += [shape, made]
    for name, parameter in parts.named_parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        weight = typed(ir.Value(name=name), parameter.shape, dtype)
        weight.const_value = ir.ExternalTensor("fake", 0, 0, weight.dtype, shape=weight.shape, name=name)
        read = ir.node("Identity", [weight])
        typed(read.outputs[0], parameter.shape, dtype)
        nodes.append(read)
        weights.append(weight)
    body = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": plan.lowering.opset})
    return ir.Model(body, ir_version=10)


def typed(value: ir.Value, shape: Sequence[int], dtype: str) -> ir.Value:
    value.shape, value.type = ir.Shape(shape), ir.TensorType(TYPES[dtype])
    return value


@contextmanager
def running() -> Iterator[None]:
    """ONNX Runtime's backend opens bodies for the bundles of `export`, and graphs for all others."""
    right = OrtBackend.open

    def open_body(backend: Any, bundle: Any, graph: Any, buffers: Any) -> Any:
        path = bundle.path(graph.file).resolve()
        return Session(path, buffers) if path in BODIES else right(backend, bundle, graph, buffers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OrtBackend, "open", open_body)
        yield


def moved(bundle: Path, folder: Path) -> None:
    """Run the bodies for a copy of a bundle too."""
    bodies = {path.name: body for path, body in BODIES.items() if path.parent == bundle.resolve()}
    BODIES.update({folder.resolve() / name: body for name, body in bodies.items()})


class Session:
    """A body over the memory of its inputs and outputs."""

    def __init__(self, path: Path, buffers: Mapping[str, Any]) -> None:
        self.path, self.buffers = path, buffers

    def run(self, rows: int | None = None) -> None:
        of, modules = BODIES[self.path], parts(self.path)
        inputs = {info.name: torch.from_numpy(self.buffers[info.name].array) for info in of.graph.inputs}
        with mistaken(of.mistake) as patch, torch.no_grad():
            patch.setattr(modern, "onnx_op", onnx_op)
            try:
                found = of.graph.body(modules, of.plan, inputs)
            except IndexError as error:
                raise BundleError(f"{self.path}: cannot be run ({error})") from error
        values = {name: value.clone() for name, value in found.items()}  # outputs may lie where inputs do
        for info in of.graph.outputs:
            value, target = values[info.name], self.buffers[info.name].array
            assert (tuple(value.shape), value.dtype) == (target.shape, torch.from_numpy(target).dtype), info
            target[...] = value.numpy()


@functools.lru_cache(maxsize=8)
def parts(path: Path) -> Parts:
    """The modules of a bundle, with the weights that its graph refers to."""
    of = BODIES[path]
    with mistaken(of.mistake):
        made = Parts(of.plan).requires_grad_(False).eval()
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    for name, parameter in made.named_parameters():
        parameter.copy_(torch.from_numpy(numpy_helper.to_array(stored[name]).copy()))
    return made


def onnx_op(name: str, inputs: Sequence[Tensor | None], like: Tensor, **attributes: Any) -> Tensor:
    """An operator of opset 24 as its specification has it, in place of `modern.onnx_op`."""
    given = [*inputs, *[None] * 7]
    result = OPERATORS[name](given, **attributes)
    assert (result.shape, result.dtype) == (like.shape, like.dtype), name
    return result


def _rms_norm(given: Sequence[Any], *, axis: int, epsilon: float, stash_type: int) -> Tensor:
    x, weight = given[0], given[1]
    assert (axis, stash_type) == (-1, 1)
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype) * weight


def _layer_norm(given: Sequence[Any], *, axis: int, epsilon: float, stash_type: int) -> Tensor:
    x, weight, bias = given[:3]
    assert (axis, stash_type) == (-1, 1)
    return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=epsilon).to(x.dtype) * weight + bias


def _rotate(given: Sequence[Any]) -> Tensor:
    x, cos, sin, positions = given[:4]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos[:, None], sin[:, None]  # [1, 1, rows, D_h / 2]
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def _attention(given: Sequence[Any], *, is_causal: int = 0) -> Tensor:
    query, key, value, mask, _, _, lengths = given[:7]
    share = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(share, 1) for part in (key, value))
    scores = query.float() @ key.float().transpose(2, 3) * query.shape[3] ** -0.5
    columns = torch.arange(key.shape[2])
    if is_causal:
        scores = scores.masked_fill(columns > torch.arange(query.shape[2])[:, None], float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if lengths is not None:
        scores = scores.masked_fill(columns >= lengths[:, None, None, None], float("-inf"))
    return (scores.softmax(-1) @ value.float()).to(query.dtype)


def _scatter(given: Sequence[Any], *, axis: int, mode: str) -> Tensor:
    cache, rows, start = given[:3]
    assert (axis, mode) == (2, "linear")
    result, at = cache.clone(), int(start)
    assert 0 <= at <= cache.shape[2] - rows.shape[2], "rows behind the cache"
    result[:, :, at : at + rows.shape[2]] = rows
    return result


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "RMSNormalization": _rms_norm,
    "LayerNormalization": _layer_norm,
    "RotaryEmbedding": _rotate,
    "Attention": _attention,
    "TensorScatter": _scatter,
}

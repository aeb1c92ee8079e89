"""Graphs that round activations, judged by their form: the one that is right, and each way to be another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lvlm_edge.exporter.proof import unrounded

X = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
WEIGHT = np.random.default_rng(1).integers(-127, 128, (4, 2)).astype(np.int8)
SCALE = np.array([0.5, 2], np.float32)
CONSTANTS: dict[str, Any] = {
    "last": np.array([-1]),
    "step": np.array([1 / 127], np.float32),
    "all": np.array([-1]),
    "zero": np.array([128], np.uint8),
    "weight": WEIGHT,
    "one": np.array([1], np.float32),
    "scale": SCALE,
    "offset": np.array(128, np.uint8),
}
NODES: dict[str, tuple[str, list[str], dict[str, int]]] = {  # by output: operator, inputs, attributes
    "size": ("Abs", ["x"], {}),
    "most": ("ReduceMax", ["size", "last"], {"keepdims": 1}),
    "row": ("Mul", ["most", "step"], {}),
    "flat": ("Reshape", ["row", "all"], {}),
    "count": ("Shape", ["flat"], {}),
    "zeros": ("Expand", ["zero", "count"], {}),
    "rounded": ("QuantizeLinear", ["x", "flat", "zeros"], {"axis": 1}),
    "wide": ("MatMulIntegerToFloat", ["rounded", "weight", "one", "scale", "offset"], {}),
    "y": ("Mul", ["wide", "row"], {}),
}
Change = Callable[[dict[str, Any], dict[str, Any]], None]


def constant(name: str, value: Any) -> Change:
    return lambda constants, nodes: constants.update({name: value})


def node(name: str, *, kind: str = "", inputs: list[str] | None = None, **attributes: int) -> Change:
    """One node changed: its operator, its inputs or its attributes, where they are given."""

    def change(constants: dict[str, Any], nodes: dict[str, Any]) -> None:
        right = nodes[name]
        nodes[name] = (kind or right[0], inputs or right[1], attributes or right[2])

    return change


def bare(name: str) -> Change:
    """A node without its attributes, which the operator's specification then gives."""
    return lambda constants, nodes: nodes.update({name: (*nodes[name][:2], {})})


def added(name: str, kind: str, *inputs: str) -> Change:
    return lambda constants, nodes: nodes.update({name: (kind, list(inputs), {})})


def model(*changes: Change, outputs: tuple[str, ...] = ("y",)) -> ir.Model:
    constants, nodes = dict(CONSTANTS), dict(NODES)
    for change in changes:
        change(constants, nodes)
    made = [
        helper.make_node(
            kind, inputs, [name], domain="com.microsoft" if kind.startswith("MatMulInteger") else "", **attributes
        )
        for name, (kind, inputs, attributes) in nodes.items()
    ]
    given = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4]),
        helper.make_tensor_value_info("unknown", TensorProto.UINT8, []),
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 2]) for name in outputs]
    own = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(helper.make_graph(made, "g", given, results, own), opset_imports=opsets, ir_version=10)
    return ir.from_proto(proto)


@pytest.mark.parametrize("changes", [[], [bare("rounded")], [bare("most")]], ids=["as written", "axis", "keepdims"])
def test_the_right_form_becomes_a_product_of_floats(changes):
    made = model(*changes)

    assert unrounded.unround(made) == []

    kinds = [each.op_type for each in made.graph]
    assert kinds == ["DequantizeLinear", "MatMul"]
    options = onnxruntime.SessionOptions()  # left to itself ONNX Runtime makes a product of integers of it again
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(made).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(["y"], {"x": X, "unknown": np.array(0, np.uint8)})
    np.testing.assert_allclose(found, X @ (WEIGHT * SCALE), rtol=1e-5, atol=1e-4)


OTHER: dict[str, Change] = {
    "more steps": constant("step", np.array([1 / 128], np.float32)),
    "another step for one of two": constant("step", np.array([1 / 127, 1 / 126], np.float32)),
    "another middle": constant("zero", np.array([127], np.uint8)),
    "another middle in the product": constant("offset", np.array(127, np.uint8)),
    "a middle that only the run tells": node("wide", inputs=["rounded", "weight", "one", "scale", "unknown"]),
    "a middle that is nothing": constant("offset", np.zeros(0, np.uint8)),
    "a scale of its own in the product": constant("one", np.array([2], np.float32)),
    "a scale of all rows": constant("last", np.array([-2, -1])),
    "a scale of every column": constant("last", np.array([-2])),
    "a scale of the first columns": constant("last", np.array([0])),
    "rows without their axis": node("most", keepdims=0),
    "rounded by columns": node("rounded", axis=2),
    "rounded by nothing": node("rounded", axis=0),
    "the largest, and not the largest magnitude": node("most", inputs=["x", "last"], keepdims=1),
    "the sum of magnitudes": node("most", kind="ReduceSum"),
    "another function of magnitudes": node("size", kind="Neg"),
    "the magnitudes of something else": lambda constants, nodes: nodes.update(
        {"other": ("Neg", ["x"], {}), "size": ("Abs", ["other"], {})}
    ),
    "magnitudes divided": node("row", kind="Div"),
    "scales in no row": node("flat", kind="Identity", inputs=["row"]),
    "middles that are none": node("zeros", kind="Identity", inputs=["zero"]),
    "no rounding": lambda constants, nodes: nodes.update({"rounded": ("Cast", ["x"], {"to": TensorProto.UINT8})}),
    "more than the five inputs": node("wide", inputs=["rounded", "weight", "one", "scale", "offset", "offset"]),
    "scales added": node("y", kind="Add"),
    "another scale afterwards": node("y", inputs=["wide", "most"]),
    "scales that are squared": node("y", inputs=["row", "wide"]),
    "a product that is read twice": added("z", "Neg", "wide"),
}


@pytest.mark.parametrize("name", OTHER)
def test_another_form_is_named(name):
    made = model(OTHER[name])

    assert unrounded.unround(made) == ["wide rounds in another way"]

    assert "MatMulIntegerToFloat" in [each.op_type for each in made.graph]


def test_a_product_that_is_an_output_has_rows_that_are_not_scaled():
    assert unrounded.unround(model(outputs=("y", "wide"))) == ["wide rounds in another way"]


def test_products_of_another_kind_are_left_alone():
    made = model(node("wide", kind="Neg", inputs=["x"]))

    assert unrounded.unround(made) == []


def test_every_product_is_judged_and_named():
    second = [
        added("wide.2", "MatMulIntegerToFloat", "rounded", "weight", "one", "scale", "offset"),
        added("y.2", "Mul", "wide.2", "most"),
    ]

    assert unrounded.unround(model(*second, outputs=("y", "y.2"))) == ["wide.2 rounds in another way"]


def test_problems_of_a_bundles_graphs_name_their_file():
    from lvlm_edge.runtime.backends.ort import library

    wrong = ir.to_proto(model(OTHER["scales added"])).SerializeToString()
    backend = unrounded.Unrounded(library())

    class Bundle:
        def graph(self, file: str) -> bytes:
            return wrong

    for name in ("a.onnxruntime", "b.onnxruntime"):
        backend.content(Bundle(), name)  # type: ignore[arg-type]

    assert backend.problems == [f"{name}.onnxruntime: wide rounds in another way" for name in "ab"]

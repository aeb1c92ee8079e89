"""Products that read the same rows become one: the joined graph computes what numpy computes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lvlm_edge.exporter.ort import joined

ROWS, INNER, BLOCK = 1, 32, 16
WIDTHS = {"q": 6, "k": 4, "v": 4}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(1, ROWS, INNER)).astype(np.float32)
INTEGERS = {name: RNG.integers(-7, 8, (INNER, width)) for name, width in WIDTHS.items()}
BIASES = {name: RNG.normal(size=width).astype(np.float32) for name, width in WIDTHS.items()}


def scales(name: str, bits: int) -> Any:
    shape = (INNER // BLOCK, WIDTHS[name]) if bits == 4 else (WIDTHS[name],)
    return np.random.default_rng(len(name) + WIDTHS[name]).uniform(0.1, 1, shape).astype(np.float32)


def model(bits: int, biases: tuple[str, ...], extra: tuple[str, ...] = ()) -> onnx.ModelProto:
    """Three products of the same rows; some with a bias, some of which are read once more."""
    nodes, tensors, outputs = [], [], []
    for name in WIDTHS:
        kind = np.int8 if bits == 8 else ml_dtypes.int4
        tensors.append(numpy_helper.from_array(INTEGERS[name].astype(kind), f"{name}.weight"))
        tensors.append(numpy_helper.from_array(scales(name, bits), f"{name}.scale"))
        options = {"axis": 1} if bits == 8 else {"axis": 0, "block_size": BLOCK}
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}.weight", f"{name}.scale"], [f"{name}.w"], **options)
        )
        product = f"{name}.product" if name in biases else name
        nodes.append(helper.make_node("MatMul", ["x", f"{name}.w"], [product]))
        if name in biases:
            tensors.append(numpy_helper.from_array(BIASES[name], f"{name}.bias"))
            nodes.append(helper.make_node("Add", [product, f"{name}.bias"], [name]))
        outputs.append(name)
        if name in extra:
            nodes.append(helper.make_node("Neg", [product], [f"{name}.extra"]))
            outputs.append(f"{name}.extra")
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)
    graph = helper.make_graph(nodes, "g", [x], infos, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def expected(bits: int, biases: tuple[str, ...], extra: tuple[str, ...] = ()) -> list[Any]:
    found = []
    for name in WIDTHS:
        scale = scales(name, bits)
        scale = np.repeat(scale, BLOCK, 0) if bits == 4 else scale
        product = X.astype(np.float64) @ (INTEGERS[name] * scale.astype(np.float64))
        found.append(product + BIASES[name] if name in biases else product)
        found += [-product] if name in extra else []
    return found


@pytest.mark.parametrize(
    ("bits", "biases", "extra", "products"),
    [
        (8, (), (), 1),
        (4, (), (), 1),
        (8, ("q", "k", "v"), (), 1),
        (4, ("q", "k", "v"), (), 1),
        (8, ("q", "v"), (), 2),  # those with a bias and the one without
        (8, ("q", "k", "v"), ("k",), 2),  # what is read before its bias is no product with one
    ],
)
def test_joined_products_are_those_of_numpy(bits, biases, extra, products):
    found = ir.from_proto(model(bits, biases, extra))

    joined.rewrite(found)

    RemoveUnusedNodesPass()(found)
    kinds = Counter(node.op_type for node in found.graph)
    assert kinds["MatMul"] == kinds["DequantizeLinear"] == products
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # floats, not rounded rows
    session = onnxruntime.InferenceSession(ir.to_proto(found).SerializeToString(), options)
    for one, right in zip(session.run(None, {"x": X}), expected(bits, biases, extra), strict=True):
        np.testing.assert_allclose(one, right, atol=1e-4)


def test_onnx_runtime_makes_one_product_of_integers_of_it(tmp_path):
    """What is joined at load is constant to ONNX Runtime, and ends in its kernel for integers."""
    found = ir.from_proto(model(4, ("q", "k", "v")))
    joined.rewrite(found)
    RemoveUnusedNodesPass()(found)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4

    onnxruntime.InferenceSession(ir.to_proto(found).SerializeToString(), options)

    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["MatMulNBits"] == 1 and not kinds.keys() & {"MatMul", "DequantizeLinear", "Concat", "Cast"}

"""Exported graphs: what a TensorRT or ONNX Runtime of today can take, and one weights file under all of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from lvlm_edge.runtime.bundle.kv_cache import coded_length

# Operators that TensorRT's parser refuses, or that make shapes depend on data.
TRAPS = {"NonZero", "Compress", "Unique", "Loop", "If", "Scan", "BitShift", "DynamicQuantizeLinear", "Where"}
TOPK_LIMIT = 3840
DTYPES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.INT64: "int64"}
WIDTH = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.INT64: 8, TensorProto.BOOL: 1}


@pytest.fixture
def manifest(made) -> dict[str, Any]:
    return json.loads((made.bundle / "manifest.json").read_text())


@pytest.fixture
def graphs(made, manifest) -> dict[str, onnx.ModelProto]:
    return {g["name"]: onnx.load(made.bundle / g["file"], load_external_data=False) for g in manifest["graphs"]}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def nodes(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def shape(value: onnx.ValueInfoProto) -> list[int]:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else -1 for d in dims]


def described(values: Any) -> list[dict[str, Any]]:
    return [{"name": v.name, "dtype": DTYPES[v.type.tensor_type.elem_type], "shape": shape(v)} for v in values]


def external(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    """File, offset and length of a tensor's bytes."""
    entry = {e.key: e.value for e in tensor.external_data}
    return entry["location"], int(entry.get("offset", 0)), int(entry["length"])


def stored(graphs: dict[str, onnx.ModelProto]) -> dict[str, set[tuple[str, int, int]]]:
    """Where each weight lies, by name, over all graphs."""
    found: dict[str, set[tuple[str, int, int]]] = {}
    for model in graphs.values():
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                found.setdefault(tensor.name, set()).add(external(tensor))
    return found


def test_a_method_has_its_graphs(made, graphs):
    expected = {
        "none": ["vision", "prefill", "decode"],
        "fastv": ["vision", "prefill_head", "select", "prefill_tail", "decode"],
    }
    assert list(graphs) == expected[made.method]


def test_graphs_are_plain_onnx_of_opset_24(graphs):
    for model in graphs.values():
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 24)]
        assert model.ir_version == 10
        assert not model.functions
        assert {node.domain for node in model.graph.node} == {""}


def test_no_operator_is_on_the_trap_list(graphs):
    for model in graphs.values():
        assert not TRAPS & {node.op_type for node in model.graph.node} - {"Where"}
        for node in nodes(model, "Where"):  # a masked softmax, and never one that decides a shape
            assert all(DTYPES.get(t) != "int64" for t in _types(model, node.output))


def _types(model: onnx.ModelProto, names: Any) -> list[int]:
    known = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    return [known[name] for name in names]


def test_every_dimension_of_every_value_is_fixed(graphs):
    for model in graphs.values():
        known = {v.name: shape(v) for v in (*model.graph.input, *model.graph.value_info, *model.graph.output)}
        for node in model.graph.node:
            for name in filter(None, node.output):
                assert name in known, (node.op_type, name)
        assert all(d > 0 for dims in known.values() for d in dims)


def test_attention_and_cache_writes_are_those_that_tensorrt_takes(graphs):
    for model in graphs.values():
        inputs, outputs = {v.name for v in model.graph.input}, {v.name for v in model.graph.output}
        for node in nodes(model, "Attention"):
            assert len(node.output) == 1
            assert not {"softcap", "softmax_precision"} & set(attributes(node))
            assert not any(node.input[3:6])  # neither a mask nor a past
        for node in nodes(model, "TensorScatter"):
            assert attributes(node).get("mode", b"linear") == b"linear"
            assert attributes(node).get("axis", -2) in (2, -2)
            assert node.input[0] in inputs and node.output[0] in outputs
            assert node.output[0].replace("present", "past_key_values") == node.input[0]


def test_topk_stays_below_tensorrts_limit(graphs):
    for model in graphs.values():
        constants = {t.name: t for t in model.graph.initializer}
        for node in nodes(model, "TopK"):
            assert onnx.numpy_helper.to_array(constants[node.input[1]]).item() <= TOPK_LIMIT


def slot_of(graph, slot, length):
    """What a graph makes of a cache length, by its own operators."""
    steps, wanted = [], {slot}
    for node in reversed(graph.node):
        if wanted & set(node.output):
            steps.insert(0, node)
            wanted |= set(node.input)
    inputs = [helper.make_tensor_value_info("cache_length", TensorProto.INT64, [1])]
    outputs = [helper.make_tensor_value_info(slot, TensorProto.INT64, [1])]
    constants = [t for t in graph.initializer if not t.external_data]
    found = helper.make_graph(steps, "slot", inputs, outputs, constants)
    if not steps:
        return length
    model = helper.make_model(found, opset_imports=[helper.make_opsetid("", 18)])
    (value,) = ReferenceEvaluator(model).run(None, {"cache_length": np.array([length])})
    return int(value.item())


def test_decode_has_one_cache_length_and_derives_the_tails_slot(made, manifest, graphs):
    model = graphs["decode"].graph
    integers = [v.name for v in model.input if v.type.tensor_type.elem_type == TensorProto.INT64]

    dropped = {}
    for node in nodes(graphs["decode"], "TensorScatter"):
        layer = int(node.input[0].split(".")[1])
        dropped[layer] = 60 - slot_of(model, node.input[2], 60)
        if made.method == "fastv":  # rows that are not dropped where pictures are missing
            fewer = slot_of(model, node.input[2], coded_length(60, restored=5))
            assert fewer == 60 - dropped[layer] + (5 if dropped[layer] else 0)

    assert integers == ["position_ids", "cache_length"]
    assert [dropped[i] for i in sorted(dropped)] == [layer["dropped"] for layer in manifest["cache"]]
    assert set(dropped.values()) == ({0, 8} if made.method == "fastv" else {0})


def test_layers_from_the_prune_layer_on_have_the_smaller_cache(made, manifest):
    removed = 8 if made.method == "fastv" else 0
    full = 16 + 64 + 16  # visual, text and new tokens

    assert [layer["capacity"] for layer in manifest["cache"]] == [full, full, full - removed, full - removed]


def test_inputs_and_outputs_have_the_names_of_the_ecosystem(made, graphs):
    layers = {"none": {"prefill": range(4)}, "fastv": {"prefill_head": range(2), "prefill_tail": range(2, 4)}}

    def caches(prefix, of):
        return {f"{prefix}.{i}.{part}" for i in of for part in ("key", "value")}

    names = {
        name: ({v.name for v in model.graph.input}, {v.name for v in model.graph.output})
        for name, model in graphs.items()
    }
    assert names["vision"] == ({"pixel_values"}, {"image_features", "image_embeds"})
    assert names["decode"][0] == {"inputs_embeds", "position_ids", "cache_length"} | caches("past_key_values", range(4))
    assert names["decode"][1] == {"logits"} | caches("present", range(4))
    for name, of in layers[made.method].items():
        inputs, outputs = names[name]
        assert caches("past_key_values", of) < inputs and caches("present", of) < outputs
    first, *_, last = [next(iter(layers[made.method])), *layers[made.method]]
    assert {"inputs_embeds", "position_ids"} < names[first][0]
    assert "logits" in names[last][1]


def test_the_manifest_describes_every_input_and_output_in_order(manifest, graphs):
    for entry in manifest["graphs"]:
        assert described(graphs[entry["name"]].graph.input) == entry["inputs"]
        assert described(graphs[entry["name"]].graph.output) == entry["outputs"]


def test_precision_is_the_bundles_with_scores_and_logits_in_float32(made, manifest):
    for entry in manifest["graphs"]:
        for tensor in (*entry["inputs"], *entry["outputs"]):
            if tensor["name"] in ("logits", "score"):
                assert tensor["dtype"] == "float32"
            elif tensor["dtype"] != "int64":
                assert tensor["dtype"] == made.dtype


def test_every_weight_lies_once_in_the_weights_file(graphs):
    found = stored(graphs)

    assert all(len(places) == 1 for places in found.values())
    assert {location for places in found.values() for location, *_ in places} == {"weights.bin"}
    for model in graphs.values():
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                assert external(tensor)[2] == math.prod(tensor.dims) * WIDTH[tensor.data_type]
            else:
                assert math.prod(tensor.dims) <= 256  # a constant, not a weight


def test_prefill_and_decode_share_every_decoder_weight(graphs):
    prefill: set[str] = set()
    for name, model in graphs.items():
        if name.startswith("prefill"):
            prefill |= {t.name for t in model.graph.initializer if t.external_data}
    decode = {t.name for t in graphs["decode"].graph.initializer if t.external_data}

    assert prefill == decode


def test_weights_and_embedding_fill_the_file_without_overlap(made, manifest, graphs):
    table = manifest["embedding"]
    size = table["vocab"] * table["hidden"] * {"float32": 4, "float16": 2}[table["dtype"]]
    ranges = sorted([place[1:] for places in stored(graphs).values() for place in places] + [(table["offset"], size)])
    end = 0
    for offset, length in ranges:
        assert 0 <= offset - end < 64  # nothing twice, and no more than an alignment in between
        end = offset + length

    assert end == (made.bundle / "weights.bin").stat().st_size


def test_the_checker_takes_every_graph_in_full(made, manifest):
    for entry in manifest["graphs"]:
        onnx.checker.check_model(str(Path(made.bundle) / entry["file"]), full_check=True)

"""The two lowerings say the same, and the legacy one keeps to what an old TensorRT parses."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from lvlm_edge.exporter import export, lowerings
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle import open_bundle
from lvlm_edge.runtime.errors import UnsupportedError
from tests import checkpoints

# Operators that TensorRT's ONNX parser takes, of those a transformer needs. Source: docs/operators.md of the public
# repository onnx/onnx-tensorrt at commit 6d0ab7be (TensorRT 8.5). Parsers only gained operators since; the page of
# 10.3 itself was not at hand. LayerNormalization, Gelu and what is newer are not in it.
_NAMES = (
    "Add And ArgMax Cast Clip Concat Constant ConstantOfShape Conv Cos Div Equal Erf Exp Expand Flatten Gather "
    "GatherElements GatherND Gemm Greater GreaterOrEqual Identity Less LessOrEqual Log MatMul Max Mean Min Mul Neg Not "
    "Or Pow Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape ScatterElements ScatterND Shape "
    "Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where"
)
PARSED_SINCE_8_5 = frozenset(_NAMES.split())
FASTV = {"method": "fastv", "prune_layer": 2, "keep_ratio": 0.5}
KINDS = ("none-mha", "none-gqa", "fastv-mha", "fastv-gqa")


def exported_both_ways(kind, mha, gqa, export):
    """The same model in both lowerings."""
    method, heads = kind.split("-")
    options = FASTV if method == "fastv" else {"method": "none"}
    return tuple(export({"mha": mha, "gqa": gqa}[heads], lowering=name, **options) for name in ("modern", "legacy"))


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=() if kind == "fastv-gqa" else pytest.mark.slow) for kind in KINDS],
)
def pair(request, mha, gqa, export_once):
    return exported_both_ways(request.param, mha, gqa, export_once)


@pytest.mark.parametrize(("text", "before"), [(2, 1), (30, 5), (64, 40)])
def test_both_lowerings_say_the_same(pair, text, before):
    agree(pair, text, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "before"), [(2, 1), (30, 5), (64, 40)])
def test_the_bodies_of_both_lowerings_say_the_same(kind, mha, gqa, eager_once, text, before):
    agree(exported_both_ways(kind, mha, gqa, eager_once), text, before)


def agree(pair, text, before):
    prompt, pixels = checkpoints.prompt(text, before), checkpoints.pixels()

    modern, legacy = (
        Pipeline.load(bundle).generate_tokens(prompt, pixels, max_new_tokens=16, ignore_eos=True) for bundle in pair
    )

    assert legacy.token_ids == modern.token_ids
    np.testing.assert_allclose(legacy.logits, modern.logits, atol=1e-4)
    if modern.kept_visual is not None:
        assert legacy.kept_visual.tolist() == modern.kept_visual.tolist()


def test_a_legacy_pipeline_forgets_the_prompt_before(pair):
    _, legacy = pair
    pipe, fresh = Pipeline.load(legacy), Pipeline.load(legacy)
    long, short = checkpoints.prompt(60, 20), checkpoints.prompt(8, 3)
    pipe.generate_tokens(long, checkpoints.pixels(), max_new_tokens=16, ignore_eos=True)

    again = pipe.generate_tokens(short, checkpoints.pixels(seed=1), max_new_tokens=8, ignore_eos=True)

    expected = fresh.generate_tokens(short, checkpoints.pixels(seed=1), max_new_tokens=8, ignore_eos=True)
    np.testing.assert_array_equal(again.logits, expected.logits)


def test_legacy_graphs_are_opset_18_and_hold_only_what_old_parsers_take(pair):
    _, legacy = pair
    manifest = open_bundle(legacy).manifest
    assert (manifest.lowering, manifest.opset) == ("legacy", 18)
    for graph in manifest.graphs:
        model = onnx.load(legacy / graph.file, load_external_data=False)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
        assert {node.op_type for node in model.graph.node} <= PARSED_SINCE_8_5
        onnx.checker.check_model(str(legacy / graph.file), full_check=True)


def test_no_product_of_legacy_graphs_differs_in_its_operands_batch(pair):
    """ONNX Runtime runs one that does by pointers, which it copies to the GPU each time."""
    _, legacy = pair
    products = 0
    for graph in open_bundle(legacy).manifest.graphs:
        model = onnx.shape_inference.infer_shapes(onnx.load(legacy / graph.file, load_external_data=False))
        values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
        shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        for node in model.graph.node:
            if node.op_type == "MatMul" and all(name in shapes for name in node.input):  # weights are in no list
                left, right = (shapes[name][:-2] for name in node.input)
                products += bool(right)
                assert right in ([], left), (graph.name, node.name)  # one matrix for all is one product
    assert products > 0


def test_legacy_graphs_return_new_rows_and_never_a_whole_cache(pair):
    _, legacy = pair
    manifest = open_bundle(legacy).manifest
    rows = {
        (graph.role, info.shape[2])
        for graph in manifest.graphs
        for info in graph.outputs
        if info.name.startswith("present.")
    }
    capacities = {layer.capacity for layer in manifest.cache}

    assert ("decode", 1) in rows
    assert not {count for _, count in rows} & capacities


@pytest.mark.slow
def test_legacy_float16_gives_logits_close_to_modern_float32(gqa, export_once):
    exact = Pipeline.load(export_once(gqa, **FASTV))
    half = Pipeline.load(export_once(gqa, lowering="legacy", dtype="float16", **FASTV))
    prompt, pixels = checkpoints.prompt(20, 5), checkpoints.pixels()

    found, expected = (p.generate_tokens(prompt, pixels, max_new_tokens=1).logits for p in (half, exact))

    assert np.abs(found - expected).max() <= 2e-2 * np.abs(expected).max()


def test_an_unknown_lowering_names_the_known_ones(mha, tmp_path):
    with pytest.raises(UnsupportedError, match="did you mean legacy"):
        export(mha, tmp_path / "bundle", lowering="legcy")
    assert lowerings.names() == ["legacy", "modern"]

"""What ONNX Runtime runs instead of the portable graphs: which operators it gets, and where it must not get them.

That the answers stay right is what the tests of the methods show, since these graphs are what they run.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle import open_bundle
from tests import checkpoints

FASTV = {"method": "fastv", "prune_layer": 2, "keep_ratio": 0.25}
LAYERS = 4


@pytest.fixture
def gqa(checkpoint_once):
    """Heads of 16."""
    return checkpoint_once(text={"num_attention_heads": 4, "num_key_value_heads": 2})


def nodes(bundle, role, name=None):
    """Nodes of the graphs of a role that ONNX Runtime runs, by operator."""
    graphs = [g for g in open_bundle(bundle).manifest.variants["ort"] if g.role == role and name in (None, g.name)]
    found = [n for g in graphs for n in onnx.load(bundle / g.file, load_external_data=False).graph.node]
    return {kind: [n for n in found if n.op_type == kind] for kind in {n.op_type for n in found}}


def flag(node, name):
    return next(a.i for a in node.attribute if a.name == name)


@pytest.mark.parametrize(
    ("options", "fused", "transposed"),
    [
        ({"method": "none"}, LAYERS, 0),
        ({"method": "none", "share_weights": True}, LAYERS, 0),
        pytest.param({"method": "none", "max_graph_gb": 1e-6}, LAYERS, 0, marks=pytest.mark.slow),
        pytest.param({"method": "none", "dtype": "float16"}, LAYERS, 0, marks=pytest.mark.slow),
        ({"method": "none", "weights": "int4", "block_size": 32}, LAYERS, 0),
        (FASTV, LAYERS, 2),  # the score reads rotated queries and keys of its own
    ],
)
def test_decode_attends_in_fused_operators(gqa, export_once, options, fused, transposed):
    found = {kind: len(some) for kind, some in nodes(export_once(gqa, **options), "decode").items()}

    assert (found.get("GroupQueryAttention", 0), found.get("Attention", 0)) == (fused, 0)
    assert found["SkipSimplifiedLayerNormalization"] >= LAYERS
    assert (found.get("Transpose", 0), found.get("TensorScatter", 0)) == (transposed, 0)


@pytest.mark.parametrize(
    "method",
    [
        {"method": "proxyv"},
        pytest.param({"method": "himix"}, marks=pytest.mark.slow),
        pytest.param({"method": "yopo"}, marks=pytest.mark.slow),
        {"method": "yopo", "semantics": "dropped"},
    ],
)
def test_decode_of_every_method_has_them(original, export_once, method):
    found = nodes(export_once(original(method=method["method"], side=8), **method), "decode")

    assert found["GroupQueryAttention"] and len(found["SkipSimplifiedLayerNormalization"]) >= 2


def test_rows_are_rotated_inside_only_where_slots_are_positions(gqa, export_once):
    """The kernel takes a first prompt's rows to be at 0, 1, 2, ..., which kept rows are not."""
    bundle = export_once(gqa, **FASTV)
    head = nodes(bundle, "prefill", "prefill_head")
    tail = nodes(bundle, "prefill", "prefill_tail")

    assert [flag(node, "do_rotary") for node in head["GroupQueryAttention"]] == [1, 1]
    assert len(head["RotaryEmbedding"]) == 1  # of the queries that the score reads
    assert [flag(node, "do_rotary") for node in tail["GroupQueryAttention"]] == [0, 0]
    assert len(tail["RotaryEmbedding"]) == 4


def test_heads_of_other_sizes_stay_as_they_are(checkpoint_once, export_once):
    """The operator takes heads of multiples of 16 only."""
    bundle = export_once(checkpoint_once(text={"hidden_size": 48, "head_dim": 12}), method="none")
    found = Counter({kind: len(some) for kind, some in nodes(bundle, "decode").items()})
    plain, fused = (Pipeline.load(bundle, portable=portable) for portable in (True, False))
    prompt, pixels = checkpoints.prompt(20, 5), checkpoints.pixels()

    assert found["GroupQueryAttention"] == 0 and found["Attention"] > 0
    expected, answer = (pipe.generate_tokens(prompt, pixels, ignore_eos=True) for pipe in (plain, fused))
    assert answer.token_ids == expected.token_ids
    assert np.abs(answer.logits - expected.logits).max() < 1e-4


def test_encoders_attend_in_blocks_where_they_are_of_float32(gqa, export_once):
    layers = 2  # of the encoder's 3, the last of which is not built
    whole, half = (nodes(export_once(gqa, dtype=dtype), "image") for dtype in ("float32", "float16"))

    assert (len(whole["MultiHeadAttention"]), "Attention" in whole) == (layers, False)
    assert "MultiHeadAttention" not in half


def test_portable_graphs_have_none_of_them(gqa, export_once):
    bundle = export_once(gqa, **FASTV)
    for graph in open_bundle(bundle).manifest.graphs:
        assert not {n.domain for n in onnx.load(bundle / graph.file, load_external_data=False).graph.node} - {""}

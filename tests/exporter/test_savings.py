"""The graphs of ProxyV, YOPO and HiMix hold the work that the plan counts, and none that the method removed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch.utils.flop_counter import FlopCounterMode

from lvlm_edge.exporter import plan
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle import Manifest, open_bundle
from tests import families
from tests.cases import some

CAPACITIES = {"max_text_tokens": 64, "max_new_tokens": 16}
UNEVEN = ["1111", "1010", "0110", "0000", "1111", "0001"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "proxyv, one crop": ("proxyv", {}, {}),
    "proxyv, three crops": ("proxyv", {"kv_heads": 2}, {"grid": (1, 2)}),
    "proxyv, learnt": ("proxyv", {"learn_proxy": True}, {"grid": (2, 2)}),
    "proxyv from layer 0": ("proxyv", {"start_layer": 0}, {}),
    "yopo released": ("yopo", {"layers": 6}, {"semantics": "released"}),
    "yopo dropped": ("yopo", {"layers": 6, "cutoff": 5, "head_mask": UNEVEN}, {"semantics": "dropped"}),
    "yopo dropped, gqa": ("yopo", {"layers": 6, "kv_heads": 2}, {"semantics": "dropped"}),
    "yopo dropped, one head apart": (
        "yopo",
        {"layers": 4, "kv_heads": 2, "cutoff": 4, "head_mask": ["1110", "0111", "0100", "0011"]},
        {"semantics": "dropped"},
    ),
    "himix": ("himix", {"kv_heads": 2}, {}),
    "himix, two images": ("himix", {}, {"num_images": 2}),
}


OFTEN = ("proxyv, three crops", "yopo dropped, gqa", "himix, two images")


@pytest.fixture(params=[pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in CASES])
def case(request, original, export_once):
    """Method, checkpoint, options and bundle; a grid of 8 x 8, so that attention counts."""
    method, options, more = CASES[request.param]
    checkpoint = original(method=method, side=8, **options)
    return method, checkpoint, more, export_once(checkpoint, method=method, **more, **CAPACITIES, ort=False)


def products(path: Path) -> list[tuple[int, ...]]:
    """Every matrix product of a graph as (batch, rows, inner, columns); attention as its two."""
    model = onnx.load(path, load_external_data=False).graph
    shapes = {t.name: tuple(t.dims) for t in model.initializer}
    for value in (*model.input, *model.value_info, *model.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    found = []
    for node in model.node:
        if node.op_type == "MatMul":
            *batch, rows, columns = shapes[node.output[0]]
            found.append((math.prod(batch), rows, shapes[node.input[0]][-1], columns))
        elif node.op_type == "Conv":
            _, columns, *grid = shapes[node.output[0]]
            found.append((1, math.prod(grid), math.prod(shapes[node.input[1]][1:]), columns))
        elif node.op_type == "Attention":
            _, heads, rows, size = shapes[node.input[0]]
            keys = shapes[node.input[1]][2]
            found += [(heads, rows, size, keys), (heads, rows, keys, size)]
        assert node.op_type not in ("Gemm", "Einsum", "ConvTranspose")
    return found


def flops(path: Path) -> int:
    return sum(2 * math.prod(product) for product in products(path))


def of_role(bundle: Path, manifest: Manifest, *names: str) -> int:
    return sum(flops(bundle / g.file) for g in manifest.graphs if g.role in names or g.name in names)


def test_flops_of_the_graphs_are_those_of_the_plan(case):
    method, checkpoint, more, bundle = case

    expected = plan(checkpoint, method=method, **more, **CAPACITIES)["flops"]

    manifest = open_bundle(bundle).manifest
    assert manifest.views * of_role(bundle, manifest, "vision") == pytest.approx(
        expected["vision"] + expected["projector"]
    )
    assert of_role(bundle, manifest, "prefill", "image_kv") == pytest.approx(expected["prefill"], rel=0.01)
    assert of_role(bundle, manifest, "decode") == pytest.approx(expected["decode_per_token"], rel=0.01)


@pytest.mark.parametrize("name", CASES)
def test_pytorch_counts_the_flops_of_the_plan_to_the_last_one(name, original, eager_once):
    method, options, more = CASES[name]
    checkpoint = original(method=method, side=8, **options)
    expected = plan(checkpoint, method=method, **more, **CAPACITIES)["flops"]
    pipe = Pipeline.load(eager_once(checkpoint, method=method, **more))
    pixels = np.ones((pipe.manifest.views, 3, 112, 112), np.float32)
    image = pipe.manifest.pictures[0].token_id
    prompt = [5, *[image] * len(pipe.manifest.pictures), 7]

    def counted(tokens: int) -> int:
        pipe.forget_images()
        with FlopCounterMode(display=False) as counter:
            pipe.generate_tokens(prompt, pixels, max_new_tokens=tokens, ignore_eos=True)
        return counter.get_total_flops()

    first = counted(1)
    assert first == expected["vision"] + expected["projector"] + expected["prefill"]
    assert counted(2) - first == expected["decode_per_token"]


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl, released": ("qwen2_vl", {"window": 3, "cutoff": 3, "head_mask": ("110110",) * 5}),
    "qwen2_vl, dropped": (
        "qwen2_vl",
        {"semantics": "dropped", "cutoff": 3, "head_mask": ("110110", "000101", "111111", "111111", "111111")},
    ),
    "internvl, released": ("internvl", {"cutoff": 3, "head_mask": ("1011",) * 5}),
    "internvl, dropped": ("internvl", {"semantics": "dropped", "ffn_ratio": 2.0, "head_mask": ("1011",) * 5}),
}


@pytest.mark.parametrize(
    "name", some([(name,) for name in FAMILIES], {("qwen2_vl, released",), ("internvl, dropped",)})
)
def test_pytorch_counts_the_flops_of_yopo_on_other_families(name, oracles, eager_once):
    family, options = FAMILIES[name]
    of = families.case(oracles, family, "none_1")
    options = {"method": "yopo", "image_size": tuple(of.data["picture_sizes"][0]), **options}
    expected = plan(of.checkpoint, **options, **CAPACITIES)["flops"]
    pipe = Pipeline.load(eager_once(of.checkpoint, **options))
    ids, pixels = pipe.prepare("What?", of.pictures)
    pipe.generate_tokens(ids, pixels, max_new_tokens=1)  # the pictures' features are kept

    def counted(tokens: int) -> int:
        with FlopCounterMode(display=False) as counter:
            pipe.generate_tokens(ids, pixels, max_new_tokens=tokens, ignore_eos=True)
        return counter.get_total_flops()

    assert counted(1) == expected["prefill"]
    assert counted(2) - counted(1) == expected["decode_per_token"]
    dense = plan(of.checkpoint, **options | {"semantics": "released", "cutoff": 5}, **CAPACITIES)["flops"]
    assert (expected["prefill"] < dense["prefill"]) == (name != "internvl, released")


def test_the_weights_file_has_the_planned_bytes(case):
    method, checkpoint, more, bundle = case
    found = plan(checkpoint, method=method, **more, **CAPACITIES)
    manifest = open_bundle(bundle).manifest
    tables = (manifest.counts.prompt_tokens + 16) * manifest.cache[0].head_dim * 4

    assert (bundle / "weights.bin").stat().st_size == pytest.approx(found["weights_bytes"] + tables, rel=0.02)


def test_no_constant_is_as_large_as_a_mask(case):
    *_, bundle = case
    for path in bundle.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if not tensor.external_data:
                assert len(tensor.raw_data) <= 8 * 64 * 5 * 3, tensor.name  # an index per row, and not per pair


def test_proxyv_asks_nothing_of_visual_tokens_from_the_start_layer_on(original, export_once):
    bundle = export_once(original(method="proxyv", side=8), method="proxyv", grid=(1, 2), **CAPACITIES, ort=False)

    rows = {(rows, inner, columns) for _, rows, inner, columns in products(bundle / "prefill_tail.onnx")}

    visual, hidden, ffn = 3 * 64, 64, 128
    of_visual = {(inner, columns) for n, inner, columns in rows if n == visual}
    assert of_visual == {(hidden, 32), (64, 32), (32, hidden)}  # the update's MLP
    with_others = {(inner, columns) for n, inner, columns in rows if n > visual}
    assert with_others == {(hidden, hidden)}  # keys and values
    assert not any(n >= visual and ffn in (inner, columns) for n, inner, columns in rows)


def test_yopo_dropped_has_no_visual_rows_in_the_tail_and_only_kept_heads_and_channels_before(original, export_once):
    checkpoint = original(method="yopo", side=8, layers=6, cutoff=5, head_mask=UNEVEN)
    bundle = export_once(checkpoint, method="yopo", semantics="dropped", **CAPACITIES, ort=False)

    def of_visual(name):  # 64 text tokens too: visual rows are told by columns that text does not have
        return [(b, n, inner, columns) for b, n, inner, columns in products(bundle / name)]

    tail = {n for _, n, _, _ in of_visual("prefill_tail.onnx")}
    assert tail <= {64, 1}
    widths = [columns for _, _, inner, columns in of_visual("prefill_head.onnx") if inner == 64]
    assert widths.count(64) > 0  # half of 128 channels, and all heads of 16
    assert 32 in widths  # two of four heads


def test_himix_never_projects_more_rows_than_text_in_its_layers(original, export_once):
    bundle = export_once(original(method="himix", side=8), method="himix", **CAPACITIES, ort=False)

    assert {rows for _, rows, _, _ in products(bundle / "prefill.onnx")} <= {64, 1}

"""TensorRT-RTX builds every graph of ProxyV, YOPO and HiMix, in float16 and bfloat16, without a GPU."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from lvlm_edge.exporter.devices import engine
from lvlm_edge.exporter.devices.engine import Settings
from lvlm_edge.runtime.backends.cuda import highest
from lvlm_edge.runtime.errors import LvlmEdgeError
from tests.cases import some
from tests.exporter.test_savings import CAPACITIES, CASES

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "easyvqa"
DTYPES = ("float16", "bfloat16")


def built(bundle: Path, *capabilities: str, graphs: tuple[str, ...] | None = None) -> set[str]:
    """Names of the engines that were made of a bundle's graphs, all of them or some."""
    out = engine.build(bundle, Settings(backend="trt-rtx", compute_capabilities=capabilities), graphs=graphs)
    return {path.stem for path in out.glob("*.engine")} - {Path(highest.FILE).stem}  # no graph of the bundle's


def graphs(bundle: Path) -> set[str]:
    return {path.stem for path in bundle.glob("*.onnx")}


ORACLES = {
    "proxyv, one crop": ("proxyv_f2", "proxyv", {}),
    "proxyv, three crops": ("proxyv_f2", "proxyv", {"grid": (1, 2)}),
    "yopo released": ("yopo_w7", "yopo", {"semantics": "released"}),
    "yopo dropped": ("yopo_w7", "yopo", {"semantics": "dropped"}),
    "himix": ("himix_mha", "himix", {}),
}


PUBLIC = {("yopo dropped", "float16")}


@pytest.mark.claims("builds", family={"proxyv": "llava_llama", "yopo": "llava_llama", "himix": "tinyllava"})
@pytest.mark.parametrize(("name", "dtype"), some(itertools.product(ORACLES, DTYPES), PUBLIC))
def test_tensorrt_rtx_builds_the_public_checkpoints(oracles, export_once, name, dtype):
    folder, method, more = ORACLES[name]
    bundle = export_once(oracles / folder, method=method, dtype=dtype, **more, **CAPACITIES, ort=False)

    assert built(bundle, "8.0", "8.9", "12.0") == graphs(bundle)


BUILT = [
    *((name, "float16") for name in ("proxyv, three crops", "proxyv, learnt", "yopo released", "yopo dropped")),
    *((name, "float16") for name in ("yopo dropped, gqa", "himix")),
    *((name, "bfloat16") for name in ("proxyv from layer 0", "yopo released", "yopo dropped, one head apart")),
]


@pytest.mark.parametrize(("name", "dtype"), some(BUILT, {("proxyv from layer 0", "bfloat16")}))
def test_tensorrt_rtx_builds_every_graph(original, export_once, name, dtype):
    method, options, more = CASES[name]
    checkpoint = original(method=method, side=8, **options)
    bundle = export_once(checkpoint, method=method, dtype=dtype, **more, **CAPACITIES, ort=False)

    assert built(bundle, "8.0", "8.9", "12.0") == graphs(bundle)


SAMPLED = ("proxyv", "yopo-released", "yopo-dropped", "himix")


@pytest.mark.slow
@pytest.mark.parametrize("method", SAMPLED)
def test_tensorrt_rtx_builds_the_samples(export_once, method):
    name, _, semantics = method.partition("-")
    more = {"semantics": semantics} if semantics else {}
    bundle = export_once(SAMPLES / name, method=name, dtype="float16", **more, **CAPACITIES, ort=False)

    assert built(bundle, "8.0", "8.9", "12.0") == graphs(bundle)


@pytest.mark.parametrize(
    ("method", "weights"),
    some(itertools.product(SAMPLED, ("int4", "int8")), ()),
)
def test_tensorrt_rtx_builds_the_samples_with_small_weights(export_once, method, weights):
    name, _, semantics = method.partition("-")
    more = {"semantics": semantics} if semantics else {}
    more |= {"weights": weights, "block_size": 32, "dtype": "float16"}
    bundle = export_once(SAMPLES / name, method=name, **more, **CAPACITIES, ort=False)

    assert built(bundle, "8.9") == graphs(bundle)


@pytest.mark.slow  # those of FastV are built in test_engine
@pytest.mark.parametrize("name", ["proxyv, three crops", "yopo dropped", "himix"])
def test_tensorrt_rtx_builds_the_legacy_graphs(original, export_once, name):
    method, options, more = CASES[name]
    checkpoint = original(method=method, side=8, **options)
    bundle = export_once(checkpoint, method=method, dtype="float16", lowering="legacy", **more, **CAPACITIES, ort=False)

    assert built(bundle, "8.6") == graphs(bundle)


# Head masks of successive layers, with 2 KV heads where not said. Earlier forms of the graphs did not build them.
MASKS = {
    "1110 twice": (["1110"] * 2, {}),
    "0111 twice": (["0111"] * 2, {}),
    "1100 three times": (["1100"] * 3, {}),
    "1110 three times, mha": (["1110"] * 3, {"kv_heads": 4}),
    "0100 and 0011": (["0100", "0100", "0011", "0011"], {}),
    "1100, 1101, 1111": (["1100", "1101", "1111"], {}),
    "1100 to 1111": (["1100", "1101", "1110", "1111"], {}),
    "1100 to 1111, then none": (["1100", "1101", "1110", "1111", "0000"], {}),
}


def drawn(count: int, seed: int = 0) -> list[tuple[tuple[str, ...], int]]:
    """Head masks of 3 to 6 layers with 4 heads, on 2 and on 4 KV heads in turn."""
    rng = random.Random(seed)
    return [
        (tuple("".join(rng.choice("01") for _ in range(4)) for _ in range(rng.randint(3, 6))), (2, 4)[i % 2])
        for i in range(count)
    ]


# The one of those drawn here that ends the compiler with a segmentation fault; samples/jetson/README.md has more.
REFUSED = (("1111", "1010", "1100", "0100"), 2)


@pytest.fixture
def yopo_prompt(original, export_once):
    """Builds the prompt's graphs of a YOPO model with some head masks. None may miss."""

    def build(rows, kv_heads):
        shape = {"kv_heads": kv_heads, "layers": len(rows), "cutoff": len(rows), "head_mask": list(rows)}
        checkpoint = original(method="yopo", side=8, **shape)
        bundle = export_once(checkpoint, method="yopo", semantics="dropped", dtype="float16", **CAPACITIES, ort=False)
        names = {name for name in graphs(bundle) if name.startswith("prefill")}
        assert names and built(bundle, "8.6", graphs=tuple(names)) == names

    return build


@pytest.mark.parametrize("name", some([(n,) for n in MASKS], {("1100 to 1111, then none",)}))
def test_tensorrt_rtx_builds_yopo_with_uneven_heads(yopo_prompt, name):
    rows, options = MASKS[name]

    yopo_prompt(rows, **{"kv_heads": 2} | options)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "kv_heads"), [case for case in drawn(6) if case != REFUSED])
def test_tensorrt_rtx_builds_yopo_with_drawn_heads(yopo_prompt, rows, kv_heads):
    yopo_prompt(rows, kv_heads)


def test_a_refused_graph_points_to_the_legacy_lowering(yopo_prompt):
    with pytest.raises(LvlmEdgeError, match="--lowering legacy"):
        yopo_prompt(*REFUSED)

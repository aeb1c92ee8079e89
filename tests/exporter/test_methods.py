"""ProxyV, YOPO and HiMix as bundles, against their released code's outputs and PyTorch references."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lvlm_edge.exporter import references
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle.kv_cache import Layout
from lvlm_edge.runtime.errors import InputError
from tests import fake_onnxruntime, originals
from tests.fake_tensorrt import Machine
from tests.runtime.test_trt import with_engines

__all__ = ["with_engines"]

CHECKPOINTS = {"proxyv": "proxyv_f2", "yopo": "yopo_w7", "himix": "himix_mha"}
FAMILIES = {"proxyv": "llava_llama", "yopo": "llava_llama", "himix": "tinyllava"}
GRIDS = {1: None, 3: (1, 2), 4: (3, 1), 5: (2, 2)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with `method_oracle` runs once per public case of the three methods."""
    if "method_oracle" in metafunc.fixturenames:
        from tests.conftest import ORACLES

        claimed = {m: pytest.mark.claims("equal", family=FAMILIES[m], method=m) for m in CHECKPOINTS}
        cases = [
            pytest.param((m, path.stem), marks=claimed[m])
            for m in CHECKPOINTS
            for path in sorted((ORACLES / m).glob("*.json"))
        ]
        metafunc.parametrize("method_oracle", cases or [("proxyv", "missing")])


@pytest.mark.parametrize("backend", ["ort", "trt-rtx", "ort-cuda"])
@pytest.mark.parametrize("lowering", ["modern", pytest.param("legacy", marks=pytest.mark.slow)])
def test_the_bundle_gives_the_released_codes_tokens_and_logits(
    method_oracle, oracles, export_once, with_engines, monkeypatch, lowering, backend
):
    bundle = of_oracle(export_once, oracles, method_oracle, lowering)
    if backend == "trt-rtx":  # a double of TensorRT and CUDA
        Machine().install(monkeypatch, "tensorrt_rtx")
        bundle = with_engines(bundle)
    elif backend == "ort-cuda":
        fake_onnxruntime.Machine().install(monkeypatch)

    says(method_oracle, oracles, Pipeline.load(bundle, backend))


@pytest.mark.parametrize("lowering", ["modern", "legacy"])
def test_the_bodies_give_the_released_codes_tokens_and_logits(method_oracle, oracles, eager_once, lowering):
    says(method_oracle, oracles, Pipeline.load(of_oracle(eager_once, oracles, method_oracle, lowering)))


def of_oracle(export: Any, oracles: Path, of: tuple[str, str], lowering: str) -> Path:
    """The bundle of a public case: its method and its name."""
    method, name = of
    case = json.loads((oracles / method / f"{name}.json").read_text())
    options = {"grid": GRIDS[case["num_crops"]]} if method == "proxyv" else {}
    bundle: Path = export(oracles / CHECKPOINTS[method], method=method, lowering=lowering, **options)
    return bundle


def says(of: tuple[str, str], oracles: Path, pipe: Pipeline) -> None:
    """Tokens, logits and lengths of caches are those of the released code."""
    method, name = of
    case = json.loads((oracles / method / f"{name}.json").read_text())
    tensors = load_file(oracles / method / f"{name}.safetensors")
    expected = case["expected_new_token_ids"]
    found = pipe.generate_tokens(
        case["prompt_token_ids"], tensors["pixel_values"], max_new_tokens=len(expected), ignore_eos=True
    )
    assert found.token_ids == expected
    assert np.abs(found.logits - tensors["step_logits"]).max() < 1e-3
    lengths = list(Layout(pipe.manifest.cache, pipe.manifest.dtype).lengths(found.prompt_tokens))
    assert lengths == case.get("cache_lengths_after_prefill", lengths)


PROXYV = {
    "gqa": ({"kv_heads": 2}, 3),
    "one crop": ({}, 1),
    "four crops": ({"kv_heads": 1}, 4),
    "more proxies than tokens of a crop": ({}, 5),  # 5 x 4 > 16: proxies see separators
    "start layer 0": ({"start_layer": 0}, 3),
    "start layer 0, one crop": ({"start_layer": 0}, 1),
    "last layer only": ({"start_layer": 3}, 3),
    "factor 4 on 8 x 8": ({"side": 8, "reduce_factor": 4}, 3),
    "odd factor": ({"side": 6, "reduce_factor": 3}, 5),
    "factor 1": ({"reduce_factor": 1}, 3),
    "learnt": ({"learn_proxy": True}, 1),
    "learnt, five crops, gqa": ({"learn_proxy": True, "kv_heads": 2}, 5),
    "learnt from layer 0": ({"learn_proxy": True, "start_layer": 0}, 3),
    "qwen2": ({"decoder": "qwen2", "kv_heads": 2}, 3),
    "phi3": ({"decoder": "phi3"}, 3),
}
PLACES = ((12, 5), (30, 1), (3, 2), (40, 35))  # text tokens, and how many come before the image


LEGACY = (
    "gqa",
    "more proxies than tokens of a crop",
    "start layer 0",
    "odd factor",
    "learnt, five crops, gqa",
    "qwen2",
)


def pairs(names: Iterable[str], legacy: Iterable[str]) -> list[tuple[str, str]]:
    """Cases with the modern lowering, and some with the legacy one."""
    return [(name, "modern") for name in names] + [(name, "legacy") for name in legacy]


@pytest.mark.parametrize(("name", "lowering"), pairs(PROXYV, LEGACY))
def test_proxyv_says_what_its_reference_says(original, exported, name, lowering):
    options, crops = PROXYV[name]
    checkpoint = original(method="proxyv", **options)
    bundle = exported(checkpoint, method="proxyv", grid=GRIDS[crops], lowering=lowering)

    side = options.get("side", 4)
    agree(bundle, checkpoint, [(originals.prompt(*at), originals.pixels(side, crops=crops)) for at in PLACES])


YOPO = {
    "uneven heads": {},
    "gqa, uneven within groups": {"kv_heads": 2, "head_mask": ["1111", "1111", "1000", "0111", "0101", "0011"]},
    "gqa, one head apart": {
        "kv_heads": 2,
        "head_mask": ["1110", "0111", "1100", "1000", "0100", "1101"],
        "cutoff": 6,
    },
    "gqa, whole groups": {"kv_heads": 2, "head_mask": ["1111", "1100", "0011", "0000", "1100", "1111"]},
    "no head kept": {"head_mask": ["0000"] * 6},
    "all heads kept, no cutoff": {"head_mask": ["1111"] * 6, "cutoff": 6},
    "uneven heads, no cutoff": {"cutoff": 6, "kv_heads": 1},
    "cutoff 1": {"cutoff": 1},
    "wide window": {"window": 7, "cutoff": 5},
    "window 1": {"window": 1, "cutoff": 4},
    "ratio 1.5": {"ffn_ratio": 1.5, "cutoff": 4},
    "qwen2": {"decoder": "qwen2", "kv_heads": 2, "cutoff": 4},
    "phi3": {"decoder": "phi3", "cutoff": 4},
}


YOPO_CASES = [(semantics, *case) for semantics in ("released", "dropped") for case in pairs(YOPO, list(YOPO)[:4])]


@pytest.mark.parametrize(("semantics", "name", "lowering"), YOPO_CASES)
def test_yopo_says_what_its_reference_says(original, exported, name, semantics, lowering):
    checkpoint = original(method="yopo", layers=6, **YOPO[name])
    bundle = exported(checkpoint, method="yopo", semantics=semantics, lowering=lowering)

    agree(bundle, checkpoint, [(originals.prompt(*at), originals.pixels()) for at in PLACES], semantics=semantics)


HIMIX = {
    "mha": ({}, 1),
    "gqa": ({"kv_heads": 2}, 1),
    "two images": ({"kv_heads": 1}, 2),
    "qwen2, which has biases": ({"decoder": "qwen2", "kv_heads": 2}, 1),
    "tied": ({"tied": True}, 3),
}


@pytest.mark.parametrize(("name", "lowering"), pairs(HIMIX, HIMIX))
def test_himix_says_what_its_reference_says(original, exported, name, lowering):
    options, images = HIMIX[name]
    checkpoint = original(method="himix", **options)
    bundle = exported(checkpoint, method="himix", num_images=images, lowering=lowering)

    cases = [(originals.prompt(*at, images=images), originals.pixels(crops=images)) for at in PLACES]
    agree(bundle, checkpoint, cases)


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_a_graph_per_layer_says_the_same(original, exported, method):
    checkpoint = original(method=method, layers=6)
    more = {"proxyv": {"grid": (1, 2)}, "yopo": {"semantics": "dropped"}, "himix": {}}[method]
    bundle = exported(checkpoint, method=method, max_graph_gb=1e-6, **more)

    crops = 3 if method == "proxyv" else 1
    changed = {"semantics": "dropped"} if method == "yopo" else {}
    agree(bundle, checkpoint, [(originals.prompt(12, 5), originals.pixels(crops=crops))], **changed)


def test_learnt_proxies_pass_from_graph_to_graph(original, exported):
    checkpoint = original(method="proxyv", learn_proxy=True)
    bundle = exported(checkpoint, method="proxyv", max_graph_gb=1e-6)

    agree(bundle, checkpoint, [(originals.prompt(12, 5), originals.pixels())])


@pytest.mark.parametrize("method", ["proxyv", "yopo", "himix"])
def test_a_prompt_without_its_picture_is_refused(method, original, eager_once):
    pipe = Pipeline.load(eager_once(original(method=method), method=method))

    with pytest.raises(InputError, match=r"pixel_values: is nothing, the bundle is planned for 1 image\(s\)"):
        pipe.generate_tokens([5, 6, 7], None)


@pytest.mark.parametrize("grid", [None, (1, 2)])
def test_a_checkpoint_of_proxyv_runs_without_it(original, exported, grid):
    checkpoint = original(method="proxyv")
    bundle = exported(checkpoint, method="none", grid=grid)

    crops = 1 if grid is None else 3
    agree(bundle, checkpoint, [(originals.prompt(*at), originals.pixels(crops=crops)) for at in PLACES])


def agree(bundle: Path, checkpoint: Path, cases: list[tuple[list[int], torch.Tensor]], **changed: Any) -> None:
    """Tokens equal and logits within 1e-4 of the reference, all prompts through one pipeline, the longest first too."""
    pipe, model = Pipeline.load(bundle), references.load(checkpoint)
    config = originals.method_config(checkpoint, **changed) if pipe.manifest.method != "none" else {}
    run = references.module(pipe.manifest.method).run
    for prompt, pixels in itertools.chain(cases, cases[:1]):
        expected = run(model, config, prompt, pixels, 6)

        found = pipe.generate_tokens(prompt, pixels.numpy(), max_new_tokens=6, ignore_eos=True)

        assert found.token_ids == expected.tokens
        np.testing.assert_allclose(found.logits, expected.logits.numpy(), atol=1e-4)


def test_himix_looks_at_an_image_once_for_several_prompts(original, exported):
    pipe = Pipeline.load(exported(original(method="himix"), method="himix"))
    pixels = originals.pixels().numpy()
    pipe.generate_tokens(originals.prompt(12, 5), pixels, max_new_tokens=4)
    ran = []
    pipe._decoder.memory._sessions = {  # type: ignore[assignment]
        name: dataclasses.make_dataclass("Counted", ["run"])(
            lambda rows=None, n=name, s=session: (ran.append(n), s.run(rows))
        )
        for name, session in pipe._decoder.memory._sessions.items()
    }

    again = pipe.generate_tokens(originals.prompt(20, 3, seed=1), pixels, max_new_tokens=4)
    seen = set(ran)
    other = pipe.generate_tokens(originals.prompt(20, 3, seed=1), -pixels, max_new_tokens=4)

    assert seen == {"prefill", "decode"}
    assert set(ran) == {"vision", "image_kv", "prefill", "decode"}
    fresh = Pipeline.load(pipe.bundle.folder)
    first = fresh.generate_tokens(originals.prompt(20, 3, seed=1), pixels, max_new_tokens=4)
    np.testing.assert_array_equal(again.logits, first.logits)
    assert np.abs(other.logits - first.logits).max() > 1e-3

"""Decoders in several graphs, and graphs that prompt and decode share: the same tokens, the promised sizes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from lvlm_edge.exporter import export
from lvlm_edge.exporter.commands.main import main
from lvlm_edge.exporter.devices import engine
from lvlm_edge.exporter.devices.engine import Settings
from lvlm_edge.exporter.planning import PlanError
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.backends.cuda import highest
from lvlm_edge.runtime.bundle import open_bundle
from lvlm_edge.runtime.errors import UnsupportedError
from tests import checkpoints
from tests.cases import some
from tests.fake_tensorrt import Machine
from tests.runtime.test_trt import with_engines

__all__ = ["with_engines"]
FASTV = {"method": "fastv", "prune_layer": 2, "keep_ratio": 0.5}
WAYS = {
    "small graphs": {"max_graph_gb": 1e-6},
    "small legacy graphs": {"max_graph_gb": 1e-6, "lowering": "legacy"},
    "shared weights": {"share_weights": True},
    "small graphs with shared weights": {"max_graph_gb": 1e-6, "share_weights": True},
}


FEW = ("small graphs", "small legacy graphs")  # what bodies can do; the other ways have shapes given at run time
OFTEN = {("fastv_1", "shared weights", "trt-rtx"), ("fastv_0", "shared weights", "ort")}
ORACLE_CASES = some(itertools.product(("fastv_0", "fastv_1", "fastv_2"), WAYS, ("ort", "trt-rtx")), OFTEN)


@pytest.mark.parametrize(("name", "way", "backend"), ORACLE_CASES)
def test_the_oracles_tokens_come_out(name, oracles, export_once, with_engines, monkeypatch, way, backend):
    case = json.loads((oracles / "fastv" / f"{name}.json").read_text())
    bundle = of_oracle(export_once, oracles, case, way, ort=backend == "ort")
    if backend != "ort":
        Machine().install(monkeypatch, "tensorrt_rtx")
        bundle = with_engines(bundle)

    says(case, oracles / "fastv" / f"{name}.safetensors", Pipeline.load(bundle, backend))


@pytest.mark.parametrize("way", FEW)
def test_the_oracles_tokens_come_out_of_the_bodies(fastv_oracle, oracles, eager_once, way):
    case = json.loads(fastv_oracle.read_text())
    bundle = of_oracle(eager_once, oracles, case, way)

    says(case, fastv_oracle.with_suffix(".safetensors"), Pipeline.load(bundle))


def of_oracle(export: Any, oracles: Path, case: dict[str, Any], way: str, **more: Any) -> Path:
    settings = {"prune_layer": case["prune_layer"], "keep_ratio": case["keep_ratio"]}
    bundle: Path = export(oracles / "llava_mha", method="fastv", **settings, **WAYS[way], **more)
    return bundle


def says(case: dict[str, Any], tensors: Path, pipe: Pipeline) -> None:
    """Tokens and logits are the case's."""
    stored = load_file(tensors)
    found = pipe.generate_tokens(case["prompt_token_ids"], stored["pixel_values"], ignore_eos=True, max_new_tokens=16)
    assert found.token_ids == case["expected_new_token_ids"]
    assert np.abs(found.logits - stored["step_logits"]).max() < 1e-3


@pytest.mark.parametrize("way", FEW)
@pytest.mark.parametrize("options", [{"method": "none"}, FASTV])
def test_bodies_of_small_graphs_say_the_same_of_short_and_long_prompts(gqa, eager_once, options, way):
    same(gqa, eager_once, options, way)


@pytest.mark.parametrize("way", some([(way,) for way in WAYS], {("shared weights",)}))
@pytest.mark.parametrize("options", [{"method": "none"}, FASTV])
def test_every_way_says_the_same_of_short_and_long_prompts(gqa, export_once, options, way):
    same(gqa, export_once, options, way)


def same(checkpoint: Path, export: Any, options: dict[str, Any], way: str) -> None:
    """A way of cutting a decoder up says what the whole decoder says."""
    whole, other = (Pipeline.load(export(checkpoint, **options, **more)) for more in ({}, WAYS[way]))
    for text, before in ((2, 1), (30, 5), (64, 40)):  # one pipeline each: nothing of the prompt before may stay
        prompt, pixels = checkpoints.prompt(text, before), checkpoints.pixels()
        expected, found = (pipe.generate_tokens(prompt, pixels, ignore_eos=True) for pipe in (whole, other))
        assert found.token_ids == expected.token_ids
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)


def test_a_graph_per_layer_holds_the_weights_of_that_layer(oracles, export_once):
    case = json.loads((oracles / "fastv" / "fastv_1.json").read_text())
    bundle = of_oracle(export_once, oracles, case, "small graphs", ort=False)

    manifest = open_bundle(bundle).manifest

    layers = len(manifest.cache)
    assert [g.name for g in manifest.graphs if g.role == "decode"] == [f"decode.{i}" for i in range(layers)]
    for i in range(layers):
        model = onnx.load(bundle / f"decode.{i}.onnx", load_external_data=False)
        read = {t.name.split(".")[1] for t in model.graph.initializer if t.name.startswith("layers.")}
        assert read == {str(i)}


def test_graphs_that_share_weights_are_one_file_each(gqa, export_once):
    manifest = open_bundle(export_once(gqa, **FASTV, share_weights=True)).manifest

    files = {g.name: g.file for g in manifest.graphs}
    assert files["decode.0"] == files["prefill_head"] and files["decode.1"] == files["prefill_tail"]
    assert "decode.onnx" not in manifest.files


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", [pytest.param("small graphs", marks=pytest.mark.slow), "shared weights"])
def test_tensorrt_rtx_builds_them(oracles, export_once, way, dtype):
    bundle = export_once(oracles / "llava_mha", **FASTV, **WAYS[way], dtype=dtype, ort=False)

    out = engine.build(bundle, Settings(backend="trt-rtx", compute_capabilities=("8.6", "12.0")))

    found = json.loads((out / "engines.json").read_text())["engines"]
    assert set(found) == {g.file for g in open_bundle(bundle).manifest.graphs} | {highest.FILE}


def test_shared_engines_hold_one_copy_of_the_decoder(checkpoint_once, export_once):
    """Plans of one SM on 14 MB of decoder weights; a second copy would add those 14 MB."""
    text = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 8}
    checkpoint = checkpoint_once(text=text | {"num_key_value_heads": 8})
    settings, sizes = Settings(backend="trt-rtx", compute_capabilities=("8.6",)), {}
    for share in (False, True):
        bundle = export_once(checkpoint, method="none", dtype="float16", share_weights=share, ort=False)
        out = engine.build(bundle, settings)
        found = json.loads((out / "engines.json").read_text())["engines"]
        sizes[share] = sum(entry["size"] for file, entry in found.items() if file != "vision.onnx")

    decoder = 2 * (2 * 512 * (4 * 512 + 3 * 1536) + 512 * 512)
    assert sizes[False] > 2 * decoder
    assert sizes[True] < sizes[False] - 0.5 * decoder  # a wide profile costs some MB of code of its own


def test_what_cannot_be_is_refused(gqa, tmp_path):
    with pytest.raises(UnsupportedError, match="legacy lowering cannot share weights"):
        export(gqa, tmp_path / "bundle", share_weights=True, lowering="legacy")
    with pytest.raises(PlanError, match="max_graph_gb is 0, expected more than 0"):
        export(gqa, tmp_path / "bundle", max_graph_gb=0)
    said = CliRunner().invoke(main, ["export", str(gqa), "-o", str(tmp_path / "bundle"), "--max-graph-gb", "-1"])

    assert said.exit_code == 2
    assert not (tmp_path / "bundle").exists()

"""TinyLLaVA's layout: with a projector like any other model, and HiMix's without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import export, families, methods, plan, planning
from lvlm_edge.exporter.bundles import plans
from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError
from lvlm_edge.exporter.families import tinyllava
from lvlm_edge.exporter.graphs import parts
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.errors import UnsupportedError
from tests import checkpoints, layouts, tiny
from tests.cases import both


def build(folder: Path, *, decoder: str = "llama", tower: str = "siglip", **fields) -> layouts.Stock:
    """A small random checkpoint in one file, with a projector. Its first SigLIP token is dropped."""
    stock = layouts.build(folder / "other", decoder=decoder, tower=tower)
    stock.siglip = False
    tensors = {f"language_model.{k}": v.contiguous().clone() for k, v in stock.decoder.state_dict().items()}
    seen = {k if k.startswith("vision_model.") else f"vision_model.{k}": v for k, v in stock.tower.state_dict().items()}
    tensors |= {f"vision_tower._vision_tower.{k}": v.contiguous() for k, v in seen.items()}
    tensors |= {f"connector._connector.{k}": v for k, v in stock.projector.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "tinyllava",
        "text_config": stock.decoder.config.to_dict(),
        "vision_config": stock.tower.config.to_dict(),
        "connector_type": "mlp2x_gelu",
        "vision_feature_select_strategy": "patch",
        **fields,
    }
    tiny.write_json(folder / "config.json", config)
    return stock


KINDS = [(tower, decoder) for tower in ("siglip", "clip") for decoder in ("llama", "qwen2", "mistral")]


@pytest.mark.parametrize(("tower", "decoder", "exported"), both(KINDS, {("siglip", "qwen2")}), indirect=["exported"])
@pytest.mark.claims("equal", family="tinyllava", method="none")
def test_a_bundle_equals_stock_modules_for(decoder, tower, tmp_path, exported):
    stock = build(tmp_path, decoder=decoder, tower=tower)
    ids, pixels = layouts.prompt(), checkpoints.pixels()
    tokens, logits = stock.generate(ids, pixels, 6)

    bundle = exported(tmp_path, max_text_tokens=24, max_new_tokens=8)
    found = Pipeline.load(bundle).generate_tokens(ids, pixels, max_new_tokens=6, ignore_eos=True)

    assert found.prompt_tokens == len(ids) - 1 + (15 if tower == "siglip" else 16)
    assert found.token_ids == tokens
    assert np.abs(found.logits - logits).max() < 1e-4


def test_the_spec_of_himix_has_no_projector_and_drops_siglips_first_token(oracles):
    found = families.read(Checkpoint.open(oracles / "himix_mha"))

    v = found.vision.encoder
    assert (found.vision.projector_act, found.image_token_id) == (None, -200)
    assert (found.settings, found.features) == ({"himix": {}}, 48)
    assert (v.kind, v.drop_first, v.tokens) == ("siglip", True, 63)
    assert (v.hidden, v.feature_layers) == (48, (2,))


@pytest.mark.parametrize("method", ["none", "fastv"])
def test_other_methods_than_its_own_are_refused_for_himix(method, oracles, tmp_path):
    folder = oracles / "himix_mha"
    for command in (["plan", folder], ["export", folder, "-o", tmp_path / "out", "-q"]):
        message = tiny.refused(3, *command, "--method", method)
        assert f"{method}: this checkpoint has no projector" in message
        assert "use --method himix" in message
    assert not (tmp_path / "out").exists()


@pytest.fixture
def without_projector(oracles) -> planning.Plan:
    """HiMix's checkpoint as a method of its own would plan it, but for the stages."""
    options = {"max_text_tokens": 24, "max_new_tokens": 8}
    found = plans.plan_of(Checkpoint.open(oracles / "himix_mha"), method="himix", options=options)
    none = methods.load("none")
    stages = none.stages(found.spec, None, found.prompt)
    return replace(found, method=none, config=none.config(), stages=stages)


def test_a_model_without_projector_sees_features_alone(without_projector):
    built, mode = parts.fake(without_projector)
    (wanted,) = without_projector.family.graphs(without_projector)
    pixels = wanted.inputs[0].shape

    with mode:
        made = wanted.body(built, without_projector, {"pixel_values": torch.empty(pixels)})

    assert [(t.name, t.shape) for t in wanted.outputs] == [("image_features", (1, 63, 48))]
    assert {name: tuple(t.shape) for name, t in made.items()} == {"image_features": (1, 63, 48)}


def test_a_model_without_projector_has_no_weights_and_no_work_for_one(without_projector):
    assert planning.vision_weights(without_projector)[1] == 0
    assert planning.projector_flops(without_projector) == 0


def test_every_tensor_of_himix_is_known(without_projector, oracles):
    folder = oracles / "himix_mha"
    built, _ = parts.fake(without_projector)
    wanted = {n: w.shape[::-1] if w.transposed else w.shape for n, w in parts.weights(built).items()}
    wanted = {n: shape for n, shape in wanted.items() if n not in parts.ROPE} | {"embed.weight": (512, 128)}

    sources = tinyllava.weights(Checkpoint.open(folder), without_projector.spec, without_projector.pictures)
    found = checkpoint.match(sources, wanted, tinyllava.unused, folder)

    assert set(found) == set(wanted)
    for part in ("k_proj_img", "v_proj_img"):
        assert tinyllava.rename(f"language_model.model.layers.3.self_attn.{part}.bias") == f"layers.3.{part}.bias"
    norm = tinyllava.rename("language_model.model.layers.3.input_layernorm_img.weight")
    assert norm == "layers.3.input_layernorm_img.weight"
    assert load_file(folder / "model.safetensors")["language_model.model.layers.3.input_layernorm_img.weight"].ndim == 1


@pytest.mark.parametrize(
    ("code", "fields", "said"),
    [
        (3, {"connector_type": "resampler"}, "connector_type is 'resampler'"),
        (3, {"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy is 'cls'"),
        (3, {"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        (3, {"text_config": {"model_type": "phi"}}, "text_config.model_type is 'phi'"),
        (3, {"vision_config": {"model_type": "dinov2"}}, "vision_config.model_type is 'dinov2'"),
        (1, {"text_config": {"model_type": "llama", "vision_hidden_size": 5}}, "vision_hidden_size is 5"),
        (1, {"vision_feature_layer": 7}, "vision_feature_layer is 7"),
        (1, {"text_config": []}, "text_config is list"),
        (1, {"image_token_index": "x"}, "image_token_index is 'x'"),
        (1, {"image_token_index": -1}, "image_token_index is -1"),
    ],
    ids=json.dumps,
)
def test_a_config_that_cannot_be_is_refused(code, fields, said, tmp_path):
    build(tmp_path)
    tiny.change_json(tmp_path / "config.json", **fields)

    assert said in tiny.refused(code, "export", tmp_path, "-o", tmp_path / "out", "-q")
    assert not (tmp_path / "out").exists()


def test_a_class_token_is_kept_where_the_config_says_so(tmp_path):
    build(tmp_path, tower="clip", vision_feature_select_strategy="cls_patch")

    assert plan(tmp_path)["visual_tokens"] == 17


def test_tensors_that_the_config_does_not_speak_of_are_refused(tmp_path):
    build(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"connector._connector.4.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match="does not speak of"):
        export(tmp_path, tmp_path / "out", max_text_tokens=24, max_new_tokens=8)


def test_himix_is_told_by_the_decoders_part_alone(tmp_path):
    build(tmp_path, vision_hidden_size=32)  # every TinyLLaVA config has this one

    assert families.read(Checkpoint.open(tmp_path)).settings == {}
    tiny.change_json(tmp_path / "config.json", connector_type=None)
    with pytest.raises(UnsupportedError, match="connector_type is None"):
        families.read(Checkpoint.open(tmp_path))

"""InternVL's original layout: outputs of the release's own code, and the hub's layout of the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import plan
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.families import internvl_chat
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.errors import UnsupportedError
from tests import families, internvls, qwen
from tests.cases import both

FAMILY = "internvl_chat"
CONFIG: dict[str, Any] = {  # InternVL2-8B
    "model_type": "internvl_chat", "downsample_ratio": 0.5, "force_image_size": 448, "select_layer": -1,
    "ps_version": "v2", "template": "internlm2-chat", "dynamic_image_size": True, "min_dynamic_patch": 1,
    "max_dynamic_patch": 12, "use_thumbnail": True,
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 448, "patch_size": 14, "qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm",
    },
    "llm_config": {
        "architectures": ["InternLM2ForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 92553,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32768, "bias": False,
        "rope_scaling": {"type": "dynamic", "factor": 2.0}, "hidden_act": "silu",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "exported"), both([("none_1",), ("none_2",), ("fastv_1",)], {("fastv_1",)}), indirect=["exported"]
)
@pytest.mark.claims("equal", family=FAMILY)
def test_the_answers_are_those_of_the_release(oracles, exported, name):
    of = families.case(oracles, FAMILY, name)
    pipe = Pipeline.load(families.bundle(exported, of))

    families.agrees(pipe, of)

    end = pipe.manifest.eos_token_ids
    assert 420 in end  # <|im_end|>, which closes an answer


@pytest.mark.parametrize("name", ["none_1", "none_2"])
def test_the_reference_expands_prompts_like_the_release(oracles, name):
    families.expands(families.case(oracles, FAMILY, name))


def original(folder: Path, native: Path, **changed: Any) -> Path:
    """The weights of a checkpoint in the hub's layout under the names of the release, q, k and v in one tensor."""
    folder.mkdir()
    config = json.loads((native / "config.json").read_text("utf-8"))
    seen, spoken = config["vision_config"], config["text_config"]
    kind = {"qwen2": "Qwen2ForCausalLM", "llama": "InternLM2ForCausalLM", "phi3": "Phi3ForCausalLM"}
    made = {
        "model_type": "internvl_chat", "ps_version": "v2", "template": "internvl2_5", "force_image_size": 56,
        "dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 12,
        "vision_config": {
            **{k: seen[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
            "image_size": 56, "patch_size": 7, "qkv_bias": seen["attention_bias"],
            "qk_normalization": seen["use_qk_norm"], "norm_type": seen["norm_type"],
        },
        "llm_config": {**spoken, "architectures": [kind[spoken["model_type"]]], "bias": False},
    } | changed  # fmt: skip
    (folder / "config.json").write_text(json.dumps(made), "utf-8")
    state = {k.removeprefix("model."): v for k, v in load_file(native / "model.safetensors").items()}
    save_file(_renamed(state, made["llm_config"]), folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(native / name, folder / name)
    return folder


VISION = {
    "embeddings.cls_token": "embeddings.class_embedding", "embeddings.position_embeddings":
    "embeddings.position_embedding", "patch_embeddings.projection": "patch_embedding", "encoder.layer.":
    "encoder.layers.", "layernorm_before": "norm1", "layernorm_after": "norm2", "lambda_": "ls",
    "attention.projection_layer": "attn.proj", "attention.": "attn.",
}  # fmt: skip
INTERNLM2 = {
    "embed_tokens": "tok_embeddings", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip


def _renamed(state: dict[str, torch.Tensor], llm: dict[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    heads, keys = llm["num_attention_heads"], llm["num_key_value_heads"]
    lm2 = llm["architectures"] == ["InternLM2ForCausalLM"]
    for key, value in state.items():
        if key.startswith("vision_tower."):
            name = key.replace("vision_tower.", "vision_model.")
            for old, new in VISION.items():
                name = name.replace(old, new)
        elif key.startswith("multi_modal_projector."):
            part, kind = key.split(".")[1:]
            name = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}[part] + "." + kind
        elif key.endswith("lm_head.weight"):
            name = "language_model.output.weight" if lm2 else "language_model.lm_head.weight"
        else:
            name = "language_model.model." + key.removeprefix("language_model.").removeprefix("model.")
            for old, new in INTERNLM2.items() if lm2 else ():
                name = name.replace(old, new)
        found[name] = value
    for name in [n for n in found if ".q_proj." in n]:
        if "vision_model" in name or lm2:
            q, k, v = (found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv")
            if "vision_model" in name:
                found[name.replace("q_proj", "qkv")] = torch.cat([q, k, v])
            else:
                d = len(q) // heads
                q, k, v = (x.view(keys, -1, d, *x.shape[1:]) for x in (q, k, v))
                fused = torch.cat([q, k, v], 1).reshape(-1, *q.shape[3:])
                found[name.replace("self_attn.q_proj", "attention.wqkv")] = fused
    return found


@pytest.mark.parametrize("decoder", ["qwen2", "llama"])
def test_a_checkpoint_of_the_hub_says_the_same_under_the_names_of_the_release(oracles, eager_once, tmp_path, decoder):
    source = families.case(oracles, "internvl", "none_1").checkpoint
    native = internvls.build(tmp_path / "native", source, decoder=decoder)
    settings = {"image_size": (90, 60), "max_text_tokens": 96, "max_new_tokens": 8}
    one = Pipeline.load(eager_once(native, **settings))
    other = Pipeline.load(eager_once(original(tmp_path / "original", native), **settings))
    ids, pixels = one.prepare("What is it?", [families.noise((90, 60))])

    found, same = (pipe.generate_tokens(ids, np.asarray(pixels), ignore_eos=True) for pipe in (one, other))

    assert found.token_ids == same.token_ids
    assert np.abs(found.logits - same.logits).max() <= 1e-6


@pytest.fixture
def changed(oracles: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the stored checkpoint whose config is changed."""

    def make(**config: Any) -> Path:
        folder = shutil.copytree(families.case(oracles, FAMILY, "none_1").checkpoint, tmp_path / "m")
        given = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(given | config), "utf-8")
        return folder

    return make


@pytest.mark.parametrize(
    "config", [{"ps_version": "v1"}, {"use_thumbnail": False}, {"dynamic_image_size": False}, {"select_layer": -2}]
)
def test_check_passes_on_other_ways_of_seeing_pictures(changed, eager_once, config):
    from lvlm_edge.exporter.proof import parity

    folder = changed(**config)
    made = eager_once(folder, image_size=(150, 60), max_text_tokens=96, max_new_tokens=4)

    assert parity.check(made, folder, steps=4, store=False).passed


def test_ways_of_seeing_pictures_differ(changed):
    views = {}
    for name, config in (("tiles", {"use_thumbnail": False}), ("whole", {"dynamic_image_size": False}), ("both", {})):
        folder = changed(**config)
        views[name] = families.planned(folder, (150, 60)).views.count
        shutil.rmtree(folder)

    assert views == {"tiles": 3, "whole": 1, "both": 4}


@pytest.mark.parametrize(
    ("template", "begins", "ends"),
    [
        ("Hermes-2", "<|im_start|>system\n" + internvl_chat.INTERNVL2 + "<|im_end|><|im_start|>user\n", "<|im_end|>"),
        ("internvl2_5", "<|im_start|>system\n" + internvl_chat.INTERNVL2_5 + "<|im_end|>\n<|im_start|>user\n", "\n"),
        ("phi3-chat", "<|system|>\n" + internvl_chat.INTERNVL2 + "<|end|><|user|>\n", "<|end|>"),
    ],
)
def test_conversation_formats_are_those_of_the_releases(template, begins, ends, changed):
    import jinja2

    source = internvl_chat.chat_template(families.Checkpoint.open(changed(template=template)))
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": "A"},
    ]

    found = jinja2.Template(source).render(messages=turns)

    assert found.startswith(begins + "<IMG_CONTEXT>\nQ")
    assert found.endswith(ends)


def test_a_system_message_of_the_config_takes_the_place_of_the_templates(changed, eager_once):
    plain = Pipeline.load(eager_once(changed(system_message="Be brief."), image_size=(60, 60)))

    asked = plain.encode(families.CONVERSATIONS["text only"])

    assert asked == plain.encode([qwen.turn("Be brief.", role="system"), *families.CONVERSATIONS["text only"]])


def test_the_plan_counts_an_8b_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), "utf-8")

    found = families.counts(tmp_path, (640, 480))

    assert (found["tokens"], found["frame"]) == (13 * 256, 2)
    vision, projector = 304_012_288, 4096 * 2 + 4096 * 4096 + 4096 + 4096 * 4096 + 4096
    decoder = 32 * (4096 * (4096 * 2 + 1024 * 2 + 14336 * 3) + 2 * 4096) + 4096 + 2 * 92553 * 4096
    assert found["parameters"] == vision + projector + decoder


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"ps_version": "v3"}, UnsupportedError, "ps_version is 'v3'"),
        ({"pad2square": True}, UnsupportedError, "pad2square is True"),
        ({"force_image_size": 64}, UnsupportedError, "force_image_size is 64"),
        ({"llm_config": {"architectures": ["GemmaForCausalLM"]}}, UnsupportedError, "architectures is 'GemmaFor"),
        ({"max_dynamic_patch": 0}, CheckpointError, "max_patches is 0"),
        ({"select_layer": 9}, CheckpointError, "select_layer is 9"),
    ],
)
def test_what_the_graphs_do_not_have_is_refused(config, error, message, changed):
    folder = changed(**config)
    with pytest.raises(error, match=message):
        plan(folder, image_size=(60, 60))


def test_a_conversation_format_that_is_not_known_is_refused(changed):
    with pytest.raises(UnsupportedError, match="template is 'vicuna_v1_1'"):
        internvl_chat.chat_template(families.Checkpoint.open(changed(template="vicuna_v1_1")))


def test_rows_that_do_not_fit_the_config_are_refused(changed, tmp_path):
    from lvlm_edge.exporter import export

    folder = changed()
    weights = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.0.attention.wqkv.weight"
    save_file(weights | {name: weights[name][:-1].clone()}, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(CheckpointError, match=r"wqkv.weight is \[127, 64\], config.json says 128 rows"):
        export(folder, tmp_path / "out", image_size=(60, 60))


def test_phi3_has_its_long_rotary_tables_up_to_the_length_that_they_begin_from(tmp_path):
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    from lvlm_edge.exporter import families as known
    from lvlm_edge.exporter.graphs.parts import rope_tables

    short, long = [1.0 + 0.1 * i for i in range(48)], [2.0] * 48
    llm = {
        "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32020, "sliding_window": 262144,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
    }  # fmt: skip
    scaling = {"type": "su", "short_factor": short, "long_factor": long}
    config = CONFIG | {"llm_config": llm | {"rope_scaling": scaling}, "template": "phi3-chat"}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")

    spec = known.read(families.Checkpoint.open(tmp_path))

    assert spec.decoder.max_positions == 4096
    stock = Phi3Config(
        **{k: v for k, v in llm.items() if k != "architectures"}, rope_scaling=scaling | {"type": "longrope"}
    )
    cos, sin = Phi3RotaryEmbedding(stock)(torch.zeros(1), torch.arange(64)[None])
    found = rope_tables(spec.decoder, 64)
    assert torch.allclose(found[0], cos[0, :, :48])
    assert torch.allclose(found[1], sin[0, :, :48])
    assert float(found[0][0, 0]) == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)

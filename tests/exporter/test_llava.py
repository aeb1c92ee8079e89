"""The llava family: every layout and every variant of a checkpoint gives what stock transformers gives."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import export, families
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.families import llava
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.errors import UnsupportedError
from tests import checkpoints
from tests.cases import both

SMALL = {"num_hidden_layers": 2}
WIDE = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

VARIANTS = {
    "SigLIP, first token dropped": {"tower": "siglip"},
    "SigLIP, all tokens": {"tower": "siglip", "vision_feature_select_strategy": "full"},
    "CLIP with the class token": {"vision_feature_select_strategy": "full"},
    "last tower layer": {"vision_feature_layer": -1},
    "tower layer counted from the front": {"vision_feature_layer": 1},
    "several tower layers": {"vision_feature_layer": [-3, -1, 1]},
    "wrong image_seq_length in the config": {"image_seq_length": 577},
    "tied embeddings": {"text": {"tie_word_embeddings": True}},
    "tied embeddings, said by the whole config": {"tie_word_embeddings": True},
    "Qwen2 decoder": {"decoder": "qwen2"},
    "Mistral decoder": {"decoder": "mistral", "text": {"num_key_value_heads": 2, "sliding_window": None}},
    "Mistral decoder with a window wider than the prompt": {"decoder": "mistral", "text": {"sliding_window": 512}},
    "head size that is not hidden over heads": {"text": WIDE},
    "llama3 rotary scaling": {"text": {"rope_parameters": LLAMA3}},
    "linear rotary scaling": {
        "text": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
    },
    "yarn rotary scaling": {"text": {"rope_parameters": YARN}},
    "biases everywhere": {"text": {"attention_bias": True, "mlp_bias": True}},
    "projector without bias, other activations": {
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu_pytorch_tanh",
        "vision": {"hidden_act": "gelu"},
        "text": {"hidden_act": "gelu_pytorch_tanh"},
    },
}


def agree(folder: Path, bundle: Path, steps: int = 4) -> None:
    """A float32 bundle says what stock `generate` says; 1e-4 is rounding (seen: 5e-6)."""
    size = checkpoints.stock(folder).config.vision_config.image_size
    ids, picture = checkpoints.prompt(20, 5), checkpoints.pixels(size)
    tokens, logits = checkpoints.generate(folder, ids, picture, steps)
    found = Pipeline.load(bundle).generate_tokens(ids, picture, max_new_tokens=steps, ignore_eos=True)
    assert found.token_ids == tokens
    assert np.abs(found.logits - logits).max() < 1e-4


TRACED = {("SigLIP, all tokens",)}


@pytest.mark.parametrize(("variant", "exported"), both([(name,) for name in VARIANTS], TRACED), indirect=["exported"])
def test_a_bundle_equals_stock_generate_for(variant, checkpoint_once, exported):
    arguments = VARIANTS[variant]
    folder = checkpoint_once(**arguments | {"text": SMALL | arguments.get("text", {})})

    bundle = exported(folder, method="none", max_text_tokens=32, max_new_tokens=8)

    agree(folder, bundle)


# The same tensors in other files and under other names.


@pytest.fixture(scope="module")
def plain(checkpoint_once):
    return checkpoint_once(text=SMALL)


@pytest.fixture(scope="module")
def plain_weights(plain, export_once):
    """The weights file of the checkpoint as transformers writes it, proved right by `agree`."""
    bundle = export_once(plain, method="none", max_text_tokens=32, max_new_tokens=8)
    agree(plain, bundle)
    return (bundle / "weights.bin").read_bytes()


def rewritten(plain: Path, folder: Path, rename) -> Path:
    """The checkpoint with its tensors under other names, in one file."""
    folder.mkdir()
    shutil.copyfile(plain / "config.json", folder / "config.json")
    tensors = {rename(_new_name(key)): value for key, value in load_file(plain / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def _new_name(key: str) -> str:
    """Whatever transformers wrote, as `LlavaForConditionalGeneration.state_dict` names it."""
    key = key.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")
    return f"model.{key}" if key.startswith(("vision_tower", "multi_modal_projector")) else key


def _old_name(key: str) -> str:
    if key.startswith("lm_head"):
        return f"language_model.{key}"
    key = key.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
    key = key.replace("vision_model.vision_model", "vision_model")
    return key.replace("language_model.", "language_model.model.")


def _as_new(plain: Path, folder: Path) -> Path:
    return rewritten(plain, folder, lambda key: key)


def _as_old(plain: Path, folder: Path) -> Path:
    return rewritten(plain, folder, _old_name)


def _with_leftovers(plain: Path, folder: Path) -> Path:
    """Buffers that older versions of transformers stored beside the weights."""
    rewritten(plain, folder, _old_name)
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)
    save_file(tensors, folder / "model.safetensors")
    return folder


def _as_shards(plain: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copyfile(plain / "config.json", folder / "config.json")
    _shards(load_file(plain / "model.safetensors"), folder, "model", "safetensors", save_file)
    return folder


def _as_bin(plain: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copyfile(plain / "config.json", folder / "config.json")
    torch.save(load_file(plain / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def _as_bin_shards(plain: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copyfile(plain / "config.json", folder / "config.json")
    _shards(load_file(plain / "model.safetensors"), folder, "pytorch_model", "bin", torch.save)
    return folder


def _shards(tensors, folder: Path, stem: str, suffix: str, save) -> None:
    names = sorted(tensors)
    parts = [names[i::3] for i in range(3)]
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"{stem}-{i:05}-of-00003.{suffix}"
        save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LAYOUTS = {
    "new names": _as_new,
    "old names": _as_old,
    "old names and left-over buffers": _with_leftovers,
    "sharded safetensors": _as_shards,
    "one pickled file": _as_bin,
    "sharded pickled files": _as_bin_shards,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_weights_come_out_of(layout, plain, plain_weights, tmp_path):
    folder = LAYOUTS[layout](plain, tmp_path / "checkpoint")

    bundle = export(folder, tmp_path / "bundle", max_text_tokens=32, max_new_tokens=8)

    assert (bundle / "weights.bin").read_bytes() == plain_weights


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_never_run(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = _as_bin(plain, tmp_path / "checkpoint")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(tensors | {"extra": Bomb()}, folder / "pytorch_model.bin", pickle_module=pickle)

    with pytest.raises(CheckpointError, match=r"cannot be loaded safely.*convert it to safetensors"):
        export(folder, tmp_path / "bundle")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_the_bundle_of_a_tied_checkpoint_holds_the_table_once(checkpoint_once, eager_once):
    untied, tied = (checkpoint_once(text=SMALL | {"tie_word_embeddings": tie}) for tie in (False, True))
    options = {"method": "none", "max_text_tokens": 32, "max_new_tokens": 8}

    larger, smaller = ((eager_once(folder, **options) / "weights.bin").stat().st_size for folder in (untied, tied))

    assert abs(larger - smaller - (checkpoints.IMAGE + 1) * 64 * 4) < 64  # the table, and an alignment


def test_a_half_precision_checkpoint_is_widened_exactly(plain, tmp_path, export_once):
    folder = tmp_path / "checkpoint"
    shutil.copytree(plain, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({key: value.bfloat16() for key, value in tensors.items()}, folder / "model.safetensors")

    bundle = export(folder, tmp_path / "bundle", max_text_tokens=32, max_new_tokens=8)

    agree(folder, bundle)


HUB = {  # config.json of llava-hf/llava-1.5-7b-hf: what it says, and what it leaves to defaults
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_seq_length": 576,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def read(tmp_path: Path, config: dict) -> ModelSpec:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return families.read(Checkpoint.open(tmp_path))


def test_a_sparse_hub_config_has_the_dimensions_of_llava_1_5_7b(tmp_path):
    found = read(tmp_path, HUB)

    d, v = found.decoder, found.vision.encoder
    assert (d.layers, d.hidden, d.heads, d.kv_heads, d.head_dim, d.ffn, d.vocab) == (
        32,
        4096,
        32,
        32,
        128,
        11008,
        32064,
    )
    assert (d.eps, d.max_positions, d.tied, d.window) == (1e-5, 4096, False, None)
    assert (v.kind, v.layers, v.hidden, v.heads, v.ffn, v.feature_layers) == ("clip", 24, 1024, 16, 4096, (23,))
    assert (v.mlp_act, v.drop_first, v.tokens) == ("quick_gelu", True, 576)
    assert (found.vision.projector_act, found.vision.projector_bias) == ("gelu", True)
    assert found.image_token_id == 32000


def test_a_config_without_a_vision_part_means_clip_large_at_336(tmp_path):
    v = read(tmp_path, {key: value for key, value in HUB.items() if key != "vision_config"}).vision.encoder

    assert (v.hidden, v.layers, v.tokens) == (1024, 24, 576)


@pytest.mark.parametrize(
    ("part", "kind", "nearest"),
    [("text_config", "llamma", "did you mean llama"), ("vision_config", "siglip_visoin_model", "did you mean siglip")],
)
def test_an_unknown_part_is_refused_with_the_nearest_known_one(part, kind, nearest, tmp_path):
    with pytest.raises(UnsupportedError, match=rf"{part}.model_type is '{kind}'.*{nearest}"):
        read(tmp_path, HUB | {part: {"model_type": kind}})


def test_rotary_scaling_that_changes_with_the_prompt_is_refused(tmp_path):
    scaled = HUB["text_config"] | {"rope_scaling": {"type": "proportional", "factor": 2.0}}

    with pytest.raises(UnsupportedError, match="rope_type is 'proportional'"):
        read(tmp_path, HUB | {"text_config": scaled})


def test_a_feature_layer_that_the_tower_does_not_have_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="vision_feature_layer is 25, but the encoder has 24 layers"):
        read(tmp_path, HUB | {"vision_feature_layer": 25})


def test_a_bundle_without_tokenizer_takes_tokens_and_says_so_when_asked_in_words(mha, export_once):
    from PIL import Image

    pipe = Pipeline.load(export_once(mha, method="none"))

    found = pipe.generate_tokens(checkpoints.prompt(5, 2), checkpoints.pixels(), max_new_tokens=1)
    with pytest.raises(UnsupportedError, match=r"has no tokenizer.*tokenizer\.json.*generate_tokens"):
        list(pipe.stream("What is this?", [Image.new("RGB", (60, 60))]))

    assert len(found.token_ids) == 1


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"text_config": {"model_type": "llama", "num_attention_heads": 16}},
        {"text_config": {"model_type": "mistral", "rope_theta": 1e6}},
        {"text_config": {"model_type": "qwen2", "use_sliding_window": True}},
        {"text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}, "tie_word_embeddings": True},
        {"vision_config": {"model_type": "siglip_vision_model"}, "vision_feature_select_strategy": "full"},
        {"vision_config": {"model_type": "clip_vision_model"}, "vision_feature_layer": [-2, -1]},
    ],
)
def test_fields_left_out_take_transformers_defaults(config, tmp_path):
    from transformers import LlavaConfig

    config = {"model_type": "llava", **config}

    found, expected = llava.read(Checkpoint(tmp_path, config)), LlavaConfig.from_dict(config)

    text, vision = expected.text_config, expected.vision_config
    d, v = found.decoder, found.vision.encoder
    assert (d.layers, d.hidden, d.heads) == (text.num_hidden_layers, text.hidden_size, text.num_attention_heads)
    assert (d.kv_heads, d.ffn, d.vocab) == (text.num_key_value_heads, text.intermediate_size, text.vocab_size)
    assert d.head_dim == (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    assert (d.eps, d.mlp_act, d.max_positions) == (text.rms_norm_eps, text.hidden_act, text.max_position_embeddings)
    assert (d.tied, d.window) == (expected.tie_word_embeddings, getattr(text, "sliding_window", None))
    assert d.rope["rope_parameters"] == {k: v for k, v in text.rope_parameters.items() if k != "type"}
    assert (v.layers, v.hidden, v.heads) == (
        vision.num_hidden_layers,
        vision.hidden_size,
        vision.num_attention_heads,
    )
    assert (v.ffn, v.image_size, v.patch_size) == (vision.intermediate_size, vision.image_size, vision.patch_size)
    assert (v.eps, v.mlp_act, v.channels) == (vision.layer_norm_eps, vision.hidden_act, vision.num_channels)
    assert found.image_token_id == expected.image_token_id
    assert found.vision.projector_act == expected.projector_hidden_act

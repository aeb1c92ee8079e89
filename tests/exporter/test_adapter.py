"""Adapters of peft's plain layout, merged at export: against the formula, written out, on stock models."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import references
from lvlm_edge.exporter.checkpoints import adapter, checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.families import llava, llava_llama
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.errors import UnsupportedError
from tests import checkpoints, eager, layouts, tiny

# As peft 0.21 writes it, less the fields that are null.
CONFIG: dict[str, Any] = {
    "alpha_pattern": {}, "base_model_name_or_path": "base", "bias": "none", "fan_in_fan_out": False,
    "init_lora_weights": True, "loftq_config": {}, "lora_alpha": 12, "lora_bias": False, "lora_dropout": 0.0,
    "peft_type": "LORA", "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "target_modules": ["q_proj"],
    "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip
HUB = (  # as transformers names modules now, and as it did
    "model.language_model.layers.0.self_attn.q_proj",
    "language_model.model.layers.1.mlp.down_proj",
    "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1",
    "model.multi_modal_projector.linear_2",
    "lm_head",
)
STORED = (
    "language_model.model.layers.0.self_attn.q_proj",
    "language_model.model.layers.1.mlp.down_proj",
    "vision_tower.encoder.layers.0.mlp.fc1",
    "multi_modal_projector.linear_2",
    "language_model.lm_head",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    small = {"text": {"num_hidden_layers": 2}, "vision": {"num_hidden_layers": 2}}
    return checkpoints.build(tmp_path_factory.mktemp("base"), **small)


def written(folder: Path, shapes: dict[str, tuple[int, ...]], rank: int = 4, **config: Any) -> dict[str, torch.Tensor]:
    """Save an adapter; its tensors."""
    folder.mkdir()
    tiny.write_json(folder / "adapter_config.json", CONFIG | {"r": rank} | config)
    torch.manual_seed(1)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns) * 0.3
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return tensors


def of_hub(base: Path, folder: Path, scale: float, **config: Any) -> Path:
    """An adapter for a hub checkpoint; the checkpoint with W + s B A written out."""
    tensors = load_file(base / "model.safetensors")
    shapes = {new: tuple(tensors[f"{old}.weight"].shape) for new, old in zip(HUB, STORED, strict=True)}
    pairs = written(folder / "adapter", shapes, **config)
    for new, old in zip(HUB, STORED, strict=True):
        low, high = (pairs[f"base_model.model.{new}.lora_{part}.weight"] for part in "AB")
        tensors[f"{old}.weight"] = tensors[f"{old}.weight"] + scale * (high @ low)
    shutil.copytree(base, folder / "merged", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, folder / "merged" / "model.safetensors", {"format": "pt"})
    return folder / "merged"


@pytest.mark.parametrize(
    ("rank", "config", "scale"),
    [(4, {}, 3.0), (4, {"use_rslora": True}, 6.0), (9, {"use_rslora": True}, 4.0), (4, {"lora_alpha": 5.5}, 5.5 / 4)],
)
def test_matrices_are_those_of_the_formula(rank, config, scale, base, tmp_path):
    merged = of_hub(base, tmp_path, scale, rank=rank, **config)
    sources = {llava.rename(name): one for name, one in checkpoint.index(base).items()}
    wanted = {llava.rename(name): one.read() for name, one in checkpoint.index(merged).items()}

    found = adapter.merged(sources, tmp_path / "adapter", llava.rename)

    assert found.keys() == wanted.keys()
    for name, one in found.items():
        assert (one.shape, one.read().shape) == (wanted[name].shape,) * 2
        assert torch.allclose(one.read(), wanted[name], atol=1e-5), name
    reference = references.load(base, str(tmp_path / "adapter"))
    stock = checkpoints.stock(merged).state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.allclose(tensor, stock[name], atol=1e-5), name


def test_a_bundle_answers_like_the_merged_model(base, tmp_path, eager_once):
    merged = of_hub(base, tmp_path, 3.0)
    ids, pixels = checkpoints.prompt(6, 2), checkpoints.pixels()
    tokens, logits = checkpoints.generate(merged, ids, pixels, 4)
    room = {"max_text_tokens": 24, "max_new_tokens": 8}

    bundle = eager.export(base, tmp_path / "bundle", adapter=tmp_path / "adapter", **room)
    found = Pipeline.load(bundle).generate_tokens(ids, pixels, max_new_tokens=4, ignore_eos=True)

    assert found.token_ids == tokens
    assert np.abs(found.logits - logits).max() < 1e-3
    assert parity.check(bundle, base, steps=2, store=False).passed
    bare = Pipeline.load(eager_once(base, **room)).generate_tokens(ids, pixels, max_new_tokens=1, ignore_eos=True)
    assert np.abs(bare.logits[0] - logits[0]).max() > 1


def test_the_original_layout_takes_adapters_too(tmp_path):
    stock = layouts.build(tmp_path / "m", text={"hidden_size": 32, "num_attention_heads": 2})
    names = {"model.layers.1.self_attn.k_proj": stock.decoder.model.layers[1].self_attn.k_proj.weight}
    names["model.mm_projector.2"] = stock.projector[2].weight
    pairs = written(tmp_path / "adapter", {name: tuple(weight.shape) for name, weight in names.items()})
    sources = {llava_llama.rename(name): one for name, one in checkpoint.index(tmp_path / "m").items()}

    found = adapter.merged(sources, tmp_path / "adapter", llava_llama.rename)
    reference = references.load(tmp_path / "m", str(tmp_path / "adapter"))

    for name, weight in names.items():
        low, high = (pairs[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        wanted = weight.detach() + 3 * (high @ low)
        assert torch.allclose(found[llava_llama.rename(f"{name}.weight")].read(), wanted, atol=1e-5)
        own = reference.projector[2] if "mm" in name else reference.decoder.layers[1].self_attn.k_proj
        assert torch.allclose(own.weight, wanted, atol=1e-5)


NOT_PLAIN = {
    "DoRA": {"use_dora": True},
    "other ranks": {"rank_pattern": {"q_proj": 2}},
    "biases": {"bias": "lora_only"},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "another method": {"peft_type": "IA3"},
    "changed matrices": {"init_lora_weights": "pissa"},
    "a variant of its own": {"velora_config": {"scale": 1}},
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_is_refused(name, tmp_path):
    written(tmp_path / "adapter", {"lm_head": (8, 8)}, **NOT_PLAIN[name])

    with pytest.raises(UnsupportedError, match=r"which is not merged here; merge it with peft"):
        adapter.read(tmp_path / "adapter")


def test_tensors_that_are_not_plain_are_refused(tmp_path):
    tensors = written(tmp_path / "adapter", {"lm_head": (8, 8)})
    more = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 8)}
    save_file(tensors | more, tmp_path / "adapter" / "adapter_model.safetensors")

    with pytest.raises(UnsupportedError, match=r"holds .*lora_embedding_A, which is not merged here"):
        adapter.read(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("shapes", "config", "said"),
    [
        ({"model.language_model.layers.9.mlp.up_proj": (128, 64)}, {}, "which the checkpoint has not"),
        ({"lm_head": (160, 32)}, {}, r"lm_head of \[160, 32\], but language_model.lm_head.weight is \[160, 64\]"),
        ({"lm_head": (160, 64)}, {"r": 5}, r"expected lora_A \[5, in\]"),
        ({"lm_head": (160, 64)}, {"r": 0}, "r is 0"),
        ({"lm_head": (160, 64)}, {"lora_alpha": "x"}, "lora_alpha 'x'"),
        ({"lm_head": (160, 64)}, {"lora_alpha": math.inf}, "lora_alpha inf"),
    ],
)
def test_an_adapter_of_another_model_is_refused(shapes, config, said, base, tmp_path):
    written(tmp_path / "adapter", shapes)
    tiny.change_json(tmp_path / "adapter" / "adapter_config.json", **config)
    sources = {llava.rename(name): one for name, one in checkpoint.index(base).items()}

    with pytest.raises(CheckpointError, match=said):
        adapter.merged(sources, tmp_path / "adapter", llava.rename)


def test_llavas_own_training_is_named(tmp_path):
    written(tmp_path / "adapter", {"lm_head": (8, 8)})
    (tmp_path / "adapter" / "non_lora_trainables.bin").touch()

    with pytest.raises(UnsupportedError, match=r"merge_lora_weights.py"):
        adapter.read(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json"):
        adapter.read(tmp_path)

"""LLaVA's original layout: whatever decoder and tower it holds, a bundle says what stock transformers says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import export, families, plan, references
from lvlm_edge.exporter.bundles import plans
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError
from lvlm_edge.exporter.families import llava_llama
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.errors import InputError, LvlmEdgeError, UnsupportedError, UsageError
from tests import checkpoints, layouts, tiny
from tests.cases import both
from tests.layouts import IMAGE

LLAMA_3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}
VARIANTS = {
    "Vicuna": {},
    "Llama 3": {"text": LLAMA_3},
    "Qwen2, biases": {"decoder": "qwen2"},
    "Qwen2, tied": {"decoder": "qwen2", "text": {"tie_word_embeddings": True}},
    "Phi-3, fused matrices": {"decoder": "phi3"},
    "Phi-3, a window wider than the prompt": {"decoder": "phi3", "text": {"sliding_window": 512}},
    "Mistral": {"decoder": "mistral"},
    "SigLIP, every token": {"tower": "siglip"},
    "ProxyV's fork, a separator after the crop": {"proxyv": False, "image_aspect_ratio": "pad"},
}
TILES = [[56, 112], [112, 56], [112, 112]]
ANYRES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": TILES}


@pytest.fixture
def small(tmp_path) -> Path:
    """A checkpoint to spoil, with any-resolution tiles and separators."""
    layouts.build(tmp_path / "model", proxyv=False, **ANYRES)
    return tmp_path / "model"


def agree(folder: Path, stock: layouts.Stock, exported: Any, pixels: np.ndarray, crops: int = 1, **options) -> None:
    """A float32 bundle says what stock modules say; 1e-4 is rounding (seen: 5e-6)."""
    bundle = exported(folder, max_text_tokens=24, max_new_tokens=8, **options)
    ids = layouts.prompt(images=len(pixels) // crops)
    tokens, logits = stock.generate(ids, pixels, 6, crops)
    found = Pipeline.load(bundle).generate_tokens(ids, pixels, max_new_tokens=6, ignore_eos=True)
    assert found.token_ids == tokens
    assert np.abs(found.logits - logits).max() < 1e-4


@pytest.mark.parametrize(
    ("variant", "exported"), both([(name,) for name in VARIANTS], {("Qwen2, tied",)}), indirect=["exported"]
)
@pytest.mark.claims("equal", family="llava_llama", method="none")
def test_a_bundle_equals_stock_modules_for(variant, tmp_path, exported):
    stock = layouts.build(tmp_path / "model", **VARIANTS[variant])

    agree(tmp_path / "model", stock, exported, checkpoints.pixels())


@pytest.mark.parametrize(
    ("images", "fork", "exported"),
    both([(images, fork) for images in (1, 2) for fork in (True, False)], {(2, True)}),
    indirect=["exported"],
)
def test_tiles_of_any_resolution_follow_their_base_view(images, fork, tmp_path, exported):
    stock = layouts.build(tmp_path / "model", **ANYRES, **({"proxyv": False} if fork else {}))

    options = {"grid": (1, 2), "num_images": images}
    agree(tmp_path / "model", stock, exported, checkpoints.pixels(images=3 * images), 3, **options)


def test_fastv_ranks_tokens_of_every_tile_where_there_are_no_separators(tmp_path, exported):
    stock = layouts.build(tmp_path / "model", **ANYRES)
    options = {"method": "fastv", "prune_layer": 1, "max_text_tokens": 24, "max_new_tokens": 8, "grid": (1, 2)}
    ids, pixels = layouts.prompt(), checkpoints.pixels(images=3)
    tokens, logits = stock.generate(ids, pixels, 1, 3)

    every = Pipeline.load(exported(tmp_path / "model", keep_ratio=1.0, **options))
    half = Pipeline.load(exported(tmp_path / "model", keep_ratio=0.5, **options))

    found = every.generate_tokens(ids, pixels, max_new_tokens=1)
    assert found.token_ids == tokens
    assert np.abs(found.logits - logits).max() < 1e-4
    assert len(half.generate_tokens(ids, pixels, max_new_tokens=1).kept_visual) == 24


@pytest.mark.parametrize("layout", ["inside", "whole CLIP", "absolute", "pickled"])
def test_the_tower_is_found_wherever_it_is(layout, tmp_path, exported):
    folder = tmp_path / "model"
    stock = layouts.build(folder)
    beside = folder / layouts.TOWER / "model.safetensors"
    tower = {k if k.startswith("vision_model.") else f"vision_model.{k}": v for k, v in load_file(beside).items()}
    if layout == "inside":
        own = load_file(folder / "model.safetensors")
        own |= {f"model.vision_tower.vision_tower.{k}": v for k, v in tower.items()}
        save_file(own, folder / "model.safetensors")
        beside.unlink()
    elif layout == "whole CLIP":
        save_file(tower | {"text_model.x": torch.ones(2), "logit_scale": torch.ones(1)}, beside)
        config = tiny.read_json(beside.parent / "config.json")
        tiny.write_json(beside.parent / "config.json", {"model_type": "clip", "vision_config": config})
    elif layout == "absolute":
        tiny.change_json(folder / "config.json", mm_vision_tower=str(beside.parent.rename(tmp_path / "elsewhere")))
    else:
        torch.save(tower, beside.parent / "pytorch_model.bin")
        beside.unlink()

    agree(folder, stock, exported, checkpoints.pixels())


@pytest.mark.parametrize("stored", ["model.safetensors", "pytorch_model.bin"])
def test_fused_matrices_are_cut_in_every_file_format(stored, tmp_path, exported):
    stock = layouts.build(tmp_path / "model", decoder="phi3")
    if stored.endswith("bin"):
        torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "model" / stored)
        (tmp_path / "model" / "model.safetensors").unlink()

    agree(tmp_path / "model", stock, exported, checkpoints.pixels())


def test_check_puts_separators_after_pytorchs_own_tokens(tmp_path, monkeypatch, quick_tracing):
    stock = layouts.build(tmp_path / "model", proxyv=False, **ANYRES)
    export(tmp_path / "model", tmp_path / "out", grid=(1, 2), max_text_tokens=24, max_new_tokens=8)

    def run(model, config, prompt, pixels, steps, kept=None):
        with torch.no_grad():
            states = stock.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        tokens, logits = stock.generate(prompt, pixels.numpy(), steps, 3)
        embeds = stock.projector(states).detach().flatten(0, 1)
        return references.Reference(
            image_features=states, image_embeds=embeds, logits=torch.from_numpy(logits), tokens=tokens
        )

    loaded = references.load(tmp_path / "model")
    monkeypatch.setattr(references, "load", lambda *_: loaded)  # for the embedding
    monkeypatch.setattr(references.module("none"), "run", run)
    verdict = parity.check(tmp_path / "out", tmp_path / "model", steps=4)

    assert verdict.passed
    assert {row.stage for row in verdict.rows} >= {"vision", "projector", "prefill logits", "tokens"}


# The reference outputs' checkpoints.


@pytest.fixture(scope="module")
def yopo(oracles) -> tuple[Path, list[int], np.ndarray]:
    """YOPO's checkpoint, and a prompt and picture for it."""
    case = oracles / "yopo" / "yopo_0.json"
    pixels = load_file(case.with_suffix(".safetensors"))["pixel_values"].numpy()
    return oracles / "yopo_w7", json.loads(case.read_text())["prompt_token_ids"], pixels


def test_yopos_checkpoint_without_reduction_equals_stock_modules(yopo, exported):
    folder, ids, pixels = yopo
    tokens, logits = layouts.load(folder).generate(ids, pixels, 16)

    found = Pipeline.load(exported(folder, method="none")).generate_tokens(ids, pixels, ignore_eos=True)

    assert found.token_ids == tokens
    assert np.abs(found.logits - logits).max() < 1e-3


@pytest.mark.claims("equal", family="llava_llama", method="fastv")
def test_yopos_checkpoint_under_fastv_equals_the_reference(yopo, exported):
    folder, ids, pixels = yopo
    model = layouts.as_hub(layouts.load(folder), 511)
    assert 511 not in ids
    known = [511 if i == IMAGE else i for i in ids]
    config = {"prune_layer": 2, "keep_ratio": 0.25, "keep_tokens": None}
    expected = references.module("fastv").run(model, config, known, torch.from_numpy(pixels), 16)

    bundle = exported(folder, method="fastv", prune_layer=2, keep_ratio=0.25)
    found = Pipeline.load(bundle).generate_tokens(ids, pixels, ignore_eos=True)

    assert found.kept_visual.tolist() == expected.kept.tolist()
    assert found.token_ids == expected.tokens
    assert np.abs(found.logits - expected.logits.numpy()).max() < 1e-3


@pytest.mark.parametrize(("case", "grid"), [("proxyv_0", None), ("proxyv_1", (1, 2))])
def test_proxyvs_checkpoint_without_reduction_equals_stock_modules(case, grid, oracles, exported):
    path = oracles / "proxyv" / f"{case}.json"
    ids, pixels = json.loads(path.read_text())["prompt_token_ids"], load_file(path.with_suffix(".safetensors"))
    pixels = pixels["pixel_values"].numpy()
    tokens, logits = layouts.load(oracles / "proxyv_f2").generate(ids, pixels, 16, len(pixels))

    found = Pipeline.load(exported(oracles / "proxyv_f2", grid=grid)).generate_tokens(ids, pixels, ignore_eos=True)

    assert found.prompt_tokens == len(ids) - 1 + 65 * len(pixels)
    assert found.token_ids == tokens
    assert np.abs(found.logits - logits).max() < 1e-3


def test_the_config_says_what_methods_the_checkpoint_is_for(oracles):
    proxyv, yopo = (families.read(Checkpoint.open(oracles / name)) for name in ("proxyv_f2", "yopo_w7"))

    assert proxyv.settings == {"proxyv": {"start_layer": 2, "reduce_factor": 2, "learn_proxy": False}}
    assert (proxyv.vision.newline, len(proxyv.vision.pinpoints), proxyv.image_token_id) == (True, 5, IMAGE)
    assert yopo.settings == {
        "yopo": {
            "window": 7,
            "cutoff": 4,
            "ffn_ratio": 4,
            "heads_kept": 30,
            "prefix_tokens": 5,
            "head_mask": str((oracles / "yopo_w7" / "headmask.npy").resolve()),
        }
    }
    assert (yopo.vision.newline, yopo.vision.pinpoints) == (False, ())
    assert hash(proxyv) != hash(yopo)


def test_the_original_layout_and_the_hub_layout_give_one_spec(oracles):
    hub, original = (families.read(Checkpoint.open(oracles / name)) for name in ("llava_mha", "proxyv_f2"))

    seen, expected = original.vision, hub.vision
    assert seen.encoder == expected.encoder
    assert original.decoder == hub.decoder
    assert (seen.projector_act, seen.projector_bias) == (expected.projector_act, expected.projector_bias)


@pytest.mark.parametrize("place", ["headmask_7b_8.npy", "headmask/headmask_13b_8.npy", "headmask/headmask.npy"])
def test_the_head_mask_is_found_by_the_number_of_kept_heads(place, tmp_path):
    layouts.build(tmp_path / "m", attncut_w=5, layercut_num=1, mlpcut_ratio=2, headcut_num=8)
    (tmp_path / "m" / "headmask").mkdir()
    (tmp_path / "m" / "headmask_7b_16.npy").write_bytes(b"another")
    missing = families.read(Checkpoint.open(tmp_path / "m")).settings["yopo"]["head_mask"]
    assert missing == str(tmp_path / "m" / "headmask.npy")
    (tmp_path / "m" / place).write_bytes(b"")

    found = families.read(Checkpoint.open(tmp_path / "m")).settings["yopo"]

    assert (found["head_mask"], found["prefix_tokens"]) == (str(tmp_path / "m" / place), 35)


def test_released_encoders_are_known_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    layouts.build(tmp_path / "m")
    for name, tokens in (
        ("openai/clip-vit-large-patch14-336", 576),
        ("openai/clip-vit-large-patch14", 256),
        ("/somewhere/else/clip-vit-large-patch14-336", 576),
        ("google/siglip-so400m-patch14-384", 729),
    ):
        hidden = 1152 if "siglip" in name else 1024
        tiny.change_json(tmp_path / "m" / "config.json", mm_vision_tower=name, mm_hidden_size=hidden)

        assert plan(tmp_path / "m", max_text_tokens=24)["visual_tokens"] == tokens


def test_the_first_releases_shared_a_name_with_the_hub_layout(small):
    tiny.change_json(small / "config.json", model_type="llava")

    assert families.read(Checkpoint.open(small)).family == "llava_llama"


def test_phi_3_sees_no_window_in_proxyvs_fork_alone(tmp_path):
    layouts.build(tmp_path / "a", decoder="phi3", text={"sliding_window": 20})
    layouts.build(tmp_path / "b", decoder="phi3", text={"sliding_window": 20}, proxyv=False)

    windows = [families.read(Checkpoint.open(tmp_path / name)).decoder.window for name in ("a", "b")]
    assert windows == [20, None]


# Plans of tiles.


def test_a_plan_counts_crops_and_separators(small):
    one, tiles = plan(small, max_text_tokens=24), plan(small, max_text_tokens=24, grid=(2, 2), num_images=2)

    assert (one["crops"], one["visual_tokens"], one["separators"]) == (1, 16, 1)
    assert (tiles["crops"], tiles["visual_tokens"], tiles["separators"]) == (5, 160, 10)
    assert tiles["stages"][0]["queries"] == 160 + 10 + 24
    assert tiles["kept_visual_tokens"] == 160
    assert tiles["flops"]["vision"] == 10 * one["flops"]["vision"]


@pytest.mark.parametrize(("size", "crops"), [("100x100", 5), ("300x100", 3), ("50x400", 3)])
def test_the_size_of_a_picture_decides_the_tiles(size, crops, small):
    report = json.loads(tiny.cli("plan", small, "--image-size", size, "--json").stdout)

    assert report["crops"] == crops


# Bad input.


@pytest.mark.parametrize(
    ("code", "fields", "said"),
    [
        (3, {"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        (3, {"mm_vision_select_feature": "cls"}, "mm_vision_select_feature is 'cls'"),
        (3, {"image_aspect_ratio": "anyres_max_9"}, "anyres_max_N with 'flat'"),
        (3, {"mm_newline_position": "grid"}, "mm_newline_position is 'grid'"),
        (3, {"rope_scaling": {"type": "proportional"}, "rope_parameters": None}, "rope_type is 'proportional'"),
        (3, {"model_type": "llava_lama"}, "did you mean llava_llama"),
        (1, {"mm_vision_tower": 3}, "mm_vision_tower is 3"),
        (1, {"mm_vision_tower": "../nowhere"}, "is no folder"),
        (1, {"mm_vision_select_layer": 9}, "mm_vision_select_layer is 9"),
        (1, {"mm_hidden_size": 33}, "mm_hidden_size is 33"),
        (1, {"per_crop_token_len": 9}, "per_crop_token_len is 9"),
        (1, {"image_grid_pinpoints": "x"}, "image_grid_pinpoints is 'x'"),
        (1, {"image_grid_pinpoints": [[57, 56]]}, "multiples of 56"),
        (1, {"hidden_size": "wide"}, "hidden"),
        (1, {"intermediate_size": 100}, "does not fit its config"),
        (1, {"num_hidden_layers": 3}, "lacks tensors"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(code, fields, said, small, tmp_path):
    tiny.change_json(small / "config.json", **fields)

    message = tiny.refused(code, "export", small, "-o", tmp_path / "out", "-q")

    assert said in message
    assert not (tmp_path / "out").exists()


def test_a_fused_matrix_of_other_rows_is_refused(tmp_path):
    layouts.build(tmp_path / "m", decoder="phi3")
    tiny.change_json(tmp_path / "m" / "config.json", num_key_value_heads=4)

    with pytest.raises(CheckpointError, match=r"qkv_proj.weight is \[128, 64\], config.json says 192 rows"):
        export(tmp_path / "m", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "3x3"], "--grid is 3x3, which is not among"),
        (["--grid", "2x1", "--image-size", "9x9"], "give one of them"),
        (["--grid", "2"], "two numbers above 0"),
        (["--image-size", "0x9"], "two numbers above 0"),
    ],
    ids=str,
)
def test_tiles_that_the_checkpoint_does_not_have_are_refused(arguments, said, small, tmp_path):
    assert said in tiny.refused(2, "export", small, "-o", tmp_path / "out", "-q", *arguments)
    assert not (tmp_path / "out").exists()


def test_tiles_are_refused_where_pictures_are_one_crop(tmp_path):
    layouts.build(tmp_path / "m")

    with pytest.raises(UsageError, match="sees every picture as one crop"):
        plan(tmp_path / "m", grid=(1, 2))


def test_fastv_refuses_separators(small, tmp_path):
    assert "separators" in tiny.refused(3, "export", small, "-o", tmp_path / "out", "-q", "--method", "fastv")
    assert not (tmp_path / "out").exists()


def test_an_unknown_name_of_the_fork_is_not_taken_for_another(small):
    tiny.change_json(small / "config.json", model_type="llava_gemma")

    with pytest.raises(UnsupportedError, match="llava_gemma"):
        families.read(Checkpoint.open(small))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [([(100, 100)], r"100x100 goes on tiles of 2x2.*has 1x2"), ([], "has 0 entries"), ([(0, 5)], "0x5")],
)
def test_a_picture_for_other_tiles_is_refused(sizes, said, small, tmp_path, quick_tracing):
    bundle = export(small, tmp_path / "bundle", grid=(1, 2), max_text_tokens=24, max_new_tokens=8)
    pipe, ids, pixels = Pipeline.load(bundle), layouts.prompt(), checkpoints.pixels(images=3)
    pipe.generate_tokens(ids, pixels, max_new_tokens=1, image_sizes=[(200, 100)])

    with pytest.raises(InputError, match=said):
        pipe.generate_tokens(ids, pixels, max_new_tokens=1, image_sizes=sizes)


def test_names_of_a_methods_own_tensors():
    start = "model.vision_mlp_layers.3."
    for key, name in (
        (start + "context_proj.weight", "vision_mlp_layers.3.context_proj.weight"),
        (start + "proj.0.weight", "vision_mlp_layers.3.proj.0.weight"),
        ("model.proxyv_initializer.Wk.weight", "proxyv_initializer.Wk.weight"),
        ("model.proxyv_initializer.proxyv_tokens", "proxyv_initializer.proxyv_tokens"),
        ("model.image_newline", "projector.newline"),
    ):
        assert llava_llama.rename(key) == name
        assert llava_llama.unused(name)


ODD = (None, [], {}, [[]], "x", -1, 0, 1.5, True, 10**9)


@pytest.mark.parametrize("layout", ["llava_llama", "tinyllava", "tower"])
def test_every_field_may_hold_anything_without_a_traceback(layout, tmp_path):
    if layout == "tinyllava":
        from tests.exporter import test_tinyllava

        test_tinyllava.build(tmp_path)
        where = tmp_path / "config.json"
    else:
        yopo = {"attncut_w": 5, "layercut_num": 1, "mlpcut_ratio": 2, "headcut_num": 8}
        layouts.build(tmp_path / "m", proxyv=True, version="v1", **ANYRES, **yopo)
        where = tmp_path / "m" / ("config.json" if layout == "llava_llama" else "tower/config.json")
    folder, whole = where.parent if layout != "tower" else where.parent.parent, tiny.read_json(where)

    changed = [whole | {field: value} for field in whole for value in ODD]
    for part in ("text_config", "vision_config"):
        inner = whole.get(part, {})
        changed += [whole | {part: inner | {field: value}} for field in inner for value in ODD]
    for config in changed:
        tiny.write_json(where, config)
        try:
            opened = Checkpoint.open(folder)
            plans.plan_of(opened, options={"max_text_tokens": 24, "max_new_tokens": 8})
            families.of(opened).chat_template(opened)
        except LvlmEdgeError:
            continue  # as a message

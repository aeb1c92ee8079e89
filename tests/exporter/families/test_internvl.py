"""InternVL against stock transformers: layer scale, tiles of the nearest shape with a thumbnail, cells as channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lvlm_edge.exporter import plan
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.families import internvl
from lvlm_edge.runtime import InputError, Pipeline
from lvlm_edge.runtime.errors import UnsupportedError, UsageError
from lvlm_edge.runtime.pictures import views
from tests import families, internvls, qwen, tiny
from tests.cases import both

FAMILY = "internvl"
TEXT = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151674, "rope_theta": 1e6,
    "tie_word_embeddings": False,
}  # fmt: skip
CONFIG: dict[str, Any] = {  # InternVL3-1B-hf
    "model_type": "internvl", "image_token_id": 151667, "text_config": TEXT,
    "vision_config": {"model_type": "internvl_vision", "attention_bias": True},
}  # fmt: skip
LARGE = CONFIG | {
    "text_config": TEXT
    | {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
}  # InternVL3_5-8B-HF
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "GotOcr2ImageProcessorFast", "size": {"height": 448, "width": 448},
    "crop_to_patches": False, "min_patches": 1, "max_patches": 12,
}  # fmt: skip
TOKENS = {  # of (width, height): tiles, visual tokens
    (336, 336): (None, 256), (672, 672): ((2, 2), 1280), (1280, 720): ((2, 4), 2304), (720, 1280): ((4, 2), 2304),
    (640, 480): ((3, 4), 3328), (448, 448): (None, 256),
}  # fmt: skip
TABLE = {  # from the published dimensions, computed by building stock models without weights
    "3-1B 672x672": (CONFIG, (672, 672), (3618.0, 11.45, 1119.4, 619.8, 938_193_024)),
    "3.5-8B 1280x720": (LARGE, (1280, 720), (6512.3, 154.62, 36237.2, 19332.9, 8_528_318_464)),
}


@pytest.mark.parametrize(
    ("name", "exported"), both([("none_1",), ("none_2",), ("fastv_1",)], {("fastv_1",)}), indirect=["exported"]
)
@pytest.mark.claims("equal", family=FAMILY)
def test_the_answers_are_those_of_stock_transformers(oracles, exported, name):
    of = families.case(oracles, FAMILY, name)

    families.agrees(Pipeline.load(families.bundle(exported, of)), of)


@pytest.mark.parametrize("name", ["none_1", "none_2"])
def test_the_reference_expands_prompts_like_the_stock_processor(oracles, name):
    families.expands(families.case(oracles, FAMILY, name))


@pytest.mark.parametrize("conversation", sorted(families.CONVERSATIONS))
def test_conversations_are_answered_like_stock_transformers(oracles, eager_once, conversation):
    of = families.case(oracles, FAMILY, "none_1")
    sizes = [tuple(of.data["picture_sizes"][0])] * (conversation != "text only")

    families.answers_like_stock(
        Pipeline.load(families.bundle(eager_once, of)), of.checkpoint, families.CONVERSATIONS[conversation], sizes
    )


def test_fastv_ranks_pictures_of_two_grids_together(oracles, eager_once):
    checkpoint, sizes = families.case(oracles, FAMILY, "none_1").checkpoint, ((150, 60), (56, 56))
    settings = {"image_size": sizes, "max_text_tokens": 96, "max_new_tokens": 24}
    pipe = Pipeline.load(eager_once(checkpoint, method="fastv", prune_layer=2, keep_ratio=1.0, **settings))

    families.answers_like_stock(pipe, checkpoint, [qwen.turn(None, "and", None, "differ how?")], sizes)

    assert [p.views.count for p in pipe.manifest.pictures] == [11, 1]


KINDS = {  # encoders and decoders that no stored case has
    "norms": {"vision": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}},
    "last norm": {"vision": {"use_mean_pooling": False}},
    "no table": {"vision": {"use_absolute_position_embeddings": False}},
    "earlier layer": {"vision_feature_layer": -2},
    "qwen3": {"decoder": "qwen3", "text": {"head_dim": 32}},
    "llama, dynamic": {"decoder": "llama", "text": {"rope_scaling": {"type": "dynamic", "factor": 2.0}}},
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_other_encoders_and_decoders_answer_like_stock_transformers(kind, eager_once, oracles, tmp_path):
    folder = internvls.build(tmp_path / "m", families.case(oracles, FAMILY, "none_1").checkpoint, **KINDS[kind])
    pipe = Pipeline.load(eager_once(folder, image_size=(90, 60), max_text_tokens=64, max_new_tokens=8))

    families.answers_like_stock(pipe, folder, families.CONVERSATIONS["text first"], [(90, 60)])


@pytest.mark.parametrize("exported", both([()], {()}), indirect=True)
def test_the_legacy_lowering_says_the_same(oracles, exported):
    of = families.case(oracles, FAMILY, "fastv_1")

    families.agrees(Pipeline.load(families.bundle(exported, of, lowering="legacy")), of)


def test_pixels_of_many_sizes_are_the_image_processors(oracles):
    checkpoint = families.case(oracles, FAMILY, "none_1").checkpoint

    families.sees_like_the_processor(checkpoint, families.random_sizes(5, 40), crop_to_patches=True)


def test_token_counts_are_the_processors(tmp_path):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    folder = qwen.published(tmp_path, CONFIG, PREPROCESSOR)
    processor = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=12)
    ties = [(448, 448), (449, 449), (634, 634), (672, 672), (896, 448), (300, 200), (1, 12), (12, 1)]

    for width, height in ties + families.random_sizes(6, 200, most=4000, thin=50):
        wanted = 256 * processor.get_number_of_image_patches(height, width, {})

        assert families.planned(folder, (width, height)).visual_tokens == wanted, (width, height)


@pytest.mark.parametrize("size", TOKENS)
def test_the_released_settings_give_the_published_tokens(size, tmp_path):
    found = families.planned(qwen.published(tmp_path, CONFIG, PREPROCESSOR), size)

    assert (found.views.tiles, found.visual_tokens) == TOKENS[size]
    assert found.rows("text") == 2


@pytest.mark.parametrize("name", TABLE)
def test_the_plan_has_the_published_counts(name, tmp_path):
    config, size, expected = TABLE[name]

    found = families.counts(qwen.published(tmp_path, config, PREPROCESSOR), size)

    for column, value in zip(("encoder", "connector", "prefill", "fastv"), expected[:-1], strict=True):
        assert found[column] == pytest.approx(value, rel=1e-4, abs=0.006), column
    assert found["parameters"] == expected[-1]


def test_check_passes_and_finds_cells_that_are_transposed(oracles, tmp_path, eager_once):
    from lvlm_edge.exporter.families import _intern_modules
    from lvlm_edge.exporter.proof import parity
    from tests import eager

    of = families.case(oracles, FAMILY, "fastv_1")
    right = _intern_modules.cells_to_channels

    def transposed(x: torch.Tensor, grid: int, merge: int) -> torch.Tensor:
        cells = right(x, grid, merge)
        side = grid // merge
        return cells.reshape(1, side, side, -1).transpose(1, 2).flatten(1, 2)

    options = {"method": "fastv", "prune_layer": 2, "image_size": (90, 60), "max_text_tokens": 96, "max_new_tokens": 8}
    bad = eager.export(
        of.checkpoint,
        tmp_path / "bad",
        mistake=lambda patch: patch.setattr(_intern_modules, "cells_to_channels", transposed),
        **options,
    )

    assert parity.check(eager_once(of.checkpoint, **options), of.checkpoint, steps=4, store=False).passed
    with eager.running():
        verdict = parity.check(bad, of.checkpoint, steps=4, store=False)
    assert not verdict.passed
    assert verdict.first_failure.stage == "vision"


def test_a_picture_of_another_grid_is_refused_or_fitted(oracles, eager_once):
    of = families.case(oracles, FAMILY, "none_1")
    pipe = Pipeline.load(families.bundle(eager_once, of))
    rows, columns = pipe.manifest.pictures[0].views.tiles
    with pytest.raises(InputError, match=rf"56x56 goes on tiles of 1x1, the bundle has {rows}x{columns}"):
        pipe.prepare("What?", [families.noise((56, 56))])

    _, pixels = pipe.prepare("What?", [families.noise((56, 56))], fit=True)

    assert pixels.shape == (rows * columns + 1, 3, 56, 56)


def test_boxes_of_stretched_tiles_share_out_the_picture(tmp_path):
    picture = families.planned(qwen.published(tmp_path, CONFIG, PREPROCESSOR), (640, 480))

    found = views.boxes((640, 480), picture.views, [(16, 16)] * 13)

    assert found[0][0].tolist() == [0, 0, 10, 10]
    assert found[11][-1].tolist() == pytest.approx([630, 470, 640, 480])
    assert found[12][-1].tolist() == pytest.approx([600, 450, 640, 480])  # of the thumbnail


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("vision_tower.embeddings.cls_token", "vision.cls_token"),
        ("model.vision_tower.embeddings.patch_embeddings.projection.bias", "vision.patch_embedding.bias"),
        ("vision_tower.encoder.layer.3.attention.projection_layer.weight", "vision.layers.3.projection_layer.weight"),
        ("vision_tower.encoder.layer.3.mlp.fc1.bias", "vision.layers.3.fc1.bias"),
        ("multi_modal_projector.layer_norm.weight", "projector.norm.weight"),
        ("model.language_model.layers.0.self_attn.q_norm.weight", "layers.0.q_norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_of_both_layouts_are_known(key, name):
    assert internvl.FAMILY.rename(key) == name


def test_missing_fields_mean_what_transformers_takes():
    from transformers import InternVLConfig

    stock = InternVLConfig()
    plain = ("projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy", "downsample_ratio")
    tower = stock.vision_config.to_dict()

    assert {key: internvl.DEFAULTS[key] for key in (*plain, "image_token_id")} == {
        key: getattr(stock, key) for key in (*plain, "image_token_id")
    }
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in internvl.ENCODER.items()} == {
        k: list(tower[k]) if isinstance(tower[k], tuple) else tower[k] for k in internvl.ENCODER
    }


@pytest.mark.parametrize(
    ("config", "preprocessor", "error", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, {}, UnsupportedError, "expected 'default'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, {}, UnsupportedError, "expected internvl_vision"),
        ({"vision_config": {"norm_type": "batch_norm"}}, {}, UnsupportedError, "norm_type is 'batch_norm'"),
        ({"vision_config": {"image_size": [448, 224]}}, {}, CheckpointError, "a number or two equal ones"),
        ({"text_config": {"model_type": "qwen3_moe"}}, {}, UnsupportedError, "model_type is 'qwen3_moe'"),
        ({"vision_feature_layer": 30}, {}, CheckpointError, "vision_feature_layer is 30, expected one of 24 layers"),
        ({}, {"size": {"height": 384, "width": 384}}, CheckpointError, "config.json says 448 pixels"),
        ({}, {"min_patches": 13}, CheckpointError, "min_patches is 13, max_patches 12"),
        ({}, {"max_patches": 0}, CheckpointError, "max_patches is 0, expected 1"),
    ],
)
def test_what_the_graphs_do_not_have_is_refused(config, preprocessor, error, message, tmp_path):
    with pytest.raises(error, match=message):
        plan(qwen.published(tmp_path, CONFIG | config, PREPROCESSOR | preprocessor), image_size=(672, 672))


def test_a_size_or_a_grid_is_needed(tmp_path):
    folder = qwen.published(tmp_path, CONFIG, PREPROCESSOR)
    with pytest.raises(UsageError, match="give --image-size WxH, or --grid RxC"):
        plan(folder)
    with pytest.raises(UsageError, match="--grid is 4x4, but pictures have at most 12 tiles"):
        plan(folder, grid=(4, 4))
    assert plan(folder, grid=(2, 3))["visual_tokens"] == 7 * 256


def test_an_export_needs_the_tokens_around_a_picture(oracles, tmp_path):
    source = families.case(oracles, FAMILY, "none_1").checkpoint
    folder = internvls.build(tmp_path / "m", source)
    (folder / "tokenizer.json").unlink()

    message = tiny.refused(1, "export", folder, "-o", tmp_path / "out", "--image-size", "90x60")

    assert "has no tokenizer.json, which says what stands around" in message


def test_a_head_that_is_not_stored_is_the_embeddings(oracles, tmp_path, eager_once):
    from safetensors.torch import load_file, save_file

    source = families.case(oracles, FAMILY, "none_1").checkpoint
    folder = internvls.build(tmp_path / "m", source, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "lm_head" not in k}, folder / "model.safetensors", {"format": "pt"})
    pipe = Pipeline.load(eager_once(folder, image_size=(90, 60), max_text_tokens=64, max_new_tokens=8))

    families.answers_like_stock(pipe, folder, families.CONVERSATIONS["text first"], [(90, 60)])

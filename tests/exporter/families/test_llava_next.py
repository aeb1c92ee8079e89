"""LLaVA-NeXT against stock transformers: tiles as one map, its padding cut off, a newline behind every row."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lvlm_edge.exporter import plan
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.families import llava_next
from lvlm_edge.runtime import InputError, Pipeline
from lvlm_edge.runtime.errors import UnsupportedError, UsageError
from lvlm_edge.runtime.pictures import overlay, views
from tests import families, qwen, tiny
from tests.cases import both

FAMILY = "llava_next"
CONFIG: dict[str, Any] = {  # llava-v1.6-mistral-7b-hf
    "model_type": "llava_next", "image_token_index": 32000, "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "image_grid_pinpoints": llava_next.PINPOINTS,
    "text_config": {
        "model_type": "mistral", "vocab_size": 32064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "sliding_window": None, "intermediate_size": 14336,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
    },
}  # fmt: skip
VICUNA = {**CONFIG, "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}}
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 336}, "resample": 3,
    "crop_size": {"height": 336, "width": 336}, "image_grid_pinpoints": llava_next.PINPOINTS,
}  # fmt: skip
TOKENS = {  # of (width, height): grid of tiles, covered cells, visual tokens
    (336, 336): ((1, 2), (24, 24), 1176), (672, 672): ((2, 2), (48, 48), 2928), (1280, 720): ((2, 2), (28, 48), 1948),
    (720, 1280): ((2, 2), (48, 28), 1968), (640, 480): ((2, 2), (36, 48), 2340), (1920, 1080): ((2, 2), (28, 48), 1948),
}  # fmt: skip
TABLE = {  # from the published dimensions, computed by building stock models without weights
    "mistral 336x336": (CONFIG, (336, 336), (1098.1, 72.48, 18115.1, 10148.3, 7_566_747_648)),
    "mistral 672x672": (CONFIG, (672, 672), (1830.2, 120.80, 46458.0, 24794.3, 7_566_747_648)),
    "vicuna 1280x720": (VICUNA, (1280, 720), (1830.2, 120.80, 28182.1, 15338.1, 7_063_431_168)),
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


@pytest.mark.parametrize("conversation", sorted(set(families.CONVERSATIONS) - {"system"}))  # which its template refuses
def test_conversations_are_answered_like_stock_transformers(oracles, eager_once, conversation):
    of = families.case(oracles, FAMILY, "none_1")
    messages = families.CONVERSATIONS[conversation]
    sizes = [(97, 211)] * (conversation != "text only")

    families.answers_like_stock(Pipeline.load(families.bundle(eager_once, of)), of.checkpoint, messages, sizes)


def test_pictures_of_two_sizes_have_a_graph_each_that_packs_them(oracles, eager_once):
    checkpoint, sizes = families.case(oracles, FAMILY, "none_1").checkpoint, ((150, 120), (97, 211))
    pipe = Pipeline.load(eager_once(checkpoint, image_size=sizes, max_text_tokens=96, max_new_tokens=24))

    families.answers_like_stock(pipe, checkpoint, [qwen.turn(None, "and", None, "differ how?")], sizes)

    assert [p.graphs for p in pipe.manifest.pictures] == [("vision", "pack.0"), ("vision", "pack.1")]


@pytest.mark.parametrize("exported", both([()], {()}), indirect=True)
def test_the_legacy_lowering_says_the_same(oracles, exported):
    of = families.case(oracles, FAMILY, "fastv_1")

    families.agrees(Pipeline.load(families.bundle(exported, of, lowering="legacy")), of)


def test_pixels_of_many_sizes_are_the_image_processors(oracles):
    checkpoint = families.case(oracles, FAMILY, "none_1").checkpoint

    families.sees_like_the_processor(checkpoint, families.random_sizes(1, 40))


def test_token_counts_are_the_processors(oracles):
    from transformers import LlavaNextProcessor

    checkpoint = families.case(oracles, FAMILY, "none_1").checkpoint
    count = LlavaNextProcessor._get_number_of_features
    of = SimpleNamespace(
        image_processor=SimpleNamespace(
            image_grid_pinpoints=json.loads((checkpoint / "config.json").read_text())["image_grid_pinpoints"]
        ),
        patch_size=7,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    of._get_unpadded_features = lambda *given: LlavaNextProcessor._get_unpadded_features(of, *given)
    exact = [(110, 352), (352, 110), (198, 176), (205, 328)]  # where a quotient is not exact

    for width, height in [*exact, *families.random_sizes(2, 200, most=4000)]:
        wanted = count(of, height, width, 42, 42) - (of.vision_feature_select_strategy == "default")

        assert families.planned(checkpoint, (width, height)).visual_tokens == wanted, (width, height)


@pytest.mark.parametrize("size", TOKENS)
def test_the_released_settings_give_the_published_tokens(size, tmp_path):
    found = families.planned(qwen.published(tmp_path, CONFIG, PREPROCESSOR), size)

    assert (found.views.tiles, found.runs[1].grid, found.visual_tokens) == TOKENS[size]


UNREAD = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024 + 2 * 1024  # CLIP's last layer and norm


@pytest.mark.parametrize("name", TABLE)
def test_the_plan_has_the_published_counts(name, tmp_path):
    config, size, expected = TABLE[name]

    found = families.counts(qwen.published(tmp_path, config, PREPROCESSOR), size)

    assert found["parameters"] + UNREAD == expected[-1]
    for column, value in zip(("encoder", "connector", "prefill", "fastv"), expected[:-1], strict=True):
        assert found[column] == pytest.approx(value, rel=1e-4), column


def test_check_passes_and_finds_newlines_in_another_place(oracles, tmp_path, eager_once):
    from lvlm_edge.exporter.families import _anyres
    from lvlm_edge.exporter.proof import parity
    from tests import eager

    of = families.case(oracles, FAMILY, "fastv_1")
    right = _anyres.map_cells

    def transposed(patch):
        patch.setattr(_anyres, "map_cells", lambda picture: right(picture)[:, ::-1])

    options = {"method": "fastv", "prune_layer": 2, "image_size": (150, 120), "max_text_tokens": 96}
    bad = eager.export(of.checkpoint, tmp_path / "bad", max_new_tokens=8, mistake=transposed, **options)
    good = eager_once(of.checkpoint, max_new_tokens=8, **options)

    assert parity.check(good, of.checkpoint, steps=4, store=False).passed
    with eager.running():
        verdict = parity.check(bad, of.checkpoint, steps=4, store=False)
    assert not verdict.passed
    assert verdict.first_failure.stage == "projector"


def test_a_picture_that_covers_other_cells_is_refused_or_fitted(oracles, eager_once):
    of = families.case(oracles, FAMILY, "none_1")
    pipe = Pipeline.load(families.bundle(eager_once, of))
    other = families.noise((97, 250))
    with pytest.raises(InputError, match=r"97x250 covers 16x6 cells of its tiles, the bundle is for 14x6"):
        pipe.prepare("What?", [other])

    ids, pixels = pipe.prepare("What?", [other], fit=True)

    wanted = pipe.pixels([other.resize((97, 211), 3)])[0]
    assert np.array_equal(pixels, wanted)
    assert np.isfinite(pipe.generate_tokens(ids, pixels, max_new_tokens=1).logits).all()


def test_kept_cells_lie_where_the_map_shows_them(tmp_path):
    picture = families.planned(qwen.published(tmp_path, CONFIG, PREPROCESSOR), (640, 480))
    every = picture.runs[1]

    cells = overlay.cells(np.arange(576 + 46, 576 + 51), every, 576)
    boxes = views.boxes((640, 480), picture.views, [picture.runs[0].grid, every.grid])[1]

    assert cells == [46, 47, 48, 49]  # a newline, which lies nowhere, is between the rows
    assert boxes.shape == (36 * 48, 4)
    assert np.allclose(boxes[0], [0, 0, 640 / 48, 480 / 36])
    assert np.allclose(boxes[-1], [640 - 640 / 48, 480 - 480 / 36, 640, 480])


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("image_newline", "projector.image_newline"),
        ("model.image_newline", "projector.image_newline"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "layers.0.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "layers.0.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.embeddings.class_embedding", "vision.class_embedding"),
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias", "vision.layers.0.fc1.bias"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.bias", "vision.layers.0.fc1.bias"),
        ("model.multi_modal_projector.linear_2.weight", "projector.linear_2.weight"),
    ],
)
def test_names_of_all_layouts_are_known(key, name):
    assert llava_next.FAMILY.rename(key) == name


def test_missing_fields_mean_what_transformers_takes():
    from transformers import LlavaNextConfig

    stock = LlavaNextConfig().to_dict()
    nested = ("text_config", "vision_config", "image_token_index")

    assert {k: v for k, v in llava_next.DEFAULTS.items() if k not in nested} == {
        k: [list(pair) for pair in stock[k]] if k == "image_grid_pinpoints" else stock[k]
        for k in llava_next.DEFAULTS
        if k not in nested
    }


def changed(tmp_path: Path, config: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> Path:
    return qwen.published(tmp_path, CONFIG | config, PREPROCESSOR | (preprocessor or {}))


@pytest.mark.parametrize(
    ("config", "preprocessor", "error", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, {}, UnsupportedError, "expected 'default' for this encoder"),
        ({"image_grid_pinpoints": [[336, 500]]}, {}, CheckpointError, "expected pairs of multiples of 336"),
        ({"image_grid_pinpoints": [[336, 672]]}, {}, CheckpointError, r"config.json's \[\(672, 336\)\]"),
        ({"text_config": {"model_type": "gpt_oss"}}, {}, UnsupportedError, "model_type is 'gpt_oss'"),
        ({}, {"size": {"shortest_edge": 224}}, CheckpointError, "config.json says 336 pixels"),
        ({}, {"resample": 2}, UnsupportedError, "resample is 2"),
        ({}, {"do_resize": False}, UnsupportedError, "do_resize is False"),
        ({}, {"image_processor_type": "ViTImageProcessor"}, UnsupportedError, "image_processor_type is 'ViTImage"),
    ],
)
def test_what_the_graphs_do_not_have_is_refused(config, preprocessor, error, message, tmp_path):
    with pytest.raises(error, match=message):
        plan(changed(tmp_path, config, preprocessor), image_size=(672, 672))


def test_a_size_is_needed_and_has_limits(tmp_path):
    folder = changed(tmp_path, {})
    with pytest.raises(UsageError, match=r"give --image-size WxH$"):
        plan(folder)
    with pytest.raises(UsageError, match="give --image-size WxH instead of --grid"):
        plan(folder, grid=(2, 2))
    with pytest.raises(UsageError, match="pictures of 900x2 are too thin"):
        plan(folder, image_size=(900, 2))
    (folder / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in tiny.refused(1, "plan", folder, "--image-size", "672x672")

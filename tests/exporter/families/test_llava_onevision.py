"""LLaVA-OneVision against stock transformers: maps that are made smaller, and squares where pictures are several."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lvlm_edge.exporter import plan
from lvlm_edge.exporter.families import _anyres, llava_onevision
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.errors import UnsupportedError
from tests import families, qwen
from tests.cases import both

FAMILY = "llava_onevision"
CONFIG: dict[str, Any] = {  # llava-onevision-qwen2-7b-ov-hf
    "model_type": "llava_onevision", "image_token_index": 151646, "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": llava_onevision.PINPOINTS,
    "text_config": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152128, "rope_theta": 1e6,
    },
    "vision_config": llava_onevision.DEFAULTS["vision_config"],
}  # fmt: skip
SMALL = CONFIG | {
    "text_config": CONFIG["text_config"]
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 152000},
    "tie_word_embeddings": True,
}
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 384, "width": 384},
}  # fmt: skip
TOKENS = {  # of (width, height): grid of tiles, cells of the map, visual tokens
    (336, 336): ((1, 1), (27, 27), 1485), (672, 672): ((2, 2), (54, 54), 3699), (1280, 720): ((2, 4), (54, 96), 5967),
    (720, 1280): ((4, 2), (96, 54), 6009), (640, 480): ((2, 2), (40, 54), 2929),
    (1920, 1080): ((3, 5), (60, 108), 7269),
}  # fmt: skip
TABLE = {  # from the published dimensions, computed by building stock models without weights
    "0.5B 336x336": (SMALL, (336, 336), (1283.6, 5.35, 1315.2, 718.3, 893_675_552)),
    "7B 672x672": (CONFIG, (672, 672), (3209.0, 123.74, 54794.4, 29487.3, 8_030_807_584)),
}
PICTURES = {"several turns", "text first", "system"}


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
    sizes = [tuple(of.data["picture_sizes"][0])] * (conversation in PICTURES)

    families.answers_like_stock(
        Pipeline.load(families.bundle(eager_once, of)), of.checkpoint, families.CONVERSATIONS[conversation], sizes
    )


def test_a_system_message_given_as_text_takes_the_form_that_the_template_reads(oracles, eager_once):
    of = families.case(oracles, FAMILY, "none_1")
    pipe = Pipeline.load(families.bundle(eager_once, of))
    picture = families.noise(tuple(of.data["picture_sizes"][0]))

    found, _ = pipe.prepare("What is it?", picture, system="Be brief.")

    assert found == pipe.encode(families.CONVERSATIONS["system"])
    assert len(found) > len(pipe.prepare("What is it?", picture)[0])


def test_two_pictures_are_a_square_each_whatever_their_shapes(oracles, eager_once):
    checkpoint, sizes = families.case(oracles, FAMILY, "none_1").checkpoint, ((150, 60), (97, 211))
    pipe = Pipeline.load(eager_once(checkpoint, num_images=2, max_text_tokens=96, max_new_tokens=24))

    families.answers_like_stock(pipe, checkpoint, [qwen.turn(None, "and", None, "differ how?")], sizes)

    assert pipe.manifest.counts.visual_tokens == 2 * (36 + 1)


def test_maps_are_made_smaller_like_torch_does_it():
    for size, wanted in (((75, 135), (60, 108)), ((9, 14), (4, 11)), ((6, 6), (1, 5))):
        cells = torch.randn(*size, 3, generator=torch.Generator().manual_seed(1))
        stock = torch.nn.functional.interpolate(cells.permute(2, 0, 1)[None], wanted, mode="bilinear")[0]

        found = _anyres._resampled(cells, wanted)

        assert torch.allclose(found, stock.permute(1, 2, 0), atol=1e-5)


@pytest.mark.parametrize("exported", both([()], {()}), indirect=True)
def test_the_legacy_lowering_says_the_same(oracles, exported):
    of = families.case(oracles, FAMILY, "fastv_1")

    families.agrees(Pipeline.load(families.bundle(exported, of, lowering="legacy")), of)


def test_pixels_of_many_sizes_are_the_image_processors(oracles):
    checkpoint = families.case(oracles, FAMILY, "none_1").checkpoint

    families.sees_like_the_processor(checkpoint, families.random_sizes(3, 40))


def test_token_counts_are_the_processors(oracles):
    from transformers import LlavaOnevisionProcessor as Stock

    checkpoint = families.case(oracles, FAMILY, "none_1").checkpoint
    config = llava_onevision.read(families.Checkpoint.open(checkpoint)).vision
    pairs = [[height, width] for width, height in config.pinpoints]
    of = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pairs),
        num_image_tokens=36,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{config.most}",
    )
    of._get_unpadded_features = lambda *given: Stock._get_unpadded_features(of, *given)
    smaller = 0
    for width, height in families.random_sizes(4, 200, most=4000):
        found = families.planned(checkpoint, (width, height))

        assert found.visual_tokens == Stock._get_number_of_features(of, height, width, 42, 42), (width, height)
        smaller += found.runs[1].grid != tuple(map(len, _anyres._covered(found)))
    assert 20 < smaller < 180


@pytest.mark.parametrize("size", TOKENS)
def test_the_released_settings_give_the_published_tokens(size, tmp_path):
    found = families.planned(qwen.published(tmp_path, CONFIG, PREPROCESSOR), size)

    assert (found.views.tiles, found.runs[1].grid, found.visual_tokens) == TOKENS[size]


@pytest.mark.parametrize("name", TABLE)
def test_the_plan_has_the_published_counts(name, tmp_path):
    config, size, expected = TABLE[name]

    found = families.counts(qwen.published(tmp_path, config, PREPROCESSOR), size)

    for column, value in zip(("encoder", "connector", "prefill", "fastv"), expected[:-1], strict=True):
        assert found[column] == pytest.approx(value, rel=1e-4, abs=0.006), column
    assert found["parameters"] == pytest.approx(expected[-1], rel=1e-5)


def test_check_passes_and_finds_a_map_of_the_wrong_shape(oracles, tmp_path, eager_once):
    from lvlm_edge.exporter.proof import parity
    from tests import eager

    of = families.case(oracles, FAMILY, "none_1")
    right = _anyres.bilinear

    def shifted(patch):
        patch.setattr(_anyres, "bilinear", lambda size, wanted: np.roll(right(size, wanted), 1, 1))

    options = {"image_size": (300, 180), "max_text_tokens": 96, "max_new_tokens": 8}
    bad = eager.export(of.checkpoint, tmp_path / "bad", mistake=shifted, **options)

    assert parity.check(eager_once(of.checkpoint, **options), of.checkpoint, steps=4, store=False).passed
    with eager.running():
        verdict = parity.check(bad, of.checkpoint, steps=4, store=False)
    assert not verdict.passed
    assert verdict.first_failure.stage == "projector"


def test_missing_fields_mean_what_transformers_takes():
    from transformers import LlavaOnevisionConfig
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    stock, own = LlavaOnevisionConfig(), llava_onevision.DEFAULTS
    plain = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio", "projector_hidden_act")
    pairs = [list(pair) for pair in LlavaOnevisionImageProcessorPil.image_grid_pinpoints]

    assert {key: own[key] for key in plain} == {key: getattr(stock, key) for key in plain}
    assert own["image_token_index"] == stock.image_token_id
    assert own["image_grid_pinpoints"] == [list(pair) for pair in stock.image_grid_pinpoints] == pairs
    tower = own["vision_config"]
    assert tower == {key: stock.vision_config.to_dict()[key] for key in tower}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vision_aspect_ratio": "pad"}, "expected anyres_max_N"),
        ({"vision_feature_select_strategy": "default"}, "expected 'full' for this encoder"),
    ],
)
def test_what_the_graphs_do_not_have_is_refused(changed, message, tmp_path):
    with pytest.raises(UnsupportedError, match=message):
        plan(qwen.published(tmp_path, CONFIG | changed, PREPROCESSOR), image_size=(672, 672))

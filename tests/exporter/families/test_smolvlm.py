"""SmolVLM and Idefics3 against stock transformers: tiles as rows of text and visual tokens."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from lvlm_edge.exporter import plan
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.families import smolvlm
from lvlm_edge.runtime import InputError, Pipeline
from lvlm_edge.runtime.errors import UnsupportedError, UsageError
from lvlm_edge.runtime.pictures import views
from tests import families, qwen
from tests.cases import both

FAMILY = "smolvlm"
TEXT = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192, "rope_theta": 1e5,
}  # fmt: skip
CONFIG: dict[str, Any] = {  # SmolVLM-256M-Instruct, whose encoder leaves out its depth
    "model_type": "idefics3", "image_token_id": 49190, "scale_factor": 4, "text_config": TEXT,
    "vision_config": {"hidden_size": 768, "num_attention_heads": 12, "image_size": 512, "patch_size": 16},
}  # fmt: skip
LARGE = CONFIG | {  # SmolVLM-Instruct (2.2B)
    "scale_factor": 3, "image_token_id": 49153,
    "text_config": TEXT
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 49155, "max_position_embeddings": 16384, "rope_theta": 273768.0},
    "vision_config": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip


def preprocessor(side: int, **changed: Any) -> dict[str, Any]:
    return {
        "image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 4 * side}, "resample": 1,
        "max_image_size": {"longest_edge": side}, "do_image_splitting": True,
    } | changed  # fmt: skip


TOKENS = {  # of (width, height): tiles, visual tokens of 256M and of 2.2B, text rows
    (336, 336): ((4, 4), 1088, 1377, 39), (672, 672): ((4, 4), 1088, 1377, 39), (1280, 720): ((3, 4), 832, 1053, 30),
    (720, 1280): ((4, 3), 832, 1053, 31), (640, 480): ((3, 4), 832, 1053, 30), (1920, 1080): ((3, 4), 832, 1053, 30),
}  # fmt: skip
TABLE = {  # from the published dimensions, computed by building stock models without weights
    "256M 336x336": (CONFIG, 512, (336, 336), (3634.8, 15.40, 351.0, 184.8, 256_484_928)),
    "2.2B 1280x720": (LARGE, 384, (1280, 720), (8663.8, 44.72, 3953.6, 2308.0, 2_246_272_880)),
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


def test_two_pictures_of_other_shapes_and_one_of_them(oracles, eager_once):
    checkpoint, sizes = families.case(oracles, FAMILY, "none_1").checkpoint, ((150, 60), (97, 211))
    settings = {"image_size": sizes, "max_text_tokens": 96, "max_new_tokens": 24}
    pipe = Pipeline.load(eager_once(checkpoint, method="fastv", prune_layer=2, keep_ratio=1.0, **settings))

    families.answers_like_stock(pipe, checkpoint, [qwen.turn(None, "and", None, "differ how?")], sizes)
    families.answers_like_stock(pipe, checkpoint, [qwen.turn(None, "and", None, "differ how?")], sizes[::-1])
    families.answers_like_stock(pipe, checkpoint, [qwen.turn(None, "What?")], sizes[1:])


def test_pixels_alone_do_not_tell_which_of_two_pictures_they_are(oracles, eager_once):
    checkpoint, sizes = families.case(oracles, FAMILY, "none_1").checkpoint, ((150, 60), (97, 211))
    settings = {"image_size": sizes, "max_text_tokens": 96, "max_new_tokens": 24}
    pipe = Pipeline.load(eager_once(checkpoint, method="fastv", prune_layer=2, keep_ratio=1.0, **settings))
    ids, pixels = pipe.prepare("What?", [families.noise(sizes[1])])
    told, plain = pipe.generate_tokens(ids, pixels, max_new_tokens=4), np.array(pixels)
    assert {picture.views.count for picture in pipe.manifest.pictures} == {9}

    with pytest.raises(InputError, match=r"stand for different rows; give image_sizes"):
        pipe.generate_tokens(ids, plain)
    found = pipe.generate_tokens(ids, plain, max_new_tokens=4, image_sizes=[sizes[1]])

    assert np.array_equal(found.logits, told.logits)
    assert pipe.generate_tokens(ids, plain, max_new_tokens=4, image_sizes=[sizes[0]]).logits[0] != pytest.approx(
        told.logits[0]
    )


@pytest.fixture
def changed(oracles, tmp_path):
    """A copy of the stored checkpoint whose config and processor are changed."""

    def make(config: dict[str, Any] | None = None, **processor: Any) -> Any:
        folder = shutil.copytree(families.case(oracles, FAMILY, "none_1").checkpoint, tmp_path / "m")
        for name, more in (("config.json", config or {}), ("preprocessor_config.json", processor)):
            given = json.loads((folder / name).read_text("utf-8"))
            (folder / name).write_text(json.dumps(given | more), "utf-8")
        return folder

    return make


def test_pictures_that_are_not_split_have_one_view(changed, eager_once):
    folder = changed(do_image_splitting=False)
    pipe = Pipeline.load(eager_once(folder, image_size=(150, 60), max_text_tokens=96, max_new_tokens=8))

    families.answers_like_stock(pipe, folder, families.CONVERSATIONS["text first"], [(150, 60)])

    assert pipe.manifest.pictures[0].views.count == 1
    families.sees_like_the_processor(folder, families.random_sizes(7, 15))


def test_a_lower_longest_edge_makes_fewer_tiles(changed):
    folder = changed(size={"longest_edge": 128})

    families.sees_like_the_processor(folder, families.random_sizes(8, 20))

    assert families.planned(folder, (300, 200)).views.tiles == (2, 2)


def test_idefics3_is_the_same_layout(changed, eager_once):
    folder = changed({"model_type": "idefics3"}, image_processor_type="Idefics3ImageProcessor")
    pipe = Pipeline.load(eager_once(folder, image_size=(150, 60), max_text_tokens=96, max_new_tokens=8))

    families.answers_like_stock(pipe, folder, families.CONVERSATIONS["text first"], [(150, 60)])

    assert pipe.manifest.model["family"] == "idefics3"


def test_markers_that_a_user_types_stay_text(oracles, eager_once):
    of = families.case(oracles, FAMILY, "none_1")
    pipe = Pipeline.load(families.bundle(eager_once, of))
    (picture,) = pipe.manifest.pictures
    special = {token for run in picture.runs for token in run.ids} | {picture.token_id}

    ids = pipe.encode([qwen.turn("<image> <fake_token_around_image> <row_1_col_1> <global-img>")])

    assert not {token for token in special if token != ids[-1]} & set(ids) - set(pipe.encode([qwen.turn("\n\n a")]))


@pytest.mark.parametrize("exported", both([()], {()}), indirect=True)
def test_the_legacy_lowering_says_the_same(oracles, exported):
    of = families.case(oracles, FAMILY, "fastv_1")

    families.agrees(Pipeline.load(families.bundle(exported, of, lowering="legacy")), of)


def test_pixels_and_token_counts_of_many_sizes_are_the_image_processors(oracles):
    checkpoint = families.case(oracles, FAMILY, "none_1").checkpoint

    families.sees_like_the_processor(checkpoint, [(1, 1), (64, 64), (257, 255), *families.random_sizes(9, 40)])


def test_grids_are_the_processors(oracles):
    from PIL import Image
    from transformers import AutoImageProcessor

    checkpoint = families.case(oracles, FAMILY, "none_1").checkpoint
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", local_files_only=True)
    for size in families.random_sizes(10, 200, most=900, thin=200):
        wanted = processor([Image.new("RGB", size)], return_row_col_info=True)

        found = families.planned(checkpoint, size).views.tiles

        assert found == (wanted["rows"][0][0], wanted["cols"][0][0]), size


@pytest.mark.parametrize("size", TOKENS)
def test_the_released_settings_give_the_published_tokens(size, tmp_path):
    tiles, small, large, text = TOKENS[size]
    for config, side, tokens in ((CONFIG, 512, small), (LARGE, 384, large)):
        found = families.planned(qwen.published(tmp_path, config, preprocessor(side)), size)

        assert (found.views.tiles, found.visual_tokens, found.rows("text")) == (tiles, tokens, text)


@pytest.mark.parametrize("name", TABLE)
def test_the_plan_has_the_published_counts(name, tmp_path):
    config, side, size, expected = TABLE[name]

    found = families.counts(qwen.published(tmp_path, config, preprocessor(side)), size)

    for column, value in zip(("encoder", "connector", "prefill", "fastv"), expected[:-1], strict=True):
        assert found[column] == pytest.approx(value, rel=1e-4, abs=0.06), column
    assert found["parameters"] == expected[-1]


def test_check_passes_and_finds_a_missing_last_norm(oracles, tmp_path, eager_once):
    from lvlm_edge.exporter.graphs import encoders
    from lvlm_edge.exporter.proof import parity
    from tests import eager

    of = families.case(oracles, FAMILY, "fastv_1")
    right = encoders._Encoder.forward

    def without(self: Any, pixels: Any) -> Any:
        norm, self.post_layernorm = self.post_layernorm, None
        try:
            return right(self, pixels)
        finally:
            self.post_layernorm = norm

    options = {"method": "fastv", "prune_layer": 2, "image_size": (90, 60), "max_text_tokens": 96, "max_new_tokens": 8}
    bad = eager.export(
        of.checkpoint,
        tmp_path / "bad",
        mistake=lambda patch: patch.setattr(encoders._Encoder, "forward", without),
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
    with pytest.raises(InputError, match=rf"300x60 goes on tiles of 1x4, the bundle has {rows}x{columns}"):
        pipe.prepare("What?", [families.noise((300, 60))])

    _, pixels = pipe.prepare("What?", [families.noise((300, 60))], fit=True)

    assert pixels.shape == (rows * columns + 1, 3, 64, 64)


def test_boxes_share_out_the_picture(tmp_path):
    picture = families.planned(qwen.published(tmp_path, CONFIG, preprocessor(512)), (640, 480))

    found = views.boxes((640, 480), picture.views, [(8, 8)] * 13)

    assert np.allclose(found[0][0], [0, 0, 20, 20])
    assert np.allclose(found[11][-1], [620, 460, 640, 480])
    assert np.allclose(found[12][0], [0, 0, 80, 60])  # of the whole picture, the last view


def test_tables_that_rounding_moves_are_told_from_plain_ones():
    from transformers import SmolVLMVisionConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

    plain = set()
    for grid in range(2, 50):
        stock = SmolVLMVisionEmbeddings(SmolVLMVisionConfig(hidden_size=1, image_size=2 * grid, patch_size=2))
        with torch.no_grad():
            stock.patch_embedding.weight.zero_()
            stock.patch_embedding.bias.zero_()
            stock.position_embedding.weight.copy_(torch.arange(grid**2)[:, None])
            rows = stock(torch.zeros(1, 3, 2 * grid, 2 * grid), torch.ones(1, grid, grid, dtype=torch.bool))
        plain |= {grid} if rows.flatten().tolist() == list(range(grid**2)) else set()

    assert {grid for grid in range(2, 50) if smolvlm.has_plain_table(grid)} == plain
    assert {8, 16, *smolvlm.RELEASED} <= plain != set(range(2, 50))


def test_missing_fields_mean_what_transformers_takes():
    from transformers import SmolVLMConfig
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    stock, tower = SmolVLMConfig(), SmolVLMConfig().vision_config.to_dict()

    for key in ("image_token_id", "scale_factor", "tie_word_embeddings"):
        assert smolvlm.DEFAULTS[key] == getattr(stock, key)
    assert stock.text_config.rms_norm_eps == smolvlm.DEFAULTS["text_config"]["rms_norm_eps"]
    assert {key: tower[key] for key in smolvlm.ENCODER} == smolvlm.ENCODER
    own = smolvlm.PROCESSORS["SmolVLMImageProcessor"]
    for key in ("size", "max_image_size", "resample", "do_image_splitting"):
        assert own[key] == getattr(SmolVLMImageProcessorPil, key)


@pytest.mark.parametrize(
    ("config", "processor", "error", "message"),
    [
        ({"vision_config": {"model_type": "clip_vision_model"}}, {}, UnsupportedError, "expected smolvlm_vision"),
        ({"vision_config": {**CONFIG["vision_config"], "patch_size": 17}}, {}, CheckpointError, "by scale_factor"),
        ({"text_config": {"model_type": "mamba"}}, {}, UnsupportedError, "model_type is 'mamba'"),
        ({}, {"max_image_size": {"longest_edge": 364}}, CheckpointError, "config.json says 512 pixels"),
        ({}, {"size": {"longest_edge": 0}}, CheckpointError, "expected a longest_edge of 1..4096"),
        ({}, {"size": {"height": 512, "width": 512}}, CheckpointError, "expected a longest_edge"),
    ],
)
def test_what_the_graphs_do_not_have_is_refused(config, processor, error, message, tmp_path):
    with pytest.raises(error, match=message):
        plan(qwen.published(tmp_path, CONFIG | config, preprocessor(512, **processor)), image_size=(672, 672))


def test_a_size_or_a_grid_is_needed(tmp_path):
    folder = qwen.published(tmp_path, CONFIG, preprocessor(512))
    with pytest.raises(UsageError, match="give --image-size WxH, or --grid RxC"):
        plan(folder)
    with pytest.raises(UsageError, match="--grid is 2x3, but the longer side of pictures has 4 tiles"):
        plan(folder, grid=(2, 3))
    assert plan(folder, grid=(3, 4))["visual_tokens"] == 13 * 64

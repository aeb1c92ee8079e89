"""Qwen2.5-VL against stock transformers: windows, a gated MLP, and everything that the line shares."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from lvlm_edge.exporter.families import qwen2_5_vl
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.backends.cuda import highest
from lvlm_edge.runtime.bundle import load_manifest
from tests import qwen
from tests.cases import both

FAMILY = "qwen2_5_vl"
CONFIG: dict[str, Any] = {  # Qwen2.5-VL-3B-Instruct, flat as it was released
    "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], "image_token_id": 151655,
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "max_position_embeddings": 128000, "tie_word_embeddings": True, "use_sliding_window": False,
    "sliding_window": 32768, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
                      "num_heads": 16, "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14,
                      "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
                      "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2},
}  # fmt: skip
LARGE = CONFIG | {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    "vision_config": CONFIG["vision_config"] | {"out_hidden_size": 3584},
}  # fmt: skip
PREPROCESSOR: dict[str, Any] = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}  # fmt: skip
TABLE = {  # from the published dimensions, computed by building stock models without weights
    "3B 672x672": (CONFIG, (672, 672), (576, 3036.2, 42.28, 3672.8, 2130.6, 22.5, 3_754_622_976)),
    "3B 1280x720": (CONFIG, (1280, 720), (1196, 6544.7, 87.79, 7460.6, 4108.1, 44.3, 3_754_622_976)),
    "7B 672x672": (LARGE, (672, 672), (576, 3036.2, 51.34, 8517.9, 5059.6, 35.0, 8_292_166_656)),
    "7B 1280x720": (LARGE, (1280, 720), (1196, 6544.7, 106.60, 17082.1, 9702.1, 68.9, 8_292_166_656)),
}


@pytest.mark.parametrize(("name", "exported"), both([("none_1",), ("fastv_1",)], {("fastv_1",)}), indirect=["exported"])
@pytest.mark.claims("equal", family=FAMILY)
def test_the_answers_are_those_of_stock_transformers(oracles, exported, name):
    of = qwen.case(oracles, FAMILY, name)

    qwen.agrees(Pipeline.load(qwen.bundle(exported, of)), of)


@pytest.mark.parametrize("conversation", qwen.CONVERSATIONS)
def test_conversations_are_answered_like_stock_transformers(oracles, exported, conversation):
    of = qwen.case(oracles, FAMILY, "none_1")
    pipe = Pipeline.load(qwen.bundle(exported, of))

    qwen.answers_like_stock(pipe, of.checkpoint, qwen.CONVERSATIONS[conversation], tuple(of.data["picture_sizes"][0]))


def test_windows_of_every_size_are_cut_like_stock_transformers(oracles, exported):
    of = qwen.case(oracles, FAMILY, "none_1")
    size = (150, 260)  # 5 x 9 visual tokens: inner windows of 4 x 4, both edges, and the corner
    pipe = Pipeline.load(exported(of.checkpoint, image_size=size, max_text_tokens=96, max_new_tokens=24))

    qwen.answers_like_stock(pipe, of.checkpoint, qwen.CONVERSATIONS["text first"], size)


@pytest.mark.parametrize(
    ("grid", "groups"),
    [
        ((24, 24), ((36, 16),)),
        ((26, 46), ((66, 16), (6, 8), (11, 8), (1, 4))),
        ((3, 2), ((1, 6),)),
    ],
)
def test_windows_tile_the_grid(grid, groups):
    found = qwen2_5_vl.windows(grid, side=4)

    assert sorted(found.order) == list(range(grid[0] * grid[1]))
    assert found.groups == groups


def test_the_legacy_lowering_says_the_same(oracles, exported):
    of = qwen.case(oracles, FAMILY, "fastv_1")

    qwen.agrees(Pipeline.load(qwen.bundle(exported, of, lowering="legacy")), of)


def test_tensorrt_rtx_builds_it_in_float16_with_the_encoder_in_bfloat16(oracles, export_once, tmp_path):
    from lvlm_edge.exporter.devices import engine

    of = qwen.case(oracles, FAMILY, "fastv_1")
    options = {"method": "fastv", "prune_layer": 2, "image_size": (150, 260), "ort": False}
    made = export_once(of.checkpoint, dtype="float16", vision_dtype="bfloat16", **options)
    shutil.copytree(made, tmp_path / "bundle")

    out = engine.build(tmp_path / "bundle", engine.Settings(backend="trt-rtx", compute_capabilities=("8.9",)))

    built = json.loads((out / engine.ENGINES).read_text("utf-8"))["engines"]
    assert set(built) == {graph.file for graph in load_manifest(made).graphs} | {highest.FILE}


@pytest.mark.parametrize("name", TABLE)
def test_the_plan_has_the_published_counts(name, tmp_path):
    config, size, expected = TABLE[name]

    found = qwen.counts(qwen.published(tmp_path, config, PREPROCESSOR), size)

    qwen.are(found, expected)


def test_token_counts_are_those_of_the_image_processor(tmp_path):
    qwen.counts_tokens_like_the_processor(qwen.published(tmp_path, CONFIG, PREPROCESSOR), 28, (3136, 12845056))


@pytest.mark.parametrize("part", ["DECODER", "ENCODER"])
def test_missing_fields_mean_what_transformers_takes(part):
    from transformers import Qwen2_5_VLConfig

    whole = Qwen2_5_VLConfig()
    stock = (whole.text_config if part == "DECODER" else whole.vision_config).to_dict()
    own = {k: v for k, v in getattr(qwen2_5_vl, part).items() if k not in qwen.ELSEWHERE}

    assert {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()} == {
        k: list(stock[k]) if isinstance(stock[k], tuple) else stock[k] for k in own
    }

"""Qwen3-VL against stock transformers: the interpolated table, DeepStack, and everything that the line shares."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from lvlm_edge.exporter.families import qwen3_vl
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.backends.cuda import highest
from lvlm_edge.runtime.bundle import load_manifest
from tests import qwen
from tests.cases import both

FAMILY = "qwen3_vl"
CONFIG: dict[str, Any] = {  # Qwen3-VL-4B-Instruct, nested as it was released
    "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "rms_norm_eps": 1e-6, "rope_theta": 5e6, "hidden_act": "silu", "max_position_embeddings": 262144,
        "attention_bias": False, "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    },
    "vision_config": {
        "model_type": "qwen3_vl", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
        "out_hidden_size": 2560, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "in_channels": 3,
        "num_position_embeddings": 2304, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}  # fmt: skip


def sized(text: dict[str, Any], vision: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    text = CONFIG["text_config"] | text | {"tie_word_embeddings": tied}
    return CONFIG | {
        "text_config": text,
        "vision_config": CONFIG["vision_config"] | vision,
        "tie_word_embeddings": tied,
    }


SMALL = sized(
    {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    {"out_hidden_size": 2048},
    tied=True,
)
LARGE = sized(
    {"hidden_size": 4096, "intermediate_size": 12288},
    {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096}
    | {"deepstack_visual_indexes": [8, 16, 24]},
    tied=False,
)
PREPROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
}  # fmt: skip
TABLE = {  # from the published dimensions, computed by building stock models without weights
    "2B 672x672": (SMALL, (672, 672), (441, 1374.1, 88.79, 1482.5, 890.6, 55.2, 2_127_532_032)),
    "2B 1280x720": (SMALL, (1280, 720), (880, 3349.6, 177.17, 2865.8, 1628.0, 103.2, 2_127_532_032)),
    "4B 672x672": (CONFIG, (672, 672), (441, 1374.1, 96.18, 3820.8, 2254.5, 71.0, 4_437_815_808)),
    "4B 1280x720": (CONFIG, (1280, 720), (880, 3349.6, 191.93, 7386.1, 4110.8, 132.8, 4_437_815_808)),
    "8B 672x672": (LARGE, (672, 672), (441, 1840.5, 141.50, 7166.9, 4258.4, 71.0, 8_767_123_696)),
    "8B 1280x720": (LARGE, (1280, 720), (880, 4441.7, 282.36, 13640.5, 7693.1, 132.8, 8_767_123_696)),
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


@pytest.mark.parametrize("prune_layer", [1, 2])
def test_fastv_below_the_last_deepstack_layer_gathers_what_is_injected(oracles, exported, prune_layer):
    """A slow, plain FastV over stock layers says the same tokens and keeps the same set."""
    of = qwen.case(oracles, FAMILY, "none_1")
    size = tuple(of.data["picture_sizes"][0])
    options = {"method": "fastv", "prune_layer": prune_layer, "keep_ratio": 0.4}
    pipe = Pipeline.load(exported(of.checkpoint, image_size=size, max_text_tokens=96, max_new_tokens=24, **options))
    ids, pixels = pipe.prepare("What is it?", [qwen.noise(size)])

    answer = pipe.generate_tokens(ids, pixels, max_new_tokens=4, ignore_eos=True)

    kept, tokens = pruned(of.checkpoint, ids, pixels, prune_layer, 0.4, 4)
    assert answer.kept_visual.tolist() == kept
    assert answer.token_ids == tokens


@torch.no_grad()
def pruned(folder: Any, ids: list[int], pixels: Any, k: int, ratio: float, steps: int) -> tuple[list[int], list[int]]:
    """The kept visual tokens and greedy tokens of FastV on stock layers, every step anew over all rows."""
    model = qwen.stock(folder)
    text, image = model.model.language_model, model.config.image_token_id
    patch = model.config.vision_config.patch_size
    grid = torch.tensor([(1, pixels.shape[2] // patch, pixels.shape[3] // patch)])
    count = int(grid.prod()) // 4
    whole = torch.tensor([[t for i in ids for t in ([i] * count if i == image else [i])]])
    seen = model.model.get_image_features(torch.from_numpy(qwen.patches(pixels[0], patch)), grid)
    positions, delta = model.model.get_rope_index(whole, (whole == image).int(), grid)
    kept: list[int] = []
    tokens: list[int] = []
    weights = torch.zeros(0)
    for _ in range(steps):
        rows = torch.cat([whole, torch.tensor([tokens], dtype=torch.int64)], 1)
        later = torch.arange(len(tokens)) + whole.shape[1] + int(delta)
        at = torch.cat([positions, later.expand(3, 1, -1)], 2)
        visual = rows[0] == image
        x = text.embed_tokens(rows)
        x[0, visual] = torch.cat(list(seen.pooler_output))
        added = []
        for features in seen.deepstack_features:
            spread = torch.zeros_like(x)
            spread[0, visual] = torch.cat(list(features))
            added.append(spread)
        for i, layer in enumerate(text.layers):
            if i == k:
                if not kept:
                    score = weights[0, :, whole.shape[1] - 1].mean(0)[visual]
                    kept = sorted(score.argsort(descending=True)[: round(count * ratio)].tolist())
                stays = ~visual
                stays[visual.nonzero()[kept, 0]] = True
                x, at, added = x[:, stays], at[..., stays], [spread[:, stays] for spread in added]
            n = x.shape[1]
            mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
            rope = text.rotary_emb(x, at)
            found: list[Any] = []
            handle = layer.self_attn.register_forward_hook(lambda _, i, o, found=found: found.append(o[1]))
            x = layer(x, attention_mask=mask, position_embeddings=rope)
            handle.remove()
            weights = found[0]
            if i < len(added):
                x = x + added[i]
        tokens.append(int(model.lm_head(text.norm(x[:, -1])).argmax()))
    return kept, tokens


def test_the_legacy_lowering_says_the_same(oracles, exported):
    of = qwen.case(oracles, FAMILY, "fastv_1")

    qwen.agrees(Pipeline.load(qwen.bundle(exported, of, lowering="legacy")), of)


def test_tensorrt_rtx_builds_it_in_float16_with_the_encoder_in_bfloat16(oracles, export_once, tmp_path):
    from lvlm_edge.exporter.devices import engine

    of = qwen.case(oracles, FAMILY, "fastv_1")
    options = {"method": "fastv", "prune_layer": 1, "image_size": (150, 120), "ort": False}
    made = export_once(of.checkpoint, dtype="float16", vision_dtype="bfloat16", **options)
    shutil.copytree(made, tmp_path / "bundle")

    out = engine.build(tmp_path / "bundle", engine.Settings(backend="trt-rtx", compute_capabilities=("8.9",)))

    built = json.loads((out / engine.ENGINES).read_text("utf-8"))["engines"]
    assert set(built) == {graph.file for graph in load_manifest(made).graphs} | {highest.FILE}


def test_the_table_is_interpolated_with_aligned_corners():
    class Table:
        def read(self) -> torch.Tensor:
            return torch.from_numpy(np.arange(9, dtype=np.float32))[:, None]

    found = qwen3_vl.interpolated(Table(), 3, (1, 2))[:, 0]  # 2 x 4 patches over 3 x 3 numbers

    expected = [[0, 2 / 3, 4 / 3, 2], [6, 6 + 2 / 3, 6 + 4 / 3, 8]]
    in_merge_order = [expected[r][2 * c + j] for c in (0, 1) for r in (0, 1) for j in (0, 1)]
    assert found.tolist() == pytest.approx(in_merge_order, abs=1e-6)


@pytest.mark.parametrize("name", TABLE)
def test_the_plan_has_the_published_counts(name, tmp_path):
    config, size, expected = TABLE[name]

    found = qwen.counts(qwen.published(tmp_path, config, PREPROCESSOR), size)

    qwen.are(found, expected)


def test_token_counts_are_those_of_the_image_processor(tmp_path):
    qwen.counts_tokens_like_the_processor(qwen.published(tmp_path, CONFIG, PREPROCESSOR), 32, (65536, 16777216))


@pytest.mark.parametrize("part", ["DECODER", "ENCODER"])
def test_missing_fields_mean_what_transformers_takes(part):
    from transformers import Qwen3VLConfig

    whole = Qwen3VLConfig()
    stock = (whole.text_config if part == "DECODER" else whole.vision_config).to_dict()
    own = {k: v for k, v in getattr(qwen3_vl, part).items() if k not in qwen.ELSEWHERE or k == "head_dim"}

    assert {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()} == {
        k: list(stock[k]) if isinstance(stock[k], tuple) else stock[k] for k in own
    }

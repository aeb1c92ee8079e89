"""Qwen2-VL against stock transformers, and what the Qwen-VL line refuses."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest

from lvlm_edge.exporter import families, plan
from lvlm_edge.exporter.bundles import ratios
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.families import qwen2_vl
from lvlm_edge.runtime import InputError, Pipeline
from lvlm_edge.runtime.backends.cuda import highest
from lvlm_edge.runtime.bundle import load_manifest
from lvlm_edge.runtime.errors import UnsupportedError, UsageError
from tests import eager, qwen, tiny
from tests.cases import both

FAMILY = "qwen2_vl"
CONFIG: dict[str, Any] = {  # Qwen2-VL-2B-Instruct, flat as it was released
    "model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"], "image_token_id": 151655,
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "max_position_embeddings": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
    "sliding_window": 32768, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 1536,
                      "patch_size": 14, "in_chans": 3, "spatial_patch_size": 14},
}  # fmt: skip
LARGE = CONFIG | {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "tie_word_embeddings": False,
    "vision_config": CONFIG["vision_config"] | {"hidden_size": 3584},
}  # fmt: skip
PREPROCESSOR: dict[str, Any] = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}  # fmt: skip
TABLE = {  # from the published dimensions, computed by building stock models without weights
    "2B 672x672": (CONFIG, (672, 672), (576, 3772.3, 39.26, 1748.0, 1030.3, 17.5, 2_208_985_600)),
    "2B 1280x720": (CONFIG, (1280, 720), (1196, 9776.6, 81.52, 3575.3, 1999.6, 34.5, 2_208_985_600)),
    "7B 672x672": (LARGE, (672, 672), (576, 3772.3, 51.34, 8517.9, 5059.6, 35.0, 8_291_375_616)),
    "7B 1280x720": (LARGE, (1280, 720), (1196, 9776.6, 106.60, 17082.1, 9702.1, 68.9, 8_291_375_616)),
}


@pytest.mark.parametrize(("name", "exported"), both([("none_1",), ("fastv_1",)], ()), indirect=["exported"])
@pytest.mark.claims("equal", family=FAMILY)
def test_the_answers_are_those_of_stock_transformers(oracles, exported, name):
    of = qwen.case(oracles, FAMILY, name)

    qwen.agrees(Pipeline.load(qwen.bundle(exported, of)), of)


@pytest.mark.parametrize("conversation", qwen.CONVERSATIONS)
def test_conversations_are_answered_like_stock_transformers(oracles, exported, conversation):
    of = qwen.case(oracles, FAMILY, "none_1")
    pipe = Pipeline.load(qwen.bundle(exported, of))

    qwen.answers_like_stock(pipe, of.checkpoint, qwen.CONVERSATIONS[conversation], tuple(of.data["picture_sizes"][0]))


def test_fastv_prunes_nothing_of_a_prompt_without_pictures(oracles, exported):
    of = qwen.case(oracles, FAMILY, "fastv_1")
    pipe = Pipeline.load(qwen.bundle(exported, of))

    qwen.answers_like_stock(pipe, of.checkpoint, qwen.CONVERSATIONS["text only"], (300, 180))


def test_pictures_of_two_sizes_and_fewer_than_planned(oracles, exported):
    checkpoint = qwen.case(oracles, FAMILY, "none_1").checkpoint
    sizes = ((150, 120), (97, 211))
    pipe = Pipeline.load(exported(checkpoint, image_size=sizes, max_text_tokens=96, max_new_tokens=24))
    both = [qwen.turn(None, "and", None, "differ how?")]
    ids, pixels = pipe.prepare(messages=both, images=[qwen.noise(size) for size in sizes])

    answer = pipe.generate_tokens(ids, pixels, max_new_tokens=8, ignore_eos=True)

    assert isinstance(pixels, list)
    assert answer.token_ids == qwen.generate(checkpoint, ids, pixels, 8)[0]
    qwen.answers_like_stock(pipe, checkpoint, qwen.CONVERSATIONS["system"], sizes[1])


@pytest.mark.parametrize("exported", both([()], {()}), indirect=True)
def test_the_legacy_lowering_says_the_same(oracles, exported):
    of = qwen.case(oracles, FAMILY, "fastv_1")

    qwen.agrees(Pipeline.load(qwen.bundle(exported, of, lowering="legacy")), of)


BUILT: dict[str, dict[str, Any]] = {
    "none": {},
    "fastv": {"prune_layer": 2},
    "yopo": {"cutoff": 4, "head_mask": ("111111", "111100", "000100", "011011", "111111")},
    "yopo, dropped": {
        "cutoff": 4,
        "semantics": "dropped",
        "head_mask": ("111111", "111100", "000100", "011011", "111111"),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("method", BUILT)
def test_tensorrt_rtx_builds_it_in_float16_with_an_encoder_of_its_own_precision(oracles, export_once, method, tmp_path):
    from lvlm_edge.exporter.devices import engine

    of = qwen.case(oracles, FAMILY, "fastv_1")
    wide = "bfloat16" if method == "none" else "float32"
    options = {"method": method.partition(",")[0], "dtype": "float16", "vision_dtype": wide, "image_size": (150, 120)}
    made = export_once(of.checkpoint, ort=False, **options, **BUILT[method])
    shutil.copytree(made, tmp_path / "bundle")

    out = engine.build(tmp_path / "bundle", engine.Settings(backend="trt-rtx", compute_capabilities=("8.9",)))

    built = json.loads((out / engine.ENGINES).read_text("utf-8"))["engines"]
    assert set(built) == {graph.file for graph in load_manifest(made).graphs} | {highest.FILE}
    assert all((out / entry["file"]).stat().st_size == entry["size"] for entry in built.values())


@pytest.mark.parametrize("name", TABLE)
def test_the_plan_has_the_published_counts(name, tmp_path):
    config, size, expected = TABLE[name]

    found = qwen.counts(qwen.published(tmp_path, config, PREPROCESSOR), size)

    qwen.are(found, expected)


def test_token_counts_are_those_of_the_image_processor(tmp_path):
    qwen.counts_tokens_like_the_processor(qwen.published(tmp_path, CONFIG, PREPROCESSOR), 28, (3136, 12845056))


def test_nested_and_flat_configs_are_one(tmp_path):
    decoder = {key: value for key, value in CONFIG.items() if key not in ("vision_config", "image_token_id")}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    nested = {
        "model_type": "qwen2_vl", "image_token_id": 151655, "vision_config": CONFIG["vision_config"],
        "hidden_size": 7, "rope_scaling": {"type": "default", "rope_type": "default"},
        "text_config": {**decoder, "model_type": "qwen2_vl_text", "rope_scaling": None, "rope_parameters": rope},
    }  # fmt: skip

    one, other = (
        families.read(Checkpoint.open(qwen.published(tmp_path, config, PREPROCESSOR))) for config in (CONFIG, nested)
    )

    assert one == other
    assert one.decoder.rope == other.decoder.rope


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("visual.blocks.3.attn.qkv.bias", "vision.blocks.3.qkv.bias"),
        ("model.visual.merger.mlp.2.weight", "projector.linear_2.weight"),
        ("model.layers.0.self_attn.q_proj.bias", "layers.0.q_proj.bias"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "layers.0.up_proj.weight"),
        ("model.embed_tokens.weight", "embed.weight"),
        ("model.language_model.norm.weight", "norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_of_both_layouts_are_known(key, name):
    assert qwen2_vl.FAMILY.rename(key) == name


@pytest.mark.parametrize("part", ["DECODER", "ENCODER"])
def test_missing_fields_mean_what_transformers_takes(part):
    from transformers import Qwen2VLConfig

    whole = Qwen2VLConfig()
    stock = (whole.text_config if part == "DECODER" else whole.vision_config).to_dict()
    own = {key: value for key, value in getattr(qwen2_vl, part).items() if key not in qwen.ELSEWHERE}

    assert own == {name: stock[name] for name in own}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, UnsupportedError, "rope_type is 'yarn'"),
        (
            {"use_sliding_window": True, "max_window_layers": 27, "sliding_window": 700},
            UnsupportedError,
            "window of 700",
        ),
        ({"layer_types": ["chunked_attention"] * 28}, UnsupportedError, "layer_types has 'chunked_attention'"),
        (
            {"vision_config": {**CONFIG["vision_config"], "spatial_merge_size": 3}},
            UnsupportedError,
            "spatial_merge_size",
        ),
    ],
)
def test_what_the_graphs_do_not_have_is_refused(changed, error, message, tmp_path):
    with pytest.raises(error, match=message):
        plan(qwen.published(tmp_path, CONFIG | changed, PREPROCESSOR), image_size=(672, 672))


def test_a_size_is_needed_and_has_limits(tmp_path):
    folder = qwen.published(tmp_path, CONFIG, PREPROCESSOR)
    with pytest.raises(UsageError, match="give --image-size WxH"):
        plan(folder)
    with pytest.raises(UsageError, match="one side more than 200 times the other"):
        plan(folder, image_size=(2010, 10))
    assert tiny.refused(2, "plan", folder).endswith("give --image-size WxH")


def test_a_picture_of_another_grid_is_refused_or_fitted(oracles, eager_once):
    of = qwen.case(oracles, FAMILY, "none_1")
    pipe = Pipeline.load(qwen.bundle(eager_once, of))
    other = qwen.noise((300, 180))
    with pytest.raises(InputError, match=r"300x180 is resized to 308x168, the bundle is for 84x224; .*--fit"):
        pipe.prepare("What?", [other])

    ids, pixels = pipe.prepare("What?", [other], fit=True)

    assert pixels.shape == (1, 3, 224, 84)
    assert np.isfinite(pipe.generate_tokens(ids, pixels, max_new_tokens=1).logits).all()


def test_run_fits_a_picture_only_when_asked(oracles, eager_once, tmp_path):
    made = qwen.bundle(eager_once, qwen.case(oracles, FAMILY, "none_1"))
    picture = tiny.picture(tmp_path / "picture.png", (300, 180))
    ask = ("run", made, "--image", picture, "--prompt", "What?", "--max-new-tokens", "2")

    assert "300x180 is resized to 308x168, the bundle is for 84x224" in tiny.refused(2, *ask)
    assert tiny.cli(*ask, "--fit").exit_code == 0


@pytest.mark.slow
def test_a_keep_ratio_added_later_gives_the_graphs_of_an_export_with_it(oracles, export_once, tmp_path):
    of = qwen.case(oracles, FAMILY, "fastv_1")
    wanted = Pipeline.load(qwen.bundle(export_once, of))
    other = shutil.copytree(qwen.bundle(export_once, of, keep_ratio=0.25), tmp_path / "bundle")

    ratios.add(other, of.data["keep_ratio"])

    pipe = Pipeline.load(other, keep_ratio=of.data["keep_ratio"])
    assert pipe.manifest.method_config == wanted.manifest.method_config
    qwen.agrees(pipe, of)


def test_check_passes_and_finds_rows_and_columns_exchanged(oracles, export_once, tmp_path):
    from lvlm_edge.exporter.graphs import rotary
    from lvlm_edge.exporter.proof import parity

    of = qwen.case(oracles, FAMILY, "fastv_1")
    good = qwen.bundle(export_once, of)
    right = rotary.sections
    assert parity.check(good, of.checkpoint, steps=4, store=False).passed

    def exchanged(patch):
        patch.setattr(rotary, "sections", lambda d: [right(d)[i] for i in (0, 2, 1)])

    options = {"method": "fastv", "prune_layer": 2, "image_size": (300, 180), "max_text_tokens": 96}
    bad = eager.export(of.checkpoint, tmp_path / "bad", max_new_tokens=24, mistake=exchanged, **options)

    with eager.running():
        verdict = parity.check(bad, of.checkpoint, steps=4, store=False)
    assert not verdict.passed
    assert verdict.first_failure.stage == "head"

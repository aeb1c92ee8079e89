"""Dimensions of published checkpoints, as their config.json has them, and folders with nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lvlm_edge.exporter.families import internvl_chat, llava_next, llava_onevision, qwen

CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
CLIP |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
SIGLIP = llava_onevision.DEFAULTS["vision_config"]


def text(
    kind: str, hidden: int, ffn: int, layers: int, heads: tuple[int, int], vocab: int, **more: Any
) -> dict[str, Any]:
    """Fields of a decoder.

    Args:
        heads: query heads and KV heads.
    """
    found = {"model_type": kind, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    found |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "vocab_size": vocab}
    return found | {"max_position_embeddings": 32768, "rope_theta": 1e6, "hidden_act": "silu"} | more


VICUNA_7B = text("llama", 4096, 11008, 32, (32, 32), 32064, max_position_embeddings=4096)
VICUNA_13B = text("llama", 5120, 13824, 40, (40, 40), 32064, max_position_embeddings=4096)


def llava(spoken: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "llava", "image_token_index": 32000, "vision_config": CLIP, "text_config": spoken}


def following(spoken: dict[str, Any], image: int = 32000) -> dict[str, Any]:
    """LLaVA-NeXT."""
    return {**llava(spoken), "model_type": "llava_next", "image_token_index": image}


def onevision(spoken: dict[str, Any], *, tied: bool = False) -> dict[str, Any]:
    found = {"model_type": "llava_onevision", "image_token_index": 151646, "tie_word_embeddings": tied}
    return {**found, "text_config": spoken}


def intern(spoken: dict[str, Any], token: int) -> dict[str, Any]:
    seen = {"model_type": "internvl_vision", "attention_bias": True}
    return {"model_type": "internvl", "image_token_id": token, "text_config": spoken, "vision_config": seen}


def smol(spoken: dict[str, Any], merge: int, seen: dict[str, Any]) -> dict[str, Any]:
    found = {"model_type": "idefics3", "image_token_id": 49153, "scale_factor": merge}
    return {**found, "text_config": spoken, "vision_config": seen}


def qwen2_vl(kind: str, spoken: dict[str, Any], *, tied: bool, **seen: Any) -> dict[str, Any]:
    """Qwen2-VL and Qwen2.5-VL, flat as they were released."""
    flat = {key: value for key, value in spoken.items() if key != "model_type"}
    scaling = {"type": "mrope", "mrope_section": [16, 24, 24]}
    rest = {"image_token_id": 151655, "tie_word_embeddings": tied, "rope_scaling": scaling, "rms_norm_eps": 1e-6}
    return {**flat, **rest, "model_type": kind, "vision_config": seen}


def qwen3_vl(spoken: dict[str, Any], *, tied: bool, **seen: Any) -> dict[str, Any]:
    scaling = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    own = {**spoken, "rope_scaling": scaling, "rms_norm_eps": 1e-6, "head_dim": 128, "tie_word_embeddings": tied}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
    vision |= {"deepstack_visual_indexes": [5, 11, 17], "out_hidden_size": own["hidden_size"]} | seen
    found = {"model_type": "qwen3_vl", "image_token_id": 151655, "tie_word_embeddings": tied}
    return {**found, "text_config": own | {"model_type": "qwen3_vl_text"}, "vision_config": vision}


QWEN2_7B = (3584, 18944, 28, (28, 4))
SMALL_SIGLIP = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 512, "patch_size": 16}
LARGE_SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
LARGE_SIGLIP |= {"image_size": 384, "patch_size": 14}
WINDOWED = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
SMOL = {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 1e5}

# By name: config.json, and the parameters that stock models of these dimensions have.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "LLaVA-1.5-7B": (llava(VICUNA_7B), 7_063_427_072),
    "LLaVA-1.5-13B": (llava(VICUNA_13B), 13_351_494_656),
    "LLaVA-1.6-Vicuna-7B": (following(VICUNA_7B), 7_063_431_168),
    "LLaVA-1.6-Vicuna-13B": (following(VICUNA_13B), 13_351_499_776),
    "LLaVA-1.6-Mistral-7B": (
        following(text("mistral", 4096, 14336, 32, (32, 8), 32064, sliding_window=None)),
        7_566_747_648,
    ),
    "LLaVA-1.6-Llama3-8B": (
        following(text("llama", 4096, 14336, 32, (32, 8), 128320, max_position_embeddings=8192), 128256),
        8_355_276_800,
    ),
    "OneVision-0.5B": (onevision(text("qwen2", 896, 4864, 24, (14, 2), 152000), tied=True), 893_675_552),
    "OneVision-7B": (onevision(text("qwen2", *QWEN2_7B, 152128)), 8_030_807_584),
    "InternVL3-1B": (intern(text("qwen2", 896, 4864, 24, (14, 2), 151674), 151667), 938_193_024),
    "InternVL3-2B": (intern(text("qwen2", 1536, 8960, 28, (12, 2), 151674), 151667), 2_088_957_440),
    "InternVL3-8B": (intern(text("qwen2", *QWEN2_7B, 151674), 151667), 7_944_373_760),
    "InternVL3.5-1B": (intern(text("qwen3", 1024, 3072, 28, (16, 8), 151936, head_dim=128), 151671), 1_060_897_792),
    "InternVL3.5-4B": (intern(text("qwen3", 2560, 9728, 36, (32, 8), 151936, head_dim=128), 151671), 4_732_489_216),
    "SmolVLM-256M": (smol(text("llama", 576, 1536, 30, (9, 3), 49280, **SMOL), 4, SMALL_SIGLIP), 256_484_928),
    "SmolVLM-500M": (smol(text("llama", 960, 2560, 32, (15, 5), 49280, **SMOL), 4, SMALL_SIGLIP), 507_482_304),
    "SmolVLM-2.2B": (
        smol(text("llama", 2048, 8192, 24, (32, 32), 49155, **SMOL), 3, LARGE_SIGLIP),
        2_246_272_880,
    ),
    "Qwen2-VL-2B": (
        qwen2_vl("qwen2_vl", text("", 1536, 8960, 28, (12, 2), 151936), tied=True, hidden_size=1536),
        2_208_985_600,
    ),
    "Qwen2-VL-7B": (
        qwen2_vl("qwen2_vl", text("", *QWEN2_7B, 152064), tied=False, hidden_size=3584),
        8_291_375_616,
    ),
    "Qwen2.5-VL-3B": (
        qwen2_vl("qwen2_5_vl", text("", 2048, 11008, 36, (16, 2), 151936), tied=True, out_hidden_size=2048, **WINDOWED),
        3_754_622_976,
    ),
    "Qwen2.5-VL-7B": (
        qwen2_vl("qwen2_5_vl", text("", *QWEN2_7B, 152064), tied=False, out_hidden_size=3584, **WINDOWED),
        8_292_166_656,
    ),
    "Qwen3-VL-2B": (qwen3_vl(text("", 2048, 6144, 28, (16, 8), 151936), tied=True), 2_127_532_032),
    "Qwen3-VL-4B": (qwen3_vl(text("", 2560, 9728, 36, (32, 8), 151936), tied=True), 4_437_815_808),
    "Qwen3-VL-8B": (
        qwen3_vl(
            text("", 4096, 12288, 36, (32, 8), 151936), tied=False, depth=27, hidden_size=1152,
            intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24],
        ),
        8_767_123_696,
    ),
    "InternVL2-8B": (
        {
            "model_type": "internvl_chat", "force_image_size": 448, "ps_version": "v2", "template": "internlm2-chat",
            "dynamic_image_size": True, "max_dynamic_patch": 12, "use_thumbnail": True,
            "vision_config": internvl_chat.ENCODER
            | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
            | {"image_size": 448, "qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"},
            "llm_config": text("", 4096, 14336, 32, (32, 8), 92553)
            | {"architectures": ["InternLM2ForCausalLM"], "bias": False},
        },
        8_075_365_376,
    ),
    "Qwen-VL-Chat": (
        {
            **qwen.DEFAULTS, "model_type": "qwen",
            "visual": {
                "width": 1664, "layers": 48, "heads": 16, "mlp_ratio": 4.9231, "patch_size": 14, "image_size": 448,
                "output_dim": 4096,
            },
        },
        9_656_935_168,
    ),
}  # fmt: skip
PROCESSORS: dict[str, dict[str, Any]] = {
    "llava": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "crop_size": 336},
    "llava_next": {
        "image_processor_type": "LlavaNextImageProcessor", "crop_size": 336,
        "image_grid_pinpoints": llava_next.PINPOINTS,
    },
    "llava_onevision": {"image_processor_type": "LlavaOnevisionImageProcessor"},
    "internvl": {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 448, "width": 448}},
    "qwen2_vl": {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056},
    "qwen2_5_vl": {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056},
    "qwen3_vl": {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    },
}  # fmt: skip


def folder(name: str, place: Path) -> Path:
    """A folder with the config files of a checkpoint and no weights."""
    config, _ = PUBLISHED[name]
    processor = PROCESSORS.get(config["model_type"], {})
    if config["model_type"] == "idefics3":
        side = config["vision_config"]["image_size"]
        processor = {"image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 4 * side}}
        processor |= {"max_image_size": {"longest_edge": side}}
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config), "utf-8")
    if processor:
        (place / "preprocessor_config.json").write_text(json.dumps(processor), "utf-8")
    return place

"""Published costs beside those that `plan` computes by each paper's own formula: `python samples/papers/table.py`.

Every row comes from a config.json alone, as `lvlm-edge plan` reads it. Rows that the published formulas do not give
are printed with their difference like all others; nothing is fitted to them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_edge.exporter import plan

CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
CLIP |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
SIGLIP |= {"num_attention_heads": 16, "image_size": 384, "patch_size": 14}
# kind, layers, hidden, heads, KV heads, FFN, vocabulary
DECODERS = {
    "Vicuna-7B": ("llama", 32, 4096, 32, 32, 11008, 32000),
    "Vicuna-13B": ("llama", 40, 5120, 40, 40, 13824, 32000),
    "Llama3-8B": ("llama", 32, 4096, 32, 8, 14336, 128256),
    "Qwen2-7B": ("qwen2", 28, 3584, 28, 4, 18944, 152064),
    "Phi3-3B": ("phi3", 32, 3072, 32, 32, 8192, 32064),
    "InternLM2.5-7B": ("llama", 32, 4096, 32, 8, 14336, 92544),  # by its dimensions
    "Qwen2-0.5B": ("qwen2", 24, 896, 14, 2, 4864, 151936),
    "TinyLlama-1.1B": ("llama", 22, 2048, 32, 4, 5632, 32000),
    "Llama-3.2-1B": ("llama", 16, 2048, 32, 8, 8192, 128256),
    "Llama-3.2-3B": ("llama", 28, 3072, 24, 8, 8192, 128256),
}
CLASSES = {"llama": "LlavaLlamaForCausalLM", "qwen2": "LlavaQwenForCausalLM", "phi3": "LlavaPhi3ForCausalLM"}
# start layers, published share of prefill saved in percent
PROXYV = {
    "Vicuna-7B": ((12, 46), (16, 36)),
    "Vicuna-13B": ((16, 43), (20, 36)),
    "Llama3-8B": ((16, 42), (20, 32)),
    "Qwen2-7B": ((16, 37), (20, 25)),
    "Phi3-3B": ((16, 35), (20, 27)),
    "InternLM2.5-7B": ((16, 39), (20, 30)),
}
# published GFLOPs of the decoder, dense and with HiMix
HIMIX = {
    "Qwen2-0.5B": (837, 78),
    "TinyLlama-1.1B": (1750, 161),
    "Llama-3.2-1B": (2040, 192),
    "Llama-3.2-3B": (5310, 525),
    "Vicuna-7B": (10800, 1310),
}
# cutoff, published TFLOPs of visual tokens, dense
YOPO = {"Vicuna-7B": (16, 7.63), "Vicuna-13B": (20, 14.89)}
# by prune layer: published percent of dense with 90, 75 and 50 % of the visual tokens removed
FASTV = {
    "Vicuna-7B": {2: (20, 33, 55), 3: (23, 35, 57), 5: (28, 40, 60)},
    "Vicuna-13B": {2: (19, 32, 55), 3: (21, 34, 56), 5: (26, 38, 58)},
}


@dataclass(frozen=True)
class Row:
    """A published figure and the computed one."""

    method: str
    model: str
    setting: str
    unit: str
    published: float
    computed: float


def text(name: str) -> dict[str, Any]:
    kind, layers, hidden, heads, kv_heads, ffn, vocab = DECODERS[name]
    config = {"model_type": kind, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    config |= {"num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": vocab, "hidden_act": "silu"}
    return config | {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 10000.0}


def original(name: str, **more: Any) -> dict[str, Any]:
    """config.json in LLaVA's original layout."""
    config = text(name)
    config |= {"architectures": [CLASSES[config["model_type"]]], "model_type": "llava_llama"}
    config |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu"}
    config |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_hidden_size": 1024}
    return config | {"image_aspect_ratio": "pad"} | more


def tinyllava(name: str) -> dict[str, Any]:
    """config.json as HiMix writes it."""
    config = {"model_type": "tinyllava", "text_config": text(name) | {"vision_hidden_size": 1152}}
    config |= {"vision_config": SIGLIP, "vision_feature_layer": -2, "vision_feature_select_strategy": "patch"}
    return config | {"image_aspect_ratio": "square", "image_token_index": -200}


def hub(name: str) -> dict[str, Any]:
    """config.json in the hub's layout of LLaVA-1.5."""
    return {"model_type": "llava", "image_token_index": 32000, "vision_config": CLIP, "text_config": text(name)}


def paper(config: dict[str, Any], method: str, **options: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        found: dict[str, Any] = plan(folder, method=method, **options)["paper"]
        return found


def rows() -> Iterator[Row]:
    for name, published in FASTV.items():
        for layer, removed, percent in (
            (layer, removed, percent)
            for layer, percents in published.items()
            for removed, percent in zip((0.9, 0.75, 0.5), percents, strict=True)
        ):
            found = paper(hub(name), "fastv", prune_layer=layer, keep_ratio=round(1 - removed, 2))
            yield Row("fastv", name, f"K={layer} R={removed:.0%}", "% of dense", percent, 100 * found["ratio"])
    for name, starts in PROXYV.items():
        for start, percent in starts:
            config = original(name, proxyv=True, proxyv_start_layer=start, proxyv_reduce_factor=4)
            config |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
            config |= {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}
            yield Row("proxyv", name, f"layer {start}", "% saved", percent, paper(config, "proxyv")["value"])
    for name, (cutoff, dense) in YOPO.items():
        config = original(name, attncut_w=5, layercut_num=cutoff, mlpcut_ratio=2)
        found = paper(config, "yopo")
        yield Row("yopo", name, "dense", "TFLOPs", dense, found["value"] / found["ratio"])
    for name, (dense, reduced) in HIMIX.items():
        found = paper(tinyllava(name), "himix")
        yield Row("himix", name, "dense", "GFLOPs", dense, found["value"] / found["ratio"])
        yield Row("himix", name, "himix", "GFLOPs", reduced, found["value"])


if __name__ == "__main__":
    print("| method | decoder | setting | published | computed | difference |\n|---" + "|---" * 5 + "|")
    for row in rows():
        apart = row.computed - row.published
        figures = f"{row.published:g} {row.unit} | {row.computed:.2f} | {apart:+.2f}"
        print(f"| {row.method} | {row.model} | {row.setting} | {figures} |")

"""What fits on which Jetson, as a Markdown table: `python samples/jetson/fit_table.py`.

LLaVA-shaped models (CLIP-L/14 at 336 px, 576 visual tokens, 256 text and 128 new tokens), dense and FastV keeping
25 %, float16 and int4 decoder weights, each device under the JetPack release its profile assumes or the one named
(`python samples/jetson/fit_table.py agx-orin-32gb@7.2`). A cell says what running needs and what building needs, GB;
bold where both fit; - where graphs cannot share weights. Predictions: nothing here was run on a Jetson.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lvlm_edge.exporter.bundles import plans
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.devices import fit, profiles
from lvlm_edge.exporter.planning import Plan

VISION = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336}
VISION |= {"patch_size": 14, "num_hidden_layers": 24, "num_attention_heads": 16}
# layers, hidden, heads, key-value heads, ffn, vocabulary: Qwen2-1.5B's decoder, and LLaVA-1.5's two
MODELS = {
    "2B": ("qwen2", 28, 1536, 12, 2, 8960, 151936, True),
    "7B": ("llama", 32, 4096, 32, 32, 11008, 32064, False),
    "13B": ("llama", 40, 5120, 40, 40, 13824, 32064, False),
}
FASTV = {"method": "fastv", "keep_ratio": 0.25}
SHARED = FASTV | {"share_weights": True}
WAYS = {"dense, float16": ({}, "as-is"), "dense, int4": ({}, "int4"), "FastV, float16": (FASTV, "as-is")}
WAYS |= {"FastV, int4": (FASTV, "int4"), "FastV, float16, `--share-weights`": (SHARED, "as-is")}


def model(name: str) -> Checkpoint:
    kind, layers, hidden, heads, kv_heads, ffn, vocab, tied = MODELS[name]
    text = {"model_type": kind, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    text |= {"num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": vocab}
    text |= {"max_position_embeddings": 4096, "tie_word_embeddings": tied}
    config = {"model_type": "llava", "image_token_index": 32000, "vision_config": VISION, "text_config": text}
    config |= {"vision_feature_layer": -2, "tie_word_embeddings": tied}
    return Checkpoint(Path(name), config)


def plan(made: Checkpoint, board: profiles.Profile, *, method: str = "none", **options: object) -> Plan:
    return plans.plan_of(made, method=method, options={"dtype": "float16", "lowering": board.lowering, **options})


def cell(made: Checkpoint, board: profiles.Profile, way: dict, weights: str) -> str:
    if "share_weights" in way and board.lowering != "modern":
        return "-"
    found = fit.predict(plan(made, board, **way), board, weights=weights)
    text = f"{found.run / 1e9:.1f} / {found.build_peak / 1e9:.1f}"
    return f"**{text}**" if found.fits else text


devices = sys.argv[1:] or [name for name in profiles.names() if profiles.load(name).kind == "jetson"]
models = {name: model(name) for name in MODELS}
print(f"| device | has | model | {' | '.join(WAYS)} |\n|---" + "|---" * (2 + len(WAYS)) + "|")
for profile in map(profiles.load, devices):
    has = fit.predict(plan(models["2B"], profile), profile).available / 1e9
    for name, made in models.items():
        cells = " | ".join(cell(made, profile, *way) for way in WAYS.values())
        print(f"| {profile.name}, JetPack {profile.jetpack} | {has:.1f} | {name} | {cells} |")

"""Realised over predicted speed-up of every method's prefill, ONNX Runtime: `python samples/bench/methods.py`.

Random checkpoints with a decoder of SmolLM2-135M's dimensions (30 layers, 9 heads on 3 KV heads, 106 M parameters
without the embedding) and 576 visual tokens of a small encoder, 100 text tokens, float32. Each method takes turns with
the same prompt without reduction, in one process; the figure is the time of the graphs from the first layer's input to
the first token's logits (HiMix: with its image graph), encoder and projector left out. Predicted: ratio of FLOPs.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median

import click
import numpy as np
from safetensors.numpy import save_file

from lvlm_edge.exporter import export, plan
from lvlm_edge.runtime import Pipeline

D, FFN, LAYERS, HEADS, KV, VOCAB, W, SIDE, TEXT = 576, 1536, 30, 9, 3, 49152, 64, 24, 100
DECODER = {"hidden_size": D, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
DECODER |= {"num_key_value_heads": KV, "vocab_size": VOCAB, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
DECODER |= {"max_position_embeddings": 2048, "rope_theta": 100000.0, "hidden_act": "silu"}
TOWER = {"model_type": "clip_vision_model", "hidden_size": W, "intermediate_size": 2 * W, "num_hidden_layers": 2}
TOWER |= {"num_attention_heads": 2, "image_size": 14 * SIDE, "patch_size": 14}
KEPT = 0.5  # YOPO: share of heads that visual tokens keep from layer 2 on
CASES = {  # method: checkpoint and settings
    "fastv": ("plain", {"prune_layer": 2, "keep_ratio": 0.25}),
    "proxyv": ("proxyv", {}),
    "yopo": ("plain", {"semantics": "dropped", "window": 5, "cutoff": 15, "ffn_ratio": 2}),
    "himix": ("himix", {}),
}


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint: `plain` and `proxyv` in LLaVA's original layout, `himix` in TinyLLaVA's."""
    at, kv = ("language_model.model." if kind == "himix" else "model."), D // HEADS * KV
    found: dict[str, tuple[int, ...]] = {f"{at}embed_tokens.weight": (VOCAB, D), f"{at}norm.weight": (D,)}
    for i in range(LAYERS):
        layer = f"{at}layers.{i}."
        found |= {f"{layer}{n}.weight": (D,) for n in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{layer}self_attn.{n}_proj.weight": s for n, s in
                  (("q", (D, D)), ("k", (kv, D)), ("v", (kv, D)), ("o", (D, D)))}  # fmt: skip
        found |= {
            f"{layer}mlp.{n}_proj.weight": s for n, s in (("gate", (FFN, D)), ("up", (FFN, D)), ("down", (D, FFN)))
        }
        if kind == "himix":
            found |= {f"{layer}self_attn.{n}_proj_img.weight": (kv, W) for n in "kv"}
            found[f"{layer}input_layernorm_img.weight"] = (W,)
    if kind != "himix":
        found |= {f"{at}mm_projector.0.weight": (D, W), f"{at}mm_projector.2.weight": (D, D)}
        found |= {f"{at}mm_projector.{n}.bias": (D,) for n in (0, 2)}
    if kind == "proxyv":
        found[f"{at}image_newline"] = (D,)
        for j in range(LAYERS - 12):
            update, q = f"{at}vision_mlp_layers.{j}.", D // 2
            found |= {f"{update}{n}.weight": s for n, s in (("context_proj", (q, D)), ("input_proj", (q, D)),
                      ("proj.0", (q, 2 * q)), ("proj.2", (D, q)), ("layernorm_post", (D,)))}  # fmt: skip
    prefix = "vision_tower._vision_tower." if kind == "himix" else f"{at}vision_tower.vision_tower."
    return found | {f"{prefix}vision_model.{name}": shape for name, shape in tower().items()}


def tower() -> dict[str, tuple[int, ...]]:
    found = {"embeddings.class_embedding": (W,), "embeddings.patch_embedding.weight": (W, 3, 14, 14)}
    found["embeddings.position_embedding.weight"] = (SIDE**2 + 1, W)
    for i in range(2):
        for n, s in (*((f"self_attn.{p}_proj", (W, W)) for p in ("q", "k", "v", "out")), ("mlp.fc1", (2 * W, W)),
                     ("mlp.fc2", (W, 2 * W)), ("layer_norm1", (W,)), ("layer_norm2", (W,))):  # fmt: skip
            found |= {f"encoder.layers.{i}.{n}.weight": s, f"encoder.layers.{i}.{n}.bias": s[:1]}
    return found | {f"{n}.{p}": (W,) for n in ("pre_layrnorm", "post_layernorm") for p in ("weight", "bias")}


def config(kind: str) -> dict:
    if kind == "himix":
        text = DECODER | {"model_type": "llama", "vision_hidden_size": W}
        return {"model_type": "tinyllava", "text_config": text, "vision_config": TOWER, "image_token_index": -200,
                "vision_feature_layer": -2, "vision_feature_select_strategy": "patch"}  # fmt: skip
    found = DECODER | {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": W}
    found |= {"mm_vision_tower": "tower", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    if kind == "proxyv":
        pins = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        found |= {"proxyv": True, "proxyv_start_layer": 12, "proxyv_reduce_factor": 4, "image_grid_pinpoints": pins}
        found |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    return found


def checkpoint(folder: Path, kind: str) -> Path:
    """A random checkpoint in a folder."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in shapes(kind).items():
        vector = len(shape) == 1
        tensors[name] = (
            np.ones(shape, np.float32) if vector else rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5
        )
    (folder / "tower").mkdir(parents=True)
    (folder / "tower" / "config.json").write_text(json.dumps(TOWER))
    (folder / "config.json").write_text(json.dumps(config(kind)))
    save_file(tensors, folder / "model.safetensors")
    return folder


def head_mask(folder: Path) -> str:
    rows = [[i < 2 or h < round(KEPT * HEADS) for h in range(HEADS)] for i in range(LAYERS)]
    np.save(folder / "headmask.npy", np.array(rows))
    return str(folder / "headmask.npy")


def prefill(pipe: Pipeline, seed: int) -> float:
    """Seconds of the graphs between the encoder and the first token."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, VOCAB, TEXT).tolist()
    pixels = rng.standard_normal((1, 3, 14 * SIDE, 14 * SIDE)).astype(np.float32)
    seconds = pipe.generate_tokens([*ids[:35], -200, *ids[35:]], pixels, max_new_tokens=1).seconds
    return sum(seconds[g.name] for g in pipe.manifest.graphs if g.role == "prefill" or g.name == "image_kv")


@click.command()
@click.option("--rounds", default=15, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--method", "names", multiple=True, default=list(CASES))
def main(rounds: int, threads: int, names: tuple[str, ...]) -> None:
    """Print the table."""
    print(
        "| method | predicted | realised | realised / predicted | prefill ms, none | method |\n|---" + "|---" * 5 + "|"
    )
    for name in names:
        kind, options = CASES[name]
        with tempfile.TemporaryDirectory() as work:
            made = {k: checkpoint(Path(work, k), k) for k in {kind, "plain" if kind == "himix" else kind}}
            if name == "yopo":
                options = options | {"head_mask": head_mask(made[kind])}
            capacities = {"max_text_tokens": TEXT, "max_new_tokens": 8}
            dense = made["plain" if kind == "himix" else kind]  # HiMix's layers cannot run without it
            flops = plan(made[kind], method=name, **options, **capacities)["flops"]
            pipes = [
                Pipeline.load(
                    export(source, Path(work, f"bundle-{method}"), method=method, **more, **capacities), threads=threads
                )
                for source, method, more in ((dense, "none", {}), (made[kind], name, options))
            ]
            times = [[prefill(pipe, seed) for pipe in pipes] for seed in range(rounds + 2)][2:]
        without, with_ = (median(column) for column in zip(*times, strict=True))
        predicted, realised = flops["prefill_dense"] / flops["prefill"], without / with_
        figures = (
            f"{predicted:.2f} | {realised:.2f} | {realised / predicted:.2f} | {without * 1e3:.1f} | {with_ * 1e3:.1f}"
        )
        print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()

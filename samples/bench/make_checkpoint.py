"""A LLaVA-1.5-shaped checkpoint with random weights, for timing: `python samples/bench/make_checkpoint.py smol DIR`.

smol: CLIP-B/14 at 336 px and a decoder of SmolLM2-135M's dimensions (250 M parameters). tinyllama: CLIP-L/14 at
336 px and TinyLlama-1.1B's (1.4 B). llava-7b: LLaVA-1.5-7B's (7.1 B). 576 visual tokens. large-eye: CLIP-L/14 at
336 px and a decoder of 4 M parameters. small-picture: smol at 56 px, 16 visual tokens. large-picture: smol at 672 px,
2,304 visual tokens. Written tensor by tensor, never held as a whole.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

VISION = {
    "b": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "l": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}
VISION |= {f"b at {size} px": VISION["b"] | {"image_size": size} for size in (56, 672)}
SIZES = {
    "smol": (
        "b",
        {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "tinyllama": (
        "l",
        {
            "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
            "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "llava-7b": (
        "l",
        {
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "large-eye": (
        "l",
        {
            "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 4, "vocab_size": 8192, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}  # fmt: skip
SIZES["small-picture"] = ("b at 56 px", SIZES["smol"][1])
SIZES["large-picture"] = ("b at 672 px", SIZES["smol"][1] | {"max_position_embeddings": 4096})


def config(size: str) -> dict:
    """config.json in hub layout."""
    tower, text = SIZES[size]
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "projection_dim": 768}
    vision |= VISION[tower]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": text["vocab_size"] - 1,
        "image_seq_length": (vision["image_size"] // 14) ** 2,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, **text},
        "vision_config": vision,
    }


def tensors(c: dict) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, shape and standard deviation of every tensor (0: ones)."""
    t, v = c["text_config"], c["vision_config"]
    d, m, w, n = t["hidden_size"], t["intermediate_size"], v["hidden_size"], v["intermediate_size"]
    kv = d // t["num_attention_heads"] * t["num_key_value_heads"]
    yield "language_model.model.embed_tokens.weight", (t["vocab_size"], d), 1.0
    for i in range(t["num_hidden_layers"]):
        at = f"language_model.model.layers.{i}."
        for name, shape in (("q", (d, d)), ("k", (kv, d)), ("v", (kv, d)), ("o", (d, d))):
            yield f"{at}self_attn.{name}_proj.weight", shape, d**-0.5
        for name, shape in (("gate", (m, d)), ("up", (m, d)), ("down", (d, m))):
            yield f"{at}mlp.{name}_proj.weight", shape, shape[1] ** -0.5
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", (d,), 0.0
    yield "language_model.model.norm.weight", (d,), 0.0
    if not c["tie_word_embeddings"]:
        yield "language_model.lm_head.weight", (t["vocab_size"], d), d**-0.5
    at = "vision_tower.vision_model."
    yield f"{at}embeddings.class_embedding", (w,), 1.0
    yield f"{at}embeddings.patch_embedding.weight", (w, 3, 14, 14), 588**-0.5
    yield f"{at}embeddings.position_embedding.weight", ((v["image_size"] // 14) ** 2 + 1, w), 0.02
    for i in range(v["num_hidden_layers"]):
        for name, shape in (
            *((f"self_attn.{p}_proj", (w, w)) for p in ("q", "k", "v", "out")),
            ("mlp.fc1", (n, w)),
            ("mlp.fc2", (w, n)),
        ):
            yield f"{at}encoder.layers.{i}.{name}.weight", shape, shape[1] ** -0.5
            yield f"{at}encoder.layers.{i}.{name}.bias", shape[:1], 0.02
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{at}encoder.layers.{i}.{name}.weight", (w,), 0.0
            yield f"{at}encoder.layers.{i}.{name}.bias", (w,), 0.02
    for name in ("pre_layrnorm", "post_layernorm"):
        yield f"{at}{name}.weight", (w,), 0.0
        yield f"{at}{name}.bias", (w,), 0.02
    for name, shape in (("linear_1", (d, w)), ("linear_2", (d, d))):
        yield f"multi_modal_projector.{name}.weight", shape, shape[1] ** -0.5
        yield f"multi_modal_projector.{name}.bias", shape[:1], 0.02


@click.command()
@click.argument("size", type=click.Choice(list(SIZES)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
@click.option("--half", is_flag=True, help="float16 instead of float32.")
def main(size: str, folder: Path, seed: int, half: bool) -> None:
    """Write config.json and model.safetensors of a size."""
    dtype = np.dtype(np.float16 if half else np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    content = config(size)
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")
    rng, header, at = np.random.default_rng(seed), {}, 0
    for name, shape, _ in tensors(content):
        end = at + dtype.itemsize * int(np.prod(shape))
        header[name] = {"dtype": "F16" if half else "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape, deviation in tensors(content):
            values = rng.standard_normal(shape, np.float32) * deviation if deviation else np.ones(shape, np.float32)
            file.write(np.ascontiguousarray(values, dtype).data)
    print(f"{folder}: {at / 1e6:,.0f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Small seeded checkpoints in the layouts of the methods' own releases: LLaVA's original one, and TinyLLaVA's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

IMAGE = -200  # the image placeholder of these layouts; no token of the vocabulary
VOCAB = 160
PATCH = 14
Shapes = dict[str, tuple[int, ...]]

MODEL_TYPES = {"llama": "llava_llama", "qwen2": "llava_qwen", "phi3": "llava_phi3"}
CLASSES = {"llama": "LlavaLlamaForCausalLM", "qwen2": "LlavaQwenForCausalLM", "phi3": "LlavaPhi3ForCausalLM"}


def build(
    folder: Path,
    *,
    method: str = "plain",
    seed: int = 0,
    decoder: str = "llama",
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 4,
    ffn: int = 128,
    vocab: int = VOCAB,
    tied: bool = False,
    side: int = 4,
    tower: str = "folder",
    tower_hidden: int = 32,
    tower_layers: int = 3,
    select_layer: int = -2,
    newline: bool | None = None,
    start_layer: int = 2,
    reduce_factor: int = 2,
    learn_proxy: bool = False,
    window: int = 3,
    cutoff: int | None = None,
    ffn_ratio: float = 2,
    head_mask: Sequence[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **changed: Any,
) -> Path:
    """A checkpoint folder with weights large enough that attention is not flat.

    Args:
        method: `plain`, `proxyv`, `yopo` (all `model_type` llava_...) or `himix` (`tinyllava`, SigLIP tower inside).
        decoder: `llama`, `qwen2` (QKV bias) or `phi3` (fused projections).
        side: patches per side of the square grid; pictures are `side * 14` pixels wide.
        tower: where CLIP is: `folder` (relative, beside the weights), `absolute` (the same by its full path),
            `inside` (in the state dict; the folder holds its config alone).
        newline: `model.image_newline` is there; by default for ProxyV alone.
        cutoff: YOPO's first layer without visual tokens; by default half the layers.
        head_mask: YOPO's, a string of 0 and 1 per layer; by default `head_masks(layers, heads, seed)`.
        changed: fields of config.json, of `text_config` for HiMix.
    """
    assert hidden % heads == 0 and heads % kv_heads == 0
    folder.mkdir(parents=True, exist_ok=True)
    text = _text_config(decoder, layers, hidden, heads, kv_heads, ffn, vocab, tied)
    if method == "himix":
        config = _tinyllava(text | {"model_type": decoder} | changed, side, tower_hidden, tower_layers, select_layer)
        shapes = {f"language_model.{k}": v for k, v in _decoder(decoder, text, "himix", tower_hidden).items()}
        shapes |= {f"vision_tower._vision_tower.{k}": v for k, v in _siglip(tower_hidden, tower_layers, side).items()}
    else:
        newline = method == "proxyv" if newline is None else newline
        name = f"clip-tiny-{side * PATCH}"
        (folder / name).mkdir(exist_ok=True)
        clip = _clip(tower_hidden, tower_layers, side)
        vision = _clip_config(tower_hidden, tower_layers, side)
        (folder / name / "config.json").write_text(json.dumps(vision, indent=1))
        shapes = _decoder(decoder, text, method, tower_hidden)
        shapes |= {
            "model.mm_projector.0.weight": (hidden, tower_hidden),
            "model.mm_projector.0.bias": (hidden,),
            "model.mm_projector.2.weight": (hidden, hidden),
            "model.mm_projector.2.bias": (hidden,),
        }
        if newline:
            shapes["model.image_newline"] = (hidden,)
        if tower == "inside":
            shapes |= {f"model.vision_tower.vision_tower.{k}": v for k, v in clip.items()}
        else:
            save_file(_weights(clip, seed + 1, dtype), folder / name / "model.safetensors", {"format": "pt"})
        config = text | {
            "architectures": [CLASSES[decoder]],
            "model_type": MODEL_TYPES[decoder],
            "mm_vision_tower": str((folder / name).absolute()) if tower == "absolute" else name,
            "mm_hidden_size": tower_hidden,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": select_layer,
            "mm_vision_select_feature": "patch",
            "image_aspect_ratio": "pad",
        }
        if method == "proxyv":
            assert side % reduce_factor == 0
            config |= _proxyv_config(side, start_layer, reduce_factor, learn_proxy, layers)
            shapes |= _proxyv(hidden, side, reduce_factor, learn_proxy, layers - start_layer)
        if method == "yopo":
            rows = list(head_mask or head_masks(layers, heads, seed))
            assert len(rows) == layers and all(len(row) == heads for row in rows)
            np.save(folder / "headmask.npy", np.array([[c == "1" for c in row] for row in rows]))
            config |= {
                "attncut_w": window,
                "layercut_num": layers // 2 if cutoff is None else cutoff,
                "headcut_num": round(sum(row.count("1") for row in rows) / layers),
                "mlpcut_ratio": ffn_ratio,
                "sprompt_len": 5,
            }
        config |= changed
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if tied:
        shapes = {k: v for k, v in shapes.items() if not k.endswith("lm_head.weight")}
    save_file(_weights(shapes, seed, dtype), folder / "model.safetensors", {"format": "pt"})
    return folder


def head_masks(layers: int, heads: int, seed: int = 0) -> list[str]:
    """Masks as uneven as released ones: all heads in the first two layers, none in the third, then some."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation([i < max(1, heads // 2) for i in range(heads)]) for _ in range(layers)]
    fixed = {0: "1" * heads, 1: "1" * heads, 2: "0" * heads}
    return [fixed.get(i, "".join("01"[int(kept)] for kept in row)) for i, row in enumerate(rows)]


def method_config(folder: Path, **changed: Any) -> dict[str, Any]:
    """The manifest's `method_config` of a checkpoint made here; `changed` fields replace its own."""
    config = json.loads((folder / "config.json").read_text())
    found: dict[str, Any] = {}
    if config.get("proxyv"):
        found = {
            "start_layer": config["proxyv_start_layer"],
            "reduce_factor": config["proxyv_reduce_factor"],
            "learn_proxy": config["learn_proxy"],
        }
    if "attncut_w" in config:
        mask = np.load(folder / "headmask.npy")
        found = {
            "semantics": "released",
            "window": config["attncut_w"],
            "cutoff": config["layercut_num"],
            "ffn_ratio": config["mlpcut_ratio"],
            "head_mask": ["".join("01"[int(kept)] for kept in row) for row in mask],
        }
    return found | changed


def prompt(text: int, before: int, *, images: int = 1, vocab: int = VOCAB, seed: int = 0) -> list[int]:
    """Seeded token ids: `before` text tokens, the images with one text token from one to the next, the rest."""
    ids: list[int] = np.random.default_rng(seed).integers(3, vocab, text).tolist()
    for i in range(images):
        ids.insert(before + 2 * i, IMAGE)
    return ids


def pixels(side: int = 4, *, crops: int = 1, seed: int = 0) -> Tensor:
    """Noise pictures, [crops, 3, side * 14, side * 14], float32."""
    shape = (crops, 3, side * PATCH, side * PATCH)
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def _text_config(
    decoder: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, tied: bool
) -> dict[str, Any]:
    config = {
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
    }
    if decoder == "llama":
        config |= {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    if decoder == "qwen2":
        config |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": layers}
    if decoder == "phi3":
        config |= {"sliding_window": None, "original_max_position_embeddings": 2048}
    return config


def _clip_config(hidden: int, layers: int, side: int) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": hidden,
        "image_size": side * PATCH,
        "intermediate_size": 2 * hidden,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": layers,
        "patch_size": PATCH,
        "projection_dim": 512,
        "transformers_version": "4.41.2",
    }


def _tinyllava(text: dict[str, Any], side: int, hidden: int, layers: int, select_layer: int) -> dict[str, Any]:
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "text_config": text | {"vision_hidden_size": hidden},
        "vision_config": {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_channels": 3,
            "patch_size": PATCH,
            "image_size": side * PATCH,
            "attention_dropout": 0.0,
            "layer_norm_eps": 1e-06,
            "hidden_act": "gelu_pytorch_tanh",
            "model_type": "siglip_vision_model",
        },
        "vision_feature_layer": select_layer,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
        "image_token_index": IMAGE,
        "hidden_size": text["hidden_size"],
        "vision_hidden_size": hidden,
        "vocab_size": text["vocab_size"],
        "torch_dtype": "bfloat16",
    }


def _proxyv_config(side: int, start_layer: int, factor: int, learn_proxy: bool, layers: int) -> dict[str, Any]:
    size = side * PATCH
    pins = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size], [3 * size, size], [size, 3 * size]]
    return {
        "mm_patch_merge_type": "spatial_unpad",
        "proxyv": True,
        "proxyv_start_layer": start_layer,
        "proxyv_reduce_factor": factor,
        "per_crop_token_len": side**2,
        "learn_proxy": learn_proxy,
        "max_num_image_crops": 5,
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": pins,
        "num_of_vision_mlp_layers": layers - start_layer,
    }


def _decoder(decoder: str, config: dict[str, Any], method: str, vision: int) -> Shapes:
    """Names and shapes of the decoder, its embedding and lm_head; HiMix's own beside them."""
    d, m, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: Shapes = {"lm_head.weight": (vocab, d), "model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        layer: Shapes = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "mlp.down_proj.weight": (d, m),
            "self_attn.o_proj.weight": (d, d),
        }
        if decoder == "phi3":
            layer |= {"self_attn.qkv_proj.weight": (d + 2 * kv, d), "mlp.gate_up_proj.weight": (2 * m, d)}
        else:
            layer |= {"mlp.gate_proj.weight": (m, d), "mlp.up_proj.weight": (m, d)}
            for name, size in (("q", d), ("k", kv), ("v", kv)):
                layer[f"self_attn.{name}_proj.weight"] = (size, d)
                if decoder == "qwen2":
                    layer[f"self_attn.{name}_proj.bias"] = (size,)
        if method == "himix":
            layer["input_layernorm_img.weight"] = (vision,)
            for name in ("k_proj_img", "v_proj_img"):
                layer[f"self_attn.{name}.weight"] = (kv, vision)
                if decoder == "qwen2":
                    layer[f"self_attn.{name}.bias"] = (kv,)
        shapes |= {f"model.layers.{i}.{k}": v for k, v in layer.items()}
    return shapes


def _proxyv(d: int, side: int, factor: int, learn_proxy: bool, count: int) -> Shapes:
    q = d // 4 if d >= 1024 else d // 2
    shapes: Shapes = {}
    for j in range(count):
        layer = f"model.vision_mlp_layers.{j}."
        shapes |= {
            layer + "context_proj.weight": (q, d),
            layer + "input_proj.weight": (q, d),
            layer + "layernorm_post.weight": (d,),
            layer + "proj.0.weight": (q, 2 * q),
            layer + "proj.2.weight": (d, q),
        }
    if learn_proxy:
        shapes["model.proxyv_initializer.Wk.weight"] = (q, d)
        shapes["model.proxyv_initializer.proxyv_tokens"] = ((side // factor) ** 2, q)
    return shapes


def _encoder(d: int, layers: int) -> Shapes:
    shapes: Shapes = {"post_layernorm.weight": (d,), "post_layernorm.bias": (d,)}
    for i in range(layers):
        linear = {f"self_attn.{name}_proj": (d, d) for name in ("k", "q", "v", "out")}
        linear |= {"mlp.fc1": (2 * d, d), "mlp.fc2": (d, 2 * d)}
        for name, shape in linear.items():
            shapes[f"encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"encoder.layers.{i}.{name}.bias"] = shape[:1]
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"encoder.layers.{i}.{name}.weight"] = shapes[f"encoder.layers.{i}.{name}.bias"] = (d,)
    return shapes


def _clip(d: int, layers: int, side: int) -> Shapes:
    shapes = _encoder(d, layers) | {
        "embeddings.class_embedding": (d,),
        "embeddings.patch_embedding.weight": (d, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": (side**2 + 1, d),
        "pre_layrnorm.weight": (d,),
        "pre_layrnorm.bias": (d,),
    }
    return {f"vision_model.{k}": v for k, v in shapes.items()}


def _siglip(d: int, layers: int, side: int) -> Shapes:
    shapes = _encoder(d, layers) | {
        "embeddings.patch_embedding.weight": (d, 3, PATCH, PATCH),
        "embeddings.patch_embedding.bias": (d,),
        "embeddings.position_embedding.weight": (side**2, d),
        "head.probe": (1, 1, d),
        "head.attention.in_proj_weight": (3 * d, d),
        "head.attention.in_proj_bias": (3 * d,),
        "head.attention.out_proj.weight": (d, d),
        "head.attention.out_proj.bias": (d,),
        "head.layernorm.weight": (d,),
        "head.layernorm.bias": (d,),
        "head.mlp.fc1.weight": (2 * d, d),
        "head.mlp.fc1.bias": (2 * d,),
        "head.mlp.fc2.weight": (d, 2 * d),
        "head.mlp.fc2.bias": (d,),
    }
    return {f"vision_model.{k}": v for k, v in shapes.items()}


def _weights(shapes: Shapes, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices that keep the size of what goes through them, and gains and biases that are not 1 and 0."""
    torch.manual_seed(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith(("embed_tokens.weight", "image_newline")):
            weight = torch.randn(shape) * 0.5
        elif len(shape) > 1:
            weight = torch.randn(shape) * 1.3 * (np.prod(shape[1:]) ** -0.5)
        else:
            weight = torch.randn(shape) * 0.1 + ("norm" in name and name.endswith("weight"))
        weights[name] = weight.to(dtype)
    return weights

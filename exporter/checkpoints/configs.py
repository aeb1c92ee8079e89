"""Encoder and decoder from their parts of a config.json, whatever family's layout the parts come in."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lvlm_edge.exporter.checkpoints.spec import CheckpointError, DecoderSpec, VisionSpec
from lvlm_edge.runtime.errors import UnsupportedError, nearest

TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
DECODERS = ("llama", "mistral", "phi3", "qwen2")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others change their tables with the prompt's length

# What a field that config.json leaves out means: the defaults of transformers' config classes (tested against them).
# Written here because reading a config must not load PyTorch, which those classes do.
_TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "image_size": 224, "num_channels": 3}  # fmt: skip
_DECODER = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6,
            "hidden_act": "silu", "head_dim": None, "tie_word_embeddings": False}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {**_TOWER, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    "siglip_vision_model": {**_TOWER, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
    "llama": {**_DECODER, "intermediate_size": 11008, "num_key_value_heads": None, "vocab_size": 32000,
              "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "mistral": {**_DECODER, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000,
                "max_position_embeddings": 131072, "sliding_window": 4096},
    "phi3": {**_DECODER, "hidden_size": 3072, "intermediate_size": 8192, "num_key_value_heads": None,
             "vocab_size": 32064, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None},
    "qwen2": {**_DECODER, "intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936,
              "max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False},
}  # fmt: skip


def completed(where: str, given: dict[str, Any], known: Collection[str], kind: Any = None) -> dict[str, Any]:
    """A part of a config with every field that decides something, and its kind as `model_type`.

    Args:
        where: the part, for errors.
        given: the fields it has.
        known: kinds that are supported.
        kind: instead of the part's own `model_type`.

    Raises:
        UnsupportedError: a kind that is not known.
    """
    kind = given.get("model_type") if kind is None else kind
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedError(f"{where}.model_type is {kind!r}, not supported; {nearest(str(kind), known)}")
    return {**DEFAULTS[kind], **given, "model_type": kind}


def vision(config: dict[str, Any], wanted: Any, *, drop_first: bool, name: str = "vision_feature_layer") -> VisionSpec:
    """The vision encoder from its completed config.

    Args:
        wanted: hidden states for the projector, a number or a list, counted from the end where negative.
        drop_first: see `VisionSpec`.
        name: of the field that `wanted` is from, for errors.

    Raises:
        CheckpointError: layers that the encoder does not have.
    """
    count = config["num_hidden_layers"]
    layers = tuple(wanted) if isinstance(wanted, list) else (wanted,)
    if not all(type(layer) is int for layer in (*layers, count)):
        raise CheckpointError(f"config.json: {name} is {wanted!r} of {count!r} layers, expected numbers; correct it")
    if not layers or any(not -count - 1 <= layer <= count for layer in layers):
        raise CheckpointError(f"config.json: {name} is {wanted}, but the tower has {count} layers; correct it")
    return VisionSpec(
        kind=TOWERS[config["model_type"]],
        layers=count,
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        ffn=config["intermediate_size"],
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        channels=config["num_channels"],
        eps=config["layer_norm_eps"],
        mlp_act=config["hidden_act"],
        feature_layers=tuple(layer % (count + 1) for layer in layers),
        drop_first=drop_first,
    )


def decoder(family: str, text: dict[str, Any], *, tied: bool = False) -> DecoderSpec:
    """The decoder from its completed config.

    Args:
        family: for errors.
        tied: lm_head and embedding are one tensor, whatever the part itself says.

    Raises:
        UnsupportedError: rotary tables that are not fixed, or rotate a part of each head only.
        CheckpointError: rotary parameters that are no object.
    """
    kind, heads = text["model_type"], text["num_attention_heads"]
    windowed = kind in ("mistral", "phi3") or (kind == "qwen2" and text["use_sliding_window"])
    bias = bool(text.get("attention_bias", False))
    return DecoderSpec(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        heads=heads,
        kv_heads=heads if text["num_key_value_heads"] is None else text["num_key_value_heads"],
        head_dim=text["head_dim"] or (text["hidden_size"] // heads if heads else 0),
        ffn=text["intermediate_size"],
        vocab=text["vocab_size"],
        eps=text["rms_norm_eps"],
        mlp_act=text["hidden_act"],
        qkv_bias=kind == "qwen2" or bias,
        o_bias=kind != "qwen2" and bias,
        mlp_bias=bool(text.get("mlp_bias", False)),
        tied=bool(tied or text["tie_word_embeddings"]),
        window=text["sliding_window"] if windowed else None,
        max_positions=text["max_position_embeddings"],
        rope={"rope_parameters": _rope(family, text), "max_position_embeddings": text["max_position_embeddings"]},
    )


def _rope(family: str, text: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters in today's form; older configs have `rope_theta` and `rope_scaling` in their place."""
    given = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"config.json: rope_parameters is {type(given).__name__}, expected an object; correct it")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in STATIC_ROPE:
        raise UnsupportedError(
            f"{family}: rope_type is {kind!r}, not supported (or its tables change with the prompt); "
            f"{nearest(str(kind), STATIC_ROPE)}"
        )
    share = given.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
    if text["model_type"] == "phi3" and share != 1.0:
        raise UnsupportedError(f"{family}: partial_rotary_factor is {share!r}, expected 1.0; use another checkpoint")
    rest = {key: value for key, value in given.items() if key != "type"}
    return {"rope_theta": text.get("rope_theta", 10000.0), **rest, "rope_type": kind}

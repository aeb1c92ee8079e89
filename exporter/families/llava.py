"""LLaVA-1.5 in Hugging Face hub layout (`model_type: llava`): CLIP or SigLIP tower, Llama-shaped decoder."""

from __future__ import annotations

import re
from typing import Any

from lvlm_edge.exporter.spec import CheckpointError, DecoderSpec, ModelSpec, VisionSpec
from lvlm_edge.runtime.errors import UnsupportedError, nearest

TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
DECODERS = ("llama", "mistral", "qwen2")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others change their tables with the prompt's length

# What a field that config.json leaves out means: the defaults of transformers' config classes (tested against them).
# Written here because reading a config must not load PyTorch, which those classes do.
_TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "image_size": 224, "num_channels": 3}  # fmt: skip
_DECODER = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6,
            "hidden_act": "silu", "head_dim": None, "tie_word_embeddings": False}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "llava": {
        "image_token_index": 32000, "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
        "text_config": {"model_type": "llama"},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
    },
    "clip_vision_model": {**_TOWER, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    "siglip_vision_model": {**_TOWER, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
    "llama": {**_DECODER, "intermediate_size": 11008, "num_key_value_heads": None, "vocab_size": 32000,
              "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "mistral": {**_DECODER, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000,
                "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {**_DECODER, "intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936,
              "max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False},
}  # fmt: skip

# LLaVA-1.5's own prompt, for checkpoints that bring no chat template
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% else %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ ' ' if message['role'] == 'user' else eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_PREFIXES = (
    (r"^model\.(?=language_model|vision_tower|multi_modal_projector)", ""),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.(model\.)?embed_tokens\.", "embed."),
    (r"^language_model\.(model\.)?", ""),
    (r"^vision_tower\.(vision_model\.)?", "vision."),
    (r"^multi_modal_projector\.", "projector."),
    (r"(?<=\.)(self_attn|mlp)\.", ""),
    (r"^vision\.(embeddings|encoder)\.", "vision."),
)
_UNUSED = re.compile(r"(position_ids|rotary_emb\.inv_freq)$|^vision\.(post_layernorm|head)\.|^vision\.layers\.\d+\.")


def read_spec(config: dict[str, Any]) -> ModelSpec:
    """The spec from a hub `config.json`; fields it leaves out take the defaults of transformers' config classes.

    Raises:
        UnsupportedError: a tower, decoder, RoPE or activation this family does not know.
        CheckpointError: fields that are not valid or contradict each other.
    """
    full = {**DEFAULTS["llava"], **config}
    parts = {}
    for part, known in (("vision_config", TOWERS), ("text_config", DECODERS)):
        given = full[part] or DEFAULTS["llava"][part]
        kind = given.get("model_type", DEFAULTS["llava"][part]["model_type"])
        if kind not in known:
            raise UnsupportedError(f"llava: {part}.model_type is {kind!r}, not supported; {nearest(str(kind), known)}")
        parts[part] = {**DEFAULTS[kind], **given, "model_type": kind}
    # image_seq_length is not read: transformers' model does not, and configs carry its default of 576 for any tower.
    try:
        return ModelSpec(
            family="llava",
            vision=_vision(full, parts["vision_config"]),
            projector_act=full["projector_hidden_act"],
            projector_bias=bool(full["multimodal_projector_bias"]),
            decoder=_decoder(full, parts["text_config"]),
            image_token_id=full.get("image_token_id", full["image_token_index"]),
        )
    except TypeError as error:  # sums with a field that is no number
        raise CheckpointError(f"config.json: a field has a value of the wrong kind ({error}); correct it") from error


def _vision(full: dict[str, Any], vision: dict[str, Any]) -> VisionSpec:
    wanted, count = full["vision_feature_layer"], vision["num_hidden_layers"]
    layers = tuple(wanted) if isinstance(wanted, list) else (wanted,)
    if not all(type(layer) is int for layer in (*layers, count)):
        raise CheckpointError(
            f"config.json: vision_feature_layer is {wanted!r} of {count!r} layers, expected numbers; correct it"
        )
    if not layers or any(not -count - 1 <= layer <= count for layer in layers):
        raise CheckpointError(
            f"config.json: vision_feature_layer is {wanted}, but the tower has {count} layers; correct it"
        )
    strategy = full["vision_feature_select_strategy"]
    if strategy not in ("default", "full"):
        raise UnsupportedError(
            f"llava: vision_feature_select_strategy is {strategy!r}; {nearest(str(strategy), ('default', 'full'))}"
        )
    return VisionSpec(
        kind=TOWERS[vision["model_type"]],
        layers=count,
        hidden=vision["hidden_size"],
        heads=vision["num_attention_heads"],
        ffn=vision["intermediate_size"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        channels=vision["num_channels"],
        eps=vision["layer_norm_eps"],
        mlp_act=vision["hidden_act"],
        feature_layers=tuple(layer % (count + 1) for layer in layers),
        drop_first=strategy == "default",
    )


def _decoder(full: dict[str, Any], text: dict[str, Any]) -> DecoderSpec:
    qwen, heads = text["model_type"] == "qwen2", text["num_attention_heads"]
    windowed = text["model_type"] == "mistral" or (qwen and text["use_sliding_window"])
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
        qkv_bias=qwen or bias,
        o_bias=not qwen and bias,
        mlp_bias=bool(text.get("mlp_bias", False)),
        tied=bool(full["tie_word_embeddings"] or text["tie_word_embeddings"]),
        window=text["sliding_window"] if windowed else None,
        max_positions=text["max_position_embeddings"],
        rope={"rope_parameters": _rope(text), "max_position_embeddings": text["max_position_embeddings"]},
    )


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters in today's form; older configs have `rope_theta` and `rope_scaling` in their place."""
    given = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"config.json: rope_parameters is {type(given).__name__}, expected an object; correct it")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in STATIC_ROPE:
        raise UnsupportedError(
            f"llava: rope_type is {kind!r}, not supported (or its tables change with the prompt); "
            f"{nearest(str(kind), STATIC_ROPE)}"
        )
    rest = {key: value for key, value in given.items() if key != "type"}
    return {"rope_theta": text.get("rope_theta", 10000.0), **rest, "rope_type": kind}


def rename(key: str) -> str:
    """A checkpoint's tensor name as the name it has in `Parts`; both hub prefixes, old and new."""
    for pattern, to in _PREFIXES:
        key = re.sub(pattern, to, key)
    return key


def unused(name: str) -> bool:
    """Whether a (renamed) tensor may be there without being read: buffers, the tower's last layers and head."""
    return bool(_UNUSED.search(name))

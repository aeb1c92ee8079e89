"""LLaVA-1.5 in Hugging Face hub layout (`model_type: llava`): CLIP or SigLIP tower, Llama-shaped decoder."""

from __future__ import annotations

import re
from typing import Any

from lvlm_edge.exporter.spec import CheckpointError, DecoderSpec, ModelSpec, VisionSpec
from lvlm_edge.runtime.errors import UnsupportedError, nearest

TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
DECODERS = ("llama", "mistral", "qwen2")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others change their tables with the prompt's length

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
    from transformers import LlavaConfig

    for part, known in (("vision_config", TOWERS), ("text_config", DECODERS)):
        kind = (config.get(part) or {}).get("model_type")
        if kind is not None and kind not in known:
            raise UnsupportedError(f"llava: {part}.model_type is {kind!r}, not supported; {nearest(kind, known)}")
    try:
        full = LlavaConfig.from_dict(config)
    except Exception as error:  # transformers raises many types here
        reason = " ".join(str(error).split())
        raise CheckpointError(f"config.json: not a valid llava config ({reason}); correct it") from error
    # image_seq_length is not read: transformers' model does not, and configs carry its default of 576 for any tower.
    return ModelSpec(
        family="llava",
        vision=_vision(full),
        projector_act=full.projector_hidden_act,
        projector_bias=full.multimodal_projector_bias,
        decoder=_decoder(full),
        image_token_id=full.image_token_index,
    )


def _vision(full: Any) -> VisionSpec:
    vision, wanted = full.vision_config, full.vision_feature_layer
    count = vision.num_hidden_layers
    layers = tuple(wanted) if isinstance(wanted, (list, tuple)) else (wanted,)
    if any(not -count - 1 <= layer <= count for layer in layers):
        raise CheckpointError(
            f"config.json: vision_feature_layer is {wanted}, but the tower has {count} layers; correct it"
        )
    return VisionSpec(
        kind=TOWERS[vision.model_type],
        layers=count,
        hidden=vision.hidden_size,
        heads=vision.num_attention_heads,
        ffn=vision.intermediate_size,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        channels=vision.num_channels,
        eps=vision.layer_norm_eps,
        mlp_act=vision.hidden_act,
        feature_layers=tuple(layer % (count + 1) for layer in layers),
        drop_first=full.vision_feature_select_strategy == "default",
    )


def _decoder(full: Any) -> DecoderSpec:
    text = full.text_config
    rope = dict(text.rope_parameters)
    if rope["rope_type"] not in STATIC_ROPE:
        raise UnsupportedError(
            f"llava: rope_type is {rope['rope_type']!r}, not supported (some change with the prompt's length); "
            + nearest(rope["rope_type"], STATIC_ROPE)
        )
    qwen = text.model_type == "qwen2"
    windowed = text.model_type == "mistral" or (qwen and text.use_sliding_window)
    return DecoderSpec(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        ffn=text.intermediate_size,
        vocab=text.vocab_size,
        eps=text.rms_norm_eps,
        mlp_act=text.hidden_act,
        qkv_bias=qwen or getattr(text, "attention_bias", False),
        o_bias=not qwen and getattr(text, "attention_bias", False),
        mlp_bias=getattr(text, "mlp_bias", False),
        tied=full.tie_word_embeddings,
        window=getattr(text, "sliding_window", None) if windowed else None,
        max_positions=text.max_position_embeddings,
        rope={"rope_parameters": rope, "max_position_embeddings": text.max_position_embeddings},
    )


def rename(key: str) -> str:
    """A checkpoint's tensor name as the name it has in `Parts`; both hub prefixes, old and new."""
    for pattern, to in _PREFIXES:
        key = re.sub(pattern, to, key)
    return key


def unused(name: str) -> bool:
    """Whether a (renamed) tensor may be there without being read: buffers, the tower's last layers and head."""
    return bool(_UNUSED.search(name))

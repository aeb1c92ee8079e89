"""LLaVA-1.5 in Hugging Face hub layout (`model_type: llava`): CLIP or SigLIP tower, Llama-shaped decoder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lvlm_edge.exporter.checkpoints import configs
from lvlm_edge.exporter.checkpoints import integers as prequantised
from lvlm_edge.exporter.checkpoints.checkpoint import Stored
from lvlm_edge.exporter.checkpoints.spec import CheckpointError, ModelSpec
from lvlm_edge.runtime.errors import UnsupportedError, nearest

DECODERS = ("llama", "mistral", "qwen2")

# What a field that config.json leaves out means, as in `configs`.
DEFAULTS: dict[str, Any] = {
    "image_token_index": 32000, "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
    "text_config": {"model_type": "llama"},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    },
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


def read_spec(config: dict[str, Any], folder: Path | None = None) -> ModelSpec:
    """The spec from a hub `config.json`; fields it leaves out take the defaults of transformers' config classes.

    Raises:
        UnsupportedError: a tower, decoder, RoPE or activation this family does not know.
        CheckpointError: fields that are not valid or contradict each other.
    """
    full = {**DEFAULTS, **config}
    parts = {}
    for part, known in (("vision_config", configs.TOWERS), ("text_config", DECODERS)):
        given = full[part] or DEFAULTS[part]
        kind = given.get("model_type", DEFAULTS[part]["model_type"])
        parts[part] = configs.completed(f"llava: {part}", given, known, kind)
    strategy = full["vision_feature_select_strategy"]
    # image_seq_length is not read: transformers' model does not, and configs carry its default of 576 for any tower.
    try:
        vision = configs.vision(parts["vision_config"], full["vision_feature_layer"], drop_first=strategy == "default")
        if strategy not in ("default", "full"):
            raise UnsupportedError(
                f"llava: vision_feature_select_strategy is {strategy!r}; {nearest(str(strategy), ('default', 'full'))}"
            )
        return ModelSpec(
            family="llava",
            vision=vision,
            projector_act=full["projector_hidden_act"],
            projector_bias=bool(full["multimodal_projector_bias"]),
            decoder=configs.decoder("llava", parts["text_config"], tied=full["tie_word_embeddings"]),
            image_token_id=full.get("image_token_id", full["image_token_index"]),
        )
    except TypeError as error:  # sums with a field that is no number
        raise CheckpointError(f"config.json: a field has a value of the wrong kind ({error}); correct it") from error


def chat_template(config: dict[str, Any]) -> str:
    """The published prompt format."""
    return CHAT_TEMPLATE


def pictures(config: dict[str, Any], folder: Path) -> tuple[Path, str]:
    """Where `preprocessor_config.json` may be, and how pictures are fitted (see `preprocess.fitted`)."""
    return folder, "processor"


def tensors(config: dict[str, Any], folder: Path, spec: ModelSpec) -> dict[str, Stored]:
    """Every tensor by its name."""
    return prequantised.index(folder)


def rename(key: str) -> str:
    """A checkpoint's tensor name as the name it has in `Parts`; both hub prefixes, old and new."""
    for pattern, to in _PREFIXES:
        key = re.sub(pattern, to, key)
    return key


def unused(name: str) -> bool:
    """Whether a (renamed) tensor may be there without being read: buffers, the tower's last layers and head."""
    return bool(_UNUSED.search(name))

"""LLaVA-1.5 in Hugging Face hub layout (`model_type: llava`): CLIP or SigLIP tower, Llama-shaped decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lvlm_edge.exporter.checkpoints import configs, encoders, integers
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError, Source, renamed
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.families import _llava
from lvlm_edge.exporter.families._llava import VisionSpec
from lvlm_edge.exporter.planning import Capacity, Family
from lvlm_edge.runtime.errors import UnsupportedError, nearest
from lvlm_edge.runtime.pictures.layout import Picture

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


def read(of: Checkpoint) -> ModelSpec[VisionSpec]:
    """The spec from a hub `config.json`; fields it leaves out take the defaults of transformers' config classes.

    Raises:
        UnsupportedError: a tower, decoder, RoPE or activation this family does not know.
        CheckpointError: fields that are not valid or contradict each other.
    """
    full, seen, text = _llava.nested(of, "llava", DEFAULTS, DECODERS)
    strategy = full["vision_feature_select_strategy"]
    # image_seq_length is not read: transformers' model does not, and configs carry its default of 576 for any tower.
    try:
        encoder = encoders.read(seen, full["vision_feature_layer"], drop_first=strategy == "default")
        if strategy not in ("default", "full"):
            raise UnsupportedError(
                f"llava: vision_feature_select_strategy is {strategy!r}; {nearest(str(strategy), ('default', 'full'))}"
            )
        spec = ModelSpec(
            family="llava",
            vision=VisionSpec(
                encoder=encoder,
                projector_act=full["projector_hidden_act"],
                projector_bias=bool(full["multimodal_projector_bias"]),
            ),
            decoder=configs.decoder("llava", text, tied=full["tie_word_embeddings"]),
            image_token_id=full.get("image_token_id", full["image_token_index"]),
        )
        return _llava.check(spec, of.folder / "config.json")
    except TypeError as error:  # sums with a field that is no number
        raise CheckpointError(f"config.json: a field has a value of the wrong kind ({error}); correct it") from error


def chat_template(of: Checkpoint) -> str:
    """The published prompt format."""
    return CHAT_TEMPLATE


def pictures(of: Checkpoint, spec: ModelSpec[VisionSpec], capacity: Capacity) -> tuple[Picture, ...]:
    """One crop each, as the image processor makes it."""
    return _llava.pictures(of, spec, capacity, where=of.folder, fit="processor")


def weights(of: Checkpoint, spec: ModelSpec[VisionSpec], pictures: tuple[Picture, ...]) -> Mapping[str, Source]:
    """Every tensor by its name in `Parts`."""
    return renamed(integers.index(of), rename, of.folder)


def rename(key: str) -> str:
    """A checkpoint's tensor name as the name it has in `Parts`; both hub prefixes, old and new."""
    for pattern, to in _PREFIXES:
        key = re.sub(pattern, to, key)
    return key


def unused(name: str) -> bool:
    """Whether a (renamed) tensor may be there without being read: buffers, the tower's last layers and head."""
    return bool(_UNUSED.search(name))


FAMILY = Family(
    name="llava",
    vision=VisionSpec,
    read=read,
    pictures=pictures,
    work=_llava.work,
    weights=weights,
    rename=rename,
    unused=unused,
    extend=_llava.extend,
    graphs=_llava.graphs,
    chat_template=chat_template,
)

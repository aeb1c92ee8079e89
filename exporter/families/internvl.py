"""InternVL 2.5, 3 and 3.5 in Hugging Face hub layout (`model_type: internvl`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lvlm_edge.exporter.checkpoints import configs, integers
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError, Source, renamed
from lvlm_edge.exporter.checkpoints.preprocess import CLIP_MEAN, CLIP_STD
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.families import _intern
from lvlm_edge.exporter.families._intern import VisionSpec
from lvlm_edge.exporter.planning import Capacity, Family
from lvlm_edge.runtime.errors import UnsupportedError
from lvlm_edge.runtime.pictures.layout import Picture, Run

DECODERS = ("qwen2", "qwen3", "llama")

# What a field that config.json or preprocessor_config.json leaves out means.
DEFAULTS: dict[str, Any] = {
    "image_token_id": 151667, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default", "downsample_ratio": 0.5, "tie_word_embeddings": True,
    "text_config": {"model_type": "qwen2"}, "vision_config": {"model_type": "internvl_vision"},
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "attention_bias": False, "use_qk_norm": False, "norm_type": "layer_norm", "layer_norm_eps": 1e-6,
    "image_size": [448, 448], "patch_size": [14, 14], "use_absolute_position_embeddings": True,
    "use_mean_pooling": True, "hidden_act": "gelu", "num_channels": 3,
}  # fmt: skip
PROCESSORS: dict[str, dict[str, Any]] = {
    "GotOcr2ImageProcessor": {
        "resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "size": {"height": 384, "width": 384},
        "min_patches": 1, "max_patches": 12,
    },
}  # fmt: skip

_NAMES = (
    (r"^model\.(?=language_model|vision_tower|multi_modal_projector)", ""),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.(model\.)?embed_tokens\.", "embed."),
    (r"^language_model\.(model\.)?", ""),
    (r"^vision_tower\.(embeddings\.)?", "vision."),
    (r"^vision\.patch_embeddings\.projection\.", "vision.patch_embedding."),
    (r"^vision\.encoder\.layer\.", "vision.layers."),
    (r"^multi_modal_projector\.layer_norm\.", "projector.norm."),
    (r"^multi_modal_projector\.", "projector."),
    (r"(?<=\.)(self_attn|attention|mlp)\.", ""),
)
_UNUSED = re.compile(r"(position_ids|rotary_emb\.inv_freq)$|^vision\.(mask_token|layernorm\.)|^vision\.layers\.\d+\.")


def read(of: Checkpoint) -> ModelSpec[VisionSpec]:
    """The spec from config.json; fields it leaves out take the defaults of transformers' config classes.

    Raises:
        UnsupportedError: an encoder, decoder, RoPE, activation or choice of features that is not known.
        CheckpointError: fields that are not valid or contradict each other.
    """
    full, where = {**DEFAULTS, **of.config}, of.folder / "config.json"
    seen = full["vision_config"] or DEFAULTS["vision_config"]
    kind = seen.get("model_type", "internvl_vision")
    if kind != "internvl_vision":
        raise UnsupportedError(
            f"internvl: vision_config.model_type is {kind!r}, not supported; expected internvl_vision"
        )
    seen = {**ENCODER, **seen}
    spoken = configs.completed("internvl: text_config", full["text_config"] or DEFAULTS["text_config"], DECODERS)
    strategy, layer = full["vision_feature_select_strategy"], full["vision_feature_layer"]
    if strategy != "default":
        raise UnsupportedError(
            f"internvl: vision_feature_select_strategy is {strategy!r}, with which patches make no cells; expected "
            "'default'"
        )
    if seen["num_channels"] != 3:
        raise UnsupportedError(f"internvl: vision_config.num_channels is {seen['num_channels']!r}, expected 3")
    count = seen["num_hidden_layers"]
    if type(layer) is not int or type(count) is not int or not -count - 1 <= layer <= count:
        raise CheckpointError(
            f"{where}: vision_feature_layer is {layer!r}, expected one of {count!r} layers; correct it"
        )
    try:
        spec = ModelSpec(
            family="internvl",
            vision=VisionSpec(
                layers=layer % (count + 1),
                hidden=seen["hidden_size"],
                heads=seen["num_attention_heads"],
                ffn=seen["intermediate_size"],
                image_size=_intern.square(where, "image_size", seen["image_size"]),
                patch=_intern.square(where, "patch_size", seen["patch_size"]),
                eps=seen["layer_norm_eps"],
                mlp_act=seen["hidden_act"],
                projector_act=full["projector_hidden_act"],
                qkv_bias=bool(seen["attention_bias"]),
                qk_norm=bool(seen["use_qk_norm"]),
                norm=seen["norm_type"],
                positions=bool(seen["use_absolute_position_embeddings"]),
                last_norm=layer == -1 and not seen["use_mean_pooling"],
                merge=int(1 / full["downsample_ratio"]),
            ),
            decoder=configs.decoder("internvl", spoken, tied=bool(of.config.get("tie_word_embeddings"))),
            image_token_id=full["image_token_id"],
        )
        return _intern.check(spec, where)
    except (TypeError, ZeroDivisionError) as error:  # sums with a field that is no number, or is 0
        raise CheckpointError(f"config.json: a field has a value of the wrong kind ({error}); correct it") from error


def chat_template(of: Checkpoint) -> None:
    """None: the template comes with the checkpoint."""


def pictures(of: Checkpoint, spec: ModelSpec[VisionSpec], capacity: Capacity) -> tuple[Picture, ...]:
    """Tiles and thumbnail between `<img>` and `</img>`."""
    how, bounds = _intern.preprocessing(of.folder, PROCESSORS, spec.vision.image_size)
    before, behind = (Run(kind="text", rows=1, ids=_intern.token(of, token)) for token in _intern.AROUND)
    return _intern.pictures(spec, capacity, how, bounds, (before, behind))


def weights(of: Checkpoint, spec: ModelSpec[VisionSpec], pictures: tuple[Picture, ...]) -> Mapping[str, Source]:
    """Every tensor by its name in `Parts`; where no head is stored, it is the embedding's, as transformers has it."""
    found = renamed(integers.index(of), rename, of.folder)
    ties = of.config.get("tie_word_embeddings", DEFAULTS["tie_word_embeddings"])
    if ties and "lm_head.weight" not in found and "embed.weight" in found:
        found["lm_head.weight"] = found["embed.weight"]
    return found


def rename(key: str) -> str:
    """A checkpoint's tensor name as the name it has in `Parts`; both hub prefixes, old and new."""
    for pattern, to in _NAMES:
        key = re.sub(pattern, to, key)
    return key


def unused(name: str) -> bool:
    """Whether a (renamed) tensor may be there without being read: buffers, the encoder's last layers and norm."""
    return bool(_UNUSED.search(name))


FAMILY = Family(
    name="internvl",
    vision=VisionSpec,
    read=read,
    pictures=pictures,
    work=_intern.work,
    weights=weights,
    rename=rename,
    unused=unused,
    extend=_intern.extend,
    graphs=_intern.graphs,
    chat_template=chat_template,
    sized=True,
)

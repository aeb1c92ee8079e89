"""TinyLLaVA's layout (`model_type: tinyllava`), with a projector, or without one as HiMix writes it.

HiMix is known by `vision_hidden_size` inside `text_config`: its decoder reads the encoder's features in every layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lvlm_edge.exporter.checkpoints import configs, encoders, integers
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError, Source, renamed
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.checkpoints.templates import TEMPLATES
from lvlm_edge.exporter.families import _llava
from lvlm_edge.exporter.families._llava import VisionSpec
from lvlm_edge.exporter.planning import Capacity, Family
from lvlm_edge.runtime.errors import UnsupportedError, nearest
from lvlm_edge.runtime.pictures.layout import Picture

DECODERS = ("llama", "mistral", "qwen2")
CHATS = {"llama": "tinyllama", "mistral": "tinyllama", "qwen2": "qwen2_base"}
LLAMA_3 = 128000  # the first id that Llama 3's vocabulary has and Llama 2's lacks
STRATEGIES = {"patch": True, "cls_patch": False}
FITS = {None: "processor", "square": "processor", "pad": "pad"}

_NAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.embed_tokens\.", "embed."),
    (r"^language_model\.model\.", ""),
    (r"^vision_tower\._vision_tower\.(vision_model\.)?", "vision."),
    (r"^vision\.(embeddings|encoder)\.", "vision."),
    (r"^connector\._connector\.0\.", "projector.linear_1."),
    (r"^connector\._connector\.2\.", "projector.linear_2."),
    (r"(?<=\.)(self_attn|mlp)\.", ""),
)
_UNUSED = re.compile(
    r"(position_ids|rotary_emb\.inv_freq)$|^vision\.(post_layernorm|head)\.|^vision\.layers\.\d+\.|"
    r"^layers\.\d+\.(k_proj_img|v_proj_img|input_layernorm_img)\.weight$"
)


def read(of: Checkpoint) -> ModelSpec[VisionSpec]:
    """The spec from config.json.

    Raises:
        UnsupportedError: a tower, connector, decoder, RoPE or way of fitting pictures that is not known.
        CheckpointError: fields that are not valid or contradict each other.
    """
    config = of.config
    given, seen = config.get("text_config") or {}, config.get("vision_config") or {}
    text = configs.completed("tinyllava: text_config", given, DECODERS)
    tower = configs.completed("tinyllava: vision_config", seen, encoders.ENCODERS, defaults=encoders.DEFAULTS)
    strategy, ratio = config.get("vision_feature_select_strategy", "patch"), config.get("image_aspect_ratio")
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise UnsupportedError(
            f"tinyllava: vision_feature_select_strategy is {strategy!r}; {nearest(str(strategy), STRATEGIES)}"
        )
    if not isinstance(ratio, str | None) or ratio not in FITS:
        known = nearest(str(ratio), (fit for fit in FITS if fit))
        raise UnsupportedError(f"tinyllava: image_aspect_ratio is {ratio!r}; {known}")
    himix = "vision_hidden_size" in given
    connector = config.get("connector_type")
    if not himix and connector != "mlp2x_gelu":
        raise UnsupportedError(f"tinyllava: connector_type is {connector!r}; known: mlp2x_gelu, and HiMix without one")
    try:
        # The first token goes from SigLIP's features too, although it stands for a patch there.
        encoder = encoders.read(tower, config.get("vision_feature_layer", -2), drop_first=STRATEGIES[strategy])
        if himix and given["vision_hidden_size"] != encoder.hidden:
            raise CheckpointError(
                f"config.json: text_config.vision_hidden_size is {given['vision_hidden_size']!r}, but vision_config "
                f"has {encoder.hidden}; correct the one that is wrong"
            )
        spec = ModelSpec(
            family="tinyllava",
            vision=VisionSpec(encoder=encoder, projector_act=None if himix else "gelu", projector_bias=not himix),
            features=len(encoder.feature_layers) * encoder.hidden if himix else 0,
            decoder=configs.decoder("tinyllava", text),
            image_token_id=config.get("image_token_index", -200),
            settings={"himix": {}} if himix else {},
        )
        return _llava.check(spec, of.folder / "config.json")
    except (TypeError, ZeroDivisionError) as error:  # sums with a field that is no number, or is 0
        raise CheckpointError(f"config.json: a field has a value of the wrong kind ({error}); correct it") from error


def chat_template(of: Checkpoint) -> str:
    """The published conversation format that belongs to the decoder."""
    text = of.config["text_config"]
    if text["model_type"] == "llama" and text.get("vocab_size", 0) > LLAMA_3:
        return TEMPLATES["llama-3"]
    return TEMPLATES[CHATS[text["model_type"]]]


def pictures(of: Checkpoint, spec: ModelSpec[VisionSpec], capacity: Capacity) -> tuple[Picture, ...]:
    """One crop each."""
    return _llava.pictures(of, spec, capacity, where=of.folder, fit=FITS[of.config.get("image_aspect_ratio")])


def weights(of: Checkpoint, spec: ModelSpec[VisionSpec], pictures: tuple[Picture, ...]) -> Mapping[str, Source]:
    """Every tensor by its name in `Parts`."""
    return renamed(integers.index(of), rename, of.folder)


def rename(key: str) -> str:
    """A checkpoint's tensor name as the name it has in `Parts`."""
    for pattern, to in _NAMES:
        key = re.sub(pattern, to, key)
    return key


def unused(name: str) -> bool:
    """Whether a (renamed) tensor may be there without being read: buffers, last tower layers and head, HiMix's own."""
    return bool(_UNUSED.search(name))


FAMILY = Family(
    name="tinyllava",
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

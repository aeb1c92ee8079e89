"""LLaVA-OneVision in Hugging Face hub layout (`model_type: llava_onevision`): up to 36 tiles, made smaller where they
are many; several pictures of a prompt are one padded square each.
"""

from __future__ import annotations

import re
from typing import Any

from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.checkpoints.preprocess import HALF
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.families import _anyres, llava
from lvlm_edge.exporter.families._anyres import VisionSpec
from lvlm_edge.exporter.planning import Capacity, Family
from lvlm_edge.runtime.errors import UnsupportedError
from lvlm_edge.runtime.pictures.layout import Picture

PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]  # (height, width)

# What a field that config.json or preprocessor_config.json leaves out means.
DEFAULTS: dict[str, Any] = {
    **llava.DEFAULTS, "image_token_index": 151646, "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": PINPOINTS, "text_config": {"model_type": "qwen2"},
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
        "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip
PROCESSORS: dict[str, dict[str, Any]] = {
    "LlavaOnevisionImageProcessor": {
        "resample": 3, "image_mean": HALF, "image_std": HALF, "image_grid_pinpoints": PINPOINTS,
    },
}  # fmt: skip


def read(of: Checkpoint) -> ModelSpec[VisionSpec]:
    """The spec from config.json, see `_anyres.read`.

    Raises:
        UnsupportedError: also for another `vision_aspect_ratio`.
    """
    ratio = of.config.get("vision_aspect_ratio", DEFAULTS["vision_aspect_ratio"])
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", str(ratio))
    if found is None:
        raise UnsupportedError(f"llava_onevision: vision_aspect_ratio is {ratio!r}, expected anyres_max_N")
    return _anyres.read(of, "llava_onevision", DEFAULTS, most=int(found[1]), squares=True)


def chat_template(of: Checkpoint) -> None:
    """None: the template comes with the checkpoint."""


def pictures(of: Checkpoint, spec: ModelSpec[VisionSpec], capacity: Capacity) -> tuple[Picture, ...]:
    """The base view and the tiles of the best canvas; of several pictures a square each."""
    return _anyres.pictures(spec, capacity, _anyres.preprocessing(of.folder, PROCESSORS, spec.vision))


FAMILY = Family(
    name="llava_onevision",
    vision=VisionSpec,
    read=read,
    pictures=pictures,
    work=_anyres.work,
    weights=_anyres.weights,
    rename=_anyres.rename,
    unused=llava.unused,
    extend=_anyres.extend,
    graphs=_anyres.graphs,
    chat_template=chat_template,
    sized=True,
)

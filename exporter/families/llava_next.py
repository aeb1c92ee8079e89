"""LLaVA-1.6 in Hugging Face hub layout (`model_type: llava_next`): any resolution, padding cut off, newlines."""

from __future__ import annotations

from typing import Any

from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.checkpoints.preprocess import CLIP_MEAN, CLIP_STD
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.families import _anyres, llava
from lvlm_edge.exporter.families._anyres import VisionSpec
from lvlm_edge.exporter.planning import Capacity, Family
from lvlm_edge.runtime.pictures.layout import Picture

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # (height, width)

# What a field that config.json or preprocessor_config.json leaves out means.
DEFAULTS: dict[str, Any] = {**llava.DEFAULTS, "image_grid_pinpoints": PINPOINTS}
PROCESSORS: dict[str, dict[str, Any]] = {
    "LlavaNextImageProcessor": {
        "resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_grid_pinpoints": PINPOINTS,
    },
}  # fmt: skip


def read(of: Checkpoint) -> ModelSpec[VisionSpec]:
    """The spec from config.json, see `_anyres.read`."""
    return _anyres.read(of, "llava_next", DEFAULTS)


def chat_template(of: Checkpoint) -> None:
    """None: the releases have templates of several kinds, each with its checkpoint."""


def pictures(of: Checkpoint, spec: ModelSpec[VisionSpec], capacity: Capacity) -> tuple[Picture, ...]:
    """The base view, and the tiles of the best canvas."""
    return _anyres.pictures(spec, capacity, _anyres.preprocessing(of.folder, PROCESSORS, spec.vision))


FAMILY = Family(
    name="llava_next",
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

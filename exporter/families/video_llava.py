"""Video-LLaVA in Hugging Face hub layout (`model_type: video_llava`): one tower for pictures, another for videos.

Source: arXiv:2311.10122.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lvlm_edge.exporter.checkpoints import configs, encoders, integers, preprocess
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError, Source, renamed
from lvlm_edge.exporter.checkpoints.encoders import EncoderSpec
from lvlm_edge.exporter.checkpoints.spec import ModelSpec, check_kind
from lvlm_edge.exporter.families import _llava, llava
from lvlm_edge.exporter.families._llava import VisionSpec
from lvlm_edge.exporter.planning import Capacity, Family, GraphSpec, Plan, Tensors, Work
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.errors import UnsupportedError, nearest
from lvlm_edge.runtime.pictures.layout import Picture, Run
from lvlm_edge.runtime.pictures.views import Canvas, Views

FRAMES = 8  # of a video, in training
IMAGE, VIDEO = "image", "video"  # towers, by the kind of what they see
GRAPHS = {IMAGE: "vision", VIDEO: "vision_video"}

# What a field that config.json leaves out means, as in `configs`.
DEFAULTS: dict[str, Any] = {
    **llava.DEFAULTS, "video_token_index": 32001,
    "vision_config": {**llava.DEFAULTS["vision_config"], "image_size": 224},
}  # fmt: skip

_PREFIXES = (
    (r"^model\.(?=language_model|image_tower|video_tower|multi_modal_projector)", ""),
    (r"^(image|video)_tower\.(vision_model\.)?", r"vision.\1."),
    (r"^vision\.(image|video)\.(embeddings|encoder)\.", r"vision.\1."),
)
_UNUSED = re.compile(r"^vision\.(image|video)\.(post_layernorm\.|layers\.\d+\.|position_ids$)")


def read(of: Checkpoint) -> ModelSpec[VisionSpec]:
    """The spec from config.json; fields it leaves out take the defaults of transformers' config classes.

    Raises:
        UnsupportedError: towers, a decoder, RoPE or activation that is not known.
        CheckpointError: fields that are not valid or contradict each other.
    """
    full, seen, text = _llava.nested(of, "video_llava", DEFAULTS, llava.DECODERS)
    strategy = full["vision_feature_select_strategy"]
    if seen["model_type"] != "clip_vision_model":
        raise UnsupportedError(
            f"video_llava: the towers are {seen['model_type']!r}; {nearest(seen['model_type'], ['clip_vision_model'])}"
        )
    if strategy not in ("default", "full"):
        raise UnsupportedError(
            f"video_llava: vision_feature_select_strategy is {strategy!r}; "
            f"{nearest(str(strategy), ('default', 'full'))}"
        )
    try:
        spec = ModelSpec(
            family="video_llava",
            vision=VisionSpec(
                encoder=encoders.read(seen, full["vision_feature_layer"], drop_first=strategy == "default"),
                projector_act=full["projector_hidden_act"],
                projector_bias=bool(full["multimodal_projector_bias"]),
            ),
            decoder=configs.decoder("video_llava", text, tied=full["tie_word_embeddings"]),
            image_token_id=full.get("image_token_id", full["image_token_index"]),
            video_token_id=full.get("video_token_id", full["video_token_index"]),
        )
        check_kind(of.folder / "config.json", "video_token_index", spec.video_token_id, int)
        return _llava.check(spec, of.folder / "config.json")
    except TypeError as error:  # sums with a field that is no number
        raise CheckpointError(f"config.json: a field has a value of the wrong kind ({error}); correct it") from error


def chat_template(of: Checkpoint) -> None:
    """None: the releases have theirs with them."""


def tower(spec: ModelSpec[VisionSpec], kind: str) -> EncoderSpec:
    """The encoder of images or videos; a frame keeps its class token whatever config.json says of images."""
    found = spec.vision.encoder
    return found if kind == IMAGE else replace(found, drop_first=False)


def pictures(of: Checkpoint, spec: ModelSpec[VisionSpec], capacity: Capacity) -> tuple[Picture, ...]:
    """One crop each of images; of videos as many frames as are planned, each as the image processor makes it.

    Images of every size are one crop, so that `--image-size` has no effect.
    """
    free = replace(capacity, image_size=())
    images = _llava.pictures(of, spec, free, where=of.folder, fit="processor")
    if not capacity.num_videos:
        return images
    assert spec.video_token_id is not None
    v, frames = tower(spec, VIDEO), capacity.num_frames or FRAMES
    how = preprocess.of_folder(of.folder, v)
    views = Views(canvas=Canvas(size=(v.image_size, v.image_size)), frames=frames, how=how)
    run = Run(kind="visual", rows=v.tokens, grid=(v.grid, v.grid), leading=1)
    video = Picture(token_id=spec.video_token_id, graphs=(GRAPHS[VIDEO],), views=views, runs=(run,) * frames)
    return images + (video,) * capacity.num_videos


def work(spec: ModelSpec[VisionSpec], picture: Picture) -> tuple[Work, Work]:
    """Products of a picture's tower, per view, and of the projector, per picture."""
    seen = replace(spec.vision, encoder=tower(spec, picture.kind))
    encoder, projector = _llava.work(replace(spec, vision=seen), picture)
    return replace(encoder, part=GRAPHS[picture.kind]), projector


def weights(of: Checkpoint, spec: ModelSpec[VisionSpec], pictures: tuple[Picture, ...]) -> Mapping[str, Source]:
    """Every tensor by its name in `Parts`, without those of a tower that sees nothing."""
    found = renamed(integers.index(of), rename, of.folder)
    blind = tuple(f"vision.{kind}." for kind in {IMAGE, VIDEO} - {picture.kind for picture in pictures})
    return {name: source for name, source in found.items() if not name.startswith(blind)}


def rename(key: str) -> str:
    """A checkpoint's tensor name as the name it has in `Parts`; all hub prefixes."""
    for pattern, to in _PREFIXES:
        key = re.sub(pattern, to, key)
    return llava.rename(key)


def unused(name: str) -> bool:
    """Whether a (renamed) tensor may be there without being read: buffers, and the towers' last layers."""
    return llava.unused(name) or bool(_UNUSED.search(name))


def extend(parts: Any, plan: Plan) -> None:
    """Give the parts the towers that see something, and the projector that they share."""
    from torch.nn import ModuleDict

    from lvlm_edge.exporter.graphs.encoders import ENCODERS, Projector

    seen: VisionSpec = plan.spec.vision
    kinds = dict.fromkeys(picture.kind for picture in plan.pictures)
    towers = {kind: tower(plan.spec, kind) for kind in kinds}
    parts.vision = ModuleDict({kind: ENCODERS[v.kind](v, plan.vision_lowering) for kind, v in towers.items()})
    wide = len(seen.encoder.feature_layers) * seen.encoder.hidden
    act, bias = str(seen.projector_act), seen.projector_bias
    parts.projector = Projector(wide, plan.spec.decoder.hidden, act, bias=bias, newline=False)


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """`vision` of an image, `vision_video` of a frame: pixel_values to the tower's features, and their projection."""
    found = []
    for kind in dict.fromkeys(picture.kind for picture in plan.pictures):
        v = tower(plan.spec, kind)
        wide, hidden = len(v.feature_layers) * v.hidden, plan.spec.decoder.hidden
        pixels = TensorInfo("pixel_values", plan.vision_dtype, (1, v.channels, v.image_size, v.image_size))
        features = TensorInfo("image_features", plan.vision_dtype, (1, v.tokens, wide))
        embeds = TensorInfo("image_embeds", plan.dtype, (1, v.tokens, hidden))
        body = partial(_vision, kind=kind)
        found.append(
            GraphSpec(name=GRAPHS[kind], role="image", inputs=(pixels,), outputs=(features, embeds), body=body)
        )
    return tuple(found)


def _vision(parts: Any, plan: Plan, inputs: Tensors, *, kind: str) -> Tensors:
    features = parts.vision[kind](inputs["pixel_values"])
    return {"image_features": features, "image_embeds": parts.projector(features).to(parts.lm_head.weight.dtype)}


FAMILY = Family(
    name="video_llava",
    vision=VisionSpec,
    read=read,
    pictures=pictures,
    work=work,
    weights=weights,
    rename=rename,
    unused=unused,
    extend=extend,
    graphs=graphs,
    chat_template=chat_template,
    frames=FRAMES,
)

"""What LLaVA's layouts share: a CLIP or SigLIP encoder, square crops of one size, and a two-layer projector."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lvlm_edge.exporter.checkpoints import configs, encoders, preprocess
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.checkpoints.encoders import EncoderSpec
from lvlm_edge.exporter.checkpoints.spec import ModelSpec, check_kind
from lvlm_edge.exporter.planning import (
    Attention,
    Capacity,
    GraphSpec,
    Plan,
    PlanError,
    Product,
    Tensors,
    Work,
)
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.pictures.layout import Picture, Run
from lvlm_edge.runtime.pictures.views import Canvas, Views, best_canvas


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """Encoder and projector.

    Attributes:
        projector_act: None for a model without a projector, whose decoder reads the encoder's features.
        newline: a learned vector, the separator, comes after the visual tokens of every crop.
        pinpoints: (width, height) of the canvases of any-resolution pictures; empty for pictures of one crop.
    """

    encoder: EncoderSpec
    projector_act: str | None
    projector_bias: bool
    newline: bool = False
    pinpoints: tuple[tuple[int, int], ...] = ()


def nested(
    of: Checkpoint, family: str, defaults: Mapping[str, Any], decoders: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A hub config whose parts are nested: all of it, its encoder's part and its decoder's, without missing fields.

    Args:
        defaults: what a field that config.json leaves out means; a part that is there takes those of its own class.
        decoders: kinds that are supported.

    Raises:
        UnsupportedError: a tower or decoder that is not known.
    """
    full = {**defaults, **of.config}
    found = []
    for part, known, own in (
        ("vision_config", encoders.ENCODERS, encoders.DEFAULTS),
        ("text_config", decoders, configs.DEFAULTS),
    ):
        given = full[part] or defaults[part]
        kind = given.get("model_type", defaults[part]["model_type"])
        found.append(configs.completed(f"{family}: {part}", given, known, kind, own))
    return full, found[0], found[1]


def check(spec: ModelSpec[VisionSpec], path: Path) -> ModelSpec[VisionSpec]:
    """The spec, if its sizes can be: see `encoders.check`."""
    encoders.check(spec.vision.encoder, path)
    if spec.vision.projector_act is not None or not spec.reads_features:
        check_kind(path, "projector_hidden_act", spec.vision.projector_act, str)
    return spec


def pictures(
    of: Checkpoint, spec: ModelSpec[VisionSpec], capacity: Capacity, *, where: Path, fit: str
) -> tuple[Picture, ...]:
    """What each image stands for: the tokens of its crops, a separator behind each where the model has one.

    Args:
        where: folder of preprocessor_config.json.
        fit: how pictures are fitted, see `preprocess.fitted`.

    Raises:
        PlanError: the model has no tiles, or not these.
    """
    v, seen = spec.vision.encoder, spec.vision
    how = preprocess.fitted(preprocess.of_folder(where, v), fit, v.image_size)
    each = [Run(kind="visual", rows=v.tokens, **_cells(v))]
    if spec.reads_features:
        each = [Run(kind="cached", rows=v.tokens, **_cells(v))]
    elif seen.newline:
        each.append(Run(kind="separator", rows=1))
    found = []
    for size in capacity.sizes:
        tiles = _tiles(seen, size, capacity.grid)
        square = (v.image_size, v.image_size)
        canvas = Canvas(size=square)
        if tiles is not None:
            on = (tiles[1] * v.image_size, tiles[0] * v.image_size)
            canvas = Canvas(size=on, rule="pinpoints", among=seen.pinpoints)
        views = Views(canvas=canvas, tiles=tiles, how=how)
        runs = tuple(each) * views.count
        found.append(Picture(token_id=spec.image_token_id, graphs=("vision",), views=views, runs=runs))
    return tuple(found)


def _cells(v: EncoderSpec) -> dict[str, Any]:
    """Which patches visual tokens stand for: a class token for none, and with SigLIP's first dropped one is missing."""
    clip = v.kind == "clip"
    return {
        "grid": (v.grid, v.grid),
        "leading": int(clip and not v.drop_first),
        "missing": int(not clip and v.drop_first),
    }


def _tiles(
    seen: VisionSpec, image_size: tuple[int, int] | None, grid: tuple[int, int] | None
) -> tuple[int, int] | None:
    """(rows, columns) of the tiles.

    Raises:
        PlanError: the model has no tiles, or not these.
    """
    if image_size is None and grid is None:
        return None
    if not seen.pinpoints:
        raise PlanError(
            f"plan: {'--grid' if image_size is None else '--image-size'} is for any-resolution checkpoints, but this "
            "one sees every picture as one crop; leave it out"
        )
    side = seen.encoder.image_size
    known = [(height // side, width // side) for width, height in seen.pinpoints]
    if image_size is not None:
        width, height = best_canvas(image_size, seen.pinpoints)
        return height // side, width // side
    if grid not in known:
        assert grid is not None
        names = ", ".join(f"{rows}x{columns}" for rows, columns in known)
        raise PlanError(
            f"plan: --grid is {grid[0]}x{grid[1]}, which is not among the checkpoint's image_grid_pinpoints; choose "
            f"one of {names} (rows x columns)"
        )
    return grid


def encoder_work(v: EncoderSpec) -> Work:
    """Products of an encoder up to the highest feature layer, per crop."""
    n, depth = v.positions, max(v.feature_layers)
    patches = Product(v.patch_size**2 * v.channels, v.hidden, v.grid**2, matrix=False)
    layer = (
        Product(v.hidden, v.hidden, n, 4 * depth),
        Product(v.hidden, v.ffn, n, depth),
        Product(v.ffn, v.hidden, n, depth),
        Attention(n, n, v.heads, v.hidden // v.heads, depth),
    )
    vectors = n * v.hidden + (3 if v.kind == "clip" else 1) * v.hidden  # class token and pre-norm, or the patch bias
    vectors += depth * (9 * v.hidden + v.ffn) + 2 * v.hidden * v.post_norm
    wide = max(3 * v.hidden, 2 * v.ffn)
    return Work((patches, *layer), vectors, layers=depth, hidden=v.hidden, wide=wide, rows=n)


def work(spec: ModelSpec[VisionSpec], picture: Picture) -> tuple[Work, Work]:
    """Products of the encoder up to the highest feature layer, per crop, and of the projector, per picture."""
    v, d = spec.vision.encoder, spec.decoder.hidden
    encoder = encoder_work(v)
    if spec.vision.projector_act is None:
        return encoder, Work()
    rows = v.tokens * picture.views.count
    steps = (Product(len(v.feature_layers) * v.hidden, d, rows), Product(d, d, rows))
    ends = (2 * spec.vision.projector_bias + spec.vision.newline) * d
    return encoder, Work(steps, ends, layers=picture.views.count, hidden=d, rows=rows)


def extend(parts: Any, plan: Plan) -> None:
    """Give the parts the encoder and the projector."""
    from lvlm_edge.exporter.graphs.encoders import ENCODERS, Projector

    seen: VisionSpec = plan.spec.vision
    parts.vision = ENCODERS[seen.encoder.kind](seen.encoder, plan.vision_lowering)
    if seen.projector_act is not None:
        wide = len(seen.encoder.feature_layers) * seen.encoder.hidden
        hidden, bias = plan.spec.decoder.hidden, seen.projector_bias
        parts.projector = Projector(wide, hidden, seen.projector_act, bias=bias, newline=seen.newline)


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """`vision`: pixel_values of one crop to the encoder's features, and their projection with the crop's separator."""
    seen: VisionSpec = plan.spec.vision
    v = seen.encoder
    wide = len(v.feature_layers) * v.hidden
    features = TensorInfo("image_features", plan.vision_dtype, (1, v.tokens, wide))
    embeds = TensorInfo("image_embeds", plan.dtype, (1, v.tokens + seen.newline, plan.spec.decoder.hidden))
    pixels = TensorInfo("pixel_values", plan.vision_dtype, (1, v.channels, v.image_size, v.image_size))
    projects = seen.projector_act is not None
    return (
        GraphSpec(
            name="vision",
            role="image",
            inputs=(pixels,),
            outputs=(features, embeds) if projects else (features,),
            body=partial(_vision, projects=projects),
        ),
    )


def _vision(parts: Any, plan: Plan, inputs: Tensors, *, projects: bool) -> Tensors:
    features = parts.vision(inputs["pixel_values"])
    if not projects:
        return {"image_features": features}
    return {"image_features": features, "image_embeds": parts.projector(features).to(parts.lm_head.weight.dtype)}

"""What LLaVA-NeXT and its kin share: tiles put together to one map, its padding cut off, a newline behind every row.

Sources: `pack_image_features` of LLaVA-NeXT and LLaVA-OneVision in transformers 5.23.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lvlm_edge.exporter.checkpoints import configs, encoders, integers, preprocess
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError, Source, renamed
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.families import _llava, llava
from lvlm_edge.exporter.planning import Capacity, GraphSpec, Plan, PlanError, Tensors, Work
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.errors import UnsupportedError
from lvlm_edge.runtime.pictures.image import Preprocessing
from lvlm_edge.runtime.pictures.layout import Picture, Run
from lvlm_edge.runtime.pictures.views import Canvas, Views, best_canvas, covered

if TYPE_CHECKING:
    from torch import Tensor

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
SMALLER = 1.1  # a map is made smaller where its side is so many times longer than it may be


@dataclass(frozen=True, kw_only=True)
class VisionSpec(_llava.VisionSpec):
    """Encoder and projector.

    Attributes:
        most: tiles whose cells a picture may have (`anyres_max_9`); None for any number.
        squares: several pictures in a prompt are one padded square each.
        unpad: padding is cut off, and a newline ends every row.
        decimals: see `Canvas`.
    """

    most: int | None = None
    squares: bool = False
    unpad: bool = True
    decimals: int | None = 7


def read(of: Checkpoint, family: str, defaults: Mapping[str, Any], **own: Any) -> ModelSpec[VisionSpec]:
    """The spec from config.json.

    Args:
        defaults: what a field that config.json leaves out means.
        own: further fields of `VisionSpec`.

    Raises:
        UnsupportedError: a tower, decoder, RoPE or activation that is not known, or a class token among features.
        CheckpointError: fields that are not valid or contradict each other.
    """
    full, seen, text = _llava.nested(of, family, defaults, DECODERS)
    where, strategy = of.folder / "config.json", full["vision_feature_select_strategy"]
    clip = seen["model_type"] == "clip_vision_model"
    if strategy != ("default" if clip else "full"):
        raise UnsupportedError(
            f"{family}: vision_feature_select_strategy is {strategy!r}, with which tiles make no map; expected "
            f"{'default' if clip else 'full'!r} for this encoder"
        )
    try:
        encoder = encoders.read(seen, full["vision_feature_layer"], drop_first=clip)
        spec = ModelSpec(
            family=family,
            vision=VisionSpec(
                encoder=encoder,
                projector_act=full["projector_hidden_act"],
                projector_bias=bool(full["multimodal_projector_bias"]),
                pinpoints=pinpoints(where, full["image_grid_pinpoints"], encoder.image_size),
                **own,
            ),
            decoder=configs.decoder(family, text, tied=full["tie_word_embeddings"]),
            image_token_id=full.get("image_token_id", full["image_token_index"]),
        )
        _llava.check(spec, where)
        return spec
    except TypeError as error:  # sums with a field that is no number
        raise CheckpointError(f"config.json: a field has a value of the wrong kind ({error}); correct it") from error


def pinpoints(where: Path, given: Any, size: int) -> tuple[tuple[int, int], ...]:
    """Canvases, (width, height), from pairs of height and width.

    Raises:
        CheckpointError: canvases that are not made of whole tiles.
    """
    wrong = (
        f"{where}: image_grid_pinpoints is {given!r}, expected pairs of multiples of {size}, the encoder's input; "
        "correct it"
    )
    if not isinstance(given, list | tuple) or not given:
        raise CheckpointError(wrong)
    for pair in given:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise CheckpointError(wrong)
        if any(type(n) is not int or n < 1 or n % size for n in pair):
            raise CheckpointError(wrong)
    return tuple((width, height) for height, width in given)


def preprocessing(folder: Path, kinds: Mapping[str, Mapping[str, Any]], seen: VisionSpec) -> Preprocessing:
    """The steps of every view.

    Args:
        kinds: by the name of the image processor, what a key that is missing means.

    Raises:
        CheckpointError: no file, canvases other than config.json's, or views that are no input of the encoder.
        UnsupportedError: another image processor, or steps that are not known.
    """
    where, values = preprocess.of_processor(folder, kinds)
    size = seen.encoder.image_size
    sides = [values.get("crop_size"), values.get("size")]
    found = [side for given in sides if isinstance(given, Mapping) for side in given.values() if side is not None]
    if any(side != size for side in found):
        raise CheckpointError(f"{where}: makes views of {found}, config.json says {size} pixels; correct it")
    own = pinpoints(where, values["image_grid_pinpoints"], size)
    if own != seen.pinpoints:
        raise CheckpointError(
            f"{where}: image_grid_pinpoints are {list(own)} (width, height), config.json's {list(seen.pinpoints)}; "
            "correct the file that is wrong"
        )
    if values["resample"] != 3:
        raise UnsupportedError(f"{where}: resample is {values['resample']!r}, not supported; expected 3 (bicubic)")
    return preprocess.view(where, values, size)


def pictures(spec: ModelSpec[VisionSpec], capacity: Capacity, how: Preprocessing) -> tuple[Picture, ...]:
    """The whole picture, and its tiles as one map; one graph packs each kind of picture.

    Raises:
        PlanError: no size, or one that no picture may have.
    """
    if capacity.grid is not None:
        raise PlanError(
            f"{spec.family}: the number of visual tokens depends on the picture's exact size; give --image-size WxH "
            "instead of --grid"
        )
    seen = spec.vision
    if seen.squares and capacity.num_images > 1:
        return (_square(spec, how),) * capacity.num_images
    if not capacity.image_size:
        raise PlanError(
            f"{spec.family}: the number of visual tokens depends on the size of the picture; give --image-size WxH"
        )
    found = [_tiled(spec, size, how) for size in capacity.sizes if size is not None]
    kinds = list(dict.fromkeys((picture.views.tiles, picture.runs, _covered(picture)) for picture in found))
    names = ["pack"] if len(kinds) == 1 else [f"pack.{i}" for i in range(len(kinds))]
    return tuple(replace(p, graphs=("vision", names[kinds.index((p.views.tiles, p.runs, _covered(p)))])) for p in found)


def _tiled(spec: ModelSpec[VisionSpec], size: tuple[int, int], how: Preprocessing) -> Picture:
    """A picture of (width, height)."""
    seen = spec.vision
    side, grid = seen.encoder.image_size, seen.encoder.grid
    width, height = best_canvas(size, seen.pinpoints)
    tiles = (height // side, width // side)
    cells = (tiles[0] * grid, tiles[1] * grid)
    canvas = Canvas(
        size=(width, height),
        rule="pinpoints",
        among=seen.pinpoints,
        picture=size,
        cells=cells,
        decimals=seen.decimals,
    )
    rows, columns = (len(part) for part in covered(size, canvas))
    if seen.most is not None:
        ratio = math.sqrt(rows * columns / (seen.most * grid**2))
        if ratio > SMALLER:
            rows, columns = int(rows // ratio), int(columns // ratio)
    if min(rows, columns) < 1:
        raise PlanError(
            f"{spec.family}: pictures of {size[0]}x{size[1]} are too thin, their tiles hold padding alone; "
            "give another --image-size"
        )
    base = Run(kind="visual", rows=grid**2, grid=(grid, grid))
    every = Run(kind="visual", rows=rows * (columns + 1), grid=(rows, columns), row_ends=1)
    views = Views(canvas=canvas, tiles=tiles, how=how)
    return Picture(token_id=spec.image_token_id, graphs=("vision",), views=views, runs=(base, every))


def _square(spec: ModelSpec[VisionSpec], how: Preprocessing) -> Picture:
    """One of several pictures: in the middle of a square of the mean colour."""
    seen = spec.vision.encoder
    red, green, blue = (int(channel * 255) for channel in how.mean or (0.0, 0.0, 0.0))
    canvas = Canvas(size=(seen.image_size, seen.image_size))
    views = Views(canvas=canvas, how=replace(how, pad_to_square=(red, green, blue)))
    cells = Run(kind="visual", rows=seen.grid**2, grid=(seen.grid, seen.grid))
    newline = Run(kind="visual", rows=1)
    return Picture(token_id=spec.image_token_id, graphs=("vision", "pack"), views=views, runs=(cells, newline))


def _covered(picture: Picture) -> tuple[range, range]:
    """Rows and columns of cells that hold more than padding."""
    return covered(picture.views.canvas.picture, picture.views.canvas)


def weights(of: Checkpoint, spec: ModelSpec[VisionSpec], pictures: tuple[Picture, ...]) -> Mapping[str, Source]:
    """Every tensor by its name in `Parts`."""
    return renamed(integers.index(of), rename, of.folder)


def rename(key: str) -> str:
    """A checkpoint's tensor name as the name it has in `Parts`; all hub prefixes."""
    return re.sub(r"^(model\.)?image_newline$", "projector.image_newline", llava.rename(key))


def work(spec: ModelSpec[VisionSpec], picture: Picture) -> tuple[Work, Work]:
    """Products of the encoder, per view, and of the projector, per picture; packing has none that count."""
    encoder, projector = _llava.work(spec, picture)
    return encoder, replace(projector, vectors=projector.vectors + spec.decoder.hidden)


def extend(parts: Any, plan: Plan) -> None:
    """Give the parts the encoder, the projector and the newline."""
    import torch

    _llava.extend(parts, plan)
    parts.projector.image_newline = torch.nn.Parameter(torch.empty(plan.spec.decoder.hidden))


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """`vision`: pixel_values of one view to features and their projection; `pack`: those of a picture to its rows."""
    (vision,) = _llava.graphs(plan)
    features, embeds = vision.outputs
    view = replace(embeds, name="view_embeds")
    found = [replace(vision, outputs=(features, view), body=_vision)]
    for name, picture in {p.graphs[1]: p for p in reversed(plan.pictures)}.items():
        count, hidden = picture.views.count * view.shape[1], view.shape[2]
        given = TensorInfo("view_embeds", plan.dtype, (1, count, hidden))
        rows = TensorInfo("image_embeds", plan.dtype, (1, picture.rows("visual"), hidden))
        body = partial(_pack, picture=picture)
        found.append(GraphSpec(name=name, role="image", inputs=(given,), outputs=(rows,), body=body))
    return tuple(found)


def _vision(parts: Any, plan: Plan, inputs: Tensors) -> Tensors:
    features = parts.vision(inputs["pixel_values"])
    return {"image_features": features, "view_embeds": parts.projector(features).to(parts.lm_head.weight.dtype)}


def _pack(parts: Any, plan: Plan, inputs: Tensors, *, picture: Picture) -> Tensors:
    """The rows of a picture: its base view, then its map row by row."""
    from lvlm_edge.exporter.graphs import blocks

    views = inputs["view_embeds"][0]
    newline = parts.projector.image_newline.to(views.dtype)
    base, every = picture.runs
    if every.grid is None:
        return {"image_embeds": blocks.concat([views, newline[None]])[None]}
    cells = map_cells(picture)
    tokens, grid = views.index_select(0, blocks.constant(cells.reshape(-1).tolist())), every.grid
    if cells.shape != grid:
        tokens = _resampled(tokens.reshape(*cells.shape, -1), grid)
    ends = newline[None, None].expand(grid[0], 1, -1)
    rows = blocks.concat([tokens.reshape(*grid, -1), ends], 1).flatten(0, 1)
    return {"image_embeds": blocks.concat([views[: base.rows], rows])[None]}


def map_cells(picture: Picture) -> NDArray[np.int64]:
    """Row of each covered cell among the visual tokens of all views, [rows, columns]; the base view comes first."""
    tiles = picture.views.tiles
    assert tiles is not None
    n = picture.views.canvas.cells[0] // tiles[0]
    rows, columns = (np.array(part) for part in _covered(picture))
    tile = rows[:, None] // n * tiles[1] + columns[None] // n
    found: NDArray[np.int64] = (1 + tile) * n**2 + rows[:, None] % n * n + columns[None] % n
    return found


def _resampled(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map [h, w, D] bilinearly on another grid, [h', w', D]: two constant matrices."""
    import torch

    down, across = (
        torch.from_numpy(bilinear(size, wanted)).to(cells.dtype)
        for size, wanted in zip(cells.shape[:2], grid, strict=True)
    )
    rows = (down @ cells.flatten(1)).reshape(grid[0], cells.shape[1], -1)
    return across @ rows


def bilinear(size: int, wanted: int) -> NDArray[np.float32]:
    """Weights of bilinear resampling along one axis, half-pixel centres, no antialiasing: [wanted, size]."""
    at = np.maximum((np.arange(wanted) + 0.5) * (size / wanted) - 0.5, 0)
    low = np.minimum(at.astype(np.int64), size - 1)
    share = (at - low).astype(np.float32)
    found = np.zeros((wanted, size), np.float32)
    found[np.arange(wanted), low] += 1 - share
    found[np.arange(wanted), np.minimum(low + 1, size - 1)] += share
    return found

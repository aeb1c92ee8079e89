"""What InternVL's layouts share: InternViT, tiles of the nearest shape with a thumbnail, cells of patches as channels.

Sources: `modeling_internvl.py` and `image_processing_pil_got_ocr2.py` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_edge.exporter.checkpoints import preprocess, text
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError
from lvlm_edge.exporter.checkpoints.spec import ModelSpec, check_kind, check_shares, check_sizes
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
from lvlm_edge.runtime.errors import UnsupportedError, nearest
from lvlm_edge.runtime.pictures.image import Preprocessing
from lvlm_edge.runtime.pictures.layout import Picture, Run
from lvlm_edge.runtime.pictures.views import Canvas, Views, nearest_shape

AROUND = ("<img>", "</img>")
NORMS = ("layer_norm", "rms_norm")
QK_EPS, PROJECTOR_EPS = 1e-6, 1e-5  # which no config names
MOST_TILES = 1024  # that a processor may ask for


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """InternViT and the projector.

    Attributes:
        layers: that are run.
        qkv_bias: queries, keys and values have biases.
        qk_norm: queries and keys are RMS-normalised over their whole width.
        norm: `layer_norm` or `rms_norm`.
        positions: there is a learned table of positions.
        last_norm: a LayerNorm comes behind the last layer.
        merge: patches along each side of a visual token.
        by_columns: visual tokens of a view stand column by column.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    image_size: int
    patch: int
    eps: float
    mlp_act: str
    projector_act: str
    qkv_bias: bool
    qk_norm: bool
    norm: str
    positions: bool
    last_norm: bool
    merge: int
    by_columns: bool = False

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch

    @property
    def cells(self) -> int:
        """Visual tokens per side."""
        return self.grid // self.merge


def check(spec: ModelSpec[VisionSpec], path: Path) -> ModelSpec[VisionSpec]:
    """The spec, if its sizes can be.

    Raises:
        CheckpointError: fields of the wrong kind, or sizes that do not share out.
        UnsupportedError: norms that are not known.
    """
    v = spec.vision
    check_kind(path, "vision_config's layer_norm_eps", v.eps, float)
    check_kind(path, "vision_config's hidden_act", v.mlp_act, str)
    check_kind(path, "projector_hidden_act", v.projector_act, str)
    names = ("layers", "hidden", "heads", "ffn", "image_size", "patch", "merge")
    check_sizes(path, "vision_config", {name: getattr(v, name) for name in names})
    check_shares(path, "vision hidden size by heads", v.hidden, v.heads)
    check_shares(path, "patches of a side by those of a visual token", v.grid, v.merge)
    if v.norm not in NORMS:
        raise UnsupportedError(f"{spec.family}: norm_type is {v.norm!r}; {nearest(str(v.norm), NORMS)}")
    if v.cells < 1:
        raise CheckpointError(f"{path}: patches of {v.patch} do not fit into pictures of {v.image_size}; correct it")
    return spec


def square(path: Path, name: str, value: Any) -> Any:
    """A size that may be written as a pair of equal numbers.

    Raises:
        CheckpointError: a pair of other numbers.
    """
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 2 or value[0] != value[1]:
        raise CheckpointError(f"{path}: {name} is {value!r}, expected a number or two equal ones; correct it")
    return value[0]


def preprocessing(
    folder: Path, kinds: Mapping[str, Mapping[str, Any]], size: int
) -> tuple[Preprocessing, tuple[int, int]]:
    """The steps of every view, and the least and most tiles.

    Whether the file asks for tiles is not read: the released processors always make them.

    Args:
        kinds: by the name of the image processor, what a key that is missing means.
        size: of the encoder's input.

    Raises:
        CheckpointError: no file, or views that are no input of the encoder.
        UnsupportedError: another image processor, or steps that are not known.
    """
    where, values = preprocess.of_processor(folder, kinds)
    given = values["size"]
    sides = list(given.values()) if isinstance(given, Mapping) else [given]
    if any(side != size for side in sides):
        raise CheckpointError(f"{where}: makes views of {given}, config.json says {size} pixels; correct it")
    return preprocess.view(where, values, size), tiles_of(where, values["min_patches"], values["max_patches"])


def tiles_of(where: Path, least: Any, most: Any) -> tuple[int, int]:
    """The least and most tiles of a picture.

    Raises:
        CheckpointError: no numbers that a picture can have.
    """
    for name, value in (("min_patches", least), ("max_patches", most)):
        if type(value) is not int or not 1 <= value <= MOST_TILES:
            raise CheckpointError(f"{where}: {name} is {value!r}, expected 1..{MOST_TILES}; correct it")
    if least > most:
        raise CheckpointError(f"{where}: min_patches is {least}, max_patches {most}; correct it")
    return least, most


def token(of: Checkpoint, name: str) -> tuple[int, ...]:
    """The token's id; none where the checkpoint has no tokenizer.

    Raises:
        CheckpointError: the tokenizer does not know it.
    """
    ids = text.encoded(of.folder, name)
    if ids is not None and len(ids) != 1:
        raise CheckpointError(
            f"{of.folder}: its tokenizer has no token {name}, which stands beside an image's visual tokens; use the "
            "tokenizer that belongs to this checkpoint"
        )
    return ids or ()


def canvases(least: int, most: int, side: int) -> tuple[tuple[int, int], ...]:
    """(width, height) of all canvases of so many tiles, in the order in which they are tried."""
    grids = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if least <= c * r <= most]
    return tuple((c * side, r * side) for c, r in sorted(grids, key=lambda grid: grid[0] * grid[1]))


def pictures(
    spec: ModelSpec[VisionSpec],
    capacity: Capacity,
    how: Preprocessing,
    bounds: tuple[int, int],
    around: tuple[Run, Run],
    *,
    thumbnail: bool = True,
) -> tuple[Picture, ...]:
    """The tiles of the canvas of the nearest shape, and the whole picture behind them where there are several.

    Args:
        bounds: the least and most tiles.
        around: the text before and behind the visual tokens.
        thumbnail: the whole picture comes behind its tiles.

    Raises:
        PlanError: no size and no grid, or a grid that the checkpoint does not have.
    """
    side, cells = spec.vision.image_size, spec.vision.cells
    among = canvases(*bounds, side)
    found = []
    for size in capacity.sizes:
        width, height = _canvas(spec.family, size, capacity.grid, among, side)
        rows, columns = height // side, width // side
        canvas = Canvas(size=(width, height), rule="ratio", among=among)
        tiles = (rows, columns) if rows * columns > 1 else None
        views = Views(canvas=canvas, tiles=tiles, fit="stretch", whole="last" if thumbnail else "none", how=how)
        visual = (Run(kind="visual", rows=cells**2, grid=(cells, cells)),) * views.count
        runs = (around[0], *visual, around[1])
        found.append(Picture(token_id=spec.image_token_id, graphs=("vision",), views=views, runs=runs))
    return tuple(found)


def _canvas(
    family: str,
    size: tuple[int, int] | None,
    grid: tuple[int, int] | None,
    among: tuple[tuple[int, int], ...],
    side: int,
) -> tuple[int, int]:
    """The canvas (width, height) of a picture's size, or of a grid of (rows, columns)."""
    if size is not None:
        return nearest_shape(size, among)
    if grid is None:
        raise PlanError(
            f"{family}: the number of visual tokens depends on the shape of the picture; give --image-size WxH, or "
            "--grid RxC"
        )
    canvas = grid[1] * side, grid[0] * side
    if canvas not in among:
        most = max(width * height for width, height in among) // side**2
        raise PlanError(
            f"plan: --grid is {grid[0]}x{grid[1]}, but pictures have at most {most} tiles; give a smaller one"
        )
    return canvas


def work(spec: ModelSpec[VisionSpec], picture: Picture) -> tuple[Work, Work]:
    """Products of the encoder, per view, and of the projector, per picture."""
    v, d, n = spec.vision, spec.decoder.hidden, spec.vision.grid**2 + 1
    layer = (
        Product(v.hidden, v.hidden, n, 4 * v.layers),
        Product(v.hidden, v.ffn, n, v.layers),
        Product(v.ffn, v.hidden, n, v.layers),
        Attention(n, n, v.heads, v.hidden // v.heads, v.layers),
    )
    patches = Product(3 * v.patch**2, v.hidden, v.grid**2, matrix=False)
    norms = 2 * (2 if v.norm == "layer_norm" else 1) + 2 * v.qk_norm + 2  # and the two scales
    vectors = v.layers * ((norms + 3 * v.qkv_bias + 2) * v.hidden + v.ffn)
    vectors += (2 + n * v.positions + 2 * v.last_norm) * v.hidden
    wide = max(3 * v.hidden, 2 * v.ffn)
    encoder = Work((patches, *layer), vectors, layers=v.layers, hidden=v.hidden, wide=wide, rows=n)
    inner, rows = v.merge**2 * v.hidden, picture.visual_tokens
    steps = (Product(inner, d, rows), Product(d, d, rows))
    return encoder, Work(steps, 2 * inner + 2 * d, layers=picture.views.count, hidden=d, rows=rows)


def extend(parts: Any, plan: Plan) -> None:
    """Give the parts the encoder and the projector."""
    from lvlm_edge.exporter.families import _intern_modules as modules

    seen: VisionSpec = plan.spec.vision
    parts.vision = modules.InternViT(seen, plan.vision_lowering)
    parts.projector = modules.Projector(seen, plan.spec.decoder.hidden, plan.vision_lowering)


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """`vision`: pixel_values of one view to cells of patches, and their projection."""
    v: VisionSpec = plan.spec.vision
    pixels = TensorInfo("pixel_values", plan.vision_dtype, (1, 3, v.image_size, v.image_size))
    features = TensorInfo("image_features", plan.vision_dtype, (1, v.cells**2, v.merge**2 * v.hidden))
    embeds = TensorInfo("image_embeds", plan.dtype, (1, v.cells**2, plan.spec.decoder.hidden))
    return (GraphSpec(name="vision", role="image", inputs=(pixels,), outputs=(features, embeds), body=_vision),)


def _vision(parts: Any, plan: Plan, inputs: Tensors) -> Tensors:
    features = parts.vision(inputs["pixel_values"])
    return {"image_features": features, "image_embeds": parts.projector(features).to(parts.lm_head.weight.dtype)}

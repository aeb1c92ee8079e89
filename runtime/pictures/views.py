"""Views: what the vision encoder sees of one picture, and which pictures belong on the canvas of a bundle.

Four numbers and a rule, decided at export; a picture of another canvas is refused, or resized on request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lvlm_edge.runtime.errors import InputError
from lvlm_edge.runtime.pictures.image import Preprocessing, grid_boxes, patch_boxes, preprocess, resized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

RULES = ("any", "pinpoints", "multiple", "ratio", "ceil")
FITS = ("letterbox", "stretch")
WHOLE = ("first", "last", "none")
LONGEST = 200  # times that a picture may be longer than wide under the rule `multiple`
MOST = 4096  # pixels of the longer side of a picture that is resized to a longest edge


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The size that pictures are brought to, and the rule that says which pictures belong on it.

    Attributes:
        size: (width, height) in pixels.
        rule: `any` (every picture), `pinpoints` (the best of `among`), `multiple` (sides rounded to multiples of
            `factor`, areas kept within `pixels`), `ratio` (that of `among` whose shape is nearest), or `ceil` (sides
            rounded up to multiples of `factor`).
        among: (width, height) of the canvases of `pinpoints` and `ratio`, in the order in which they are tried.
        factor: side of a cell in pixels.
        pixels: least and most pixels of a picture.
        longest: pixels of the longer side that pictures are resized to before anything else; 0 where they are not.
        picture: (width, height) of the pictures that the bundle is for, where only those belong on the canvas that
            cover as many `cells` of it; (0, 0) where all do.
        cells: (rows, columns) of cells on the whole canvas; with `picture` only.
        decimals: that the covered part is rounded to before it is cut to whole cells; None for all.
    """

    size: tuple[int, int]
    rule: str = "any"
    among: tuple[tuple[int, int], ...] = ()
    factor: int = 1
    pixels: tuple[int, int] = (0, 0)
    longest: int = 0
    picture: tuple[int, int] = (0, 0)
    cells: tuple[int, int] = (0, 0)
    decimals: int | None = 7


@dataclass(frozen=True, kw_only=True)
class Views:
    """What the encoder sees of a picture, or of a video.

    Attributes:
        canvas: what the picture is laid on.
        tiles: (rows, columns) that cut up the canvas, row by row; None where the whole picture is the only view.
        fit: how the picture lies on a canvas of tiles: `letterbox` (in its own shape, in the middle, on black) or
            `stretch` (over all of it).
        whole: where the view of the whole picture stands among the tiles: `first`, `last`, or `none` for tiles alone.
        frames: frames of a video, each a view; 0 for a picture.
        how: preprocessing of each view.
    """

    canvas: Canvas
    tiles: tuple[int, int] | None = None
    fit: str = "letterbox"
    whole: str = "first"
    frames: int = 0
    how: Preprocessing

    @property
    def count(self) -> int:
        if self.tiles is None:
            return self.frames or 1
        return self.tiles[0] * self.tiles[1] + (self.whole != "none")


def view_size(views: Views) -> tuple[int, int]:
    """(width, height) of each view in pixels, as the encoder takes it."""
    how = views.how
    given = how.crop or how.resize_to
    if given:
        return given[1], given[0]
    edge = how.shortest_edge or 0
    return edge, edge


def canvas_of(size: tuple[int, int], canvas: Canvas) -> tuple[int, int]:
    """The canvas (width, height) that a picture belongs on under a canvas's rule.

    Args:
        size: (width, height) of the picture in pixels.

    Raises:
        InputError: the picture is empty, or too long and thin for the rule.
    """
    if min(size) < 1:
        raise InputError(f"picture: is {size[0]}x{size[1]}, expected width and height above 0")
    if canvas.rule == "pinpoints":
        return best_canvas(size, canvas.among)
    if canvas.rule == "multiple":
        return multiple(size, canvas.factor, canvas.pixels)
    if canvas.rule == "ratio":
        return nearest_shape(size, canvas.among)
    if canvas.rule == "ceil":
        return rounded_up(edged(size, canvas.longest), canvas.factor)
    return canvas.size


def belongs(size: tuple[int, int], canvas: Canvas) -> bool:
    """Whether a picture (width, height) belongs on a canvas.

    Raises:
        InputError: see `canvas_of`.
    """
    return canvas_of(size, canvas) == canvas.size and (
        not any(canvas.picture) or covered(size, canvas) == covered(canvas.picture, canvas)
    )


def covered(size: tuple[int, int], canvas: Canvas) -> tuple[range, range]:
    """Rows and columns of cells that a picture covers in the middle of a canvas; those outside hold padding alone.

    Args:
        size: (width, height) of the picture in pixels.
        canvas: of so many cells.

    Source: `unpad_image` of LLaVA-NeXT, and of transformers 5.23, which rounds to 7 decimals; in their order of float64
    operations. One row or column of padding stays where an odd number would have to go.
    """
    (width, height), (rows, columns) = size, canvas.cells
    if width / height > columns / rows:
        cut = (rows - _whole(height * (columns / width), canvas.decimals)) // 2
        return range(cut, rows - cut), range(columns)
    cut = (columns - _whole(width * (rows / height), canvas.decimals)) // 2
    return range(rows), range(cut, columns - cut)


def _whole(value: float, decimals: int | None) -> int:
    return int(value if decimals is None else round(value, decimals))


def nearest_shape(size: tuple[int, int], canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The canvas whose width by height is nearest to a picture's.

    Of equally near ones a later one takes the place of an earlier one where the picture has more than half its pixels.

    Args:
        size: (width, height) of the picture.
        canvases: (width, height) of each, in the order in which they are tried.

    Source: `find_closest_aspect_ratio` of InternVL, in its order of float64 operations.
    """
    best, least = canvases[0], math.inf
    for canvas in canvases:
        apart = abs(size[0] / size[1] - canvas[0] / canvas[1])
        if apart < least or (apart == least and size[0] * size[1] > 0.5 * canvas[0] * canvas[1]):
            best, least = canvas, apart
    return best


def edged(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """A size (width, height) whose longer side is `longest`, the other one even; the size itself where that is 0.

    Source: `_resize_output_size_rescale_to_max_len` and `_resize_output_size_scale_below_upper_bound` of Idefics3 in
    transformers 5.23.
    """
    if not longest:
        return size
    width, height = _along(size, longest)
    if size[0] >= size[1]:
        height = max(1, height + height % 2)
    else:
        width = max(1, width + width % 2)
    if max(width, height) > MOST:
        width, height = _along((width, height), MOST)
    return max(1, width), max(1, height)


def _along(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """A size whose longer side is `longest`, the other one cut to whole pixels."""
    ratio = size[0] / size[1]
    return (longest, int(longest / ratio)) if size[0] >= size[1] else (int(longest * ratio), longest)


def rounded_up(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Sides (width, height) rounded up to multiples of `factor`: the longer one first, the other by the shape.

    Source: `resize_for_vision_encoder` of Idefics3 in transformers 5.23.
    """
    ratio = size[0] / size[1]
    if size[0] >= size[1]:
        width = math.ceil(size[0] / factor) * factor
        return width, math.ceil(int(width / ratio) / factor) * factor
    height = math.ceil(size[1] / factor) * factor
    return math.ceil(int(height * ratio) / factor) * factor, height


def multiple(size: tuple[int, int], factor: int, pixels: tuple[int, int]) -> tuple[int, int]:
    """Sides (width, height) rounded to multiples of `factor`, half to even, with an area within `pixels`.

    Args:
        size: (width, height) in pixels.
        factor: side of a cell in pixels.
        pixels: least and most pixels.

    Raises:
        InputError: one side is more than 200 times the other.

    Source: `smart_resize` of transformers' Qwen2-VL image processor, in its order of float64 operations.
    """
    width, height = size
    if max(size) / min(size) > LONGEST:
        raise InputError(
            f"picture: is {width}x{height}, one side more than {LONGEST} times the other, expected at most "
            f"{LONGEST}; crop it first"
        )
    low, high = pixels
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > high:
        scale = math.sqrt((height * width) / high)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < low:
        scale = math.sqrt(low / (height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return columns, rows


def pixels(picture: Image, views: Views) -> NDArray[np.float32]:
    """The views of a picture, laid on the canvas whatever its own size, float32 [views, 3, H, W].

    A picture that covers other cells of the canvas than planned is resized to the planned picture's size.
    """
    canvas = views.canvas
    if any(canvas.picture) and not belongs(picture.size, canvas):
        picture = resized(picture, canvas.picture)
    if canvas.longest:
        picture = resized(picture, edged(picture.size, canvas.longest), views.how.resample)
    if views.tiles is None:
        return preprocess(resized(picture, canvas.size, views.how.resample) if canvas.longest else picture, views.how)
    if views.fit == "stretch":
        return stretched(picture, views)
    return tiled(picture, views.how, canvas.size, views.tiles)


def boxes(size: tuple[int, int], views: Views, grids: Sequence[tuple[int, int]]) -> list[NDArray[np.float64]]:
    """Where the cells of each grid lie on the original picture, see `patch_boxes`.

    Args:
        size: (width, height) of the original picture in pixels.
        grids: (rows, columns) of cells, of each view; or of the whole picture and of all tiles together, without the
            cells that hold padding alone.

    Returns:
        [rows * columns, 4] of each grid.
    """
    if views.tiles is not None and views.whole == "none":
        return list(tile_boxes(size, views, grids[0]).reshape(len(grids), -1, 4))
    first = views.tiles is None or views.whole == "first"
    rest = list(grids)
    whole = patch_boxes(size, views.how, rest.pop(0 if first else -1))
    tiles: list[NDArray[np.float64]] = []
    if rest and any(views.canvas.picture):
        shown = size if belongs(size, views.canvas) else views.canvas.picture
        scale = np.array([size[0] / shown[0], size[1] / shown[1]] * 2)
        tiles = [map_boxes(shown, views, rest[0]) * scale]
    elif rest:
        tiles = list(tile_boxes(size, views, rest[0]).reshape(len(rest), -1, 4))
    return [whole, *tiles] if first else [*tiles, whole]


def best_canvas(size: tuple[int, int], canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The canvas that shows most of a picture's pixels, and of such canvases the one with the least empty space.

    Args:
        size: (width, height) of the picture.
        canvases: (width, height) of each; the first wins a tie.

    Source: `select_best_resolution` of LLaVA-NeXT, in whole pixels as there.
    """
    width, height = size

    def rank(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - canvas[0] * canvas[1]

    return max(canvases, key=rank)


def tiled(image: Image, how: Preprocessing, canvas: tuple[int, int], grid: tuple[int, int]) -> NDArray[np.float32]:
    """The base view and the tiles of an any-resolution picture.

    The base view is the whole picture; the tiles cut up the picture as it lies in the middle of the canvas, as large
    as it can be in its own shape, on black.

    Args:
        image: the picture, RGB.
        how: the steps for each view, which resize to one tile's size.
        canvas: (width, height), from `best_canvas`.
        grid: (rows, columns) of tiles on the canvas.

    Returns:
        `pixel_values`, [1 + rows * columns, 3, H, W], float32; tiles row by row.

    Source: `process_anyres_image` of LLaVA-NeXT and ProxyV.
    """
    from PIL import Image

    left, top, *size = _placed(image.size, canvas)
    sheet = Image.new("RGB", canvas)
    sheet.paste(resized(image, (size[0], size[1])), (left, top))
    return np.concatenate([preprocess(view, how) for view in (image, *_cut(sheet, grid))])


def stretched(image: Image, views: Views) -> NDArray[np.float32]:
    """The tiles of a picture that is resized to the whole canvas, and a view of the whole picture.

    Args:
        image: the picture.
        views: with tiles.

    Returns:
        `pixel_values`, [rows * columns + 1, 3, H, W], float32.

    Source: `crop_image_to_patches` of GotOcr2 and `split_images` of Idefics3 in transformers 5.23.
    """
    assert views.tiles is not None
    sheet = resized(image, views.canvas.size, views.how.resample, views.how.width_first)
    tiles = _cut(sheet, views.tiles)
    whole = sheet if views.canvas.longest else image
    found = [*[whole] * (views.whole == "first"), *tiles, *[whole] * (views.whole == "last")]
    return np.concatenate([preprocess(view, views.how) for view in found])


def _cut(sheet: Image, tiles: tuple[int, int]) -> list[Image]:
    """The tiles of a canvas, (rows, columns) of them, row by row."""
    width, height = sheet.width // tiles[1], sheet.height // tiles[0]
    return [
        sheet.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
        for row in range(tiles[0])
        for column in range(tiles[1])
    ]


def tile_boxes(size: tuple[int, int], views: Views, grid: tuple[int, int]) -> NDArray[np.float64]:
    """Where the patches of tiles lie on the original picture.

    Args:
        size: (width, height) of the original picture in pixels.
        views: with tiles.
        grid: (rows, columns) of patches on each tile.

    Returns:
        As `patch_boxes`, tile by tile, [tiles * rows * columns, 4], float64.
    """
    canvas, tiles = views.canvas.size, views.tiles or (1, 1)
    left, top, width, height = (0, 0, *canvas) if views.fit == "stretch" else _placed(size, canvas)
    tile = canvas[0] // tiles[1], canvas[1] // tiles[0]
    patch = tile[0] // grid[1], tile[1] // grid[0]
    rows, columns, r, c = np.mgrid[: tiles[0], : tiles[1], : grid[0], : grid[1]]
    x, y = columns * tile[0] + c * patch[0], rows * tile[1] + r * patch[1]
    corners = np.stack([x, y, x + patch[0], y + patch[1]], axis=-1).reshape(-1, 4).astype(np.float64)
    scale = size[0] / width, size[1] / height
    found: NDArray[np.float64] = (corners - np.array([left, top] * 2)) * np.array([*scale, *scale])
    return found


def map_boxes(size: tuple[int, int], views: Views, grid: tuple[int, int]) -> NDArray[np.float64]:
    """Where the cells of all tiles together lie on the original picture, without those that hold padding alone.

    Args:
        size: (width, height) of the original picture in pixels.
        views: with tiles, letterboxed; of the canvas's `cells`.
        grid: (rows, columns) that the covered cells were resampled to.

    Returns:
        As `patch_boxes`, [rows * columns, 4], float64.
    """
    canvas, tiles = views.canvas, views.tiles or (1, 1)
    left, top, width, height = _placed(size, canvas.size)
    x, y = (
        (_edges(inside, cells // count, side // count, asked) - first) * (original / shown)
        for inside, cells, count, side, asked, first, original, shown in zip(
            covered(size, canvas)[::-1],
            canvas.cells[::-1],
            tiles[::-1],
            canvas.size,
            grid[::-1],
            (left, top),
            size,
            (width, height),
            strict=True,
        )
    )
    return grid_boxes(x, y)


def _edges(inside: range, each: int, tile: int, asked: int) -> NDArray[np.float64]:
    """Pixels of a canvas between which its covered cells lie along one axis, shared out to another number of cells.

    Args:
        inside: the covered cells.
        each: cells of a tile.
        tile: pixels of a tile; what its cells leave over belongs to the last one.
        asked: cells.
    """
    cell = np.arange(inside.start, inside.stop + 1)
    marks = (cell // each * tile + cell % each * (tile // each)).astype(np.float64)
    return np.interp(np.linspace(0, len(inside), asked + 1), np.arange(len(inside) + 1), marks)


def _placed(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a picture as it lies on a canvas: as large as can be, in the middle."""
    wide, high = canvas[0] / size[0], canvas[1] / size[1]
    if wide < high:
        width, height = canvas[0], min(math.ceil(size[1] * wide), canvas[1])
    else:
        width, height = min(math.ceil(size[0] * high), canvas[0]), canvas[1]
    return (canvas[0] - width) // 2, (canvas[1] - height) // 2, width, height

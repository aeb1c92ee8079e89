"""Views: what the vision encoder sees of one picture, and which pictures belong on the canvas of a bundle.

Four numbers and a rule, decided at export; a picture of another canvas is refused, or resized on request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lvlm_edge.runtime.errors import InputError
from lvlm_edge.runtime.pictures.image import Preprocessing, patch_boxes, preprocess

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

RULES = ("any", "pinpoints", "multiple")
LONGEST = 200  # times that a picture may be longer than wide under the rule `multiple`


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The size that pictures are brought to, and the rule that says which pictures belong on it.

    Attributes:
        size: (width, height) in pixels.
        rule: `any` (every picture), `pinpoints` (the best of `among`), or `multiple` (sides rounded to multiples of
            `factor`, areas kept within `pixels`).
        among: (width, height) of the canvases of `pinpoints`.
        factor: side of a cell in pixels.
        pixels: least and most pixels of a picture.
    """

    size: tuple[int, int]
    rule: str = "any"
    among: tuple[tuple[int, int], ...] = ()
    factor: int = 1
    pixels: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Views:
    """What the encoder sees of a picture.

    Attributes:
        canvas: what the picture is laid on.
        tiles: (rows, columns) that cut up the canvas; None where the whole picture is the only view.
        how: preprocessing of each view. The whole picture is the first view, tiles follow row by row.
    """

    canvas: Canvas
    tiles: tuple[int, int] | None = None
    how: Preprocessing

    @property
    def count(self) -> int:
        return 1 if self.tiles is None else self.tiles[0] * self.tiles[1] + 1


def view_size(views: Views) -> tuple[int, int]:
    """(width, height) of each view in pixels, as the encoder takes it."""
    how = views.how
    if how.crop or how.resize_to:
        height, width = how.crop or how.resize_to or (0, 0)
        return width, height
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
    return canvas.size


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
    """The views of a picture, laid on the canvas whatever its own size, float32 [views, 3, H, W]."""
    if views.tiles is None:
        return preprocess(picture, views.how)
    return tiled(picture, views.how, views.canvas.size, views.tiles)


def boxes(size: tuple[int, int], views: Views, grids: Sequence[tuple[int, int]]) -> list[NDArray[np.float64]]:
    """Where the cells of each view lie on the original picture, see `patch_boxes`.

    Args:
        size: (width, height) of the original picture in pixels.
        grids: (rows, columns) of cells, of each view.

    Returns:
        [rows * columns, 4] of each view.
    """
    found = [patch_boxes(size, views.how, grids[0])]
    if views.tiles is not None:
        whole = tile_boxes(size, views.canvas.size, views.tiles, grids[1])
        found += list(whole.reshape(len(grids) - 1, -1, 4))
    return found


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
    sheet.paste(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), (left, top))
    width, height = canvas[0] // grid[1], canvas[1] // grid[0]
    tiles = [
        sheet.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
        for row in range(grid[0])
        for column in range(grid[1])
    ]
    return np.concatenate([preprocess(view, how) for view in (image, *tiles)])


def tile_boxes(
    size: tuple[int, int], canvas: tuple[int, int], tiles: tuple[int, int], grid: tuple[int, int]
) -> NDArray[np.float64]:
    """Where the patches of the tiles of `tiled` lie on the original picture.

    Args:
        size: (width, height) of the original picture in pixels.
        canvas: (width, height).
        tiles: (rows, columns) of tiles.
        grid: (rows, columns) of patches on each tile.

    Returns:
        As `patch_boxes`, tile by tile, [tiles * rows * columns, 4], float64.
    """
    left, top, width, height = _placed(size, canvas)
    tile = canvas[0] // tiles[1], canvas[1] // tiles[0]
    patch = tile[0] // grid[1], tile[1] // grid[0]
    rows, columns, r, c = np.mgrid[: tiles[0], : tiles[1], : grid[0], : grid[1]]
    x, y = columns * tile[0] + c * patch[0], rows * tile[1] + r * patch[1]
    corners = np.stack([x, y, x + patch[0], y + patch[1]], axis=-1).reshape(-1, 4).astype(np.float64)
    scale = size[0] / width, size[1] / height
    found: NDArray[np.float64] = (corners - np.array([left, top] * 2)) * np.array([*scale, *scale])
    return found


def _placed(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a picture as it lies on a canvas: as large as can be, in the middle."""
    wide, high = canvas[0] / size[0], canvas[1] / size[1]
    if wide < high:
        width, height = canvas[0], min(math.ceil(size[1] * wide), canvas[1])
    else:
        width, height = min(math.ceil(size[0] * high), canvas[0]), canvas[1]
    return (canvas[0] - width) // 2, (canvas[1] - height) // 2, width, height

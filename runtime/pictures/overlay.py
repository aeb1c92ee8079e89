"""Draws which visual tokens survived over the pictures they came from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_edge.runtime.pictures import views
from lvlm_edge.runtime.pictures.sources import Reading, listed
from lvlm_edge.runtime.pictures.videos import frames

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from lvlm_edge.runtime.pictures.layout import Picture, Run

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SMALLEST = 384  # pixels of the longer edge of a drawn picture


def cells(kept: Any, run: Run, start: int) -> list[int]:
    """Cells of a run's grid (row-major) that kept visual tokens stand for.

    Args:
        kept: ascending indices among the visual tokens of all pictures, int [k].
        start: index of the run's first visual token.
    """
    mine = kept[(kept >= start) & (kept < start + run.rows)] - start
    mine = mine[mine >= run.leading] - run.leading + run.missing
    columns = run.grid[1] if run.grid is not None else 1
    row, column = np.divmod(mine, columns + run.row_ends)
    return [int(i) for i in (row * columns + column)[column < columns]]


def draw(
    pictures: Sequence[Picture], sources: Any, kept: Any, reading: Reading | None = None, *, videos: Any = ()
) -> Image:
    """The pictures and frames side by side, small ones enlarged: kept cells clear, the others dark.

    Args:
        pictures: what each image and video stood for (`Result.pictures`).
        sources, videos: the images and videos, as the pipeline got them.
        kept: ascending indices among the visual tokens of all pictures (`Result.kept_visual`).
        reading: how the pipeline reads pictures (`Pipeline.reading`).
    """
    from PIL import Image

    drawn, start, reading = [], 0, reading or Reading()
    for picture, planned, visual in _seen(pictures, listed(sources), listed(videos, axes=4), reading):
        boxes = views.boxes(picture.size, planned.views, [run.grid for run in visual if run.grid is not None])
        shown, first = [], 0
        for run in visual:  # one without a grid has visual tokens, and no cells to draw
            if run.grid is not None:
                shown += [first + cell for cell in cells(np.asarray(kept), run, start)]
                first += math.prod(run.grid)
            start += run.rows
        whole = np.concatenate(boxes)
        factor = -(-SMALLEST // max(picture.size))
        if factor > 1:
            picture, whole = picture.resize([factor * edge for edge in picture.size]), whole * factor
        drawn.append(overlay(picture, whole, shown))
    sheet = Image.new("RGB", (sum(p.width for p in drawn), max(p.height for p in drawn)))
    left = 0
    for picture in drawn:
        sheet.paste(picture, (left, 0))
        left += picture.width
    return sheet


def _seen(
    pictures: Sequence[Picture], images: list[Any], videos: list[Any], reading: Reading
) -> Iterator[tuple[Image, Picture, list[Run]]]:
    """Every picture and frame, what it is planned as, and its visual tokens."""
    for planned in pictures:
        visual, count = [run for run in planned.runs if run.kind == "visual"], planned.views.frames
        if not count:
            yield reading.open(images.pop(0)), planned, visual
            continue
        each = len(visual) // count
        for i, frame in enumerate(frames(videos.pop(0), count, reading)):
            yield frame, planned, visual[i * each : (i + 1) * each]


def overlay(image: Image, boxes: NDArray[np.float64], kept: Sequence[int]) -> Image:
    """The picture with the kept patches clear and outlined, and everything else darkened.

    Args:
        image: the original picture.
        boxes: boxes of all patches, from `patch_boxes`, [patches, 4].
        kept: ascending indices of the kept patches.
    """
    from PIL import Image, ImageDraw

    picture = image.convert("RGB")
    shown = Image.blend(picture, Image.new("RGB", picture.size), 0.7)
    corners = np.rint(boxes[np.asarray(kept, dtype=np.int64)]).astype(np.int64).reshape(-1, 4)
    corners[:, 0::2] = corners[:, 0::2].clip(0, picture.width)
    corners[:, 1::2] = corners[:, 1::2].clip(0, picture.height)
    inside = [(x0, y0, x1, y1) for x0, y0, x1, y1 in corners.tolist() if x0 < x1 and y0 < y1]
    for box in inside:
        shown.paste(picture.crop(box), box)
    pen = ImageDraw.Draw(shown)
    for left, top, right, bottom in inside:
        pen.rectangle((left, top, right - 1, bottom - 1), outline=(255, 210, 0))
    return shown

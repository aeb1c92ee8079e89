"""What the encoder sees of a picture under every rule: against transformers' functions, and steps written out here."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from lvlm_edge.runtime.errors import InputError
from lvlm_edge.runtime.pictures import overlay, views
from lvlm_edge.runtime.pictures.image import Preprocessing, grid_boxes, preprocess, resized
from lvlm_edge.runtime.pictures.layout import Run
from lvlm_edge.runtime.pictures.views import Canvas, Views
from tests.families import random_sizes
from tests.qwen import noise

SIDE = 8
HOW = Preprocessing(resize_to=(SIDE, SIDE), rescale=1 / 255)


def planned(size: tuple[int, int], tiles: tuple[int, int] | None = None, how: Any = HOW, **more: Any) -> Views:
    """Views on a canvas, whose own fields are among the others."""
    of_views = {name: more.pop(name) for name in ("fit", "whole") if name in more}
    return Views(canvas=Canvas(size=size, **more), tiles=tiles, how=how, **of_views)


# Which canvas.


def test_the_nearest_shape_is_that_of_transformers():
    from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as stock

    grids = stock.get_all_supported_aspect_ratios(1, 12)
    canvas = Canvas(size=(56, 56), rule="ratio", among=tuple((w * 56, h * 56) for w, h in grids))
    ties = [(56, 56), (79, 79), (80, 80), (112, 112), (168, 168), (112, 56), (158, 79), (160, 80), (1, 12), (12, 1)]

    for width, height in [*ties, *random_sizes(3, 200, most=600, thin=40)]:
        wanted = stock.get_optimal_tiled_canvas((height, width), (56, 56), 1, 12)
        assert views.canvas_of((width, height), canvas) == (wanted[0] * 56, wanted[1] * 56), (width, height)


def test_of_equally_near_shapes_a_later_one_needs_more_than_half_its_pixels_in_the_picture():
    shapes = ((60, 10), (20, 10))  # 6 and 2, as near to 4

    assert [views.nearest_shape(size, shapes) for size in ((20, 5), (24, 6))] == list(shapes)  # 100 is half of 200
    assert [views.nearest_shape(size, shapes[::-1]) for size in ((20, 5), (36, 9))] == [(20, 10), (60, 10)]


@pytest.mark.parametrize("longest", [0, 1, 7, 364, 1456, 4096, 4097, 6001])
def test_sides_are_rounded_up_as_in_transformers(longest):
    from transformers.models.idefics3 import image_processing_pil_idefics3 as stock

    asked: list[Any] = []
    processor = stock.Idefics3ImageProcessorPil()
    processor.resize = lambda image, size, **more: asked.append((size.width, size.height))
    canvas = Canvas(size=(1, 1), rule="ceil", factor=64, longest=longest)
    sizes = [(1, 1), (64, 64), (65, 64), (64, 65), (63, 63), (128, 1), (1, 128), (400, 3), (7000, 1), (1, 7000)]

    for width, height in [*sizes, *random_sizes(4, 100, most=3000, thin=90)]:
        like = np.broadcast_to(np.uint8(0), (3, height, width))
        edge = stock.get_resize_output_image_size(like, longest)[::-1] if longest else (width, height)
        processor.resize_for_vision_encoder(np.broadcast_to(np.uint8(0), (3, *edge[::-1])), 64)
        assert views.edged((width, height), longest) == edge, (width, height)
        assert views.canvas_of((width, height), canvas) == asked[-1], (width, height)


EXACT = [(110, 352), (352, 110), (198, 176), (205, 328)]  # where a quotient is not exact in float64


@pytest.mark.parametrize("cells", [(12, 12), (12, 6), (7, 14), (48, 24), (1, 3)])
def test_covered_cells_are_those_that_transformers_leaves(cells):
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    numbers = torch.arange(cells[0] * cells[1]).reshape(1, *cells)
    canvas = Canvas(size=(cells[1] * SIDE, cells[0] * SIDE), cells=cells)

    for width, height in [*EXACT, (100, 100), (200, 100), (100, 200), *random_sizes(5, 100, most=3000, thin=12)]:
        rows, columns = views.covered((width, height), canvas)
        wanted = unpad_image(numbers, (height, width))[0].tolist()
        assert [[r * cells[1] + c for c in columns] for r in rows] == wanted, (width, height)


def test_parts_of_cells_are_rounded_to_the_decimals_before_they_are_cut():
    """6.996 of 12 cells are 6, of which as many remain on both sides, or 7, beside which one of padding stays."""
    for size, across in (((1000, 583), 0), ((583, 1000), 1)):
        canvases = [Canvas(size=(1, 1), cells=(12, 12), decimals=decimals) for decimals in (None, 7, 3, 2, 1)]
        assert [len(views.covered(size, canvas)[across]) for canvas in canvases] == [6, 6, 6, 8, 8]


def test_a_picture_belongs_where_it_covers_as_many_cells_as_the_planned_one():
    fields = {"size": (64, 64), "rule": "pinpoints", "among": ((64, 64), (32, 64))}
    canvas, free = Canvas(picture=(60, 50), cells=(16, 16), **fields), Canvas(**fields)
    shapes = [(60, 50), (120, 100), (61, 50), (60, 30), (50, 60), (30, 60)]

    assert [views.belongs(shape, canvas) for shape in shapes] == [True, True, True, False, False, False]
    assert [views.belongs(shape, free) for shape in shapes] == [True, True, True, True, True, False]
    with pytest.raises(InputError, match="is 0x5, expected width and height above 0"):
        views.belongs((0, 5), canvas)


# Views.


def test_what_is_left_out_takes_no_part():
    unread = {"among": (), "factor": 1, "pixels": (0, 0), "longest": 0, "picture": (0, 0), "cells": (0, 0)}

    assert Canvas(size=(1, 2)) == Canvas(size=(1, 2), rule="any", decimals=7, **unread)
    assert planned((1, 2)) == planned((1, 2), None, fit="letterbox", whole="first")


@pytest.mark.parametrize(("whole", "count"), [("first", 7), ("last", 7), ("none", 6)])
def test_views_are_counted_with_the_whole_picture_where_it_is_one(whole, count):
    assert planned((1, 1), (2, 3), whole=whole).count == count
    assert planned((1, 1), None, whole=whole).count == 1


def cut(sheet: PIL.Image.Image, tiles: tuple[int, int]) -> list[PIL.Image.Image]:
    width, height = sheet.width // tiles[1], sheet.height // tiles[0]
    corners = [(x * width, y * height) for y in range(tiles[0]) for x in range(tiles[1])]
    return [sheet.crop((x, y, x + width, y + height)) for x, y in corners]


@pytest.mark.parametrize("whole", ["first", "last", "none"])
@pytest.mark.parametrize("longest", [0, 40])
def test_a_stretched_picture_fills_its_tiles(whole, longest):
    source = noise((50, 31), 3)
    made = planned((24, 16), (2, 3), fit="stretch", whole=whole, longest=longest, rule="any")
    begun = source.resize((40, 24), 3) if longest else source
    sheet = begun.resize((24, 16), 3)
    alone = sheet if longest else source
    wanted = [*[alone] * (whole == "first"), *cut(sheet, (2, 3)), *[alone] * (whole == "last")]

    found = views.pixels(source, made)

    assert np.array_equal(found, np.concatenate([preprocess(view, HOW) for view in wanted]))


@pytest.mark.parametrize(("resample", "width_first"), [(2, False), (3, True)])
def test_a_stretched_picture_is_resized_as_its_views_are(resample, width_first):
    source = noise((500, 31), 3)
    how = Preprocessing(resize_to=(SIDE, SIDE), resample=resample, width_first=width_first)
    made = planned((24, 16), (2, 3), how=how, fit="stretch", whole="none")
    begun = source.resize((24, 31), resample) if width_first else source

    found = views.pixels(source, made)

    sheet = begun.resize((24, 16), resample)
    assert np.array_equal(found, np.concatenate([preprocess(view, how) for view in cut(sheet, (2, 3))]))


def test_the_width_is_resized_first_where_that_is_said():
    source = noise((41, 37), 1)

    assert resized(source, (9, 8), 2).tobytes() == source.resize((9, 8), 2).tobytes()
    assert resized(source, (9, 8)).tobytes() == source.resize((9, 8), 3).tobytes()
    assert resized(source, (9, 8), 3, True).tobytes() == source.resize((9, 37), 3).resize((9, 8), 3).tobytes()
    assert resized(source.convert("RGBA"), (9, 8)).mode == "RGB"


def test_a_picture_without_tiles_is_brought_to_its_longest_edge_and_its_canvas():
    source = noise((50, 31), 3)
    begun = source.resize((40, 24), 3)

    found = views.pixels(source, planned((64, 64), rule="ceil", factor=64, longest=40))
    assert np.array_equal(found, preprocess(begun.resize((64, 64), 3), HOW))
    assert np.array_equal(views.pixels(source, planned((64, 64))), preprocess(source, HOW))


def test_a_picture_that_covers_other_cells_is_brought_to_the_size_of_the_planned_one():
    made = planned((16, 16), (2, 2), rule="any", picture=(100, 50), cells=(16, 16))
    other, same = noise((50, 50), 1), noise((60, 30), 2)

    assert np.array_equal(views.pixels(other, made), views.tiled(other.resize((100, 50), 3), HOW, (16, 16), (2, 2)))
    assert np.array_equal(views.pixels(same, made), views.tiled(same, HOW, (16, 16), (2, 2)))


# Where cells lie on the picture.


def colours(size: tuple[int, int]) -> PIL.Image.Image:
    """A picture that names its own pixels."""
    x, y = np.meshgrid(np.arange(size[0]) * (255 / size[0]), np.arange(size[1]) * (255 / size[1]))
    return PIL.Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def middles(boxes: np.ndarray) -> np.ndarray:
    return np.stack([boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]], -1) / 2


def test_boxes_are_those_of_lines_across_both_axes():
    found = grid_boxes(np.array([1.0, 4, 9]), np.array([2.0, 3, 5]))

    assert found.tolist() == [[1, 2, 4, 3], [4, 2, 9, 3], [1, 3, 4, 5], [4, 3, 9, 5]]


@pytest.mark.parametrize("whole", ["first", "last", "none"])
@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_cells_of_every_view_lie_on_what_they_show(whole, fit):
    """On a stretched canvas of 2 x 3 tiles; on a letterboxed one where they are inside the picture."""
    size = (90, 60) if fit == "stretch" else (60, 60)
    how = Preprocessing(resize_to=(32, 32))
    made = planned((96, 64), (2, 3), how=how, fit=fit, whole=whole)
    shown = (
        views.stretched(colours(size), made) if fit == "stretch" else views.tiled(colours(size), how, (96, 64), (2, 3))
    )
    if fit == "letterbox" and whole != "first":
        shown = shown[1:] if whole == "none" else np.roll(shown, -1, 0)

    found = views.boxes(size, made, [(4, 4)] * made.count)

    assert [boxes.shape for boxes in found] == [(16, 4)] * made.count == [(16, 4)] * len(shown)
    seen = 0
    for view, boxes in zip(shown, found, strict=True):
        cells = view.reshape(3, 4, 8, 4, 8).mean((2, 4)).reshape(3, 16).T[:, :2]
        inside = (boxes[:, 0] >= 0) & (boxes[:, 2] <= size[0]) & (boxes[:, 1] >= 0) & (boxes[:, 3] <= size[1])
        seen += int(inside.sum())
        assert np.abs(cells - middles(boxes) * (255 / np.array(size)))[inside].max() < 5
    assert seen >= 48


@pytest.mark.parametrize("whole", ["first", "last"])
def test_the_whole_picture_may_have_another_grid_than_its_tiles(whole):
    made, tiles = planned((24, 16), (2, 3), fit="stretch", whole=whole), [(4, 4)] * 6

    found = views.boxes((24, 16), made, [(1, 2), *tiles] if whole == "first" else [*tiles, (1, 2)])

    alone = found[0 if whole == "first" else -1]
    assert alone.tolist() == [[0, 0, 12, 16], [12, 0, 24, 16]]
    assert sorted(map(len, found)) == [2] + [16] * 6


def test_a_single_tile_may_be_all_there_is():
    (found,) = views.boxes((24, 16), planned((8, 8), (1, 1), fit="stretch", whole="none"), [(1, 2)])

    assert found.tolist() == [[0, 0, 12, 16], [12, 0, 24, 16]]


def shared_out(lines: np.ndarray, count: int) -> np.ndarray:
    """Lines between so many cells that cover the same, evenly among the cells that were there."""
    found = []
    for i in range(count + 1):
        at = i * (len(lines) - 1) / count
        first = min(int(at), len(lines) - 2)
        found.append(lines[first] + (at - first) * (lines[first + 1] - lines[first]))
    return np.array(found)


@pytest.mark.parametrize(
    ("size", "asked"), [((64, 32), None), ((32, 64), None), ((50, 50), None), ((64, 40), None), ((64, 40), (2, 3))]
)
def test_cells_of_the_map_lie_on_what_the_tiles_show(size, asked):
    """The cells of all tiles together that hold something of the picture; 9 pixels of a tile are 2 cells of 4 each."""
    cells, tile, tiles = (4, 6), 9, (2, 3)
    canvas = Canvas(size=(27, 18), cells=cells, picture=size)
    made = Views(canvas=canvas, tiles=tiles, how=HOW)
    rows, columns = views.covered(size, canvas)
    scale = min(27 / size[0], 18 / size[1])
    width, height = min(int(np.ceil(size[0] * scale)), 27), min(int(np.ceil(size[1] * scale)), 18)
    left, top = (27 - width) // 2, (18 - height) // 2
    marks = [each // 2 * tile + each % 2 * 4 for each in range(7)]  # where a cell begins on the canvas
    x = (np.array([marks[c] for c in range(columns.start, columns.stop + 1)]) - left) * (size[0] / width)
    y = (np.array([marks[r] for r in range(rows.start, rows.stop + 1)]) - top) * (size[1] / height)
    if asked is not None:  # shared out to fewer cells, between the lines
        y, x = shared_out(y, asked[0]), shared_out(x, asked[1])

    found = views.map_boxes(size, made, asked or (len(rows), len(columns)))

    wanted = [[x[c], y[r], x[c + 1], y[r + 1]] for r in range(len(y) - 1) for c in range(len(x) - 1)]
    assert np.allclose(found, wanted)
    both = views.boxes(size, made, [(4, 4), asked or (len(rows), len(columns))])
    assert len(both) == 2 and np.array_equal(both[1], found) and len(both[0]) == 16


def test_cells_of_a_fitted_picture_lie_on_the_original():
    """A picture of 50 x 100 that is resized to the planned 64 x 32: its boxes are the planned one's, as much larger."""
    made = Views(canvas=Canvas(size=(16, 16), cells=(4, 4), picture=(64, 32)), tiles=(2, 2), how=HOW)
    right = views.map_boxes((64, 32), made, (2, 4))

    _, found = views.boxes((50, 100), made, [(2, 2), (2, 4)])

    assert np.allclose(found, right * np.array([50 / 64, 100 / 32] * 2))
    assert np.array_equal(views.boxes((64, 32), made, [(2, 2), (2, 4)])[1], right)


def test_newlines_behind_rows_lie_on_no_cell():
    """Tokens 5 to 7 lead, then 2 rows of 3 cells and a newline each."""
    run = Run(kind="visual", rows=2 * 4 + 3, grid=(2, 3), leading=3, row_ends=1)

    assert overlay.cells(np.arange(3, 20), run, 5) == [0, 1, 2, 3, 4, 5]
    assert overlay.cells(np.array([7, 8, 10, 11, 12, 14, 15, 16]), run, 5) == [0, 2, 3, 5]
    plain = Run(kind="visual", rows=4, grid=(2, 3), missing=2)
    assert overlay.cells(np.array([4, 5, 8, 9]), plain, 5) == [2, 5]

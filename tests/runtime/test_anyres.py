"""Any-resolution pictures: which canvas, which tiles, and what the pipeline says when they do not fit a bundle."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from transformers import CLIPImageProcessorPil
from transformers.image_processing_utils import select_best_resolution

from lvlm_edge.exporter.checkpoints import preprocess
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.errors import InputError
from lvlm_edge.runtime.pictures import image, overlay, views
from tests import layouts, tiny

SIDE = 56
CANVASES = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))  # (width, height)
HOW = preprocess.fitted(preprocess.for_config_only(SIDE, "clip"), "resize", SIDE)


def picture(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    """Blurred noise."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return PIL.Image.fromarray(np.ascontiguousarray(small.repeat(4, 0).repeat(4, 1)[:height, :width]))


def test_the_best_canvas_is_that_of_transformers():
    sides = [1, 2, 3, 13, 55, 56, 57, 100, 112, 113, 150, 168, 300, 999]

    for width in sides:
        for height in sides:
            rows_first = [(h, w) for w, h in CANVASES]
            expected = select_best_resolution((height, width), rows_first)
            assert views.best_canvas((width, height), CANVASES)[::-1] == expected


def reference(source: PIL.Image.Image, canvas: tuple[int, int]) -> np.ndarray:
    """The released steps one by one: the whole picture squeezed, then the padded picture cut into squares."""
    scale_w, scale_h = canvas[0] / source.width, canvas[1] / source.height
    if scale_w < scale_h:
        new = (canvas[0], min(math.ceil(source.height * scale_w), canvas[1]))
    else:
        new = (min(math.ceil(source.width * scale_h), canvas[0]), canvas[1])
    black = PIL.Image.new("RGB", canvas, (0, 0, 0))
    black.paste(source.resize(new), ((canvas[0] - new[0]) // 2, (canvas[1] - new[1]) // 2))
    views = [source.resize((SIDE, SIDE))]
    for top in range(0, canvas[1], SIDE):
        for left in range(0, canvas[0], SIDE):
            views.append(black.crop((left, top, left + SIDE, top + SIDE)))
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    return np.concatenate([processor(view, return_tensors="np")["pixel_values"] for view in views])


@pytest.mark.parametrize("size", [(100, 100), (57, 200), (333, 40), (1, 300), (56, 112), (7, 5)], ids=str)
def test_tiles_are_those_of_the_release(size):
    source = picture(*size)

    for canvas in CANVASES:
        found = views.tiled(source, HOW, canvas, (canvas[1] // SIDE, canvas[0] // SIDE))
        assert found.dtype == np.float32
        assert np.array_equal(found, reference(source, canvas))


@pytest.mark.parametrize("size", [(100, 50), (40, 90), (112, 56)], ids=str)
def test_boxes_lie_on_what_their_patches_show(size):
    """A picture that names its own pixels: the mean colour of a patch is that of its box."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    colours = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)
    plain = image.Preprocessing(resize_to=(SIDE, SIDE))
    canvas, tiles = (112, 112), (2, 2)

    found = views.tiled(PIL.Image.fromarray(colours), plain, canvas, tiles)[1:]
    planned = views.Views(canvas=views.Canvas(size=canvas), tiles=tiles, how=plain)
    boxes = views.tile_boxes(size, planned, (4, 4))

    assert boxes.shape == (64, 4)
    inside = [(i, box) for i, box in enumerate(boxes) if box.min() >= 0 and box[2] <= size[0] and box[3] <= size[1]]
    assert len(inside) >= 16
    for i, (left, top, right, bottom) in inside:
        tile, row, column = i // 16, i % 16 // 4, i % 4
        shown = found[tile, :, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14].mean((1, 2))
        middle = np.array([(left + right) / 2 / size[0] * 255, (top + bottom) / 2 / size[1] * 255, 0])
        assert np.abs(shown - middle).max() < 6  # of 255, over patches of 14 to 40


def test_an_overlay_shows_patches_of_the_base_view_and_of_tiles(tmp_path, eager_once):
    tiles = [list(canvas) for canvas in CANVASES]
    layouts.build(tmp_path / "m", image_aspect_ratio="anyres", image_grid_pinpoints=tiles)
    options = {"method": "fastv", "prune_layer": 1, "grid": (1, 2), "max_text_tokens": 24, "max_new_tokens": 4}
    manifest = Pipeline.load(eager_once(tmp_path / "m", **options)).manifest
    white = PIL.Image.new("RGB", (448, 224), "white")

    # The last patch of the base view, and the last one of the first tile.
    sheet = np.asarray(overlay.draw(manifest.pictures, [white], np.array([15, 31])))

    clear = (sheet > 250).all(-1)
    assert clear[180:220, 345:440].all()
    assert clear[180:220, 180:220].all()
    assert not clear[:160].any()
    assert not clear[:, 230:330].any()


def test_the_base_view_alone_is_the_whole_picture_squeezed():
    source = picture(300, 40)

    assert np.array_equal(image.preprocess(source, HOW), reference(source, CANVASES[0])[:1])


def test_pad_pads_with_the_mean_colour():
    from transformers import LlavaImageProcessorPil

    how = preprocess.fitted(preprocess.for_config_only(SIDE, "clip"), "pad", SIDE)
    processor = LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE, do_pad=True)
    source = picture(90, 40)

    assert np.array_equal(image.preprocess(source, how), processor(source, return_tensors="np")["pixel_values"])


# Whole bundles.


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> Path:
    """A checkpoint with separators and tiles, and a tokenizer without an image token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("talking") / "model"
    tiles = [list(canvas) for canvas in CANVASES]
    layouts.build(folder, proxyv=False, image_aspect_ratio="anyres", image_grid_pinpoints=tiles)
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 160))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    chat = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # the language model's own: it knows no images
    tiny.write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "chat_template": chat})
    return folder


CAPACITY = ["--max-text-tokens", "120", "--max-new-tokens", "4", "-q"]


@pytest.fixture(scope="module")
def tiles(talking, quick_tracing) -> Path:
    done = tiny.cli("export", talking, "-o", talking.parent / "tiles", "--image-size", "300x150", *CAPACITY)
    assert done.exit_code == 0, done.output
    return talking.parent / "tiles"


def test_a_picture_and_a_question_give_the_base_view_and_its_tiles(tiles, talking):
    pipe = Pipeline.load(tiles)
    source = picture(200, 100)

    ids, pixels = pipe.prepare("w5 w6 <image>?", [source])
    answer = pipe.generate("w5 w6 <image>?", [source])

    assert ids.count(layouts.IMAGE) == 1
    assert np.array_equal(pixels, reference(source, (112, 56)))
    (planned,) = pipe.manifest.pictures
    assert (planned.views.count, planned.rows("separator")) == (3, 3)
    assert answer.prompt_tokens == len(ids) - 1 + 3 * 17
    text = (tiles / "chat_template.jinja").read_text()
    assert "ASSISTANT" in text  # the published one: the tokenizer's own knows no images


def test_what_closes_an_answer_ends_it_whatever_the_config_says(talking, tmp_path, quick_tracing):
    shutil.copytree(talking, tmp_path / "model")
    tiny.change_json(tmp_path / "model" / "config.json", eos_token_id=9)

    assert tiny.cli("export", tmp_path / "model", "-o", tmp_path / "out", *CAPACITY).exit_code == 0

    assert Pipeline.load(tmp_path / "out").manifest.eos_token_ids == (9, 2)


def test_answers_with_a_repetition_penalty_do_not_count_the_placeholder(tiles):
    from lvlm_edge.runtime import Sampling

    pipe = Pipeline.load(tiles)

    assert pipe.generate("w5", [picture(200, 100)], sampling=Sampling(repetition_penalty=1.5)).token_ids


def test_a_picture_for_other_tiles_is_refused_with_the_way_out(tiles):
    with pytest.raises(InputError, match=r"100x100 goes on tiles of 2x2, the bundle has 1x2.*--image-size 100x100"):
        Pipeline.load(tiles).generate("w5", [picture(100, 100)])


def test_run_refuses_a_picture_for_other_tiles_on_one_line(tiles, tmp_path):
    picture(50, 200).save(tmp_path / "tall.png")

    message = tiny.refused(2, "run", tiles, "--image", tmp_path / "tall.png", "--prompt", "w5")

    assert "50x200 goes on tiles of" in message


def test_a_bundle_of_one_crop_takes_every_picture(talking, tmp_path, quick_tracing):
    assert tiny.cli("export", talking, "-o", tmp_path / "one", *CAPACITY).exit_code == 0
    pipe = Pipeline.load(tmp_path / "one")

    for size in ((30, 200), (100, 100)):
        _, pixels = pipe.prepare("w5", [picture(*size)])
        assert np.array_equal(pixels, reference(picture(*size), CANVASES[0])[:1])
        assert pipe.generate("w5", [picture(*size)]).prompt_tokens > 17


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("tiles", [2, 2], "expected 51 rows of 64 from 5 runs"),
        ("tiles", None, "expected 51 rows of 64 from 1 runs"),
        ("tiles", [-1, -2], "impossible canvas"),
        ("canvas", [56, 56], "impossible canvas"),
        ("canvas", None, "size is NoneType"),
    ],
    ids=str,
)
def test_a_manifest_whose_tiles_do_not_fit_together_is_refused(field, value, said, tiles, tmp_path):
    from lvlm_edge.runtime import bundle
    from lvlm_edge.runtime.errors import BundleError

    content = tiny.read_json(tiles / "manifest.json")
    views = content["pictures"][0]["views"]
    assert (views["tiles"], views["canvas"]["size"]) == ([1, 2], [112, 56])
    if field == "tiles":
        views["tiles"] = value
    else:
        views["canvas"]["size"] = value
    tiny.write_json(tmp_path / "manifest.json", content)

    with pytest.raises(BundleError, match=said):
        bundle.load_manifest(tmp_path)


@pytest.mark.parametrize(("factor", "bounds"), [(28, (56 * 56, 100 * 28 * 28)), (32, (4096, 4096)), (14, (1, 1 << 30))])
def test_sides_are_rounded_as_in_transformers(factor, bounds):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    sides = [1, 2, 13, 14, 15, 28, 41, 42, 43, 55, 56, 57, 70, 98, 111, 200, 280, 281, 333, 800]
    pairs = [(w, h) for w in sides for h in sides if max(w, h) / min(w, h) <= 200]
    assert (1, 200) in pairs and (200, 1) in pairs

    for width, height in pairs:
        canvas = views.Canvas(size=(1, 1), rule="multiple", factor=factor, pixels=bounds)
        height_, width_ = smart_resize(height, width, factor, *bounds)
        assert views.canvas_of((width, height), canvas) == (width_, height_), (width, height)


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (401, 2)])
def test_a_picture_more_than_200_times_as_long_as_wide_is_refused(size):
    said = rf"is {size[0]}x{size[1]}, one side more than 200 times the other, expected at most 200; crop it first"
    with pytest.raises(InputError, match=said):
        views.multiple(size, 14, (1, 1 << 30))


@pytest.mark.parametrize(
    ("how", "size"),
    [
        ({"crop": (3, 5)}, (5, 3)),
        ({"resize_to": (3, 5)}, (5, 3)),
        ({"resize_to": (9, 9), "crop": (3, 5)}, (5, 3)),
        ({"shortest_edge": 7, "crop": (3, 5)}, (5, 3)),
        ({"shortest_edge": 7}, (7, 7)),
        ({}, (0, 0)),  # which is no size: a manifest of such views is refused
    ],
    ids=str,
)
def test_a_view_is_as_large_as_the_last_step_makes_it(how, size):
    assert views.view_size(views.Views(canvas=views.Canvas(size=(1, 1)), how=image.Preprocessing(**how))) == size


def test_views_are_the_whole_picture_and_its_tiles():
    made = views.Views(canvas=views.Canvas(size=(112, 168)), how=HOW, tiles=(3, 2))
    boxes = views.boxes((112, 168), made, [(4, 4)] * 7)

    assert (made.count, views.pixels(picture(100, 150), made).shape) == (7, (7, 3, 56, 56))
    assert [box.shape for box in boxes] == [(16, 4)] * 7
    assert boxes[0][[0, -1]].tolist() == [[0, 0, 28, 42], [84, 126, 112, 168]]
    assert [box[0].tolist() for box in boxes[1:]] == [[x, y, x + 14, y + 14] for y in (0, 56, 112) for x in (0, 56)]
    alone = views.Views(canvas=views.Canvas(size=(56, 56)), how=HOW)
    assert (alone.count, len(views.boxes((56, 56), alone, [(4, 4)]))) == (1, 1)


def test_patches_of_tiles_are_cut_to_whole_pixels_and_scaled_back():
    """A canvas of 100 x 60 in 3 x 2 tiles of 2 x 3 patches, of 16 x 10, holds a picture of 50 x 20 as 100 x 40."""
    planned = views.Views(canvas=views.Canvas(size=(100, 60)), tiles=(3, 2), how=HOW)

    found = views.tile_boxes((50, 20), planned, (2, 3))

    expected = []
    for tile_y in (0, 20, 40):
        for tile_x in (0, 50):
            for y in (0, 10):
                for x in (0, 16, 32):
                    left, top = tile_x + x, tile_y + y - 10
                    expected.append([left / 2, top / 2, (left + 16) / 2, (top + 10) / 2])
    assert found.tolist() == expected


def test_a_picture_has_at_least_one_pixel():
    canvas = views.Canvas(size=(56, 56))

    assert views.canvas_of((1, 1), canvas) == (56, 56)
    for size in ((0, 5), (5, 0)):
        with pytest.raises(InputError, match=f"is {size[0]}x{size[1]}, expected width and height above 0"):
            views.canvas_of(size, canvas)

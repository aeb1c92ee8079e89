from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from lvlm_edge.runtime.errors import InputError
from lvlm_edge.runtime.pictures import image, overlay
from lvlm_edge.runtime.pictures.image import Preprocessing
from lvlm_edge.runtime.pictures.layout import Picture, Run
from lvlm_edge.runtime.pictures.views import Canvas, Views

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = Preprocessing(shortest_edge=112, crop=(112, 112), rescale=1 / 255, mean=CLIP_MEAN, std=CLIP_STD)
LLAVA = Preprocessing(
    pad_to_square=(122, 116, 104),
    shortest_edge=112,
    crop=(112, 112),
    rescale=1 / 255,
    mean=CLIP_MEAN,
    std=CLIP_STD,
)
SIGLIP = Preprocessing(resize_to=(112, 112), rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)
PROCESSORS = {
    "clip": (CLIP, CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size=112)),
    "llava": (LLAVA, LlavaImageProcessorPil(size={"shortest_edge": 112}, crop_size=112, do_pad=True)),
    "siglip": (SIGLIP, SiglipImageProcessorPil(size={"height": 112, "width": 112})),
}
PHOTOS = (
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "retina.jpg",
    "text.png",
    "logo.png",
)


def noise(height: int, width: int, channels: int, seed: int = 0) -> NDArray[np.uint8]:
    """Blurred random pixels, [H, W, channels]; single-pixel noise would vanish in the resize."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (height // 4 + 1, width // 4 + 1, channels), dtype=np.uint8)
    return np.ascontiguousarray(small.repeat(4, 0).repeat(4, 1)[:height, :width])


def picture(mode: str, width: int, height: int) -> PIL.Image.Image:
    if mode == "I;16":
        return PIL.Image.fromarray(noise(height, width, 1)[..., 0].astype(np.uint16) * 257)
    if mode in ("RGBA", "LA"):
        return PIL.Image.fromarray(noise(height, width, len(mode)), mode)
    base = PIL.Image.fromarray(noise(height, width, 3))
    return base.convert(mode)


def transparent_palette() -> PIL.Image.Image:
    made = picture("P", 60, 90)
    made.info["transparency"] = 3
    return made


PICTURES: dict[str, Callable[[], PIL.Image.Image]] = {
    "1": lambda: picture("1", 90, 60),
    "L": lambda: picture("L", 200, 130),
    "LA": lambda: picture("LA", 77, 140),
    "P": lambda: picture("P", 123, 99),
    "P with transparency": transparent_palette,
    "RGB": lambda: picture("RGB", 301, 207),
    "RGBA": lambda: picture("RGBA", 133, 201),
    "CMYK": lambda: picture("CMYK", 90, 150),
    "YCbCr": lambda: picture("YCbCr", 90, 150),
    "I;16": lambda: picture("I;16", 90, 70),
    "1x1": lambda: picture("RGB", 1, 1),
    "1x2": lambda: picture("RGB", 1, 2),
    "2x1": lambda: picture("RGB", 2, 1),
    "3x4000": lambda: picture("RGB", 3, 4000),
    "4000x3": lambda: picture("RGB", 4000, 3),
    "112x112": lambda: picture("RGB", 112, 112),
    "113x112": lambda: picture("RGB", 113, 112),
    "111x110": lambda: picture("RGB", 111, 110),
}


def photo(name: str) -> Path:
    data = pytest.importorskip("skimage.data")
    path = Path(data.__file__).parent / name
    if not path.exists():
        pytest.skip(f"this scikit-image comes without {name}")
    return path


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("name", PICTURES)
def test_pixels_equal_those_of_transformers(name: str, kind: str) -> None:
    how, processor = PROCESSORS[kind]
    made = PICTURES[name]()

    pixels = image.preprocess(made, how)

    assert pixels.dtype == np.float32 and pixels.shape == (1, 3, 112, 112)
    np.testing.assert_allclose(pixels, processor(images=made, return_tensors="np")["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("name", PHOTOS)
def test_pixels_of_photos_equal_those_of_transformers(name: str, kind: str) -> None:
    how, processor = PROCESSORS[kind]
    path = photo(name)

    pixels = image.preprocess(image.open_image(path), how)

    reference = processor(images=load_image(str(path)), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels, reference, rtol=0, atol=1e-6)


def test_a_picture_smaller_than_the_crop_is_padded_with_zeros_as_in_transformers() -> None:
    how = Preprocessing(shortest_edge=31, crop=(64, 49), rescale=1 / 255, mean=CLIP_MEAN, std=CLIP_STD)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 31}, crop_size={"height": 64, "width": 49})
    made = picture("RGB", 40, 90)

    reference = processor(images=made, return_tensors="np")["pixel_values"]

    np.testing.assert_allclose(image.preprocess(made, how), reference, rtol=0, atol=1e-6)


def test_steps_that_are_left_out_are_not_performed() -> None:
    made = picture("RGB", 8, 6)

    pixels = image.preprocess(made, Preprocessing())

    np.testing.assert_array_equal(pixels[0].transpose(1, 2, 0), np.array(made, dtype=np.float32))


@pytest.mark.parametrize("resample", range(6))
def test_every_filter_gives_the_pixels_of_transformers(resample: int) -> None:
    how = Preprocessing(resize_to=(40, 50), resample=resample, rescale=1 / 255)
    processor = SiglipImageProcessorPil(size={"height": 40, "width": 50}, resample=resample, do_normalize=False)
    made = picture("RGB", 91, 67)

    reference = processor(images=made, return_tensors="np")["pixel_values"]

    np.testing.assert_allclose(image.preprocess(made, how), reference, rtol=0, atol=1e-6)


FILES = {
    "l.png": "L",
    "la.png": "LA",
    "p.png": "P",
    "p.gif": "P",
    "rgba.png": "RGBA",
    "rgba.webp": "RGBA",
    "rgb.webp": "RGB",
    "rgb.bmp": "RGB",
    "rgb.jpg": "RGB",
    "l.jpg": "L",
    "cmyk.jpg": "CMYK",
    "one.png": "1",
}


@pytest.mark.parametrize("name", FILES)
def test_files_open_as_in_transformers(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    picture(FILES[name], 37, 21).save(path)

    opened = image.open_image(path)

    assert opened.mode == "RGB"
    flat = convert_to_rgb(PIL.Image.open(path)) if name in SEE_THROUGH else load_image(str(path))
    np.testing.assert_array_equal(np.array(opened), np.array(flat))


SEE_THROUGH = ("la.png", "rgba.png", "rgba.webp")  # laid on white, where `load_image` drops transparency


def test_transparent_pixels_are_white_and_not_the_black_behind_them(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:6, 2:6] = (0, 0, 255, 255)
    PIL.Image.fromarray(pixels).save(tmp_path / "circle.png")

    opened = np.array(image.open_image(tmp_path / "circle.png"))

    assert (opened[0, 0] == 255).all() and opened[3, 3].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_colour_that_is_transparent_is_white(mode: str, tmp_path: Path) -> None:
    made = PIL.Image.new(mode, (4, 4), 0 if mode != "RGB" else (0, 0, 0))
    made.paste(1 if mode == "P" else 99 if mode == "L" else (99, 99, 99), (0, 0, 2, 2))
    if mode == "P":
        made.putpalette([0, 0, 0, 99, 99, 99])
    made.save(tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)

    opened = np.array(image.open_image(tmp_path / "a.png"))

    assert opened[3, 3].tolist() == [255] * 3 and opened[0, 0].tolist() == [99] * 3


DEEP = [("a.png", np.uint16), ("a.tiff", np.uint16), ("a.tiff", np.float32), ("a.tiff", np.int32)]


@pytest.mark.parametrize(("name", "dtype"), DEEP)
def test_pictures_of_more_than_8_bits_are_refused(name: str, dtype: type, tmp_path: Path) -> None:
    PIL.Image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8)).save(tmp_path / name)

    with pytest.raises(InputError, match=r"16 or 32 bits\), expected 8 bits per channel"):
        image.open_image(tmp_path / name)


def test_a_picture_that_another_program_would_decode_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    PIL.Image.new("RGB", (8, 8)).save(path, format="EPS")

    with pytest.raises(InputError, match="not a picture in a format that is read, expected one of JPEG, PNG"):
        image.open_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    picture("RGB", 40, 24).save(path, exif=exif)

    opened = image.open_image(str(path))

    assert opened.size == ((40, 24) if orientation < 5 else (24, 40))
    np.testing.assert_array_equal(np.array(opened), np.array(load_image(str(path))))


def test_bytes_path_and_picture_open_alike(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture("RGB", 20, 10).save(path)

    opened = [image.open_image(source) for source in (path, str(path), path.read_bytes(), PIL.Image.open(path))]

    assert all(np.array_equal(np.array(opened[0]), np.array(other)) for other in opened)


def jpeg() -> bytes:
    file = io.BytesIO()
    picture("RGB", 200, 200).save(file, "JPEG")
    return file.getvalue()


def bad_files() -> Iterator[tuple[str, bytes, str]]:
    png = io.BytesIO()
    picture("RGB", 200, 200).save(png, "PNG")
    yield "empty", b"", "not a picture"
    yield "text", b"this is no picture\n", "not a picture"
    yield "truncated jpeg", jpeg()[:700], "truncated or damaged"
    yield "truncated png", png.getvalue()[:300], "truncated or damaged"
    yield "header only", jpeg()[:20], "not a picture"
    yield "damaged png", png.getvalue()[:100] + bytes(200) + png.getvalue()[300:], "truncated or damaged"


@pytest.mark.parametrize(("content", "says"), [file[1:] for file in bad_files()], ids=[file[0] for file in bad_files()])
def test_a_bad_picture_is_reported_on_one_line(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)

    for source in (path, content):
        with pytest.raises(InputError, match=says) as error:
            image.open_image(source)
        assert "\n" not in str(error.value)


def test_a_missing_picture_is_reported_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jpg: no such file.*check the path"):
        image.open_image(tmp_path / "nowhere.jpg")


def test_a_folder_is_not_a_picture(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        image.open_image(tmp_path)


@pytest.mark.parametrize(("pillows", "own"), [(49, 1.0), (10**6, 99e-6)])
@pytest.mark.filterwarnings("error")
def test_a_picture_over_a_limit_is_not_decoded(
    pillows: int, own: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "bomb.png"
    picture("RGB", 10, 10).save(path)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", pillows)
    monkeypatch.setattr(PIL.Image.Image, "load", lambda self: pytest.fail("decoded"))

    with pytest.raises(InputError, match=r"too large .*expected at most 98|expected at most 9\.9e-05; scale it down"):
        image.open_image(path, megapixels=own)


def test_a_picture_of_as_many_pixels_as_the_limit_is_read_and_one_of_more_is_not() -> None:
    assert image.open_image(picture("RGB", 10, 10), megapixels=1e-4).size == (10, 10)
    with pytest.raises(InputError, match=r"picture: the picture is 10x11, 0\.0 megapixels, expected at most 0\.0001"):
        image.open_image(picture("RGB", 10, 11), megapixels=1e-4)


@pytest.mark.parametrize(("format_", "fractions"), [("JPEG", {2: (9, 8), 4: (5, 4), 8: (3, 2)}), ("PNG", {})])
def test_a_jpeg_is_reduced_as_little_as_the_limit_asks_for(format_: str, fractions: dict[int, tuple[int, int]]) -> None:
    file = io.BytesIO()
    picture("RGB", 17, 15).save(file, format_)
    sizes = {1: (17, 15)} | fractions  # of a half, a quarter and an eighth, rounded up

    for width, height in sizes.values():
        found = image.open_image(file.getvalue(), megapixels=width * height / 1e6)
        assert found.size == (width, height)
    smallest = min(width * height for width, height in sizes.values())
    with pytest.raises(InputError, match="expected at most"):
        image.open_image(file.getvalue(), megapixels=(smallest - 1) / 1e6)


def test_what_a_picture_is_resized_to_has_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert image.MEGAPIXELS == 25
    monkeypatch.setattr(image, "MEGAPIXELS", 0.0006)
    how = Preprocessing(shortest_edge=20)

    assert image.preprocess(picture("RGB", 4, 6), how).shape == (1, 3, 30, 20)
    said = r"picture: 40x64 is too long and thin, it would be resized to 20x32, expected at most 0\.0006 megapixels"
    with pytest.raises(InputError, match=said):
        image.preprocess(picture("RGB", 40, 64), how)


@pytest.mark.parametrize(
    ("source", "name"),
    [("", "''"), (b"abc", "picture of 3 bytes"), ("no\nwhere.png", "no where.png"), (Path("x.png"), "x.png")],
)
def test_a_picture_is_called_by_its_name(source: str | bytes | Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        image.open_image(source)
    assert str(caught.value).startswith(f"{name}: ")


def test_what_a_format_trips_over_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a\nb")

    monkeypatch.setattr(PIL.Image, "open", fail)

    with pytest.raises(InputError, match=r"^picture of 1 bytes: cannot be read as a picture \(a b\), expected a JPEG"):
        image.open_image(b"x")


def test_a_picture_of_pillow_is_called_by_its_file(tmp_path: Path) -> None:
    made = PIL.Image.fromarray(np.zeros((4, 4), np.int32))
    with pytest.raises(InputError, match=r"^picture: its pixels are I"):
        image.open_image(made)
    made.save(tmp_path / "deep.tiff")
    with pytest.raises(InputError, match=r"deep\.tiff: its pixels are I"):
        image.open_image(PIL.Image.open(tmp_path / "deep.tiff"))


@pytest.mark.parametrize("part", ["mean", "std"])
def test_pixels_are_normalised_where_mean_and_deviation_are_given(part: str) -> None:
    made = picture("RGB", 5, 4)
    one: dict[str, tuple[float, float, float]] = {part: (0.1, 0.2, 0.3)}

    found = image.preprocess(made, Preprocessing(rescale=1 / 255, **one))  # type: ignore[arg-type]

    np.testing.assert_array_equal(found[0].transpose(1, 2, 0), (np.array(made) / 255).astype(np.float32))


def test_a_picture_that_would_be_resized_beyond_measure_is_refused() -> None:
    with pytest.raises(InputError, match="too long and thin"):
        image.preprocess(picture("RGB", 1, 60000), CLIP)


def test_a_picture_of_another_mode_is_refused_where_the_model_converts_nothing() -> None:
    with pytest.raises(InputError, match="its mode is L"):
        image.preprocess(picture("L", 9, 9), Preprocessing(convert_rgb=False))


def test_boxes_tile_a_square_picture() -> None:
    boxes = image.patch_boxes((200, 200), CLIP, (2, 2))

    assert boxes.tolist() == [[0, 0, 100, 100], [100, 0, 200, 100], [0, 100, 100, 200], [100, 100, 200, 200]]


def test_boxes_of_a_cropped_picture_stay_in_the_middle() -> None:
    boxes = image.patch_boxes((224, 112), CLIP, (1, 2))

    assert boxes.tolist() == [[56, 0, 112, 112], [112, 0, 168, 112]]


def test_boxes_of_a_padded_picture_reach_outside() -> None:
    boxes = image.patch_boxes((224, 112), LLAVA, (2, 1))

    assert boxes.tolist() == [[0, -56, 224, 56], [0, 56, 224, 168]]


def test_boxes_of_a_stretched_picture_are_stretched_back() -> None:
    boxes = image.patch_boxes((224, 56), SIGLIP, (1, 2))

    assert boxes.tolist() == [[0, 0, 112, 56], [112, 0, 224, 56]]


def test_pixels_left_over_by_whole_patches_belong_to_no_box() -> None:
    how = Preprocessing(resize_to=(384, 384))

    boxes = image.patch_boxes((384, 384), how, (27, 27))

    assert boxes[-1].tolist() == [364, 364, 378, 378]


@pytest.mark.parametrize("how", [CLIP, LLAVA, SIGLIP])
@pytest.mark.parametrize("size", [(300, 180), (180, 300), (112, 112), (60, 90)])
def test_a_box_covers_what_its_patch_shows(size: tuple[int, int], how: Preprocessing) -> None:
    # One channel grows with x and one with y, so the mean of a patch tells where it lies.
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    ramp = PIL.Image.fromarray(np.stack([x, y, y], axis=-1).astype(np.uint8))
    shown = image.preprocess(ramp, Preprocessing(**{**vars(how), "rescale": None, "mean": None, "std": None}))
    means = shown[0].reshape(3, 4, 28, 4, 28).mean((2, 4)).reshape(3, 16)

    boxes = image.patch_boxes(size, how, (4, 4))

    inside = (boxes[:, :2] >= 0).all(1) & (boxes[:, 2] <= width) & (boxes[:, 3] <= height)
    expected_x = (boxes[:, 0] + boxes[:, 2]) / 2 / width * 255
    expected_y = (boxes[:, 1] + boxes[:, 3]) / 2 / height * 255
    assert inside.any()
    # A few grey levels: the ramp and the resize round to whole ones, and edges are sharpened.
    np.testing.assert_allclose(means[0][inside], expected_x[inside], atol=4)
    np.testing.assert_allclose(means[1][inside], expected_y[inside], atol=4)


def test_overlay_leaves_kept_patches_clear_and_darkens_the_rest() -> None:
    made = PIL.Image.new("RGB", (100, 100), (200, 200, 200))

    shown = np.array(overlay.overlay(made, image.patch_boxes((100, 100), SIGLIP, (2, 2)), [1]))

    assert shown[25, 75].tolist() == [200, 200, 200]
    assert all(shown[y, x].max() < 100 for y, x in ((25, 25), (75, 25), (75, 75)))
    yellow = (shown == [255, 210, 0]).all(-1)  # the outline, one pixel wide, inside the patch
    inside = np.zeros((100, 100), bool)
    inside[:50, 50:] = True
    inside[1:49, 51:99] = False
    assert np.array_equal(yellow, inside)
    assert np.array(made).min() == 200


def test_overlay_takes_boxes_outside_the_picture_and_no_boxes() -> None:
    made = picture("LA", 50, 20)
    boxes = image.patch_boxes(made.size, LLAVA, (8, 8))

    assert overlay.overlay(made, boxes, range(64)).size == made.size
    assert overlay.overlay(made, boxes, []).size == made.size


def test_visual_tokens_without_cells_are_counted_and_not_drawn() -> None:
    views = Views(canvas=Canvas(size=(112, 112)), how=SIGLIP)
    runs = (Run(kind="visual", rows=3), Run(kind="separator", rows=1), Run(kind="visual", rows=4, grid=(2, 2)))
    planned = Picture(token_id=7, graphs=(), views=views, runs=runs)
    grey = PIL.Image.new("RGB", (400, 400), (200, 200, 200))

    shown = np.array(overlay.draw([planned, planned], [grey, grey], np.array([1, 4, 7 + 6])))

    clear = [shown[y, x].tolist() == [200, 200, 200] for y in (100, 300) for x in (100, 300, 500, 700)]
    assert clear == [False, True, False, False, False, False, False, True]


@pytest.mark.parametrize(("leading", "missing"), [(0, 1), (1, 0), (0, 0)])
def test_an_overlay_counts_a_class_token_and_patches_that_have_no_token(leading: int, missing: int) -> None:
    views = Views(canvas=Canvas(size=(112, 112)), how=SIGLIP)
    run = Run(kind="visual", rows=4 + leading - missing, grid=(2, 2), leading=leading, missing=missing)
    planned = Picture(token_id=7, graphs=(), views=views, runs=(run,))
    grey = PIL.Image.new("RGB", (400, 400), (200, 200, 200))

    for patch, (y, x) in enumerate([(100, 100), (100, 300), (300, 100), (300, 300)]):
        token = leading + patch - missing
        if token < 0:
            continue
        shown = np.array(overlay.draw([planned], [grey], np.array([token])))
        assert shown[y, x].tolist() == [200, 200, 200]
        assert (shown == 200).all(-1).sum() < 200 * 200  # no other patch is clear
    if leading:
        shown = np.array(overlay.draw([planned], [grey], np.array([0])))
        assert not (shown == 200).all(-1).any()


def test_a_damaged_tiff_is_an_answer_or_an_error_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    file = io.BytesIO()
    picture("RGB", 9, 7).save(file, "TIFF")
    good = file.getvalue()
    damaged = [good[:cut] for cut in range(len(good))]
    damaged += [good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :] for at in range(len(good)) for bit in (0, 7)]

    for content in damaged:
        with contextlib.suppress(InputError):
            image.open_image(content)

    assert [str(each.message) for each in recwarn] == []


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((384, 1), (384, 1)), ((383, 2), (766, 4)), ((192, 100), (384, 200)), ((191, 3), (573, 9)), ((2, 400), (2, 400))],
)
def test_small_pictures_are_enlarged_by_whole_factors(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    views = Views(canvas=Canvas(size=(112, 112)), how=SIGLIP)
    planned = Picture(token_id=7, graphs=(), views=views, runs=(Run(kind="visual", rows=4, grid=(2, 2)),))

    assert overlay.draw([planned], [PIL.Image.new("RGB", size)], np.array([0])).size == drawn


def test_pictures_of_several_sizes_stand_side_by_side() -> None:
    views = Views(canvas=Canvas(size=(112, 112)), how=SIGLIP)
    planned = Picture(token_id=7, graphs=(), views=views, runs=(Run(kind="visual", rows=1, grid=(1, 1)),))
    sources = [PIL.Image.new("RGB", size, colour) for size, colour in (((400, 50), "red"), ((500, 90), "lime"))]

    shown = np.array(overlay.draw([planned, planned], sources, np.array([0, 1])))

    assert shown.shape == (90, 900, 3)
    assert shown[25, 200].tolist() == [255, 0, 0] and shown[70, 700].tolist() == [0, 255, 0]
    assert not shown[51:, :400].any()  # below the lower one


def test_what_is_not_kept_has_three_tenths_of_its_light_and_boxes_end_with_the_picture() -> None:
    grey = PIL.Image.new("RGB", (10, 8), (200, 100, 50))
    boxes = np.array([[-3.0, -2, 2.4, 1.6], [7.6, 6, 14, 11], [4, 4, 4, 9], [11, 2, 15, 5]])

    shown = np.array(overlay.overlay(grey, boxes, [0, 1, 2, 3]))

    assert shown[4, 5].tolist() == [60, 30, 15]
    outline = np.zeros((8, 10), bool)
    outline[0:2, 0:2] = outline[6:8, 8:10] = True  # boxes of 2 x 2 are all outline; an empty one has none
    assert np.array_equal((shown == [255, 210, 0]).all(-1), outline)


def test_cells_are_those_of_their_own_run() -> None:
    run = Run(kind="visual", rows=5, grid=(2, 3), leading=1, missing=2)

    assert overlay.cells(np.array([0, 3, 9, 10, 11, 14, 15, 20]), run, 10) == [2, 5]

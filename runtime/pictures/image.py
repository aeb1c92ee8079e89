"""Pictures: opening them, turning them into the model's input, and where its patches lie on them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lvlm_edge.runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What is done to a picture before the vision encoder, in the order of the fields; `None` skips a step.

    Sizes are (height, width) in pixels. Exactly one of `shortest_edge` and `resize_to` may be set.
    """

    convert_rgb: bool = True  # transparent pixels are laid on white
    pad_to_square: tuple[int, int, int] | None = None  # colour of the padding, 0..255
    shortest_edge: int | None = None  # resize so that the shorter edge has this length, keeping the shape
    resize_to: tuple[int, int] | None = None  # resize to this size, whatever the shape
    resample: int = 3  # Pillow's filter number; 3 is bicubic
    width_first: bool = False  # resize the width, then the height, as Pillow before 13; 13 takes the cheaper order
    crop: tuple[int, int] | None = None  # centre crop; a smaller picture is padded with zeros
    rescale: float | None = None  # factor on the pixel values
    mean: tuple[float, float, float] | None = None  # subtracted per channel, after rescaling
    std: tuple[float, float, float] | None = None  # divided by, per channel


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # EPS would start Ghostscript


MEGAPIXELS = 25.0  # of a picture, and of what it is resized to


def open_image(source: str | os.PathLike[str] | bytes | Image, *, megapixels: float = MEGAPIXELS) -> Image:
    """A picture as RGB, turned upright by its EXIF orientation and decoded completely.

    The first frame is taken. Transparent pixels are laid on white, as image processors of transformers do with a Pillow
    picture. Only formats that Pillow decodes in this process are opened.

    Args:
        source: a path, the content of a file, or a Pillow picture, which is left as it is.
        megapixels: most pixels, in millions. A JPEG file of more is decoded at 1/2, 1/4 or 1/8 of its size.

    Raises:
        InputError: the picture is missing, not a picture, truncated or damaged, has 16 or 32 bits per channel, or is
            too large.
    """
    from PIL import Image

    where = _name(source)
    if isinstance(source, Image.Image):
        return _upright(source, where, megapixels)
    with _open(source, where) as picture:  # a picture of several frames keeps its file open otherwise
        _reduce(picture, megapixels)
        return _upright(picture, where, megapixels)


def preprocess(image: Image, how: Preprocessing) -> NDArray[np.float32]:
    """The model's input, equal to what the Pillow-backed image processors of transformers return.

    Args:
        image: the picture, usually from `open_image`.
        how: the steps.

    Returns:
        `pixel_values`, [1, 3, H, W], float32.

    Raises:
        InputError: the picture is too long and thin to resize, or not RGB although the model wants it as it is.

    Source: `image_processing_backends.PilBackend` and `LlavaImageProcessorPil` of transformers 5.23.
    """
    pixels = _rgb(image) if how.convert_rgb else _as_is(image)
    if how.pad_to_square is not None:
        pixels = _padded(pixels, how.pad_to_square)
    size = _resized_size((pixels.shape[0], pixels.shape[1]), how)
    if how.shortest_edge is not None or how.resize_to is not None:
        pixels = _resized(pixels, size, how.resample, how.width_first)
    if how.crop is not None:
        pixels = _cropped(pixels, how.crop)
    return np.ascontiguousarray(_normalized(pixels, how).transpose(2, 0, 1)[None], dtype=np.float32)


def patch_boxes(size: tuple[int, int], how: Preprocessing, grid: tuple[int, int]) -> NDArray[np.float64]:
    """Where the patches of the model's input lie on the original picture, undoing crop, resize and padding.

    A patch is a whole number of pixels wide; what is left over at the right and bottom of the input belongs to
    no patch, as in a convolution.

    Args:
        size: (width, height) of the original picture in pixels.
        how: the steps of `preprocess`.
        grid: (rows, columns) of patches on the model's input.

    Returns:
        (left, top, right, bottom) of each patch in pixels, row by row, [rows * columns, 4], float64. Boxes reach
        outside the picture where the input was padded.
    """
    width, height = size
    side = max(width, height)
    padded = (side, side) if how.pad_to_square is not None else (height, width)
    resized = _resized_size(padded, how)
    crop = how.crop or resized
    edges = []
    for axis, original in ((0, height), (1, width)):
        patch = crop[axis] // grid[axis]
        cropped_off = (resized[axis] - crop[axis]) // 2
        padding = (padded[axis] - original) // 2
        marks = np.arange(grid[axis] + 1, dtype=np.float64) * patch + cropped_off
        edges.append(marks * (padded[axis] / resized[axis]) - padding)
    return grid_boxes(edges[1], edges[0])


def grid_boxes(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """(left, top, right, bottom) of the cells between lines across both axes, row by row, [rows * columns, 4]."""
    top, left = np.meshgrid(y[:-1], x[:-1], indexing="ij")
    bottom, right = np.meshgrid(y[1:], x[1:], indexing="ij")
    return np.stack([left, top, right, bottom], axis=-1).reshape(-1, 4)


def resized(image: Image, size: tuple[int, int], resample: int = 3, width_first: bool = False) -> Image:
    """A picture as RGB, resized to (width, height).

    Args:
        resample, width_first: see `Preprocessing`.

    Raises:
        InputError: the result would have too many pixels.
    """
    from PIL import Image

    return Image.fromarray(_resized(np.array(image.convert("RGB")), size[::-1], resample, width_first))


def _open(source: str | os.PathLike[str] | bytes, where: str) -> Image:
    """The picture, identified but not decoded."""
    import io
    import warnings

    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Of sizes, which are checked right after this, and of damage: an error says more, and is one line.
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such file, expected a picture; check the path") from error
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise InputError(f"{where}: not a picture in a format that is read, expected one of {known}") from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{where}: the picture is too large ({_one_line(error)}), expected at most "
            f"{2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; scale it down"
        ) from error
    except OSError as error:
        raise InputError(
            f"{where}: cannot be read ({error.strerror or _one_line(error)}), expected a picture; "
            f"check the path and its permissions"
        ) from error
    except Exception as error:
        raise InputError(
            f"{where}: cannot be read as a picture ({_one_line(error)}), expected a JPEG, PNG or WebP file; "
            f"save or copy it again"
        ) from error


def _reduce(picture: Image, megapixels: float) -> None:
    """Have a large JPEG decoded at a fraction of its size, which takes as little memory as that."""
    width, height = picture.size
    parts = [part for part in (1, 2, 4) if -(-width // part) * -(-height // part) <= megapixels * 1e6]
    if picture.format == "JPEG":
        part = min(parts, default=8)
        picture.draft(picture.mode, (max(1, width // part), max(1, height // part)))


def _upright(picture: Image, where: str, megapixels: float) -> Image:
    """The picture as `open_image` returns it; its size is checked before anything is decoded."""
    import warnings

    from PIL import ImageOps

    width, height = picture.size
    if width * height > megapixels * 1e6:
        raise InputError(
            f"{where}: the picture is {width}x{height}, {width * height / 1e6:.1f} megapixels, expected at most "
            f"{megapixels:g}; scale it down, or raise --max-megapixels (max_megapixels)"
        )
    if picture.mode.startswith(("I", "F")):
        raise InputError(
            f"{where}: its pixels are {picture.mode} (16 or 32 bits), expected 8 bits per channel; scale it to "
            "0..255 by the range of what it shows and save it again"
        )
    try:
        with warnings.catch_warnings():  # of damaged EXIF
            warnings.simplefilter("ignore")
            return _on_white(ImageOps.exif_transpose(picture))
    except Exception as error:
        raise InputError(
            f"{where}: the picture is truncated or damaged ({_one_line(error)}), expected a complete picture; "
            f"save or copy it again"
        ) from error


def _name(source: str | os.PathLike[str] | bytes | Image) -> str:
    """How an error calls the source."""
    if isinstance(source, bytes):
        return f"picture of {len(source)} bytes"
    if isinstance(source, (str, os.PathLike)):
        return _one_line(os.fspath(source)) or "''"
    return _one_line(getattr(source, "filename", "")) or "picture"


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _rgb(image: Image) -> NDArray[np.uint8]:
    """[H, W, 3], uint8; transparent pixels are laid on white."""
    return np.array(_on_white(image))


def _on_white(image: Image) -> Image:
    """The picture as RGB, transparent pixels on white."""
    from PIL import Image

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _as_is(image: Image) -> NDArray[np.uint8]:
    """[H, W, 3], uint8, without a conversion."""
    if image.mode != "RGB":
        raise InputError(
            f"picture: its mode is {image.mode}, but this model takes pictures unconverted, expected RGB; "
            f"convert it to RGB first"
        )
    return np.array(image)


def _padded(pixels: NDArray[np.uint8], colour: Sequence[int]) -> NDArray[np.uint8]:
    """The pixels in the middle of a square of the padding's colour, [side, side, 3]."""
    height, width, _ = pixels.shape
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = colour
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def _resized_size(size: tuple[int, int], how: Preprocessing) -> tuple[int, int]:
    """(height, width) after the resize; `size` itself when there is none."""
    if how.resize_to is not None:
        return how.resize_to[0], how.resize_to[1]
    if how.shortest_edge is None:
        return size
    height, width = size
    longest = int(how.shortest_edge * max(size) / min(size))
    return (longest, how.shortest_edge) if width <= height else (how.shortest_edge, longest)


def _resized(pixels: NDArray[np.uint8], size: tuple[int, int], resample: int, width_first: bool) -> NDArray[np.uint8]:
    from PIL import Image

    # Only the middle of a long, thin picture is used, but cropping before resizing changes the last bits.
    if size[0] * size[1] > MEGAPIXELS * 1e6:
        raise InputError(
            f"picture: {pixels.shape[1]}x{pixels.shape[0]} is too long and thin, it would be resized to "
            f"{size[1]}x{size[0]}, expected at most {MEGAPIXELS:g} megapixels; crop it first"
        )
    picture, how = Image.fromarray(pixels), Image.Resampling(resample)
    if width_first:
        picture = picture.resize((size[1], picture.height), resample=how)
    return np.array(picture.resize((size[1], size[0]), resample=how))


def _cropped(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle of the picture, or the picture in the middle of zeros where it is smaller."""
    out = np.zeros((size[0], size[1], 3), dtype=np.uint8)
    rows, columns = (_overlap(pixels.shape[axis], size[axis]) for axis in (0, 1))
    out[rows[1], columns[1]] = pixels[rows[0], columns[0]]
    return out


def _overlap(have: int, want: int) -> tuple[slice, slice]:
    """The pixels taken from an edge of length `have`, and where they go on one of length `want`."""
    start = (have - want) // 2  # rounds down, also when negative
    if start >= 0:
        return slice(start, start + want), slice(0, want)
    return slice(0, have), slice(-start, -start + have)


def _normalized(pixels: NDArray[np.uint8], how: Preprocessing) -> NDArray[np.float32]:
    """[H, W, 3], float32. Rescaling happens in float64 and normalising in float32, as in transformers."""
    scaled = pixels if how.rescale is None else pixels.astype(np.float64) * how.rescale
    values = scaled.astype(np.float32)
    if how.mean is None or how.std is None:
        return values
    mean, std = np.array(how.mean, dtype=np.float32), np.array(how.std, dtype=np.float32)
    out: NDArray[np.float32] = (values - mean) / std
    return out

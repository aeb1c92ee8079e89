"""Where pictures come from: files, bytes, arrays, Pillow pictures, data URLs, and URLs where they are asked for."""

from __future__ import annotations

import base64
import binascii
import os
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_edge.runtime.errors import InputError, UsageError
from lvlm_edge.runtime.pictures.image import MEGAPIXELS, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

TIMEOUT, MOST = 30, 50_000_000  # seconds without an answer, bytes of one: of a URL


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How pictures are read.

    Attributes:
        max_megapixels: of a picture, in 10^6 pixels. A JPEG above it is decoded at 1/2, 1/4 or 1/8 of its size, others
            are refused.
        bgr: channels of arrays are blue, green, red, as OpenCV has them.
        allow_url: fetch `http://` and `https://`.
    """

    max_megapixels: float = MEGAPIXELS
    bgr: bool = False
    allow_url: bool = False

    def __post_init__(self) -> None:
        if not self.max_megapixels > 0:
            raise UsageError(f"max_megapixels: is {self.max_megapixels}, expected a number above 0")

    def open(self, source: Any) -> Image:
        """A picture, see `image.open_image`.

        Args:
            source: a path, the content of a file, a Pillow picture, an array uint8 [H, W, 3], a data URL, or a URL.

        Raises:
            InputError: the picture cannot be read, or is larger than it may be.
        """
        if isinstance(source, np.ndarray):
            source = _array(source, self.bgr)
        elif isinstance(source, str) and source.startswith("data:"):
            source = _data(source)
        elif isinstance(source, str) and source.startswith(("http://", "https://")):
            source = _fetched(source, self.allow_url)
        elif not isinstance(source, (str, bytes, bytearray, os.PathLike)) and not hasattr(source, "getbands"):
            raise InputError(
                f"images: one is of type {type(source).__name__}, expected a path, bytes, a Pillow picture, an array "
                "uint8 [H, W, 3] or a data URL"
            )
        return open_image(bytes(source) if isinstance(source, bytearray) else source, megapixels=self.max_megapixels)


def listed(images: Any, *, axes: int = 3) -> list[Any]:
    """Sources of pictures or videos as a list: one alone is a list of one, an array [N, ...] of them is N.

    Args:
        axes: of an array that is one alone: 3 of a picture [H, W, 3], 4 of a video [frames, H, W, 3].
    """
    alone = isinstance(images, (str, bytes, bytearray, os.PathLike)) or hasattr(images, "getbands")
    if alone or (isinstance(images, np.ndarray) and images.ndim <= axes):
        return [images]
    try:
        return list(images)
    except TypeError:
        return [images]


def _array(frame: Any, bgr: bool) -> Image:
    from PIL import Image

    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise InputError(f"images: an array is {frame.dtype} {list(frame.shape)}, expected uint8 [H, W, 3]; convert it")
    return Image.fromarray(np.ascontiguousarray(frame[..., ::-1] if bgr else frame))


def _data(url: str) -> bytes:
    """The content of a data URL, RFC 2397."""
    head, comma, body = url.partition(",")
    where = f"data URL of {len(url)} characters"
    if not comma:
        raise InputError(f"{where}: has no comma, expected data:image/png;base64,...")
    try:
        if head.endswith(";base64"):
            return base64.b64decode("".join(urllib.parse.unquote(body).split()), validate=True)
        return urllib.parse.unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: is not base64 ({error}), expected data:image/png;base64,...") from error


def _fetched(url: str, allowed: bool) -> bytes:
    try:
        parts = urllib.parse.urlsplit(url)
        where = f"{parts.scheme}://{parts.hostname}{parts.path}"[:100]  # without passwords and queries
    except ValueError as error:
        raise InputError(f"picture: its URL cannot be read ({error}); give a file") from error
    if not allowed:
        raise InputError(f"{where}: is a URL, which is not fetched; allow it with --allow-url (allow_url=True)")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content: bytes = answer.read(MOST + 1)
    except (OSError, ValueError) as error:  # urllib's errors are OSErrors
        raise InputError(f"{where}: cannot be fetched ({getattr(error, 'reason', error)}); check the URL") from error
    if len(content) > MOST:
        raise InputError(f"{where}: has more than {MOST} bytes, expected a picture; give a smaller one")
    return content

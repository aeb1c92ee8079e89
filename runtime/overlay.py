"""Draws which visual tokens survived over the pictures they came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_edge.runtime import image as pictures
from lvlm_edge.runtime.bundle import ImageConfig, Manifest

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


SMALLEST = 384  # pixels of the longer edge of a drawn picture


def patches(kept: Any, config: ImageConfig, tokens: int, picture: int) -> list[int]:
    """Grid patches (row-major) of one crop that kept tokens stand for.

    Args:
        kept: ascending indices among the visual tokens of all pictures, int [k].
        tokens: visual tokens per crop.
        picture: number of the crop in the prompt.
    """
    mine = kept[(kept >= picture * tokens) & (kept < (picture + 1) * tokens)] - picture * tokens
    found = mine - config.leading_tokens + config.missing_patches
    return [int(i) for i in found if i >= 0]


def draw(manifest: Manifest, images: Sequence[Any], kept: Any) -> Image:
    """The pictures side by side, small ones enlarged: kept patches clear, the others dark."""
    from PIL import Image

    config, tokens = manifest.image, manifest.counts.visual_tokens // manifest.counts.num_images
    drawn = []
    for i, source in enumerate(images):
        picture = pictures.open_image(source)
        boxes = _boxes(picture.size, config)
        factor = -(-SMALLEST // max(picture.size))
        if factor > 1:
            picture, boxes = picture.resize([factor * edge for edge in picture.size]), boxes * factor
        each, crops = tokens // manifest.counts.crops, manifest.counts.crops
        shown = [
            crop * len(boxes) // crops + patch
            for crop in range(crops)
            for patch in patches(np.asarray(kept), config, each, i * crops + crop)
        ]
        drawn.append(pictures.overlay(picture, boxes, shown))
    sheet = Image.new("RGB", (sum(p.width for p in drawn), max(p.height for p in drawn)))
    left = 0
    for picture in drawn:
        sheet.paste(picture, (left, 0))
        left += picture.width
    return sheet


def _boxes(size: tuple[int, int], config: ImageConfig) -> Any:
    """Boxes of the patches of every crop of a picture, [crops * patches, 4]."""
    base = pictures.patch_boxes(size, config.preprocessing, config.grid)
    if config.tiles is None or config.canvas is None:
        return base
    return np.concatenate([base, pictures.tile_boxes(size, config.canvas, config.tiles, config.grid)])


def save(sheet: Image, target: Path) -> None:
    """Write a picture; an error leaves nothing half-written and what was there before.

    Raises:
        OSError: it cannot be written.
        ValueError: Pillow cannot write this format or size.
    """
    partial = target.with_name(f"{target.stem}.partial{target.suffix}")
    try:
        sheet.save(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)

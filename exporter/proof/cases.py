"""Prompts to compare a bundle with PyTorch on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvlm_edge.exporter.planning import Capacity
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.pictures.views import Canvas, view_size
from lvlm_edge.runtime.pipeline.inputs import placed

Array = NDArray[Any]
FREE = (301, 207)  # pixels of a made-up picture, where any size will do


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt to compare on: token ids with one image token per image, and each image's pixels.

    Attributes:
        pixels: float32 [views, 3, H, W] of all images, or one such array per image.
        sizes: (width, height) of the images, for references whose rows depend on them.
    """

    name: str
    prompt: tuple[int, ...]
    pixels: Array | Sequence[Array]
    sizes: tuple[tuple[int, int], ...] = ()


def planned_sizes(pipe: Pipeline, capacity: Capacity) -> tuple[tuple[int, int], ...]:
    """(width, height) of the images that a bundle is for: as asked, or those that fill their canvas.

    Args:
        capacity: what the export was asked for.
    """
    pairs = zip(capacity.sizes, pipe.manifest.pictures, strict=True)
    return tuple(_some(picture.views.canvas) if size is None else size for size, picture in pairs)


def _some(canvas: Canvas) -> tuple[int, int]:
    """A size (width, height) that belongs on a canvas."""
    return FREE if canvas.rule == "any" else canvas.size


def synthetic(pipe: Pipeline, seed: int = 0, sizes: tuple[tuple[int, int], ...] = ()) -> list[Case]:
    """Seeded prompts of several lengths, with the images at several places, on noise pictures.

    Args:
        sizes: (width, height) of the images.
    """
    rng, manifest = np.random.default_rng(seed), pipe.manifest
    room, images = manifest.counts.text_tokens, len(manifest.pictures)
    found = []
    for name, text, before in (
        ("short", min(6, room), 1),
        ("middle", max(2, room // 2), min(room // 4, 35)),
        ("full", room, 5),
    ):
        ids = rng.integers(0, manifest.embedding.vocab, text)
        ids[ids == manifest.image_token_id] = (manifest.image_token_id + 1) % manifest.embedding.vocab
        before = min(before, text - 1)
        prompt = placed(ids.tolist(), before, manifest.image_token_id, images)
        shapes = [(p.views.count, 3, *view_size(p.views)[::-1]) for p in manifest.pictures]
        pixels = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        same = len({shape[1:] for shape in shapes}) == 1
        joined = np.concatenate(pixels) if same else pixels
        found.append(Case(name=name, prompt=tuple(prompt), pixels=joined, sizes=sizes))
    return found

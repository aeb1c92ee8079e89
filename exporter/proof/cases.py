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
from lvlm_edge.runtime.pipeline.inputs import placed, random_text

Array = NDArray[Any]
FREE = (301, 207)  # pixels of a made-up picture, where any size will do


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt to compare on: token ids with one token per image and video, and the pixels of these in their order.

    Attributes:
        pixels: float32 [views, 3, H, W] of all images, or one such array per image; a frame of a video is a view.
        sizes: (width, height) of the images, for references whose rows depend on them.
    """

    name: str
    prompt: tuple[int, ...]
    pixels: Array | Sequence[Array]
    sizes: tuple[tuple[int, int], ...] = ()


def planned_sizes(pipe: Pipeline, capacity: Capacity) -> tuple[tuple[int, int], ...]:
    """(width, height) of the images and videos that a bundle is for: as asked, or those that fill their canvas.

    Args:
        capacity: what the export was asked for.
    """
    pairs = zip(capacity.sizes + (None,) * capacity.num_videos, pipe.manifest.pictures, strict=True)
    return tuple(_some(picture.views.canvas) if size is None else size for size, picture in pairs)


def _some(canvas: Canvas) -> tuple[int, int]:
    """A size (width, height) that belongs on a canvas."""
    return FREE if canvas.rule == "any" else canvas.size


def ranked(pipe: Pipeline, case: Case) -> int:
    """Parts of a prompt's visual tokens that are ranked, each by itself."""
    apart = pipe.manifest.method_config.get("rank") == "per-image"
    return sum(token in pipe.manifest.placeholders for token in case.prompt) if apart else 1


def synthetic(pipe: Pipeline, seed: int = 0, sizes: tuple[tuple[int, int], ...] = ()) -> list[Case]:
    """Seeded prompts of several lengths, with the images at several places, on noise pictures.

    Args:
        sizes: (width, height) of the images and videos.
    """
    rng, manifest = np.random.default_rng(seed), pipe.manifest
    room = manifest.counts.text_tokens
    found = []
    for name, text, before in (
        ("short", min(6, room), 1),
        ("middle", max(2, room // 2), min(room // 4, 35)),
        ("full", room, 5),
    ):
        ids = random_text(rng, manifest, text)
        before = min(before, text - 1)
        prompt = placed(ids, before, [picture.token_id for picture in manifest.pictures])
        shapes = [(p.views.count, 3, *view_size(p.views)[::-1]) for p in manifest.pictures]
        pixels = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        same = len({shape[1:] for shape in shapes}) == 1
        joined = np.concatenate(pixels) if same else pixels
        found.append(Case(name=name, prompt=tuple(prompt), pixels=joined, sizes=sizes))
    return found

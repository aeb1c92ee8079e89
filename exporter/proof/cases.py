"""Prompts to compare a bundle with PyTorch on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.pictures.views import view_size
from lvlm_edge.runtime.pipeline.inputs import placed

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt to compare on: token ids with one image token per image, and each image's pixels.

    Attributes:
        pixels: float32 [views, 3, H, W] of all images, or one such array per image.
    """

    name: str
    prompt: tuple[int, ...]
    pixels: Array | Sequence[Array]


def synthetic(pipe: Pipeline, seed: int = 0) -> list[Case]:
    """Seeded prompts of several lengths, with the images at several places, on noise pictures."""
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
        found.append(Case(name=name, prompt=tuple(prompt), pixels=joined))
    return found

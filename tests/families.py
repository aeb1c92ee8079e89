"""Checks that the tests of families with several views share, against stock transformers and its stored outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvlm_edge.exporter import families, plan, references
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.planning import Capacity
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.pictures import views
from lvlm_edge.runtime.pictures.layout import Picture
from tests import qwen
from tests.qwen import TOLERANCE, Case, noise

CONVERSATIONS, case = qwen.CONVERSATIONS, qwen.case


def agrees(pipe: Pipeline, of: Case) -> None:
    """Prompt ids, pixels to the bit, tokens, kept set and logits are those of the case."""
    ids, pixels = pipe.prepare(messages=of.data["messages"], images=of.pictures)
    given = np.concatenate(pixels) if isinstance(pixels, list) else pixels
    wanted = of.tensors["pixel_values"].reshape(-1, *given.shape[1:])
    answer = pipe.generate_tokens(ids, pixels, max_new_tokens=24, ignore_eos=True)

    assert ids == of.data["prompt_token_ids"]
    assert np.array_equal(given, wanted[[bool(view.any()) for view in wanted]])
    assert pipe.manifest.counts.visual_tokens == of.data["num_visual_tokens"]
    assert answer.token_ids == of.data["expected_new_token_ids"]
    assert np.abs(answer.logits - of.tensors["step_logits"]).max() <= TOLERANCE
    if of.data["method"] == "fastv":
        assert answer.kept_visual.tolist() == of.data["kept_visual"]


def expands(of: Case) -> None:
    """What `check` takes for a prompt's ids with everything that pictures bring are the stock processor's."""
    model = references.view(references.load(of.checkpoint))
    model.sizes = tuple(tuple(size) for size in of.data["picture_sizes"])
    real = of.tensors["pixel_values"].reshape(-1, *of.tensors["pixel_values"].shape[-3:])
    pixels = torch.from_numpy(real[[bool(view.any()) for view in real]])
    with torch.no_grad():
        counts = model.counts(model.of_prompt(of.data["prompt_token_ids"], pixels))

    assert model.expanded(of.data["prompt_token_ids"], counts) == of.data["input_ids"]


@torch.no_grad()
def answers_like_stock(
    pipe: Pipeline, folder: Path, messages: list[dict[str, Any]], sizes: Iterable[tuple[int, int]]
) -> None:
    """Tokens and logits of stock `generate` for a conversation with noise pictures of these sizes."""
    sizes = tuple(sizes)
    ids, pixels = pipe.prepare(messages=messages, images=[noise(size, seed) for seed, size in enumerate(sizes)])
    answer = pipe.generate_tokens(ids, pixels, max_new_tokens=8, ignore_eos=True)
    model = references.view(references.load(folder))
    if pixels is None:
        inputs = {"input_ids": torch.tensor([ids])}
        tokens, logits = references.original.generated(model.whole, 8, inputs, len(ids))
    else:
        tokens, logits = model.answer(ids, references.given(model, pixels, sizes), 8)

    assert answer.token_ids == tokens
    assert np.abs(answer.logits - logits.numpy()).max() <= TOLERANCE


def layers(folder: Path) -> int:
    """Decoder layers of a checkpoint."""
    return families.read(Checkpoint.open(folder)).decoder.layers


def planned(folder: Path, size: tuple[int, int]) -> Picture:
    """What a checkpoint's picture of (width, height) stands for."""
    of = Checkpoint.open(folder)
    (picture,) = families.of(of).pictures(of, families.read(of), Capacity(image_size=(size,)))
    return picture


def sees_like_the_processor(folder: Path, sizes: Iterable[tuple[int, int]], **options: Any) -> None:
    """Pixels of pictures of many sizes are the Pillow-backed image processor's, to the bit."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    for seed, size in enumerate(sizes):
        picture = noise(size, seed)

        found = views.pixels(picture, planned(folder, size).views)

        wanted = np.asarray(processor(picture, return_tensors="np", **options)["pixel_values"])
        assert np.array_equal(found, wanted.reshape(-1, *found.shape[1:])), size


def counts(folder: Path, size: tuple[int, int], text: int = 64) -> dict[str, Any]:
    """The columns of the tables in the specification of these families: rows, GFLOP, and parameters."""
    settings = {"image_size": size, "max_text_tokens": text, "max_new_tokens": 1, "dtype": "float16"}
    dense = plan(folder, **settings)
    pruned = plan(folder, method="fastv", prune_layer=3, keep_ratio=0.5, **settings)
    return {
        "tokens": dense["visual_tokens"],
        "frame": dense["stages"][0]["queries"] - dense["visual_tokens"] - text,
        "encoder": dense["flops"]["vision"] / 1e9,
        "connector": dense["flops"]["projector"] / 1e9,
        "prefill": dense["flops"]["prefill"] / 1e9,
        "fastv": pruned["flops"]["prefill"] / 1e9,
        "parameters": sum(dense["parameters"].values()),
    }


def random_sizes(seed: int, count: int, most: int = 1200, thin: float = 8) -> list[tuple[int, int]]:
    """Random (width, height), none `thin` times longer than wide."""
    rng = np.random.default_rng(seed)
    found: list[tuple[int, int]] = []
    while len(found) < count:
        width, height = (round(float(np.exp(rng.uniform(np.log(8), np.log(most))))) for _ in range(2))
        if max(width, height) <= thin * min(width, height):
            found.append((width, height))
    return found


def bundle(export: Callable[..., Path], of: Case, **more: Any) -> Path:
    """The bundle of a case: for its pictures' sizes, with its method."""
    sizes = of.data["picture_sizes"]
    return qwen.bundle(export, of, **({"num_images": len(sizes)} if len(sizes) > 1 else {}), **more)

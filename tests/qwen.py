"""Checks that the tests of the Qwen-VL families share, against stock transformers and its stored outputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from lvlm_edge.exporter import families, plan
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.planning import Capacity
from lvlm_edge.runtime import Pipeline

# Fields that transformers has under rope_parameters, derives, or does not have by itself.
ELSEWHERE = ("rope_theta", "mrope_section", "head_dim", "sliding_window", "tie_word_embeddings")
TOLERANCE = 1e-3  # of float32 logits: sums in another order, seen at 5e-5


@dataclass(frozen=True)
class Case:
    """A case of the reference outputs: what it holds, its tensors, the checkpoint, and its pictures."""

    data: dict[str, Any]
    tensors: dict[str, NDArray[Any]]
    checkpoint: Path
    pictures: list[Path]


def case(oracles: Path, family: str, name: str) -> Case:
    folder = oracles / "families" / family
    data = json.loads((folder / f"{name}.json").read_text("utf-8"))
    tensors = load_file(folder / f"{name}.safetensors")
    return Case(data, tensors, folder / data["checkpoint"], [folder / picture for picture in data["pictures"]])


def bundle(export_once: Callable[..., Path], of: Case, **more: Any) -> Path:
    """The bundle of a case: for its pictures' sizes, with its method."""
    options = {"method": of.data["method"]}
    if of.data["method"] == "fastv":
        options |= {key: of.data[key] for key in ("prune_layer", "keep_ratio")}
    sizes = tuple(tuple(size) for size in of.data["picture_sizes"])
    return export_once(of.checkpoint, image_size=sizes, max_text_tokens=96, max_new_tokens=24, **options | more)


def agrees(pipe: Pipeline, of: Case) -> None:
    """Prompt ids, pixels to the bit, tokens, kept set and logits are those of the case."""
    ids, pixels = pipe.prepare(messages=of.data["messages"], images=of.pictures)
    given = [picture[None] for picture in pixels] if isinstance(pixels, np.ndarray) else pixels
    patch = given[0].shape[2] // of.data["image_grid_thw"][0][1]
    answer = pipe.generate_tokens(ids, pixels, max_new_tokens=24, ignore_eos=True)

    assert ids == of.data["prompt_token_ids"]
    assert np.array_equal(np.concatenate([patches(p[0], patch) for p in given]), of.tensors["pixel_values"])
    assert answer.token_ids == of.data["expected_new_token_ids"]
    assert np.abs(answer.logits - of.tensors["step_logits"]).max() <= TOLERANCE
    if of.data["method"] == "fastv":
        assert answer.kept_visual.tolist() == of.data["kept_visual"]


def patches(picture: NDArray[np.float32], patch: int) -> NDArray[np.float32]:
    """A picture [3, H, W] as the stock processor cuts it up, one patch after the other: a slow, plain loop."""
    _, height, width = picture.shape
    found = []
    for top in range(0, height, 2 * patch):
        for left in range(0, width, 2 * patch):
            for i in (0, patch):
                for j in (0, patch):
                    one = picture[:, top + i : top + i + patch, left + j : left + j + patch]
                    found.append(np.stack([one, one], 1).reshape(-1))
    return np.stack(found)


@lru_cache(maxsize=2)
def stock(folder: Path) -> Any:
    """Stock transformers' model, float32, eager."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    settings = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    return AutoModelForImageTextToText.from_pretrained(folder, **settings).eval()


@torch.no_grad()
def generate(
    folder: Path, ids: Sequence[int], pictures: Sequence[NDArray[np.float32]], steps: int
) -> tuple[list[int], NDArray[np.float32]]:
    """Greedy tokens of stock `generate`, end-of-sequence ignored, and their logits [steps, vocab].

    Args:
        ids: one image token per picture.
        pictures: [1, 3, H, W] each.
    """
    from transformers import GenerationConfig

    model = stock(folder)
    model.generation_config = GenerationConfig()
    image, patch = model.config.image_token_id, model.config.vision_config.patch_size
    grids = [(1, p.shape[2] // patch, p.shape[3] // patch) for p in pictures]
    counts = iter([rows * columns // 4 for _, rows, columns in grids])
    expanded = torch.tensor([[t for i in ids for t in ([i] * next(counts) if i == image else [i])]])
    given: dict[str, Any] = {"input_ids": expanded, "attention_mask": torch.ones_like(expanded)}
    if pictures:
        given |= {
            "mm_token_type_ids": (expanded == image).int(),
            "image_grid_thw": torch.tensor(grids),
            "pixel_values": torch.from_numpy(np.concatenate([patches(p[0], patch) for p in pictures])),
        }
    settings = GenerationConfig(
        max_new_tokens=steps, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    out = model.generate(**given, generation_config=settings)
    return out.sequences[0, expanded.shape[1] :].tolist(), torch.cat(out.logits).numpy()


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A noise picture of (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def turn(*parts: str | None, role: str = "user") -> dict[str, Any]:
    """A message; None is an image."""
    return {
        "role": role,
        "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
    }


CONVERSATIONS = {
    "text first": [turn("Look at this: ", None, " and say what it is.")],
    "several turns": [turn(None, "What is it?"), turn("A cat.", role="assistant"), turn("And its colour?")],
    "text only": [turn("Tell me a story.")],
    "system": [turn("Be brief.", role="system"), turn(None, "What is it?")],
}


def answers_like_stock(pipe: Pipeline, folder: Path, messages: list[dict[str, Any]], size: tuple[int, int]) -> None:
    """Tokens and logits of stock `generate` for a conversation, with a noise picture where it has one."""
    images = [noise(size)] * sum(part["type"] == "image" for message in messages for part in message["content"])
    ids, pixels = pipe.prepare(messages=messages, images=images)

    answer = pipe.generate_tokens(ids, pixels, max_new_tokens=8, ignore_eos=True)

    pictures = [] if pixels is None else [picture[None] for picture in pixels]
    tokens, logits = generate(folder, ids, pictures, 8)
    assert answer.token_ids == tokens
    assert np.abs(answer.logits - logits).max() <= TOLERANCE


def published(tmp_path: Path, config: dict[str, Any], preprocessor: dict[str, Any]) -> Path:
    """A folder of a published checkpoint's configs, without weights."""
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor), "utf-8")
    return tmp_path


def counts(folder: Path, size: tuple[int, int]) -> dict[str, float]:
    """The columns of the table in the specification of these families: GFLOP, MiB, and parameters."""
    settings = {"image_size": size, "max_text_tokens": 64, "max_new_tokens": 1, "dtype": "float16"}
    dense = plan(folder, **settings)
    pruned = plan(folder, method="fastv", prune_layer=3, keep_ratio=0.5, **settings)
    row = dense["kv_cache_bytes"] / (dense["visual_tokens"] + 64 + 1)
    return {
        "tokens": dense["visual_tokens"],
        "encoder": dense["flops"]["vision"] / 1e9,
        "mergers": dense["flops"]["projector"] / 1e9,
        "prefill": dense["flops"]["prefill"] / 1e9,
        "fastv": pruned["flops"]["prefill"] / 1e9,
        "cache": row * (dense["visual_tokens"] + 64) / 2**20,
        "parameters": sum(dense["parameters"].values()),
    }


def are(found: dict[str, float], expected: Sequence[float]) -> None:
    """Counts are those of a row of the table; it has four to five digits."""
    names = ("tokens", "encoder", "mergers", "prefill", "fastv", "cache", "parameters")
    for name, value in zip(names, expected, strict=True):
        exact = pytest.approx(value, rel=1e-3) if name == "parameters" else pytest.approx(value, rel=1e-4, abs=0.06)
        assert found[name] == exact, name


def counts_tokens_like_the_processor(folder: Path, factor: int, bounds: tuple[int, int]) -> None:
    """300 random sizes of pictures are resized like the Pillow-backed image processor resizes them."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    of = Checkpoint.open(folder)
    spec = families.read(of)
    for width, height in sizes(seed=1):
        expected = smart_resize(height, width, factor, *bounds)

        (picture,) = families.of(of).pictures(of, spec, Capacity(image_size=((width, height),)))

        assert picture.views.canvas.size == expected[::-1], (width, height)
        assert picture.visual_tokens == expected[0] * expected[1] // factor**2


def sizes(seed: int, count: int = 300) -> list[tuple[int, int]]:
    """Random (width, height) from 1x1 to 4000x3000, most of them small, none 200 times longer than wide."""
    rng = np.random.default_rng(seed)
    found: list[tuple[int, int]] = [(1, 1), (4000, 3000), (3000, 4000)]
    while len(found) < count:
        width, height = (round(float(np.exp(rng.uniform(0, np.log(most))))) for most in (4000, 3000))
        if max(width, height) <= 200 * min(width, height):
            found.append((width, height))
    return found

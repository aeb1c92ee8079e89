"""Small seeded LLaVA checkpoints in hub layout, and what stock transformers says of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

IMAGE = 159  # the image token of every checkpoint made here, the last of its vocabulary


def build(folder: Path, *, seed: int = 0, tower: str = "clip", decoder: str = "llama", **changed: Any) -> Path:
    """A checkpoint of 4 decoder layers and 16 visual tokens, with weights large enough that attention is not flat.

    Args:
        tower: `clip` or `siglip`.
        decoder: `llama`, `mistral` or `qwen2`.
        changed: fields of the config; those of a part under `text` and `vision`.
    """
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config(tower, decoder, **changed))
    _randomise(model)
    model.save_pretrained(folder)
    return folder


def config(tower: str, decoder: str, *, text: Any = None, vision: Any = None, **top: Any) -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        MistralConfig,
        Qwen2Config,
        SiglipVisionConfig,
    )

    towers = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
    decoders = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    seen = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    spoken = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": IMAGE + 1,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlavaConfig(
        vision_config=towers[tower](**seen | (vision or {})),
        text_config=decoders[decoder](**spoken | (text or {})),
        image_token_index=IMAGE,
        **top,
    )


@torch.no_grad()
def _randomise(model: Any) -> None:
    """Matrices that keep the size of what goes through them, and gains and biases that are not 1 and 0."""
    for name, weight in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            weight.normal_(0, 0.5)
        elif weight.dim() > 1:
            weight.normal_(0, 1.3 * weight[0].numel() ** -0.5)
        else:
            weight.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)


def prompt(
    text: int, before: int, *, images: int = 1, between: int = 0, image: int = IMAGE, seed: int = 0
) -> list[int]:
    """Seeded token ids: `before` text tokens, the images with `between` text tokens from one to the next, the rest."""
    ids = np.random.default_rng(seed).integers(3, image, text).tolist()
    for i in range(images):
        at = before + i * (between + 1)
        ids.insert(at, image)
    return ids


def pixels(size: int = 56, *, images: int = 1, seed: int = 0) -> NDArray[np.float32]:
    """Noise pictures, [images, 3, size, size]."""
    return np.random.default_rng(seed).standard_normal((images, 3, size, size)).astype(np.float32)


@lru_cache(maxsize=4)
def stock(folder: Path, attention: str = "eager") -> Any:
    """Stock transformers' model, float32."""
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True
    )
    return model.eval()


@torch.no_grad()
def features(folder: Path, pictures: NDArray[np.float32]) -> torch.Tensor:
    """Visual tokens of all pictures as stock transformers has them, [images * V, D]."""
    return torch.cat(list(stock(folder).model.get_image_features(torch.from_numpy(pictures)).pooler_output))


@torch.no_grad()
def generate(
    folder: Path, ids: Sequence[int], pictures: NDArray[np.float32], steps: int, attention: str = "eager"
) -> tuple[list[int], NDArray[np.float32]]:
    """Greedy tokens of stock `generate`, end-of-sequence ignored, and their logits [steps, vocab]."""
    from transformers import GenerationConfig

    model = stock(folder, attention)
    model.generation_config = GenerationConfig()
    each = len(features(folder, pictures)) // len(pictures)
    image = model.config.image_token_id
    expanded = torch.tensor([[t for i in ids for t in ([i] * each if i == image else [i])]])
    out = model.generate(
        input_ids=expanded,
        attention_mask=torch.ones_like(expanded),
        pixel_values=torch.from_numpy(pictures),
        generation_config=GenerationConfig(
            max_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    return out.sequences[0, expanded.shape[1] :].tolist(), torch.cat(out.logits).numpy()

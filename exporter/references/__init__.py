"""Plain PyTorch references for `check`, one per method; they share no code with the exported graphs.

Each module has `run(model, method_config, prompt, pixels, steps, kept=None) -> Reference`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lvlm_edge.exporter.spec import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What PyTorch says of one prompt. All float32.

    Attributes:
        image_features: what the projector reads, [images, V, D_v].
        image_embeds: what the decoder reads, [images * V, D].
        logits: [steps, vocab]; row t gave token t.
        tokens: greedy tokens.
        hidden: hidden states entering the prune layer, [n, D]; None where nothing is pruned.
        score: importance of each visual token, [V]; None likewise.
        kept: ascending indices of the kept visual tokens, [k]; None likewise.
    """

    image_features: Tensor
    image_embeds: Tensor
    logits: Tensor
    tokens: list[int]
    hidden: Tensor | None = None
    score: Tensor | None = None
    kept: Tensor | None = None


def module(method: str) -> ModuleType:
    """The reference of a method."""
    return importlib.import_module(f"{__name__}.{method}")


def load(folder: Path) -> Any:
    """Stock transformers' model of a checkpoint, float32, eager attention, weights tied and loaded by transformers.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
    except Exception as error:  # transformers raises many types; the first line says what is wrong
        raise CheckpointError(f"{folder}: transformers cannot load it ({str(error).splitlines()[0]})") from error
    finally:
        if bar:
            logging.enable_progress_bar()
    return model.eval()


def expand(model: Any, prompt: Sequence[int], count: int) -> Tensor:
    """The prompt with each image token repeated `count` times, once per visual token of a picture, [1, n]."""
    image = model.config.image_token_id
    return torch.tensor([[t for token in prompt for t in ([token] * count if token == image else [token])]])


@contextmanager
def recorded(module: Any, pick: Any) -> Iterator[list[Tensor]]:
    """`pick(inputs, output)` of every call of a module inside the block."""
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, inputs, output: found.append(pick(inputs, output).detach()))
    try:
        yield found
    finally:
        handle.remove()

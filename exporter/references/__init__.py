"""Plain PyTorch references for `check`, one per method; they share no code with the exported graphs.

Each module has `run(model, method_config, prompt, pixels, steps, kept=None) -> Reference`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, read_json
from lvlm_edge.exporter.references import families, lora, original, quantised, released, stored


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What PyTorch says of one prompt. All float32.

    Attributes:
        image_features: what the projector reads, [images, V, D_v].
        image_embeds: what the decoder reads of it, without the newlines some checkpoints put after each crop,
            [images * V, D].
        logits: [steps, vocab]; row t gave token t.
        tokens: greedy tokens.
        hidden: hidden states entering the prune layer, [n, D]; None where nothing is pruned.
        score: importance of each visual token, [V]; None likewise.
        kept: ascending indices of the kept visual tokens, [k]; None likewise.
        cache: keys and values per layer after prefill, [H_kv, rows, d], without HiMix's images; None where not told.
        image_kv: keys and values of the images in every layer, [L, 2, H_kv, N, d]; HiMix's only.
        injected: what is added to the images' rows after decoder layers, [rows of images, D], by the names of the
            graphs' outputs.
    """

    image_features: Tensor
    image_embeds: Tensor
    logits: Tensor
    tokens: list[int]
    hidden: Tensor | None = None
    score: Tensor | None = None
    kept: Tensor | None = None
    cache: list[tuple[Tensor, Tensor]] | None = None
    image_kv: Tensor | None = None
    injected: dict[str, Tensor] = field(default_factory=dict)


__all__ = ["Reference", "given", "load", "module", "pixels", "quantised", "view"]
view = original.view


def module(method: str) -> ModuleType:
    """The reference of a method."""
    return importlib.import_module(f"{__name__}.{method}")


def pixels(values: Any) -> Any:
    """Pixel values as the references take them: a tensor where all images have one size, else a list of tensors."""
    found = [torch.from_numpy(part) for part in (values if isinstance(values, list | tuple) else [values])]
    return torch.cat(found) if len({part.shape[1:] for part in found}) == 1 else found


def given(model: Any, values: Any, sizes: Sequence[tuple[int, int]]) -> Any:
    """Pixel values as `pixels` makes them; a model whose rows depend on the pictures' sizes is told these.

    Args:
        sizes: (width, height) of the pictures that the values are of.
    """
    view(model).sizes = tuple(sizes)
    return pixels(values)


def load(folder: Path, adapter: str | None = None) -> Any:
    """A checkpoint on transformers' modules, float32, eager attention.

    Args:
        adapter: folder of one to add to it.

    Returns:
        Stock `LlavaForConditionalGeneration` for the hub's layout, else an `original.Original`: that of the file of
        `references/families` named as `model_type`, or LLaVA's original layouts.

    An image token whose id is outside of the embedding is never looked up: features are put in by position.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    model = _loaded(folder)
    m = view(model)
    if adapter is not None:
        lora.add(m, Path(adapter))
    table, image = m.decoder.embed_tokens, m.image_token_id
    if image >= table.num_embeddings:
        table.register_forward_pre_hook(lambda _, given: (given[0].masked_fill(given[0] == image, 0), *given[1:]))
    return model


def _loaded(folder: Path) -> Any:
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging

    bar, told = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it warns of, export has said in a line of its own
    try:
        config = read_json(folder / "config.json")
        if released.known(config):
            return released.load(folder)
        if config["model_type"] in [m.name for m in pkgutil.iter_modules(families.__path__)]:
            return importlib.import_module(f"{families.__name__}.{config['model_type']}").load(folder)
        if stored.quantised(folder) is not None:
            return _dequantised(folder)
        model = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises many types; the first line says what is wrong
        raise CheckpointError(f"{folder}: transformers cannot load it ({str(error).splitlines()[0]})") from error
    finally:
        logging.set_verbosity(told)
        if bar:
            logging.enable_progress_bar()
    return model.eval()


def _dequantised(folder: Path) -> Any:
    """Stock `LlavaForConditionalGeneration` with what a quantised checkpoint's tensors stand for.

    Raises:
        CheckpointError: the tensors are not those of the model.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    model, report = LlavaForConditionalGeneration.from_pretrained(
        None,
        config=LlavaConfig.from_dict(stored.plain(read_json(folder / "config.json"))),
        state_dict=stored.state(folder),
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = ", ".join(sorted(map(str, report[problem]))[:4])
            raise CheckpointError(f"{folder}: it has {problem.replace('_', ' ')}: {names}")
    return model.eval()

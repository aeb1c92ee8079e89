"""A LoRA adapter of peft's plain layout, merged into the matrices that it is for.

A merged matrix is W + s B A with B [out, r] and A [r, in] of the adapter and s = alpha / r, or alpha / sqrt(r) where
`use_rslora` says so (arXiv:2106.09685, arXiv:2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, Derived, Source, Stored
from lvlm_edge.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
TRAINED = "non_lora_trainables.bin"  # LLaVA's own, of a language model that is no LLaVA yet
PLAIN: dict[str, tuple[Any, ...]] = {  # fields that change what is merged, and the values that do not
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "fan_in_fan_out": (False,), "lora_bias": (False,),
    "modules_to_save": ([],), "rank_pattern": ({},), "alpha_pattern": ({},), "layer_replication": (),
    "target_parameters": ([],), "trainable_token_indices": ([], {}), "alora_invocation_tokens": (),
    "use_qalora": (False,), "use_bdlora": (False,),
    # Others than these change the checkpoint's own matrices when training begins.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}  # fmt: skip
ADVICE = "merge it with peft (merge_and_unload), and export what that saves"
_NAME = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])(\.default)?\.weight$")


@dataclass(frozen=True)
class Adapter:
    """What is added to matrices: a factor, and by the name of a module the matrices A and B."""

    scale: float
    matrices: Mapping[str, tuple[Stored, Stored]]


def read(folder: Path) -> Adapter:
    """The adapter of a folder.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit each other.
        UnsupportedError: it does more than adding a product of two matrices to some.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG}; give a folder that peft saved an adapter in")
    config, where = checkpoint.read_json(folder / CONFIG), folder / CONFIG
    variants: dict[str, tuple[Any, ...]] = {
        name: ({},) for name in config if name.endswith("_config") and name != "eva_config"
    }
    for field, neutral in (PLAIN | variants).items():
        value = config.get(field)
        if value is not None and value not in neutral:
            raise UnsupportedError(f"{where}: {field} is {value!r}, which is not merged here; {ADVICE}")
    if (folder / TRAINED).is_file():
        raise UnsupportedError(
            f"{folder}: has {TRAINED} beside the adapter, as LLaVA's training leaves it; merge both with LLaVA's "
            "scripts/merge_lora_weights.py, and export what that saves"
        )
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CheckpointError(f"{where}: r is {rank!r} and lora_alpha {alpha!r}, expected numbers above 0; correct it")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: has no {' or '.join(FILES)}; download the adapter again")
    return Adapter(scale, _pairs(file, rank))


def _pairs(file: Path, rank: int) -> dict[str, tuple[Stored, Stored]]:
    parts: dict[str, dict[str, Stored]] = {}
    for name, tensor in checkpoint.headers(file).items():
        found = _NAME.match(name)
        if found is None:
            raise UnsupportedError(f"{file}: holds {name}, which is not merged here; {ADVICE}")
        parts.setdefault(found["module"], {})[found["part"]] = tensor
    for module, pair in parts.items():
        shapes = [pair[part].shape for part in "AB" if part in pair]
        if len(shapes) != 2 or len(shapes[0]) != 2 or len(shapes[1]) != 2 or not shapes[0][0] == shapes[1][1] == rank:
            raise CheckpointError(
                f"{file}: {module} has {' and '.join(map(str, map(list, shapes)))}, expected lora_A [{rank}, in] and "
                f"lora_B [out, {rank}]; download the adapter again"
            )
    return {module: (pair["A"], pair["B"]) for module, pair in parts.items()}


def merged(sources: Mapping[str, Source], folder: Path, rename: Callable[[str], str]) -> dict[str, Source]:
    """Sources of weights with an adapter added to them.

    Args:
        sources: by `Parts` name.
        folder: of the adapter.
        rename: a tensor's name in the checkpoint -> its name in `Parts`.

    Raises:
        CheckpointError: a matrix that the checkpoint does not have, or has in another shape.
        UnsupportedError: see `read`.
    """
    found, adapter = dict(sources), read(folder)
    for module, (a, b) in adapter.matrices.items():
        name, shape = rename(f"{module}.weight"), (b.shape[0], a.shape[1])
        base = sources.get(name)
        if base is None:
            raise CheckpointError(f"{folder}: is for {module}, which the checkpoint has not as one matrix; {ADVICE}")
        if base.shape != shape:
            raise CheckpointError(
                f"{folder}: is for {module} of {list(shape)}, but {base.key} is {list(base.shape)}; give the "
                "checkpoint that it was trained on"
            )
        found[name] = Derived(base.file, base.key, shape, "float32", partial(_added, base, a, b, adapter.scale))
    return found


def _added(base: Source, a: Stored, b: Stored, scale: float) -> Tensor:
    """W + s B A, float32 [out, in]."""
    return base.read().float().addmm(b.read().float(), a.read().float(), alpha=scale)

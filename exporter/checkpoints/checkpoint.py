"""A checkpoint's tensors, read one at a time from mapped files; nothing here holds the whole model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.checkpoints.spec import CheckpointError, read_json

if TYPE_CHECKING:
    from torch import Tensor

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: file, key in it, shape and dtype; `rows` (first, end) of what is stored, None for all."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    rows: tuple[int, int] | None = None


def resolve(source: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local one, or a Hugging Face id downloaded into its cache.

    Raises:
        CheckpointError: neither a folder with a config.json nor an id that can be had.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: has no config.json; give the folder of a Hugging Face checkpoint")
        return folder
    if folder.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: is no folder; give a checkpoint folder or a Hugging Face id (owner/name)")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.model", "*.npy", *(["*.safetensors"] if weights else [])]
    try:
        found = snapshot_download(str(source), revision=revision, allow_patterns=patterns)
        if weights and not any((Path(found) / name).exists() for name in _SAFETENSORS):
            found = snapshot_download(str(source), revision=revision, allow_patterns=[*patterns, "*.bin"])
    except Exception as error:  # the hub client raises many types; the first line says what is wrong
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{source}: is no folder, and could not be downloaded ({reason})") from error
    return Path(found)


def index(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by its name, from file headers alone.

    Raises:
        CheckpointError: no weights, a shard missing or truncated, or an index that names tensors its shards lack.
    """
    for single, sharded in (_SAFETENSORS, _PICKLED):
        if (folder / single).is_file():
            return _headers(folder / single)
        if (folder / sharded).is_file():
            return _sharded(folder, sharded)
    raise CheckpointError(f"{folder}: has no weights; expected {', '.join((*_SAFETENSORS, *_PICKLED))}")


def _sharded(folder: Path, name: str) -> dict[str, Stored]:
    weight_map = read_json(folder / name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / name}: has no weight_map from names to files; download the checkpoint again")
    found: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        if os.path.basename(file) != file or file in ("", ".", ".."):
            raise CheckpointError(f"{folder / name}: names {file!r} outside the folder; do not use this checkpoint")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: is missing; download the checkpoint again")
        found |= _headers(folder / file)
    lost = sorted(set(weight_map) - set(found))
    if lost:
        raise CheckpointError(f"{folder / name}: names {_some(lost)}, which its files do not hold; download again")
    return found


def _headers(file: Path) -> dict[str, Stored]:
    if file.suffix == ".bin":
        return {k: Stored(file, k, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in _pickled(file)}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            return {
                key: Stored(file, key, tuple(part.get_shape()), _FLOATS.get(part.get_dtype(), part.get_dtype()))
                for key, part in parts.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: is damaged or truncated ({error}); download it again") from error


def _pickled(file: Path) -> Iterable[tuple[str, Tensor]]:
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and torch errors: all mean the same to a user
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{file}: cannot be loaded safely ({reason}); convert it to safetensors") from error
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise CheckpointError(f"{file}: holds more than tensors; convert it to safetensors")
    return list(content.items())


def read(stored: Stored) -> Tensor:
    """One tensor, mapped from its file; the mapping goes with the tensor."""
    rows = slice(*stored.rows) if stored.rows else slice(None)
    if stored.file.suffix == ".bin":
        whole = dict(_pickled(stored.file))[stored.key]
        return whole[rows] if stored.rows else whole
    from safetensors import safe_open

    with safe_open(stored.file, "pt") as opened:
        tensor: Tensor = opened.get_slice(stored.key)[rows] if stored.rows else opened.get_tensor(stored.key)
        return tensor


def match(
    stored: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]], family: Any, folder: Path
) -> dict[str, Stored]:
    """The wanted tensors, by the names of `Parts`.

    Args:
        stored: tensors by checkpoint name.
        wanted: shapes, as the checkpoint holds them, by `Parts` name.
        family: module with `rename` and `unused`.

    Raises:
        CheckpointError: tensors missing, misshapen, not floating point, unknown, or twice under two prefixes.
    """
    found: dict[str, Stored] = {}
    unknown: list[str] = []
    for key, value in stored.items():
        name = family.rename(key)
        if name in found:
            raise CheckpointError(f"{folder}: holds {name} twice ({found[name].key} and {key}); remove one")
        if name in wanted:
            found[name] = value
        elif not family.unused(name):
            unknown.append(key)
    missing = [name for name in wanted if name not in found]
    wrong = [
        f"{found[n].key} is {list(found[n].shape)}, config.json says {list(shape)}"
        for n, shape in wanted.items()
        if n in found and found[n].shape != shape
    ]
    alien = [f"{s.key} is {s.dtype}" for s in found.values() if s.dtype not in _FLOATS.values()]
    for problem, names, advice in (
        ("lacks tensors", missing, "download it again, or correct config.json"),
        ("holds tensors that config.json does not speak of", unknown, "correct config.json, or remove them"),
        ("does not fit its config", wrong, "correct config.json"),
        ("is quantised or not floating point", alien, "export the unquantised checkpoint"),
    ):
        if names:
            raise CheckpointError(f"{folder}: {problem}: {_some(names)}; {advice}")
    return found


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"

"""A checkpoint: its folder, its config read once, and tensors read one at a time from mapped files.

Nothing here holds the whole model.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lvlm_edge.runtime.errors import LvlmEdgeError

if TYPE_CHECKING:
    from torch import Tensor

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# What training with TinyLLaVA Factory leaves: a folder for each part, and what the names in it lack.
_PARTS = {"language_model": "language_model.", "vision_tower": "vision_tower._vision_tower.", "connector": "connector."}
_ADAPTER, _PROJECTOR, _INSIDE_PEFT = "adapter_config.json", "mm_projector.bin", "base_model.model."
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class CheckpointError(LvlmEdgeError):
    """A checkpoint's files are missing, damaged, or do not fit each other."""


class Source(Protocol):
    """Where a weight's content comes from.

    Attributes:
        file: that it is read from, for messages.
        key: the tensor's name in the checkpoint, for messages.
        shape: of what `read` returns.
        dtype: of what `read` returns, by torch's name.
    """

    @property
    def file(self) -> Path: ...

    @property
    def key(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def read(self) -> Tensor:
        """The tensor, mapped from its file where it lies in one as it is."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: key in it, shape and dtype; `rows` (first, end) of what is stored, None for all."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    rows: tuple[int, int] | None = None

    def read(self) -> Tensor:
        """The tensor, mapped from its file; the mapping goes with the tensor."""
        return read(self)


@dataclass(frozen=True)
class Derived:
    """A weight that is computed from others: folded, fused, or interpolated.

    Attributes:
        file, key: of the tensor that it is made of.
        make: its content; float32 or the checkpoint's dtype.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Tensor]

    def read(self) -> Tensor:
        return self.make()


def cut(tensor: Source, rows: Mapping[str, int]) -> dict[str, Stored]:
    """Parts of a tensor that stand one above the other, by their names.

    Args:
        rows: of each part, in order.

    Raises:
        CheckpointError: the tensor has another number of rows, or does not lie in its file as it is.
    """
    whole = sum(rows.values())
    if not isinstance(tensor, Stored) or not tensor.shape or tensor.shape[0] != whole:
        raise CheckpointError(
            f"{tensor.file}: {tensor.key} is {list(tensor.shape)}, config.json says {whole} rows; correct config.json"
        )
    found, start = {}, 0
    for name, count in rows.items():
        found[name] = replace(tensor, shape=(count, *tensor.shape[1:]), rows=(start, start + count))
        start += count
    return found


def apart(found: dict[str, Source], name: str, fused: str, rows: Mapping[str, int]) -> dict[str, Stored]:
    """A fused tensor's parts, by its name with theirs in the place of `fused`; it leaves what was found.

    Args:
        rows: of each part, see `cut`.
    """
    return {name.replace(fused, part): tensor for part, tensor in cut(found.pop(name), rows).items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a JSON object; restore the file")
    return content


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a config.json.

    Attributes:
        folder: the folder.
        config: content of config.json.
    """

    folder: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """The checkpoint of a local folder.

        Raises:
            CheckpointError: no readable `config.json`, or one without `model_type`.
        """
        path = Path(folder) / "config.json"
        config = read_json(path)
        if not isinstance(config.get("model_type"), str):
            raise CheckpointError(f"{path}: has no model_type; give a Hugging Face checkpoint folder")
        for key, value in config.items():
            if key.endswith("_config") and not isinstance(value, dict | None):
                raise CheckpointError(
                    f"{path}: {key} is {type(value).__name__}, expected a JSON object; restore the file"
                )
        return cls(Path(folder), config)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file beside config.json; empty where there is none.

        Raises:
            CheckpointError: the file holds no JSON object.
        """
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """Every tensor by its name, from file headers alone, as it is stored.

        Raises:
            CheckpointError: no weights, a shard missing or truncated.
        """
        return index(self.folder)


def resolve(source: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local one, or a Hugging Face id downloaded into its cache.

    Raises:
        CheckpointError: neither a folder with a config.json nor an id that can be had.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            advice = _what_else(folder) or "give the folder of a Hugging Face checkpoint"
            raise CheckpointError(f"{folder}: has no config.json; {advice}")
        return folder
    if folder.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: is no folder; give a checkpoint folder or a Hugging Face id (owner/name)")
    from huggingface_hub import snapshot_download

    patterns = [
        "*.json",
        "*.jinja",
        "*.model",
        "*.tiktoken",
        "merges.txt",
        "*.npy",
        *(["*.safetensors"] if weights else []),
    ]
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
    found = _of_files(folder)
    if found is None and all(_of_files(folder / part) for part in ("language_model", "vision_tower")):
        if (folder / _ADAPTER).is_file():
            raise CheckpointError(f"{folder}: {_what_else(folder)}")
        found = {}
        for part, prefix in _PARTS.items():
            found |= {prefix + name: tensor for name, tensor in (_of_files(folder / part) or {}).items()}
    if found is None:
        known = ", ".join((*_SAFETENSORS, *_PICKLED))
        raise CheckpointError(f"{folder}: has no weights; {_what_else(folder) or f'expected {known}'}")
    inside = next((name for name in found if name.startswith(_INSIDE_PEFT)), None)
    if inside is not None:
        raise CheckpointError(
            f"{folder}: holds {inside}: its tensors have their names inside of peft, so the adapter was not merged, or "
            "merged and not unloaded; save what merge_and_unload() returns, and export that"
        )
    return found


def _of_files(folder: Path) -> dict[str, Stored] | None:
    """Every tensor of the files in a folder by its name; None where it has none."""
    for single, sharded in (_SAFETENSORS, _PICKLED):
        if (folder / single).is_file():
            return headers(folder / single)
        if (folder / sharded).is_file():
            return _sharded(folder, sharded)
    return None


def _what_else(folder: Path) -> str:
    """What a folder holds instead of a model, and what to do with it; empty where that is not known."""
    if (folder / _ADAPTER).is_file():
        base = read_json(folder / _ADAPTER).get("base_model_name_or_path")
        return (
            f"it holds an adapter (LoRA) of {base}: export that model with --adapter {folder}, or merge them with "
            "peft, save what merge_and_unload() returns, and export that"
        )
    if (folder / _PROJECTOR).is_file():
        return (
            f"it holds a projector alone ({_PROJECTOR}), as the first stage of LLaVA's training leaves it: export the "
            "model of the second stage, or load the projector into its language model with LLaVA and save both"
        )
    return ""


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
        found |= headers(folder / file)
    lost = sorted(set(weight_map) - set(found))
    if lost:
        raise CheckpointError(f"{folder / name}: names {_some(lost)}, which its files do not hold; download again")
    return found


def headers(file: Path) -> dict[str, Stored]:
    """Every tensor of one file by its name.

    Raises:
        CheckpointError: the file is damaged, or cannot be loaded safely.
    """
    if file.suffix == ".bin":
        return {
            k: Stored(file, k, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in _pickled(file).items()
        }
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


def _pickled(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a file by torch: mapped, or in memory where it is in torch's format of before 1.6."""
    if zipfile.is_zipfile(file):
        return _loaded(file, mapped=True)
    found = file.stat()
    return _older(file, (found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=1)
def _older(file: Path, version: tuple[int, int]) -> Mapping[str, Tensor]:
    """One file at a time, kept for its other tensors: reading any of them reads them all."""
    return _loaded(file, mapped=False)


def _loaded(file: Path, *, mapped: bool) -> Mapping[str, Tensor]:
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # pickle, zip and torch errors: all mean the same to a user
        raise CheckpointError(
            f"{file}: cannot be loaded safely ({_reason(error)}); download it again, or convert it to safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise CheckpointError(f"{file}: holds more than tensors; convert it to safetensors")
    return content


def _reason(error: Exception) -> str:
    """The first sentence of torch's error; of what it refused to unpickle, without its advice to unpickle it."""
    said = str(error).strip()
    if said.startswith("Weights only load failed"):
        said = said.rpartition("WeightsUnpickler error:")[2].strip()
        lines = (line for line in said.splitlines() if line and not line.startswith("Weights only load failed"))
        said = next(lines, "it holds more than tensors")
    return (said or type(error).__name__).splitlines()[0].partition(". ")[0].rstrip(".")


def read(stored: Stored) -> Tensor:
    """One tensor, mapped from its file; the mapping goes with the tensor."""
    rows = slice(*stored.rows) if stored.rows else slice(None)
    if stored.file.suffix == ".bin":
        whole = _pickled(stored.file)[stored.key]
        return whole[rows] if stored.rows else whole
    from safetensors import safe_open

    with safe_open(stored.file, "pt") as opened:
        tensor: Tensor = opened.get_slice(stored.key)[rows] if stored.rows else opened.get_tensor(stored.key)
        return tensor


def match(
    sources: Mapping[str, Source], wanted: Mapping[str, tuple[int, ...]], unused: Callable[[str], bool], folder: Path
) -> dict[str, Source]:
    """The wanted tensors, by the names of `Parts`.

    Args:
        sources: by `Parts` name.
        wanted: shapes, as the checkpoint holds them, by `Parts` name.
        unused: whether a tensor may be there without being read.

    Raises:
        CheckpointError: tensors missing, misshapen, not floating point, or unknown.
    """
    unknown = [source.key for name, source in sources.items() if name not in wanted and not unused(name)]
    found = {name: source for name, source in sources.items() if name in wanted}
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


def renamed(stored: Mapping[str, Source], rename: Callable[[str], str], folder: Path) -> dict[str, Source]:
    """Tensors by their names in `Parts`.

    Raises:
        CheckpointError: one is there twice, under two prefixes.
    """
    found: dict[str, Source] = {}
    for key, value in stored.items():
        name = rename(key)
        if name in found:
            raise CheckpointError(f"{folder}: holds {name} twice ({found[name].key} and {key}); remove one")
        found[name] = value
    return found


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"

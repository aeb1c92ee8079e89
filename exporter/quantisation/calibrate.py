"""Checkpoint to quantised checkpoint: INT4 matrices in the decoder's layers, calibrated on images.

The parts are in this folder: `samples` chooses images and prompts, `gather` takes what the model's own matrices read
while it answers them, `smooth` folds AWQ's factors, `rounding` rounds to nearest or by GPTQ, `write` writes the files.
The model is in memory as a whole, in float32, and beside it up to `gather.ROWS` rows of what each matrix reads.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_edge.exporter import families, references
from lvlm_edge.exporter.bundles import atomic, pack, plans
from lvlm_edge.exporter.checkpoints import checkpoint, quantise
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, Stored
from lvlm_edge.exporter.planning import Capacity, Family, Model, fold_all
from lvlm_edge.exporter.planning import Settings as Precision
from lvlm_edge.exporter.quantisation.gather import gather
from lvlm_edge.exporter.quantisation.layer import groups_of, linears_of
from lvlm_edge.exporter.quantisation.rounding import ALGORITHMS, by_gptq, by_nearest, silent
from lvlm_edge.exporter.quantisation.samples import cases_of, read_samples
from lvlm_edge.exporter.quantisation.smooth import smooth
from lvlm_edge.exporter.quantisation.write import Made, packed, write
from lvlm_edge.exporter.references import original
from lvlm_edge.runtime.errors import UnsupportedError, UsageError, nearest

_SMALL = re.compile(r"\.(weight_packed|weight_scale|weight_shape|qweight|qzeros|g_idx)$")  # of quantised checkpoints
_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to quantise with; keyword options of `quantize`.

    Attributes:
        algorithm: `awq` or `gptq`.
        block_size: input channels that share a scale: 128 where it divides them, or 32. Matrices that neither divides
            stay as they are.
        samples: images to calibrate on, chosen at random where there are more.
        prompt: what is asked about the images of a folder.
        seed: of the choice of images and of rows.
    """

    algorithm: str = "awq"
    block_size: int = 128
    samples: int = 128
    prompt: str = "Describe the picture."
    seed: int = 0


def quantize(
    source: str | Path,
    output: str | Path,
    *,
    pictures: str | Path,
    revision: str | None = None,
    force: bool = False,
    progress: pack.Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a checkpoint of the same family whose decoder layers have INT4 matrices; its other files are copied.

    The model is in memory as a whole, in float32, and beside it 4,096 rows of what every matrix reads: about 40 GB for
    a decoder of 7 B parameters. GPTQ rounds the whole of a matrix once per input channel: seconds for each at widths
    of 1,000, hours at 10,000.

    Args:
        source: checkpoint folder or Hugging Face id.
        output: folder to write; it appears complete or not at all.
        pictures: to calibrate on: a folder, or a JSONL file of `{"image": path, "prompt": text}`, with an `answer` or
            without; paths are relative to the file.
        revision: branch, tag or commit of a Hugging Face id.
        force: replace an output of this function.
        options: fields of `Settings`.

    Returns:
        What was done: `matrices` counts them by block size, `kept` names those that stay, `smoothed` says in how many
        layers AWQ's factors are used, by the first matrix that they multiply.

    Raises:
        UsageError: a setting is unknown or out of range, or `output` exists.
        InputError: a picture or a line of the JSONL file cannot be used.
        UnsupportedError: an algorithm or model this version does not know, one that is quantised already, or
            nvidia-modelopt is not there.
        CheckpointError: files missing, damaged, or not fitting config.json; no tokenizer.
        LvlmEdgeError: no room on the disk, or too few pictures.
    """
    settings = fold_all(Settings, options, "quantize")
    output, pictures, tell = Path(output), Path(pictures), progress or (lambda *_: None)
    _check_settings(settings)
    _require_modelopt()
    _check_output(output, force)
    folder = checkpoint.resolve(source, revision)
    if folder.resolve().is_relative_to(output.resolve()) or output.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{output}: and the checkpoint lie in one another; choose another --output")
    of = Checkpoint.open(folder)
    _check_plain(of)
    family = families.of(of)
    if family.sized:
        raise UnsupportedError(
            f"quantize: {family.name} is not supported, whose pictures have no one size; export with --weights int4"
        )
    chosen = read_samples(pictures, settings.prompt, settings.samples, settings.seed)
    planned, stored = plans.model(of, Capacity(max_text_tokens=1, max_new_tokens=1)), of.stored
    method = next(iter(planned.spec.settings), "none")
    cases = cases_of(of, planned, chosen)
    with atomic.folder(output) as partial:
        model = references.load(folder)
        rows = gather(model, method, _method_config(planned, method), cases, settings.seed, tell)
        made = _convert(model, rows, _keys(stored, planned.family), stored, settings, method, tell)
        del model, rows
        write(folder, partial, stored, made, of.config)
    return {
        "output": str(output),
        "source": str(source),
        "algorithm": settings.algorithm,
        "samples": len(chosen),
        "method": method,
        "matrices": {str(size): count for size, count in sorted(Counter(made.blocks.values()).items())},
        "kept": made.kept,
        "smoothed": made.smoothed,
        "bytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
    }


def _check_settings(settings: Settings) -> None:
    algorithm, block_size = settings.algorithm, settings.block_size
    if algorithm not in ALGORITHMS:
        raise UnsupportedError(f"algorithm: {algorithm!r} is not supported; {nearest(algorithm, ALGORITHMS)}")
    if block_size not in quantise.BLOCKS:
        raise UsageError(f"block_size: {block_size}, expected {' or '.join(map(str, quantise.BLOCKS))}")
    if settings.samples < 1:
        raise UsageError(f"samples: {settings.samples}, expected at least 1; raise --samples")
    if not settings.prompt.strip():
        raise UsageError("prompt: is empty; ask something")


def _require_modelopt() -> None:
    try:
        with silent():
            import modelopt.torch.quantization  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"quantize: nvidia-modelopt cannot be imported ({error}); pip install 'lvlm-edge[quantize]'"
        ) from error


def _check_output(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise UsageError(f"{output}: exists; choose another --output, or replace it with --force")
    if not output.is_dir() or (any(output.iterdir()) and not _is_ours(output)):
        raise UsageError(
            f"{output}: is no quantised checkpoint, so --force does not replace it; choose another --output"
        )


def _is_ours(folder: Path) -> bool:
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    given = found.get("quantization_config") if isinstance(found, dict) else None
    return isinstance(given, dict) and given.get("format") == "pack-quantized"


def _check_plain(of: Checkpoint) -> None:
    """Raise UnsupportedError for a quantised checkpoint. What `text_config` says may be of the decoder's past."""
    if of.config.get("quantization_config") or any(_SMALL.search(key) for key in of.stored):
        raise UnsupportedError(f"{of.folder}: is quantised already; give the checkpoint that it was made from")


def _method_config(model: Model, method: str) -> dict[str, Any]:
    """A method's settings as its reference takes them."""
    capacity = Capacity(max_text_tokens=1, max_new_tokens=1)
    return asdict(plans.make(model, capacity, Precision(), method=method, options={}).config)


def _keys(stored: Mapping[str, Stored], family: Family[Any]) -> dict[str, str]:
    """Names of a checkpoint's tensors by those of `Parts`."""
    return {family.rename(key): key for key in stored}


def _convert(
    model: Any,
    rows: dict[str, Tensor],
    keys: Mapping[str, str],
    stored: Mapping[str, Stored],
    settings: Settings,
    method: str,
    progress: pack.Progress,
) -> Made:
    """What is written of all decoder layers; they are changed in place, and rows given up one after the other.

    Raises:
        UnsupportedError: the checkpoint's matrices are not float32, float16 or bfloat16.
        CheckpointError: a matrix that is not finite.
    """
    block = settings.block_size
    layers, made = original.view(model).decoder.layers, Made()
    paths = {id(module): path for path, module in model.named_modules()} if isinstance(model, nn.Module) else {}
    for i, layer in enumerate(layers):
        progress(settings.algorithm, i, len(layers))
        linears = linears_of(layer)
        names = {name: keys[f"layers.{i}.{name}.weight"] for name in linears}
        dtype = _dtype(stored, next(iter(names.values())))
        read = {group[0]: rows.pop(f"layers.{i}.{group[0]}") for group in groups_of(linears)}
        if settings.algorithm == "awq":
            for name in smooth(layer, read, block, dtype, values_elsewhere=method == "himix"):
                made.smoothed[name] = made.smoothed.get(name, 0) + 1
            small = by_nearest(linears, block, dtype)
        else:
            small = by_gptq(linears, read, block, dtype)
        for name, key in names.items():
            path = paths.get(id(linears[name]), key.removesuffix(".weight"))
            if name in small:
                made.blocks[path] = linears[name].in_features // small[name][1].shape[1]
                made.tensors |= packed(key, *small[name])
            else:
                made.kept.append(path)
        made.tensors |= _rest(layer, f"layers.{i}.", keys, stored, small)
    made.others = [path for path in _modules(model, stored) if path not in made.blocks]
    return made


def _modules(model: Any, stored: Mapping[str, Stored]) -> list[str]:
    """Names of the linear modules: transformers' own, or for the original layouts those of the tensors."""
    if isinstance(model, nn.Module):
        return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = [key for key, tensor in stored.items() if key.endswith(".weight") and len(tensor.shape) == 2]
    found = [key.removesuffix(".weight") for key in weights if "embed" not in key]
    beside_it = not any("vision_tower" in key for key in found)  # a checkpoint of its own
    return found + ["re:.*vision_tower.*"] * beside_it


def _dtype(stored: Mapping[str, Stored], key: str) -> torch.dtype:
    if stored[key].dtype not in _FLOATS:
        raise UnsupportedError(f"{stored[key].file}: {key} is {stored[key].dtype}; known: {', '.join(_FLOATS)}")
    found: torch.dtype = getattr(torch, stored[key].dtype)
    return found


def _rest(
    layer: nn.Module, prefix: str, keys: Mapping[str, str], stored: Mapping[str, Stored], small: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A layer's other tensors, which factors may have gone into: norms, biases, matrices that stay."""
    found = {}
    for name, tensor in layer.state_dict().items():
        *_, module, kind = name.split(".")
        if not (module in small and kind == "weight"):
            key = keys[f"{prefix}{module}.{kind}"]
            found[key] = tensor.to(_dtype(stored, key))
    return found

"""Writes the bundle: graphs, one weights file, tokenizer files, manifest. Beside its place, then renamed."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import hashlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter import checkpoint, planning, preprocess, spec, text
from lvlm_edge.exporter.planning import Plan
from lvlm_edge.exporter.spec import CheckpointError
from lvlm_edge.runtime import bundle as manifests
from lvlm_edge.runtime.errors import LvlmEdgeError, UsageError
from lvlm_edge.runtime.image import Preprocessing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lvlm_edge.exporter.parts import Weight

WEIGHTS = "weights.bin"
PIECE = 1 << 24  # elements of a weight converted at a time
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, out of how much
_VERSIONS = ("lvlm-edge", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "safetensors", "numpy")


@dataclass(frozen=True)
class Placed:
    """A weight in the weights file: its offset, and where its content comes from (None: computed)."""

    offset: int
    weight: Weight
    source: checkpoint.Stored | None


def export(
    source: str | Path,
    output: str | Path,
    *,
    method: str = "none",
    dtype: str = "float32",
    num_images: int = 1,
    max_text_tokens: int = 256,
    max_new_tokens: int = 128,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Export a checkpoint to a bundle.

    Args:
        source: checkpoint folder or Hugging Face id.
        output: folder to write; it appears complete or not at all.
        method: token reduction; its settings are `options` (`prune_layer=2, keep_ratio=0.5`).
        dtype: `float32` or `float16`, of weights, activations and caches.
        max_text_tokens: capacity for text tokens of a prompt, begin-of-sequence included.
        force: replace an existing bundle.

    Returns:
        The bundle's folder.

    Raises:
        UsageError: a setting is out of range, or `output` exists.
        UnsupportedError: a model or method this version does not know.
        CheckpointError: files missing, damaged, or not fitting config.json.
        LvlmEdgeError: no room on the disk.
    """
    output = Path(output)
    _check_output(output, force)
    folder = checkpoint.resolve(source, revision)
    plan = planning.make(
        spec.load(folder),
        method_name=method,
        options=options,
        num_images=num_images,
        max_text_tokens=max_text_tokens,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
    )
    provenance = manifests.Provenance(
        source=str(source),
        revision=revision or _snapshot(folder),
        config_sha256=manifests.sha256(folder / "config.json"),
        versions=_versions(),
    )
    with _beside(output) as partial:
        _write(folder, partial, plan, provenance, progress or (lambda *_: None))
    return output


def _check_output(output: Path, force: bool) -> None:
    if output.exists():
        if not force:
            raise UsageError(f"{output}: exists; choose another --output, or replace it with --force")
        if not output.is_dir() or (any(output.iterdir()) and not (output / manifests.MANIFEST).exists()):
            raise UsageError(f"{output}: is not a bundle, so --force does not replace it; choose another --output")


def _write(folder: Path, out: Path, plan: Plan, provenance: manifests.Provenance, progress: Progress) -> None:
    from lvlm_edge.exporter import graph, parts, trace

    built, mode = parts.fake(plan)
    known = parts.weights(built)
    family = spec.family(plan.spec.family)
    d = plan.spec.decoder
    specs = planning.method(plan.method).graphs(plan)
    sources = _sources(folder, plan, known, family)
    models = []
    for i, wanted in enumerate(specs):
        progress(f"tracing {wanted.name}", i, len(specs))
        models.append(trace.trace(wanted, built, plan, mode))
    used = {name for model in models for name in graph.weight_names(model, known)}
    table = "lm_head.weight" if d.tied else "embed.weight"
    order = [name for name in known if name in used] + ([] if d.tied else ["embed.weight"])
    placed = _place(order, known | {"embed.weight": parts.Weight((d.vocab, d.hidden), False)}, sources, plan.dtype)
    offsets = {name: p.offset for name, p in placed.items()}
    total = sum(p.weight.count for p in placed.values()) * planning.BYTES[plan.dtype]
    _check_room(out, total)
    for wanted, model in zip(specs, models, strict=True):
        graph.save(graph.finish(model, wanted, WEIGHTS, offsets), out / f"{wanted.name}.onnx")
    ropes = dict(zip(parts.ROPE, parts.rope_tables(d, plan.positions), strict=True))
    files = {WEIGHTS: write_weights(out / WEIGHTS, placed, ropes, parts.DTYPES[plan.dtype], progress)}
    text_config = text.copy(folder, out, family, plan.spec.image_token_id)
    for path in sorted(out.iterdir()):
        if path.name not in files:
            files[path.name] = manifests.FileInfo(path.stat().st_size, manifests.sha256(path))
    embedding = manifests.Embedding(
        file=WEIGHTS,
        offset=offsets[table],
        vocab=d.vocab,
        hidden=d.hidden,
        dtype=plan.dtype,
        columns=d.tied,
    )
    manifests.save_manifest(out, _manifest(folder, plan, specs, embedding, text_config, provenance, files))


def _sources(folder: Path, plan: Plan, known: Mapping[str, Weight], family: Any) -> dict[str, checkpoint.Stored]:
    """Checkpoint tensors by the names of `Parts`; a tied lm_head reads the embedding."""
    from lvlm_edge.exporter import parts

    d = plan.spec.decoder
    wanted = {n: w.shape[::-1] if w.transposed else w.shape for n, w in known.items() if n not in parts.ROPE}
    wanted["embed.weight"] = (d.vocab, d.hidden)
    stored = checkpoint.index(folder)
    if d.tied:
        del wanted["lm_head.weight"]
        stored = {k: v for k, v in stored.items() if family.rename(k) != "lm_head.weight"}
    found = checkpoint.match(stored, wanted, family, folder)
    if d.tied:
        found["lm_head.weight"] = found["embed.weight"]
    return found


def _place(
    order: list[str], known: Mapping[str, Weight], sources: Mapping[str, checkpoint.Stored], dtype: str
) -> dict[str, Placed]:
    """Offsets of the weights, one after the other: large ones on page borders so that they can be mapped."""
    placed, end = {}, 0
    for name in order:
        size = known[name].count * planning.BYTES[dtype]
        border = 4096 if size >= 1 << 20 else 64
        end = -(-end // border) * border
        placed[name] = Placed(end, known[name], sources.get(name))
        end += size
    return placed


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed * 1.02:
        raise LvlmEdgeError(
            f"{out.parent}: has {free / 1e6:,.0f} MB free, the bundle needs {needed * 1.02 / 1e6:,.0f} MB; "
            "free some space or choose another --output"
        )


def write_weights(
    path: Path, placed: Mapping[str, Placed], computed: Mapping[str, Tensor], dtype: torch.dtype, progress: Progress
) -> manifests.FileInfo:
    """Write every weight at its offset, one at a time and in pieces.

    Raises:
        CheckpointError: a value that `dtype` cannot hold.
    """
    digest, at = hashlib.sha256(), 0
    size = max(p.offset + p.weight.count * dtype.itemsize for p in placed.values())
    with path.open("wb") as file:
        for name, place in placed.items():
            progress("writing weights", at, size)
            for data in _pieces(name, place, computed, dtype):
                if at < place.offset:
                    pad = bytes(place.offset - at)
                    file.write(pad)
                    digest.update(pad)
                    at = place.offset
                file.write(data)
                digest.update(data)
                at += len(data)
    progress("writing weights", size, size)
    assert at == size, (at, size)
    return manifests.FileInfo(size, digest.hexdigest())


def _pieces(name: str, place: Placed, computed: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of a weight as the graphs read it, converted a few rows at a time."""
    tensor = computed[name] if place.source is None else checkpoint.read(place.source)
    if place.weight.transposed:
        tensor = tensor.t()
    assert tuple(tensor.shape) == place.weight.shape, name
    flat = tensor if tensor.dim() > 1 else tensor.reshape(1, -1)
    step = max(1, PIECE // max(1, place.weight.count // flat.shape[0]))
    for start in range(0, flat.shape[0], step):
        piece = flat[start : start + step].to(dtype).contiguous()
        if not bool(piece.isfinite().all()):
            key = name if place.source is None else place.source.key
            raise CheckpointError(
                f"{key}: holds values that {str(dtype).removeprefix('torch.')} cannot (infinite, not a number, or "
                "too large); check the checkpoint, or export with --dtype float32"
            )
        yield piece.numpy().data.cast("B")


def _manifest(
    folder: Path,
    plan: Plan,
    specs: tuple[Any, ...],
    embedding: manifests.Embedding,
    text_config: Any,
    provenance: manifests.Provenance,
    files: dict[str, manifests.FileInfo],
) -> manifests.Manifest:
    from lvlm_edge.exporter.blocks import OPSET

    d, v = plan.spec.decoder, plan.spec.vision
    class_token = v.kind == "clip"
    report = planning.report(plan)
    return manifests.Manifest(
        schema=manifests.SCHEMA,
        model=report["model"],
        method=plan.method,
        method_config=dataclasses.asdict(plan.config),
        dtype=plan.dtype,
        opset=OPSET,
        lowering="modern",
        counts=manifests.Counts(
            num_images=plan.num_images,
            visual_tokens=plan.visual_tokens,
            kept_tokens=plan.kept_tokens,
            text_tokens=plan.text_tokens,
            prompt_tokens=plan.prompt_tokens,
            new_tokens=plan.new_tokens,
        ),
        decode_offset=0,
        stages=tuple(report["stages"]),
        graphs=tuple(
            manifests.Graph(name=s.name, file=f"{s.name}.onnx", role=s.role, inputs=s.inputs, outputs=s.outputs)
            for s in specs
        ),
        cache=tuple(
            manifests.CacheLayer(
                kv_heads=d.kv_heads, head_dim=d.head_dim, capacity=plan.capacity(i), dropped=plan.dropped(i)
            )
            for i in range(d.layers)
        ),
        embedding=embedding,
        image=manifests.ImageConfig(
            preprocessing=_preprocessing(folder, v),
            grid=(v.grid, v.grid),
            leading_tokens=int(class_token and not v.drop_first),
            missing_patches=int(not class_token and v.drop_first),
        ),
        text=text_config,
        image_token_id=plan.spec.image_token_id,
        eos_token_ids=text.eos_token_ids(folder),
        weights=WEIGHTS,
        provenance=provenance,
        files=files,
    )


def _preprocessing(folder: Path, vision: spec.VisionSpec) -> Preprocessing:
    """From preprocessor_config.json, or where newer transformers put it, else the tower's defaults."""
    if (folder / "preprocessor_config.json").is_file():
        config = spec.read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():
        config = spec.read_json(folder / "processor_config.json").get("image_processor") or {}
    else:
        config = {}
    if not config:
        return preprocess.for_config_only(vision.image_size, "siglip" if vision.kind == "siglip" else "clip")
    return preprocess.read(config, default_size=vision.image_size)


def _snapshot(folder: Path) -> str | None:
    """The commit of a folder inside the Hugging Face cache."""
    return folder.name if folder.parent.name == "snapshots" else None


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends, and is removed when it fails.

    What a killed export left behind is removed by the next one.
    """
    partial = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        with _termination_raises():
            yield partial
        _take_place(partial, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise LvlmEdgeError(f"{output.parent}: no room on the disk ({error.strerror}); free some space") from error
        raise LvlmEdgeError(f"{output}: cannot be written ({error}); choose another --output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_place(partial: Path, output: Path) -> None:
    """Move the finished folder to its place; an old bundle is exchanged for it in one step where the system can."""
    for path in partial.iterdir():
        _sync(path)
    if not output.exists():
        partial.rename(output)
        return
    exchange = 2  # RENAME_EXCHANGE
    libc = ctypes.CDLL(None, use_errno=True)
    here = -100  # AT_FDCWD
    if hasattr(libc, "renameat2") and not libc.renameat2(
        here, os.fsencode(partial), here, os.fsencode(output), exchange
    ):
        return  # the old bundle is now the partial folder, which is removed
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM as an exception, so that what was begun is removed; only where signals can be set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""Writes the bundle: graphs, one weights file, tokenizer files, manifest. Beside its place, then renamed."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter import lowerings, planning
from lvlm_edge.exporter.bundles import atomic
from lvlm_edge.exporter.checkpoints import checkpoint, preprocess, spec, text
from lvlm_edge.exporter.checkpoints.spec import CheckpointError
from lvlm_edge.exporter.planning import Plan
from lvlm_edge.runtime import bundle as manifests
from lvlm_edge.runtime.errors import LvlmEdgeError, UnsupportedError, UsageError
from lvlm_edge.runtime.image import Preprocessing
from lvlm_edge.runtime.prompt import TextConfig

if TYPE_CHECKING:
    from lvlm_edge.exporter.bundles.graph_set import Drawn
    from lvlm_edge.exporter.graphs.parts import Weight

WEIGHTS = "weights.bin"
TABLE = "embed.weight"  # the token embedding, which no graph reads
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, out of how much
_VERSIONS = ("lvlm-edge", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "safetensors", "numpy")


def export(
    source: str | Path,
    output: str | Path,
    *,
    method: str = "none",
    dtype: str = "float32",
    lowering: str = "modern",
    share_weights: bool = False,
    max_graph_gb: float = planning.MAX_GRAPH_GB,
    num_images: int = 1,
    max_text_tokens: int = 256,
    max_new_tokens: int = 128,
    image_size: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    weights: str = "as-is",
    vision_weights: str = "as-is",
    head_weights: str | None = None,
    block_size: int = 128,
    ort: bool = True,
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
        dtype: `float32`, `float16` or `bfloat16` (TensorRT only), of weights, activations and caches.
        lowering: `modern` (opset 24) or `legacy` (opset 18, for TensorRT 10.3).
        share_weights: prompt and decode run in the same graphs, of which an engine holds one copy of the weights.
        max_graph_gb: GB of weights that one decoder graph may hold; the decoder is split into as many as it takes.
        max_text_tokens: capacity for text tokens of a prompt, begin-of-sequence included.
        image_size: (width, height) of the pictures to come, for any-resolution checkpoints.
        grid: (rows, columns) of any-resolution tiles instead; with neither an image is its base view.
        weights: `as-is`, `int8` (a scale per output channel) or `int4` (a scale per block) for the decoder's matrices;
            `float` for floats, also where the checkpoint's are integers, which `as-is` keeps.
        vision_weights: the same for those of the encoder and the projector.
        head_weights: the same for lm_head; by default `int8` where the decoder's are rounded, else what theirs are.
        block_size: input channels that share an INT4 scale: 32, or 128 where it divides them.
        ort: with graphs for ONNX Runtime beside the portable ones, where it gains by them.
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
    if folder.resolve().is_relative_to(output.resolve()):
        raise UsageError(f"{output}: holds the checkpoint itself; choose another --output")
    plan = planning.make(
        spec.load(folder),
        method_name=method,
        options=options,
        num_images=num_images,
        max_text_tokens=max_text_tokens,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        lowering=lowering,
        share_weights=share_weights,
        max_graph_gb=max_graph_gb,
        image_size=image_size,
        grid=grid,
        weights=weights,
        vision_weights=vision_weights,
        head_weights=head_weights,
        block_size=block_size,
    )
    provenance = manifests.Provenance(
        source=str(source),
        revision=revision or _snapshot(folder),
        config_sha256=manifests.sha256(folder / "config.json"),
        versions=_versions(),
    )
    with atomic.folder(output) as partial:
        _write(folder, partial, plan, provenance, progress or (lambda *_: None), ort=ort)
    return output


def _check_output(output: Path, force: bool) -> None:
    if output.exists():
        if not force:
            raise UsageError(f"{output}: exists; choose another --output, or replace it with --force")
        if not output.is_dir() or (any(output.iterdir()) and not _is_bundle(output)):
            raise UsageError(f"{output}: is not a bundle, so --force does not replace it; choose another --output")


def _is_bundle(folder: Path) -> bool:
    """Whether a folder was written by an export, of whatever version: others have a manifest.json too."""
    try:
        content = json.loads((folder / manifests.MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"schema", "graphs", "files"} <= set(content)


def _write(
    folder: Path, out: Path, plan: Plan, provenance: manifests.Provenance, progress: Progress, *, ort: bool
) -> None:
    from lvlm_edge.exporter.bundles import graph_set, ratios, weights_file
    from lvlm_edge.exporter.graphs import parts

    family = spec.family(plan.spec.family)
    d = plan.spec.decoder
    known = graph_set.weights(plan)
    sources = _sources(folder, plan, known, family)
    formats = weights_file.formats(known, sources, plan)
    if plan.lowering == "legacy" and "int4" in (formats.decoder, formats.vision, formats.head):
        raise UnsupportedError(
            "weights: opset 18, of the legacy lowering, has no INT4; choose int8 or --lowering modern"
        )
    plan = replace(plan, formats=formats)
    _check_room(out, planning.weights_bytes(plan))
    config = spec.read_json(folder / "config.json")
    text_config = text.copy(folder, out, family.chat_template(config), plan.spec.image_token_id)
    where, fit = family.pictures(config, folder)
    how = preprocess.fitted(preprocessing(where, plan.spec.vision), fit, plan.spec.vision.image_size)
    ends = text.eos_token_ids(folder)
    if text_config is not None:
        ends += tuple(i for i in text.turn_end(out) if i not in ends)
    drawn = graph_set.draw(plan, progress, ort=ort)
    used, head_is_table = drawn.used(known), d.tied and plan.formats.head == "as-is"
    order = [name for name in known if name in used] + ([] if head_is_table else [TABLE])
    placed = weights_file.place(order, known | {TABLE: parts.Weight((d.vocab, d.hidden), False)}, sources, plan)
    places = {name: p.place for name, p in placed.items()}
    drawn.write(out, WEIGHTS, places)
    ratios.record(out, plan, places)
    ropes = dict(zip(parts.ROPE, parts.rope_tables(d, plan.positions), strict=True))
    files = {WEIGHTS: weights_file.write(out / WEIGHTS, placed, ropes, plan.dtype, progress)}
    for path in sorted(out.iterdir()):
        if path.name not in files:
            files[path.name] = manifests.FileInfo(path.stat().st_size, manifests.sha256(path))
    embedding = manifests.Embedding(
        file=WEIGHTS,
        offset=places["lm_head.weight" if head_is_table else TABLE].offset,
        vocab=d.vocab,
        hidden=d.hidden,
        dtype=plan.dtype,
        columns=head_is_table,
    )
    manifest = _manifest(plan, drawn, embedding, provenance, how=how, text_config=text_config, ends=ends, files=files)
    manifests.save_manifest(out, manifest)  # the last of all files


def _sources(folder: Path, plan: Plan, known: Mapping[str, Weight], family: Any) -> dict[str, checkpoint.Stored]:
    """Checkpoint tensors by the names of `Parts`; a tied lm_head reads the embedding."""
    from lvlm_edge.exporter.graphs import parts

    d = plan.spec.decoder
    wanted = {n: w.shape[::-1] if w.transposed else w.shape for n, w in known.items() if n not in parts.ROPE}
    wanted[TABLE] = (d.vocab, d.hidden)
    stored = family.tensors(spec.read_json(folder / "config.json"), folder, plan.spec)
    if d.tied:
        del wanted["lm_head.weight"]
        stored = {k: v for k, v in stored.items() if family.rename(k) != "lm_head.weight"}
    found = checkpoint.match(stored, wanted, family, folder)
    if d.tied:
        found["lm_head.weight"] = found[TABLE]
    return found


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed * 1.02:
        raise LvlmEdgeError(
            f"{out.parent}: has {free / 1e6:,.0f} MB free, the bundle needs {needed * 1.02 / 1e6:,.0f} MB; "
            "free some space or choose another --output"
        )


def _manifest(
    plan: Plan,
    drawn: Drawn,
    embedding: manifests.Embedding,
    provenance: manifests.Provenance,
    *,
    how: Preprocessing,
    text_config: TextConfig | None,
    ends: tuple[int, ...],
    files: dict[str, manifests.FileInfo],
) -> manifests.Manifest:
    from lvlm_edge.exporter.bundles.graph_set import described

    v = plan.spec.vision
    class_token = v.kind == "clip"
    return manifests.Manifest(
        schema=manifests.SCHEMA,
        model=planning.report(plan)["model"],
        method=plan.method,
        dtype=plan.dtype,
        opset=lowerings.load(plan.lowering).OPSET,
        lowering=plan.lowering,
        decode_offset=0,
        **described(plan, drawn),
        embedding=embedding,
        image=manifests.ImageConfig(
            preprocessing=how,
            grid=(v.grid, v.grid),
            leading_tokens=int(class_token and not v.drop_first),
            missing_patches=int(not class_token and v.drop_first),
            tiles=plan.grid,
            canvas=plan.grid and (plan.grid[1] * v.image_size, plan.grid[0] * v.image_size),
            pinpoints=plan.spec.pinpoints,
        ),
        text=text_config,
        image_token_id=plan.spec.image_token_id,
        eos_token_ids=ends,
        weights=WEIGHTS,
        formats=plan.formats,
        provenance=provenance,
        files=files,
    )


def preprocessing(folder: Path, vision: spec.VisionSpec) -> Preprocessing:
    """From preprocessor_config.json, or where newer transformers put it, else the tower's defaults.

    Raises:
        CheckpointError: what comes out is no input of the tower.
    """
    path, config = folder / "preprocessor_config.json", {}
    if path.is_file():
        config = spec.read_json(path)
    elif (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"
        config = spec.read_json(path).get("image_processor") or {}
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: image_processor is {type(config).__name__}, expected an object; correct it")
    if not config:
        return preprocess.for_config_only(vision.image_size, "siglip" if vision.kind == "siglip" else "clip")
    how = preprocess.read(config, default_size=vision.image_size)
    size, wanted = (3, *_size(how)), (vision.channels, vision.image_size, vision.image_size)
    if size != wanted:
        raise CheckpointError(
            f"{path}: makes pictures of {list(size)}, config.json says {list(wanted)} (channels, height, width); "
            "correct the file that is wrong"
        )
    if not all(map(math.isfinite, (how.rescale or 0, *(how.mean or ()), *(how.std or ())))) or 0 in (how.std or ()):
        raise CheckpointError(f"{path}: mean, std and rescale_factor make no finite picture; correct the file")
    return how


def _size(how: Preprocessing) -> tuple[int, int]:
    """Height and width of every picture after its preprocessing."""
    size = how.crop or how.resize_to
    if size is None:
        assert how.shortest_edge is not None and how.pad_to_square is not None
        return how.shortest_edge, how.shortest_edge
    return size


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

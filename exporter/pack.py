"""Writes the bundle: graphs, one weights file, tokenizer files, manifest. Beside its place, then renamed."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter import beside, checkpoint, lowerings, planning, preprocess, spec, text
from lvlm_edge.exporter.planning import Plan
from lvlm_edge.exporter.spec import CheckpointError
from lvlm_edge.runtime import bundle as manifests
from lvlm_edge.runtime.errors import LvlmEdgeError, UsageError
from lvlm_edge.runtime.image import Preprocessing
from lvlm_edge.runtime.prompt import TextConfig

if TYPE_CHECKING:
    import onnx_ir as ir

    from lvlm_edge.exporter.blocks import GraphSpec
    from lvlm_edge.exporter.parts import Parts, Weight

WEIGHTS = "weights.bin"
ORT = ".onnxruntime"  # ends the names of graphs that are for ONNX Runtime alone
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
        weights: `as-is`, `int8` (a scale per output channel) or `int4` (a scale per block) for the decoder's matrices.
        vision_weights: the same for those of the encoder and the projector.
        head_weights: the same for lm_head; by default `int8` where the decoder's are small.
        block_size: input channels that share an INT4 scale: 32, or 128 where it divides them.
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
    with beside.folder(output) as partial:
        _write(folder, partial, plan, provenance, progress or (lambda *_: None))
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


def _write(folder: Path, out: Path, plan: Plan, provenance: manifests.Provenance, progress: Progress) -> None:
    from lvlm_edge.exporter import blob, graph, parts

    built, mode = parts.fake(plan)
    known = parts.weights(built)
    family = spec.family(plan.spec.family)
    d = plan.spec.decoder
    specs = planning.method(plan.method).graphs(plan)
    sources = _sources(folder, plan, known, family)
    _check_room(out, planning.weights_bytes(plan))
    config = spec.read_json(folder / "config.json")
    text_config = text.copy(folder, out, family.chat_template(config), plan.spec.image_token_id)
    where, fit = family.pictures(config, folder)
    how = preprocess.fitted(_preprocessing(where, plan.spec.vision), fit, plan.spec.vision.image_size)
    ends = text.eos_token_ids(folder)
    if text_config is not None:
        ends += tuple(i for i in text.turn_end(out) if i not in ends)
    traced = _traced(specs, built, plan, mode, progress)
    forms, more = _forms(plan, built, mode, progress)
    traced += more
    used = {name for _, model in traced for name in graph.weight_names(model, known)}
    head_is_table = d.tied and plan.formats.head == "as-is"
    order = [name for name in known if name in used] + ([] if head_is_table else [TABLE])
    placed = blob.place(order, known | {TABLE: parts.Weight((d.vocab, d.hidden), False)}, sources, plan)
    places = {name: p.place for name, p in placed.items()}
    for wanted, model in traced:
        graph.save(graph.finish(model, wanted, built.ops.OPSET, WEIGHTS, places), out / _file(wanted))
    ropes = dict(zip(parts.ROPE, parts.rope_tables(d, plan.positions), strict=True))
    files = {WEIGHTS: blob.write(out / WEIGHTS, placed, ropes, plan.dtype, progress)}
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
    manifest = _manifest(
        plan, specs, forms, embedding, provenance, how=how, text_config=text_config, ends=ends, files=files
    )
    manifests.save_manifest(out, manifest)  # the last of all files


def _traced(
    specs: Iterable[GraphSpec], built: Parts, plan: Plan, mode: Any, progress: Progress
) -> list[tuple[GraphSpec, ir.Model]]:
    """Every graph that is a file of its own, with its model."""
    from lvlm_edge.exporter import trace

    files = [wanted for wanted in specs if wanted.file is None]
    found = []
    for i, wanted in enumerate(files):
        progress(f"tracing {wanted.name}", i, len(files))
        found.append((wanted, trace.trace(wanted, built, plan, mode)))
    return found


def _forms(
    plan: Plan, built: Parts, mode: Any, progress: Progress
) -> tuple[dict[str, tuple[GraphSpec, ...]], list[tuple[GraphSpec, ir.Model]]]:
    """Graphs for ONNX Runtime where it can do with fewer: its sessions share no weights, but a session may run both the
    prompt and decode, if it leaves the number of rows open.

    Returns:
        the graphs by backend, and the models of those that are not among the portable ones.
    """
    shares = hasattr(planning.method(plan.method), "SHARES_WEIGHTS") and plan.lowering == "modern"
    if not shares or plan.share_weights or plan.dtype == "bfloat16":
        return {}, []
    both = replace(plan, share_weights=True)
    specs = planning.method(plan.method).graphs(both)
    own = [wanted for wanted in specs if wanted.dynamic_rows is not None and wanted.file is None]
    traced = _traced(own, built, both, mode, progress)
    names = {wanted.name: f"{wanted.name}{ORT}" for wanted in own}
    named = tuple(replace(s, file=names.get(s.file or s.name, s.file)) for s in specs)
    return {"ort": named}, [(replace(s, file=names[s.name]), model) for s, model in traced]


def _file(wanted: GraphSpec) -> str:
    """A graph's file: its name's, unless it says another."""
    file = wanted.file or wanted.name
    return file if file.endswith(ORT) else f"{file}.onnx"


def _sources(folder: Path, plan: Plan, known: Mapping[str, Weight], family: Any) -> dict[str, checkpoint.Stored]:
    """Checkpoint tensors by the names of `Parts`; a tied lm_head reads the embedding."""
    from lvlm_edge.exporter import parts

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
    specs: tuple[GraphSpec, ...],
    forms: Mapping[str, tuple[GraphSpec, ...]],
    embedding: manifests.Embedding,
    provenance: manifests.Provenance,
    *,
    how: Preprocessing,
    text_config: TextConfig | None,
    ends: tuple[int, ...],
    files: dict[str, manifests.FileInfo],
) -> manifests.Manifest:
    d, v = plan.spec.decoder, plan.spec.vision
    class_token = v.kind == "clip"
    report = planning.report(plan)
    return manifests.Manifest(
        schema=manifests.SCHEMA,
        model=report["model"],
        method=plan.method,
        method_config=dataclasses.asdict(plan.config),
        dtype=plan.dtype,
        opset=lowerings.load(plan.lowering).OPSET,
        lowering=plan.lowering,
        counts=manifests.Counts(
            num_images=plan.num_images,
            crops=plan.crops,
            visual_tokens=plan.visual_tokens,
            separators=plan.separators,
            kept_tokens=plan.kept_tokens,
            text_tokens=plan.text_tokens,
            prompt_tokens=plan.prompt_tokens,
            new_tokens=plan.new_tokens,
        ),
        decode_offset=0,
        stages=tuple(report["stages"]),
        graphs=_graphs(specs),
        forms={name: _graphs(graphs) for name, graphs in forms.items()},
        cache=tuple(
            manifests.Cache(
                name=group.name,
                heads=len(group.kv_heads),
                head_dim=d.head_dim,
                capacity=plan.capacity(group),
                dropped=group.dropped,
            )
            for group in plan.all_groups()
        ),
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


def _graphs(specs: Iterable[GraphSpec]) -> tuple[manifests.Graph, ...]:
    return tuple(
        manifests.Graph(
            name=s.name, file=_file(s), role=s.role, inputs=s.inputs, outputs=s.outputs, names=dict(s.names)
        )
        for s in specs
    )


def _preprocessing(folder: Path, vision: spec.VisionSpec) -> Preprocessing:
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

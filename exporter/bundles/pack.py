"""Writes the bundle: graphs, one weights file, tokenizer files, manifest. Beside its place, then renamed."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter import planning
from lvlm_edge.exporter.bundles import atomic, plans
from lvlm_edge.exporter.checkpoints import adapter, checkpoint, generation, text
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError, Source
from lvlm_edge.exporter.planning import Capacity, Model, Plan, Settings, fold
from lvlm_edge.exporter.planning.report import model as dimensions
from lvlm_edge.runtime import bundle as manifests
from lvlm_edge.runtime.errors import LvlmEdgeError, UnsupportedError, UsageError
from lvlm_edge.runtime.pictures.layout import is_complete

if TYPE_CHECKING:
    from lvlm_edge.exporter.graphs.parts import Weight

WEIGHTS = "weights.bin"
HEAD, TABLE = "lm_head.weight", "embed.weight"  # no graph reads the token embedding
ROWS = 4096  # of a matrix, compared at a time
log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, out of how much
_VERSIONS = ("lvlm-edge", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "safetensors", "numpy")


def export(
    source: str | Path,
    output: str | Path,
    *,
    method: str = "none",
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
        method: token reduction.
        ort: with graphs for ONNX Runtime beside the portable ones, where it gains by them.
        force: replace an existing bundle.
        options: fields of `planning.Capacity` (`max_text_tokens=256`, `image_size=(1280, 720)`), of
            `planning.Settings` (`dtype="float16"`, `weights="int4"`), and the method's own settings
            (`prune_layer=2, keep_ratio=0.5`).

    Returns:
        The bundle's folder.

    Raises:
        UsageError: a setting is out of range or not known, or `output` exists.
        UnsupportedError: a model or method this version does not know.
        CheckpointError: files missing, damaged, or not fitting config.json.
        LvlmEdgeError: no room on the disk.
    """
    output = Path(output)
    _check_output(output, force)
    capacity, rest = fold(Capacity, options)
    settings, rest = fold(Settings, rest)
    if settings.adapter is not None:
        settings = replace(settings, adapter=str(Path(settings.adapter).resolve()))
    if settings.prompt_weights is not None and not ort:
        raise UsageError("export: prompt_weights is for ONNX Runtime's graphs; leave it out, or give ort=True")
    folder = checkpoint.resolve(source, revision)
    if folder.resolve().is_relative_to(output.resolve()):
        raise UsageError(f"{output}: holds the checkpoint itself; choose another --output")
    of = Checkpoint.open(folder)
    model = plans.model(of, capacity)
    _check_frames(folder, model)
    plans.make(model, capacity, settings, method=method, options=rest)  # its errors come before those of tensors
    provenance = manifests.Provenance(
        source=str(source),
        revision=revision or _snapshot(folder),
        config_sha256=manifests.sha256(folder / "config.json"),
        versions=_versions(),
    )
    with atomic.folder(output) as partial:
        model, found = sources(of, model, settings.adapter)
        formats = _formats(found, settings)
        plan = plans.make(model, capacity, settings, method=method, options=rest, formats=formats)
        _Writer(of, plan, partial, progress or (lambda *_: None)).write(found, provenance, ort=ort)
    return output


def _check_output(output: Path, force: bool) -> None:
    if output.exists():
        if not force:
            raise UsageError(f"{output}: exists; choose another --output, or replace it with --force")
        if not output.is_dir() or (any(output.iterdir()) and not _is_bundle(output)):
            raise UsageError(f"{output}: is not a bundle, so --force does not replace it; choose another --output")


def _check_frames(folder: Path, model: Model) -> None:
    """Raise CheckpointError where text stands around images whose tokens nobody knows."""
    if not all(map(is_complete, (run for picture in model.pictures for run in picture.runs))):
        raise CheckpointError(
            f"{folder}: has no tokenizer.json, which says what stands around an image's visual tokens; add the one "
            "that belongs to this checkpoint"
        )


def _is_bundle(folder: Path) -> bool:
    """Whether a folder was written by an export, of whatever version: others have a manifest.json too."""
    try:
        content = json.loads((folder / manifests.MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"schema", "graphs", "files"} <= set(content)


def sources(of: Checkpoint, model: Model, merge: str | None = None) -> tuple[Model, dict[str, Source]]:
    """The model as its tensors show it, and their sources by the names of `Parts`.

    A config that ties lm_head to the embedding holds for tensors that are equal, or where one of them is not stored.
    Of others transformers uses both, since 5.0.

    Args:
        merge: folder of an adapter to add to them.

    Raises:
        UnsupportedError: an adapter of integers, or one that is not plain.
    """
    found = dict(model.family.weights(of, model.spec, model.pictures))
    if merge is not None:
        if model.spec.prequantised is not None:
            raise UnsupportedError(f"{of.folder}: is quantised, so no adapter can be merged; give it in floats")
        found = adapter.merged(found, Path(merge), model.family.rename)
    if not model.spec.decoder.tied:
        return model, found
    head, table = found.get(HEAD), found.get(TABLE)
    if head is not None and table is not None and not _equal(head, table):
        log.warning(
            f"{of.folder}: tie_word_embeddings is true, but {head.key} and {table.key} hold other values; the stored "
            "head is used, as transformers does; set tie_word_embeddings to false"
        )
        decoder = replace(model.spec.decoder, tied=False)
        return model._replace(spec=replace(model.spec, decoder=decoder)), found
    if table is None and head is not None:
        found[TABLE] = head
    found.pop(HEAD, None)
    return model, found


def _equal(one: Source, other: Source) -> bool:
    """Whether two tensors hold the same values, in whatever precision."""
    if one.shape != other.shape:
        return False
    left, right = one.read(), other.read()
    pieces = (slice(start, start + ROWS) for start in range(0, one.shape[0], ROWS))
    return all(bool((left[rows].float() == right[rows].float()).all()) for rows in pieces)


def _formats(sources: Mapping[str, Source], settings: Settings) -> manifests.WeightFormats:
    from lvlm_edge.exporter.bundles import weights_file

    formats = weights_file.formats(sources, settings.requested)
    if settings.lowering == "legacy" and "int4" in (formats.decoder, formats.vision, formats.head):
        raise UnsupportedError(
            "weights: opset 18, of the legacy lowering, has no INT4; choose int8 or --lowering modern"
        )
    return formats


class _Writer:
    """Writes a plan's bundle into a folder."""

    def __init__(self, of: Checkpoint, plan: Plan, out: Path, progress: Progress) -> None:
        self.of, self.plan, self.out, self.progress = of, plan, out, progress

    def write(self, sources: Mapping[str, Source], provenance: manifests.Provenance, *, ort: bool) -> None:
        from lvlm_edge.exporter.bundles import graph_set, ratios, weights_file
        from lvlm_edge.exporter.graphs import parts

        plan, out, d = self.plan, self.out, self.plan.spec.decoder
        known = graph_set.weights(plan)
        matched = self._matched(sources, known)
        _check_room(out, planning.weights_bytes(plan))
        published = plan.family.chat_template(self.of)
        chosen = plan.settings.chat_template if plan.family.own_template else "published"
        image, video = plan.spec.image_token_id, plan.spec.video_token_id
        text_config = text.copy(self.of.folder, out, published, image, chosen, video_token_id=video)
        ends = text.eos_token_ids(self.of.folder)
        if text_config is None:
            log.warning(
                f"{self.of.folder}: has no tokenizer.json, tokenizer.model, or vocab.json with merges.txt; the bundle "
                "takes token ids alone (generate_tokens), and run needs one of them beside config.json"
            )
        else:
            ends += tuple(i for i in text.turn_end(out, published) if i not in ends)
        drawn, skipped = generation.read(self.of.folder), generation.not_applied(self.of.folder)
        if skipped:
            log.warning(f"{self.of.folder / generation.FILE}: {', '.join(skipped)} has no effect on a bundle's answers")
        traced = graph_set.trace_graphs(plan, self.progress, ort=ort)
        used, head_is_table = traced.used(known), d.tied and plan.formats.head == "as-is"
        order = [name for name in known if name.removesuffix(planning.PROMPT) in used]
        order += [] if head_is_table else [TABLE]
        table = {TABLE: parts.Weight((d.vocab, d.hidden), False)}
        placed = weights_file.place(order, known | table, matched, plan)
        places = {name: p.place for name, p in placed.items()}
        traced.write(out, WEIGHTS, places)
        ratios.record(out, plan, places)
        ropes = dict(zip(parts.ROPE, parts.rope_tables(d, plan.positions), strict=True))
        files = {WEIGHTS: weights_file.write(out / WEIGHTS, placed, ropes, self.progress)}
        for path in sorted(out.iterdir()):
            if path.name not in files:
                files[path.name] = manifests.FileInfo(path.stat().st_size, manifests.sha256(path))
        embedding = manifests.Embedding(
            file=WEIGHTS,
            offset=places[HEAD if head_is_table else TABLE].offset,
            vocab=d.vocab,
            hidden=d.hidden,
            dtype=plan.dtype,
            columns=head_is_table,
        )
        manifest = manifests.Manifest(
            schema=manifests.SCHEMA,
            model=dimensions(plan),
            method=plan.method.name,
            dtype=plan.dtype,
            opset=plan.lowering.opset,
            lowering=plan.lowering.name,
            **graph_set.described(plan, traced),
            axes=plan.axes,
            embedding=embedding,
            pictures=plan.pictures,
            image_rows=_image_rows(plan),
            fewer_pictures=plan.method.fewer_pictures,
            text=text_config,
            eos_token_ids=ends,
            generation=drawn,
            weights=WEIGHTS,
            formats=plan.formats,
            provenance=provenance,
            files=files,
        )
        manifests.save_manifest(out, manifest)  # the last of all files

    def _matched(self, sources: Mapping[str, Source], known: Mapping[str, Weight]) -> dict[str, Source]:
        """The sources of the known weights, each of the shape that the plan says."""
        from lvlm_edge.exporter.graphs import parts

        d = self.plan.spec.decoder
        once = {n: w for n, w in known.items() if n not in parts.ROPE and not n.endswith(planning.PROMPT)}
        wanted = {n: w.shape[::-1] if w.transposed else w.shape for n, w in once.items()}
        wanted[TABLE] = (d.vocab, d.hidden)
        if d.tied:
            del wanted[HEAD]
        found = checkpoint.match(sources, wanted, self.plan.family.unused, self.of.folder)
        if d.tied:
            found[HEAD] = found[TABLE]
        return found | {n: found[n.removesuffix(planning.PROMPT)] for n in known if n.endswith(planning.PROMPT)}


def _image_rows(plan: Plan) -> dict[str, str]:
    """By output of the image graphs, the prompt's tensor that takes its rows."""
    if plan.spec.reads_features:
        return {}
    return {"image_embeds": "inputs_embeds"} | {name: name for name in plan.injected}


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed * 1.02:
        raise LvlmEdgeError(
            f"{out.parent}: has {free / 1e6:,.0f} MB free, the bundle needs {needed * 1.02 / 1e6:,.0f} MB; "
            "free some space or choose another --output"
        )


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

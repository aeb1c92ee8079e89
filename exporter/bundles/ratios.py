"""Several keep ratios in one bundle: each a manifest of its own, whose graphs read the bundle's one file of weights.

What is needed to trace graphs once more, without the checkpoint, lies in the bundle as `export.json`: dimensions,
settings, and where each weight is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lvlm_edge.exporter import planning
from lvlm_edge.exporter.bundles import atomic
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.planning import Plan
from lvlm_edge.runtime import bundle as manifests
from lvlm_edge.runtime.errors import BundleError, UsageError

RECORD = "export.json"
SETTINGS = {"decoder": "weights", "vision": "vision_weights", "head": "head_weights"}  # what was asked of each part


def record(folder: Path, plan: Plan, places: Mapping[str, Any]) -> None:
    """Write what `add` needs into a bundle."""
    settings = {
        "num_images": plan.num_images,
        "max_text_tokens": plan.text_tokens,
        "max_new_tokens": plan.new_tokens,
        "dtype": plan.dtype,
        "lowering": plan.lowering,
        "share_weights": plan.share_weights,
        "max_graph_gb": plan.max_graph_bytes / 1e9,
        "grid": plan.grid,
        "block_size": plan.asked.block,
        **{name: getattr(plan.asked, part) for part, name in SETTINGS.items()},
    }
    content = {
        "spec": asdict(plan.spec),
        "settings": settings,
        "places": {name: asdict(place) for name, place in places.items()},
    }
    (folder / RECORD).write_text(json.dumps(content) + "\n", "utf-8")


def rounded(folder: Path) -> manifests.WeightFormats:
    """The formats that an export rounded a bundle's weights to; those of the checkpoint's own integers are `as-is`.

    Raises:
        BundleError: the bundle does not say.
    """
    try:
        asked = json.loads((folder / RECORD).read_text("utf-8"))["settings"]
        kinds = {part: str(asked[name]) for part, name in SETTINGS.items()}
        block = int(asked["block_size"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{folder / RECORD}: cannot be read ({error}); export the bundle again") from error
    kinds = {part: "as-is" if kind == planning.FLOAT else kind for part, kind in kinds.items()}
    return manifests.WeightFormats(**kinds, block=block)


def add(bundle: str | Path, keep_ratio: float, progress: Any = None) -> Path:
    """Add graphs for a keep ratio to a bundle; its weights and what it holds already stay as they are.

    Args:
        bundle: folder made by `export`, with a method that has a keep ratio.
        keep_ratio: kept over all visual tokens.

    Returns:
        The new manifest's file.

    Raises:
        BundleError: the bundle is damaged or altered.
        UsageError: its method keeps every token, the ratio is out of range, or the bundle holds it already, or another
            export is writing there.
        LvlmEdgeError: no room, or the bundle cannot be written.
    """
    opened = manifests.open_bundle(bundle)
    manifest, folder = opened.manifest, opened.folder
    if "keep_ratio" not in manifest.method_config:
        raise UsageError(f"{folder}: its method, {manifest.method}, has no keep ratio; export with --method fastv")
    if keep_ratio in manifests.keep_ratios(folder):
        raise UsageError(f"{folder}: holds keep ratio {keep_ratio:g} already; run it with --keep-ratio {keep_ratio:g}")
    plan, places = _plan(folder, manifest, keep_ratio)
    with atomic.inside(folder) as partial:
        made = _draw(partial, manifest, plan, places, progress or (lambda *_: None))
        return _place(folder, partial, manifest, made, keep_ratio)


def _plan(folder: Path, manifest: manifests.Manifest, keep_ratio: float) -> tuple[Plan, dict[str, Any]]:
    """The bundle's own plan with another keep ratio, and where its weights are."""
    from lvlm_edge.exporter.checkpoints.quantise import Format
    from lvlm_edge.exporter.graphs.graph import Place

    try:
        content = json.loads((folder / RECORD).read_text("utf-8"))
        spec = manifests.parse(ModelSpec, content["spec"], "spec")
        settings = content["settings"]
        places = {
            name: Place(p["offset"], p["how"] and Format(**p["how"]), p["scales"], p["shifts"])
            for name, p in content["places"].items()
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{folder / RECORD}: cannot be read ({error}); export the bundle again") from error
    grid = settings.pop("grid")
    plan = planning.make(
        spec,
        method_name=manifest.method,
        options=manifest.method_config | {"keep_ratio": keep_ratio},
        grid=grid and tuple(grid),
        **settings,
    )
    return replace(plan, formats=manifest.formats), places


def _draw(
    folder: Path, manifest: manifests.Manifest, plan: Plan, places: Mapping[str, Any], progress: Any
) -> manifests.Manifest:
    """Trace the graphs of a ratio into a folder; its manifest, which lists them and what is the bundle's anyway."""
    from lvlm_edge.exporter.bundles.graph_set import described, draw

    drawn = draw(plan, progress, ort="ort" in manifest.forms)
    names = drawn.write(folder, manifest.weights, places)
    graphs = {graph.file for form in (manifest.graphs, *manifest.forms.values()) for graph in form}
    files = {name: info for name, info in manifest.files.items() if name not in graphs}
    for name in names:
        files[name] = manifests.FileInfo((folder / name).stat().st_size, manifests.sha256(folder / name))
    return replace(manifest, **described(plan, drawn), files=files)


def _place(
    folder: Path, partial: Path, manifest: manifests.Manifest, made: manifests.Manifest, keep_ratio: float
) -> Path:
    """Move new graphs into the bundle, then their manifest: a kill leaves the bundle as it was, or with all of it."""
    renamed = {}
    for name in [path.name for path in partial.iterdir()]:
        if made.files[name] != manifest.files.get(name):
            stem, _, end = name.rpartition(".")
            renamed[name] = f"{stem}.keep-{keep_ratio:g}.{end}"
            shutil.move(partial / name, folder / renamed[name])
    entry = _renamed(made, renamed)
    manifests.save_manifest(partial, entry)
    target = folder / manifests.manifest_name(keep_ratio)
    os.replace(partial / manifests.MANIFEST, target)
    return target


def _renamed(manifest: manifests.Manifest, names: Mapping[str, str]) -> manifests.Manifest:
    """A manifest whose files have other names."""

    def graphs(found: tuple[manifests.Graph, ...]) -> tuple[manifests.Graph, ...]:
        return tuple(replace(graph, file=names.get(graph.file, graph.file)) for graph in found)

    return replace(
        manifest,
        graphs=graphs(manifest.graphs),
        forms={name: graphs(form) for name, form in manifest.forms.items()},
        files={names.get(name, name): info for name, info in manifest.files.items()},
    )

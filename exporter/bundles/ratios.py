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

from lvlm_edge.exporter import families, planning
from lvlm_edge.exporter.bundles import atomic, plans
from lvlm_edge.exporter.checkpoints.quantise import Format
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.planning import Capacity, Model, Plan, Settings
from lvlm_edge.runtime import bundle as manifests
from lvlm_edge.runtime.errors import BundleError, UsageError
from lvlm_edge.runtime.pictures.layout import Picture

RECORD = "export.json"


def record(folder: Path, plan: Plan, places: Mapping[str, Any]) -> None:
    """Write what `add` needs into a bundle."""
    content = {
        "spec": asdict(plan.spec),
        "pictures": [asdict(picture) for picture in plan.pictures],
        "capacity": asdict(plan.capacity),
        "settings": asdict(plan.settings),
        "places": {name: asdict(place) for name, place in places.items()},
    }
    (folder / RECORD).write_text(json.dumps(content) + "\n", "utf-8")


def _read(folder: Path) -> dict[str, Any]:
    """Content of the record.

    Raises:
        BundleError: the bundle has none.
    """
    try:
        content = json.loads((folder / RECORD).read_text("utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"holds {type(content).__name__}")
        return content
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> BundleError:
    return BundleError(f"{folder / RECORD}: cannot be read ({error}); export the bundle again")


def capacity(folder: Path) -> Capacity:
    """What a bundle was planned for.

    Raises:
        BundleError: the bundle does not say.
    """
    try:
        found = manifests.parse(Capacity, _read(folder)["capacity"], "capacity")
    except (ValueError, TypeError, KeyError) as error:
        raise _unreadable(folder, error) from error
    assert isinstance(found, Capacity)
    return found


def settings(folder: Path) -> Settings:
    """What else a bundle's export was asked for.

    Raises:
        BundleError: the bundle does not say.
    """
    try:
        found = manifests.parse(Settings, _read(folder)["settings"], "settings")
    except (ValueError, TypeError, KeyError) as error:
        raise _unreadable(folder, error) from error
    assert isinstance(found, Settings)
    return found


def rounded(folder: Path) -> manifests.WeightFormats:
    """The formats that an export rounded a bundle's weights to; those of the checkpoint's own integers are `as-is`.

    Raises:
        BundleError: the bundle does not say.
    """
    found = settings(folder).requested
    kinds = {part: getattr(found, part) for part in ("decoder", "vision", "head")}
    kinds = {part: "as-is" if kind == planning.FLOAT else kind for part, kind in kinds.items()}
    return manifests.WeightFormats(**kinds, block=found.block, prompt=found.prompt)


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
        ratio = manifests.ratio_text(keep_ratio)
        raise UsageError(f"{folder}: holds keep ratio {ratio} already; run it with --keep-ratio {ratio}")
    plan, places = _plan(folder, manifest, keep_ratio)
    with atomic.inside(folder) as partial:
        made = _trace(partial, manifest, plan, places, progress or (lambda *_: None))
        return _place(folder, partial, manifest, made, keep_ratio)


def _plan(folder: Path, manifest: manifests.Manifest, keep_ratio: float) -> tuple[Plan, dict[str, Any]]:
    """The bundle's own plan with another keep ratio, and where its weights are."""
    from lvlm_edge.exporter.graphs.graph import Place

    content = _read(folder)
    try:
        family = families.load(content["spec"]["family"])
        vision = manifests.parse(family.vision, content["spec"]["vision"], "vision")
        spec = replace(manifests.parse(ModelSpec, content["spec"] | {"vision": None}, "spec"), vision=vision)
        pictures = tuple(manifests.parse(Picture, one, "picture") for one in content["pictures"])
        places = {
            name: Place(p["offset"], p["how"] and Format(**p["how"]), p["scales"], p["shifts"])
            for name, p in content["places"].items()
        }
    except (ValueError, TypeError, KeyError) as error:
        raise _unreadable(folder, error) from error
    plan = plans.make(
        Model(family, spec, pictures),
        capacity(folder),
        settings(folder),
        method=manifest.method,
        options=manifest.method_config | {"keep_ratio": keep_ratio},
        formats=manifest.formats,
    )
    return plan, places


def _trace(
    folder: Path, manifest: manifests.Manifest, plan: Plan, places: Mapping[str, Any], progress: Any
) -> manifests.Manifest:
    """Trace the graphs of a ratio into a folder; its manifest, which lists them and what is the bundle's anyway."""
    from lvlm_edge.exporter.bundles.graph_set import described, trace_graphs

    traced = trace_graphs(plan, progress, ort="ort" in manifest.variants)
    names = traced.write(folder, manifest.weights, places)
    graphs = {graph.file for variant in (manifest.graphs, *manifest.variants.values()) for graph in variant}
    files = {name: info for name, info in manifest.files.items() if name not in graphs}
    for name in names:
        files[name] = manifests.FileInfo((folder / name).stat().st_size, manifests.sha256(folder / name))
    return replace(manifest, **described(plan, traced), files=files)


def _place(
    folder: Path, partial: Path, manifest: manifests.Manifest, made: manifests.Manifest, keep_ratio: float
) -> Path:
    """Move new graphs into the bundle, then their manifest: a kill leaves the bundle as it was, or with all of it."""
    renamed = {}
    for name in [path.name for path in partial.iterdir()]:
        if made.files[name] != manifest.files.get(name):
            stem, _, end = name.rpartition(".")
            renamed[name] = f"{stem}.keep-{manifests.ratio_text(keep_ratio)}.{end}"
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
        variants={name: graphs(variant) for name, variant in manifest.variants.items()},
        files={names.get(name, name): info for name, info in manifest.files.items()},
    )

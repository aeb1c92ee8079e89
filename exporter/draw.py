"""Every graph of a plan: traced, and written with its weights by reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lvlm_edge.exporter import graph, parts, planning, trace
from lvlm_edge.exporter.blocks import GraphSpec
from lvlm_edge.exporter.graph import Place
from lvlm_edge.exporter.parts import Parts, Weight
from lvlm_edge.exporter.planning import Plan
from lvlm_edge.runtime import bundle as manifests

ORT = ".onnxruntime"  # ends the names of graphs that are for ONNX Runtime alone
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, out of how much
Models = list[tuple[GraphSpec, ir.Model]]


@dataclass(frozen=True)
class Drawn:
    """The graphs of a plan.

    Attributes:
        specs: those for every backend.
        forms: by backend, those that it runs instead.
        models: of every file that they name.
    """

    specs: tuple[GraphSpec, ...]
    forms: dict[str, tuple[GraphSpec, ...]]
    models: Models
    opset: int

    def used(self, known: Mapping[str, Weight]) -> set[str]:
        """Names of the weights that the graphs read."""
        return {name for _, model in self.models for name in graph.weight_names(model, known)}

    def write(self, folder: Path, weights: str, places: Mapping[str, Place]) -> list[str]:
        """Write every graph into a folder; names of the files.

        Args:
            weights: file name of the weights beside them.
            places: of every weight in it.
        """
        for wanted, model in self.models:
            graph.save(graph.finish(model, wanted, self.opset, weights, places), folder / file_of(wanted))
        return [file_of(wanted) for wanted, _ in self.models]


def weights(plan: Plan) -> dict[str, Weight]:
    """The weights that graphs of a plan may read, by name."""
    return parts.weights(parts.fake(plan)[0])


def draw(plan: Plan, progress: Progress) -> Drawn:
    """Trace the graphs of a plan; their weights are still fake."""
    built, mode = parts.fake(plan)
    specs = planning.method(plan.method).graphs(plan)
    models = _traced(specs, built, plan, mode, progress)
    forms, more = _forms(plan, built, mode, progress)
    return Drawn(specs, forms, models + more, built.ops.OPSET)


def _traced(specs: Iterable[GraphSpec], built: Parts, plan: Plan, mode: Any, progress: Progress) -> Models:
    """Every graph that is a file of its own, with its model."""
    files = [wanted for wanted in specs if wanted.file is None]
    found = []
    for i, wanted in enumerate(files):
        progress(f"tracing {wanted.name}", i, len(files))
        found.append((wanted, trace.trace(wanted, built, plan, mode)))
    return found


def _forms(plan: Plan, built: Parts, mode: Any, progress: Progress) -> tuple[dict[str, tuple[GraphSpec, ...]], Models]:
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
    models = _traced(own, built, both, mode, progress)
    names = {wanted.name: f"{wanted.name}{ORT}" for wanted in own}
    named = tuple(replace(s, file=names.get(s.file or s.name, s.file)) for s in specs)
    return {"ort": named}, [(replace(s, file=names[s.name]), model) for s, model in models]


def file_of(wanted: GraphSpec) -> str:
    """A graph's file: its name's, unless it says another."""
    file = wanted.file or wanted.name
    return file if file.endswith(ORT) else f"{file}.onnx"


def described(plan: Plan, drawn: Drawn) -> dict[str, Any]:
    """What a manifest says of a plan and its graphs, by field: all that another keep ratio changes."""
    return {
        "method_config": asdict(plan.config),
        "counts": manifests.Counts(
            num_images=plan.num_images,
            crops=plan.crops,
            visual_tokens=plan.visual_tokens,
            separators=plan.separators,
            kept_tokens=plan.kept_tokens,
            text_tokens=plan.text_tokens,
            prompt_tokens=plan.prompt_tokens,
            new_tokens=plan.new_tokens,
        ),
        "stages": tuple(planning.report(plan)["stages"]),
        "graphs": _entries(drawn.specs),
        "forms": {name: _entries(graphs) for name, graphs in drawn.forms.items()},
        "cache": tuple(
            manifests.Cache(
                name=group.name,
                heads=len(group.kv_heads),
                head_dim=plan.spec.decoder.head_dim,
                capacity=plan.capacity(group),
                dropped=group.dropped,
            )
            for group in plan.all_groups()
        ),
    }


def _entries(specs: Iterable[GraphSpec]) -> tuple[manifests.Graph, ...]:
    """Graphs as the manifest lists them."""
    return tuple(
        manifests.Graph(
            name=s.name, file=file_of(s), role=s.role, inputs=s.inputs, outputs=s.outputs, names=dict(s.names)
        )
        for s in specs
    )

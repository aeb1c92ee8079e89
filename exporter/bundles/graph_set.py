"""Every graph of a plan: traced, and written with its weights by reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lvlm_edge.exporter.checkpoints import quantise
from lvlm_edge.exporter.graphs import graph, parts, trace
from lvlm_edge.exporter.graphs.graph import Place
from lvlm_edge.exporter.graphs.parts import Parts, Weight
from lvlm_edge.exporter.ort import form, fusions
from lvlm_edge.exporter.planning import PROMPT, GraphSpec, Plan, part_of
from lvlm_edge.exporter.planning.report import stages
from lvlm_edge.runtime import bundle as manifests

ORT = ".onnxruntime"  # ends the names of graphs that are for ONNX Runtime alone
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, out of how much
Models = list[tuple[GraphSpec, ir.Model]]


@dataclass(frozen=True)
class GraphSet:
    """The graphs of a plan.

    Attributes:
        specs: those for every backend.
        variants: by backend, those that it runs instead.
        models: of every file that they name.
        by_row: files of ONNX Runtime's that compute one row of a decoder of integers at a time.
    """

    specs: tuple[GraphSpec, ...]
    variants: dict[str, tuple[GraphSpec, ...]]
    models: Models
    opset: int
    by_row: frozenset[str] = frozenset()

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
        files = [file_of(wanted) for wanted, _ in self.models]
        for file in sorted({file_of(s) for s in self.variants.get("ort", ())}):
            if file.endswith(ORT):
                portable = f"{file.removesuffix(ORT)}.onnx"
                source = folder / (file if file in files else portable)
                by_row = file in self.by_row
                change = None if by_row else partial(graph.for_prompts, location=weights, places=places)
                form.convert(source, folder / file, by_row=by_row, change=change)
        return sorted({*files, *(file_of(s) for s in self.variants.get("ort", ()))})


def weights(plan: Plan) -> dict[str, Weight]:
    """The weights that graphs of a plan may read, by name."""
    known = parts.weights(parts.fake(plan)[0])
    return known | {f"{name}{PROMPT}": weight for name, weight in known.items() if _twice(plan, name, weight)}


def _twice(plan: Plan, name: str, weight: Weight) -> bool:
    """Whether graphs of prompts read a matrix in a format of their own."""
    if plan.formats.prompt is None or not weight.transposed or part_of(name) != "decoder":
        return False
    how = quantise.fitting(plan.format_of(name), weight.shape[0], plan.formats.block)
    return how is not None and how.bits == 4


def trace_graphs(plan: Plan, progress: Progress, *, ort: bool) -> GraphSet:
    """Trace the graphs of a plan; their weights are still fake.

    Args:
        ort: with graphs for ONNX Runtime beside the portable ones, where it gains by them.
    """
    built, mode = parts.fake(plan)
    specs = graphs_of(plan)
    models = _traced(specs, built, plan, mode, progress)
    variants, more = _variants(plan, built, mode, specs, models, progress) if ort else ({}, [])
    by_row = frozenset(file_of(s) for s in variants.get("ort", ()) if s.role == "decode" and _decodes_by_row(plan))
    return GraphSet(specs, variants, models + more, plan.lowering.opset, by_row)


def graphs_of(plan: Plan) -> tuple[GraphSpec, ...]:
    """The graphs of a plan in the order in which they run: the family's of images, then the method's."""
    return *plan.family.graphs(plan), *plan.method.graphs(plan)


def _traced(specs: Iterable[GraphSpec], built: Parts, plan: Plan, mode: Any, progress: Progress) -> Models:
    """Every graph that is a file of its own, with its model."""
    files = [wanted for wanted in specs if wanted.file is None]
    found = []
    for i, wanted in enumerate(files):
        progress(f"tracing {wanted.name}", i, len(files))
        found.append((wanted, trace.trace(wanted, built, plan, mode)))
    return found


def _variants(
    plan: Plan, built: Parts, mode: Any, specs: tuple[GraphSpec, ...], models: Models, progress: Progress
) -> tuple[dict[str, tuple[GraphSpec, ...]], Models]:
    """Graphs for ONNX Runtime where it gains by them.

    Its sessions share no weights, but one session may run both the prompt and decode, if it leaves the number of rows
    open. Floats do so always. Integers do with `share_weights` alone: many rows and one row have kernels of their own,
    and a session packs weights for one of them. Graphs that read caches and encoders have fused operators for their
    attention (`ort`).

    Returns:
        the graphs by backend, and the models of those that have to be traced for it.
    """
    if plan.dtype == "bfloat16":
        return {}, []
    more: Models = []
    shares = plan.method.shares_weights and plan.lowering.shares_weights
    if shares and not plan.share_weights:
        both = replace(plan, settings=replace(plan.settings, share_weights=True))
        decode = [wanted for wanted in specs if wanted.role == "decode" and _decodes_by_row(plan)]
        specs = graphs_of(both)
        own = [wanted for wanted in specs if wanted.dynamic_rows is not None and wanted.file is None]
        specs = (*(wanted for wanted in specs if not decode or wanted.role != "decode"), *decode)
        more = [(replace(s, file=s.name + ORT), model) for s, model in _traced(own, built, both, mode, progress)]
    known = parts.weights(built)
    names = {
        s.name
        for s, model in (*models, *more)
        if s.file is not None or _reads_caches(plan, s) or _has_integers(plan, model, known) or _encodes(plan, model)
    }
    named = tuple(replace(s, file=(s.file or s.name) + ORT) if (s.file or s.name) in names else s for s in specs)
    return ({"ort": named} if names else {}), more


def _decodes_by_row(plan: Plan) -> bool:
    """Whether ONNX Runtime decodes in graphs of their own, whose products are left to its kernel for one row.

    The kernel for one row reads float32 alone, and the sessions of opset 18 are for versions that have none.
    """
    integers = plan.formats.decoder != "as-is"
    return integers and plan.dtype == "float32" and plan.lowering.shares_weights and not plan.share_weights


def _reads_caches(plan: Plan, wanted: GraphSpec) -> bool:
    """Whether a graph attends to what its caches hold, in operators that others can be put for."""
    return plan.lowering.shares_weights and (wanted.role == "decode" or wanted.dynamic_rows is not None)


def _encodes(plan: Plan, model: ir.Model) -> bool:
    """Whether a graph has an encoder's attention, in an operator that another can be put for."""
    return plan.lowering.shares_weights and any(map(fusions.encodes, model.graph))


def _has_integers(plan: Plan, model: ir.Model, known: Mapping[str, Weight]) -> bool:
    """Whether a graph reads weights that are kept as integers."""
    read = graph.weight_names(model, known)
    return any(known[name].transposed and plan.format_of(name) != "as-is" for name in read)


def file_of(wanted: GraphSpec) -> str:
    """A graph's file: its name's, unless it says another."""
    file = wanted.file or wanted.name
    return file if file.endswith(ORT) else f"{file}.onnx"


def described(plan: Plan, found: GraphSet) -> dict[str, Any]:
    """What a manifest says of a plan and its graphs, by field: all that another keep ratio changes."""
    variants = {name: _entries(graphs) for name, graphs in found.variants.items()}
    return {**planned(plan), "graphs": _entries(found.specs), "variants": variants}


def planned(plan: Plan) -> dict[str, Any]:
    """What a manifest says of a plan alone, by field."""
    return {
        "method_config": asdict(plan.config),
        "counts": manifests.Counts(
            num_images=sum(picture.kind == "image" for picture in plan.pictures),
            num_videos=sum(picture.kind == "video" for picture in plan.pictures),
            visual_tokens=plan.visual_tokens,
            kept_tokens=plan.kept_tokens,
            text_tokens=plan.text_tokens,
            prompt_tokens=plan.prompt_tokens,
            new_tokens=plan.new_tokens,
        ),
        "stages": tuple(stages(plan)),
        "cache": tuple(
            manifests.Cache(
                name=group.name,
                heads=len(group.kv_heads),
                head_dim=plan.spec.decoder.head_dim,
                capacity=plan.capacity_of(group),
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

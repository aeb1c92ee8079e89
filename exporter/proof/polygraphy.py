"""A bundle's graphs, inputs and outputs in polygraphy's formats, to compare another runtime's outputs on a device with.

The outputs are those of ONNX Runtime in floats on graphs that `check` has just compared with PyTorch. Polygraphy itself
is not needed to write them. Source of the formats: `polygraphy.json` of polygraphy 0.53.6.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_edge.exporter.bundles import atomic
from lvlm_edge.exporter.proof.cases import Case
from lvlm_edge.exporter.proof.judge import ROUNDED, TOLERANCE, Array
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle import Graph
from lvlm_edge.runtime.errors import UsageError

INPUTS, OUTPUTS, COMMANDS = ".inputs.json", ".outputs.json", "commands.txt"
RUNNER = "lvlm-edge check"


def save(pipe: Pipeline, case: Case, target: Path) -> Path:
    """Write `GRAPH.inputs.json` and `GRAPH.outputs.json` of every portable graph, and the commands that compare.

    Args:
        pipe: the bundle's portable graphs on ONNX Runtime, in floats.
        case: the prompt that they run.
        target: a folder, which must not exist.
    """
    manifest = pipe.manifest
    with atomic.folder(target) as partial:
        commands = []
        for graph, inputs in _inputs(pipe, case):
            outputs = _named(graph, pipe.run_graph(graph.name, inputs))
            _write(partial / f"{graph.name}{INPUTS}", [_named(graph, inputs)])
            _write(partial / f"{graph.name}{OUTPUTS}", _results(outputs))
            bound = ROUNDED if manifest.formats.quantized else TOLERANCE[manifest.dtype]
            commands.append(command(pipe.bundle.path(graph.file), target, graph.name, outputs, bound))
        (partial / COMMANDS).write_text("\n".join(commands) + "\n", "utf-8")
    return target


def check_target(target: Path, backend: str) -> None:
    """Raise UsageError for a folder that exists, and for a backend whose outputs are no reference."""
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target}: exists; give another folder for polygraphy's files")
    if backend != "ort":
        raise UsageError(f"check: --save-polygraphy has the outputs of ort, not of {backend}; leave --backend out")


def command(graph: Path, folder: Path, name: str, outputs: Mapping[str, Array], bound: float) -> str:
    """The command that compares a graph; with `--trt --strongly-typed` instead of `--onnxrt` on TensorRT.

    Args:
        bound: of the error of a value over the largest of its tensor; integers must be equal.
    """
    files = f"--load-inputs {folder / (name + INPUTS)} --load-outputs {folder / (name + OUTPUTS)}"
    most = {output: np.abs(values).max() * (values.dtype.kind == "f") for output, values in outputs.items()}
    bounds = " ".join(f"{output}:{bound * float(size):.3g}" for output, size in most.items())
    return f"polygraphy run {graph} --onnxrt {files} --rtol 0 --atol {bounds}"


def _inputs(pipe: Pipeline, case: Case) -> list[tuple[Graph, dict[str, Array]]]:
    """What every graph read when it last ran: for the prompt, and for decode after its first token."""
    found = []
    pipe.forget_images()
    for steps, roles in ((1, ("image", "prefill")), (2, ("decode",))):
        pipe.generate_tokens(case.prompt, case.pixels, max_new_tokens=steps, ignore_eos=True)
        for graph in (graph for graph in pipe.manifest.graphs if graph.role in roles):
            found.append((graph, {t.name: pipe.buffer(graph.name, t.name).read().copy() for t in graph.inputs}))
    return found


def _named(graph: Graph, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Tensors by the names that the graph's file has for them."""
    return {graph.names.get(name, name): values for name, values in tensors.items()}


def _results(outputs: Mapping[str, Array]) -> dict[str, Any]:
    values = {name: {"values": value, "polygraphy_class": "LazyArray"} for name, value in outputs.items()}
    result = {"outputs": values, "runtime": 0.0, "runner_name": RUNNER, "polygraphy_class": "IterationResult"}
    return {"lst": [[RUNNER, [result]]], "polygraphy_class": "RunResults"}


def _write(path: Path, content: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, default=_array)


def _array(values: Any) -> dict[str, str]:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(values), allow_pickle=False)
    return {"array": base64.b64encode(file.getvalue()).decode(), "polygraphy_class": "ndarray"}

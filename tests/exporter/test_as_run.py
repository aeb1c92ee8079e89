"""`check` judges the graphs that run: tampered with behind right hashes, it fails and says where."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime.bundle import open_bundle
from tests.cases import some
from tests.tiny import sign

pytestmark = pytest.mark.export

FASTV = {"method": "fastv", "prune_layer": 2, "keep_ratio": 0.5}
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "int8": {"weights": "int8", "vision_weights": "int8"},
    "int4": {"weights": "int4", "block_size": 32},
    "int4, prompts int8": {"weights": "int4", "block_size": 32, "prompt_weights": "int8"},
}
STAGES = ("vision", "projector", "scores", "kept set", "prefill logits", "decode logits", "tokens")
Change = Callable[[onnx.GraphProto, str], list[onnx.NodeProto]]


def times(factor: float) -> Change:
    """Nodes that give an output its values times a factor; they read `OUTPUT.right`."""

    def change(graph: onnx.GraphProto, output: str) -> list[onnx.NodeProto]:
        kind = next(o.type.tensor_type.elem_type for o in graph.output if o.name == output)
        dtype = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}[kind]
        graph.initializer.append(numpy_helper.from_array(np.array(factor, dtype), f"{output}.factor"))
        return [helper.make_node("Mul", [f"{output}.right", f"{output}.factor"], [output])]

    return change


TAMPERED: dict[str, tuple[str, float, str]] = {  # the output, what it is multiplied by, and the stage that says so
    "scores negated": ("score", -1.0, "as run: scores"),
    "logits negated": ("logits", -1.0, "as run: prefill logits"),
    "hidden states negated": ("hidden", -1.0, "as run: prefill logits"),
    "image features gone": ("image_embeds", 0.0, "as run: projector"),
    "features negated": ("image_features", -1.0, "as run: vision"),
}


def tamper(bundle: Path, output: str, factor: float) -> None:
    """Change an output in every graph that ONNX Runtime runs, and the hashes with it."""
    manifest = open_bundle(bundle).manifest
    names = {graph.file for graph in manifest.variants["ort"]} - {graph.file for graph in manifest.graphs}
    own = {g.names.get(output, output) for g in manifest.variants["ort"]}
    changed = 0
    for name in sorted(names):
        model = onnx.load(bundle / name, load_external_data=False)
        for found in [o.name for o in model.graph.output if o.name in own or o.name == output]:
            for node in model.graph.node:
                for i, made in enumerate(node.output):
                    if made == found:
                        node.output[i] = f"{found}.right"
                for i, read in enumerate(node.input):
                    if read == found:
                        node.input[i] = f"{found}.right"
            model.graph.node.extend(times(factor)(model.graph, found))
            changed += 1
        (bundle / name).write_bytes(model.SerializeToString())
    sign(bundle)
    assert changed, f"no graph that runs has {output}"


# Float16 has no other encoder for ONNX Runtime.
CASES = [(name, what) for name in FORMATS for what in TAMPERED if name != "float16" or "features" not in what]
OFTEN = {case for case in CASES if case[0] in ("float32", "int8")}


@pytest.mark.parametrize(("name", "what"), some(CASES, OFTEN))
def test_check_finds_graphs_that_run_and_are_wrong(gqa, export_once, tmp_path, name, what):
    output, factor, stage = TAMPERED[what]
    bundle = Path(shutil.copytree(export_once(gqa, **FASTV, **FORMATS[name]), tmp_path / "bundle"))
    tamper(bundle, output, factor)

    verdict = parity.check(bundle, gqa, steps=4, store=False)

    assert verdict.first_failure is not None and verdict.first_failure.stage == stage
    assert all(row.stage.startswith("as run") for row in verdict.rows if not row.passed)


def steps_of_64(graph: onnx.GraphProto) -> None:
    """Half the steps: activations rounded to 7 bits."""
    for tensor in graph.initializer:
        if tensor.name.endswith(".step"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2, tensor.name))


def one_scale_for_all(graph: onnx.GraphProto) -> None:
    """The scale of all rows is that of the largest."""
    graph.initializer.append(numpy_helper.from_array(np.array([-2, -1]), "both"))
    for node in graph.node:
        if node.op_type == "ReduceMax":
            node.input[1] = "both"


@pytest.mark.parametrize("wrong", [steps_of_64, one_scale_for_all])
def test_check_finds_graphs_that_round_in_another_way(gqa, export_once, tmp_path, wrong):
    bundle = Path(shutil.copytree(export_once(gqa, **FASTV, **FORMATS["int8"]), tmp_path / "bundle"))
    for path in bundle.glob("*.onnxruntime"):
        model = onnx.load(path, load_external_data=False)
        wrong(model.graph)
        path.write_bytes(model.SerializeToString())
    sign(bundle)

    verdict = parity.check(bundle, gqa, steps=2, store=False)

    assert "as run, unrounded: rounding" in {row.stage for row in verdict.rows if not row.passed}


@pytest.mark.parametrize("name", some([(name,) for name in FORMATS], {("float32",), ("int4, prompts int8",)}))
def test_graphs_that_run_are_judged_in_every_format(gqa, export_once, name):
    bundle = export_once(gqa, **FASTV, **FORMATS[name])

    for seed in range(3):
        verdict = parity.check(bundle, gqa, steps=4, seed=seed, store=False)

        assert verdict.passed, verdict.first_failure
        found = {row.stage for row in verdict.rows if row.stage.startswith("as run")}
        kinds = ["as run"] if name.startswith("float") else ["as run", "as run, unrounded"]
        assert found - {"as run, unrounded: rounding"} == {f"{k}: {s}" for k in kinds for s in STAGES}
        assert ("as run, unrounded: rounding" in found) == (len(kinds) == 2)
        assert len([row for row in verdict.rows if row.stage == "loss"]) == 3 * (len(kinds) == 2)
        assert all(row.bound is not None for row in verdict.rows if row.stage != "loss")

"""Bundles altered behind right hashes: `check` fails on every one and names a stage.

Seeded alterations of each method's bundle in each format: of single weights, scales, embedding rows and rotary rows, of
the outputs of graphs that run and of those that do not, of late steps alone, and of what the host does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime.bundle import open_bundle
from tests import tiny
from tests.cases import some
from tests.exporter.test_host import TAMPERED as OF_HOST
from tests.tiny import read_json, sign, write_json

pytestmark = pytest.mark.export

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "fastv": {"prune_layer": 1},
    "proxyv": {},
    "yopo": {},
    "himix": {},
}
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "int8": {"weights": "int8", "vision_weights": "int8"},
    "int4": {"weights": "int4", "block_size": 32},
}
CAPACITY = {"max_text_tokens": 16, "max_new_tokens": 6}
EACH = 60
Change = Callable[[Path], None]
DTYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.INT8: np.int8}
ROPE = ("rope_cos", "rope_sin")


def weights(bundle: Path) -> Iterator[tuple[str, int, int, int]]:
    """Name, element type, offset and bytes of every tensor in the file of weights, in the order of their names."""
    found = {}
    for path in sorted(bundle.glob("*.onnx")):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                found[tensor.name] = (tensor.data_type, int(place["offset"]), int(place["length"]))
    return ((name, *found[name]) for name in sorted(found))


def element(offset: int, length: int, kind: int, at: float) -> Change:
    """One element, at a share of the way through a tensor: far off, or for integers one step."""

    def change(bundle: Path) -> None:
        if kind in (TensorProto.INT4, TensorProto.INT8):
            values = np.memmap(bundle / "weights.bin", np.uint8, "r+", offset, (length,))
            values[int(at * (length - 1))] ^= 0x10 if kind == TensorProto.INT4 else 0x01
        else:
            width = np.dtype(DTYPES[kind]).itemsize
            values = np.memmap(bundle / "weights.bin", DTYPES[kind], "r+", offset, (length // width,))
            values[int(at * (len(values) - 1))] += np.abs(values).max() / 4 + 0.01
        values.flush()

    return change


def output(file: str, name: str, factor: float, after: int | None) -> Change:
    """An output of a graph times a factor; `after`: only where so many rows are cached."""

    def change(bundle: Path) -> None:
        model = onnx.load(bundle / file, load_external_data=False)
        graph = model.graph
        made = next(o for o in graph.output if o.name == name)
        for node in graph.node:
            for list_ in (node.input, node.output):
                list_[:] = [f"{name}.right" if n == name else n for n in list_]
        dtype = DTYPES[made.type.tensor_type.elem_type]
        graph.initializer.append(numpy_helper.from_array(np.array(factor, dtype), "t.factor"))
        graph.initializer.append(numpy_helper.from_array(np.array(1, dtype), "t.one"))
        times = "t.factor"
        if after is not None:
            graph.initializer.append(numpy_helper.from_array(np.array([after]), "t.after"))
            graph.node.append(helper.make_node("GreaterOrEqual", ["cache_length", "t.after"], ["t.late"]))
            graph.node.append(helper.make_node("Where", ["t.late", "t.factor", "t.one"], ["t.chosen"]))
            times = "t.chosen"
        graph.node.append(helper.make_node("Mul", [f"{name}.right", times], [name]))
        (bundle / file).write_bytes(model.SerializeToString())

    return change


def of_host(change: Any) -> Change:
    def apply(bundle: Path) -> None:
        manifest = read_json(bundle / "manifest.json")
        change(bundle, manifest)
        write_json(bundle / "manifest.json", manifest)

    return apply


def alterations(bundle: Path, rng: np.random.Generator) -> dict[str, Change]:
    """At least `EACH` alterations of a bundle, by name."""
    found: dict[str, Change] = {}
    manifest = open_bundle(bundle).manifest
    if manifest.text is not None:
        found |= {what: of_host(change) for what, (_, change) in OF_HOST.items() if applies(what, manifest)}
    for variant in (manifest.graphs, *manifest.variants.values()):
        for graph in variant:
            floats = [t for t in graph.outputs if t.dtype in ("float32", "float16")]
            for info in [t for t in floats if "key_values" not in t.name] or floats[:1]:
                name = graph.names.get(info.name, info.name)
                found[f"{graph.file}: {info.name} negated"] = output(graph.file, name, -1.0, None)
                if graph.role == "decode" and info.name == "logits":
                    room = manifest.counts.prompt_tokens + manifest.counts.new_tokens - 2
                    late = room - (manifest.counts.visual_tokens - manifest.counts.kept_tokens) * manifest.selects
                    if graph.file.endswith(".onnx") and not manifest.selects:
                        found[f"{graph.file}: last step alone"] = output(graph.file, name, -1.0, late)
    every = list(weights(bundle))
    plain = [entry for entry in every if entry[0] not in ROPE]
    for name, kind, offset, length in every:
        if name in ROPE:
            for at in (0.1, 0.5, 0.97):
                found[f"{name} at {at}"] = element(offset, length, kind, at)
    table = manifest.embedding
    width = {"float32": 4, "float16": 2}[table.dtype]
    size = table.vocab * table.hidden * width
    kind = TensorProto.FLOAT if width == 4 else TensorProto.FLOAT16
    for at in rng.random(4):
        found[f"embedding at {at:.2f}"] = element(table.offset, size, kind, float(at))
    while len(found) < EACH:
        name, kind, offset, length = plain[int(rng.integers(len(plain)))]
        at = float(rng.random())
        found[f"{name} at {at:.3f}"] = element(offset, length, kind, at)
    return found


def applies(what: str, manifest: Any) -> bool:
    return manifest.method == "fastv" or ("kept" not in what and "keep" not in what)


def made(method: str, form: str, checkpoint_once: Any, original: Any, export_once: Any) -> tuple[Path, Path]:
    """A checkpoint for a method, and its bundle in a format."""
    checkpoint = (
        tiny.checkpoint(checkpoint_once) if method in ("none", "fastv") else original(method=method, kv_heads=2)
    )
    return checkpoint, export_once(checkpoint, method=method, **METHODS[method], **FORMATS[form], **CAPACITY)


CASES = [(method, form) for method in METHODS for form in FORMATS]
OFTEN = {("fastv", "int8")}


@pytest.mark.parametrize(("method", "form"), some(CASES, set()))
def test_check_finds_every_alteration(method, form, checkpoint_once, original, export_once, tmp_path):
    missed = survivors(*made(method, form, checkpoint_once, original, export_once), tmp_path, EACH)
    assert not missed


@pytest.mark.parametrize(("method", "form"), some(CASES, set()))
def test_a_clean_bundle_passes_with_every_seed(method, form, checkpoint_once, original, export_once):
    checkpoint, bundle = made(method, form, checkpoint_once, original, export_once)

    for seed in range(5):
        verdict = parity.check(bundle, checkpoint, seed=seed, store=False)
        assert verdict.passed, (seed, verdict.first_failure)


@pytest.mark.parametrize(("method", "form"), sorted(OFTEN))
def test_check_finds_some_alterations(method, form, checkpoint_once, original, export_once, tmp_path):
    missed = survivors(*made(method, form, checkpoint_once, original, export_once), tmp_path, 6)
    assert not missed


def survivors(checkpoint: Path, bundle: Path, folder: Path, count: int) -> list[str]:
    """Alterations that `check` passes, or whose failure names no stage."""
    rng = np.random.default_rng(len(bundle.name))
    assert parity.check(bundle, checkpoint, steps=2, store=False).passed
    found = alterations(bundle, rng)
    missed = []
    for name in [*found] if count >= EACH else rng.permutation(list(found))[:count].tolist():
        altered = Path(shutil.copytree(bundle, folder / "altered"))
        found[name](altered)
        sign(altered)
        verdict = parity.check(altered, checkpoint, steps=2, store=False)
        if verdict.passed or verdict.first_failure is None or not verdict.first_failure.stage:
            missed.append(name)
        shutil.rmtree(altered)
    return missed

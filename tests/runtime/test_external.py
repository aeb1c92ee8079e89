"""Graphs may read the bundle's weights and nothing else, and what was hashed is what is opened."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import Descriptor
from onnx import TensorProto, helper

from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle import external, files, open_bundle
from lvlm_edge.runtime.errors import BundleError
from tests import tiny


def outside(name: str, file: str) -> onnx.TensorProto:
    """A tensor whose data is in another file."""
    tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=file)
    tensor.external_data.add(key="offset", value="0")
    return tensor


def model() -> onnx.ModelProto:
    """A model with external data at every place where a tensor may be."""
    branch = helper.make_graph([], "branch", [], [], [outside("a", "branch.bin")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    node.attribute.append(helper.make_attribute("value", outside("b", "attribute.bin")))
    node.attribute.append(helper.make_attribute("several", [outside("d", "list.bin"), outside("e", "list2.bin")]))
    sparse = onnx.SparseTensorProto(values=outside("v", "sparse.bin"), indices=outside("i", "indices.bin"), dims=[1])
    node.attribute.append(helper.make_attribute("sparse", sparse))
    graph = helper.make_graph([node], "g", [], [], [outside("w", "weights.bin")])
    graph.sparse_initializer.append(sparse)
    made = helper.make_model(graph)
    function = helper.make_function("own", "f", [], [], [], [helper.make_opsetid("", 18)])
    function.node.add(op_type="Constant", output=["k"]).attribute.append(
        helper.make_attribute("value", outside("k", "function.bin"))
    )
    made.functions.append(function)
    made.training_info.add().algorithm.initializer.append(outside("t", "training.bin"))
    return made


def test_every_place_of_external_data_is_found():
    names = ("weights", "branch", "attribute", "list", "list2", "sparse", "indices", "function", "training")
    assert external.locations(model().SerializeToString()) == {f"{name}.bin" for name in names}


def test_every_way_to_a_tensor_in_the_format_is_walked():
    kinds = {
        "ModelProto": "model",
        "TrainingInfoProto": "training",
        "FunctionProto": "function",
        "GraphProto": "graph",
        "NodeProto": "node",
        "AttributeProto": "attribute",
        "SparseTensorProto": "sparse",
        "TensorProto": "tensor",
        "StringStringEntryProto": "entry",
    }

    def leads(kind: Descriptor, seen: frozenset[str] = frozenset()) -> bool:
        return kind.name == "TensorProto" or any(
            f.message_type and f.message_type.name not in seen and leads(f.message_type, seen | {kind.name})
            for f in kind.fields
        )

    for kind in [getattr(onnx, name).DESCRIPTOR for name in list(kinds)[:-2]]:
        wanted = {f.number: kinds[f.message_type.name] for f in kind.fields if f.message_type and leads(f.message_type)}
        assert external.INSIDE[kinds[kind.name]] == wanted, kind.name
    assert external.INSIDE["tensor"] == {onnx.TensorProto.DESCRIPTOR.fields_by_name["external_data"].number: "entry"}


def test_damaged_graphs_raise_one_kind_of_error():
    content, rng = model().SerializeToString(), np.random.default_rng(0)
    for _ in range(2000):
        at, noise = int(rng.integers(len(content))), rng.bytes(int(rng.integers(1, 6)))
        damaged = (noise * 9, content[:at] + noise + content[at + len(noise) :], content[:at])
        for one in damaged:
            with contextlib.suppress(ValueError):
                external.locations(one)


@pytest.fixture
def bundle(checkpoint_once, eager_once, tmp_path) -> Path:
    return Path(shutil.copytree(tiny.bundle(checkpoint_once, eager_once, "fastv"), tmp_path / "bundle"))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("file", ["other.bin", "../other.bin", "/etc/hostname"])
def test_a_graph_that_reads_another_file_is_refused(bundle, file, listed):
    graph = onnx.load(bundle / "decode.onnx", load_external_data=False)
    graph.graph.initializer[0].CopyFrom(outside(graph.graph.initializer[0].name, file))
    (bundle / "decode.onnx").write_bytes(graph.SerializeToString())
    np.zeros(1 << 20, np.uint8).tofile(bundle / "other.bin")
    if listed and file == "other.bin":
        manifest = tiny.read_json(bundle / "manifest.json")
        tiny.write_json(bundle / "manifest.json", manifest | {"files": manifest["files"] | {file: {}}})
    tiny.sign(bundle)

    for verify in (True, False):
        with pytest.raises(BundleError, match=r"decode\.onnx: reads weights from .*, expected weights\.bin alone"):
            Pipeline.load(bundle, verify=verify)


def test_a_file_exchanged_after_it_was_hashed_is_noticed(bundle, monkeypatch):
    right = files.sha256

    def slow(path):
        found = right(path)
        if path.name == "weights.bin":  # another of the same size and times takes its place
            copy = path.with_name("copy")
            shutil.copy2(path, copy)
            copy.replace(path)
        return found

    monkeypatch.setattr(files, "sha256", slow)

    with pytest.raises(BundleError, match=r"weights\.bin: changed while the bundle was being opened"):
        Pipeline.load(bundle)


def test_a_graph_exchanged_after_it_was_hashed_is_not_opened(bundle):
    opened = open_bundle(bundle)
    content = (bundle / "decode.onnx").read_bytes()
    (bundle / "decode.onnx").write_bytes(content.replace(b"lvlm-edge", b"lvlm-edgy", 1))

    with pytest.raises(BundleError, match=r"decode\.onnx: was altered"):
        opened.graph("decode.onnx")

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


# Weights and operators, as onnx reads them.


def saved(name: str, kind: int, dims: list[int], **entries: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_weights_are_those_that_onnx_reads():
    tensors = [
        saved("a", TensorProto.FLOAT, [3, 129], location="w", offset="70000", length="1548"),
        saved("b", TensorProto.INT8, [], location="w"),
        saved("é", TensorProto.INT4, [1 << 62, 1, 127, 128], location="w", length="0", checksum="x"),
        helper.make_tensor("inside", TensorProto.FLOAT, [1], [1.0]),
        saved("nowhere", TensorProto.FLOAT, [1], offset="1"),
    ]
    made = helper.make_model(helper.make_graph([], "g", [], [], tensors), producer_name="x" * 300)

    found = external.weights(made.SerializeToString())

    assert found == (
        external.Weight("a", TensorProto.FLOAT, (3, 129), 70000, 1548),
        external.Weight("b", TensorProto.INT8, (), 0, None),
        external.Weight("é", TensorProto.INT4, (1 << 62, 1, 127, 128), 0, 0),
    )


def test_weights_of_subgraphs_are_not_the_graphs():
    assert [weight.name for weight in external.weights(model().SerializeToString())] == ["w"]


def test_operators_are_named_with_their_domain_in_subgraphs_and_functions_too():
    made = model()
    made.graph.node.add(op_type="MatMulNBits", domain="com.microsoft")

    found = external.operators(made.SerializeToString())

    assert found == {("", "If"), ("", "Constant"), ("com.microsoft", "MatMulNBits")}


def varint(value: int) -> bytes:
    """A number as protocol buffers write it: 7 bits to a byte, the lowest first."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


ENTRY = message(13, message(1, b"location") + message(2, b"w"))
DIMS = [1, 127, 128, 300, (1 << 63) - 1]


@pytest.mark.parametrize(
    "dims",
    [message(1, b"".join(map(varint, DIMS))), b"".join(varint(1 << 3) + varint(n) for n in DIMS)],
    ids=["packed", "one by one"],
)
def test_fields_of_other_kinds_are_passed_over(dims):
    """Numbers of 4 and 8 bytes, and fields that no version of the format has yet."""
    fixed = varint(100 << 3 | 1) + bytes(8) + varint(101 << 3 | 5) + bytes(4) + varint(2000 << 3) + varint(5)
    tensor = fixed + dims + fixed + varint(2 << 3) + varint(10) + message(8, b"name") + ENTRY + fixed
    content = fixed + message(7, fixed + message(5, tensor) + fixed) + fixed

    assert external.weights(content) == (external.Weight("name", 10, tuple(DIMS), 0, None),)
    assert external.locations(content) == {"w"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80", "a number without end at byte 1"),
        (b"\xff" * 11, "a number without end at byte 10"),
        (varint(7 << 3 | 2) + b"\x80", "a number without end at byte 2"),
        (varint(7 << 3 | 3), "wire type 3 at byte 1"),
        (varint(7 << 3 | 6), "wire type 6 at byte 1"),
        (varint(7 << 3 | 2) + b"\x05abcd", "a field that ends at byte 7, after its message's end at 6"),
        (varint(9 << 3 | 1) + bytes(7), "a field that ends at byte 9, after its message's end at 8"),
        (varint(9 << 3 | 5) + bytes(3), "a field that ends at byte 5, after its message's end at 4"),
        (
            message(7, varint(1 << 3 | 2) + b"\x03ab") + varint(9 << 3) + b"\x01",
            "a field that ends at byte 7, after its message's end at 6",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_protocol_buffer_is_said_with_its_place(content, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        external.locations(content)


def test_a_number_has_ten_bytes_at_most():
    whole = varint(9 << 3) + b"\xff" * 9 + b"\x01"

    assert external.locations(whole) == set()
    assert (
        external.locations(varint(9 << 3 | 1) + bytes(8)) == external.locations(varint(9 << 3 | 5) + bytes(4)) == set()
    )

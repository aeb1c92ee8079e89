"""How `check` judges the file of weights: bounds, and which rows are named, on tensors written here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, Qwen2VLTextConfig

from lvlm_edge.exporter import references
from lvlm_edge.exporter.proof import tensors

DTYPES = ("float32", "float16", "bfloat16")


def stored(values: Any) -> Any:
    """A tensor of the file, as far as its values go."""
    return SimpleNamespace(numpy=lambda: np.asarray(values))


def plan(dtype: str = "float32", requested: str = "as-is", *, axes: int = 1, block: int = 4) -> Any:
    return SimpleNamespace(
        dtype=dtype,
        axes=axes,
        dtype_of=lambda name: dtype,
        requested_of=lambda name: requested,
        formats=SimpleNamespace(block=block),
    )


# Rows of a stage.


def test_a_row_says_how_many_entries_differ_and_where_the_first_is():
    row = tensors._row("weights", iter([("a", []), ("b", [3, 7]), ("c", [0])]))

    assert (row.case, row.stage, row.figure, row.bound, row.passed) == ("checkpoint", "weights", 3, 0, False)
    assert row.note == "first in b, row 3"
    clean = tensors._row("weights", iter([("a", []), ("b", [])]))
    assert (clean.figure, clean.passed, clean.note) == (0, True, "")


# Rotary tables. The bounds are the precision's: the last bits of float32, and one rounding of values up to 1.

TURNS = {"float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8}


def table(positions: int, size: int = 8) -> list[np.ndarray]:
    """Cosines and sines of base 10000, [positions, size / 2]."""
    angles = [[p * 10000 ** (-2 * i / size) for i in range(size // 2)] for p in range(positions)]
    return [np.cos(angles), np.sin(angles)]


@pytest.fixture
def rotary(monkeypatch) -> Any:
    """A reference of stock transformers' own rotary embedding, of one axis or of three."""
    monkeypatch.setattr(references, "view", lambda model: model)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64, "num_hidden_layers": 1}

    def make(axes: int) -> Any:
        sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        made = (
            LlamaRotaryEmbedding(LlamaConfig(**sizes))
            if axes == 1
            else Qwen2VLRotaryEmbedding(Qwen2VLTextConfig(**sizes, rope_parameters=sections))
        )
        return SimpleNamespace(decoder=SimpleNamespace(rotary_emb=made))

    return make


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(("share", "wrong"), [(0.0, []), (0.8, []), (1.2, [5])])
def test_a_position_turned_by_more_than_the_precision_is_found(part, dtype, axes, share, wrong, rotary):
    values = table(7)
    values[part][5, 2] += share * TURNS[dtype]
    named = dict(zip(("rope_cos", "rope_sin"), map(stored, values), strict=True))

    found = dict(tensors._wrong_turns(named, plan(dtype, axes=axes), rotary(axes)))

    assert found == {"rope_cos": [], "rope_sin": []} | {("rope_cos", "rope_sin")[part]: wrong}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_turn_at_the_bound_is_right_and_one_next_to_it_wrong(dtype, rotary):
    """The first position's sines are 0, so that a table's value is its own error."""
    at = np.float32(TURNS[dtype])
    if float(at) > TURNS[dtype]:
        at = np.nextafter(at, np.float32(0))
    for value, rows in ((at, []), (np.nextafter(at, np.float32(1)), [0])):
        values = table(3)[1].astype(np.float32)
        values[0, 1] = value
        assert list(tensors._wrong_turns({"rope_sin": stored(values)}, plan(dtype), rotary(1))) == [("rope_sin", rows)]


def test_tables_that_graphs_do_not_read_are_passed_over_and_misshapen_ones_named(rotary):
    narrow, wide = table(7)[1][:, :3], np.zeros((7, 9))

    assert list(tensors._wrong_turns({"rope_sin": stored(table(7)[1])}, plan(), rotary(1))) == [("rope_sin", [])]
    assert list(tensors._wrong_turns({"rope_sin": stored(narrow)}, plan(), rotary(1))) == [("rope_sin", [])]
    assert list(tensors._wrong_turns({"rope_cos": stored(wide)}, plan(), rotary(1))) == [("rope_cos", [0])]


# Embedding.


@pytest.mark.parametrize("row", [0, 3, 4, 9, None])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_of_the_embedding_are_named_wherever_they_are(dtype, row, monkeypatch):
    monkeypatch.setattr(references, "view", lambda model: model)
    monkeypatch.setattr(tensors, "EMBEDDED", 4)  # 10 rows in three goes
    right = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    own = right.to(getattr(torch, dtype)).numpy().copy()
    if row is not None:
        own[row, 1] = np.nextafter(own[row, 1], own.dtype.type(9))
    asked = []

    def embed(ids: Any) -> Any:
        asked.extend(ids.tolist())
        return own[ids]

    pipe: Any = SimpleNamespace(manifest=SimpleNamespace(embedding=SimpleNamespace(vocab=10, dtype=dtype)), embed=embed)
    model = SimpleNamespace(embed=lambda ids: right[list(ids)])

    found = [(name, rows) for name, rows in tensors._wrong_embeddings(pipe, model) if rows]

    assert found == ([] if row is None else [("the embedding", [row])])
    assert asked == list(range(10))


# Floats.

KNOWN: dict[str, Any] = {
    "matrix": SimpleNamespace(transposed=True),
    "norm": SimpleNamespace(transposed=False),
    "lm_head.weight": SimpleNamespace(transposed=True),
    "unread": SimpleNamespace(transposed=False),
    "rope_cos": SimpleNamespace(transposed=False),
}


def sources(**values: torch.Tensor) -> dict[str, Any]:
    found = {name.replace("__", "."): value for name, value in values.items()}
    return {name: SimpleNamespace(read=lambda value=value: value) for name, value in found.items()}


def wrong(named: Mapping[str, Any], of: Mapping[str, Any], plan: Any) -> dict[str, list[int]]:
    return dict(tensors._wrong_weights({name: stored(value) for name, value in named.items()}, KNOWN, of, plan))


def test_floats_are_the_checkpoints_own_rounded_to_the_bundles_precision():
    matrix, norm = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 2.0, 3.0])
    of = sources(matrix=matrix, norm=norm, embed__weight=matrix + 1)
    named = {"matrix": matrix.T.half().numpy(), "norm": norm.half().numpy(), "rope_cos": np.zeros((2, 2))}

    assert wrong(named, of, plan("float16")) == {"matrix": [], "norm": []}
    assert wrong(named, of, plan("float32")) == {"matrix": [0, 1, 2, 3, 4], "norm": []}  # not rounded in the plan
    spoilt = named["matrix"].copy()
    spoilt[2, 4] += 1
    spoilt[0, 1] += 1
    assert wrong(named | {"matrix": spoilt, "norm": named["norm"] * [1, 1, 2]}, of, plan("float16")) == {
        "matrix": [1, 4],
        "norm": [2],
    }
    assert wrong(named | {"matrix": named["matrix"][:2]}, of, plan("float16")) == {"matrix": [0], "norm": []}


def test_a_head_that_is_tied_is_the_embedding_and_one_that_is_not_is_its_own():
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    named = {"lm_head.weight": table.T.numpy()}

    assert wrong(named, sources(embed__weight=table), plan()) == {"lm_head.weight": []}
    own = sources(embed__weight=table, lm_head__weight=table * torch.tensor([[1], [1], [2], [1], [1]]))
    assert wrong(named, own, plan()) == {"lm_head.weight": [2]}


# Integers. Those of the checkpoint stand for its values, but for one rounding of scales and shifts.

KEPT = {"float32": 2**-20, "float16": 2**-8, "bfloat16": 2**-5}


@pytest.mark.parametrize("blocks", [None, 1, 2])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("share", "rows"), [(0.0, []), (0.9, []), (1.1, [2])])
def test_integers_of_a_checkpoint_stand_for_its_values(dtype, shifted, blocks, share, rows):
    rng = np.random.default_rng(0)
    integers = rng.integers(-8, 8, (8, 3))  # [in, out]
    count = blocks or 1
    scale = rng.integers(1, 9, (count, 3)) / 8.0  # of few bits, so that nothing is rounded here
    shift = rng.integers(-9, 9, (count, 3)) / 4.0
    values = np.stack([[float(integers[i, o]) * scale[i * count // 8, o] for i in range(8)] for o in range(3)])
    if shifted:  # of a block's input channels together
        values += np.stack([[shift[i * count // 8, o] / (8 // count) for i in range(8)] for o in range(3)])
    named: dict[str, Any] = {"matrix": integers.astype(np.int8), "matrix.scale": scale[0] if blocks is None else scale}
    if shifted:
        named["matrix.shift"] = shift[0] if blocks is None else shift
    smallest = np.abs(values[2]).argmin()
    values[2, smallest] += share * KEPT[dtype] * np.abs(values[2]).max()

    found = wrong(named, sources(matrix=torch.from_numpy(values).float()), plan(dtype))

    assert found == {"matrix": rows}


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_at_the_bound_are_right_and_next_to_it_wrong(dtype):
    named = {"matrix": np.array([[0], [8]], np.int8), "matrix.scale": np.ones(1)}
    at = np.float32(8 * KEPT[dtype])

    for value, rows in ((at, []), (np.nextafter(at, np.float32(9)), [0])):
        of = sources(matrix=torch.tensor([[float(value), 8.0]]))
        assert wrong(named, of, plan(dtype)) == {"matrix": rows}


def test_weights_that_integers_hold_exactly_are_held_exactly():
    named = {"matrix": np.array([[127, 0], [5, 0]], np.int8), "matrix.scale": np.ones(2)}
    of = sources(matrix=torch.tensor([[127.0, 5.0], [0.0, 0.0]]))

    assert wrong(named, of, plan(requested="int8")) == {"matrix": []}


def test_integers_of_another_shape_are_named():
    named = {"matrix": np.ones((8, 3), np.int8), "matrix.scale": np.ones(3)}

    assert wrong(named, sources(matrix=torch.ones(4, 8)), plan()) == {"matrix": [0]}


@pytest.mark.parametrize(("stretch", "rows"), [(0.0, []), (2.2e-5, []), (4.5e-5, [1])])
def test_integers_of_an_export_are_as_near_as_plain_rounding_is(stretch, rows):
    """By one part in 10^4 of the squared error: 0.16 of the second channel, and 127 times the stretch, squared."""
    values = np.array([[127.0, 0.0], [127.0, 0.4]], np.float32)  # [out, in]; plain rounding has the scale 1
    named = {"matrix": np.array([[127, 127], [0, 0]], np.int8), "matrix.scale": np.array([1, 1 + stretch], np.float32)}

    assert wrong(named, sources(matrix=torch.from_numpy(values)), plan(requested="int8")) == {"matrix": rows}


def test_every_block_is_as_near_as_plain_rounding_is():
    """A block that is nearer does not pay for another one that is further off."""
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    rounded = references.quantised.rounded(values, "int4", 32, torch.float32)
    scale = np.stack(
        [[np.unique(np.abs(np.diff(np.unique(b)))).min() for b in row.reshape(2, 32)] for row in rounded.numpy()]
    )
    integers = np.rint(rounded.numpy() / scale.repeat(32, 1))
    named = {"matrix": integers.T.astype(np.int8), "matrix.scale": scale.T.astype(np.float32)}
    of = sources(matrix=values)
    assert wrong(named, of, plan(requested="int4", block=32)) == {"matrix": []}

    for row, column in ((0, 40), (2, 3)):
        spoilt = named["matrix"].copy()
        spoilt[column, row] += 1 if spoilt[column, row] < 0 else -1
        assert wrong(named | {"matrix": spoilt}, of, plan(requested="int4", block=32)) == {"matrix": [row]}


# What graphs read.


def graph(path: Path, *weights: tuple[str, str, int, tuple[int, ...]]) -> None:
    """A graph with initializers in files beside it: name, file, offset and shape; and one of its own."""
    found = [helper.make_tensor("inside", TensorProto.FLOAT, [1], [1.0])]
    for name, file, offset, shape in weights:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        place = {"location": file, "length": str(4 * int(np.prod(shape)))} | ({"offset": str(offset)} if offset else {})
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
        found.append(tensor)
    path.write_bytes(helper.make_model(helper.make_graph([], path.stem, [], [], found)).SerializeToString())


def read(folder: Path, files: list[str], variants: list[str], known: set[str]) -> tuple[list[str], list[str]]:
    listed = [SimpleNamespace(file=name) for name in files]
    manifest = SimpleNamespace(
        graphs=listed, variants={"ort": [SimpleNamespace(file=name) for name in variants]}, weights="weights.bin"
    )
    pipe: Any = SimpleNamespace(bundle=SimpleNamespace(manifest=manifest, folder=folder))
    named, stray = tensors._read_by_graphs(pipe, dict.fromkeys(known))
    return sorted(named), stray


def test_portable_graphs_say_where_a_weight_is(tmp_path):
    graph(tmp_path / "b.onnx", ("one", "weights.bin", 0, (2, 3)))
    graph(tmp_path / "a.onnxruntime", ("one", "weights.bin", 1, (2, 3)))

    assert read(tmp_path, ["b.onnx"], ["a.onnxruntime"], {"one"}) == (["one"], ["a.onnxruntime: one"])


def test_weights_turns_embedding_and_strays_are_a_row_each(monkeypatch):
    monkeypatch.setattr(tensors.graph_set, "weights", lambda plan: {"known": None})
    monkeypatch.setattr(tensors.pack, "sources", lambda of, model, adapter: (None, {"source": None}))
    monkeypatch.setattr(tensors, "_read_by_graphs", lambda pipe, known: ({}, ["a.onnx: x", "b.onnx: y"]))
    monkeypatch.setattr(tensors, "_wrong_weights", lambda named, known, sources, plan: iter([("w", [4])]))
    monkeypatch.setattr(tensors, "_wrong_turns", lambda named, plan, model: iter([]))
    monkeypatch.setattr(tensors, "_wrong_embeddings", lambda pipe, model: iter([("e", [1, 2])]))
    made: Any = SimpleNamespace(family=None, spec=None, pictures=None, settings=SimpleNamespace(adapter=None))

    rows = tensors.compare(SimpleNamespace(), None, made, None)  # type: ignore[arg-type]

    assert [(row.stage, row.figure, row.note) for row in rows] == [
        ("weights", 1, "first in w, row 4"),
        ("rotary", 0, ""),
        ("embedding", 2, "first in e, row 1"),
        ("weights of graphs", 2, "first in a.onnx: x, row 0"),
    ]


def test_what_graphs_read_is_a_weight_where_the_portable_graphs_have_it(tmp_path):
    one = ("one", "weights.bin", 64, (2, 3))
    first = ("first", "weights.bin", 0, (4,))
    graph(
        tmp_path / "b.onnx",
        one,
        first,
        ("one.scale", "weights.bin", 96, (3,)),
        ("one.shift", "weights.bin", 112, (3,)),
    )
    graph(tmp_path / "c.onnx", one)
    graph(tmp_path / "a.onnxruntime", ("renamed", "weights.bin", 64, (2, 3)), ("again", "weights.bin", 0, (4,)))

    found = read(tmp_path, ["b.onnx", "c.onnx"], ["a.onnxruntime"], {"one", "first"})

    assert found == (["first", "one", "one.scale", "one.shift"], [])


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (("one", "weights.bin", 68, (2, 3)), "c.onnx: one"),
        (("one", "weights.bin", 64, (3, 2)), "c.onnx: one"),
        (("one", "weights.bin", 0, (2, 3)), "c.onnx: one"),
        (("one", "other.bin", 64, (2, 3)), "c.onnx: one, of other.bin"),
        (("two", "weights.bin", 68, (2, 3)), "c.onnx: two"),
        (("two", "weights.bin", 64, (6,)), "c.onnx: two"),
    ],
    ids=str,
)
def test_what_is_read_from_elsewhere_is_named(weight, said, tmp_path):
    graph(tmp_path / "b.onnx", ("one", "weights.bin", 64, (2, 3)))
    graph(tmp_path / "c.onnx", weight)

    assert read(tmp_path, ["b.onnx", "c.onnx"], [], {"one"}) == (["one"], [said])

"""ONNX Runtime on the CPU: graphs that take any number of rows compute those that are in use."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.backends import ort
from tests import checkpoints

ROWS, AXES, WIDTH = 7, 3, 4
FASTV = {"method": "fastv", "prune_layer": 2, "keep_ratio": 0.5}


def model(*, rows: str | int) -> bytes:
    """Rows times the sum of their positions over axes [axes, rows], and a cache that has no rows of the prompt."""
    kind = TensorProto.FLOAT
    nodes = [
        helper.make_node("ReduceSum", ["positions", "first"], ["sums"], keepdims=0),
        helper.make_node("Unsqueeze", ["sums", "shape"], ["column"]),
        helper.make_node("Mul", ["x", "column"], ["y"]),
        helper.make_node("Identity", ["cache"], ["present"]),
    ]
    constants = [helper.make_tensor(n, TensorProto.INT64, [len(v)], v) for n, v in (("first", [0]), ("shape", [0, 2]))]
    shapes = {"x": [1, rows, WIDTH], "positions": [AXES, rows], "cache": [ROWS, 2]}
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info(n, kind, s) for n, s in (("y", shapes["x"]), ("present", [ROWS, 2]))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    content: bytes = made.SerializeToString()
    return content


@pytest.mark.parametrize(("rows", "use", "computed"), [("rows", 3, 3), ("rows", None, 7), ("rows", 7, 7), (7, 3, 7)])
def test_rows_that_are_in_use_are_computed_and_others_stay(rows, use, computed):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(1, ROWS, WIDTH)), "positions": rng.normal(size=(AXES, ROWS))}
    arrays |= {"cache": rng.normal(size=(ROWS, 2)), "y": np.full((1, ROWS, WIDTH), np.nan), "present": np.zeros((7, 2))}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    made = onnxruntime.InferenceSession(model(rows=rows))
    opened = ort.OrtSession(Path("g.onnx"), made, ort.bound(made, arrays), arrays)

    opened.run(use)

    wanted = arrays["x"] * arrays["positions"].sum(0)[None, :, None]
    np.testing.assert_allclose(arrays["y"][:, :computed], wanted[:, :computed], rtol=1e-5)
    assert np.isnan(arrays["y"][:, computed:]).all()
    np.testing.assert_array_equal(arrays["present"], arrays["cache"])


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "wrong"),
    [
        ("x86_64", "processor : 0\nflags\t\t: fpu avx2 avx512_vnni\n", False),
        ("AMD64", "flags : avx2 avx_vnni", False),
        ("x86_64", "flags : fpu avx2 avx512f", True),
        ("x86_64", "processor : 0", True),
        ("AMD64", None, True),  # no such file: another system
        ("aarch64", "Features : fp asimd", False),
    ],
)
def test_sums_of_bytes_are_guarded_where_the_processor_would_cut_them_off(
    machine, cpuinfo, wrong, monkeypatch, tmp_path
):
    monkeypatch.setattr(ort.platform, "machine", lambda: machine)
    monkeypatch.setattr(ort, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)

    assert ort.saturates.__wrapped__() is wrong


@pytest.mark.parametrize("guard", [True, False])
def test_the_guard_reaches_the_session(guard, monkeypatch, tmp_path):
    monkeypatch.setattr(ort, "saturates", lambda: guard)
    (tmp_path / "g.onnx").write_bytes(model(rows=7))

    opened = ort.load(onnxruntime, tmp_path / "g.onnx")

    assert opened.get_session_options().get_session_config_entry("session.x64quantprecision") == str(int(guard))


@pytest.mark.export
@pytest.mark.parametrize("fewer", [0, 1])
def test_a_short_prompt_is_computed_without_padding(gqa, export_once, fewer):
    """Before and behind the cut, also with fewer pictures than planned."""
    bundle = export_once(gqa, **FASTV, num_images=2, max_text_tokens=40)
    pipe = Pipeline.load(bundle)
    head, _, tail = (graph.name for graph in pipe.manifest.role("prefill"))
    counts, seen = pipe.manifest.counts, 2 - fewer
    visual = counts.visual_tokens // 2 * seen
    before, after = 9 + visual, 9 + round(counts.visual_tokens * FASTV["keep_ratio"]) // 2 * seen
    ids = [5, 6, *[pipe.manifest.image_token_id] * seen, 7, 8, 9, 10, 11, 12, 13]
    ran = []

    class Counted(ort.OrtSession):
        def run(self, rows: int | None = None) -> None:
            ran.append((self.path.name.partition(".")[0], rows))
            super().run(rows)

    sessions = pipe._decoder.memory._sessions
    for name, opened in sessions.items():
        assert isinstance(opened, ort.OrtSession)
        sessions[name] = Counted(**{f.name: getattr(opened, f.name) for f in dataclasses.fields(opened)})
    hidden = pipe.buffer(head, "hidden").read()
    hidden[:] = 7

    pipe.generate_tokens(ids, checkpoints.pixels(images=seen), max_new_tokens=1)

    assert dict(ran)[head] == before and dict(ran)[tail] == after
    assert (hidden[0, before:] == 7).all() and not (hidden[0, :before] == 7).all(1).any()

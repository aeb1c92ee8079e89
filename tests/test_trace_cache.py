"""The cache of traced graphs gives what tracing gives, and nothing that was traced with other code."""

from __future__ import annotations

import functools
import inspect
import textwrap
from pathlib import Path

import pytest

from lvlm_edge.exporter import export, planning
from lvlm_edge.exporter.bundles import plans
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.graphs import blocks, parts, trace
from lvlm_edge.exporter.lowerings import legacy, modern
from lvlm_edge.exporter.methods import fastv
from tests import tiny, trace_cache
from tests.trace_cache import UnkeptError, key

PLANS = {
    "none": {},
    "none, more text": {"max_text_tokens": 32},
    "none, legacy": {"lowering": "legacy"},
    "none, shared": {"share_weights": True},
    "none, int8": {"weights": "int8", "vision_weights": "int8"},
    "fastv": {"method": "fastv", "prune_layer": 1},
    "fastv, a quarter": {"method": "fastv", "prune_layer": 1, "keep_ratio": 0.25},
    "fastv, two images": {"method": "fastv", "prune_layer": 1, "num_images": 2},
}


@pytest.fixture
def folder(checkpoint_once) -> Path:
    return tiny.checkpoint(checkpoint_once)


def planned(folder: Path, name: str) -> planning.Plan:
    options = {"max_text_tokens": 24, "max_new_tokens": 8} | PLANS[name]
    return plans.plan_of(Checkpoint.open(folder), method=options.pop("method", "none"), options=options)


def graphs(plan: planning.Plan):
    """Each graph that is traced, with the arguments of `trace`."""
    built, mode = parts.fake(plan)
    found = (*plan.family.graphs(plan), *plan.method.graphs(plan))
    return [(graph, built, plan, mode) for graph in found if graph.file is None]


def keys(plan: planning.Plan) -> dict[str, str]:
    return {graph.name: key(graph, built, plan) for graph, built, plan, _ in graphs(plan)}


def written(model, graph, path: Path) -> bytes:
    """A traced model as a bundle holds it, its weights aside."""
    from lvlm_edge.exporter.graphs import graph as files

    opset = model.opset_imports[""]
    places = {name: files.Place(0) for name in model.graph.initializers if "." in name or name in parts.ROPE}
    files.save(files.finish(model, graph, opset, "weights.bin", places), path)
    return path.read_bytes()


@pytest.mark.export
@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"method": "fastv", "prune_layer": 1, "lowering": "legacy"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_bundle_of_kept_graphs_is_that_of_traced_ones(options, folder, tmp_path, monkeypatch):
    right = inspect.unwrap(trace.trace)
    bundles = []
    for i, way in enumerate((right, *[trace_cache.cached(right, tmp_path / "traces")] * 2)):
        monkeypatch.setattr(trace, "trace", way)
        bundles.append(tiny.tree(export(folder, tmp_path / str(i), **options)))

    assert bundles[0] == bundles[1] == bundles[2]
    assert list((tmp_path / "traces").iterdir())


@pytest.mark.slow
@pytest.mark.export
def test_graphs_of_one_key_are_the_same_graph(folder, tmp_path):
    """The key leaves much of a plan out: what it leaves out changes no graph."""
    seen, again = {}, 0
    for name in PLANS:
        for graph, built, plan, mode in graphs(planned(folder, name)):
            known = key(graph, built, plan)
            made = written(inspect.unwrap(trace.trace)(graph, built, plan, mode), graph, tmp_path / "graph.onnx")
            again += known in seen
            assert seen.setdefault(known, made) == made, (name, graph.name)

    assert again >= 8


def test_a_key_is_that_of_the_shapes_and_not_of_the_weights(folder):
    plain, rounded, longer = (keys(planned(folder, name)) for name in ("none", "none, int8", "none, more text"))

    assert plain == rounded
    assert plain["vision"] == longer["vision"]
    assert not {plain["prefill"], plain["decode"]} & {longer["prefill"], longer["decode"]}


def test_keep_ratios_share_the_encoder_alone(folder):
    half, quarter = keys(planned(folder, "fastv")), keys(planned(folder, "fastv, a quarter"))

    assert {name for name in half if half[name] == quarter[name]} == {"vision"}


def rewritten(function, old: str, new: str):
    """A function with some of its source changed, in the place of the right one."""
    source, file = textwrap.dedent(inspect.getsource(function)), function.__code__.co_filename
    assert old in source
    found = {}
    code = compile(f"from __future__ import annotations\n{source.replace(old, new)}", file, "exec")
    exec(code, function.__globals__, found)
    return found[function.__name__]


@pytest.mark.parametrize(
    ("module", "name", "old", "new", "changed"),
    [
        (blocks, "finish", "x + layer", "x - layer", {"vision", "prefill_head", "select", "prefill_tail", "decode"}),
        (modern, "_written", "axis=2", "axis=3", {"vision", "prefill_head", "select", "prefill_tail", "decode"}),
        (legacy, "_scores", "size**-0.5", "size**-1", {"vision", "prefill_head", "select", "prefill_tail", "decode"}),
        (fastv, "importance", "size**-0.5", "size**-1", {"prefill_head", "select"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_function_in_place_is_another_key(module, name, old, new, changed, folder, monkeypatch):
    plan = planned(folder, "fastv")
    before = keys(plan)

    monkeypatch.setattr(module, name, rewritten(getattr(module, name), old, new))
    after = keys(plan)

    assert {graph for graph in before if before[graph] != after[graph]} == changed
    monkeypatch.undo()
    assert keys(plan) == before


def test_another_method_of_a_class_is_another_key(folder, monkeypatch):
    plan = planned(folder, "fastv")
    before = keys(plan)

    monkeypatch.setattr(parts.Linear, "forward", rewritten(parts.Linear.forward, "+ self.bias", "- self.bias"))

    assert not set(keys(plan).values()) & set(before.values())


@pytest.mark.parametrize(("module", "name", "value"), [(modern, "FEWEST_HEADS", 9), (parts, "ACTIVATIONS", {})])
def test_another_constant_is_another_key(module, name, value, folder, monkeypatch):
    plan = planned(folder, "fastv")
    asked = graphs(plan)
    before = {key(graph, built, plan) for graph, built, plan, _ in asked}

    monkeypatch.setattr(module, name, value)

    assert not before & {key(graph, built, plan) for graph, built, plan, _ in asked}


@pytest.mark.parametrize("way", ["function", "closure", "partial"])
def test_nothing_is_kept_where_a_function_is_a_tests(way, folder, monkeypatch):
    right = blocks.finish
    wrong = {
        "function": lambda *given: given[2],
        "closure": lambda *given: right(*given),
        "partial": functools.partial(lambda _, *given: right(*given), None),
    }
    monkeypatch.setattr(blocks, "finish", wrong[way])

    with pytest.raises(UnkeptError):
        keys(planned(folder, "none"))


@pytest.mark.export
def test_a_broken_function_is_traced_and_its_graph_is_not_the_kept_one(folder, tmp_path, monkeypatch):
    (*_, decode) = graphs(planned(folder, "none"))
    way = trace_cache.cached(inspect.unwrap(trace.trace), tmp_path / "traces")
    right = written(way(*decode), decode[0], tmp_path / "right.onnx")

    for wrong in (rewritten(blocks.finish, "x + layer", "x - layer"), lambda parts, layer, x, attended: x):
        monkeypatch.setattr(blocks, "finish", wrong)
        assert written(way(*decode), decode[0], tmp_path / "wrong.onnx") != right

    monkeypatch.undo()
    assert written(way(*decode), decode[0], tmp_path / "again.onnx") == right
    assert len([path for path in (tmp_path / "traces").iterdir() if path.suffix != ".lock"]) == 2

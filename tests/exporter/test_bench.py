"""Bench: what is made of timings, the turns, floors and chart; and whole runs. Never that something is fast."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvlm_edge.exporter import planning
from lvlm_edge.exporter.bundles import plans, ratios
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.checkpoints.quantise import Format
from lvlm_edge.exporter.devices import cost
from lvlm_edge.exporter.planning import loads, rates
from lvlm_edge.exporter.timing import bench, chart, contenders, speeds
from lvlm_edge.exporter.timing.contenders import Contender
from lvlm_edge.runtime.bundle import open_bundle
from lvlm_edge.runtime.errors import LvlmEdgeError, UnsupportedError, UsageError
from tests import tiny
from tests.fake_onnxruntime import Machine
from tests.test_imports import probe
from tests.tiny import cli, refused, tree


@pytest.fixture(scope="module")
def checkpoint(checkpoint_once) -> Path:
    return tiny.checkpoint(checkpoint_once)


@pytest.fixture(scope="module")
def bundles(checkpoint_once, export_once) -> list[Path]:
    return [tiny.bundle(checkpoint_once, export_once, name) for name in ("none", "fastv")]


# What is made of timings.


def test_median_and_range_are_those_of_the_values():
    found = bench.summarised([0.004, 0.001, 0.010, 0.002])

    assert found == {"median_ms": 3.0, "low_ms": 1.0, "high_ms": 10.0, "all_ms": [4.0, 1.0, 10.0, 2.0]}


def test_the_best_rates_are_the_highest_of_any_turn():
    turns = [
        {"int8 rows": f, "float32 row": b, "reading": m}
        for f, b, m in ((5.0, 30.0, 35.0), (9.0, 10.0, 40.0), (6.0, 20.0, 25.0))
    ]
    found = bench.best_rates(turns, {"hidden": 8})

    assert found["best"] == {"int8 rows": 9.0, "float32 row": 40.0}  # memory is read faster than by any product
    assert found["median"] == {"int8 rows": 6.0, "float32 row": 20.0}
    assert (found["version"], found["of"]) == (2, {"hidden": 8})


RATES = {
    "float32 rows": 100.0, "float32 row": 10.0, "float32 start": 5.0,
    "int8 rows": 200.0, "int8 row": 20.0, "int8 start": 4.0,
    "int4/32 rows": 50.0, "int4/32 row": 40.0, "int4/32 start": 4.0,
    "int4/128 rows": 80.0, "int4/128 row": 50.0, "int4/128 start": 4.0,
    "attention rows": 10.0, "attention row": 2.0, "elements": 8.0, "operator": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("work", "floor", "predicted"),
    [
        # FLOPs of two formats one after the other, 5 + 1 s; their bytes, 2 + 1 s, are read meanwhile.
        ({"float32 rows": 500, "float32 row": 20, "int8 rows": 200, "int8 row": 20, "int8 start": 4}, 6, 6),
        ({"float32 rows": 500, "float32 row": 80}, 8, 8),  # few rows: the bytes take longer
        ({"int4/32 row": 80, "int4/32 start": 6, "int8 row": 20, "int8 start": 2}, 3, 3 + 1.5 + 0.5),
        ({"int4/128 rows": 160, "attention rows": 30, "elements": 4, "operator": 1}, 2, 2 + 3 + 0.5 + 0.5),
        ({"attention row": 3, "operator": 3}, 0, 1.5 + 1.5),
    ],
)
def test_floors_and_predictions_by_hand(work, floor, predicted):
    assert rates.floor(work, RATES) == floor
    assert rates.predicted(work, RATES) == predicted


def test_every_rate_has_a_unit_and_a_part():
    assert set(RATES) == set(rates.UNITS)
    assert sorted(name for part in rates.PARTS.values() for name in part) == sorted(RATES)


def test_rates_are_work_over_time():
    works = {
        "float32 rows": {"float32 rows": 600.0, "float32 row": 1.0},
        "float32 row": {"float32 row": 80.0, "float32 start": 1},
        "float32 start": {"float32 row": 40.0, "float32 start": 12},
        "int8 row": {"int8 row": 50.0},
        "int8 start": {"int8 row": 50.0, "int8 start": 2},
        "elements": {"elements": 9.0, "operator": 6},
        "operator": {"elements": 1.0, "operator": 6},
    }
    seconds = {"float32 rows": 3.0, "float32 row": 4.0, "float32 start": 5.0, "int8 row": 5.0, "int8 start": 4.0}

    found = speeds.rates_of(works, seconds | {"elements": 3.0, "operator": 2.0})
    # 40 bytes at 20 per second take 2 of the 5 seconds, so that 12 products begin in 3.
    assert found == {
        "float32 rows": 200, "float32 row": 20, "float32 start": pytest.approx(4), "int8 row": 10,
        "int8 start": pytest.approx(1e9), "elements": 3, "operator": 3,
    }  # fmt: skip


def test_the_work_of_a_product_by_hand():
    matrix = (256, 10)
    floats, int8, int4, fine = (
        rates.product(matrix, 7, how) for how in (None, Format(8), Format(4, 128), Format(4, 32))
    )

    assert floats == {"float32 rows": 2 * 7 * 2560, "float32 row": 4 * 2560, "float32 start": 1}
    scaled = {"elements": 4 * 2 * 7 * 10, "operator": 1}  # read and written once more, times the rows' scales
    assert int8 == {"int8 rows": 2 * 7 * 2560, "int8 row": 2560 + 4 * 10, "int8 start": 1} | scaled
    assert int4 == {"int4/128 rows": 2 * 7 * 2560, "int4/128 row": 1280 + 4 * 2 * 10, "int4/128 start": 1}
    assert fine == {"int4/32 rows": 2 * 7 * 2560, "int4/32 row": 1280 + 4 * 8 * 10, "int4/32 start": 1}
    assert rates.product(matrix, 1, Format(8), 3) == {"int8 row": 3 * 2600, "int8 start": 3}
    # The largest magnitude (read, written, read), and numbers of 4 bytes that become one of 1.
    assert rates.rounding(7, 256) == {"elements": 4 * 7 * 256 * (3 + 1.25), "operator": 5}


def test_ratios_are_medians_of_the_rounds_ratios():
    # The machine slows down threefold in the second round, for both.
    turns = {
        "a": [{"first_token": t, "decode": 1.0} for t in (1.0, 3.0, 2.0)],
        "b": [{"first_token": t, "decode": 0.5} for t in (2.0, 3.0, 8.0)],
    }
    rows: list[dict[str, Any]] = [{"name": n, "kind": "bundle", "first_token": {}, "decode": {}} for n in turns]
    bench._compare(rows, turns)

    assert [row["first_token"]["ratio"] for row in rows] == [1.0, 2.0]  # of 2, 1 and 4; of medians it were 1.5
    assert [row["decode"]["ratio"] for row in rows] == [1.0, 0.5]
    rows[1]["kind"] = "torch"
    bench._compare(rows, turns)
    assert [row["ratio_to"] for row in rows] == ["b", "b"]
    assert rows[0]["first_token"]["ratio"] == 0.5


class Logged:
    """Takes turns, and writes them down."""

    about: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        self.name, self.log = name, log

    def ask(self, seed: int) -> dict[str, Any]:
        self.log.append((self.name, seed))
        return {"seed": seed}


def test_contenders_take_turns_with_one_seed_a_round():
    log: list[tuple[str, int]] = []
    runners = {name: Logged(name, log) for name in "abc"}

    found = bench.interleaved(runners, rounds=2, warm_up=1, seed=40)

    assert log == [(name, seed) for seed, names in ((40, "abc"), (41, "cba"), (42, "abc")) for name in names]
    assert found == {name: [{"seed": 41}, {"seed": 42}] for name in "abc"}


def test_prompts_are_fresh_each_turn_and_alike_in_one(bundles):
    none, fastv = (open_bundle(b).manifest for b in bundles)
    (ids, pictures), (same, _), (other, others) = (
        contenders.prompt(m, seed, 9) for m, seed in ((none, 3), (fastv, 3), (none, 4))
    )

    assert ids == same
    image = none.pictures[0].token_id
    assert len(ids) == 10 and ids.count(image) == 1 and ids[3] == image
    assert ids != other
    assert np.any(np.asarray(pictures[0][0]) != np.asarray(others[0][0]))
    assert [seen.shape for seen in contenders.pixels(none, pictures)] == [(1, 3, 28, 28)]


def test_pictures_of_tiles_have_their_canvas(original, eager_once):
    checkpoint = original(method="proxyv", side=8)
    manifest = open_bundle(eager_once(checkpoint, method="proxyv", grid=(1, 2), max_text_tokens=8)).manifest

    _, pictures = contenders.prompt(manifest, 0, 8)

    assert pictures[0][0].size == (2 * 112, 112)
    assert [seen.shape for seen in contenders.pixels(manifest, pictures)] == [(3, 3, 112, 112)]


def test_memory_is_that_of_the_process(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(50_000_000))
    before = contenders.memory()
    held = np.ones(25_000_000)
    after = contenders.memory()

    assert after["anonymous_bytes"] - before["anonymous_bytes"] == pytest.approx(held.nbytes, rel=0.05)
    mapped = np.memmap(tmp_path / "weights", np.uint8, "r")
    assert mapped.sum() == 0
    assert contenders.memory()["anonymous_bytes"] - after["anonymous_bytes"] < 25_000_000
    assert contenders.memory()["peak_bytes"] >= after["anonymous_bytes"] + mapped.nbytes


# Work and floors of real bundles.


def test_work_of_a_bundle_is_that_of_its_plan(bundles, checkpoint):
    options = {"prune_layer": 1, "max_text_tokens": 24, "max_new_tokens": 8}
    plan = plans.plan_of(Checkpoint.open(checkpoint), method="fastv", options=options)
    notes: list[str] = []
    who = Contender(name="", kind="bundle", text_tokens=24, new_tokens=8)
    found = bench.works(open_bundle(bundles[1]), who, notes)

    vision, projector, head, _, tail = cost.prompt_work(plan)
    flops = {name: row["flops"] for name, row in found.items()}
    assert flops == {
        "vision": vision.flops + projector.flops,
        "prefill_head": head.flops,
        "select": 0,
        "prefill_tail": tail.flops,
        "decode": planning.decode_flops(plan),
    }
    assert notes == []
    # 4 visual tokens of which 2 are kept from layer 1 on, 24 text tokens, and half of 8 new ones.
    d = plan.spec.decoder
    caches = 2 * d.kv_heads * d.head_dim * 4 * ((4 + 24 + 4) + (2 + 24 + 4))
    assert bench.cache_bytes(open_bundle(bundles[1]).manifest, who) == caches
    count = planning.decoder_weights(d)
    weights = 4 * (d.layers * (count.matrices + count.vectors) + count.norm + count.head)
    tables = 4 * 2 * plan.positions * d.head_dim  # cosines and sines, half of the head each or whole
    assert weights + caches <= found["decode"]["bytes"] <= weights + caches + tables + 1000


def test_a_graph_of_pixels_counts_once_per_crop(original, export_once):
    checkpoint = original(method="proxyv", side=8)
    one, three = (
        bench.works(
            open_bundle(export_once(checkpoint, method="none", grid=grid, max_text_tokens=8, max_new_tokens=2)),
            Contender(name="", kind="bundle", text_tokens=8),
            [],
        )["vision"]
        for grid in (None, (1, 2))
    )

    assert {key: three[key] for key in ("flops", "bytes")} == {key: 3 * one[key] for key in ("flops", "bytes")}
    assert three["work"] == {name: 3 * amount for name, amount in one["work"].items()}


@pytest.mark.parametrize(
    ("weights", "prompt", "many", "one"),
    [
        ("as-is", None, {"float32"}, {"float32"}),
        ("int8", None, {"int8"}, {"int8"}),
        ("int4", None, {"int4/32"}, {"int4/32", "int8"}),
        ("int4", "int8", {"int8"}, {"int4/32", "int8"}),
    ],
)
def test_work_of_the_graphs_is_that_of_the_plan(weights, prompt, many, one, checkpoint, export_once):
    """Two counts: nodes of the graphs, and dimensions of the plan. INT4 has a head of INT8."""
    options = {"max_text_tokens": 24, "max_new_tokens": 8, "weights": weights, "vision_weights": weights}
    options["prompt_weights"] = prompt
    bundle = open_bundle(export_once(checkpoint, method="none", **options))
    plan = plans.plan_of(Checkpoint.open(checkpoint), method="none", options=options)
    who = Contender(name="", kind="bundle", text_tokens=24, new_tokens=16)  # on average its caches are full
    found = {name: row["work"] for name, row in bench.works(bundle, who, []).items()}

    expected = {
        "vision": rates.total([loads.vision(plan), loads.projector(plan)]),
        "prefill": loads.stage(plan, plan.stages[0], last=True),
        "decode": loads.decode(plan),
    }
    assert {f for f in rates.FORMATS if rates.ROWS[f] in found["prefill"]} == many
    assert {f for f in rates.FORMATS if rates.ROW[f] in found["decode"]} == one
    for name, work in expected.items():
        assert set(found[name]) == set(work) <= set(rates.UNITS)
        for rate in work:
            # Graphs have a few operators beside those of their layers, which are two here.
            about = {rates.ELEMENTS: {"rel": 0.25}, rates.OPERATOR: {"abs": 8}}.get(rate, {"rel": 1e-9})
            assert found[name][rate] == pytest.approx(work[rate], **about), (name, rate)


def test_prompts_shorter_than_planned_have_no_floors(checkpoint, export_once):
    bundle = open_bundle(export_once(checkpoint, method="none", max_text_tokens=24, max_new_tokens=8))
    notes: list[str] = []

    found = bench.works(bundle, Contender(name="", kind="bundle", text_tokens=23), notes)

    assert list(found) == ["vision", "decode"]
    assert notes == ["prompts are shorter than planned: no floors for them; leave out --text-tokens"]


def test_another_decoder_than_the_first_has_no_floors(bundles):
    own = {"hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2, "head_dim": 16, "rows": 28}
    who = Contender(name="fastv", kind="bundle", text_tokens=24, new_tokens=4)
    notes: list[str] = []

    assert bench._fitting_works(open_bundle(bundles[1]), who, own | {"rows": 3}, notes) and notes == []
    assert bench._fitting_works(open_bundle(bundles[1]), who, own | {"ffn": 65}, notes) == {}
    assert notes == ["no floors for fastv: the rates are of the first bundle's dimensions; time it alone"]


def test_graphs_that_share_weights_have_no_floors(checkpoint, export_once):
    bundle = export_once(checkpoint, method="none", share_weights=True, max_text_tokens=24, max_new_tokens=8)
    notes: list[str] = []

    found = bench.works(open_bundle(bundle), Contender(name="", kind="bundle"), notes)

    assert list(found) == ["vision"]
    assert set(notes) == {"graphs that share weights are for any number of rows: no floors for them"}


# Whole runs.


@pytest.fixture(scope="module")
def report(bundles, checkpoint, tmp_path_factory) -> dict[str, Any]:
    """Of two bundles and PyTorch, by the command line; with the chart beside."""
    plot = tmp_path_factory.mktemp("plot") / "chart.png"
    arguments = ["--against", checkpoint, "--threads", 1, "--new-tokens", 4, "--text-tokens", 24]
    turns = ["--rounds", 2, "--warm-up", 0]
    done = cli("bench", *bundles, *arguments, *turns, "--plot", plot, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout) | {"plot": plot}


def test_every_stage_of_every_contender_is_there(report):
    rows = report["contenders"]

    assert [(r["kind"], r["method"], r["backend"]) for r in rows] == [
        ("bundle", "none", "ort"), ("bundle", "fastv", "ort"), ("torch", "none", "PyTorch"),
    ]  # fmt: skip
    assert [[s["name"] for s in r["stages"]] for r in rows] == [
        ["preprocess", "vision", "prefill", "between"],
        ["preprocess", "vision", "prefill_head", "select", "prefill_tail", "between"],
        ["preprocess", "model"],
    ]
    assert (rows[1]["visual_tokens"], rows[1]["kept_tokens"], rows[1]["dtype"]) == (4, 2, "float32")
    assert (report["rounds"], report["warm_up"], report["threads"]) == (2, 0, 1)
    assert (report["text_tokens"], report["new_tokens"]) == (24, 4)


def test_the_figures_of_a_report_agree(report):
    base = report["contenders"][-1]
    for row in report["contenders"]:
        for part in (*row["stages"], row["first_token"], row["decode"]):
            assert len(part["all_ms"]) == 2
            assert part["median_ms"] == median(part["all_ms"])
            assert 0 < part["low_ms"] <= part["median_ms"] <= part["high_ms"]
        for whole, *parts in zip(row["first_token"]["all_ms"], *(s["all_ms"] for s in row["stages"]), strict=True):
            assert whole == pytest.approx(sum(parts))
        ratios = [a / b for a, b in zip(row["decode"]["all_ms"], base["decode"]["all_ms"], strict=True)]
        assert row["decode"]["ratio"] == pytest.approx(median(ratios))
        assert row["memory"]["peak_bytes"] > row["memory"]["anonymous_bytes"] > 10**6


def test_floors_stand_beside_what_has_work(report):
    best, usual = report["rates"]["best"], report["rates"]["median"]

    assert set(best) == set(usual) == set(rates.UNITS)
    assert all(0 < usual[name] <= rate for name, rate in best.items() if not name.endswith("start"))
    for row in report["contenders"][:2]:
        with_floor = [s for s in (*row["stages"], row["decode"]) if "floor_ms" in s]
        names = [s["name"] for s in with_floor]
        assert names == [*(n["name"] for n in row["stages"] if n["name"].startswith(("vision", "prefill"))), "decode"]
        for stage in with_floor:
            work = stage["work"]
            seconds = work.get("float32 rows", 0) / best["float32 rows"], work["float32 row"] / best["float32 row"]
            assert stage["floor_ms"] == pytest.approx(1e3 * max(seconds))
            assert stage["times_floor"] == pytest.approx(stage["median_ms"] / stage["floor_ms"])
            assert stage["predicted_ms"] > stage["floor_ms"]
            assert stage["times_predicted"] == pytest.approx(stage["median_ms"] / stage["predicted_ms"])
        for key in ("floor_ms", "predicted_ms"):
            assert row["first_token"][key] == pytest.approx(sum(s[key] for s in with_floor[:-1]))
    assert not any("floor_ms" in s for s in report["contenders"][2]["stages"])


def test_a_report_says_what_it_depends_on(report):
    machine = report["machine"]

    assert machine["versions"]["onnxruntime"] and machine["versions"]["torch"]
    assert machine["cores"] >= 1 and machine["processor"]
    assert set(machine["clocks_mhz"]) == {"before", "after"}
    assert "vision: encoder and projector, which are one graph" in report["notes"]
    assert any(note.startswith("PyTorch: float32, sdpa, every visual token") for note in report["notes"])


def test_plan_predicts_from_the_rates_of_a_report(report, checkpoint, tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(report, default=str))
    done = cli("plan", checkpoint, *tiny.CAPACITY, "--rates", tmp_path / "bench.json", "--json")

    found = json.loads(done.stdout)["prediction"]
    expected = {stage["name"]: stage["predicted_ms"] for stage in report["contenders"][0]["stages"][1:-1]}
    vision, projector, prefill = (stage["ms"] for stage in found["stages"])
    assert vision + projector == pytest.approx(expected["vision"], rel=0.2)  # counted from dimensions, and from nodes
    assert prefill == pytest.approx(expected["prefill"], rel=0.2)


def bars(sheet: Image.Image) -> list[int]:
    """Lengths of the bars in pixels, from the top; a line or a floor's mark may cover where one begins."""
    pixels = np.asarray(sheet)[:, chart.LEFT :]
    filled = np.any([(pixels[:, 0] == colour).all(-1) for colour in (chart.BASE, chart.RANGE, chart.FLOOR)], axis=0)
    edges = np.flatnonzero(filled != np.roll(filled, 1)).reshape(-1, 2)
    coloured = (pixels == chart.BASE).all(-1)
    return [int(max(np.flatnonzero(coloured[top:end].any(0)), default=0)) for top, end in edges]


def floors(sheet: Image.Image) -> list[int]:
    """Where the floors' marks are, from the top, in pixels from the bars' start."""
    marked = (np.asarray(sheet)[:, chart.LEFT :] == chart.FLOOR).all(-1)
    rows = marked.any(1)
    starts = np.flatnonzero(rows & ~np.roll(rows, 1))
    return [int(np.flatnonzero(marked[y]).mean()) for y in starts]


def test_the_chart_has_a_bar_for_every_stage(report):
    with Image.open(report["plot"]) as sheet:
        sheet.load()
        found = bars(sheet)
        assert sheet.format == "PNG"

    assert len(found) == sum(len(row["stages"]) + 2 for row in report["contenders"])
    assert [p.name for p in report["plot"].parent.iterdir()] == ["chart.png"]


def part(name: str, ms: float, **more: float) -> dict[str, Any]:
    return {"name": name, "median_ms": ms, "low_ms": ms, "high_ms": ms} | more


def test_bars_are_as_long_as_their_times():
    rows = [
        {
            "name": "a",
            "stages": [part("x", 10.0, floor_ms=5.0)],
            "first_token": part("", 10.0),
            "decode": part("d", 1.0),
        },
        {"name": "b", "stages": [part("x", 20)], "first_token": part("", 40), "decode": part("d", 2, floor_ms=1.0)},
    ]
    sheet = chart.draw({"contenders": rows})

    assert bars(sheet) == pytest.approx([chart.WIDTH * ms / 40 for ms in (10, 10, 1, 20, 40, 2)], abs=1)
    assert floors(sheet) == pytest.approx([chart.WIDTH * ms / 40 for ms in (5, 1)], abs=1)


def test_a_chart_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "chart.png"
    target.write_text("before")
    rows = [{"name": "a", "stages": [part("x", 1.0)], "first_token": part("", 1.0), "decode": part("d", 1.0)}]

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UsageError, match=r"chart.png: cannot be written \(no space left\)"):
        chart.save({"contenders": rows}, target)
    assert tree(tmp_path) == {"chart.png": b"before"}


def test_the_command_prints_the_stages(bundles, report, monkeypatch):
    monkeypatch.setattr(bench, "bench", lambda *_, **__: report)
    done = cli("bench", bundles[1])

    assert done.exit_code == 0, done.output
    for word in ("preprocess", "prefill_head", "select", "floor ms", "tokens/s", "peak memory", "predicted ms"):
        assert word in done.stdout
    best = report["rates"]["best"]
    many, one = (line for line in done.stdout.splitlines() if line.startswith("this machine"))
    assert f"many rows: float32 {best['float32 rows'] / 1e9:,.1f}, int8 " in many and many.endswith(" GFLOP/s")
    assert f"one row: float32 {best['float32 row'] / 1e9:,.1f}, int8 " in one and one.endswith(" GB/s")
    assert "attention" in many and "attention" not in one  # whose rates are FLOPs, for one row too


@pytest.fixture
def without_onnx_ir(monkeypatch) -> None:
    """No floors, and so no process that measures the machine's rates, which takes seconds."""
    monkeypatch.setattr(bench, "_has_onnx_ir", lambda: False)


def test_without_onnx_ir_there_are_no_floors(bundles, without_onnx_ir):
    report = bench.bench(bundles[:1], rounds=1, warm_up=0, new_tokens=2, threads=1)

    assert report["rates"] is None
    assert "no floors: onnx_ir is not installed here, which counts a graph's FLOPs" in report["notes"]
    (row,) = report["contenders"]
    assert not any("floor_ms" in part for part in (*row["stages"], row["first_token"], row["decode"]))


@pytest.mark.parametrize("module", ["bench", "contenders", "chart"])
def test_it_imports_on_a_device(module):
    probe(f"import lvlm_edge.exporter.timing.{module}")


def test_pytorch_runs_the_layouts_of_the_releases(original, eager_once):
    checkpoint = original(method="proxyv", side=8)
    bundle = eager_once(checkpoint, method="proxyv", grid=(1, 2), max_text_tokens=8, max_new_tokens=2)
    runner = contenders.RUNNERS["torch"](pytorch(checkpoint, bundle))

    found = runner.ask(0)
    assert found["decode"] > 0
    assert sum(found["stages"].values()) == pytest.approx(found["first_token"])


def pytorch(checkpoint: Path, bundle: Path) -> Contender:
    """PyTorch beside a bundle; to be run in this process, which has its libraries already."""
    return Contender(name="PyTorch", kind="torch", folder=str(checkpoint), bundle=str(bundle), text_tokens=8)


# What is refused.


def test_himix_has_no_pytorch_to_be_compared_with(original, eager_once):
    checkpoint = original(method="himix", side=8)
    bundle = eager_once(checkpoint, method="himix", max_text_tokens=8, max_new_tokens=2)

    with pytest.raises(UnsupportedError, match="transformers cannot run HiMix's layers"):
        contenders.RUNNERS["torch"](pytorch(checkpoint, bundle))


@pytest.mark.parametrize(
    ("code", "options", "said"),
    [
        (2, ["--rounds", 0], "0 is not in the range x>=1"),
        (2, ["--threads", 0], "0 is not in the range x>=1"),
        (2, ["--new-tokens", 1], "--new-tokens is 1, the bundles hold 2 to 8"),
        (2, ["--new-tokens", 9], "--new-tokens is 9, the bundles hold 2 to 8"),
        (2, ["--text-tokens", 25], "--text-tokens is 25, the bundles hold 1 to 24"),
        (2, ["--text-tokens", 0], "--text-tokens is 0, the bundles hold 1 to 24"),
        (2, ["--plot", "chart.jpg"], "chart.jpg: cannot be written as a chart"),
        (2, ["--plot", "nowhere/chart.png"], "cannot be written as a chart"),
        (3, ["--backend", "tensorflow"], "backend: 'tensorflow' is not known"),
        (2, ["--backend", "ort", "--backend", "ort"], "given twice"),
    ],
)
def test_what_cannot_be_timed_is_refused(code, options, said, bundles):
    assert said in refused(code, "bench", bundles[0], "-q", *options)


def test_a_damaged_bundle_and_one_given_twice_are_refused(bundles, tmp_path):
    assert "is no folder" in refused(5, "bench", tmp_path / "nowhere")
    assert "given twice" in refused(2, "bench", bundles[0], bundles[0])
    assert "holds keep ratio 0.5, not 0.3" in refused(2, "bench", bundles[1], "--keep-ratio", 0.3)
    assert "Missing argument" in refused(2, "bench")


class InProcess:
    """A contender without a process of its own, which a double of a library would not reach."""

    def __init__(self, contender: Contender) -> None:
        self.name, self._runner = contender.name, contenders.RUNNERS[contender.kind](contender)
        self.about, self.ask = self._runner.about, self._runner.ask

    def close(self) -> None:
        """Nothing."""


def test_a_gpus_backend_is_timed_over_its_double(bundles, monkeypatch, without_onnx_ir):
    """Contenders take turns on one device, each with its own streams and buffers, and no logits come back."""
    machine = Machine().install(monkeypatch)
    monkeypatch.setattr(bench, "Worker", InProcess)

    found = bench.bench(bundles, backends=["ort-cuda"], rounds=2, warm_up=1, new_tokens=4)

    assert [(row["method"], row["backend"]) for row in found["contenders"]] == [
        ("none", "ort-cuda"),
        ("fastv", "ort-cuda"),
    ]
    for row in found["contenders"]:
        assert {"vision", "preprocess", "between"} < {stage["name"] for stage in row["stages"]}
        assert len(row["decode"]["all_ms"]) == 2 and min(row["decode"]["all_ms"]) > 0
    assert "no floors for ort-cuda: the rates measured are those of a processor" in found["notes"]
    assert machine.calls["captured"] == 4 and machine.calls["replayed"] > 4  # decode and the search, of both
    vocab = open_bundle(bundles[0]).manifest.embedding.vocab
    assert ("out", 4 * vocab) not in machine.copied and "out" in dict(machine.copied)


def test_threads_are_left_to_a_gpu_and_its_errors_keep_their_exit_code(bundles, monkeypatch):
    machine = Machine()
    machine.driver = 12040
    machine.install(monkeypatch)
    monkeypatch.setattr(bench, "Worker", InProcess)

    said = refused(3, "bench", bundles[0], "--backend", "ort-cuda", "-q", "--rounds", 1, "--threads", 2)

    assert "ort-cuda: the driver is too old: it is for CUDA 12.4" in said


def test_another_checkpoint_than_the_bundles_is_refused(bundles, checkpoint_once, without_onnx_ir):
    other = checkpoint_once(**copy.deepcopy(tiny.SIZES) | {"seed": 8, "vision": {"image_size": 42}})

    said = refused(1, "bench", bundles[0], "--against", other, "-q", "--rounds", 1)
    assert "visual tokens: 9, the bundle has 4; give the checkpoint that was exported" in said


def test_a_contender_that_ends_is_an_error_with_its_name():
    with pytest.raises(LvlmEdgeError, match="the process of gone ended with code 1"):
        bench.Worker(Contender(name="gone", kind="no such kind"))


def test_the_other_contenders_end_with_one_that_fails(bundles, monkeypatch, without_onnx_ir):
    begun: list[bench.Worker] = []
    start = bench.Worker.__init__

    def noted(self: bench.Worker, contender: Contender) -> None:
        begun.append(self)
        start(self, contender)

    monkeypatch.setattr(bench.Worker, "__init__", noted)
    monkeypatch.setattr(bench.Worker, "ask", lambda *_: (_ for _ in ()).throw(LvlmEdgeError("enough")))
    with pytest.raises(LvlmEdgeError, match="enough"):
        bench.bench(bundles, rounds=1)

    assert len(begun) == 2
    assert all(worker._process.poll() is not None for worker in begun)


def test_a_contender_ends_when_nobody_asks_any_more(bundles):
    # As where the parent was killed: its end of the pipe is closed.
    who = {"name": "x", "kind": "bundle", "folder": str(bundles[0]), "bundle": str(bundles[0])}
    command = [sys.executable, "-m", "lvlm_edge.exporter.timing.contenders", json.dumps(who)]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=True, timeout=60)

    assert json.loads(done.stdout)["method"] == "none"


@pytest.mark.parametrize(
    ("folders", "ratios", "backends", "names"),
    [
        (["/a/x", "/a/y"], [], ["ort"], ["x", "y"]),
        (["/a/x", "/b/x"], [], ["ort"], ["/a/x", "/b/x"]),
        (["/a/x"], [], ["ort", "trt"], ["x, ort", "x, trt"]),
        (["/a/x"], [0.5, 0.25], ["ort"], ["x, keep 0.5", "x, keep 0.25"]),
        (["/a/PyTorch", "/a/rates"], [], ["ort"], ["/a/PyTorch", "/a/rates"]),
    ],
)
def test_contenders_have_names_of_their_own(folders, ratios, backends, names):
    assert list(bench._names([Path(f) for f in folders], ratios, backends).values()) == names


def test_each_keep_ratio_of_a_bundle_is_timed(bundles, tmp_path, without_onnx_ir):
    bundle = Path(shutil.copytree(bundles[1], tmp_path / "bundle"))
    ratios.add(bundle, 0.25)

    found = bench.bench([bundle], keep_ratios=[0.25, 0.5], rounds=1, warm_up=0, threads=1, new_tokens=2)

    assert [(row["keep_ratio"], row["kept_tokens"]) for row in found["contenders"]] == [(0.25, 1), (0.5, 2)]

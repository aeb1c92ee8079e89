"""Cost: predicted times by hand-made sums, that they only grow with the work, and when a method does not pay."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lvlm_edge.exporter import plan as planned
from lvlm_edge.exporter import planning
from lvlm_edge.exporter.bundles import plans
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.devices import cost, fit, profiles
from lvlm_edge.exporter.graphs import graph
from lvlm_edge.runtime.bundle import open_bundle
from lvlm_edge.runtime.errors import UnsupportedError, UsageError
from tests.exporter.test_fit import MODELS, config, written
from tests.tiny import cli, refused

GPUS = [name for name in profiles.names() if name != "cpu"]
CONSTANTS = cost.Constants(efficiency={"float16": 0.5, "int4": 0.25}, bandwidth=0.8, prompt_layer=1e-4, decode_layer=0)
AGX = profiles.load("agx-orin-64gb")  # 42.6 TFLOP/s, 205 GB/s
MACHINE = cost.machine(AGX, CONSTANTS)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Checkpoint]:
    return {m: Checkpoint.open(written(tmp_path_factory.mktemp(m), m)) for m in MODELS}


@pytest.fixture
def made(models):
    def plan(model: str = "7B", keep: float | None = None, **more: Any) -> planning.Plan:
        options = {"dtype": "float16"} | ({} if keep is None else {"keep_ratio": keep}) | more
        return plans.plan_of(models[model], method="none" if keep is None else "fastv", options=options)

    return plan


def on(name: str, weights: str = "as-is") -> cost.Machine:
    profile = profiles.load(name)
    return cost.machine(profile, cost.of_class(cost.constants(), cost.class_of(profile)), weights=weights)


def test_a_stage_takes_its_flops_or_its_bytes_and_its_layers():
    machine = cost.Machine(vision=100, decoder=10, bandwidth=5, prompt_layer=0.5, decode_layer=0.25)
    work = cost.StageWork(name="", flops=40, bytes=10, layers=2)

    assert work.seconds(machine) == 4 + 1
    assert replace(work, bytes=30).seconds(machine) == 6 + 1
    assert replace(work, vision=True).seconds(machine) == 2 + 1
    assert replace(work, decode=True).seconds(machine) == 4 + 0.5


def test_the_stages_of_7b_by_hand(made):
    vision, projector, head, select, tail = cost.prompt_work(made(keep=0.25))

    layer, full, reduced = 4096 * (4 * 4096 + 3 * 11008), 576 + 256, 144 + 256
    assert [w.name for w in (vision, projector, head, select, tail)] == [
        "vision", "projector", "prefill 0..1", "select", "prefill 2..31",
    ]  # fmt: skip
    assert head.flops == 2 * (2 * full * layer + 4 * full**2 * 4096) + 2 * full * 4096
    assert tail.flops == 30 * (2 * reduced * layer + 4 * reduced**2 * 4096) + 2 * 4096 * 32064
    assert head.bytes == 2 * 2 * (layer + 2 * 4096)
    assert tail.bytes == 2 * (30 * (layer + 2 * 4096) + 4096 + 4096 * 32064)
    assert select.bytes == 2 * 2 * reduced * 4096
    assert projector.flops == 2 * 576 * (1024 * 4096 + 4096 * 4096)
    assert projector.bytes == 2 * (1024 * 4096 + 4096 * 4096 + 2 * 4096)
    assert tail.seconds(MACHINE) == tail.flops / (42.6e12 * 0.5) + 30e-4
    assert select.seconds(MACHINE) == select.bytes / (205e9 * 0.8) + 1e-4


def test_a_decoded_token_of_7b_by_hand(made):
    work = cost.decode_work(made(), weights="int4")

    layer = 4096 * (4 * 4096 + 3 * 11008)
    caches = 32 * 2 * 2 * 4096 * (576 + 256 + 128)
    assert work.bytes == pytest.approx(32 * (0.58 * layer + 2 * 2 * 4096) + 2 * (4096 + 4096 * 32064) + caches)
    assert work.seconds(MACHINE) == work.bytes / (205e9 * 0.8)


def test_pictures_are_seen_one_by_one(made):
    one, three = (cost.prompt_work(made(num_images=n))[0] for n in (1, 3))

    assert (three.flops, three.bytes, three.layers) == (3 * one.flops, 3 * one.bytes, 3 * one.layers)


OTHERS = [  # methods, with options of their checkpoint and of the plan
    ("proxyv", {}, {"grid": (1, 2)}),
    ("yopo", {"layers": 6}, {"semantics": "released"}),
    ("yopo", {"layers": 6}, {"semantics": "dropped"}),
    ("himix", {}, {"num_images": 2}),
]


@pytest.mark.parametrize(("method", "options", "more"), OTHERS)
def test_flops_are_those_of_the_plan(method, options, more, original):
    checkpoint = original(method=method, side=8, **options)
    report = planned(checkpoint, method=method, device=AGX, dtype="float16", **more)
    expected, stages = report["flops"], report["prediction"]["stages"]

    of = {s["name"]: s["flops"] for s in stages}
    assert of.pop("vision") + of.pop("projector", 0) == expected["vision"] + expected["projector"]
    assert sum(of.values()) == expected["prefill"]


def test_flops_are_those_of_the_graphs_nodes(gqa, export_once):
    settings = {"prune_layer": 2, "keep_ratio": 0.5, "max_text_tokens": 64, "max_new_tokens": 16}
    bundle = export_once(gqa, method="fastv", **settings)
    plan = plans.plan_of(Checkpoint.open(gqa), method="fastv", options=settings)

    counted = {g.name: graph.flops(bundle / g.file) for g in open_bundle(bundle).manifest.graphs}
    vision, projector, head, select, tail = (w.flops for w in cost.prompt_work(plan))
    assert vision + projector == counted["vision"]
    assert (head, select, tail) == (counted["prefill_head"], counted["select"], counted["prefill_tail"])
    assert cost.decode_work(plan).flops == counted["decode"]


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("model", MODELS)
def test_times_only_grow_with_the_work(name, model, made):
    machine = on(name)

    def first(machine=machine, weights="as-is", **settings):
        return cost.first_token(cost.prompt_work(made(model, **settings), weights=weights), machine)

    def token(weights="as-is", machine=machine, **settings):
        return cost.decode_work(made(model, **settings), weights=weights).seconds(machine)

    def ascends(times, strictly=False):
        return times == sorted(set(times) if strictly else times)

    ratios = [i / 20 for i in range(1, 21)]
    assert ascends([first(keep=r) for r in ratios])
    assert ascends([token(keep=r) for r in ratios], strictly=True)
    assert ascends([first(keep=0.5, prune_layer=k) for k in range(1, 28)])
    lengths = [8, 32, 33, 64, 128, 256, 512, 1024, 2048]
    assert ascends([first(max_text_tokens=n) for n in lengths])
    assert ascends([first(keep=0.5, max_text_tokens=n) for n in lengths])
    assert ascends([token(max_text_tokens=n) for n in lengths], strictly=True)
    assert ascends([first(num_images=n) for n in (1, 2, 3)], strictly=True)
    formats = ["int4", "int8", "as-is"]
    assert ascends([token(w, on(name, w)) for w in formats], strictly=True)
    assert ascends([first(on(name, w), w) for w in formats[:2]])  # they are multiplied alike


@pytest.mark.parametrize("name", ["thor-t4000", "thor-t5000", "dgx-spark"])
def test_fp4_decodes_as_fast_as_int4_and_answers_sooner(name, made):
    works = {w: cost.prompt_work(made(), weights=w) for w in ("fp4", "int4")}

    assert cost.first_token(works["fp4"], on(name, "fp4")) < cost.first_token(works["int4"], on(name, "int4"))
    assert cost.decode_work(made(), weights="fp4").seconds(on(name, "fp4")) < cost.decode_work(made()).seconds(on(name))


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_prediction(name, made):
    report = cost.report(made(keep=0.25), profiles.load(name))

    assert report["available"], report
    assert report["first_token_ms"] == pytest.approx(sum(s["ms"] for s in report["stages"]))
    assert report["speed_up"] == report["none"]["first_token_ms"] / report["first_token_ms"]
    assert report["held_out_error"]["worst"] <= 0.4
    assert (report["held_out_error_of_this_device"] is not None) == (
        name in ("agx-orin-64gb", "orin-nano-8gb", "orin-nx-16gb", "thor-t5000")
    )
    assert report["memory_bytes"] == fit.predict(made(keep=0.25), profiles.load(name)).run


def test_a_method_that_halves_the_prompt_pays_on_a_large_decoder(made):
    assert cost.verdict(made(keep=0.25), MACHINE) == (True, "")


def test_none_is_judged_by_nobody(made):
    assert cost.report(made(), AGX)["pays"] is None


def test_saving_just_under_5_percent_does_not_pay(made):
    machine = replace(MACHINE, prompt_layer=0.0)
    plan = made(keep=0.9)
    none = cost.first_token(cost.prompt_work(made()), machine)
    shares = [cost.first_token(cost.prompt_work(made(keep=r)), machine) / none for r in (0.9, 0.91, 0.92, 0.93)]
    assert shares[0] < 0.95 < shares[-1]

    judged = [cost.verdict(made(keep=r), machine)[0] for r in (0.9, 0.91, 0.92, 0.93)]
    assert judged == [share <= 0.95 for share in shares]
    assert cost.verdict(plan, machine)[0]


@pytest.mark.parametrize(
    ("machine", "plan", "why"),
    [
        # 576 of 832 rows and 5 % of them dropped: nothing but the FLOPs is to blame.
        (MACHINE, {"keep": 0.95}, "left with 96.6% of its FLOPs (547 of 576 visual tokens kept, from layer 2 of 32 on"),
        (MACHINE, {"keep": 0.5, "prune_layer": 31}, "from layer 31 of 32 on"),
        (MACHINE, {"keep": 0.75, "max_text_tokens": 3000}, "576 of 3576 rows are visual"),
        (replace(MACHINE, bandwidth=1e9), {"keep": 0.25}, "reading the weights costs 12,957 ms"),
        (replace(MACHINE, vision=1e9), {"keep": 0.25}, "the vision encoder costs 390,"),
        (replace(MACHINE, prompt_layer=0.1), {"keep": 0.25}, "the fixed time of the layers costs 3,300 ms"),
    ],
)
def test_where_a_method_does_not_pay_the_floor_is_named(machine, plan, why, made):
    pays, said = cost.verdict(made(max_new_tokens=8, **plan), machine)

    assert not pays
    assert why in said


def test_a_selector_that_costs_what_it_saves_is_named(made, monkeypatch):
    works = cost.prompt_work

    def slow(plan, **more):
        return tuple(replace(w, bytes=1e12) if w.name == "select" else w for w in works(plan, **more))

    monkeypatch.setattr(cost, "prompt_work", slow)
    pays, said = cost.verdict(made(keep=0.25), MACHINE)

    assert not pays
    assert said.startswith("the choice of tokens costs")


def test_a_tiny_decoder_behind_a_large_encoder_does_not_pay(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config("qwen2", 4, 256, 4, 4, 1024, 32000, True)))
    options = {"keep_ratio": 0.25, "dtype": "float16"}
    plan = plans.plan_of(Checkpoint.open(tmp_path), method="fastv", options=options)

    assert cost.verdict(plan, on("agx-orin-64gb"))[1].startswith("the vision encoder costs")


def test_what_cannot_be_predicted_is_said(made):
    def why(name, dtype="float16", **options):
        report = cost.report(made(dtype=dtype), profiles.load(name), **options)
        assert not report["available"]
        return report["reason"]

    assert "no constants are fitted for cpu; measure it there: lvlm-edge bench" in why("cpu")
    assert "no published time to fit fp8 weights on" in why("thor-t5000", weights="fp8")
    assert "has no rate of float32; choose another --dtype" in why("agx-orin-64gb", "float32")
    assert "no published time to fit fp4" in why("agx-orin-64gb", weights="fp4")
    assert "profile of rtx-5090 has no rate of fp4" in why("rtx-5090", weights="fp4")
    old = replace(AGX, compute_capability=profiles.Figure("7.2", "unverified"))
    with pytest.raises(UnsupportedError, match="no constants are fitted"):
        cost.class_of(old)


MEASURED = {  # of a processor
    "float32 rows": 1e11, "int8 rows": 4e11, "int4/32 rows": 2e11, "int4/128 rows": 3e11, "attention rows": 5e10,
    "float32 row": 4e10, "int8 row": 3e10, "int4/32 row": 2e10, "int4/128 row": 2.5e10, "attention row": 1e10,
    "float32 start": 1e5, "int8 start": 8e4, "int4/32 start": 5e4, "int4/128 start": 6e4,
    "elements": 5e10, "operator": 1e6,
}  # fmt: skip


def rates(folder: Path, **changed: Any) -> Path:
    path = folder / "bench.json"
    path.write_text(json.dumps({"rates": {"version": 2, "median": MEASURED} | changed}))
    return path


@pytest.mark.parametrize(
    ("weights", "rows", "row", "start", "width", "products", "rounded"),
    [
        # bytes of a weight with its share of float32 scales: one per output channel, or per 128 weights
        ("as-is", 1e11, 4e10, 1e5, lambda inner: 4, 7, False),
        ("int8", 4e11, 3e10, 8e4, lambda inner: 1 + 4 / inner, 4, True),
        ("int4", 3e11, 2.5e10, 6e4, lambda inner: 0.5 + 4 / 128, 4, False),
    ],
)
def test_measured_rates_are_those_of_the_format(weights, rows, row, start, width, products, rounded, tmp_path, made):
    plan = made("7B", dtype="float32", weights=weights)
    report = cost.report(plan, profiles.load("cpu"), weights=weights, rates=rates(tmp_path))

    h, m, layers, n, vocab = 4096, 11008, 32, 832, 32064
    matrices = 4 * h * h + 3 * h * m
    attended = 4 * n * n * h / 5e10
    between = 4 * n * (10 * h + 6 * m) / 5e10 + 6 / 1e6
    scaled = 4 * n * (2 * (5 * h + 2 * m) + 4.25 * (3 * h + m)) / 5e10 + (7 + 4 * 5) / 1e6
    layer = 2 * n * matrices / rows + attended + between + rounded * scaled
    assert report["stages"][-1]["ms"] == pytest.approx(1e3 * layers * layer)

    read = 4 * h * h * width(h) + 2 * h * m * width(h) + h * m * width(m)
    caches = 4 * (n + 128) * h / 1e10
    one = read / row + products / start + caches + 4 * (10 * h + 6 * m) / 5e10 + 6 / 1e6
    of_head = (4e10, 1e5, 4) if weights == "as-is" else (3e10, 8e4, 1 + 4 / h)
    head = h * vocab * of_head[2] / of_head[0] + 1 / of_head[1]
    assert report["decode_ms"] == pytest.approx(1e3 * (layers * one + head))
    assert report["first_token_ms"] == pytest.approx(sum(s["ms"] for s in report["stages"]))
    assert report["held_out_error"] is None


def test_only_formats_that_were_measured_are_predicted(tmp_path, made):
    half = cost.report(made("2B"), profiles.load("cpu"), rates=rates(tmp_path))
    other = cost.report(made("2B", dtype="float32"), profiles.load("cpu"), weights="fp8", rates=rates(tmp_path))

    assert "the plan is float16 with as-is weights, vision float16; choose --dtype float32" in half["reason"]
    assert "the plan is float32 with fp8 weights" in other["reason"]


@pytest.mark.parametrize(("method", "options", "more"), OTHERS)
def test_loads_have_the_flops_of_the_plan(method, options, more, original):
    checkpoint = Checkpoint.open(original(method=method, side=8, **options))
    plan = plans.plan_of(checkpoint, method=method, options={"dtype": "float32"} | more)

    for work in cost.prompt_work(plan):
        flops = sum(work.load.get(name, 0) for name in ("float32 rows", "attention rows"))
        head = work.flops - flops  # one row of it, whose bytes count
        assert head in (0, planning.head_flops(plan.spec.decoder)) or work.name == "select"
        assert min(work.load.values(), default=0) >= 0


def test_measured_rates_say_why_a_method_does_not_pay(tmp_path, made):
    path = rates(tmp_path, median=MEASURED | {"float32 row": 1e7})
    report = cost.report(made("2B", keep=0.25, dtype="float32"), profiles.load("cpu"), rates=path)

    assert not report["pays"] and report["why_not"].startswith("reading the weights costs")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"median": None}, "holds no measured rates (TypeError"),
        ({"median": {}}, "holds no measured rates (KeyError 'float32 rows')"),
        ({"median": MEASURED | {"int8 row": 0}}, "the rate 'int8 row' is 0, expected a number above 0"),
        ({"median": MEASURED | {"int8 row": "x"}}, "holds no measured rates (ValueError"),
        ({"median": MEASURED | {"operator": -1}}, "the rate 'operator' is -1"),
        ({"version": 3}, "rates are of version 3, expected 2; make it with lvlm-edge bench BUNDLE --json"),
    ],
)
def test_a_file_without_rates_is_refused(changed, said, tmp_path):
    folder = written(tmp_path / "2b", "2B")

    assert said in refused(2, "plan", folder, "--rates", rates(tmp_path, **changed))
    with pytest.raises(UsageError):
        cost.measured(tmp_path / "none.json")


def test_rates_of_float32_alone_are_refused(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"rates": {"flops_per_second": 1e11, "bytes_per_second": 2e10}}))
    said = refused(2, "plan", written(tmp_path / "2b", "2B"), "--rates", tmp_path / "old.json")

    assert "old.json: rates are of version 1, expected 2; make it with lvlm-edge bench BUNDLE --json" in said


def test_plan_prints_the_prediction_and_the_error_beside_it(tmp_path):
    folder = written(tmp_path / "7b", "7B")
    arguments = ["plan", folder, "--device", "orin-nx-16gb", "--method", "fastv", "--weights", "int4"]
    said = " ".join(cli(*arguments, "--ratios", "0.95,0.5").stdout.split())

    found = json.loads(cli(*arguments, "--ratios", "0.95,0.5", "--json").stdout)["prediction"]
    for part in (
        f"first token {found['first_token_ms']:,.4g} ms, then {found['decode_ms']:,.3g} ms per token",
        f"none: first token {found['none']['first_token_ms']:,.4g} ms",
        f"first token {found['speed_up']:.2f} times as fast as none's; pays",
        "error on held-out times: median 8%, worst 40%; on this device 4%, 4%",
    ):
        assert part in said
    assert [row["pays"] for row in found["ratios"]] == [False, True]
    assert found["ratios"][1]["first_token_ms"] == found["first_token_ms"]  # the default ratio is 0.5
    assert "does not pay" in said


def test_plan_says_so_where_a_method_does_not_pay(tmp_path):
    folder = written(tmp_path / "7b", "7B")
    done = cli("plan", folder, "--device", "rtx-4090", "--method", "fastv", "--keep-ratio", "0.95")

    said = " ".join(done.stdout.split())
    assert "does not pay: the decoder is left with 96.6% of its FLOPs" in said
    assert "never compared on this device" in said


def test_plan_on_a_processor_predicts_no_times(tmp_path):
    assert "times not predicted: no constants" in " ".join(cli("plan", written(tmp_path / "2b", "2B")).stdout.split())


def test_ratios_are_for_methods_that_have_one(tmp_path):
    folder = written(tmp_path / "2b", "2B")

    assert "no option --keep-ratio" in refused(2, "plan", folder, "--ratios", "0.5")
    assert "keep_ratio is 1.5" in refused(2, "plan", folder, "--method", "fastv", "--ratios", "1.5")
    assert "not numbers" in refused(2, "plan", folder, "--method", "fastv", "--ratios", "a")


def test_constants_are_below_their_peaks():
    for constants in (cost.of_class(cost.constants(), n) for n in ("orin", "thor")):
        assert all(0 < share <= 1 for share in (*constants.efficiency.values(), constants.bandwidth))
        assert min(dataclasses.astuple(constants)[2:]) >= 0

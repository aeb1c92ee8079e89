"""Fits the constants of `exporter/devices/cost.json` on published times: `python samples/cost/fit.py [--write]`.

Rows of `edge_llm.json` in the table's order: the first, third, fifth and so on are fitted, the others held out. Fitted
are the logarithms of the constants, class by class, to the smallest sum of squared log ratios of predicted to
published times; errors are |predicted - published| / published of times, in ms per token for decode. INT4 is AWQ in
groups of 128 with a float16 scale, FP4 is NVFP4 in blocks of 16 with a float8 scale; lm_head and vision encoder are
float16, as Edge-LLM leaves them unless asked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import click

from lvlm_edge.exporter import planning
from lvlm_edge.exporter.checkpoints import spec
from lvlm_edge.exporter.devices import cost, profiles

HERE = Path(__file__).parent
TARGET = HERE.parents[1] / "exporter" / "devices" / "cost.json"
BYTES = {"int4": 0.5 + 2 / 128, "fp4": 0.5 + 1 / 16}
QUANTITIES = ("prefill of 2048", "prefill of a picture", "decode", "vision")
FORMATS = {"orin": ("float16", "int4"), "thor": ("float16", "int4", "fp4")}
START = {"efficiency": 0.3, "bandwidth": 0.8, "layer": 5e-5}


def decoder(sizes: dict) -> spec.DecoderSpec:
    """Qwen's decoders; the fields that no cost depends on are of no account."""
    rest = {"eps": 1e-6, "mlp_act": "silu", "qkv_bias": False, "o_bias": False, "mlp_bias": False, "tied": False}
    return spec.DecoderSpec(**sizes, **rest, window=None, max_positions=1 << 18, rope={})


def works(row: dict, models: dict) -> dict[str, cost.StageWork]:
    """What each published time of a row was spent on."""
    model = models[row["model"]]
    d, v = decoder(model["decoder"]), model["vision"]
    dq, dkv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    weights = d.layers * d.hidden * (2 * dq + 2 * dkv + 3 * d.ffn) * BYTES[row["weights"]] + 2 * d.hidden * d.vocab

    def prompt(rows: int) -> cost.StageWork:
        flops = d.layers * planning.layer_flops(d, rows, rows) + planning.head_flops(d)
        return cost.StageWork(name="prefill", flops=flops, bytes=weights, layers=d.layers)

    short, tokens = model["short"]
    h, patches = v["hidden"], 4 * tokens
    matrices = 4 * h * h + v["ffn_matrices"] * h * v["ffn"]
    seen = v["full"] * patches + (v["layers"] - v["full"]) * (v["window"] or 0)
    merger = (4 * h) ** 2 + 4 * h * d.hidden
    flops = 2 * patches * (v["layers"] * matrices + 6 * v["patch"] ** 2 * h) + 4 * patches * seen * h
    read = 2 * (v["layers"] * matrices + v["mergers"] * merger)
    caches = 2 * 2 * d.layers * dkv * 2048
    token = d.layers * planning.layer_flops(d, 1, 2048) + planning.head_flops(d)
    encoder = flops + 2 * tokens * v["mergers"] * merger
    done = (
        prompt(2048),
        prompt(short),
        cost.StageWork(name="decode", flops=token, bytes=weights + caches, layers=d.layers, decode=True),
        cost.StageWork(name="vision", flops=encoder, bytes=read, layers=v["layers"], vision=True),
    )
    return dict(zip(QUANTITIES, done, strict=True))


def published(row: dict) -> dict[str, float]:
    """Seconds."""
    times = (row["prefill_2048_ms"], row["prefill_short_ms"], 1e3 / row["decode_tokens_per_s"], row["vision_ms"])
    return {name: ms / 1e3 for name, ms in zip(QUANTITIES, times, strict=True)}


def predicted(row: dict, models: dict, constants: cost.Constants) -> dict[str, float]:
    """Seconds."""
    machine = cost.machine(profiles.load(row["device"]), constants, weights=row["weights"])
    return {name: work.seconds(machine) for name, work in works(row, models).items()}


def minimum(loss: Callable[[list[float]], float], at: list[float]) -> list[float]:
    """Where a loss is least: steps along one coordinate at a time, halved when none helps."""
    step, least = 0.5, loss(at)
    while step > 1e-4:
        tries = [[x + sign * step * (i == j) for j, x in enumerate(at)] for i in range(len(at)) for sign in (1, -1)]
        best = min(tries, key=loss)
        if loss(best) < least:
            at, least = best, loss(best)
        else:
            step /= 2
    return at


def unpacked(numbers: list[float], name: str) -> cost.Constants:
    """The constants of logarithms, to four digits; what is below a nanosecond is nothing."""
    found = [float(f"{math.exp(x):.4g}") for x in numbers]
    *efficiency, bandwidth, prompt_layer, decode_layer = [x if x > 1e-9 else 0.0 for x in found]
    shares = dict(zip(FORMATS[name], efficiency, strict=True))
    return cost.Constants(efficiency=shares, bandwidth=bandwidth, prompt_layer=prompt_layer, decode_layer=decode_layer)


def fitted(rows: list[dict], models: dict, name: str) -> cost.Constants:
    """The constants of a class, from its rows."""
    own = [r for r in rows if cost.class_of(profiles.load(r["device"])) == name]

    def loss(numbers: list[float]) -> float:
        found = unpacked(numbers, name)
        pairs = ((predicted(r, models, found), published(r)) for r in own)
        return sum(math.log(p[q] / t[q]) ** 2 for p, t in pairs for q in QUANTITIES)

    start = [START["efficiency"]] * len(FORMATS[name]) + [START["bandwidth"], START["layer"], START["layer"]]
    return unpacked(minimum(loss, [math.log(x) for x in start]), name)


def errors(rows: Iterable[dict], models: dict, classes: dict[str, cost.Constants]) -> dict[str, list[float]]:
    """|predicted - published| / published, by quantity, in the order of the rows."""
    found: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    for row in rows:
        times = predicted(row, models, classes[cost.class_of(profiles.load(row["device"]))])
        for name, truth in published(row).items():
            found[name].append(abs(times[name] - truth) / truth)
    return found


def summary(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    every = {"all": [e for errors in found.values() for e in errors]} | found
    return {k: {"median": round(median(e), 4), "worst": round(max(e), 4)} for k, e in every.items()}


def load() -> tuple[list[dict], dict, str]:
    data = json.loads((HERE / "edge_llm.json").read_text("utf-8"))
    return [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]], data["models"], data["source"]


def fit_all() -> tuple[dict[str, cost.Constants], list[dict], list[dict], dict]:
    """Constants of every class; the rows that they were fitted on, those held out, and the models."""
    rows, models, _ = load()
    own, held_out = rows[::2], rows[1::2]
    return {name: fitted(own, models, name) for name in FORMATS}, own, held_out, models


@click.command()
@click.option("--write", is_flag=True, help="Replace exporter/devices/cost.json.")
@click.option("--held-out/--no-held-out", default=True, help="Look at the rows that were held out.")
def main(write: bool, held_out: bool) -> None:
    classes, own, others, models = fit_all()
    for row in own + (others if held_out else []):
        found = predicted(row, models, classes[cost.class_of(profiles.load(row["device"]))])
        cells = [f"{n} {found[n] * 1e3:.1f} for {t * 1e3:.1f}" for n, t in published(row).items()]
        kind = "fitted  " if row in own else "held out"
        print(kind, row["device"], row["model"], row["weights"], "|", "; ".join(cells))
    result = {
        "fitted_with": "samples/cost/fit.py --write",
        "fitted_on": "every second published time of TensorRT Edge-LLM 0.10.0",
        "source": load()[2],
        "devices": sorted({r["device"] for r in own + others}),
        "classes": {
            n: {"efficiency": c.efficiency} | {k: getattr(c, k) for k in ("bandwidth", "prompt_layer", "decode_layer")}
            for n, c in classes.items()
        },
        "fitted": summary(errors(own, models, classes)),
    }
    if held_out:
        by_device = {d: errors([r for r in others if r["device"] == d], models, classes) for d in result["devices"]}
        result["held_out"] = summary(errors(others, models, classes))
        result["held_out_of"] = {d: summary(found)["all"] for d, found in by_device.items()}
    print(json.dumps(result, indent=1))
    if write:
        TARGET.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

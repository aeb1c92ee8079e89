"""Realised over predicted speed-up of FastV by keep ratio: `python samples/bench/ratios.py NONE FASTV`.

NONE and FASTV are bundles of one checkpoint with equal capacities, FASTV with several ratios (`--add-keep-ratio`). Each
ratio takes turns with NONE in one process, a fresh picture and prompt per turn. Speed-up is that of the decoder's
graphs from the first layer's input to the first token's logits, predicted by their FLOPs; encoder and projector are
left out.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import click
import numpy as np

from lvlm_edge.exporter.graphs import graph as graphs
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle import keep_ratios, open_bundle


def flops(bundle: Path, keep_ratio: float | None = None) -> int:
    """Of the portable graphs of a prompt."""
    opened = open_bundle(bundle, verify=False, keep_ratio=keep_ratio)
    return sum(graphs.flops(opened.path(g.file)) for g in opened.manifest.graphs if g.role == "prefill")


def prefill(pipe: Pipeline, seed: int, text: int) -> float:
    """Seconds of the graphs of one fresh prompt."""
    rng, image = np.random.default_rng(seed), pipe.manifest.image_token_id
    ids = rng.integers(3, image, text).tolist()
    shape = pipe.manifest.graph("vision").inputs[0].shape
    pipe.forget_images()
    picture = rng.standard_normal(shape).astype(np.float32)
    seconds = pipe.generate_tokens([*ids[:3], image, *ids[3:]], picture, max_new_tokens=1).seconds
    return sum(seconds[g.name] for g in pipe.manifest.graphs if g.role == "prefill")


@click.command()
@click.argument("none", type=click.Path(path_type=Path))
@click.argument("fastv", type=click.Path(path_type=Path))
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(none: Path, fastv: Path, rounds: int, threads: int) -> None:
    """A row per keep ratio."""
    dense = Pipeline.load(none, threads=threads)
    text = dense.manifest.counts.text_tokens
    print("| keep ratio | predicted | realised | realised / predicted | prefill ms, none | fastv |")
    print("|---|---|---|---|---|---|")
    for ratio in keep_ratios(fastv):
        pipe = Pipeline.load(fastv, keep_ratio=ratio, threads=threads)
        turns = [[prefill(p, seed, text) for p in (dense, pipe)] for seed in range(rounds + 1)][1:]
        predicted = flops(none) / flops(fastv, ratio)
        realised = median(a / b for a, b in turns)
        times = " | ".join(f"{median(t[i] for t in turns) * 1e3:.1f}" for i in (0, 1))
        share = realised / predicted
        print(f"| {ratio:g} | {predicted:.2f} | {realised:.2f} | {share:.2f} | {times} |", flush=True)
        del pipe


if __name__ == "__main__":
    main()

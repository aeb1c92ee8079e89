"""Bundles against transformers on one machine: `python samples/bench/compare.py`.

A random checkpoint (see make_checkpoint.py), a prompt of 676 tokens with 576 visual, float32, two threads. What
`lvlm-edge bench BUNDLE... --against CHECKPOINT` does, with checkpoint and bundles made first and the result as a
Markdown table: median and range of the time to first token and per decoded token, ratios to transformers, peak memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import click

from lvlm_edge.exporter.timing.bench import bench

HERE = Path(__file__).parent
TEXT = 100
BUNDLES = {"none": [], "fastv": ["--prune-layer", "2", "--keep-ratio", "0.25"]}


def prepare(work: Path, size: str) -> list[Path]:
    """The bundles, with their checkpoint where it is missing; prints what export needed."""
    checkpoint = work / size
    if not (checkpoint / "model.safetensors").exists():
        subprocess.run([sys.executable, HERE / "make_checkpoint.py", size, checkpoint], check=True)
    for name, options in BUNDLES.items():
        bundle = work / f"{size}-{name}"
        command = [
            sys.executable,
            "-m",
            "lvlm_edge.exporter.commands.main",
            "export",
            checkpoint,
            "-o",
            bundle,
            "--force",
            "-q",
        ]
        command += ["--method", name, "--max-text-tokens", str(TEXT), "--max-new-tokens", "64", *options]
        began = time.perf_counter()
        child = subprocess.Popen(command)
        _, status, usage = os.wait4(child.pid, 0)
        assert status == 0, f"export of {name} failed"
        weights = (checkpoint / "model.safetensors").stat().st_size
        written = sum(path.stat().st_size for path in bundle.iterdir())
        print(
            f"export {name}: {time.perf_counter() - began:.0f} s, peak {usage.ru_maxrss / 1e6:.2f} GB, bundle "
            f"{written / 1e6:,.0f} MB, {written / weights:.3f} of the checkpoint's weights"
        )
    return [work / f"{size}-{name}" for name in BUNDLES]


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench"), show_default=True)
@click.option("--size", default="smol", show_default=True)
@click.option("--rounds", default=7, show_default=True, help="Counted turns of each, after one that is not.")
@click.option("--threads", default=2, show_default=True)
def main(work: Path, size: str, rounds: int, threads: int) -> None:
    """Time to first token and per token of transformers, bundle none and bundle fastv, in turns."""
    report = bench(prepare(work, size), against=work / size, rounds=rounds, threads=threads, new_tokens=16)
    print(f"{size}, {TEXT} text tokens, float32, {threads} threads, median of {rounds} turns in alternation")
    print("| | first token ms | ratio | ms per token | ratio | peak GB |\n|---|---|---|---|---|---|")
    for row in report["contenders"]:
        cells = [row["name"]]
        for part in (row["first_token"], row["decode"]):
            cells.append(f"{part['median_ms']:.1f} ({part['low_ms']:.1f}-{part['high_ms']:.1f})")
            cells.append(f"{part['ratio']:.2f}")
        print(f"| {' | '.join(cells)} | {row['memory']['peak_bytes'] / 1e9:.2f} |")


if __name__ == "__main__":
    main()

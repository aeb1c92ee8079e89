"""Bundles against transformers on one machine: `python samples/bench/compare.py`.

A random checkpoint (see make_checkpoint.py), a prompt of 676 tokens with 576 visual, float32, two threads. Each
contender is a process of its own; they take turns, so that the machine's drift meets all alike. Printed: median time
to first token (picture already preprocessed) and per decoded token, ratios to transformers, and peak memory.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import click
import numpy as np

HERE = Path(__file__).parent
TEXT, BEFORE, NEW = 100, 35, 16
BUNDLES = {"none": [], "fastv": ["--prune-layer", "2", "--keep-ratio", "0.25"]}


def prompt(seed: int, image: int) -> tuple[list[int], np.ndarray]:
    """A fresh prompt with one image token, and a fresh picture."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, image, TEXT).tolist()
    return [*ids[:BEFORE], image, *ids[BEFORE:]], rng.standard_normal((1, 3, 336, 336)).astype(np.float32)


def transformers_contender(folder: str, threads: int):
    """Stock transformers with sdpa: (seconds to first token, seconds per decoded token) of a prompt."""
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.set_num_threads(threads)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.eval()
    image, count = model.config.image_token_id, model.config.image_seq_length

    @torch.no_grad()
    def once(seed: int) -> tuple[float, float]:
        ids, pixels = prompt(seed, image)
        tokens = torch.tensor([[t for i in ids for t in ([i] * count if i == image else [i])]])
        began = time.perf_counter()
        out = model(input_ids=tokens, pixel_values=torch.from_numpy(pixels), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(NEW - 1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return first - began, (time.perf_counter() - first) / (NEW - 1)

    return once


def bundle_contender(folder: str, threads: int):
    """A bundle on ONNX Runtime, the same way."""
    from lvlm_edge.runtime import Pipeline

    pipe = Pipeline.load(folder, threads=threads)

    def once(seed: int) -> tuple[float, float]:
        ids, pixels = prompt(seed, pipe.manifest.image_token_id)
        seconds = pipe.generate_tokens(ids, pixels, max_new_tokens=NEW, ignore_eos=True).seconds
        return seconds["first_token"], seconds["decode"] / (NEW - 1)

    return once


def serve(kind: str, folder: str, threads: int) -> None:
    """Answer seeds on stdin with timings and peak memory on stdout."""
    once = (transformers_contender if kind == "transformers" else bundle_contender)(folder, threads)
    for line in sys.stdin:
        first, each = once(int(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps([first, each, peak]), flush=True)


def start(kind: str, folder: Path, threads: int) -> subprocess.Popen:
    command = [sys.executable, __file__, "--serve", kind, "--work", str(folder), "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def prepare(work: Path, size: str) -> dict[str, Path]:
    """Checkpoint and bundles, made where missing; prints what export needed."""
    checkpoint = work / size
    if not (checkpoint / "model.safetensors").exists():
        subprocess.run([sys.executable, HERE / "make_checkpoint.py", size, checkpoint], check=True)
    for name, options in BUNDLES.items():
        bundle = work / f"{size}-{name}"
        command = [sys.executable, "-m", "lvlm_edge.exporter.cli", "export", checkpoint, "-o", bundle, "--force", "-q"]
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
    return {"transformers": checkpoint} | {name: work / f"{size}-{name}" for name in BUNDLES}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench"), show_default=True)
@click.option("--size", default="smol", show_default=True)
@click.option("--rounds", default=7, show_default=True, help="Counted turns of each, after one that is not.")
@click.option("--threads", default=2, show_default=True)
@click.option("--serve", "kind", hidden=True)
def main(work: Path, size: str, rounds: int, threads: int, kind: str | None) -> None:
    """Time to first token and per token of transformers, bundle none and bundle fastv, interleaved."""
    if kind is not None:
        serve(kind, str(work), threads)
        return
    running = {name: start(name, folder, threads) for name, folder in prepare(work, size).items()}
    found: dict[str, list[list[float]]] = {name: [] for name in running}
    for turn in range(rounds + 1):
        for name, process in running.items():
            process.stdin.write(f"{turn}\n")
            process.stdin.flush()
            found[name].append(json.loads(process.stdout.readline()))
    for process in running.values():
        process.stdin.close()
        process.wait()
    print(
        f"{size}, {TEXT + 576} tokens with 576 visual, float32, {threads} threads, median of {rounds} interleaved turns"
    )
    print("| | first token ms | ratio | ms per token | ratio | peak GB |\n|---|---|---|---|---|---|")
    base = found["transformers"]
    for name, turns in found.items():
        cells = []
        for column in (0, 1):
            ratio = median(a[column] / b[column] for a, b in zip(turns[1:], base[1:], strict=True))
            low, high = (f(t[column] for t in turns[1:]) * 1e3 for f in (min, max))
            cells += [f"{median(t[column] for t in turns[1:]) * 1e3:.1f} ({low:.1f}-{high:.1f})", f"{ratio:.2f}"]
        print(f"| {name} | {' | '.join(cells)} | {turns[-1][2] / 1e9:.2f} |")


if __name__ == "__main__":
    main()

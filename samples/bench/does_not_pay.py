"""Where the cost model says that FastV does not pay, timed: `python samples/bench/does_not_pay.py`.

Random checkpoints (make_checkpoint.py), float32, ONNX Runtime. Each case: bundles `none` and `fastv` in turns by
`lvlm-edge bench`, and the prediction of `lvlm-edge plan --rates` from the rates that this bench measured. Shares are of
the time to first token that FastV saves, timed ones by the median of the rounds' ratios and by the lowest times, which
a busy machine spoils least; less than 5 % does not pay. The last case is one that does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

from lvlm_edge.exporter import plan
from lvlm_edge.exporter.timing.bench import bench

HERE = Path(__file__).parent
CASES = {  # what it is: checkpoint, text tokens, share of the visual tokens kept
    "large encoder, small decoder": ("large-eye", 100, 0.25),
    "nearly all tokens kept": ("smol", 100, 0.95),
    "few visual tokens": ("small-picture", 512, 0.25),
    "a case that pays": ("smol", 100, 0.25),
}


def exported(work: Path, size: str, text: int, ratio: float | None) -> Path:
    """A bundle, made where it is missing: `none`, or FastV from layer 2 on."""
    options = [] if ratio is None else ["--method", "fastv", "--prune-layer", "2", "--keep-ratio", str(ratio)]
    bundle = work / "-".join([size, str(text), *(["none"] if ratio is None else ["fastv", str(ratio)])])
    if not bundle.is_dir():
        command = [sys.executable, "-m", "lvlm_edge.exporter.commands.main", "export", work / size, "-o", bundle, "-q"]
        command += ["--max-text-tokens", str(text), "--max-new-tokens", "8", *options]
        subprocess.run(command, check=True)
    return bundle


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench"), show_default=True)
@click.option("--rounds", default=31, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--case", "names", multiple=True, default=list(CASES), help="Only this one.")
def main(work: Path, rounds: int, threads: int, names: tuple[str, ...]) -> None:
    """Print the table."""
    print("| | predicted | timed | lowest | first token ms, none | fastv | why not |\n|---|---|---|---|---|---|---|")
    for name in names:
        size, text, ratio = CASES[name]
        if not (work / size / "model.safetensors").exists():
            subprocess.run([sys.executable, HERE / "make_checkpoint.py", size, work / size], check=True)
        bundles = [exported(work, size, text, None), exported(work, size, text, ratio)]
        report = bench(bundles, rounds=rounds, threads=threads, new_tokens=2)
        (work / "bench.json").write_text(json.dumps(report))
        options = {"prune_layer": 2, "keep_ratio": ratio, "max_text_tokens": text, "max_new_tokens": 8}
        found = plan(work / size, method="fastv", device="cpu", rates=work / "bench.json", **options)["prediction"]
        none, fastv = (row["first_token"] for row in report["contenders"])
        shares = (1 - 1 / found["speed_up"], 1 - fastv["ratio"], 1 - fastv["low_ms"] / none["low_ms"])
        times = [f"{row['median_ms']:.0f} ({row['low_ms']:.0f}-{row['high_ms']:.0f})" for row in (none, fastv)]
        cells = [name, *(f"{share:.1%}" for share in shares), *times, found["why_not"] or "it pays"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

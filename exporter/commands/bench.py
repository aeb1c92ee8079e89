"""`lvlm-edge bench`: latency and peak memory of bundles on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lvlm_edge.exporter.commands.options import AT_LEAST_1, ENGINES, FROM_0, JSON
from lvlm_edge.exporter.commands.output import progress_bar, show, table


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    default=["ort"],
    show_default=True,
    help="Backend that runs the bundles: ort (ONNX Runtime on the CPU), ort-cuda (the same on an NVIDIA GPU), trt "
    "(TensorRT) or trt-rtx (TensorRT-RTX); may be given repeatedly.",
)
@click.option(
    "--keep-ratio",
    "keep_ratios",
    type=float,
    multiple=True,
    help="Keep ratio (kept / all visual tokens) to time, one that every bundle holds: `lvlm-edge inspect` lists "
    "them. May be given repeatedly.  "
    "[default: the one each was exported with]",
)
@click.option("--against", help="Checkpoint of the first bundle, to time PyTorch with too: folder or Hugging Face id.")
@click.option("--rounds", type=AT_LEAST_1, default=7, show_default=True, help="Number of measured rounds.")
@click.option("--warm-up", type=FROM_0, default=1, show_default=True, help="Number of warm-up rounds, not measured.")
@ENGINES
@click.option("--threads", type=AT_LEAST_1, help="CPU threads.  [default: all that this process may use]")
@click.option("--text-tokens", type=int, help="Text tokens of a prompt, at least 1.  [default: the smallest capacity]")
@click.option(
    "--new-tokens", type=int, help="Tokens of an answer, at least 2.  [default: 16, or the smallest capacity if less]"
)
@click.option("--seed", type=FROM_0, default=0, show_default=True, help="Seed of the random images and prompts.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Write a chart of the stages and their lower bounds to this file.",
)
@click.option("--no-verify", is_flag=True, help="Skip verifying the bundles' files by their hashes.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress bar.")
@JSON
def bench(
    bundles: tuple[Path, ...],
    backends: tuple[str, ...],
    keep_ratios: tuple[float, ...],
    against: str | None,
    plot: Path | None,
    no_verify: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Time bundles on this machine, stage by stage.

    Prints time to first token by stage, time per token and peak memory, with the lower bounds and predictions that the
    machine's measured rates give.
    """
    from lvlm_edge.exporter.timing import bench as benched
    from lvlm_edge.exporter.timing import chart

    if plot is not None:
        chart.check(plot)
    with progress_bar(quiet) as progress:
        report = benched.bench(
            bundles,
            backends=backends,
            keep_ratios=keep_ratios,
            against=against,
            verify=not no_verify,
            progress=progress,
            **options,
        )
    if plot is not None:
        chart.save(report, plot)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        _print_bench(report)


def _print_bench(report: dict[str, Any]) -> None:
    rates = report["rates"]
    show(
        f"{report['machine']['processor']}, {report['threads']} thread(s); prompts of {report['text_tokens']} text "
        f"tokens, answers of {report['new_tokens']}; medians of {report['rounds']} turns"
    )
    if rates:
        for end, unit, kind in ((" rows", "FLOP/s", "many rows"), (" row", "bytes/s", "one row")):
            names = [n for n in rates["best"] if n.endswith(end) and rates["units"][n] == unit]
            found = ", ".join(f"{n.removesuffix(end)} {rates['best'][n] / 1e9:,.1f}" for n in names)
            show(f"this machine, {kind}: {found} G{unit.replace('bytes', 'B')}")
    for row in report["contenders"]:
        rows = table(row["name"], "ms", "lowest to highest", "floor ms", "times floor", "predicted ms")
        for part in (*row["stages"], row["first_token"] | {"name": "first token"}, row["decode"]):
            figures = [f"{part['median_ms']:,.4g}", f"{part['low_ms']:,.4g} to {part['high_ms']:,.4g}"]
            if "floor_ms" in part:
                figures += [f"{part['floor_ms']:,.3g}", f"{part['times_floor']:.2f}", f"{part['predicted_ms']:,.3g}"]
            rows.add_row(part["name"], *figures)
        memory, first, each = row["memory"], row["first_token"], row["decode"]
        anonymous = memory["anonymous_bytes"]
        rest = "" if anonymous is None else f", {anonymous / 1e9:,.2f} GB without pages of mapped files"
        show(
            rows,
            f"{1e3 / each['median_ms']:,.1f} tokens/s; peak memory {memory['peak_bytes'] / 1e9:,.2f} GB{rest}",
            f"first token {first['ratio']:.2f}, decode {each['ratio']:.2f} of the time of {row['ratio_to']}",
        )
    for note in report["notes"]:
        show(note)

"""`lvlm-edge quantize`: checkpoint to checkpoint with INT4 matrices, calibrated on images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lvlm_edge.exporter.commands.options import AT_LEAST_1, FROM_0, JSON, REVISION
from lvlm_edge.exporter.commands.output import progress_bar


@click.command()
@click.argument("checkpoint")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint to write."
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    required=True,
    help="Images to calibrate on, like those that the model will see: a folder, or a .jsonl file with a line "
    '{"image": path, "prompt": text, "answer": text} each; the answer is optional.',
)
@click.option(
    "--algorithm",
    default="awq",
    show_default=True,
    help="awq (per-channel scales, folded into the preceding layer) or gptq (compensates each column's rounding error "
    "in the columns that follow; slower, for small models).",
)
@click.option(
    "--block-size",
    default=128,
    show_default=True,
    help="Input channels that share a scale: 128 or 32. Where 128 does not divide a matrix, 32 is used.",
)
@click.option(
    "--samples", type=AT_LEAST_1, default=128, show_default=True, help="Images to calibrate on, chosen at random."
)
@click.option("--prompt", default="Describe the picture.", show_default=True, help="Prompt for the images of a folder.")
@click.option(
    "--seed", type=FROM_0, default=0, show_default=True, help="Seed of the random choice of images and activations."
)
@REVISION
@click.option("--force", is_flag=True, help="Replace an existing quantized checkpoint.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@JSON
def quantize(checkpoint: str, output: Path, quiet: bool, as_json: bool, **options: Any) -> None:
    """Quantize a decoder to INT4, calibrated on images.

    Writes a checkpoint of the same family. Needs the extra `quantize`. The whole model is held in memory in float32,
    with samples of the inputs of its matrices: about 40 GB for a decoder of 7 B parameters.
    """
    from lvlm_edge.exporter import quantize as quantised

    with progress_bar(quiet) as progress:
        report = quantised(checkpoint, output, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    elif not quiet:
        counts = ", ".join(f"{count} of blocks of {size}" for size, count in report["matrices"].items())
        kept = f"; {len(report['kept'])} stay as they are" if report["kept"] else ""
        click.echo(f"{output}: {report['bytes'] / 1e6:,.1f} MB; INT4 matrices: {counts or 'none'}{kept}")

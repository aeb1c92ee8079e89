"""`lvlm-edge export`: checkpoint to bundle, or one more keep ratio for a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lvlm_edge.exporter.commands.options import JSON, REVISION, MethodCommand, device_of, given, settings_of
from lvlm_edge.exporter.commands.output import progress_bar
from lvlm_edge.runtime.errors import UsageError


@click.command(cls=MethodCommand)
@click.argument("checkpoint")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the bundle to write; required without --add-keep-ratio.",
)
@click.option(
    "--add-keep-ratio",
    type=float,
    help="Keep ratio, above 0 and at most 1, to add to an existing FastV bundle: CHECKPOINT is then the bundle, and no "
    "--output is given. The added graphs share the bundle's weights.",
)
@REVISION
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option(
    "--weights",
    default="as-is",
    show_default=True,
    help="Weight format of the decoder's matrices: as-is (keeps the integers of a quantized checkpoint), float "
    "(dequantizes them), int8 (one scale per output channel) or int4 (one scale per block of input channels).",
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@JSON
def export(
    checkpoint: str,
    output: Path | None,
    add_keep_ratio: float | None,
    method: str,
    revision: str | None,
    force: bool,
    weights: str,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Export a checkpoint to a bundle of ONNX graphs and weights.

    CHECKPOINT is a folder or a Hugging Face id. Every shape is fixed: the options say how many images, text tokens and
    new tokens the bundle holds.
    """
    if add_keep_ratio is not None:
        _add_keep_ratio(Path(checkpoint), add_keep_ratio, quiet, as_json)
        return
    if output is None:
        raise UsageError("export: --output is missing; say where the bundle goes, as in -o BUNDLE")
    device = device_of(options)
    settings = settings_of(options, device)
    if device.kind != "cpu" or given("device"):  # the bundle may be for another machine than this one
        from lvlm_edge.exporter import check_fit

        check_fit(checkpoint, device, method=method, revision=revision, weights=weights, **settings)
    from lvlm_edge.exporter import export as exported

    with progress_bar(quiet) as progress:
        exported(
            checkpoint,
            output,
            method=method,
            revision=revision,
            force=force,
            weights=weights,
            ort=device.backend == "ort",
            progress=progress,
            **settings,
        )
    if as_json:
        click.echo((output / "manifest.json").read_text("utf-8"))
    elif not quiet:
        size = sum(path.stat().st_size for path in output.iterdir())
        click.echo(f"{output}: {size / 1e6:,.1f} MB; next: lvlm-edge check {output} --against {checkpoint}")


def _add_keep_ratio(bundle: Path, keep_ratio: float, quiet: bool, as_json: bool) -> None:
    from lvlm_edge.exporter.bundles import ratios
    from lvlm_edge.runtime.bundle import ratio_text

    context = click.get_current_context()
    known = {"checkpoint", "add_keep_ratio", "quiet", "as_json"}
    others = [f"--{name.replace('_', '-')}" for name in context.params if name not in known and given(name)]
    if others:
        raise UsageError(f"export: --add-keep-ratio takes the bundle's own settings; leave out {', '.join(others)}")
    with progress_bar(quiet) as progress:
        written = ratios.add(bundle, keep_ratio, progress)
    if as_json:
        click.echo(written.read_text("utf-8"))
    elif not quiet:
        ratio = ratio_text(keep_ratio)
        click.echo(f"{bundle}: keep ratio {ratio} added; next: lvlm-edge run {bundle} --keep-ratio {ratio}")

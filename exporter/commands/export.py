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
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the bundle to write.")
@click.option(
    "--add-keep-ratio",
    type=float,
    help="Write no new bundle: CHECKPOINT is a bundle, and graphs for this keep ratio are added to it. They use the "
    "weights that it holds.",
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
    """Checkpoint to bundle: static-shape graphs, weights, tokenizer, manifest."""
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
        click.echo(
            f"{bundle}: keep ratio {keep_ratio:g} added; next: lvlm-edge run {bundle} --keep-ratio {keep_ratio:g}"
        )

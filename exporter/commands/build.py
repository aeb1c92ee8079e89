"""`lvlm-edge build`: TensorRT engines of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lvlm_edge.exporter.commands.options import ENGINES, JSON, KEEP_RATIO, device_option
from lvlm_edge.exporter.commands.output import progress_bar


class DeviceCommand(click.Command):
    """A command that requires `--device`."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        return [*params[:-1], device_option(required=True), params[-1]]


@click.command(cls=DeviceCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@KEEP_RATIO
@click.option(
    "--compute-capability",
    "targets",
    multiple=True,
    help="Compute capability to build for, like 8.9, or portable (TensorRT-RTX only); may be given repeatedly.  "
    "[default: the device's]",
)
@click.option(
    "--graph",
    "graphs",
    multiple=True,
    help="Graph to build, by its name in `lvlm-edge inspect`; may be given repeatedly.  [default: all graphs]",
)
@click.option(
    "--optimisation-level",
    type=click.IntRange(0, 5),
    help="TensorRT's builder optimization level, from 0 (builds fast) to 5 (runs fast).  [default: TensorRT's]",
)
@ENGINES
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@JSON
def build(
    bundle: Path,
    keep_ratio: float | None,
    device: str,
    targets: tuple[str, ...],
    graphs: tuple[str, ...],
    optimisation_level: int | None,
    engines: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build TensorRT engines of a bundle for a device.

    Engines are put into this user's cache folder and not into the bundle. Those that are up to date are kept: a build
    that was interrupted goes on where it stopped.
    """
    from lvlm_edge.exporter.devices import engine, profiles

    profile = profiles.find(device)
    own = profile.compute_capability
    settings = engine.Settings(
        backend=profile.backend,
        compute_capabilities=targets or (own.value if own else engine.PORTABLE,),
        optimisation_level=optimisation_level,
    )
    built = set()
    with progress_bar(quiet) as bar:

        def progress(what: str, done: int, total: int) -> None:
            built.add(what.partition(":")[0])
            bar(what, done, total)

        out = engine.build(
            bundle, settings, graphs=graphs or None, keep_ratio=keep_ratio, engines=engines, progress=progress
        )
    record = json.loads((out / engine.ENGINES).read_text("utf-8"))
    if as_json:
        click.echo(json.dumps(record, indent=1))
    elif not quiet:
        size = sum(entry["size"] for entry in record["engines"].values())
        click.echo(
            f"{out}: {len(record['engines'])} engines, {len(built)} of them built now, {size / 1e6:,.1f} MB, "
            f"{record['flavour']} {record['version']}"
        )

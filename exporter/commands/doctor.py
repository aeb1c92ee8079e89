"""`lvlm-edge doctor`: what this machine has, and what works with it."""

from __future__ import annotations

import json
from typing import Any

import click

from lvlm_edge.exporter.commands.options import JSON


@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """Show what this machine has, what works, and what to install.

    Reports packages, GPU and JetPack.
    """
    from lvlm_edge.exporter.devices import doctor as examined

    found = examined.report()
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _print_doctor(found)


def _print_doctor(found: dict[str, Any]) -> None:
    memory = "" if found["memory_bytes"] is None else f", {found['memory_bytes'] / 1e9:,.1f} GB"
    click.echo(f"Python {found['python']} on {found['platform']}{memory}; device {found['device'] or 'unknown'}")
    if found["device_problem"]:
        click.echo(found["device_problem"])
    if found["jetpack"]:
        pack = found["jetpack"]
        click.echo(f"JetPack {pack['release']} (L4T {found['l4t']}), which brings TensorRT {pack['tensorrt']}")
    for gpu in found["gpus"]:
        click.echo(
            f"GPU {gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_bytes'] / 1e9:,.1f} GB"
        )
    click.echo("packages: " + ", ".join(f"{k} {v}" for k, v in found["packages"].items() if v))
    for part in found["parts"]:
        click.echo(f"{'works' if part['works'] else 'no   '}  {part['name']}: {part['why']}")
        if part["install"]:
            click.echo(f"       {part['install']}")

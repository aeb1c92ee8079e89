"""`lvlm-edge devices`: the known devices, and every figure of one with its source."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from typing import Any

import click

from lvlm_edge.exporter.commands.options import JSON


@click.command()
@click.argument("profile", required=False)
@JSON
def devices(profile: str | None, as_json: bool) -> None:
    """List the known devices, or every figure of one with its source."""
    from lvlm_edge.exporter.devices import profiles

    found = [profiles.find(profile)] if profile else [profiles.load(name) for name in profiles.names()]
    if as_json:
        rows = [dataclasses.asdict(p) | {"backends": p.backends} for p in found]
        click.echo(json.dumps(rows[0] if profile else rows, indent=1))
    elif profile:
        _print_device(found[0])
    else:
        _print_devices(found)


def _print_devices(found: list[Any]) -> None:
    rows = [("device", "GB", "GB/s", "TFLOPS", "compute", "backend", "lowering", "JetPack", "TensorRT")]
    for p in found:
        figures = (p.memory_gb, p.bandwidth_gb_s, p.tflops and p.tflops["float16"], p.compute_capability)
        release = (p.release.version, p.release.tensorrt) if p.release else ("", "")
        rows.append((p.name, *(_value(f) if f else "" for f in figures), p.backend, p.lowering, *release))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # no rich table: it would cut the names on a narrow terminal
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    also = ", ".join(p.name for p in found if len(p.backends) > 1)
    click.echo("\n" + textwrap.fill(f"ort-cuda runs on these too: {also}", 80))
    click.echo("\nTFLOPS: float16, dense; lvlm-edge devices DEVICE explains one, with the source of every figure")


def _value(figure: Any) -> str:
    value = figure.value
    return ", ".join(value) if isinstance(value, tuple) else value if isinstance(value, str) else f"{value:g}"


def _print_device(p: Any) -> None:
    """Every figure of a profile with its source; long addresses are not cut."""
    click.echo(f"{p.name}: {p.description}")
    click.echo(f"backend {' or '.join(p.backends)}, lowering {p.lowering}, dtypes {', '.join(p.dtypes)}")
    figures = {
        "weight formats": p.quantised,
        "compute capability": p.compute_capability,
        "memory GB": p.memory_gb,
        "usable share": p.usable_share,
        "bandwidth GB/s": p.bandwidth_gb_s,
        "power modes": p.power_modes,
    } | {f"{dtype} TFLOP/s": figure for dtype, figure in (p.tflops or {}).items()}
    for name, figure in figures.items():
        if figure is not None:
            click.echo(f"{name}: {_value(figure)}  [{_source(figure)}]")
    for row in p.jetpacks:
        click.echo(
            f"JetPack {row.version}{' (assumed)' if row == p.release else ''}: L4T {row.l4t}, TensorRT {row.tensorrt}, "
            f"CUDA {row.cuda}, Python {row.python}; parses {' and '.join(row.lowerings) or 'neither lowering'}  "
            f"[{_source(row)}]"
        )


def _source(figure: Any) -> str:
    return f"{figure.source}; {figure.note}" if figure.note else str(figure.source)

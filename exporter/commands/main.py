"""The command `lvlm-edge`. Heavy imports are inside the commands, so that help is quick."""

from __future__ import annotations

import click

from lvlm_edge.exporter.commands.bench import bench
from lvlm_edge.exporter.commands.build import build
from lvlm_edge.exporter.commands.check import check
from lvlm_edge.exporter.commands.devices import devices
from lvlm_edge.exporter.commands.doctor import doctor
from lvlm_edge.exporter.commands.errors import Errors
from lvlm_edge.exporter.commands.export import export
from lvlm_edge.exporter.commands.inspect import inspect
from lvlm_edge.exporter.commands.plan import plan
from lvlm_edge.exporter.commands.quantize import quantize
from lvlm_edge.exporter.commands.run import run


@click.group(
    cls=Errors,
    commands=[bench, build, check, devices, doctor, export, inspect, plan, quantize, run],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="lvlm-edge")
def main() -> None:
    """Vision-language models with fewer visual tokens, as static graphs that run without PyTorch.

    Exit codes: 0 done; 1 a check failed or the work could not be done; 2 wrong usage; 3 unsupported model or method; 4
    does not fit the device; 5 the bundle or engine does not match this machine, is damaged or was altered; 130 stopped.
    """


if __name__ == "__main__":
    main()

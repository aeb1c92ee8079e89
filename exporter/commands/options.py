"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any

import click

from lvlm_edge.runtime.errors import UnsupportedError, nearest

AT_LEAST_1, FROM_0 = click.IntRange(min=1), click.IntRange(min=0)


def pair(value: str) -> tuple[int, int]:
    """Two whole numbers above 0, from `WxH` or `RxC`."""
    found = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not two numbers above 0 like 672x336")
    return int(found[1]), int(found[2])


def shares(value: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in value.split(",") if part)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not numbers like 0.75,0.5") from error


def device_option(**attributes: Any) -> click.Option:
    """`--device`, with the names of the known devices in its help.

    Args:
        attributes: of the click option.
    """
    from lvlm_edge.exporter.devices import profiles

    names = ", ".join(profiles.names())
    text = f"Target device: {names}, or auto for this machine. NAME@RELEASE names a Jetson's JetPack, like 6.2."
    return click.Option(["--device"], help=text, **attributes)


OF_DEVICE = ("dtype", "lowering")  # whose defaults are the device's
OWN = ("weights",)  # options that commands have themselves


KEEP_RATIO = click.option(
    "--keep-ratio",
    type=float,
    help="Keep ratio (kept / all visual tokens) to use, one that the bundle holds: `lvlm-edge inspect` lists them.  "
    "[default: the one it was exported with]",
)

BACKEND = click.option(
    "--backend",
    default="ort",
    show_default=True,
    help="Backend that runs the graphs: ort (ONNX Runtime on the CPU), ort-cuda (the same on an NVIDIA GPU), trt "
    "(TensorRT) or trt-rtx (TensorRT-RTX).",
)

ENGINES = click.option(
    "--engines",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of TensorRT engines, which are code that will be run.  [default: ~/.cache/lvlm-edge/engines]",
)

REVISION = click.option("--revision", help="Branch, tag or commit, if CHECKPOINT is a Hugging Face id.")

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")


class MethodCommand(click.Command):
    """A command with `--method`, the capacities and settings of an export, and the settings of every method.

    They are the fields of `planning.Capacity` and `planning.Settings`, and of the `Config` classes in
    `exporter/methods/`. A field's metadata has its `help`, the words that it takes (`choices`), and, where the field's
    own default is not what applies, the `default` to print.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from lvlm_edge.exporter.planning import Capacity, Settings

        params = super().get_params(ctx)
        device = device_option(default="cpu", show_default=True)
        own = [*_fields(Capacity), device, *_fields(Settings)]
        return [*params[:-1], _method_option(), *own, *_method_settings(), params[-1]]


def _method_option() -> click.Option:
    from lvlm_edge.exporter import methods

    names = methods.names()
    text = f"Token-reduction method: {', '.join(names[:-1])} or {names[-1]}."
    return click.Option(["--method"], default="none", show_default=True, help=text)


def _method_settings() -> list[click.Option]:
    from lvlm_edge.exporter import methods

    options: dict[str, click.Option] = {}
    for name in methods.names():
        for option in _fields(methods.load(name).config, f"{name}: "):
            options.setdefault(option.opts[0], option)
    return list(options.values())


def _fields(record: type, prefix: str = "") -> list[click.Option]:
    """The fields of a dataclass as options; None where one is not given."""
    hints = typing.get_type_hints(record)
    fields = [field for field in dataclasses.fields(record) if field.name not in OWN]
    return [_option(field, hints[field.name], prefix) for field in fields]


def _option(field: dataclasses.Field[Any], hint: Any, prefix: str) -> click.Option:
    flag, known = "--" + field.name.replace("_", "-"), field.metadata
    text = prefix + known["help"].rstrip(".") + "."
    default = "the device's" if field.name in OF_DEVICE else known.get("default", field.default)
    if hint is bool and default is False:
        return click.Option([flag], is_flag=True, default=None, help=text)
    if default is not None and default != ():
        text += f"  [default: {default}]"
    if known.get("metavar"):
        several = known["metavar"] == "WxH"
        return click.Option([flag], type=pair, metavar=known["metavar"], multiple=several, help=text)
    return click.Option([flag], type=_plain(hint), help=text)


def _plain(hint: Any) -> Any:
    """`int | None` and the like as the type to parse."""
    if isinstance(hint, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def device_of(options: dict[str, Any]) -> Any:
    """The profile that `--device` names, taken out of the options."""
    from lvlm_edge.exporter.devices import profiles

    return profiles.find(options.pop("device"))


def given(option: str) -> bool:
    """Whether an option of the running command was given, not left at its default."""
    return click.get_current_context().get_parameter_source(option) is not click.core.ParameterSource.DEFAULT


def settings_of(options: dict[str, Any], device: Any) -> dict[str, Any]:
    """Options that were given; dtype and lowering from the device's profile where they were not."""
    from lvlm_edge.exporter.devices import profiles

    chosen = {"dtype": options["dtype"] or device.default_dtype, "lowering": options["lowering"] or device.lowering}
    for key, known in (("dtype", profiles.CHOICES["dtypes"]), ("lowering", profiles.CHOICES["lowering"])):
        # What a device with TensorRT lacks is for `fit` to say; the graphs of the others are ONNX Runtime's.
        choices = device.dtypes if key == "dtype" and device.kind == "cpu" else known
        if chosen[key] not in choices:
            raise UnsupportedError(
                f"{key}: {chosen[key]!r} is not one of {device.name}'s; {nearest(chosen[key], choices)}"
            )
    return {k: v for k, v in (options | chosen).items() if v is not None}

"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
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


CAPACITY = (
    click.Option(["--num-images"], default=1, show_default=True, help="Images of a prompt, at least 1."),
    click.Option(
        ["--max-text-tokens"],
        default=256,
        show_default=True,
        help="Capacity for text tokens of a prompt, before and after the images, begin-of-sequence included.",
    ),
    click.Option(
        ["--image-size"],
        type=pair,
        metavar="WxH",
        help="Width and height in pixels of the images to come. Sets the tiles of an any-resolution checkpoint.",
    ),
    click.Option(
        ["--grid"],
        type=pair,
        metavar="RxC",
        help="Rows and columns of tiles of an any-resolution checkpoint, instead of --image-size.",
    ),
    click.Option(
        ["--max-new-tokens"], default=128, show_default=True, help="Capacity for tokens of an answer, at least 1."
    ),
    click.Option(
        ["--dtype"],
        help="Number format of activations, caches and weights that are not integers: float32, float16 or bfloat16.  "
        "[default: the device's]",
    ),
    click.Option(
        ["--lowering"],
        help="Operators of the graphs: modern (ONNX opset 24) or legacy (opset 18).  [default: the device's]",
    ),
    click.Option(
        ["--device"],
        default="cpu",
        show_default=True,
        help="Profile of the target device: NAME, NAME@JETPACK, or auto for this machine's. `lvlm-edge devices` lists "
        "the names.",
    ),
    click.Option(
        ["--share-weights"],
        is_flag=True,
        help="Run prompt and decode in the same graphs, so that engines hold one copy of the decoder's weights.",
    ),
    click.Option(
        ["--vision-weights"],
        help="Weight format of the vision encoder and projector: as-is, float, int8 or int4.  [default: as-is]",
    ),
    click.Option(
        ["--head-weights"],
        help="Weight format of lm_head: as-is, float, int8 or int4.  [default: int8 if --weights is int8 or int4, else "
        "the same as --weights]",
    ),
    click.Option(
        ["--block-size"], type=int, help="Input channels that share an INT4 scale: 32 or 128.  [default: 128]"
    ),
    click.Option(
        ["--max-graph-gb"],
        type=float,
        help="Largest weights of one decoder graph in GB, above 0. A larger decoder is split into several graphs.  "
        "[default: 8]",
    ),
)


KEEP_RATIO = click.option(
    "--keep-ratio",
    type=float,
    help="Keep ratio (kept / all visual tokens) to use, one of those that the bundle holds.  [default: the one it was "
    "exported with]",
)

BACKEND = click.option(
    "--backend",
    default="ort",
    show_default=True,
    help="Backend that runs the graphs: ort (ONNX Runtime), trt (TensorRT) or trt-rtx (TensorRT-RTX).",
)

REVISION = click.option("--revision", help="Branch, tag or commit, if CHECKPOINT is a Hugging Face id.")

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")


class MethodCommand(click.Command):
    """A command with `--method`, the capacity options, and the settings of every method.

    The settings are read from the `Config` classes in `exporter/methods/`; a field's metadata has its `help` and, where
    the field's own default is not what applies, the `default` to print.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        return [*params[:-1], _method_option(), *CAPACITY, *_method_settings(), params[-1]]


def _method_option() -> click.Option:
    from lvlm_edge.exporter import planning

    names = planning.method_names()
    text = f"Token-reduction method: {', '.join(names[:-1])} or {names[-1]}."
    return click.Option(["--method"], default="none", show_default=True, help=text)


def _method_settings() -> list[click.Option]:
    from lvlm_edge.exporter import planning

    options: dict[str, click.Option] = {}
    for name in planning.method_names():
        config = planning.method(name).Config
        hints = typing.get_type_hints(config)
        for setting in dataclasses.fields(config):
            flag = "--" + setting.name.replace("_", "-")
            default = setting.metadata.get("default", setting.default)
            text = f"{name}: {setting.metadata['help']}." + ("" if default is None else f"  [default: {default}]")
            options.setdefault(flag, click.Option([flag], type=_plain(hints[setting.name]), help=text))
    return list(options.values())


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

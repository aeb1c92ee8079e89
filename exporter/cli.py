"""Command line: verbs on checkpoints and bundles. Heavy imports are inside the commands, so that help is quick."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from lvlm_edge.runtime.errors import LvlmEdgeError, UnsupportedError, UsageError, nearest

AT_LEAST_1, FROM_0 = click.IntRange(min=1), click.IntRange(min=0)


def _pair(value: str) -> tuple[int, int]:
    """Two whole numbers above 0, from `WxH` or `RxC`."""
    found = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not two numbers above 0 like 672x336")
    return int(found[1]), int(found[2])


def _shares(value: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in value.split(",") if part)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not numbers like 0.75,0.5") from error


CAPACITY = (
    click.Option(["--num-images"], default=1, show_default=True, help="Images in a prompt."),
    click.Option(
        ["--max-text-tokens"],
        default=256,
        show_default=True,
        help="Text tokens of a prompt before and after the images, begin-of-sequence included.",
    ),
    click.Option(
        ["--image-size"], type=_pair, metavar="WxH", help="Size of the pictures to come, for any-resolution tiles."
    ),
    click.Option(["--grid"], type=_pair, metavar="RxC", help="Rows and columns of any-resolution tiles instead."),
    click.Option(["--max-new-tokens"], default=128, show_default=True, help="Tokens of an answer."),
    click.Option(["--dtype"], help="float32, float16 or bfloat16.  [default: the device's]"),
    click.Option(["--lowering"], help="modern (opset 24) or legacy (opset 18).  [default: the device's]"),
    click.Option(
        ["--device"],
        default="cpu",
        show_default=True,
        help="Profile (lvlm-edge devices), as NAME or NAME@JETPACK, or auto for this machine's.",
    ),
    click.Option(
        ["--share-weights"],
        is_flag=True,
        help="Prompt and decode run in the same graphs: engines hold one copy of the weights, for small boards.",
    ),
    click.Option(["--vision-weights"], help="The same for encoder and projector.  [default: as-is]"),
    click.Option(
        ["--head-weights"], help="The same for lm_head.  [default: int8 where the decoder's are rounded, else theirs]"
    ),
    click.Option(["--block-size"], type=int, help="Input channels of an INT4 scale, 32 or 128.  [default: 128]"),
    click.Option(
        ["--max-graph-gb"],
        type=float,
        help="GB of weights that one decoder graph may hold; more are split into several.  [default: 8]",
    ),
)


KEEP_RATIO = click.option(
    "--keep-ratio", type=float, help="One of those that the bundle holds.  [default: its export's]"
)


class Errors(click.Group):
    """A group that prints every error a user can act on as one line and exits with its code."""

    def main(self, args: Any = None, prog_name: Any = None, *_: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except click.ClickException as error:
            if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
                error.show()
            else:
                _print_error(_usage(error))
            code = error.exit_code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LvlmEdgeError as error:
            _print_error(str(error))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            _print_error("stopped; nothing was left half-written")
            ctx.exit(1)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            raise click.UsageError(f"command {args[0]!r} is not known; {nearest(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)


def _print_error(message: str) -> None:
    click.echo(f"lvlm-edge: {' '.join(message.split())}", err=True)


def _usage(error: click.ClickException) -> str:
    """An error of the command line itself: which command, what is wrong, where its options are."""
    context = getattr(error, "ctx", None)
    if context is None or context.parent is None:
        return f"{error.format_message().rstrip('.')}; see lvlm-edge --help"
    name = context.command.name
    return f"{name}: {error.format_message().rstrip('.')}; see lvlm-edge {name} --help"


class MethodCommand(click.Command):
    """A command whose options include the settings of every method, read from their `Config` classes."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        return [*params[:-1], *CAPACITY, *_method_options(), params[-1]]


def _method_options() -> list[click.Option]:
    from lvlm_edge.exporter import planning

    options: dict[str, click.Option] = {}
    for name in planning.method_names():
        config = planning.method(name).Config
        hints = typing.get_type_hints(config)
        for setting in dataclasses.fields(config):
            flag = "--" + setting.name.replace("_", "-")
            default = "" if setting.default is None else f"  [default: {setting.default}]"
            text = f"{name}: {setting.metadata.get('help', setting.name.replace('_', ' '))}{default}"
            options.setdefault(flag, click.Option([flag], type=_plain(hints[setting.name]), help=text))
    return list(options.values())


def _plain(hint: Any) -> Any:
    """`int | None` and the like as the type to parse."""
    if isinstance(hint, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


@click.group(cls=Errors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lvlm-edge")
def main() -> None:
    """Vision-language models with fewer visual tokens, as static graphs that run without PyTorch."""


@main.command(cls=MethodCommand)
@click.argument("checkpoint")
@click.option("--method", default="none", show_default=True, help="Token-reduction method.")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option(
    "--weights", default="as-is", show_default=True, help="Decoder weights to predict: as-is, float, int8, int4, fp4."
)
@click.option(
    "--rates", type=click.Path(path_type=Path), help="Predict times from the rates in this file of `bench --json`."
)
@click.option("--ratios", type=_shares, default="", metavar="R,R", help="Predict times at these keep ratios too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def plan(
    checkpoint: str,
    method: str,
    revision: str | None,
    weights: str,
    rates: Path | None,
    ratios: tuple[float, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Print stages, token counts, FLOPs, bytes, and what the device would take; reads config.json only."""
    from lvlm_edge.exporter import plan as planned

    device = _device(options)
    settings = _settings(options, device)
    report = planned(
        checkpoint,
        method=method,
        revision=revision,
        device=device,
        weights=weights,
        rates=rates,
        ratios=ratios,
        **settings,
    )
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        _print_plan(report)


@main.command(cls=MethodCommand)
@click.argument("checkpoint")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle to write.")
@click.option(
    "--add-keep-ratio",
    type=float,
    help="Instead of a new bundle: add graphs for this ratio to the BUNDLE given as CHECKPOINT, on its own weights.",
)
@click.option("--method", default="none", show_default=True, help="Token-reduction method.")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option(
    "--weights",
    default="as-is",
    show_default=True,
    help="Format of the decoder's matrices: as-is, int8 (a scale per channel), int4 (a scale per block), or float, "
    "also of a checkpoint that is quantised already, whose integers as-is keeps.",
)
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
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
    device = _device(options)
    settings = _settings(options, device)
    if device.kind != "cpu" or _given("device"):  # the bundle may be for another machine than this one
        from lvlm_edge.exporter import check_fit

        check_fit(checkpoint, device, method=method, revision=revision, weights=weights, **settings)
    from lvlm_edge.exporter import export as exported

    with _progress(quiet) as progress:
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
    others = [f"--{name.replace('_', '-')}" for name in context.params if name not in known and _given(name)]
    if others:
        raise UsageError(f"export: --add-keep-ratio takes the bundle's own settings; leave out {', '.join(others)}")
    with _progress(quiet) as progress:
        written = ratios.add(bundle, keep_ratio, progress)
    if as_json:
        click.echo(written.read_text("utf-8"))
    elif not quiet:
        click.echo(
            f"{bundle}: keep ratio {keep_ratio:g} added; next: lvlm-edge run {bundle} --keep-ratio {keep_ratio:g}"
        )


@main.command()
@click.argument("checkpoint")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Checkpoint to write, of the same family."
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    required=True,
    help='Folder of pictures like those to come, or a .jsonl of {"image": path, "prompt": text, "answer": text}; the '
    "answer may be missing.",
)
@click.option("--algorithm", default="awq", show_default=True, help="awq, or gptq for small models: it takes longer.")
@click.option(
    "--block-size", default=128, show_default=True, help="Input channels of a scale, 128 (where it divides) or 32."
)
@click.option("--samples", type=AT_LEAST_1, default=128, show_default=True, help="Of the pictures, at random.")
@click.option(
    "--prompt", default="Describe the picture.", show_default=True, help="What is asked about a folder's pictures."
)
@click.option("--seed", type=FROM_0, default=0, show_default=True, help="Of the choice of pictures and of rows.")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--force", is_flag=True, help="Replace an existing quantised checkpoint.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def quantize(checkpoint: str, output: Path, quiet: bool, as_json: bool, **options: Any) -> None:
    """Checkpoint to checkpoint with INT4 matrices in the decoder's layers, rounded with an eye on pictures.

    Needs the extra `quantize`. The model is in memory as a whole, in float32, and rows of what its matrices read
    beside it: about 40 GB for a decoder of 7 B parameters.
    """
    from lvlm_edge.exporter import quantize as quantised

    with _progress(quiet) as progress:
        report = quantised(checkpoint, output, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    elif not quiet:
        counts = ", ".join(f"{count} of blocks of {size}" for size, count in report["matrices"].items())
        kept = f"; {len(report['kept'])} stay as they are" if report["kept"] else ""
        click.echo(f"{output}: {report['bytes'] / 1e6:,.1f} MB; INT4 matrices: {counts or 'none'}{kept}")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@KEEP_RATIO
@click.option("--against", required=True, help="The checkpoint that was exported.")
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="Compare on this picture too.")
@click.option("--prompt", help="Compare on this question about the pictures.")
@click.option("--steps", type=AT_LEAST_1, default=16, show_default=True, help="Greedy tokens to compare.")
@click.option("--backend", default="ort", show_default=True, help="What runs the bundle.")
@click.option("--seed", type=FROM_0, default=0, show_default=True, help="Of the made-up prompts and pictures.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def check(
    bundle: Path,
    keep_ratio: float | None,
    against: str,
    images: tuple[Path, ...],
    prompt: str | None,
    steps: int,
    backend: str,
    seed: int,
    as_json: bool,
) -> None:
    """Compare a bundle with PyTorch, graph by graph and token by token; exit 1 if it differs."""
    from lvlm_edge.exporter.proof import parity

    verdict = parity.check(
        bundle,
        against,
        steps=steps,
        backend=backend,
        keep_ratio=keep_ratio,
        seed=seed,
        question=_question(images, prompt),
    )
    if as_json:
        rows = [dataclasses.asdict(row) for row in verdict.rows]
        click.echo(json.dumps({"passed": verdict.passed, "rows": rows}, indent=1))
    else:
        _print_verdict(verdict)
    if not verdict.passed:
        sys.exit(1)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@KEEP_RATIO
@click.option("--device", required=True, help="Device to build for; `lvlm-edge devices` lists them.")
@click.option("--compute-capability", "targets", multiple=True, help="Instead of the device's: 8.9, or portable (RTX).")
@click.option("--graph", "graphs", multiple=True, help="Build only this graph.")
@click.option("--optimisation-level", type=click.IntRange(0, 5), help="0 builds fast, 5 runs fast.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def build(
    bundle: Path,
    keep_ratio: float | None,
    device: str,
    targets: tuple[str, ...],
    graphs: tuple[str, ...],
    optimisation_level: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """TensorRT engines of a bundle, built for a device; what is up to date stays."""
    from lvlm_edge.exporter.devices import engine, profiles

    profile = profiles.find(device)
    own = profile.compute_capability
    settings = engine.Settings(
        backend=profile.backend,
        compute_capabilities=targets or (own.value if own else engine.PORTABLE,),
        optimisation_level=optimisation_level,
    )
    with _progress(quiet) as progress:
        out = engine.build(bundle, settings, graphs=graphs or None, keep_ratio=keep_ratio, progress=progress)
    record = json.loads((out / engine.ENGINES).read_text("utf-8"))
    if as_json:
        click.echo(json.dumps(record, indent=1))
    elif not quiet:
        size = sum(entry["size"] for entry in record["engines"].values())
        click.echo(
            f"{out}: {len(record['engines'])} engines, {size / 1e6:,.1f} MB, {record['flavour']} {record['version']}"
        )


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@KEEP_RATIO
@click.option("--image", "images", multiple=True, help="Picture file; as often as the bundle takes images.")
@click.option("--prompt", required=True, help="The question.")
@click.option("--system", help="System message, where the chat template takes one.")
@click.option("--max-new-tokens", type=int, help="At most the bundle's capacity, the default.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="Sample among the k best; 0 is off.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample among the best with this much probability.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="1 is off.")
@click.option("--seed", type=int, help="Of sampling.")
@click.option("--stop", multiple=True, help="Text that ends the answer.")
@click.option("--overlay", type=click.Path(path_type=Path), help="Write the picture with the kept patches shown.")
@click.option("--backend", default="ort", show_default=True, help="What runs the graphs.")
@click.option("--threads", type=AT_LEAST_1, help="Threads of the backend.")
@click.option("--no-verify", is_flag=True, help="Do not hash the bundle's files first.")
@click.option("--stats", is_flag=True, help="Print times and kept tokens to stderr.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def run(bundle: Path, images: tuple[str, ...], prompt: str, overlay: Path | None, as_json: bool, **o: Any) -> None:
    """Answer a question about pictures, streaming to stdout."""
    from lvlm_edge.runtime import Pipeline, Sampling

    sampling = Sampling(
        temperature=o["temperature"],
        top_k=o["top_k"],
        top_p=o["top_p"],
        repetition_penalty=o["repetition_penalty"],
        seed=o["seed"],
    )
    options = {"keep_ratio": o["keep_ratio"], "verify": not o["no_verify"], "threads": o["threads"]}
    pipe = Pipeline.load(bundle, o["backend"], **options)
    if overlay is not None:
        _check_overlay(pipe.manifest, overlay)
    begun = False
    for piece in pipe.stream(
        prompt,
        images,
        max_new_tokens=o["max_new_tokens"],
        sampling=sampling,
        stop=o["stop"],
        system=o["system"],
    ):
        if not as_json:  # many tokenizers begin an answer with the space that separates it from the prompt
            click.echo(piece if begun else piece.lstrip(), nl=False)
            sys.stdout.flush()
        begun = begun or bool(piece.strip())
    if not as_json:
        click.echo()
    if overlay is not None:
        _write_overlay(pipe, images, overlay)
    if as_json:
        click.echo(json.dumps(_answer(pipe), indent=1))
    elif o["stats"]:
        _print_stats(pipe)


@main.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
@click.option("--backend", "backends", multiple=True, default=["ort"], show_default=True, help="What runs the bundles.")
@click.option(
    "--keep-ratio", "keep_ratios", type=float, multiple=True, help="One that the bundles hold; may be given repeatedly."
)
@click.option("--against", help="The first bundle's checkpoint: time PyTorch on it too.")
@click.option("--rounds", type=AT_LEAST_1, default=7, show_default=True, help="Turns of each that count.")
@click.option("--warm-up", type=FROM_0, default=1, show_default=True, help="Turns before them that do not.")
@click.option("--threads", type=AT_LEAST_1, help="Threads of each.  [default: as many as may be used]")
@click.option("--text-tokens", type=int, help="Of a prompt.  [default: the smallest capacity]")
@click.option("--new-tokens", type=int, help="Of an answer.  [default: 16, or the smallest capacity]")
@click.option("--seed", type=FROM_0, default=0, show_default=True, help="Of pictures and prompts.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw stages beside their floors.")
@click.option("--no-verify", is_flag=True, help="Do not hash the bundles' files first.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
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
    """Time to first token by stage, decode speed and peak memory of bundles in turns, beside their floors."""
    from lvlm_edge.exporter.timing import bench as benched
    from lvlm_edge.exporter.timing import chart

    if plot is not None:
        chart.check(plot)
    with _progress(quiet) as progress:
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


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@KEEP_RATIO
@click.option("--verify", is_flag=True, help="Hash every file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def inspect(bundle: Path, keep_ratio: float | None, verify: bool, as_json: bool) -> None:
    """What is in a bundle: counts, graphs with every tensor, caches, files and who shares them, certificate."""
    from lvlm_edge.runtime.bundle import keep_ratios, open_bundle

    opened = open_bundle(bundle, verify=verify, keep_ratio=keep_ratio)
    certificate, ratios = _certificate(bundle, opened.name), keep_ratios(bundle)
    shared = _shared(bundle, ratios)
    if as_json:
        content = dataclasses.asdict(opened.manifest) | {"certificate": certificate, "verified": verify}
        click.echo(json.dumps(content | {"keep_ratios": ratios, "shared": shared}, indent=1))
    else:
        _print_bundle(opened.manifest, certificate, verify)
        if ratios[1:]:
            _print_shared(shared)


def _shared(bundle: Path, ratios: list[float]) -> dict[str, Any]:
    """Which keep ratios read which bytes: of every file its size, its sha256 and the ratios that need it.

    `beyond_weights` are the bytes of a ratio's files that no ratio before it has, weights left out.
    """
    from lvlm_edge.runtime.bundle import open_bundle

    files: dict[str, dict[str, Any]] = {}
    beyond = {}
    for ratio in ratios:
        manifest = open_bundle(bundle, verify=False, keep_ratio=ratio).manifest
        new = [name for name in manifest.files if name not in files]
        beyond[f"{ratio:g}"] = sum(manifest.files[name].size for name in new if name != manifest.weights)
        for name, info in manifest.files.items():
            files.setdefault(name, {**dataclasses.asdict(info), "keep_ratios": []})["keep_ratios"].append(ratio)
    return {"files": files, "beyond_weights": beyond}


@main.command()
@click.argument("profile", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def devices(profile: str | None, as_json: bool) -> None:
    """The known devices and their limits; of one device every figure, with its source."""
    from lvlm_edge.exporter.devices import profiles

    found = [profiles.find(profile)] if profile else [profiles.load(name) for name in profiles.names()]
    if as_json:
        rows = [dataclasses.asdict(p) for p in found]
        click.echo(json.dumps(rows[0] if profile else rows, indent=1))
    elif profile:
        _print_device(found[0])
    else:
        _print_devices(found)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def doctor(as_json: bool) -> None:
    """What this machine has: packages, GPU, JetPack; what works with it, and what to install for the rest."""
    from lvlm_edge.exporter.devices import doctor as examined

    found = examined.report()
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _print_doctor(found)


def _certificate(bundle: Path, manifest: str) -> dict[str, Any] | None:
    """Verdict of the last check, and whether it speaks of this very manifest; None where there was none."""
    from lvlm_edge.runtime.bundle import certificate_name, sha256

    path = bundle / certificate_name(manifest)
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text("utf-8"))
        passed, hashed = bool(stored["passed"]), stored["manifest_sha256"]
    except (OSError, RecursionError, ValueError, TypeError, KeyError):
        return {"passed": None, "of_this_bundle": False}
    return {"passed": passed, "of_this_bundle": hashed == sha256(bundle / manifest)}


def _device(options: dict[str, Any]) -> Any:
    """The profile that `--device` names, taken out of the options."""
    from lvlm_edge.exporter.devices import profiles

    return profiles.find(options.pop("device"))


def _given(option: str) -> bool:
    """Whether an option of the running command was given, not left at its default."""
    return click.get_current_context().get_parameter_source(option) is not click.core.ParameterSource.DEFAULT


def _settings(options: dict[str, Any], device: Any) -> dict[str, Any]:
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


def _question(images: tuple[Path, ...], prompt: str | None) -> tuple[str, tuple[Path, ...]] | None:
    if not images and prompt is None:
        return None
    if not images or prompt is None:
        raise UsageError("check: --image and --prompt go together; give both or neither")
    return prompt, images


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _check_overlay(manifest: Any, target: Path) -> None:
    """Raise UsageError, before the answer, for what can be known then."""
    if not any(info.name == "kept_visual" for graph in manifest.graphs for info in graph.outputs):
        raise UsageError(
            f"run: --overlay shows which tokens are kept, but method {manifest.method} chooses none; leave it out"
        )
    from lvlm_edge.runtime import overlay

    if target.suffix.lower() not in overlay.SUFFIXES or target.is_dir() or not target.parent.is_dir():
        raise UsageError(
            f"{target}: cannot be written as a picture; give a path in a folder that exists, ending in "
            + ", ".join(overlay.SUFFIXES)
        )


def _write_overlay(pipe: Any, images: tuple[str, ...], target: Path) -> None:
    """The picture (side by side where there are several) with the kept patches clear and the others dark."""
    from lvlm_edge.runtime import overlay

    try:
        overlay.save(overlay.draw(pipe.manifest, images, pipe.last.kept_visual), target)
    except (OSError, ValueError) as error:
        raise UsageError(f"{target}: cannot be written ({error}); give another path") from error


def _answer(pipe: Any) -> dict[str, Any]:
    result = pipe.last
    kept = None if result.kept_visual is None else result.kept_visual.tolist()
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish": result.finish,
        "prompt_tokens": result.prompt_tokens,
        "visual_tokens": pipe.manifest.counts.visual_tokens,
        "kept_visual": kept,
        "seconds": result.seconds,
    }


def _print_stats(pipe: Any) -> None:
    result, counts = pipe.last, pipe.manifest.counts
    if result.kept_visual is not None:
        share = counts.kept_tokens / counts.visual_tokens
        click.echo(
            f"kept {counts.kept_tokens} of {counts.visual_tokens} visual tokens "
            f"({share:.0%} kept, {1 - share:.0%} removed)",
            err=True,
        )
    steps = "  ".join(f"{k} {v * 1e3:.1f}" for k, v in result.seconds.items() if k not in ("first_token", "decode"))
    click.echo(f"time to first token {result.seconds['first_token'] * 1e3:.1f} ms ({steps})", err=True)
    if len(result.token_ids) > 1:
        each = result.seconds["decode"] / (len(result.token_ids) - 1)
        click.echo(f"{len(result.token_ids)} tokens, {each * 1e3:.2f} ms per token", err=True)


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def _show(*things: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    for thing in things:
        console.print(thing)


def _print_plan(report: dict[str, Any]) -> None:
    table = _table("layers", "queries", "keys", "cached")
    for stage in report["stages"]:
        first, last = stage["layers"]
        table.add_row(f"{first}..{last}", *(f"{stage[k]:,}" for k in ("queries", "keys", "cached")))
    flops, paper = report["flops"], report["paper"]
    share = report["kept_visual_tokens"] / report["visual_tokens"]
    _show(
        f"{report['method']} on {report['model']['family']}: {report['visual_tokens']} visual tokens, "
        f"{report['kept_visual_tokens']} kept ({share:.1%} kept, {1 - share:.1%} removed), "
        f"{report['text_tokens']} text, {report['new_tokens']} new",
        table,
        f"weights   {report['weights_bytes'] / 1e6:,.1f} MB ({report['dtype']})",
        f"KV cache  {report['kv_cache_bytes'] / 1e6:,.1f} MB (dense {report['kv_cache_bytes_dense'] / 1e6:,.1f} MB)",
        f"FLOPs     vision {flops['vision'] / 1e9:,.2f} G, projector {flops['projector'] / 1e9:,.2f} G, prefill "
        f"{flops['prefill'] / 1e9:,.2f} G ({flops['prefill'] / flops['prefill_dense']:.1%} of dense), decode "
        f"{flops['decode_per_token'] / 1e9:,.3f} G per token",
    )
    if paper:
        _show(f"paper     {paper['name']}: {paper['value']:,.2f} {paper['unit']}, {paper['ratio']:.1%} of dense")
    if "fit" in report:
        _print_fit(report["fit"])
        _print_prediction(report["prediction"])


def _print_fit(fit: dict[str, Any]) -> None:
    parts = ", ".join(f"{k} {fit[k] / 1e9:,.2f}" for k in ("weights", "caches", "activations", "workspace", "overhead"))
    have = "" if fit["available"] is None else f" of {fit['available'] / 1e9:,.2f} GB"
    _show(f"{fit['device']:9} runs in {fit['run'] / 1e9:,.2f} GB{have} ({parts}){'' if fit['fits_run'] else ': NO'}")
    if fit["build_peak"]:
        where = "on the machine that builds" if fit["build_available"] is None else "there"
        no = "" if fit["fits_build"] else ": NO"
        _show(f"          its largest engine is built in {fit['build_peak'] / 1e9:,.2f} GB, {where}{no}")
    for problem in fit["problems"]:
        _show(f"          {fit['device']} {problem}")
    for remedy in fit["helps"]:
        _show(f"          would fit: {' and '.join(remedy['changes'])} ({remedy['run'] / 1e9:,.2f} GB)")


def _print_prediction(found: dict[str, Any]) -> None:
    if not found["available"]:
        _show(f"times     not predicted: {found['reason'].removeprefix('cost: ')}")
        return
    table = _table("predicted", "ms", "limit")
    for stage in found["stages"]:
        table.add_row(stage["name"], f"{stage['ms']:,.3g}", stage["bound"])
    _show(table)
    for name, row in (("", found), ("none: ", found["none"]))[: 1 if found["pays"] is None else 2]:
        _show(
            f"{name}first token {row['first_token_ms']:,.4g} ms, then {row['decode_ms']:,.3g} ms per token "
            f"({row['tokens_per_second']:,.3g} tokens/s), {row['memory_bytes'] / 1e9:,.2f} GB"
        )
    if found["pays"] is not None:
        said = "pays" if found["pays"] else f"does not pay: {found['why_not']}"
        _show(f"first token {found['speed_up']:.2f} times as fast as none's; {said}")
    if found["ratios"]:
        table = _table("keep ratio", "first token ms", "times as fast", "ms per token", "GB", "")
        for row in found["ratios"]:
            figures = f"{row['first_token_ms']:,.4g}", f"{row['speed_up']:.2f}", f"{row['decode_ms']:,.3g}"
            memory = f"{row['memory_bytes'] / 1e9:,.2f}"
            table.add_row(f"{row['keep_ratio']:g}", *figures, memory, "" if row["pays"] else "does not pay")
        _show(table)
    error, own = found["held_out_error"], found["held_out_error_of_this_device"]
    if error is not None:
        here = f"on this device {own['median']:.0%}, {own['worst']:.0%}" if own else "never compared on this device"
        _show(f"error on held-out times: median {error['median']:.0%}, worst {error['worst']:.0%}; {here}")
    _show(f"from {found['basis']}")


def _print_bench(report: dict[str, Any]) -> None:
    rates = report["rates"]
    _show(
        f"{report['machine']['processor']}, {report['threads']} thread(s); prompts of {report['text_tokens']} text "
        f"tokens, answers of {report['new_tokens']}; medians of {report['rounds']} turns"
    )
    if rates:
        reached = rates["flops_per_second"] / 1e9, rates["bytes_per_second"] / 1e9
        _show(f"this machine: {reached[0]:,.0f} GFLOP/s, {reached[1]:,.1f} GB/s")
    for row in report["contenders"]:
        table = _table(row["name"], "ms", "lowest to highest", "floor ms", "times floor")
        for part in (*row["stages"], row["first_token"] | {"name": "first token"}, row["decode"]):
            figures = [f"{part['median_ms']:,.4g}", f"{part['low_ms']:,.4g} to {part['high_ms']:,.4g}"]
            if "floor_ms" in part:
                figures += [f"{part['floor_ms']:,.3g}", f"{part['times_floor']:.2f}"]
            table.add_row(part["name"], *figures)
        memory, first, each = row["memory"], row["first_token"], row["decode"]
        anonymous = memory["anonymous_bytes"]
        rest = "" if anonymous is None else f", {anonymous / 1e9:,.2f} GB without pages of mapped files"
        _show(
            table,
            f"{1e3 / each['median_ms']:,.1f} tokens/s; peak memory {memory['peak_bytes'] / 1e9:,.2f} GB{rest}",
            f"first token {first['ratio']:.2f}, decode {each['ratio']:.2f} of the time of {row['ratio_to']}",
        )
    for note in report["notes"]:
        _show(note)


def _print_devices(found: list[Any]) -> None:
    rows = [("device", "GB", "GB/s", "TFLOP/s", "compute", "backend", "lowering", "JetPack", "TensorRT")]
    for p in found:
        figures = (p.memory_gb, p.bandwidth_gb_s, p.tflops and p.tflops["float16"], p.compute_capability)
        release = (p.release.version, p.release.tensorrt) if p.release else ("", "")
        rows.append((p.name, *(_value(f) if f else "" for f in figures), p.backend, p.lowering, *release))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # no rich table: it would cut the names on a narrow terminal
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    click.echo("\nTFLOP/s: float16, dense; lvlm-edge devices DEVICE explains one, with the source of every figure")


def _value(figure: Any) -> str:
    value = figure.value
    return ", ".join(value) if isinstance(value, tuple) else value if isinstance(value, str) else f"{value:g}"


def _print_device(p: Any) -> None:
    """Every figure of a profile with its source; long addresses are not cut."""
    click.echo(f"{p.name}: {p.description}")
    click.echo(f"backend {p.backend}, lowering {p.lowering}, dtypes {', '.join(p.dtypes)}")
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


def _print_verdict(verdict: Any) -> None:
    table = _table("prompt", "stage", "error", "bound", "", "")
    for row in verdict.rows:
        mark = "[green]ok[/]" if row.passed else "[red]FAILED[/]"
        told = ("", "") if row.bound is None else (f"{row.bound:.1e}", mark)
        table.add_row(row.case, row.stage, f"{row.figure:.2e}", *told, row.note)
    _show(table)
    if verdict.passed:
        _show(f"[green]PASSED[/]: {len(verdict.rows)} comparisons; certificate.json written")
    else:
        row = verdict.first_failure
        _show(f"[red]FAILED[/]: first at {row.stage} (prompt {row.case}); certificate.json written")


def _print_bundle(manifest: Any, certificate: dict[str, Any] | None, verified: bool) -> None:
    counts = manifest.counts
    tensors = _table("graph", "", "tensor", "dtype", "shape")
    for graph in manifest.graphs:
        for kind, infos in (("in", graph.inputs), ("out", graph.outputs)):
            for info in infos:
                tensors.add_row(graph.name, kind, info.name, info.dtype, "x".join(map(str, info.shape)))
    files = _table("file", "bytes", "sha256")
    for name, info in manifest.files.items():
        files.add_row(name, f"{info.size:,}", info.sha256[:16])
    caches = sorted({(c.capacity, c.dropped) for c in manifest.cache}, reverse=True)
    _show(
        f"{manifest.method} {manifest.method_config or ''} on {manifest.model['family']}, {manifest.dtype}, opset "
        f"{manifest.opset}, from {manifest.provenance.source}",
        f"{counts.num_images} image(s), {counts.visual_tokens} visual tokens, {counts.kept_tokens} kept; up to "
        f"{counts.text_tokens} text and {counts.new_tokens} new tokens",
        "caches: " + ", ".join(f"{c} rows ({d} dropped)" for c, d in caches),
        tensors,
        files,
        f"files {'verified by hash' if verified else 'present, sizes as listed; --verify hashes them'}",
    )
    if certificate is None:
        _show("no certificate; lvlm-edge check makes one")
    elif certificate["passed"] is None:
        _show("certificate: damaged; lvlm-edge check makes a new one")
    else:
        state = "passed" if certificate["passed"] else "FAILED"
        _show(f"certificate: {state}" + ("" if certificate["of_this_bundle"] else ", but of another export"))


def _print_shared(shared: dict[str, Any]) -> None:
    files = _table("file", "bytes", "sha256", "keep ratios")
    for name, entry in shared["files"].items():
        files.add_row(
            name, f"{entry['size']:,}", entry["sha256"][:16], ", ".join(f"{r:g}" for r in entry["keep_ratios"])
        )
    _show(files)
    for ratio, size in shared["beyond_weights"].items():
        _show(f"keep ratio {ratio}: {size:,} bytes of its own")


if __name__ == "__main__":
    main()

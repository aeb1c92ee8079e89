"""`lvlm-edge plan`: stages, token counts, FLOPs, bytes, and the prediction for a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lvlm_edge.exporter.commands.options import JSON, REVISION, MethodCommand, device_of, settings_of, shares
from lvlm_edge.exporter.commands.output import show, table


@click.command(cls=MethodCommand)
@click.argument("checkpoint")
@REVISION
@click.option(
    "--weights",
    default="as-is",
    show_default=True,
    help="Weight format of the decoder's matrices: as-is (keeps the integers of a quantized checkpoint), float "
    "(dequantizes them), int8, int4, fp8 or fp4. export writes no fp8 and fp4.",
)
@click.option(
    "--rates",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Output of `lvlm-edge bench --json`: predict times from the rates that it measured.",
)
@click.option(
    "--ratios",
    type=shares,
    default="",
    metavar="R,R",
    help="Predict times at these keep ratios too, each above 0 and at most 1.",
)
@JSON
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
    """Predict token counts, FLOPs, memory and time from config.json.

    Reads no weights. With --device, also predicts whether the device can build and run the bundle, and how fast.
    """
    from lvlm_edge.exporter import plan as planned

    device = device_of(options)
    settings = settings_of(options, device)
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


def _print_plan(report: dict[str, Any]) -> None:
    rows = table("layers", "queries", "keys", "cached")
    for stage in report["stages"]:
        first, last = stage["layers"]
        rows.add_row(f"{first}..{last}", *(f"{stage[k]:,}" for k in ("queries", "keys", "cached")))
    flops, paper = report["flops"], report["paper"]
    share = report["kept_visual_tokens"] / report["visual_tokens"]
    show(
        f"{report['method']} on {report['model']['family']}: {report['visual_tokens']} visual tokens, "
        f"{report['kept_visual_tokens']} kept ({share:.1%} kept, {1 - share:.1%} removed), "
        f"{report['text_tokens']} text, {report['new_tokens']} new",
        rows,
        f"weights   {report['weights_bytes'] / 1e6:,.1f} MB ({report['dtype']}){_of_prompts(report)}",
        f"KV cache  {report['kv_cache_bytes'] / 1e6:,.1f} MB (dense {report['kv_cache_bytes_dense'] / 1e6:,.1f} MB)",
        f"FLOPs     vision {flops['vision'] / 1e9:,.2f} G, projector {flops['projector'] / 1e9:,.2f} G, prefill "
        f"{flops['prefill'] / 1e9:,.2f} G ({flops['prefill'] / flops['prefill_dense']:.1%} of dense), decode "
        f"{flops['decode_per_token'] / 1e9:,.3f} G per token",
    )
    if paper:
        show(f"paper     {paper['name']}: {paper['value']:,.2f} {paper['unit']}, {paper['ratio']:.1%} of dense")
    if "fit" in report:
        _print_fit(report["fit"])
        _print_prediction(report["prediction"])


def _of_prompts(report: dict[str, Any]) -> str:
    """What a second copy of the decoder's matrices costs, for prompts."""
    size = report["prompt_weights_bytes"]
    return f", {size / 1e6:,.1f} MB of them for prompts alone (--prompt-weights)" if size else ""


def _print_fit(fit: dict[str, Any]) -> None:
    parts = ", ".join(f"{k} {fit[k] / 1e9:,.2f}" for k in ("weights", "caches", "activations", "workspace", "overhead"))
    have = "" if fit["available"] is None else f" of {fit['available'] / 1e9:,.2f} GB"
    show(f"{fit['device']:9} runs in {fit['run'] / 1e9:,.2f} GB{have} ({parts}){'' if fit['fits_run'] else ': NO'}")
    if fit["build_peak"]:
        where = "on the machine that builds" if fit["build_available"] is None else "there"
        no = "" if fit["fits_build"] else ": NO"
        show(f"          its largest engine is built in {fit['build_peak'] / 1e9:,.2f} GB, {where}{no}")
    for problem in fit["problems"]:
        show(f"          {fit['device']} {problem}")
    for remedy in fit["helps"]:
        show(f"          would fit: {' and '.join(remedy['changes'])} ({remedy['run'] / 1e9:,.2f} GB)")


def _print_prediction(found: dict[str, Any]) -> None:
    if not found["available"]:
        show(f"times     not predicted: {found['reason'].removeprefix('cost: ')}")
        return
    rows = table("predicted", "ms", "limit")
    for stage in found["stages"]:
        rows.add_row(stage["name"], f"{stage['ms']:,.3g}", stage["bound"])
    show(rows)
    for name, row in (("", found), ("none: ", found["none"]))[: 1 if found["pays"] is None else 2]:
        show(
            f"{name}first token {row['first_token_ms']:,.4g} ms, then {row['decode_ms']:,.3g} ms per token "
            f"({row['tokens_per_second']:,.3g} tokens/s), {row['memory_bytes'] / 1e9:,.2f} GB"
        )
    if found["pays"] is not None:
        said = "pays" if found["pays"] else f"does not pay: {found['why_not']}"
        show(f"first token {found['speed_up']:.2f} times as fast as none's; {said}")
    if found["ratios"]:
        rows = table("keep ratio", "first token ms", "times as fast", "ms per token", "GB", "")
        for row in found["ratios"]:
            figures = f"{row['first_token_ms']:,.4g}", f"{row['speed_up']:.2f}", f"{row['decode_ms']:,.3g}"
            memory = f"{row['memory_bytes'] / 1e9:,.2f}"
            rows.add_row(f"{row['keep_ratio']:g}", *figures, memory, "" if row["pays"] else "does not pay")
        show(rows)
    error, own = found["held_out_error"], found["held_out_error_of_this_device"]
    if error is not None:
        here = f"on this device {own['median']:.0%}, {own['worst']:.0%}" if own else "never compared on this device"
        show(f"error on held-out times: median {error['median']:.0%}, worst {error['worst']:.0%}; {here}")
    show(f"from {found['basis']}")

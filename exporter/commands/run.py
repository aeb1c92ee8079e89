"""`lvlm-edge run`: an answer to a prompt, with images and videos or without."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lvlm_edge.exporter.commands.options import AT_LEAST_1, BACKEND, ENGINES, JSON, KEEP_RATIO
from lvlm_edge.exporter.commands.output import visible
from lvlm_edge.runtime.errors import UsageError

CHECKPOINTS = "[default: the checkpoint's]"  # as `inspect` shows it
DRAWN = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@KEEP_RATIO
@click.option(
    "--image",
    "images",
    multiple=True,
    help="Image file, data URL, or - for standard input; given once per image that the bundle is for. Bundles of the "
    "methods none and fastv also take fewer images, or none.",
)
@click.option(
    "--video",
    "videos",
    multiple=True,
    metavar="FILE|FOLDER",
    help="Video file, folder of frames (pictures in the order of their names), or .npy array uint8 [frames, H, W, 3]; "
    "given once per video that the bundle is for. Frames are sampled evenly.",
)
@click.option(
    "--max-megapixels",
    type=float,
    default=25.0,
    show_default=True,
    help="Largest image or frame, in millions of pixels; a larger JPEG is decoded at a fraction of its size.",
)
@click.option("--allow-url", is_flag=True, help="Fetch images that are given as http:// or https:// URLs.")
@click.option("--fit", is_flag=True, help="Resize pictures that belong on another canvas to the bundle's.")
@click.option("--prompt", required=True, help="Text of the prompt, such as a question about the images.")
@click.option("--system", help="System message, if the chat template takes one.")
@click.option(
    "--max-new-tokens", type=int, help="Most tokens of the answer, at least 1.  [default: the bundle's capacity]"
)
@click.option("--temperature", type=float, help=f"Sampling temperature, 0 or more; 0 decodes greedily.  {CHECKPOINTS}")
@click.option("--top-k", type=int, help=f"Sample among this many likeliest tokens, 0 or more; 0 is off.  {CHECKPOINTS}")
@click.option(
    "--top-p",
    type=float,
    help="Sample among the likeliest tokens with this cumulative probability, above 0 and at most 1; 1 is off.  "
    + CHECKPOINTS,
)
@click.option(
    "--repetition-penalty",
    type=float,
    help=f"Penalty on tokens that occurred before, above 0; 1 is off.  {CHECKPOINTS}",
)
@click.option("--seed", type=int, help="Seed of sampling, 0 or more.  [default: random]")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given repeatedly.")
@click.option(
    "--overlay",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the images and frames to this file (.png, .jpg, .jpeg or .webp), with the patches of dropped visual "
    "tokens darkened. Needs a method that selects tokens, like fastv.",
)
@BACKEND
@ENGINES
@click.option("--threads", type=AT_LEAST_1, help="CPU threads of the backend ort.  [default: ONNX Runtime's]")
@click.option("--no-verify", is_flag=True, help="Skip verifying the bundle's files by their hashes.")
@click.option("--certified", is_flag=True, help="Refuse a bundle that has not passed `lvlm-edge check` as it is now.")
@click.option("--stats", is_flag=True, help="Print times and the number of kept visual tokens to stderr.")
@JSON
def run(bundle: Path, images: tuple[str, ...], prompt: str, overlay: Path | None, as_json: bool, **o: Any) -> None:
    """Answer a prompt about images and videos, streaming to stdout."""
    from lvlm_edge.runtime import Pipeline, Sampling

    if images.count("-") > 1:
        raise UsageError("run: --image - is given several times, and standard input is one image; give files")
    sources = [sys.stdin.buffer.read() if image == "-" else image for image in images]

    asked = {name: o[name] for name in DRAWN if o[name] is not None}
    Sampling(**asked)  # its errors come before the bundle is read
    options = {"keep_ratio": o["keep_ratio"], "verify": not o["no_verify"], "threads": o["threads"]}
    options |= {name: o[name] for name in ("certified", "max_megapixels", "allow_url")}
    if o["engines"] is not None:
        options["engines"] = o["engines"]
    pipe = Pipeline.load(bundle, o["backend"], **options)
    if overlay is not None:
        _check_overlay(pipe.manifest, overlay)
    begun = False
    for piece in pipe.stream(
        prompt,
        sources,
        o["videos"],
        max_new_tokens=o["max_new_tokens"],
        sampling=replace(pipe.sampling, **asked),
        stop=o["stop"],
        system=o["system"],
        fit=o["fit"],
    ):
        if not as_json:  # many tokenizers begin an answer with the space that separates it from the prompt
            text = piece if begun else piece.lstrip()
            click.echo(visible(text) if sys.stdout.isatty() else text, nl=False)
            sys.stdout.flush()
        begun = begun or bool(piece.strip())
    if not as_json:
        click.echo()
    if overlay is not None:
        _write_overlay(pipe, sources, o["videos"], overlay)
    if as_json:
        click.echo(json.dumps(_answer(pipe), indent=1))
    elif o["stats"]:
        _print_stats(pipe)


def _check_overlay(manifest: Any, target: Path) -> None:
    """Raise UsageError, before the answer, for what can be known then."""
    if not any(info.name == "kept_visual" for graph in manifest.graphs for info in graph.outputs):
        raise UsageError(
            f"run: --overlay shows which tokens are kept, but method {manifest.method} chooses none; leave it out"
        )
    from lvlm_edge.runtime.pictures import overlay

    if target.suffix.lower() not in overlay.SUFFIXES or target.is_dir() or not target.parent.is_dir():
        raise UsageError(
            f"{target}: cannot be written as a picture; give a path in a folder that exists, ending in "
            + ", ".join(overlay.SUFFIXES)
        )


def _write_overlay(pipe: Any, images: Sequence[Any], videos: Sequence[Any], target: Path) -> None:
    """The pictures and frames, side by side, with the kept patches clear and the others dark."""
    from lvlm_edge.runtime.bundle.replacing import replacing
    from lvlm_edge.runtime.pictures import overlay

    try:
        with replacing(target) as partial:
            drawn = overlay.draw(pipe.last.pictures, images, pipe.last.kept_visual, pipe.reading, videos=videos)
            drawn.save(partial)
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

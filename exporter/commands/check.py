"""`lvlm-edge check`: a bundle against PyTorch."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from lvlm_edge.exporter.commands.options import AT_LEAST_1, BACKEND, ENGINES, FROM_0, JSON, KEEP_RATIO
from lvlm_edge.exporter.commands.output import show, table, visible
from lvlm_edge.runtime.errors import LvlmEdgeError, UsageError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@KEEP_RATIO
@click.option("--against", required=True, help="Checkpoint that was exported: folder or Hugging Face id.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Image file of an additional comparison, with --prompt; may be given repeatedly.",
)
@click.option(
    "--video",
    "videos",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE|FOLDER",
    help="Video of an additional comparison, with --prompt; may be given repeatedly.",
)
@click.option("--prompt", help="Question of an additional comparison, about what --image and --video give.")
@click.option(
    "--steps",
    type=AT_LEAST_1,
    default=16,
    show_default=True,
    help="Number of decoded tokens to compare; behind the longest prompt, all that the bundle has room for.",
)
@BACKEND
@ENGINES
@click.option(
    "--save-polygraphy",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write every graph's inputs and outputs to this new folder in polygraphy's formats, with the commands that "
    "compare another runtime with them.",
)
@click.option("--seed", type=FROM_0, default=0, show_default=True, help="Seed of the random prompts and images.")
@JSON
def check(
    bundle: Path,
    keep_ratio: float | None,
    against: str,
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
    prompt: str | None,
    steps: int,
    backend: str,
    engines: Path | None,
    seed: int,
    save_polygraphy: Path | None,
    as_json: bool,
) -> None:
    """Compare a bundle with PyTorch; exit 1 if they differ.

    Compares settings, prompts and pictures with the checkpoint, and graph by graph and token by token with PyTorch on
    random prompts; then the graphs that run, from pixels to tokens. Writes the result to the bundle as
    certificate.json.
    """
    from lvlm_edge.exporter.proof import parity

    verdict = parity.check(
        bundle,
        against,
        steps=steps,
        backend=backend,
        engines=engines,
        keep_ratio=keep_ratio,
        seed=seed,
        save_polygraphy=save_polygraphy,
        question=_question(images, videos, prompt),
    )
    if as_json:
        rows = [dataclasses.asdict(row) for row in verdict.rows]
        found = {"passed": verdict.passed, "not_judged": verdict.not_judged, "rows": rows}
        click.echo(json.dumps(found, indent=1))
    else:
        _print_verdict(verdict)
    if verdict.unwritten:
        raise LvlmEdgeError(verdict.unwritten)
    if not verdict.passed:
        sys.exit(1)


def _question(
    images: tuple[Path, ...], videos: tuple[Path, ...], prompt: str | None
) -> tuple[str, tuple[Path, ...], tuple[Path, ...]] | None:
    seen = images or videos
    if not seen and prompt is None:
        return None
    if not seen or prompt is None:
        raise UsageError("check: --image and --prompt go together, or --video and --prompt; give both or neither")
    return prompt, images, videos


def _print_verdict(verdict: Any) -> None:
    from rich.text import Text

    rows = table("prompt", "stage", "error", "bound", "", "")
    for row in verdict.rows:
        mark = Text("ok", "green") if row.passed else Text("FAILED", "red")
        told = ("", "") if row.bound is None else (f"{row.bound:.1e}", mark)
        rows.add_row(row.case, row.stage, f"{row.figure:.2e}", *told, row.note)
    show(rows)
    for what in verdict.not_judged:
        show(f"not judged: {what}")
    written = verdict.unwritten or "certificate.json written"
    if verdict.passed:
        show(Text.assemble(("PASSED", "green"), f": {len(verdict.rows)} comparisons; {visible(written)}"))
    else:
        row = verdict.first_failure
        show(Text.assemble(("FAILED", "red"), f": first at {row.stage} (prompt {row.case}); {visible(written)}"))

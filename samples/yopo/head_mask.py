"""YOPO's head mask for a checkpoint: `python samples/yopo/head_mask.py CHECKPOINT PICTURE... --out headmask.npy`.

The paper's rule (arXiv:2410.06169): a head stays active for visual tokens if in enough pictures its attention to them,
relative to its attention to all other tokens, is above a threshold; the first two layers keep all heads. Given
`--heads` instead of a threshold, the threshold that keeps this many heads per layer on average is looked for.

`--prompt` is in the checkpoint's own format, with `<image>` where the picture's rows stand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import AutoTokenizer

from lvlm_edge.exporter import families, references
from lvlm_edge.exporter.bundles import plans
from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.planning import Capacity
from lvlm_edge.exporter.references import original
from lvlm_edge.runtime.pictures import views
from lvlm_edge.runtime.pictures.image import open_image

PROMPT = "USER: <image>\nDescribe the picture. ASSISTANT:"


@torch.no_grad()
def ratios(m: original.Original, ids: list[int], pixels: Any) -> np.ndarray:
    """Attention to visual tokens over attention to all others, summed over all queries, [layers, heads]."""
    read = m.lay_out(ids, pixels)
    x, rows, found = read.rows, torch.arange(len(read.rows)), []
    for layer in m.decoder.layers:
        q, k, v = original.qkv(layer, layer.input_layernorm(x))
        q, k = original.rope(m.decoder, q, read.positions), original.rope(m.decoder, k, read.positions)
        attention = original.softmax(q, k, rows[:, None] >= rows)
        found.append(attention[..., read.images].sum((1, 2)) / attention[..., ~read.images].sum((1, 2)))
        x = original.feed_forward(layer, x + original.join(layer, attention @ v))
    return torch.stack(found).numpy()


def seen(m: original.Original, of: checkpoint.Checkpoint, path: Path) -> Any:
    """Pixel values of a picture, which the model is told the size of."""
    picture = open_image(path)
    capacity = Capacity(image_size=(picture.size,)) if families.of(of).sized else Capacity()
    return references.given(m, views.pixels(picture, plans.model(of, capacity).pictures[0].views), [picture.size])


def mask(samples: np.ndarray, threshold: float, share: float) -> np.ndarray:
    """Heads whose ratio [samples, layers, heads] is above the threshold in more than this share of the samples."""
    kept = (samples > threshold).mean(0) > share
    kept[:2] = True
    return kept


@click.command()
@click.argument("folder", metavar="CHECKPOINT")
@click.argument("pictures", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", default=Path("headmask.npy"), show_default=True, type=click.Path(path_type=Path))
@click.option("--prompt", default=PROMPT, show_default=True, help="What each picture is asked.")
@click.option("--threshold", default=0.2, show_default=True)
@click.option("--share", default=0.4, show_default=True, help="Share of the pictures that must be above it.")
@click.option("--heads", type=float, help="Heads kept per layer on average, instead of a threshold.")
def main(folder: str, pictures: tuple[Path, ...], out: Path, prompt: str, threshold: float, share: float,
         heads: float | None) -> None:  # fmt: skip
    """Write the heads that stay active for visual tokens as a bool array [layers, heads]."""
    home = checkpoint.resolve(folder)
    m, of, tokens = (
        original.view(references.load(home)),
        checkpoint.Checkpoint.open(home),
        AutoTokenizer.from_pretrained(home),
    )
    before, after = prompt.split("<image>")
    ids = [*tokens(before).input_ids, m.image_token_id, *tokens(after, add_special_tokens=False).input_ids]
    samples = np.stack([ratios(m, ids, seen(m, of, path)) for path in pictures])
    if heads is not None:
        tries = sorted(set(samples.flatten()), reverse=True)
        threshold = next(t for t in tries if mask(samples, t, share).mean() * samples.shape[2] >= heads)
    kept = mask(samples, threshold, share)
    np.save(out, kept)
    print(f"{out}: {kept.sum()} of {kept.size} heads kept, threshold {threshold:.4g}; per layer {kept.sum(1).tolist()}")


if __name__ == "__main__":
    main()

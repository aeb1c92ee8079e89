"""YOPO's head mask for a checkpoint: `python samples/yopo/head_mask.py CHECKPOINT PICTURE... --out headmask.npy`.

The paper's rule (arXiv:2410.06169): a head stays active for visual tokens if in enough pictures its attention to them,
relative to its attention to all other tokens, is above a threshold; the first two layers keep all heads. Given
`--heads` instead of a threshold, the threshold that keeps this many heads per layer on average is looked for.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil

from lvlm_edge.exporter import references
from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.references import original

PROMPT = "USER: <image>\nDescribe the picture. ASSISTANT:"


@torch.no_grad()
def ratios(m: original.Original, ids: list[int], pixels: torch.Tensor) -> np.ndarray:
    """Attention to visual tokens over attention to all others, summed over all queries, [layers, heads]."""
    _, _, rows, visual = m.read(ids, pixels)
    x, at, found = rows, torch.arange(len(rows)), []
    for layer in m.decoder.layers:
        q, k, v = original.qkv(layer, layer.input_layernorm(x))
        q, k = original.rope(m.decoder, q, at), original.rope(m.decoder, k, at)
        attention = original.softmax(q, k, at[:, None] >= at)
        found.append(attention[..., visual].sum((1, 2)) / attention[..., ~visual].sum((1, 2)))
        x = original.feed_forward(layer, x + original.join(layer, attention @ v))
    return torch.stack(found).numpy()


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
    m, tokens = original.view(references.load(home)), AutoTokenizer.from_pretrained(home)
    tower = home / json.loads((home / "config.json").read_text()).get("mm_vision_tower", ".")
    processor = CLIPImageProcessorPil.from_pretrained(tower if (tower / "preprocessor_config.json").exists() else home)
    before, after = prompt.split("<image>")
    ids = [*tokens(before).input_ids, m.image_token_id, *tokens(after, add_special_tokens=False).input_ids]
    seen = [processor(Image.open(path).convert("RGB"), return_tensors="pt").pixel_values for path in pictures]
    samples = np.stack([ratios(m, ids, pixels) for pixels in seen])
    if heads is not None:
        tries = sorted(set(samples.flatten()), reverse=True)
        threshold = next(t for t in tries if mask(samples, t, share).mean() * samples.shape[2] >= heads)
    kept = mask(samples, threshold, share)
    np.save(out, kept)
    print(f"{out}: {kept.sum()} of {kept.size} heads kept, threshold {threshold:.4g}; per layer {kept.sum(1).tolist()}")


if __name__ == "__main__":
    main()

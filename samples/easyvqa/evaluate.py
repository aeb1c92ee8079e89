"""Held-out accuracy of the sample, in PyTorch and from bundles: `python samples/easyvqa/evaluate.py`.

Answers are generated greedily and compared as text. Dense, FastV at several keep ratios, and as many random tokens
in place of FastV's, all over the same questions. With --card the table takes its place in the model card.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import data
import numpy as np
import torch
from rich.progress import track

from lvlm_edge.exporter import export, references
from lvlm_edge.runtime import Pipeline

HERE = Path(__file__).parent
RATIOS = (0.5, 0.25, 0.1)
PRUNE_LAYER = 2
STEPS = 3  # an answer, end-of-sequence, and one to see that it ends
Answer = Callable[[list[int], np.ndarray, np.random.Generator], list[int]]


def from_bundle(checkpoint: Path, folder: Path, ratio: float | None, scattered: bool) -> tuple[Answer, Pipeline]:
    """Answers of a bundle; `scattered` replaces the scores by random ones."""
    settings = {"max_text_tokens": 32, "max_new_tokens": STEPS}
    if ratio is None:
        export(checkpoint, folder, **settings)
    else:
        export(checkpoint, folder, method="fastv", prune_layer=PRUNE_LAYER, keep_ratio=ratio, **settings)
    pipe = Pipeline.load(folder)
    visual = pipe.manifest.counts.visual_tokens

    def answer(prompt: list[int], pixels: np.ndarray, rng: np.random.Generator) -> list[int]:
        chance = {"score": rng.random((1, visual), np.float32)} if scattered else None
        return pipe.generate_tokens(prompt, pixels, max_new_tokens=STEPS, ignore_eos=True, replace=chance).token_ids

    return answer, pipe


def from_pytorch(model: torch.nn.Module, count: int, ratio: float | None, scattered: bool) -> Answer:
    """Answers of transformers: stock `generate`, or the plain FastV reference."""
    config = {"prune_layer": PRUNE_LAYER, "keep_ratio": ratio, "keep_tokens": None}
    run = references.module("none" if ratio is None else "fastv").run

    def answer(prompt: list[int], pixels: np.ndarray, rng: np.random.Generator) -> list[int]:
        chosen = None
        if scattered:  # the same draw as the bundle's: the highest random scores
            scores = rng.random((1, count), np.float32)[0]
            chosen = torch.from_numpy(np.sort(np.argsort(-scores, kind="stable")[: round(count * ratio)]))
        return run(model, config, prompt, torch.from_numpy(pixels), STEPS, chosen).tokens

    return answer


def answers(answer: Answer, pipe: Pipeline, split: data.Split, chosen: np.ndarray, what: str) -> list[str]:
    """The answer to each chosen question, as text up to the end-of-sequence token."""
    found, text = [], pipe._load_text()
    for number in track(chosen, what):
        question, _, picture = split.questions[number]
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = text.encode_chat([{"role": "user", "content": content}])
        tokens = answer(prompt, data.normalise(split.pictures[picture : picture + 1]), np.random.default_rng(number))
        ends = [i for i, token in enumerate(tokens) if token in pipe.manifest.eos_token_ids]
        found.append(text.decode(tokens[: ends[0]] if ends else tokens).strip())
    return found


def table(checkpoint: Path, count: int, seed: int) -> str:
    """The accuracy table in Markdown."""
    torch.set_num_threads(1)  # the model is too small for more
    split, model = data.load("test"), references.load(checkpoint)
    visual = model.config.image_seq_length
    chosen = np.random.default_rng(seed).permutation(len(split.questions))[:count]
    truth = [split.questions[i][1] for i in chosen]
    kinds = {"yes/no": ("yes", "no"), "shape": data.SHAPES, "color": data.COLORS}
    rows = [
        f"{count} held-out questions of easy-VQA (of {len(split.questions)}; `--questions {count} --seed {seed}`).",
        "",
        "| tokens kept from layer 2 on | PyTorch | bundle | same answer | " + " | ".join(kinds) + " |",
        "|---|---|---|---|" + "---|" * len(kinds),
    ]
    for ratio, scattered in [(None, False), *((r, s) for r in RATIOS for s in (False, True))]:
        name = "all" if ratio is None else f"{round(visual * ratio)} {'at random' if scattered else 'by FastV'}"
        with tempfile.TemporaryDirectory() as folder:
            answer, pipe = from_bundle(checkpoint, Path(folder) / "bundle", ratio, scattered)
            mine = answers(answer, pipe, split, chosen, f"{name}, bundle")
            theirs = answers(from_pytorch(model, visual, ratio, scattered), pipe, split, chosen, f"{name}, PyTorch")
        right = np.array([m == t for m, t in zip(mine, truth, strict=True)])
        cells = [
            f"{name} ({'100' if ratio is None else f'{ratio * 100:g}'} %)",
            f"{np.mean([a == t for a, t in zip(theirs, truth, strict=True)]):.4f}",
            f"{right.mean():.4f}",
            f"{np.mean([a == b for a, b in zip(mine, theirs, strict=True)]):.2%}",
            *(f"{right[[t in words for t in truth]].mean():.3f}" for words in kinds.values()),
        ]
        rows.append("| " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    return "\n".join([*rows, "", "By kind of answer: the bundle's. Float32, ONNX Runtime and PyTorch on the CPU."])


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), default=HERE / "checkpoint")
@click.option("--questions", default=2000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--card", is_flag=True, help="Write the table into the model card.")
def main(checkpoint: Path, questions: int, seed: int, card: bool) -> None:
    """Accuracy of the sample: dense, FastV and random pruning, PyTorch beside bundle."""
    made = table(checkpoint, questions, seed)
    print(made)
    if card:
        path = HERE / "README.md"
        head, _, rest = path.read_text().partition("<!-- table -->\n")
        _, _, tail = rest.partition("<!-- /table -->")
        path.write_text(f"{head}<!-- table -->\n{made}\n<!-- /table -->{tail}")


if __name__ == "__main__":
    main()

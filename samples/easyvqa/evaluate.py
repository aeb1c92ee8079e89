"""Held-out accuracy of the sample, in PyTorch and from bundles: `python samples/easyvqa/evaluate.py`.

Answers are generated greedily and compared as text. The table of pruning has dense, FastV at several keep ratios, and
as many random tokens in place of FastV's; the table of methods has every method, those that are trained on their own
checkpoints. All are asked the same questions. With --card a table takes its place in the model card.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import data
import easy_vqa
import numpy as np
import torch
from rich.progress import track
from tokenizers import Tokenizer

from lvlm_edge.exporter import export, quantize, references
from lvlm_edge.exporter.references import original, quantised
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle import WeightFormats

HERE = Path(__file__).parent
RATIOS = (0.5, 0.25, 0.1)
PRUNE_LAYER = 2
STEPS = 3  # an answer, end-of-sequence, and one to see that it ends
VARIANTS: tuple[tuple[str, str, str, dict[str, object]], ...] = (  # row, folder, method, options
    ("none", "checkpoint", "none", {}),
    ("FastV, 36 of 144 tokens from layer 2 on", "checkpoint", "fastv", {"prune_layer": 2, "keep_ratio": 0.25}),
    ("ProxyV, 9 proxies from layer 2 on", "proxyv", "proxyv", {}),
    ("YOPO, `released`", "yopo", "yopo", {"semantics": "released"}),
    ("YOPO, `dropped`", "yopo", "yopo", {"semantics": "dropped"}),
    ("HiMix", "himix", "himix", {}),
)
FASTV = {"method": "fastv", "prune_layer": PRUNE_LAYER, "keep_ratio": 0.25}
FORMATS: tuple[tuple[str, dict[str, object]], ...] = (  # how matrices are kept
    ("float32", {}),
    ("int8", {"weights": "int8"}),
    ("int8, encoder too", {"weights": "int8", "vision_weights": "int8"}),
    ("int4, head int8", {"weights": "int4"}),
    ("int4 throughout", {"weights": "int4", "vision_weights": "int4", "head_weights": "int4"}),
)
KINDS = {"yes/no": ("yes", "no"), "shape": data.SHAPES, "color": data.COLORS}
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


def held_out(count: int, seed: int) -> tuple[data.Split, np.ndarray, list[str]]:
    """The test split, numbers of some of its questions drawn at random, and their right answers."""
    split = data.load("test")
    chosen = np.random.default_rng(seed).permutation(len(split.questions))[:count]
    return split, chosen, [split.questions[i][1] for i in chosen]


def greedy(pipe: Pipeline) -> Answer:
    """Answers of a pipeline as it is."""

    def answer(prompt: list[int], pixels: np.ndarray, _: np.random.Generator) -> list[int]:
        return pipe.generate_tokens(prompt, pixels, max_new_tokens=STEPS, ignore_eos=True).token_ids

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
    (split, chosen, truth), model = held_out(count, seed), references.load(checkpoint)
    visual = model.config.image_seq_length
    rows = [
        f"{count} held-out questions of easy-VQA (of {len(split.questions)}; `--questions {count} --seed {seed}`).",
        "",
        "| tokens kept from layer 2 on | PyTorch | bundle | same answer | " + " | ".join(KINDS) + " |",
        "|---|---|---|---|" + "---|" * len(KINDS),
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
            *(f"{right[[t in words for t in truth]].mean():.3f}" for words in KINDS.values()),
        ]
        rows.append("| " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    return "\n".join([*rows, "", "By kind of answer: the bundle's. Float32, ONNX Runtime and PyTorch on the CPU."])


def method_config(folder: Path, method: str, options: dict[str, object]) -> dict[str, object]:
    """What a method's reference must know: from the checkpoint, and the options on top."""
    config = json.loads((folder / "config.json").read_text())
    found: dict[str, object] = {"fastv": {"keep_tokens": None}}.get(method, {})
    if method == "proxyv":
        found = {"start_layer": config["proxyv_start_layer"], "reduce_factor": config["proxyv_reduce_factor"],
                 "learn_proxy": config["learn_proxy"]}  # fmt: skip
    if method == "yopo":
        mask = ["".join("01"[int(kept)] for kept in row) for row in np.load(folder / "headmask.npy")]
        found = {"window": config["attncut_w"], "cutoff": config["layercut_num"], "ffn_ratio": config["mlpcut_ratio"],
                 "head_mask": mask}  # fmt: skip
    return {**found, **options}


def reference_answers(
    folder: Path, method: str, options: dict[str, object], split: data.Split, chosen: np.ndarray, what: str
) -> list[str]:
    """The answer of a method's PyTorch reference to each chosen question, as `answers` gives them."""
    m, tokens = original.view(references.load(folder)), Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = m.whole if isinstance(m, original.Hub) else m
    image, end, found = tokens.token_to_id("<image>"), tokens.token_to_id("</s>"), []
    run, config = references.module(method).run, method_config(folder, method, options)
    for number in track(chosen, what):
        question, _, picture = split.questions[number]
        ids = [m.image_token_id if t == image else t for t in tokens.encode(data.prompt(question)).ids]
        pixels = torch.from_numpy(data.normalise(split.pictures[picture : picture + 1]))
        said = run(model, config, ids, pixels, STEPS).tokens
        found.append(tokens.decode(said[: said.index(end)] if end in said else said).strip())
    return found


def methods_table(count: int, seed: int, bundles: bool) -> str:
    """Every method's accuracy in Markdown; without bundles, of its PyTorch reference alone."""
    torch.set_num_threads(1)
    split, chosen, truth = held_out(count, seed)
    columns = ["method", "PyTorch", *(["bundle", "same answer"] if bundles else []), *KINDS]
    rows = [
        f"{count} held-out questions of easy-VQA (of {len(split.questions)}; `--questions {count} --seed {seed}`).",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for name, folder, method, options in VARIANTS:
        theirs = reference_answers(HERE / folder, method, options, split, chosen, f"{name}, PyTorch")
        mine = theirs
        if bundles:
            with tempfile.TemporaryDirectory() as place:
                made = Path(place) / "bundle"
                export(HERE / folder, made, method=method, max_text_tokens=32, max_new_tokens=STEPS, **options)
                pipe = Pipeline.load(made)
                mine = answers(greedy(pipe), pipe, split, chosen, f"{name}, bundle")
        right = np.array([m == t for m, t in zip(mine, truth, strict=True)])
        same = np.mean([a == b for a, b in zip(mine, theirs, strict=True)])
        cells = [name, f"{np.mean([a == t for a, t in zip(theirs, truth, strict=True)]):.4f}"]
        cells += [f"{right.mean():.4f}", f"{same:.2%}"] if bundles else []
        cells += [f"{right[[t in words for t in truth]].mean():.3f}" for words in KINDS.values()]
        rows.append("| " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    whose = "the bundle's" if bundles else "PyTorch's"
    return "\n".join([*rows, "", f"By kind of answer: {whose}. Float32 on the CPU."])


def formats_table(checkpoint: Path, count: int, seed: int) -> str:
    """Accuracy of bundles by how their matrices are kept, as `lvlm-edge run` runs them, in Markdown."""
    split, chosen, truth = held_out(count, seed)
    rows = [
        f"{count} held-out questions of easy-VQA (of {len(split.questions)}; `--formats --questions {count}`).",
        "",
        "| matrices | method | accuracy | same answer as float32 | bytes of weights |",
        "|---|---|---|---|---|",
    ]
    for method, options in (("none", {}), ("FastV, 36 of 144 tokens", FASTV)):
        first: list[str] = []
        for name, kept in FORMATS:
            with tempfile.TemporaryDirectory() as place:
                made = export(
                    checkpoint, Path(place) / "b", max_text_tokens=32, max_new_tokens=STEPS, **options, **kept
                )
                pipe = Pipeline.load(made, threads=1)
                size = (made / "weights.bin").stat().st_size
                mine = answers(greedy(pipe), pipe, split, chosen, f"{name}, {method}")
            first = first or mine
            right, same = (np.mean([a == b for a, b in zip(mine, other, strict=True)]) for other in (truth, first))
            rows.append(f"| {name} | {method} | {right:.4f} | {same:.2%} | {size:,} |")
            print(rows[-1], flush=True)
    return "\n".join([*rows, "", "ONNX Runtime on the CPU; activations are rounded too where weights are int8."])


def first_answers(
    model: torch.nn.Module, folder: Path, split: data.Split, chosen: np.ndarray, what: str
) -> tuple[list[str], torch.Tensor]:
    """A model's answer to each chosen question, and the logits of its first token, [questions, vocab]."""
    tokens, found, logits = Tokenizer.from_file(str(folder / "tokenizer.json")), [], []
    end, run = tokens.token_to_id("</s>"), references.module("none").run
    for number in track(chosen, what):
        question, _, picture = split.questions[number]
        pixels = torch.from_numpy(data.normalise(split.pictures[picture : picture + 1]))
        reference = run(model, {}, tokens.encode(data.prompt(question)).ids, pixels, STEPS)
        said = reference.tokens
        found.append(tokens.decode(said[: said.index(end)] if end in said else said).strip())
        logits.append(reference.logits[0])
    return found, torch.stack(logits)


def quantised_table(checkpoint: Path, count: int, seed: int) -> str:
    """INT4 decoder matrices by how they are rounded, in PyTorch, in Markdown; calibrated on training questions."""
    split, chosen, truth = held_out(count, seed)
    rows = [
        f"{count} held-out questions of easy-VQA (`--quantised --questions {count}`).",
        "",
        "| decoder's matrices | accuracy | same answer as float32 | error of logits | bytes of the checkpoint |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as place:
        samples = Path(place) / "train.jsonl"
        paths, asked = easy_vqa.get_train_image_paths(), zip(*easy_vqa.get_train_questions(), strict=True)
        lines = [{"image": str(paths[picture]), "prompt": q, "answer": a} for q, a, picture in asked]
        samples.write_text("\n".join(map(json.dumps, lines)))
        first: tuple[list[str], torch.Tensor] | None = None
        for name in ("float32", "int4, nearest", "int4, awq", "int4, gptq"):
            folder = checkpoint
            if name.endswith(("awq", "gptq")):
                folder = Path(place) / name[-4:].strip()
                quantize(checkpoint, folder, pictures=samples, algorithm=folder.name, block_size=32, seed=seed)
            model = references.load(folder)
            if name.endswith("nearest"):
                quantised.apply(model, WeightFormats(decoder="int4", block=32), "bfloat16")
            found, logits = first_answers(model, checkpoint, split, chosen, name)
            first = first or (found, logits)
            right, same = (np.mean([a == b for a, b in zip(found, other, strict=True)]) for other in (truth, first[0]))
            error = (logits - first[1]).norm() / first[1].norm()
            size = "" if name.endswith("nearest") else f"{(folder / 'model.safetensors').stat().st_size:,}"
            rows.append(f"| {name} | {right:.4f} | {same:.2%} | {error:.2%} | {size} |")
            print(rows[-1], flush=True)
    return "\n".join([*rows, "", "PyTorch on the CPU, blocks of 32 with scales in bfloat16, 128 training questions."])


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), default=HERE / "checkpoint")
@click.option("--questions", default=2000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--methods", is_flag=True, help="The table of methods, not that of pruning.")
@click.option("--formats", is_flag=True, help="The table of weights as small integers.")
@click.option("--quantised", "small", is_flag=True, help="The table of INT4 with and without calibration.")
@click.option("--bundles/--no-bundles", default=True, show_default=True, help="Of the methods' bundles too.")
@click.option("--card", is_flag=True, help="Write the table into the model card.")
def main(
    checkpoint: Path, questions: int, seed: int, methods: bool, formats: bool, small: bool, bundles: bool, card: bool
) -> None:
    """Accuracy of the sample: dense, FastV and random pruning; or every method; or small weights, calibrated or not."""
    if formats:
        mark, made = "formats", formats_table(checkpoint, questions, seed)
    elif small:
        mark, made = "quantised", quantised_table(checkpoint, questions, seed)
    elif methods:
        mark, made = "methods", methods_table(questions, seed, bundles)
    else:
        mark, made = "table", table(checkpoint, questions, seed)
    print(made)
    if card:
        path = HERE / "README.md"
        head, _, rest = path.read_text().partition(f"<!-- {mark} -->\n")
        _, _, tail = rest.partition(f"<!-- /{mark} -->")
        path.write_text(f"{head}<!-- {mark} -->\n{made}\n<!-- /{mark} -->{tail}")


if __name__ == "__main__":
    main()

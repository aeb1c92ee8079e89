"""Bundles against OpenVINO and transformers in one run: `python samples/bench/against_openvino.py --python OTHER`.

OTHER is a Python with `openvino` and `optimum-intel[openvino]` (and no torchvision), which this project does not need:

    OTHER -m optimum.commands.optimum_cli export openvino -m build/bench/smol --task image-text-to-text \
        --weight-format fp16 build/bench/smol-openvino-fp16     # and int8

The three models of such an export (encoder, embedding, decoder with its own cache) are run through OpenVINO's runtime,
without GenAI's tokenizer and scheduler. A fresh picture and prompt of 676 tokens with 576 visual for every turn, 16
greedy tokens, two threads; medians of the turns, the lowest in brackets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import click
import numpy as np

TEXT, BEFORE, NEW, VISUAL = 100, 35, 16, 576


def prompt(seed: int, image: int):
    """Tokens before and after the picture, and the picture."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, image, TEXT)
    return ids[:BEFORE], ids[BEFORE:], rng.standard_normal((1, 3, 336, 336)).astype(np.float32)


def openvino_contender(folder: str, precision: str, threads: int):
    import openvino as ov

    core, at = ov.Core(), Path(folder)
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    names = ("vision_embeddings", "text_embeddings", "language")
    vision, table, decoder = (
        core.compile_model(at / f"openvino_{n}_model.xml", "CPU", options).create_infer_request() for n in names
    )
    image = json.loads((at / "config.json").read_text())["image_token_index"]

    def step(embeds: np.ndarray, length: int) -> int:
        rows = embeds.shape[1]
        inputs = {"inputs_embeds": embeds, "attention_mask": np.ones((1, length), np.int64)}
        inputs |= {"position_ids": np.arange(length - rows, length)[None], "beam_idx": np.zeros(1, np.int32)}
        return int(decoder.infer(inputs)[decoder.model_outputs[0]][0, -1].argmax())

    def once(seed: int) -> tuple[float, float]:
        before, after, pixels = prompt(seed, image)
        decoder.reset_state()
        began = time.perf_counter()
        seen = vision.infer([pixels])[vision.model_outputs[0]].copy()
        rows = [table.infer([ids[None]])[table.model_outputs[0]].copy() for ids in (before, after)]
        length = TEXT + VISUAL
        token = step(np.concatenate([rows[0], seen.reshape(1, VISUAL, -1), rows[1]], 1), length)
        first = time.perf_counter()
        for i in range(1, NEW):
            token = step(table.infer([np.array([[token]])])[table.model_outputs[0]].copy(), length + i)
        return first - began, (time.perf_counter() - first) / (NEW - 1)

    return once


def transformers_contender(folder: str, precision: str, threads: int):
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.set_num_threads(threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    image = model.config.image_token_id

    @torch.no_grad()
    def once(seed: int) -> tuple[float, float]:
        before, after, pixels = prompt(seed, image)
        tokens = torch.tensor([[*before, *[image] * VISUAL, *after]])
        began = time.perf_counter()
        out = model(input_ids=tokens, pixel_values=torch.from_numpy(pixels).to(dtype), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(NEW - 1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return first - began, (time.perf_counter() - first) / (NEW - 1)

    return once


def bundle_contender(folder: str, _: str, threads: int):
    from lvlm_edge.runtime import Pipeline

    place, _, ratio = folder.partition("@")
    pipe = Pipeline.load(place, keep_ratio=float(ratio) if ratio else None, threads=threads)
    image = pipe.manifest.image_token_id

    def once(seed: int) -> tuple[float, float]:
        before, after, pixels = prompt(seed, image)
        found = pipe.generate_tokens([*before, image, *after], pixels, max_new_tokens=NEW, ignore_eos=True)
        return found.seconds["first_token"], found.seconds["decode"] / (NEW - 1)

    return once


KINDS = {"openvino": openvino_contender, "transformers": transformers_contender, "bundle": bundle_contender}


def serve(kind: str, folder: str, precision: str, threads: int) -> None:
    """Answer seeds on stdin with two times on stdout."""
    once = KINDS[kind](folder, precision, threads)
    for line in sys.stdin:
        print(json.dumps(once(int(line))), flush=True)


@click.command()
@click.option("--python", "other", help="Python that has OpenVINO; without it the others are compared.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench"), show_default=True)
@click.option("--size", default="smol", show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
def main(other: str | None, work: Path, size: str, rounds: int, threads: int, bundles: tuple[Path, ...]) -> None:
    """BUNDLES, as FOLDER or FOLDER@KEEP-RATIO, against transformers and OpenVINO on the checkpoint WORK/SIZE."""
    wanted = [("transformers", work / size, p) for p in ("f32", "bf16")]
    if other:
        made = [(work / f"{size}-openvino-fp16", p) for p in ("f32", "bf16")]
        made += [(work / f"{size}-openvino-int8", p) for p in ("f32", "bf16")]
        wanted += [("openvino", folder, p) for folder, p in made]
    wanted += [("bundle", folder, "") for folder in bundles]
    running = {}
    for kind, folder, precision in wanted:
        python = other if kind == "openvino" else sys.executable
        command = [python, __file__, "--serve", kind, str(folder), precision, str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        name = f"{kind} {folder.name} {precision}".strip()
        running[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    found: dict[str, list[list[float]]] = {name: [] for name in running}
    for turn in range(rounds + 1):
        for name, process in running.items():
            process.stdin.write(f"{turn}\n")
            process.stdin.flush()
            found[name].append(json.loads(process.stdout.readline()))
    for process in running.values():
        process.stdin.close()
        process.wait()
    print("| | first token ms | per token ms |\n|---|---|---|")
    for name, turns in found.items():
        cells = [
            f"{median(t[i] for t in turns[1:]) * 1e3:.1f} ({min(t[i] for t in turns[1:]) * 1e3:.1f})" for i in (0, 1)
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:5], int(sys.argv[5]))
    else:
        main()

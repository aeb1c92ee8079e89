"""Train the sample checkpoint on easy-VQA: `python samples/easyvqa/train.py --out samples/easyvqa/checkpoint`.

Stage 1 aligns pictures with words: the mean of a picture's projected tokens must point to the embeddings of its
shape and its colour, and a linear head must tell them from the tower's own features, which gets shape off the ground.
Without it shape stays at chance, and comparing a named colour with a seen one is not learnt.
Stage 2 trains the whole model on answers. Several questions share one picture's visual tokens in a sequence (each
sees the picture and itself only), which is exact for a causal decoder and several times cheaper. Negated questions
come in gradually: while they are half of all, seeing the named thing says nothing about yes or no.
Interrupted, the same command goes on from the last saved step.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import data
import numpy as np
import reduced
import torch
import torch.nn.functional as F
from reduced import SLOT, SLOTS
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

PICTURES_1, PICTURES_2 = 96, 24  # pictures per step
SAVE_EVERY = 100


def build(tokens: Tokenizer) -> LlavaForConditionalGeneration:
    """The untrained model: 144 visual tokens, 8 decoder layers, 2.4 M parameters."""
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
        image_size=data.SIZE, patch_size=8, projection_dim=128,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=tokens.get_vocab_size(), max_position_embeddings=1024, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokens.token_to_id("<image>"),
        image_seq_length=(data.SIZE // 8) ** 2, vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def augment(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flips, transposition and small rolls, all of which leave shape and colour as they are."""
    out = np.empty_like(pictures)
    for i, picture in enumerate(pictures):
        flips, turn = rng.integers(0, 2, 3), rng.integers(-8, 9, 2)
        picture = picture[:: 1 - 2 * flips[0], :: 1 - 2 * flips[1]]
        out[i] = np.roll(picture.transpose(1, 0, 2) if flips[2] else picture, turn, (0, 1))
    return out


def ask(
    split: data.Split,
    by_picture: list[list[int]],
    forms: dict[str, list[str]],
    picture: int,
    done: float,
    rng: np.random.Generator,
) -> tuple[str, str]:
    """One question about a picture: from the data set, or where its labels are known also made from its templates.

    `done` is the share of training behind us: data set questions and negations grow to their final share by half-time.
    """
    shape, color = split.labels[picture]
    ramp = min(1.0, 2 * done)
    if shape < 0 or color < 0 or rng.random() < 0.4 * ramp:
        question, answer, _ = split.questions[int(rng.choice(by_picture[picture]))]
        return question, answer
    kind = str(rng.choice(["shape", "color", "yes/no", "yes/no", "yes/no", "yes/no"]))
    if kind == "yes/no":
        kind = "no" if rng.random() < 0.1 + 0.4 * ramp else "yes"
    form = str(rng.choice(forms[kind]))
    true = {"SHAPE": data.SHAPES[shape], "COLOR": data.COLORS[color]}
    if kind in ("shape", "color"):
        return form.replace("SHAPE", true["SHAPE"]).replace("COLOR", true["COLOR"]), true[kind.upper()]
    there = bool(rng.random() < 0.5)
    for key, words in (("SHAPE", data.SHAPES), ("COLOR", data.COLORS)):
        others = [w for w in words if w != true[key]]
        form = form.replace(key, true[key] if there else str(rng.choice(others)))
    return form, "yes" if there == data.asserts(form) else "no"


def templates(split: data.Split) -> dict[str, list[str]]:
    """Questions with their shape and colour words taken out: asking for shape, for color, `yes` asserting, `no` not."""
    forms: dict[str, set[str]] = {"shape": set(), "color": set(), "yes": set(), "no": set()}
    for question, answer, _ in split.questions:
        kind = "shape" if answer in data.SHAPES else "color" if answer in data.COLORS else None
        kind = kind or ("yes" if data.asserts(question) else "no")
        words = question.rstrip("?").split()
        words = ["SHAPE" if w in data.SHAPES else "COLOR" if w in data.COLORS else w for w in words]
        forms[kind].add(" ".join(words) + "?")
    return {kind: sorted(found) for kind, found in forms.items()}


class Packed(nn.Module):
    """Loss over SLOTS questions per picture, all attending to one copy of its visual tokens."""

    def __init__(self, model: LlavaForConditionalGeneration, prefix: list[int], image_token: int) -> None:
        super().__init__()
        self.model, at = model, prefix.index(image_token)
        visual = model.config.image_seq_length
        self.register_buffer("before", torch.tensor(prefix[:at]))
        self.register_buffer("after", torch.tensor(prefix[at + 1 :]))
        head = len(prefix) - 1 + visual
        slot = torch.arange(SLOTS * SLOT) // SLOT
        order = torch.cat([torch.arange(head), head + torch.arange(SLOTS * SLOT) % SLOT])
        group = torch.cat([torch.full((head,), -1), slot])
        sees = (order[:, None] >= order[None]) & ((group[:, None] == group[None]) | (group[None] == -1))
        self.register_buffer("mask", torch.where(sees, 0.0, -1e9)[None, None])
        self.register_buffer("positions", order[None])
        self.head = head

    def forward(self, pixels: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy of the answer token.

        Args:
            pixels: [B, 3, H, W] float32.
            ids: question, answer and end-of-sequence, right-padded, [B, SLOTS, SLOT] int64.
            labels: next token where it is part of an answer, else -100, [B, SLOTS, SLOT] int64.
        """
        core, batch = self.model.model, pixels.shape[0]
        hidden = core.vision_tower(pixels).last_hidden_state[:, 1:]
        image = core.multi_modal_projector(hidden)
        embed = core.get_input_embeddings()
        fixed = [embed(t).expand(batch, -1, -1) for t in (self.before, self.after)]
        x = torch.cat([fixed[0], image, fixed[1], embed(ids.flatten(1))], 1)
        mask = self.mask.to(x.dtype)
        out = core.language_model(inputs_embeds=x, attention_mask=mask, position_ids=self.positions, use_cache=False)
        chosen = labels.flatten(1) >= 0
        target = labels.flatten(1)[chosen]
        logits = self.model.lm_head(out.last_hidden_state[:, self.head :][chosen]).float()
        words = target != 2
        hit = (logits.argmax(-1) == target)[words].float().mean()
        return F.cross_entropy(logits, target), hit


def rate(step: int, steps: int, warm: int = 60) -> float:
    """Cosine schedule with linear warm-up, relative to the peak rate."""
    return min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class Run:
    """Steps with a schedule, a progress bar, and a state that survives a kill."""

    def __init__(self, name: str, folder: Path, module: nn.Module, groups: list[dict], steps: int) -> None:
        self.name, self.file, self.module, self.steps = name, folder / f"{name}.pt", module, steps
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)
        self.peaks = [g["lr"] for g in self.optimizer.param_groups]
        self.start = 0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.start = state["step"]

    def save(self, step: int) -> None:
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step}
        torch.save(state, self.file.with_suffix(".tmp"))
        os.replace(self.file.with_suffix(".tmp"), self.file)

    def go(self, loss_of) -> None:
        columns = (TextColumn(self.name), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                   TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
        with Progress(*columns) as bar:
            task, seen = bar.add_task("", total=self.steps, completed=self.start, note=""), []
            for step in range(self.start, self.steps):
                for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                    group["lr"] = peak * rate(step, self.steps)
                with torch.autocast("cpu", torch.bfloat16):
                    loss, hit = loss_of(step)
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
                self.optimizer.step()
                seen = [*seen[-49:], (float(loss.detach()), float(hit))]
                note = "loss {:.3f} hit {:.3f}".format(*np.mean(seen, 0))
                bar.update(task, advance=1, note=note)
                if (step + 1) % SAVE_EVERY == 0 or step + 1 == self.steps:
                    self.save(step + 1)
                    bar.console.print(f"{self.name} step {step + 1} {note}", highlight=False)


def train_alignment(
    model: LlavaForConditionalGeneration, split: data.Split, tokens: Tokenizer, folder: Path, steps: int, seed: int
) -> None:
    """Stage 1: the mean of a picture's projected tokens against the embeddings of the shape and colour words."""
    known = np.flatnonzero((split.labels >= 0).all(1))
    core, embed = model.model, model.get_input_embeddings()
    heads = nn.Linear(core.vision_tower.config.hidden_size, len(data.SHAPES) + len(data.COLORS))
    module = nn.ModuleList([core.vision_tower, core.multi_modal_projector, embed, heads])
    run = Run("alignment", folder, module, [{"params": module.parameters(), "lr": 1e-3}], steps)
    words = [torch.tensor([tokens.encode(f" {w}", add_special_tokens=False).ids[0] for w in group])
             for group in (data.SHAPES, data.COLORS)]  # fmt: skip

    def loss_of(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((seed, 1, step))
        chosen = rng.choice(known, PICTURES_1)
        pixels = torch.from_numpy(data.normalise(augment(split.pictures[chosen], rng)))
        features = core.vision_tower(pixels).last_hidden_state[:, 1:]
        seen = core.multi_modal_projector(features).mean(1).float()
        out = [20 * F.normalize(seen, dim=-1) @ F.normalize(embed(group), dim=-1).T for group in words]
        plain = heads(features.mean(1)).float().split([len(group) for group in words], -1)
        labels = torch.from_numpy(split.labels[chosen])
        loss = sum(F.cross_entropy(o, labels[:, i % 2]) for i, o in enumerate([*out, *plain]))
        hit = torch.stack([o.argmax(-1) == labels[:, i] for i, o in enumerate(out)]).all(0).float().mean()
        return loss, hit

    run.go(loss_of)


def train_answers(model: LlavaForConditionalGeneration, split: data.Split, tokens: Tokenizer, folder: Path,
                  steps: int, seed: int) -> None:  # fmt: skip
    """Stage 2: everything, on the answer and the end-of-sequence token."""
    prefix, image_token = head(tokens)
    module = Packed(model, prefix, image_token)
    slow = {id(p) for p in model.model.vision_tower.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in slow], "lr": 1.2e-3},
        {"params": [p for p in model.parameters() if id(p) in slow], "lr": 0.36e-3},
    ]
    batch = batches(split, tokens, prefix, (seed, 2))
    Run("answers", folder, module, groups, steps).go(lambda step: module(*batch(step, step / steps)))


def train_reduced(model: LlavaForConditionalGeneration, method: str, split: data.Split, tokens: Tokenizer,
                  folder: Path, steps: int, seed: int, **options: object) -> reduced.Reduced:  # fmt: skip
    """Fine-tune the trained sample with a reduction in it.

    HiMix's image projections begin alone, as in its paper. YOPO's two semantics take turns: its paper trains with
    `released` alone, and a model that never met `dropped` loses accuracy there.
    """
    prefix, image_token = head(tokens)
    module = reduced.METHODS[method](model, prefix, image_token, **options)
    batch = batches(split, tokens, prefix, (seed, 3))
    first = int(0.4 * steps) if method == "himix" else 0
    if first:
        groups = [{"params": module.images.parameters(), "lr": 2e-3}]
        Run(f"{method}-images", folder, module, groups, first).go(lambda step: module(*batch(step, 1.0)))
    run = Run(method, folder, module, module.groups(3e-4), steps - first)

    def loss_of(step: int) -> tuple[Tensor, Tensor]:
        module.dropped = step % 2 == 1
        return module(*batch(first + step, 1.0))

    run.go(loss_of)
    return module


def head(tokens: Tokenizer) -> tuple[list[int], int]:
    """Tokens before a question, which are begin-of-sequence, "user: ", image, newline; and the image's."""
    image_token = tokens.token_to_id("<image>")
    ids = tokens.encode(data.prompt("")).ids
    return ids[: ids.index(image_token) + 2], image_token


def batches(
    split: data.Split, tokens: Tokenizer, prefix: list[int], seed: tuple[int, ...]
) -> Callable[[int, float], tuple[Tensor, Tensor, Tensor]]:
    """What `Packed` takes, by step and share of training done: the same at every call."""
    forms = templates(split)
    by_picture: list[list[int]] = [[] for _ in split.pictures]
    for i, (_, _, picture) in enumerate(split.questions):
        by_picture[picture].append(i)
    usable = np.array([i for i, found in enumerate(by_picture) if found])

    def batch(step: int, done: float) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng((*seed, step))
        chosen = rng.choice(usable, PICTURES_2)
        ids = np.zeros((PICTURES_2, SLOTS, SLOT), np.int64)
        labels = np.full_like(ids, -100)
        for b, picture in enumerate(chosen):
            for s in range(SLOTS):
                question, answer = ask(split, by_picture, forms, picture, done, rng)
                asked = tokens.encode(data.prompt(question)).ids
                assert asked[: len(prefix)] == prefix
                full = tokens.encode(f"{data.prompt(question)} {answer}</s>").ids
                row, start = full[len(prefix) :], len(asked) - len(prefix)
                ids[b, s, : len(row)] = row
                labels[b, s, start - 1 : len(row) - 1] = row[start:]
        pixels = torch.from_numpy(data.normalise(augment(split.pictures[chosen], rng)))
        return pixels, torch.from_numpy(ids), torch.from_numpy(labels)

    return batch


def save(model: LlavaForConditionalGeneration, tokens: Tokenizer, out: Path) -> None:
    """Write the checkpoint in hub layout, weights in bfloat16, beside `out` and then renamed."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokens.save(str(partial / "tokenizer.json"))
    size = {"height": data.SIZE, "width": data.SIZE}
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
            "pad_token": "<pad>", "image_token": "<image>", "clean_up_tokenization_spaces": False,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "patch_size": 8, "vision_feature_select_strategy": "default",
            "image_token": "<image>", "num_additional_image_tokens": 1,
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
            "size": {"shortest_edge": data.SIZE}, "resample": 3, "do_center_crop": True, "crop_size": size,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": [data.MEAN] * 3, "image_std": [data.STD] * 3,
        },
    }  # fmt: skip
    for name, content in files.items():
        (partial / name).write_text(json.dumps(content, indent=2) + "\n")
    (partial / "chat_template.jinja").write_text(data.TEMPLATE)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the finished checkpoint.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/easyvqa"), show_default=True,
              help="Folder of the training state.")  # fmt: skip
@click.option("--method", type=click.Choice(["none", *reduced.METHODS]), default="none", show_default=True,
              help="Fine-tune the sample for this method instead of training it from nothing.")  # fmt: skip
@click.option("--source", type=click.Path(path_type=Path), default=Path(__file__).parent / "checkpoint",
              help="Checkpoint a method starts from.")  # fmt: skip
@click.option("--head-mask", type=click.Path(path_type=Path, exists=True), help="YOPO's (samples/yopo/head_mask.py).")
@click.option("--alignment-steps", default=600, show_default=True)
@click.option("--answer-steps", default=1500, show_default=True)
@click.option("--steps", default=300, show_default=True, help="Steps of a method's fine-tune.")
@click.option("--threads", type=int, help="Of PyTorch.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, work: Path, method: str, source: Path, head_mask: Path | None, alignment_steps: int,
         answer_steps: int, steps: int, threads: int | None, seed: int) -> None:  # fmt: skip
    """Train the easy-VQA sample from nothing, or fine-tune it for a method."""
    if method == "yopo" and head_mask is None:
        raise click.UsageError("--method yopo needs --head-mask; samples/yopo/head_mask.py makes one")
    work.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    split = data.load("train")
    if method != "none":
        tokens = Tokenizer.from_file(str(source / "tokenizer.json"))
        model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        options = {"head_mask": torch.from_numpy(np.load(head_mask))} if method == "yopo" else {}
        train_reduced(model, method, split, tokens, work, steps, seed, **options).save(source, out)
        return
    tokens = data.tokenizer([f"{data.prompt(q)} {a}" for q, a, _ in split.questions])
    model = build(tokens)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {tokens.get_vocab_size()}")
    train_alignment(model, split, tokens, work, alignment_steps, seed)
    train_answers(model, split, tokens, work, answer_steps, seed)
    save(model, tokens, out)


if __name__ == "__main__":
    main()

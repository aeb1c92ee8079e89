"""FastV: bundles against the released code's outputs, and against a slow, plain reference written from the paper."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from lvlm_edge.exporter import plan
from lvlm_edge.exporter.methods import fastv
from lvlm_edge.exporter.planning import PlanError
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle.kv_cache import Layout
from lvlm_edge.runtime.errors import UnsupportedError
from tests import checkpoints
from tests.cases import both
from tests.checkpoints import IMAGE

GQA = {"num_attention_heads": 8, "num_key_value_heads": 2}

# The reference: mask mode. Nothing is gathered and nothing is cached; every token recomputes the whole sequence, and
# keys of dropped tokens are hidden from layer K on. It knows the decoder's published arithmetic and no product code.


class Plain:
    """A Llama decoder in float64 on the weights of a Hugging Face state dict."""

    def __init__(self, folder: Path) -> None:
        model = checkpoints.stock(folder)
        self.config = model.config.text_config
        self.weights = {
            key.removeprefix("model.language_model."): value.double() for key, value in model.state_dict().items()
        }
        self.head_dim = self.config.head_dim

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def norm(self, name: str, x: Tensor) -> Tensor:
        return (
            self.weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        )

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.head_dim).transpose(0, 1)

    def rope(self, x: Tensor) -> Tensor:
        """Rotate-half, row i at position i."""
        half = self.head_dim // 2
        theta = self.config.rope_parameters["rope_theta"]
        angle = torch.outer(
            torch.arange(x.shape[1]).double(), theta ** (-torch.arange(half).double() * 2 / self.head_dim)
        )
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def layer(self, i: int, x: Tensor, hidden_keys: Tensor) -> tuple[Tensor, Tensor]:
        """Rows after layer i, and its attention [H, n, n]; `hidden_keys` [n] may not be read by anyone."""
        at = f"layers.{i}"
        normed = self.norm(f"{at}.input_layernorm", x)
        q = self.rope(self.heads(self.linear(f"{at}.self_attn.q_proj", normed)))
        k = self.rope(self.heads(self.linear(f"{at}.self_attn.k_proj", normed)))
        v = self.heads(self.linear(f"{at}.self_attn.v_proj", normed))
        shared = len(q) // len(k)
        k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        # a large number and not infinity: a dropped row may see nothing at all, and nobody reads it
        scores = (q @ k.transpose(1, 2) * self.head_dim**-0.5).masked_fill(future | hidden_keys, -1e30)
        attention = scores.softmax(-1)
        x = x + self.linear(f"{at}.self_attn.o_proj", (attention @ v).transpose(0, 1).flatten(1))
        normed = self.norm(f"{at}.post_attention_layernorm", x)
        gate, up = self.linear(f"{at}.mlp.gate_proj", normed), self.linear(f"{at}.mlp.up_proj", normed)
        return x + self.linear(f"{at}.mlp.down_proj", gate * torch.sigmoid(gate) * up), attention


def plain_fastv(
    folder: Path, ids: list[int], pictures: np.ndarray, *, prune_layer: int, count: int, steps: int
) -> tuple[list[int], np.ndarray, list[int]]:
    """Greedy tokens, logits [steps, vocab], and the kept visual tokens, ranked once."""
    model = Plain(folder)
    table = model.weights["embed_tokens.weight"]
    image = checkpoints.features(folder, pictures).double()
    each = len(image) // len(pictures)
    flat = [t for i in ids for t in ([i] * each if i == IMAGE else [i])]
    visual = torch.tensor([i for i, t in enumerate(flat) if t == IMAGE])
    x = table[torch.tensor(flat)]
    x[visual] = image
    kept: list[int] | None = None
    tokens: list[int] = []
    logits: list[Tensor] = []
    attention = torch.empty(0)
    for _ in range(steps):
        rows = torch.cat([x, table[torch.tensor(tokens, dtype=torch.int64)]])
        dropped = torch.zeros(len(rows), dtype=torch.bool)
        for i in range(model.config.num_hidden_layers):
            if i == prune_layer:
                if kept is None:
                    score = attention[:, -1].mean(0)[visual]
                    kept = sorted(score.argsort(descending=True, stable=True)[:count].tolist())
                dropped[visual] = True
                dropped[visual[kept]] = False
            rows, attention = model.layer(i, rows, dropped)
        last = rows[torch.nonzero(~dropped)[-1, 0]]  # of the rows that stay
        logits.append(model.linear("lm_head", model.norm("norm", last)))
        tokens.append(int(logits[-1].argmax()))
    assert kept is not None
    return tokens, torch.stack(logits).numpy(), kept


def same(found: Any, tokens: list[int], logits: np.ndarray, kept: list[int]) -> None:
    """A float32 bundle says what the float64 reference says; 1e-4 is rounding over a few layers (seen: 5e-6)."""
    assert found.kept_visual.tolist() == kept
    assert found.token_ids == tokens
    assert np.abs(found.logits - logits).max() < 1e-4


@pytest.mark.claims("equal", family="llava", method="fastv")
def test_the_bundle_gives_the_released_codes_tokens_and_logits(fastv_oracle, oracles, export_once):
    case, tensors = json.loads(fastv_oracle.read_text()), load_file(fastv_oracle.with_suffix(".safetensors"))
    expected = case["expected_new_token_ids"]
    bundle = export_once(
        oracles / "llava_mha", method="fastv", prune_layer=case["prune_layer"], keep_ratio=case["keep_ratio"]
    )
    pipe = Pipeline.load(bundle)

    found = pipe.generate_tokens(
        case["prompt_token_ids"], tensors["pixel_values"], max_new_tokens=len(expected), ignore_eos=True
    )

    assert found.token_ids == expected
    assert np.abs(found.logits - tensors["step_logits"]).max() < 1e-3  # the oracles' own tolerance
    lengths = Layout(pipe.manifest.cache, pipe.manifest.dtype).lengths(found.prompt_tokens)
    assert list(lengths) == case["cache_lengths_after_prefill"]
    assert len(found.kept_visual) == case["num_kept"]
    assert (np.diff(found.kept_visual) > 0).all()
    assert found.kept_visual.min() >= 0 and found.kept_visual.max() < case["num_visual_tokens"]


PLACES = {
    "at the start": (20, 0),
    "after 35 tokens": (50, 35),
    "before the last token": (30, 29),
    "at the end": (30, 30),
}
SETTINGS = {
    "first layer only": ({"prune_layer": 1, "keep_ratio": 0.5}, 8),
    "last layer": ({"prune_layer": 3, "keep_ratio": 0.1}, 2),  # 1.6 rounds to 2
    "nearly all kept": ({"prune_layer": 2, "keep_ratio": 0.9}, 14),  # 14.4 rounds to 14
    "all kept": ({"prune_layer": 2, "keep_ratio": 1.0}, 16),
    "a count": ({"prune_layer": 2, "keep_tokens": 5}, 5),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_bundle_equals_the_plain_reference_under_grouped_queries(setting, gqa, exported):
    options, count = SETTINGS[setting]
    pipe = Pipeline.load(exported(gqa, method="fastv", **options))

    for seed, (text, before) in enumerate(PLACES.values()):
        ids, picture = checkpoints.prompt(text, before, seed=seed), checkpoints.pixels(seed=seed)
        found = pipe.generate_tokens(ids, picture, max_new_tokens=6, ignore_eos=True)
        same(found, *plain_fastv(gqa, ids, picture, prune_layer=options["prune_layer"], count=count, steps=6))


@pytest.mark.parametrize(
    ("size", "patch", "ratio", "count"),
    [(96, 16, 0.25, 9), (42, 14, 0.5, 4)],
    ids=["36 tokens", "4.5 of 9 round to 4"],
)
def test_other_picture_sizes_keep_the_count_rounded_half_to_even(size, patch, ratio, count, checkpoint_once, exported):
    folder = checkpoint_once(
        text={"num_hidden_layers": 2}, vision={"image_size": size, "patch_size": patch}, image_seq_length=576
    )
    pipe = Pipeline.load(exported(folder, method="fastv", prune_layer=1, keep_ratio=ratio))
    ids, picture = checkpoints.prompt(12, 4), checkpoints.pixels(size)

    found = pipe.generate_tokens(ids, picture, max_new_tokens=4, ignore_eos=True)

    assert len(found.kept_visual) == count
    same(found, *plain_fastv(folder, ids, picture, prune_layer=1, count=count, steps=4))


def test_two_pictures_with_text_between_are_ranked_together(gqa, exported):
    pipe = Pipeline.load(exported(gqa, method="fastv", prune_layer=2, keep_ratio=0.25, num_images=2))

    for seed, between in enumerate((0, 7)):
        ids = checkpoints.prompt(25, 3, images=2, between=between, seed=seed)
        pictures = checkpoints.pixels(images=2, seed=seed)
        found = pipe.generate_tokens(ids, pictures, max_new_tokens=6, ignore_eos=True)
        same(found, *plain_fastv(gqa, ids, pictures, prune_layer=2, count=8, steps=6))


def test_padding_never_changes_an_answer(gqa, exported):
    ids, picture = checkpoints.prompt(40, 5), checkpoints.pixels()

    found = [
        Pipeline.load(
            exported(gqa, method="fastv", prune_layer=1, keep_ratio=0.5, max_text_tokens=room)
        ).generate_tokens(ids, picture, max_new_tokens=16, ignore_eos=True)
        for room in (64, 128, 256)
    ]

    for other in found[1:]:
        assert other.kept_visual.tolist() == found[0].kept_visual.tolist()
        assert other.token_ids == found[0].token_ids
        assert np.abs(other.logits - found[0].logits).max() < 1e-4


def test_a_prompt_leaves_nothing_behind_for_the_next_one(gqa, export_once):
    pipe = Pipeline.load(export_once(gqa, method="fastv", prune_layer=2, keep_ratio=0.5))
    short, long = checkpoints.prompt(8, 3, seed=1), checkpoints.prompt(60, 20, seed=2)
    first = pipe.generate_tokens(short, checkpoints.pixels(seed=1), ignore_eos=True)

    pipe.generate_tokens(long, checkpoints.pixels(seed=2), ignore_eos=True)
    again = pipe.generate_tokens(short, checkpoints.pixels(seed=1), ignore_eos=True)

    assert again.token_ids == first.token_ids
    assert np.array_equal(again.logits, first.logits)


def test_text_alone_is_answered_as_without_reduction(gqa, exported):
    bundles = [exported(gqa, method="fastv", prune_layer=1, keep_ratio=0.25), exported(gqa, method="none")]

    for before, text in ((1, 5), (0, 64)):  # after a prompt with a picture, and as long as can be
        prompt = checkpoints.prompt(text, before)
        prompt.remove(IMAGE)
        pipes = [Pipeline.load(bundle) for bundle in bundles]
        for pipe in pipes:
            pipe.generate_tokens(checkpoints.prompt(30, 4), checkpoints.pixels(), max_new_tokens=2)
        fastv, none = (pipe.generate_tokens(prompt, None, ignore_eos=True) for pipe in pipes)

        assert fastv.token_ids == none.token_ids and len(none.token_ids) == 16
        assert np.abs(fastv.logits - none.logits).max() < 1e-4
        assert fastv.kept_visual.tolist() == []


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("last", [23, 30, 39])
def test_importance_is_the_last_real_rows_attention_averaged_over_heads(kv_heads, last):
    torch.manual_seed(0)
    query, key = torch.randn(1, 8, 40, 16) * 2, torch.randn(1, kv_heads, 40, 16) * 2
    visual = torch.arange(5, 21)

    found = fastv.importance(query, key, torch.tensor([last]), visual)

    real, repeated = last + 1, key.double().repeat_interleave(8 // kv_heads, 1)
    logits = query.double()[:, :, :real] @ repeated[:, :, :real].transpose(2, 3) / 4
    causal = logits.masked_fill(torch.ones(real, real, dtype=torch.bool).triu(1), float("-inf"))
    expected = causal.softmax(-1)[:, :, -1].mean(1)[:, 5:21]
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("visual", "ratio", "count"), [(576, 0.5, 288), (576, 0.25, 144), (576, 0.1, 58), (25, 0.5, 12), (25, 0.3, 8)]
)
def test_the_kept_count_is_rounded_half_to_even(visual, ratio, count):
    assert fastv.kept(fastv.Config(keep_ratio=ratio), visual) == count


def test_a_count_wins_over_a_ratio():
    assert fastv.kept(fastv.Config(keep_ratio=0.5, keep_tokens=7), 576) == 7


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_more_than_2048_rows_are_kept_in_order_with_their_positions(dtype):
    """Half precision holds whole numbers up to 2048 alone."""
    generator = torch.Generator().manual_seed(0)
    visual = torch.arange(35, 35 + 2880)  # any-resolution LLaVA's five crops
    text = torch.cat([torch.arange(35), torch.arange(35 + 2880, 3000)])
    score = torch.rand(1, 2880, generator=generator)
    hidden = torch.rand(1, 3000, 4, generator=generator).to(getattr(torch, dtype))
    plan: Any = SimpleNamespace(kept_tokens=2500, config=fastv.Config(prune_layer=1), injected=(), prompt=None)
    inputs = {"score": score, "hidden": hidden, "visual_index": visual, "text_index": text}
    inputs |= {"position_ids": torch.arange(3000)[None] + 7, "last_index": torch.tensor([2990])}

    found = fastv.select(None, plan, inputs)

    kept = sorted(sorted(range(2880), key=lambda i: -float(score[0, i]))[:2500])
    rows = sorted([*text.tolist(), *(35 + i for i in kept)])
    assert found["kept_visual"].tolist() == kept
    assert found["kept_position_ids"].tolist() == [[row + 7 for row in rows]]
    assert torch.equal(found["kept_hidden"], hidden[:, rows])
    assert found["kept_last_index"].tolist() == [rows.index(2990)]


def ranked(kind: str, keep: dict[str, Any]) -> dict[str, Any]:
    return {"method": "fastv", "prune_layer": 2, "rank": kind, "num_images": 2, **keep}


@pytest.mark.parametrize("exported", both([()], {()}), indirect=True)
def test_per_image_ranks_keep_as_many_tokens_of_every_image(exported, gqa):
    pipe = Pipeline.load(exported(gqa, **ranked("per-image", {"keep_ratio": 0.3})))
    together = Pipeline.load(exported(gqa, **ranked("together", {"keep_ratio": 0.3})))
    prompt, pixels = checkpoints.prompt(12, 4, images=2), checkpoints.pixels(images=2)

    found = pipe.generate_tokens(prompt, pixels, max_new_tokens=1)  # graphs of later tokens write scores of their own

    score = pipe.buffer("prefill_head", "score").read()[0]
    wanted = [i * 16 + j for i in (0, 1) for j in sorted(np.argsort(-score[i * 16 : i * 16 + 16])[:5])]
    assert found.kept_visual.tolist() == wanted
    assert together.generate_tokens(prompt, pixels, max_new_tokens=1).kept_visual.tolist() != wanted


def test_per_image_ranks_of_one_image_are_those_of_a_bundle_for_one(eager_once, gqa):
    two = Pipeline.load(eager_once(gqa, **ranked("per-image", {"keep_tokens": 5})))
    one = Pipeline.load(eager_once(gqa, method="fastv", prune_layer=2, keep_tokens=5))
    prompt, pixels = checkpoints.prompt(12, 4), checkpoints.pixels(images=1)

    found, wanted = (pipe.generate_tokens(prompt, pixels, max_new_tokens=6, ignore_eos=True) for pipe in (two, one))

    assert found.kept_visual.tolist() == wanted.kept_visual.tolist()
    assert found.token_ids == wanted.token_ids
    assert np.abs(found.logits - wanted.logits).max() < 1e-4


def test_check_judges_per_image_ranks(eager_once, gqa):
    made = eager_once(gqa, **ranked("per-image", {"keep_ratio": 0.3}))

    assert parity.check(made, gqa, steps=4, store=False).passed


def test_images_of_different_numbers_of_tokens_are_not_ranked_one_by_one(oracles):
    checkpoint = oracles / "families" / "internvl" / "internvl_a"
    with pytest.raises(PlanError, match="images of 16 and 176 visual tokens cannot be ranked one by one"):
        plan(checkpoint, method="fastv", rank="per-image", image_size=((150, 60), (56, 56)))
    with pytest.raises(UnsupportedError, match="rank is 'each'"):
        plan(checkpoint, method="fastv", rank="each", image_size=(56, 56))

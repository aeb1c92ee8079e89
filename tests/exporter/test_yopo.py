"""YOPO without training, on families whose pictures have any shape, several tiles, or text around them.

The oracle is stock `generate` with an attention written here, and visual rows of every MLP cut to their channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from lvlm_edge.exporter import plan, references
from lvlm_edge.exporter.bundles import plans
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.graphs import rotary
from lvlm_edge.exporter.methods import _yopo_counts, yopo
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.errors import UnsupportedError
from tests import eager, internvls, qwen, tiny
from tests.cases import some
from tests.qwen import TOLERANCE, Case

AXES = ("qwen2_vl", "qwen2_5_vl")  # families whose release drops layers before the softmax
HEADS = {"qwen2_vl": 6, "qwen2_5_vl": 6, "internvl": 4, "internvl_chat": 4, "smolvlm": 4, "video_llava": 4}
STEPS = 6


@dataclasses.dataclass(frozen=True)
class Settings:
    """YOPO's settings for a prompt.

    Attributes:
        window: None for visual tokens that see all before them.
        visual: rows of visual tokens, bool [n].
        grids: (rows, columns) of every tile.
        early: `released` drops layers before the softmax.
    """

    semantics: str
    window: int | None
    cutoff: int
    channels: int
    mask: np.ndarray[Any, Any]
    visual: Tensor
    grids: tuple[tuple[int, int], ...]
    early: bool


def near(settings: Settings) -> Tensor:
    """Which rows of the prompt see which, bool [n, n]."""
    n, where = len(settings.visual), settings.visual.nonzero()[:, 0].tolist()
    sees = torch.ones(n, n, dtype=torch.bool).tril()
    if settings.window is None:
        return sees
    half = (settings.window - 1) // 2
    at = [(t, i, j) for t, (rows, columns) in enumerate(settings.grids) for i in range(rows) for j in range(columns)]
    assert len(at) == len(where)
    for (tile, i, j), row in zip(at, where, strict=True):
        for (other, k, m), column in zip(at, where, strict=True):
            sees[row, column] = tile == other and abs(i - k) <= half and abs(j - m) <= half
    return sees


def attention(settings: Settings) -> Any:
    """An attention for stock modules, one head after the other."""
    whole = near(settings)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        rows, keys = query.shape[2], key.shape[2]
        visual = torch.cat([settings.visual, torch.zeros(keys - len(settings.visual), dtype=torch.bool)])
        asks = visual[-rows:]  # which of the queries are visual tokens
        sees = whole if rows > 1 else torch.ones(1, keys, dtype=torch.bool)
        late, share = module.layer_idx >= settings.cutoff, query.shape[1] // key.shape[1]
        found = []
        for h in range(query.shape[1]):
            kept = bool(settings.mask[module.layer_idx, h])
            gone = ~asks[:, None] & visual[None]  # text that looks at visual tokens
            hidden = gone & ((settings.semantics == "dropped" and not kept) or (late and settings.early))
            scores = query[0, h] @ key[0, h // share].T / math.sqrt(query.shape[3])
            weights = scores.masked_fill(~sees | hidden, -math.inf).softmax(-1)
            if not kept or (late and not settings.early):
                weights = weights.masked_fill(visual[None], 0)
            out = weights @ value[0, h // share]
            found.append(out.masked_fill(asks[:, None] & (not kept), 0))
        return torch.stack(found, 1)[None], None

    return attend


@contextmanager
def masked(m: Any, settings: Settings) -> Iterator[None]:
    """A stock model whose decoder attends and feeds forward as the settings say."""

    def cut(mlp: Any, inputs: Any, output: Tensor) -> Tensor:
        rows = inputs[0]
        if rows.shape[1] == 1:
            return output
        inside = mlp.act_fn(mlp.gate_proj(rows)) * mlp.up_proj(rows)
        inside[..., settings.channels :] = 0
        return torch.where(settings.visual[None, :, None], mlp.down_proj(inside), output)

    config = m.decoder.layers[0].self_attn.config
    AttentionInterface.register("yopo", attention(settings))
    before, config._attn_implementation = config._attn_implementation, "yopo"
    hooks = [layer.mlp.register_forward_hook(cut) for layer in m.decoder.layers]
    try:
        yield
    finally:
        config._attn_implementation = before
        for hook in hooks:
            hook.remove()


@lru_cache(maxsize=2)
def stock(folder: Path) -> Any:
    return references.view(references.load(folder))


def of_prompt(of: Case, family: str, views: int, semantics: str, options: dict[str, Any]) -> Settings:
    """The settings of an export for the case's own prompt."""
    visual = torch.tensor(of.data["input_ids"]) == stock(of.checkpoint).image_token_id
    if family in AXES:
        grids = tuple((h // 2, w // 2) for _, h, w in of.data["image_grid_thw"])
    else:
        side = math.isqrt(int(visual.sum()) // views)
        grids = ((side, side),) * views
    ffn = stock(of.checkpoint).language.config.intermediate_size
    return Settings(
        semantics=semantics,
        window=options.get("window"),
        cutoff=options["cutoff"],
        channels=int(ffn / options.get("ffn_ratio", 1)),
        mask=np.load(options["head_mask"]),
        visual=visual,
        grids=grids,
        early=family in AXES or semantics == "dropped",
    )


def sized(of: Case) -> dict[str, Any]:
    """The capacity of a case with one picture."""
    (size,) = of.data["picture_sizes"]
    return {"image_size": tuple(size), "max_text_tokens": 96, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def head_masks(tmp_path_factory) -> Any:
    """A file of a mask: all heads in the first layer, some in the second, none in the third, one group in the last."""

    @cache
    def made(family: str, layers: int) -> str:
        heads = HEADS[family]
        mask = np.random.default_rng(1).random((layers, heads)) > 0.5
        mask[0], mask[2], mask[-1] = True, False, np.arange(heads) < heads // 2
        assert 0 < mask[1].sum() < heads
        path = tmp_path_factory.mktemp("masks") / "headmask.npy"
        np.save(path, mask)
        return str(path)

    return made


CASES = {
    "qwen2_vl, as released": ("qwen2_vl", {"cutoff": 4}, "modern"),
    "qwen2_vl, window": ("qwen2_vl", {"window": 3, "cutoff": 4, "ffn_ratio": 2}, "legacy"),
    "qwen2_vl, cutoff 2": ("qwen2_vl", {"window": 5, "cutoff": 2}, "modern"),
    "qwen2_5_vl": ("qwen2_5_vl", {"window": 3, "cutoff": 4}, "modern"),
    "internvl, heads alone": ("internvl", {}, "modern"),
    "internvl, window of tiles": ("internvl", {"window": 3, "cutoff": 4, "ffn_ratio": 1.5}, "modern"),
    "internvl, wide window": ("internvl", {"window": 9, "cutoff": 4}, "legacy"),
    "internvl_chat": ("internvl_chat", {"window": 3, "cutoff": 3}, "modern"),
    "smolvlm, text between tiles": ("smolvlm", {"window": 3, "cutoff": 4}, "modern"),
}
EVERY = [(semantics, name) for semantics in ("released", "dropped") for name in CASES]
OFTEN = {
    ("released", "qwen2_vl, as released"),
    ("dropped", "qwen2_vl, window"),
    ("released", "qwen2_5_vl"),
    ("released", "internvl, window of tiles"),
    ("dropped", "internvl, wide window"),
    ("released", "internvl_chat"),
    ("dropped", "smolvlm, text between tiles"),
}
RUN = [
    *(pytest.param(*case.values, "bodies", marks=case.marks) for case in some(EVERY, OFTEN)),
    *(pytest.param(*case.values, "graphs", marks=case.marks) for case in some(EVERY, set())),
]


@pytest.mark.claims("equal", method="yopo")
@pytest.mark.parametrize(("semantics", "name", "exported"), RUN, indirect=["exported"])
def test_answers_are_those_of_stock_modules_with_masks(semantics, name, exported, oracles, head_masks):
    answers_like_stock(*CASES[name], semantics, exported, oracles, head_masks)


@pytest.mark.slow
@pytest.mark.parametrize("semantics", ["released", "dropped"])
def test_an_image_of_video_llava_is_answered_like_that_too(semantics, eager_once, oracles, head_masks):
    options = {"window": 3, "cutoff": 3}
    answers_like_stock("video_llava", options, "modern", semantics, eager_once, oracles, head_masks)


@torch.no_grad()
def answers_like_stock(
    family: str, options: dict[str, Any], lowering: str, semantics: str, exported: Any, oracles: Path, head_masks: Any
) -> None:
    of = qwen.case(oracles, family, "none_1")
    layers = stock(of.checkpoint).language.config.num_hidden_layers
    options = {"cutoff": layers} | options | {"head_mask": head_masks(family, layers)}
    bundle = exported(of.checkpoint, method="yopo", semantics=semantics, lowering=lowering, **options, **sized(of))
    pipe = Pipeline.load(bundle)
    ids, pixels = pipe.prepare(messages=of.data["messages"], images=of.pictures)

    found = pipe.generate_tokens(ids, pixels, max_new_tokens=STEPS, ignore_eos=True)

    m = stock(of.checkpoint)
    settings = of_prompt(of, family, pipe.manifest.views, semantics, options)
    with masked(m, settings):
        tokens, logits = m.answer(ids, references.given(m, pixels, [tuple(of.data["picture_sizes"][0])]), STEPS)
    assert found.token_ids == tokens
    assert np.abs(found.logits - logits.numpy()).max() <= TOLERANCE
    plain = pipe.manifest.method_config | {"head_mask": ["1" * HEADS[family]] * layers, "cutoff": layers}
    whole = references.module("yopo").run(m, plain, ids, references.given(m, pixels, m.sizes), STEPS)
    assert np.abs(whole.logits.numpy() - logits.numpy()).max() > 10 * TOLERANCE  # the mask counts


@pytest.mark.parametrize(("family", "semantics"), [("qwen2_vl", "released"), ("internvl", "dropped")])
def test_with_every_head_and_no_cutoff_it_is_the_stock_model(family, semantics, eager_once, oracles, tmp_path):
    of = qwen.case(oracles, family, "none_1")
    layers = len(stock(of.checkpoint).decoder.layers)
    np.save(tmp_path / "all.npy", np.ones((layers, HEADS[family]), bool))

    made = eager_once(
        of.checkpoint, method="yopo", semantics=semantics, head_mask=str(tmp_path / "all.npy"), **sized(of)
    )

    pipe = Pipeline.load(made)
    ids, pixels = pipe.prepare(messages=of.data["messages"], images=of.pictures)
    found = pipe.generate_tokens(ids, pixels, max_new_tokens=8, ignore_eos=True)
    assert found.token_ids == of.data["expected_new_token_ids"][:8]
    assert np.abs(found.logits - of.tensors["step_logits"][:8]).max() <= TOLERANCE


def test_qwen3_decoders_have_norms_on_their_heads(eager_once, oracles, head_masks, tmp_path):
    source = qwen.case(oracles, "internvl", "none_1").checkpoint
    folder = internvls.build(tmp_path / "m", source, decoder="qwen3", text={"head_dim": 32, "num_hidden_layers": 4})
    mask, sizes = head_masks("internvl", 4), {"image_size": (90, 60), "max_text_tokens": 64, "max_new_tokens": 8}
    m = stock(folder)

    pipe = Pipeline.load(eager_once(folder, method="yopo", semantics="dropped", cutoff=3, head_mask=mask, **sizes))

    ids, pixels = pipe.prepare("What?", [qwen.noise((90, 60))])
    given = references.given(m, pixels, [(90, 60)])
    expanded = torch.tensor(m.expanded(ids, m.counts(m.of_prompt(ids, given))))
    settings = Settings(
        semantics="dropped", window=None, cutoff=3, channels=m.language.config.intermediate_size, mask=np.load(mask),
        visual=expanded == m.image_token_id, grids=(), early=True,
    )  # fmt: skip
    with masked(m, settings), torch.no_grad():
        tokens, logits = m.answer(ids, given, STEPS)
    found = pipe.generate_tokens(ids, pixels, max_new_tokens=STEPS, ignore_eos=True)
    assert found.token_ids == tokens
    assert np.abs(found.logits - logits.numpy()).max() <= TOLERANCE


# What is computed and cached.


def test_a_key_head_is_left_out_where_all_its_query_heads_are(oracles, tmp_path):
    of = qwen.case(oracles, "qwen2_vl", "none_1")  # 6 query heads on 2 key heads
    rows = ("111111", "000100", "111000", "000000", "111111")
    np.save(tmp_path / "m.npy", np.array([[c == "1" for c in row] for row in rows]))
    options = {"semantics": "dropped", "cutoff": 5, "head_mask": str(tmp_path / "m.npy"), **sized(of)}

    made = plans.plan_of(Checkpoint.open(of.checkpoint), method="yopo", options=options)

    visual = sum(stop - start for start, stop in of.data["visual_rows"])
    found = [[(g.name, g.kv_heads, g.dropped) for g in made.groups(i)] for i in range(5)]
    assert found == [
        [("0", (0, 1), 0)],
        [("1.kept", (1,), 0), ("1.pruned", (0, 1), visual)],
        [("2.kept", (0,), 0), ("2.pruned", (1,), visual)],
        [("3", (0, 1), visual)],
        [("4", (0, 1), 0)],
    ]


@pytest.mark.parametrize(("family", "layers"), [("qwen2_vl", [[0, 2], [3, 4]]), ("internvl", [[0, 4]])])
def test_released_leaves_visual_tokens_out_where_the_release_masks_before_the_softmax(family, layers, oracles):
    of = qwen.case(oracles, family, "none_1")

    found = plan(of.checkpoint, method="yopo", cutoff=3, **sized(of))

    assert [stage["layers"] for stage in found["stages"]] == layers
    whole, text = found["stages"][0]["queries"], found["stages"][-1]["queries"]
    assert whole - text in (0, found["visual_tokens"]) and (whole > text) == (family == "qwen2_vl")


def test_the_papers_cost_without_a_window_has_every_visual_token_as_a_key(oracles):
    of = qwen.case(oracles, "qwen2_vl", "none_1")

    found = plan(of.checkpoint, method="yopo", cutoff=4, **sized(of))["paper"]

    assert found["ratio"] == pytest.approx(4 / 5, abs=1e-12)


# What `check` sees.

Patch = pytest.MonkeyPatch


def heads_of_the_layer_before(patch: Patch) -> None:
    right = _yopo_counts.heads
    for module in (_yopo_counts, yopo):
        patch.setattr(module, "heads", lambda plan, layer: right(plan, max(layer - 1, 0)))


def tiles_that_touch(patch: Patch) -> None:
    patch.setattr(yopo, "cells", lambda tiles, apart: _yopo_counts.cells(tiles, 0))


def columns_for_rows(patch: Patch) -> None:
    patch.setattr(yopo, "cells", lambda tiles, apart: sorted(_yopo_counts.cells(tiles, apart), key=lambda at: at[1]))


def one_axis(patch: Patch) -> None:
    patch.setattr(yopo, "rotation", lambda parts, at: rotary.rotation(parts, at[:1]))


def one_layer_too_many(patch: Patch) -> None:
    patch.setattr(_yopo_counts, "_limit", lambda spec, config: config.cutoff + 1)


def zeros_behind_the_softmax(patch: Patch) -> None:
    patch.setattr(_yopo_counts, "leaves_early", lambda spec: False)


MISTAKES = {
    "heads of the layer before": ("internvl", "dropped", "prefill_tail caches", heads_of_the_layer_before),
    "tiles that touch": ("internvl", "released", "prefill caches", tiles_that_touch),
    "columns for rows": ("qwen2_vl", "released", "prefill_head caches", columns_for_rows),
    "one axis": ("qwen2_vl", "dropped", "prefill_head caches", one_axis),
    "one layer too many": ("qwen2_vl", "released", "prefill_tail caches", one_layer_too_many),
    "zeros behind the softmax": ("qwen2_vl", "released", "prefill caches", zeros_behind_the_softmax),
}


@pytest.mark.parametrize("name", some([(name,) for name in MISTAKES], {("heads of the layer before",), ("one axis",)}))
def test_check_passes_and_finds(name, oracles, eager_once, head_masks, tmp_path):
    family, semantics, stage, mistake = MISTAKES[name]
    of = qwen.case(oracles, family, "none_1")
    options = {"window": 3, "cutoff": 3, "head_mask": head_masks(family, 5), "semantics": semantics, **sized(of)}
    good = eager_once(of.checkpoint, method="yopo", **options)

    bad = eager.export(of.checkpoint, tmp_path / "bad", method="yopo", mistake=mistake, **options)

    assert parity.check(good, of.checkpoint, steps=2, store=False).passed
    with eager.running():
        verdict = parity.check(bad, of.checkpoint, steps=2, store=False)
    assert next(row.stage for row in verdict.rows if not row.passed and row.case != "checkpoint") == stage


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "internvl", "internvl_chat"])
def test_the_commands_export_and_check(family, oracles, head_masks, tmp_path, quick_tracing):
    of = qwen.case(oracles, family, "none_1")
    width, height = sized(of)["image_size"]
    layers = len(stock(of.checkpoint).decoder.layers)
    options = ["--method", "yopo", "--head-mask", head_masks(family, layers), "--window", "3", "--cutoff", "3"]
    capacity = ["--image-size", f"{width}x{height}", "--max-text-tokens", "96", "--max-new-tokens", "8"]
    assert tiny.cli("export", of.checkpoint, "-o", tmp_path / "b", *options, *capacity).exit_code == 0

    done = tiny.cli("check", tmp_path / "b", "--against", of.checkpoint)

    assert done.exit_code == 0 and "PASSED" in done.stdout, done.output


# What is refused.


@pytest.mark.parametrize(
    ("family", "said"),
    [
        (
            "qwen3_vl",
            "yopo: is not defined for qwen3_vl, which adds features of a picture to visual rows after decoder",
        ),
        ("llava_next", "visual tokens that fill no grid, expected visual tokens on the grid of a picture or of its"),
        ("llava_onevision", "visual tokens that fill no grid"),
        ("qwen_vl_chat", "visual tokens that fill no grid"),
    ],
)
def test_what_yopo_is_not_defined_for_is_refused(family, said, oracles):
    of = qwen.case(oracles, family, "none_1")

    message = tiny.refused(3, "plan", of.checkpoint, "--method", "yopo", "--cutoff", "2", "--image-size", "90x60")

    assert said in message


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl"])
def test_several_pictures_are_refused(family, oracles):
    of = qwen.case(oracles, family, "none_1")

    sizes = ("--image-size", "90x60", "--image-size", "60x90")

    assert "2 images, but it is defined for one" in tiny.refused(
        2, "plan", of.checkpoint, "--method", "yopo", "--cutoff", "2", *sizes
    )


def test_a_method_for_positions_of_one_axis_is_refused(oracles, monkeypatch):
    of = qwen.case(oracles, "qwen2_vl", "none_1")
    monkeypatch.setattr(yopo, "METHOD", dataclasses.replace(yopo.METHOD, three_axes=False))

    with pytest.raises(UnsupportedError, match="positions have 3 axes; use --method none or fastv"):
        plan(of.checkpoint, method="yopo", cutoff=2, **sized(of))

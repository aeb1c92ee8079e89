"""What the methods count: stages, weights and the papers' cost columns, to the last number, and the ends of ranges.

The references are sums over products of matrices as the papers describe the layers, and literal numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open

from lvlm_edge.exporter import plan
from lvlm_edge.exporter.bundles import plans
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.methods import fastv, proxyv, yopo
from lvlm_edge.exporter.planning import PlanError
from lvlm_edge.runtime.errors import UnsupportedError
from lvlm_edge.runtime.pictures.image import Preprocessing
from lvlm_edge.runtime.pictures.layout import Picture, Run
from lvlm_edge.runtime.pictures.views import Canvas, Views

HIDDEN, FFN, LAYERS, HEAD = 64, 128, 4, 16  # `originals.build`: 4 heads of 16
CAPACITY = {"max_text_tokens": 24, "max_new_tokens": 4}


def macs(*products: tuple[int, int, int]) -> int:
    """Multiply-accumulates of products: rows, inputs, outputs."""
    return sum(rows * inputs * outputs for rows, inputs, outputs in products)


def layer(rows: int, keys: int, kv: int) -> int:
    """Of a decoder layer: queries, keys, values and output, three matrices of the FFN, scores and weighted values."""
    linear = [(rows, HIDDEN, HIDDEN)] * 2 + [(rows, HIDDEN, kv)] * 2 + [(rows, HIDDEN, FFN)] * 3
    return macs(*linear, (rows, HIDDEN, keys), (rows, keys, HIDDEN))


# Papers.


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize(("kv_heads", "factor", "grid"), [(4, 2, None), (2, 4, (1, 2)), (2, 1, None)])
def test_proxyvs_saving_is_that_of_its_layers_on_five_crops_and_fifty_text_tokens(
    start, kv_heads, factor, grid, original
):
    folder = original(method="proxyv", kv_heads=kv_heads, start_layer=start)

    found = plan(folder, method="proxyv", reduce_factor=factor, grid=grid, **CAPACITY)["paper"]

    visual, proxies, text = 5 * 16, 5 * 16 // factor**2, 50 + 5  # a separator after each crop
    q, kv, every = HIDDEN // 2, kv_heads * HEAD, visual + text
    dense = layer(every, every, kv)
    reduced = layer(proxies + text, visual + proxies + text, kv)
    reduced += macs((visual, HIDDEN, kv), (visual, HIDDEN, kv))  # keys and values of visual tokens
    reduced += macs((visual, HIDDEN, q), (proxies, HIDDEN, q), (visual, 2 * q, q), (visual, q, HIDDEN))  # the update
    cost = (start * dense + (LAYERS - start) * reduced) / (LAYERS * dense)
    assert (found["name"], found["unit"]) == ("ProxyV", "% of prefill FLOPs saved")
    assert found["ratio"] == pytest.approx(cost, rel=1e-12)
    assert found["value"] == pytest.approx(100 * (1 - cost), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_ratio": 0.3}, 4.8),  # the formula takes the share as it is
        ({"keep_tokens": 7}, 7),
        ({"keep_tokens": 7, "keep_ratio": 0.25}, 7),
        ({"keep_ratio": 1.0}, 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("prune_layer", [1, 3])
def test_fastvs_cost_is_the_mean_of_its_layers_with_thirty_six_other_tokens(prune_layer, options, kept, original):
    found = plan(original(layers=5), method="fastv", prune_layer=prune_layer, **options)["paper"]

    def cost(tokens: float) -> float:  # arXiv:2403.06764: 4nd^2 + 2n^2d + 2ndm
        return 4 * tokens * HIDDEN**2 + 2 * tokens**2 * HIDDEN + 2 * tokens * HIDDEN * FFN

    mean = (prune_layer * cost(16 + 36) + (5 - prune_layer) * cost(kept + 36)) / 5
    assert found["value"] == pytest.approx(mean / 1e9, rel=1e-12)
    assert found["ratio"] == pytest.approx(mean / cost(16 + 36), rel=1e-12)
    assert (found["name"], found["unit"]) == ("FastV", "GMAC per layer, mean")


@pytest.mark.parametrize("semantics", ["released", "dropped"])
def test_yopos_cost_is_that_of_the_kept_heads_and_channels_below_the_cutoff(semantics, original):
    masks = ["1111", "1010", "0000", "0111", "1111"]
    folder = original(method="yopo", layers=5, kv_heads=2, cutoff=4, window=5, ffn_ratio=2.5, head_mask=masks)

    found = plan(folder, method="yopo", semantics=semantics, **CAPACITY)["paper"]

    cost = dense = 0.0
    for i, mask in enumerate(masks):
        heads = macs(*[(16, HIDDEN, HIDDEN)] * 4)  # keys and values as wide as queries
        channels = macs(*[(16, HIDDEN, FFN)] * 3)
        near, all_ = macs(*[(16, HIDDEN, 25)] * 2), macs(*[(16, HIDDEN, 16)] * 2)
        dense += 2 * (heads + all_ + channels)
        if i < 4:
            cost += 2 * (mask.count("1") / 4 * (heads + near) + channels / 2.5)
    assert found["value"] == pytest.approx(cost / 1e12, rel=1e-12)
    assert found["ratio"] == pytest.approx(cost / dense, rel=1e-12)
    assert (found["name"], found["unit"]) == ("YOPO", "TFLOPs of visual tokens")


def test_himixs_column_is_named(original):
    found = plan(original(method="himix"), method="himix", **CAPACITY)["paper"]

    assert (found["name"], found["unit"]) == ("HiMix", "GFLOPs")


# Stages: layers, and rows that ask, that are seen and that are cached.

Rows = tuple[int, int, int]
STAGES: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[list[int], Rows]]]] = {
    "none": ({}, {}, [([0, 3], (40, 40, 40))]),
    "fastv": ({}, {"prune_layer": 3, "keep_tokens": 1}, [([0, 2], (40, 40, 40)), ([3, 3], (25, 25, 25))]),
    "fastv, all": ({}, {"prune_layer": 1, "keep_tokens": 16}, [([0, 0], (40, 40, 40)), ([1, 3], (40, 40, 40))]),
    "proxyv": ({}, {}, [([0, 1], (41, 41, 41)), ([2, 3], (29, 45, 41))]),  # 16, 4 proxies, a separator, 24
    "proxyv, three crops": ({}, {"grid": (1, 2)}, [([0, 1], (75, 75, 75)), ([2, 3], (39, 87, 75))]),
    "proxyv, one proxy": ({}, {"reduce_factor": 4}, [([0, 1], (41, 41, 41)), ([2, 3], (26, 42, 41))]),
    "proxyv, all proxies": ({}, {"reduce_factor": 1}, [([0, 1], (41, 41, 41)), ([2, 3], (41, 57, 41))]),
    "proxyv, from the first": ({"start_layer": 0}, {}, [([0, 3], (29, 45, 41))]),
    "proxyv, in the last": ({"start_layer": 3}, {}, [([0, 2], (41, 41, 41)), ([3, 3], (29, 45, 41))]),
    "yopo": ({}, {}, [([0, 3], (40, 40, 40))]),
    "yopo, dropped": ({}, {"semantics": "dropped"}, [([0, 1], (40, 40, 40)), ([2, 3], (24, 24, 24))]),
    "yopo, from the second": (
        {},
        {"semantics": "dropped", "cutoff": 1},
        [([0, 0], (40, 40, 40)), ([1, 3], (24, 24, 24))],
    ),
    "yopo, to the last": (
        {"head_mask": ["1111"] * 4},
        {"semantics": "dropped", "cutoff": 4},
        [([0, 3], (40, 40, 40))],
    ),
    "yopo, no head below the cutoff": (
        {"head_mask": ["1111", "0010", "0000", "1111"]},
        {"semantics": "dropped", "cutoff": 3},
        [([0, 1], (40, 40, 40)), ([2, 3], (24, 24, 24))],
    ),
    "yopo, no head at all": (
        {"head_mask": ["0000", "0000", "1111", "1111"]},
        {"semantics": "dropped", "cutoff": 2},
        [([0, 3], (24, 24, 24))],
    ),
    "himix": ({}, {}, [([0, 3], (24, 39, 39))]),
    "himix, two images": ({}, {"num_images": 2}, [([0, 3], (24, 54, 54))]),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_ask_see_and_cache_so_many_rows(name, original):
    options, more, expected = STAGES[name]
    method = name.split(",")[0]
    folder = original(method="plain" if method in ("none", "fastv") else method, **options)

    found = plan(folder, method=method, **more, **CAPACITY)["stages"]

    assert [(s["layers"], (s["queries"], s["keys"], s["cached"])) for s in found] == expected


# Weights that only a method has, as the checkpoint's file has them.


def stored(folder: Path, *parts: str) -> int:
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if any(part in name for part in parts)]  # noqa: SIM118
    assert shapes
    total = 0
    for shape in shapes:
        count = 1
        for size in shape:
            count *= size
        total += count
    return total


def planned(folder: Path, method: str, **options: Any) -> Any:
    return plans.plan_of(Checkpoint.open(folder), method=method, options=CAPACITY | options)


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("start", [0, 2])
def test_proxyvs_own_weights_are_those_of_the_file_without_the_last_layers_update(learnt, start, original):
    folder = original(method="proxyv", start_layer=start, learn_proxy=learnt)
    plan_ = planned(folder, "proxyv")

    found = plan_.method.own_weights(plan_)

    assert type(found) is int
    unread = stored(folder, f"vision_mlp_layers.{LAYERS - start - 1}.")
    assert found == stored(folder, "vision_mlp_layers", *(["proxyv_initializer"] if learnt else [])) - unread


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])  # the second has biases
def test_himixs_own_weights_are_those_of_the_file(decoder, original):
    folder = original(method="himix", kv_heads=2, decoder=decoder)
    plan_ = planned(folder, "himix")

    assert plan_.method.own_weights(plan_) == stored(folder, "_img.")


# The ends of ranges: what is next to them is refused (also see `test_bad_methods`).


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """LLaVA of 576 visual tokens with room for many positions, config.json alone."""
    folder = tmp_path_factory.mktemp("large")
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "patch_size": 14}
    vision |= {"intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    text = {"model_type": "llama", "max_position_embeddings": 8192, "vocab_size": 32064}
    config = {"model_type": "llava", "image_token_index": 32000, "vision_config": vision, "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_fastv_sorts_3840_rows_and_no_more(large):
    found = plan(large, method="fastv", keep_tokens=576, max_text_tokens=3840 - 576)
    assert found["stages"][1]["queries"] == 3840

    with pytest.raises(PlanError, match=r"^fastv: keeps 3841 rows of text and visual tokens, .* at most 3840; lower"):
        plan(large, method="fastv", keep_tokens=576, max_text_tokens=3841 - 576)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prune_layer": 0}, r"^fastv: prune_layer is 0, but the model has layers 0\.\.31; choose 1\.\.31$"),
        ({"prune_layer": 1}, None),
        ({"prune_layer": 31}, None),
        ({"prune_layer": 32}, r"^fastv: prune_layer is 32, but"),
        ({"keep_ratio": 1.0}, None),
        ({"keep_ratio": 1.0001}, r"^fastv: keep_ratio is 1\.0001, expected more than 0 and at most 1"),
        ({"keep_ratio": 0.0}, r"^fastv: keep_ratio is 0, expected"),
        ({"keep_ratio": 0.001}, None),  # 0.576 rounds to 1
        ({"keep_ratio": 0.0008}, r"^fastv: 0 of 576 visual tokens would be kept; keep 1\.\.576$"),
        ({"keep_ratio": 5.0, "keep_tokens": 3}, None),  # the count replaces the ratio
        ({"keep_tokens": 0}, r"^fastv: 0 of 576"),
        ({"keep_tokens": 1}, None),
        ({"keep_tokens": 576}, None),
        ({"keep_tokens": 577}, r"^fastv: 577 of 576"),
    ],
    ids=str,
)
def test_fastvs_settings_reach_to_the_ends_of_their_ranges(options, said, large):
    if said is None:
        assert plan(large, method="fastv", **options)["method"] == "fastv"
        return
    with pytest.raises(PlanError, match=said):
        plan(large, method="fastv", **options)


ENDS = [
    ("proxyv", {"start_layer": 0}, {}, True),
    ("proxyv", {"start_layer": 3}, {}, True),
    ("proxyv", {}, {"start_layer": True}, False),
    ("proxyv", {}, {"reduce_factor": True}, False),
    ("proxyv", {}, {"reduce_factor": 1}, True),
    ("proxyv", {}, {"reduce_factor": 4}, True),
    ("proxyv", {}, {"reduce_factor": 8}, False),
    ("proxyv", {}, {"reduce_factor": -1}, False),
    ("yopo", {}, {"window": 1}, True),
    ("yopo", {}, {"window": True}, False),
    ("yopo", {}, {"window": 2.0}, False),
    ("yopo", {}, {"window": 99}, True),
    ("yopo", {}, {"cutoff": 1}, True),
    ("yopo", {}, {"cutoff": True}, False),
    ("yopo", {}, {"cutoff": 4}, True),
    ("yopo", {}, {"ffn_ratio": 1}, True),
    ("yopo", {}, {"ffn_ratio": 0.99}, False),
    ("yopo", {}, {"ffn_ratio": True}, False),
    ("yopo", {}, {"ffn_ratio": 128}, True),
    ("yopo", {}, {"ffn_ratio": 128.0}, True),
    ("yopo", {}, {"ffn_ratio": 128.5}, False),
]


@pytest.mark.parametrize(("method", "made", "options", "fits"), ENDS, ids=str)
def test_settings_reach_to_the_ends_of_their_ranges(method, made, options, fits, original):
    folder = original(method=method, **made)

    if fits:
        found = plan(folder, method=method, **options, **CAPACITY)["config"]
        assert {name: found[name] for name in options} == options
    else:
        with pytest.raises(PlanError, match=rf"^{method}: {next(iter(options))} is {next(iter(options.values()))!r}"):
            plan(folder, method=method, **options, **CAPACITY)


# Rows that a method is defined for.


def picture(*runs: Run) -> Picture:
    views = Views(canvas=Canvas(size=(56, 56)), how=Preprocessing(resize_to=(56, 56)))
    return Picture(token_id=7, graphs=("vision",), views=views, runs=runs)


def visual(rows: int = 8, grid: tuple[int, int] | None = (2, 4)) -> Run:
    return Run(kind="visual", rows=rows, grid=grid)


SEPARATOR = Run(kind="separator", rows=1)
TEXT = Run(kind="text", rows=1, ids=(3,))
ARRANGED: dict[str, tuple[tuple[Run, ...], bool]] = {
    "one crop": ((visual(), SEPARATOR), True),
    "three crops": ((visual(), SEPARATOR) * 3, True),
    "no separator": ((visual(),), False),
    "no separator at the end": ((visual(), SEPARATOR, visual()), False),
    "two separators": ((visual(), SEPARATOR, SEPARATOR), False),
    "two rows of separators": ((visual(), Run(kind="separator", rows=2)), False),
    "text for a separator": ((visual(), TEXT), False),
    "a separator first": ((SEPARATOR, visual()), False),
    "text among the crops": ((visual(), SEPARATOR, TEXT, SEPARATOR), False),
    "another grid in the second crop": ((visual(), SEPARATOR, visual(8, (4, 2)), SEPARATOR), False),
    "other rows in the second separator": ((visual(), SEPARATOR, visual(), Run(kind="separator", rows=3)), False),
    "no grid": ((visual(8, None), SEPARATOR), False),
}


@pytest.mark.parametrize("name", ARRANGED)
def test_proxyv_takes_crops_of_one_grid_with_a_separator_after_each(name):
    runs, fits = ARRANGED[name]
    config = proxyv.Config(start_layer=1, reduce_factor=2)

    if fits:
        assert proxyv.grid_of([picture(*runs)], config) == (2, 4)
    else:
        with pytest.raises(UnsupportedError, match=r"^proxyv: expected a separator after the tokens of each crop; use"):
            proxyv.grid_of([picture(*runs)], config)


@pytest.mark.parametrize(
    ("run", "factor", "fits"),
    [
        (visual(), 1, True),
        (visual(), 2, True),
        (visual(), 4, False),  # of the columns alone
        (visual(8, (4, 2)), 4, False),  # of the rows alone
        (visual(36, (6, 6)), 3, True),
        (visual(36, (6, 6)), 4, False),
        (visual(), 0, False),
        (visual(), -1, False),
        (visual(7), 1, False),  # a cell without a token
    ],
)
def test_proxies_stand_for_squares_of_a_whole_grid(run, factor, fits):
    config = proxyv.Config(start_layer=1, reduce_factor=factor)

    if fits:
        assert proxyv.grid_of([picture(run, SEPARATOR)], config) == run.grid
    else:
        with pytest.raises(PlanError, match=rf"reduce_factor is {factor}, .* a grid of {run.rows} tokens into squares"):
            proxyv.grid_of([picture(run, SEPARATOR)], config)


TILES = {  # (row, column) of every row from the first visual token to the last, tiles 2 rows apart
    "one grid": ((visual(),), [(0, j) for j in range(4)] + [(1, j) for j in range(4)]),
    "between texts": ((TEXT, visual(2, (1, 2)), TEXT), [(0, 0), (0, 1)]),
    "two tiles": ((visual(2, (1, 2)), visual(2, (2, 1))), [(0, 0), (0, 1), (3, 0), (4, 0)]),
    "text between tiles": ((visual(1, (1, 1)), TEXT, TEXT, visual(1, (1, 1))), [(0, 0), (0, 0), (0, 0), (3, 0)]),
}


@pytest.mark.parametrize("name", TILES)
def test_yopo_takes_whole_grids_and_lays_tiles_apart(name):
    runs, expected = TILES[name]
    spec: Any = SimpleNamespace(reads_features=False)

    assert yopo.cells(yopo.tiles_of([picture(*runs)], spec), apart=2) == expected


@pytest.mark.parametrize(
    ("runs", "features", "said"),
    [
        ((visual(8, None),), 0, "8 visual tokens that fill no grid"),
        ((visual(7),), 0, "7 visual tokens that fill no grid"),
        ((visual(9),), 0, "9 visual tokens that fill no grid"),
        ((visual(), visual(9)), 0, "17 visual tokens that fill no grid"),
        ((visual(), SEPARATOR), 0, "separators after its crops"),
        ((Run(kind="cached", rows=8, grid=(2, 4)),), 32, "no projector"),
        ((Run(kind="cached", rows=8, grid=(2, 4)),), 0, "8 visual tokens that fill no grid"),
    ],
)
def test_yopo_refuses_visual_tokens_that_are_not_on_a_grid(runs, features, said):
    spec: Any = SimpleNamespace(reads_features=features > 0)

    with pytest.raises(
        UnsupportedError, match=rf"^yopo: the checkpoint has {said}, expected visual tokens on the grid"
    ):
        yopo.tiles_of([picture(*runs)], spec)


# Settings that nobody gave, as the help and the papers have them.


def test_settings_have_the_defaults_of_papers_and_releases():
    assert fastv.Config() == fastv.Config(prune_layer=2, keep_ratio=0.5, keep_tokens=None)
    assert proxyv.Config() == proxyv.Config(start_layer=None, reduce_factor=4, learn_proxy=False)
    found = yopo.Config()
    assert (found.semantics, found.window, found.cutoff, found.ffn_ratio) == ("released", None, None, None)
    assert (found.head_mask, found.prefix_tokens) == (None, None)

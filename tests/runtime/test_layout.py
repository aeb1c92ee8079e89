"""What placeholders stand for: rows, kinds and positions, against stock transformers' own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.bundle.kv_cache import Layout, are_rows, check_layout, coded_length
from lvlm_edge.runtime.bundle.manifest import Cache, Counts
from lvlm_edge.runtime.errors import BundleError
from lvlm_edge.runtime.pictures.image import Preprocessing
from lvlm_edge.runtime.pictures.layout import Picture, Run, is_complete, lay_out
from lvlm_edge.runtime.pictures.views import Canvas, Views

IMAGE = 9
VIEWS = Views(canvas=Canvas(size=(28, 28)), how=Preprocessing(resize_to=(28, 28)))


def picture(*runs: Run) -> Picture:
    return Picture(token_id=IMAGE, graphs=("vision",), views=VIEWS, runs=runs)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", ["none_1", "fastv_1"])
def test_positions_of_three_axes_are_those_of_stock_transformers(oracles, family, name):
    path = oracles / "families" / family / f"{name}.json"
    case, tensors = json.loads(path.read_text("utf-8")), load_file(path.with_suffix(".safetensors"))
    pictures = [
        Picture(
            token_id=case["image_token_id"],
            graphs=("vision",),
            views=VIEWS,
            runs=(Run(kind="visual", rows=rows * columns // 4, grid=(rows // 2, columns // 2)),),
        )
        for _, rows, columns in case["image_grid_thw"]
    ]

    found = lay_out(case["prompt_token_ids"], pictures, axes=3)

    assert np.array_equal(found.positions, tensors["position_ids"])
    assert found.next == case["next_position"]
    assert [[found.visual[0], found.visual[-1] + 1]] == case["visual_rows"]
    assert found.ids.tolist() == [i for i in case["input_ids"] if i != case["image_token_id"]]


def test_one_axis_counts_rows():
    found = lay_out([1, IMAGE, 2], [picture(Run(kind="visual", rows=4, grid=(2, 2)))])

    assert found.positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert found.visual.tolist() == [1, 2, 3, 4]
    assert found.text.tolist() == [0, 5]
    assert found.next == 6


def test_a_picture_brings_rows_of_several_kinds():
    runs = (
        Run(kind="text", rows=2, ids=(7, 8)),
        Run(kind="visual", rows=2, grid=(1, 2)),
        Run(kind="separator", rows=1),
        Run(kind="cached", rows=5),
    )

    found = lay_out([1, IMAGE], [picture(*runs)])

    assert found.ids.tolist() == [1, 7, 8]
    assert found.image.tolist() == [3, 4, 5]
    assert found.visual.tolist() == [3, 4]
    assert found.count == 6


def test_a_placeholder_without_a_picture_is_a_token():
    assert lay_out([1, IMAGE], []).ids.tolist() == [1, IMAGE]


@pytest.mark.parametrize(
    "run",
    [
        Run(kind="video", rows=1),
        Run(kind="visual", rows=0),
        Run(kind="visual", rows=5, grid=(2, 2)),
        Run(kind="text", rows=2, ids=(1,)),
        Run(kind="text", rows=1, ids=(-1,)),
    ],
)
def test_a_run_that_contradicts_itself_is_found(run):
    assert not is_complete(run)


def test_a_length_says_how_many_planned_rows_were_not_dropped():
    caches = tuple(Cache(name=str(i), heads=1, head_dim=2, capacity=9, dropped=d) for i, d in enumerate((0, 4)))
    layout = Layout(caches, "float32")

    full, text = coded_length(10), coded_length(10, restored=4)

    assert full == 10
    assert [layout.slot(f"present.{i}.key", full) for i in (0, 1)] == [10, 6]
    assert [layout.slot(f"present.{i}.key", text) for i in (0, 1)] == [10, 10]


COUNTS = Counts(num_images=1, visual_tokens=4, kept_tokens=2, text_tokens=5, prompt_tokens=9, new_tokens=3)


@pytest.mark.parametrize(
    ("changed", "fits"),
    [
        ({}, True),
        ({"capacity": 11}, False),
        ({"capacity": 10, "dropped": 2}, True),
        ({"capacity": 9, "dropped": 2}, False),
        ({"capacity": 14, "dropped": -2}, True),
        ({"capacity": 13, "dropped": -2}, False),
        ({"capacity": 1, "dropped": 11}, True),
        ({"capacity": 0, "dropped": 12}, False),
        ({"heads": 0}, False),
        ({"head_dim": 0}, False),
    ],
    ids=str,
)
def test_a_cache_holds_a_full_prompt_and_every_new_token(changed, fits):
    cache = Cache(**{"name": "0", "heads": 1, "head_dim": 1, "capacity": 12, "dropped": 0} | changed)

    if fits:
        check_layout([cache], COUNTS)
    else:
        with pytest.raises(BundleError, match="cannot hold 12 rows"):
            check_layout([cache], COUNTS)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "rows"),
    [
        ("present.0.key", "float32", (1, 2, 5, 8), True),
        ("present.0.key", "float32", (1, 2, 12, 8), False),
        ("present.0.key", "float32", (1, 2, 13, 8), False),
        ("present.0.key", "float16", (1, 2, 5, 8), False),
        ("present.0.key", "float32", (1, 3, 5, 8), False),
        ("present.0.key", "float32", (1, 2, 5, 9), False),
        ("present.0.key", "float32", (2, 5, 8), False),
        ("hidden", "float32", (1, 2, 5, 8), False),
    ],
)
def test_fewer_rows_of_a_cache_are_told_from_a_whole_one(name, dtype, shape, rows):
    assert are_rows(TensorInfo(name, dtype, shape), TensorInfo("past", "float32", (1, 2, 12, 8))) == rows

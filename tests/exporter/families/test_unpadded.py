"""LLaVA-1.6 in its original layout: the hub's layout of the same weights says the same, and plain PyTorch does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import plan
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.errors import UnsupportedError
from tests import families, layouts

SETTINGS = {"max_text_tokens": 64, "max_new_tokens": 8}


def original(folder: Path, native: Path, **changed: Any) -> Path:
    """The weights of a checkpoint in the hub's layout under the names of the release, its encoder inside."""
    (folder / layouts.TOWER).mkdir(parents=True)
    config = json.loads((native / "config.json").read_text("utf-8"))
    (folder / layouts.TOWER / "config.json").write_text(json.dumps(config["vision_config"]), "utf-8")
    shutil.copyfile(native / "preprocessor_config.json", folder / "preprocessor_config.json")
    plain = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 42}, "crop_size": 42}
    (folder / "preprocessor_config.json").write_text(json.dumps(plain), "utf-8")
    made = {
        **config["text_config"], "model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"],
        "mm_vision_tower": layouts.TOWER, "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 64,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[width, height] for height, width in config["image_grid_pinpoints"]],
    } | changed  # fmt: skip
    (folder / "config.json").write_text(json.dumps(made), "utf-8")
    projector = {"linear_1": "0", "linear_2": "2"}
    tensors = {}
    for key, value in load_file(native / "model.safetensors").items():
        name = key.removeprefix("language_model.")
        if key.startswith("multi_modal_projector."):
            _, part, kind = key.split(".")
            name = f"model.mm_projector.{projector[part]}.{kind}"
        elif key.startswith("vision_tower."):
            name = f"model.vision_tower.{key}"
        elif key == "image_newline":
            name = "model.image_newline"
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("method", ["none", "fastv"])
def test_the_hubs_layout_of_the_same_weights_says_the_same(oracles, eager_once, tmp_path, method):
    native = families.case(oracles, "llava_next", "none_1").checkpoint
    folder, size = original(tmp_path / "m", native), (97, 211)
    options = {"method": method, "image_size": size, **SETTINGS} | ({"prune_layer": 2} if method == "fastv" else {})
    one, other = Pipeline.load(eager_once(native, **options)), Pipeline.load(eager_once(folder, **options))
    picture, ids = families.noise(size), [5, 6, 7, 8, 9]

    answers = [
        pipe.generate_tokens([*ids[:2], pipe.manifest.pictures[0].token_id, *ids[2:]], pipe.pixels(picture)[0])
        for pipe in (one, other)
    ]

    assert np.array_equal(one.pixels(picture)[0], other.pixels(picture)[0])
    assert answers[0].token_ids == answers[1].token_ids
    assert np.abs(answers[0].logits - answers[1].logits).max() <= 1e-5


MAPS = {"anyres": [(14, 18), (18, 8)], "anyres_max_1": [(5, 6), (9, 4)], "anyres_max_4": [(10, 13), (18, 8)]}


@pytest.mark.parametrize("ratio", MAPS)
def test_check_passes(oracles, eager_once, tmp_path, ratio):
    native = families.case(oracles, "llava_next", "none_1").checkpoint
    folder = original(tmp_path / "m", native, image_aspect_ratio=ratio, image_grid_pinpoints="(1x1),...,(3x3)")
    made = eager_once(folder, image_size=((150, 120), (97, 211)), **SETTINGS)

    assert parity.check(made, folder, steps=4, store=False).passed
    assert [picture.runs[1].grid for picture in Pipeline.load(made).manifest.pictures] == MAPS[ratio]


@pytest.mark.parametrize("size", [(110, 352), (352, 110), (198, 176), (205, 328)])
def test_rows_are_counted_as_the_release_counts_them(tmp_path, size):
    """Without rounding a quotient before it is cut, which in the hub's layout it is."""
    config = {
        "model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type":
        "mlp2x_gelu", "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "mm_hidden_size": 1024,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    picture = families.planned(tmp_path, size)
    rows, columns = picture.views.canvas.cells
    width, height = size
    if width / height > columns / rows:
        cut = (rows - int(height * (columns / width))) // 2
        wanted = (rows - 2 * cut, columns)
    else:
        cut = (columns - int(width * (rows / height))) // 2
        wanted = (rows, columns - 2 * cut)

    assert picture.runs[1].grid == wanted


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mm_patch_merge_type": "spatial"}, "tiles are put together as 'spatial'"),
        ({"image_aspect_ratio": "pad"}, "tiles are put together as 'spatial_unpad', but image_aspect_ratio is 'pad'"),
        ({"image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "flat"}, "anyres_max_N with 'flat'"),
        ({"mm_newline_position": "grid"}, "mm_newline_position is 'grid'"),
    ],
)
def test_other_ways_of_putting_tiles_together_are_refused(changed, message, oracles, tmp_path):
    folder = original(tmp_path / "m", families.case(oracles, "llava_next", "none_1").checkpoint, **changed)
    with pytest.raises(UnsupportedError, match=message):
        plan(folder, image_size=(97, 211))

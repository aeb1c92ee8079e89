"""TensorRT-RTX builds the graphs of the families that have stored checkpoints, in float16, without a GPU."""

from __future__ import annotations

import itertools

import pytest

from tests import families
from tests.cases import some
from tests.exporter.test_builds import built, graphs

SIZES = {  # of the picture, in pixels
    "llava_next": ((150, 120),),
    "llava_onevision": ((300, 180),),  # whose map is made smaller
    "internvl": ((90, 60),),
    "smolvlm": ((150, 60),),
    "internvl_chat": ((90, 60),),
    "qwen": (),
    "video_llava": (),
    "qwen2_vl": ((150, 120),),
    "qwen2_5_vl": ((150, 260),),
    "qwen3_vl": ((150, 120),),
}
FOLDERS = {"qwen": "qwen_vl_chat"}  # of stored checkpoints, where it is not the family's name
METHODS = {"none": {}, "fastv": {"prune_layer": 2, "keep_ratio": 0.5}}


@pytest.mark.claims("builds")
@pytest.mark.parametrize(("family", "method"), some(itertools.product(SIZES, METHODS), {("llava_onevision", "fastv")}))
def test_tensorrt_rtx_builds_every_graph(oracles, export_once, family, method):
    checkpoint = families.case(oracles, FOLDERS.get(family, family), "none_1").checkpoint
    more = {"num_videos": 1, "num_images": 1} if family == "video_llava" else {}
    options = {
        "method": method,
        "image_size": SIZES[family],
        **more,
        "dtype": "float16",
        "ort": False,
        **METHODS[method],
    }
    bundle = export_once(checkpoint, max_text_tokens=32, max_new_tokens=8, **options)

    assert built(bundle, "8.6", "8.9", "12.0") == graphs(bundle)

"""TensorRT-RTX builds the graphs of every family of several views, in float16, without a GPU."""

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
    "qwen_vl_chat": (),
    "video_llava": (),
}
METHODS = {
    "none": {},
    "fastv": {"prune_layer": 2, "keep_ratio": 0.5},
    "yopo, released": {"window": 3, "cutoff": 3},
    "yopo, dropped": {"semantics": "dropped", "window": 3, "cutoff": 3},
}
GRIDS = ("internvl", "internvl_chat", "smolvlm")  # whose visual tokens are on whole grids
CASES = [(f, m) for f, m in itertools.product(SIZES, METHODS) if f in GRIDS or "yopo" not in m]


@pytest.mark.parametrize(("family", "method"), some(CASES, {("llava_onevision", "fastv")}))
def test_tensorrt_rtx_builds_every_graph(oracles, export_once, family, method):
    checkpoint = families.case(oracles, family, "none_1").checkpoint
    more = {"num_videos": 1, "num_images": 1} if family == "video_llava" else {}
    if "yopo" in method:
        layers = families.layers(checkpoint)
        more = {"head_mask": tuple((["1111", "1101", "0100"] * layers)[:layers])}
    options = {
        "method": method.partition(",")[0],
        "image_size": SIZES[family],
        **more,
        "dtype": "float16",
        "ort": False,
        **METHODS[method],
    }
    bundle = export_once(checkpoint, max_text_tokens=32, max_new_tokens=8, **options)

    assert built(bundle, "8.6", "8.9", "12.0") == graphs(bundle)

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
METHODS = {
    "none": {},
    "fastv": {"prune_layer": 2, "keep_ratio": 0.5},
    "yopo, released": {"window": 3, "cutoff": 3},
    "yopo, dropped": {"semantics": "dropped", "window": 3, "cutoff": 3},
}
FOUR, SIX = ("1111", "1101", "0100"), ("111111", "111100", "000100")  # heads of layers 0, 1, ..., over and over
MASKS = {"internvl": FOUR, "internvl_chat": FOUR, "smolvlm": FOUR, "qwen2_vl": SIX, "qwen2_5_vl": SIX}
CASES = [(f, m) for f, m in itertools.product(SIZES, METHODS) if f in MASKS or "yopo" not in m]


@pytest.mark.claims("builds")
@pytest.mark.parametrize(("family", "method"), some(CASES, {("llava_onevision", "fastv")}))
def test_tensorrt_rtx_builds_every_graph(oracles, export_once, family, method):
    checkpoint = families.case(oracles, FOLDERS.get(family, family), "none_1").checkpoint
    more = {"num_videos": 1, "num_images": 1} if family == "video_llava" else {}
    if "yopo" in method:
        layers = families.layers(checkpoint)
        more = {"head_mask": (MASKS[family] * layers)[:layers]}
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

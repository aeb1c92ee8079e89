"""What has no stored outputs: other methods of LLaVA's three layouts, and Idefics3; traced graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lvlm_edge.exporter import references
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime import Pipeline
from tests import checkpoints, families, originals
from tests.exporter import test_tinyllava
from tests.exporter.test_builds import built, graphs

pytestmark = pytest.mark.slow

YOPO = {"semantics": "dropped", "window": 3, "cutoff": 2, "ffn_ratio": 2.0}
METHODS = {"none": {}, "fastv": {"prune_layer": 1, "keep_ratio": 0.5}, "yopo": YOPO}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}  # of 16: for 8 TensorRT-RTX has no attention kernel
WIDE = {"max_text_tokens": 96}
CAPACITY = {"max_text_tokens": 24, "max_new_tokens": 8, "ort": False}


@pytest.fixture
def made(checkpoint_once, original, oracles, tmp_path) -> Callable[[str], Path]:
    """A checkpoint of a family."""

    def make(family: str) -> Path:
        if family == "llava":
            return checkpoint_once(text=HEADS)
        if family == "llava_llama":
            return original(method="yopo")
        if family == "tinyllava":
            test_tinyllava.build(tmp_path / "m", tower="clip")  # whose tokens fill the grid, as YOPO needs it
            return tmp_path / "m"
        shutil.copytree(families.case(oracles, "smolvlm", "none_1").checkpoint, tmp_path / "m")
        for file, changed in (
            ("config.json", {"model_type": "idefics3"}),
            ("preprocessor_config.json", {"image_processor_type": "Idefics3ImageProcessor"}),
        ):
            content = json.loads((tmp_path / "m" / file).read_text("utf-8"))
            (tmp_path / "m" / file).write_text(json.dumps(content | changed), "utf-8")
        return tmp_path / "m"

    return make


@pytest.mark.claims("equal")
@pytest.mark.parametrize(("family", "method"), [("llava", "yopo"), ("tinyllava", "fastv"), ("tinyllava", "yopo")])
def test_the_answers_are_those_of_the_reference(made, export_once, family, method):
    checkpoint = made(family)
    pipe = Pipeline.load(export_once(checkpoint, method=method, **METHODS[method], **CAPACITY))
    ids = checkpoints.prompt(12, 4) if family == "llava" else originals.prompt(12, 4)
    model, pixels = references.load(checkpoint), checkpoints.pixels()
    config = {"keep_tokens": None, "head_mask": ["1111"] * len(pipe.manifest.cache)} | METHODS[method]

    found = pipe.generate_tokens(ids, pixels, max_new_tokens=6, ignore_eos=True)

    wanted = references.module(method).run(model, config, ids, torch.from_numpy(pixels), 6)
    assert found.token_ids == wanted.tokens
    assert np.abs(found.logits - wanted.logits.numpy()).max() < 1e-4


@pytest.mark.claims("equal", family="idefics3")
@pytest.mark.parametrize("method", METHODS)
def test_idefics3_answers_as_stock_transformers(made, export_once, method):
    checkpoint, size = made("idefics3"), (150, 60)
    bundle = export_once(checkpoint, method=method, image_size=size, **METHODS[method], **CAPACITY | WIDE)

    if method == "none":
        families.answers_like_stock(Pipeline.load(bundle), checkpoint, families.CONVERSATIONS["text first"], [size])
    assert parity.check(bundle, checkpoint, steps=4, store=False).passed


BUILT = [(family, method) for family in ("llava", "llava_llama", "tinyllava") for method in METHODS]


@pytest.mark.claims("builds")
@pytest.mark.parametrize(("family", "method"), [*BUILT, *(("idefics3", method) for method in METHODS)])
def test_tensorrt_rtx_builds_every_graph(made, export_once, family, method):
    more = {"image_size": (150, 60), **WIDE} if family == "idefics3" else {}
    bundle = export_once(made(family), method=method, dtype="float16", **METHODS[method], **CAPACITY | more)

    assert built(bundle, "8.6", "8.9", "12.0") == graphs(bundle)

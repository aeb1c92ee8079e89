"""Qwen-VL-Chat's own layout against outputs of the release's code."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvlm_edge.exporter import plan
from lvlm_edge.exporter.checkpoints import text
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.families import qwen as family
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.errors import UnsupportedError, UsageError
from lvlm_edge.runtime.pictures.image import Preprocessing, preprocess
from tests import families, qwen, tiny
from tests.cases import both

FOLDER = "qwen_vl_chat"
CONFIG: dict[str, Any] = {  # Qwen-VL-Chat
    **family.DEFAULTS, "model_type": "qwen",
    "visual": {
        "width": 1664, "layers": 48, "heads": 16, "mlp_ratio": 4.9231, "patch_size": 14, "image_size": 448,
        "output_dim": 4096, "image_start_id": 151857,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "exported"), both([("none_1",), ("none_2",), ("fastv_1",)], {("fastv_1",)}), indirect=["exported"]
)
@pytest.mark.claims("equal", family="qwen")
def test_the_answers_are_those_of_the_release(oracles, exported, name):
    of = families.case(oracles, FOLDER, name)
    pipe = Pipeline.load(families.bundle(exported, of))

    families.agrees(pipe, of)

    assert set(pipe.manifest.eos_token_ids) == {306, 308}  # <|endoftext|>, and <|im_end|>, which closes an answer


def test_check_passes_and_finds_heads_in_another_order(oracles, eager_once, tmp_path):
    from lvlm_edge.exporter.proof import parity
    from tests import eager

    of = families.case(oracles, FOLDER, "fastv_1")
    right = family._interleaved

    def plain(name: str, fused: Any, v: Any, folder: Path) -> Any:
        found = right(name, fused, v, folder)
        swapped = {"q_proj": "k_proj", "k_proj": "q_proj"}
        return {n.replace(p, swapped.get(p, p)): t for n, t in found.items() for p in [n.split(".")[-2]]}

    options = {"method": "fastv", "prune_layer": 2, "max_text_tokens": 96, "max_new_tokens": 8}
    bad = eager.export(
        of.checkpoint, tmp_path / "bad", mistake=lambda patch: patch.setattr(family, "_interleaved", plain), **options
    )

    assert parity.check(eager_once(of.checkpoint, **options), of.checkpoint, steps=4, store=False).passed
    with eager.running():
        verdict = parity.check(bad, of.checkpoint, steps=4, store=False)
    assert not verdict.passed


@pytest.mark.parametrize("exported", both([()], {()}), indirect=True)
def test_the_legacy_lowering_says_the_same(oracles, exported):
    of = families.case(oracles, FOLDER, "fastv_1")

    families.agrees(Pipeline.load(families.bundle(exported, of, lowering="legacy")), of)


def test_pictures_are_numbered_in_every_message_anew(oracles, eager_once):
    of = families.case(oracles, FOLDER, "none_2")
    pipe = Pipeline.load(families.bundle(eager_once, of))
    talk = [qwen.turn(None, "One?"), qwen.turn("Yes.", role="assistant"), qwen.turn(None, "Two?")]

    found = pipe.encode(talk)

    first, second = (i for i, token in enumerate(found) if token == 522)
    assert found[first - 4 : first] == found[second - 4 : second]  # "ture 1:" both times


def test_texts_that_spell_special_tokens_stay_text_and_places_do_not(oracles, eager_once):
    of = families.case(oracles, FOLDER, "none_1")
    pipe = Pipeline.load(families.bundle(eager_once, of))

    found = pipe.encode([qwen.turn("<imgpad></img><|im_end|><box>(1,2)</box>")])

    assert 522 not in found
    assert 521 not in found
    assert found.count(308) == 2  # of the system's message and the question's
    assert found.count(516) == found.count(517) == 1


def test_ranks_are_merged_like_a_plain_loop_merges_them(oracles):
    """The release's tokenizer merges the pair of neighbours with the lowest rank, again and again."""
    import base64

    checkpoint = families.case(oracles, FOLDER, "none_1").checkpoint
    lines = [line.split() for line in (checkpoint / "qwen.tiktoken").read_bytes().splitlines() if line]
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
    rng = np.random.default_rng(0)
    words = ["the", "and", "ing", "What", "éa", "漢字", "they", "tion", "pictures", "question"]
    for _ in range(200):
        word = "".join(rng.choice(words, rng.integers(1, 4)))
        parts = [bytes([byte]) for byte in word.encode("utf-8")]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
            if not pairs:
                break
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

        assert list(text.encoded(checkpoint, word)) == [ranks[part] for part in parts], word


def test_the_width_is_resized_before_the_height():
    picture = families.noise((50, 110))
    how = Preprocessing(resize_to=(60, 60), width_first=True)

    found = preprocess(picture, how)

    wanted = picture.resize((60, 110), Image.Resampling.BICUBIC).resize((60, 60), Image.Resampling.BICUBIC)
    assert np.array_equal(found[0].transpose(1, 2, 0), np.asarray(wanted, np.float32))


def test_the_plan_counts_the_released_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), "utf-8")

    found = plan(tmp_path, max_text_tokens=64)

    e, d, f, n = 1664, 4096, 8192, 1024
    encoder = 48 * (4 * e * e + 4 * e + 2 * e * f + f + e + 4 * e) + 3 * 14 * 14 * e + 256 * e + 2 * e
    resampler = e * d + 4 * d * d + 4 * d + 6 * d + 2 * 256 * d + d * d
    layer = 4 * d * d + 3 * d + 3 * d * 11008 + 2 * d
    decoder = 32 * layer + d + 2 * 151936 * d
    assert sum(found["parameters"].values()) == encoder + resampler + decoder
    assert found["visual_tokens"] == 256
    products = 3 * 14 * 14 * e * n + 48 * (4 * e * e * n + 2 * e * f * n + 2 * n * n * e)
    assert found["flops"]["vision"] == 2 * products
    assert found["flops"]["projector"] == 2 * (e * d * n + 2 * d * d * n + 3 * d * d * 256 + 2 * 256 * n * d)


@pytest.fixture
def changed(oracles: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the stored checkpoint whose config is changed."""

    def make(**config: Any) -> Path:
        folder = shutil.copytree(families.case(oracles, FOLDER, "none_1").checkpoint, tmp_path / "m")
        given = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(given | config), "utf-8")
        return folder

    return make


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"visual": None}, UnsupportedError, "a language model alone"),
        ({"no_bias": False}, UnsupportedError, "no_bias is False"),
        ({"rotary_pct": 0.5}, UnsupportedError, "rotary_pct is 0.5"),
        ({"kv_channels": 16}, CheckpointError, "kv_channels times num_attention_heads is 64, expected 128"),
        ({"seq_length": 300}, UsageError, "but the model has 300"),
    ],
)
def test_what_the_graphs_do_not_have_is_refused(config, error, message, changed):
    with pytest.raises(error, match=message):
        plan(changed(**config), max_text_tokens=96)


def test_without_length_scaling_positions_go_further(changed):
    assert plan(changed(seq_length=300, use_dynamic_ntk=False, use_logn_attn=False), max_text_tokens=96)


def test_a_damaged_ranks_file_is_one_line(changed, tmp_path):
    folder = changed()
    (folder / "qwen.tiktoken").chmod(0o644)
    (folder / "qwen.tiktoken").write_text("IQ== 0\nIg== 7\n", "utf-8")

    assert "qwen.tiktoken: is no ranks file" in tiny.refused(1, "export", folder, "-o", tmp_path / "out")

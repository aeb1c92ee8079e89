"""Names, order and formats of GGUF files, when turns end, and what `samples/bench/peers.py` writes and says."""

from __future__ import annotations

import importlib
import json
import math
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "samples" / "bench"
HEADS, KV_HEADS, SIZE = 4, 2, 8
CONFIG = {
    "tie_word_embeddings": False,
    "text_config": {
        "hidden_size": HEADS * SIZE, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "vocab_size": 96, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def scripts():
    """peers.py and gguf_files.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("peers", "gguf_files")})
    for name in ("peers", "gguf_files", "contenders"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def read():
    """Random tensors by name, as transformers names them."""
    rng, size, text = np.random.default_rng(0), HEADS * SIZE, CONFIG["text_config"]
    ends = {"q_proj": (size, size), "k_proj": (KV_HEADS * SIZE, size), "v_proj": (KV_HEADS * SIZE, size)}
    ends |= {"o_proj": (size, size), "gate_proj": (64, size), "up_proj": (64, size), "down_proj": (size, 64)}
    ends |= {"embed_tokens": (text["vocab_size"], size), "lm_head": (text["vocab_size"], size)}
    found = {}

    def tensor(name):
        shape = ends.get(name.split(".")[-2], (size,))
        return found.setdefault(name, rng.standard_normal(shape, np.float32))

    return tensor


def halves_rotated(rows, position):
    """Rotary embedding as transformers does it, [heads, size]: entries i and i + half turn together."""
    half = rows.shape[-1] // 2
    angles = position * 10000.0 ** (-np.arange(half) / half)
    a, b = rows[:, :half], rows[:, half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], 1)


def neighbours_rotated(rows, position):
    """Rotary embedding as llama.cpp does it for LLaMA: entries 2i and 2i + 1 turn together."""
    found = np.empty_like(rows)
    for i in range(rows.shape[-1] // 2):
        angle = position * 10000.0 ** (-2 * i / rows.shape[-1])
        a, b = rows[:, 2 * i], rows[:, 2 * i + 1]
        found[:, 2 * i] = a * np.cos(angle) - b * np.sin(angle)
        found[:, 2 * i + 1] = b * np.cos(angle) + a * np.sin(angle)
    return found


def scores(q, k, rotated):
    """Of a query at position 11 and a key at position 5, by head; heads share keys."""
    rng = np.random.default_rng(1)
    query, key = rng.standard_normal((2, HEADS * SIZE))
    q = rotated((q.astype(np.float64) @ query).reshape(HEADS, SIZE), 11)
    k = rotated((k.astype(np.float64) @ key).reshape(KV_HEADS, SIZE), 5)
    return (q * np.repeat(k, HEADS // KV_HEADS, axis=0)).sum(-1)


def test_attention_scores_survive_the_order_of_llama_cpp(scripts, read):
    found = dict(scripts.gguf_files.decoder(read, CONFIG))
    at = "language_model.model.layers.1.self_attn."

    ours = scores(found["blk.1.attn_q.weight"], found["blk.1.attn_k.weight"], neighbours_rotated)

    theirs = scores(read(f"{at}q_proj.weight"), read(f"{at}k_proj.weight"), halves_rotated)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)  # float64: sums in another order


def test_names_are_those_of_the_gguf_package(scripts, read):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: it is part of peers.py setup, not of the tests")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    asked = []

    found = [name for name, _ in scripts.gguf_files.decoder(lambda name: asked.append(name) or read(name), CONFIG)]

    assert found == [names.get_name(n.removeprefix("language_model."), (".weight",)) for n in asked]


def test_a_written_decoder_is_read_back_by_the_gguf_package(scripts, read, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: it is part of peers.py setup, not of the tests")

    scripts.gguf_files.write_decoder(tmp_path / "d.gguf", read, CONFIG)

    file = gguf.GGUFReader(tmp_path / "d.gguf")
    by_name = {tensor.name: tensor.data for tensor in file.tensors}
    np.testing.assert_array_equal(
        by_name["blk.0.ffn_down.weight"], read("language_model.model.layers.0.mlp.down_proj.weight")
    )
    assert len(by_name) == 3 + 9 * 2
    assert file.fields["llama.attention.head_count_kv"].contents() == KV_HEADS
    assert file.fields["llama.rope.freq_base"].contents() == 10000.0


def test_tables_hold_medians_minima_and_ratios(scripts):
    found = {
        "OpenVINO, int8 weights, float32": [(0.4, 0.008, 0.0), (0.2, 0.004, 0.0), (0.8, 0.010, 0.0)],
        "bundle `none`, int8": [(0.3, 0.005, 0.0), (0.1, 0.006, 0.0), (0.2, 0.004, 0.0)],
    }

    assert scripts.peers.table(found)[2:] == [
        "| OpenVINO, int8 weights, float32 | 400 (200) | 8.0 (4.0) |",
        "| bundle `none`, int8 | 200 (100) | 5.0 (4.0) |",
    ]
    assert scripts.peers.ratios(found)[2:] == ["| `none`, int8 | OpenVINO, int8 weights, float32 | 0.50 | 0.62 |"]


def test_a_table_takes_the_place_of_the_one_with_its_title_alone(scripts):
    page = "# A\n\n| x | y |\n|---|---|\n| old | 1 |\n| older | 2 |\n\ntext\n\n| other |\n|---|\n| kept |\n"

    found = scripts.peers.written(page, ["| x | y |", "|---|---|", "| new | 3 |"])

    assert found == "# A\n\n| x | y |\n|---|---|\n| new | 3 |\n\ntext\n\n| other |\n|---|\n| kept |\n"


def test_the_pages_hold_the_stored_figures(scripts):
    figures = json.loads(scripts.peers.FIGURES.read_text("utf-8"))

    assert set(figures["turns"]) == {row[3] for row in scripts.peers.ROWS}
    for path, text in scripts.peers.pages(figures).items():
        assert path.read_text("utf-8") == text


@pytest.mark.parametrize("kind", ["openvino", "llama"])
def test_a_missing_peer_is_named_with_the_command_that_sets_it_up(scripts, tmp_path, kind):
    python = tmp_path / "peers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")  # a Python that imports nothing
    python.chmod(0o755)

    for known in (python, python.with_name("absent")):
        text = scripts.peers.missing(kind, known)
        assert text.startswith(f"{kind}: not installed")
        assert text.endswith(f"python samples/bench/peers.py setup {tmp_path / 'peers'}")
    assert scripts.peers.missing("transformers", None) is None


def test_turns_end_once_no_two_contenders_change_places(scripts):
    a, b = (1.0, 0.1, 0.0), (2.0, 0.2, 0.0)

    assert not scripts.peers.settled({"a": [a] * 4, "b": [b] * 4})  # too few
    assert scripts.peers.settled({"a": [a] * 5, "b": [b] * 5})
    # Medians of the first three turns have the other order, those of four and five do not.
    assert not scripts.peers.settled({"a": [b, b, a, a, a], "b": [(1.6, 0.16, 0.0)] * 5})


def test_a_prompt_beside_other_work_is_asked_again_and_the_quietest_counts(scripts):
    seeds, shares = [], chain([0.9], [0.4, 0.3, 0.01], [0.5, 0.2, 0.6, 0.7, 0.4], [0.0] * 99)

    def ask(seed):
        seeds.append(seed)
        return float(seed), 0.0, [7.0], next(shares)

    found, logits = scripts.peers.measure({"one": SimpleNamespace(ask=ask)}, rounds=2, busy=0.05, until=math.inf)

    assert seeds == list(range(9))
    assert [turn[0] for turn in found["one"]] == [3.0, 5.0]
    assert logits == {"one": [7.0]}


def test_agreement_is_the_correlation_of_logits_without_the_highest(scripts):
    logits = {"first": [1.0, 2.0, 90.0, 4.0], "doubled": [2.0, 4.0, 7.0, 8.0], "turned": [-1.0, -2.0, 90.0, -4.0]}

    assert scripts.peers.agreement(logits) == pytest.approx({"first": 1, "doubled": 1, "turned": -1})

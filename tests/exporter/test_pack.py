"""What an export writes: every weight once, in place, and a bundle that says where it comes from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import export
from lvlm_edge.exporter.bundles import atomic
from lvlm_edge.exporter.checkpoints import quantise
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle import open_bundle, sha256
from tests import tiny
from tests.tiny import PROMPT, pixels

SMALL = {"max_text_tokens": 24, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def good(checkpoint_once) -> Path:
    return tiny.checkpoint(checkpoint_once)


@pytest.fixture(scope="module")
def bundle(checkpoint_once, export_once) -> Path:
    return tiny.bundle(checkpoint_once, export_once, "none")


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "checkpoint"))


def answers(bundle: Path) -> tuple[list[int], np.ndarray]:
    found = Pipeline.load(bundle).generate_tokens(PROMPT, pixels(), ignore_eos=True)
    assert found.logits is not None
    return found.token_ids, found.logits


def same_answers(one: Path, other: Path) -> None:
    (tokens, logits), (others, other_logits) = answers(one), answers(other)
    assert tokens == others
    assert np.array_equal(logits, other_logits)


@pytest.mark.export
def test_an_export_says_what_it_is_doing_and_how_far_it_is(good, tmp_path):
    said = []

    returned = export(good, tmp_path / "bundle", progress=lambda *step: said.append(step), **SMALL)

    assert returned == tmp_path / "bundle"
    began = [what for what, done, total in said if done == 0]
    assert began == ["tracing vision", "tracing prefill", "writing weights"]  # the second for ONNX Runtime
    assert said[-1] == ("writing weights", said[-1][2], said[-1][2])
    assert all(0 <= done <= total for _, done, total in said)


def test_two_exports_are_equal_byte_for_byte(good, bundle, tmp_path):
    export(good, tmp_path / "again", **SMALL)

    assert tiny.tree(tmp_path / "again") == tiny.tree(bundle)


def test_the_manifest_says_where_the_bundle_comes_from(good, bundle):
    found = open_bundle(bundle).manifest.provenance

    assert (found.source, found.revision) == (str(good), None)
    assert found.config_sha256 == sha256(good / "config.json")
    assert {"torch", "transformers", "lvlm-edge", "python"} <= set(found.versions)


def test_the_weights_file_holds_every_weight_once(bundle, good):
    read = {key: tensor for key, tensor in load_file(good / "model.safetensors").items() if "post_layernorm" not in key}
    unused = "encoder.layers.1."  # the feature layer is the one before the last
    numbers = sum(tensor.numel() for key, tensor in read.items() if unused not in key)
    tables = 2 * 36 * 8  # rotary: positions x half a head

    size = open_bundle(bundle).manifest.files["weights.bin"].size

    assert 4 * numbers <= size <= 1.02 * 4 * (numbers + tables) + 64 * len(read)


def test_the_embedding_is_where_the_manifest_says(bundle, good):
    table = open_bundle(bundle).manifest.embedding
    expected = load_file(good / "model.safetensors")["language_model.model.embed_tokens.weight"]

    found = np.fromfile(bundle / table.file, table.dtype, table.vocab * table.hidden, offset=table.offset)

    assert np.array_equal(found.reshape(expected.shape), expected.numpy())


def test_a_sharded_checkpoint_gives_the_same_bundle(folder, bundle, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {}
    for part in (0, 1):
        shard = dict(sorted(tensors.items())[part::2])
        save_file(shard, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
        names |= dict.fromkeys(shard, f"model-{part}.safetensors")
    tiny.write_json(folder / "model.safetensors.index.json", {"weight_map": names})

    export(folder, tmp_path / "bundle", **SMALL)

    assert (tmp_path / "bundle" / "weights.bin").read_bytes() == (bundle / "weights.bin").read_bytes()


def test_a_pickled_checkpoint_of_tensors_gives_the_same_bundle(folder, bundle, tmp_path):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    export(folder, tmp_path / "bundle", **SMALL)

    assert (tmp_path / "bundle" / "weights.bin").read_bytes() == (bundle / "weights.bin").read_bytes()


def test_an_image_token_beyond_the_vocabulary_is_never_embedded(folder, bundle, tmp_path):
    tiny.change_json(folder / "config.json", image_token_index=200)
    (folder / "tokenizer.json").unlink()

    export(folder, tmp_path / "bundle", **SMALL)

    prompt = [200 if token == PROMPT[1] else token for token in PROMPT]
    found = Pipeline.load(tmp_path / "bundle").generate_tokens(prompt, pixels(), ignore_eos=True)
    tokens, logits = answers(bundle)
    assert found.token_ids == tokens
    assert np.array_equal(found.logits, logits)


@pytest.mark.export
def test_a_checkpoint_without_picture_settings_takes_its_encoders(folder, tmp_path):
    (folder / "preprocessor_config.json").unlink()

    export(folder, tmp_path / "bundle", **SMALL)

    how = open_bundle(tmp_path / "bundle").manifest.pictures[0].views.how
    assert (how.shortest_edge, how.crop) == (28, (28, 28))


def test_pieces_of_a_weight_do_not_change_it(good, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(quantise, "PIECE", 100)

    export(good, tmp_path / "bundle", **SMALL)

    same_answers(tmp_path / "bundle", bundle)


@pytest.mark.parametrize("content", ['{"image_processor": "x"}', '{"image_processor": [1]}'])
def test_picture_settings_that_are_no_object_are_refused(content, folder, tmp_path):
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(content)

    with pytest.raises(CheckpointError, match=r"processor_config.json: image_processor is"):
        export(folder, tmp_path / "bundle", **SMALL)


def test_a_system_without_exchange_of_folders_replaces_a_bundle_too(good, bundle, tmp_path, monkeypatch):
    output = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())

    export(good, output, force=True, num_images=2, **SMALL)

    assert open_bundle(output).manifest.counts.num_images == 2
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_bundle_moved_aside_by_a_killed_export_comes_back(bundle, folder, tmp_path):
    shutil.copytree(bundle, tmp_path / "place" / ".bundle.lvlm-edge" / "old")
    (tmp_path / "place" / ".bundle.lvlm-edge" / "lock").write_bytes(atomic.MARK)
    (folder / "model.safetensors").write_bytes(b"")

    with pytest.raises(CheckpointError):
        export(folder, tmp_path / "place" / "bundle", **SMALL)

    assert [path.name for path in (tmp_path / "place").iterdir()] == ["bundle"]
    open_bundle(tmp_path / "place" / "bundle")

"""Folders of weights in other forms than one safetensors file, against the same tensors in such a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import references
from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.quantisation import write
from lvlm_edge.runtime import Pipeline
from tests import checkpoints, layouts, tiny
from tests.exporter import test_tinyllava

SMALL = {"text": {"num_hidden_layers": 2}, "vision": {"num_hidden_layers": 2}}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return checkpoints.build(tmp_path_factory.mktemp("good"), **SMALL)


def copied(good: Path, target: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose other files are copied."""
    shutil.copytree(good, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return load_file(good / "model.safetensors")


def test_torchs_older_format_is_read(good, tmp_path):
    tensors = copied(good, tmp_path / "m")
    torch.save(tensors, tmp_path / "m" / "pytorch_model.bin", _use_new_zipfile_serialization=False)

    found = checkpoint.index(tmp_path / "m")

    assert {name: (one.shape, one.dtype) for name, one in found.items()} == {
        name: (tuple(tensor.shape), "float32") for name, tensor in tensors.items()
    }
    assert all(torch.equal(one.read(), tensors[name]) for name, one in found.items())
    head = references.view(references.load(tmp_path / "m")).language.lm_head.weight
    assert torch.equal(head, tensors["language_model.lm_head.weight"])


def test_a_file_in_the_older_format_that_changed_is_read_again(good, tmp_path):
    tensors = copied(good, tmp_path / "m")
    name = next(iter(tensors))
    for value in (1.0, 22.0):
        changed = tensors | {name: torch.full((2, 3), value), "more": torch.zeros(int(value))}
        torch.save(changed, tmp_path / "m" / "pytorch_model.bin", _use_new_zipfile_serialization=False)

        assert checkpoint.index(tmp_path / "m")[name].read()[0, 0] == value


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_code_in_the_older_format_is_not_run(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = copied(good, tmp_path / "m")
    content = tensors | {"weight": Bomb()}
    torch.save(content, tmp_path / "m" / "pytorch_model.bin", _use_new_zipfile_serialization=False)

    with pytest.raises(CheckpointError, match=r"cannot be loaded safely \(Unsupported global: "):
        checkpoint.index(tmp_path / "m")

    assert not (tmp_path / "executed").exists()


# A model in three folders, as TinyLLaVA Factory writes it after training.


def in_folders(folder: Path) -> tuple[layouts.Stock, dict[str, torch.Tensor]]:
    """A checkpoint of TinyLLaVA in three folders: stock modules, and its tensors by the names of one file."""
    stock = test_tinyllava.build(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder / "other")
    for part, prefix in (
        ("language_model", "language_model."),
        ("vision_tower", "vision_tower._vision_tower."),
        ("connector", "connector."),
    ):
        (folder / part).mkdir()
        inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        torch.save(inside, folder / part / "pytorch_model.bin")
        tiny.write_json(folder / part / "config.json", {})
    return stock, tensors


def test_a_model_in_three_folders_is_read(tmp_path, eager_once):
    stock, tensors = in_folders(tmp_path / "m")
    ids, pixels = layouts.prompt(), checkpoints.pixels()
    tokens, logits = stock.generate(ids, pixels, 4)

    found = checkpoint.index(tmp_path / "m")
    answer = Pipeline.load(eager_once(tmp_path / "m", max_text_tokens=24, max_new_tokens=8)).generate_tokens(
        ids, pixels, max_new_tokens=4, ignore_eos=True
    )
    reference = references.module("none").run(references.load(tmp_path / "m"), {}, ids, references.pixels(pixels), 4)

    assert found.keys() == tensors.keys()
    assert all(torch.equal(one.read(), tensors[name]) for name, one in found.items())
    assert answer.token_ids == reference.tokens == tokens
    assert np.abs(answer.logits - logits).max() < 1e-3


def test_what_quantize_writes_of_three_folders_is_read_again(tmp_path):
    _, tensors = in_folders(tmp_path / "m")
    (tmp_path / "out").mkdir()

    write.write(tmp_path / "m", tmp_path / "out", checkpoint.index(tmp_path / "m"), write.Made(), {})

    found = checkpoint.index(tmp_path / "out")
    assert {name: one.read().tolist() for name, one in found.items()} == {n: t.tolist() for n, t in tensors.items()}
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


# Folders that hold something else than a model.

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "r": 8, "lora_alpha": 16}
LEFT = {
    "an adapter": (["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"], "adapter (LoRA) of lmsys"),
    "a projector": (["mm_projector.bin"], "holds a projector alone (mm_projector.bin)"),
}


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("name", LEFT)
def test_a_folder_without_a_model_is_named_for_what_it_is(name, config, good, tmp_path):
    copied(good, tmp_path / "m")
    files, said = LEFT[name]
    for file in files:
        (tmp_path / "m" / file).write_text(tiny.dumps(ADAPTER), "utf-8")
    if not config:
        (tmp_path / "m" / "config.json").unlink()

    message = tiny.refused(1, "export", tmp_path / "m", "-o", tmp_path / "out")

    assert said in message and "export" in message.partition(said)[2]
    assert "download" not in message


def test_three_folders_of_an_adapter_are_not_taken_for_a_model(tmp_path):
    in_folders(tmp_path)
    tiny.write_json(tmp_path / "adapter_config.json", ADAPTER)

    with pytest.raises(CheckpointError, match=r"adapter \(LoRA\) of lmsys"):
        checkpoint.index(tmp_path)


def test_a_merge_that_kept_pefts_names_is_named(good, tmp_path):
    tensors = copied(good, tmp_path / "m")
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, tmp_path / "m" / "model.safetensors")

    message = tiny.refused(1, "export", tmp_path / "m", "-o", tmp_path / "out")

    assert "base_model.model." in message and "merge_and_unload()" in message

"""Folders of weights in other forms than one safetensors file, against the same tensors in such a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lvlm_edge.exporter import references
from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from tests import checkpoints

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

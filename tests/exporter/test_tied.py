"""`tie_word_embeddings: true` beside a stored head of other values: the stored head, as transformers has it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import references
from lvlm_edge.exporter.bundles import pack, plans
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.planning import Capacity
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime import Pipeline
from tests import checkpoints, layouts, originals, qwen, tiny

SMALL = {"text": {"num_hidden_layers": 2}, "vision": {"num_hidden_layers": 2}}


def tied(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint whose config ties what its tensors do not."""
    shutil.copytree(folder, target)
    config = tiny.read_json(target / "config.json") | {"tie_word_embeddings": True}
    if "text_config" in config:
        config["text_config"]["tie_word_embeddings"] = True
    tiny.write_json(target / "config.json", config)
    return target


def store(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def hub(oracles: Path, folder: Path) -> Path:
    return checkpoints.build(folder, **SMALL)


def original(oracles: Path, folder: Path) -> Path:
    layouts.build(folder)
    return folder


def tinyllava(oracles: Path, folder: Path) -> Path:
    return originals.build(folder, method="himix")


def qwen2_vl(oracles: Path, folder: Path) -> Path:
    shutil.copytree(qwen.case(oracles, "qwen2_vl", "none_1").checkpoint, folder)
    return folder


@pytest.mark.parametrize("build", [hub, original, tinyllava, qwen2_vl])
def test_every_family_and_its_reference_take_the_stored_head(build, oracles, tmp_path, caplog, capsys):
    folder = build(oracles, tmp_path / "untied")
    stored = load_file(folder / "model.safetensors")
    table = next(key for key in stored if key.endswith("embed_tokens.weight"))
    key = next((key for key in stored if key.endswith("lm_head.weight")), "lm_head.weight")
    head = torch.randn(stored[table].shape, generator=torch.Generator().manual_seed(5))
    store(folder, lambda tensors: tensors.update({key: head}))
    of = Checkpoint.open(tied(folder, tmp_path / "tied"))
    size = {"image_size": ((56, 56),)} if build is qwen2_vl else {}
    planned = plans.model(of, Capacity(max_text_tokens=8, max_new_tokens=2, **size))
    assert planned.spec.decoder.tied

    model, sources = pack.sources(of, planned)

    assert not model.spec.decoder.tied
    assert torch.equal(sources["lm_head.weight"].read().float(), head)
    assert "lm_head.weight" in caplog.text and "the stored head is used" in caplog.text
    capsys.readouterr()
    assert torch.equal(references.view(references.load(of.folder)).language.lm_head.weight, head)
    assert capsys.readouterr().err == ""


def test_a_bundle_answers_like_stock_transformers(tmp_path, eager_once):
    folder = tied(checkpoints.build(tmp_path / "untied", **SMALL), tmp_path / "tied")
    ids, pixels = checkpoints.prompt(6, 2), checkpoints.pixels()
    tokens, logits = checkpoints.generate(folder, ids, pixels, 4)

    bundle = eager_once(folder, max_text_tokens=24, max_new_tokens=8)
    found = Pipeline.load(bundle).generate_tokens(ids, pixels, max_new_tokens=4, ignore_eos=True)

    assert found.token_ids == tokens
    assert np.abs(found.logits - logits).max() < 1e-3
    assert parity.check(bundle, folder, steps=2, store=False).passed


@pytest.mark.parametrize("stored", ["both, equal", "the head alone"])
def test_tensors_that_agree_stay_tied(stored, tmp_path, caplog):
    folder = checkpoints.build(tmp_path / "untied", tie_word_embeddings=True, **SMALL)
    (table,) = (key for key in load_file(folder / "model.safetensors") if key.endswith("embed_tokens.weight"))
    head = table.replace("model.embed_tokens", "lm_head")
    held = load_file(folder / "model.safetensors")[table]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[head] = held.clone()
        if stored == "the head alone":
            del tensors[table]

    store(folder, change)
    of = Checkpoint.open(folder)

    model, sources = pack.sources(of, plans.model(of, Capacity()))

    assert model.spec.decoder.tied and "lm_head.weight" not in sources
    assert torch.equal(sources["embed.weight"].read(), held)
    assert torch.equal(checkpoints.stock(folder).lm_head.weight, held)
    assert caplog.text == ""


def test_the_command_says_so_on_one_line(tmp_path, monkeypatch):
    folder = tied(checkpoints.build(tmp_path / "untied", **SMALL), tmp_path / "tied")
    monkeypatch.setattr(pack._Writer, "write", lambda *_, **__: None)

    for options, lines in ((), 1), (("--quiet",), 0):
        done = tiny.cli("export", folder, "-o", tmp_path / "bundle", *options)

        assert done.exit_code == 0, done.output
        assert len(done.stderr.splitlines()) == lines
        assert done.stderr.startswith("lvlm-edge: " if lines else "")
        shutil.rmtree(tmp_path / "bundle")

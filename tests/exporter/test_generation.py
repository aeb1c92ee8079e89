"""generation_config.json as the default of answers, against what stock `generate` does with the file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from lvlm_edge.exporter.checkpoints import generation
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime import Pipeline, Sampling
from lvlm_edge.runtime.bundle import Generation
from tests import checkpoints, eager, tiny

FILES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "LLaVA-1.5": {"max_length": 4096, "temperature": 0.9, "top_p": 0.6},
    "Qwen2-VL": {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.1, "top_k": 1, "top_p": 0.001},
    "Qwen3-VL": {"do_sample": True, "repetition_penalty": 1.0, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "sampling alone": {"do_sample": True},
    "nulls": {"do_sample": True, "temperature": None, "top_k": None, "top_p": None, "repetition_penalty": None},
    "greedy with a penalty": {"do_sample": False, "temperature": 0.2, "repetition_penalty": 1.3},
    "all tokens": {"do_sample": True, "top_k": 0},
}


@pytest.fixture
def checkpoint(checkpoint_once, tmp_path) -> Path:
    return Path(shutil.copytree(tiny.checkpoint(checkpoint_once), tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", FILES)
def test_values_are_those_that_generate_works_with(name, checkpoint_once, tmp_path):
    tiny.write_json(tmp_path / generation.FILE, FILES[name])
    model = checkpoints.stock(tiny.checkpoint(checkpoint_once))
    before, model.generation_config = model.generation_config, GenerationConfig.from_pretrained(tmp_path)
    stock, _ = model._prepare_generation_config(None)
    model.generation_config = before

    found = generation.read(tmp_path)

    assert found.repetition_penalty == stock.repetition_penalty
    if stock.do_sample:
        assert (found.temperature, found.top_k, found.top_p) == (stock.temperature, stock.top_k, stock.top_p)
    else:
        assert found == Generation(repetition_penalty=stock.repetition_penalty)


@torch.no_grad()
def test_an_answer_is_that_of_stock_generate_with_the_file(checkpoint, tmp_path, eager_once):
    tiny.write_json(checkpoint / generation.FILE, {"repetition_penalty": 0.2, "temperature": 0.3, "eos_token_id": 2})
    bundle = eager.export(checkpoint, tmp_path / "bundle", max_text_tokens=48, max_new_tokens=8)
    pipe, picture = Pipeline.load(bundle), tiny.picture(tmp_path / "picture.png")
    ids, pixels = pipe.prepare("w5 w6 w7", images=[picture])
    model = checkpoints.stock(checkpoint)
    image, each = model.config.image_token_id, pipe.manifest.counts.visual_tokens
    expanded = torch.tensor([[t for i in ids for t in ([i] * each if i == image else [i])]])
    stock = model.generate(
        input_ids=expanded,
        attention_mask=torch.ones_like(expanded),
        pixel_values=torch.from_numpy(pixels),
        max_new_tokens=8,
    )

    answer = pipe.generate("w5 w6 w7", images=[picture])

    assert answer.token_ids == stock[0, expanded.shape[1] :].tolist()
    greedy = pipe.generate_tokens(ids, pixels, max_new_tokens=8)
    assert greedy.token_ids != answer.token_ids
    plain = pipe.generate("w5 w6 w7", images=[picture], sampling=Sampling())
    assert plain.token_ids == greedy.token_ids
    told = tiny.cli("run", bundle, "--image", picture, "--prompt", "w5 w6 w7", "--json")
    assert tiny.json.loads(told.stdout)["token_ids"] == answer.token_ids
    overruled = tiny.cli(
        "run", bundle, "--image", picture, "--prompt", "w5 w6 w7", "--json", "--repetition-penalty", "1"
    )
    assert tiny.json.loads(overruled.stdout)["token_ids"] == greedy.token_ids
    assert "generation: greedy, repetition_penalty 0.2" in tiny.cli("inspect", bundle).stdout


def test_check_judges_what_the_manifest_says(checkpoint, tmp_path, eager_once):
    tiny.write_json(checkpoint / generation.FILE, FILES["Qwen3-VL"] | {"eos_token_id": 2})
    bundle = eager.export(checkpoint, tmp_path / "bundle", max_text_tokens=24, max_new_tokens=8)
    assert "generation: sampled, temperature 0.7, top_k 20, top_p 0.8" in tiny.cli("inspect", bundle).stdout
    assert parity.check(bundle, checkpoint, steps=1, store=False).passed

    for name, value in (("temperature", 0.8), ("top_k", 0), ("top_p", 0.9), ("repetition_penalty", 1.1)):
        manifest = tiny.read_json(bundle / "manifest.json")
        right = manifest["generation"][name]
        manifest["generation"][name] = value
        tiny.write_json(bundle / "manifest.json", manifest)

        verdict = parity.check(bundle, checkpoint, steps=1, store=False)

        assert [row.stage for row in verdict.rows if not row.passed] == ["generation defaults"], name
        manifest["generation"][name] = right
        tiny.write_json(bundle / "manifest.json", manifest)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("temperature", "warm"), ("temperature", float("nan")), ("top_k", -1), ("top_k", 1.5),
        ("top_k", True), ("top_p", 0), ("top_p", 1.1), ("repetition_penalty", 0), ("do_sample", 1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(field, value, tmp_path):
    tiny.write_json(tmp_path / generation.FILE, {field: value})

    with pytest.raises(CheckpointError, match=rf"generation_config.json: {field} is .*, expected .*; correct it"):
        generation.read(tmp_path)


def test_fields_that_are_not_applied_are_named(tmp_path):
    tiny.write_json(
        tmp_path / generation.FILE,
        {
            "num_beams": 4,
            "min_p": 0.1,
            "no_repeat_ngram_size": 0,
            "typical_p": 1.0,
            "max_length": 20,
            "stop_strings": [],
        },
    )
    assert generation.not_applied(tmp_path) == ["num_beams"]

    tiny.change_json(tmp_path / generation.FILE, do_sample=True)
    assert generation.not_applied(tmp_path) == ["num_beams", "min_p"]

"""The table of published checkpoints: its dimensions are the published ones, and its page holds what it prints."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from lvlm_edge.exporter import plan

FOLDER = Path(__file__).resolve().parents[2] / "samples" / "families"
CLIP_REST = 12_598_272  # weights of CLIP-L's last layer and last norm, which no model reads
SIGLIP_REST = 2 * 1152  # of SigLIP's last norm, which OneVision does not read


def module(name: str) -> Any:
    found = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert found is not None
    made = importlib.util.module_from_spec(found)
    sys.modules[name] = made
    assert found.loader is not None
    found.loader.exec_module(made)
    return made


PUBLISHED = module("published")


@pytest.mark.parametrize("name", PUBLISHED.PUBLISHED)
def test_parameters_are_those_of_stock_models(name, tmp_path):
    config, total = PUBLISHED.PUBLISHED[name]
    size = {} if config["model_type"] in ("llava", "qwen") else {"image_size": (672, 672)}

    found = sum(plan(PUBLISHED.folder(name, tmp_path), max_text_tokens=64, **size)["parameters"].values())

    unread = {"llava": CLIP_REST, "llava_next": CLIP_REST, "llava_onevision": SIGLIP_REST}
    assert found + unread.get(config["model_type"], 0) == total


def test_the_page_holds_what_the_table_prints():
    page = (FOLDER / "README.md").read_text("utf-8")

    for row in module("table").rows():
        assert f"| {' | '.join(row)} |" in page

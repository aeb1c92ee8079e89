"""The GPU's script where there is no GPU, and what the dry run counts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "samples" / "gpu"


@pytest.fixture(scope="module")
def dry_run():
    found = importlib.util.spec_from_file_location("dry_run", SCRIPTS / "dry_run.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_without_a_gpu_the_script_says_so_and_ends_with_3(tmp_path):
    command = [sys.executable, SCRIPTS / "run.py", tmp_path / "work"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}

    done = subprocess.run(command, capture_output=True, text=True, check=False, env=hidden)

    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1 and "there is no GPU here" in done.stderr
    assert not (tmp_path / "work").exists()


class Steps:
    """Bindings that say what happened, step by step."""

    def __init__(self, *steps: str) -> None:
        self._steps = [[], *(value for step in steps for value in ([line.split() for line in step.split(",")], []))]

    def take(self) -> list[list[str]]:
        return self._steps.pop(0)


def test_copies_that_a_cuda_graph_holds_are_counted_with_each_token(dry_run, monkeypatch):
    from lvlm_edge.runtime.bundle import TensorInfo

    logits = TensorInfo("logits", "float32", (1, 1, 4))
    graph = SimpleNamespace(name="decode", inputs=(TensorInfo("position_ids", "int64", (1, 1)),), outputs=(logits,))
    manifest = SimpleNamespace(role=lambda _: (graph,), counts=SimpleNamespace(prompt_tokens=8), image_rows={})
    memory = SimpleNamespace(
        write=lambda *_: None,
        run=lambda *_: None,
        buffer=lambda _: SimpleNamespace(read=lambda: None),
        finder=SimpleNamespace(find=lambda: None),
    )
    captured = "ort capture-begin,ort copy-H2D 4,ort launch k,ort capture-end"
    first = f"own copy-H2D 8,ort copy-H2D 4,ort launch k,{captured},ort launch k,{captured}"
    second = "own copy-H2D 8,ort graph-launch,ort graph-launch,own copy-D2H 12"
    third = "own copy-H2D 8,ort graph-launch,own copy-D2H 16"

    found = dry_run.decode(SimpleNamespace(manifest=manifest), memory, Steps(first, second, third))

    assert found["captured"] and found["launches"] == 2 and found["allocations"] == 0
    assert found["copies_captured"] == {"ort H2D": 2}
    assert (found["bytes"]["own D2H"], found["bytes_with_logits"]["own D2H"]) == (12, 16)
    line = dry_run.row("b", {"decode": found, "nodes": {"CUDA": 3, "CPU": 1}, "weights": {
        "by_us": 8, "in_the_file": 8, "by_sessions": 0}})  # fmt: skip
    assert line == "| b | 1 of 4 | 2 | 1 (8 B) + 1 (12 B) | yes | 2 | yes | 0 |"

"""Files for polygraphy: it compares every graph of every method with them, and finds a weight that was changed."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvlm_edge.exporter.proof import parity
from tests import tiny
from tests.cases import some

pytestmark = pytest.mark.export

tools = pytest.importorskip("polygraphy.tools._main", reason="polygraphy is not installed")

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "fastv": {"method": "fastv", "prune_layer": 1},
    "fastv, int8": {"method": "fastv", "prune_layer": 1, "weights": "int8"},
    "fastv, legacy": {"method": "fastv", "prune_layer": 1, "lowering": "legacy"},
    "fastv, float16": {"method": "fastv", "prune_layer": 1, "dtype": "float16"},
    "proxyv": {"method": "proxyv"},
    "yopo": {"method": "yopo"},
    "yopo, dropped": {"method": "yopo", "semantics": "dropped"},
    "himix": {"method": "himix"},
}
OFTEN = {("fastv",)}


def compared(line: str) -> int:
    """The exit code of a command of polygraphy's."""
    command = shlex.split(line)
    assert command[0] == "polygraphy"
    status = tools.main(command[1:])
    return 0 if status is None else int(status)


def saved(name: str, checkpoint_once: Any, original: Any, export_once: Any, folder: Path) -> tuple[Path, list[str]]:
    """A copy of a method's bundle, and the commands for it."""
    options = {"max_text_tokens": 16, "max_new_tokens": 4} | METHODS[name]
    method = options.get("method", "none")
    own = method not in ("none", "fastv")
    checkpoint = original(method=method, kv_heads=2) if own else tiny.checkpoint(checkpoint_once)
    bundle = Path(shutil.copytree(export_once(checkpoint, **options), folder / "bundle"))
    verdict = parity.check(bundle, checkpoint, steps=1, store=False, save_polygraphy=folder / "saved")
    assert verdict.passed
    return bundle, (folder / "saved" / "commands.txt").read_text().splitlines()


@pytest.mark.parametrize("name", some([(name,) for name in METHODS], OFTEN))
def test_every_graph_passes_until_a_weight_is_changed(name, checkpoint_once, original, export_once, tmp_path, capsys):
    bundle, commands = saved(name, checkpoint_once, original, export_once, tmp_path)
    assert len(commands) == len(list(bundle.glob("*.onnx")))

    codes = [compared(line) for line in commands]
    weights = np.memmap(bundle / "weights.bin", np.uint8, "r+")
    weights[:] ^= 0x11
    weights.flush()
    spoilt = [compared(line) for line in commands]

    capsys.readouterr()
    assert codes == [0] * len(commands)
    reading = [
        code for code, line in zip(spoilt, commands, strict=True) if "/select.onnx" not in line
    ]  # has no weights
    assert reading and 0 not in reading


def test_what_cannot_be_saved_is_said_before_anything_is_compared(checkpoint_once, eager_once, tmp_path):
    folder, bundle = tiny.checkpoint(checkpoint_once), tiny.bundle(checkpoint_once, eager_once, "none")
    (tmp_path / "there").mkdir()
    check = ("check", bundle, "--against", folder, "--save-polygraphy")

    assert "exists; give another folder" in tiny.refused(2, *check, tmp_path / "there")
    assert "not of trt" in tiny.refused(2, *check, tmp_path / "new", "--backend", "trt")
    assert not (tmp_path / "new").exists()

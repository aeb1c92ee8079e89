"""Commands leave the home folder as it was; a build puts engines into the cache folder, for their user alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ASIDE = ("CI", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
COMMANDS = {
    "devices": ("devices",),
    "doctor": ("doctor",),
    "plan": ("plan", "CHECKPOINT", "--method", "fastv", "--prune-layer", "1"),
    "inspect": ("inspect", "BUNDLE", "--verify"),
    "run": ("run", "BUNDLE", "--image", "PICTURE", "--prompt", "w5 w6", "--overlay", "OUT.png"),
    "check": ("check", "BUNDLE", "--against", "CHECKPOINT", "--steps", "1"),
    "refused": ("run", "BUNDLE", "--image", "missing.png", "--prompt", "w5"),
    "export": ("export", "CHECKPOINT", "-o", "OUT", "--max-text-tokens", "24", "--max-new-tokens", "8"),
    "bench": ("bench", "BUNDLE", "--rounds", "1", "--warm-up", "0", "--plot", "OUT.png"),
    "build": ("build", "BUNDLE", "--device", "rtx-4090", "--graph", "select"),
}
SLOW = {"export", "bench", "build"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in COMMANDS]
)
def test_a_command_leaves_the_home_folder_as_it_was(name, checkpoint_once, export_once, tmp_path):
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    (home / "notes.txt").write_text("mine")
    places = {
        "CHECKPOINT": tiny.checkpoint(checkpoint_once),
        "BUNDLE": Path(shutil.copytree(tiny.bundle(checkpoint_once, export_once, "fastv"), tmp_path / "bundle")),
        "PICTURE": tiny.picture(tmp_path / "picture.png"),
        "OUT": tmp_path / "out",
        "OUT.png": tmp_path / "out.png",
    }
    before, beside = tiny.tree(home), set(tmp_path.iterdir())
    env = {key: value for key, value in os.environ.items() if key not in ASIDE} | {"HOME": str(home)}
    command = [str(places.get(part, part)) for part in COMMANDS[name]]

    done = subprocess.run(
        [sys.executable, "-m", "lvlm_edge.exporter.commands.main", *command],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == (2 if name == "refused" else 0), done.stderr
    after = tiny.tree(home)
    engines = {path for path in after if path.startswith(".cache/lvlm-edge")}
    assert {path: content for path, content in after.items() if path not in engines} == before
    assert bool(engines) == (name == "build")
    for path in (home / path for path in engines if path.count("/") > 2):
        assert path.stat().st_mode & 0o077 == 0
    made = {Path(places[part]) for part in ("OUT", "OUT.png") if part in COMMANDS[name]}
    assert set(tmp_path.iterdir()) == beside | made

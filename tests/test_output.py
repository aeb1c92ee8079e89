"""What the commands print where the output, a bundle's texts or its folder are not what they should be."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lvlm_edge.exporter.bundles import ratios
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError
from lvlm_edge.exporter.proof import certificate, parity
from lvlm_edge.runtime.bundle import keep_ratios, manifest_name
from lvlm_edge.runtime.errors import UsageError
from tests import tiny
from tests.tiny import cli, read_json, refused, write_json


@pytest.fixture(scope="module")
def bundle(checkpoint_once, eager_once) -> Path:
    return tiny.bundle(checkpoint_once, eager_once, "fastv")


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("command", [["inspect", "BUNDLE"], ["inspect", "BUNDLE", "--json"], ["devices"]])
def test_a_full_output_is_one_line(command, bundle):
    code = "from lvlm_edge.exporter.commands.main import main; main()"
    arguments = [str(bundle) if word == "BUNDLE" else word for word in command]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "standard output: cannot be read or written (No space left" in done.stderr


def test_texts_of_a_manifest_are_shown_and_not_obeyed(copied):
    manifest = read_json(copied / "manifest.json")
    manifest["provenance"]["source"] = "[/x] [red] \x1b]52;c;aGk=\x07 end"
    write_json(copied / "manifest.json", manifest)

    printed = " ".join(cli("inspect", copied).stdout.split())

    assert r"from [/x] [red] \x1b]52;c;aGk=\x07 end" in printed


def test_errors_hold_no_control_characters(tmp_path):
    said = refused(5, "inspect", tmp_path / "no\x1b[2Jbundle")

    assert "\x1b" not in said and r"no\x1b[2Jbundle" in said


def test_a_terminal_without_a_character_shows_another():
    code = "from lvlm_edge.exporter.commands.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "/nowhere/été漢"], capture_output=True, check=False,
        env={"PYTHONIOENCODING": "latin-1", "PATH": ""},
    )  # fmt: skip

    assert done.returncode == 5 and b"Traceback" not in done.stderr


def test_a_verdict_is_printed_although_its_certificate_cannot_be_written(bundle, checkpoint_once, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(certificate, "write", full)

    done = cli("check", bundle, "--against", tiny.checkpoint(checkpoint_once), "--steps", "1")

    assert done.exit_code == 1
    assert "PASSED" in done.stdout
    assert "the certificate cannot be written (No space left on device); free some space" in done.stderr


def test_a_check_of_nothing_is_refused(bundle, checkpoint_once):
    with pytest.raises(UsageError, match="no cases are given"):
        parity.check(bundle, tiny.checkpoint(checkpoint_once), cases=[], store=False)


def test_ratios_that_print_alike_are_two(copied):
    first, second = 0.3333333333, 0.33333349
    names = {manifest_name(ratio) for ratio in (first, second, 0.25, 0.1)}
    assert names == {f"manifest.keep-{text}.json" for text in ("0.3333333333", "0.33333349", "0.25", "0.1")}
    for name in (manifest_name(first), manifest_name(second), "manifest.keep--1.json", "manifest.keep-0.250.json"):
        shutil.copy(copied / "manifest.json", copied / name)

    assert keep_ratios(copied)[1:] == [second, first]
    with pytest.raises(UsageError, match=r"holds keep ratio 0\.3333333333 already"):
        ratios.add(copied, first)


def test_a_config_nested_too_deeply_is_one_error(tmp_path):
    (tmp_path / "config.json").write_text("[" * 5000 + "]" * 5000)

    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Checkpoint.open(tmp_path)

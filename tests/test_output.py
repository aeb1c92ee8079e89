"""What the commands print where the output, a bundle's texts or its folder are not what they should be."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter.bundles import ratios
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError
from lvlm_edge.exporter.proof import certificate, parity
from lvlm_edge.runtime import Pipeline
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


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (2, ("run", "BUNDLE", "--prompt", "w5", "--image", "missing.png")),
        (2, ("plan", "BUNDLE", "--nothing")),
        (5, ("inspect", "missing")),
        (3, ("plan", "CHECKPOINT", "--device", "rtx-3090")),
    ],
    ids=str,
)
def test_an_error_is_a_document_too_where_json_is_asked_for(code, arguments, bundle, checkpoint_once):
    places = {"BUNDLE": bundle, "CHECKPOINT": tiny.checkpoint(checkpoint_once)}

    done = tiny.cli(*(places.get(part, part) for part in arguments), "--json")

    assert done.exit_code == code
    said = json.loads(done.stdout)
    assert said["exit_code"] == code
    assert done.stderr == f"lvlm-edge: {said['error']}\n"


def test_a_gpu_without_a_profile_is_told_its_compute_capability(checkpoint_once):
    plan = ("plan", tiny.checkpoint(checkpoint_once), "--device")

    for name, capability in (("rtx-3090", "8.6"), ("RTX-2080-Ti", "7.5"), ("a30", "8.0"), ("h200-nvl", "9.0")):
        assert f"--device rtx-4090 --compute-capability {capability}; known: " in tiny.refused(3, *plan, name)
    assert "did you mean rtx-4090?" in tiny.refused(3, *plan, "rtx4090")


def test_tables_are_not_wrapped_into_a_pipe(copied, checkpoint_once, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")

    done = tiny.cli("check", copied, "--against", tiny.checkpoint(checkpoint_once))  # of graphs that were left empty

    assert "FAILED" in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if line.split()[:3] == ["full", "kept", "set"]]
    assert "margin at the cut" in row


def test_what_stops_a_command_ends_it_with_130(bundle, monkeypatch):
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "load", stopped)

    assert tiny.refused(130, "run", bundle, "--prompt", "w5") == "lvlm-edge: stopped"


def test_ctrl_c_while_the_command_is_imported_prints_nothing():
    code = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs tests in the background has it ignored
sys.argv = ["/usr/bin/lvlm-edge", "--version"]
import lvlm_edge.exporter.commands
assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
from lvlm_edge.exporter.commands.main import main
try:
    main()
except SystemExit as end:
    assert not end.code
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_a_stream_that_is_closed_was_cancelled(bundle, tmp_path):
    pipe = Pipeline.load(bundle)
    stream = pipe.stream("w5 w6", [tiny.picture(tmp_path / "a.png")])

    next(stream)
    stream.close()

    assert pipe.last.finish == "cancelled"


def test_check_names_the_layer_that_overflows(checkpoint_once, eager_once, tmp_path):
    folder = Path(shutil.copytree(tiny.checkpoint(checkpoint_once), tmp_path / "large"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.mlp.down_proj.weight"))
    save_file(tensors | {name: tensors[name] * 1e5}, folder / "model.safetensors", {"format": "pt"})
    made = eager_once(folder, dtype="float16", max_text_tokens=24, max_new_tokens=4)

    verdict = parity.check(made, folder, steps=1, store=False)

    (row, *_) = [row for row in verdict.rows if row.stage == "finite"]
    assert row.note.startswith("first in layer 1; activations left the range of float16: export with --dtype bfloat16")
    assert not verdict.passed

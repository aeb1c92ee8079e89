"""What the commands print and with which code they end. Bad input is in test_bad_input.py."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest
from PIL import Image

from lvlm_edge.exporter import methods, planning
from lvlm_edge.exporter.checkpoints import quantise
from lvlm_edge.exporter.commands.main import main
from lvlm_edge.exporter.devices import profiles
from lvlm_edge.exporter.methods import _yopo_counts
from lvlm_edge.runtime.bundle import FORMATS, open_bundle
from tests import tiny
from tests.tiny import CAPACITY, cli, refused, tree


@pytest.fixture(scope="module")
def good(checkpoint_once) -> Path:
    return tiny.checkpoint(checkpoint_once)


@pytest.fixture(scope="module")
def none(checkpoint_once, export_once) -> Path:
    return tiny.bundle(checkpoint_once, export_once, "none")


@pytest.fixture(scope="module")
def fastv(checkpoint_once, export_once) -> Path:
    return tiny.bundle(checkpoint_once, export_once, "fastv")


@pytest.fixture
def ask(tmp_path):
    """`run` on a picture, with these options."""
    picture = tiny.picture(tmp_path / "picture.png")

    def asked(bundle: Path, *options: object, prompt: str = "w5 w6") -> str:
        done = cli("run", bundle, "--image", picture, "--prompt", prompt, *options)
        assert done.exit_code == 0, done.output
        assert done.stderr == ""
        return str(done.stdout)

    return asked


def document(*arguments: object) -> dict:
    """The one JSON document that a command prints, and nothing else."""
    done = cli(*arguments, "--json")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


COMMANDS = ("plan", "quantize", "export", "check", "build", "run", "bench", "inspect", "devices", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_speaks_of_every_option(command):
    done = cli(command, "--help")

    assert done.exit_code == 0
    assert "--json" in done.stdout
    for option in {"run": ["--fit", "--overlay", "--stop", "--seed"], "export": ["--prune-layer", "--keep-ratio"]}.get(
        command, []
    ):
        assert option in done.stdout


# Options that take one of several words, and where the words come from.
WORDS = {
    "--method": methods.names(),
    "--device": (*profiles.names(), "auto"),
    "--dtype": profiles.CHOICES["dtypes"],
    "--vision-dtype": profiles.CHOICES["dtypes"],
    "--lowering": profiles.CHOICES["lowering"],
    "--backend": profiles.CHOICES["backend"],
    "--algorithm": ("awq", "gptq"),
    "--semantics": _yopo_counts.SEMANTICS,
    "--weights": (planning.FLOAT, *FORMATS),
    "--vision-weights": (planning.FLOAT, *FORMATS),
    "--head-weights": (planning.FLOAT, *FORMATS),
    "--block-size": tuple(map(str, quantise.BLOCKS)),
}


def options_of(command: str) -> dict[str, click.Option]:
    found = main.commands[command]
    params = found.get_params(click.Context(found, info_name=command))
    return {param.opts[-1]: param for param in params if isinstance(param, click.Option)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is_and_which_words_it_takes(command):
    for flag, option in options_of(command).items():
        said = option.help or ""
        assert len(said) > 10, flag
        assert not said.startswith(("Of ", "The same")), flag
        missing = [word for word in WORDS.get(flag, ()) if not re.search(rf"(?<![\w-]){word}(?![\w-])", said)]
        assert not missing, f"{command} {flag}: {missing}"


def test_every_setting_of_every_method_is_an_option_that_says_what_it_does():
    options = options_of("export")
    for name in methods.names():
        for setting in dataclasses.fields(methods.load(name).config):
            option = options["--" + setting.name.replace("_", "-")]
            assert (option.help or "").startswith(f"{name}: {setting.metadata['help']}")


def test_the_commands_are_listed_with_what_they_do():
    done = cli("--help")

    assert done.exit_code == 0
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)
    assert "..." not in done.stdout.split("Commands:")[1]


def test_no_arguments_print_the_help():
    done = cli()

    assert done.exit_code == 2
    assert "Commands:" in done.output


def test_help_imports_no_torch():
    code = "import sys; from lvlm_edge.exporter.commands.main import main\n"
    code += "main(['export', '--help'], standalone_mode=False)\n"
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "False False"


def test_plan_reads_no_weights(good, tmp_path):
    shutil.copy(good / "config.json", tmp_path)

    report = document("plan", tmp_path, "--method", "fastv", "--prune-layer", "1", "--keep-ratio", "0.25", *CAPACITY)

    assert report["method"] == "fastv"
    assert (report["visual_tokens"], report["kept_visual_tokens"], report["removed_share"]) == (4, 1, 0.75)
    assert [stage["layers"] for stage in report["stages"]] == [[0, 0], [1, 1]]
    assert [stage["cached"] for stage in report["stages"]] == [28, 25]
    assert set(report["flops"]) == {"vision", "projector", "prefill", "prefill_dense", "decode_per_token"}
    assert report["paper"]["name"] == "FastV"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_plan_prints_kept_and_removed_shares(good):
    done = cli("plan", good, "--method", "fastv", "--prune-layer", "1", "--keep-ratio", "0.25")

    assert done.exit_code == 0
    assert "25.0% kept, 75.0% removed" in done.stdout
    assert done.stderr == ""


@pytest.mark.export
def test_export_prints_the_next_step_and_no_progress_where_there_is_no_terminal(good, tmp_path):
    done = cli("export", good, "-o", tmp_path / "deep" / "bundle", "--method", "none", *CAPACITY)

    assert done.exit_code == 0
    assert done.stderr == ""
    assert len(done.stdout.replace("\n", " ").split("next:")) == 2
    assert f"lvlm-edge check {tmp_path / 'deep' / 'bundle'} --against {good}" in done.stdout.replace("\n", " ")
    assert open_bundle(tmp_path / "deep" / "bundle").manifest.method == "none"


def test_export_replaces_a_bundle_with_force_and_prints_its_manifest(good, none, tmp_path):
    output = Path(shutil.copytree(none, tmp_path / "bundle"))
    (output / "certificate.json").write_text("{}")

    manifest = document("export", good, "-o", output, "--force", "--dtype", "float16", *CAPACITY)

    assert manifest["dtype"] == "float16"
    assert manifest == json.loads((output / "manifest.json").read_text())
    assert open_bundle(output).manifest.dtype == "float16"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert not (output / "certificate.json").exists()


def test_export_writes_through_no_link(good, none, tmp_path):
    shutil.copytree(none, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    before = tree(tmp_path)

    assert "link: is a link; give the folder" in refused(
        2, "export", good, "-o", tmp_path / "link", "--force", *CAPACITY
    )

    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path) == before


def test_export_shows_its_progress_on_a_terminal(good, tmp_path, monkeypatch, quick_tracing):
    shown, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with ThreadPoolExecutor() as pool, os.fdopen(terminal, "w") as stderr:
        printed = pool.submit(everything, shown)
        monkeypatch.setattr(sys, "stderr", stderr)
        arguments = ["export", good, "-o", tmp_path / "bundle", *CAPACITY, "--device", "rtx-4090"]
        main(list(map(str, arguments)), standalone_mode=False)
        monkeypatch.undo()
        stderr.close()

    assert "tracing" in printed.result()


def everything(shown: int) -> str:
    """What is printed to a terminal until its other end is closed."""
    found = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(shown, 4096):
            found += piece
    os.close(shown)
    return found.decode()


def test_check_passes_and_leaves_a_certificate_that_inspect_reads(good, fastv, tmp_path):
    bundle = Path(shutil.copytree(fastv, tmp_path / "bundle"))
    assert document("inspect", bundle)["certificate"] is None
    asked = ["run", bundle, "--image", tiny.picture(tmp_path / "picture.png"), "--prompt", "w5"]
    assert "certificate.json is missing" in tiny.refused(5, *asked, "--certified")

    verdict = document("check", bundle, "--against", good, "--steps", "4")

    assert verdict["passed"] is True
    assert {"vision", "head", "scores", "kept set", "tokens"} <= {row["stage"] for row in verdict["rows"]}
    said = {"passed": True, "of_this_bundle": True, "cases": 3, "steps": 8, "not_judged": []}
    assert document("inspect", bundle)["certificate"] == said
    assert "certificate: passed; 3 prompts, up to 8 tokens" in cli("inspect", bundle).stdout
    assert (cli(*asked, "--certified").exit_code, cli(*asked).stderr) == (0, "")
    with (bundle / "manifest.json").open("a") as file:
        file.write("\n")
    assert document("inspect", bundle)["certificate"] == said | {"of_this_bundle": False}
    assert "passed, but of another manifest" in tiny.refused(5, *asked, "--certified")
    warned = cli(*asked)
    assert warned.exit_code == 0
    assert "certificate.json says: passed, but of another manifest; check the bundle" in warned.stderr
    assert len(warned.stderr.splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"passed": true}'])
def test_inspect_survives_a_damaged_certificate(content, none, tmp_path):
    bundle = Path(shutil.copytree(none, tmp_path / "bundle"))
    (bundle / "certificate.json").write_text(content)

    said = document("inspect", bundle)["certificate"]
    assert (said["passed"], said["of_this_bundle"]) == (None, False)
    assert "certificate: damaged" in cli("inspect", bundle).stdout


def test_check_on_a_question_prints_a_table(good, none, tmp_path):
    bundle = Path(shutil.copytree(none, tmp_path / "bundle"))
    picture = tiny.picture(tmp_path / "picture.jpg")

    done = cli("check", bundle, "--against", good, "--image", picture, "--prompt", "w5 w6", "--steps", "2")

    assert done.exit_code == 0
    assert "PASSED" in done.stdout and "question" in done.stdout


def test_check_ends_with_1_when_the_bundle_says_something_else(checkpoint_once, none, tmp_path):
    bundle = Path(shutil.copytree(none, tmp_path / "bundle"))
    other = checkpoint_once(**tiny.SIZES | {"seed": 8})

    done = cli("check", bundle, "--against", other, "--steps", "2", "--json")

    assert done.exit_code == 1
    assert json.loads(done.stdout)["passed"] is False
    said = document("inspect", bundle)["certificate"]
    assert (said["passed"], said["of_this_bundle"]) == (False, True)


@pytest.mark.parametrize("verify", [[], ["--verify"]])
def test_inspect_lists_every_tensor_and_file(verify, fastv):
    found = document("inspect", fastv, *verify)

    assert found["verified"] is bool(verify)
    assert set(found["files"]) == {path.name for path in fastv.iterdir()} - {"manifest.json"}
    text = cli("inspect", fastv, *verify).stdout
    for graph in found["graphs"]:
        for tensor in graph["inputs"] + graph["outputs"]:
            assert tensor["name"] in text
    assert ("verified by hash" in text) is bool(verify)


def test_inspect_hashes_only_when_asked(none, tmp_path):
    bundle = Path(shutil.copytree(none, tmp_path / "bundle"))
    content = bytearray((bundle / "weights.bin").read_bytes())
    content[77] ^= 1
    (bundle / "weights.bin").write_bytes(content)

    assert cli("inspect", bundle).exit_code == 0
    assert cli("inspect", bundle, "--verify").exit_code == 5


def test_run_prints_the_answer_alone(none, fastv, ask):
    for bundle in (none, fastv):
        answer = ask(bundle)
        assert len(answer.split()) == 8 and answer.endswith("\n")


def test_run_says_as_json_what_it_says_as_text(fastv, ask):
    found = json.loads(ask(fastv, "--json"))

    assert found["text"] + "\n" == ask(fastv)
    assert len(found["token_ids"]) == 8 and found["finish"] == "length"
    assert found["prompt_tokens"] == 4 + 6  # 4 visual; `USER`, `:`, two words, `ASSISTANT`, `:`
    assert found["visual_tokens"] == 4 and len(found["kept_visual"]) == 2
    assert {"preprocess", "vision", "first_token", "decode"} <= set(found["seconds"])


def test_run_stops_at_a_stop_string(none, ask):
    words = ask(none).split()

    found = json.loads(ask(none, "--json", "--stop", f" {words[2]}", "--stop", "never"))

    assert found["text"] == " ".join(words[: words.index(words[2])]) and found["finish"] == "stop"


def test_run_gives_fewer_tokens_when_asked(none, ask):
    assert ask(none, "--max-new-tokens", "3").split() == ask(none).split()[:3]


def test_sampling_with_a_seed_is_reproducible(none, ask):
    hot = ("--temperature", "5", "--top-k", "50", "--top-p", "0.99", "--repetition-penalty", "1.1")

    first = [ask(none, *hot, "--seed", seed) for seed in (1, 2)]

    assert first == [ask(none, *hot, "--seed", seed) for seed in (1, 2)]
    assert first[0] != first[1]


def test_run_prints_stats_to_stderr(fastv, tmp_path):
    picture = tiny.picture(tmp_path / "picture.png")

    done = cli("run", fastv, "--image", picture, "--prompt", "w5", "--stats")

    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 1
    assert "kept 2 of 4 visual tokens (50% kept, 50% removed)" in done.stderr
    assert "time to first token" in done.stderr


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".PNG"])
def test_run_draws_what_was_kept(suffix, fastv, ask, tmp_path):
    target = tmp_path / f"kept{suffix}"

    ask(fastv, "--overlay", target)

    with Image.open(target) as drawn:
        assert drawn.width * 30 == drawn.height * 40
    assert {path.name for path in tmp_path.iterdir()} == {"picture.png", target.name}


def test_run_answers_without_hashing_and_on_one_thread(none, ask, tmp_path):
    answer = ask(none)

    # a process of its own, since a process has one pool of threads
    options = ("--image", tmp_path / "picture.png", "--prompt", "w5 w6", "--no-verify", "--threads", "1")
    command = [sys.executable, "-m", "lvlm_edge.exporter.commands.main", "run", none, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)

    assert (done.stdout, done.stderr) == (answer, "")


def test_no_command_but_check_changes_a_bundle(fastv, ask):
    before = tree(fastv)

    ask(fastv)
    document("inspect", fastv, "--verify")

    assert tree(fastv) == before

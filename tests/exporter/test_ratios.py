"""Several keep ratios in one bundle: each as good as a bundle of its own, on the same bytes of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lvlm_edge.exporter.bundles import atomic, graph_set, ratios
from lvlm_edge.exporter.commands.main import main
from lvlm_edge.exporter.graphs import trace
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle import MANIFEST, keep_ratios, open_bundle, sha256
from lvlm_edge.runtime.errors import BundleError, LvlmEdgeError, UsageError
from tests import checkpoints, eager

FASTV = {"method": "fastv", "prune_layer": 2}


@pytest.fixture(scope="module")
def several(gqa, export_once, tmp_path_factory):
    """A bundle of keep ratio 0.5 to which 0.25 was added, in int8 and in float32."""
    made = {}
    for weights in ("as-is", "int8"):
        own = export_once(gqa, keep_ratio=0.5, weights=weights, **FASTV)
        made[weights] = Path(shutil.copytree(own, tmp_path_factory.mktemp("several") / "bundle"))
        ratios.add(made[weights], 0.25)
    return made


def answer(bundle, **options):
    prompt, pixels = checkpoints.prompt(20, 5), checkpoints.pixels()
    return Pipeline.load(bundle, **options).generate_tokens(prompt, pixels, max_new_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("weights", ["as-is", "int8"])
@pytest.mark.parametrize("portable", [True, False])
def test_an_added_ratio_says_what_a_bundle_of_its_own_says(several, gqa, export_once, weights, portable):
    own = export_once(gqa, keep_ratio=0.25, weights=weights, **FASTV)

    found, wanted = answer(several[weights], keep_ratio=0.25, portable=portable), answer(own, portable=portable)

    assert found.token_ids == wanted.token_ids
    assert found.kept_visual.tolist() == wanted.kept_visual.tolist() and len(found.kept_visual) == 4
    np.testing.assert_array_equal(found.logits, wanted.logits)


def test_the_ratio_of_the_export_stays_what_it_was(several, gqa, export_once):
    own = export_once(gqa, keep_ratio=0.5, **FASTV)

    for options in ({}, {"keep_ratio": 0.5}):
        np.testing.assert_array_equal(answer(several["as-is"], **options).logits, answer(own).logits)
    assert sha256(several["as-is"] / MANIFEST) == sha256(own / MANIFEST)
    assert sha256(several["as-is"] / "weights.bin") == sha256(own / "weights.bin")


def test_only_what_a_ratio_changes_is_written_again(several):
    names = {p.name for p in several["as-is"].iterdir() if ".keep-" in p.name and "certificate" not in p.name}

    files = ("select", "prefill_tail", "decode")
    assert names == {
        "manifest.keep-0.25.json", "prefill_tail.keep-0.25.onnxruntime", *(f"{f}.keep-0.25.onnx" for f in files)
    }  # fmt: skip
    assert keep_ratios(several["as-is"]) == [0.5, 0.25]


def test_an_added_ratio_is_checked_by_itself(several, gqa):
    verdict = parity.check(several["as-is"], gqa, keep_ratio=0.25, steps=4)

    assert verdict.passed, verdict.first_failure
    certificate = json.loads((several["as-is"] / "certificate.keep-0.25.json").read_text())
    assert certificate["manifest_sha256"] == sha256(several["as-is"] / "manifest.keep-0.25.json")
    assert not (several["as-is"] / "certificate.json").exists()


def test_inspect_tells_who_shares_what(several):
    done = CliRunner().invoke(main, ["inspect", str(several["as-is"]), "--json"])

    content = json.loads(done.stdout)
    assert content["keep_ratios"] == [0.5, 0.25]
    files = content["shared"]["files"]
    assert files["weights.bin"]["keep_ratios"] == [0.5, 0.25]
    assert files["weights.bin"]["sha256"] == sha256(several["as-is"] / "weights.bin")
    assert files["decode.onnx"]["keep_ratios"] == [0.5]
    own = ("select", "prefill_tail", "decode")
    sizes = [several["as-is"] / f"{name}.keep-0.25.onnx" for name in own]
    sizes.append(several["as-is"] / "prefill_tail.keep-0.25.onnxruntime")
    assert content["shared"]["beyond_weights"]["0.25"] == sum(path.stat().st_size for path in sizes)


def test_an_altered_graph_of_a_ratio_is_noticed(several, tmp_path):
    bundle = Path(shutil.copytree(several["as-is"], tmp_path / "bundle"))
    graph = bundle / "select.keep-0.25.onnx"
    content = bytearray(graph.read_bytes())
    content[-1] ^= 1
    graph.write_bytes(content)

    open_bundle(bundle)
    with pytest.raises(BundleError, match=r"select.keep-0.25.onnx: was altered"):
        open_bundle(bundle, keep_ratio=0.25)


def test_what_fails_on_the_way_leaves_the_bundle_as_it_was(several, tmp_path, monkeypatch):
    bundle = Path(shutil.copytree(several["as-is"], tmp_path / "bundle"))
    before = {path.name: sha256(path) for path in bundle.iterdir()}
    monkeypatch.setattr(trace, "trace", eager.empty)
    monkeypatch.setattr(graph_set.graph, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))

    with pytest.raises(LvlmEdgeError, match="disk full"):
        ratios.add(bundle, 0.1)

    assert {path.name: sha256(path) for path in bundle.iterdir()} == before


def test_what_a_killed_run_left_is_removed(several, tmp_path, monkeypatch):
    bundle = Path(shutil.copytree(several["as-is"], tmp_path / "bundle"))
    work = atomic.work_folder(bundle)
    (work / "partial").mkdir(parents=True)
    (work / "partial" / "decode.onnx").write_bytes(b"half")
    (work / "lock").write_bytes(atomic.MARK)
    monkeypatch.setattr(trace, "trace", eager.empty)

    ratios.add(bundle, 0.1)

    assert not work.exists()
    assert keep_ratios(bundle) == [0.5, 0.25, 0.1]
    open_bundle(bundle, keep_ratio=0.1)


def test_one_at_a_time(several, tmp_path):
    bundle = Path(shutil.copytree(several["as-is"], tmp_path / "bundle"))

    with atomic.inside(bundle), pytest.raises(UsageError, match="is being written by another export"):
        ratios.add(bundle, 0.1)

    assert keep_ratios(bundle) == [0.5, 0.25]


@pytest.mark.parametrize(
    ("ratio", "message"),
    [(0.25, "holds keep ratio 0.25 already"), (0.5, "holds keep ratio 0.5 already"), (1.5, "keep_ratio is 1.5")],
)
def test_ratios_that_cannot_be_added(several, ratio, message):
    with pytest.raises(UsageError, match=message):
        ratios.add(several["as-is"], ratio)


def test_a_method_that_keeps_everything_has_none_to_add(gqa, export_once):
    with pytest.raises(UsageError, match="has no keep ratio"):
        ratios.add(export_once(gqa), 0.5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "BUNDLE", "--keep-ratio", "0.3", "--prompt", "x"], 2, "holds keep ratio 0.5, 0.25, not 0.3; choose"),
        (["export", "BUNDLE", "--add-keep-ratio", "0.3", "--dtype", "float16"], 2, "leave out --dtype"),
        (["export", "BUNDLE", "--add-keep-ratio", "0.3", "-o", "x"], 2, "leave out --output"),
        (["export", "/nowhere", "--add-keep-ratio", "0.3"], 5, "is no folder"),
        (["export", "BUNDLE"], 2, "--output is missing"),
    ],
)
def test_what_the_command_line_refuses(several, arguments, code, message):
    done = CliRunner().invoke(main, [str(several["as-is"]) if a == "BUNDLE" else a for a in arguments])

    assert (done.exit_code, done.stderr.count("\n")) == (code, 1)
    assert message in done.stderr

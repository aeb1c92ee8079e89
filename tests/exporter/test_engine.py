"""Engines really built by TensorRT-RTX, which needs no GPU to build."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lvlm_edge.exporter.devices import engine
from lvlm_edge.exporter.devices.engine import PORTABLE, Settings
from lvlm_edge.runtime.backends.cuda import highest
from lvlm_edge.runtime.bundle import open_bundle, sha256
from lvlm_edge.runtime.errors import LvlmEdgeError, UnsupportedError, UsageError
from tests import tiny

pytestmark = pytest.mark.export

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this machine")

FASTV = {"method": "fastv", "prune_layer": 2, "keep_ratio": 0.5}
EVERY = ("8.0", "8.6", "8.9", "12.0", "12.1")
SAMPLE = Path(__file__).parents[2] / "samples/easyvqa/checkpoint"


def entries(folder):
    return json.loads((folder / engine.ENGINES).read_text())["engines"]


@pytest.fixture(scope="module", params=[pytest.param("none", marks=pytest.mark.slow), "fastv"])
def options(request):
    return FASTV if request.param == "fastv" else {"method": "none"}


@pytest.fixture(scope="module")
def gqa(checkpoint_once):
    """Heads of 16: TensorRT-RTX has no attention kernel for the 8 of other tests' checkpoints."""
    return checkpoint_once(text={"num_attention_heads": 4, "num_key_value_heads": 2})


@pytest.fixture
def own(gqa, export_once, tmp_path, monkeypatch):
    """A bundle of its own, to be spoilt, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = export_once(gqa, dtype="float16", max_text_tokens=32, max_new_tokens=8, ort=False, **FASTV)
    return shutil.copytree(made, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        ("float16", EVERY),
        pytest.param("bfloat16", EVERY, marks=pytest.mark.slow),
        pytest.param("bfloat16", (PORTABLE,), marks=pytest.mark.slow),
        pytest.param("float16", (PORTABLE,), marks=pytest.mark.slow),
        *(pytest.param(dtype, (one,), marks=pytest.mark.slow) for one in EVERY for dtype in ("float16", "bfloat16")),
    ],
)
def test_every_graph_of_the_oracle_checkpoint_builds(oracles, export_once, options, dtype, target):
    bundle = export_once(oracles / "llava_mha", dtype=dtype, ort=False, **options)

    out = engine.build(bundle, Settings(backend="trt-rtx", compute_capabilities=target))

    manifest = open_bundle(bundle).manifest
    found = entries(out)
    assert set(found) == {graph.file for graph in manifest.graphs} | {highest.FILE}
    sources = {name: info.sha256 for name, info in manifest.files.items()}
    sources[highest.FILE] = hashlib.sha256(highest.graph(manifest.embedding.vocab)).hexdigest()
    for name, entry in found.items():
        assert (out / entry["file"]).read_bytes()[:4] == b"vtrt"
        assert sha256(out / entry["file"]) == entry["sha256"]
        assert entry["graph_sha256"] == sources[name]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_graph_of_the_sample_builds(export_once, options, dtype):
    bundle = export_once(SAMPLE, dtype=dtype, ort=False, **options)
    every = ("7.5", *EVERY) if dtype == "float16" else EVERY  # 7.5 has no bfloat16
    graphs = {graph.file for graph in open_bundle(bundle).manifest.graphs}

    for targets in (every, (PORTABLE,)):
        out = engine.build(bundle, Settings(backend="trt-rtx", compute_capabilities=targets))

        assert set(entries(out)) == graphs | {highest.FILE}
        assert all((out / entry["file"]).read_bytes()[:4] == b"vtrt" for entry in entries(out).values())


@pytest.mark.slow
def test_turing_takes_float16_and_refuses_bfloat16(gqa, export_once, options):
    turing = Settings(backend="trt-rtx", compute_capabilities=("7.5",))
    engine.build(export_once(gqa, dtype="float16", ort=False, **options), turing)

    with pytest.raises(LvlmEdgeError, match="did not build it"):
        engine.build(export_once(gqa, dtype="bfloat16", ort=False, **options), turing)


@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=pytest.mark.slow)])
def test_legacy_graphs_build_too(gqa, export_once, options, dtype):
    bundle = export_once(gqa, lowering="legacy", dtype=dtype, ort=False, **options)

    out = engine.build(bundle, Settings(backend="trt-rtx", compute_capabilities=("8.6",)))

    assert set(entries(out)) == {graph.file for graph in open_bundle(bundle).manifest.graphs} | {highest.FILE}


def test_caches_written_in_place_are_listed_as_aliases(own):
    out = engine.build(own, Settings(backend="trt-rtx"), graphs=["decode", "select"])

    found = entries(out)
    layers = len(open_bundle(own).manifest.cache)
    assert found["decode.onnx"]["aliases"]["present.0.key"] == "past_key_values.0.key"
    assert len(found["decode.onnx"]["aliases"]) == 2 * layers
    assert found["select.onnx"]["aliases"] == {}


def test_what_is_up_to_date_is_not_built_again(own):
    settings = Settings(backend="trt-rtx", compute_capabilities=("8.6",))
    out = engine.build(own, settings)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.engine")}
    damaged = out / "select.engine"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    engine.build(own, settings)

    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.engine")}
    assert {name for name in after if after[name] != before[name]} == {"select.engine"}
    assert sha256(damaged) == entries(out)["select.onnx"]["sha256"]


def test_another_target_builds_everything_again(own):
    out = engine.build(own, Settings(backend="trt-rtx", compute_capabilities=("8.6",)), graphs=["select", "vision"])

    engine.build(own, Settings(backend="trt-rtx", compute_capabilities=("8.9",)), graphs=["select"])

    assert set(entries(out)) == {"select.onnx"}


def test_a_killed_build_goes_on_where_it_stopped(own):
    code = f"""
from lvlm_edge.exporter.devices import engine
engine.build({str(own)!r}, engine.Settings(backend="trt-rtx", compute_capabilities=("8.6",)))
"""
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    out = engine.folder(open_bundle(own), "trt-rtx")
    while not (out / engine.ENGINES).exists():
        assert child.poll() is None
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    done = entries(out)
    first = {name: (out / entry["file"]).stat().st_mtime_ns for name, entry in done.items()}
    assert 0 < len(done) < 6

    engine.build(own, Settings(backend="trt-rtx", compute_capabilities=("8.6",)))

    found = entries(out)
    assert len(found) == 6
    assert {name: (out / found[name]["file"]).stat().st_mtime_ns for name in first} == first
    assert not list(out.glob(".*"))


def test_a_plan_can_be_read_by_its_owner_only(own):
    out = engine.build(own, Settings(backend="trt-rtx"), graphs=["select"])

    assert (out / "select.engine").stat().st_mode & 0o777 == 0o600
    assert (out / engine.ENGINES).stat().st_mode & 0o777 == 0o600


def test_engines_are_not_put_into_the_bundle(own, tmp_path):
    before = tiny.tree(Path(own))

    out = engine.build(own, Settings(backend="trt-rtx"), graphs=["select"])
    elsewhere = engine.build(own, Settings(backend="trt-rtx"), graphs=["select"], engines=tmp_path / "mine")

    assert tiny.tree(Path(own)) == before
    assert out.is_relative_to(tmp_path / "cache/lvlm-edge/engines")
    assert elsewhere == tmp_path / "mine" / out.relative_to(tmp_path / "cache/lvlm-edge/engines")


def test_what_cannot_be_built_says_why(own):
    with pytest.raises(UnsupportedError, match="tensorrt is not installed"):
        engine.build(own, Settings(backend="trt"))
    with pytest.raises(UnsupportedError, match="has no engines"):
        engine.build(own, Settings(backend="ort"))
    with pytest.raises(UsageError, match="'prefil' is not in the bundle"):
        engine.build(own, Settings(backend="trt-rtx"), graphs=["prefil"])
    with pytest.raises(LvlmEdgeError, match=r"compute capability 8.7 is no target"):
        engine.build(own, Settings(backend="trt-rtx", compute_capabilities=("8.7",)), graphs=["select"])


def test_float32_attention_is_refused_with_tensorrts_reason_and_a_way_out(gqa, export_once):
    bundle = export_once(gqa, ort=False, **FASTV)

    with pytest.raises(LvlmEdgeError, match=r"--lowering legacy"):
        engine.build(bundle, Settings(backend="trt-rtx", compute_capabilities=("8.6",)), graphs=["prefill_tail"])


def test_the_command_line_builds_for_a_device(own):
    from click.testing import CliRunner

    from lvlm_edge.exporter.commands.main import main

    done = CliRunner().invoke(main, ["build", str(own), "--device", "rtx-4090", "--graph", "select", "--json"])
    refused = CliRunner().invoke(main, ["build", str(own), "--device", "cpu"])

    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["settings"]["compute_capabilities"] == ["8.9"]
    assert set(record["engines"]) == {"select.onnx"}
    assert refused.exit_code == 3

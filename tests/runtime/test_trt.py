"""The TensorRT backends over a double that runs the same graphs on ONNX Runtime; no GPU, no TensorRT."""

from __future__ import annotations

import gc
import itertools
import json
import platform
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from lvlm_edge.runtime import Pipeline, backends
from lvlm_edge.runtime.backends import trt
from lvlm_edge.runtime.backends.cuda import engines, highest
from lvlm_edge.runtime.bundle import kv_cache, load_manifest, open_bundle, sha256
from lvlm_edge.runtime.errors import BundleError, DeviceError, LvlmEdgeError, UnsupportedError, UsageError
from lvlm_edge.runtime.pipeline.sampling import Sampling
from tests import fake_tensorrt, tiny
from tests.cases import some
from tests.fake_tensorrt import CODES, Machine
from tests.tiny import PROMPT, pixels

FASTV = {"method": "fastv", "prune_layer": 1}


def aliases(graph):
    """Caches among the outputs that are as long as the input they came from."""
    shapes = {info.name: info.shape for info in graph.inputs}
    pairs = {info.name: kv_cache.shared_name(info.name) for info in graph.outputs}
    return {
        o.name: pairs[o.name] for o in graph.outputs if shapes.get(pairs[o.name]) == o.shape and o.name not in shapes
    }


def place(bundle: Path, backend: str = "trt-rtx") -> Path:
    """Where a bundle's engines are."""
    return engines.folder(open_bundle(bundle, verify=False), backend)


def write_engines(bundle: Path, backend: str = "trt-rtx", *, graphs: Path | None = None, **record) -> Path:
    """Engines for the double, in the form that `engine.py` writes; each asks for 1000 bytes more scratch."""
    manifest = load_manifest(bundle)
    out = place(bundle, backend)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    entries = {}
    (out / highest.FILE).write_bytes(highest.graph(manifest.embedding.vocab))
    for i, file in enumerate(dict.fromkeys([*(g.file for g in manifest.graphs), highest.FILE])):
        found, bits, others, source = {}, [], [], out / file
        if file != highest.FILE:
            graph, *others = manifest.graphs_of(file)
            found, source = aliases(graph), (graphs or bundle) / file
            bits = [info.name for info in (*graph.inputs, *graph.outputs) if info.dtype == "bfloat16"]
        scratch = 500 if file == highest.FILE else 1000 * (i + 1)
        content = fake_tensorrt.plan(source, scratch=scratch, aliases=found, bfloat16=bits, profiles=1 + len(others))
        path = (out / file).with_suffix(".engine")
        path.write_bytes(content)
        path.chmod(0o600)
        entries[file] = {
            "file": path.name,
            "size": len(content),
            "sha256": sha256(path),
            "graph_sha256": sha256(out / file) if file == highest.FILE else manifest.files[file].sha256,
            "aliases": found,
            "peak_bytes": 1,
            "seconds": 0.1,
        }
    capabilities = ["portable"] if backend == "trt-rtx" else ["8.7"]
    common = {
        "schema": 2,
        "flavour": {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}[backend],
        "version": "1.7.1",
        "platform": f"{sys.platform}-{platform.machine()}",
        "settings": {"backend": backend, "compute_capabilities": capabilities},
        "weights_sha256": manifest.files[manifest.weights].sha256,
        "engines": entries,
    }
    tiny.write_json(out / "engines.json", common | record)
    (out / "engines.json").chmod(0o600)
    return bundle


@pytest.fixture(scope="module")
def with_engines(tmp_path_factory):
    """A bundle's copy with engines for both flavours, made once."""
    made: dict[Path, Path] = {}

    def copied(bundle: Path) -> Path:
        if bundle not in made:
            made[bundle] = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("engines") / "bundle"))
            write_engines(made[bundle], "trt-rtx")
            write_engines(made[bundle], "trt")
        return made[bundle]

    return copied


@pytest.fixture(scope="module", params=["modern", "legacy"])
def small(request, checkpoint_once, export_once, with_engines) -> Path:
    """A small bundle of either lowering, with engines."""
    return with_engines(tiny.bundle(checkpoint_once, export_once, "fastv", lowering=request.param))


@pytest.fixture(scope="module")
def modern(checkpoint_once, export_once, with_engines) -> Path:
    return with_engines(tiny.bundle(checkpoint_once, export_once, "fastv"))


@pytest.fixture(scope="module")
def legacy(checkpoint_once, export_once, with_engines) -> Path:
    return with_engines(tiny.bundle(checkpoint_once, export_once, "fastv", lowering="legacy"))


@pytest.fixture
def own(modern, tmp_path, monkeypatch) -> Path:
    """A bundle with engines, to be spoilt."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_engines(Path(shutil.copytree(modern, tmp_path / "bundle")))


def generate(pipe):
    return pipe.generate_tokens(PROMPT, pixels(), ignore_eos=True)


def few(pipe, **options):
    """One decode step plain, one captured and launched, one launched."""
    return pipe.generate_tokens(PROMPT, pixels(), ignore_eos=True, max_new_tokens=4, **options)


# Tokens.


ORACLES = ("fastv_0", "fastv_1", "fastv_2")
OFTEN = {("fastv_1", "fastv", "float32", "modern")}
PAIRINGS = itertools.product(ORACLES, ("fastv", "none"), ("float32", "float16"), ("modern", "legacy"))


@pytest.mark.parametrize(("name", "method", "dtype", "lowering"), some(PAIRINGS, OFTEN))
def test_tokens_and_logits_of_every_oracle_are_those_of_onnx_runtime(
    name, oracles, export_once, with_engines, monkeypatch, method, dtype, lowering
):
    case = json.loads((oracles / "fastv" / f"{name}.json").read_text())
    tensors = load_file(oracles / "fastv" / f"{name}.safetensors")
    options = {"prune_layer": case["prune_layer"], "keep_ratio": case["keep_ratio"]} if method == "fastv" else {}
    bundle = export_once(oracles / "llava_mha", method=method, dtype=dtype, lowering=lowering, **options)
    machine = Machine().install(monkeypatch, "tensorrt_rtx")
    pipes = Pipeline.load(bundle, portable=True), Pipeline.load(with_engines(bundle), "trt-rtx")

    expected, found = (
        pipe.generate_tokens(case["prompt_token_ids"], tensors["pixel_values"], ignore_eos=True) for pipe in pipes
    )

    assert found.token_ids == expected.token_ids and len(found.token_ids) == 16
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5 if dtype == "float32" else 1e-2)
    if method == "fastv":
        assert found.kept_visual.tolist() == expected.kept_visual.tolist()
        if dtype == "float32":
            assert found.token_ids[: len(case["expected_new_token_ids"])] == case["expected_new_token_ids"]
    assert (machine.calls["cudaMemcpy2DAsync"] > 0) == (lowering == "legacy")


@pytest.mark.parametrize("modern_api", [True, False])
@pytest.mark.parametrize("integrated", [True, False])
def test_tensorrt_gives_the_same_tokens(small, monkeypatch, integrated, modern_api):
    """TensorRT 10.3 has neither aliases nor `is_stream_capturable`."""
    machine = Machine(capability=(8, 7), integrated=integrated, modern=modern_api)
    machine.install(monkeypatch, "tensorrt")

    found = generate(Pipeline.load(small, "trt"))

    expected = generate(Pipeline.load(small))
    assert found.token_ids == expected.token_ids
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)


@pytest.mark.parametrize("integrated", [True, False])
def test_the_highest_logits_are_enough_for_the_same_tokens(small, monkeypatch, integrated):
    """And where the device shares its memory with the host, nobody looks for them."""
    machine = Machine(integrated=integrated).install(monkeypatch, "tensorrt_rtx")
    expected, pipe = Pipeline.load(small), Pipeline.load(small, "trt-rtx")
    row, all_of_them = ("out", 4 * (2 * highest.COUNT + 1)), ("out", 4 * pipe.manifest.embedding.vocab)

    for sampling in (Sampling(), Sampling(temperature=1, top_k=30, seed=2)):
        given = {"ignore_eos": True, "sampling": sampling}
        machine.copied.clear()
        found = pipe.generate_tokens(PROMPT, pixels(), **given, logits=False)

        assert found.token_ids == expected.generate_tokens(PROMPT, pixels(), **given).token_ids
        assert machine.copied.count(row) == (0 if integrated else len(found.token_ids))
        assert all_of_them not in machine.copied
    if not integrated:
        assert machine.copied[-4:-2] == machine.copied[-2:] == [machine.copied[-2], row]  # one in, one out


def test_engines_without_the_highest_logits_are_built_again(own, monkeypatch):
    record = tiny.read_json(place(own) / "engines.json")
    del record["engines"][highest.FILE]
    tiny.write_json(place(own) / "engines.json", record)

    Machine().install(monkeypatch, "tensorrt_rtx")
    with pytest.raises(BundleError, match=r"lists no engine of highest\.onnx.*run lvlm-edge build") as caught:
        Pipeline.load(own, "trt-rtx")
    assert "\n" not in str(caught.value)


def test_a_pipeline_forgets_the_prompt_before(small, monkeypatch):
    Machine().install(monkeypatch, "tensorrt_rtx")
    pipe = Pipeline.load(small, "trt-rtx")
    pipe.generate_tokens([*range(9, 20), *PROMPT], pixels() * 2, ignore_eos=True)

    again = generate(pipe)

    np.testing.assert_array_equal(again.logits, generate(Pipeline.load(small, "trt-rtx")).logits)


def test_a_bfloat16_bundle_runs_and_is_close_to_float32(checkpoint_once, export_once, with_engines, monkeypatch):
    """The double computes in float32 and rounds what lies between graphs, to 8 bits of mantissa: seen 1e-2."""
    exact = tiny.bundle(checkpoint_once, export_once, "none")
    bundle = with_engines(tiny.bundle(checkpoint_once, export_once, "none", dtype="bfloat16"))
    write_engines(bundle, graphs=exact)
    Machine().install(monkeypatch, "tensorrt_rtx")

    found = generate(Pipeline.load(bundle, "trt-rtx"))

    expected = generate(Pipeline.load(exact))
    assert found.logits.dtype == np.float32
    pairs = enumerate(zip(found.token_ids, expected.token_ids, strict=True))
    same = next((t + 1 for t, (mine, other) in pairs if mine != other), 8)  # up to a flip in a near tie
    assert same > 1  # so that decode is compared, too
    assert np.abs(found.logits[:same] - expected.logits[:same]).max() < 5e-2 * np.abs(expected.logits).max()


# Numbers.


def test_bfloat16_rounds_to_nearest_even_and_keeps_what_is_special():
    import ml_dtypes

    seeded = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38, 1.00390625, 1.01171875, 65504.0]
    values = np.concatenate([seeded, np.array(special, np.float32)])

    found = backends.to_bfloat16(values)

    with np.errstate(all="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    real = ~np.isnan(values)
    np.testing.assert_array_equal(found[real], expected.view(np.uint16)[real])
    assert np.isnan(backends.from_bfloat16(found)[~real]).all()
    np.testing.assert_array_equal(backends.from_bfloat16(found)[real], expected.astype(np.float32)[real])


@pytest.mark.parametrize("integrated", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_buffers_are_zeroed_and_give_back_what_was_written(monkeypatch, dtype, integrated):
    machine = Machine(integrated=integrated).install(monkeypatch, "tensorrt_rtx")
    buffer = backends.load("trt-rtx").allocate(backends.TensorInfo("logits", dtype, (1, 2, 3)), host=True)
    assert not buffer.read().any()

    buffer.write(np.arange(6, dtype=np.float32).reshape(1, 2, 3))

    assert buffer.read().tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert buffer.read().dtype == (np.float32 if dtype == "bfloat16" else np.dtype(dtype))
    assert (machine.calls["cudaMemcpyAsync"] == 0) == integrated


def test_rows_go_into_a_cache_head_by_head(monkeypatch):
    Machine().install(monkeypatch, "tensorrt_rtx")
    backend = backends.load("trt-rtx")
    cache, rows = (
        backend.allocate(backends.TensorInfo(name, "float16", (1, 3, count, 4)))
        for name, count in (("past_key_values.0.key", 7), ("present.0.key", 2))
    )
    new = np.arange(1, 25).reshape(1, 3, 2, 4)
    rows.write(new)

    cache.copy_rows(rows, 5)

    assert np.array_equal(cache.read()[:, :, 5:], new)
    assert not cache.read()[:, :, :5].any()


# Memory.


def test_all_that_the_host_touches_is_mapped_on_an_integrated_gpu(small, monkeypatch):
    machine = Machine(integrated=True).install(monkeypatch, "tensorrt_rtx")
    pipe = Pipeline.load(small, "trt-rtx")

    generate(pipe)

    assert machine.calls["cudaMemcpyAsync"] == 0
    caches = [
        buffer for info, buffer in pipe._decoder.memory._buffers.items() if info.name.startswith("past_key_values")
    ]
    assert caches and all(machine.kinds[cache.address] == "device" for cache in caches)


def test_one_scratch_buffer_of_the_largest_size_serves_every_engine(small, monkeypatch):
    machine = Machine().install(monkeypatch, "tensorrt_rtx")
    pipe = Pipeline.load(small, "trt-rtx")
    before = machine.calls["cudaMalloc"]

    generate(pipe)

    assert machine.calls["cudaMalloc"] == before + 1
    assert len(set(machine.scratch)) == 1
    assert len(machine.scratch) == len(pipe.manifest.graphs)
    assert machine.scratch[0][1] == 1000 * len(pipe.manifest.graphs)


def test_an_engine_opened_later_may_ask_for_more_scratch(modern, monkeypatch):
    machine = Machine().install(monkeypatch, "tensorrt_rtx")
    pipe = Pipeline.load(modern, "trt-rtx")
    before = generate(pipe)
    pipe.backend._scratch.reserve(1 << 20)

    after = generate(pipe)

    np.testing.assert_array_equal(after.logits, before.logits)
    assert {size for _, size in machine.scratch} == {5000, 1 << 20}
    assert machine.calls["cudaStreamBeginCapture"] == 2


def test_everything_is_given_back(small, monkeypatch):
    machine = Machine(integrated=True).install(monkeypatch, "tensorrt_rtx")
    pipe = Pipeline.load(small, "trt-rtx")
    generate(pipe)

    del pipe
    gc.collect()

    assert not machine.kinds


# Capture.


def test_decode_is_captured_once_and_then_launched(small, monkeypatch):
    machine = Machine(capturable=True).install(monkeypatch, "tensorrt_rtx")
    pipe = Pipeline.load(small, "trt-rtx")
    assert len(generate(pipe).token_ids) == 8
    graphs = len(pipe.manifest.graphs)

    # 7 decode steps: one plain, one captured; the captured one and five more launched
    names = ("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy")
    assert [machine.calls[name] for name in names] == [1, 1, 1, 1]
    assert machine.calls["cudaGraphLaunch"] == 6
    assert machine.calls["execute_async_v3"] == graphs + 1

    addresses = machine.calls["set_tensor_address"]
    pipe.forget_images()
    generate(pipe)

    assert machine.calls["cudaStreamBeginCapture"] == 1
    assert machine.calls["cudaGraphLaunch"] == 13
    assert machine.calls["execute_async_v3"] == 2 * graphs
    assert machine.calls["set_tensor_address"] == addresses


def test_an_engine_that_cannot_be_captured_runs_without(small, monkeypatch):
    machine = Machine(capturable=False).install(monkeypatch, "tensorrt_rtx")

    found = generate(Pipeline.load(small, "trt-rtx"))

    assert found.token_ids == generate(Pipeline.load(small)).token_ids
    assert machine.calls["cudaStreamBeginCapture"] == machine.calls["cudaGraphLaunch"] == 0


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
@pytest.mark.parametrize("code", range(900, 909))
def test_where_capture_fails_decode_goes_on_without(modern, monkeypatch, call, code):
    machine = Machine().install(monkeypatch, "tensorrt_rtx")
    machine.fail[call] = code

    found = generate(Pipeline.load(modern, "trt-rtx"))

    assert found.token_ids == generate(Pipeline.load(modern)).token_ids
    assert machine.calls["cudaStreamBeginCapture"] == 1  # and is not tried again
    assert machine.calls["cudaGraphLaunch"] == 0
    assert machine.calls["cudaGetLastError"] == 1


# CUDA's and TensorRT's errors.

CAPTURING = ("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy")
CALLS = (
    "cudaGetDevice",
    "cudaGetDeviceProperties",
    "cudaStreamCreateWithFlags",
    "cudaMalloc",
    "cudaMemsetAsync",
    "cudaHostAlloc",
    "cudaHostGetDevicePointer",
    "cudaMemcpyAsync",
    "cudaMemcpy2DAsync",
    "cudaStreamSynchronize",
    "cudaGraphLaunch",
    *CAPTURING,
)


def test_every_call_that_runs_make_is_among_those_that_fail_below(legacy, monkeypatch):
    called = set()
    for integrated in (True, False):
        machine = Machine(integrated=integrated).install(monkeypatch, "tensorrt_rtx")
        generate(Pipeline.load(legacy, "trt-rtx"))
        called |= {name for name in machine.calls if name.startswith("cuda")}
        gc.collect()

    assert called - {"cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaGraphExecDestroy"} == set(CALLS)


@pytest.mark.parametrize("call", CALLS)
def test_each_cuda_error_at_each_call_is_one_error_that_names_both(legacy, monkeypatch, quick_collection, call):
    integrated = call.startswith("cudaHost")
    counting = Machine(integrated=integrated).install(monkeypatch, "tensorrt_rtx")
    few(Pipeline.load(legacy, "trt-rtx", verify=False), logits=False)
    total = counting.calls[call]
    codes = {name: code for name, code in CODES.items() if code}
    if call in CAPTURING:
        codes = {name: code for name, code in codes.items() if code not in trt.CAPTURE_ERRORS}

    for i, (name, code) in enumerate(codes.items()):
        machine = Machine(integrated=integrated).install(monkeypatch, "tensorrt_rtx")
        # from the first call to the last, one after the other
        machine.fail[call], machine.skip[call] = code, i * (total - 1) // (len(codes) - 1)
        with pytest.raises(LvlmEdgeError, match=f"^{call}: CUDA says {name}; ") as caught:
            few(Pipeline.load(legacy, "trt-rtx", verify=False), logits=False)
        assert isinstance(caught.value, DeviceError) and caught.value.exit_code == 1
        assert machine.recording is None
        assert not machine.fail
        del caught
        gc.collect()
        left = {"graph"} if call == "cudaGraphDestroy" else set()  # what could not be given back
        assert set(machine.kinds.values()) == left, "something was not given back"


def test_what_tensorrt_says_when_it_does_not_run_is_passed_on(modern, monkeypatch):
    machine = Machine().install(monkeypatch, "tensorrt_rtx")
    pipe = Pipeline.load(modern, "trt-rtx")
    machine.refuse_run = True
    with pytest.raises(DeviceError, match="vision: TensorRT did not run it"):
        generate(pipe)

    machine.refuse_run, machine.refuse_context = False, True
    with pytest.raises(DeviceError, match=r"vision\.engine: TensorRT has no context for it"):
        Pipeline.load(modern, "trt-rtx")

    machine.refuse_context, machine.refuse_address = False, True
    with pytest.raises(DeviceError, match=r"vision\.engine: TensorRT does not take the address of pixel_values"):
        Pipeline.load(modern, "trt-rtx")

    machine.refuse_address, machine.refuse_load = False, True
    with pytest.raises(BundleError, match=r"does not load it .no kernel image.; run lvlm-edge build"):
        Pipeline.load(modern, "trt-rtx")


# Engines of others.


def refused(bundle, monkeypatch, said, backend="trt-rtx", **machine):
    """The bundle is refused with this, and TensorRT sees nothing of it."""
    module = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}[backend]
    double = Machine(**machine).install(monkeypatch, module)
    with pytest.raises(BundleError, match=said) as caught:
        Pipeline.load(bundle, backend)
    assert caught.value.exit_code == 5
    assert f"run lvlm-edge build {bundle} --device" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert double.calls["deserialize_cuda_engine"] == double.calls["Runtime"] == 0


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"version": "1.6.0"}, "built by tensorrt_rtx '1.6.0', this machine has '1.7.1'"),
        ({"version": None}, "built by tensorrt_rtx None"),
        ({"flavour": "tensorrt"}, "are of 'tensorrt', this machine has 'tensorrt_rtx'"),
        ({"platform": "linux-riscv64"}, "built on 'linux-riscv64'"),
        ({"settings": {"compute_capabilities": ["8.6", "12.0"]}}, "this GPU has 8.9"),
        ({"settings": {"compute_capabilities": "8.9"}}, "this GPU has 8.9"),
        ({"settings": None}, "this GPU has 8.9"),
        ({"weights_sha256": "0" * 64}, "other weights"),
        ({"schema": 1}, "schema is 1, expected 2"),
        ({"engines": []}, "schema"),
        ({"engines": {}}, "lists no engine of vision"),
        ({"engines": {"vision.onnx": {"file": "../vision.engine", "aliases": {}}}}, "cannot be read"),
        ({"engines": {"vision.onnx": {"file": "vision.engine"}}}, "cannot be read"),
    ],
    ids=str,
)
def test_engines_of_another_machine_or_bundle_never_reach_tensorrt(own, monkeypatch, record, said):
    write_engines(own, **record)

    refused(own, monkeypatch, said)


def test_engines_for_this_gpu_run_and_portable_ones_run_from_ampere_on(own, monkeypatch):
    write_engines(own, settings={"compute_capabilities": ["8.6", "8.9"]})
    Machine().install(monkeypatch, "tensorrt_rtx")
    Pipeline.load(own, "trt-rtx")

    write_engines(own)
    refused(own, monkeypatch, "this GPU has 7.5", capability=(7, 5))

    write_engines(own, "trt", settings={"compute_capabilities": ["portable"]})
    refused(own, monkeypatch, "this GPU has 8.7", "trt", capability=(8, 7))


def test_a_stale_graph_hash_is_refused(own, monkeypatch):
    path = place(own) / "engines.json"
    record = tiny.read_json(path)
    record["engines"]["vision.onnx"]["graph_sha256"] = "0" * 64
    tiny.write_json(path, record)

    refused(own, monkeypatch, r"built from another vision\.onnx")


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{", "null", "\x00\xff", "[" * 100_000], ids=lambda text: str(text)[:3]
)
def test_no_readable_list_of_engines_is_refused(own, monkeypatch, text):
    path = place(own) / "engines.json"
    path.unlink() if text is None else path.write_text(text, "latin-1")

    refused(own, monkeypatch, "is not there" if text is None else "cannot be read|schema is None")


def test_engines_that_come_with_a_bundle_are_not_opened(own, monkeypatch, tmp_path):
    """Wherever in it: in today's layout, and where earlier versions kept them."""
    for inside in ("engines", place(own).parent.name):
        shutil.copytree(place(own).parent, own / inside)
    shutil.rmtree(tmp_path / "cache")

    refused(own, monkeypatch, r"engines\.json: is not there, so no engine was built")


def test_engines_of_another_folder_run_where_they_are_asked_for(own, monkeypatch, tmp_path):
    machine = Machine().install(monkeypatch, "tensorrt_rtx")
    expected = generate(Pipeline.load(own, "trt-rtx")).token_ids
    (tmp_path / "cache/lvlm-edge/engines").rename(tmp_path / "elsewhere")
    seen = machine.calls["deserialize_cuda_engine"]
    with pytest.raises(BundleError, match="is not there"):
        Pipeline.load(own, "trt-rtx")
    assert machine.calls["deserialize_cuda_engine"] == seen

    assert generate(Pipeline.load(own, "trt-rtx", engines=tmp_path / "elsewhere")).token_ids == expected
    with pytest.raises(UsageError, match="ort: takes no engines"):
        Pipeline.load(own, "ort", engines=tmp_path / "elsewhere")


def test_engines_that_others_can_write_are_refused(own, monkeypatch):
    for path in (place(own), place(own) / "engines.json", place(own) / "vision.engine"):
        mode = path.stat().st_mode
        for more in (0o020, 0o002):
            path.chmod(mode | more)
            refused(own, monkeypatch, r"can be written by others \(mode \d{3}\), and an engine is code")
        path.chmod(mode)

    wrong = engines.Wrong(own, "trt-rtx")
    with pytest.raises(BundleError, match="belongs to user 54321, and an engine is code"):
        engines._check_own(own, SimpleNamespace(st_uid=54321, st_mode=0o600), wrong)


def flipped(plan: Path) -> None:
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)


def linked(plan: Path) -> None:
    kept = plan.rename(plan.with_suffix(".kept"))
    plan.symlink_to(kept)


SPOILT = {
    "flipped": (flipped, "was altered"),
    "truncated": (lambda plan: plan.write_bytes(plan.read_bytes()[:-1]), "bytes, engines.json says"),
    "longer": (lambda plan: plan.write_bytes(plan.read_bytes() + b"\0"), "bytes, engines.json says"),
    "empty": (lambda plan: plan.write_bytes(b""), "has 0 bytes"),
    "random": (lambda plan: plan.write_bytes(np.random.default_rng(0).bytes(plan.stat().st_size)), "was altered"),
    "foreign": (
        lambda plan: plan.write_bytes(plan.with_name("decode.engine").read_bytes()),
        "bytes, engines.json|altered",
    ),
    "missing": (lambda plan: plan.unlink(), "cannot be read .No such file"),
    "folder": (lambda plan: (plan.unlink(), plan.mkdir()), "cannot be read .Is a directory"),
    "link": (linked, "is a link"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_plan_never_reaches_tensorrt(own, monkeypatch, how):
    spoil, said = SPOILT[how]
    spoil(place(own) / "vision.engine")

    refused(own, monkeypatch, rf"vision\.engine: .*({said})")


def test_an_alias_that_is_not_the_engines_is_found(own, monkeypatch):
    path = place(own) / "engines.json"
    record = tiny.read_json(path)
    Machine().install(monkeypatch, "tensorrt_rtx")
    found = record["engines"]["decode.onnx"]["aliases"]

    found["present.0.key"] = "past_key_values.1.key"
    tiny.write_json(path, record)
    with pytest.raises(BundleError, match=r"written over past_key_values.0.key, engines.json says past_key_values.1"):
        Pipeline.load(own, "trt-rtx")

    del found["present.0.key"]
    tiny.write_json(path, record)
    with pytest.raises(BundleError, match="says None"):
        Pipeline.load(own, "trt-rtx")


def test_an_alias_that_the_bundle_keeps_apart_is_found_without_tensorrts_word(own, monkeypatch):
    path = place(own) / "engines.json"
    record = tiny.read_json(path)
    record["engines"]["decode.onnx"]["aliases"]["present.0.key"] = "past_key_values.1.key"
    tiny.write_json(path, record)
    Machine(modern=False).install(monkeypatch, "tensorrt_rtx")

    with pytest.raises(BundleError, match="the bundle keeps them apart"):
        Pipeline.load(own, "trt-rtx")


def test_an_engine_of_other_tensors_than_the_manifests_is_found(own, modern, monkeypatch):
    path = place(own)
    record = tiny.read_json(path / "engines.json")
    plan = path / "decode.engine"
    plan.write_bytes(fake_tensorrt.plan(own / "vision.onnx"))
    record["engines"]["decode.onnx"] |= {"size": plan.stat().st_size, "sha256": sha256(plan)}
    tiny.write_json(path / "engines.json", record)
    Machine().install(monkeypatch, "tensorrt_rtx")

    with pytest.raises(BundleError, match=r"decode\.engine: 'pixel_values' is .*, the manifest says None"):
        Pipeline.load(own, "trt-rtx")


# TensorRT-RTX keeps what it compiled.


def test_compiled_kernels_are_kept_beside_the_engines(own, monkeypatch):
    machine = Machine(jit=True).install(monkeypatch, "tensorrt_rtx")
    first = generate(Pipeline.load(own, "trt-rtx"))
    assert machine.jit_loaded == []
    kept = place(own) / "decode.jit"
    assert kept.read_bytes() == b"kernels" and kept.stat().st_mode & 0o777 == 0o600

    again = generate(Pipeline.load(own, "trt-rtx"))

    assert machine.jit_loaded == [b"kernels"] * 5
    assert again.token_ids == first.token_ids
    assert not list(kept.parent.glob(".*"))


# What is there, and what is not.


@pytest.mark.parametrize(("backend", "module"), [("trt", "tensorrt"), ("trt-rtx", "tensorrt_rtx")])
def test_a_missing_library_says_what_to_install(modern, monkeypatch, backend, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedError, match=f"{backend}: {module} is not installed; pip install .* cuda-bindings"):
        Pipeline.load(modern, backend)

    Machine().install(monkeypatch, module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(UnsupportedError, match=f"{backend}: cuda.bindings.runtime is not installed"):
        Pipeline.load(modern, backend)


def test_threads_are_refused_and_names_are_those_of_the_command_line(monkeypatch):
    Machine().install(monkeypatch, "tensorrt_rtx")
    with pytest.raises(UsageError, match="takes no number of threads"):
        backends.load("trt-rtx", threads=2)
    with pytest.raises(UnsupportedError, match="did you mean trt-rtx"):
        backends.load("trt_rtx")
    assert backends.load("trt-rtx", threads=None).name == "trt-rtx"


def test_the_command_line_answers_with_tensorrt(modern, monkeypatch, tmp_path):
    Machine().install(monkeypatch, "tensorrt_rtx")
    picture = tiny.picture(tmp_path / "picture.png")
    run = ("run", modern, "--image", picture, "--prompt", "w5 w6")

    found = tiny.cli(*run, "--backend", "trt-rtx")

    assert found.exit_code == 0, found.output
    assert found.stdout == tiny.cli(*run).stdout


def test_every_name_that_is_taken_for_granted_is_in_the_real_library():
    """Those that are missing from 10.3 are asked for with `hasattr` and `getattr`."""
    real = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this machine")
    assert real.ExecutionContextAllocationStrategy.USER_MANAGED is not None
    assert {
        real.DataType.FLOAT.name,
        real.DataType.HALF.name,
        real.DataType.BF16.name,
        real.DataType.INT64.name,
    } == set(trt.DTYPES)
    for kind, names in {
        real.ICudaEngine: "num_io_tensors get_tensor_name get_tensor_dtype get_tensor_shape create_execution_context "
        "device_memory_size_v2 get_aliased_input_tensor create_runtime_config",
        real.IExecutionContext: "set_device_memory set_tensor_address execute_async_v3 is_stream_capturable",
        real.IRuntimeConfig: "create_runtime_cache set_runtime_cache set_execution_context_allocation_strategy",
        real.IRuntimeCache: "serialize deserialize",
        real.Runtime: "deserialize_cuda_engine",
    }.items():
        assert set(names.split()) <= set(dir(kind))

"""The CUDA backend of ONNX Runtime over a double that runs the same graphs on the CPU; no GPU, no onnxruntime-gpu."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from lvlm_edge.exporter.proof import certificate, parity
from lvlm_edge.exporter.proof.cases import synthetic
from lvlm_edge.runtime import Pipeline, backends
from lvlm_edge.runtime.backends import Highest, ort_cuda
from lvlm_edge.runtime.backends.cuda import highest
from lvlm_edge.runtime.bundle import external, load_manifest, open_bundle
from lvlm_edge.runtime.errors import BundleError, DeviceError, LvlmEdgeError, UnsupportedError, UsageError
from lvlm_edge.runtime.pipeline.sampling import Sampling
from tests import tiny
from tests.cases import some
from tests.fake_onnxruntime import OF_ORT, Machine
from tests.fake_tensorrt import CODES
from tests.tiny import PROMPT, pixels

CALLS = (
    "cudaGetDevice",
    "cudaGetDeviceProperties",
    "cudaStreamCreateWithFlags",
    "cudaMalloc",
    "cudaMemsetAsync",
    "cudaMemcpyAsync",
    "cudaMemcpy2DAsync",
    "cudaStreamSynchronize",
)


@pytest.fixture
def machine(monkeypatch) -> Machine:
    return Machine().install(monkeypatch)


@pytest.fixture(scope="module")
def modern(checkpoint_once, export_once) -> Path:
    return tiny.bundle(checkpoint_once, export_once, "fastv")


@pytest.fixture(scope="module")
def legacy(checkpoint_once, export_once) -> Path:
    return tiny.bundle(checkpoint_once, export_once, "fastv", lowering="legacy")


def few(pipe, **options):
    return pipe.generate_tokens(PROMPT, pixels(), ignore_eos=True, max_new_tokens=4, **options)


# Tokens.

UNEVEN = ["1011", "0110", "1000", "0101"]
BUNDLES = {
    "none": ({}, {}),
    "none, float16": ({}, {"dtype": "float16"}),
    "none, int8": ({}, {"weights": "int8"}),
    "none, int4": ({}, {"weights": "int4"}),
    "none, shared": ({}, {"share_weights": True}),
    "fastv": ({}, {"method": "fastv", "prune_layer": 1}),
    "fastv, legacy": ({}, {"method": "fastv", "prune_layer": 1, "lowering": "legacy"}),
    "fastv, pieces": ({}, {"method": "fastv", "max_graph_gb": 1e-6}),
    "proxyv": ({"method": "proxyv", "kv_heads": 2}, {"method": "proxyv", "grid": (1, 2)}),
    "yopo, float16": ({"method": "yopo"}, {"method": "yopo", "dtype": "float16"}),
    "yopo, dropped": (
        {"method": "yopo", "kv_heads": 2, "head_mask": UNEVEN},
        {"method": "yopo", "semantics": "dropped"},
    ),
    "himix": ({"method": "himix", "kv_heads": 2}, {"method": "himix"}),
    "himix, legacy": ({"method": "himix"}, {"method": "himix", "num_images": 2, "lowering": "legacy"}),
}
OFTEN = {(name,) for name in ("fastv", "none, shared", "proxyv", "yopo, float16", "himix, legacy")}


@pytest.fixture
def bundle(request, original, checkpoint_once, export_once) -> Path:
    of, options = BUNDLES[request.param]
    if "method" in of:
        return export_once(original(**of), **options)
    method = {"method": "none"} | options
    return tiny.bundle(checkpoint_once, export_once, **method)


@pytest.mark.parametrize("bundle", some([(name,) for name in BUNDLES], OFTEN), indirect=True)
def test_every_method_says_what_onnx_runtime_says_on_the_cpu(bundle, machine):
    """On prompts of three lengths, one after the other, and again in another order."""
    expected = Pipeline.load(bundle, portable=True, exact=True)
    pipe = Pipeline.load(bundle, "ort-cuda")
    cases = synthetic(expected)

    for case in (*cases, cases[1]):
        right = expected.generate_tokens(case.prompt, case.pixels, ignore_eos=True)
        found = pipe.generate_tokens(case.prompt, case.pixels, ignore_eos=True)

        assert found.token_ids == right.token_ids
        np.testing.assert_allclose(found.logits, right.logits, atol=1e-4, rtol=1e-3)
        assert (found.kept_visual is None) == (right.kept_visual is None)
        assert found.kept_visual is None or np.array_equal(found.kept_visual, right.kept_visual)
    assert len(found.token_ids) > 2
    assert machine.calls["captured"] == len(pipe.manifest.role("decode"))


ORACLES = ("fastv_0", "fastv_1", "fastv_2")
PAIRINGS = itertools.product(ORACLES, ("fastv", "none"), ("float32", "float16"), ("modern", "legacy"))


@pytest.mark.parametrize(
    ("name", "method", "dtype", "lowering"), some(PAIRINGS, {("fastv_1", "fastv", "float32", "modern")})
)
def test_tokens_and_logits_of_every_oracle_are_those_of_onnx_runtime(
    name, oracles, export_once, machine, method, dtype, lowering
):
    """Those of ProxyV, YOPO and HiMix are in `test_methods.py`."""
    case = json.loads((oracles / "fastv" / f"{name}.json").read_text())
    tensors = load_file(oracles / "fastv" / f"{name}.safetensors")
    options = {"prune_layer": case["prune_layer"], "keep_ratio": case["keep_ratio"]} if method == "fastv" else {}
    bundle = export_once(oracles / "llava_mha", method=method, dtype=dtype, lowering=lowering, **options)
    given = (case["prompt_token_ids"], tensors["pixel_values"])
    expected = Pipeline.load(bundle, portable=True).generate_tokens(*given, ignore_eos=True)
    pipe = Pipeline.load(bundle, "ort-cuda")

    found = pipe.generate_tokens(*given, ignore_eos=True)

    assert found.token_ids == expected.token_ids and len(found.token_ids) == 16
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5 if dtype == "float32" else 1e-2)
    assert pipe.generate_tokens(*given, ignore_eos=True, logits=False).token_ids == found.token_ids
    if (method, dtype) == ("fastv", "float32"):
        assert found.token_ids[: len(case["expected_new_token_ids"])] == case["expected_new_token_ids"]


SAMPLING = {
    "greedy": (Sampling(), True),
    "greedy, penalty": (Sampling(repetition_penalty=1.3), True),
    "top-k": (Sampling(temperature=0.8, top_k=20, seed=3), True),
    "top-k, top-p, penalty": (Sampling(temperature=1.2, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=4), True),
    "top-p": (Sampling(temperature=1, top_p=0.9, seed=5), False),
    "small penalty": (Sampling(repetition_penalty=0.8), False),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_tokens_chosen_on_the_device_are_those_of_the_host(name, modern, machine):
    """Every prompt's tokens in turn, and the highest logits alone come back wherever they are enough."""
    sampling, few_are_enough = SAMPLING[name]
    expected, pipe = Pipeline.load(modern), Pipeline.load(modern, "ort-cuda")
    vocab = pipe.manifest.embedding.vocab

    for case in (*synthetic(expected, 0), *synthetic(expected, 1)):
        given = {"ignore_eos": True, "sampling": sampling}
        right = expected.generate_tokens(case.prompt, case.pixels, **given)
        machine.copied.clear()
        found = pipe.generate_tokens(case.prompt, case.pixels, **given, logits=False)

        assert found.token_ids == right.token_ids and found.logits is None
        assert (("out", 4 * vocab) not in machine.copied) == few_are_enough
        assert (("out", 4 * (2 * highest.COUNT + 1)) in machine.copied) == few_are_enough


@pytest.mark.parametrize(("logits", "out"), [(False, 4 * (2 * highest.COUNT + 1)), (True, 4 * 160)])
def test_a_token_is_one_copy_in_and_one_copy_out(modern, machine, logits, out):
    pipe, copies = Pipeline.load(modern, "ort-cuda"), []
    assert pipe.manifest.embedding.vocab == 160
    few(pipe)  # whose picture is not encoded again

    for count in (3, 4):
        machine.copied.clear()
        pipe.generate_tokens(PROMPT, pixels(), ignore_eos=True, max_new_tokens=count, logits=logits)
        copies.append(machine.copied.copy())

    assert copies[1] == [*copies[0], copies[1][-2], ("out", out)]
    assert copies[1][-2] == ("in", 3 * 256)  # the token's embedding, position and length, each at a multiple of 256


def test_logits_that_are_not_finite_are_noticed_on_the_device(modern, machine, monkeypatch):
    pipe = Pipeline.load(modern, "ort-cuda")
    right, logits = pipe._decoder._decode, pipe.buffer("decode", "logits")
    monkeypatch.setattr(pipe._decoder, "_decode", lambda *given: (right(*given), logits.write(np.nan)))

    with pytest.raises(LvlmEdgeError, match=r"logits of token 1 are not finite.*export with --dtype"):
        few(pipe, logits=False)


def test_streams_that_take_turns_answer_as_each_alone(modern, legacy, machine, tmp_path):
    picture = tiny.picture(tmp_path / "picture.png")
    prompts = "w5 w6", "w7 w8 w9"
    expected = [list(Pipeline.load(b).stream(p, [picture])) for b, p in zip((modern, legacy), prompts, strict=True)]
    pipes = [Pipeline.load(bundle, "ort-cuda") for bundle in (modern, legacy)]

    streams = [pipe.stream(prompt, [picture]) for pipe, prompt in zip(pipes, prompts, strict=True)]
    pieces = list(itertools.zip_longest(*streams, fillvalue=None))

    assert [[p for p in column if p is not None] for column in zip(*pieces, strict=True)] == expected
    assert all(len(words) > 1 for words in expected)


def test_two_pipelines_take_turns(modern, legacy, machine):
    expected = [few(Pipeline.load(bundle)).token_ids for bundle in (modern, legacy)]
    pipes = [Pipeline.load(bundle, "ort-cuda") for bundle in (modern, legacy)]
    seen: list[list[list[int]]] = [[], []]

    for _ in range(2):
        for pipe, found in zip(pipes, seen, strict=True):
            found.append(few(pipe).token_ids)

    assert seen == [[tokens] * 2 for tokens in expected]


# What the device holds and runs.


def test_float_weights_are_on_the_device_once(modern, machine):
    bundle = open_bundle(modern)
    before = sum(len(m) for b, m in machine.memory.items() if machine.kinds[b] == "device")

    pipe = Pipeline.load(modern, "ort-cuda")

    files = {graph.file for graph in pipe.manifest.graphs}
    named = [w for file in files for w in external.weights(bundle.graph(file))]
    once = sum(w.size for w in set(named))
    assert once < sum(w.size for w in named), "no graphs share a weight, so nothing is tested"
    shared = {view.address for session in machine.sessions for view in session.shared.values()}
    held = sum(len(content) for base, content in machine.memory.items() if base in shared)
    assert (before, held, len(shared)) == (0, once, len(set(named)))
    # every weight of every graph is shared: a session holds none of its own
    assert sorted(w.name for w in named) == sorted(name for s in machine.sessions for name in s.shared)


def test_decode_and_the_search_behind_it_alone_are_cuda_graphs(modern, machine):
    pipe = Pipeline.load(modern, "ort-cuda")

    few(pipe)
    few(pipe)

    assert (machine.calls["captured"], machine.calls["replayed"]) == (1, 5)
    few(pipe, logits=False)
    assert (machine.calls["captured"], machine.calls["replayed"]) == (2, 5 + 3 + 3)
    assert [s.captures for s in machine.sessions].count(True) == 2


def test_a_run_is_over_when_it_returns(modern, machine):
    memory = Pipeline.load(modern, "ort-cuda")._decoder.memory

    memory.run(load_manifest(modern).role("image")[0], None)

    assert machine.calls["run"] == 1 and not machine.queue


def test_without_capture_decode_runs_plainly(modern, machine):
    expected = few(Pipeline.load(modern)).token_ids

    assert few(Pipeline.load(modern, "ort-cuda", capture=False)).token_ids == expected
    assert machine.calls["captured"] == 0


def test_an_old_onnx_runtime_captures_nothing(legacy, monkeypatch):
    """Before 1.31 copies inside a captured graph read host memory again that others may have by then."""
    machine = Machine()
    machine.version = "1.30.0"
    machine.install(monkeypatch)

    few(Pipeline.load(legacy, "ort-cuda"))

    assert machine.calls["captured"] == 0


def test_everything_is_given_back(modern, machine):
    pipe = Pipeline.load(modern, "ort-cuda")
    few(pipe)

    machine.sessions.clear()
    del pipe
    gc.collect()

    assert not machine.kinds


# CUDA's and ONNX Runtime's errors.


def test_every_call_that_runs_make_is_among_those_that_fail_below(legacy, machine):
    few(Pipeline.load(legacy, "ort-cuda"))
    gc.collect()

    called = {name for name in machine.calls if name.startswith("cuda")} - {"cudaDriverGetVersion"}
    assert called - {"cudaFree", "cudaStreamDestroy"} == set(CALLS)


FAILING = (*CALLS, *OF_ORT)


SHARES = 5  # of the codes


@pytest.mark.parametrize(
    ("call", "share"),
    some(itertools.product(FAILING, range(SHARES)), {(call, i % SHARES) for i, call in enumerate(FAILING)}),
)
def test_each_error_is_one_line_that_names_it_and_the_call(legacy, monkeypatch, quick_collection, call, share):
    """Every code at every call, from the call's first time to its last; every code at two of the calls often."""
    counting = Machine().install(monkeypatch)
    few(Pipeline.load(legacy, "ort-cuda", verify=False), logits=False)
    total = counting.calls[call]
    every = [(name, code) for name, code in CODES.items() if code]
    codes = every[share::SHARES]
    assert total > 0
    said = r"{}: ONNX Runtime's CUDA provider d.*CUDA failure {}: {}" if call in OF_ORT else "^{}: CUDA says {}"

    for i, (name, code) in enumerate(codes):
        machine = Machine().install(monkeypatch)
        machine.fail[call], machine.skip[call] = code, i * (total - 1) // (len(codes) - 1)
        expected = said.format(r"\w+\.(onnx|bin)", code, name) if call in OF_ORT else said.format(call, name)
        with pytest.raises(DeviceError, match=expected) as caught:
            few(Pipeline.load(legacy, "ort-cuda", verify=False), logits=False)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 1
        assert not machine.fail
        machine.sessions.clear()
        del caught
        gc.collect()
        assert not machine.kinds, "something was not given back"


@pytest.mark.parametrize("call", OF_ORT)
@pytest.mark.parametrize("words", ort_cuda.ADVICE)
def test_what_helps_is_told_of_every_error_that_is_known(legacy, machine, call, words, tmp_path):
    """On the command line, wherever ONNX Runtime says it: one line, with the advice for it, and exit code 1."""
    machine.words[call] = f"[ONNXRuntimeError] : 6 : FAIL : a.cc:1\nhere: {words} (13)"
    picture = tiny.picture(tmp_path / "picture.png")

    said = tiny.refused(1, "run", legacy, "--backend", "ort-cuda", "--image", picture, "--prompt", "w5 w6")

    assert not machine.words and words in said and said.endswith(ort_cuda.ADVICE[words])


def test_the_devices_own_memory_running_out_is_told_apart(legacy, machine):
    machine.fail["cudaMalloc"] = CODES["cudaErrorMemoryAllocation"]

    said = tiny.refused(1, "run", legacy, "--backend", "ort-cuda", "--prompt", "w5 w6")

    assert "cudaMalloc: CUDA says cudaErrorMemoryAllocation; close what else uses the GPU" in said


def test_a_session_that_falls_to_the_cpu_is_refused(modern, monkeypatch):
    machine = Machine()
    machine.silent = True
    machine.install(monkeypatch)

    with pytest.raises(DeviceError, match=r"\.onnx: ONNX Runtime would run it on the CPU.*pip uninstall -y onnx"):
        Pipeline.load(modern, "ort-cuda")


# Bundles that are not to be run.


def own(bundle: Path, folder: Path, change) -> Path:
    """A copy whose decode graph is changed, with hashes that hold."""
    copy = Path(shutil.copytree(bundle, folder / "bundle"))
    graph = onnx.load(copy / "decode.onnx", load_external_data=False)
    change(graph)
    (copy / "decode.onnx").write_bytes(graph.SerializeToString())
    tiny.sign(copy)
    return copy


def foreign(graph) -> None:
    graph.graph.node.add(op_type="Run", domain="some.library", output=["o"])


def compiled(graph) -> None:
    graph.graph.node.add(op_type="EPContext", domain="com.microsoft", output=["o"])


def inside(graph) -> None:
    body = helper.make_graph([helper.make_node("EPContext", [], ["o"], domain="com.microsoft")], "b", [], [])
    graph.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body))


def in_function(graph) -> None:
    graph.functions.append(helper.make_function("own", "f", [], [], [], [helper.make_opsetid("", 18)]))
    graph.functions[0].node.add(op_type="Run", domain="some.library")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (foreign, "some.library:Run"),
        (compiled, "com.microsoft:EPContext"),
        (inside, "com.microsoft:EPContext"),
        (in_function, "some.library:Run"),
    ],
)
def test_foreign_operators_and_compiled_code_are_refused(modern, machine, tmp_path, change, named):
    with pytest.raises(BundleError, match=rf"decode\.onnx: has the operator {named}.*do not use this bundle"):
        Pipeline.load(own(modern, tmp_path, change), "ort-cuda")


def away(graph) -> None:
    tensor = next(t for t in graph.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == "offset").value = str(1 << 40)


def larger(graph) -> None:
    next(t for t in graph.graph.initializer if t.external_data).dims[0] += 1


def negative(graph) -> None:
    next(t for t in graph.graph.initializer if t.external_data).dims[0] = -1


@pytest.mark.parametrize("change", [away, larger, negative])
def test_weights_that_the_file_does_not_hold_are_refused(modern, machine, tmp_path, change):
    with pytest.raises(BundleError, match=r"weights\.bin: does not hold .*; export the bundle again"):
        Pipeline.load(own(modern, tmp_path, change), "ort-cuda")
    assert "cudaMalloc" in machine.calls


def test_a_graph_of_other_tensors_than_the_manifests_is_refused(modern, machine, tmp_path):
    copy = Path(shutil.copytree(modern, tmp_path / "bundle"))
    (copy / "decode.onnx").write_bytes((copy / "vision.onnx").read_bytes())
    tiny.sign(copy)

    with pytest.raises(BundleError, match=r"decode\.onnx: 'pixel_values' is .*, the manifest says None"):
        Pipeline.load(copy, "ort-cuda")


# What is installed.


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"wheels": {"onnxruntime", "onnxruntime-gpu"}}, "are both installed.*pip uninstall -y onnxruntime onnx"),
        ({"providers": ["CPUExecutionProvider"], "wheels": {"onnxruntime"}}, "has no CUDA provider; pip uninstall"),
        ({"driver": 0}, "there is no NVIDIA driver"),
        ({"driver": 12040}, r"too old: it is for CUDA 12\.4.*needs CUDA 13; update it to 580.*onnxruntime-gpu==1\.26"),
        ({"missing": {"libcudnn.so.9"}}, r"libcudnn\.so\.9 is not there.*pip install nvidia-cudnn-cu13"),
        (
            {"missing": {"libcublas.so.13"}},
            r"libcublas\.so\.13 is not there.*libcublas\.so\.12 of another CUDA.*pip install nvidia-cublas$",
        ),
        (
            {"cuda": "12.8", "driver": 12080, "missing": {"libcublasLt.so.12", "libcublasLt.so.13"}},
            r"libcublasLt\.so\.12 is not there.*pip install nvidia-cublas-cu12$",
        ),
    ],
)
def test_a_machine_that_cannot_run_it_says_why_and_what_to_install(monkeypatch, capsys, given, said):
    machine = Machine()
    for name, value in given.items():
        setattr(machine, name, value)
    machine.install(monkeypatch)

    with pytest.raises(UnsupportedError, match=f"^ort-cuda: .*{said}") as caught:
        backends.load("ort-cuda")

    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    assert capsys.readouterr().out == ""


def test_both_wheels_at_once_are_one_line_of_the_command_line(modern, machine):
    machine.wheels.add("onnxruntime")

    said = tiny.refused(3, "run", modern, "--backend", "ort-cuda", "--prompt", "w5")

    assert "onnxruntime and onnxruntime-gpu are both installed, and each overwrites the other's files" in said
    assert said.endswith("pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'lvlm-edge[ort-cuda]'")


@pytest.mark.parametrize("module", ["onnxruntime", "cuda.bindings.runtime"])
def test_a_missing_library_says_what_to_install(machine, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(UnsupportedError, match=rf"ort-cuda: {module} is not installed; pip install 'lvlm-edge\[ort-cu"):
        backends.load("ort-cuda")


def test_an_opset_that_is_too_new_names_the_lowering(modern, monkeypatch):
    machine = Machine()
    machine.version = "1.23.2"
    machine.install(monkeypatch)

    with pytest.raises(UnsupportedError, match=r"^ort-cuda: .*opset 24.*1\.25.*here is 1\.23\.2; export with --lower"):
        Pipeline.load(modern, "ort-cuda")


def test_bfloat16_of_the_legacy_lowering_names_the_one_that_runs(legacy, machine, tmp_path):
    copy = Path(shutil.copytree(legacy, tmp_path / "bundle"))
    tiny.change_json(copy / "manifest.json", dtype="bfloat16")

    bundle, backend = open_bundle(copy), backends.load("ort-cuda")

    with pytest.raises(UnsupportedError, match=r"^ort-cuda: .*bfloat16.*export with --lowering modern"):
        backend.open(bundle, bundle.manifest.graphs[0], {})


def test_threads_are_refused(machine):
    with pytest.raises(UsageError, match="ort-cuda: takes no number of threads"):
        backends.load("ort-cuda", threads=2)


def test_the_command_line_answers_with_it(modern, machine, tmp_path):
    picture = tiny.picture(tmp_path / "picture.png")
    run = ("run", modern, "--image", picture, "--prompt", "w5 w6")

    found = tiny.cli(*run, "--backend", "ort-cuda")

    assert found.exit_code == 0, found.output
    assert found.stdout == tiny.cli(*run).stdout
    machine.fail["run"] = 700
    assert "CUDA failure 700" in tiny.refused(1, *run, "--backend", "ort-cuda")


def test_check_judges_what_it_runs(modern, machine, checkpoint_once):
    verdict = parity.check(modern, tiny.checkpoint(checkpoint_once), backend="ort-cuda", steps=3, store=False)

    assert verdict.passed, verdict.first_failure
    assert machine.calls["run"] > 20
    assert [row.stage for row in verdict.rows].count("highest logits") == 3  # prompts


@pytest.mark.parametrize("wrong", ["id", "score", "missing"])
def test_check_fails_where_the_device_chooses_wrongly(modern, machine, checkpoint_once, monkeypatch, wrong):
    right = highest.OnDevice.find

    def find(self):
        found = right(self)
        best = int(found.scores.argmax())
        if wrong == "missing":
            return Highest(np.delete(found.ids, best), np.delete(found.scores, best))
        (found.ids if wrong == "id" else found.scores)[best] += 1
        return found

    monkeypatch.setattr(highest.OnDevice, "find", find)

    verdict = parity.check(modern, tiny.checkpoint(checkpoint_once), backend="ort-cuda", steps=3, store=False)

    assert {row.stage for row in verdict.rows if not row.passed} == {"highest logits"}


def test_a_certificate_names_the_wheel_that_is_installed(monkeypatch):
    real = certificate.metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return "1.31.1" if name == "onnxruntime-gpu" else real(name)

    monkeypatch.setattr(certificate.metadata, "version", version)

    found = certificate.versions()

    assert found["onnxruntime-gpu"] == "1.31.1" and "onnxruntime" not in found and "torch" in found


# Weights and operators in a graph's bytes.


def test_the_weights_of_a_graph_are_those_that_onnx_reads(modern):
    content = (modern / "decode.onnx").read_bytes()
    read = {t.name: t for t in onnx.load_from_string(content).graph.initializer if t.external_data}
    rows = np.memmap(modern / "weights.bin", np.uint8, "r")

    found = external.weights(content)

    assert {w.name for w in found} == set(read)
    for weight in found:
        right = numpy_helper.to_array(read[weight.name], base_dir=str(modern))
        assert (weight.kind, weight.shape) == (read[weight.name].data_type, right.shape)
        assert bytes(rows[weight.offset : weight.offset + weight.size]) == right.tobytes()


def test_operators_are_found_with_their_domains():
    node = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0])
    graph = helper.make_graph([node, helper.make_node("Add", ["y", "w"], ["z"])], "g", [], [], [tensor])

    assert external.operators(helper.make_model(graph).SerializeToString()) == {("com.microsoft", "Gelu"), ("", "Add")}


def test_an_error_without_words_is_named():
    assert ort_cuda._said(ValueError("")) == "ValueError); see `lvlm-edge doctor`"

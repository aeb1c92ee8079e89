"""Doctor: what it finds, on this machine and on others played by files and modules."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types

import pytest

from lvlm_edge.exporter.devices import doctor
from lvlm_edge.runtime.backends import ort, ort_cuda
from lvlm_edge.runtime.errors import UnsupportedError
from tests import tiny
from tests.tiny import cli


@pytest.fixture
def jetson(tmp_path):
    """The root of an Orin Nano with L4T 36.4.3, and how to give it another release."""

    def made(release: str = "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic"):
        for file, content in {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "etc/nv_tegra_release": release,
            "proc/meminfo": "MemTotal:        7800000 kB\n",
        }.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(content)
        return tmp_path

    return made


@pytest.fixture
def modules(monkeypatch):
    """Lets modules be there, broken (an exception) or absent (None)."""
    real, importing = doctor._there, importlib.import_module
    placed: dict[str, object] = {}

    def place(**named: object) -> None:
        placed.update({name.replace("__", "."): module for name, module in named.items()})

    def load(name: str) -> object:
        found = placed.get(name) or importing(name)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(doctor, "_there", lambda m: placed[m] is not None if m in placed else real(m))
    monkeypatch.setattr(doctor.importlib, "import_module", load)
    place(onnxruntime=None, tensorrt=None, tensorrt_rtx=None, cuda__bindings=None)
    return place


class Status(int):
    name = "cudaErrorInsufficientDriver"


def cuda(count: object, status: int = 0) -> types.SimpleNamespace:
    card = types.SimpleNamespace(name=b"Orin\0", major=8, minor=7, totalGlobalMem=7_000_000_000, integrated=1)
    return types.SimpleNamespace(
        cudaGetDeviceCount=lambda: (Status(status), count), cudaGetDeviceProperties=lambda _: (Status(0), card)
    )


def parts(found: dict) -> dict[str, dict]:
    return {part["name"]: part for part in found["parts"]}


def library(version: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(__version__=version, get_available_providers=lambda: ["CPUExecutionProvider"])


def test_the_command_prints_one_document_and_ends_well():
    done = cli("doctor", "--json")

    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {"python", "device", "jetpack", "packages", "gpus", "parts"} <= set(found)
    assert found["packages"]["numpy"]
    assert parts(found)["run with ort"]["works"]


def test_the_command_prints_what_works_and_what_to_install(modules):
    done = cli("doctor")

    assert done.exit_code == 0, done.output
    assert "pip install 'lvlm-edge[ort]'" in done.stdout
    assert "run with ort: onnxruntime is not installed" in done.stdout


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from lvlm_edge.exporter.commands.main import main\n"
        "try: main(['doctor', '--json'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print({'torch', 'transformers', 'onnx'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (0, "set()"), done.stderr


def test_without_anything_every_backend_is_said_to_be_missing(modules, tmp_path):
    found = doctor.report(tmp_path)

    assert (found["device"], found["l4t"], found["jetpack"]) == ("cpu", None, None)
    for name in ("run with ort", "run with trt-rtx", "build for and run with trt"):
        assert not parts(found)[name]["works"]
        assert parts(found)[name]["install"].startswith("pip install")


def test_a_jetson_is_told_to_use_jetpacks_own_tensorrt(modules, jetson):
    found = doctor.report(jetson())

    assert (found["device"], found["l4t"]) == ("orin-nano-8gb", "36.4.3")
    assert found["jetpack"] == {"release": "6.2", "tensorrt": "10.3"}
    advice = parts(found)["build for and run with trt"]["install"]
    assert "python3-libnvinfer" in advice and "system-site-packages" in advice and "cuda-bindings==12.*" in advice
    assert not parts(found)["run with trt-rtx"]["works"]


def test_a_jetson_with_everything_works(modules, jetson):
    modules(tensorrt=library("10.3.0"), cuda__bindings=True, cuda__bindings__runtime=cuda(1))

    found = doctor.report(jetson())

    assert found["gpus"] == [
        {"name": "Orin", "compute_capability": "8.7", "memory_bytes": 7_000_000_000, "integrated": True}
    ]
    part = parts(found)["build for and run with trt"]
    assert (part["works"], part["why"], part["install"]) == (True, "tensorrt 10.3.0", "")


def test_a_release_that_is_too_old_is_said_to_be(modules, jetson):
    modules(tensorrt=library("8.6.2"), cuda__bindings=True, cuda__bindings__runtime=cuda(1))

    part = parts(doctor.report(jetson("# R36 (release), REVISION: 3.0,")))["build for and run with trt"]

    assert not part["works"] and "TensorRT 8.6 of JetPack 6.0 is too old" in part["why"]
    found = doctor.report(jetson("# R35 (release), REVISION: 4.1,"))
    assert found["device"] is None and "L4T 35.4.1" in found["device_problem"]


def test_a_library_that_does_not_load_is_no_working_one(modules, tmp_path):
    modules(tensorrt_rtx=OSError("libtensorrt_rtx.so.1: cannot open shared object file\nand more"))

    part = parts(doctor.report(tmp_path))["build for trt-rtx, on any machine"]

    assert not part["works"]
    assert part["why"] == "tensorrt_rtx does not load (libtensorrt_rtx.so.1: cannot open shared object file)"


@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        (cuda(None, 35), "CUDA says cudaErrorInsufficientDriver"),
        (cuda(0), "CUDA sees no GPU"),
        (RuntimeError("no driver"), "CUDA cannot be asked (no driver)"),
    ],
)
def test_engines_are_built_but_not_run_without_a_gpu(runtime, said, modules, tmp_path):
    modules(tensorrt_rtx=library("1.7.1.116"), cuda__bindings=True, cuda__bindings__runtime=runtime)

    found = doctor.report(tmp_path)

    assert (found["gpus"], found["cuda"]) == ([], said)
    assert parts(found)["build for trt-rtx, on any machine"]["works"]
    assert not parts(found)["run with trt-rtx"]["works"]
    assert said in parts(found)["run with trt-rtx"]["why"]


def test_an_onnx_runtime_that_is_too_old_for_modern_bundles(modules):
    modules(onnxruntime=library("1.23.2"))

    found = parts(doctor.report())

    assert found["run bundles of --lowering legacy with ort"]["works"] is True
    modern = found["run bundles of --lowering modern with ort"]
    assert modern["works"] is False and "needs onnxruntime 1.25 (Python 3.11), here is 1.23.2" in modern["why"]
    with pytest.raises(UnsupportedError, match=r"opset 24, .*1\.25 .*here is 1\.23\.2; export with --lowering legacy"):
        ort.check_opset(library("1.23.2"), 24)
    for version, opset in (("1.23.2", 18), ("1.25.0", 24), ("1.31.1", 24), ("2.0.0", 24)):
        ort.check_opset(library(version), opset)


@pytest.mark.parametrize(
    ("command", "module"), [("export", "torch"), ("check", "transformers"), ("run", "onnxruntime")]
)
def test_a_missing_extra_is_named(command, module, checkpoint_once, eager_once, tmp_path):
    """In a process of its own, from which a package is hidden."""
    folder, bundle = tiny.checkpoint(checkpoint_once), tiny.bundle(checkpoint_once, eager_once, "none")
    arguments = {
        "export": ["export", folder, "-o", tmp_path / "out"],
        "check": ["check", bundle, "--against", folder],
        "run": ["run", bundle, "--prompt", "w5"],
    }[command]
    code = f"""
import sys
sys.modules[{module!r}] = None
from lvlm_edge.exporter.commands.main import main
main({[str(a) for a in arguments]!r})
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 3, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert f"pip install 'lvlm-edge[{'ort' if module == 'onnxruntime' else 'export'}]'" in done.stderr
    assert not (tmp_path / "out").exists()


def gpu_wheel(version: str = "1.31.1") -> types.SimpleNamespace:
    return types.SimpleNamespace(
        __version__=version,
        cuda_version="13.0",
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        preload_dlls=lambda: None,
    )


def card(major: int, minor: int, driver: int = 13000) -> types.SimpleNamespace:
    found = types.SimpleNamespace(name=b"card", major=major, minor=minor, totalGlobalMem=1 << 34, integrated=0)
    return types.SimpleNamespace(
        cudaGetDeviceCount=lambda: (Status(0), 1),
        cudaGetDeviceProperties=lambda _: (Status(0), found),
        cudaDriverGetVersion=lambda: (Status(0), driver),
    )


@pytest.fixture
def of_gpu(modules, monkeypatch, tmp_path):
    """What doctor says of ort-cuda where the GPU wheel is installed."""
    monkeypatch.setattr(ort_cuda, "_installed", lambda name: name == "onnxruntime-gpu")
    monkeypatch.setattr(ort_cuda, "loads", lambda file: True)

    def said(runtime) -> dict:
        modules(onnxruntime=gpu_wheel(), cuda__bindings=True, cuda__bindings__runtime=runtime)
        monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
        return parts(doctor.report(tmp_path))["run with ort-cuda"]

    return said


def test_onnx_runtime_on_a_gpu_that_it_has_code_for(of_gpu):
    assert of_gpu(card(9, 0)) == {
        "name": "run with ort-cuda",
        "works": True,
        "why": "onnxruntime-gpu 1.31.1",
        "install": "",
    }
    assert of_gpu(card(8, 9))["works"]


def test_what_keeps_onnx_runtime_from_a_gpu(of_gpu, monkeypatch):
    foreign = of_gpu(card(10, 0))
    assert not foreign["works"] and "no code for compute capability 10.0" in foreign["why"]
    old = of_gpu(card(9, 0, driver=12020))
    assert not old["works"] and "the driver is too old: it is for CUDA 12.2" in old["why"]
    assert old["install"].startswith("update it to 580 or newer, or pip install 'onnxruntime-gpu==1.26.0'")
    monkeypatch.setattr(ort_cuda, "loads", lambda file: "cudnn" not in file)
    none = of_gpu(card(9, 0))
    assert "libcudnn.so.9 is not there" in none["why"] and none["install"] == "pip install nvidia-cudnn-cu13"
    monkeypatch.setattr(ort_cuda, "_installed", lambda name: True)
    both = of_gpu(card(9, 0))
    assert "both installed" in both["why"]
    assert both["install"].startswith("pip uninstall -y onnxruntime onnxruntime-gpu")


def test_the_cpu_wheel_is_no_gpu_wheel_and_a_jetson_has_neither(modules, jetson, tmp_path):
    modules(onnxruntime=library("1.31.1"))
    assert "has no CUDA provider" in parts(doctor.report(tmp_path))["run with ort-cuda"]["why"]
    modules(onnxruntime=None)
    advice = parts(doctor.report(jetson()))["run with ort-cuda"]["install"]
    assert "jp6/cu126" in advice and "--lowering legacy" in advice

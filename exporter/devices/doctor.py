"""Doctor: what this machine has, what of lvlm-edge works with it, and what to install for the rest.

Nothing heavy is imported: packages are looked up by their metadata. Only the libraries that run graphs are loaded,
since being installed and finding their own shared libraries are two things.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from lvlm_edge.exporter.devices import profiles
from lvlm_edge.runtime.backends import ort_cuda
from lvlm_edge.runtime.backends.ort import MODERN, TELEMETRY, saturates
from lvlm_edge.runtime.errors import LvlmEdgeError

# Module by the distribution that brings it; of several that bring one module, the first that is installed counts.
PACKAGES = {
    "lvlm-edge": "lvlm_edge",
    "numpy": "numpy",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "transformers": "transformers",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "cuda-bindings": "cuda.bindings",
}
BACKENDS = {"ort": "onnxruntime", "trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}
EXPORT = ("torch", "transformers", "onnx", "onnxscript")
INSTALL = {
    "export": "pip install 'lvlm-edge[export]'",
    "ort": "pip install 'lvlm-edge[ort]'",
    "trt": "pip install tensorrt cuda-bindings",
    "trt-rtx": "pip install tensorrt-rtx cuda-bindings",
}
ON_JETSON = (
    "sudo apt install python3-libnvinfer, make the environment with python3 -m venv --system-site-packages, and pip "
    "install 'cuda-bindings=={cuda}.*'"
)

ON_JETSON_ORT = (
    "a build of onnxruntime for this JetPack: pip install onnxruntime-gpu --index-url "
    "https://pypi.jetson-ai-lab.io/jp6/cu126 on JetPack 6, for bundles of --lowering legacy"
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something lvlm-edge can do here, or what is missing for it; `install` is empty where nothing is."""

    name: str
    works: bool
    why: str
    install: str = ""


def report(root: Path = Path("/")) -> dict[str, Any]:
    """What this machine has and can do, as `doctor --json` prints it.

    Args:
        root: where `etc` and `proc` are.
    """
    jetson = profiles.l4t(root)
    try:
        profile: profiles.Profile | None = profiles.detect(root)
        unknown = ""
    except LvlmEdgeError as error:
        profile, unknown = None, str(error)
    installed = {name: _version(name) for name in PACKAGES}
    loads = {name: _loads(module) for name, module in BACKENDS.items()}
    gpus, cuda = _gpus()
    release = profile.release if profile else None
    jetpack = None if release is None else {"release": release.version, "tensorrt": release.tensorrt}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "memory_bytes": profiles.memory_bytes(root),
        "device": profile.name if profile else None,
        "device_problem": unknown or None,
        "l4t": jetson,
        "jetpack": jetpack,
        "packages": installed,
        "gpus": gpus,
        "cuda": cuda,
        "parts": [vars(p) for p in _parts(profile, loads, gpus, cuda)],
    }


def _version(distribution: str) -> str | None:
    """Its installed version; of a module from elsewhere (JetPack's TensorRT), `installed`; None if there is neither."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        module = PACKAGES[distribution]
        alone = list(PACKAGES.values()).count(module) == 1
        return "installed" if alone and _there(module) else None


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _loads(module: str) -> str:
    """The version of a module once imported, or what went wrong after a colon; empty if it is not installed."""
    if not _there(module):
        return ""
    os.environ.setdefault(TELEMETRY, "1")
    try:
        return str(vars(importlib.import_module(module)).get("__version__", "unknown version"))
    except Exception as error:  # a broken installation can raise anything
        return f": {_first(error)}"


def _first(error: Exception) -> str:
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def _gpus() -> tuple[list[dict[str, Any]], str]:
    """NVIDIA GPUs by the CUDA runtime, and why there are none where there are none."""
    if not _there("cuda.bindings"):
        return [], "cuda-bindings is not installed, so nobody was asked"
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
        status, count = runtime.cudaGetDeviceCount()
        if int(status) != 0:
            return [], f"CUDA says {getattr(status, 'name', status)}"
        found: list[dict[str, Any]] = []
        for i in range(count):
            status, p = runtime.cudaGetDeviceProperties(i)
            if int(status) != 0:
                return found, f"CUDA says {getattr(status, 'name', status)} of GPU {i}"
            name = p.name.decode() if isinstance(p.name, bytes) else str(p.name)
            found.append(
                {
                    "name": name.rstrip("\0"),
                    "compute_capability": f"{p.major}.{p.minor}",
                    "memory_bytes": int(p.totalGlobalMem),
                    "integrated": bool(p.integrated),
                }
            )
        return found, "" if found else "CUDA sees no GPU"
    except Exception as error:  # without a driver even the import can fail
        return [], f"CUDA cannot be asked ({_first(error)})"


def _parts(
    profile: profiles.Profile | None, loads: dict[str, str], gpus: list[dict[str, Any]], cuda: str
) -> tuple[Part, ...]:
    """What works here: exporting, building, and each backend."""
    release = profile.release if profile else None
    missing = [name for name in EXPORT if not _there(PACKAGES[name])]
    parts = [
        Part(
            name="export and check",
            works=not missing,
            why=f"without {', '.join(missing)}" if missing else "PyTorch and its exporters are installed",
            install=INSTALL["export"] if missing else "",
        ),
        *_of_ort(loads["ort"]),
    ]
    without = [] if gpus else [f"no GPU: {cuda}"]
    parts.append(_of_ort_cuda(loads["ort"], gpus, without, jetson=release is not None))
    if release is None:
        parts.append(_library("build for trt-rtx, on any machine", "trt-rtx", loads["trt-rtx"], []))
        parts.append(_library("run with trt-rtx", "trt-rtx", loads["trt-rtx"], without))
        parts.append(_library("build for and run with trt", "trt", loads["trt"], without))
        return tuple(parts)
    hint = ON_JETSON.format(cuda=profiles.numbers(release.cuda)[0])
    short = (
        [] if release.lowerings else [f"TensorRT {release.tensorrt} of JetPack {release.version} is too old; update"]
    )
    parts.append(_library("build for and run with trt", "trt", loads["trt"], [*short, *without], hint))
    parts.append(Part(name="run with trt-rtx", works=False, why="TensorRT-RTX has no Jetson build"))
    return tuple(parts)


def _of_ort(loaded: str) -> list[Part]:
    """Which bundles the installed ONNX Runtime runs: an old one runs those of the legacy lowering alone."""
    version = tuple(int(part) for part in loaded.split(".")[:2] if part.isdigit())
    if not version or version >= MODERN:
        found = _library("run with ort", "ort", loaded, [])
        slow = "; this processor has no VNNI, prompts of INT8 bundles take about 1.7 times as long as with it"
        return [replace(found, why=found.why + slow) if found.works and saturates() else found]
    newer = f"needs onnxruntime {MODERN[0]}.{MODERN[1]} (Python 3.11), here is {loaded}"
    return [
        Part(name="run bundles of --lowering legacy with ort", works=True, why=f"onnxruntime {loaded}"),
        Part(name="run bundles of --lowering modern with ort", works=False, why=newer, install=INSTALL["ort"]),
    ]


def _of_ort_cuda(loaded: str, gpus: list[dict[str, Any]], without: list[str], *, jetson: bool) -> Part:
    """Whether ONNX Runtime runs bundles on the GPU."""
    name, install = "run with ort-cuda", ON_JETSON_ORT if jetson else ort_cuda.INSTALL
    if not loaded or loaded.startswith(": "):
        why = f"onnxruntime does not load ({loaded[2:]})" if loaded else "onnxruntime is not installed"
        return Part(name=name, works=False, why=why, install=install)
    wrong, _, advice = ort_cuda.problem(importlib.import_module("onnxruntime"), _driver()).rpartition("; ")
    if wrong:
        return Part(name=name, works=False, why=wrong, install=ON_JETSON_ORT if jetson else advice)
    here = platform.machine()
    foreign = [g for g in gpus if not ort_cuda.has_code(profiles.numbers(g["compute_capability"]), here)]
    lacks = [f"PyPI's wheels have no code for compute capability {g['compute_capability']}" for g in foreign]
    if jetson or not (without or lacks):  # there somebody else has built it
        return Part(name=name, works=not without, why="; ".join([f"onnxruntime-gpu {loaded}", *without]))
    return Part(name=name, works=False, why=f"onnxruntime-gpu {loaded} loads, but {'; '.join([*without, *lacks])}")


def _driver() -> int:
    """The CUDA version of the driver, as CUDA numbers it; 0 where nobody can say."""
    try:
        status, version = importlib.import_module("cuda.bindings.runtime").cudaDriverGetVersion()
    except Exception:  # as above
        return 0
    return 0 if int(status) else int(version)


def _library(what: str, backend: str, loaded: str, lacks: list[str], install: str = "") -> Part:
    """A part that needs a backend's library and the absence of what it lacks."""
    module, install = BACKENDS[backend], install or INSTALL[backend]
    if not loaded:
        return Part(name=what, works=False, why=f"{module} is not installed", install=install)
    if loaded.startswith(": "):
        return Part(name=what, works=False, why=f"{module} does not load ({loaded[2:]})", install=install)
    if lacks:
        return Part(name=what, works=False, why=f"{module} {loaded} loads, but {'; '.join(lacks)}")
    return Part(name=what, works=True, why=f"{module} {loaded}")

"""ONNX Runtime on an NVIDIA GPU: caches updated in place on the device, decode as a CUDA graph, weights held once.

It runs the portable graphs alone, wholly on the GPU: what its CUDA provider cannot run is an error and never goes to
the CPU. Float32 is computed as float32, without TF32. Floating-point weights are on the device once, whatever the
number of graphs that read them; those of integers once per graph, since ONNX Runtime packs them its own way.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import io
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_edge.runtime.backends import Buffer, Session, ort
from lvlm_edge.runtime.backends.cuda import highest
from lvlm_edge.runtime.backends.cuda.device import Cuda, DeviceBuffer, DeviceInputs, library
from lvlm_edge.runtime.bundle import WIDTHS, Bundle, Graph, TensorInfo, external
from lvlm_edge.runtime.errors import BundleError, DeviceError, LvlmEdgeError, UnsupportedError, UsageError

if TYPE_CHECKING:
    import onnxruntime

NAME, PROVIDER = "ort-cuda", "CUDAExecutionProvider"
INSTALL = "pip install 'lvlm-edge[ort-cuda]'"
AGAIN = f"pip uninstall -y onnxruntime onnxruntime-gpu, then {INSTALL}"
WHEELS = ("onnxruntime", "onnxruntime-gpu")
DOMAINS = ("", "ai.onnx", "com.microsoft")  # of operators that ONNX Runtime itself brings
COMPILED = "EPContext"  # the operator that carries code for a device
ELEMENTS = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7}  # TensorProto's numbers
FLOATS = {ELEMENTS[dtype]: dtype for dtype in WIDTHS}
DLPACK = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16)}  # code and bits of its types
DRIVERS = {12: "525", 13: "580"}  # the first driver of a CUDA version
LAST_FOR = {12: "1.26.0"}  # the last onnxruntime-gpu of PyPI for it, where that is not the newest
LEGACY = "Conv of opset 18 does not take; export with --lowering modern, or with --dtype float16"
CAPTURES = (1, 31)  # the first that keeps the host memory which copies inside a captured graph read again
# Shared libraries that the CUDA provider opens, and the package that brings each; ones of CUDA 12 end in -cu12.
LIBRARIES = {
    "libcudart.so.{cuda}": "nvidia-cuda-runtime",
    "libcublasLt.so.{cuda}": "nvidia-cublas",
    "libcublas.so.{cuda}": "nvidia-cublas",
    "libcurand.so.10": "nvidia-curand",
    "libcudnn.so.9": "nvidia-cudnn-cu{cuda}",
}
# Compute capabilities that PyPI's onnxruntime-gpu 1.31.1 has machine code for; it has none that a driver translates.
CODE = {
    "x86_64": ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)),
    "aarch64": ((8, 9), (9, 0), (12, 0), (12, 1)),
}
# What ONNX Runtime says, and what helps.
ADVICE = {
    "out of memory": "close what else uses the GPU, or export with lower capacities",
    "Failed to allocate": "close what else uses the GPU, or export with lower capacities",
    "no kernel image": "this onnxruntime-gpu has no code for this GPU; run the bundle with trt",
    "cuDNN": "pip install 'nvidia-cudnn-cu13>=9'",
    "apture": "open the bundle without CUDA graphs: Pipeline.load(bundle, 'ort-cuda', capture=False)",
}


@dataclass(frozen=True)
class Opened:
    """A session, and what has to live as long as it does.

    Attributes:
        weights: the device's memory behind its initializers, and what ONNX Runtime has been told of it.
        captured: decode is replayed as a CUDA graph.
    """

    session: onnxruntime.InferenceSession
    weights: tuple[Weight, ...]
    captured: bool


@dataclass(frozen=True)
class Weight:
    """An initializer on the device, and the view of it that sessions are given."""

    view: Any
    buffer: DeviceBuffer


class OrtCudaSession:
    """A session bound to addresses of the device, which never change, on the stream that copies use too."""

    def __init__(self, path: Path, opened: Opened, binding: Any, how: Any, cuda: Cuda) -> None:
        self._binding, self._how, self._opened, self._path, self._cuda = binding, how, opened, path, cuda
        self.buffers: tuple[DeviceBuffer, ...] = ()  # kept as long as their addresses are

    def run(self, rows: int | None = None) -> None:
        # With a CUDA graph the first run computes three times: to see what it allocates, to capture and to replay.
        # A step of decode gives the same when it is done again: it writes the same rows into the same slots.
        with _naming(self._path, "did not run it"):
            self._opened.session.run_with_iobinding(self._binding, self._how)
        self._cuda.wait()


class OrtCudaBackend:
    """Sessions on the current CUDA device."""

    name = NAME

    def __init__(self, runtime: ModuleType, cuda: Cuda, capture: bool) -> None:
        self._sessions: dict[Path, Opened] = {}
        self._runtime, self._cuda, self._capture = runtime, cuda, capture
        self._weights: dict[tuple[Path, external.Weight], Weight] = {}

    def allocate(self, info: TensorInfo, *, host: bool = False) -> DeviceBuffer:
        """A zeroed buffer.

        Args:
            host: whether the host reads or writes it.

        Raises:
            DeviceError: the device has not that much memory.
        """
        return DeviceBuffer(self._cuda, info, host=host)

    def together(self, infos: Sequence[TensorInfo]) -> DeviceInputs:
        return DeviceInputs(self._cuda, infos)

    def finder(self, bundle: Bundle, logits: Buffer) -> highest.OnDevice | None:
        """The highest logits' graph in a session of its own, replayed as a CUDA graph like decode.

        Raises:
            DeviceError: the CUDA provider cannot run it.
        """
        assert isinstance(logits, DeviceBuffer)
        info = highest.row_of(logits.info)
        if info is None or self._cuda.properties.integrated:  # which share their memory with the host
            return None
        path, content = bundle.folder / highest.FILE, highest.graph(logits.info.shape[-1])
        opened = self._session(path, content, {}, captured=self._can_capture)
        row = self.allocate(info, host=True)
        how = self._run_options(1 if opened.captured else None)
        return highest.OnDevice(self._bound(path, opened, {"logits": logits, "highest": row}, how), row)

    def open(self, bundle: Bundle, graph: Graph, buffers: Mapping[str, Buffer]) -> Session:
        """A graph bound to its buffers; graphs of one file share its session.

        Raises:
            BundleError: the graph was altered, reads other files than the bundle's weights, asks for operators that
                are not ONNX Runtime's, or is not the one the manifest describes.
            DeviceError: the GPU has not the memory, or the CUDA provider cannot run all of the graph.
            UnsupportedError: the installed ONNX Runtime is too old for the bundle.
        """
        path = bundle.path(graph.file)
        if path not in self._sessions:
            ort.check_opset(self._runtime, bundle.manifest.opset, NAME)
            if (bundle.manifest.lowering, bundle.manifest.dtype) == ("legacy", "bfloat16"):
                raise UnsupportedError(f"{NAME}: {path} is of bfloat16, which {LEGACY}")
            self._sessions[path] = self._opened(bundle, graph.file)
        opened, number = self._sessions[path], None
        if opened.captured:
            number = bundle.manifest.graphs_of(graph.file).index(graph) + 1 if graph.role == "decode" else -1
        return self._bound(path, opened, buffers, self._run_options(number))

    def _bound(self, path: Path, opened: Opened, buffers: Mapping[str, Buffer], how: Any) -> OrtCudaSession:
        """A session with its inputs and outputs bound to buffers by name."""
        kept = []
        with _naming(path, "does not take its buffers"):
            binding, inputs, outputs = (
                opened.session.io_binding(),
                opened.session.get_inputs(),
                opened.session.get_outputs(),
            )
            for bind, info in [(binding.bind_input, i) for i in inputs] + [(binding.bind_output, o) for o in outputs]:
                buffer = buffers.get(info.name)
                assert buffer is None or isinstance(buffer, DeviceBuffer)
                ort.check_tensor(path, info, None if buffer is None else buffer.info)
                assert buffer is not None
                shape = list(buffer.info.shape)
                bind(info.name, "cuda", self._cuda.device, ELEMENTS[buffer.info.dtype], shape, buffer.address)
                kept.append(buffer)
        session = OrtCudaSession(path, opened, binding, how, self._cuda)
        session.buffers = tuple(kept)
        return session

    def _run_options(self, number: int | None) -> Any:
        """How a graph is run: which CUDA graph of its session it is, and that the stream is waited for by us.

        Args:
            number: from 1 on, or -1 for none; None for a session that captures nothing.
        """
        how = self._runtime.RunOptions()
        how.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if number is not None:
            how.add_run_config_entry("gpu_graph_id", str(number))
        return how

    def _opened(self, bundle: Bundle, file: str) -> Opened:
        path, content = bundle.path(file), bundle.graph(file)
        _check_operators(path, content)
        weights = {w.name: self._weight(bundle, w) for w in external.weights(content) if w.kind in FLOATS}
        decodes = any(graph.role == "decode" for graph in bundle.manifest.graphs_of(file))
        captured = decodes and self._can_capture
        return self._session(path, content, weights, captured=captured, linked=ort.linked(bundle))

    def _session(
        self, path: Path, content: bytes, weights: Mapping[str, Weight], *, captured: bool, linked: Path | None = None
    ) -> Opened:
        """The session of a graph's bytes.

        Args:
            path: of the graph, beside which its weights are.
            weights: those that are on the device.
            linked: the file of weights, where it is a link.
        """
        options = self._runtime.SessionOptions()
        options.log_severity_level = 4  # what is wrong is raised, and stderr belongs to our one line
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        for name, weight in weights.items():
            options.add_initializer(name, weight.view)
        with _naming(path, "does not take it"):
            if linked is not None:
                with linked.open("rb") as rows:
                    mapped = mmap.mmap(rows.fileno(), 0, access=mmap.ACCESS_READ)
                options.add_external_initializers_from_files_in_memory([linked.name], [mapped], [len(mapped)])
            provider = (PROVIDER, self._provider_options(captured))
            session = self._runtime.InferenceSession(
                content,
                options,
                providers=[provider],
                enable_fallback=0,
                # it would hold parts of weights once more where a graph reads slices of them
                disabled_optimizers=["ConstantFolding"],
            )
        if session.get_providers()[0] != PROVIDER:
            raise DeviceError(f"{path}: ONNX Runtime would run it on the CPU, without its CUDA provider; {AGAIN}")
        return Opened(session, tuple(weights.values()), captured)

    @property
    def _can_capture(self) -> bool:
        """Whether what runs once per token is replayed as a CUDA graph."""
        return self._capture and _version(self._runtime) >= CAPTURES

    def _provider_options(self, captured: bool) -> dict[str, str]:
        return {
            "device_id": str(self._cuda.device),
            "user_compute_stream": str(self._cuda.stream),
            "enable_cuda_graph": str(int(captured)),
            "use_tf32": "0",
            "arena_extend_strategy": "kSameAsRequested",  # by default it takes twice as much each time
            "cudnn_conv_algo_search": "HEURISTIC",  # by default it times every algorithm in the first run
        }

    def _weight(self, bundle: Bundle, weight: external.Weight) -> Weight:
        """An initializer on the device; the one that another graph has put there, if there is one.

        Raises:
            BundleError: its rows are not in the bundle's file of weights.
        """
        path = bundle.path(bundle.manifest.weights)
        if (path, weight) not in self._weights:
            dtype = FLOATS[weight.kind]
            size = int(np.prod(weight.shape, dtype=object)) * WIDTHS[dtype]
            mapped = np.memmap(path, np.uint8, "r")
            if not (size == (size if weight.size is None else weight.size) and weight.offset + size <= len(mapped)):
                raise BundleError(f"{path}: does not hold {weight}; export the bundle again")
            buffer = DeviceBuffer(self._cuda, TensorInfo(weight.name, dtype, weight.shape))
            rows = mapped[weight.offset : weight.offset + size]
            self._cuda.copy(buffer.address, rows.ctypes.data, size, "HostToDevice")
            with _naming(path, f"does not take {weight.name}"):
                view = self._runtime.OrtValue.from_dlpack(capsule(buffer, self._cuda.device))
            self._weights[path, weight] = Weight(view, buffer)
        return self._weights[path, weight]


@contextlib.contextmanager
def _naming(path: Path, what: str) -> Iterator[None]:
    """Make what ONNX Runtime raises one line: a file, what its CUDA provider does not do, and why."""
    try:
        yield
    except (AssertionError, LvlmEdgeError):
        raise
    except Exception as error:  # the bindings raise their own types
        raise DeviceError(f"{path}: ONNX Runtime's CUDA provider {what} ({_said(error)}") from error


def _said(error: Exception) -> str:
    """What ONNX Runtime says, on one line and without its own functions' names, and what helps."""
    whole = " ".join(str(error).split()) or type(error).__name__
    failure = re.search(r"(CUDA|CUBLAS|CUDNN|CURAND) failure \d+: [^;]+", whole)
    last = whole.rpartition("[ONNXRuntimeError] : ")[2]
    advice = next((helps for says, helps in ADVICE.items() if says in whole), "see `lvlm-edge doctor`")
    return f"{(failure[0] if failure else last).strip()[:300]}); {advice}"


def _check_operators(path: Path, content: bytes) -> None:
    """Raise BundleError for a graph with operators of other libraries, or with code for a device."""
    for domain, name in sorted(external.operators(content)):
        if domain not in DOMAINS or name == COMPILED:
            raise BundleError(
                f"{path}: has the operator {domain or 'ai.onnx'}:{name}, which is not ONNX's and may be code; do not "
                "use this bundle"
            )


class _Managed(ctypes.Structure):
    """DLPack's `DLManagedTensor`. Source: dlpack.h, version 0.8."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


def capsule(buffer: DeviceBuffer, device: int) -> Any:
    """A DLPack capsule of a buffer, which has to outlive what is made of it.

    What describes the buffer is C's memory, which its reader gives back with C's `free`: no Python is needed then.
    """
    c, shape = ctypes.CDLL(None), buffer.info.shape
    c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    head = ctypes.sizeof(_Managed)
    address = c.malloc(head + 8 * len(shape))
    (ctypes.c_int64 * len(shape)).from_address(address + head)[:] = list(shape)
    code, bits = DLPACK[buffer.info.dtype]
    managed = _Managed.from_address(address)
    managed.data, managed.device_type, managed.device_id, managed.ndim = buffer.address, 2, device, len(shape)
    managed.code, managed.bits, managed.lanes, managed.byte_offset = code, bits, 1, 0
    managed.shape, managed.strides, managed.manager = address + head, None, None
    managed.deleter = ctypes.cast(c.free, ctypes.c_void_p).value
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(address, b"dltensor", None)


def _version(runtime: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in runtime.__version__.split(".")[:2] if part.isdigit())


def has_code(capability: tuple[int, ...], machine: str) -> bool:
    """Whether the wheels have code for a GPU: code runs on later minor versions of its compute capability too.

    Args:
        machine: `x86_64` or `aarch64`.
    """
    major, minor = capability
    return any(major == m and n <= minor for m, n in CODE.get(machine, ()))


def problem(runtime: ModuleType, driver: int) -> str:
    """What keeps the installed ONNX Runtime from using CUDA here, and what to do; empty if nothing does.

    Args:
        runtime: the module `onnxruntime`.
        driver: the CUDA version of the driver, as CUDA numbers it: 13000 is 13.0, and 0 none.
    """
    if len([name for name in WHEELS if _installed(name)]) == len(WHEELS):
        return f"onnxruntime and onnxruntime-gpu are both installed, and each overwrites the other's files; {AGAIN}"
    if PROVIDER not in runtime.get_available_providers():
        return f"the installed onnxruntime {runtime.__version__} has no CUDA provider; {AGAIN}"
    said = runtime.cuda_version.partition(".")[0]
    if not said.isdigit():  # built by somebody who knows
        return ""
    return _of_driver(runtime.__version__, int(said), driver) or _of_libraries(runtime, int(said))


def _installed(distribution: str) -> bool:
    try:
        return bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


def _of_driver(version: str, cuda: int, driver: int) -> str:
    if driver == 0:
        return "there is no NVIDIA driver; install one, then see `lvlm-edge doctor`"
    here = driver // 1000
    if here >= cuda:
        return ""
    last = LAST_FOR.get(here)
    older = f", or pip install 'onnxruntime-gpu=={last}' 'cuda-bindings=={here}.*'" if last else ""
    return (
        f"the driver is too old: it is for CUDA {here}.{driver % 1000 // 10}, and onnxruntime-gpu {version} needs CUDA "
        f"{cuda}; update it to {DRIVERS.get(cuda, 'the newest')} or newer{older}"
    )


def _of_libraries(runtime: ModuleType, cuda: int) -> str:
    """The first of CUDA's libraries that does not load, and the package that brings it."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        runtime.preload_dlls()
    for name, package in LIBRARIES.items():
        file = name.format(cuda=cuda)
        if loads(file):
            continue
        others = [other for major in DRIVERS if loads(other := name.format(cuda=major))]
        wrong = f", and {others[0]} of another CUDA is no substitute" if others else ""
        brings = package.format(cuda=cuda) if "{cuda}" in package or cuda > 12 else f"{package}-cu{cuda}"
        return f"{file} is not there, which onnxruntime-gpu {runtime.__version__} needs{wrong}; pip install {brings}"
    return ""


def loads(file: str) -> bool:
    """Whether the dynamic linker finds a shared library."""
    try:
        ctypes.CDLL(file)
    except OSError:
        return False
    return True


def create(threads: int | None = None, *, capture: bool = True) -> OrtCudaBackend:
    """The backend.

    Args:
        threads: must be None; the GPU has its own.
        capture: replay decode as a CUDA graph, where ONNX Runtime is 1.31 or newer.

    Raises:
        UnsupportedError: a library is not installed, does not load, or is for another CUDA.
        UsageError: threads are given.
        DeviceError: there is no GPU, or CUDA cannot use it.
    """
    if threads is not None:
        raise UsageError(f"{NAME}: takes no number of threads, since it runs on the GPU; leave --threads out")
    runtime, bindings = ort.library(NAME), library(NAME, "cuda.bindings.runtime", INSTALL)
    status, driver = bindings.cudaDriverGetVersion()
    wrong = problem(runtime, 0 if int(status) else driver)
    if wrong:
        raise UnsupportedError(f"{NAME}: {wrong}")
    return OrtCudaBackend(runtime, Cuda(bindings), capture)

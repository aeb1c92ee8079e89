"""ONNX Runtime on the CPU: caches updated in place through IO binding, weights mapped from the bundle's file."""

from __future__ import annotations

import functools
import mmap
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_edge.runtime.backends import Array, Buffer, Session
from lvlm_edge.runtime.bundle import Bundle, Graph, TensorInfo
from lvlm_edge.runtime.errors import BundleError, UnsupportedError

if TYPE_CHECKING:
    import onnxruntime

MODERN, MODERN_OPSET = (1, 25), 24  # the first ONNX Runtime that loads graphs of the modern lowering, and their opset
X86, CPUINFO, VNNI = ("x86_64", "amd64"), Path("/proc/cpuinfo"), {"avx512_vnni", "avx_vnni"}
TELEMETRY = "ORT_DISABLE_TELEMETRY"  # of ONNX Runtime from 1.29 on; a user's own setting stays


@dataclass(frozen=True)
class HostBuffer:
    """A numpy array that sessions read and write by address."""

    array: Array

    def write(self, values: Array) -> None:
        self.array[...] = values

    def read(self) -> Array:
        return self.array

    def copy_rows(self, rows: Buffer, slot: int) -> None:
        new = rows.read()
        self.array[:, :, slot : slot + new.shape[2]] = new


@dataclass(frozen=True)
class HostInputs:
    """Arrays that are filled one after the other: the host's memory has no copies to save."""

    buffers: Mapping[TensorInfo, HostBuffer]

    def write(self, values: Mapping[TensorInfo, Array]) -> None:
        for info, buffer in self.buffers.items():
            buffer.write(values[info])


@dataclass(frozen=True)
class OrtSession:
    """A graph's file, its session, its binding, and the arrays that are bound, by name."""

    path: Path
    session: onnxruntime.InferenceSession
    binding: Any
    arrays: Mapping[str, Array]

    def run(self, rows: int | None = None) -> None:
        arrays = self.arrays if rows is None else narrowed(self.session, self.arrays, rows)
        binding = self.binding if arrays is self.arrays else bound(self.session, arrays)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # the bindings raise their own types; the first line says what is wrong
            reason = str(error).splitlines()[0]
            raise BundleError(f"{self.path}: ONNX Runtime cannot run it ({reason}); export the bundle again") from error


class OrtBackend:
    """Sessions with a thread pool each, whose threads stop spinning when their graph is done.

    Left to spin, the idle threads of one graph's session take the cores that the next graph needs.
    """

    name = "ort"

    def __init__(self, runtime: ModuleType, threads: int, exact: bool) -> None:
        self._runtime, self._threads, self._exact = runtime, threads, exact
        self._sessions: dict[Path, onnxruntime.InferenceSession] = {}

    def allocate(self, info: TensorInfo, *, host: bool = False) -> HostBuffer:
        if info.dtype == "bfloat16":
            raise UnsupportedError(
                f"ort: {info.name} is bfloat16, which ONNX Runtime does not compute on the CPU; export with --dtype "
                "float32 or float16, or run the bundle with TensorRT"
            )
        return HostBuffer(np.zeros(info.shape, np.dtype(info.dtype)))

    def together(self, infos: Sequence[TensorInfo]) -> HostInputs:
        return HostInputs({info: self.allocate(info, host=True) for info in infos})

    def finder(self, bundle: Bundle, logits: Buffer) -> None:
        """Nothing: the host has the logits."""

    def open(self, bundle: Bundle, graph: Graph, buffers: Mapping[str, Buffer]) -> Session:
        """A graph bound to its buffers; graphs of one file share its session, and with it the weights.

        Raises:
            BundleError: the graph was altered, reads other files than the bundle's weights, or is not the one the
                manifest describes; or ONNX Runtime cannot load it.
        """
        path = bundle.path(graph.file)
        if path not in self._sessions:
            check_opset(self._runtime, bundle.manifest.opset)
            self._sessions[path] = load(
                self._runtime,
                path,
                content=self.content(bundle, graph.file),
                weights=linked(bundle),
                threads=self._threads,
                exact=self._exact,
            )
        session = self._sessions[path]
        arrays = {}
        for info in (*session.get_inputs(), *session.get_outputs()):
            buffer = buffers.get(info.name)
            assert buffer is None or isinstance(buffer, HostBuffer)
            held = None if buffer is None else TensorInfo(info.name, buffer.array.dtype.name, buffer.array.shape)
            check_tensor(path, info, held)
            assert buffer is not None
            arrays[info.name] = buffer.array
        return OrtSession(path, session, bound(session, arrays), arrays)

    def content(self, bundle: Bundle, file: str) -> bytes:
        """The graph that is opened for a file."""
        return bundle.graph(file)


def bound(session: onnxruntime.InferenceSession, arrays: Mapping[str, Array]) -> Any:
    """A binding of a session's inputs and outputs to arrays by name, which have to outlive it."""
    binding = session.io_binding()
    for bind, infos in ((binding.bind_input, session.get_inputs()), (binding.bind_output, session.get_outputs())):
        for info in infos:
            array = arrays[info.name]
            bind(info.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return binding


def narrowed(session: onnxruntime.InferenceSession, arrays: Mapping[str, Array], rows: int) -> Mapping[str, Array]:
    """Arrays of a session's inputs and outputs with so many rows, where it leaves the number of rows open.

    An input with axes of several entries before its rows is copied.

    Returns:
        the arrays as they are where it takes one number alone, or that many rows.
    """
    found = dict(arrays)
    for info in (*session.get_inputs(), *session.get_outputs()):
        axis = next((i for i, size in enumerate(info.shape) if isinstance(size, str)), None)
        if axis is not None:
            found[info.name] = np.ascontiguousarray(arrays[info.name][(slice(None),) * axis + (slice(rows),)])
    outputs = [(found[info.name], arrays[info.name]) for info in session.get_outputs()]
    assert all(np.shares_memory(narrow, whole) for narrow, whole in outputs), "outputs are written in place"
    same = all(found[name].shape == array.shape for name, array in arrays.items())
    return arrays if same else found


def check_opset(runtime: ModuleType, opset: int, backend: str = "ort") -> None:
    """Raise UnsupportedError for an opset that the installed ONNX Runtime is too old for."""
    version = tuple(int(part) for part in runtime.__version__.split(".")[:2] if part.isdigit())
    if opset >= MODERN_OPSET and version < MODERN:
        raise UnsupportedError(
            f"{backend}: the bundle is of opset {opset}, which needs onnxruntime {MODERN[0]}.{MODERN[1]} (Python 3.11) "
            f"or newer, here is {runtime.__version__}; export with --lowering legacy, or upgrade"
        )


def linked(bundle: Bundle) -> Path | None:
    """The file of weights where it is a link, which ONNX Runtime does not follow."""
    path = bundle.path(bundle.manifest.weights)
    return path if path.is_symlink() else None


def load(
    runtime: ModuleType,
    path: Path,
    *,
    content: bytes | None = None,
    weights: Path | None = None,
    threads: int = 0,
    exact: bool = False,
) -> onnxruntime.InferenceSession:
    """The session of a graph.

    Args:
        runtime: the module `onnxruntime`.
        content: of the file; read here where it is not given. Weights are read from the folder of `path`.
        weights: the file of weights where ONNX Runtime cannot map it itself; it then copies what it reads.
        threads: threads to compute with; 0 lets ONNX Runtime take the physical cores.
        exact: multiply weights of small integers as the floating-point numbers they stand for.

    Raises:
        BundleError: ONNX Runtime cannot load the graph.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    _share_arena(runtime)
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # "1" makes constant signed weights unsigned, so that sums are exact where they would saturate; it is slower
    options.add_session_config_entry("session.x64quantprecision", str(int(saturates())))
    # 1: small integers become float32 to be multiplied; 4: activations become 8-bit integers, block by block
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1" if exact else "4")
    # input channels for which one row's activations have a scale, where weights of 8 bits have one per output channel
    options.add_session_config_entry("session.qdq_matmulnbits_block_size", "128")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        if weights is not None:
            with weights.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            options.add_external_initializers_from_files_in_memory([weights.name], [mapped], [len(mapped)])
        # its fallback prints to stdout, which belongs to the answer
        return runtime.InferenceSession(
            path if content is None else content,
            options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,
            disabled_optimizers=["QDQS8ToU8Transformer"],  # 1.31.1: gives scales per channel one zero point, and fails
        )
    except Exception as error:  # the bindings raise their own types; the first line says what is wrong
        raise BundleError(f"{path}: ONNX Runtime cannot load it ({str(error).splitlines()[0]})") from error


@functools.cache
def saturates() -> bool:
    """Whether this processor adds two products of an unsigned and a signed byte in 16 bits: x86 without VNNI.

    One that does not say what it has (outside Linux) is taken to.
    """
    if platform.machine().lower() not in X86:
        return False
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return True
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not VNNI & set(flags)


@functools.cache
def _share_arena(runtime: ModuleType) -> None:
    """Let sessions take activations from one arena of this process: a graph reuses what the one before it has freed."""
    kind, default = runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, runtime.OrtMemType.DEFAULT
    arena = runtime.OrtArenaCfg(0, 0, -1, -1)  # of any size, extended to powers of two, everything else as by default
    runtime.create_and_register_allocator(runtime.OrtMemoryInfo("Cpu", kind, 0, default), arena)


def check_tensor(path: Path, info: Any, buffer: TensorInfo | None) -> None:
    """Raise BundleError where a session's input or output is not of its buffer's dtype and shape."""
    kinds = {f"tensor({t})": t for t in ("float16", "bfloat16", "int64")} | {"tensor(float)": "float32"}
    wanted = None if buffer is None else (buffer.dtype, list(buffer.shape))
    shape = info.shape
    if wanted is not None and len(shape) == len(wanted[1]):  # a size that the file leaves open is a name there
        shape = [there if isinstance(here, str) else here for here, there in zip(shape, wanted[1], strict=True)]
    found = (kinds.get(info.type, info.type), shape)
    if found != wanted:
        raise BundleError(f"{path}: {info.name!r} is {found}, the manifest says {wanted}; export the bundle again")


def library(backend: str = "ort") -> ModuleType:
    """The module `onnxruntime`, which is told to send no telemetry.

    Args:
        backend: for which it is, and the extra that brings it.

    Raises:
        UnsupportedError: it is not installed.
    """
    os.environ.setdefault(TELEMETRY, "1")  # read when the library starts
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError(
            f"{backend}: onnxruntime is not installed; pip install 'lvlm-edge[{backend}]'"
        ) from error
    return onnxruntime  # type: ignore[no-any-return]


def create(threads: int | None = None, exact: bool = False) -> OrtBackend:
    """The backend.

    Args:
        threads: threads to compute with; None lets ONNX Runtime take the physical cores.
        exact: multiply weights of small integers as the floating-point numbers they stand for, which is slower.

    Raises:
        UnsupportedError: onnxruntime is not installed.
    """
    return OrtBackend(library(), threads or 0, exact)

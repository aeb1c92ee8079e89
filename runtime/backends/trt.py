"""TensorRT and TensorRT-RTX: one API under two module names; numpy and cuda.bindings around it.

A plan is executable code. One is opened only if `lvlm-edge build` listed it beside the bundle for this machine and its
bytes are still the listed ones; TensorRT sees nothing of any other. Caches live on the device and are written in
place; lengths are device tensors, so that decode never changes its addresses and is replayed as one CUDA graph.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import mmap
import os
import platform
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_edge.runtime.backends import Array, Buffer, Session, from_bfloat16, numpy_dtype, to_bfloat16
from lvlm_edge.runtime.bundle import Bundle, Graph, TensorInfo
from lvlm_edge.runtime.errors import BundleError, DeviceError, UnsupportedError, UsageError

SCHEMA = 2  # of engines.json, which the builder writes
ENGINES = "engines.json"
PORTABLE = "portable"  # one plan for every GPU from Ampere on (TensorRT-RTX)
MODULES = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}  # backend to Python package
INSTALL = {
    "trt": "pip install tensorrt cuda-bindings (on a Jetson: TensorRT comes with JetPack)",
    "trt-rtx": "pip install tensorrt-rtx cuda-bindings",
}
DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}
# What the pipeline writes and reads on the host; the rest passes from graph to graph on the device.
HOST = frozenset(
    {"pixel_values", "image_embeds", "inputs_embeds", "position_ids", "last_index", "write_index", "visual_index"}
    | {"text_index", "cache_length", "logits", "kept_visual"}
)
CAPTURE_ERRORS = range(900, 909)  # cudaErrorStreamCaptureUnsupported and its kin: this work cannot be captured
ALIGNMENT = 256  # bytes, of scratch memory


class Cuda:
    """The CUDA runtime of one device and one stream, every return code checked."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self.properties = self.call("cudaGetDeviceProperties", self.call("cudaGetDevice"))
        # blocking streams would wait for whatever else runs in the process
        self.stream = int(self.call("cudaStreamCreateWithFlags", int(runtime.cudaStreamNonBlocking)))
        self.owned(self, "cudaStreamDestroy", self.stream)

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the device."""
        return self.properties.major, self.properties.minor

    def call(self, name: str, *arguments: Any) -> Any:
        """What a function of the CUDA runtime returns beside its status.

        Raises:
            DeviceError: the status is not success.
        """
        status, *values = getattr(self.runtime, name)(*arguments)
        if int(status) != 0:
            raise _CudaError(name, status)
        return values[0] if values else None

    def wait(self) -> None:
        self.call("cudaStreamSynchronize", self.stream)

    def copy(self, target: int, source: int, size: int, kind: str) -> None:
        """Copy bytes and wait; `kind` is `HostToDevice` or `DeviceToHost`."""
        how = getattr(self.runtime.cudaMemcpyKind, f"cudaMemcpy{kind}")
        self.call("cudaMemcpyAsync", target, source, size, how, self.stream)
        self.wait()

    def owned(self, owner: Any, release: str, handle: Any) -> None:
        """Release a handle when its owner is gone; at exit the process's memory goes as a whole."""
        weakref.finalize(owner, _release, self.runtime, release, handle).atexit = False


class _CudaError(DeviceError):
    """A status of the CUDA runtime that is not success."""

    def __init__(self, call: str, status: Any) -> None:
        self.code = int(status)
        name = getattr(status, "name", f"error {self.code}")
        short = name == "cudaErrorMemoryAllocation"
        advice = "close what else uses the GPU, or export with lower capacities" if short else "see `lvlm-edge doctor`"
        super().__init__(f"{call}: CUDA says {name}; {advice}")


def _release(runtime: Any, name: str, handle: Any) -> None:
    """Give something back. Nobody is left to act on a failure: it repeats what an earlier call has already said."""
    getattr(runtime, name)(handle)


class DeviceBuffer:
    """Device memory; on integrated GPUs, what the host touches is host memory that the device sees."""

    def __init__(self, cuda: Cuda, info: TensorInfo) -> None:
        self.info, self._cuda = info, cuda
        self._dtype = numpy_dtype(info.dtype)
        self._size = int(np.prod(info.shape, dtype=np.int64)) * self._dtype.itemsize
        self._mapped: Array | None = None
        if cuda.properties.integrated and info.name in HOST:
            host = int(cuda.call("cudaHostAlloc", self._size, int(cuda.runtime.cudaHostAllocMapped)))
            cuda.owned(self, "cudaFreeHost", host)
            self.address = int(cuda.call("cudaHostGetDevicePointer", host, 0))
            self._mapped = _at(host, self._size).view(self._dtype).reshape(info.shape)
            self._mapped[...] = 0
        else:
            self.address = int(cuda.call("cudaMalloc", self._size))
            cuda.owned(self, "cudaFree", self.address)
            cuda.call("cudaMemsetAsync", self.address, 0, self._size, cuda.stream)

    def write(self, values: Array) -> None:
        if self.info.dtype == "bfloat16":
            values = to_bfloat16(values)
        if self._mapped is not None:
            self._mapped[...] = values
            return
        host = np.empty(self.info.shape, self._dtype)
        host[...] = values
        self._cuda.copy(self.address, host.ctypes.data, self._size, "HostToDevice")

    def read(self) -> Array:
        host = self._mapped
        if host is None:
            host = np.empty(self.info.shape, self._dtype)
            self._cuda.copy(host.ctypes.data, self.address, self._size, "DeviceToHost")
        return from_bfloat16(host) if self.info.dtype == "bfloat16" else host

    def copy_rows(self, rows: Buffer, slot: int) -> None:
        assert isinstance(rows, DeviceBuffer) and rows.info.dtype == self.info.dtype
        (_, heads, capacity, width), count = self.info.shape, rows.info.shape[2]
        assert 0 <= slot <= capacity - count
        row = width * self._dtype.itemsize
        # head by head: `count` rows lie together in both, a head's stride apart
        self._cuda.call(
            "cudaMemcpy2DAsync",
            self.address + slot * row,
            capacity * row,
            rows.address,
            count * row,
            count * row,
            heads,
            self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice,
            self._cuda.stream,
        )


def _at(address: int, size: int) -> Array:
    """Host memory as bytes."""
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class Scratch:
    """Working memory of all engines, which run one after the other: as large as the largest needs."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._wanted = cuda, ALIGNMENT
        self._memory: DeviceBuffer | None = None

    def reserve(self, size: int) -> None:
        self._wanted = max(self._wanted, size)

    def memory(self) -> tuple[int, int]:
        """Address and size; an engine opened after the first run may make it a larger one."""
        if self._memory is None or self._memory.info.shape[0] * 8 < self._wanted:
            self._cuda.wait()
            self._memory = None
            self._memory = DeviceBuffer(self._cuda, TensorInfo("scratch", "int64", (-(-self._wanted // 8),)))
        return self._memory.address, self._memory.info.shape[0] * 8


class TrtSession:
    """An execution context, its addresses set once. `replay` makes a CUDA graph of the second run."""

    def __init__(self, name: str, context: Any, cuda: Cuda, scratch: Scratch, log: Log, *, replay: bool) -> None:
        self._name, self._context, self._cuda, self._scratch, self._log = name, context, cuda, scratch, log
        self._memory = (0, 0)
        self._graph: _CudaGraph | None = None
        self._warm, self._replay = False, replay
        self.after_first: Callable[[], None] | None = None
        self.buffers: tuple[DeviceBuffer, ...] = ()  # kept as long as their addresses are

    def run(self) -> None:
        memory = self._scratch.memory()
        if memory != self._memory:
            self._context.set_device_memory(*memory)
            self._memory, self._graph, self._warm = memory, None, False
        if self._graph is None and self._warm and self._replay:
            self._graph = self._captured()
            self._replay = self._graph is not None
        if self._graph is not None:
            self._cuda.call("cudaGraphLaunch", self._graph.handle, self._cuda.stream)
        else:
            self._enqueue()
        self._cuda.wait()
        if not self._warm and self.after_first is not None:
            self.after_first()
        self._warm = True

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise DeviceError(f"{self._name}: TensorRT did not run it ({self._log.last()}); see `lvlm-edge doctor`")

    def _captured(self) -> _CudaGraph | None:
        """The run as a CUDA graph, not yet launched; None where this engine or driver cannot."""
        can = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX
        if can is not None and not can(self._cuda.stream):
            return None
        modes = self._cuda.runtime.cudaStreamCaptureMode
        try:
            self._cuda.call("cudaStreamBeginCapture", self._cuda.stream, modes.cudaStreamCaptureModeThreadLocal)
            try:
                taken = self._context.execute_async_v3(self._cuda.stream)
            finally:  # a stream left capturing would take nothing else
                graph = self._cuda.call("cudaStreamEndCapture", self._cuda.stream)
            try:
                made = _CudaGraph(self._cuda, self._cuda.call("cudaGraphInstantiate", graph, 0)) if taken else None
            finally:
                self._cuda.call("cudaGraphDestroy", graph)
        except _CudaError as error:
            if error.code not in CAPTURE_ERRORS:
                raise
            # the status that it returns is the error that it clears
            self._cuda.runtime.cudaGetLastError()
            return None
        return made


class _CudaGraph:
    """An executable CUDA graph."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self.handle = handle
        cuda.owned(self, "cudaGraphExecDestroy", handle)


@dataclass(frozen=True)
class Log:
    """What TensorRT complained about, and the logger that it is handed."""

    messages: list[str]
    logger: Any

    def last(self) -> str:
        return " ".join(self.messages[-1].split())[:300] if self.messages else "it does not say why"


class TrtBackend:
    """Engines of one flavour on the current CUDA device."""

    def __init__(self, name: str, module: Any, runtime: Any) -> None:
        self.name, self._module = name, module
        self._cuda = Cuda(runtime)
        self._scratch = Scratch(self._cuda)
        self._log = _logger(module)
        self._runtime: Any = None
        self._engines: dict[str, tuple[Any, Path, dict[str, str]]] = {}

    def allocate(self, info: TensorInfo) -> DeviceBuffer:
        """A zeroed buffer.

        Raises:
            DeviceError: the device has not that much memory.
        """
        return DeviceBuffer(self._cuda, info)

    def open(self, bundle: Bundle, graph: Graph, buffers: Mapping[str, Buffer]) -> Session:
        """The engine of a graph, bound to its buffers; graphs of one file share their engine, and with it the weights.

        The engine of `NAME.onnx` is in `engines/<backend>/` beside it.

        Raises:
            BundleError: there is no engine of this graph that was built here, or it is not what was built.
            DeviceError: TensorRT has no context for it, for want of memory say.
        """
        wrong = Wrong(bundle.folder, self.name)
        if graph.file not in self._engines:
            self._engines[graph.file] = self._engine(bundle, graph.file, wrong)
        engine, plan, aliases = self._engines[graph.file]
        shared = bundle.manifest.graphs_of(graph.file)
        bound = _bind(engine, graph, buffers, aliases, plan.name, wrong)
        context, keep = _context(self._module, engine, plan.with_suffix(".jit"))
        if context is None:
            raise DeviceError(f"{plan}: TensorRT has no context for it ({self._log.last()}); see `lvlm-edge doctor`")
        if len(shared) > 1:
            self._choose(context, shared.index(graph), engine, bound, plan)
        for name, buffer in bound.items():
            if not context.set_tensor_address(name, buffer.address):
                raise DeviceError(f"{plan}: TensorRT does not take the address of {name} ({self._log.last()})")
        self._scratch.reserve(int(engine.device_memory_size_v2))
        replay = graph.role == "decode"
        session = TrtSession(graph.name, context, self._cuda, self._scratch, self._log, replay=replay)
        session.after_first, session.buffers = keep, tuple(bound.values())
        return session

    def _engine(self, bundle: Bundle, file: str, wrong: Wrong) -> tuple[Any, Path, dict[str, str]]:
        """The engine of a file, the path of its plan, and which outputs it writes over which inputs."""
        version, capability = self._module.__version__, self._cuda.capability
        entry = _entry(bundle, file, self.name, version, capability, wrong)
        plan = bundle.folder / "engines" / self.name / entry["file"]
        with _checked_plan(plan, entry, wrong) as content:
            if self._runtime is None:
                self._runtime = self._module.Runtime(self._log.logger)
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise wrong(plan.name, f"TensorRT does not load it ({self._log.last()})")
        return engine, plan, entry["aliases"]

    def _choose(self, context: Any, profile: int, engine: Any, bound: Mapping[str, DeviceBuffer], plan: Path) -> None:
        """Set a context's optimization profile, and with it the sizes that the engine leaves open."""
        inputs = [name for name, buffer in bound.items() if -1 in engine.get_tensor_shape(name)]
        taken = context.set_optimization_profile_async(profile, self._cuda.stream)
        for name in inputs:
            if engine.get_tensor_mode(name) == self._module.TensorIOMode.INPUT:
                taken = taken and context.set_input_shape(name, bound[name].info.shape)
        if not taken:
            raise DeviceError(f"{plan}: TensorRT does not take profile {profile} ({self._log.last()})")


@dataclass(frozen=True)
class Wrong:
    """Makes the error for an engine that cannot be used, with the command that builds one that can."""

    folder: Path
    backend: str

    def __call__(self, what: str, found: str) -> BundleError:
        return BundleError(
            f"{self.backend}: {what}: {found}; run lvlm-edge build {self.folder} --device NAME on this device "
            "(names: lvlm-edge devices)"
        )


def _entry(
    bundle: Bundle, file: str, backend: str, version: str, capability: tuple[int, int], wrong: Wrong
) -> dict[str, Any]:
    """What `engines.json` says of a file's engine, once everything it says of this machine and bundle is true."""
    manifest = bundle.manifest
    record = _record(bundle.folder / "engines" / backend / ENGINES, wrong)
    here = f"{sys.platform}-{platform.machine()}"
    weights, source = manifest.files[manifest.weights].sha256, manifest.files[file].sha256
    for key, what, mine in (
        ("flavour", "engines are of", MODULES[backend]),
        ("version", f"engines were built by {MODULES[backend]}", version),
        ("platform", "engines were built on", here),
    ):
        if record.get(key) != mine:
            raise wrong(ENGINES, f"{what} {record.get(key)!r}, this machine has {mine!r}")
    settings = record.get("settings")
    targets = settings.get("compute_capabilities") if isinstance(settings, dict) else None
    own = "{}.{}".format(*capability)
    portable = backend == "trt-rtx" and capability >= (8, 0)
    if not isinstance(targets, list) or not (own in targets or (portable and PORTABLE in targets)):
        raise wrong(ENGINES, f"engines are for compute capability {targets}, this GPU has {own}")
    if record.get("weights_sha256") != weights:
        raise wrong(ENGINES, "engines were built from other weights than the bundle's")
    entry = record["engines"].get(file)
    if not isinstance(entry, dict):
        raise wrong(ENGINES, f"lists no engine of {file}, and one that is not listed is not opened")
    name, aliases = entry.get("file"), entry.get("aliases")
    if not isinstance(name, str) or not name or Path(name).name != name or not isinstance(aliases, dict):
        raise wrong(ENGINES, f"what it says of {file} cannot be read")
    if entry.get("graph_sha256") != source:
        raise wrong(name, f"was built from another {file} than the bundle's")
    return entry


def _record(path: Path, wrong: Wrong) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise wrong(str(path), "is not there, so no engine was built") from None
    except (OSError, RecursionError, ValueError) as error:
        raise wrong(str(path), f"cannot be read ({error})") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA or not isinstance(record.get("engines"), dict):
        raise wrong(str(path), f"schema is {schema!r}, expected {SCHEMA}")
    return dict(record)


@contextlib.contextmanager
def _checked_plan(path: Path, entry: dict[str, Any], wrong: Wrong) -> Iterator[memoryview]:
    """A plan's bytes, mapped, which are those that were built: what is hashed is what TensorRT then reads."""
    try:
        if path.is_symlink():
            raise wrong(path.name, "is a link, expected the file that was built")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.get("size") or size == 0:
                raise wrong(path.name, f"has {size} bytes, {ENGINES} says {entry.get('size')}")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise wrong(path.name, f"cannot be read ({error.strerror})") from error
    with mapped, memoryview(mapped) as content:
        if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
            raise wrong(path.name, f"was altered (its sha256 is not that in {ENGINES})")
        yield content


def _bind(
    engine: Any, graph: Graph, buffers: Mapping[str, Buffer], aliases: dict[str, str], what: str, wrong: Wrong
) -> dict[str, DeviceBuffer]:
    """The buffer of each of the engine's tensors, which agree with the manifest and share memory where they must."""
    bound: dict[str, DeviceBuffer] = {}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        buffer = buffers.get(name)
        assert buffer is None or isinstance(buffer, DeviceBuffer)
        dtype = engine.get_tensor_dtype(name).name
        wanted = None if buffer is None else (buffer.info.dtype, buffer.info.shape)
        shape = tuple(engine.get_tensor_shape(name))
        if wanted is not None and len(shape) == len(wanted[1]):  # -1: a size that the engine leaves open
            shape = tuple(w if s == -1 else s for s, w in zip(shape, wanted[1], strict=True))
        found = (DTYPES.get(dtype, dtype), shape)
        if buffer is None or found != wanted:
            raise wrong(what, f"{name!r} is {found}, the manifest says {wanted}")
        bound[name] = buffer
    missing = [name for info in graph.outputs if (name := graph.names.get(info.name, info.name)) not in bound]
    if missing:
        raise wrong(what, f"has no output {missing[0]!r}")
    says = getattr(engine, "get_aliased_input_tensor", None)  # since 10.15
    for name in (graph.names.get(info.name, info.name) for info in graph.outputs):
        source = aliases.get(name)
        if says is not None and (says(name) or None) != source:
            raise wrong(what, f"{name!r} is written over {says(name)}, {ENGINES} says {source}")
        if source is not None and (source not in bound or bound[source].address != bound[name].address):
            raise wrong(what, f"{name!r} is written over {source!r}, but the bundle keeps them apart")
    return bound


def _context(module: Any, engine: Any, cache_path: Path) -> tuple[Any, Callable[[], None] | None]:
    """A context whose scratch memory is ours; for TensorRT-RTX also what saves its compiled kernels after a run."""
    strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
    config = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
    if not hasattr(config, "create_runtime_cache"):
        return engine.create_execution_context(strategy), None
    assert config is not None
    config.set_execution_context_allocation_strategy(strategy)
    cache = config.create_runtime_cache()
    with contextlib.suppress(OSError):
        cache.deserialize(cache_path.read_bytes())  # one of another driver or GPU is left alone
    config.set_runtime_cache(cache)
    return engine.create_execution_context(config), lambda: _keep(cache, cache_path)


def _keep(cache: Any, path: Path) -> None:
    """Save compiled kernels for the next process, if there are new ones and the folder can be written."""
    blob = cache.serialize()
    content = b"" if blob is None else bytes(blob)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        if not content or (path.is_file() and path.read_bytes() == content):
            return
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _logger(module: Any) -> Log:
    """A logger that keeps errors to itself: stderr belongs to our one line."""
    messages: list[str] = []

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= module.ILogger.Severity.ERROR:
                messages.append(message)

    return Log(messages, Logger())


def create(threads: int | None = None, *, backend: str = "trt") -> TrtBackend:
    """The backend.

    Args:
        threads: must be None; the GPU has its own.
        backend: `trt` or `trt-rtx`.

    Raises:
        UnsupportedError: a library is not installed or does not load.
        UsageError: threads are given.
        DeviceError: there is no GPU, or CUDA cannot use it.
    """
    if threads is not None:
        raise UsageError(f"{backend}: takes no number of threads, since it runs on the GPU; leave --threads out")
    return TrtBackend(backend, _load(backend, MODULES[backend]), _load(backend, "cuda.bindings.runtime"))


def _load(backend: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # with its own libraries missing, the import can raise anything
        absent = isinstance(error, ModuleNotFoundError)
        reason = "is not installed" if absent else f"does not load ({' '.join(str(error).split())[:200]})"
        raise UnsupportedError(f"{backend}: {module} {reason}; {INSTALL[backend]}") from error

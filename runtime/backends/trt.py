"""TensorRT and TensorRT-RTX: one API under two module names; numpy and cuda.bindings around it.

A plan is executable code, and TensorRT sees only those that `runtime.cuda.engines` has proved. Caches live on the
device and are written in place; lengths are device tensors, so that decode never changes its addresses and is replayed
as one CUDA graph.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_edge.runtime.backends import Buffer, Session
from lvlm_edge.runtime.backends.cuda import highest
from lvlm_edge.runtime.backends.cuda.device import Cuda, CudaError, DeviceBuffer, DeviceInputs, Scratch, library
from lvlm_edge.runtime.backends.cuda.engines import ENGINES, MODULES, Wrong, checked_plan, entry_of, folder
from lvlm_edge.runtime.bundle import Bundle, Graph, TensorInfo
from lvlm_edge.runtime.bundle.replacing import replacing
from lvlm_edge.runtime.errors import DeviceError, UsageError

INSTALL = {
    "trt": "pip install tensorrt cuda-bindings (on a Jetson: TensorRT comes with JetPack)",
    "trt-rtx": "pip install tensorrt-rtx cuda-bindings",
}
DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}
CAPTURE_ERRORS = range(900, 909)  # cudaErrorStreamCaptureUnsupported and its kin: this work cannot be captured


class TrtSession:
    """An execution context, its addresses set once. `replay` makes a CUDA graph of the second run."""

    def __init__(self, name: str, context: Any, cuda: Cuda, scratch: Scratch, log: Log, *, replay: bool) -> None:
        self._name, self._context, self._cuda, self._scratch, self._log = name, context, cuda, scratch, log
        self._memory = (0, 0)
        self._graph: _CudaGraph | None = None
        self._warm, self._replay = False, replay
        self.after_first: Callable[[], None] | None = None
        self.buffers: tuple[DeviceBuffer, ...] = ()  # kept as long as their addresses are

    def run(self, rows: int | None = None) -> None:
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
        except CudaError as error:
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

    def __init__(self, name: str, module: Any, runtime: Any, base: Path | None) -> None:
        self.name, self._module, self._base = name, module, base
        self._cuda = Cuda(runtime)
        self._scratch = Scratch(self._cuda)
        self._log = _logger(module)
        self._runtime: Any = None
        self._engines: dict[str, tuple[Any, Path, dict[str, str]]] = {}

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

    def open(self, bundle: Bundle, graph: Graph, buffers: Mapping[str, Buffer]) -> Session:
        """The engine of a graph, bound to its buffers; graphs of one file share their engine, and with it the weights.

        The engine of `NAME.onnx` is in the folder that `cuda.engines.folder` names.

        Raises:
            BundleError: there is no engine of this graph that was built here, or it is not what was built.
            DeviceError: TensorRT has no context for it, for want of memory say.
        """
        source = bundle.manifest.files[graph.file].sha256
        return self._session(bundle, graph, source, buffers, replay=graph.role == "decode")

    def finder(self, bundle: Bundle, logits: Buffer) -> highest.OnDevice | None:
        """The highest logits' graph as an engine of its own, replayed as a CUDA graph like decode.

        Raises:
            BundleError: see `open`.
            DeviceError: see `open`.
        """
        assert isinstance(logits, DeviceBuffer)
        info = highest.row_of(logits.info)
        if info is None or self._cuda.properties.integrated:  # which share their memory with the host
            return None
        graph = Graph(name="highest", file=highest.FILE, role="", inputs=(logits.info,), outputs=(info,), names={})
        row, source = self.allocate(info, host=True), hashlib.sha256(highest.graph(logits.info.shape[-1])).hexdigest()
        session = self._session(bundle, graph, source, {"logits": logits, "highest": row}, replay=True)
        return highest.OnDevice(session, row)

    def _session(
        self, bundle: Bundle, graph: Graph, source: str, buffers: Mapping[str, Buffer], *, replay: bool
    ) -> TrtSession:
        """An engine bound to buffers.

        Args:
            source: sha256 of the graph's file.
            replay: whether it is made a CUDA graph.
        """
        wrong = Wrong(bundle.folder, self.name)
        if graph.file not in self._engines:
            self._engines[graph.file] = self._engine(bundle, graph.file, source, wrong)
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
        session = TrtSession(graph.name, context, self._cuda, self._scratch, self._log, replay=replay)
        session.after_first, session.buffers = keep, tuple(bound.values())
        return session

    def _engine(self, bundle: Bundle, file: str, source: str, wrong: Wrong) -> tuple[Any, Path, dict[str, str]]:
        """The engine of a file, the path of its plan, and which outputs it writes over which inputs."""
        version, capability = self._module.__version__, self._cuda.capability
        place = folder(bundle, self.name, self._base)
        entry = entry_of(bundle, file, source, place=place, version=version, capability=capability, wrong=wrong)
        plan = place / entry["file"]
        with checked_plan(plan, entry, wrong) as content:
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
    with contextlib.suppress(OSError):
        if not content or (path.is_file() and path.read_bytes() == content):
            return
        with replacing(path, 0o600) as partial:
            partial.write_bytes(content)


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


def create(threads: int | None = None, *, engines: str | Path | None = None, backend: str = "trt") -> TrtBackend:
    """The backend.

    Args:
        threads: must be None; the GPU has its own.
        engines: folder of all engines, where it is not this user's own; what is in it is code that will be run.
        backend: `trt` or `trt-rtx`.

    Raises:
        UnsupportedError: a library is not installed or does not load.
        UsageError: threads are given.
        DeviceError: there is no GPU, or CUDA cannot use it.
    """
    if threads is not None:
        raise UsageError(f"{backend}: takes no number of threads, since it runs on the GPU; leave --threads out")
    base = None if engines is None else Path(engines)
    module, runtime = (library(backend, name, INSTALL[backend]) for name in (MODULES[backend], "cuda.bindings.runtime"))
    return TrtBackend(backend, module, runtime, base)

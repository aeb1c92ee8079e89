"""A double of TensorRT and the CUDA runtime: device memory is host memory, an engine names an ONNX graph.

Strict where the real ones are silently wrong: work on a stream happens when the stream is waited for, every pointer
must lie in memory that is allocated then, freed memory is poisoned, scratch memory is scribbled over by every run.
What a caller may not do is an AssertionError here, since no status of CUDA reports it reliably.
"""

from __future__ import annotations

import enum
import functools
import itertools
import json
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_edge.runtime.backends import from_bfloat16, to_bfloat16

MAGIC = b"double"
KINDS = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
WIDE = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "BF16": np.uint16}

# `cudaError_t` of cuda-bindings 12.9 and 13.5: the numbers CUDA's own documentation gives.
CODES = {
    "cudaSuccess": 0,
    "cudaErrorInvalidValue": 1,
    "cudaErrorMemoryAllocation": 2,
    "cudaErrorInitializationError": 3,
    "cudaErrorCudartUnloading": 4,
    "cudaErrorInvalidPitchValue": 12,
    "cudaErrorInvalidMemcpyDirection": 21,
    "cudaErrorInsufficientDriver": 35,
    "cudaErrorDevicesUnavailable": 46,
    "cudaErrorNoDevice": 100,
    "cudaErrorInvalidDevice": 101,
    "cudaErrorNoKernelImageForDevice": 209,
    "cudaErrorECCUncorrectable": 214,
    "cudaErrorOperatingSystem": 304,
    "cudaErrorInvalidResourceHandle": 400,
    "cudaErrorIllegalState": 401,
    "cudaErrorNotReady": 600,
    "cudaErrorIllegalAddress": 700,
    "cudaErrorLaunchOutOfResources": 701,
    "cudaErrorLaunchTimeout": 702,
    "cudaErrorContextIsDestroyed": 709,
    "cudaErrorMisalignedAddress": 716,
    "cudaErrorLaunchFailure": 719,
    "cudaErrorNotPermitted": 800,
    "cudaErrorNotSupported": 801,
    "cudaErrorStreamCaptureUnsupported": 900,
    "cudaErrorStreamCaptureInvalidated": 901,
    "cudaErrorStreamCaptureMerge": 902,
    "cudaErrorStreamCaptureUnmatched": 903,
    "cudaErrorStreamCaptureUnjoined": 904,
    "cudaErrorStreamCaptureIsolation": 905,
    "cudaErrorStreamCaptureImplicit": 906,
    "cudaErrorCapturedEvent": 907,
    "cudaErrorStreamCaptureWrongThread": 908,
    "cudaErrorTimeout": 909,
    "cudaErrorUnknown": 999,
}
Status = enum.IntEnum("cudaError_t", CODES)  # type: ignore[misc]


def plan(graph: Path, **changed: Any) -> bytes:
    """The bytes of an engine.

    Args:
        graph: ONNX file.
        changed: `scratch` (bytes), `aliases` (output to input), `bfloat16` (names of float32
            tensors that are bfloat16 outside), `profiles` (how many).
    """
    return MAGIC + json.dumps({"graph": str(graph), "scratch": 1000, "aliases": {}} | changed).encode()


class Machine:
    """One GPU and its libraries, with counts of what was asked of them.

    Attributes:
        fail: calls that fail once: name to status; `skip` counts calls of that name that go well before.
    """

    def __init__(
        self,
        *,
        capability: tuple[int, int] = (8, 9),
        integrated: bool = False,
        version: str = "1.7.1",
        modern: bool = True,
        jit: bool = False,
        capturable: bool | None = None,
    ) -> None:
        self.capability, self.integrated, self.version = capability, integrated, version
        self.modern, self.jit, self.capturable = modern, jit, capturable
        self.driver = 13000
        self.calls: Counter[str] = Counter()
        self.copied: list[tuple[str, int]] = []  # copies between host and device: the way and the bytes
        self.fail: dict[str, int] = {}
        self.skip: dict[str, int] = {}
        self.memory: dict[int, Any] = {}  # base address to bytes
        self.kinds: dict[int, str] = {}
        self.freed: list[Any] = []
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.handles: dict[int, Any] = {}
        self.names = itertools.count(0x1000)
        self.scratch: list[tuple[int, int]] = []
        self.jit_loaded: list[bytes] = []
        self.refuse_load = self.refuse_run = self.refuse_context = self.refuse_address = False

    def install(self, patch: Any, module: str) -> Machine:
        """Put the double in the place of the libraries."""
        cuda, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
        runtime = CudaRuntime(self)
        cuda.bindings, bindings.runtime = bindings, runtime  # type: ignore[attr-defined]
        for name, value in (("cuda", cuda), ("cuda.bindings", bindings), ("cuda.bindings.runtime", runtime)):
            patch.setitem(__import__("sys").modules, name, value)
        patch.setitem(__import__("sys").modules, module, tensorrt(self))
        return self

    def take(self, size: int, kind: str) -> int:
        array = np.full(size + 256, 0xCD, np.uint8)
        base = array.ctypes.data + -array.ctypes.data % 256
        self.memory[base], self.kinds[base] = array[base - array.ctypes.data :][:size], kind
        return base

    def give_back(self, base: int, kind: str) -> None:
        assert self.kinds.get(base) == kind, f"{base:#x} is no {kind} memory"
        self.run_queue()  # freeing waits for the device
        self.memory[base][...] = 0xDE
        self.freed.append(self.memory.pop(base))
        del self.kinds[base]

    def at(self, address: int, size: int) -> Any:
        """Allocated device memory as bytes."""
        for base, content in self.memory.items():
            if base <= address and address + size <= base + len(content):
                return content[address - base :][:size]
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated")

    def enqueue(self, work: Callable[[], None]) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def run_queue(self) -> None:
        work, self.queue = self.queue, []
        for piece in work:
            piece()


class CudaRuntime(types.ModuleType):
    """`cuda.bindings.runtime`: functions return a status and values."""

    cudaStreamNonBlocking = 1
    cudaHostAllocMapped = 2
    cudaMemcpyKind = types.SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, machine: Machine) -> None:
        super().__init__("cuda.bindings.runtime")
        self._machine = machine

    def __getattr__(self, name: str) -> Any:
        function = getattr(Functions, name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            machine = self._machine
            machine.calls[name] += 1
            if name in machine.fail and machine.calls[name] > machine.skip.get(name, 0):
                if name == "cudaStreamEndCapture":
                    machine.recording = None
                if name == "cudaStreamSynchronize":
                    machine.queue.clear()  # what was on its way is lost
                return Status(machine.fail.pop(name)), None
            values = function(machine, *arguments)
            if isinstance(values, Status):
                return (values,)
            return (Status.cudaSuccess,) if values is None else (Status.cudaSuccess, values)

        return call


class Functions:
    """What the functions do; a stream is any stream but 0."""

    def cudaDriverGetVersion(m: Machine) -> int:
        return m.driver

    def cudaGetDevice(m: Machine) -> int:
        return 0

    def cudaGetDeviceProperties(m: Machine, device: int) -> Any:
        major, minor = m.capability
        return types.SimpleNamespace(major=major, minor=minor, integrated=int(m.integrated))

    def cudaStreamCreateWithFlags(m: Machine, flags: int) -> int:
        return m.take(1, "stream")

    def cudaStreamDestroy(m: Machine, stream: int) -> None:
        m.give_back(stream, "stream")

    def cudaStreamSynchronize(m: Machine, stream: int) -> None:
        assert m.kinds[stream] == "stream" and m.recording is None
        m.run_queue()

    def cudaMalloc(m: Machine, size: int) -> int:
        return m.take(size, "device")

    def cudaFree(m: Machine, address: int) -> None:
        m.give_back(address, "device")

    def cudaHostAlloc(m: Machine, size: int, flags: int) -> int:
        assert flags == CudaRuntime.cudaHostAllocMapped
        return m.take(size, "host")

    def cudaHostGetDevicePointer(m: Machine, address: int, flags: int) -> int:
        assert m.kinds[address] == "host" and flags == 0
        return address

    def cudaFreeHost(m: Machine, address: int) -> None:
        m.give_back(address, "host")

    def cudaMemsetAsync(m: Machine, address: int, value: int, count: int, stream: int) -> None:
        m.enqueue(lambda: m.at(address, count).fill(value))

    def cudaMemcpyAsync(m: Machine, target: int, source: int, size: int, kind: int, stream: int) -> None:
        import ctypes

        device = {1: target, 2: source}[kind]
        m.copied.append(({1: "in", 2: "out"}[kind], size))
        m.enqueue(lambda: (m.at(device, size), ctypes.memmove(target, source, size)))

    def cudaMemcpy2DAsync(
        m: Machine,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
        kind: int,
        stream: int,
    ) -> None:
        assert kind == 3 and width <= min(target_pitch, source_pitch)

        def work() -> None:
            for row in range(height):
                m.at(target + row * target_pitch, width)[...] = m.at(source + row * source_pitch, width)

        m.enqueue(work)

    def cudaStreamBeginCapture(m: Machine, stream: int, mode: int) -> None:
        assert m.kinds[stream] == "stream" and m.recording is None and mode == 1
        m.recording = []

    def cudaStreamEndCapture(m: Machine, stream: int) -> int:
        assert m.recording is not None
        handle = m.take(1, "graph")
        m.handles[handle], m.recording = m.recording, None
        return handle

    def cudaGraphInstantiate(m: Machine, graph: int, flags: int) -> int:
        assert m.kinds[graph] == "graph" and m.handles[graph] and flags == 0
        handle = m.take(1, "executable")
        m.handles[handle] = m.handles[graph]
        return handle

    def cudaGraphDestroy(m: Machine, graph: int) -> None:
        m.give_back(graph, "graph")

    def cudaGraphExecDestroy(m: Machine, graph: int) -> None:
        m.give_back(graph, "executable")

    def cudaGraphLaunch(m: Machine, graph: int, stream: int) -> None:
        assert m.kinds[graph] == "executable" and m.kinds[stream] == "stream"
        for work in m.handles[graph]:
            m.enqueue(work)

    def cudaGetLastError(m: Machine) -> Any:
        return Status.cudaErrorUnknown  # it returns the error that it clears


@functools.lru_cache(maxsize=64)
def session(path: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT64 = range(4)


class Engine:
    """An ONNX graph under the names of `ICudaEngine`."""

    def __init__(self, machine: Machine, content: bytes) -> None:
        assert content.startswith(MAGIC)
        self._machine, self._said = machine, json.loads(content[len(MAGIC) :])
        self.session = session(self._said["graph"])
        inputs = self.session.get_inputs()
        self.inputs = {t.name for t in inputs}
        self.tensors = {t.name: t for t in (*inputs, *self.session.get_outputs())}
        self.device_memory_size_v2 = self._said["scratch"]
        self.num_io_tensors = len(self.tensors)
        self.aliases, self.profiles = self._said["aliases"], self._said.get("profiles", 1)
        if machine.modern:
            self.get_aliased_input_tensor = self.aliases.get
        if machine.jit:
            self.create_runtime_config = lambda: RuntimeConfig(machine)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(size, str) else size for size in self.tensors[name].shape)

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> DataType:
        found = KINDS[self.tensors[name].type]
        return DataType["BF16" if name in self._said.get("bfloat16", ()) else found]

    def create_execution_context(self, how: Any) -> Any:
        strategy = how.strategy if isinstance(how, RuntimeConfig) else how
        assert strategy == "user managed"
        return None if self._machine.refuse_context else Context(self._machine, self)


class RuntimeConfig:
    """`IRuntimeConfig` of TensorRT-RTX, with its cache of compiled kernels."""

    def __init__(self, machine: Machine) -> None:
        self.strategy, self.cache, self._machine = "", None, machine

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        loaded = self._machine.jit_loaded
        return types.SimpleNamespace(serialize=lambda: b"kernels", deserialize=loaded.append)

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class Context:
    """`IExecutionContext`."""

    def __init__(self, machine: Machine, engine: Engine) -> None:
        self._machine, self._engine = machine, engine
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._profile: int | None = None
        self._sizes: dict[str, int] = {}  # of the dimensions that the engine leaves open
        if machine.capturable is not None:
            self.is_stream_capturable = lambda stream: machine.capturable

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0 and size >= self._engine.device_memory_size_v2
        self._machine.at(address, size)
        self._machine.scratch.append((address, size))
        self._scratch = (address, self._engine.device_memory_size_v2)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert self._machine.kinds[stream] == "stream" and 0 <= profile < self._engine.profiles
        self._profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None and name in self._engine.inputs
        planned = self._engine.tensors[name].shape
        assert len(shape) == len(planned)
        self._sizes |= {size: given for size, given in zip(planned, shape, strict=True) if isinstance(size, str)}
        return True

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._sizes[n] if isinstance(n, str) else n for n in self._engine.tensors[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._machine.calls["set_tensor_address"] += 1
        assert name in self._engine.tensors
        self._machine.at(address, 1)
        self._addresses[name] = address
        return not self._machine.refuse_address

    def execute_async_v3(self, stream: int) -> bool:
        machine = self._machine
        machine.calls["execute_async_v3"] += 1
        assert machine.kinds[stream] == "stream"
        if machine.refuse_run:
            return False
        assert set(self._addresses) == set(self._engine.tensors), "an address is not set"
        for output, source in self._engine.aliases.items():
            assert self._addresses[output] == self._addresses[source], f"{output} is not where {source} is"
        assert self._scratch != (0, 0), "no scratch memory"
        addresses, scratch = dict(self._addresses), self._scratch
        machine.enqueue(lambda: self._execute(addresses, scratch))
        return True

    def _execute(self, addresses: dict[str, int], scratch: tuple[int, int]) -> None:
        engine, machine = self._engine, self._machine
        machine.at(*scratch)[...] = 0xA5
        arrays = {}
        for name, address in addresses.items():
            dtype = np.dtype(WIDE[engine.get_tensor_dtype(name).name])
            shape = self.shape(name)
            arrays[name] = machine.at(address, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
        outputs = [name for name in arrays if name not in engine.inputs]
        if engine._said.get("bfloat16"):
            wide = {n: from_bfloat16(arrays[n]) if arrays[n].dtype == np.uint16 else arrays[n] for n in engine.inputs}
            for name, value in zip(outputs, engine.session.run(outputs, wide), strict=True):
                arrays[name][...] = to_bfloat16(value) if arrays[name].dtype == np.uint16 else value
            return
        binding = engine.session.io_binding()
        for name, array in arrays.items():
            bind = binding.bind_input if name in engine.inputs else binding.bind_output
            bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        engine.session.run_with_iobinding(binding)


def tensorrt(machine: Machine) -> types.ModuleType:
    """The module `tensorrt` or `tensorrt_rtx`, as far as the backend touches it."""
    module: Any = types.ModuleType("tensorrt")
    severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)  # type: ignore[misc]

    class ILogger:
        Severity = severity

    class Runtime:
        def __init__(self, logger: Any) -> None:
            machine.calls["Runtime"] += 1
            self._logger = logger

        def deserialize_cuda_engine(self, content: memoryview) -> Engine | None:
            machine.calls["deserialize_cuda_engine"] += 1
            assert isinstance(content, memoryview)
            if machine.refuse_load:
                self._logger.log(severity.ERROR, "no kernel\nimage")
                self._logger.log(severity.INFO, "noise")
                return None
            return Engine(machine, bytes(content))

    module.ILogger, module.Runtime, module.__version__ = ILogger, Runtime, machine.version
    module.TensorIOMode = types.SimpleNamespace(INPUT="input")
    module.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user managed")
    return module  # type: ignore[no-any-return]

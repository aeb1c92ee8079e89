"""The CUDA runtime of one device and one stream, and memory on it; every return code is checked."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lvlm_edge.runtime.backends import Array, Buffer, from_bfloat16, numpy_dtype, to_bfloat16
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.errors import DeviceError, UnsupportedError

ALIGNMENT = 256  # bytes, of memory that is not an allocation's begin


def library(backend: str, module: str, install: str) -> Any:
    """A module that a backend needs.

    Args:
        install: what to do where it is missing.

    Raises:
        UnsupportedError: it is not installed or does not load.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # with its own libraries missing, the import can raise anything
        absent = isinstance(error, ModuleNotFoundError)
        reason = "is not installed" if absent else f"does not load ({' '.join(str(error).split())[:200]})"
        raise UnsupportedError(f"{backend}: {module} {reason}; {install}") from error


class Cuda:
    """The CUDA runtime of one device and one stream, every return code checked."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self.device = int(self.call("cudaGetDevice"))
        self.properties = self.call("cudaGetDeviceProperties", self.device)
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
            raise CudaError(name, status)
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


class CudaError(DeviceError):
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
    """Device memory; on integrated GPUs, what the host touches is host memory that the device sees.

    Args:
        host: whether the host reads or writes it.
        inside: a buffer of bytes that it is a part of, and where it begins there.

    Raises:
        DeviceError: the device has not that much memory.
    """

    def __init__(
        self, cuda: Cuda, info: TensorInfo, *, host: bool = False, inside: tuple[DeviceBuffer, int] | None = None
    ) -> None:
        self.info, self._cuda, self._inside = info, cuda, inside
        self._dtype = numpy_dtype(info.dtype)
        self._size = _size(info)
        self._mapped: Array | None = None
        self.address: int
        if inside is not None:
            whole, at = inside
            self.address = whole.address + at
            if whole._mapped is not None:
                part = whole._mapped.view(np.uint8)[at : at + self._size]
                self._mapped = part.view(self._dtype).reshape(info.shape)
        elif cuda.properties.integrated and host:
            memory = int(cuda.call("cudaHostAlloc", self._size, int(cuda.runtime.cudaHostAllocMapped)))
            cuda.owned(self, "cudaFreeHost", memory)
            self.address = int(cuda.call("cudaHostGetDevicePointer", memory, 0))
            self._mapped = _at(memory, self._size).view(self._dtype).reshape(info.shape)
            self._mapped[...] = 0
        else:
            self.address = int(cuda.call("cudaMalloc", self._size))
            cuda.owned(self, "cudaFree", self.address)
            cuda.call("cudaMemsetAsync", self.address, 0, self._size, cuda.stream)

    def write(self, values: Array) -> None:
        if self._mapped is not None:
            self._mapped[...] = self.encoded(values)
            return
        host = np.empty(self.info.shape, self._dtype)
        host[...] = self.encoded(values)
        self._cuda.copy(self.address, host.ctypes.data, self._size, "HostToDevice")

    def encoded(self, values: Array) -> Array:
        """Values as the host hands them to the buffer; numpy converts all dtypes but bfloat16."""
        return to_bfloat16(values) if self.info.dtype == "bfloat16" else values

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


class DeviceInputs:
    """Buffers side by side in device memory, which one copy fills.

    Raises:
        DeviceError: the device has not that much memory.
    """

    def __init__(self, cuda: Cuda, infos: Sequence[TensorInfo]) -> None:
        self._begins, size = dict[TensorInfo, int](), 0
        for info in infos:
            self._begins[info] = size
            size += -(-_size(info) // ALIGNMENT) * ALIGNMENT
        self._whole = DeviceBuffer(cuda, TensorInfo("inputs", "int64", (size // 8,)), host=True)
        self.buffers = {i: DeviceBuffer(cuda, i, inside=(self._whole, at)) for i, at in self._begins.items()}

    def write(self, values: Mapping[TensorInfo, Array]) -> None:
        host = np.zeros(self._whole.info.shape, np.int64)
        for info, buffer in self.buffers.items():
            at = self._begins[info]
            part = host.view(np.uint8)[at : at + _size(info)].view(numpy_dtype(info.dtype))
            part.reshape(info.shape)[...] = buffer.encoded(values[info])
        self._whole.write(host)


def _size(info: TensorInfo) -> int:
    """Bytes of a tensor."""
    return int(np.prod(info.shape, dtype=np.int64)) * numpy_dtype(info.dtype).itemsize


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

"""ONNX Runtime on the CPU: caches updated in place through IO binding, weights mapped from the bundle's file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_edge.runtime.backends import Array, Buffer, Session
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.errors import BundleError, UnsupportedError

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class HostBuffer:
    """A numpy array that sessions read and write by address."""

    array: Array

    def write(self, values: Array) -> None:
        self.array[...] = values

    def read(self) -> Array:
        return self.array


@dataclass(frozen=True)
class OrtSession:
    """A graph and its binding."""

    session: onnxruntime.InferenceSession
    binding: Any

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)


class OrtBackend:
    """Sessions of one process."""

    name = "ort"

    def __init__(self, runtime: Any, threads: int | None) -> None:
        self._runtime, self._threads = runtime, threads

    def allocate(self, info: TensorInfo) -> HostBuffer:
        return HostBuffer(np.zeros(info.shape, np.dtype(info.dtype)))

    def open(self, path: Path, buffers: Mapping[str, Buffer]) -> Session:
        """A graph bound to its buffers.

        Raises:
            BundleError: ONNX Runtime cannot load the graph.
        """
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        try:
            session = self._runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the bindings raise their own types; the first line says what is wrong
            raise BundleError(f"{path}: ONNX Runtime cannot load it ({str(error).splitlines()[0]})") from error
        binding = session.io_binding()
        for bind, infos in ((binding.bind_input, session.get_inputs()), (binding.bind_output, session.get_outputs())):
            for info in infos:
                buffer = buffers[info.name]
                assert isinstance(buffer, HostBuffer)
                array = buffer.array
                assert list(array.shape) == info.shape, (info.name, array.shape, info.shape)
                bind(info.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return OrtSession(session, binding)


def create(threads: int | None = None) -> OrtBackend:
    """The backend.

    Args:
        threads: threads per graph; None lets ONNX Runtime take the physical cores.

    Raises:
        UnsupportedError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError("ort: onnxruntime is not installed; pip install 'lvlm-edge[ort]'") from error
    return OrtBackend(onnxruntime, threads)

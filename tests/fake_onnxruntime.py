"""A double of onnxruntime-gpu: ONNX Runtime on the CPU over the device memory of `fake_tensorrt.Machine`.

Strict where the real one is silently wrong: a graph that may fall back to the CPU, a stream that nobody made, memory
that is not the device's, a CUDA graph that is replayed over other addresses. Sessions that do not ask for CUDA are
the real ones.
"""

from __future__ import annotations

import ctypes
import sys
import types
from typing import Any

import numpy as np
import onnxruntime as real

from lvlm_edge.runtime.backends import ort_cuda
from tests import fake_tensorrt
from tests.fake_tensorrt import Status

OF_ORT = ("InferenceSession", "from_dlpack", "io_binding", "bind", "run", "capture")
DTYPES = {1: np.float32, 10: np.float16, 7: np.int64}
CODES = {(2, 32): np.float32, (2, 16): np.float16}  # DLPack's


class Machine(fake_tensorrt.Machine):
    """One GPU, with what ONNX Runtime is told of it.

    Attributes:
        fail: as the base has it; `OF_ORT` are ONNX Runtime's.
        words: by call of ONNX Runtime, what it says in place of an error of CUDA, once.
        silent: sessions run on the CPU without a word, as without CUDA's libraries.
        wheels: distributions that are installed.
        missing: shared libraries that are not there.
        sessions: those that were opened.
    """

    def __init__(self, **gpu: Any) -> None:
        super().__init__(**gpu)
        self.silent, self.version, self.cuda = False, real.__version__, "13.0"
        self.wheels, self.missing = {"onnxruntime-gpu"}, set[str]()
        self.providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        self.sessions: list[Session] = []
        self.words: dict[str, str] = {}

    def install(self, patch: Any, module: str = "onnxruntime") -> Machine:
        """Put the double in the place of the libraries."""
        super().install(patch, "tensorrt")
        patch.setitem(sys.modules, module, onnxruntime(self))
        patch.setattr(ort_cuda, "_installed", lambda name: name in self.wheels)
        patch.setattr(ort_cuda, "loads", lambda file: file not in self.missing)
        return self

    def failing(self, call: str) -> None:
        """Fail once as ONNX Runtime words an error of CUDA."""
        self.calls[call] += 1
        if call in self.words:
            raise RuntimeError(self.words.pop(call))
        if call in self.fail and self.calls[call] > self.skip.get(call, 0):
            status = Status(self.fail.pop(call))
            raise RuntimeError(
                f"Error in execution: Non-zero status code returned while running MatMul node. Status Message: CUDA "
                f"failure {int(status)}: {status.name} ; GPU=0 ; hostname=here ; file=x.cc ; line=1 ;\nexpr=f();"
            )


def onnxruntime(machine: Machine) -> types.ModuleType:
    """The module `onnxruntime`, as far as the backend touches it."""
    module: Any = types.ModuleType("onnxruntime")
    vars(module).update(vars(real))

    def session(content: Any, options: Any, *, providers: list[Any], **more: Any) -> Any:
        if isinstance(providers[0], tuple):
            assert more == {"enable_fallback": 0, "disabled_optimizers": ["ConstantFolding"]}
            return Session(machine, content, options, providers)
        return real.InferenceSession(content, options, providers=providers, **more)

    module.__version__, module.cuda_version = machine.version, machine.cuda
    module.get_available_providers = lambda: machine.providers
    module.preload_dlls = lambda: print("Failed to load libcudnn.so.9")  # what it finds missing goes to stdout
    module.SessionOptions, module.InferenceSession = Options, session
    module.OrtValue = types.SimpleNamespace(
        from_dlpack=lambda capsule: machine.failing("from_dlpack") or View(machine, capsule)
    )
    module.RunOptions = RunOptions
    return module


class Options(real.SessionOptions):  # type: ignore[misc]
    """`SessionOptions` that remembers the initializers that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.shared: dict[str, View] = {}

    def add_initializer(self, name: str, value: Any) -> None:
        assert name not in self.shared
        self.shared[name] = value


class RunOptions:
    """`RunOptions`, of which only the entries matter."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class View:
    """An OrtValue over device memory that it does not own."""

    def __init__(self, machine: Machine, capsule: Any) -> None:
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        at = get(capsule, b"dltensor")
        raw = ctypes.string_at(at, 64)
        address, device, number, rank = np.frombuffer(raw, "u8,i4,i4,i4", 1)[0]
        code, bits, lanes = np.frombuffer(raw, "u1,u1,u2", 1, 20)[0]
        shape, strides, offset, _, deleter = np.frombuffer(raw, np.uint64, 5, 24)
        assert (device, number, lanes, strides, offset) == (2, 0, 1, 0, 0) and deleter
        self.shape = np.frombuffer(ctypes.string_at(int(shape), 8 * int(rank)), np.int64).tolist()
        self.dtype = np.dtype(CODES[int(code), int(bits)])
        self.address, self.machine = int(address), machine
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(int(deleter))(at)  # as its reader ends with it

    def array(self) -> Any:
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        return self.machine.at(self.address, size).view(self.dtype).reshape(self.shape)


class Session:
    """An `InferenceSession` of the CUDA provider."""

    def __init__(self, machine: Machine, content: bytes, options: Options, providers: list[Any]) -> None:
        ((provider, said),) = providers
        machine.failing("InferenceSession")
        assert provider == "CUDAExecutionProvider"
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        assert machine.kinds[int(said["user_compute_stream"])] == "stream" and said["device_id"] == "0"
        assert said["use_tf32"] == "0"
        self.machine, self.captures = machine, said["enable_cuda_graph"] == "1"
        self.captured: dict[str, Any] = {}  # by `gpu_graph_id`, what it was captured over
        own, key = real.SessionOptions(), "session.model_external_initializers_file_folder_path"
        own.log_severity_level, own.intra_op_num_threads = 3, 1
        own.add_session_config_entry(key, options.get_session_config_entry(key))
        # on the GPU small integers become floating-point numbers; on the CPU, left alone, activations become integers
        own.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.shared = options.shared
        self._held = {name: real.OrtValue.ortvalue_from_numpy(view.array()) for name, view in self.shared.items()}
        for name, value in self._held.items():
            own.add_initializer(name, value)
        self.session = real.InferenceSession(content, own, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self.session.get_inputs, self.session.get_outputs
        machine.sessions.append(self)

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"] if self.machine.silent else ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> Binding:
        self.machine.failing("io_binding")
        return Binding(self)

    def run_with_iobinding(self, binding: Binding, how: RunOptions) -> None:
        machine, bound = self.machine, dict(binding.bound)
        machine.failing("run")
        assert {t.name for t in (*self.get_inputs(), *self.get_outputs())} == set(bound), "something is not bound"
        assert how.entries["disable_synchronize_execution_providers"] == "1"
        number = how.entries.get("gpu_graph_id", "0") if self.captures else "-1"
        times = 1
        if number != "-1":
            times = 1 if number in self.captured else 3
            if times == 3:
                machine.failing("capture")
            machine.calls["replayed" if times == 1 else "captured"] += 1
            assert self.captured.setdefault(number, bound) == bound, "replayed over other addresses"
        for _ in range(times):
            machine.enqueue(lambda: self._execute(bound))

    def _execute(self, bound: dict[str, Any]) -> None:
        binding, inputs = self.session.io_binding(), {t.name for t in self.get_inputs()}
        for name, (kind, shape, address) in bound.items():
            dtype = np.dtype(DTYPES[kind])
            array = self.machine.at(address, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
            bind = binding.bind_input if name in inputs else binding.bind_output
            bind(name, "cpu", 0, dtype, list(shape), array.ctypes.data)
        self.session.run_with_iobinding(binding)


class Binding:
    """`IOBinding` by address."""

    def __init__(self, session: Session) -> None:
        self.session, self.bound = session, dict[str, tuple[int, tuple[int, ...], int]]()
        self.bind_input = self.bind_output = self.bind

    def bind(self, name: str, device: str, number: int, kind: int, shape: list[int], address: int) -> None:
        assert (device, number) == ("cuda", 0)
        self.session.machine.failing("bind")
        self.session.machine.at(address, 1)
        self.bound[name] = kind, tuple(shape), address

"""Backends run a bundle's graphs; one file each, chosen by name (`ort`)."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.errors import UnsupportedError, nearest

Array = NDArray[Any]


class Buffer(Protocol):
    """Memory of a fixed shape and dtype that graphs read and write, on the host or on a device."""

    def write(self, values: Array) -> None:
        """Fill the buffer from the host; `values` has its shape and dtype."""

    def read(self) -> Array:
        """The content on the host; valid until the next run."""

    def copy_rows(self, rows: Buffer, slot: int) -> None:
        """Put rows [1, heads, R, D_h] into this cache [1, heads, C, D_h] from `slot` on, where both buffers live."""


class Session(Protocol):
    """One graph, its inputs and outputs bound to buffers once."""

    def run(self) -> None:
        """Run the graph over its buffers and wait for it."""


class Backend(Protocol):
    """A way to run graphs."""

    name: str

    def allocate(self, info: TensorInfo) -> Buffer:
        """A zeroed buffer."""

    def open(self, path: Path, buffers: Mapping[str, Buffer]) -> Session:
        """A graph with every input and output bound to the buffer of its name."""


def load(name: str, **options: Any) -> Backend:
    """A backend by name.

    Raises:
        UnsupportedError: unknown, or its packages are not installed.
    """
    known = [m.name for m in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise UnsupportedError(f"backend: {name!r} is not known; {nearest(name, known)}")
    backend: Backend = importlib.import_module(f"{__name__}.{name}").create(**options)
    return backend


def numpy_dtype(name: str) -> np.dtype[Any]:
    """`float32`, `float16` or `int64` as a numpy dtype."""
    return np.dtype(name)

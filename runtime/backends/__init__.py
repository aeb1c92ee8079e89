"""Backends run a bundle's graphs; one file each, chosen by name (`ort`, `ort-cuda`, `trt`, `trt-rtx`)."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lvlm_edge.runtime.bundle import Bundle, Graph, TensorInfo, kv_cache
from lvlm_edge.runtime.errors import UnsupportedError, UsageError, nearest

Array = NDArray[Any]


class Buffer(Protocol):
    """Memory of a fixed shape and dtype that graphs read and write, on the host or on a device."""

    def write(self, values: Array) -> None:
        """Fill the buffer from the host; `values` has its shape and is converted to its dtype."""

    def read(self) -> Array:
        """The content on the host, float32 if the buffer is bfloat16; valid until the next run."""

    def copy_rows(self, rows: Buffer, slot: int) -> None:
        """Put rows [1, heads, R, D_h] into this cache [1, heads, C, D_h] from `slot` on, where both buffers live."""


class Inputs(Protocol):
    """Buffers that the host fills all at once."""

    @property
    def buffers(self) -> Mapping[TensorInfo, Buffer]:
        """The buffers by tensor."""

    def write(self, values: Mapping[TensorInfo, Array]) -> None:
        """Fill every buffer; see `Buffer.write`."""


@dataclass(frozen=True)
class Highest:
    """The highest logits: every one that is above the lowest of these is among them.

    Attributes:
        ids: their tokens, int64 [K], ascending.
        scores: float32 [K].
    """

    ids: Array
    scores: Array


class Finder(Protocol):
    """Finds the highest logits where the logits are."""

    def find(self) -> Highest | None:
        """The highest of the logits as they are now; None where one may not be finite."""


class Session(Protocol):
    """One graph, its inputs and outputs bound to buffers once."""

    def run(self, rows: int | None = None) -> None:
        """Run the graph over its buffers and wait for it.

        Args:
            rows: of the prompt that are in use, from the first on. Where the graph takes any number, it computes these
                alone, and those behind them keep what they held; None for all.
        """


class Backend(Protocol):
    """A way to run graphs."""

    name: str

    def allocate(self, info: TensorInfo, *, host: bool = False) -> Buffer:
        """A zeroed buffer.

        Args:
            host: whether the host reads or writes it; other buffers are for graphs alone.
        """

    def together(self, infos: Sequence[TensorInfo]) -> Inputs:
        """Zeroed buffers that the host mostly fills all at once."""

    def open(self, bundle: Bundle, graph: Graph, buffers: Mapping[str, Buffer]) -> Session:
        """A graph with every input and output of its file bound to the buffer of its name in the file."""

    def finder(self, bundle: Bundle, logits: Buffer) -> Finder | None:
        """What brings the highest logits to the host; None where reading all of them costs no copy."""


def load(name: str, **options: Any) -> Backend:
    """A backend by name.

    Args:
        options: the backend's own (`ort`: `threads`, `exact`; `ort-cuda`: `capture`; `trt`, `trt-rtx`: `engines`).

    Raises:
        UnsupportedError: unknown, or its packages are not installed.
        UsageError: an option that it does not have.
    """
    known = {m.name.replace("_", "-"): m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg}
    if name not in known:
        raise UnsupportedError(f"backend: {name!r} is not known; {nearest(name, known)}")
    create = importlib.import_module(f"{__name__}.{known[name]}").create
    for option in options.keys() - inspect.signature(create).parameters.keys():
        raise UsageError(f"{name}: takes no {option}; leave it out")
    backend: Backend = create(**options)
    return backend


def host_tensors(graphs: Iterable[Graph]) -> frozenset[str]:
    """Names of the tensors that the host writes or reads while a bundle runs.

    A tensor that one graph returns and another takes stays where the graphs run, caches among them. The host writes
    what no graph returns and reads what no graph takes. Graphs of role image run once per crop, so that the host
    collects what passes between them.
    """
    graphs = tuple(graphs)
    taken = {kv_cache.shared_name(info.name) for graph in graphs for info in graph.inputs}
    returned = {kv_cache.shared_name(info.name) for graph in graphs for info in graph.outputs}
    of_images = {info.name for graph in graphs if graph.role == "image" for info in graph.outputs}
    collected = {name for name in of_images if kv_cache.shared_name(name) == name}
    return frozenset((taken ^ returned) | collected)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """A manifest's dtype as what the host holds; numpy has no bfloat16, whose bits are uint16."""
    return np.dtype(np.uint16 if name == "bfloat16" else name)


def to_bfloat16(values: Array) -> NDArray[np.uint16]:
    """Numbers as the bits of bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # rounding would carry a NaN over into an infinity or a zero
    kept = np.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
    return kept.astype(np.uint16)


def from_bfloat16(bits: Array) -> NDArray[np.float32]:
    """The bits of bfloat16 as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)

"""Cache layout and buffers; the only file that knows slots.

A position is an index in the original sequence and feeds RoPE; a slot is a row of a cache buffer. After pruning
they differ. Graphs get one unpruned length and take the dropped rows off themselves; this file sizes and checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lvlm_edge.runtime.bundle import WIDTHS, CacheLayer, Counts, TensorInfo
from lvlm_edge.runtime.errors import BundleError

PAST, PRESENT = "past_key_values", "present"


@dataclass(frozen=True)
class Layout:
    """The caches of a bundle, by layer."""

    layers: tuple[CacheLayer, ...]
    dtype: str

    def buffers(self) -> tuple[TensorInfo, ...]:
        """One buffer per layer and part, named as the graphs' inputs: [1, kv_heads, capacity, head_dim]."""
        return tuple(
            TensorInfo(f"{PAST}.{i}.{part}", self.dtype, (1, layer.kv_heads, layer.capacity, layer.head_dim))
            for i, layer in enumerate(self.layers)
            for part in ("key", "value")
        )

    def bytes(self) -> int:
        """Memory of all buffers."""
        width = WIDTHS[self.dtype]
        return sum(2 * width * c.kv_heads * c.capacity * c.head_dim for c in self.layers)

    def lengths(self, unpruned: int) -> tuple[int, ...]:
        """Filled slots per layer when `unpruned` rows (visual, text, decoded) have gone by."""
        return tuple(unpruned - layer.dropped for layer in self.layers)

    def slot(self, name: str, length: int) -> int:
        """Where the rows of `present.3.key` go in its cache when `length` unpruned rows have gone by."""
        return max(0, length - self.layers[int(name.split(".")[1])].dropped)


def shared_name(name: str) -> str:
    """The buffer that a graph's tensor lives in: `present.3.key` is written into `past_key_values.3.key`."""
    return PAST + name.removeprefix(PRESENT) if name.startswith(PRESENT + ".") else name


def are_rows(info: TensorInfo, cache: TensorInfo) -> bool:
    """Whether a graph's output is new rows for a cache: of its dtype and shape, but for fewer rows."""
    if info.dtype != cache.dtype or len(info.shape) != 4 or not info.name.startswith(PRESENT + "."):
        return False
    fewer = info.shape[2] < cache.shape[2]
    return fewer and info.shape[:2] == cache.shape[:2] and info.shape[3] == cache.shape[3]


def check_layout(layers: Sequence[CacheLayer], counts: Counts) -> None:
    """Check what the planner promised: every layer can hold a full prompt's rows and every new token.

    Raises:
        BundleError: a layer cannot.
    """
    wanted = counts.prompt_tokens + counts.new_tokens
    for i, layer in enumerate(layers):
        rows = layer.capacity + layer.dropped
        if min(layer.kv_heads, layer.head_dim, layer.capacity) < 1 or layer.dropped < 0 or rows < wanted:
            raise BundleError(f"manifest: {layer} of layer {i} cannot hold {wanted} rows; export the bundle again")

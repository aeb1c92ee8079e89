"""Cache layout and buffers; the only file that knows slots.

A position is an index in the original sequence and feeds RoPE; a slot is a row of a cache buffer. After pruning
they differ. Graphs get one unpruned length and take the dropped rows off themselves; this file sizes and checks.

Where fewer pictures come than planned, fewer rows are dropped. Graphs have one length input (two independent ones stop
TensorRT-RTX's compiler), so the number of planned but not dropped rows is its high part: see `coded_length`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lvlm_edge.runtime.bundle import WIDTHS, Cache, Counts, TensorInfo
from lvlm_edge.runtime.errors import BundleError

PAST, PRESENT = "past_key_values", "present"
LENGTHS = 1 << 24  # `cache_length` is the length plus this times the rows that were planned to drop and were not


@dataclass(frozen=True)
class Layout:
    """The caches of a bundle."""

    caches: tuple[Cache, ...]
    dtype: str

    def buffers(self) -> tuple[TensorInfo, ...]:
        """One buffer per cache and part, named as the graphs' inputs: [1, heads, capacity, head_dim]."""
        return tuple(
            TensorInfo(f"{PAST}.{cache.name}.{part}", self.dtype, (1, cache.heads, cache.capacity, cache.head_dim))
            for cache in self.caches
            for part in ("key", "value")
        )

    def bytes(self) -> int:
        """Memory of all buffers."""
        width = WIDTHS[self.dtype]
        return sum(2 * width * c.heads * c.capacity * c.head_dim for c in self.caches)

    def lengths(self, unpruned: int) -> tuple[int, ...]:
        """Filled slots per cache when `unpruned` rows (visual, text, decoded) have gone by."""
        return tuple(unpruned - cache.dropped for cache in self.caches)

    def slot(self, name: str, length: int) -> int:
        """Where the rows of `present.3.key` go in its cache after a `coded_length`."""
        cache = next(c for c in self.caches if name.rpartition(".")[0] == f"{PRESENT}.{c.name}")
        restored, unpruned = divmod(length, LENGTHS)
        return max(0, unpruned - cache.dropped + (restored if cache.dropped > 0 else 0))


def coded_length(unpruned: int, restored: int = 0) -> int:
    """What graphs get as `cache_length`.

    Args:
        unpruned: rows that have gone by, dropped ones included.
        restored: rows that the plan drops and this prompt did not.
    """
    return unpruned + LENGTHS * restored


def shared_name(name: str) -> str:
    """The buffer that a graph's tensor lives in: `present.3.key` is written into `past_key_values.3.key`."""
    return PAST + name.removeprefix(PRESENT) if name.startswith(PRESENT + ".") else name


def are_rows(info: TensorInfo, cache: TensorInfo) -> bool:
    """Whether a graph's output is new rows for a cache: of its dtype and shape, but for fewer rows."""
    if info.dtype != cache.dtype or len(info.shape) != 4 or not info.name.startswith(PRESENT + "."):
        return False
    fewer = info.shape[2] < cache.shape[2]
    return fewer and info.shape[:2] == cache.shape[:2] and info.shape[3] == cache.shape[3]


def check_layout(caches: Sequence[Cache], counts: Counts) -> None:
    """Check what the planner promised: every cache can hold a full prompt's rows and every new token.

    Raises:
        BundleError: one cannot.
    """
    wanted = counts.prompt_tokens + counts.new_tokens
    for cache in caches:
        rows = cache.capacity + cache.dropped
        if min(cache.heads, cache.head_dim, cache.capacity) < 1 or rows < wanted:
            raise BundleError(f"manifest: {cache} cannot hold {wanted} rows; export the bundle again")

"""What published checkpoints cost, from their dimensions alone: `python samples/families/table.py`.

A picture, 64 text and 128 new tokens, float16. FastV runs from layer 2 on with half of the visual tokens. Times are
predictions of `lvlm-edge plan --device`; none was measured.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import published

from lvlm_edge.exporter import plan

SIZES = ((336, 336), (672, 672), (1280, 720))
SIZE = (672, 672)  # of the columns behind the tokens
ONE = ("llava", "qwen")  # whose visual tokens do not depend on the picture
BOARDS = ("orin-nano-4gb", "orin-nano-8gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb")
TIMED = "agx-orin-64gb"
HEAD = (
    "checkpoint", "visual tokens: 336x336", "672x672", "1280x720", "prefill TFLOP", "FastV", "cache MB",
    "weights GB: float16", "int8", "int4", "smallest Orin: float16", "int8", "first token s", "FastV",
)  # fmt: skip


def planned(folder: Path, name: str, size: tuple[int, int], **more: Any) -> dict[str, Any]:
    """`plan` of a checkpoint for a picture of (width, height)."""
    sized = {} if published.PUBLISHED[name][0]["model_type"] in ONE else {"image_size": size}
    settings = {"max_text_tokens": 64, "max_new_tokens": 128, "dtype": "float16", **sized, **more}
    return plan(folder, **settings)


def rows() -> Iterator[tuple[str, ...]]:
    """A row per checkpoint."""
    for name in published.PUBLISHED:
        with tempfile.TemporaryDirectory() as place:
            yield (name, *_cells(published.folder(name, Path(place)), name))


def _cells(folder: Path, name: str) -> list[str]:
    tokens = [f"{planned(folder, name, size)['visual_tokens']:,}" for size in SIZES]
    dense = planned(folder, name, SIZE)
    fast = planned(folder, name, SIZE, **FASTV)
    stored = [planned(folder, name, SIZE, **_stored(kind)) for kind in ("as-is", "int8", "int4")]
    found = [f"{p['flops']['prefill'] / 1e12:.2f}" for p in (dense, fast)]
    found += [f"{dense['kv_cache_bytes'] / 1e6:,.0f}", *(f"{p['weights_bytes'] / 1e9:.1f}" for p in stored)]
    found += [_smallest(folder, name, kind) for kind in ("as-is", "int8")]
    times = [planned(folder, name, SIZE, device=TIMED, **more)["prediction"] for more in ({}, FASTV)]
    return [*tokens, *found, *(f"{p['first_token_ms'] / 1e3:.2f}" for p in times)]


FASTV = {"method": "fastv", "prune_layer": 2, "keep_ratio": 0.5}


def _stored(kind: str) -> dict[str, str]:
    return {} if kind == "as-is" else {"weights": kind, "vision_weights": kind}


def _smallest(folder: Path, name: str, kind: str) -> str:
    """The smallest board that runs it."""
    more = {"lowering": "legacy", **_stored(kind)}
    fits = (b for b in BOARDS if planned(folder, name, SIZE, device=b, **more)["fit"]["fits_run"])
    return next(fits, "none")


def main() -> None:
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for row in rows():
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()

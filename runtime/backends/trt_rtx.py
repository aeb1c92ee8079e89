"""TensorRT-RTX: `trt` under another name."""

from __future__ import annotations

from pathlib import Path

from lvlm_edge.runtime.backends import trt


def create(threads: int | None = None, *, engines: str | Path | None = None) -> trt.TrtBackend:
    """The backend; see `trt.create`."""
    return trt.create(threads, engines=engines, backend="trt-rtx")

"""Graphs for ONNX Runtime alone: a portable graph in the operators that this runtime has fused kernels for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lvlm_edge.exporter.ort import fusions, integers, joined


def convert(
    source: Path, target: Path, *, by_row: bool = False, change: Callable[[ir.Model], None] | None = None
) -> None:
    """Write a graph's form for ONNX Runtime beside it, or over it.

    Args:
        by_row: the graph computes one row at a time, so that its products are left to `MatMulNBits`.
        change: made to the portable graph first.
    """
    model = ir.load(source)
    if change is not None:
        change(model)
    if not by_row:
        integers.rewrite(model)
    fusions.rewrite(model)
    RemoveUnusedNodesPass()(model)
    if by_row:
        joined.rewrite(model)
        RemoveUnusedNodesPass()(model)
    ir.save(model, target)

"""Graphs for ONNX Runtime alone: a portable graph in the operators that this runtime has fused kernels for."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lvlm_edge.exporter.ort import fusions, integers


def convert(source: Path, target: Path) -> None:
    """Write a graph's form for ONNX Runtime beside it, or over it."""
    model = ir.load(source)
    integers.rewrite(model)
    fusions.rewrite(model)
    RemoveUnusedNodesPass()(model)
    ir.save(model, target)

"""The matrices of a decoder layer, and which of them read the same rows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

# Matrices of a layer that read the same rows, and so have the same factors. Phi-3 has two of these as one.
GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("qkv_proj",),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("gate_up_proj",),
    ("down_proj",),
)


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """A decoder layer's matrices by their own names."""
    return {n.rpartition(".")[2]: module for n, module in layer.named_modules() if isinstance(module, nn.Linear)}


def groups_of(linears: Mapping[str, nn.Linear]) -> list[tuple[str, ...]]:
    return [names for names in GROUPS if names[0] in linears]

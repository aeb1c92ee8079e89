"""A checkpoint's modules with the weights that a bundle of small integers stands for, made from its own: plainly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lvlm_edge.exporter.references import original
from lvlm_edge.runtime.bundle import WeightFormats

SPANS = (7.0, 7.5, 8.0, 8.75)  # what the largest weight of an INT4 block may be in steps of its scale; the nearest wins
MATRICES = ("k_proj_img.weight", "v_proj_img.weight", "_proj.weight", "proj.0.weight", "proj.2.weight", "Wk.weight")


@torch.no_grad()
def apply(model: Any, formats: WeightFormats, dtype: str) -> None:
    """Round the matrices of a model in place, as its bundle keeps them; the embedding stays, tied or not.

    Args:
        model: as `references.load` made it.
        dtype: of the scales, the bundle's.
    """
    m, scale = original.view(model), getattr(torch, dtype)
    for part, kind in ((m.tower, formats.vision), (m.projector, formats.vision), (m.decoder, formats.decoder)):
        for module in part.modules() if part is not None else ():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(rounded(module.weight, kind, formats.block, scale))
    head = m.language.lm_head
    head.weight = nn.Parameter(rounded(head.weight, formats.head, formats.block, scale))
    for name, tensor in m.extra.items():
        if tensor.dim() == 2 and name.endswith(MATRICES):
            m.extra[name] = rounded(tensor, formats.decoder, formats.block, scale)


def rounded(weight: Tensor, kind: str, block: int, dtype: torch.dtype) -> Tensor:
    """A matrix [out, in] after rounding to `int8` or `int4`, float32; itself where it is kept `as-is`."""
    if kind == "as-is":
        return weight
    weight = weight.detach().float()
    inputs = weight.shape[1]
    block = block if inputs % block == 0 else 32
    if kind == "int8" or inputs % block:
        scale = (weight.abs().amax(1, keepdim=True) / 127).to(dtype).float().clamp_min(torch.finfo(dtype).tiny)
        return torch.clamp(torch.round(weight / scale), -127, 127) * scale
    rows = weight.reshape(-1, block)
    tried = []
    for span in SPANS:
        scale = (rows.abs().amax(1, keepdim=True) / span).to(dtype).float().clamp_min(torch.finfo(dtype).tiny)
        tried.append(torch.clamp(torch.round(rows / scale), -8, 7) * scale)
    errors = torch.stack([(made - rows).square().sum(1) for made in tried])
    return torch.stack(tried)[errors.argmin(0), torch.arange(len(rows))].reshape(weight.shape)

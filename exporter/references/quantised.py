"""A checkpoint's modules with the weights that a bundle of small integers stands for, made from its own: plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lvlm_edge.exporter.references import original
from lvlm_edge.runtime.bundle import WeightFormats

SPANS = (7.0, 7.5, 8.0, 8.75)  # what the largest weight of an INT4 block may be in steps of its scale; the nearest wins
MATRICES = ("k_proj_img.weight", "v_proj_img.weight", "_proj.weight", "proj.0.weight", "proj.2.weight", "Wk.weight")
PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)


@torch.no_grad()
def apply(model: Any, formats: WeightFormats, dtype: str) -> None:
    """Round the matrices of a model in place, as its bundle keeps them; the embedding stays, tied or not.

    Args:
        model: as `references.load` made it.
        dtype: of the scales, the bundle's.
    """
    m, scale = original.view(model), getattr(torch, dtype)
    for module, kind in _linear(m, formats):
        module.weight = nn.Parameter(rounded(module.weight, kind, formats.block, scale))
    for name in _own(m):
        m.extra[name] = rounded(m.extra[name], formats.decoder, formats.block, scale)


def _linear(m: Any, formats: WeightFormats) -> Iterator[tuple[nn.Linear, str]]:
    """Every linear module of a model, and the format of its matrix."""
    for part, kind in ((m.tower, formats.vision), (m.projector, formats.vision), (m.decoder, formats.decoder)):
        for module in part.modules() if part is not None else ():
            if isinstance(module, nn.Linear):
                yield module, kind
    yield m.language.lm_head, formats.head


def _own(m: Any) -> list[str]:
    """Names of a method's own matrices."""
    return [name for name, tensor in m.extra.items() if tensor.dim() == 2 and name.endswith(MATRICES)]


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


@contextmanager
def activations(model: Any, formats: WeightFormats) -> Iterator[None]:
    """Products with INT8 and INT4 matrices read activations that were rounded to 8 bits, as ONNX Runtime's do.

    A row has a scale of its own for INT8 matrices, and one per block of input channels for INT4 ones: its largest
    magnitude over 127.

    Args:
        model: with the weights that the bundle stands for.
        formats: those of the bundle.
    """
    m, blocks = original.view(model), dict[int, int]()
    kinds = [(module.weight, kind) for module, kind in _linear(m, formats)]
    for weight, kind in kinds + [(m.extra[name], formats.decoder) for name in _own(m)]:
        if kind != "as-is":
            inputs = weight.shape[1]
            block = formats.block if inputs % formats.block == 0 else 32
            whole = kind == "int8" or inputs % block
            blocks[weight.untyped_storage().data_ptr()] = inputs if whole else block
    with _Rounding(blocks):
        yield


class _Rounding(TorchFunctionMode):
    """Rounds what is multiplied by some matrices, told by where their memory begins."""

    def __init__(self, blocks: Mapping[int, int]) -> None:
        super().__init__()
        self.blocks = blocks

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS:
            x, weight, *rest = args
            block = self.blocks.get(weight.untyped_storage().data_ptr())
            if block is not None:
                args = (_eight_bits(x, block), weight, *rest)
        return func(*args, **(kwargs or {}))


def _eight_bits(x: Tensor, block: int) -> Tensor:
    rows = x.reshape(-1, min(block, x.shape[-1]))
    scale = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (torch.round(rows / scale) * scale).reshape(x.shape)

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
    for module in _of_prompts(m, formats):
        module.register_buffer("of_prompts", rounded(module.weight, str(formats.prompt), formats.block, scale))
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


def _of_prompts(m: Any, formats: WeightFormats) -> list[nn.Linear]:
    """Linear modules whose matrix ONNX Runtime's graphs of prompts have in a format of their own."""
    modules = m.decoder.modules() if formats.prompt is not None else ()
    return [module for module in modules if isinstance(module, nn.Linear)]


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
def as_run(model: Any, formats: WeightFormats, *, rounds: bool = True) -> Iterator[None]:
    """Products are those of ONNX Runtime's graphs: prompts may read matrices of their own, and activations are rounded.

    Activations that INT8 and INT4 matrices multiply are rounded to 8 bits. A row has a scale of its own for INT8
    matrices, and one per block of input channels for INT4 ones: its largest magnitude over 127. (Graphs of one row
    have scales per block for INT8 too.)

    Args:
        model: with the weights that the bundle stands for, as `apply` left it.
        formats: those of the bundle.
        rounds: whether activations are rounded.
    """
    m, blocks, prompts = original.view(model), dict[int, int](), dict[int, Tensor]()
    kinds = [(module.weight, kind) for module, kind in _linear(m, formats)]
    for weight, kind in kinds + [(m.extra[name], formats.decoder) for name in _own(m)]:
        if kind != "as-is":
            inputs = weight.shape[1]
            block = formats.block if inputs % formats.block == 0 else 32
            whole = kind == "int8" or inputs % block
            blocks[_begin(weight)] = inputs if whole else block
    for module in _of_prompts(m, formats):
        prompts[_begin(module.weight)] = module.get_buffer("of_prompts")
    with _Products(blocks if rounds else {}, prompts):
        yield


def _begin(weight: Tensor) -> int:
    return weight.untyped_storage().data_ptr()


class _Products(TorchFunctionMode):
    """Changes what is multiplied by some matrices, told by where their memory begins.

    Args:
        blocks: input channels that share a scale, where activations are rounded.
        prompts: what several rows are multiplied by instead; a row is then rounded as a whole.
    """

    def __init__(self, blocks: Mapping[int, int], prompts: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.blocks, self.prompts = blocks, prompts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS:
            x, weight, *rest = args
            block = self.blocks.get(_begin(weight))
            own = self.prompts.get(_begin(weight)) if x.shape[-2:-1].numel() > 1 else None
            if block is not None:
                x = _eight_bits(x, block if own is None else x.shape[-1])
            args = (x, weight if own is None else own, *rest)
        return func(*args, **(kwargs or {}))


def _eight_bits(x: Tensor, block: int) -> Tensor:
    rows = x.reshape(-1, min(block, x.shape[-1]))
    scale = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (torch.round(rows / scale) * scale).reshape(x.shape)

"""AWQ (arXiv:2306.00978): a factor for every input channel, folded into whatever the channel comes from.

The factor multiplies the matrix and divides what it reads, so that nothing changes until the matrix is rounded. Where
the factors go, and where they do not:

- of q, k and v, and of gate and up: into the norm before them. FastV, ProxyV, YOPO and HiMix read that norm's output
  through these matrices alone; ProxyV's updates read the rows before it, HiMix's images have a norm of their own.
- of down: into the rows of up. YOPO leaves channels out after both.
- of o: into the rows of v, one factor for query heads that share values. Not in HiMix, whose images have values that
  come from another matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_edge.exporter.quantisation.layer import groups_of, linears_of
from lvlm_edge.exporter.quantisation.rounding import dequantised, format_of, searched, to_nearest

NORMS = {
    "q_proj": "input_layernorm",
    "qkv_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "gate_up_proj": "post_attention_layernorm",
}
MAKERS = {"o_proj": ("v_proj", "qkv_proj"), "down_proj": ("up_proj", "gate_up_proj")}  # in a fused one the last rows


@torch.no_grad()
def smooth(
    layer: nn.Module, rows: Mapping[str, Tensor], block: int, dtype: torch.dtype, *, values_elsewhere: bool = False
) -> list[str]:
    """Fold AWQ's factors into a decoder layer, in place; it computes what it did before.

    Args:
        rows: what each group of matrices reads, [n, in], by the group's first name.
        block: input channels that will share a scale.
        dtype: what gains will be kept in; they are rounded to it now, and the matrices make up for that.
        values_elsewhere: the attention also sees values that are not the layer's own.

    Returns:
        The first names of the groups that have factors: where rounding comes nearer to what the group computes.
    """
    linears, done = linears_of(layer), []
    for names in groups_of(linears):
        first = names[0]
        if first == "o_proj" and values_elsewhere:
            continue
        weight = torch.cat([_evened(linears[name].weight, rows[first]) for name in names])
        maker = _maker(linears, first)
        factor = _factor(weight, rows[first], block, dtype, _heads(layer, linears) if first == "o_proj" else None)
        if factor is None:
            continue
        done.append(first)
        if maker is None:
            factor = _divide_gain(getattr(layer, NORMS[first]), factor, dtype)
        else:
            _divide_rows(maker, _heads(layer, linears).once(factor) if first == "o_proj" else factor)
        for name in names:
            linears[name].weight *= factor
    return done


@dataclass(frozen=True)
class Heads:
    """Query heads of a size that share values: `each` of them."""

    size: int
    each: int

    def shared(self, factor: Tensor) -> Tensor:
        """One factor for all query heads that share values, the geometric mean, [heads * size]."""
        return self._view(factor).log().mean(1, keepdim=True).exp().expand(-1, self.each, -1).reshape(-1)

    def once(self, factor: Tensor) -> Tensor:
        """The factors of each head of values, [kv_heads * size]."""
        return self._view(factor)[:, 0].reshape(-1)

    def _view(self, factor: Tensor) -> Tensor:
        return factor.view(-1, self.each, self.size)


def _heads(layer: Any, linears: Mapping[str, nn.Linear]) -> Heads:
    config = layer.self_attn.config
    return Heads(
        linears["o_proj"].in_features // config.num_attention_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )


def _maker(linears: Mapping[str, nn.Linear], name: str) -> nn.Linear | None:
    """The matrix whose last rows make, channel by channel, what `o_proj` or `down_proj` reads; None for a norm's."""
    return next((linears[maker] for maker in MAKERS.get(name, ()) if maker in linears), None)


def _divide_rows(maker: nn.Linear, factor: Tensor) -> None:
    """The last rows of a matrix, and of its bias, over their factors; in a fused matrix others come before them."""
    maker.weight[-len(factor) :] /= factor[:, None]
    if maker.bias is not None:
        maker.bias[-len(factor) :] /= factor


def _divide_gain(norm: Any, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A gain over its factors, rounded to what it will be kept in; returns the factors that it was really divided by.

    A channel whose gain would become 0 is left alone.
    """
    gain = norm.weight.clone()
    kept = (gain / factor).to(dtype).float()
    kept = torch.where(kept == 0, gain, kept)
    norm.weight.copy_(kept)
    return torch.where(kept == 0, torch.ones_like(gain), gain / kept)


def _factor(weight: Tensor, rows: Tensor, block: int, dtype: torch.dtype, heads: Heads | None) -> Tensor | None:
    """AWQ's factors of a matrix's input channels, [in]; None where it does without them, or stays as it is.

    Args:
        weight: [out, in].
        heads: of a matrix that reads them.
    """
    how = format_of(weight, block)
    if how is None:
        return None
    linear = searched(weight, rows, how, "awq")
    factor: Tensor = 1 / linear.input_quantizer.pre_quant_scale.float()
    factor = factor if heads is None else heads.shared(factor)
    ones, exact = torch.ones_like(factor), rows @ weight.T
    with_factor, without = (
        ((rows / f) @ dequantised(*to_nearest(weight * f, how, dtype)).T - exact).square().sum() for f in (factor, ones)
    )
    return factor if with_factor < without else None


def _evened(weight: Tensor, rows: Tensor) -> Tensor:
    """A matrix over the root mean square of what it makes of its rows, so that no matrix of a group outweighs others.

    Blocks of an output channel have scales of their own: rounding is the same at any size.
    """
    return weight / (rows @ weight.T).square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)

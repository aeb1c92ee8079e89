"""Parts: a checkpoint as named modules (vision, projector, layers, norm, lm_head), built on fake tensors.

No module ever holds a weight. Matrices are laid out [in, out], as the graphs multiply. The encoder and the projector
are the family's (`Family.extend`), under the names that its `weights` have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.checkpoints.spec import DecoderSpec
from lvlm_edge.exporter.planning import Plan
from lvlm_edge.runtime.errors import UnsupportedError, nearest

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROPE = ("rope_cos", "rope_sin")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """An activation by its name in transformers' configs.

    Raises:
        UnsupportedError: a name this version does not know.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedError(f"config: activation {name!r} is not supported; {nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Linear(nn.Module):
    """x @ weight + bias with weight [in, out]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Norm(nn.Module):
    """Weight (and bias) of a normalisation over the last axis."""

    def __init__(self, width: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None


class DecoderLayer(nn.Module):
    """The weights of one Llama-shaped layer; `blocks` has the arithmetic."""

    def __init__(self, d: DecoderSpec) -> None:
        super().__init__()
        dq, dkv = d.heads * d.head_dim, d.kv_heads * d.head_dim
        self.input_layernorm, self.post_attention_layernorm = Norm(d.hidden), Norm(d.hidden)
        self.q_proj = Linear(d.hidden, dq, d.qkv_bias)
        self.k_proj, self.v_proj = Linear(d.hidden, dkv, d.qkv_bias), Linear(d.hidden, dkv, d.qkv_bias)
        self.o_proj = Linear(dq, d.hidden, d.o_bias)
        self.gate_proj, self.up_proj = Linear(d.hidden, d.ffn, d.mlp_bias), Linear(d.hidden, d.ffn, d.mlp_bias)
        self.down_proj = Linear(d.ffn, d.hidden, d.mlp_bias)
        if d.qk_norm:
            self.q_norm, self.k_norm = Norm(d.head_dim), Norm(d.head_dim)


class Parts(nn.Module):
    """Everything a graph may use. The token embedding is not here: the runtime looks tokens up itself."""

    layers: Any  # a ModuleList of DecoderLayer
    vision: Any  # the family's
    projector: Any

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        spec, d, positions = plan.spec, plan.spec.decoder, plan.positions
        self.spec, self.act, self.ops = spec, activation(d.mlp_act), plan.lowering
        with _default_dtype(plan.vision_dtype):
            plan.family.extend(self, plan)
        with _default_dtype(plan.dtype):
            self.layers = nn.ModuleList(DecoderLayer(d) for _ in range(d.layers))
            self.norm, self.lm_head = Norm(d.hidden), Linear(d.hidden, d.vocab)
            self.rope_cos = nn.Parameter(torch.empty(positions, d.head_dim // 2))
            self.rope_sin = nn.Parameter(torch.empty(positions, d.head_dim // 2))
            plan.method.extend(self, plan)


@contextmanager
def _default_dtype(name: str) -> Iterator[None]:
    """New tensors are of a dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[name])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fake(plan: Plan) -> tuple[Parts, Any]:
    """The parts of a plan on fake tensors of its dtypes, and the mode they live in."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    with mode:
        return Parts(plan).requires_grad_(False).eval(), mode


@dataclass(frozen=True)
class Weight:
    """A weight as the graphs read it: shape, and whether the checkpoint holds it transposed."""

    shape: tuple[int, ...]
    transposed: bool

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def weights(parts: Parts) -> dict[str, Weight]:
    """Every parameter by name."""
    matrices = {f"{name}.weight" for name, module in parts.named_modules() if isinstance(module, Linear)}
    return {name: Weight(tuple(p.shape), name in matrices) for name, p in parts.named_parameters()}


def rope_tables(d: DecoderSpec, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables [positions, D_h / 2], float32, from transformers' own rotary embedding.

    Raises:
        CheckpointError: parameters that transformers does not take.
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        config = LlamaConfig(hidden_size=d.hidden, num_attention_heads=d.heads, head_dim=d.head_dim, **d.rope)
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(positions)[None])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: its rotary parameters cannot be used ({error}); correct them") from error
    half = d.head_dim // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

"""Parts: a checkpoint as named modules (vision, projector, layers, norm, lm_head), built on fake tensors.

No module ever holds a weight. Names of parameters are the names a family's `rename` gives, so a family is a table
of names and dimensions. Matrices are laid out [in, out], as the graphs multiply.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvlm_edge.exporter import lowerings
from lvlm_edge.exporter.checkpoints.spec import CheckpointError, DecoderSpec, ModelSpec, VisionSpec
from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.planning import Plan, method
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


class VisionLayer(nn.Module):
    """A pre-norm encoder layer of CLIP or SigLIP."""

    def __init__(self, v: VisionSpec, ops: Any) -> None:
        super().__init__()
        self.spec, self.act, self.ops = v, activation(v.mlp_act), ops
        self.layer_norm1, self.layer_norm2 = Norm(v.hidden, bias=True), Norm(v.hidden, bias=True)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(v.hidden, v.hidden, bias=True) for _ in range(4))
        self.fc1, self.fc2 = Linear(v.hidden, v.ffn, bias=True), Linear(v.ffn, v.hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        normed = self._norm(x, self.layer_norm1)
        q, k, v = (blocks.split_heads(p(normed), self.spec.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.out_proj(blocks.join_heads(self.ops.attend(q, k, v)))
        hidden: Tensor = x + self.fc2(self.act(self.fc1(self._norm(x, self.layer_norm2))))
        return hidden

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        normed: Tensor = self.ops.layer_norm(x, norm.weight, norm.bias, self.spec.eps)
        return normed


class PatchEmbedding(nn.Module):
    """Convolution of patch size and stride, weight [D, channels, P, P] as in the checkpoint."""

    def __init__(self, v: VisionSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(v.hidden, v.channels, v.patch_size, v.patch_size))
        self.bias = nn.Parameter(torch.empty(v.hidden)) if v.kind == "siglip" else None
        self.stride = v.patch_size

    def forward(self, pixels: Tensor) -> Tensor:
        return F.conv2d(pixels, self.weight, self.bias, stride=self.stride).flatten(2).transpose(1, 2)


class Table(nn.Module):
    """A learned table [rows, D], added as a whole."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))


class Vision(nn.Module):
    """The vision encoder up to its highest feature layer; layers above are not built."""

    def __init__(self, v: VisionSpec, ops: Any) -> None:
        super().__init__()
        self.spec, self.ops = v, ops
        self.patch_embedding = PatchEmbedding(v)
        self.position_embedding = Table(v.positions, v.hidden)
        if v.kind == "clip":
            self.class_embedding = nn.Parameter(torch.empty(v.hidden))
            self.pre_layrnorm = Norm(v.hidden, bias=True)  # spelled as in every CLIP checkpoint
        self.layers = nn.ModuleList(VisionLayer(v, ops) for _ in range(max(v.feature_layers)))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixel_values [1, C, H, W] to the features the projector reads, [1, V, D * number of feature layers]."""
        x = self.patch_embedding(pixels)
        if self.spec.kind == "clip":
            x = torch.cat([self.class_embedding.reshape(1, 1, -1), x], 1)
        x = x + self.position_embedding.weight
        if self.spec.kind == "clip":
            x = self.ops.layer_norm(x, self.pre_layrnorm.weight, self.pre_layrnorm.bias, self.spec.eps)
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        chosen = [states[i][:, 1:] if self.spec.drop_first else states[i] for i in self.spec.feature_layers]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, -1)


class Projector(nn.Module):
    """Linear, activation, linear: vision features to visual tokens."""

    def __init__(self, spec: ModelSpec, act: str) -> None:
        super().__init__()
        wide, d = len(spec.vision.feature_layers) * spec.vision.hidden, spec.decoder.hidden
        self.linear_1, self.linear_2 = Linear(wide, d, spec.projector_bias), Linear(d, d, spec.projector_bias)
        self.act = activation(act)

    def forward(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return tokens


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


class Parts(nn.Module):
    """Everything a graph may use. The token embedding is not here: the runtime looks tokens up itself."""

    layers: Any  # a ModuleList of DecoderLayer
    newline: nn.Parameter  # the separator after every crop [D], where the model has one

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        spec, d, positions = plan.spec, plan.spec.decoder, plan.positions
        self.spec, self.act, self.ops = spec, activation(d.mlp_act), lowerings.load(plan.lowering)
        self.vision = Vision(spec.vision, self.ops)
        if spec.projector_act is not None:
            self.projector = Projector(spec, spec.projector_act)
        if spec.newline:
            self.newline = nn.Parameter(torch.empty(d.hidden))
        self.layers = nn.ModuleList(DecoderLayer(d) for _ in range(d.layers))
        self.norm, self.lm_head = Norm(d.hidden), Linear(d.hidden, d.vocab)
        self.rope_cos = nn.Parameter(torch.empty(positions, d.head_dim // 2))
        self.rope_sin = nn.Parameter(torch.empty(positions, d.head_dim // 2))
        extend = getattr(method(plan.method), "extend", None)
        if extend is not None:  # weights of the method's own
            extend(self, plan)


def fake(plan: Plan) -> tuple[Parts, Any]:
    """The parts of a plan on fake tensors of its dtype, and the mode they live in."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode, before = FakeTensorMode(), torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[plan.dtype])
    try:
        with mode:
            return Parts(plan).requires_grad_(False).eval(), mode
    finally:
        torch.set_default_dtype(before)


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

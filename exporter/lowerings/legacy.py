"""Opset 18: primitives only, for TensorRT 10.3 (JetPack 6). Graphs return new rows; the runtime copies them.

Attention is two matrix products around a float32 softmax. While decoding, the scores of the cached rows and of the
new row are joined before the softmax, so that the new row need not be in the cache yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lvlm_edge.exporter.planning import CacheGroup, Lowering, Plan, Tensors
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.bundle.kv_cache import PAST, PRESENT

if TYPE_CHECKING:
    from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis; the normalisation in float32."""
    wide = x.float()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / deviation * weight + bias over the last axis; the normalisation in float32."""
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight + bias


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    """Rotary position embedding, see `planning.Lowering`."""
    import torch

    first, second = x.chunk(2, -1)
    if positions is None:
        c, s = cos[:, None], sin[:, None]
    else:
        c, s = (table.index_select(0, positions[0])[None, None] for table in (cos, sin))  # [1, 1, rows, D_h / 2]
    return torch.cat([first * c - second * s, second * c + first * s], -1)


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Softmax attention among fresh rows [1, H, S, D_h], causal by row number."""
    import torch

    scores = _scores(query, key)
    if causal:
        rows = torch.arange(query.shape[2])
        scores = scores.masked_fill(rows[None, :] > rows[:, None], float("-inf"))
    return _weighted(scores.softmax(-1).to(value.dtype), value).reshape(query.shape)


def attend_where(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention of queries [1, H, Q, D_h] to the keys [1, H_kv, K, D_h] they see, `visible` [Q, K], bool."""
    scores = _scores(query, key).masked_fill(~visible, float("-inf"))
    return _weighted(scores.softmax(-1).to(value.dtype), value).reshape(query.shape)


def prefill_inputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    """Nothing: a prompt attends to itself only."""
    return ()


def leading_outputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    return plan.leading_rows(layers)


def put(inputs: Tensors, group: CacheGroup, key: Tensor, value: Tensor) -> Tensors:
    """The rows as they are."""
    return store(inputs, group, key, value)


def prefill_outputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    return plan.prompt_rows(layers)


def store(inputs: Tensors, group: CacheGroup, key: Tensor, value: Tensor) -> Tensors:
    """The rows as they are."""
    return {f"{PRESENT}.{group.name}.key": key, f"{PRESENT}.{group.name}.value": value}


def decode_inputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    return plan.caches(layers, PAST)


def decode_outputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    return plan.new_rows(layers)


def append(
    inputs: Tensors, group: CacheGroup, query: Tensor, key: Tensor, value: Tensor, slot: Tensor
) -> tuple[Tensor, Tensors]:
    """The query's attention to the `slot` ([1], int64) cached rows and to the new one."""
    import torch

    past_key, past_value = (inputs[f"{PAST}.{group.name}.{part}"] for part in ("key", "value"))
    capacity = past_key.shape[2]
    past = _scores(query, past_key).masked_fill(torch.arange(capacity) >= slot, float("-inf"))
    weights = torch.cat([past, _scores(query, key)], -1).softmax(-1).to(value.dtype)
    attended = _weighted(weights[..., :capacity], past_value) + _weighted(weights[..., capacity:], value)
    return attended.reshape(query.shape), store(inputs, group, key, value)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Scaled products, float32, [B, H_kv, H / H_kv, rows, keys]; query head h reads key head h * H_kv // H.

    The rows of query heads that read one key head are multiplied together. A product whose operands differ in their
    batch is one of pointers on CUDA, which ONNX Runtime copies from the host.
    """
    batch, heads, rows, size = query.shape
    kv_heads, keys = key.shape[1:3]
    stacked = query.reshape(batch, kv_heads, heads // kv_heads * rows, size) * size**-0.5
    products: Tensor = stacked @ key.transpose(-1, -2)
    return products.reshape(batch, kv_heads, heads // kv_heads, rows, keys).float()


def _weighted(weights: Tensor, value: Tensor) -> Tensor:
    """Values [B, H_kv, keys, D_h] summed by weights as `_scores` has them, [B, H_kv, H / H_kv * rows, D_h]."""
    batch, kv_heads, shared, rows, keys = weights.shape
    return weights.reshape(batch, kv_heads, shared * rows, keys) @ value


LOWERING = Lowering(
    name="legacy",
    opset=18,
    rms_norm=rms_norm,
    layer_norm=layer_norm,
    rotate=rotate,
    attend=attend,
    attend_where=attend_where,
    prefill_inputs=prefill_inputs,
    prefill_outputs=prefill_outputs,
    leading_outputs=leading_outputs,
    decode_inputs=decode_inputs,
    decode_outputs=decode_outputs,
    store=store,
    put=put,
    append=append,
)

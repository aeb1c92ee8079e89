"""Opset 24: operators that runtimes have fused kernels for, caches written in place inside the graph.

Torch is imported when a function runs, so that choosing a lowering does not load it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.lowerings import legacy
from lvlm_edge.exporter.planning import CacheGroup, Lowering, Plan, Tensors
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.bundle.kv_cache import PAST, PRESENT

if TYPE_CHECKING:
    from torch import Tensor

OPSET = 24
FEWEST_HEADS = 4  # with fewer query heads, TensorRT-RTX 1.7.1 has no kernel for Attention of one row
_WRITE = TensorInfo("write_index", "int64", (1,))
_LENGTH = TensorInfo("cache_length", "int64", (1,))


def onnx_op(name: str, inputs: Sequence[Tensor | None], like: Tensor, **attributes: Any) -> Tensor:
    """An ONNX operator with one output of the shape and dtype of `like`."""
    import torch

    result: Tensor = torch.onnx.ops.symbolic(
        name, inputs, attributes, dtype=like.dtype, shape=like.shape, version=OPSET
    )
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis; the normalisation in float32."""
    return onnx_op("RMSNormalization", [x, weight], x, axis=-1, epsilon=eps, stash_type=1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / deviation * weight + bias over the last axis; the normalisation in float32."""
    return onnx_op("LayerNormalization", [x, weight, bias], x, axis=-1, epsilon=eps, stash_type=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    """Rotary position embedding, see `planning.Lowering`."""
    return onnx_op("RotaryEmbedding", [x, cos, sin, *([] if positions is None else [positions])], x)


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Softmax attention among fresh rows [1, H, S, D_h], causal by row number."""
    if query.shape[1] == 1:  # TensorRT-RTX 1.7.1 has no kernel for one head
        return legacy.attend(query, key, value, causal)
    return onnx_op("Attention", [query, key, value], query, is_causal=int(causal))


def attend_where(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention of queries [1, H, Q, D_h] to the keys [1, H_kv, K, D_h] they see, `visible` [Q, K], bool."""
    # For one head TensorRT-RTX 1.7.1 has no kernel; one row beside an attention of all rows to the same keys ends it
    # with a segmentation fault in bfloat16.
    if 1 in query.shape[1:3]:
        return legacy.attend_where(query, key, value, visible)
    return onnx_op("Attention", [query, key, value, visible[None, None]], query)


def prefill_inputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    """The slot to write from (0), and the caches to write into."""
    return (_WRITE, *plan.caches(layers, PAST))


def leading_outputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    """What a graph returns that fills caches before the prompt's rows."""
    return plan.caches(layers, PRESENT)


def put(inputs: Tensors, group: CacheGroup, key: Tensor, value: Tensor) -> Tensors:
    """Caches with rows written at their start."""
    return _written(inputs, group, key, value, inputs[_WRITE.name])


def prefill_outputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    """The written caches; a runtime gives them the inputs' memory."""
    return plan.caches(layers, PRESENT)


def store(inputs: Tensors, group: CacheGroup, key: Tensor, value: Tensor) -> Tensors:
    """Caches with a prompt's rows written, behind those that no prompt has."""
    start = inputs[_WRITE.name]
    return _written(inputs, group, key, value, start if group.dropped >= 0 else start - group.dropped)


def shared_inputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    """What `extend` needs: how many rows went by before, and the caches."""
    return (_LENGTH, *plan.caches(layers, PAST))


def extend(
    inputs: Tensors,
    group: CacheGroup,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensors]:
    """Any number of rows written behind those that a cache holds, and their attention to all up to their own."""
    if group.dropped:
        slot = slot.clamp(min=0)  # a prompt begins at 0
    caches = _written(inputs, group, key, value, slot)
    rows = [caches[f"{PRESENT}.{group.name}.{part}"] for part in ("key", "value")]
    # [1, rows]: a range would need the number of rows
    last = (positions * 0 + 1).cumsum(1) - 1 + slot
    seen = _arange(rows[0].shape[2])[None, None, None] <= last[:, None, :, None]
    return onnx_op("Attention", [query, *rows, seen], query), caches


def decode_inputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    return plan.caches(layers, PAST)


def decode_outputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    return plan.caches(layers, PRESENT)


def append(
    inputs: Tensors, group: CacheGroup, query: Tensor, key: Tensor, value: Tensor, slot: Tensor
) -> tuple[Tensor, Tensors]:
    """One row written at `slot` ([1], int64), and the query's attention to the rows up to and including it."""
    caches = _written(inputs, group, key, value, slot)
    keys, values = (caches[f"{PRESENT}.{group.name}.{part}"] for part in ("key", "value"))
    if query.shape[1] < FEWEST_HEADS:
        return _few(query, keys, values, slot), caches
    return onnx_op("Attention", [query, keys, values, None, None, None, slot + 1], query), caches


def _few(query: Tensor, key: Tensor, value: Tensor, slot: Tensor) -> Tensor:
    """The same attention as products and a softmax, of which no runtime has a kernel that it could refuse."""
    _, heads, _, size = query.shape
    kv_heads, rows = key.shape[1], key.shape[2]
    products: Tensor = query.reshape(1, kv_heads, heads // kv_heads, size) * size**-0.5 @ key.transpose(2, 3)
    weights = products.float().masked_fill(_arange(rows) > slot, float("-inf")).softmax(-1)
    attended: Tensor = weights.to(value.dtype) @ value
    return attended.reshape(query.shape)


def _arange(count: int) -> Tensor:
    import torch

    return torch.arange(count)


def _written(inputs: Tensors, group: CacheGroup, key: Tensor, value: Tensor, slot: Tensor) -> Tensors:
    found = {}
    for part, rows in (("key", key), ("value", value)):
        cache = inputs[f"{PAST}.{group.name}.{part}"]
        found[f"{PRESENT}.{group.name}.{part}"] = onnx_op(
            "TensorScatter", [cache, rows, slot], cache, axis=2, mode="linear"
        )
    return found


LOWERING = Lowering(
    name="modern",
    opset=OPSET,
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
    wide=replace(legacy.LOWERING, name="modern", opset=OPSET, rms_norm=rms_norm, layer_norm=layer_norm, rotate=rotate),
    shared_inputs=shared_inputs,
    extend=extend,
)

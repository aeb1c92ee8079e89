"""Decoder arithmetic as functions of tensors, and the graphs that every method shares.

The functions are traced with fake tensors; how attention, norms and caches become operators is the lowering's.
Torch is imported when a function runs, so that reading a method's settings does not load it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter import lowerings
from lvlm_edge.exporter.planning import Plan
from lvlm_edge.runtime.bundle import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from lvlm_edge.exporter.parts import DecoderLayer, Parts


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """A graph to be traced.

    Attributes:
        role: `image`, `prefill` or `decode` (see the manifest).
        body: (parts, plan, inputs by name) -> outputs by name.
    """

    name: str
    role: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    body: Callable[[Any, Plan, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Shapes:
    """Inputs and outputs by their names in the ecosystem, with the plan's shapes."""

    plan: Plan

    def hidden(self, name: str, rows: int) -> TensorInfo:
        return TensorInfo(name, self.plan.dtype, (1, rows, self.plan.spec.decoder.hidden))

    def score(self, name: str, rows: int) -> TensorInfo:
        return TensorInfo(name, "float32", (1, rows))

    def index(self, name: str, *shape: int) -> TensorInfo:
        return TensorInfo(name, "int64", shape)

    def logits(self) -> TensorInfo:
        return TensorInfo("logits", "float32", (1, 1, self.plan.spec.decoder.vocab))


def arange(count: int) -> Tensor:
    """0 .. count-1, [count], int64."""
    import torch

    return torch.arange(count)


def concat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors joined along their first axis."""
    import torch

    return torch.cat(list(tensors))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[1, rows, heads * D_h] to [1, heads, rows, D_h]."""
    _, rows, width = x.shape
    if rows == 1:  # the same bytes: no transposition while decoding
        return x.reshape(1, heads, 1, width // heads)
    return x.reshape(1, rows, heads, width // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[1, heads, rows, D_h] to [1, rows, heads * D_h]."""
    _, heads, rows, size = x.shape
    return x.reshape(1, 1, heads * size) if rows == 1 else x.transpose(1, 2).reshape(1, rows, heads * size)


def ascending(indices: Tensor) -> Tensor:
    """Indices [n], int64, sorted. As floats, exact below 2^24: not every TensorRT sorts integers."""
    values: Tensor = indices.float().topk(indices.shape[0], largest=False).values
    return values.long()


def prefill_inputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    """What the layers' caches need as inputs of a prefill graph."""
    return tuple(lowerings.load(plan.lowering).prefill_inputs(plan, layers))


def prefill_outputs(plan: Plan, layers: Iterable[int], rows: int) -> tuple[TensorInfo, ...]:
    """What a prefill graph returns for the layers' caches after that many rows."""
    return tuple(lowerings.load(plan.lowering).prefill_outputs(plan, layers, rows))


def project(parts: Parts, layer: DecoderLayer, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, both rotated in the rotate-half convention, and values of a layer.

    Args:
        x: hidden states, [1, rows, D].
        positions: original positions of the rows, [1, rows], int64.

    Returns:
        [1, H, rows, D_h], [1, H_kv, rows, D_h], [1, H_kv, rows, D_h].
    """
    d, ops, tables = parts.spec.decoder, parts.ops, (parts.rope_cos, parts.rope_sin)
    normed = ops.rms_norm(x, layer.input_layernorm.weight, d.eps)
    query = ops.rotate(split_heads(layer.q_proj(normed), d.heads), *tables, positions)
    key = ops.rotate(split_heads(layer.k_proj(normed), d.kv_heads), *tables, positions)
    return query, key, split_heads(layer.v_proj(normed), d.kv_heads)


def finish(parts: Parts, layer: DecoderLayer, x: Tensor, attended: Tensor) -> Tensor:
    """Output projection, residual, feed-forward, residual."""
    x = x + layer.o_proj(join_heads(attended))
    normed = parts.ops.rms_norm(x, layer.post_attention_layernorm.weight, parts.spec.decoder.eps)
    out: Tensor = x + layer.down_proj(parts.act(layer.gate_proj(normed)) * layer.up_proj(normed))
    return out


def prefill_layers(
    parts: Parts, plan: Plan, layers: Iterable[int], inputs: dict[str, Tensor], entry: str
) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Layers over fresh rows with causal attention; right padding needs no mask of its own.

    Args:
        inputs: `entry` [1, S, D], `position_ids` [1, S], and what `prefill_inputs` names.

    Returns:
        hidden states after the last layer, its rotated (query, key), and the caches' outputs by name.
    """
    x, positions = inputs[entry], inputs["position_ids"]
    caches: dict[str, Tensor] = {}
    for i in layers:
        query, key, value = project(parts, parts.layers[i], x, positions)
        caches |= parts.ops.store(inputs, i, key, value)
        x = finish(parts, parts.layers[i], x, parts.ops.attend(query, key, value, positions))
    return x, (query, key), caches


def logits(parts: Parts, x: Tensor, row: Tensor) -> Tensor:
    """Logits of one row of the last hidden states, [1, 1, vocab], float32."""
    return _head(parts, x.index_select(1, row))


def _head(parts: Parts, x: Tensor) -> Tensor:
    """Last norm and lm_head: hidden states [1, rows, D] to logits [1, rows, vocab], float32."""
    result: Tensor = parts.lm_head(parts.ops.rms_norm(x, parts.norm.weight, parts.spec.decoder.eps)).float()
    return result


def vision_graph(plan: Plan) -> GraphSpec:
    """pixel_values of one crop to the tower's features, and their projection with the crop's separator.

    A model without a projector has the features alone.
    """
    v = plan.spec.vision
    wide = len(v.feature_layers) * v.hidden
    features = TensorInfo("image_features", plan.dtype, (1, v.tokens, wide))
    embeds = TensorInfo("image_embeds", plan.dtype, (1, v.tokens + plan.spec.newline, plan.spec.decoder.hidden))
    return GraphSpec(
        name="vision",
        role="image",
        inputs=(TensorInfo("pixel_values", plan.dtype, (1, v.channels, v.image_size, v.image_size)),),
        outputs=(features,) if plan.spec.projector_act is None else (features, embeds),
        body=_vision,
    )


def _vision(parts: Parts, plan: Plan, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    features = parts.vision(inputs["pixel_values"])
    if plan.spec.projector_act is None:
        return {"image_features": features}
    embeds = parts.projector(features)
    if plan.spec.newline:
        embeds = concat([embeds[0], parts.newline[None]])[None]
    return {"image_features": features, "image_embeds": embeds}


def decode_graph(plan: Plan) -> GraphSpec:
    """One token through every layer, each with its own cache capacity, from one cache length."""
    shapes, ops = Shapes(plan), lowerings.load(plan.lowering)
    layers = range(plan.spec.decoder.layers)
    return GraphSpec(
        name="decode",
        role="decode",
        inputs=(
            shapes.hidden("inputs_embeds", 1),
            shapes.index("position_ids", 1, 1),
            shapes.index("cache_length", 1),
            *ops.decode_inputs(plan, layers),
        ),
        outputs=(shapes.logits(), *ops.decode_outputs(plan, layers)),
        body=_decode,
    )


def _decode(parts: Parts, plan: Plan, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x, positions = inputs["inputs_embeds"], inputs["position_ids"]
    caches: dict[str, Tensor] = {}
    # One length input: two independent ones stop TensorRT-RTX's compiler, a derived one does not.
    slots = {n: inputs["cache_length"] - n if n else inputs["cache_length"] for n in sorted(_dropped(plan))}
    for i in range(plan.spec.decoder.layers):
        slot = slots[plan.dropped(i)]
        query, key, value = project(parts, parts.layers[i], x, positions)
        attended, outputs = parts.ops.append(inputs, i, query, key, value, slot)
        caches |= outputs
        x = finish(parts, parts.layers[i], x, attended)
    return {"logits": _head(parts, x), **caches}


def _dropped(plan: Plan) -> set[int]:
    return {plan.dropped(i) for i in range(plan.spec.decoder.layers)}

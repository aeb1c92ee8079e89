"""Decoder arithmetic as functions of tensors, and the graphs that every method shares.

The functions are traced with fake tensors. Operators that ONNX has and PyTorch has not (`Attention`,
`RotaryEmbedding`, `RMSNormalization`, `TensorScatter` of opset 24) are written into the graph as they are.
Torch is imported when a function runs, so that reading a method's settings does not load it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.planning import Plan
from lvlm_edge.runtime.bundle import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from lvlm_edge.exporter.parts import DecoderLayer, Parts

OPSET = 24


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

    def caches(self, layers: Iterable[int], prefix: str) -> tuple[TensorInfo, ...]:
        d = self.plan.spec.decoder
        return tuple(
            TensorInfo(f"{prefix}.{i}.{part}", self.plan.dtype, (1, d.kv_heads, self.plan.capacity(i), d.head_dim))
            for i in layers
            for part in ("key", "value")
        )


def onnx_op(name: str, inputs: Sequence[Tensor | None], like: Tensor, **attributes: Any) -> Tensor:
    """An ONNX operator with one output of the shape and dtype of `like`."""
    import torch

    result: Tensor = torch.onnx.ops.symbolic(
        name, inputs, attributes, dtype=like.dtype, shape=like.shape, version=OPSET
    )
    return result


def arange(count: int) -> Tensor:
    """0 .. count-1, [count], int64."""
    import torch

    return torch.arange(count)


def concat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors joined along their first axis."""
    import torch

    return torch.cat(list(tensors))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis; the normalisation in float32."""
    return onnx_op("RMSNormalization", [x, weight], x, axis=-1, epsilon=eps, stash_type=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding in the rotate-half convention.

    Args:
        x: queries or keys, [1, heads, rows, D_h].
        cos, sin: tables, [positions, D_h / 2].
        positions: original positions of the rows, [1, rows], int64.
    """
    return onnx_op("RotaryEmbedding", [x, cos, sin, positions], x)


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """Softmax attention among fresh rows; query head h reads key head h * H_kv // H. [1, H, S, D_h]."""
    return onnx_op("Attention", [query, key, value], query, is_causal=int(causal))


def attend_cache(query: Tensor, key: Tensor, value: Tensor, length: Tensor) -> Tensor:
    """One query row against the first `length` rows of the caches; `length` is [1], int64."""
    return onnx_op("Attention", [query, key, value, None, None, None, length], query)


def write_cache(cache: Tensor, rows: Tensor, slot: Tensor) -> Tensor:
    """The cache [1, H_kv, C, D_h] with `rows` [1, H_kv, R, D_h] from `slot` ([1], int64) on; in place at run time."""
    return onnx_op("TensorScatter", [cache, rows, slot], cache, axis=2, mode="linear")


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


def project(parts: Parts, layer: DecoderLayer, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, rotated keys and values of a layer for the rows of x."""
    d = parts.spec.decoder
    normed = rms_norm(x, layer.input_layernorm.weight, d.eps)
    query = rotate(split_heads(layer.q_proj(normed), d.heads), parts.rope_cos, parts.rope_sin, positions)
    key = rotate(split_heads(layer.k_proj(normed), d.kv_heads), parts.rope_cos, parts.rope_sin, positions)
    return query, key, split_heads(layer.v_proj(normed), d.kv_heads)


def finish(parts: Parts, layer: DecoderLayer, x: Tensor, attended: Tensor) -> Tensor:
    """Output projection, residual, feed-forward, residual."""
    x = x + layer.o_proj(join_heads(attended))
    normed = rms_norm(x, layer.post_attention_layernorm.weight, parts.spec.decoder.eps)
    out: Tensor = x + layer.down_proj(parts.act(layer.gate_proj(normed)) * layer.up_proj(normed))
    return out


def prefill_layers(
    parts: Parts, plan: Plan, layers: Iterable[int], inputs: dict[str, Tensor], entry: str
) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Layers over fresh rows with causal attention; right padding makes a mask unnecessary.

    Args:
        inputs: `entry` [1, S, D], `position_ids` [1, S], `write_index` [1] (0), and the layers' caches.

    Returns:
        hidden states after the last layer, its rotated (query, key), and the written caches by name.
    """
    x, positions, write = inputs[entry], inputs["position_ids"], inputs["write_index"]
    caches: dict[str, Tensor] = {}
    for i in layers:
        query, key, value = project(parts, parts.layers[i], x, positions)
        for part, rows in (("key", key), ("value", value)):
            caches[f"present.{i}.{part}"] = write_cache(inputs[f"past_key_values.{i}.{part}"], rows, write)
        x = finish(parts, parts.layers[i], x, attend(query, key, value, causal=True))
    return x, (query, key), caches


def logits(parts: Parts, x: Tensor, row: Tensor) -> Tensor:
    """Logits of one row of the last hidden states, [1, 1, vocab], float32."""
    chosen = x.index_select(1, row)
    normed = rms_norm(chosen, parts.norm.weight, parts.spec.decoder.eps)
    result: Tensor = parts.lm_head(normed).float()
    return result


def vision_graph(plan: Plan) -> GraphSpec:
    """pixel_values of one image to the tower's features and their projection."""
    v = plan.spec.vision
    wide = len(v.feature_layers) * v.hidden
    return GraphSpec(
        name="vision",
        role="image",
        inputs=(TensorInfo("pixel_values", plan.dtype, (1, v.channels, v.image_size, v.image_size)),),
        outputs=(
            TensorInfo("image_features", plan.dtype, (1, v.tokens, wide)),
            TensorInfo("image_embeds", plan.dtype, (1, v.tokens, plan.spec.decoder.hidden)),
        ),
        body=_vision,
    )


def _vision(parts: Parts, plan: Plan, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    features = parts.vision(inputs["pixel_values"])
    return {"image_features": features, "image_embeds": parts.projector(features)}


def decode_graph(plan: Plan) -> GraphSpec:
    """One token through every layer, each with its own cache capacity, from one cache length."""
    shapes = Shapes(plan)
    layers = range(plan.spec.decoder.layers)
    return GraphSpec(
        name="decode",
        role="decode",
        inputs=(
            shapes.hidden("inputs_embeds", 1),
            shapes.index("position_ids", 1, 1),
            shapes.index("cache_length", 1),
            *shapes.caches(layers, "past_key_values"),
        ),
        outputs=(shapes.logits(), *shapes.caches(layers, "present")),
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
        written = [
            write_cache(inputs[f"past_key_values.{i}.{part}"], rows, slot)
            for part, rows in (("key", key), ("value", value))
        ]
        caches[f"present.{i}.key"], caches[f"present.{i}.value"] = written
        x = finish(parts, parts.layers[i], x, attend_cache(query, written[0], written[1], slot + 1))
    normed = rms_norm(x, parts.norm.weight, parts.spec.decoder.eps)
    return {"logits": parts.lm_head(normed).float(), **caches}


def _dropped(plan: Plan) -> set[int]:
    return {plan.dropped(i) for i in range(plan.spec.decoder.layers)}

"""Decoder arithmetic as functions of tensors, and the graphs that every method shares.

The functions are traced with fake tensors; how attention, norms and caches become operators is the lowering's.
Torch is imported when a function runs, so that reading a method's settings does not load it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter import lowerings
from lvlm_edge.exporter.planning import CacheGroup, Plan
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.kv_cache import PAST, PRESENT

if TYPE_CHECKING:
    from torch import Tensor

    from lvlm_edge.exporter.graphs.parts import DecoderLayer, Linear, Parts


Body = Callable[[Any, Plan, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """A graph to be traced.

    Attributes:
        role: `image`, `prefill` or `decode` (see the manifest).
        body: (parts, plan, inputs by name) -> outputs by name.
        dynamic_rows: the graph takes any number of rows up to this one; None where its shapes are fixed.
        file: name of the graph that is traced, where this one runs it with other shapes.
        names: what that graph calls a tensor, where the name differs.
    """

    name: str
    role: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    body: Body
    dynamic_rows: int | None = None
    file: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)


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


def constant(values: Sequence[int]) -> Tensor:
    """Numbers known at export, [n], int64."""
    import torch

    return torch.tensor(list(values))


def concat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors joined along an axis."""
    import torch

    return torch.cat(list(tensors), axis)


def where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Elements of one or the other tensor."""
    import torch

    return torch.where(condition, yes, no)


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


def pick(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of [1, heads, rows, D_h], in that order; the tensor itself where that is all of them."""
    if heads == tuple(range(x.shape[1])):
        return x
    return x.index_select(1, constant(heads))


def prefill_inputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    """What the layers' caches need as inputs of a prefill graph."""
    return tuple(lowerings.load(plan.lowering).prefill_inputs(plan, layers))


def beside_outputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    """What a graph returns that fills the layers' caches before the prompt's rows."""
    return tuple(lowerings.load(plan.lowering).beside_outputs(plan, layers))


def prefill_outputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    """What a prefill graph returns for the layers' caches."""
    return tuple(lowerings.load(plan.lowering).prefill_outputs(plan, layers))


@dataclass(frozen=True)
class Segment:
    """A run of layers that is one graph.

    Attributes:
        entry: name of the hidden states it reads.
        result: name of those it returns; None where it returns logits.
    """

    name: str
    layers: range
    entry: str
    result: str | None


def segments(plan: Plan, name: str, layers: range, entry: str, result: str | None = None) -> tuple[Segment, ...]:
    """Layers as graphs no larger than the plan allows; numbered where they are several."""
    runs = plan.segments(layers)
    names = [name] if len(runs) == 1 else [f"{name}.{i}" for i in range(len(runs))]
    states = [entry, *(f"hidden.{run.start}" for run in runs[1:]), result]
    return tuple(
        Segment(names[i], run, str(states[i]), states[i + 1])  # only the last state can be None
        for i, run in enumerate(runs)
    )


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


def some_heads(x: Tensor, linear: Linear, wanted: tuple[int, ...], count: int) -> Tensor:
    """Some of the `count` heads that a projection makes of [1, rows, D], [1, wanted, rows, D_h]."""
    if wanted == tuple(range(count)):
        return split_heads(linear(x), count)
    inputs, outputs = linear.weight.shape
    weight = linear.weight.reshape(inputs, count, outputs // count).index_select(1, constant(wanted))
    y = x @ weight.reshape(inputs, -1)
    if linear.bias is not None:
        y = y + linear.bias.reshape(count, -1).index_select(0, constant(wanted)).reshape(-1)
    return split_heads(y, len(wanted))


def finish(parts: Parts, layer: DecoderLayer, x: Tensor, attended: Tensor) -> Tensor:
    """Output projection, residual, feed-forward, residual."""
    return feed_forward(parts, layer, x + layer.o_proj(join_heads(attended)))


def feed_forward(parts: Parts, layer: DecoderLayer, x: Tensor) -> Tensor:
    """A layer's second half, with its residual."""
    normed = parts.ops.rms_norm(x, layer.post_attention_layernorm.weight, parts.spec.decoder.eps)
    out: Tensor = x + layer.down_proj(parts.act(layer.gate_proj(normed)) * layer.up_proj(normed))
    return out


def prefill_layers(
    parts: Parts, plan: Plan, layers: Iterable[int], inputs: dict[str, Tensor], x: Tensor, positions: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Layers over the rows of a prompt, with causal attention; right padding needs no mask of its own.

    Args:
        inputs: what the lowering wants for caches (`prefill_inputs`, or `shared_inputs` where weights are shared).
        x: hidden states, [1, S, D].
        positions: [1, S], ascending.

    Returns:
        hidden states after the last layer, its rotated query and the rotated keys, and the caches' outputs by name.
    """
    caches: dict[str, Tensor] = {}
    for i in layers:
        (group,) = plan.groups(i)
        query, key, value = project(parts, parts.layers[i], x, positions)
        if plan.share_weights:
            attended, written = parts.ops.extend(inputs, group, query, key, value, positions)
            key = written[f"{PRESENT}.{group.name}.key"]
        else:
            attended = parts.ops.attend(query, key, value, positions)
            written = parts.ops.store(inputs, group, key, value)
        caches |= written
        x = finish(parts, parts.layers[i], x, attended)
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


def prefill_graph(
    plan: Plan,
    segment: Segment,
    rows: int,
    *,
    kept: str = "",
    inputs: tuple[TensorInfo, ...] = (),
    outputs: tuple[TensorInfo, ...] = (),
    body: Body | None = None,
) -> GraphSpec:
    """A segment over the rows of a prompt.

    Args:
        kept: prefix of the names of positions and last row, `kept_` after a reduction.
        inputs: further ones, for a `body` of its own.
        body: by default the layers with causal attention, and logits at the end.
    """
    shapes, ops = Shapes(plan), lowerings.load(plan.lowering)
    positions, last = f"{kept}position_ids", f"{kept}last_index"
    ends = segment.result is None
    wanted = (shapes.index(last, 1),) if ends or inputs else ()
    before = ops.shared_inputs if plan.share_weights else ops.prefill_inputs
    return GraphSpec(
        name=segment.name,
        role="prefill",
        inputs=(
            shapes.hidden(segment.entry, rows),
            shapes.index(positions, 1, rows),
            *wanted,
            *inputs,
            *before(plan, segment.layers),
        ),
        outputs=(
            shapes.logits() if segment.result is None else shapes.hidden(segment.result, rows),
            *outputs,
            *ops.prefill_outputs(plan, segment.layers),
        ),
        body=body or partial(_prefill, segment=segment, positions=positions, last=last),
        dynamic_rows=rows if plan.share_weights else None,
    )


def _prefill(
    parts: Parts, plan: Plan, inputs: dict[str, Tensor], *, segment: Segment, positions: str, last: str
) -> dict[str, Tensor]:
    x, _, caches = prefill_layers(parts, plan, segment.layers, inputs, inputs[segment.entry], inputs[positions])
    if segment.result is None:
        return {"logits": logits(parts, x, inputs[last]), **caches}
    return {segment.result: x, **caches}


def decode_graphs(plan: Plan, prefill: Sequence[GraphSpec]) -> tuple[GraphSpec, ...]:
    """One token through every layer, each cache with its own capacity, from one cache length.

    Args:
        prefill: the graphs of a prompt, in order; where weights are shared they are those of decode too.
    """
    if plan.share_weights:
        return _shared_decode(plan, [graph for graph in prefill if graph.dynamic_rows])
    shapes, ops = Shapes(plan), lowerings.load(plan.lowering)
    return tuple(
        GraphSpec(
            name=segment.name,
            role="decode",
            inputs=(
                shapes.hidden(segment.entry, 1),
                shapes.index("position_ids", 1, 1),
                shapes.index("cache_length", 1),
                *ops.decode_inputs(plan, segment.layers),
            ),
            outputs=(
                shapes.logits() if segment.result is None else shapes.hidden(segment.result, 1),
                *ops.decode_outputs(plan, segment.layers),
            ),
            body=partial(_decode, segment=segment),
        )
        for segment in segments(plan, "decode", range(plan.spec.decoder.layers), "inputs_embeds")
    )


def _shared_decode(plan: Plan, graphs: Sequence[GraphSpec]) -> tuple[GraphSpec, ...]:
    """The graphs of a prompt once more, for one row; each reads the hidden states that the one before returns."""
    found: list[GraphSpec] = []
    state = graphs[0].inputs[0].name
    for graph in graphs:
        rows = graph.dynamic_rows
        assert rows is not None
        names = {graph.inputs[0].name: state} | {t.name: t.name.removeprefix("kept_") for t in graph.inputs[1:]}
        single = [
            tuple(replace(t, name=names.get(t.name, t.name), shape=one_row(t, rows)) for t in tensors)
            for tensors in (graph.inputs, graph.outputs)
        ]
        found.append(
            replace(
                graph,
                name="decode" if len(graphs) == 1 else f"decode.{len(found)}",
                role="decode",
                inputs=single[0],
                outputs=single[1],
                file=graph.name,
                names={to: name for name, to in names.items() if to != name},
            )
        )
        state = graph.outputs[0].name
    return tuple(found)


def one_row(info: TensorInfo, rows: int) -> tuple[int, ...]:
    """Shape of a tensor of a graph with a number of rows given at run time, when that number is 1."""
    axis = row_axis(info, rows)
    return info.shape if axis is None else (*info.shape[:axis], 1, *info.shape[axis + 1 :])


def row_axis(info: TensorInfo, rows: int) -> int | None:
    """The axis of a tensor along which a prompt's rows lie; None for caches and what has one value per prompt."""
    cache = info.name.startswith((PAST, PRESENT))
    return 1 if len(info.shape) in (2, 3) and info.shape[1] == rows and not cache and info.name != "score" else None


def _decode(parts: Parts, plan: Plan, inputs: dict[str, Tensor], *, segment: Segment) -> dict[str, Tensor]:
    x, positions, length = inputs[segment.entry], inputs["position_ids"], inputs["cache_length"]
    caches: dict[str, Tensor] = {}
    # One length input: two independent ones stop TensorRT-RTX's compiler, a derived one does not.
    slots = {n: length - n if n else length for n in sorted(_dropped(plan, segment.layers))}
    for i in segment.layers:
        query, key, value = project(parts, parts.layers[i], x, positions)
        attended = []
        for group in plan.groups(i):
            heads = pick(query, group.queries), pick(key, group.kv_heads), pick(value, group.kv_heads)
            result, outputs = parts.ops.append(inputs, group, *heads, slots[group.dropped])
            attended.append(result)
            caches |= outputs
        x = finish(parts, parts.layers[i], x, merged(plan.groups(i), attended))
    if segment.result is None:
        return {"logits": _head(parts, x), **caches}
    return {segment.result: x, **caches}


def merged(groups: Sequence[CacheGroup], attended: Sequence[Tensor]) -> Tensor:
    """Results of a layer's groups, [1, queries, rows, D_h] each, as one tensor with the heads in their order."""
    if len(groups) == 1:
        return attended[0]
    computed = [(head, group.owned) for group in groups for head in group.queries]
    heads = range(max(head for head, _ in computed) + 1)
    order = [next(i for i, (h, owned) in enumerate(computed) if h == head and head in owned) for head in heads]
    return pick(concat(attended, 1), tuple(order))


def _dropped(plan: Plan, layers: Iterable[int]) -> set[int]:
    return {group.dropped for layer in layers for group in plan.groups(layer)}

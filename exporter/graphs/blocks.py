"""Decoder arithmetic as functions of tensors, and the graphs that every method shares.

The functions are traced with fake tensors; how attention, norms and caches become operators is the lowering's.
Torch is imported when a function runs, so that reading a method's settings does not load it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from lvlm_edge.exporter.graphs.rotary import Rotation, rotation, turned
from lvlm_edge.exporter.planning import Body, CacheGroup, GraphSpec, Plan, Tensors
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.bundle.kv_cache import LENGTHS, PRESENT

if TYPE_CHECKING:
    from torch import Tensor

    from lvlm_edge.exporter.graphs.parts import DecoderLayer, Linear, Parts


@dataclass(frozen=True)
class Shapes:
    """Inputs and outputs by their names in the ecosystem, with the plan's shapes."""

    plan: Plan

    def hidden(self, name: str, rows: int) -> TensorInfo:
        return TensorInfo(name, self.plan.dtype, (1, rows, self.plan.spec.decoder.hidden))

    def score(self, name: str, rows: int) -> TensorInfo:
        return TensorInfo(name, "float32", (1, rows))

    def positions(self, name: str, rows: int) -> TensorInfo:
        return TensorInfo(name, "int64", (self.plan.axes, rows))

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
    return plan.lowering.prefill_inputs(plan, layers)


def leading_outputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    """What a graph returns that fills the layers' caches before the prompt's rows."""
    return plan.lowering.leading_outputs(plan, layers)


def prefill_outputs(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    """What a prefill graph returns for the layers' caches."""
    return plan.lowering.prefill_outputs(plan, layers)


@dataclass(frozen=True)
class Subgraph:
    """A run of layers that is one graph.

    Attributes:
        entry: name of the hidden states it reads.
        result: name of those it returns; None where it returns logits.
    """

    name: str
    layers: range
    entry: str
    result: str | None


def subgraphs(plan: Plan, name: str, layers: range, entry: str, result: str | None = None) -> tuple[Subgraph, ...]:
    """Layers as graphs no larger than the plan allows; numbered where they are several."""
    runs = plan.subgraphs(layers)
    names = [name] if len(runs) == 1 else [f"{name}.{i}" for i in range(len(runs))]
    states = [entry, *(f"hidden.{run.start}" for run in runs[1:]), result]
    return tuple(
        Subgraph(names[i], run, str(states[i]), states[i + 1])  # only the last state can be None
        for i, run in enumerate(runs)
    )


def project(parts: Parts, layer: DecoderLayer, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, both rotated, and values of a layer.

    Args:
        x: hidden states, [1, rows, D].
        rotation: of the rows.

    Returns:
        [1, H, rows, D_h], [1, H_kv, rows, D_h], [1, H_kv, rows, D_h].
    """
    d, ops = parts.spec.decoder, parts.ops
    normed = ops.rms_norm(x, layer.input_layernorm.weight, d.eps)
    query, key = split_heads(layer.q_proj(normed), d.heads), split_heads(layer.k_proj(normed), d.kv_heads)
    if d.qk_norm:
        query = ops.rms_norm(query, layer.q_norm.weight, d.eps)
        key = ops.rms_norm(key, layer.k_norm.weight, d.eps)
    value = split_heads(layer.v_proj(normed), d.kv_heads)
    return turned(parts, query, rotation), turned(parts, key, rotation), value


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
    parts: Parts, plan: Plan, layers: Iterable[int], inputs: Tensors, x: Tensor, positions: Tensor, kept: str = ""
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensors]:
    """Layers over the rows of a prompt, with causal attention; right padding needs no mask of its own.

    Args:
        inputs: what the lowering wants for caches (`prefill_inputs`, or `shared_inputs` where weights are shared), and
            what is added to visual rows after a layer.
        x: hidden states, [1, S, D].
        positions: [axes, S].
        kept: prefix of the names of what is added, `kept_` after a reduction.

    Returns:
        hidden states after the last layer, its rotated query and the rotated keys, and the caches' outputs by name.
    """
    caches: Tensors = {}
    turn, extend = rotation(parts, positions), parts.ops.extend
    for i in layers:
        (group,) = plan.groups(i)
        query, key, value = project(parts, parts.layers[i], x, turn)
        if plan.share_weights:
            assert extend is not None
            slot = _slots(plan, inputs["cache_length"], {group.dropped})[group.dropped]
            attended, written = extend(inputs, group, query, key, value, slot, positions[:1])
            key = written[f"{PRESENT}.{group.name}.key"]
        else:
            attended = parts.ops.attend(query, key, value, True)
            written = parts.ops.store(inputs, group, key, value)
        caches |= written
        x = finish(parts, parts.layers[i], x, attended)
        if i < len(plan.injected):
            x = x + inputs[f"{kept}{plan.injected[i]}"]
    return x, (query, key), caches


def injected(plan: Plan, layers: Iterable[int], rows: int, kept: str = "") -> tuple[TensorInfo, ...]:
    """What is added to the rows after each of some layers, [1, rows, D]: zeros at rows of text."""
    names = [plan.injected[i] for i in layers if i < len(plan.injected)]
    return tuple(Shapes(plan).hidden(f"{kept}{name}", rows) for name in names)


def logits(parts: Parts, x: Tensor, row: Tensor) -> Tensor:
    """Logits of one row of the last hidden states, [1, 1, vocab], float32."""
    return _head(parts, x.index_select(1, row))


def _head(parts: Parts, x: Tensor) -> Tensor:
    """Last norm and lm_head: hidden states [1, rows, D] to logits [1, rows, vocab], float32."""
    result: Tensor = parts.lm_head(parts.ops.rms_norm(x, parts.norm.weight, parts.spec.decoder.eps)).float()
    return result


def prefill_graph(
    plan: Plan,
    subgraph: Subgraph,
    rows: int,
    *,
    kept: str = "",
    inputs: tuple[TensorInfo, ...] = (),
    outputs: tuple[TensorInfo, ...] = (),
    body: Body | None = None,
) -> GraphSpec:
    """A subgraph over the rows of a prompt.

    Args:
        kept: prefix of the names of positions and last row, `kept_` after a reduction.
        inputs: further ones, for a `body` of its own.
        body: by default the layers with causal attention, and logits at the end.
    """
    shapes, ops = Shapes(plan), plan.lowering
    positions, last = f"{kept}position_ids", f"{kept}last_index"
    ends = subgraph.result is None
    wanted = (shapes.index(last, 1),) if ends or inputs else ()
    before = ops.shared_inputs if plan.share_weights else ops.prefill_inputs
    assert before is not None
    added = injected(plan, subgraph.layers, rows, kept)
    states = [
        subgraph.entry,
        positions,
        *(info.name for info in added),
        *([subgraph.result] if subgraph.result else []),
    ]
    return GraphSpec(
        name=subgraph.name,
        role="prefill",
        inputs=(
            shapes.hidden(subgraph.entry, rows),
            shapes.positions(positions, rows),
            *wanted,
            *inputs,
            *added,
            *before(plan, subgraph.layers),
        ),
        outputs=(
            shapes.logits() if subgraph.result is None else shapes.hidden(subgraph.result, rows),
            *outputs,
            *ops.prefill_outputs(plan, subgraph.layers),
        ),
        body=body or partial(_prefill, subgraph=subgraph, kept=kept),
        dynamic_rows=rows if plan.share_weights else None,
        row_axes=dict.fromkeys(states, 1),
    )


def _prefill(parts: Parts, plan: Plan, inputs: Tensors, *, subgraph: Subgraph, kept: str) -> Tensors:
    positions = inputs[f"{kept}position_ids"]
    x, _, caches = prefill_layers(parts, plan, subgraph.layers, inputs, inputs[subgraph.entry], positions, kept)
    if subgraph.result is None:
        return {"logits": logits(parts, x, inputs[f"{kept}last_index"]), **caches}
    return {subgraph.result: x, **caches}


def decode_graphs(plan: Plan, prefill: Sequence[GraphSpec]) -> tuple[GraphSpec, ...]:
    """One token through every layer, each cache with its own capacity, from one cache length.

    Args:
        prefill: the graphs of a prompt, in order; where weights are shared they are those of decode too.
    """
    if plan.share_weights:
        return _shared_decode(plan, [graph for graph in prefill if graph.dynamic_rows])
    shapes, ops = Shapes(plan), plan.lowering
    return tuple(
        GraphSpec(
            name=subgraph.name,
            role="decode",
            inputs=(
                shapes.hidden(subgraph.entry, 1),
                shapes.positions("position_ids", 1),
                shapes.index("cache_length", 1),
                *ops.decode_inputs(plan, subgraph.layers),
            ),
            outputs=(
                shapes.logits() if subgraph.result is None else shapes.hidden(subgraph.result, 1),
                *ops.decode_outputs(plan, subgraph.layers),
            ),
            body=partial(_decode, subgraph=subgraph),
        )
        for subgraph in subgraphs(plan, "decode", range(plan.spec.decoder.layers), "inputs_embeds")
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
            tuple(replace(t, name=names.get(t.name, t.name), shape=one_row(graph, t)) for t in tensors)
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


def one_row(graph: GraphSpec, info: TensorInfo) -> tuple[int, ...]:
    """Shape of a tensor of a graph with a number of rows given at run time, when that number is 1."""
    axis = graph.row_axes.get(info.name)
    return info.shape if axis is None else (*info.shape[:axis], 1, *info.shape[axis + 1 :])


def _decode(parts: Parts, plan: Plan, inputs: Tensors, *, subgraph: Subgraph) -> Tensors:
    x, positions, length = inputs[subgraph.entry], inputs["position_ids"], inputs["cache_length"]
    caches: Tensors = {}
    slots = _slots(plan, length, _dropped(plan, subgraph.layers))
    turn = rotation(parts, positions[:1])  # a text row has one position on all axes
    for i in subgraph.layers:
        query, key, value = project(parts, parts.layers[i], x, turn)
        attended = []
        for group in plan.groups(i):
            heads = pick(query, group.queries), pick(key, group.kv_heads), pick(value, group.kv_heads)
            result, outputs = parts.ops.append(inputs, group, *heads, slots[group.dropped])
            attended.append(result)
            caches |= outputs
        x = finish(parts, parts.layers[i], x, merged(plan.groups(i), attended))
    if subgraph.result is None:
        return {"logits": _head(parts, x), **caches}
    return {subgraph.result: x, **caches}


def merged(groups: Sequence[CacheGroup], attended: Sequence[Tensor]) -> Tensor:
    """Results of a layer's groups, [1, queries, rows, D_h] each, as one tensor with the heads in their order."""
    if len(groups) == 1:
        return attended[0]
    computed = [(head, group.owned) for group in groups for head in group.queries]
    heads = range(max(head for head, _ in computed) + 1)
    order = [next(i for i, (h, owned) in enumerate(computed) if h == head and head in owned) for head in heads]
    return pick(concat(attended, 1), tuple(order))


def _slots(plan: Plan, length: Tensor, dropped: set[int]) -> dict[int, Tensor]:
    """Rows that caches hold, [1] int64, by the number of rows that they drop of a full prompt.

    There is one length input: two independent ones stop TensorRT-RTX's compiler, derived ones do not. Where fewer
    pictures may come, it says in its high part how many rows are not dropped (`kv_cache.coded_length`).
    """
    everywhere = {group.dropped for group in plan.all_groups()}
    if not plan.method.fewer_pictures or everywhere == {0}:
        return {n: length - n if n else length for n in sorted(dropped)}
    # A power of two, and far fewer rows: exact in float32. A floor division of integers would be seven operators.
    restored = (length.float() * (1 / LENGTHS)).long()
    rows = length - restored * LENGTHS
    return {n: rows - n + restored if n else rows for n in sorted(dropped)}


def _dropped(plan: Plan, layers: Iterable[int]) -> set[int]:
    return {group.dropped for layer in layers for group in plan.groups(layer)}

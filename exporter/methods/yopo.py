"""YOPO: visual tokens skip heads, FFN channels, far neighbours and the late layers (arXiv:2410.06169).

The release is a simulation by masks, and it zeroes attention to visual tokens after the softmax, where their share is
already taken. Two semantics follow: `released` computes just that, so that published checkpoints say what they say in
PyTorch, and saves little; `dropped` removes what the simulation stands for: from the cutoff layer on there are no
visual tokens, below it they have the kept heads and the first FFN channels alone, and pruned heads see only text.

The release also runs on Qwen2-VL and InternVL2 without training. A head mask has a column per query head; a KV head is
left out for visual tokens where the mask prunes every query head that reads it.

- Qwen2-VL: the release masks visual tokens out from the cutoff on before the softmax, in the rows of text, so nobody
  reads them there and `released` leaves them out too; pruned heads are zeroed after the softmax. It takes the text to
  begin as many rows too early as stand before the picture; here it begins behind the picture. The release prunes no
  head of its first two layers; here the mask says so of every layer.
- InternVL2: `released` is that of LLaVA. Its release was not at hand.
- Windows are off in the release's Qwen2-VL (`none`): visual tokens see all rows before them. Its own window is a token
  itself; here a window is a square on the picture's grid, of any rectangle, as for LLaVA. With several tiles, and with
  the view of the whole picture, a token's neighbours are those of its own view.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.graphs.rotary import Rotation, last_rows, rotation, turned
from lvlm_edge.exporter.methods._yopo_counts import (
    OFF,
    Config,
    cache_groups,
    cells,
    channels,
    heads,
    limit,
    nominal,
    paper,
    released,
    resolve,
    stages,
    tiles_of,
)
from lvlm_edge.exporter.planning import (
    GraphSpec,
    Method,
    Plan,
    Tensors,
)
from lvlm_edge.runtime.bundle import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from lvlm_edge.exporter.graphs.parts import DecoderLayer, Linear, Parts


# Graphs. Visual tokens and text are apart from the start: they use different weights.


def seen(plan: Plan, inputs: Tensors) -> Tensor:
    """Which rows see which keys, both visual tokens, then text, [V + T, V + T], bool.

    Causal, but that visual tokens with a window see their neighbours on all sides, and no other visual token.
    """
    visual, text = inputs["visual_index"], inputs["text_index"]
    if plan.config.window == OFF:
        reach, apart = 0, visual[None] - visual[:, None]
    else:
        reach = (plan.config.window - 1) // 2
        apart = distances(visual - visual[:1], cells(tiles_of(plan.pictures, plan.spec), reach))
    # One comparison at the end: TensorRT-RTX 1.7.1 ends with a segmentation fault on joined and combined booleans.
    later = (text[None] - visual[:, None]) * (reach + 1)  # beyond reach where text comes after the image
    of_text = (blocks.concat([visual, text])[None] - text[:, None]) * (reach + 1)
    sees: Tensor = blocks.concat([blocks.concat([apart, later], 1), of_text]) <= reach
    return sees


def distances(index: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """Rows or columns between visual tokens, whichever are more, [V, V], int64.

    Args:
        index: of each visual token among the places, as data: of a constant the whole square would become one.
        places: (row, column).
    """
    rows, columns = zip(*places, strict=True)
    at = [blocks.constant(table).index_select(0, index) for table in (rows, columns)]
    down, across = ((x[:, None] - x[None]).abs() for x in at)
    return down.maximum(across)


def run(parts: Parts, plan: Plan, inputs: Tensors, *, subgraph: blocks.Subgraph) -> Tensors:
    """Layers of the subgraph, with visual tokens as far as they go."""
    first, positions = subgraph.layers.start, inputs["text_index"][None]
    if plan.axes > 1:
        positions = inputs["position_ids"][:1].index_select(1, inputs["text_index"])  # text has one on all axes
    if first == 0:
        x = inputs[subgraph.entry]
        text = x.index_select(1, inputs["text_index"])
        visual = x.index_select(1, inputs["visual_index"]) if limit(plan) else text
    else:
        text = inputs[f"text.{first}"]
        visual = inputs.get(f"visual.{first}", text)  # nobody reads it where there is none
    mixed = (seen(plan, inputs), turning(parts, plan, inputs)) if first < limit(plan) else None
    caches: Tensors = {}
    for i in subgraph.layers:
        if mixed is None or i >= limit(plan):
            text, _, written = blocks.prefill_layers(parts, plan, [i], inputs, text, positions)
        else:
            layer = _released if released(plan) else _dropped
            visual, text, written = layer(parts, plan, i, inputs, visual, text, *mixed)
        caches |= written
    if subgraph.result is None:
        return {"logits": blocks.logits(parts, text, inputs["last_index"] - plan.visual_tokens), **caches}
    return {f"visual.{subgraph.layers.stop}": visual, f"text.{subgraph.layers.stop}": text} | caches


def turning(parts: Parts, plan: Plan, inputs: Tensors) -> Rotation:
    """The rotation of visual tokens, then text."""
    at = blocks.concat([inputs["visual_index"], inputs["text_index"]])
    return rotation(parts, at[None] if plan.axes == 1 else inputs["position_ids"].index_select(1, at))


def _dropped(
    parts: Parts, plan: Plan, i: int, inputs: Tensors, visual: Tensor, text: Tensor, sees: Tensor, turn: Rotation
) -> tuple[Tensor, Tensor, Tensors]:
    """A layer whose pruned heads do not know of visual tokens: two layers in one, of other heads and other rows."""
    layer, found, groups, last = parts.layers[i], heads(plan, i), plan.groups(i), i == limit(plan) - 1
    results: list[Tensor] = []  # of text
    written: Tensors = {}
    of_visual = None
    if found.kept:
        rows = _rows(parts, layer, visual, text, turn, found.kept, found.kept_kv, asks=not last)
        written |= parts.ops.store(inputs, groups[0], *rows[1:])
        key, value = (_per_query(plan, x, found.kept, found.kept_kv) for x in rows[1:])
        of_visual, of_text = _attend(parts, plan, rows[0], key, value, sees)
        results.append(of_text)
    if found.pruned:
        rows = _rows(parts, layer, None, text, turn, found.pruned, found.pruned_kv)
        written |= parts.ops.store(inputs, groups[-1], *rows[1:])
        key, value = (_per_query(plan, x, found.pruned, found.pruned_kv) for x in rows[1:])
        results.append(parts.ops.attend(rows[0], key, value, True))
    # The weight in the order of the heads, selected where that is its own too: TensorRT-RTX 1.7.1 ends with a
    # segmentation fault on heads of two attentions in the weight's order, and on more masks without the selection.
    joined = [blocks.join_heads(x) for x in results]
    heads_of_text = joined[0] if len(joined) == 1 else blocks.concat(joined, -1)
    projected = heads_of_text @ _selected(plan, layer, found.kept + found.pruned)
    text = blocks.feed_forward(parts, layer, text + _biased(projected, layer.o_proj))
    if not last:
        visual = _finish_visual(parts, plan, layer, visual, of_visual, found.kept)
    return visual, text, written


def _released(
    parts: Parts, plan: Plan, i: int, inputs: Tensors, visual: Tensor, text: Tensor, sees: Tensor, turn: Rotation
) -> tuple[Tensor, Tensor, Tensors]:
    """A layer that takes visual tokens into the softmax, and their values as zero where the release zeroes columns."""
    layer, found, d = parts.layers[i], heads(plan, i), plan.spec.decoder
    (group,) = plan.groups(i)
    last, every = i == limit(plan) - 1, tuple(range(d.heads))
    query, key, value = _rows(parts, layer, visual, text, turn, every, tuple(range(d.kv_heads)), asks=not last)
    if len(group.kv_heads) > d.kv_heads:
        # Not one Gather: TensorRT-RTX 1.7.1 does not build caches whose rows come out of one.
        key, value = (blocks.concat([x[:, h : h + 1] for h in group.kv_heads], 1) for x in (key, value))
    reads, per = set(found.kept) if i < plan.config.cutoff else set(), d.heads // len(group.kv_heads)
    read = [bool(reads & set(every[j * per : (j + 1) * per])) for j in range(len(group.kv_heads))]
    is_text = [False] * plan.visual_tokens + [True] * plan.prompt.others
    value = value * _flags(read, value).maximum(_flags(is_text, value).transpose(1, 2))
    written = parts.ops.store(inputs, group, key, value)
    of_visual, of_text = _attend(parts, plan, query, key, value, sees)
    text = blocks.finish(parts, layer, text, of_text)
    if of_visual is not None:
        of_visual = of_visual * _flags([h in found.kept for h in every], of_visual)
        visual = _finish_visual(parts, plan, layer, visual, of_visual, every)
    return visual, text, written


def _attend(
    parts: Parts, plan: Plan, query: Tensor, key: Tensor, value: Tensor, sees: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Results of visual tokens, None where they have no queries, and of text, as one attention.

    Two that read the same keys end TensorRT-RTX 1.7.1 with a segmentation fault, in bfloat16 wherever it was tried.
    """
    rows, text = query.shape[2], plan.prompt.others
    attended = parts.ops.attend_where(query, key, value, sees[-rows:])
    return (attended[:, :, :-text] if rows > text else None), attended[:, :, -text:]


def _rows(
    parts: Parts,
    layer: DecoderLayer,
    visual: Tensor | None,
    text: Tensor,
    turn: Rotation,
    asking: tuple[int, ...],
    kv_heads: tuple[int, ...],
    *,
    asks: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of some heads; rows are visual tokens, where given, and text, projected together.

    TensorRT-RTX 1.7.1 does not build a cache of rows that were projected apart and then joined.

    Args:
        turn: of visual tokens, then text.
        asks: visual tokens have queries too.
    """
    d, ops = parts.spec.decoder, parts.ops
    x = text if visual is None else blocks.concat([visual, text], 1)
    normed = ops.rms_norm(x, layer.input_layernorm.weight, d.eps)
    own = normed if asks else normed[:, -text.shape[1] :]
    query = blocks.some_heads(own, layer.q_proj, asking, d.heads)
    key = blocks.some_heads(normed, layer.k_proj, kv_heads, d.kv_heads)
    if d.qk_norm:
        query = ops.rms_norm(query, layer.q_norm.weight, d.eps)
        key = ops.rms_norm(key, layer.k_norm.weight, d.eps)
    query, key = (turned(parts, heads, last_rows(turn, heads.shape[2])) for heads in (query, key))
    return query, key, blocks.some_heads(normed, layer.v_proj, kv_heads, d.kv_heads)


def _finish_visual(
    parts: Parts, plan: Plan, layer: DecoderLayer, x: Tensor, attended: Tensor | None, kept: tuple[int, ...]
) -> Tensor:
    """Output projection of the kept heads, residual, the first FFN channels, residual."""
    n = channels(plan.spec, plan.config)
    if attended is not None:
        every = len(kept) == parts.spec.decoder.heads
        x = x + blocks.join_heads(attended) @ (layer.o_proj.weight if every else _selected(plan, layer, kept))
    x = _biased(x, layer.o_proj)
    normed = parts.ops.rms_norm(x, layer.post_attention_layernorm.weight, parts.spec.decoder.eps)
    gate, up = _first(normed, layer.gate_proj, n), _first(normed, layer.up_proj, n)
    down = (parts.act(gate) * up) @ layer.down_proj.weight[:n]
    return x + _biased(down, layer.down_proj)


def _selected(plan: Plan, layer: DecoderLayer, order: tuple[int, ...]) -> Tensor:
    """The output projection's rows of some heads, in that order, [heads * D_h, D]."""
    weight: Tensor = layer.o_proj.weight
    by_head = weight.reshape(plan.spec.decoder.heads, -1, weight.shape[1]).index_select(0, blocks.constant(order))
    return by_head.reshape(-1, weight.shape[1])


def _biased(x: Tensor, linear: Linear) -> Tensor:
    return x if linear.bias is None else x + linear.bias


def _first(x: Tensor, linear: Linear, count: int) -> Tensor:
    """The first of a projection's channels."""
    y = x @ linear.weight[:, :count]
    return y if linear.bias is None else y + linear.bias[:count]


def _per_query(plan: Plan, x: Tensor, asking: tuple[int, ...], kv_heads: tuple[int, ...]) -> Tensor:
    """KV heads [1, kv_heads, rows, D_h] as query heads `asking` read them: as they are where those share evenly."""
    each = plan.spec.decoder.heads // plan.spec.decoder.kv_heads
    wanted = tuple(kv_heads.index(h // each) for h in asking)
    even = tuple(i * len(kv_heads) // len(asking) for i in range(len(asking)))
    return x if wanted == even and len(asking) % len(kv_heads) == 0 else blocks.pick(x, wanted)


def _flags(kept: Sequence[bool], like: Tensor) -> Tensor:
    """1 or 0 per head, [1, heads, 1, 1], of a tensor's dtype."""
    import torch

    return torch.tensor([float(k) for k in kept]).to(like.dtype).reshape(1, -1, 1, 1)


def _state(plan: Plan, layer: int) -> tuple[TensorInfo, ...]:
    """What passes between graphs, named after the layer that it enters."""
    shapes = blocks.Shapes(plan)
    visual = (shapes.hidden(f"visual.{layer}", plan.visual_tokens),) if layer < limit(plan) else ()
    return (*visual, shapes.hidden(f"text.{layer}", plan.prompt.others))


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """Prefill, or prefill_head and, where visual tokens have left, prefill_tail; decode."""
    shapes, layers, border = blocks.Shapes(plan), plan.spec.decoder.layers, limit(plan)
    names = ("prefill",) if border in (0, layers) else ("prefill_head", "prefill_tail")
    runs = [run for run in (range(border), range(border, layers)) if run]
    subgraphs = [
        subgraph
        for name, run in zip(names, runs, strict=True)
        for subgraph in blocks.subgraphs(plan, name, run, "inputs_embeds", "text" if run.stop < layers else None)
    ]

    def graph(subgraph: blocks.Subgraph) -> GraphSpec:
        first, stop = subgraph.layers.start, subgraph.layers.stop
        entry = _state(plan, first) if first else (shapes.hidden("inputs_embeds", plan.prompt_tokens),)
        positions = (shapes.positions("position_ids", plan.prompt_tokens),) if plan.axes > 1 else ()
        visual = (shapes.index("visual_index", plan.visual_tokens),) if first < border else ()
        last = (shapes.index("last_index", 1),) if stop == layers else ()
        caches = blocks.prefill_inputs(plan, subgraph.layers)
        return GraphSpec(
            name=subgraph.name,
            role="prefill",
            inputs=(*entry, *positions, *visual, shapes.index("text_index", plan.prompt.others), *last, *caches),
            outputs=(
                *((shapes.logits(),) if stop == layers else _state(plan, stop)),
                *blocks.prefill_outputs(plan, subgraph.layers),
            ),
            body=partial(run, subgraph=subgraph),
        )

    return *(graph(subgraph) for subgraph in subgraphs), *blocks.decode_graphs(plan, ())


METHOD = Method(
    name="yopo",
    config=Config,
    stages=stages,
    graphs=graphs,
    paper=paper,
    resolve=resolve,
    nominal=nominal,
    cache_groups=cache_groups,
    one_image=True,  # the released code knows one block of visual tokens
    three_axes=True,
)

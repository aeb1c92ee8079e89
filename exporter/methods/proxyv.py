"""ProxyV: from the start layer on, few proxy tokens stand in for the visual tokens (arXiv:2505.15816).

Visual tokens stop asking: they keep giving keys and values to the text, and a small MLP brings them what their proxies
learnt. Where paper and released code differ, this file follows the code, which the published weights were trained with:
proxies see no visual tokens, text sees no proxies, the separators of later crops stand one crop too early, and proxies
take positions of their own. A cache holds every visual token, and decode is a plain decoder step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.graphs.rotary import rotation
from lvlm_edge.exporter.methods._proxyv_counts import (
    Config,
    crops_of,
    each_of,
    grid_of,
    narrow,
    own_weights,
    paper,
    proxies,
    resolve,
    stages,
)
from lvlm_edge.exporter.planning import (
    GraphSpec,
    Method,
    Plan,
    Tensors,
)
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from lvlm_edge.exporter.graphs.parts import Parts


# Weights.


def extend(parts: Any, plan: Plan) -> None:
    """Give the parts ProxyV's weights, under the names of the release.

    Raises:
        UnsupportedError: the checkpoint was trained from another start layer: its updates belong to other layers.
    """
    trained = plan.spec.settings["proxyv"].get("start_layer")
    if trained not in (None, plan.config.start_layer):
        raise UnsupportedError(
            f"proxyv: start_layer is {plan.config.start_layer}, but the checkpoint was trained from layer {trained} "
            "on; leave out --start-layer"
        )
    import torch
    from torch import nn

    from lvlm_edge.exporter.graphs.parts import Linear, Norm, activation

    d, q = plan.spec.decoder.hidden, narrow(plan.spec.decoder)

    def update() -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "context_proj": Linear(d, q),
                "input_proj": Linear(d, q),
                "proj": nn.ModuleDict({"0": Linear(2 * q, q), "2": Linear(q, d)}),
                "layernorm_post": Norm(d),
            }
        )

    updates = plan.spec.decoder.layers - plan.config.start_layer
    parts.silu = activation("silu")  # whatever the decoder's is
    parts.vision_mlp_layers = nn.ModuleList(update() for _ in range(updates))
    if plan.config.learn_proxy:
        parts.proxyv_initializer = nn.Module()
        parts.proxyv_initializer.Wk = Linear(d, q)
        tokens = torch.empty(proxies(plan), q)
        parts.proxyv_initializer.proxyv_tokens = nn.Parameter(tokens)


# Where rows stand. An image's rows follow each other: the tokens of a crop, its separator, the next crop.


@dataclass(frozen=True)
class Layout:
    """Rows of an image, by what is fixed at export: crops of `each` visual tokens and a separator."""

    crops: int
    each: int
    proxies: int

    @property
    def rows(self) -> int:
        return self.crops * (self.each + 1)

    def visual(self) -> list[int]:
        return [crop * (self.each + 1) + j for crop in range(self.crops) for j in range(self.each)]

    def separators(self) -> list[int]:
        return [crop * (self.each + 1) + self.each for crop in range(self.crops)]

    def separator_positions(self) -> list[int]:
        """As the released code counts: that of a later crop stands where the crop before it ends."""
        return [max(0, crop - 1) * (self.each + 1) + self.each for crop in range(self.crops)]

    def positions(self) -> list[int]:
        """Of every row, counted from the image's first."""
        found = list(range(self.rows))
        for row, position in zip(self.separators(), self.separator_positions(), strict=True):
            found[row] = position
        return found

    def order(self) -> list[int]:
        """The rows by position; the first two separators share one."""
        positions = self.positions()
        return sorted(range(self.rows), key=lambda row: positions[row])


def layout(plan: Plan) -> Layout:
    return Layout(crops_of(plan), each_of(plan), proxies(plan))


@dataclass(frozen=True)
class Places:
    """Positions of the rows by kind, [n] int64 each."""

    visual: Tensor
    proxies: Tensor
    rest: Tensor


def places(plan: Plan, inputs: Tensors) -> Places:
    """Positions of visual tokens, of proxies, and of separators and text."""
    where, start = layout(plan), inputs["visual_index"][:1]
    separators = start + blocks.constant(where.separator_positions())
    return Places(
        visual=start + blocks.constant(where.visual()),
        proxies=start + blocks.arange(where.crops * where.proxies),
        rest=blocks.concat([separators, inputs["text_index"]]),
    )


def by_position(plan: Plan, inputs: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the prompt ordered by position: the order, its inverse, and the positions in it, [S] int64 each."""
    where = layout(plan)
    order = where.order()
    inverse = sorted(range(where.rows), key=lambda i: order[i])
    positions = where.positions()
    start, rows = inputs["visual_index"][:1], blocks.arange(plan.prompt_tokens)
    inside = (rows >= start) & (rows < start + where.rows)
    local = (rows - start).clamp(0, where.rows - 1)

    def mapped(table: list[int]) -> Tensor:
        return start + blocks.constant(table).index_select(0, local)

    return tuple(  # type: ignore[return-value]
        blocks.where(inside, mapped(table), rows) for table in (order, inverse, [positions[row] for row in order])
    )


# Below the start layer.


def head(parts: Parts, plan: Plan, inputs: Tensors, *, subgraph: blocks.Subgraph) -> Tensors:
    """Ordinary layers over the whole prompt, every row seeing the positions up to its own."""
    x = inputs[subgraph.entry]
    caches: Tensors = {}
    order, inverse, positions = by_position(plan, inputs)
    several = crops_of(plan) > 1
    turn = rotation(parts, positions[None])
    if several:
        x = x.index_select(1, order)
    for i in subgraph.layers:
        layer, (group,) = parts.layers[i], plan.groups(i)
        query, key, value = blocks.project(parts, layer, x, turn)
        attended = parts.ops.attend(query, key, value, True)
        if several:
            attended = _tied(parts, plan, inputs, attended, (query, key, value))
        caches |= parts.ops.store(inputs, group, key, value)
        x = blocks.finish(parts, layer, x, attended)
    assert subgraph.result is not None
    return {subgraph.result: x.index_select(1, inverse) if several else x, **caches}


def _tied(parts: Parts, plan: Plan, inputs: Tensors, attended: Tensor, heads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The result with one row replaced: the first separator sees the second, which has its position and comes next."""
    query, key, value = heads
    row = inputs["visual_index"][:1] + each_of(plan)
    rows = blocks.arange(plan.prompt_tokens)
    alone = parts.ops.attend_where(query.index_select(2, row), key, value, (rows <= row + 1)[None])
    return blocks.where((rows == row)[None, None, :, None], alone, attended)


# From the start layer on.


def tail(parts: Parts, plan: Plan, inputs: Tensors, *, subgraph: blocks.Subgraph) -> Tensors:
    """Layers in which proxies, separators and text ask; visual tokens give keys and values, and are updated."""
    where, at = layout(plan), places(plan, inputs)
    if subgraph.layers.start == plan.config.start_layer:
        state = _start(parts, plan, inputs, inputs[subgraph.entry])
    else:
        state = {name: inputs[f"{name}.{subgraph.layers.start}"] for name in _state_names(plan)}
    full, proxy, rest = state["full"], state["proxy"], state["rest"]
    caches: Tensors = {}
    for i in subgraph.layers:
        layer, last, (group,) = parts.layers[i], i == plan.spec.decoder.layers - 1, plan.groups(i)
        asking = rest if last else blocks.concat([proxy, rest], 1)
        positions = at.rest if last else blocks.concat([at.proxies, at.rest])
        (query, key, value), (seen_key, seen_value) = _project(parts, layer, asking, full, (positions, at.visual))
        n = 0 if last else where.crops * where.proxies
        text_key, text_value = key[:, :, n:], value[:, :, n:]
        stored = blocks.concat([seen_key, text_key], 2), blocks.concat([seen_value, text_value], 2)
        attended = parts.ops.attend_where(query[:, :, n:], *stored, _before(at.rest, at.visual, at.rest))
        if not last:
            guides = parts.ops.attend_where(query[:, :, :n], key, value, _before(at.proxies, at.proxies, at.rest))
            attended = blocks.concat([guides, attended], 2)
        caches |= parts.ops.store(inputs, group, *stored)
        asking = blocks.finish(parts, layer, asking, attended)
        rest = asking[:, n:]
        if not last:
            proxy = asking[:, :n]
            guide = partial(_learnt_guide, state["share"]) if plan.config.learn_proxy else partial(_grid_guide, plan)
            full = update(parts, i - plan.config.start_layer, full, proxy, guide)
    if subgraph.result is None:
        row = inputs["last_index"] + (where.crops - where.rows)
        return {"logits": blocks.logits(parts, rest, row), **caches}
    state |= {"full": full, "proxy": proxy, "rest": rest}
    return {f"{name}.{subgraph.layers.stop}": state[name] for name in _state_names(plan)} | caches


def _project(
    parts: Parts, layer: Any, asking: Tensor, full: Tensor, positions: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Queries, keys and values of rows that ask, and keys and values of visual tokens, as `blocks.project` has them.

    In one product for both: TensorRT-RTX 1.7.1 does not build most graphs in which two read a matrix of integers.
    """
    d, ops, count = parts.spec.decoder, parts.ops, asking.shape[1]
    normed = ops.rms_norm(blocks.concat([asking, full], 1), layer.input_layernorm.weight, d.eps)
    keys, values = layer.k_proj(normed), layer.v_proj(normed)

    def rotated(rows: Tensor, heads: int, at: Tensor) -> Tensor:
        return ops.rotate(blocks.split_heads(rows, heads), parts.rope_cos, parts.rope_sin, at[None])

    own = (
        rotated(layer.q_proj(normed[:, :count]), d.heads, positions[0]),
        rotated(keys[:, :count], d.kv_heads, positions[0]),
        blocks.split_heads(values[:, :count], d.kv_heads),
    )
    return own, (rotated(keys[:, count:], d.kv_heads, positions[1]), blocks.split_heads(values[:, count:], d.kv_heads))


def _before(queries: Tensor, *keys: Tensor) -> Tensor:
    """Whether each key's position is at most each query's, [queries, keys], bool."""
    return blocks.concat(keys)[None] <= queries[:, None]


def _start(parts: Parts, plan: Plan, inputs: Tensors, x: Tensor) -> Tensors:
    """The kinds of rows apart, and the proxies, from the hidden states that enter the start layer."""
    where, start = layout(plan), inputs["visual_index"][:1]
    full = x.index_select(1, start + blocks.constant(where.visual()))
    rest = blocks.concat([start + blocks.constant(where.separators()), inputs["text_index"]])
    state = {"full": full, "rest": x.index_select(1, rest)}
    if not plan.config.learn_proxy:
        return state | {
            "proxy": pooled(full, where.crops, grid_of(plan.pictures, plan.config), plan.config.reduce_factor)
        }
    proxy, share = learnt(parts, full.reshape(where.crops, where.each, -1))
    return state | {"proxy": proxy, "share": share}


def pooled(full: Tensor, crops: int, grid: tuple[int, int], factor: int) -> Tensor:
    """Each crop's grid made smaller by bilinear interpolation with half-pixel centres, [1, crops * P, D].

    For an even factor that is the mean of the four tokens around the middle of a block, for an odd one the middle.
    """
    rows, columns, width = grid[0] // factor, grid[1] // factor, full.shape[-1]
    cells = full.reshape(crops * rows, factor, columns, factor, width)
    first, count = (factor - 1) // 2, 2 - factor % 2
    middle = cells[:, first : first + count, :, first : first + count]
    found: Tensor = middle.mean((1, 3)) if count > 1 else middle
    return found.reshape(1, crops * rows * columns, width)


def learnt(parts: Any, full: Tensor) -> tuple[Tensor, Tensor]:
    """Proxies as learnt mixtures of each crop's tokens [crops, V, D]: [1, crops * P, D], and how they are spread.

    The second is the association [crops, V, P], by which a token takes its guidance from the proxies.
    """
    tokens = parts.proxyv_initializer.proxyv_tokens
    scores = (parts.proxyv_initializer.Wk(full) @ tokens.t()).float() * tokens.shape[1] ** -0.5  # [crops, V, P]
    mixed = scores.transpose(1, 2).softmax(-1).to(full.dtype) @ full
    return mixed.reshape(1, -1, full.shape[-1]), scores.softmax(-1).to(full.dtype)


def update(parts: Any, index: int, full: Tensor, proxy: Tensor, guide: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """Visual tokens [1, V, D] after a layer's guided update by its proxies."""
    mlp = parts.vision_mlp_layers[index]
    inside = blocks.concat([mlp["input_proj"](full), guide(mlp["context_proj"], proxy)], -1)
    total = mlp["proj"]["2"](parts.silu(mlp["proj"]["0"](inside))) + full
    found: Tensor = parts.ops.rms_norm(total, mlp["layernorm_post"].weight, parts.spec.decoder.eps)
    return found


def _grid_guide(plan: Plan, context: Any, proxy: Tensor) -> Tensor:
    """Every token of a block gets its proxy's context, [1, V, q]."""
    (rows, columns), factor = grid_of(plan.pictures, plan.config), plan.config.reduce_factor
    few, narrowed = columns // factor, context(proxy)
    width, crops = narrowed.shape[-1], crops_of(plan)
    blocks_ = narrowed.reshape(crops * (rows // factor), 1, few, 1, width).expand(-1, factor, -1, factor, -1)
    found: Tensor = blocks_.reshape(1, crops * rows * columns, width)
    return found


def _learnt_guide(share: Tensor, context: Any, proxy: Tensor) -> Tensor:
    """Every token gets its share [crops, V, P] of the crop's proxies, [1, V, q]."""
    spread = share @ proxy.reshape(share.shape[0], share.shape[2], -1)
    found: Tensor = context(spread.reshape(1, -1, proxy.shape[-1]))
    return found


def _state_names(plan: Plan) -> tuple[str, ...]:
    return ("full", "proxy", "rest", *(("share",) if plan.config.learn_proxy else ()))


def _state(plan: Plan, layer: int) -> tuple[TensorInfo, ...]:
    """What passes between graphs of the tail, named after the layer that it enters."""
    where, d = layout(plan), plan.spec.decoder.hidden
    shapes = {
        "full": (1, where.crops * where.each, d),
        "proxy": (1, where.crops * where.proxies, d),
        "rest": (1, where.crops + plan.text_tokens, d),
        "share": (where.crops, where.each, where.proxies),
    }
    return tuple(TensorInfo(f"{name}.{layer}", plan.dtype, shapes[name]) for name in _state_names(plan))


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """prefill_head (layers below the start layer), prefill_tail, decode."""
    shapes = blocks.Shapes(plan)
    first, layers = plan.config.start_layer, plan.spec.decoder.layers
    visual = shapes.index("visual_index", plan.visual_tokens + plan.prompt.separators)
    heads = blocks.subgraphs(plan, "prefill_head", range(first), "inputs_embeds", "hidden") if first else ()
    tails = blocks.subgraphs(plan, "prefill_tail", range(first, layers), "hidden" if first else "inputs_embeds")
    return (
        *(_head_graph(plan, subgraph, visual) for subgraph in heads),
        *(_tail_graph(plan, subgraph, visual) for subgraph in tails),
        *blocks.decode_graphs(plan, ()),
    )


def _head_graph(plan: Plan, subgraph: blocks.Subgraph, visual: TensorInfo) -> GraphSpec:
    shapes = blocks.Shapes(plan)
    assert subgraph.result is not None
    return GraphSpec(
        name=subgraph.name,
        role="prefill",
        inputs=(
            shapes.hidden(subgraph.entry, plan.prompt_tokens),
            visual,
            *blocks.prefill_inputs(plan, subgraph.layers),
        ),
        outputs=(
            shapes.hidden(subgraph.result, plan.prompt_tokens),
            *blocks.prefill_outputs(plan, subgraph.layers),
        ),
        body=partial(head, subgraph=subgraph),
    )


def _tail_graph(plan: Plan, subgraph: blocks.Subgraph, visual: TensorInfo) -> GraphSpec:
    shapes = blocks.Shapes(plan)
    starts = subgraph.layers.start == plan.config.start_layer
    entry = (shapes.hidden(subgraph.entry, plan.prompt_tokens),) if starts else _state(plan, subgraph.layers.start)
    last = (shapes.index("last_index", 1),) if subgraph.result is None else ()
    return GraphSpec(
        name=subgraph.name,
        role="prefill",
        inputs=(
            *entry,
            visual,
            shapes.index("text_index", plan.text_tokens),
            *last,
            *blocks.prefill_inputs(plan, subgraph.layers),
        ),
        outputs=(
            *((shapes.logits(),) if subgraph.result is None else _state(plan, subgraph.layers.stop)),
            *blocks.prefill_outputs(plan, subgraph.layers),
        ),
        body=partial(tail, subgraph=subgraph),
    )


METHOD = Method(
    name="proxyv",
    config=Config,
    stages=stages,
    graphs=graphs,
    paper=paper,
    resolve=resolve,
    own_weights=own_weights,
    extend=extend,
    one_image=True,  # the released code packs the crops of one image
)

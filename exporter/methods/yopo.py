"""YOPO: visual tokens skip heads, FFN channels, far neighbours and the late layers (arXiv:2410.06169).

The release is a simulation by masks, and it zeroes attention to visual tokens after the softmax, where their share is
already taken. Two semantics follow: `released` computes just that, so that published checkpoints say what they say in
PyTorch, and saves little; `dropped` removes what the simulation stands for: from the cutoff layer on there are no
visual tokens, below it they have the kept heads and the first FFN channels alone, and pruned heads see only text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter import blocks
from lvlm_edge.exporter.planning import CacheGroup, Plan, PlanError, Stage, layer_flops
from lvlm_edge.exporter.spec import CheckpointError, ModelSpec
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.errors import UnsupportedError, UsageError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from lvlm_edge.exporter.parts import DecoderLayer, Linear, Parts

ONE_IMAGE = True  # the released code knows one block of visual tokens
SEMANTICS = ("released", "dropped")


@dataclass(frozen=True, kw_only=True)
class Config:
    """YOPO's settings; a checkpoint's config has them."""

    semantics: str = field(default="released", metadata={"help": "released (parity) or dropped (the savings)"})
    window: int | None = None  # side of the square of neighbours that a visual token sees
    cutoff: int | None = None  # first layer without visual tokens
    ffn_ratio: float | None = None  # FFN channels over those that visual tokens use
    # A file as long as it is a setting, then a string per layer: 1 where a head stays for visual tokens.
    head_mask: str | tuple[str, ...] | None = field(
        default=None, metadata={"help": "file of heads that stay for visual tokens, .npy, bool [layers, heads]"}
    )
    prefix_tokens: int | None = field(
        default=None, metadata={"help": "text before the image in training, for the record"}
    )


def resolve(spec: ModelSpec, config: Config) -> Config:
    """The settings with the head mask read.

    Raises:
        PlanError: a setting is missing or out of range.
        UnsupportedError: visual tokens that are no square of one picture.
        UsageError, CheckpointError: the head mask cannot be read, or is not of this model.
    """
    d = spec.decoder
    if config.semantics not in SEMANTICS:
        raise UsageError(f"yopo: semantics is {config.semantics!r}; {nearest(str(config.semantics), SEMANTICS)}")
    for name, value, least, most in (
        ("window", config.window, 1, math.inf),
        ("cutoff", config.cutoff, 1, d.layers),
        ("ffn_ratio", config.ffn_ratio, 1, d.ffn),
    ):
        flag = "--" + name.replace("_", "-")
        if value is None:
            raise PlanError(f"yopo: the checkpoint's config has no {name}; give {flag}")
        kinds = int | float if name == "ffn_ratio" else int
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            wanted = f"{least}..{most}" if most < math.inf else f"at least {least}"
            kind = "a whole number, " if kinds is int else ""
            raise PlanError(f"yopo: {name} is {value!r}, expected {kind}{wanted}; correct it with {flag}")
    if math.isqrt(spec.visual_tokens) ** 2 != spec.visual_tokens or spec.newline or spec.projector_act is None:
        found = (
            "no projector"
            if spec.projector_act is None
            else "separators after its crops"
            if spec.newline
            else f"{spec.visual_tokens} visual tokens"
        )
        raise UnsupportedError(
            f"yopo: the checkpoint has {found}, expected the square grid of one picture alone; use another --method"
        )
    mask = config.head_mask
    rows = ("1" * d.heads,) * d.layers if mask is None else _read(mask, spec) if isinstance(mask, str) else mask
    return replace(config, head_mask=rows)


def _read(path: str, spec: ModelSpec) -> tuple[str, ...]:
    import numpy as np

    shape = (spec.decoder.layers, spec.decoder.heads)
    own = spec.settings.get("yopo", {}).get("head_mask") == path
    kind, advice = (CheckpointError, "put the model's own there") if own else (UsageError, "correct it")
    advice += ", or give another --head-mask" if own else " with --head-mask"
    if not Path(path).is_file():
        said = "config.json prunes heads, but the file is missing" if own else "is no file"
        raise kind(f"{path}: {said}; {advice}")
    try:
        mask = np.load(path, allow_pickle=False)
    except Exception as error:  # of many types, for a header or content of other kinds of files
        raise kind(f"{path}: cannot be read as .npy ({str(error).splitlines()[0]}); {advice}") from error
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != shape:
        found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise kind(f"{path}: is {found}, expected bool {list(shape)}, layers by heads; {advice}")
    return tuple("".join("1" if kept else "0" for kept in row) for row in mask)


@dataclass(frozen=True)
class Heads:
    """Query heads of a layer that visual tokens keep and those they lose, and the KV heads that either reads."""

    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    kept_kv: tuple[int, ...]
    pruned_kv: tuple[int, ...]


def heads(plan: Plan, layer: int) -> Heads:
    d = plan.spec.decoder
    row, each = plan.config.head_mask[layer], d.heads // d.kv_heads
    kept = tuple(h for h in range(d.heads) if row[h] == "1")
    pruned = tuple(h for h in range(d.heads) if row[h] != "1")
    read = [tuple(sorted({h // each for h in some})) for some in (kept, pruned)]
    return Heads(kept, pruned, read[0], read[1])


def channels(spec: ModelSpec, config: Config) -> int:
    """FFN channels that visual tokens use: the first ones."""
    assert config.ffn_ratio is not None
    return int(spec.decoder.ffn / config.ffn_ratio)


def released(plan: Plan) -> bool:
    return bool(plan.config.semantics == "released")


def limit(plan: Plan) -> int:
    """The first layer that visual tokens do not enter."""
    return plan.spec.decoder.layers if released(plan) else int(plan.config.cutoff)


def stages(spec: ModelSpec, config: Config, visual_tokens: int, others: int) -> tuple[Stage, ...]:
    """Dropped: two stages, split at the cutoff. Released: every token in every layer."""
    full, layers = visual_tokens + others, spec.decoder.layers
    assert config.cutoff is not None
    with_visual = layers if config.semantics == "released" else config.cutoff
    flops = sum(_layer_flops(spec, config, visual_tokens, others, i, i == with_visual - 1) for i in range(with_visual))
    rest = (Stage(range(with_visual, layers), others, others, others),) if with_visual < layers else ()
    return Stage(range(with_visual), full, full, full, flops=flops), *rest


def _layer_flops(spec: ModelSpec, config: Config, v: int, t: int, layer: int, last: bool) -> int:
    """FLOPs of a layer that visual tokens enter; of the last such layer only their keys and values are read."""
    d = spec.decoder
    assert isinstance(config.head_mask, tuple)
    row, size, each = config.head_mask[layer], d.head_dim, d.heads // d.kv_heads
    kept = [h for h in range(d.heads) if row[h] == "1" or config.semantics == "released"]
    text = layer_flops(d, t, 0) + 4 * size * (t * (v + t) * len(kept) + t * t * (d.heads - len(kept)))
    visual = 4 * v * d.hidden * len({h // each for h in kept}) * size
    if last:
        return text + visual
    attention = 4 * v * d.hidden * len(kept) * size + 4 * v * (v + t) * len(kept) * size
    return text + visual + attention + 6 * v * d.hidden * channels(spec, config)


def paper(plan: Plan) -> dict[str, Any]:
    """The paper's column: FLOPs of the visual tokens alone, as configured; the published costs are nominal.

    Convention: 2 x multiply-accumulate, keys and values as wide as queries, `window`^2 keys below the cutoff.
    """
    d, c, v = plan.spec.decoder, plan.config, plan.spec.visual_tokens
    shares = [row.count("1") / d.heads for row in c.head_mask[: c.cutoff]]
    attention = 4 * v * d.hidden**2 + 2 * v * c.window**2 * d.hidden
    cost = 2 * sum(share * attention + 3 * v * d.hidden * d.ffn / c.ffn_ratio for share in shares)
    dense = 2 * d.layers * (4 * v * d.hidden**2 + 2 * v**2 * d.hidden + 3 * v * d.hidden * d.ffn)
    return {"name": "YOPO", "unit": "TFLOPs of visual tokens", "value": cost / 1e12, "ratio": cost / dense}


def cache_groups(plan: Plan, layer: int) -> tuple[CacheGroup, ...]:
    """Dropped: kept heads cache every row, pruned ones and late layers text alone. Released: one cache of all rows.

    Released values are zero for visual tokens where a head is pruned, so that heads which share a KV head need copies
    of their own when only some of them are.
    """
    d, found = plan.spec.decoder, heads(plan, layer)
    every, each = tuple(range(d.heads)), d.heads // d.kv_heads
    own = partial(CacheGroup, name=str(layer), queries=every, owned=every)
    if released(plan):
        shared = layer < plan.config.cutoff and set(found.kept_kv) & set(found.pruned_kv)
        return (own(kv_heads=tuple(h // each for h in every) if shared else tuple(range(d.kv_heads)), dropped=0),)
    if layer >= limit(plan) or not found.kept:
        return (own(kv_heads=tuple(range(d.kv_heads)), dropped=plan.visual_tokens),)
    if not found.pruned:
        return (own(kv_heads=tuple(range(d.kv_heads)), dropped=0),)
    return tuple(
        CacheGroup(
            name=f"{layer}.{name}",
            kv_heads=kv_heads,
            queries=tuple(h for h in every if h // each in kv_heads),
            owned=owned,
            dropped=dropped,
        )
        for name, kv_heads, owned, dropped in (
            ("kept", found.kept_kv, found.kept, 0),
            ("pruned", found.pruned_kv, found.pruned, plan.visual_tokens),
        )
    )


# Graphs. Visual tokens and text are apart from the start: they use different weights.


@dataclass(frozen=True)
class Seen:
    """Which rows see which, bool: visual tokens [V, V + T], text [T, V + T]; the keys are visual tokens, then text."""

    visual: Tensor
    text: Tensor


def seen(plan: Plan, inputs: dict[str, Tensor]) -> Seen:
    """Causal, but that visual tokens see their neighbours on all sides, and no other visual token."""
    visual, text = inputs["visual_index"], inputs["text_index"]
    near = neighbours(visual - visual[:1], math.isqrt(plan.visual_tokens), plan.config.window)
    return Seen(
        visual=blocks.concat([near, text[None] < visual[:, None]], 1),
        text=blocks.concat([visual[None] <= text[:, None], text[None] <= text[:, None]], 1),
    )


def neighbours(index: Tensor, side: int, window: int) -> Tensor:
    """Which visual tokens [V] see each other, [V, V]: at most half a window apart in rows and in columns.

    Args:
        index: 0 .. V-1, as data: of a constant the whole square would become one.
    """
    reach = (window - 1) // 2
    near = None
    for table in ([i // side for i in range(side**2)], [i % side for i in range(side**2)]):
        at = blocks.constant(table).index_select(0, index)
        apart = at[:, None] - at[None]
        close = (apart <= reach) & (apart >= -reach)
        near = close if near is None else near & close
    assert near is not None
    return near


def run(parts: Parts, plan: Plan, inputs: dict[str, Tensor], *, segment: blocks.Segment) -> dict[str, Tensor]:
    """Layers of the segment, with visual tokens as far as they go."""
    first, positions = segment.layers.start, inputs["text_index"][None]
    if first == 0:
        x = inputs[segment.entry]
        visual, text = (x.index_select(1, inputs[name]) for name in ("visual_index", "text_index"))
    else:
        text = inputs[f"text.{first}"]
        visual = inputs.get(f"visual.{first}", text)  # nobody reads it where there is none
    sees = seen(plan, inputs) if first < limit(plan) else None
    caches: dict[str, Tensor] = {}
    for i in segment.layers:
        if sees is None or i >= limit(plan):
            text, _, written = blocks.prefill_layers(parts, plan, [i], inputs, text, positions)
        else:
            layer = _released if released(plan) else _dropped
            visual, text, written = layer(parts, plan, i, inputs, visual, text, sees)
        caches |= written
    if segment.result is None:
        return {"logits": blocks.logits(parts, text, inputs["last_index"] - plan.visual_tokens), **caches}
    return {f"visual.{segment.layers.stop}": visual, f"text.{segment.layers.stop}": text} | caches


def _dropped(
    parts: Parts, plan: Plan, i: int, inputs: dict[str, Tensor], visual: Tensor, text: Tensor, sees: Seen
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A layer whose pruned heads do not know of visual tokens."""
    layer, found, last = parts.layers[i], heads(plan, i), i == limit(plan) - 1
    groups, at = plan.groups(i), inputs["text_index"][None]
    query, key, value = blocks.project(parts, layer, text, at)
    results: list[tuple[tuple[int, ...], Tensor]] = []
    written: dict[str, Tensor] = {}
    attended = None
    if found.kept:
        asked, *own = _visual_heads(parts, layer, visual, inputs["visual_index"][None], found, asks=not last)
        rows = [blocks.concat([o, blocks.pick(x, found.kept_kv)], 2) for o, x in zip(own, (key, value), strict=True)]
        written |= parts.ops.store(inputs, groups[0], *rows)
        rows = [_per_query(plan, x, found.kept, found.kept_kv) for x in rows]
        results.append((found.kept, parts.ops.attend_where(blocks.pick(query, found.kept), *rows, sees.text)))
        attended = None if last else parts.ops.attend_where(asked, *rows, sees.visual)
    if found.pruned:
        rows = [blocks.pick(x, found.pruned_kv) for x in (key, value)]
        written |= parts.ops.store(inputs, groups[-1], *rows)
        rows = [_per_query(plan, x, found.pruned, found.pruned_kv) for x in rows]
        results.append((found.pruned, parts.ops.attend(blocks.pick(query, found.pruned), *rows, at)))
    text = blocks.finish(parts, layer, text, _in_order(results))
    if not last:
        visual = _finish_visual(parts, plan, layer, visual, attended, found.kept)
    return visual, text, written


def _released(
    parts: Parts, plan: Plan, i: int, inputs: dict[str, Tensor], visual: Tensor, text: Tensor, sees: Seen
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A layer that takes visual tokens into the softmax, and their values as zero where the release zeroes columns."""
    layer, found, d = parts.layers[i], heads(plan, i), plan.spec.decoder
    (group,) = plan.groups(i)
    last, every = i == d.layers - 1, tuple(range(d.heads))
    at = inputs["visual_index"][None]
    query, text_key, text_value = blocks.project(parts, layer, text, inputs["text_index"][None])
    all_heads = Heads(every, (), tuple(range(d.kv_heads)), ())
    asked, key, value = _visual_heads(parts, layer, visual, at, all_heads, asks=not last)
    key, value, text_key, text_value = (blocks.pick(x, group.kv_heads) for x in (key, value, text_key, text_value))
    reads = set(found.kept) if i < plan.config.cutoff else set()
    per = d.heads // len(group.kv_heads)
    value = value * _flags(
        [bool(reads & set(every[j * per : (j + 1) * per])) for j in range(len(group.kv_heads))], value
    )
    keys, values = blocks.concat([key, text_key], 2), blocks.concat([value, text_value], 2)
    written = parts.ops.store(inputs, group, keys, values)
    text = blocks.finish(parts, layer, text, parts.ops.attend_where(query, keys, values, sees.text))
    if last:
        return visual, text, written
    attended = parts.ops.attend_where(asked, keys, values, sees.visual)
    attended = attended * _flags([h in found.kept for h in every], attended)
    return _finish_visual(parts, plan, layer, visual, attended, every), text, written


def _visual_heads(
    parts: Parts, layer: DecoderLayer, x: Tensor, at: Tensor, found: Heads, *, asks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the kept heads, keys and values of the KV heads they read, of visual tokens [1, V, D].

    Without `asks` the keys stand in the place of the queries, which nobody reads.
    """
    d, ops, tables = parts.spec.decoder, parts.ops, (parts.rope_cos, parts.rope_sin)
    normed = ops.rms_norm(x, layer.input_layernorm.weight, d.eps)
    key = ops.rotate(_some(normed, layer.k_proj, found.kept_kv, d.kv_heads), *tables, at)
    value = _some(normed, layer.v_proj, found.kept_kv, d.kv_heads)
    query = ops.rotate(_some(normed, layer.q_proj, found.kept, d.heads), *tables, at) if asks else key
    return query, key, value


def _some(x: Tensor, linear: Linear, wanted: tuple[int, ...], count: int) -> Tensor:
    """Some of the heads that a projection makes, [1, wanted, rows, D_h]; the others are not computed."""
    if len(wanted) == count:
        return blocks.split_heads(linear(x), count)
    inputs, outputs = linear.weight.shape
    weight = linear.weight.reshape(inputs, count, outputs // count).index_select(1, blocks.constant(wanted))
    y = x @ weight.reshape(inputs, -1)
    if linear.bias is not None:
        y = y + linear.bias.reshape(count, -1).index_select(0, blocks.constant(wanted)).reshape(-1)
    return blocks.split_heads(y, len(wanted))


def _finish_visual(
    parts: Parts, plan: Plan, layer: DecoderLayer, x: Tensor, attended: Tensor | None, kept: tuple[int, ...]
) -> Tensor:
    """Output projection of the kept heads, residual, the first FFN channels, residual."""
    n, out = channels(plan.spec, plan.config), layer.o_proj
    if attended is not None:
        weight: Tensor = out.weight
        if len(kept) < plan.spec.decoder.heads:
            by_head = weight.reshape(plan.spec.decoder.heads, -1, weight.shape[1]).index_select(
                0, blocks.constant(kept)
            )
            weight = by_head.reshape(-1, weight.shape[1])
        x = x + blocks.join_heads(attended) @ weight
    if out.bias is not None:
        x = x + out.bias
    normed = parts.ops.rms_norm(x, layer.post_attention_layernorm.weight, parts.spec.decoder.eps)
    gate, up = _first(normed, layer.gate_proj, n), _first(normed, layer.up_proj, n)
    down = (parts.act(gate) * up) @ layer.down_proj.weight[:n]
    return x + (down if layer.down_proj.bias is None else down + layer.down_proj.bias)


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


def _in_order(results: Sequence[tuple[tuple[int, ...], Tensor]]) -> Tensor:
    """Results of some heads each as one tensor with the heads in their order."""
    order = [head for some, _ in results for head in some]
    whole = results[0][1] if len(results) == 1 else blocks.concat([x for _, x in results], 1)
    return blocks.pick(whole, tuple(order.index(head) for head in range(len(order))))


def _flags(kept: Sequence[bool], like: Tensor) -> Tensor:
    """1 or 0 per head, [1, heads, 1, 1], of a tensor's dtype."""
    import torch

    return torch.tensor([float(k) for k in kept]).to(like.dtype).reshape(1, -1, 1, 1)


def _state(plan: Plan, layer: int) -> tuple[TensorInfo, ...]:
    """What passes between graphs, named after the layer that it enters."""
    shapes = blocks.Shapes(plan)
    visual = (shapes.hidden(f"visual.{layer}", plan.visual_tokens),) if layer < limit(plan) else ()
    return (*visual, shapes.hidden(f"text.{layer}", plan.text_tokens))


def graphs(plan: Plan) -> tuple[blocks.GraphSpec, ...]:
    """vision; released: prefill; dropped: prefill_head and, from the cutoff on, prefill_tail; decode."""
    shapes, layers, border = blocks.Shapes(plan), plan.spec.decoder.layers, limit(plan)
    whole = border == layers
    segments = blocks.segments(plan, "prefill" if whole else "prefill_head", range(border), "inputs_embeds")
    if not whole:
        segments = (*segments[:-1], replace(segments[-1], result="text"))
        segments += blocks.segments(plan, "prefill_tail", range(border, layers), "text")

    def graph(segment: blocks.Segment) -> blocks.GraphSpec:
        first, stop = segment.layers.start, segment.layers.stop
        entry = _state(plan, first) if first else (shapes.hidden("inputs_embeds", plan.prompt_tokens),)
        visual = (shapes.index("visual_index", plan.visual_tokens),) if first < border else ()
        last = (shapes.index("last_index", 1),) if stop == layers else ()
        caches = blocks.prefill_inputs(plan, segment.layers)
        return blocks.GraphSpec(
            name=segment.name,
            role="prefill",
            inputs=(*entry, *visual, shapes.index("text_index", plan.text_tokens), *last, *caches),
            outputs=(
                *((shapes.logits(),) if stop == layers else _state(plan, stop)),
                *blocks.prefill_outputs(plan, segment.layers),
            ),
            body=partial(run, segment=segment),
        )

    return blocks.vision_graph(plan), *(graph(segment) for segment in segments), *blocks.decode_graphs(plan, ())

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

from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.planning import (
    CacheGroup,
    GraphSpec,
    Method,
    Plan,
    PlanError,
    Prompt,
    Stage,
    Tensors,
    layer_flops,
)
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.errors import UnsupportedError, UsageError, nearest
from lvlm_edge.runtime.pictures.layout import Picture

if TYPE_CHECKING:
    from torch import Tensor

    from lvlm_edge.exporter.graphs.parts import DecoderLayer, Linear, Parts

SEMANTICS = ("released", "dropped")


@dataclass(frozen=True, kw_only=True)
class Config:
    """YOPO's settings; a checkpoint's config has them."""

    semantics: str = field(
        default="released",
        metadata={
            "help": "released (masks as in the released code, full cost) or dropped (leaves the tokens out, saves time)"
        },
    )
    window: int | None = field(
        default=None,
        metadata={
            "help": "side of the square of neighbors that a visual token attends to, at least 1",
            "default": "the checkpoint's",
        },
    )
    cutoff: int | None = field(
        default=None,
        metadata={"help": "first decoder layer without visual tokens, 1..layers", "default": "the checkpoint's"},
    )
    ffn_ratio: float | None = field(
        default=None,
        metadata={
            "help": "FFN channels divided by those that visual tokens use, from 1 to the number of channels",
            "default": "the checkpoint's",
        },
    )
    # A file as long as it is a setting, then a string per layer: 1 where a head stays for visual tokens.
    head_mask: str | tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "file of the heads that visual tokens use, .npy, bool [layers, heads]",
            "default": "the checkpoint's, else all heads",
        },
    )
    prefix_tokens: int | None = field(
        default=None,
        metadata={
            "help": "text tokens before the image in training, 0 or more; recorded in the manifest and not used",
            "default": "the checkpoint's",
        },
    )


def nominal(spec: ModelSpec[Any], config: Config) -> Config:
    """The settings, where the checkpoint's head mask is missing with the number of heads that its config says.

    Masks are not part of every published checkpoint's folder; for counting, the average is enough.
    """
    own = spec.settings.get("yopo", {})
    if config.head_mask is None or config.head_mask != own.get("head_mask") or Path(str(config.head_mask)).is_file():
        return config
    row = "1" * own["heads_kept"] + "0" * (spec.decoder.heads - own["heads_kept"])
    return replace(config, head_mask=(row,) * spec.decoder.layers)


def resolve(spec: ModelSpec[Any], config: Config) -> Config:
    """The settings with the head mask read.

    Raises:
        PlanError: a setting is missing or out of range.
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
    mask = config.head_mask
    rows = ("1" * d.heads,) * d.layers if mask is None else _read(mask, spec) if isinstance(mask, str) else mask
    return replace(config, head_mask=rows)


def _read(path: str, spec: ModelSpec[Any]) -> tuple[str, ...]:
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


def channels(spec: ModelSpec[Any], config: Config) -> int:
    """FFN channels that visual tokens use: the first ones."""
    assert config.ffn_ratio is not None
    return int(spec.decoder.ffn / config.ffn_ratio)


def released(plan: Plan) -> bool:
    return bool(plan.config.semantics == "released")


def limit(plan: Plan) -> int:
    """The first layer that visual tokens do not enter."""
    return _limit(plan.spec, plan.config)


def _limit(spec: ModelSpec[Any], config: Config) -> int:
    if config.semantics == "released":
        return spec.decoder.layers
    assert config.cutoff is not None and config.head_mask is not None
    # Below the cutoff too, where no later layer keeps a head for them.
    return 1 + max((i for i in range(config.cutoff) if "1" in config.head_mask[i]), default=-1)


def grid_of(pictures: Sequence[Picture], spec: ModelSpec[Any]) -> tuple[int, int]:
    """(rows, columns) of the picture's visual tokens.

    Raises:
        UnsupportedError: they are not the whole grid of one picture, in one run.
    """
    runs = pictures[0].runs
    grid = runs[0].grid
    if runs[0].kind == "visual" and len(runs) == 1 and grid is not None and runs[0].rows == math.prod(grid):
        return grid
    found = f"{pictures[0].visual_tokens} visual tokens"
    if spec.reads_features:
        found = "no projector"
    elif any(run.kind == "separator" for run in runs):
        found = "separators after its crops"
    raise UnsupportedError(
        f"yopo: the checkpoint has {found}, expected the grid of one picture alone; use another --method"
    )


def stages(spec: ModelSpec[Any], config: Config, prompt: Prompt) -> tuple[Stage, ...]:
    """Dropped: two stages, split where visual tokens leave. Released: every token in every layer."""
    grid_of(prompt.pictures, spec)
    visual, others = prompt.visual, prompt.others
    full, layers, border = visual + others, spec.decoder.layers, _limit(spec, config)
    flops = sum(_layer_flops(spec, config, visual, others, i, i == border - 1) for i in range(border))
    return (
        *([Stage(range(border), full, full, full, flops=flops)] if border else []),
        *([Stage(range(border, layers), others, others, others)] if border < layers else []),
    )


def _layer_flops(spec: ModelSpec[Any], config: Config, v: int, t: int, layer: int, last: bool) -> int:
    """FLOPs of a layer that visual tokens enter; of the last such layer only their keys and values are read."""
    d = spec.decoder
    assert isinstance(config.head_mask, tuple)
    row, size, each = config.head_mask[layer], d.head_dim, d.heads // d.kv_heads
    kept = [h for h in range(d.heads) if row[h] == "1" or config.semantics == "released"]
    pruned = [h for h in range(d.heads) if h not in kept]
    text = layer_flops(d, t, 0) + 4 * size * (t * (v + t) * len(kept) + t * t * len(pruned))
    # A KV head that both kept and pruned heads read is projected for either.
    text += 4 * t * d.hidden * len({h // each for h in kept} & {h // each for h in pruned}) * size
    visual = 4 * v * d.hidden * len({h // each for h in kept}) * size
    if last:
        return text + visual
    attention = 4 * v * d.hidden * len(kept) * size + 4 * v * (v + t) * len(kept) * size
    return text + visual + attention + 6 * v * d.hidden * channels(spec, config)


def paper(plan: Plan) -> dict[str, Any]:
    """The paper's column: FLOPs of the visual tokens alone, as configured; the published costs are nominal.

    Convention: 2 x multiply-accumulate, keys and values as wide as queries, `window`^2 keys below the cutoff.
    """
    d, c, v = plan.spec.decoder, plan.config, plan.visual_tokens
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


def seen(plan: Plan, inputs: Tensors) -> Tensor:
    """Which rows see which keys, both visual tokens, then text, [V + T, V + T], bool.

    Causal, but that visual tokens see their neighbours on all sides, and no other visual token.
    """
    visual, text = inputs["visual_index"], inputs["text_index"]
    apart = distances(visual - visual[:1], grid_of(plan.pictures, plan.spec))
    reach = (plan.config.window - 1) // 2
    # One comparison at the end: TensorRT-RTX 1.7.1 ends with a segmentation fault on joined and combined booleans.
    later = (text[None] - visual[:, None]) * (reach + 1)  # beyond reach where text comes after the image
    of_text = (blocks.concat([visual, text])[None] - text[:, None]) * (reach + 1)
    sees: Tensor = blocks.concat([blocks.concat([apart, later], 1), of_text]) <= reach
    return sees


def distances(index: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rows or columns between visual tokens, whichever are more, [V, V], int64.

    Args:
        index: 0 .. V-1, as data: of a constant the whole square would become one.
        grid: (rows, columns) that they lie on.
    """
    count, side = math.prod(grid), grid[1]
    rows, columns = ([i // side for i in range(count)], [i % side for i in range(count)])
    at = [blocks.constant(table).index_select(0, index) for table in (rows, columns)]
    down, across = ((x[:, None] - x[None]).abs() for x in at)
    return down.maximum(across)


def run(parts: Parts, plan: Plan, inputs: Tensors, *, segment: blocks.Segment) -> Tensors:
    """Layers of the segment, with visual tokens as far as they go."""
    first, positions = segment.layers.start, inputs["text_index"][None]
    if first == 0:
        x = inputs[segment.entry]
        text = x.index_select(1, inputs["text_index"])
        visual = x.index_select(1, inputs["visual_index"]) if limit(plan) else text
    else:
        text = inputs[f"text.{first}"]
        visual = inputs.get(f"visual.{first}", text)  # nobody reads it where there is none
    sees = seen(plan, inputs) if first < limit(plan) else None
    caches: Tensors = {}
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
    parts: Parts, plan: Plan, i: int, inputs: Tensors, visual: Tensor, text: Tensor, sees: Tensor
) -> tuple[Tensor, Tensor, Tensors]:
    """A layer whose pruned heads do not know of visual tokens: two layers in one, of other heads and other rows."""
    layer, found, groups, last = parts.layers[i], heads(plan, i), plan.groups(i), i == limit(plan) - 1
    results: list[Tensor] = []  # of text
    written: Tensors = {}
    of_visual = None
    if found.kept:
        rows = _rows(parts, layer, visual, text, inputs, found.kept, found.kept_kv, asks=not last)
        written |= parts.ops.store(inputs, groups[0], *rows[1:])
        key, value = (_per_query(plan, x, found.kept, found.kept_kv) for x in rows[1:])
        of_visual, of_text = _attend(parts, plan, rows[0], key, value, sees)
        results.append(of_text)
    if found.pruned:
        rows = _rows(parts, layer, None, text, inputs, found.pruned, found.pruned_kv)
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
    parts: Parts, plan: Plan, i: int, inputs: Tensors, visual: Tensor, text: Tensor, sees: Tensor
) -> tuple[Tensor, Tensor, Tensors]:
    """A layer that takes visual tokens into the softmax, and their values as zero where the release zeroes columns."""
    layer, found, d = parts.layers[i], heads(plan, i), plan.spec.decoder
    (group,) = plan.groups(i)
    last, every = i == d.layers - 1, tuple(range(d.heads))
    query, key, value = _rows(parts, layer, visual, text, inputs, every, tuple(range(d.kv_heads)), asks=not last)
    if len(group.kv_heads) > d.kv_heads:
        # Not one Gather: TensorRT-RTX 1.7.1 does not build caches whose rows come out of one.
        key, value = (blocks.concat([x[:, h : h + 1] for h in group.kv_heads], 1) for x in (key, value))
    reads, per = set(found.kept) if i < plan.config.cutoff else set(), d.heads // len(group.kv_heads)
    read = [bool(reads & set(every[j * per : (j + 1) * per])) for j in range(len(group.kv_heads))]
    is_text = [False] * plan.visual_tokens + [True] * plan.text_tokens
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
    rows, text = query.shape[2], plan.text_tokens
    attended = parts.ops.attend_where(query, key, value, sees[-rows:])
    return (attended[:, :, :-text] if rows > text else None), attended[:, :, -text:]


def _rows(
    parts: Parts,
    layer: DecoderLayer,
    visual: Tensor | None,
    text: Tensor,
    inputs: Tensors,
    asking: tuple[int, ...],
    kv_heads: tuple[int, ...],
    *,
    asks: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of some heads; rows are visual tokens, where given, and text, projected together.

    TensorRT-RTX 1.7.1 does not build a cache of rows that were projected apart and then joined.

    Args:
        asks: visual tokens have queries too.
    """
    d, ops, tables = parts.spec.decoder, parts.ops, (parts.rope_cos, parts.rope_sin)
    x = text if visual is None else blocks.concat([visual, text], 1)
    at = inputs["text_index"]
    at = (at if visual is None else blocks.concat([inputs["visual_index"], at]))[None]
    normed = ops.rms_norm(x, layer.input_layernorm.weight, d.eps)
    own, own_at = (normed, at) if asks else (normed[:, -text.shape[1] :], at[:, -text.shape[1] :])
    query = ops.rotate(blocks.some_heads(own, layer.q_proj, asking, d.heads), *tables, own_at)
    key = ops.rotate(blocks.some_heads(normed, layer.k_proj, kv_heads, d.kv_heads), *tables, at)
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
    return (*visual, shapes.hidden(f"text.{layer}", plan.text_tokens))


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """Released: prefill; dropped: prefill_head and, from the cutoff on, prefill_tail; decode."""
    shapes, layers, border = blocks.Shapes(plan), plan.spec.decoder.layers, limit(plan)
    names = ("prefill",) if border in (0, layers) else ("prefill_head", "prefill_tail")
    runs = [run for run in (range(border), range(border, layers)) if run]
    segments = [
        segment
        for name, run in zip(names, runs, strict=True)
        for segment in blocks.segments(plan, name, run, "inputs_embeds", "text" if run.stop < layers else None)
    ]

    def graph(segment: blocks.Segment) -> GraphSpec:
        first, stop = segment.layers.start, segment.layers.stop
        entry = _state(plan, first) if first else (shapes.hidden("inputs_embeds", plan.prompt_tokens),)
        visual = (shapes.index("visual_index", plan.visual_tokens),) if first < border else ()
        last = (shapes.index("last_index", 1),) if stop == layers else ()
        caches = blocks.prefill_inputs(plan, segment.layers)
        return GraphSpec(
            name=segment.name,
            role="prefill",
            inputs=(*entry, *visual, shapes.index("text_index", plan.text_tokens), *last, *caches),
            outputs=(
                *((shapes.logits(),) if stop == layers else _state(plan, stop)),
                *blocks.prefill_outputs(plan, segment.layers),
            ),
            body=partial(run, segment=segment),
        )

    return *(graph(segment) for segment in segments), *blocks.decode_graphs(plan, ())


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
)

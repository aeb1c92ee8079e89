"""FastV: drop low-attention visual tokens from the prune layer on (arXiv:2403.06764).

The paper describes the score as attention received from all tokens; the released code, and this file, use the
attention of the last prompt token alone. Ranked once, in prefill; kept tokens keep their original positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.planning import GraphSpec, Method, Plan, PlanError, Prompt, Stage, Tensors
from lvlm_edge.runtime.errors import UnsupportedError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from lvlm_edge.exporter.graphs.parts import Parts


LARGEST_SORT = 3840  # rows that TensorRT's TopK takes
TOGETHER, PER_IMAGE = RANKS = ("together", "per-image")


@dataclass(frozen=True, kw_only=True)
class Config:
    """FastV's two knobs, the second as a share or as a count."""

    prune_layer: int = field(  # K in the paper: layers 0..K-1 see every visual token
        default=2, metadata={"help": "first decoder layer that runs on the kept visual tokens alone, 1..layers-1"}
    )
    keep_ratio: float = field(  # 1 - R in the paper
        default=0.5, metadata={"help": "visual tokens kept over all visual tokens, above 0 and at most 1"}
    )
    keep_tokens: int | None = field(
        default=None,
        metadata={"help": "number of visual tokens to keep, from 1 to all; replaces --keep-ratio"},
    )
    rank: str = field(
        default=TOGETHER,
        metadata={
            "help": "how visual tokens are ranked: together, over all images, or per-image, where each image keeps the "
            "ratio or the number of its own",
            "choices": RANKS,
        },
    )


def kept(config: Config, visual_tokens: int) -> int:
    """Visual tokens kept: `keep_tokens`, or the ratio rounded half to even as the released code rounds.

    Raises:
        PlanError: the ratio is not in (0, 1], or the count not in 1..visual_tokens.
    """
    if config.keep_tokens is None and not 0 < config.keep_ratio <= 1:
        raise PlanError(
            f"fastv: keep_ratio is {config.keep_ratio:g}, expected more than 0 and at most 1 (kept over all)"
        )
    count = round(visual_tokens * config.keep_ratio) if config.keep_tokens is None else config.keep_tokens
    if not 1 <= count <= visual_tokens:
        raise PlanError(f"fastv: {count} of {visual_tokens} visual tokens would be kept; keep 1..{visual_tokens}")
    return count


def ranked_apart(config: Config, prompt: Prompt) -> int:
    """How many parts of equally many visual tokens are ranked, each by itself.

    Raises:
        UnsupportedError: an unknown way of ranking.
        PlanError: images have different numbers of visual tokens.
    """
    if config.rank not in RANKS:
        raise UnsupportedError(f"fastv: rank is {config.rank!r}; {nearest(str(config.rank), RANKS)}")
    if config.rank == TOGETHER:
        return 1
    tokens = sorted({picture.visual_tokens for picture in prompt.pictures})
    if len(tokens) > 1:
        raise PlanError(
            f"fastv: images of {' and '.join(map(str, tokens))} visual tokens cannot be ranked one by one; give one "
            "--image-size for all, or leave out --rank"
        )
    return len(prompt.pictures)


def stages(spec: ModelSpec[Any], config: Config, prompt: Prompt) -> tuple[Stage, ...]:
    """Two stages, split at the prune layer.

    Raises:
        PlanError: the prune layer is not inside the model, or the kept count is out of range.
        UnsupportedError: separators stand among the visual tokens.
    """
    if prompt.separators:
        raise UnsupportedError(
            "fastv: ranks no tokens of a checkpoint with separators after its crops; use --method none"
        )
    k, layers = config.prune_layer, spec.decoder.layers
    if not 0 < k < layers:
        raise PlanError(f"fastv: prune_layer is {k}, but the model has layers 0..{layers - 1}; choose 1..{layers - 1}")
    images = ranked_apart(config, prompt)
    full = prompt.visual + prompt.others
    reduced = images * kept(config, prompt.visual // images) + prompt.others
    if reduced > LARGEST_SORT:
        raise PlanError(
            f"fastv: keeps {reduced} rows of text and visual tokens, but TensorRT sorts at most {LARGEST_SORT}; lower "
            "--keep-ratio, --image-size or --max-text-tokens"
        )
    return (
        Stage(range(k), full, full, full, scored=full),
        Stage(range(k, layers), reduced, reduced, reduced),
    )


def paper(plan: Plan) -> dict[str, Any]:
    """The paper's column: mean FLOPs of one layer, as multiply-accumulates, FFN as two matrices, 36 other tokens.

    Its formula takes the kept share of the visual tokens as it is, not rounded to whole tokens.
    """
    d, m = plan.spec.decoder.hidden, plan.spec.decoder.ffn

    def cost(n: float) -> float:
        return 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m

    visual, layers, k = plan.visual_tokens, plan.spec.decoder.layers, plan.config.prune_layer
    left = plan.kept_tokens if plan.config.keep_tokens is not None else visual * plan.config.keep_ratio
    dense, reduced = cost(visual + 36), cost(left + 36)
    mean = (k * dense + (layers - k) * reduced) / layers
    return {"name": "FastV", "unit": "GMAC per layer, mean", "value": mean / 1e9, "ratio": mean / dense}


def head(parts: Parts, plan: Plan, inputs: Tensors, *, subgraph: blocks.Subgraph) -> Tensors:
    """The last layers below the prune layer over the whole prompt, and the importance scores."""
    x, positions = inputs[subgraph.entry], inputs["position_ids"]
    x, (query, key), caches = blocks.prefill_layers(parts, plan, subgraph.layers, inputs, x, positions)
    scores = importance(query, key, inputs["last_index"], inputs["visual_index"])
    return {"hidden": x, "score": scores, **caches}


def importance(query: Tensor, key: Tensor, last: Tensor, visual: Tensor) -> Tensor:
    """Importance score of each visual token: attention from the last real prompt token, mean over query heads.

    Args:
        query: queries of the layer before the prune layer, rotated, [1, H, S, D_h].
        key: keys of the same layer, rotated, [1, H_kv, at least S, D_h]; further ones count as padding.
        last: row of the last real token; padding comes after it, [1], int64.
        visual: rows of the visual tokens, ascending, [V], int64.

    Returns:
        [1, V], float32.

    Source: the released code of arXiv:2403.06764; softmax per head over all keys, then the mean.
    """
    heads, size = query.shape[1], query.shape[3]
    kv_heads, rows = key.shape[1], key.shape[2]
    row = query.index_select(2, last).reshape(1, kv_heads, heads // kv_heads, size)
    # The product in the graph's dtype: Turing has no float32 matrix product in TensorRT-RTX. All else in float32.
    logits: Tensor = (row @ key.transpose(2, 3)).float() * size**-0.5  # [1, H_kv, H / H_kv, S]
    real = blocks.arange(rows) <= last
    attention = logits.masked_fill(~real, float("-inf")).softmax(-1)
    return attention.mean((1, 2)).index_select(1, visual)


def select(parts: Parts, plan: Plan, inputs: Tensors) -> Tensors:
    """The kept rows, in sequence order, with their original positions."""
    top = _best(inputs["score"], plan.kept_tokens, ranked_apart(plan.config, plan.prompt))
    # topk orders by score; RoPE and the causal mask need sequence order.
    kept_visual = blocks.ascending(top)
    slots = blocks.concat([inputs["text_index"], inputs["visual_index"].index_select(0, kept_visual)])
    keep_index = blocks.ascending(slots)
    added = {f"kept_{name}": inputs[name].index_select(1, keep_index) for name in _added(plan)}
    # With fewer pictures than planned, padding is chosen in their place: rows behind the last real one.
    last = (keep_index <= inputs["last_index"]).long().sum(0, keepdim=True) - 1
    return {
        "kept_hidden": inputs["hidden"].index_select(1, keep_index),
        "kept_position_ids": inputs["position_ids"].index_select(1, keep_index),
        "kept_last_index": last,
        "kept_visual": kept_visual,
        **added,
    }


def _best(score: Tensor, count: int, apart: int) -> Tensor:
    """Indices of the highest of scores [1, V], equally many of each of so many parts, [count]."""
    if apart == 1:
        return score.topk(count).indices[0]
    each = score.shape[1] // apart
    first = (blocks.arange(apart) * each)[:, None]
    top: Tensor = score.reshape(apart, each).topk(count // apart).indices + first
    return top.flatten()


def _added(plan: Plan) -> tuple[str, ...]:
    """What is added to visual rows after layers from the prune layer on."""
    return plan.injected[plan.config.prune_layer :]


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """prefill_head, select, prefill_tail, decode."""
    shapes = blocks.Shapes(plan)
    first, second = plan.stages
    full, reduced = first.queries, second.queries
    score, visual_index = (
        shapes.score("score", plan.visual_tokens),
        shapes.index("visual_index", plan.visual_tokens),
    )
    heads = blocks.subgraphs(plan, "prefill_head", first.layers, "inputs_embeds", "hidden")
    scored = partial(head, subgraph=heads[-1])
    before = (
        *(blocks.prefill_graph(plan, subgraph, full) for subgraph in heads[:-1]),
        blocks.prefill_graph(plan, heads[-1], full, inputs=(visual_index,), outputs=(score,), body=scored),
    )
    selection = GraphSpec(
        name="select",
        role="prefill",
        inputs=(
            shapes.hidden("hidden", full),
            shapes.positions("position_ids", full),
            shapes.index("last_index", 1),
            score,
            visual_index,
            shapes.index("text_index", plan.prompt.others),
            *(shapes.hidden(name, full) for name in _added(plan)),
        ),
        outputs=(
            shapes.hidden("kept_hidden", reduced),
            shapes.positions("kept_position_ids", reduced),
            shapes.index("kept_last_index", 1),
            shapes.index("kept_visual", plan.kept_tokens),
            *(shapes.hidden(f"kept_{name}", reduced) for name in _added(plan)),
        ),
        body=select,
    )
    tails = blocks.subgraphs(plan, "prefill_tail", second.layers, "kept_hidden")
    after = [blocks.prefill_graph(plan, subgraph, reduced, kept="kept_") for subgraph in tails]
    prefill = (*before, selection, *after)
    return *prefill, *blocks.decode_graphs(plan, prefill)


METHOD = Method(
    name="fastv",
    config=Config,
    stages=stages,
    graphs=graphs,
    paper=paper,
    shares_weights=True,
    fewer_pictures=True,
    three_axes=True,
    injected=True,
)

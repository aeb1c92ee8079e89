"""Loads: the work of a plan's stages by the rates of a processor (`rates`), from the dimensions alone.

Products and attention are counted as FLOPs are (`counts`). The operators between them are those that layers have in
general: two norms and two sums of the residual stream, an activation and, in a decoder, the product that gates it; in
an encoder also biases, and heads that are transposed.
"""

from __future__ import annotations

from lvlm_edge.exporter.checkpoints import quantise
from lvlm_edge.exporter.planning import counts, rates
from lvlm_edge.exporter.planning.plan import Plan
from lvlm_edge.exporter.planning.records import Stage
from lvlm_edge.exporter.planning.work import Attention, Work

Load = dict[str, float]
Shape = tuple[int, int]


def vision(plan: Plan) -> Load:
    """Of the vision encoder over all views of all images."""
    seen = counts.vision_work(plan)
    return rates.total(part for views, encoder, _ in seen for part in [_work(plan, encoder)] * views)


def projector(plan: Plan) -> Load:
    """Of the projector over all images."""
    return rates.total(_work(plan, projector) for _, _, projector in counts.vision_work(plan))


def stage(plan: Plan, stage: Stage, *, last: bool) -> Load:
    """Of a prefill stage, with lm_head on one row if it is the last.

    A stage that counts its own FLOPs has those that are not attention's as products of its layers.
    """
    d, layers, rows = plan.spec.decoder, len(stage.layers), stage.queries
    attended = 4 * rows * stage.keys * d.heads * d.head_dim * layers + 2 * stage.scored * d.heads * d.head_dim
    parts = [
        rates.attention(attended, rows),
        _matrices(plan, rows, layers, (counts.stage_flops(d, stage) - attended) / layers),
        _between(plan, rows, layers),
    ]
    return rates.total([*parts, _head(plan)] if last else parts)


def decode(plan: Plan) -> Load:
    """Of one decoded token that attends to full caches.

    Integer products that read the same row are one (`ort.joined`): four of seven.
    """
    d = plan.spec.decoder
    attended = sum(4 * len(g.queries) * d.head_dim * plan.capacity_of(g) for g in plan.all_groups())
    matrices = _matrices(plan, 1, d.layers)
    if plan.formats.decoder != "as-is":
        matrices |= {name: matrices[name] * 4 / 7 for name in rates.START.values() if name in matrices}
    return rates.total([rates.attention(attended, 1), matrices, _between(plan, 1, d.layers), _head(plan)])


def _matrices(plan: Plan, rows: int, layers: int, flops: float | None = None) -> Load:
    """Products of layers, whose FLOPs per layer may be fewer than those of every row."""
    shapes, part = (
        counts.layer_matrices(plan.spec.decoder),
        "prompt" if rows > 1 and plan.formats.prompt is not None else "decoder",
    )
    found = rates.total(_product(plan, part, shape, rows, layers) for shape in shapes)
    if rows > 1 and flops is not None:
        share = flops / (2 * rows * sum(a * b for a, b in shapes))
        found |= {name: found[name] * share for name in rates.ROWS.values() if name in found}
    if rows > 1:
        read = {0: shapes[0], 3: shapes[3], 4: shapes[4], 6: shapes[6]}  # the others read the same rows as one before
        found = rates.total([found, *(_rounding(plan, part, s, rows, layers) for s in read.values())])
    return found


def _between(plan: Plan, rows: int, layers: int) -> Load:
    d = plan.spec.decoder
    return rates.elements(rows * (10 * d.hidden + 6 * d.ffn) * layers, 6 * layers)


def _head(plan: Plan) -> Load:
    d = plan.spec.decoder
    return _product(plan, "head", (d.hidden, d.vocab), 1, 1)


def _work(plan: Plan, work: Work) -> Load:
    parts: list[Load] = []
    for step in work.steps:
        if isinstance(step, Attention):
            flops = 4 * step.queries * step.keys * step.heads * step.size * step.count
            parts.append(rates.attention(flops, step.queries))
            continue
        shape = step.inputs, step.outputs
        part = "vision" if step.matrix else ""
        parts.append(_product(plan, part, shape, step.rows, step.count))
        parts.append(_rounding(plan, part, shape, step.rows, step.count))
        parts.append(rates.elements(2 * step.rows * step.outputs * step.count, step.count))  # its bias
    wide = max((p.outputs for p in work.products), default=0)
    if any(isinstance(step, Attention) for step in work.steps):
        parts.append(rates.elements(work.rows * (18 * work.hidden + 5 * wide) * work.layers, 10 * work.layers))
    return rates.total(parts)


def _product(plan: Plan, part: str, shape: Shape, rows: int, count: int) -> Load:
    return rates.product(shape, rows, _format(plan, part, shape), count)


def _rounding(plan: Plan, part: str, shape: Shape, rows: int, count: int) -> Load:
    """Of the rows that an INT8 product reads; none for another."""
    integers = rates.format_of(_format(plan, part, shape)) == "int8" and rows > 1
    return rates.rounding(rows, shape[0], count) if integers else {}


def _format(plan: Plan, part: str, shape: Shape) -> quantise.Format | None:
    """How a matrix of a part is kept; one of no part as floats."""
    return quantise.fitting(getattr(plan.formats, part), shape[0], plan.formats.block) if part else None

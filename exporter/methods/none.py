"""No reduction: every visual token in every layer. The baseline that the methods are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.planning import Plan, Stage

SHARES_WEIGHTS = True  # prompt and decode can run in the same graphs


@dataclass(frozen=True, kw_only=True)
class Config:
    """The baseline has no knobs."""


def stages(spec: ModelSpec, config: Config, visual_tokens: int, text_tokens: int) -> tuple[Stage, ...]:
    """One stage: all layers see the whole prompt."""
    full = visual_tokens + text_tokens
    return (Stage(range(spec.decoder.layers), full, full, full),)


def paper(plan: Plan) -> dict[str, Any] | None:
    """No paper, no column."""
    return None


def graphs(plan: Plan) -> tuple[blocks.GraphSpec, ...]:
    """vision, prefill, decode."""
    segments = blocks.segments(plan, "prefill", range(plan.spec.decoder.layers), "inputs_embeds")
    prefill = [blocks.prefill_graph(plan, segment, plan.prompt_tokens) for segment in segments]
    return blocks.vision_graph(plan), *prefill, *blocks.decode_graphs(plan, prefill)

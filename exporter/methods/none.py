"""No reduction: every visual token in every layer. The baseline that the methods are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter import blocks
from lvlm_edge.exporter.planning import Plan, Stage
from lvlm_edge.exporter.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from lvlm_edge.exporter.parts import Parts


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


def prefill(parts: Parts, plan: Plan, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits [1, 1, vocab] of the last real token, and the caches."""
    x, _, caches = blocks.prefill_layers(parts, plan, range(plan.spec.decoder.layers), inputs, "inputs_embeds")
    return {"logits": blocks.logits(parts, x, inputs["last_index"]), **caches}


def graphs(plan: Plan) -> tuple[blocks.GraphSpec, ...]:
    """vision, prefill, decode."""
    shapes = blocks.Shapes(plan)
    layers = range(plan.spec.decoder.layers)
    return (
        blocks.vision_graph(plan),
        blocks.GraphSpec(
            name="prefill",
            role="prefill",
            inputs=(
                shapes.hidden("inputs_embeds", plan.prompt_tokens),
                shapes.index("position_ids", 1, plan.prompt_tokens),
                shapes.index("last_index", 1),
                *blocks.prefill_inputs(plan, layers),
            ),
            outputs=(shapes.logits(), *blocks.prefill_outputs(plan, layers, plan.prompt_tokens)),
            body=prefill,
        ),
        blocks.decode_graph(plan),
    )

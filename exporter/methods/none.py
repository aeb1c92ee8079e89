"""No reduction: every visual token in every layer. The baseline that the methods are measured against."""

from __future__ import annotations

from dataclasses import dataclass

from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.planning import GraphSpec, Method, Plan, whole


@dataclass(frozen=True, kw_only=True)
class Config:
    """The baseline has no settings."""


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """prefill, decode."""
    subgraphs = blocks.subgraphs(plan, "prefill", range(plan.spec.decoder.layers), "inputs_embeds")
    prefill = [blocks.prefill_graph(plan, subgraph, plan.prompt_tokens) for subgraph in subgraphs]
    return *prefill, *blocks.decode_graphs(plan, prefill)


METHOD = Method(
    name="none",
    config=Config,
    stages=whole,
    graphs=graphs,
    shares_weights=True,
    fewer_pictures=True,
    three_axes=True,
    injected=True,
)

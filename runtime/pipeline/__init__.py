"""Runs a bundle: inputs, memory between the graphs, the loop, and the choice of tokens."""

from lvlm_edge.runtime.pipeline.pipeline import Pipeline, Result

__all__ = ["Pipeline", "Result"]

"""Runs a bundle on a device: numpy, tokenizers, Pillow, jinja2 and one backend; no training framework."""

from lvlm_edge.runtime.errors import BundleError, InputError, LvlmEdgeError, UnsupportedError, UsageError
from lvlm_edge.runtime.pipeline import Pipeline, Reading, Result
from lvlm_edge.runtime.pipeline.sampling import Sampling

__all__ = [
    "BundleError",
    "InputError",
    "LvlmEdgeError",
    "Pipeline",
    "Reading",
    "Result",
    "Sampling",
    "UnsupportedError",
    "UsageError",
]

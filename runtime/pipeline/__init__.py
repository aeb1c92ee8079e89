"""Runs a bundle: inputs, memory between the graphs, the loop, and the choice of tokens.

Image features are cached: a second question about the same images skips the vision encoder, and HiMix's keys and values
of images. `Pipeline.forget_images` clears the cache.
"""

from lvlm_edge.runtime.pictures.sources import Reading
from lvlm_edge.runtime.pipeline.decoder import Result
from lvlm_edge.runtime.pipeline.pipeline import Pipeline

__all__ = ["Pipeline", "Reading", "Result"]

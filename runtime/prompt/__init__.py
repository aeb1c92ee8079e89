"""Prompts: chat messages to token ids, and token ids back to text."""

from lvlm_edge.runtime.prompt.chat import Text, TextConfig, count_parts
from lvlm_edge.runtime.prompt.streams import TextStream

__all__ = ["Text", "TextConfig", "TextStream", "count_parts"]

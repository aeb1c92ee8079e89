"""ModelSpec: dimensions and token ids of a checkpoint, from its configs alone; reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError

# What stands for an image in the original LLaVA layouts, whose tokenizers have no token for it.
PLACEHOLDER_ID = -200

V = TypeVar("V", covariant=True)


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A Llama-shaped decoder.

    Attributes:
        tied: lm_head and embedding are one tensor.
        window: sliding attention window in tokens, None for full attention.
        max_positions: positions the checkpoint was trained for.
        rope: the text config's fields that decide the rotary tables.
        qk_norm: queries and keys are RMS-normalised per head before they are rotated.
        rope_sections: frequencies that turn by time, row and column, in this order; empty for positions of one axis.
        rope_interleaved: frequencies of rows and columns alternate with those of time instead of following them.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    eps: float
    mlp_act: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool
    window: int | None
    max_positions: int
    rope: Mapping[str, Any] = field(hash=False)
    qk_norm: bool = False
    rope_sections: tuple[int, ...] = ()
    rope_interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class Prequantised:
    """How a checkpoint stores matrices as integers already: a weight is scale * (integer - zero point).

    Attributes:
        layout: `awq`, `gptq` (zero points less 1), `gptq_v2`, `packed` (compressed-tensors' int32) or `plain` (int8).
        bits: of an integer, 4 or 8.
        group: input channels that share a scale; None where an output channel has one scale.
        smaller: sizes of the groups of matrices whose input channels `group` does not divide.
        symmetric: every zero point is the middle of the integers' range.
        parts: what config.json says is quantised: `decoder`, and maybe `vision` and `head`.
    """

    layout: str
    bits: int
    group: int | None
    symmetric: bool
    parts: tuple[str, ...]
    smaller: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Generic[V]):
    """A vision-language model: encoder, projector, decoder, and the token ids that matter.

    Attributes:
        family: name of the family that read it.
        vision: the family's own description of the encoder and projector.
        image_token_id: `PLACEHOLDER_ID` where the tokenizer has no image token.
        video_token_id: None where videos are not seen.
        features: width of the encoder's features that the decoder's layers read; 0 where a projector makes rows of
            them.
        settings: what the checkpoint's config says of reduction methods, by method and the method's field.
        prequantised: how the checkpoint's integers are stored; None where it has floats.
    """

    family: str
    vision: V
    decoder: DecoderSpec
    image_token_id: int
    video_token_id: int | None = None
    features: int = 0
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    prequantised: Prequantised | None = None

    @property
    def reads_features(self) -> bool:
        """Whether pictures have no rows in the prompt."""
        return self.features > 0


_KINDS = {int: "whole number", float: "number", str: "name", bool: "true or false"}


def check_kind(path: Path, name: str, value: Any, kind: type) -> None:
    """Raise CheckpointError unless a field of config.json is of its kind; whole numbers are numbers."""
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise CheckpointError(f"{path}: {name} is {value!r}, expected a {_KINDS[kind]}; correct it")


# Sizes that no model has, far above those that some have: counting with them would not end, or overflow.
LARGEST = {"layers": 1_000, "image_size": 1 << 14, "max_positions": 1 << 40}
LARGEST_OTHER = 1 << 24


def check_sizes(path: Path, part: str, sizes: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless sizes are whole numbers above 0, and such as a model can have."""
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{path}: {part} has {name} {value!r}, expected a whole number above 0; correct it")
        most = LARGEST.get(name, LARGEST_OTHER)
        if value > most:
            raise CheckpointError(f"{path}: {part} has {name} {value}, expected at most {most}; correct it")


def check_shares(path: Path, name: str, whole: int, by: int) -> None:
    """Raise CheckpointError unless something can be shared out."""
    if whole % by:
        raise CheckpointError(f"{path}: cannot share out {name}, {whole} by {by}; correct it")


def check(spec: ModelSpec[Any], path: Path) -> None:
    """Raise CheckpointError unless the decoder's fields are of their kind, and heads share out what they divide."""
    d = spec.decoder
    check_kind(path, "image_token_index", spec.image_token_id, int)
    check_kind(path, "text_config's rms_norm_eps", d.eps, float)
    check_kind(path, "text_config's hidden_act", d.mlp_act, str)
    theta = d.rope.get("rope_parameters", {}).get("rope_theta", 1.0)
    check_kind(path, "rope_parameters' rope_theta", theta, float)
    names = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_positions")
    check_sizes(path, "text_config", {name: getattr(d, name) for name in names})
    check_sizes(path, "text_config", {"heads times head_dim": d.heads * d.head_dim})
    check_shares(path, "heads by key-value heads", d.heads, d.kv_heads)
    check_shares(path, "head size by 2", d.head_dim, 2)
    if d.rope_sections and sum(d.rope_sections) != d.head_dim // 2:
        raise CheckpointError(
            f"{path}: mrope_section is {list(d.rope_sections)}, expected a sum of {d.head_dim // 2}; correct it"
        )
    if spec.image_token_id < 0 and spec.image_token_id != PLACEHOLDER_ID:
        raise CheckpointError(f"{path}: image_token_index is {spec.image_token_id}, expected a token id; correct it")
    if spec.video_token_id is not None and (spec.video_token_id < 0 or spec.video_token_id == spec.image_token_id):
        raise CheckpointError(
            f"{path}: video_token_index is {spec.video_token_id}, expected a token id other than the image's; "
            "correct it"
        )

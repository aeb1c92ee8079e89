"""ModelSpec: dimensions and token ids of a checkpoint, from its `config.json` alone; reads no weights."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lvlm_edge.runtime.errors import LvlmEdgeError, UnsupportedError, nearest

# What stands for an image in the original LLaVA layouts, whose tokenizers have no token for it.
PLACEHOLDER_ID = -200
# Names that another family's module serves.
ALIASES = dict.fromkeys(("llava_qwen", "llava_phi", "llava_phi3", "llava_mistral"), "llava_llama")


class CheckpointError(LvlmEdgeError):
    """A checkpoint's files are missing, damaged, or do not fit each other."""


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """The vision encoder.

    Attributes:
        kind: `clip` (class token, LayerNorm before the layers) or `siglip`.
        layers: layers of the checkpoint; a graph holds only those below the highest feature layer.
        feature_layers: hidden states handed to the projector, as numbers of layers run, concatenated.
        drop_first: the first token of each hidden state is removed (select strategy `default`).
        mlp_act: activation name as in the config (`quick_gelu`, `gelu`, `gelu_pytorch_tanh`).
    """

    kind: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    image_size: int
    patch_size: int
    channels: int
    eps: float
    mlp_act: str
    feature_layers: tuple[int, ...]
    drop_first: bool

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def positions(self) -> int:
        """Tokens inside the encoder: the patches, and for CLIP the class token."""
        return self.grid**2 + (self.kind == "clip")

    @property
    def tokens(self) -> int:
        """Visual tokens per picture that the encoder sees."""
        return self.positions - self.drop_first


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A Llama-shaped decoder.

    Attributes:
        tied: lm_head and embedding are one tensor.
        window: sliding attention window in tokens, None for full attention.
        max_positions: positions the checkpoint was trained for.
        rope: the text config's fields that decide the rotary tables.
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
class ModelSpec:
    """A vision-language model: encoder, two-layer projector, decoder, and the token ids that matter.

    Attributes:
        projector_act: None for a model without a projector, whose decoder reads the encoder's features.
        image_token_id: `PLACEHOLDER_ID` where the tokenizer has no image token.
        newline: a learned vector, the separator, comes after the visual tokens of every crop.
        pinpoints: (width, height) of the canvases of any-resolution pictures; empty for pictures of one crop.
        settings: what the checkpoint's config says of reduction methods, by method and the method's field.
        prequantised: how the checkpoint's integers are stored; None where it has floats.
    """

    family: str
    vision: VisionSpec
    projector_act: str | None
    projector_bias: bool
    decoder: DecoderSpec
    image_token_id: int
    newline: bool = False
    pinpoints: tuple[tuple[int, int], ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    prequantised: Prequantised | None = None

    @property
    def visual_tokens(self) -> int:
        """Visual tokens per crop; an image is one crop unless any-resolution tiles come with it."""
        return self.vision.tokens


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a JSON object; restore the file")
    return content


def family(name: str) -> ModuleType:
    """The module of a model family, by `model_type`.

    Raises:
        UnsupportedError: there is no such family.
    """
    from lvlm_edge.exporter import families

    known = [m.name for m in pkgutil.iter_modules(families.__path__)]
    if ALIASES.get(name, name) not in known:
        known += ALIASES
        raise UnsupportedError(f"family: model_type is {name!r}, which is not supported; {nearest(name, known)}")
    return importlib.import_module(f"lvlm_edge.exporter.families.{ALIASES.get(name, name)}")


def load(folder: Path) -> ModelSpec:
    """The spec of a checkpoint folder; only `config.json` needs to be there.

    Raises:
        CheckpointError: no readable `config.json`, or one without `model_type`.
        UnsupportedError: a family, a feature or a way of quantising that this version does not know.
    """
    from lvlm_edge.exporter.checkpoints import integers  # which imports this module

    config = read_json(folder / "config.json")
    name = config.get("model_type")
    if not isinstance(name, str):
        raise CheckpointError(f"{folder / 'config.json'}: has no model_type; give a Hugging Face checkpoint folder")
    for key, value in config.items():
        if key.endswith("_config") and not isinstance(value, dict | None):
            raise CheckpointError(
                f"{folder / 'config.json'}: {key} is {type(value).__name__}, expected a JSON object; restore the file"
            )
    if name == "llava" and "mm_vision_tower" in config and "text_config" not in config:
        name = "llava_llama"  # LLaVA-1.5's first releases had the name that the hub layout has now
    spec = family(name).read_spec(config, folder)
    assert isinstance(spec, ModelSpec)
    _check_sizes(spec, folder / "config.json")
    return replace(spec, prequantised=integers.read(config, folder / "config.json"))


_KINDS = {int: "whole number", float: "number", str: "name"}


def _check_sizes(spec: ModelSpec, path: Path) -> None:
    """Raise CheckpointError unless fields are of their kind, sizes above 0, and heads share out what they divide."""
    v, d = spec.vision, spec.decoder
    for name, value, kind in (
        ("image_token_index", spec.image_token_id, int),
        ("vision_config's layer_norm_eps", v.eps, float),
        ("text_config's rms_norm_eps", d.eps, float),
        ("vision_config's hidden_act", v.mlp_act, str),
        ("text_config's hidden_act", d.mlp_act, str),
        ("projector_hidden_act", spec.projector_act if not spec.settings else spec.projector_act or "", str),
        ("rope_parameters' rope_theta", d.rope.get("rope_parameters", {}).get("rope_theta", 1.0), float),
    ):
        if type(value) not in (kind, int) or (kind is str and type(value) is int):
            raise CheckpointError(f"{path}: {name} is {value!r}, expected a {_KINDS[kind]}; correct it")
    for part, numbers in (
        ("vision_config", ("layers", "hidden", "heads", "ffn", "image_size", "patch_size", "channels")),
        ("text_config", ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_positions")),
    ):
        for name in numbers:
            value = getattr(v if part == "vision_config" else d, name)
            if type(value) is not int or value < 1:
                raise CheckpointError(
                    f"{path}: {part} has {name} {value!r}, expected a whole number above 0; correct it"
                )
    for name, whole, by in (
        ("vision hidden size by heads", v.hidden, v.heads),
        ("heads by key-value heads", d.heads, d.kv_heads),
        ("head size by 2", d.head_dim, 2),
    ):
        if whole % by:
            raise CheckpointError(f"{path}: cannot share out {name}, {whole} by {by}; correct it")
    if spec.visual_tokens < 1:
        raise CheckpointError(
            f"{path}: patches of {v.patch_size} do not fit into pictures of {v.image_size}; correct it"
        )
    if spec.image_token_id < 0 and spec.image_token_id != PLACEHOLDER_ID:
        raise CheckpointError(f"{path}: image_token_index is {spec.image_token_id}, expected a token id; correct it")

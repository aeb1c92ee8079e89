"""CLIP and SigLIP vision encoders from their part of a config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.checkpoints.spec import check_kind, check_shares, check_sizes

ENCODERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}

# What a field that config.json leaves out means: the defaults of transformers' config classes (tested against them).
_ENCODER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "image_size": 224, "num_channels": 3}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {**_ENCODER, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    "siglip_vision_model": {**_ENCODER, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """A CLIP or SigLIP vision encoder.

    Attributes:
        kind: `clip` (class token, LayerNorm before the layers) or `siglip`.
        layers: layers of the checkpoint; a graph holds only those below the highest feature layer.
        feature_layers: hidden states handed to the projector, as numbers of layers run, concatenated.
        drop_first: the first token of each hidden state is removed (select strategy `default`).
        mlp_act: activation name as in the config (`quick_gelu`, `gelu`, `gelu_pytorch_tanh`).
        post_norm: a LayerNorm comes behind the layers.
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
    post_norm: bool = False

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


def read(
    config: dict[str, Any],
    wanted: Any,
    *,
    drop_first: bool,
    name: str = "vision_feature_layer",
    post_norm: bool = False,
) -> EncoderSpec:
    """The vision encoder from its completed config.

    Args:
        wanted: hidden states for the projector, a number or a list, counted from the end where negative.
        drop_first, post_norm: see `EncoderSpec`.
        name: of the field that `wanted` is from, for errors.

    Raises:
        CheckpointError: layers that the encoder does not have.
    """
    count = config["num_hidden_layers"]
    layers = tuple(wanted) if isinstance(wanted, list) else (wanted,)
    if not all(type(layer) is int for layer in (*layers, count)):
        raise CheckpointError(f"config.json: {name} is {wanted!r} of {count!r} layers, expected numbers; correct it")
    if not layers or any(not -count - 1 <= layer <= count for layer in layers):
        raise CheckpointError(f"config.json: {name} is {wanted}, but the encoder has {count} layers; correct it")
    return EncoderSpec(
        kind=ENCODERS[config["model_type"]],
        layers=count,
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        ffn=config["intermediate_size"],
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        channels=config["num_channels"],
        eps=config["layer_norm_eps"],
        mlp_act=config["hidden_act"],
        feature_layers=tuple(layer % (count + 1) for layer in layers),
        drop_first=drop_first,
        post_norm=post_norm,
    )


def check(v: EncoderSpec, path: Path) -> None:
    """Raise CheckpointError unless fields are of their kind, sizes above 0, and patches fit into pictures."""
    check_kind(path, "vision_config's layer_norm_eps", v.eps, float)
    check_kind(path, "vision_config's hidden_act", v.mlp_act, str)
    names = ("layers", "hidden", "heads", "ffn", "image_size", "patch_size", "channels")
    check_sizes(path, "vision_config", {name: getattr(v, name) for name in names})
    check_shares(path, "vision hidden size by heads", v.hidden, v.heads)
    if v.tokens < 1:
        raise CheckpointError(
            f"{path}: patches of {v.patch_size} do not fit into pictures of {v.image_size}; correct it"
        )

"""Qwen2-VL (`model_type: qwen2_vl`): full attention over any rectangle, LayerNorm, a plain MLP, a Qwen2 decoder."""

from __future__ import annotations

from typing import Any

from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.families import _qwen
from lvlm_edge.exporter.families._qwen import VisionSpec
from lvlm_edge.exporter.planning import Family, Plan

# What a field that config.json leaves out means: the defaults of transformers' config classes (tested against them).
DECODER: dict[str, Any] = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": None, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "mrope_section": [16, 24, 24], "hidden_act": "silu",
    "tie_word_embeddings": False, "sliding_window": 4096, "max_window_layers": 80,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 3584, "patch_size": 14,
    "hidden_act": "quick_gelu",
}  # fmt: skip
IMAGE_TOKEN = 151655


def read(of: Checkpoint) -> ModelSpec[VisionSpec]:
    """The spec from a flat or nested config.json.

    Raises:
        UnsupportedError: windows, another rotary embedding, or another merging of patches.
        CheckpointError: fields that are not valid or contradict each other.
    """
    path, seen = of.folder / "config.json", {**ENCODER, **_qwen.parts_of(of)[1]}
    _qwen.check_merge(seen, "qwen2_vl")
    decoder = _qwen.decoder(of, "qwen2_vl", "qwen2", DECODER)
    try:
        ffn = int(seen["embed_dim"] * seen["mlp_ratio"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: vision_config has embed_dim or mlp_ratio of the wrong kind ({error})"
        ) from error
    vision = VisionSpec(
        layers=seen["depth"],
        hidden=seen["embed_dim"],
        heads=seen["num_heads"],
        ffn=ffn,
        patch=seen["patch_size"],
        mlp_act=seen["hidden_act"],
    )
    _qwen.check(vision, path, seen["hidden_size"], decoder.hidden)
    token = _qwen.image_token(of, IMAGE_TOKEN)
    return ModelSpec(family="qwen2_vl", vision=vision, decoder=decoder, image_token_id=token)


def extend(parts: Any, plan: Plan) -> None:
    """Give the parts the encoder and the merger."""
    from lvlm_edge.exporter.families import _qwen_modules as modules

    v, ops = plan.spec.vision, plan.vision_lowering
    parts.vision = modules.Encoder(v, ops, modules.Kind(norm=modules.LayerNorm, mlp=modules.Mlp))
    parts.projector = modules.Projector(v, plan.spec.decoder.hidden, ops, modules.LayerNorm)


def chat_template(of: Checkpoint) -> str:
    """The published conversation format, with a default system message."""
    return _qwen.chat_template(system=True)


FAMILY = Family(
    name="qwen2_vl",
    vision=VisionSpec,
    read=read,
    pictures=_qwen.pictures,
    work=_qwen.work,
    weights=_qwen.weights,
    rename=_qwen.rename,
    unused=_qwen.unused,
    extend=extend,
    graphs=_qwen.graphs,
    chat_template=chat_template,
    axes=3,
    sized=True,
)

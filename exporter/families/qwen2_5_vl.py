"""Qwen2.5-VL (`model_type: qwen2_5_vl`): attention in windows but for a few layers, RMSNorm, a gated MLP."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError
from lvlm_edge.exporter.checkpoints.spec import ModelSpec, check_sizes
from lvlm_edge.exporter.families import _qwen
from lvlm_edge.exporter.families._qwen import Windows
from lvlm_edge.exporter.planning import Family, Plan, Work
from lvlm_edge.runtime.pictures.layout import Picture

# What a field that config.json leaves out means: the defaults of transformers' config classes (tested against them).
DECODER: dict[str, Any] = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": None, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "mrope_section": [16, 24, 24], "hidden_act": "silu",
    "tie_word_embeddings": False, "sliding_window": 4096, "max_window_layers": 80,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "depth": 32, "hidden_size": 3584, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584,
    "patch_size": 14, "hidden_act": "silu", "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
IMAGE_TOKEN = 151655


@dataclass(frozen=True, kw_only=True)
class VisionSpec(_qwen.VisionSpec):
    """The encoder.

    Attributes:
        window: side of a window in visual tokens.
        full: layers whose patches see all others.
    """

    window: int
    full: tuple[int, ...]


def read(of: Checkpoint) -> ModelSpec[VisionSpec]:
    """The spec from a flat or nested config.json.

    Raises:
        UnsupportedError: windows in the decoder, another rotary embedding, or another merging of patches.
        CheckpointError: fields that are not valid or contradict each other.
    """
    path, seen = of.folder / "config.json", {**ENCODER, **_qwen.parts_of(of)[1]}
    _qwen.check_merge(seen, "qwen2_5_vl")
    decoder = _qwen.decoder(of, "qwen2_5_vl", "qwen2", DECODER)
    check_sizes(path, "vision_config", {name: seen[name] for name in ("window_size", "patch_size")})
    full = seen["fullatt_block_indexes"]
    if not isinstance(full, list | tuple) or any(type(i) is not int or i < 0 for i in full):
        raise CheckpointError(f"{path}: fullatt_block_indexes is {full!r}, expected numbers of layers; correct it")
    vision = VisionSpec(
        layers=seen["depth"],
        hidden=seen["hidden_size"],
        heads=seen["num_heads"],
        ffn=seen["intermediate_size"],
        patch=seen["patch_size"],
        mlp_act=seen["hidden_act"],
        window=seen["window_size"] // seen["patch_size"] // _qwen.MERGE,
        full=tuple(full),
    )
    _qwen.check(vision, path, seen["out_hidden_size"], decoder.hidden)
    check_sizes(path, "vision_config", {"window": vision.window})
    token = _qwen.image_token(of, IMAGE_TOKEN)
    return ModelSpec(family="qwen2_5_vl", vision=vision, decoder=decoder, image_token_id=token)


def windows(grid: tuple[int, int], *, side: int) -> Windows:
    """Windows that tile a grid of visual tokens from the top left, cut at its right and bottom edge.

    Those of one size follow each other: inner ones, right edge, bottom edge, corner. The order of windows is free,
    since patches attend inside their own, and the order is undone after the encoder.

    Args:
        grid: (rows, columns) of visual tokens.
        side: of a window, in visual tokens.
    """
    by_size: dict[tuple[int, int], list[list[int]]] = {}
    for top in range(0, grid[0], side):
        for left in range(0, grid[1], side):
            rows, columns = range(top, min(top + side, grid[0])), range(left, min(left + side, grid[1]))
            cells = [row * grid[1] + column for row in rows for column in columns]
            by_size.setdefault((len(rows), len(columns)), []).append(cells)
    order = tuple(cell for same in by_size.values() for window in same for cell in window)
    return Windows(order, tuple((len(same), len(same[0])) for same in by_size.values()))


def work(spec: ModelSpec[VisionSpec], picture: Picture) -> tuple[Work, Work]:
    """Products of the encoder, with the attention rectangles of its windows, and of the merger."""
    tiled = windows(_qwen.grid_of(picture), side=spec.vision.window)
    full = sum(i in spec.vision.full for i in range(spec.vision.layers))
    return _qwen.work(spec, picture, gated=True, windows=tiled, full=full)


def extend(parts: Any, plan: Plan) -> None:
    """Give the parts the encoder and the merger."""
    from lvlm_edge.exporter.families import _qwen_modules as modules

    v, ops = plan.spec.vision, plan.vision_lowering
    kind = modules.Kind(
        norm=modules.RMSNorm, mlp=modules.GatedMlp, windows=partial(windows, side=v.window), full=v.full
    )
    parts.vision = modules.Encoder(v, ops, kind)
    parts.projector = modules.Projector(v, plan.spec.decoder.hidden, ops, modules.RMSNorm)


def chat_template(of: Checkpoint) -> str:
    """The published conversation format, with a default system message."""
    return _qwen.chat_template(system=True)


FAMILY = Family(
    name="qwen2_5_vl",
    vision=VisionSpec,
    read=read,
    pictures=_qwen.pictures,
    work=work,
    weights=_qwen.weights,
    rename=_qwen.rename,
    unused=_qwen.unused,
    extend=extend,
    graphs=_qwen.graphs,
    chat_template=chat_template,
    axes=3,
    sized=True,
)

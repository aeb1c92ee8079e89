"""Qwen3-VL, dense (`model_type: qwen3_vl`): a learnt table of positions beside the rotary ones, and DeepStack.

Features of a few encoder blocks are merged by mergers of their own and added to the visual rows after the first decoder
layers (arXiv:2511.21631).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError, Derived, Source
from lvlm_edge.exporter.checkpoints.spec import ModelSpec, check_sizes
from lvlm_edge.exporter.families import _qwen
from lvlm_edge.exporter.planning import Family, Plan, Work
from lvlm_edge.runtime.pictures.layout import Picture

if TYPE_CHECKING:
    from torch import Tensor

# What a field that config.json leaves out means: the defaults of transformers' config classes (tested against them).
DECODER: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128000, "rope_theta": 5e5, "mrope_section": [24, 20, 20], "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "sliding_window": None,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "out_hidden_size": 3584,
    "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip
IMAGE_TOKEN = 151655


@dataclass(frozen=True, kw_only=True)
class VisionSpec(_qwen.VisionSpec):
    """The encoder.

    Attributes:
        table: side of the square table of positions.
        taps: blocks whose outputs are injected after decoder layers 0, 1, ....
    """

    table: int
    taps: tuple[int, ...]


def read(of: Checkpoint) -> ModelSpec[VisionSpec]:
    """The spec from a nested or flat config.json.

    Raises:
        UnsupportedError: windows, another rotary embedding, or another merging of patches.
        CheckpointError: fields that are not valid or contradict each other.
    """
    path, seen = of.folder / "config.json", {**ENCODER, **_qwen.parts_of(of)[1]}
    _qwen.check_merge(seen, "qwen3_vl")
    decoder = _qwen.decoder(of, "qwen3_vl", "qwen3", DECODER)
    check_sizes(path, "vision_config", {"num_position_embeddings": seen["num_position_embeddings"]})
    side, taps = math.isqrt(seen["num_position_embeddings"]), seen["deepstack_visual_indexes"]
    if side**2 != seen["num_position_embeddings"]:
        raise CheckpointError(
            f"{path}: num_position_embeddings is {seen['num_position_embeddings']}, expected a square; correct it"
        )
    if not isinstance(taps, list | tuple) or any(type(i) is not int or not 0 <= i < seen["depth"] for i in taps):
        raise CheckpointError(f"{path}: deepstack_visual_indexes is {taps!r}, expected numbers of layers; correct it")
    if list(taps) != sorted(set(taps)) or len(taps) > decoder.layers:
        raise CheckpointError(f"{path}: deepstack_visual_indexes is {taps!r}, expected them ascending; correct it")
    vision = VisionSpec(
        layers=seen["depth"],
        hidden=seen["hidden_size"],
        heads=seen["num_heads"],
        ffn=seen["intermediate_size"],
        patch=seen["patch_size"],
        mlp_act=seen["hidden_act"],
        table=side,
        taps=tuple(taps),
    )
    _qwen.check(vision, path, seen["out_hidden_size"], decoder.hidden)
    token = _qwen.image_token(of, IMAGE_TOKEN)
    return ModelSpec(family="qwen3_vl", vision=vision, decoder=decoder, image_token_id=token)


def work(spec: ModelSpec[VisionSpec], picture: Picture) -> tuple[Work, Work]:
    """Products of the encoder and of all mergers."""
    return _qwen.work(spec, picture, mergers=len(spec.vision.taps), table=spec.vision.table**2)


def weights(of: Checkpoint, spec: ModelSpec[VisionSpec], pictures: tuple[Picture, ...]) -> Mapping[str, Source]:
    """Tensors by their names in `Parts`; the table of positions interpolated to each grid of patches."""
    found = _qwen.weights(of, spec, pictures)
    table = found.pop("vision.table.weight", None)
    if table is None:
        return found
    side, width = spec.vision.table, spec.vision.hidden
    if table.shape != (side**2, width):
        raise CheckpointError(
            f"{of.folder}: {table.key} is {list(table.shape)}, config.json says {[side**2, width]}; correct config.json"
        )
    for rows, columns in dict.fromkeys(map(_qwen.grid_of, pictures)):
        shape = (rows * columns * _qwen.MERGE**2, width)
        make = partial(interpolated, table, side, (rows, columns))
        found[f"vision.positions.{rows}x{columns}"] = Derived(table.file, table.key, shape, "float32", make)
    return found


def interpolated(table: Source, side: int, grid: tuple[int, int]) -> Tensor:
    """The table [side^2, E] at the patches of a grid of visual tokens, bilinear with aligned corners, in merge order.

    Returns:
        [patches, E], float32.
    """
    import torch

    whole, places = table.read().float(), torch.tensor(_qwen.patches(grid))
    near, share = [], []
    for axis in (0, 1):
        count = _qwen.MERGE * grid[axis]
        at = torch.linspace(0, side - 1, count)[places[:, axis]] if count > 1 else torch.zeros(len(places))
        low = at.long().clamp(max=side - 1)
        near.append((low, (low + 1).clamp(max=side - 1)))
        share.append((1 - (at - low), at - low))
    corners = [
        whole[near[0][i] * side + near[1][j]] * (share[0][i] * share[1][j])[:, None] for i in (0, 1) for j in (0, 1)
    ]
    return torch.stack(corners).sum(0)


def extend(parts: Any, plan: Plan) -> None:
    """Give the parts the encoder and its mergers."""
    from lvlm_edge.exporter.families import _qwen_modules as modules

    v, ops = plan.spec.vision, plan.vision_lowering
    grids = tuple(dict.fromkeys(map(_qwen.grid_of, plan.pictures)))
    kind = modules.Kind(norm=modules.LayerNorm, mlp=modules.Mlp, bias=True, taps=v.taps, grids=grids)
    parts.vision = modules.Encoder(v, ops, kind)
    hidden, taps = plan.spec.decoder.hidden, len(v.taps)
    parts.projector = modules.Projector(v, hidden, ops, modules.LayerNorm, injected=taps)


def injected(spec: ModelSpec[VisionSpec]) -> tuple[str, ...]:
    """Features of the encoder's blocks, merged."""
    return tuple(f"deepstack.{i}" for i in range(len(spec.vision.taps)))


def chat_template(of: Checkpoint) -> str:
    """The published conversation format."""
    return _qwen.chat_template(system=False)


FAMILY = Family(
    name="qwen3_vl",
    vision=VisionSpec,
    read=read,
    pictures=_qwen.pictures,
    work=work,
    weights=weights,
    rename=_qwen.rename,
    unused=_qwen.unused,
    extend=extend,
    graphs=_qwen.graphs,
    chat_template=chat_template,
    injected=injected,
    axes=3,
    sized=True,
)

"""compressed-tensors' layouts: `pack-quantized` has int32 words along the input channels, the others a plain int8.

Source: `pack_to_int32` and `NaiveQuantizationCompressor` of compressed-tensors 0.20.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import regex  # whose matches can be given a time limit

from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.checkpoints.integers.config import entries, expect, flag, group_size, names
from lvlm_edge.exporter.checkpoints.integers.packed import (
    FLOATS,
    INDICES,
    Format,
    Layout,
    Packed,
    Pieces,
    Wanted,
    group_count,
    signed,
    unpacked,
)
from lvlm_edge.exporter.checkpoints.spec import Prequantised
from lvlm_edge.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

SECONDS = 2.0  # that a pattern may take on a name
LAYOUTS = {"pack-quantized": "packed", "int-quantized": "plain", "naive-quantized": "plain"}  # by `format`
# Modules as checkpoints name them, to ask a config's patterns about the parts that are not the decoder's layers.
ASKED = {
    "head": ("lm_head", "language_model.lm_head"),
    "vision": tuple(
        f"{prefix}layers.0.self_attn.q_proj"
        for start in ("", "model.")
        for prefix in (
            f"{start}vision_tower.encoder.",
            f"{start}vision_tower.vision_model.encoder.",
            f"{start}vision_tower.vision_tower.vision_model.encoder.",
            f"{start}vision_tower._vision_tower.vision_model.encoder.",
        )
    ),
}


def read(config: Mapping[str, Any], where: str) -> Prequantised:
    expect(where, "quantization_status", config.get("quantization_status") or "compressed", ("compressed",))
    expect(where, "kv_cache_scheme", config.get("kv_cache_scheme"), (None,))
    sparsity = entries(where, config, "sparsity_config").get("format") or "dense"
    expect(where, "sparsity_config's format", sparsity, ("dense",))
    expect(where, "transform_config", config.get("transform_config") or None, (None,))
    groups = list(entries(where, config, "config_groups").values())
    if not groups or not all(isinstance(g, dict) and isinstance(g.get("weights"), dict) for g in groups):
        raise UnsupportedError(
            f"{where}: config_groups is {config.get('config_groups')!r}, expected an object of groups with weights; "
            "export the unquantised checkpoint"
        )
    schemes = {_scheme(group, config.get("format"), where) for group in groups}
    sizes = {size for _, _, size, _ in schemes}
    if len({(layout, bits, symmetric) for layout, bits, _, symmetric in schemes}) > 1 or (
        len(sizes) > 1 and None in sizes
    ):
        raise UnsupportedError(
            f"{where}: its {len(groups)} config_groups quantise weights in different ways, expected one, or several "
            "sizes of groups; export the unquantised checkpoint"
        )
    layout, bits, _, symmetric = schemes.pop()
    group = max(sizes, key=lambda size: size or 0)
    smaller = tuple(size for size in sizes if size and size != group)
    targets, ignored = [t for each in groups for t in names(where, each, "targets")], names(where, config, "ignore")
    parts = tuple(part for part, names in ASKED.items() if _targeted(names, targets, ignored))
    return Prequantised(
        layout=layout, bits=bits, group=group, smaller=smaller, symmetric=symmetric, parts=("decoder", *parts)
    )


def _scheme(group: Mapping[str, Any], outer: Any, where: str) -> tuple[str, int, int | None, bool]:
    """Layout, bits, group and symmetry of a group's weights."""
    weights = group["weights"]
    kind = group.get("format") or outer
    expect(where, "format", kind, tuple(LAYOUTS))
    expect(where, "type of weights", weights.get("type", "int"), ("int",))
    expect(where, "num_bits", weights.get("num_bits"), (4, 8))
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    expect(where, "strategy", strategy, ("group", "channel"))
    size = group_size(where, weights.get("group_size")) if strategy == "group" else None
    return LAYOUTS[kind], int(weights["num_bits"]), size, flag(where, weights, "symmetric", True)


def _targeted(names: Iterable[str], targets: Iterable[str], ignored: Iterable[str]) -> bool:
    """Whether modules of these names, which are different checkpoints' of one module, are targets and not ignored."""
    names = list(names)
    wanted = any(target == "Linear" or _named(target, names) for target in targets)
    return wanted and not any(_named(entry, names) for entry in ignored)


def _named(entry: str, names: Iterable[str]) -> bool:
    """Whether an entry of compressed-tensors, a name, a module above it or a `re:` pattern, means one of the names."""
    if entry.startswith("re:"):
        return any(_matches(entry[3:], name) for name in names)
    return any(name == entry or name.startswith(f"{entry}.") for name in names)


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern, which came with a download, matches the beginning of a name.

    Raises:
        CheckpointError: it does not come to an end.
    """
    try:
        return regex.match(pattern, name, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise CheckpointError(
            f"config.json: quantization_config: the pattern {pattern!r:.60} takes longer than {SECONDS:g} s on "
            f"{name!r}, expected a name or a simple pattern; correct it"
        ) from error


def packed_size(module: str, pieces: Pieces, how: Prequantised) -> tuple[int, int]:
    said = pieces["weight_shape"]
    size = checkpoint.read(said).flatten().tolist() if said.shape == (2,) else []
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise CheckpointError(f"{said.file}: {module}.weight_shape is no shape of a matrix; download it again")
    return size[0], size[1]


def packed_wanted(outputs: int, inputs: int, how: Prequantised) -> tuple[Wanted, ...]:
    groups, each = group_count(inputs, how), 32 // how.bits
    return (
        *_scales_wanted(outputs, inputs, how),
        Wanted("weight_packed", ((outputs, -(-inputs // each)),), ("int32",)),
        Wanted("weight_zero_point", ((-(-outputs // each), groups),), ("int32",)),
    )


def packed_integers(matrix: Packed) -> Tensor:
    columns = int(matrix.piece("weight_shape")[1])
    return signed(unpacked(matrix.piece("weight_packed"), matrix.how.bits)[:, :columns], matrix.how.bits)


def packed_zero_points(matrix: Packed, stored: Tensor) -> Tensor:
    outputs = matrix.pieces["weight_packed"].shape[0]
    return signed(unpacked(stored.t(), matrix.how.bits)[:, :outputs], matrix.how.bits).t()


def plain_size(module: str, pieces: Pieces, how: Prequantised) -> tuple[int, int]:
    rows, columns = pieces["weight"].shape
    return rows, columns


def plain_wanted(outputs: int, inputs: int, how: Prequantised) -> tuple[Wanted, ...]:
    return (
        *_scales_wanted(outputs, inputs, how),
        Wanted("weight", ((outputs, inputs),), ("int8",)),
        Wanted("weight_zero_point", _by_channel(outputs, inputs, how), ("int8",)),
    )


def plain_integers(matrix: Packed) -> Tensor:
    return matrix.piece("weight")


def plain_zero_points(matrix: Packed, stored: Tensor) -> Tensor:
    return stored.reshape(len(stored), -1)


def scales(matrix: Packed) -> Tensor:
    found = matrix.piece("weight_scale").float()
    return found.reshape(len(found), -1)


def _scales_wanted(outputs: int, inputs: int, how: Prequantised) -> tuple[Wanted, ...]:
    return (
        Wanted("weight_scale", _by_channel(outputs, inputs, how), FLOATS),
        Wanted("weight_g_idx", ((inputs,),), INDICES),
    )


def _by_channel(outputs: int, inputs: int, how: Prequantised) -> tuple[tuple[int, ...], ...]:
    """Shapes of values of every output channel and group; one group needs no axis."""
    groups = group_count(inputs, how)
    return ((outputs, groups), *(((outputs,),) if groups == 1 else ()))


FORMAT = Format(
    read=read,
    layouts={
        "packed": Layout(
            ends=("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
            needed=("weight_scale", "weight_shape"),
            zeros="weight_zero_point",
            size=packed_size,
            wanted=packed_wanted,
            integers=packed_integers,
            scales=scales,
            zero_points=packed_zero_points,
        ),
        "plain": Layout(
            ends=("weight", "weight_scale", "weight_zero_point", "weight_g_idx"),
            needed=("weight_scale",),
            zeros="weight_zero_point",
            dtype="int8",
            size=plain_size,
            wanted=plain_wanted,
            integers=plain_integers,
            scales=scales,
            zero_points=plain_zero_points,
        ),
    },
)

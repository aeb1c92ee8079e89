"""Checkpoints that are quantised already: the layouts of AWQ, GPTQ and compressed-tensors, and nobody else's.

Their tensors stand in an index as one float matrix `X.weight` [out, in] each, so that families know of none of this.
Reading it dequantises in float32; `integers`, `scales` and `zero_points` are the checkpoint's own, for graphs that keep
them. Inside, integers are signed: zero is the middle of their range, and a zero point is its distance from there.

Activations that a checkpoint means to be rounded too (W8A8) are not: the weights are what it stores, and products with
activations that are not rounded are what rounding them approximates.

Sources: AutoAWQ's `WQLinear_GEMM`, GPTQModel's `convert_gptq_v1_to_v2_format_module`, compressed-tensors 0.20.0's
`pack_to_int32` and `NaiveQuantizationCompressor`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError, Stored
from lvlm_edge.exporter.checkpoints.spec import Prequantised
from lvlm_edge.runtime.errors import UnsupportedError, nearest

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = (128, 64, 32)  # input channels that may share a scale in a graph, of INT4
METHODS = ("awq", "gptq", "compressed-tensors")
FORMATS = {"pack-quantized": "packed", "int-quantized": "plain", "naive-quantized": "plain"}
ADVICE = "choose --weights int8 or float, and for other parts --vision-weights and --head-weights likewise"
# Tensors of a matrix by their ends. The first says that there is one; those of `NEEDED` must be there.
ENDS = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "packed": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    "plain": ("weight", "weight_scale", "weight_zero_point", "weight_g_idx"),
}
NEEDED = {
    "awq": ("scales",),
    "gptq": ("scales",),
    "packed": ("weight_scale", "weight_shape"),
    "plain": ("weight_scale",),
}
ZEROS = {"awq": "qzeros", "gptq": "qzeros", "packed": "weight_zero_point", "plain": "weight_zero_point"}
ACTIVATIONS = re.compile(r"\.(input|output)_(scale|zero_point|global_scale|g_idx)$")  # of activations to be rounded
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the channels of an int32 stand in it
INTEGERS = {"I8": "int8", "I32": "int32", "I64": "int64"}
FLOATS = ("float64", "float32", "float16", "bfloat16")
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


@dataclass(frozen=True)
class Packed(Stored):
    """A matrix [out, in] that is stored as integers; shape and dtype are those of what reading it gives.

    Attributes:
        how: what config.json says of it.
        pieces: its tensors by the ends of their names.
    """

    how: Prequantised = field(kw_only=True)
    pieces: Mapping[str, Stored] = field(kw_only=True, hash=False)

    @property
    def layout(self) -> str:
        return _layout(self.how)

    def read(self) -> Tensor:
        """What the integers stand for, float32 [out, in]."""
        return tensor(self)


# config.json


def read(config: Mapping[str, Any], path: Path) -> Prequantised | None:
    """What a config.json says of integers in its checkpoint; None where it says nothing.

    Args:
        path: of the file, for messages.

    Raises:
        UnsupportedError: a method, format or setting that is not read here.
        CheckpointError: a field of the wrong kind.
    """
    outer, inner = ((part or {}).get("quantization_config") for part in (config, config.get("text_config")))
    found = outer or inner
    if not found:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: quantization_config is {found!r}, expected a JSON object; restore the file")
    where = f"{path}: quantization_config"
    method = found.get("quant_method")
    if method not in METHODS:
        raise UnsupportedError(f"{where}: quant_method is {method!r}; {nearest(str(method), METHODS)}")
    how = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}[method](found, where)
    return how if outer else replace(how, parts=tuple(part for part in how.parts if part != "vision"))


def _awq(config: Mapping[str, Any], where: str) -> Prequantised:
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    _expect(where, "version", version, ("gemm",))
    _expect(where, "backend", str(config.get("backend") or "autoawq").lower(), ("autoawq", "auto"))
    bits = config.get("bits", config.get("w_bit", 4))
    _expect(where, "bits", bits, (4,))
    group = _group(where, config.get("group_size", config.get("q_group_size", 128)))
    symmetric = not _flag(where, config, "zero_point", True)
    return Prequantised(layout="awq", bits=int(bits), group=group, symmetric=symmetric, parts=("decoder",))


def _gptq(config: Mapping[str, Any], where: str) -> Prequantised:
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    _expect(where, "checkpoint_format", layout, ("gptq", "gptq_v2"))
    _expect(where, "is_marlin_format", bool(config.get("is_marlin_format")), (False,))
    bits: Any = config.get("bits")
    _expect(where, "bits", bits, (4, 8))
    for pattern, other in _object(where, config, "dynamic").items():
        if not str(pattern).startswith("-:"):  # those are left as they are, which their tensors say too
            raise UnsupportedError(
                f"{where}: dynamic has {other!r} for {pattern!r}, expected the same bits and groups for every matrix; "
                "quantise without it"
            )
    group = _group(where, config.get("group_size", 128))
    parts = ("decoder", "head") if _flag(where, config, "lm_head", False) else ("decoder",)
    symmetric = _flag(where, config, "sym", True)
    return Prequantised(layout=layout, bits=int(bits), group=group, symmetric=symmetric, parts=parts)


def _compressed(config: Mapping[str, Any], where: str) -> Prequantised:
    _expect(where, "quantization_status", config.get("quantization_status") or "compressed", ("compressed",))
    _expect(where, "kv_cache_scheme", config.get("kv_cache_scheme"), (None,))
    sparsity = _object(where, config, "sparsity_config").get("format") or "dense"
    _expect(where, "sparsity_config's format", sparsity, ("dense",))
    _expect(where, "transform_config", config.get("transform_config") or None, (None,))
    groups = list(_object(where, config, "config_groups").values())
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
    targets, ignored = [t for each in groups for t in _names(where, each, "targets")], _names(where, config, "ignore")
    parts = tuple(part for part, names in ASKED.items() if _targeted(names, targets, ignored))
    return Prequantised(
        layout=layout, bits=bits, group=group, smaller=smaller, symmetric=symmetric, parts=("decoder", *parts)
    )


def _scheme(group: Mapping[str, Any], outer: Any, where: str) -> tuple[str, int, int | None, bool]:
    """Layout, bits, group and symmetry of a group's weights."""
    weights = group["weights"]
    kind = group.get("format") or outer
    _expect(where, "format", kind, tuple(FORMATS))
    _expect(where, "type of weights", weights.get("type", "int"), ("int",))
    _expect(where, "num_bits", weights.get("num_bits"), (4, 8))
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    _expect(where, "strategy", strategy, ("group", "channel"))
    size = _group(where, weights.get("group_size")) if strategy == "group" else None
    return FORMATS[kind], int(weights["num_bits"]), size, _flag(where, weights, "symmetric", True)


def _expect(where: str, name: str, value: Any, known: Sequence[Any]) -> None:
    if isinstance(value, bool) is not isinstance(known[0], bool) or value not in known:
        wanted = " or ".join(map(str, known))
        raise UnsupportedError(
            f"{where}: {name} is {value!r}, which is not supported; expected {wanted}; export the "
            "unquantised checkpoint"
        )


def _object(where: str, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key} is {value!r}, expected a JSON object; correct it")
    return value


def _names(where: str, config: Mapping[str, Any], key: str) -> list[str]:
    """Names of modules and `re:` patterns of them."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) and _compiles(entry) for entry in value):
        raise CheckpointError(f"{where}: {key} is {value!r}, expected a list of names and re: patterns; correct it")
    return value


def _compiles(entry: str) -> bool:
    try:
        re.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
    except re.error:
        return False
    return True


def _group(where: str, value: Any) -> int | None:
    """Input channels that share a scale; None for -1, which means all of them."""
    if type(value) is not int or (value < 1 and value != -1):
        raise CheckpointError(f"{where}: group_size is {value!r}, expected a whole number above 0, or -1; correct it")
    return None if value == -1 else value


def _flag(where: str, config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} is {value!r}, expected true or false; correct it")
    return value


def _targeted(names: Iterable[str], targets: Iterable[str], ignored: Iterable[str]) -> bool:
    """Whether modules of these names, which are different checkpoints' of one module, are targets and not ignored."""
    names = list(names)
    wanted = any(target == "Linear" or _named(target, names) for target in targets)
    return wanted and not any(_named(entry, names) for entry in ignored)


def _named(entry: str, names: Iterable[str]) -> bool:
    """Whether an entry of compressed-tensors, a name, a module above it or a `re:` pattern, means one of the names."""
    if entry.startswith("re:"):
        return any(re.match(entry[3:], name) for name in names)
    return any(name == entry or name.startswith(f"{entry}.") for name in names)


def block(how: Prequantised, rows: int | None = None) -> int | None:
    """Input channels that share a scale in a graph that keeps the integers; None for INT8, whose channels do.

    Args:
        rows: input channels of a matrix; None for what can be said without them.

    Raises:
        UnsupportedError: graphs cannot hold such integers.
    """
    size = how.group or rows or BLOCKS[0]
    if how.bits == 8 and (how.group is None or how.group == rows):
        return None
    found = next((b for b in BLOCKS if size % b == 0 and (rows is None or rows % b == 0)), None)
    if how.bits == 8 or found is None:
        raise UnsupportedError(
            f"quantization_config: {how.bits}-bit integers with a scale per {size} input channels, which graphs do not "
            f"hold; expected groups of 32, 64 or 128 of 4 bits, or one scale per output channel of 8; {ADVICE}"
        )
    return found


def held(matrix: Packed) -> int | None:
    """Input channels that share a scale in a graph that keeps a matrix's integers; None for INT8.

    Raises:
        UnsupportedError: graphs cannot hold them.
    """
    if not bool((_groups(matrix) == _neighbours(matrix)).all()):
        raise UnsupportedError(
            f"{matrix.file}: the input channels of {matrix.key} are grouped in another order (g_idx, desc_act), which "
            f"graphs do not hold; expected neighbours; {ADVICE}"
        )
    return block(matrix.how, matrix.shape[1])


# tensors


def index(of: Checkpoint) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by its name, with one `Packed` matrix for the tensors it is stored as.

    Raises:
        CheckpointError: no weights, or damaged ones; pieces of a matrix missing or misshapen.
        UnsupportedError: config.json says that they are quantised in a way that is not read here.
    """
    folder, stored = of.folder, dict(of.stored)
    how = read(of.config, folder / "config.json")
    if how is None:
        unsaid = sorted(name for name in stored if name.endswith((".qweight", ".weight_packed")))
        if unsaid:
            raise CheckpointError(
                f"{folder}: is quantised ({unsaid[0]}), but config.json has no quantization_config; restore it there"
            )
        return stored
    layout = _layout(how)
    modules = sorted(_modules(stored, layout))
    if not modules:
        raise CheckpointError(
            f"{folder}: config.json says that it is quantised, but it holds no {ENDS[layout][0]}; correct config.json"
        )
    taken: set[str] = set()
    found: dict[str, Stored] = {}
    for module in modules:
        pieces = {end: stored[f"{module}.{end}"] for end in ENDS[layout] if f"{module}.{end}" in stored}
        taken |= {f"{module}.{end}" for end in pieces}
        found[f"{module}.weight"] = _matrix(module, pieces, how, layout)
    taken |= _empty_biases(modules, stored)
    rest = {name: one for name, one in stored.items() if name not in taken and not ACTIVATIONS.search(name)}
    for name in rest:
        if name.rpartition(".")[2] in ENDS[layout] and name.rpartition(".")[2] != "weight":
            raise CheckpointError(f"{folder}: holds {name} without {ENDS[layout][0]}; download the checkpoint again")
    return rest | found


def _empty_biases(modules: Iterable[str], stored: Mapping[str, Stored]) -> set[str]:
    """Biases that are 0 in every layer: AutoGPTQ wrote them for matrices that have none."""
    found: dict[str, list[str]] = {}
    for module in modules:
        if f"{module}.bias" in stored:
            found.setdefault(module.rpartition(".")[2], []).append(f"{module}.bias")
    return {n for names in found.values() if not any(checkpoint.read(stored[n]).any() for n in names) for n in names}


def _layout(how: Prequantised) -> str:
    """The key of `ENDS`: GPTQ's two versions have the same tensors."""
    return "gptq" if how.layout == "gptq_v2" else how.layout


def _modules(stored: Mapping[str, Stored], layout: str) -> set[str]:
    """Names of modules whose weight is integers."""
    end = f".{ENDS[layout][0]}"
    return {
        name.removesuffix(end)
        for name, one in stored.items()
        if name.endswith(end) and (layout != "plain" or _kind(one) == "int8")
    }


def _matrix(module: str, pieces: dict[str, Stored], how: Prequantised, layout: str) -> Packed:
    """A matrix of its tensors.

    Raises:
        CheckpointError: one is missing, or not of the shape or dtype that the others and config.json make it.
    """
    first = pieces[ENDS[layout][0]]
    lost = [end for end in NEEDED[layout] if end not in pieces]
    lost += [ZEROS[layout]] if not how.symmetric and ZEROS[layout] not in pieces else []
    if lost:
        raise CheckpointError(f"{first.file}: lacks {module}.{lost[0]}; download the checkpoint again")
    outputs, inputs = _size(module, pieces, how, layout)
    how = _of_matrix(how, inputs, pieces)
    for end, shapes, kinds in _wanted(outputs, inputs, how, layout):
        one = pieces.get(end)
        if one is not None and (one.shape not in shapes or _kind(one) not in kinds):
            kind = "floats" if kinds == FLOATS else kinds[0]
            raise CheckpointError(
                f"{one.file}: {module}.{end} is {_kind(one)} {list(one.shape)}, expected {kind} {list(shapes[0])}; "
                "download the checkpoint again, or correct quantization_config"
            )
    key = f"{module}.weight"
    return Packed(first.file, key, (outputs, inputs), "float32", how=how, pieces=pieces)


def _of_matrix(how: Prequantised, inputs: int, pieces: Mapping[str, Stored]) -> Prequantised:
    """What config.json says, with the size of group that a matrix's scales tell of where it names several."""
    if not how.smaller:
        return how
    scales = pieces["weight_scale"].shape
    sizes = [size for size in (how.group, *how.smaller) if size and scales[1:] == (-(-inputs // size),)]
    return replace(how, group=sizes[0] if sizes else how.group, smaller=())


def _size(module: str, pieces: Mapping[str, Stored], how: Prequantised, layout: str) -> tuple[int, int]:
    """Output and input channels.

    Raises:
        CheckpointError: the tensor that says so is none.
    """
    first, each = pieces[ENDS[layout][0]], 32 // how.bits
    if len(first.shape) != 2:
        raise CheckpointError(f"{first.file}: {first.key} is {list(first.shape)}, expected a matrix; download it again")
    if layout == "packed":
        said = pieces["weight_shape"]
        size = checkpoint.read(said).flatten().tolist() if said.shape == (2,) else []
        if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise CheckpointError(f"{said.file}: {module}.weight_shape is no shape of a matrix; download it again")
        return size[0], size[1]
    rows, columns = first.shape
    return {"awq": (columns * each, rows), "gptq": (columns, rows * each), "plain": (rows, columns)}[layout]


def _wanted(
    outputs: int, inputs: int, how: Prequantised, layout: str
) -> list[tuple[str, tuple[tuple[int, ...], ...], tuple[str, ...]]]:
    """Ends of names, the shapes that a tensor may have there, and its dtypes."""
    groups = 1 if how.group is None else -(-inputs // how.group)
    each = 32 // how.bits
    high, wide = -(-outputs // each), -(-inputs // each)
    indices = ("int32", "int64")
    if layout in ("awq", "gptq"):
        integers = (inputs, high) if layout == "awq" else (wide, outputs)
        return [
            ("qweight", (integers,), ("int32",)),
            ("qzeros", ((groups, high),), ("int32",)),
            ("scales", ((groups, outputs),), FLOATS),
            ("g_idx", ((inputs,),), indices),
        ]
    flat = ((outputs, groups), *(((outputs,),) if groups == 1 else ()))
    found = [("weight_scale", flat, FLOATS), ("weight_g_idx", ((inputs,),), indices)]
    if layout == "plain":
        return [*found, ("weight", ((outputs, inputs),), ("int8",)), ("weight_zero_point", flat, ("int8",))]
    zeros = [("weight_zero_point", ((high, groups),), ("int32",))]
    return [*found, ("weight_packed", ((outputs, wide),), ("int32",)), *zeros]


def _kind(stored: Stored) -> str:
    return INTEGERS.get(stored.dtype, stored.dtype)


# content


def tensor(stored: Packed) -> Tensor:
    """A matrix of integers as what they stand for, float32 [out, in]."""
    values, zeros, of = integers(stored).float(), zero_points(stored), _groups(stored)
    if zeros is not None:
        values -= zeros.float()[:, of]
    return values * scales(stored)[:, of]


def integers(matrix: Packed) -> Tensor:
    """The checkpoint's integers around 0, int8 [out, in]."""
    import torch

    first = checkpoint.read(matrix.pieces[ENDS[matrix.layout][0]])
    bits = matrix.how.bits
    if matrix.layout == "plain":
        values = first
    elif matrix.layout == "awq":
        values = _signed(_interleaved(_unpacked(first, bits)), bits).t()
    elif matrix.layout == "gptq":
        values = _signed(_unpacked(first.t(), bits), bits)
    else:
        columns = int(checkpoint.read(matrix.pieces["weight_shape"])[1])
        values = _signed(_unpacked(first, bits)[:, :columns], bits)
    return _rows(matrix, values).to(torch.int8)


def scales(matrix: Packed) -> Tensor:
    """The checkpoint's scales, float32 [out, groups]."""
    found = checkpoint.read(matrix.pieces["scales" if "scales" in matrix.pieces else "weight_scale"]).float()
    return _rows(matrix, found.t() if matrix.layout in ("awq", "gptq") else found.reshape(len(found), -1))


def zero_points(matrix: Packed) -> Tensor | None:
    """Distances of the zero points from the middle, int16 [out, groups]; None where all are 0."""
    import torch

    piece = matrix.pieces.get(ZEROS[matrix.layout])
    if piece is None:
        return None
    stored, bits = checkpoint.read(piece), matrix.how.bits
    if matrix.layout == "plain":
        found = stored.reshape(len(stored), -1)
    elif matrix.layout == "packed":
        outputs = matrix.pieces["weight_packed"].shape[0]
        found = _signed(_unpacked(stored.t(), bits)[:, :outputs], bits).t()
    elif matrix.layout == "awq":
        found = _signed(_interleaved(_unpacked(stored, bits)), bits).t()
    else:
        # 1 was taken from each, in whole words: what is borrowed of the next one comes back with it.
        ones = {4: 0x11111111, 8: 0x01010101}[bits] if matrix.how.layout == "gptq" else 0
        found = _signed(_unpacked(stored + ones, bits), bits).t()
    found = _rows(matrix, found).to(torch.int16)
    return found if bool(found.any()) else None


def _groups(matrix: Packed) -> Tensor:
    """The group of every input channel, int64 [in].

    Raises:
        CheckpointError: one that does not exist.
    """
    piece = matrix.pieces.get("g_idx", matrix.pieces.get("weight_g_idx"))
    plain = _neighbours(matrix)
    if piece is None:
        return plain
    found = checkpoint.read(piece).long()
    if bool((found == -1).all()):  # compressed-tensors' word for none
        return plain
    if int(found.min()) < 0 or int(found.max()) > int(plain[-1]):
        raise CheckpointError(
            f"{piece.file}: {piece.key} names group {int(found.max())} of {int(plain[-1]) + 1}; download it again"
        )
    return found


def _neighbours(matrix: Packed) -> Tensor:
    """The group of every input channel where those of a group are neighbours, int64 [in]."""
    import torch

    inputs = matrix.shape[1]
    return torch.arange(inputs) // (matrix.how.group or inputs)


def _rows(matrix: Packed, values: Tensor) -> Tensor:
    """Rows of a matrix that was cut out of a taller one."""
    return values[slice(*matrix.rows)] if matrix.rows else values


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The values in int32 [rows, n], lowest bits first, uint8 [rows, n * 32 / bits]."""
    import torch

    values = words.reshape(-1).view(torch.uint8)
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], -1)
    return values.reshape(len(words), -1)


def _interleaved(values: Tensor) -> Tensor:
    """AWQ's channels [rows, out] in their order."""
    return values.reshape(len(values), -1, len(AWQ_ORDER))[:, :, list(AWQ_ORDER)].reshape(len(values), -1)


def _signed(values: Tensor, bits: int) -> Tensor:
    """Values around the middle of their range, int8."""
    import torch

    return (values.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)

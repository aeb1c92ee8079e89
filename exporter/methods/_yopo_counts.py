"""YOPO's settings, counts, FLOPs and caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.planning import (
    CacheGroup,
    Plan,
    PlanError,
    Prompt,
    Stage,
    layer_flops,
)
from lvlm_edge.runtime.errors import UnsupportedError, UsageError, nearest
from lvlm_edge.runtime.pictures.layout import Picture, Run

SEMANTICS = ("released", "dropped")
OFF = "none"  # the window of visual tokens that see all before them, as text does


@dataclass(frozen=True, kw_only=True)
class Config:
    """YOPO's settings. A checkpoint trained for it has them in its config; with others, what is not given is off."""

    semantics: str = field(
        default="released",
        metadata={
            "help": "released (masks as in the released code, full cost) or dropped (leaves the tokens out, saves time)"
        },
    )
    window: str | int | None = field(
        default=None,
        metadata={
            "help": "side of the square of neighbors that a visual token attends to, at least 1; none: all before it",
            "default": "the checkpoint's, else none",
        },
    )
    cutoff: int | None = field(
        default=None,
        metadata={
            "help": "first decoder layer without visual tokens, 1..layers",
            "default": "the checkpoint's, else the number of layers",
        },
    )
    ffn_ratio: float | None = field(
        default=None,
        metadata={
            "help": "FFN channels divided by those that visual tokens use, from 1 to the number of channels",
            "default": "the checkpoint's, else 1",
        },
    )
    # A file as long as it is a setting, then a string per layer: 1 where a head stays for visual tokens.
    head_mask: str | tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "file of the heads that visual tokens use, .npy, bool [layers, heads]",
            "default": "the checkpoint's, else all heads",
        },
    )
    prefix_tokens: int | None = field(
        default=None,
        metadata={
            "help": "text tokens before the image in training, 0 or more; recorded in the manifest and not used",
            "default": "the checkpoint's",
        },
    )


def nominal(spec: ModelSpec[Any], config: Config) -> Config:
    """The settings, where the checkpoint's head mask is missing with the number of heads that its config says.

    Masks are not part of every published checkpoint's folder; for counting, the average is enough.
    """
    own = spec.settings.get("yopo", {})
    if config.head_mask is None or config.head_mask != own.get("head_mask") or Path(str(config.head_mask)).is_file():
        return config
    row = "1" * own["heads_kept"] + "0" * (spec.decoder.heads - own["heads_kept"])
    return replace(config, head_mask=(row,) * spec.decoder.layers)


def resolve(spec: ModelSpec[Any], config: Config) -> Config:
    """The settings with the head mask read.

    Raises:
        PlanError: a setting is missing or out of range.
        UsageError, CheckpointError: the head mask cannot be read, or is not of this model.
    """
    d = spec.decoder
    if config.semantics not in SEMANTICS:
        raise UsageError(f"yopo: semantics is {config.semantics!r}; {nearest(str(config.semantics), SEMANTICS)}")
    if "yopo" not in spec.settings:
        config = _untrained(spec, config)
    window = config.window
    if isinstance(window, str) and window.isdecimal():  # of the command line
        config = replace(config, window=int(window))
    for name, value, least, most in (
        ("window", config.window, 1, math.inf),
        ("cutoff", config.cutoff, 1, d.layers),
        ("ffn_ratio", config.ffn_ratio, 1, d.ffn),
    ):
        flag = "--" + name.replace("_", "-")
        if value is None:
            raise PlanError(f"yopo: the checkpoint's config has no {name}; give {flag}")
        if name == "window" and value == OFF:
            continue
        kinds = int | float if name == "ffn_ratio" else int
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            wanted = f"{least}..{most}" if most < math.inf else f"at least {least}, or {OFF}"
            kind = "a whole number, " if kinds is int else ""
            raise PlanError(f"yopo: {name} is {value!r}, expected {kind}{wanted}; correct it with {flag}")
    mask = config.head_mask
    rows = ("1" * d.heads,) * d.layers if mask is None else _read(mask, spec) if isinstance(mask, str) else mask
    return replace(config, head_mask=rows)


def _untrained(spec: ModelSpec[Any], config: Config) -> Config:
    """The settings for a checkpoint that was not trained for the method: what is not given is off.

    Raises:
        PlanError: nothing is given.
    """
    if (config.window, config.cutoff, config.ffn_ratio, config.head_mask) == (None,) * 4:
        raise PlanError(
            "yopo: the checkpoint was not trained for it, and its config has no settings; give --window, --cutoff, "
            "--ffn-ratio or --head-mask"
        )
    return replace(
        config,
        window=OFF if config.window is None else config.window,
        cutoff=spec.decoder.layers if config.cutoff is None else config.cutoff,
        ffn_ratio=1 if config.ffn_ratio is None else config.ffn_ratio,
    )


def _read(path: str, spec: ModelSpec[Any]) -> tuple[str, ...]:
    import numpy as np

    shape = (spec.decoder.layers, spec.decoder.heads)
    own = spec.settings.get("yopo", {}).get("head_mask") == path
    kind, advice = (CheckpointError, "put the model's own there") if own else (UsageError, "correct it")
    advice += ", or give another --head-mask" if own else " with --head-mask"
    if not Path(path).is_file():
        said = "config.json prunes heads, but the file is missing" if own else "is no file"
        raise kind(f"{path}: {said}; {advice}")
    try:
        mask = np.load(path, allow_pickle=False)
    except Exception as error:  # of many types, for a header or content of other kinds of files
        raise kind(f"{path}: cannot be read as .npy ({str(error).splitlines()[0]}); {advice}") from error
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != shape:
        found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise kind(f"{path}: is {found}, expected bool {list(shape)}, layers by heads; {advice}")
    return tuple("".join("1" if kept else "0" for kept in row) for row in mask)


@dataclass(frozen=True)
class Heads:
    """Query heads of a layer that visual tokens keep and those they lose, and the KV heads that either reads."""

    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    kept_kv: tuple[int, ...]
    pruned_kv: tuple[int, ...]


def heads(plan: Plan, layer: int) -> Heads:
    d = plan.spec.decoder
    row, each = plan.config.head_mask[layer], d.heads // d.kv_heads
    kept = tuple(h for h in range(d.heads) if row[h] == "1")
    pruned = tuple(h for h in range(d.heads) if row[h] != "1")
    read = [tuple(sorted({h // each for h in some})) for some in (kept, pruned)]
    return Heads(kept, pruned, read[0], read[1])


def channels(spec: ModelSpec[Any], config: Config) -> int:
    """FFN channels that visual tokens use: the first ones."""
    assert config.ffn_ratio is not None
    return int(spec.decoder.ffn / config.ffn_ratio)


def released(plan: Plan) -> bool:
    return bool(plan.config.semantics == "released")


def limit(plan: Plan) -> int:
    """The first layer that visual tokens do not enter."""
    return _limit(plan.spec, plan.config)


def _limit(spec: ModelSpec[Any], config: Config) -> int:
    assert config.cutoff is not None and config.head_mask is not None
    if config.semantics == "released":
        return config.cutoff if leaves_early(spec) else spec.decoder.layers
    # Below the cutoff too, where no later layer keeps a head for them.
    return 1 + max((i for i in range(config.cutoff) if "1" in config.head_mask[i]), default=-1)


def leaves_early(spec: ModelSpec[Any]) -> bool:
    """Whether the release drops layers before the softmax: that for Qwen2-VL, whose positions have three axes."""
    return bool(spec.decoder.rope_sections)


def tiles_of(pictures: Sequence[Picture], spec: ModelSpec[Any]) -> tuple[Run, ...]:
    """The picture's rows from its first visual token to its last: whole grids, one of each tile, and text between.

    Raises:
        UnsupportedError: visual tokens that fill no grid, or rows of another kind.
    """
    runs = pictures[0].runs
    visual = [i for i, run in enumerate(runs) if run.kind == "visual"]
    whole = all(runs[i].grid is not None and runs[i].rows == math.prod(runs[i].grid or ()) for i in visual)
    if visual and whole and all(run.kind in ("visual", "text") for run in runs):
        return runs[visual[0] : visual[-1] + 1]
    found = f"{pictures[0].visual_tokens} visual tokens that fill no grid"
    if spec.reads_features:
        found = "no projector"
    elif any(run.kind == "separator" for run in runs):
        found = "separators after its crops"
    raise UnsupportedError(
        f"yopo: the checkpoint has {found}, expected visual tokens on the grid of a picture or of its tiles, and no "
        "others; use another --method"
    )


def cells(tiles: Sequence[Run], apart: int) -> list[tuple[int, int]]:
    """(row, column) of the cell of each row of `tiles_of`, one tile below the other; (0, 0) for text.

    Args:
        apart: rows that lie between two tiles, so that no token of one is the neighbour of one of another.
    """
    found: list[tuple[int, int]] = []
    top = 0
    for tile in tiles:
        if tile.grid is None:
            found += [(0, 0)] * tile.rows
        else:
            rows, columns = tile.grid
            found += [(top + i, j) for i in range(rows) for j in range(columns)]
            top += rows + apart
    return found


def stages(spec: ModelSpec[Any], config: Config, prompt: Prompt) -> tuple[Stage, ...]:
    """Two stages, split where visual tokens leave; one where they stay in every layer."""
    tiles_of(prompt.pictures, spec)
    visual, others = prompt.visual, prompt.others
    full, layers, border = visual + others, spec.decoder.layers, _limit(spec, config)
    flops = sum(_layer_flops(spec, config, visual, others, i, i == border - 1) for i in range(border))
    return (
        *([Stage(range(border), full, full, full, flops=flops)] if border else []),
        *([Stage(range(border, layers), others, others, others)] if border < layers else []),
    )


def _layer_flops(spec: ModelSpec[Any], config: Config, v: int, t: int, layer: int, last: bool) -> int:
    """FLOPs of a layer that visual tokens enter; of the last such layer only their keys and values are read."""
    d = spec.decoder
    assert isinstance(config.head_mask, tuple)
    row, size, each = config.head_mask[layer], d.head_dim, d.heads // d.kv_heads
    kept = [h for h in range(d.heads) if row[h] == "1" or config.semantics == "released"]
    pruned = [h for h in range(d.heads) if h not in kept]
    text = layer_flops(d, t, 0) + 4 * size * (t * (v + t) * len(kept) + t * t * len(pruned))
    # A KV head that both kept and pruned heads read is projected for either.
    text += 4 * t * d.hidden * len({h // each for h in kept} & {h // each for h in pruned}) * size
    visual = 4 * v * d.hidden * len({h // each for h in kept}) * size
    if last:
        return text + visual
    attention = 4 * v * d.hidden * len(kept) * size + 4 * v * (v + t) * len(kept) * size
    return text + visual + attention + 6 * v * d.hidden * channels(spec, config)


def paper(plan: Plan) -> dict[str, Any]:
    """The paper's column: FLOPs of the visual tokens alone, as configured; the published costs are nominal.

    Convention: 2 x multiply-accumulate, keys and values as wide as queries, below the cutoff `window`^2 keys, or all
    visual tokens.
    """
    d, c, v = plan.spec.decoder, plan.config, plan.visual_tokens
    shares = [row.count("1") / d.heads for row in c.head_mask[: c.cutoff]]
    near = v if c.window == OFF else c.window**2
    attention = 4 * v * d.hidden**2 + 2 * v * near * d.hidden
    cost = 2 * sum(share * attention + 3 * v * d.hidden * d.ffn / c.ffn_ratio for share in shares)
    dense = 2 * d.layers * (4 * v * d.hidden**2 + 2 * v**2 * d.hidden + 3 * v * d.hidden * d.ffn)
    return {"name": "YOPO", "unit": "TFLOPs of visual tokens", "value": cost / 1e12, "ratio": cost / dense}


def cache_groups(plan: Plan, layer: int) -> tuple[CacheGroup, ...]:
    """Layers without visual tokens cache text alone. Dropped: so do pruned heads. Released: one cache of all rows.

    Released values are zero for visual tokens where a head is pruned, so that heads which share a KV head need copies
    of their own when only some of them are.
    """
    d, found = plan.spec.decoder, heads(plan, layer)
    every, each = tuple(range(d.heads)), d.heads // d.kv_heads
    own = partial(CacheGroup, name=str(layer), queries=every, owned=every)
    text = (own(kv_heads=tuple(range(d.kv_heads)), dropped=plan.visual_tokens),)
    if layer >= limit(plan):
        return text
    if released(plan):
        shared = layer < plan.config.cutoff and set(found.kept_kv) & set(found.pruned_kv)
        return (own(kv_heads=tuple(h // each for h in every) if shared else tuple(range(d.kv_heads)), dropped=0),)
    if not found.kept:
        return text
    if not found.pruned:
        return (own(kv_heads=tuple(range(d.kv_heads)), dropped=0),)
    return tuple(
        CacheGroup(
            name=f"{layer}.{name}",
            kv_heads=kv_heads,
            queries=tuple(h for h in every if h // each in kv_heads),
            owned=owned,
            dropped=dropped,
        )
        for name, kv_heads, owned, dropped in (
            ("kept", found.kept_kv, found.kept, 0),
            ("pruned", found.pruned_kv, found.pruned, plan.visual_tokens),
        )
    )

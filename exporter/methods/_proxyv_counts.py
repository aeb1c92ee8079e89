"""ProxyV's settings, counts and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.checkpoints.spec import DecoderSpec, ModelSpec
from lvlm_edge.exporter.planning import (
    Plan,
    PlanError,
    Prompt,
    Stage,
    layer_flops,
)
from lvlm_edge.runtime.errors import UnsupportedError
from lvlm_edge.runtime.pictures.layout import Picture

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class Config:
    """ProxyV's settings; a checkpoint's config has them."""

    start_layer: int | None = field(
        default=None,
        metadata={
            "help": "first decoder layer that runs on proxy tokens, 0..layers-1",
            "default": "the checkpoint's",
        },
    )
    reduce_factor: int = field(
        default=4,
        metadata={
            "help": "visual tokens per proxy token along each side of the grid, a divisor of the side",
            "default": "the checkpoint's, else 4",
        },
    )
    learn_proxy: bool = field(
        default=False,
        metadata={
            "help": "proxy tokens are learned mixtures of a crop's visual tokens (true) or its smaller grid (false)",
            "default": "the checkpoint's, else false",
        },
    )


@dataclass(frozen=True)
class Counts:
    """Rows by kind, of all crops together: visual tokens, proxies, separators; and text."""

    visual: int
    proxies: int
    separators: int
    text: int

    @property
    def asking(self) -> int:
        """Rows that have queries from the start layer on."""
        return self.proxies + self.separators + self.text


def resolve(spec: ModelSpec[Any], config: Config) -> Config:
    """The settings, if the checkpoint can run with them.

    Raises:
        UnsupportedError: the checkpoint has no weights of ProxyV.
        PlanError: the start layer is missing or not in the model.
    """
    if "proxyv" not in spec.settings:
        raise UnsupportedError("proxyv: this checkpoint has no ProxyV weights; use one that was trained with ProxyV")
    layers = spec.decoder.layers
    if config.start_layer is None:
        raise PlanError("proxyv: the checkpoint's config has no proxyv_start_layer; give --start-layer")
    for name, value in (("start_layer", config.start_layer), ("reduce_factor", config.reduce_factor)):
        if not isinstance(value, int) or isinstance(value, bool):
            flag = "--" + name.replace("_", "-")
            raise PlanError(f"proxyv: {name} is {value!r}, expected a whole number; correct it with {flag}")
    if not 0 <= config.start_layer < layers:
        raise PlanError(
            f"proxyv: start_layer is {config.start_layer}, but the model has layers 0..{layers - 1}; correct it with "
            "--start-layer"
        )
    return config


def grid_of(pictures: Sequence[Picture], config: Config) -> tuple[int, int]:
    """(rows, columns) of the visual tokens of each crop, each crop followed by a separator.

    Raises:
        UnsupportedError: another arrangement of rows.
        PlanError: the grid cannot be shared out.
    """
    runs = pictures[0].runs
    visual, separators = runs[::2], runs[1::2]
    grid = visual[0].grid
    right = all(run.kind == "visual" and run.grid == grid for run in visual) and len(visual) == len(separators)
    if not right or not all(run.kind == "separator" and run.rows == 1 for run in separators) or grid is None:
        raise UnsupportedError("proxyv: expected a separator after the tokens of each crop; use another --method")
    factor = config.reduce_factor
    if visual[0].rows != math.prod(grid) or factor < 1 or any(side % factor for side in grid):
        raise PlanError(
            f"proxyv: reduce_factor is {factor}, which does not divide a grid of {visual[0].rows} tokens into squares; "
            "choose a divisor of its side"
        )
    return grid


def each_of(plan: Plan) -> int:
    """Visual tokens per crop."""
    return math.prod(grid_of(plan.pictures, plan.config))


def crops_of(plan: Plan) -> int:
    return plan.prompt.separators


def proxies(plan: Plan) -> int:
    """Proxy tokens per crop."""
    return each_of(plan) // int(plan.config.reduce_factor) ** 2


def narrow(d: DecoderSpec) -> int:
    """Width inside the guided update: a quarter of the decoder's, half of a decoder below 1024."""
    return d.hidden // (4 if d.hidden >= 1024 else 2)


def stages(spec: ModelSpec[Any], config: Config, prompt: Prompt) -> tuple[Stage, ...]:
    """Two stages, split at the start layer; one where that is 0."""
    crops, each = prompt.separators, math.prod(grid_of(prompt.pictures, config))
    per = each // config.reduce_factor**2
    counts = Counts(prompt.visual, crops * per, crops, prompt.others - crops)
    first, last = config.start_layer or 0, spec.decoder.layers
    full, asking = prompt.visual + prompt.others, counts.asking
    dense = layer_flops(spec.decoder, full, full) + (crops > 1) * _attention_flops(spec.decoder, 1, full)
    reduced = sum(_layer_flops(spec.decoder, config, counts, per, last=i == last - 1) for i in range(first, last))
    return (
        *([Stage(range(first), full, full, full, flops=first * dense)] if first else []),
        Stage(
            range(first, last),
            asking,
            prompt.visual + asking,
            full,
            flops=reduced + _creation_flops(spec.decoder, counts, config, per),
        ),
    )


def _attention_flops(d: DecoderSpec, queries: int, keys: int) -> int:
    return 4 * queries * keys * d.heads * d.head_dim


def _layer_flops(d: DecoderSpec, config: Config, n: Counts, per: int, *, last: bool) -> int:
    """FLOPs of a layer with proxies; the last one updates no visual tokens, so that its proxies need not ask."""
    q = narrow(d)
    rows, dkv = n.separators + n.text, d.kv_heads * d.head_dim
    asking = rows if last else n.asking
    found = layer_flops(d, asking, 0) + 2 * n.visual * 2 * d.hidden * dkv
    found += _attention_flops(d, rows, n.visual + rows)
    if last:
        return found
    found += _attention_flops(d, n.proxies, n.proxies + rows)
    found += 2 * n.visual * (2 * d.hidden * q + 2 * q * q)
    if not config.learn_proxy:
        return found + 2 * n.proxies * d.hidden * q
    return found + 2 * n.visual * (per * d.hidden + d.hidden * q)


def _creation_flops(decoder: DecoderSpec, n: Counts, config: Config, per: int) -> int:
    """FLOPs that make learnt proxies, once; pooled ones have no matrix products."""
    if not config.learn_proxy:
        return 0
    d, q = decoder.hidden, narrow(decoder)
    return 2 * n.visual * (d * q + per * q + per * d)


def paper(plan: Plan) -> dict[str, Any]:
    """The paper's column: share of prefill's FLOPs saved, on 5 crops and 50 text tokens.

    Its convention: attention of every row to every row, also where masked, multiply-accumulates, no lm_head.
    """
    d, each = plan.spec.decoder, each_of(plan)
    q, dq, dkv = narrow(d), d.heads * d.head_dim, d.kv_heads * d.head_dim
    nf, p, t = 5 * each, 5 * proxies(plan), 50 + 5
    linear = 2 * d.hidden * dq + 2 * d.hidden * dkv + 3 * d.hidden * d.ffn
    full = (nf + t) * linear + 2 * (nf + t) ** 2 * dq
    update = nf * (2 * d.hidden * q + 2 * q * q) + p * d.hidden * q
    reduced = nf * 2 * d.hidden * dkv + update + (p + t) * linear + 2 * (p + t) * (nf + p + t) * dq
    cut = (d.layers - plan.config.start_layer) / d.layers * (1 - reduced / full)
    return {"name": "ProxyV", "unit": "% of prefill FLOPs saved", "value": 100 * cut, "ratio": 1 - cut}


def own_weights(plan: Plan) -> int:
    """Numbers of weights that only ProxyV has and the graphs read."""
    d, q, start = plan.spec.decoder, narrow(plan.spec.decoder), plan.config.start_layer
    update = 3 * d.hidden * q + 2 * q * q + d.hidden
    learnt = d.hidden * q + proxies(plan) * q if plan.config.learn_proxy else 0
    return int((d.layers - start - 1) * update + learnt)  # the last layer's update changes nothing that is read

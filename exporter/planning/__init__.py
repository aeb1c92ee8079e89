"""Plan: the one place where token counts, tensor shapes, cache sizes and FLOPs are computed."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import ModuleType
from typing import Any

from lvlm_edge.exporter.checkpoints import integers as prequantised
from lvlm_edge.exporter.checkpoints import quantise
from lvlm_edge.exporter.checkpoints.spec import DecoderSpec, ModelSpec
from lvlm_edge.runtime.bundle import FORMATS, WIDTHS, TensorInfo, WeightFormats
from lvlm_edge.runtime.errors import UnsupportedError, UsageError, nearest
from lvlm_edge.runtime.image import best_canvas
from lvlm_edge.runtime.kv_cache import PRESENT

BYTES = WIDTHS
CAPACITIES = (
    "num_images",
    "max_text_tokens",
    "max_new_tokens",
    "dtype",
    "lowering",
    "share_weights",
    "max_graph_gb",
    "image_size",
    "grid",
    "weights",
    "vision_weights",
    "head_weights",
    "block_size",
)
FLOAT = "float"  # what matrices may be asked to be beside FORMATS: no integers, whatever the checkpoint has
MAX_GRAPH_GB = 8.0  # a graph's weights: one of 12.4 GB took 20.3 GB to build, one of 13.2 GB more than 22.8 GB


class PlanError(UsageError):
    """A method's setting or a capacity is out of range."""


@dataclass(frozen=True)
class Stage:
    """A run of layers that see the same counts in prefill.

    Attributes:
        layers: decoder layers, 0-based.
        queries: rows of the residual stream.
        keys: rows attended to.
        cached: cache rows filled by prefill.
        scored: keys scored once more for one query row by the last of these layers (0: none).
        flops: of all these layers together; None where every row is projected, fed forward, and meets every key.
    """

    layers: range
    queries: int
    keys: int
    cached: int
    scored: int = 0
    flops: int | None = None


@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """KV heads of a layer that share a cache, because the same rows are cached for them.

    Attributes:
        name: as in `past_key_values.NAME.key`.
        kv_heads: KV heads of the layer, one per head of the cache.
        queries: query heads that read it, a whole number per head of the cache, in order.
        owned: those of `queries` whose result counts; the others are read for nothing, and only while decoding.
        dropped: prompt rows that it does not hold; negative where it holds rows that no prompt has.
    """

    name: str
    kv_heads: tuple[int, ...]
    queries: tuple[int, ...]
    owned: tuple[int, ...]
    dropped: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything an export fixes: counts, stages and precision. Where an image stands is run-time data.

    Attributes:
        share_weights: prompt and decode run in the same graphs, each with a number of rows given at run time.
        max_graph_bytes: weights that one decoder graph may hold; more are split into several.
        text_tokens: capacity for text tokens of the prompt, begin-of-sequence included.
        new_tokens: capacity for generated tokens.
        grid: (rows, columns) of any-resolution tiles that come with the base view of an image; None for one crop.
        visual_tokens: of all images together, without separators.
        separators: learned vectors after the visual tokens of each crop, of all images together.
        kept_tokens: visual tokens left after the last reduction.
        formats: of the weights, as the bundle has them.
        asked: what they were asked to be: `as-is` keeps a checkpoint's own integers, `float` does not.
    """

    spec: ModelSpec
    method: str
    config: Any
    stages: tuple[Stage, ...]
    num_images: int
    text_tokens: int
    new_tokens: int
    dtype: str
    lowering: str = "modern"
    share_weights: bool = False
    max_graph_bytes: int = round(MAX_GRAPH_GB * 1e9)
    grid: tuple[int, int] | None = None
    formats: WeightFormats = field(default_factory=WeightFormats)
    asked: WeightFormats = field(default_factory=WeightFormats)

    @property
    def crops(self) -> int:
        """Pictures that the encoder sees of each image."""
        return crops_of(self.grid)

    @property
    def visual_tokens(self) -> int:
        return self.spec.visual_tokens * self.num_images * self.crops

    @property
    def separators(self) -> int:
        return self.num_images * self.crops if self.spec.newline else 0

    @property
    def kept_tokens(self) -> int:
        return self.stages[-1].cached - self.text_tokens - self.separators

    @property
    def image_rows(self) -> int:
        """Rows of the prompt that images take: none where the layers read their features directly."""
        return 0 if self.spec.projector_act is None else self.visual_tokens + self.separators

    @property
    def prompt_tokens(self) -> int:
        """Rows of the padded prompt."""
        return self.image_rows + self.text_tokens

    @property
    def positions(self) -> int:
        """Rows of the rotary tables: every position a prompt or an answer can reach."""
        return self.prompt_tokens + self.new_tokens

    def format_of(self, weight: str) -> str:
        """The format of a matrix, by its name in `Parts`."""
        return str(getattr(self.formats, part_of(weight)))

    def asked_of(self, weight: str) -> str:
        """What was asked of a matrix, by its name in `Parts`: a format, or `float`."""
        return str(getattr(self.asked, part_of(weight)))

    def stage_of(self, layer: int) -> Stage:
        return next(stage for stage in self.stages if layer in stage.layers)

    def segments(self, layers: range) -> tuple[range, ...]:
        """The layers in runs of about equal length, as few as keep each run's weights below `max_graph_bytes`."""
        w, width = weights(self.spec), BYTES[self.dtype]
        size = (len(layers) * (w.matrices + w.vectors) + w.norm + w.head) * width
        count = min(len(layers), -(-size // self.max_graph_bytes))
        borders = [layers.start + round(len(layers) * i / count) for i in range(count + 1)]
        return tuple(range(start, stop) for start, stop in itertools.pairwise(borders))

    def groups(self, layer: int) -> tuple[CacheGroup, ...]:
        """The caches of a layer; one, unless the method says otherwise."""
        special = getattr(method(self.method), "cache_groups", None)
        if special is not None:
            found: tuple[CacheGroup, ...] = special(self, layer)
            return found
        d = self.spec.decoder
        every = tuple(range(d.heads))
        dropped = self.prompt_tokens - self.stage_of(layer).cached
        kv_heads = tuple(range(d.kv_heads))
        return (CacheGroup(name=str(layer), kv_heads=kv_heads, queries=every, owned=every, dropped=dropped),)

    def filled(self, group: CacheGroup) -> int:
        """Cache rows that a full prompt takes, with what is cached of images beside it."""
        return self.prompt_tokens - group.dropped

    def capacity(self, group: CacheGroup) -> int:
        """Rows of a cache."""
        return self.filled(group) + self.new_tokens

    def all_groups(self) -> tuple[CacheGroup, ...]:
        return tuple(group for layer in range(self.spec.decoder.layers) for group in self.groups(layer))

    def caches(self, layers: Iterable[int], prefix: str) -> tuple[TensorInfo, ...]:
        """Whole caches of some layers as tensors of a graph: [1, heads, capacity, head_dim]."""
        return self._cache_tensors(layers, prefix, self.capacity)

    def prompt_rows(self, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
        """A full prompt's rows for the caches of some layers: [1, heads, rows, head_dim]."""
        return self._cache_tensors(layers, PRESENT, lambda group: min(self.filled(group), self.prompt_tokens))

    def beside_rows(self, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
        """What caches of some layers hold before the prompt's rows: [1, heads, rows, head_dim]."""
        return self._cache_tensors(layers, PRESENT, lambda group: -group.dropped)

    def new_rows(self, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
        """One new row for each cache of some layers: [1, heads, 1, head_dim]."""
        return self._cache_tensors(layers, PRESENT, lambda _: 1)

    def _cache_tensors(
        self, layers: Iterable[int], prefix: str, rows: Callable[[CacheGroup], int]
    ) -> tuple[TensorInfo, ...]:
        size = self.spec.decoder.head_dim
        return tuple(
            TensorInfo(f"{prefix}.{group.name}.{part}", self.dtype, (1, len(group.kv_heads), rows(group), size))
            for layer in layers
            for group in self.groups(layer)
            for part in ("key", "value")
        )

    def kv_cache_bytes(self) -> int:
        row = 2 * self.spec.decoder.head_dim * BYTES[self.dtype]
        return sum(row * len(group.kv_heads) * self.capacity(group) for group in self.all_groups())


def part_of(weight: str) -> str:
    """The part that a weight's format goes by: `vision`, `head` or `decoder`."""
    if weight.startswith(("vision.", "projector.")):
        return "vision"
    return "head" if weight.startswith("lm_head.") else "decoder"


def crops_of(grid: tuple[int, int] | None) -> int:
    """The base view, and the tiles of a grid where there is one."""
    return 1 if grid is None else grid[0] * grid[1] + 1


def method_names() -> list[str]:
    from lvlm_edge.exporter import methods

    return [m.name for m in pkgutil.iter_modules(methods.__path__)]


def method(name: str) -> ModuleType:
    """The module of a method.

    Raises:
        UnsupportedError: there is no such method.
    """
    if name not in method_names():
        raise UnsupportedError(f"method: {name!r} is not known; {nearest(name, method_names())}")
    return importlib.import_module(f"lvlm_edge.exporter.methods.{name}")


def configure(name: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A method's `Config` from options by field name; None means not given.

    Args:
        settings: what the checkpoint says, taken for what is not given.

    Raises:
        UsageError: an option the method does not have.
    """
    config = method(name).Config
    known = [f.name for f in fields(config)]
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in known:
            flag, flags = "--" + key.replace("_", "-"), ["--" + k.replace("_", "-") for k in known]
            advice = nearest(flag, flags) if flags else "leave it out, or choose another --method"
            raise UsageError(f"{name}: has no option {flag}; {advice}")
    own = {key: value for key, value in settings.items() if key in known and value is not None}
    return config(**own | given)


def make(
    spec: ModelSpec,
    *,
    method_name: str = "none",
    options: Mapping[str, Any] | None = None,
    num_images: int = 1,
    max_text_tokens: int = 256,
    max_new_tokens: int = 128,
    dtype: str = "float32",
    lowering: str = "modern",
    share_weights: bool = False,
    max_graph_gb: float = MAX_GRAPH_GB,
    image_size: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    weights: str = "as-is",
    vision_weights: str = "as-is",
    head_weights: str | None = None,
    block_size: int = 128,
    nominal: bool = False,
) -> Plan:
    """The plan of a model under a method.

    Args:
        nominal: where a file beside config.json is missing, count with what config.json says of it.
        image_size: (width, height) of the pictures to come, which decides the grid of any-resolution tiles.
        grid: (rows, columns) of the tiles instead; with neither the base view stands alone.
        weights: format of the decoder's matrices: `as-is`, `int8`, `int4`, or `float`, which differs from `as-is` where
            the checkpoint's are integers already.
        vision_weights: of the encoder's and the projector's.
        head_weights: of lm_head; by default `int8` where the decoder's are rounded, else what theirs are.
        block_size: input channels that share an INT4 scale: 32, or 128 where it divides them.

    Raises:
        PlanError: a count is out of range, the model has no such grid, or the positions exceed what the model was
            trained for.
        UnsupportedError: unknown method or dtype, a method that the checkpoint cannot do without its own, a
            sliding window shorter than the prompt, or integers of the checkpoint's that graphs do not hold.
    """
    if dtype not in BYTES:
        raise UnsupportedError(f"dtype: {dtype!r} is not supported; {nearest(dtype, BYTES)}")
    for name, value in (
        ("num_images", num_images),
        ("max_text_tokens", max_text_tokens),
        ("max_new_tokens", max_new_tokens),
    ):
        if value < 1:
            raise PlanError(f"plan: {name} is {value}, expected at least 1; raise --{name.replace('_', '-')}")
    if not max_graph_gb > 0:
        raise PlanError(f"plan: max_graph_gb is {max_graph_gb:g}, expected more than 0; raise --max-graph-gb")
    if share_weights and lowering != "modern":
        raise UnsupportedError(
            f"plan: graphs of the {lowering} lowering cannot share weights, those of modern can; leave out "
            "--share-weights or choose --lowering modern"
        )
    module = method(method_name)
    if share_weights and not hasattr(module, "SHARES_WEIGHTS"):
        raise UnsupportedError(
            f"{method_name}: a prompt's graphs are not those of decode, so they cannot share weights; leave out "
            "--share-weights"
        )
    config = configure(method_name, options or {}, spec.settings.get(method_name, {}))
    if nominal and hasattr(module, "nominal"):
        config = module.nominal(spec, config)
    if hasattr(module, "resolve"):
        config = module.resolve(spec, config)
    if spec.projector_act is None and method_name not in spec.settings:
        raise UnsupportedError(
            f"{method_name}: this checkpoint has no projector, its decoder's layers read the encoder's features; use "
            f"--method {' or '.join(spec.settings)}"
        )
    grid = _grid(spec, image_size, grid)
    tiles = num_images * crops_of(grid)
    visual = spec.visual_tokens * tiles
    if hasattr(module, "ONE_IMAGE") and num_images > 1:
        raise PlanError(f"{method_name}: {num_images} images, but it is defined for one; leave out --num-images")
    # Separators are no visual tokens, and to the counts of a method they are as good as text.
    others = max_text_tokens + tiles * spec.newline
    asked = _asked(weights, vision_weights, head_weights, block_size)
    plan = Plan(
        spec=spec,
        method=method_name,
        config=config,
        stages=module.stages(spec, config, visual, others),
        num_images=num_images,
        text_tokens=max_text_tokens,
        new_tokens=max_new_tokens,
        dtype=dtype,
        lowering=lowering,
        share_weights=share_weights,
        max_graph_bytes=round(max_graph_gb * 1e9),
        grid=grid,
        formats=_formats(spec, asked),
        asked=asked,
    )
    limit = spec.decoder.max_positions
    if plan.positions > limit:
        raise PlanError(
            f"plan: {visual + plan.separators} visual + {max_text_tokens} text + {max_new_tokens} new tokens make "
            f"{plan.positions} positions, but the model has {limit}; lower --max-text-tokens or --max-new-tokens"
        )
    window = spec.decoder.window
    if window is not None and plan.positions > window:
        raise UnsupportedError(
            f"plan: {plan.positions} positions exceed the model's sliding window of {window}; lower --max-text-tokens "
            "or --max-new-tokens"
        )
    return plan


def _asked(weights: str, vision: str, head: str | None, block: int) -> WeightFormats:
    """The formats that were asked for.

    Raises:
        UnsupportedError: a format this version does not know.
        PlanError: another block size than 32 and 128.
    """
    if head is None:
        head = weights if weights in ("as-is", FLOAT) else "int8"
    for flag, name in (("weights", weights), ("vision_weights", vision), ("head_weights", head)):
        if name not in (*FORMATS, FLOAT):
            raise UnsupportedError(f"{flag}: {name!r} is not supported; {nearest(name, (*FORMATS, FLOAT))}")
    if block not in quantise.BLOCKS:
        raise PlanError(f"block_size: {block}, expected 32 or 128")
    return WeightFormats(decoder=weights, vision=vision, head=head, block=block)


def _formats(spec: ModelSpec, asked: WeightFormats) -> WeightFormats:
    """The formats that come of what was asked: integers of the checkpoint's own stay where it is `as-is`.

    Raises:
        UnsupportedError: graphs do not hold such integers.
    """
    how = spec.prequantised
    found, block = {}, asked.block
    for part in ("decoder", "vision", "head"):
        kind = getattr(asked, part)
        found[part] = "as-is" if kind == FLOAT else kind
        tied = part == "head" and spec.decoder.tied  # such a head is the embedding's table
        if how is not None and kind == "as-is" and part in how.parts and not tied:
            found[part], block = f"int{how.bits}", prequantised.block(how) or block
    return WeightFormats(**found, block=block)


def dense(plan: Plan) -> Plan:
    """The plan of the same prompt without reduction, whether or not the model could run it."""
    module = method("none")
    stages = module.stages(plan.spec, module.Config(), plan.visual_tokens, plan.text_tokens + plan.separators)
    return replace(plan, method="none", config=module.Config(), stages=stages)


def _grid(spec: ModelSpec, image_size: tuple[int, int] | None, grid: tuple[int, int] | None) -> tuple[int, int] | None:
    """(rows, columns) of the tiles.

    Raises:
        PlanError: both are given, the model has no tiles, or not these.
    """
    if image_size is None and grid is None:
        return None
    if image_size is not None and grid is not None:
        raise PlanError("plan: --image-size and --grid both decide the tiles; give one of them")
    if not spec.pinpoints:
        raise PlanError(
            f"plan: {'--grid' if image_size is None else '--image-size'} is for any-resolution checkpoints, but this "
            "one sees every picture as one crop; leave it out"
        )
    side = spec.vision.image_size
    known = [(height // side, width // side) for width, height in spec.pinpoints]
    if image_size is not None:
        if min(image_size) < 1:
            raise PlanError(f"plan: --image-size is {image_size[0]}x{image_size[1]}; give width x height in pixels")
        width, height = best_canvas(image_size, spec.pinpoints)
        return height // side, width // side
    if grid not in known:
        assert grid is not None
        names = ", ".join(f"{rows}x{columns}" for rows, columns in known)
        raise PlanError(
            f"plan: --grid is {grid[0]}x{grid[1]}, which is not among the checkpoint's image_grid_pinpoints; choose "
            f"one of {names} (rows x columns)"
        )
    return grid


# FLOPs: 2 x multiply-accumulate of matrix products and convolutions; full attention rectangles, also where masked.


def vision_flops(spec: ModelSpec) -> int:
    """FLOPs of the vision encoder for one crop, up to the highest feature layer."""
    v = spec.vision
    patches = v.grid**2 * v.patch_size**2 * v.channels * v.hidden
    n = v.positions
    layer = 4 * n * v.hidden**2 + 2 * n * v.hidden * v.ffn + 2 * n * n * v.hidden
    return 2 * (patches + max(v.feature_layers) * layer)


def projector_flops(spec: ModelSpec) -> int:
    """FLOPs of the two-layer projector for one crop; none where there is no projector."""
    if spec.projector_act is None:
        return 0
    wide, d = len(spec.vision.feature_layers) * spec.vision.hidden, spec.decoder.hidden
    return 2 * spec.visual_tokens * (wide * d + d * d)


def layer_flops(d: DecoderSpec, queries: int, keys: int) -> int:
    """FLOPs of one decoder layer: every row projected and fed forward, each query against each key."""
    dq, dkv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    return 2 * queries * (2 * d.hidden * dq + 2 * d.hidden * dkv + 3 * d.hidden * d.ffn) + 4 * queries * keys * dq


def prefill_flops(plan: Plan) -> int:
    """FLOPs of the decoder over the padded prompt, with lm_head on the one emitted row."""
    d = plan.spec.decoder
    return sum(stage_flops(d, stage) for stage in plan.stages) + head_flops(d)


def head_flops(d: DecoderSpec) -> int:
    """FLOPs of lm_head on one row."""
    return 2 * d.hidden * d.vocab


def stage_flops(d: DecoderSpec, stage: Stage) -> int:
    """FLOPs of a prefill stage's layers, without lm_head."""
    if stage.flops is not None:
        return stage.flops
    scores = 2 * stage.scored * d.heads * d.head_dim
    return len(stage.layers) * layer_flops(d, stage.queries, stage.keys) + scores


def decode_flops(plan: Plan) -> int:
    """FLOPs of one decoded token, attending to full caches."""
    d = plan.spec.decoder
    attended = sum(4 * len(g.queries) * d.head_dim * plan.capacity(g) for g in plan.all_groups())
    return d.layers * layer_flops(d, 1, 0) + attended + head_flops(d)


@dataclass(frozen=True)
class Weights:
    """Numbers of weights, each counted once; without rotary tables.

    Attributes:
        vision: the encoder up to the highest feature layer.
        projector: with the separator, where there is one.
        matrices: of the matrices of one decoder layer, the part that weight formats such as int4 are for.
        vectors: of the norms and biases of one decoder layer.
        norm: the last norm.
        head: lm_head; the embedding has as many, and is the same tensor where they are tied.
    """

    vision: int
    projector: int
    matrices: int
    vectors: int
    norm: int
    head: int


def weights(spec: ModelSpec) -> Weights:
    """How many weights each part of a model has."""
    v, d = spec.vision, spec.decoder
    vision = v.patch_size**2 * v.channels * v.hidden + v.positions * v.hidden
    vision += (3 if v.kind == "clip" else 1) * v.hidden  # class token and pre-norm, or the patch bias
    vision += max(v.feature_layers) * (4 * v.hidden**2 + 2 * v.hidden * v.ffn + 9 * v.hidden + v.ffn)
    wide = len(v.feature_layers) * v.hidden
    dq, dkv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    biases = d.qkv_bias * (dq + 2 * dkv) + d.o_bias * d.hidden + d.mlp_bias * (2 * d.ffn + d.hidden)
    projector = wide * d.hidden + d.hidden**2 + (2 * spec.projector_bias + spec.newline) * d.hidden
    if spec.projector_act is None:
        projector = 0
    return Weights(
        vision=vision,
        projector=projector,
        matrices=d.hidden * (2 * dq + 2 * dkv + 3 * d.ffn),
        vectors=2 * d.hidden + biases,
        norm=d.hidden,
        head=d.vocab * d.hidden,
    )


def weights_bytes(plan: Plan) -> int:
    """Bytes of every weight the graphs and the embedding read, each counted once; without rotary tables.

    A quantised head is not the embedding's table, which stays in the plan's dtype.
    """
    w, d, formats, width = weights(plan.spec), plan.spec.decoder, plan.formats, BYTES[plan.dtype]
    v, wide = plan.spec.vision, len(plan.spec.vision.feature_layers) * plan.spec.vision.hidden
    dq, dkv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    encoder = [(v.hidden, v.hidden)] * 4 + [(v.hidden, v.ffn), (v.ffn, v.hidden)]
    matrices = [("vision", shape, max(v.feature_layers)) for shape in encoder]
    if plan.spec.projector_act is not None:
        matrices += [("vision", shape, 1) for shape in ((wide, d.hidden), (d.hidden, d.hidden))]
    layer = [(d.hidden, dq), (d.hidden, dkv), (d.hidden, dkv), (dq, d.hidden)]
    layer += [(d.hidden, d.ffn), (d.hidden, d.ffn), (d.ffn, d.hidden)]
    matrices += [("decoder", shape, d.layers) for shape in layer]
    matrices.append(("head", (d.hidden, d.vocab), 1))
    dense = sum(shape[0] * shape[1] * count for _, shape, count in matrices)
    stored = sum(_matrix_bytes(plan, part, shape) * count for part, shape, count in matrices)
    tables = w.head * (1 if not d.tied or formats.head != "as-is" else 0)
    others = w.vision + w.projector + d.layers * (w.matrices + w.vectors) + w.norm + w.head - dense
    return stored + (others + tables + own_weights(plan)) * width


def _matrix_bytes(plan: Plan, part: str, shape: tuple[int, int]) -> int:
    """Bytes of a matrix [in, out] of a part, in its format; zero points of the checkpoint's take as many as scales."""
    how = quantise.fitting(getattr(plan.formats, part), shape[0], plan.formats.block)
    if how is None:
        return shape[0] * shape[1] * BYTES[plan.dtype]
    stored = plan.spec.prequantised
    shifted = getattr(plan.asked, part) == "as-is" and stored is not None and not stored.symmetric
    return how.integer_bytes(shape) + how.scale_bytes(shape, plan.dtype) * (2 if shifted else 1)


def own_weights(plan: Plan) -> int:
    """Numbers of weights that only the plan's method has."""
    own = getattr(method(plan.method), "own_weights", None)
    return 0 if own is None else int(own(plan))


def report(plan: Plan) -> dict[str, Any]:
    """The plan as `plan --json` prints it (`interface`: method, model, stages, bytes, flops, paper)."""
    d = plan.spec.decoder
    unreduced, module, pictures = dense(plan), method(plan.method), plan.num_images * plan.crops
    return {
        "method": plan.method,
        "config": asdict(plan.config),
        "model": {
            "family": plan.spec.family,
            "layers": d.layers,
            "hidden": d.hidden,
            "heads": d.heads,
            "kv_heads": d.kv_heads,
            "head_dim": d.head_dim,
            "ffn": d.ffn,
            "vocab": d.vocab,
        },
        "dtype": plan.dtype,
        "num_images": plan.num_images,
        "crops": plan.crops,
        "separators": plan.separators,
        "visual_tokens": plan.visual_tokens,
        "kept_visual_tokens": plan.kept_tokens,
        "removed_share": 1 - plan.kept_tokens / plan.visual_tokens,
        "text_tokens": plan.text_tokens,
        "new_tokens": plan.new_tokens,
        "stages": [
            {
                "layers": [s.layers.start, s.layers.stop - 1],
                "queries": s.queries,
                "keys": s.keys,
                "cached": s.cached,
            }
            for s in plan.stages
        ],
        "weights_bytes": weights_bytes(plan),
        "kv_cache_bytes": plan.kv_cache_bytes(),
        "kv_cache_bytes_dense": unreduced.kv_cache_bytes(),
        "flops": {
            "vision": vision_flops(plan.spec) * pictures,
            "projector": projector_flops(plan.spec) * pictures,
            "prefill": prefill_flops(plan),
            "prefill_dense": prefill_flops(unreduced),
            "decode_per_token": decode_flops(plan),
        },
        "paper": module.paper(plan),
    }

"""Plan: the one place where token counts, tensor shapes and cache sizes are computed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from lvlm_edge.exporter.checkpoints.integers import block
from lvlm_edge.exporter.checkpoints.spec import DecoderSpec, ModelSpec
from lvlm_edge.exporter.planning.capacity import FLOAT, Capacity, PlanError, Settings
from lvlm_edge.exporter.planning.records import (
    C,
    CacheGroup,
    Family,
    Lowering,
    Method,
    Prompt,
    Stage,
    no_paper,
    no_weights,
    one_cache,
)
from lvlm_edge.runtime.bundle import WIDTHS, TensorInfo, WeightFormats
from lvlm_edge.runtime.bundle.kv_cache import PRESENT
from lvlm_edge.runtime.errors import UnsupportedError, UsageError, nearest
from lvlm_edge.runtime.pictures.layout import Picture

BYTES = WIDTHS
PROMPT = ".prompt"  # ends the names of matrices that graphs of prompts read in a format of their own


class Model(NamedTuple):
    """What a plan is for: a family's spec of a checkpoint, and what each planned image or video stands for."""

    family: Family[Any]
    spec: ModelSpec[Any]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything an export fixes: counts, stages and precision. Where an image stands is run-time data.

    Attributes:
        prompt: rows of a full prompt.
        formats: of the weights, as the bundle has them; `settings.requested` is what they were asked to be.
    """

    family: Family[Any]
    spec: ModelSpec[Any]
    method: Method[Any]
    config: Any
    lowering: Lowering
    prompt: Prompt
    stages: tuple[Stage, ...]
    capacity: Capacity
    settings: Settings
    formats: WeightFormats

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return self.prompt.pictures

    @property
    def axes(self) -> int:
        """Axes of positions."""
        return self.family.axes

    @property
    def dtype(self) -> str:
        return self.settings.dtype

    @property
    def vision_dtype(self) -> str:
        """Precision of the vision encoder and projector."""
        return self.settings.vision_dtype or self.settings.dtype

    @property
    def vision_lowering(self) -> Lowering:
        """The lowering of the vision encoder and projector."""
        wide = self.lowering.wide
        return wide if wide and self.vision_dtype == "float32" != self.dtype else self.lowering

    def dtype_of(self, weight: str) -> str:
        """Precision of a weight, by its name in `Parts`."""
        return self.vision_dtype if part_of(weight) == "vision" else self.dtype

    @property
    def share_weights(self) -> bool:
        """Prompt and decode run in the same graphs, each with a number of rows given at run time."""
        return self.settings.share_weights

    @property
    def text_tokens(self) -> int:
        return self.capacity.max_text_tokens

    @property
    def new_tokens(self) -> int:
        return self.capacity.max_new_tokens

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of all images together."""
        return self.prompt.visual

    @property
    def kept_tokens(self) -> int:
        """Visual tokens left after the last reduction."""
        return self.stages[-1].cached - self.prompt.others

    @property
    def prompt_tokens(self) -> int:
        """Rows of the padded prompt."""
        return self.prompt.rows

    @property
    def positions(self) -> int:
        """Rows of the rotary tables: every position a prompt or an answer can reach."""
        return self.prompt_tokens + self.new_tokens

    @property
    def injected(self) -> tuple[str, ...]:
        """Outputs of image graphs that are added to visual rows after decoder layers 0, 1, ...."""
        return self.family.injected(self.spec)

    def format_of(self, weight: str) -> str:
        """The format of a matrix, by its name in `Parts`, or with `PROMPT` behind it."""
        return str(getattr(self.formats, part_of(weight)))

    def requested_of(self, weight: str) -> str:
        """What was asked of a matrix, by its name in `Parts` or with `PROMPT` behind it: a format, or `float`."""
        return str(getattr(self.settings.requested, part_of(weight)))

    def stage_of(self, layer: int) -> Stage:
        return next(stage for stage in self.stages if layer in stage.layers)

    def subgraphs(self, layers: range) -> tuple[range, ...]:
        """The layers in runs of about equal length, as few as keep each run's weights below `max_graph_gb`."""
        w, width = decoder_weights(self.spec.decoder), BYTES[self.dtype]
        size = (len(layers) * (w.matrices + w.vectors) + w.norm + w.head) * width
        count = min(len(layers), -(-size // round(self.settings.max_graph_gb * 1e9)))
        borders = [layers.start + round(len(layers) * i / count) for i in range(count + 1)]
        return tuple(range(start, stop) for start, stop in itertools.pairwise(borders))

    def groups(self, layer: int) -> tuple[CacheGroup, ...]:
        """The caches of a layer."""
        return self.method.cache_groups(self, layer)

    def filled(self, group: CacheGroup) -> int:
        """Cache rows that a full prompt takes, with what is cached of images beside it."""
        return self.prompt_tokens - group.dropped

    def capacity_of(self, group: CacheGroup) -> int:
        """Rows of a cache. Where fewer pictures may come, a cache also holds rows that are then not dropped."""
        return self.filled(group) + self.new_tokens

    def all_groups(self) -> tuple[CacheGroup, ...]:
        return tuple(group for layer in range(self.spec.decoder.layers) for group in self.groups(layer))

    def caches(self, layers: Iterable[int], prefix: str) -> tuple[TensorInfo, ...]:
        """Whole caches of some layers as tensors of a graph: [1, heads, capacity, head_dim]."""
        return self._cache_tensors(layers, prefix, self.capacity_of)

    def prompt_rows(self, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
        """A full prompt's rows for the caches of some layers: [1, heads, rows, head_dim]."""
        return self._cache_tensors(layers, PRESENT, lambda group: min(self.filled(group), self.prompt_tokens))

    def leading_rows(self, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
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
        return sum(row * len(group.kv_heads) * self.capacity_of(group) for group in self.all_groups())


class DecoderWeights(NamedTuple):
    """Numbers of weights of a decoder.

    Attributes:
        matrices: of the matrices of one layer, the part that weight formats such as int4 are for.
        vectors: of the norms and biases of one layer.
        norm: the last norm.
        head: lm_head; the embedding has as many, and is the same tensor where they are tied.
    """

    matrices: int
    vectors: int
    norm: int
    head: int


def decoder_weights(d: DecoderSpec) -> DecoderWeights:
    """How many weights a decoder has, without rotary tables."""
    dq, dkv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    biases = d.qkv_bias * (dq + 2 * dkv) + d.o_bias * d.hidden + d.mlp_bias * (2 * d.ffn + d.hidden)
    return DecoderWeights(
        matrices=d.hidden * (2 * dq + 2 * dkv + 3 * d.ffn),
        vectors=2 * d.hidden + biases + 2 * d.head_dim * d.qk_norm,
        norm=d.hidden,
        head=d.vocab * d.hidden,
    )


def part_of(weight: str) -> str:
    """The part that a weight's format goes by: `vision`, `prompt`, `head` or `decoder`."""
    if weight.startswith(("vision.", "projector.")):
        return "vision"
    if weight.endswith(PROMPT):
        return "prompt"
    return "head" if weight.startswith("lm_head.") else "decoder"


def configure(method: Method[C], spec: ModelSpec[Any], options: Mapping[str, Any], *, nominal: bool = False) -> C:
    """A method's resolved `Config` from options by field name; None means not given.

    Args:
        spec: what the checkpoint says of the method is taken for what is not given.
        nominal: where a file beside config.json is missing, count with what config.json says of it.

    Raises:
        UsageError: an option the method does not have.
        UnsupportedError: the checkpoint has no weights of the method.
    """
    known = [f.name for f in fields(method.config)]
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in known:
            flag, flags = "--" + key.replace("_", "-"), ["--" + k.replace("_", "-") for k in known]
            advice = nearest(flag, flags) if flags else "leave it out, or choose another --method"
            raise UsageError(f"{method.name}: has no option {flag}; {advice}")
    settings = spec.settings.get(method.name, {})
    own = {key: value for key, value in settings.items() if key in known and value is not None}
    config = method.config(**own | given)
    return method.resolve(spec, method.nominal(spec, config) if nominal else config)


def make(
    model: Model,
    *,
    method: Method[Any],
    lowering: Lowering,
    config: Any,
    capacity: Capacity,
    settings: Settings,
    formats: WeightFormats | None = None,
) -> Plan:
    """The plan of a model under a method.

    Args:
        config: the method's, resolved (`configure`).
        formats: of the weights, where the checkpoint's tensors were looked at; by default what config.json says.

    Raises:
        PlanError: a count is out of range, or the positions exceed what the model was trained for.
        UnsupportedError: a method that the checkpoint cannot do without its own, weights that cannot be shared, a
            sliding window shorter than the prompt, or integers of the checkpoint's that graphs do not hold.
    """
    family, spec, pictures = model
    prompt = Prompt(pictures, capacity.max_text_tokens)
    _check_sharing(method, lowering, settings)
    if spec.reads_features and not method.reads_features:
        raise UnsupportedError(
            f"{method.name}: this checkpoint has no projector, its decoder's layers read the encoder's features; use "
            f"--method {' or '.join(spec.settings)}"
        )
    if family.axes > 1 and not method.three_axes:
        raise UnsupportedError(
            f"{method.name}: is not defined for {family.name}, whose positions have {family.axes} axes; use --method "
            "none or fastv"
        )
    if family.injected(spec) and not method.injected:
        raise UnsupportedError(
            f"{method.name}: is not defined for {family.name}, which adds features of a picture to visual rows after "
            "decoder layers; use --method none or fastv"
        )
    if method.one_image and len(pictures) > 1:
        raise PlanError(f"{method.name}: {len(pictures)} images, but it is defined for one; leave out --num-images")
    if method.one_image and any(picture.kind == "video" for picture in pictures):
        raise PlanError(f"{method.name}: is defined for one image, not for a video; leave out --num-videos")
    plan = Plan(
        family=family,
        spec=spec,
        method=method,
        config=config,
        lowering=lowering,
        prompt=prompt,
        stages=method.stages(spec, config, prompt),
        capacity=capacity,
        settings=settings,
        formats=formats or nominal_formats(spec, settings.requested),
    )
    _check_positions(plan)
    return plan


def _check_sharing(method: Method[Any], lowering: Lowering, settings: Settings) -> None:
    if settings.share_weights and not lowering.shares_weights:
        raise UnsupportedError(
            f"plan: graphs of the {lowering.name} lowering cannot share weights, those of modern can; leave out "
            "--share-weights or choose --lowering modern"
        )
    if settings.share_weights and not method.shares_weights:
        raise UnsupportedError(
            f"{method.name}: a prompt's graphs are not those of decode, so they cannot share weights; leave out "
            "--share-weights"
        )
    if settings.prompt_weights is not None and (settings.dtype != "float32" or settings.share_weights):
        asked = "--share-weights" if settings.share_weights else f"--dtype {settings.dtype}"
        raise PlanError(
            f"prompt_weights: {settings.prompt_weights} does not go with {asked}, where prompt and decode are one "
            "graph of ONNX Runtime's; leave one of the two out"
        )
    if settings.prompt_weights is not None and not method.shares_weights:
        raise UnsupportedError(
            f"{method.name}: its prompts read the formats of --weights alone; leave out --prompt-weights, which "
            "methods none and fastv take"
        )


def _check_positions(plan: Plan) -> None:
    limit, window = plan.spec.decoder.max_positions, plan.spec.decoder.window
    if plan.positions > limit:
        visual = plan.visual_tokens + plan.prompt.separators
        raise PlanError(
            f"plan: {visual} visual + {plan.text_tokens} text + {plan.new_tokens} new tokens make "
            f"{plan.positions} positions, but the model has {limit}; lower --max-text-tokens or --max-new-tokens"
        )
    if window is not None and plan.positions > window:
        rows = plan.prompt_tokens - plan.text_tokens  # of pictures; some text and one new token come beside them
        advice = "lower --max-text-tokens or --max-new-tokens"
        if rows + 2 > window:
            advice = "export for smaller or fewer pictures (--image-size, --num-images), or use another checkpoint"
        raise UnsupportedError(
            f"plan: {plan.positions} positions, {rows} of them of pictures, exceed the model's sliding window of "
            f"{window}; {advice}"
        )


def nominal_formats(spec: ModelSpec[Any], requested: WeightFormats) -> WeightFormats:
    """The formats that come of what was asked, by config.json alone: integers that it names stay where it is `as-is`.

    Raises:
        UnsupportedError: graphs do not hold such integers.
    """
    how = spec.prequantised
    found, size = {}, requested.block
    for part in ("decoder", "vision", "head"):
        kind = getattr(requested, part)
        found[part] = "as-is" if kind == FLOAT else kind
        tied = part == "head" and spec.decoder.tied  # such a head is the embedding's table
        if how is not None and kind == "as-is" and part in how.parts and not tied:
            found[part], size = f"int{how.bits}", block(how) or size
    return WeightFormats(**found, block=size, prompt=prompt_format(requested, found["decoder"]))


def prompt_format(requested: WeightFormats, decoder: str) -> str | None:
    """The format that graphs of prompts read the decoder's matrices in, where it is one of their own.

    Args:
        decoder: the format of these matrices.

    Raises:
        PlanError: one is asked for, and the matrices are not INT4.
    """
    if requested.prompt is not None and decoder != "int4":
        raise PlanError(
            f"prompt_weights: {requested.prompt} is for INT4 matrices, the decoder's are {decoder}; leave it out, or "
            "give --weights int4"
        )
    return requested.prompt


def whole(spec: ModelSpec[Any], config: Any, prompt: Prompt) -> tuple[Stage, ...]:
    """One stage: all layers see the whole prompt."""
    full = prompt.visual + prompt.others
    return (Stage(range(spec.decoder.layers), full, full, full),)


def dense(plan: Plan) -> Plan:
    """The plan of the same prompt without reduction, whether or not the model could run it."""
    method = replace(plan.method, name="none", cache_groups=one_cache, own_weights=no_weights, paper=no_paper)
    return replace(plan, method=method, config=None, stages=whole(plan.spec, None, plan.prompt))

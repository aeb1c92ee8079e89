"""What plug-ins hand into a plan: records with typed fields, one instance as the last line of each plug-in's file.

A method is one file of `exporter/methods/`, a family one of `exporter/families/`, a lowering one of
`exporter/lowerings/`. The docstrings of the fields are the contract. A misspelt field is an error of mypy, and of
Python when the file is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, Source
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.planning.capacity import Capacity
from lvlm_edge.exporter.planning.work import Work
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.pictures.layout import Picture

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch import Tensor

    from lvlm_edge.exporter.planning.plan import Plan

C = TypeVar("C", bound="DataclassInstance")  # a method's own settings
V = TypeVar("V")  # a family's own description of its vision encoder
Tensors = dict[str, "Tensor"]


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


@dataclass(frozen=True)
class Prompt:
    """The rows of a full prompt: pictures, and the capacity for text.

    Attributes:
        pictures: what each image stands for.
        text: text tokens outside of the pictures.
    """

    pictures: tuple[Picture, ...]
    text: int

    @property
    def visual(self) -> int:
        """Visual tokens of all pictures, also those that have no rows in the prompt."""
        return sum(picture.visual_tokens for picture in self.pictures)

    @property
    def separators(self) -> int:
        return sum(picture.rows("separator") for picture in self.pictures)

    @property
    def others(self) -> int:
        """Rows that are no visual tokens: text, that of pictures among it, and separators."""
        return self.text + sum(picture.rows("separator", "text") for picture in self.pictures)

    @property
    def image_rows(self) -> int:
        """Rows of the prompt that take the output of an image graph."""
        return sum(picture.rows("visual", "separator") for picture in self.pictures)

    @property
    def rows(self) -> int:
        """Rows of the padded prompt."""
        return self.text + sum(picture.rows() for picture in self.pictures)


# (parts, plan, inputs by name) -> outputs by name. The first argument is `graphs.parts.Parts`, above this package.
Body = Callable[[Any, "Plan", Tensors], Tensors]


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """A graph to be traced.

    Attributes:
        role: `image`, `prefill` or `decode` (see the manifest).
        body: (parts, plan, inputs by name) -> outputs by name.
        dynamic_rows: the graph takes any number of rows up to this one; None where its shapes are fixed.
        row_axes: the axis along which a tensor's rows lie, by name, where their number is given at run time.
        file: name of the graph that is traced, where this one runs it with other shapes.
        names: what that graph calls a tensor, where the name differs.
    """

    name: str
    role: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    body: Body
    dynamic_rows: int | None = None
    row_axes: Mapping[str, int] = field(default_factory=dict)
    file: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)


Paper = dict[str, Any]


def no_paper(plan: Plan) -> Paper | None:
    """No paper, no column."""
    return None


def as_given(spec: ModelSpec[Any], config: C) -> C:
    """The settings as they are."""
    return config


def no_weights(plan: Plan) -> int:
    """No weights of its own."""
    return 0


def nothing(parts: Any, plan: Plan) -> None:
    """Nothing to add."""


def one_cache(plan: Plan, layer: int) -> tuple[CacheGroup, ...]:
    """One cache for all heads of a layer, of the rows that its stage caches."""
    d = plan.spec.decoder
    every = tuple(range(d.heads))
    dropped = plan.prompt_tokens - plan.stage_of(layer).cached
    kv_heads = tuple(range(d.kv_heads))
    return (CacheGroup(name=str(layer), kv_heads=kv_heads, queries=every, owned=every, dropped=dropped),)


@dataclass(frozen=True, kw_only=True)
class Method(Generic[C]):
    """A token-reduction method, whose settings are a `C`.

    Attributes:
        name: its name on the command line, that of its file.
        config: a frozen, keyword-only dataclass. Its fields become flags (`prune_layer` is `--prune-layer`), a field's
            metadata `help` the flag's help. `ModelSpec.settings[name]` holds the defaults that a checkpoint brings.
        stages: (spec, config, prompt) -> runs of layers that see the same counts. Raises PlanError for a setting out
            of range, UnsupportedError for a checkpoint that the method does not work on.
        graphs: plan -> the graphs of the decoder, in the order in which they run; those of images come before them.
        paper: plan -> the cost column of the method's paper by the paper's own formula: `name`, `unit`, `value`,
            `ratio`.
        resolve: (spec, config) -> the config with what the checkpoint says. Raises UnsupportedError where its weights
            are not the method's.
        nominal: the same for `plan`, which reads config.json alone, where a file beside it is missing.
        cache_groups: (plan, layer) -> the caches of a layer.
        own_weights: plan -> how many numbers only this method has.
        extend: (parts, plan) -> None; gives `Parts` the method's own weights, under the names of its release.
        one_image: the method is defined for one image.
        shares_weights: its prompt graphs can also be those of decode (`--share-weights`).
        fewer_pictures: its graphs answer prompts with fewer pictures than planned, and without pictures.
        reads_features: the decoder's layers read the encoder's features, and pictures have no rows in the prompt.
        three_axes: its graphs take positions of three axes.
        injected: its graphs take features that are added to visual rows after layers.
    """

    name: str
    config: type[C]
    stages: Callable[[ModelSpec[Any], C, Prompt], tuple[Stage, ...]]
    graphs: Callable[[Plan], tuple[GraphSpec, ...]]
    paper: Callable[[Plan], Paper | None] = no_paper
    resolve: Callable[[ModelSpec[Any], C], C] = as_given
    nominal: Callable[[ModelSpec[Any], C], C] = as_given
    cache_groups: Callable[[Plan, int], tuple[CacheGroup, ...]] = one_cache
    own_weights: Callable[[Plan], int] = no_weights
    extend: Callable[[Any, Plan], None] = nothing
    one_image: bool = False
    shares_weights: bool = False
    fewer_pictures: bool = False
    reads_features: bool = False
    three_axes: bool = False
    injected: bool = False


Attend = Callable[["Tensor", "Tensor", "Tensor", bool], "Tensor"]
Layers = Callable[["Plan", Iterable[int]], tuple[TensorInfo, ...]]


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """How decoder arithmetic and cache updates are written as ONNX operators.

    Heads are [1, H, rows, D_h]; caches [1, H_kv, capacity, D_h].

    Attributes:
        name: its name on the command line, that of its file.
        opset: of plain ai.onnx.
        rms_norm: (x, weight, eps) -> x / rms(x) * weight over the last axis, the normalisation in float32.
        layer_norm: (x, weight, bias, eps) -> likewise.
        rotate: (heads, cos, sin, positions) -> heads turned in the rotate-half convention. `cos` and `sin` are tables
            [positions, D_h / 2] and `positions` [1, rows]; or they are [1, rows, D_h / 2], and `positions` is None.
        attend: (query, key, value, causal) -> softmax attention among fresh rows; causal by row number.
        attend_where: (query, key, value, visible [Q, K] bool) -> attention to the visible keys.
        prefill_inputs, prefill_outputs, store: what a prompt graph takes and returns for caches, and makes of new
            rows: (inputs, group, key, value) -> outputs by name.
        leading_outputs, put: the same of rows that caches hold before the prompt's.
        decode_inputs, decode_outputs, append: the same for one token: (inputs, group, query, key, value, slot) ->
            attention, outputs by name.
        wide: for a float32 part of a bundle in half precision, where its operators would have no kernels in float32.
        shared_inputs, extend: of graphs that serve prompt and decode; None where the lowering has none:
            (inputs, group, query, key, value, slot [1], a number for each row [1, rows]) -> attention, outputs by
            name.
    """

    name: str
    opset: int
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    attend: Attend
    attend_where: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    prefill_inputs: Layers
    prefill_outputs: Layers
    leading_outputs: Layers
    decode_inputs: Layers
    decode_outputs: Layers
    store: Callable[[Tensors, CacheGroup, Tensor, Tensor], Tensors]
    put: Callable[[Tensors, CacheGroup, Tensor, Tensor], Tensors]
    append: Callable[[Tensors, CacheGroup, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensors]]
    wide: Lowering | None = None
    shared_inputs: Layers | None = None
    extend: Callable[[Tensors, CacheGroup, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensors]] | None = (
        None
    )

    @property
    def shares_weights(self) -> bool:
        """Whether prompt and decode can run in the same graphs."""
        return self.extend is not None


@dataclass(frozen=True, kw_only=True)
class Family(Generic[V]):
    """A family of models: a layout of config.json and tensors, a vision encoder and a projector.

    Attributes:
        name: `model_type` in config.json, that of its file.
        vision: the family's frozen dataclass of its vision encoder's dimensions.
        read: checkpoint -> spec, from the configs alone. Raises UnsupportedError for a feature that the graphs do not
            have, instead of leaving it out.
        pictures: (checkpoint, spec, capacity) -> what each planned image stands for, in order. Raises PlanError for a
            capacity that the family does not have, or lacks one that it needs.
        work: (spec, picture) -> products of the vision encoder per view, and of the projector per picture.
        weights: (checkpoint, spec, pictures) -> sources of weights by their names in `Parts`.
        rename: a tensor's name in the checkpoint -> its name in `Parts`.
        unused: whether a tensor (renamed) may be there without being read.
        extend: (parts, plan) -> None; gives `Parts` the encoder and the projector.
        graphs: plan -> graphs of role `image`, in the order in which they run.
        chat_template: checkpoint -> the published template, for a checkpoint that brings none.
        injected: spec -> outputs of image graphs that are added to visual rows after decoder layers 0, 1, ....
        axes: of positions: 1, or 3 (time, row, column).
        own_template: a checkpoint's own template knows images; else it is its language model's, and the published one
            is used.
        sized: visual tokens depend on the picture's size, which an export is told (`--image-size`).
        frames: of a video, in training; 0 where videos are not seen.
    """

    name: str
    vision: type[V]
    read: Callable[[Checkpoint], ModelSpec[V]]
    pictures: Callable[[Checkpoint, ModelSpec[V], Capacity], tuple[Picture, ...]]
    work: Callable[[ModelSpec[V], Picture], tuple[Work, Work]]
    weights: Callable[[Checkpoint, ModelSpec[V], tuple[Picture, ...]], Mapping[str, Source]]
    rename: Callable[[str], str]
    unused: Callable[[str], bool]
    extend: Callable[[Any, Plan], None]
    graphs: Callable[[Plan], tuple[GraphSpec, ...]]
    chat_template: Callable[[Checkpoint], str | None]
    injected: Callable[[ModelSpec[V]], tuple[str, ...]] = lambda spec: ()
    axes: int = 1
    sized: bool = False
    frames: int = 0
    own_template: bool = True

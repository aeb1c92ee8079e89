"""HiMix: visual tokens never enter the layers; each layer makes keys and values of the image's features itself
(arXiv:2501.10318).

Image keys carry no rotary embedding and every text token sees all of them; text counts its positions without images.
So what the caches hold of an image depends on nothing else, is made once, and serves every prompt about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.graphs.rotary import rotation
from lvlm_edge.exporter.planning import GraphSpec, Method, Plan, Prompt, Stage, Tensors, layer_flops
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.bundle.kv_cache import PAST
from lvlm_edge.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from lvlm_edge.exporter.graphs.parts import Parts


@dataclass(frozen=True, kw_only=True)
class Config:
    """HiMix has no settings."""


def resolve(spec: ModelSpec[Any], config: Config) -> Config:
    """The settings.

    Raises:
        UnsupportedError: the checkpoint has no weights of HiMix.
    """
    if "himix" not in spec.settings:
        raise UnsupportedError("himix: this checkpoint has no HiMix weights; use one that was trained with HiMix")
    return config


def stages(spec: ModelSpec[Any], config: Config, prompt: Prompt) -> tuple[Stage, ...]:
    """One stage: text asks, image and text answer."""
    d, rows, keys = spec.decoder, prompt.others, prompt.visual + prompt.others
    layer = layer_flops(d, rows, keys) + 4 * prompt.visual * spec.features * d.kv_heads * d.head_dim
    return (Stage(range(d.layers), rows, keys, keys, flops=d.layers * layer),)


def paper(plan: Plan) -> dict[str, Any]:
    """The paper's column: FLOPs of the decoder at 64 text tokens, lm_head on each of them."""
    d, m = plan.spec.decoder, 64
    n, dkv = plan.pictures[0].visual_tokens, d.kv_heads * d.head_dim
    linear, attention = layer_flops(d, 1, 0), 4 * d.heads * d.head_dim
    head = 2 * d.hidden * d.vocab
    dense = d.layers * ((n + m) * linear + (n + m) ** 2 * attention) + (n + m) * head
    cost = d.layers * (m * linear + 4 * n * plan.spec.features * dkv + m * (n + m) * attention) + m * head
    return {"name": "HiMix", "unit": "GFLOPs", "value": cost / 1e9, "ratio": cost / dense}


def own_weights(plan: Plan) -> int:
    """Numbers of weights that only HiMix has."""
    d, wide = plan.spec.decoder, plan.spec.features
    dkv = d.kv_heads * d.head_dim
    return d.layers * (wide + 2 * dkv * (wide + d.qkv_bias))


def extend(parts: Parts, plan: Plan) -> None:
    """Give the decoder's layers HiMix's weights, under the names of the release."""
    from lvlm_edge.exporter.graphs.parts import Linear, Norm

    d, wide = plan.spec.decoder, plan.spec.features
    for layer in parts.layers:
        layer.input_layernorm_img = Norm(wide)
        layer.k_proj_img = Linear(wide, d.kv_heads * d.head_dim, d.qkv_bias)
        layer.v_proj_img = Linear(wide, d.kv_heads * d.head_dim, d.qkv_bias)


def image_kv(parts: Parts, plan: Plan, inputs: Tensors) -> Tensors:
    """Caches with every layer's keys and values of the images' features [1, N, D_v] at their start."""
    d = plan.spec.decoder
    caches: Tensors = {}
    for i, layer in enumerate(parts.layers):
        normed = parts.ops.rms_norm(inputs["image_features"], layer.input_layernorm_img.weight, d.eps)
        key, value = (blocks.split_heads(p(normed), d.kv_heads) for p in (layer.k_proj_img, layer.v_proj_img))
        (group,) = plan.groups(i)
        caches |= parts.ops.put(inputs, group, key, value)
    return caches


def prefill(parts: Parts, plan: Plan, inputs: Tensors, *, subgraph: blocks.Subgraph) -> Tensors:
    """Text through the layers; every row sees the images, and text up to itself."""
    x, positions = inputs[subgraph.entry], inputs["position_ids"]
    turn = rotation(parts, positions)
    before = blocks.constant([0] * plan.visual_tokens)  # images are where the first position is
    visible = blocks.concat([before, positions[0]])[None] <= positions[0][:, None]
    caches: Tensors = {}
    for i in subgraph.layers:
        layer, (group,) = parts.layers[i], plan.groups(i)
        query, key, value = blocks.project(parts, layer, x, turn)
        both = [
            blocks.concat([inputs[f"{PAST}.{group.name}.{part}"][:, :, : plan.visual_tokens], own], 2)
            for part, own in (("key", key), ("value", value))
        ]
        rows = both[0], both[1]
        caches |= parts.ops.store(inputs, group, key, value)
        x = blocks.finish(parts, layer, x, parts.ops.attend_where(query, *rows, visible))
    if subgraph.result is None:
        return {"logits": blocks.logits(parts, x, inputs["last_index"]), **caches}
    return {subgraph.result: x, **caches}


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """image_kv, prefill, decode."""
    layers = range(plan.spec.decoder.layers)
    subgraphs = blocks.subgraphs(plan, "prefill", layers, "inputs_embeds")
    return (
        _image_graph(plan, layers),
        *(_prefill_graph(plan, subgraph) for subgraph in subgraphs),
        *blocks.decode_graphs(plan, ()),
    )


def _image_graph(plan: Plan, layers: range) -> GraphSpec:
    return GraphSpec(
        name="image_kv",
        role="image",
        inputs=(
            TensorInfo("image_features", plan.dtype, (1, plan.visual_tokens, plan.spec.features)),
            *blocks.prefill_inputs(plan, layers),
        ),
        outputs=blocks.leading_outputs(plan, layers),
        body=image_kv,
    )


def _prefill_graph(plan: Plan, subgraph: blocks.Subgraph) -> GraphSpec:
    shapes = blocks.Shapes(plan)
    last = (shapes.index("last_index", 1),) if subgraph.result is None else ()
    result = shapes.logits() if subgraph.result is None else shapes.hidden(subgraph.result, plan.text_tokens)
    return GraphSpec(
        name=subgraph.name,
        role="prefill",
        inputs=(
            shapes.hidden(subgraph.entry, plan.text_tokens),
            shapes.positions("position_ids", plan.text_tokens),
            *last,
            *_caches(plan, subgraph.layers),
        ),
        outputs=(result, *blocks.prefill_outputs(plan, subgraph.layers)),
        body=partial(prefill, subgraph=subgraph),
    )


def _caches(plan: Plan, layers: Iterable[int]) -> tuple[TensorInfo, ...]:
    """What the lowering wants for caches, and in any case what they hold of the images."""
    wanted = (*blocks.prefill_inputs(plan, layers), *plan.caches(layers, PAST))
    return tuple(dict.fromkeys(wanted))


METHOD = Method(
    name="himix",
    config=Config,
    stages=stages,
    graphs=graphs,
    paper=paper,
    resolve=resolve,
    own_weights=own_weights,
    extend=extend,
    reads_features=True,
)

"""Qwen-VL-Chat in its release's own layout (`model_type: qwen`): an encoder whose features a resampler makes 256 rows.

Source: `modeling_qwen.py`, `visual.py` and `tokenization_qwen.py` of Qwen-VL-Chat.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.checkpoints import integers, text
from lvlm_edge.exporter.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    Derived,
    Source,
    apart,
    renamed,
)
from lvlm_edge.exporter.checkpoints.preprocess import CLIP_MEAN, CLIP_STD
from lvlm_edge.exporter.checkpoints.spec import (
    PLACEHOLDER_ID,
    DecoderSpec,
    ModelSpec,
    check_kind,
    check_shares,
    check_sizes,
)
from lvlm_edge.exporter.planning import Attention, Capacity, Family, GraphSpec, Plan, PlanError, Product, Tensors, Work
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.errors import UnsupportedError
from lvlm_edge.runtime.pictures.image import Preprocessing
from lvlm_edge.runtime.pictures.layout import Picture, Run
from lvlm_edge.runtime.pictures.views import Canvas, Views

if TYPE_CHECKING:
    from torch import Tensor

TABLE = 16  # rows and columns of the encoder's table of positions, and of the resampler's queries
HEAD = 128  # size of the resampler's heads
PARTS = ("q_proj", "k_proj", "v_proj")  # of a fused tensor, in order
AROUND, IMAGE = ("<img>", "</img>"), "<imgpad>"

# What a field that config.json leaves out means.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "kv_channels": 128,
    "intermediate_size": 22016, "vocab_size": 151936, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000,
    "rotary_pct": 1.0, "seq_length": 2048, "max_position_embeddings": 8192, "no_bias": True,
    "tie_word_embeddings": False, "use_dynamic_ntk": True, "use_logn_attn": True,
}  # fmt: skip

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% set seen = namespace(pictures=0) %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set seen.pictures = seen.pictures + 1 %}"
    "{{ 'Picture ' ~ seen.pictures ~ ':<imgpad>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_NAMES = (
    (r"^transformer\.wte\.", "embed."),
    (r"^transformer\.ln_f\.", "norm."),
    (r"^transformer\.visual\.attn_pool\.attn\.in_proj_(weight|bias)$", r"projector.in_proj.\1"),
    (r"^transformer\.visual\.attn_pool\.(attn\.)?", "projector."),
    (r"^transformer\.visual\.(ln_post\.|proj$)", r"projector.\1"),
    (r"^transformer\.visual\.conv1\.", "vision.patch_embedding."),
    (r"^transformer\.visual\.positional_embedding$", "vision.positions"),
    (r"^transformer\.visual\.(transformer\.)?resblocks\.", "vision.layers."),
    (r"^transformer\.visual\.", "vision."),
    (r"^(vision\.layers\.\d+)\.(attn|mlp)\.", r"\1."),
    (r"^transformer\.h\.(\d+)\.ln_1\.", r"layers.\1.input_layernorm."),
    (r"^transformer\.h\.(\d+)\.ln_2\.", r"layers.\1.post_attention_layernorm."),
    (r"^transformer\.h\.(\d+)\.attn\.c_proj\.", r"layers.\1.o_proj."),
    (r"^transformer\.h\.(\d+)\.attn\.c_attn\.", r"layers.\1.c_attn."),
    (r"^transformer\.h\.(\d+)\.mlp\.w1\.", r"layers.\1.up_proj."),
    (r"^transformer\.h\.(\d+)\.mlp\.w2\.", r"layers.\1.gate_proj."),
    (r"^transformer\.h\.(\d+)\.mlp\.c_proj\.", r"layers.\1.down_proj."),
)
_UNUSED = re.compile(r"(rotary_emb\.inv_freq|attn\.(bias|masked_bias)|logn_tensor)$")


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """Encoder and resampler.

    Attributes:
        joined: the resampler has a matrix from the encoder's width to its own.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    image_size: int
    patch: int
    output: int
    joined: bool

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch


def read(of: Checkpoint) -> ModelSpec[VisionSpec]:
    """The spec from config.json.

    Raises:
        UnsupportedError: a model without an encoder, or a decoder with parts that are not known.
        CheckpointError: fields that are not valid or contradict each other.
    """
    full, path = {**DEFAULTS, **of.config}, of.folder / "config.json"
    seen = full.get("visual")
    if not isinstance(seen, dict):
        raise UnsupportedError("qwen: config.json has no visual, so this is a language model alone; give Qwen-VL's")
    for name, wanted in (("no_bias", True), ("rotary_pct", 1.0), ("tie_word_embeddings", False)):
        if full[name] != wanted:
            raise UnsupportedError(f"qwen: {name} is {full[name]!r}, not supported; expected {wanted!r}")
    try:
        vision = VisionSpec(
            layers=seen["layers"],
            hidden=seen["width"],
            heads=seen["heads"],
            ffn=int(seen["width"] * seen["mlp_ratio"]),
            image_size=seen["image_size"],
            patch=seen["patch_size"],
            output=seen["output_dim"],
            joined=seen["width"] != seen["output_dim"],
        )
        image = text.encoded(of.folder, IMAGE) or (PLACEHOLDER_ID,)
        spec = ModelSpec(family="qwen", vision=vision, decoder=_decoder(full), image_token_id=image[0])
    except KeyError as error:
        raise CheckpointError(f"{path}: visual has no {error.args[0]}; restore the file") from error
    except (TypeError, ValueError) as error:  # sums with a field that is no number
        raise CheckpointError(f"{path}: a field has a value of the wrong kind ({error}); correct it") from error
    _check(spec, full, path)
    return spec


def _decoder(full: Mapping[str, Any]) -> DecoderSpec:
    """The decoder. Dynamic NTK and log-n scaling change nothing up to `seq_length` positions, where a plan ends."""
    trained = full["seq_length"] if full["use_dynamic_ntk"] or full["use_logn_attn"] else math.inf
    most = min(trained, full["max_position_embeddings"])
    return DecoderSpec(
        layers=full["num_hidden_layers"],
        hidden=full["hidden_size"],
        heads=full["num_attention_heads"],
        kv_heads=full["num_attention_heads"],
        head_dim=full["kv_channels"],
        ffn=full["intermediate_size"] // 2,
        vocab=full["vocab_size"],
        eps=full["layer_norm_epsilon"],
        mlp_act="silu",
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        tied=False,
        window=None,
        max_positions=most,
        rope={
            "rope_parameters": {"rope_type": "default", "rope_theta": full["rotary_emb_base"]},
            "max_position_embeddings": most,
        },
    )


def _check(spec: ModelSpec[VisionSpec], full: Mapping[str, Any], path: Path) -> None:
    v, d = spec.vision, spec.decoder
    names = ("layers", "hidden", "heads", "ffn", "image_size", "patch", "output")
    check_sizes(path, "visual", {name: getattr(v, name) for name in names})
    check_kind(path, "rotary_emb_base", full["rotary_emb_base"], float)
    check_shares(path, "visual's width by heads", v.hidden, v.heads)
    check_shares(path, "visual's output_dim by 128", v.output, HEAD)
    for name, found, wanted in (
        ("visual's output_dim", v.output, d.hidden),
        ("kv_channels times num_attention_heads", d.head_dim * d.heads, d.hidden),
        ("patches that fit into an image, at least one", min(v.grid, 1), 1),
    ):
        if found != wanted:
            raise CheckpointError(f"{path}: {name} is {found}, expected {wanted}; correct it")


def chat_template(of: Checkpoint) -> str:
    """The published conversation format."""
    return CHAT_TEMPLATE


def pictures(of: Checkpoint, spec: ModelSpec[VisionSpec], capacity: Capacity) -> tuple[Picture, ...]:
    """The whole picture, stretched to a square, as 256 visual tokens between `<img>` and `</img>`.

    Raises:
        PlanError: tiles are asked for.
    """
    if capacity.grid is not None:
        raise PlanError("qwen: every picture is stretched to one square; leave out --grid")
    side = spec.vision.image_size
    how = Preprocessing(resize_to=(side, side), width_first=True, rescale=1 / 255, mean=CLIP_MEAN, std=CLIP_STD)
    before, behind = (Run(kind="text", rows=1, ids=text.encoded(of.folder, token) or ()) for token in AROUND)
    visual = Run(kind="visual", rows=TABLE**2)  # of which none stands for a place
    views = Views(canvas=Canvas(size=(side, side)), how=how)
    one = Picture(token_id=spec.image_token_id, graphs=("vision",), views=views, runs=(before, visual, behind))
    return (one,) * capacity.num_images


def work(spec: ModelSpec[VisionSpec], picture: Picture) -> tuple[Work, Work]:
    """Products of the encoder and of the resampler, per view."""
    v, n, queries = spec.vision, spec.vision.grid**2, TABLE**2
    layer = (
        Product(v.hidden, v.hidden, n, 4 * v.layers),
        Product(v.hidden, v.ffn, n, v.layers),
        Product(v.ffn, v.hidden, n, v.layers),
        Attention(n, n, v.heads, v.hidden // v.heads, v.layers),
    )
    patches = Product(3 * v.patch**2, v.hidden, n, matrix=False)
    vectors = v.layers * (9 * v.hidden + v.ffn) + (2 + n) * v.hidden
    wide = max(3 * v.hidden, 2 * v.ffn)
    spare = (queries - n) * v.hidden  # of the table, which graphs have at their own number of patches
    encoder = Work((patches, *layer), vectors, layers=v.layers, hidden=v.hidden, wide=wide, rows=n, folded=spare)
    steps: tuple[Product | Attention, ...] = (Product(v.hidden, v.output, n),) if v.joined else ()
    steps += (
        Product(v.output, v.output, n, 2),
        Product(v.output, v.output, queries, 2),
        Product(v.output, v.output, queries, matrix=False),
        Attention(queries, n, v.output // HEAD, HEAD),
    )
    ends = (6 + 4) * v.output + (2 * queries + n) * v.output  # norms and biases, queries and tables
    own = -n * v.output  # the keys' table is made of the queries'
    return encoder, Work(steps, ends, layers=1, hidden=v.output, rows=n, folded=own)


def weights(of: Checkpoint, spec: ModelSpec[VisionSpec], pictures: tuple[Picture, ...]) -> dict[str, Source]:
    """Tensors by their names in `Parts`: queries, keys and values apart, tables at the number of patches."""
    found, v = renamed(integers.index(of), rename, of.folder), spec.vision
    for name in list(found):
        if re.match(r"vision\.layers\.\d+\.in_proj\.", name):
            found |= _interleaved(name, found.pop(name), v, of.folder)
        elif re.match(r"layers\.\d+\.c_attn\.", name):
            found |= apart(found, name, "c_attn", dict.fromkeys(PARTS, spec.decoder.hidden))
        elif name.startswith("projector.in_proj."):
            found |= apart(found, name, "in_proj", dict.fromkeys(PARTS, v.output))
    for source, name, width in (
        ("vision.positions", "vision.positions", v.hidden),
        ("projector.pos_embed", "projector.key_positions", v.output),
    ):
        table = found.get(source)
        if table is not None:
            if table.shape != (TABLE**2, width):
                raise CheckpointError(
                    f"{of.folder}: {table.key} is {list(table.shape)}, config.json says {[TABLE**2, width]}; correct it"
                )
            make = partial(resampled, table, v.grid)
            found[name] = Derived(table.file, table.key, (v.grid**2, width), "float32", make)
    return found


def _interleaved(name: str, fused: Source, v: VisionSpec, folder: Path) -> dict[str, Source]:
    """The encoder's in_proj: for every head its rows of queries, then of keys, then of values.

    Raises:
        CheckpointError: another number of rows than config.json says.
    """
    if not fused.shape or fused.shape[0] != 3 * v.hidden:
        raise CheckpointError(
            f"{folder}: {fused.key} is {list(fused.shape)}, config.json says {3 * v.hidden} rows; correct it"
        )
    rest = fused.shape[1:]

    def part(index: int) -> Tensor:
        rows = fused.read().reshape(v.heads, 3, -1, *rest)[:, index]
        return rows.reshape(-1, *rest).contiguous()

    return {
        name.replace("in_proj", own): Derived(fused.file, fused.key, (v.hidden, *rest), fused.dtype, partial(part, i))
        for i, own in enumerate(PARTS)
    }


def resampled(table: Source, grid: int) -> Tensor:
    """A table [256, E] of 16 x 16 places at grid x grid, bicubic with half-pixel centres, float32."""
    import torch.nn.functional as F

    whole = table.read().float()
    if grid == TABLE:
        return whole
    square = whole.reshape(1, TABLE, TABLE, -1).permute(0, 3, 1, 2)
    found = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return found.permute(0, 2, 3, 1).reshape(grid**2, -1).contiguous()


def rename(key: str) -> str:
    """A checkpoint's tensor name as the name it has in `Parts`."""
    for pattern, to in _NAMES:
        key = re.sub(pattern, to, key)
    return key


def unused(name: str) -> bool:
    """Whether a (renamed) tensor may be there without being read: buffers."""
    return bool(_UNUSED.search(name))


def extend(parts: Any, plan: Plan) -> None:
    """Give the parts the encoder and the resampler."""
    from lvlm_edge.exporter.families import _qwen_vl_modules as modules

    parts.vision = modules.Encoder(plan.spec.vision, plan.vision_lowering)
    parts.projector = modules.Resampler(plan.spec.vision, plan.vision_lowering)


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """`vision`: pixel_values to the encoder's features and the resampler's rows."""
    v: VisionSpec = plan.spec.vision
    pixels = TensorInfo("pixel_values", plan.vision_dtype, (1, 3, v.image_size, v.image_size))
    features = TensorInfo("image_features", plan.vision_dtype, (1, v.grid**2, v.hidden))
    embeds = TensorInfo("image_embeds", plan.dtype, (1, TABLE**2, v.output))
    return (GraphSpec(name="vision", role="image", inputs=(pixels,), outputs=(features, embeds), body=_vision),)


def _vision(parts: Any, plan: Plan, inputs: Tensors) -> Tensors:
    features = parts.vision(inputs["pixel_values"])
    return {"image_features": features, "image_embeds": parts.projector(features).to(parts.lm_head.weight.dtype)}


FAMILY = Family(
    name="qwen",
    vision=VisionSpec,
    read=read,
    pictures=pictures,
    work=work,
    weights=weights,
    rename=rename,
    unused=unused,
    extend=extend,
    graphs=graphs,
    chat_template=chat_template,
    own_template=False,
)

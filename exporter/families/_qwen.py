"""What the Qwen-VL line shares: any rectangle, four patches merged to a visual token, positions of three axes.

Sources: `modeling_qwen2_vl.py`, `modeling_qwen2_5_vl.py`, `modeling_qwen3_vl.py` and the Pillow-backed
`image_processing_qwen2_vl` of transformers 5.23; Qwen2-VL (arXiv:2409.12191).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lvlm_edge.exporter.checkpoints import configs, integers, preprocess
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError, Derived, Source, apart, renamed
from lvlm_edge.exporter.checkpoints.spec import DecoderSpec, ModelSpec, check_kind, check_shares, check_sizes
from lvlm_edge.exporter.planning import Attention, Capacity, GraphSpec, Plan, PlanError, Product, Tensors, Work
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.errors import InputError, UnsupportedError, nearest
from lvlm_edge.runtime.pictures.image import Preprocessing
from lvlm_edge.runtime.pictures.layout import Picture, Run
from lvlm_edge.runtime.pictures.views import Canvas, Views, multiple

if TYPE_CHECKING:
    from torch import Tensor

MERGE = 2  # patches along each side of a visual token
THETA = 10000.0  # of the encoder's rotary embedding
EPS = 1e-6  # of the encoder's and the mergers' norms, which no config names
PIXELS = (3136, 1003520)  # least and most pixels of a picture where preprocessor_config.json has none
PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")

SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """The encoder.

    Attributes:
        layers: depth.
        hidden: width.
        patch: side of a patch in pixels.
        mlp_act: activation of the blocks; the mergers have GELU.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    patch: int
    mlp_act: str

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def factor(self) -> int:
        """Side of a visual token in pixels."""
        return MERGE * self.patch


# config.json


def parts_of(of: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """The decoder's fields and the encoder's, whether config.json nests the decoder's or has them at its root."""
    seen, nested = of.config.get("vision_config") or {}, of.config.get("text_config")
    text = nested or {key: value for key, value in of.config.items() if not key.endswith("_config")}
    return text, seen


def decoder(of: Checkpoint, family: str, kind: str, defaults: Mapping[str, Any]) -> DecoderSpec:
    """The decoder.

    Args:
        kind: of decoder, see `configs.KINDS`.
        defaults: what a field that config.json leaves out means.

    Raises:
        UnsupportedError: layers of an unknown kind, or another rotary embedding than the one with three sections.
        CheckpointError: rotary parameters or a window of the wrong kind.
    """
    given, _ = parts_of(of)
    text = {**defaults, **given, "model_type": kind, "use_sliding_window": given.get("use_sliding_window") or False}
    if kind == "qwen2":
        text["head_dim"] = None  # these configs have no such field
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"config.json: rope_scaling is {type(rope).__name__}, expected an object; correct it")
    word = rope.get("rope_type", rope.get("type", "default"))
    if word not in ("default", "mrope"):
        raise UnsupportedError(
            f"{family}: rope_type is {word!r} together with mrope_section, which is not supported; expected mrope or "
            "default"
        )
    sections = rope.get("mrope_section", defaults["mrope_section"])
    if not isinstance(sections, list | tuple) or len(sections) != 3 or any(type(n) is not int for n in sections):
        raise CheckpointError(f"config.json: mrope_section is {sections!r}, expected three whole numbers; correct it")
    theta = rope.get("rope_theta", text.get("rope_theta"))
    tied = bool(of.config.get("tie_word_embeddings") or given.get("tie_word_embeddings"))
    plain = {"rope_type": "default", "rope_theta": theta}
    text = {**text, "rope_parameters": plain, "tie_word_embeddings": tied}
    return configs.decoder(family, text, tied=tied, sections=tuple(sections), interleaved=kind == "qwen3")


def image_token(of: Checkpoint, default: int) -> int:
    return int(of.config.get("image_token_id", default))


def check(v: VisionSpec, path: Path, output: int, hidden: int) -> None:
    """Raise CheckpointError unless the encoder's fields are of their kind and fit the decoder."""
    check_kind(path, "vision_config's hidden_act", v.mlp_act, str)
    check_sizes(path, "vision_config", {n: getattr(v, n) for n in ("layers", "hidden", "heads", "ffn", "patch")})
    check_shares(path, "vision hidden size by heads", v.hidden, v.heads)
    check_shares(path, "vision head size by 4", v.head_dim, 4)
    if output != hidden:
        raise CheckpointError(
            f"{path}: the vision encoder's output has {output} channels, the decoder {hidden}; correct vision_config"
        )


def check_merge(seen: Mapping[str, Any], family: str) -> None:
    """Raise UnsupportedError for another merging of patches than 2 x 2, of two frames."""
    for name, wanted in (("spatial_merge_size", MERGE), ("temporal_patch_size", 2), ("in_channels", 3)):
        found = seen.get(name, wanted)
        if found != wanted:
            raise UnsupportedError(f"{family}: vision_config.{name} is {found!r}, not supported; expected {wanted}")


# Pictures.


def preprocessing(of: Checkpoint, factor: int) -> tuple[Preprocessing, tuple[int, int]]:
    """Steps of the image processor without their sizes, and the least and most pixels of a picture.

    Raises:
        UnsupportedError: another image processor.
        CheckpointError: values that make no picture.
    """
    name = "preprocessor_config.json"
    given = of.json(name)
    if not given:
        name = "processor_config.json"
        given = of.json(name).get("image_processor") or {}
    where = of.folder / name
    kind = given.get("image_processor_type", PROCESSORS[0])
    if kind not in PROCESSORS:
        raise UnsupportedError(f"{where}: image_processor_type is {kind!r}; {nearest(str(kind), PROCESSORS)}")
    side = given.get("patch_size", factor // MERGE) * given.get("merge_size", MERGE)
    if side != factor:
        raise CheckpointError(f"{where}: makes visual tokens of {side} pixels, config.json of {factor}; correct it")
    for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if given.get(step, True) is not True:
            raise UnsupportedError(f"{where}: {step} is {given[step]!r}, not supported; expected true")
    size = given.get("size") or {}
    bounds = []
    for least, edge, default in (
        ("min_pixels", "shortest_edge", PIXELS[0]),
        ("max_pixels", "longest_edge", PIXELS[1]),
    ):
        found = next((v for v in (given.get(least), size.get(edge), size.get(least)) if v is not None), default)
        if type(found) is not int or found < 1:
            raise CheckpointError(f"{where}: {least} is {found!r}, expected a whole number above 0; correct it")
        bounds.append(found)
    mean, std = (
        preprocess.channels(key, given.get(key, default))
        for key, default in (("image_mean", preprocess.CLIP_MEAN), ("image_std", preprocess.CLIP_STD))
    )
    how = Preprocessing(
        resize_to=(factor, factor),
        resample=preprocess.resampling(given.get("resample", 3)),
        rescale=float(given.get("rescale_factor", 1 / 255)),
        mean=mean,
        std=std,
    )
    if not all(map(math.isfinite, (how.rescale or 0, *mean, *std))) or 0 in std:
        raise CheckpointError(f"{where}: mean, std and rescale_factor make no finite picture; correct the file")
    return how, (bounds[0], bounds[1])


def pictures(of: Checkpoint, spec: ModelSpec[Any], capacity: Capacity) -> tuple[Picture, ...]:
    """Each image resized to the nearest canvas of whole visual tokens; one graph for each canvas.

    Raises:
        PlanError: no size, or one that no picture may have.
    """
    if capacity.grid is not None:
        raise PlanError(f"{spec.family}: has no any-resolution tiles; give --image-size instead of --grid")
    if not capacity.image_size:
        raise PlanError(
            f"{spec.family}: the number of visual tokens depends on the size of the picture; give --image-size WxH"
        )
    factor = spec.vision.factor
    how, bounds = preprocessing(of, factor)
    sizes = [size for size in capacity.sizes if size is not None]
    try:
        canvases = [multiple(size, factor, bounds) for size in sizes]
    except InputError as error:
        raise PlanError(f"plan: --image-size: {error}") from error
    distinct = list(dict.fromkeys(canvases))
    found = []
    for width, height in canvases:
        graph = names(distinct)[distinct.index((width, height))]
        grid = (height // factor, width // factor)
        canvas = Canvas(size=(width, height), rule="multiple", factor=factor, pixels=bounds)
        found.append(
            Picture(
                token_id=spec.image_token_id,
                graphs=(graph,),
                views=Views(canvas=canvas, how=replace(how, resize_to=(height, width))),
                runs=(Run(kind="visual", rows=math.prod(grid), grid=grid),),
            )
        )
    return tuple(found)


def names(canvases: Sequence[tuple[int, int]]) -> list[str]:
    """Names of the image graphs of distinct canvases."""
    return ["vision"] if len(canvases) == 1 else [f"vision.{i}" for i in range(len(canvases))]


def grid_of(picture: Picture) -> tuple[int, int]:
    """(rows, columns) of a picture's visual tokens."""
    grid = picture.runs[0].grid
    assert grid is not None
    return grid


def by_graph(plan: Plan) -> dict[str, Picture]:
    """A picture of each canvas, by the name of its graph."""
    return {picture.graphs[0]: picture for picture in reversed(plan.pictures)}


@dataclass(frozen=True)
class Windows:
    """Segments of attention.

    Attributes:
        order: cells (visual tokens, row-major) in the order in which the encoder has them: window after window.
        groups: (windows, cells of each) of windows that follow each other and have one size.
    """

    order: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]


def work(
    spec: ModelSpec[Any],
    picture: Picture,
    *,
    gated: bool = False,
    windows: Windows | None = None,
    full: int | None = None,
    mergers: int = 0,
    table: int = 0,
) -> tuple[Work, Work]:
    """Products of the encoder and of the mergers; the patch embedding on one frame.

    Args:
        gated: the MLP has a gate, and norms have no bias.
        windows: of the layers that are not full; None where all are.
        full: layers of full attention; None for all.
        mergers: of features that are injected into the decoder.
        table: rows of a learnt table of positions; with one, the patch embedding has a bias.
    """
    v, d, tokens = spec.vision, spec.decoder.hidden, picture.visual_tokens
    rows, wide = tokens * MERGE**2, v.hidden * MERGE**2
    full = v.layers if full is None else full
    segments = [(1, rows, full)] + [
        (n, cells * MERGE**2, v.layers - full) for n, cells in (windows.groups if windows else ())
    ]
    patch = 3 * v.patch**2 * v.hidden
    encoder: tuple[Product | Attention, ...] = (
        Product(3 * v.patch**2, v.hidden, rows, matrix=False),
        Product(v.hidden, v.hidden, rows, 4 * v.layers),
        Product(v.hidden, v.ffn, rows, (2 if gated else 1) * v.layers),
        Product(v.ffn, v.hidden, rows, v.layers),
        *(Attention(size, size, v.heads, v.head_dim, count * layers) for count, size, layers in segments if layers),
    )
    merger = (Product(wide, wide, tokens, 1 + mergers), Product(wide, d, tokens, 1 + mergers))
    norm = 1 if gated else 2
    vectors = v.layers * ((4 + 2 * norm + 1) * v.hidden + (2 if gated else 1) * v.ffn)
    vectors += (rows * v.hidden + v.hidden) if table else 0
    ends = norm * v.hidden + wide + d + mergers * (2 * wide + wide + d)
    held = max(3 * v.hidden, (3 if gated else 2) * v.ffn)
    folded = patch + (table - rows) * v.hidden if table else patch
    return (
        Work(encoder, vectors, layers=v.layers, hidden=v.hidden, wide=held, rows=rows, folded=folded),
        Work(merger, ends, layers=1, hidden=wide, rows=tokens),
    )


# Weights.

_NAMES = (
    (r"^model\.visual\.", "visual."),
    (r"^model\.language_model\.", "model."),
    (r"^model\.embed_tokens\.", "embed."),
    (r"^model\.", ""),
    (r"^visual\.patch_embed\.proj\.", "vision.patch."),
    (r"^visual\.merger\.(ln_q|norm)\.", "projector.norm."),
    (r"^visual\.merger\.(mlp\.0|linear_fc1)\.", "projector.linear_1."),
    (r"^visual\.merger\.(mlp\.2|linear_fc2)\.", "projector.linear_2."),
    (r"^visual\.deepstack_merger_list\.(\d+)\.norm\.", r"projector.deepstack.\1.norm."),
    (r"^visual\.deepstack_merger_list\.(\d+)\.linear_fc1\.", r"projector.deepstack.\1.linear_1."),
    (r"^visual\.deepstack_merger_list\.(\d+)\.linear_fc2\.", r"projector.deepstack.\1.linear_2."),
    (r"^visual\.pos_embed\.", "vision.table."),
    (r"^visual\.blocks\.", "vision.blocks."),
    (r"(?<=\.)mlp\.linear_fc", "mlp.fc"),
    (r"(?<=\.)(self_attn|attn)\.", ""),
    (r"^(layers\.\d+\.)mlp\.", r"\1"),
)
_UNUSED = re.compile(r"rotary_emb\.inv_freq$|^rotary_pos_emb\.")


def rename(key: str) -> str:
    """A checkpoint's tensor name as the name it has in `Parts`; both layouts, old and new."""
    for pattern, to in _NAMES:
        key = re.sub(pattern, to, key)
    return key


def unused(name: str) -> bool:
    """Whether a (renamed) tensor may be there without being read: buffers."""
    return bool(_UNUSED.search(name))


def weights(of: Checkpoint, spec: ModelSpec[Any], pictures: tuple[Picture, ...]) -> dict[str, Source]:
    """Tensors by their names in `Parts`: the patch embedding's two frames folded to one, q, k and v apart."""
    stored: Mapping[str, Source] = integers.index(of)
    found = renamed(stored, rename, of.folder)
    patch = found.get("vision.patch.weight")
    if patch is not None:
        found["vision.patch.weight"] = _folded(patch, of.folder)
    for name in [name for name in found if re.match(r"vision\.blocks\.\d+\.qkv\.", name)]:
        found |= apart(found, name, "qkv", dict.fromkeys("qkv", spec.vision.hidden))
    return found


def _folded(patch: Source, folder: Path) -> Source:
    """The patch embedding [E, 3, p, p] of pictures, whose two frames are equal: the sum of both, in float32."""
    if len(patch.shape) != 5 or patch.shape[2] != 2:
        raise CheckpointError(
            f"{folder}: {patch.key} is {list(patch.shape)}, expected [width, 3, 2, patch, patch]; correct config.json"
        )
    shape = (*patch.shape[:2], *patch.shape[3:])
    return Derived(patch.file, patch.key, shape, "float32", lambda: patch.read().float().sum(2))


# Constants of a grid of (rows, columns) visual tokens. Patches stand in merge order: those of a visual token together.


def patches(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """(row, column) of every patch, in merge order."""
    return [
        (MERGE * row + i, MERGE * column + j)
        for row in range(grid[0])
        for column in range(grid[1])
        for i in range(MERGE)
        for j in range(MERGE)
    ]


def angles(v: VisionSpec, grid: tuple[int, int]) -> NDArray[np.float32]:
    """Rotary angles of patches in merge order, [patches, e / 2]: rows turn the first half, columns the second.

    Source: `VisionRotaryEmbedding` of Qwen2-VL.
    """
    half = v.head_dim // 2
    frequencies = np.float32(1) / np.float32(THETA) ** (np.arange(0, half, 2, dtype=np.float32) / np.float32(half))
    at = np.array(patches(grid), np.float32)
    return np.concatenate([at[:, :1] * frequencies, at[:, 1:] * frequencies], 1).astype(np.float32)


# Graphs.


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """`vision` of each canvas: pixel_values to rows in row-major order of the visual tokens, and what is injected."""
    made = []
    for name, picture in by_graph(plan).items():
        (rows, columns), factor, hidden = grid_of(picture), plan.spec.vision.factor, plan.spec.decoder.hidden
        pixels = TensorInfo("pixel_values", plan.vision_dtype, (1, 3, rows * factor, columns * factor))
        seen = TensorInfo("image_features", plan.vision_dtype, (1, rows * columns * MERGE**2, plan.spec.vision.hidden))
        outputs = [
            TensorInfo(output, plan.dtype, (1, rows * columns, hidden)) for output in ("image_embeds", *plan.injected)
        ]
        body = partial(_vision, grid=(rows, columns))
        made.append(GraphSpec(name=name, role="image", inputs=(pixels,), outputs=(seen, *outputs), body=body))
    return tuple(made)


def _vision(parts: Any, plan: Plan, inputs: Tensors, *, grid: tuple[int, int]) -> Tensors:
    features, injected = parts.vision(inputs["pixel_values"], grid)
    embeds, *others = parts.projector(features, injected)
    dtype = parts.lm_head.weight.dtype
    rows: list[Tensor] = [embeds, *others]
    found = dict(zip(("image_embeds", *plan.injected), (row.to(dtype) for row in rows), strict=True))
    return {"image_features": features, **found}


CHAT_TEMPLATE = (
    "{% for message in messages %}__SYSTEM__<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_template(*, system: bool) -> str:
    """The published conversation format; `system`: with a default system message."""
    return CHAT_TEMPLATE.replace("__SYSTEM__", SYSTEM if system else "")

"""SmolVLM and SmolVLM2 in Hugging Face hub layout (`model_type: smolvlm`): tiles as rows of text and visual tokens.

Sources: `modeling_smolvlm.py`, `processing_smolvlm.py` and `image_processing_pil_smolvlm.py` of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_edge.exporter.checkpoints import configs, encoders, integers, preprocess, text
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError, Source, renamed
from lvlm_edge.exporter.checkpoints.encoders import EncoderSpec
from lvlm_edge.exporter.checkpoints.preprocess import HALF
from lvlm_edge.exporter.checkpoints.spec import ModelSpec, check_shares, check_sizes
from lvlm_edge.exporter.families import _llava
from lvlm_edge.exporter.planning import Capacity, Family, GraphSpec, Plan, PlanError, Product, Tensors, Work
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.errors import UnsupportedError
from lvlm_edge.runtime.pictures.layout import Picture, Run
from lvlm_edge.runtime.pictures.views import Canvas, Views, canvas_of

DECODERS = ("llama", "mistral", "qwen2")
VISIONS = ("smolvlm_vision", "idefics3_vision", "smolvlm", "idefics3", "siglip_vision_model")

# What a field that config.json or preprocessor_config.json leaves out means.
DEFAULTS: dict[str, Any] = {
    "image_token_id": 128257, "scale_factor": 2, "tie_word_embeddings": False,
    "text_config": {"model_type": "llama", "rms_norm_eps": 1e-5}, "vision_config": {},
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
_PROCESSOR: dict[str, Any] = {
    "resample": 1, "image_mean": HALF, "image_std": HALF, "size": {"longest_edge": 1456},
    "max_image_size": {"longest_edge": 364}, "do_image_splitting": True,
}  # fmt: skip
PROCESSORS = {"SmolVLMImageProcessor": _PROCESSOR, "Idefics3ImageProcessor": _PROCESSOR}
RELEASED = (26, 27, 32)  # patches of a side, whose tables are plain on every machine
LARGEST = 4096  # pixels of the longer side that pictures are resized to

_NAMES = (
    (r"^model\.text_model\.embed_tokens\.", "embed."),
    (r"^model\.text_model\.", ""),
    (r"^model\.vision_model\.", "vision."),
    (r"^model\.connector\.modality_projection\.proj\.", "projector.proj."),
    (r"(?<=\.)(self_attn|mlp)\.", ""),
    (r"^vision\.(embeddings|encoder)\.", "vision."),
)
_UNUSED = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """Encoder and projector.

    Attributes:
        merge: patches along each side of a visual token.
    """

    encoder: EncoderSpec
    merge: int

    @property
    def cells(self) -> int:
        """Visual tokens per side of a view."""
        return self.encoder.grid // self.merge


def read(of: Checkpoint, family: str = "smolvlm") -> ModelSpec[VisionSpec]:
    """The spec from config.json; fields it leaves out take the defaults of transformers' config classes.

    Raises:
        UnsupportedError: an encoder, decoder, RoPE or activation that is not known.
        CheckpointError: fields that are not valid or contradict each other.
    """
    full, where = {**DEFAULTS, **of.config}, of.folder / "config.json"
    seen = full["vision_config"] or {}
    kind = seen.get("model_type", VISIONS[0])
    if kind not in VISIONS:
        raise UnsupportedError(f"{family}: vision_config.model_type is {kind!r}; expected {' or '.join(VISIONS[:2])}")
    seen = {**ENCODER, **seen, "model_type": "siglip_vision_model"}
    spoken = configs.completed(f"{family}: text_config", full["text_config"] or DEFAULTS["text_config"], DECODERS)
    try:
        encoder = encoders.read(seen, -1, drop_first=False, post_norm=True)
        vision = VisionSpec(encoder=encoder, merge=full["scale_factor"])
        spec = ModelSpec(
            family=family,
            vision=vision,
            decoder=configs.decoder(family, spoken, tied=bool(full["tie_word_embeddings"])),
            image_token_id=full["image_token_id"],
        )
        encoders.check(encoder, where)
        check_sizes(where, "config", {"scale_factor": vision.merge})
        check_shares(where, "patches of a side by scale_factor", encoder.grid, vision.merge)
    except TypeError as error:  # sums with a field that is no number
        raise CheckpointError(f"config.json: a field has a value of the wrong kind ({error}); correct it") from error
    if not has_plain_table(encoder.grid):
        raise UnsupportedError(
            f"{family}: encoders of {encoder.grid} patches a side look positions up by rounded fractions, which differ "
            "between machines; use a checkpoint of 26, 27 or 32 patches a side"
        )
    return spec


def has_plain_table(grid: int) -> bool:
    """Whether patch i of a side has row i of the table: stock looks up the bucket of i's fraction of the side."""
    if grid in RELEASED:
        return True
    import torch

    fractions = (torch.arange(grid, dtype=torch.float32) * (1.0 / torch.tensor(grid))).clamp(max=1 - 1e-6)
    buckets = torch.bucketize(fractions, torch.arange(1 / grid, 1.0, 1 / grid), right=True)
    return buckets.tolist() == list(range(grid))


def chat_template(of: Checkpoint) -> None:
    """None: the template comes with the checkpoint."""


def pictures(of: Checkpoint, spec: ModelSpec[VisionSpec], capacity: Capacity) -> tuple[Picture, ...]:
    """Tiles row by row and the whole picture behind them, with the text that stands between.

    Raises:
        PlanError: no size and no grid, or a grid that no picture has.
        CheckpointError: a processor file is missing, or makes no input of the encoder.
        UnsupportedError: another image processor, or steps that are not known.
    """
    where, values = preprocess.of_processor(of.folder, PROCESSORS)
    side, cells = spec.vision.encoder.image_size, spec.vision.cells
    longest = _edge(where, "size", values["size"])
    if _edge(where, "max_image_size", values["max_image_size"]) != side:
        raise CheckpointError(
            f"{where}: makes views of {values['max_image_size']}, config.json says {side} pixels; correct it"
        )
    how = preprocess.view(where, values, side)
    split = bool(values["do_image_splitting"])
    found = []
    for size in capacity.sizes:
        canvas = Canvas(size=(side, side), longest=longest)
        if split:
            rule = Canvas(size=(side, side), rule="ceil", factor=side, longest=longest)
            canvas = _canvas(spec.family, size, capacity.grid, rule)
        rows, columns = canvas.size[1] // side, canvas.size[0] // side
        tiles = (rows, columns) if rows * columns > 1 else None
        views = Views(canvas=canvas, tiles=tiles, fit="stretch", whole="last", how=how)
        visual = Run(kind="visual", rows=cells**2, grid=(cells, cells))
        runs = tuple(_runs(of, spec, tiles, visual))
        found.append(Picture(token_id=spec.image_token_id, graphs=("vision",), views=views, runs=runs))
    return tuple(found)


def _edge(where: Path, name: str, given: Any) -> int:
    edge = given.get("longest_edge") if isinstance(given, Mapping) else given
    if type(edge) is not int or not 1 <= edge <= LARGEST:
        raise CheckpointError(f"{where}: {name} is {given!r}, expected a longest_edge of 1..{LARGEST}; correct it")
    return edge


def _canvas(family: str, size: tuple[int, int] | None, grid: tuple[int, int] | None, rule: Canvas) -> Canvas:
    """The canvas of a picture's size, or of a grid of (rows, columns)."""
    if size is None and grid is None:
        raise PlanError(
            f"{family}: the number of visual tokens depends on the shape of the picture; give --image-size WxH, or "
            "--grid RxC"
        )
    asked = size if size is not None or grid is None else (grid[1] * rule.factor, grid[0] * rule.factor)
    assert asked is not None
    found = canvas_of(asked, rule)
    if size is None and found != asked:
        assert grid is not None
        raise PlanError(
            f"plan: --grid is {grid[0]}x{grid[1]}, but the longer side of pictures has "
            f"{max(found) // rule.factor} tiles; give another"
        )
    return Canvas(size=found, rule=rule.rule, factor=rule.factor, longest=rule.longest)


def frame(tiles: tuple[int, int] | None) -> str:
    """The text of a picture, in which `<image>` stands for a view's visual tokens.

    Source: `get_image_prompt_string` of SmolVLM's processor.
    """
    fake = "<fake_token_around_image>"
    rows, columns = tiles or (0, 0)
    found = ""
    for row in range(1, rows + 1):
        found += "".join(f"{fake}<row_{row}_col_{column}><image>" for column in range(1, columns + 1)) + "\n"
    return f"{found}{chr(10) if rows else ''}{fake}<global-img><image>{fake}"


def _runs(of: Checkpoint, spec: ModelSpec[VisionSpec], tiles: tuple[int, int] | None, visual: Run) -> Iterator[Run]:
    """Text and visual tokens in turns; text without ids where the checkpoint has no tokenizer.

    Raises:
        CheckpointError: the tokenizer does not know the image token.
    """
    whole = frame(tiles)
    ids = text.encoded(of.folder, whole)
    if ids is None:
        for i, piece in enumerate(whole.split("<image>")):
            yield from (visual,) * bool(i)
            yield Run(kind="text", rows=len(re.findall(r"<[^>]+>|\n+", piece)))
        return
    at = [-1, *(i for i, token in enumerate(ids) if token == spec.image_token_id), len(ids)]
    if len(at) != whole.count("<image>") + 2:
        raise CheckpointError(
            f"{of.folder}: its tokenizer does not know <image> as token {spec.image_token_id}, as config.json says; "
            "use the tokenizer that belongs to this checkpoint"
        )
    for i in range(len(at) - 1):
        yield from (visual,) * bool(i)
        between = ids[at[i] + 1 : at[i + 1]]
        if between:
            yield Run(kind="text", rows=len(between), ids=between)


def work(spec: ModelSpec[VisionSpec], picture: Picture) -> tuple[Work, Work]:
    """Products of the encoder, per view, and of the projector, per picture."""
    v, d, rows = spec.vision, spec.decoder.hidden, picture.visual_tokens
    product = Product(v.merge**2 * v.encoder.hidden, d, rows)
    return _llava.encoder_work(v.encoder), Work((product,), 0, layers=picture.views.count, hidden=d, rows=rows)


def weights(of: Checkpoint, spec: ModelSpec[VisionSpec], pictures: tuple[Picture, ...]) -> Mapping[str, Source]:
    """Every tensor by its name in `Parts`."""
    return renamed(integers.index(of), rename, of.folder)


def rename(key: str) -> str:
    """A checkpoint's tensor name as the name it has in `Parts`."""
    for pattern, to in _NAMES:
        key = re.sub(pattern, to, key)
    return key


def unused(name: str) -> bool:
    """Whether a (renamed) tensor may be there without being read: buffers."""
    return bool(_UNUSED.search(name))


def extend(parts: Any, plan: Plan) -> None:
    """Give the parts the encoder and the projector."""
    from torch import nn

    from lvlm_edge.exporter.graphs.encoders import Siglip
    from lvlm_edge.exporter.graphs.parts import Linear

    seen: VisionSpec = plan.spec.vision
    parts.vision = Siglip(seen.encoder, plan.vision_lowering)
    parts.projector = nn.Module()
    parts.projector.proj = Linear(seen.merge**2 * seen.encoder.hidden, plan.spec.decoder.hidden)


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """`vision`: pixel_values of one view to cells of patches, and their projection."""
    v: VisionSpec = plan.spec.vision
    pixels = TensorInfo("pixel_values", plan.vision_dtype, (1, 3, v.encoder.image_size, v.encoder.image_size))
    features = TensorInfo("image_features", plan.vision_dtype, (1, v.cells**2, v.merge**2 * v.encoder.hidden))
    embeds = TensorInfo("image_embeds", plan.dtype, (1, v.cells**2, plan.spec.decoder.hidden))
    return (GraphSpec(name="vision", role="image", inputs=(pixels,), outputs=(features, embeds), body=_vision),)


def _vision(parts: Any, plan: Plan, inputs: Tensors) -> Tensors:
    from lvlm_edge.exporter.graphs.encoders import cells_to_channels

    v: VisionSpec = plan.spec.vision
    features = cells_to_channels(parts.vision(inputs["pixel_values"]), v.encoder.grid, v.merge)
    return {"image_features": features, "image_embeds": parts.projector.proj(features).to(parts.lm_head.weight.dtype)}


FAMILY = Family(
    name="smolvlm",
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
    sized=True,
)

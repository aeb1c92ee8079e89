"""LLaVA's original layout (`model_type: llava_llama`), as LLaVA-1.5, YOPO and ProxyV's fork of LLaVA-NeXT write it.

The decoder's fields stand at the top of config.json, and the vision encoder is mostly another checkpoint, named by
`mm_vision_tower`. ProxyV's fork, known by its field `proxyv`, puts a learned vector after the tokens of every crop.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_edge.exporter.checkpoints import checkpoint, configs, encoders, integers, preprocess
from lvlm_edge.exporter.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    Source,
    Stored,
    cut,
    read_json,
    renamed,
)
from lvlm_edge.exporter.checkpoints.encoders import EncoderSpec
from lvlm_edge.exporter.checkpoints.spec import PLACEHOLDER_ID, DecoderSpec, ModelSpec
from lvlm_edge.exporter.checkpoints.templates import TEMPLATES, bracketed
from lvlm_edge.exporter.families import _anyres, _llava
from lvlm_edge.exporter.families._anyres import VisionSpec
from lvlm_edge.exporter.planning import Capacity, Family, GraphSpec, Plan, Work
from lvlm_edge.runtime.errors import UnsupportedError, nearest
from lvlm_edge.runtime.pictures.layout import Picture

ARCHITECTURES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaPhiForCausalLM": "phi3",
    "LlavaPhi3ForCausalLM": "phi3",
    "LlavaQwenForCausalLM": "qwen2",
}
MODEL_TYPES = {"llava_mistral": "mistral", "llava_phi": "phi3", "llava_phi3": "phi3", "llava_qwen": "qwen2"}
CHATS = {"llama": "v1", "mistral": "v1", "phi3": "phi3_instruct", "qwen2": "qwen_1_5"}
LLAMA_3 = 128000  # the first id that Llama 3's vocabulary has and Llama 2's lacks

# Encoders that checkpoints name, so that reading a config needs no network.
_CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16, "patch_size": 14}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {**_CLIP, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP, "image_size": 224},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "patch_size": 14, "image_size": 384,
    },
}  # fmt: skip
_WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # a checkpoint that has a text encoder too

UNPAD = "spatial_unpad"
FITS = {None: "processor", "square": "processor", "pad": "pad", "resize": "resize", "anyres": "resize"}

_NAMES = (
    (r"^model\.vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision."),
    (r"^vision\.(embeddings|encoder)\.", "vision."),
    (r"^model\.mm_projector\.0\.", "projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "projector.linear_2."),
    (r"^model\.embed_tokens\.", "embed."),
    (r"^model\.image_newline$", "projector.newline"),
    (r"^model\.", ""),
    (r"(?<=\.)(self_attn|mlp)\.", ""),
)
_UNUSED = re.compile(
    r"(position_ids|rotary_emb\.inv_freq)$|^vision\.(post_layernorm|head)\.|^vision\.layers\.\d+\.|"
    r"^projector\.newline$|^vision_mlp_layers\.\d+\.(context_proj|input_proj|proj\.[02]|layernorm_post)\.weight$|"
    r"^proxyv_initializer\.(Wk\.weight|proxyv_tokens)$"
)
_FUSED = re.compile(r"^model\.layers\.\d+\.(self_attn\.(qkv)_proj|mlp\.(gate_up)_proj)\.weight$")


def read(of: Checkpoint) -> ModelSpec[VisionSpec]:
    """The spec from config.json, and from that of the vision encoder where it is another checkpoint.

    Raises:
        UnsupportedError: a tower, projector, decoder, RoPE or way of fitting pictures that is not known.
        CheckpointError: fields that are not valid or contradict each other.
    """
    config, folder = of.config, of.folder
    projector = config.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise UnsupportedError(f"llava_llama: mm_projector_type is {projector!r}; known: mlp2x_gelu")
    try:
        kind = decoder_kind(config)
        text = configs.completed("llava_llama: config.json", config, configs.DECODERS, kind)
        encoder, decoder = _vision(config, folder), configs.decoder("llava_llama", text)
        if kind == "phi3" and "proxyv" in config:  # its prefill and decode masks know no window
            decoder = dataclasses.replace(decoder, window=None)
        spec = ModelSpec(
            family="llava_llama",
            vision=VisionSpec(
                encoder=encoder,
                projector_act="gelu",
                projector_bias=True,
                newline="proxyv" in config,
                pinpoints=_pinpoints(config, encoder.image_size),
                most=_most(config),
                unpad="proxyv" not in config and config.get("mm_patch_merge_type") == UNPAD,
                decimals=None,
            ),
            decoder=decoder,
            image_token_id=PLACEHOLDER_ID,
            settings=_settings(config, decoder, folder),
        )
        _agree(config, spec)
        _llava.check(spec, folder / "config.json")
        return spec
    except (TypeError, ZeroDivisionError) as error:  # sums with a field that is no number, or is 0
        raise CheckpointError(f"config.json: a field has a value of the wrong kind ({error}); correct it") from error


def decoder_kind(config: dict[str, Any]) -> str:
    """The decoder, from the name of the model's class or, where that says nothing, from `model_type`."""
    named = [ARCHITECTURES[a] for a in config.get("architectures") or () if a in ARCHITECTURES]
    return named[0] if named else MODEL_TYPES.get(config["model_type"], "llama")


def chat_template(of: Checkpoint) -> str:
    """The published conversation format that belongs to the decoder, or that the config names as `version`.

    Raises:
        CheckpointError: `mm_use_im_start_end`, tokens around every image, is neither true nor false.
    """
    config = of.config
    kind, named = decoder_kind(config), config.get("version")
    name = named if isinstance(named, str) and named in TEMPLATES else CHATS[kind]
    if kind == "llama" and config.get("vocab_size", 0) > LLAMA_3:
        name = "llava_llama_3"
    return bracketed(TEMPLATES[name]) if _flag(config, "mm_use_im_start_end") else TEMPLATES[name]


def pictures(of: Checkpoint, spec: ModelSpec[VisionSpec], capacity: Capacity) -> tuple[Picture, ...]:
    """One crop each, or the base view and the tiles of any-resolution pictures."""
    where, fit = _preprocessing(of.config, of.folder)
    v = spec.vision.encoder
    if spec.vision.unpad and spec.vision.pinpoints:
        return _anyres.pictures(spec, capacity, preprocess.fitted(preprocess.of_folder(where, v), fit, v.image_size))
    return _llava.pictures(of, spec, capacity, where=where, fit=fit)


def work(spec: ModelSpec[VisionSpec], picture: Picture) -> tuple[Work, Work]:
    """Products of the encoder, per view, and of the projector, per picture."""
    return _anyres.work(spec, picture) if spec.vision.unpad else _llava.work(spec, picture)


def extend(parts: Any, plan: Plan) -> None:
    """Give the parts the encoder, the projector and the newline, where there is one."""
    if plan.spec.vision.unpad:
        _anyres.extend(parts, plan)
    else:
        _llava.extend(parts, plan)


def graphs(plan: Plan) -> tuple[GraphSpec, ...]:
    """`vision` per view, and `pack` where views are put together to a map."""
    return _anyres.graphs(plan) if plan.spec.vision.unpad else _llava.graphs(plan)


def _preprocessing(config: dict[str, Any], folder: Path) -> tuple[Path, str]:
    """Where `preprocessor_config.json` is, and how pictures are fitted.

    The encoder's own is taken where the checkpoint has none; those of released encoders are what is taken without one.
    `pad` pads to a square of the mean colour. `resize`, which is also what any-resolution makes of the base view and
    does not keep the picture's shape, resizes to the encoder's square; `processor` leaves it to the image processor.
    """
    fit, name = FITS[_ratio(config)], _encoder_name(config)
    here = _local(name, folder)
    if (folder / "preprocessor_config.json").is_file() or (here is None and _released(name) in ENCODERS):
        return folder, fit
    return here or checkpoint.resolve(name, weights=False), fit


def weights(of: Checkpoint, spec: ModelSpec[VisionSpec], pictures: tuple[Picture, ...]) -> Mapping[str, Source]:
    """Tensors by their names in `Parts`, with those of the encoder's own checkpoint, and Phi-3's fused ones cut up.

    Raises:
        CheckpointError: there are updates of ProxyV for more layers than its config has.
    """
    stored = integers.index(of)
    _check_updates(of.config, of.folder, stored, spec.decoder.layers)
    if not any(name.startswith("model.vision_tower.") for name in stored):
        beside = integers.index(Checkpoint.open(_encoder_folder(of.config, of.folder)))
        whole = any(name.startswith("vision_model.") for name in beside)
        inside = {name: t for name, t in beside.items() if not whole or name.startswith("vision_model.")}
        stored |= {f"model.vision_tower.{name}": t for name, t in inside.items()}
    apart = {name: t for key, tensor in stored.items() for name, t in _cut(key, tensor, spec.decoder).items()}
    found: dict[str, Source] = dict(renamed(apart, rename, of.folder))
    if spec.vision.unpad and "projector.newline" in found:
        found["projector.image_newline"] = found.pop("projector.newline")
    return found


def rename(key: str) -> str:
    """A checkpoint's tensor name as the name it has in `Parts`."""
    for pattern, to in _NAMES:
        key = re.sub(pattern, to, key)
    return key


def unused(name: str) -> bool:
    """Whether a (renamed) tensor may be there without being read: buffers, last tower layers, a method's own."""
    return bool(_UNUSED.search(name))


def _vision(config: dict[str, Any], folder: Path) -> EncoderSpec:
    """The encoder. LLaVA takes SigLIP's last layer off and reads what is left as it is, whatever the config says."""
    given = _encoder_config(config, folder)
    tower = configs.completed("llava_llama: mm_vision_tower", given, encoders.ENCODERS, defaults=encoders.DEFAULTS)
    select = config.get("mm_vision_select_feature", "patch")
    if select not in ("patch", "cls_patch"):
        known = nearest(str(select), ("patch", "cls_patch"))
        raise UnsupportedError(f"llava_llama: mm_vision_select_feature is {select!r}; {known}")
    siglip = tower["model_type"] == "siglip_vision_model"
    layer = -2 if siglip else config.get("mm_vision_select_layer", -2)
    return encoders.read(tower, layer, drop_first=select == "patch" and not siglip, name="mm_vision_select_layer")


def _encoder_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    name = _encoder_name(config)
    here = _local(name, folder)
    if here is None and _released(name) in ENCODERS:
        return ENCODERS[_released(name)]
    if here is None:
        here = checkpoint.resolve(name, weights=False)
    found = read_json(here / "config.json")
    inner = found.get("vision_config")
    if isinstance(inner, dict):
        return {"model_type": _WHOLE.get(str(found.get("model_type"))), **inner}
    return found


def _encoder_folder(config: dict[str, Any], folder: Path) -> Path:
    """The vision encoder's checkpoint: beside the model, anywhere on the disk, or from the Hugging Face hub.

    Raises:
        CheckpointError: it is nowhere.
    """
    name = _encoder_name(config)
    here = _local(name, folder)
    return checkpoint.resolve(_released(name)) if here is None else here


def _encoder_name(config: dict[str, Any]) -> str:
    name = config.get("mm_vision_tower", config.get("vision_tower"))
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"config.json: mm_vision_tower is {name!r}, expected a folder or a name; correct it")
    return name


def _released(name: str) -> str:
    """The hub's name of a released encoder that a config names by where it lay when the model was trained."""
    return next((known for known in ENCODERS if Path(known).name == Path(name).name), name)


def _local(name: str, folder: Path) -> Path | None:
    found = folder / name  # an absolute name stays what it is
    return found if (found / "config.json").is_file() else None


def _ratio(config: dict[str, Any]) -> Any:
    """`image_aspect_ratio`, with `anyres` for `anyres_max_9`."""
    ratio = config.get("image_aspect_ratio")
    return "anyres" if _most(config) is not None else ratio


def _most(config: dict[str, Any]) -> int | None:
    """Tiles whose cells a picture may have."""
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", str(config.get("image_aspect_ratio")))
    return int(found[1]) if found else None


def _pinpoints(config: dict[str, Any], size: int) -> tuple[tuple[int, int], ...]:
    """Canvases of any-resolution pictures, (width, height).

    Raises:
        UnsupportedError: a way of fitting pictures, or of putting tiles together, that is not known.
        CheckpointError: canvases that are not made of whole tiles.
    """
    ratio, merge = _ratio(config), config.get("mm_patch_merge_type", "flat")
    if ratio not in FITS:
        known = nearest(str(ratio), (fit for fit in FITS if fit))
        raise UnsupportedError(f"llava_llama: image_aspect_ratio is {ratio!r}; {known}")
    newline = config.get("mm_newline_position", "one_token")
    if ("proxyv" in config or merge == UNPAD) and newline != "one_token":
        raise UnsupportedError(f"llava_llama: mm_newline_position is {newline!r}; known: one_token")
    if ratio != "anyres":
        if merge == UNPAD and "proxyv" not in config:
            raise UnsupportedError(
                f"llava_llama: tiles are put together as {UNPAD!r}, but image_aspect_ratio is {ratio!r}"
            )
        return ()
    if "proxyv" not in config and merge not in ("flat", UNPAD):
        raise UnsupportedError(
            f"llava_llama: tiles are put together as {merge!r}, which is not supported; known: flat, {UNPAD}, and "
            "ProxyV's way"
        )
    if _most(config) is not None and merge != UNPAD:
        raise UnsupportedError(f"llava_llama: image_aspect_ratio is anyres_max_N with {merge!r}; known: with {UNPAD}")
    given = _pairs(config.get("image_grid_pinpoints"), size)
    if not given or any(type(n) is not int or n < 1 or n % size for pair in given for n in pair):
        raise CheckpointError(
            f"config.json: image_grid_pinpoints is {config.get('image_grid_pinpoints')!r}, expected multiples of "
            f"{size}, the encoder's input; correct it"
        )
    return given


def _pairs(given: Any, size: int) -> tuple[tuple[int, int], ...]:
    """Pairs of width and height: a list, one that is written out, or a range of tiles as `(1x1),...,(6x6)`."""
    if isinstance(given, str) and "x" in given:
        numbers = [int(n) for n in re.findall(r"\d+", given)]
        if len(numbers) < 4:
            return ()
        wide, high = range(numbers[0], numbers[-2] + 1), range(numbers[1], numbers[-1] + 1)
        return tuple((i * size, j * size) for i in wide for j in high)
    try:
        found = ast.literal_eval(given) if isinstance(given, str) else given
        return tuple((width, height) for width, height in found)
    except (SyntaxError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"config.json: image_grid_pinpoints is {given!r}, expected pairs of width and height; correct it"
        ) from error


def _settings(config: dict[str, Any], d: DecoderSpec, folder: Path) -> dict[str, dict[str, Any]]:
    """What the config says of ProxyV and YOPO, by the names of their settings.

    Raises:
        CheckpointError: a field that no checkpoint can have.
    """
    found: dict[str, dict[str, Any]] = {}
    if _flag(config, "proxyv"):
        start = _number(config, "proxyv_start_layer", 0, d.layers - 1)
        updates = _number(config, "num_of_vision_mlp_layers", 0, d.layers)
        if None not in (start, updates) and start + updates != d.layers:
            raise CheckpointError(
                f"config.json: proxyv_start_layer is {start} and num_of_vision_mlp_layers {updates}, but there are "
                f"{d.layers} layers; correct them"
            )
        found["proxyv"] = {
            "start_layer": start,
            "reduce_factor": _number(config, "proxyv_reduce_factor", 1),
            "learn_proxy": _flag(config, "learn_proxy"),
        }
    if config.get("attncut_w") is not None:
        prefix, kept = _number(config, "sprompt_len", 0), _number(config, "headcut_num", 0)
        found["yopo"] = {
            "window": _number(config, "attncut_w", 1),
            "cutoff": _number(config, "layercut_num", 1, d.layers),
            "ffn_ratio": _number(config, "mlpcut_ratio", 1, d.ffn, whole=False),
            "prefix_tokens": 35 if prefix is None else prefix,
            "head_mask": _head_mask(folder, kept, d.heads),
            "heads_kept": kept,
        }
    return found


def _flag(config: dict[str, Any], key: str) -> bool:
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise CheckpointError(f"config.json: {key} is {value!r}, expected true or false; correct it")
    return bool(value)


def _number(config: dict[str, Any], key: str, least: int, most: float = math.inf, *, whole: bool = True) -> Any:
    """A field within its range; None where the config has none."""
    value = config.get(key)
    kinds = int if whole else int | float
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most):
        return value
    wanted = f"at least {least}" if most == math.inf else f"{least}..{most}"
    kind = "a whole number, " if whole else ""
    raise CheckpointError(f"config.json: {key} is {value!r}, expected {kind}{wanted}; correct it")


def _head_mask(folder: Path, kept: int | None, heads: int) -> str | None:
    """YOPO's file of heads that stay active, `kept` of a layer on average; None where all of them do.

    Where the folder has none, but the config says that heads are pruned, the file that should be there.
    """
    for place in (folder, folder / "headmask"):
        names = [place / "headmask.npy", *sorted(place.glob(f"headmask_*_{kept}.npy"))]
        for path in names:
            if path.is_file():
                return str(path.resolve())
    return None if kept in (None, heads) else str(folder.resolve() / "headmask.npy")


def _agree(config: dict[str, Any], spec: ModelSpec[VisionSpec]) -> None:
    """Raise CheckpointError where config.json says of the encoder what the encoder's own says otherwise."""
    for key, value in (
        ("mm_hidden_size", spec.vision.encoder.hidden),
        ("per_crop_token_len", spec.vision.encoder.tokens if "proxyv" in config else None),
    ):
        given = config.get(key, value)
        if value is not None and given != value:
            raise CheckpointError(
                f"config.json: {key} is {given!r}, but its vision encoder has {value}; correct it, or mm_vision_tower"
            )


def _check_updates(config: dict[str, Any], folder: Path, stored: Mapping[str, Stored], layers: int) -> None:
    """Raise CheckpointError for ProxyV's updates of layers that the config has none for: they would go to others."""
    found = {int(number[1]) for key in stored if (number := re.match(r"model\.vision_mlp_layers\.(\d+)\.", key))}
    start = config.get("proxyv_start_layer")
    if found and isinstance(start, int) and max(found) >= layers - start:
        raise CheckpointError(
            f"{folder}: holds vision_mlp_layers.{max(found)}, but config.json's proxyv_start_layer of {start} has "
            f"{layers - start} of {layers} layers updated; correct config.json"
        )


def _cut(key: str, tensor: Stored, d: DecoderSpec) -> dict[str, Stored]:
    """A tensor under its name; one that holds several matrices, one above the other, as each of them.

    Raises:
        CheckpointError: it does not have their rows.
    """
    found = _FUSED.match(key)
    if found is None:
        return {key: tensor}
    queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    rows = {"q": queries, "k": keys, "v": keys} if found[2] else {"gate": d.ffn, "up": d.ffn}
    return {key.replace(found[2] or found[3], name): part for name, part in cut(tensor, rows).items()}


FAMILY = Family(
    name="llava_llama",
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
)

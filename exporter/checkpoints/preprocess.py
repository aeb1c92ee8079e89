"""preprocessor_config.json -> Preprocessing, with the defaults of the image processor it names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, read_json
from lvlm_edge.exporter.checkpoints.encoders import EncoderSpec
from lvlm_edge.runtime.errors import UnsupportedError, nearest
from lvlm_edge.runtime.pictures.image import Preprocessing

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

# What transformers takes for a key that is missing; null is a value, mostly "no". Sizes come from the vision encoder
# instead of transformers' fixed 224: they agree for encoders of that size, and 224 is unusable for all others.
_SHARED: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "default_to_square": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_pad": False,
}
_CLIP: dict[str, Any] = {**_SHARED, "do_center_crop": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "VideoLlavaImageProcessor": _CLIP,
    "SiglipImageProcessor": {**_SHARED, "do_center_crop": False, "image_mean": HALF, "image_std": HALF},
}
_SQUARE_BY_DEFAULT = frozenset({"SiglipImageProcessor"})
_WHERE = "preprocessor_config.json"
_ALWAYS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")


def read(config: Mapping[str, Any], *, default_size: int) -> Preprocessing:
    """The steps a checkpoint's image processor performs.

    Args:
        config: content of `preprocessor_config.json`.
        default_size: side of the vision encoder's input in pixels, taken where `size` or `crop_size` is missing.

    Raises:
        UnsupportedError: the image processor is unknown, a value cannot be used, or the result would not have the
            same size for every picture.
    """
    kind = _kind(config)
    values = _DEFAULTS[kind] | dict(config)
    shortest_edge, resize_to = _resize(values, kind, default_size) if values["do_resize"] else (None, None)
    crop = _rectangle("crop_size", values.get("crop_size", default_size)) if values["do_center_crop"] else None
    how = Preprocessing(
        convert_rgb=bool(values["do_convert_rgb"]),
        pad_to_square=_pad_colour(values, kind),
        shortest_edge=shortest_edge,
        resize_to=resize_to,
        resample=resampling(values["resample"]) if values["do_resize"] else _SHARED["resample"],
        crop=crop,
        rescale=_number("rescale_factor", values["rescale_factor"]) if values["do_rescale"] else None,
        mean=channels("image_mean", values["image_mean"]) if values["do_normalize"] else None,
        std=channels("image_std", values["image_std"]) if values["do_normalize"] else None,
    )
    _check_fixed_size(how)
    return how


def of_processor(
    folder: Path, kinds: Mapping[str, Mapping[str, Any]], *, fixed: tuple[str, ...] = _ALWAYS
) -> tuple[Path, dict[str, Any]]:
    """Settings of an image processor that makes several views, and the file that they are from.

    Args:
        kinds: by the processor's name without the suffix of its backend, what a key that is missing means.
        fixed: steps that must be on.

    Raises:
        CheckpointError: no file, or settings that make no picture.
        UnsupportedError: another image processor, or one of its steps is off.
    """
    named = [folder / name for name in (_WHERE, "processor_config.json")]
    where = next((path for path in named if path.is_file()), None)
    given: Any = {} if where is None else read_json(where)
    if where is not None and where.name != _WHERE:
        given = given.get("image_processor")
    if where is None or not isinstance(given, dict) or not given:
        raise CheckpointError(f"{folder}: has no {_WHERE}; add the file that belongs to this checkpoint")
    name = str(given.get("image_processor_type") or next(iter(kinds)))
    plain = name.removesuffix("Fast").removesuffix("Pil")
    if plain not in kinds:
        raise UnsupportedError(f"{where}: image_processor_type is {name!r}; {nearest(plain, kinds)}")
    values = {**kinds[plain], **{key: value for key, value in given.items() if value is not None}}
    for step in fixed:
        if values.get(step, True) is not True:
            raise UnsupportedError(f"{where}: {step} is {values[step]!r}, not supported; expected true")
    return where, values


def view(where: Path, values: Mapping[str, Any], size: int) -> Preprocessing:
    """The steps of one view: resized to a square whatever its shape, then to floats.

    Args:
        where: the file that the settings are from, for errors.
        values: of `of_processor`.
        size: side of the square in pixels.

    Raises:
        CheckpointError: settings that make no finite picture.
    """
    how = Preprocessing(
        resize_to=(size, size),
        resample=resampling(values["resample"]),
        rescale=_number("rescale_factor", values.get("rescale_factor", 1 / 255)),
        mean=channels("image_mean", values["image_mean"]),
        std=channels("image_std", values["image_std"]),
    )
    check_finite(where, how)
    return how


def check_finite(where: Path, how: Preprocessing) -> None:
    """Raise CheckpointError for steps that make no finite picture."""
    if not all(map(math.isfinite, (how.rescale or 0, *(how.mean or ()), *(how.std or ())))) or 0 in (how.std or ()):
        raise CheckpointError(f"{where}: mean, std and rescale_factor make no finite picture; correct the file")


def for_config_only(image_size: int, tower: Literal["clip", "siglip"]) -> Preprocessing:
    """The steps for a checkpoint without a `preprocessor_config.json`: the defaults of its vision encoder.

    Args:
        image_size: side of the vision encoder's input in pixels.
        tower: family of the vision encoder.

    Raises:
        UnsupportedError: the family is unknown, or the size is not a positive number.
    """
    kinds = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}
    if tower not in kinds:
        raise UnsupportedError(
            f"config.json: vision encoder {tower!r} has no known image processor; {nearest(tower, kinds)}"
        )
    return read({"image_processor_type": kinds[tower]}, default_size=image_size)


def of_folder(folder: Path, vision: EncoderSpec) -> Preprocessing:
    """From preprocessor_config.json, or where newer transformers put it, else the tower's defaults.

    Raises:
        CheckpointError: what comes out is no input of the tower.
    """
    path, config = folder / "preprocessor_config.json", {}
    if path.is_file():
        config = read_json(path)
    elif (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"
        config = read_json(path).get("image_processor") or {}
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: image_processor is {type(config).__name__}, expected an object; correct it")
    if not config:
        return for_config_only(vision.image_size, "siglip" if vision.kind == "siglip" else "clip")
    how = read(config, default_size=vision.image_size)
    size, wanted = (3, *_size(how)), (vision.channels, vision.image_size, vision.image_size)
    if size != wanted:
        raise CheckpointError(
            f"{path}: makes pictures of {list(size)}, config.json says {list(wanted)} (channels, height, width); "
            "correct the file that is wrong"
        )
    check_finite(path, how)
    return how


def _size(how: Preprocessing) -> tuple[int, int]:
    """Height and width of every picture after its preprocessing."""
    size = how.crop or how.resize_to
    if size is None:
        assert how.shortest_edge is not None and how.pad_to_square is not None
        return how.shortest_edge, how.shortest_edge
    return size


def fitted(how: Preprocessing, fit: str, size: int) -> Preprocessing:
    """The steps of an image processor, and what is done to a picture before it.

    Args:
        fit: `processor` for nothing; `pad` to a square of the mean colour; `resize` to the encoder's square whatever
            the picture's shape, bicubic.
        size: side of the vision encoder's input in pixels.
    """
    if fit == "pad":
        red, green, blue = (int(255 * channel) for channel in how.mean or (0.0, 0.0, 0.0))
        return replace(how, pad_to_square=(red, green, blue))
    if fit == "resize":
        return replace(how, pad_to_square=None, shortest_edge=None, resize_to=(size, size), resample=3, crop=None)
    assert fit == "processor"
    return how


def _kind(config: Mapping[str, Any]) -> str:
    """Name of the image processor, without the suffix of its backend."""
    # LLaVA's is what transformers takes for a LLaVA checkpoint that names none; it equals CLIP's unless it pads.
    name = config.get("image_processor_type") or config.get("feature_extractor_type") or "LlavaImageProcessor"
    plain = str(name).replace("FeatureExtractor", "ImageProcessor")
    for suffix in ("Fast", "Pil"):
        plain = plain.removesuffix(suffix)
    if plain not in _DEFAULTS:
        raise UnsupportedError(
            f"{_WHERE}: image_processor_type is {str(name)!r}, which is not known; {nearest(plain, _DEFAULTS)}"
        )
    return plain


def _resize(values: Mapping[str, Any], kind: str, default: int) -> tuple[int | None, tuple[int, int] | None]:
    """(shortest edge, (height, width)), one of them None."""
    if "size" in values:
        size = values["size"]
    else:
        size = {"height": default, "width": default} if kind in _SQUARE_BY_DEFAULT else {"shortest_edge": default}
    if isinstance(size, int) and not values["default_to_square"]:
        size = {"shortest_edge": size}
    if isinstance(size, Mapping) and set(_given(size)) == {"shortest_edge"}:
        return _positive("size", size["shortest_edge"]), None
    return None, _rectangle("size", size)


def _rectangle(key: str, size: Any) -> tuple[int, int]:
    """(height, width) from a number, a pair, or a mapping that names them."""
    if isinstance(size, Mapping) and set(_given(size)) == {"height", "width"}:
        return _positive(key, size["height"]), _positive(key, size["width"])
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return _positive(key, size[0]), _positive(key, size[1])
    if isinstance(size, int):
        return _positive(key, size), _positive(key, size)
    shapes = "a number or {height, width}" + (" or {shortest_edge}" if key == "size" else "")
    raise UnsupportedError(f"{_WHERE}: {key} is {size!r}, expected {shapes}; use a checkpoint of fixed input size")


def _given(size: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are not null; some writers spell out all the shapes a size can have."""
    return {key: value for key, value in size.items() if value is not None}


def _positive(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedError(
            f"{_WHERE}: {key} holds {value!r}, expected a whole number of pixels above 0; correct the file"
        )
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnsupportedError(f"{_WHERE}: {key} holds {value!r}, expected a number; correct the file")
    return float(value)


def channels(key: str, value: Any) -> tuple[float, float, float]:
    """Three numbers, one per channel; a single number stands for all three."""
    if not isinstance(value, (list, tuple)):
        value = (value,) * 3
    if len(value) != 3:
        raise UnsupportedError(
            f"{_WHERE}: {key} has {len(value)} numbers, expected 3 for red, green and blue; correct the file"
        )
    red, green, blue = (_number(key, number) for number in value)
    return red, green, blue


def resampling(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 5:
        raise UnsupportedError(f"{_WHERE}: resample is {value!r}, expected 0..5, a filter of Pillow; correct the file")
    return value


def _pad_colour(values: Mapping[str, Any], kind: str) -> tuple[int, int, int] | None:
    """Colour of the padding to a square, in 0..255; None without padding."""
    if not values["do_pad"]:
        return None
    if kind == "LlavaImageProcessor":
        mean = channels("image_mean", values["image_mean"] or 0.0)
        red, green, blue = (int(channel * 255) for channel in mean)  # cut off, as transformers does
        return red, green, blue
    if values.get("pad_size") is not None:
        raise UnsupportedError(
            f"{_WHERE}: {kind} with pad_size {values['pad_size']!r} is not supported, expected no "
            f"padding or LlavaImageProcessor; use another checkpoint"
        )
    return None  # the others pad to the largest picture of a batch, and our batch is one picture


def _check_fixed_size(how: Preprocessing) -> None:
    """Raises UnsupportedError if the size of the result depends on the picture: graphs have static shapes."""
    square = how.shortest_edge is not None and how.pad_to_square is not None
    if how.crop is None and how.resize_to is None and not square:
        raise UnsupportedError(
            f"{_WHERE}: the size of the model's input depends on the picture (no center crop and no fixed size), "
            f"expected one size for all; set do_center_crop and crop_size, or size to {{height, width}}"
        )

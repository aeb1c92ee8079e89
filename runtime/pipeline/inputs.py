"""What a prompt brings: pictures to pixel values, pixel values to the pictures that a bundle is planned for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvlm_edge.runtime.backends import Array
from lvlm_edge.runtime.bundle import Manifest
from lvlm_edge.runtime.errors import InputError, UsageError
from lvlm_edge.runtime.pictures.layout import Picture
from lvlm_edge.runtime.pictures.sources import Reading
from lvlm_edge.runtime.pictures.views import Canvas, belongs, canvas_of, covered, pixels, view_size


class Pixels(np.ndarray[Any, Any]):
    """Pixel values of `Pipeline.prepare`, which know the planned pictures that they were made for.

    Attributes:
        pictures: in the order of the views; empty for what was computed from such values.
    """

    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Media:
    """A picture of a prompt: what its placeholder stands for, and its views, float32 [views, 3, H, W]."""

    picture: Picture
    pixels: Array


def user_turn(prompt: str, images: int, system: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The messages of one question, the images before its text.

    Args:
        system: a message before it.

    Raises:
        InputError: the prompt is empty.
    """
    if not prompt.strip():
        raise InputError("prompt: is empty; ask something")
    parts: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
    return messages if system is None else [dict(system), *messages]


def count_images(messages: Sequence[Mapping[str, Any]]) -> int:
    """Parts of type image in a conversation."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    return sum(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def read_images(
    manifest: Manifest, images: Sequence[Any], reading: Reading, *, fit: bool = False
) -> Array | list[Array] | None:
    """Pixel values of pictures, in order.

    Args:
        images: sources of pictures (see `sources.Reading.open`).
        fit: resize pictures that belong on another canvas to the one that is planned.

    Returns:
        float32 [views, 3, H, W] of all pictures where they have one size, else a list with one array per picture; None
        without pictures.

    Raises:
        InputError: another number of pictures than planned, an unreadable one, or one of another canvas.
    """
    _check_count(manifest, len(images), "images")
    opened = [reading.open(image) for image in images]
    free = list(manifest.pictures)
    chosen, found = list[Picture](), list[Array]()
    for picture in opened:
        chosen.append(_planned(picture.size, free, fit))
        free.remove(chosen[-1])
        found.append(np.asarray(pixels(picture, chosen[-1].views)))
    if not found:
        return None
    if len({views.shape[1:] for views in found}) == 1:
        return _named(np.concatenate(found), chosen)
    return [_named(views, [picture]) for views, picture in zip(found, chosen, strict=True)]


def _named(values: Array, pictures: Sequence[Picture]) -> Array:
    named = values.view(Pixels)
    named.pictures = tuple(pictures)
    return named


def _planned(size: tuple[int, int], free: Sequence[Picture], fit: bool) -> Picture:
    """The first planned picture whose canvas a picture belongs on; the first of all where it is to be fitted.

    Raises:
        InputError: it belongs on none.
    """
    for picture in free:
        if belongs(size, picture.views.canvas):
            return picture
    if fit:
        return free[0]
    raise _misfit(size, free[0].views.canvas, free[0].views.tiles)


def _misfit(size: tuple[int, int], canvas: Canvas, tiles: tuple[int, int] | None) -> InputError:
    best = canvas_of(size, canvas)
    advice = f"export another with --image-size {size[0]}x{size[1]}"
    if best == canvas.size:
        own, planned = ("x".join(str(len(part)) for part in covered(s, canvas)) for s in (size, canvas.picture))
        return InputError(
            f"picture: {size[0]}x{size[1]} covers {own} cells of its tiles, the bundle is for {planned} (rows x "
            f"columns), as of {canvas.picture[0]}x{canvas.picture[1]}; resize it with --fit (fit=True), or {advice}"
        )
    if tiles is not None:
        tile = canvas.size[0] // tiles[1], canvas.size[1] // tiles[0]
        return InputError(
            f"picture: {size[0]}x{size[1]} goes on tiles of {best[1] // tile[1]}x{best[0] // tile[0]}, the bundle has "
            f"{tiles[0]}x{tiles[1]} (rows x columns); {advice}"
        )
    return InputError(
        f"picture: {size[0]}x{size[1]} is resized to {best[0]}x{best[1]}, the bundle is for "
        f"{canvas.size[0]}x{canvas.size[1]}; give a picture of that size, resize it with --fit (fit=True), or {advice}"
    )


def media(manifest: Manifest, pixel_values: Any, sizes: Sequence[tuple[int, int]] | None = None) -> tuple[Media, ...]:
    """Pixel values with the pictures that they are planned for.

    Planned pictures of equal views may stand for different rows. Values of `read_images` know theirs; others are those
    of the planned pictures in order, unless sizes are given.

    Args:
        pixel_values: float32 [views, 3, H, W] of all pictures, or a list of one such array per picture, or None.
        sizes: (width, height) of the pictures that they were made of.

    Raises:
        InputError: another shape or number than the bundle is planned for, values that are not finite, or fewer
            pictures than planned without a way to tell which.
    """
    if pixel_values is None:
        _check_count(manifest, 0, "pixel_values")
        return ()
    named = _pictures_of(manifest, pixel_values, sizes)
    free = list(manifest.pictures) if named is None else named
    if isinstance(pixel_values, list | tuple):
        _check_count(manifest, len(pixel_values), "pixel_values")
        several = tuple(_matched(manifest, np.asarray(views), free) for views in pixel_values)
        if named is None and len(several) < len(manifest.pictures):
            _check_alike(manifest, several)
        return several
    whole = np.asarray(pixel_values)
    found: list[Media] = []
    while not found or len(whole):
        if not free and sizes is not None:
            check_sizes(sizes, len(found) + 1)
        if not free:
            raise _unplanned(manifest, np.asarray(pixel_values))
        views = free[0].views.count
        found.append(_matched(manifest, whole[:views], free, given=np.asarray(pixel_values)))
        whole = whole[len(found[-1].pixels) :]
    _check_count(manifest, len(found), "pixel_values")
    if named is None and len(found) < len(manifest.pictures):
        _check_alike(manifest, found)
    return tuple(found)


def _pictures_of(
    manifest: Manifest, pixel_values: Any, sizes: Sequence[tuple[int, int]] | None
) -> list[Picture] | None:
    """The planned pictures that pixel values were made for, in order; None where nothing says so."""
    if sizes is not None:
        _check_count(manifest, len(sizes), "image_sizes")
        free, found = list(manifest.pictures), []
        for width, height in sizes:
            found.append(_planned((width, height), free, fit=False))
            free.remove(found[-1])
        return found
    values = pixel_values if isinstance(pixel_values, list | tuple) else [pixel_values]
    if not all(isinstance(value, Pixels) and value.pictures for value in values):
        return None
    named = [picture for value in values for picture in value.pictures]
    return named if set(named) <= set(manifest.pictures) and len(named) <= len(manifest.pictures) else None


def _check_alike(manifest: Manifest, found: Sequence[Media]) -> None:
    """Raise InputError where another planned picture has the same views as one that was found, and other rows."""
    for one in found:
        for picture in manifest.pictures:
            if _shape(picture) == _shape(one.picture) and picture.runs != one.picture.runs:
                raise InputError(
                    "pixel_values: planned pictures of these views stand for different rows; give image_sizes, (width, "
                    "height) of each, or all planned pictures in order"
                )


def _matched(manifest: Manifest, views: Array, free: list[Picture], *, given: Array | None = None) -> Media:
    """The first planned picture of these views, which is then no longer free."""
    for picture in free:
        if views.shape == _shape(picture):
            if not np.isfinite(views).all():
                raise InputError(
                    "pixel_values: holds values that are infinite or not a number; check the preprocessing"
                )
            free.remove(picture)
            return Media(picture, views)
    raise _unplanned(manifest, views if given is None else given)


def _unplanned(manifest: Manifest, given: Array) -> InputError:
    shapes = [list(_shape(picture)) for picture in manifest.pictures]
    if all(shape[1:] == shapes[0][1:] for shape in shapes):
        shapes = [[sum(shape[0] for shape in shapes), *shapes[0][1:]]]
    wanted = " and ".join(map(str, shapes))
    return InputError(f"pixel_values: is {list(given.shape)}, the bundle is planned for {wanted}; see num_images")


def _shape(picture: Picture) -> tuple[int, ...]:
    width, height = view_size(picture.views)
    return picture.views.count, 3, height, width


def placed(text: Sequence[int], before: int, image: int, count: int) -> list[int]:
    """A prompt with images in it, and a text token between each two as long as there are some.

    Args:
        text: token ids.
        before: text tokens before the first image.
        image: the image token.
        count: of images.
    """
    found = [int(token) for token in text[:before]]
    rest = [int(token) for token in text[before:]]
    for _ in range(count):
        found.append(image)
        if len(rest) > 1:
            found.append(rest.pop(0))
    return found + rest


def check_sizes(sizes: Sequence[tuple[int, int]], images: int) -> None:
    """Raise InputError unless there is a size, (width, height), of each picture.

    Args:
        images: how many pictures are given.
    """
    if len(sizes) != images:
        raise InputError(
            f"image_sizes: has {len(sizes)} entries, {images} image(s) given; give (width, height) of each"
        )


def check_prompt(manifest: Manifest, prompt: Sequence[int], images: int) -> Array:
    """The prompt's token ids, int64 [n].

    Raises:
        InputError: a token outside the vocabulary, another number of image tokens than images, no text, or too much.
    """
    counts, image = manifest.counts, manifest.image_token_id
    ids = np.asarray(prompt, np.int64).reshape(-1)
    vocab = manifest.embedding.vocab
    outside = ids[((ids < 0) | (ids >= vocab)) & (ids != image)]
    if outside.size:
        raise InputError(f"prompt: token {outside[0]} is outside the vocabulary of {vocab}; use this model's tokenizer")
    named = int((ids == image).sum())
    _check_count(manifest, named, "prompt")
    if named != images:
        raise InputError(f"prompt: has {named} image token(s), {images} image(s) given; give one image for each")
    text = len(ids) - named
    if not text:
        raise InputError("prompt: has no text; ask something")
    if text > counts.text_tokens:
        raise InputError(
            f"prompt: has {text} text tokens, the bundle holds {counts.text_tokens}; shorten it, or export with "
            f"--max-text-tokens {text} or more"
        )
    return ids


def _check_count(manifest: Manifest, images: int, where: str) -> None:
    planned = len(manifest.pictures)
    if images == planned or (images < planned and manifest.fewer_pictures):
        return
    if images == 0 and where == "pixel_values":
        raise InputError(f"pixel_values: is nothing, the bundle is planned for {planned} image(s); see num_images")
    said = f"{images} given" if where in ("images", "pixel_values") else f"has {images} image(s)"
    most = "at most " if manifest.fewer_pictures else ""
    raise InputError(
        f"{where}: {said}, the bundle is planned for {planned}; give {most}{planned}, or export with --num-images "
        f"{max(images, 1)}"
    )


def kept_of(manifest: Manifest, visual: int) -> int:
    """Visual tokens that a method keeps of so many, as it counts them of a full prompt."""
    counts, config = manifest.counts, manifest.method_config
    if visual == counts.visual_tokens or not manifest.selects:
        return counts.kept_tokens if visual else 0
    if config.get("keep_tokens") is not None:
        return min(int(config["keep_tokens"]), visual)
    return round(visual * float(config["keep_ratio"]))


def limit(manifest: Manifest, max_new_tokens: int | None) -> int:
    """The most new tokens of an answer.

    Raises:
        UsageError: the bundle does not hold as many.
    """
    room = manifest.counts.new_tokens
    if max_new_tokens is None:
        return room
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens: is {max_new_tokens}, expected 1..{room}; ask for at least one token")
    if max_new_tokens > room:
        raise UsageError(
            f"max_new_tokens: is {max_new_tokens}, the bundle holds {room}; ask for fewer, or export with "
            f"--max-new-tokens {max_new_tokens}"
        )
    return max_new_tokens

"""What a prompt brings: pictures and videos to pixel values, pixel values to what a bundle is planned for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvlm_edge.runtime.backends import Array
from lvlm_edge.runtime.bundle import Manifest
from lvlm_edge.runtime.errors import InputError, UsageError
from lvlm_edge.runtime.pictures.layout import Picture
from lvlm_edge.runtime.pictures.sources import Reading
from lvlm_edge.runtime.pictures.videos import frames
from lvlm_edge.runtime.pictures.views import Canvas, belongs, canvas_of, covered, pixels, view_size
from lvlm_edge.runtime.prompt import count_parts

MEDIA = ("image", "video")  # what placeholders stand for


class Pixels(np.ndarray[Any, Any]):
    """Pixel values of `Pipeline.prepare`, which know the planned pictures that they were made for.

    Attributes:
        pictures: in the order of the views; empty for what was computed from such values.
    """

    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Media:
    """A picture or a video of a prompt: what its placeholder stands for, and its views, float32 [views, 3, H, W]."""

    picture: Picture
    pixels: Array


def user_turn(prompt: str, images: int, system: Mapping[str, Any] | None, *, videos: int = 0) -> list[dict[str, Any]]:
    """The messages of one question, the images and videos before its text.

    Args:
        system: a message before it.

    Raises:
        InputError: the prompt is empty.
    """
    if not prompt.strip():
        raise InputError("prompt: is empty; ask something")
    parts: list[dict[str, str]] = [{"type": kind} for kind in ["image"] * images + ["video"] * videos]
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
    return messages if system is None else [dict(system), *messages]


def check_named(messages: Sequence[Mapping[str, Any]], images: int, videos: int) -> None:
    """Raise InputError unless a conversation names so many images and videos."""
    for kind, given in zip(MEDIA, (images, videos), strict=True):
        named = count_parts(messages, kind)
        if named != given:
            raise InputError(f"messages: name {named} {kind}(s), {given} given; give one for each")


def read_media(
    manifest: Manifest,
    kinds: Sequence[str],
    images: Sequence[Any],
    videos: Sequence[Any],
    reading: Reading,
    *,
    fit: bool = False,
) -> Array | list[Array] | None:
    """Pixel values of a prompt's images and videos, in the order of their placeholders.

    Args:
        kinds: of the placeholders, as many of each as there are sources.
        images: sources of pictures (see `sources.Reading.open`).
        videos: sources of videos (see `videos.frames`).
        fit: resize pictures that belong on another canvas to the one that is planned.

    Returns:
        float32 [views, 3, H, W] of all where their views have one size, else a list with one array for each; None
        where there are none.

    Raises:
        InputError: other numbers than planned, an unreadable one, a picture of another canvas, or a video of fewer
            frames than planned.
    """
    for kind, given in zip(MEDIA, (images, videos), strict=True):
        _check_count(manifest, len(given), f"{kind}s", kind)
    free, waiting = list(manifest.pictures), {"image": list(images), "video": list(videos)}
    chosen, found = list[Picture](), list[Array]()
    for kind in kinds:
        source, planned = waiting[kind].pop(0), [picture for picture in free if picture.kind == kind]
        if kind == "video":
            chosen.append(planned[0])
            shown = frames(source, planned[0].views.frames, reading)
            found.append(np.concatenate([pixels(frame, planned[0].views) for frame in shown]))
        else:
            picture = reading.open(source)
            chosen.append(_planned(picture.size, planned, fit))
            found.append(np.asarray(pixels(picture, chosen[-1].views)))
        free.remove(chosen[-1])
    if not found:
        return None
    if len({views.shape[1:] for views in found}) == 1:
        return _named(np.concatenate(found), chosen)
    return [_named(views, [picture]) for views, picture in zip(found, chosen, strict=True)]


def kinds_of(manifest: Manifest, prompt: Sequence[int]) -> list[str]:
    """What the placeholders of a prompt stand for, in its order: `image` or `video` each."""
    known = manifest.placeholders
    return [known[int(token)] for token in prompt if int(token) in known]


def planned_for(manifest: Manifest, prompt: Sequence[int]) -> tuple[Picture, ...]:
    """The planned pictures that a prompt's placeholders stand for, those of a kind in the order of the plan.

    Raises:
        InputError: the prompt has more than are planned.
    """
    kinds = kinds_of(manifest, prompt)
    for kind in MEDIA:
        _check_count(manifest, kinds.count(kind), "prompt", kind)
    waiting = {kind: [picture for picture in manifest.pictures if picture.kind == kind] for kind in MEDIA}
    return tuple(waiting[kind].pop(0) for kind in kinds)


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


def media(
    manifest: Manifest,
    pixel_values: Any,
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    prompt: Sequence[int] = (),
) -> tuple[Media, ...]:
    """Pixel values with the pictures that they are planned for.

    Planned pictures of equal views may stand for different rows. Values of `read_media` know theirs; others are those
    of the planned pictures in order, unless sizes are given.

    Args:
        pixel_values: float32 [views, 3, H, W] of all pictures, or a list of one such array per picture, or None.
        sizes: (width, height) of the images that they were made of.
        prompt: token ids, whose placeholders tell images from videos.

    Raises:
        InputError: another shape or number than the bundle is planned for, values that are not finite, or fewer
            pictures than planned without a way to tell which.
    """
    if pixel_values is None:
        _check_count(manifest, 0, "pixel_values")
        return ()
    named = _pictures_of(manifest, pixel_values, sizes)
    free, kinds = (list(manifest.pictures), kinds_of(manifest, prompt)) if named is None else (named, [])
    joined = not isinstance(pixel_values, list | tuple)
    waiting = [np.asarray(values) for values in ([pixel_values] if joined else pixel_values)]
    if not joined:
        _check_count(manifest, len(waiting), "pixel_values")
    found: list[Media] = []
    while waiting:
        kind = kinds[len(found)] if len(found) < len(kinds) else ""
        if not free and sizes is not None:
            check_sizes(sizes, len(found) + 1)
        able, views = [picture for picture in free if kind in ("", picture.kind)], waiting.pop(0)
        count = able[0].views.count if joined and able else len(views)
        if count < len(views):
            waiting.append(views[count:])
        given = np.asarray(pixel_values) if joined else views
        found.append(_matched(manifest, views[:count], able, given))
        free.remove(found[-1].picture)
    _check_count(manifest, len(found), "pixel_values")
    if named is None and len(found) < len(manifest.pictures):
        _check_alike(manifest, found, told=bool(kinds))
    return tuple(found)


def _pictures_of(
    manifest: Manifest, pixel_values: Any, sizes: Sequence[tuple[int, int]] | None
) -> list[Picture] | None:
    """The planned pictures that pixel values were made for, in order; None where nothing says so."""
    if sizes is not None and all(picture.kind == "image" for picture in manifest.pictures):
        _check_count(manifest, len(sizes), "image_sizes", "image")
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


def _check_alike(manifest: Manifest, found: Sequence[Media], *, told: bool) -> None:
    """Raise InputError where another planned picture has the same views as one that was found, and other rows.

    Args:
        told: it is known which of them are images and which are videos.
    """
    for one in found:
        for picture in (p for p in manifest.pictures if not told or p.kind == one.picture.kind):
            if _shape(picture) == _shape(one.picture) and picture.runs != one.picture.runs:
                raise InputError(
                    "pixel_values: planned pictures of these views stand for different rows; give image_sizes, (width, "
                    "height) of each, or all planned pictures in order"
                )


def _matched(manifest: Manifest, views: Array, free: Sequence[Picture], given: Array) -> Media:
    """The first planned picture of these views.

    Args:
        given: what the views are part of, for errors.
    """
    for picture in free:
        if views.shape == _shape(picture):
            if not np.isfinite(views).all():
                raise InputError(
                    "pixel_values: holds values that are infinite or not a number; check the preprocessing"
                )
            return Media(picture, views)
    raise _unplanned(manifest, given)


def _unplanned(manifest: Manifest, given: Array) -> InputError:
    shapes = [list(_shape(picture)) for picture in manifest.pictures]
    if all(shape[1:] == shapes[0][1:] for shape in shapes):
        shapes = [[sum(shape[0] for shape in shapes), *shapes[0][1:]]]
    wanted = " and ".join(map(str, shapes))
    return InputError(
        f"pixel_values: is {list(given.shape)}, the bundle is planned for {wanted}; see {_flags(manifest)}"
    )


def _shape(picture: Picture) -> tuple[int, ...]:
    width, height = view_size(picture.views)
    return picture.views.count, 3, height, width


def random_text(rng: np.random.Generator, manifest: Manifest, count: int) -> list[int]:
    """Random token ids, none of them a placeholder."""
    vocab, taken = manifest.embedding.vocab, manifest.placeholders
    ids = rng.integers(0, vocab, count)
    free = next(token for token in itertools.count(max(taken) + 1) if token % vocab not in taken) % vocab
    return [free if token in taken else token for token in ids.tolist()]


def placed(text: Sequence[int], before: int, placeholders: Sequence[int]) -> list[int]:
    """A prompt with images and videos in it, and a text token between each two as long as there are some.

    Args:
        text: token ids.
        before: text tokens before the first image or video.
        placeholders: their tokens, in order.
    """
    found = [int(token) for token in text[:before]]
    rest = [int(token) for token in text[before:]]
    for token in placeholders:
        found.append(token)
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


def check_prompt(manifest: Manifest, prompt: Sequence[int], pictures: Sequence[Picture]) -> Array:
    """The prompt's token ids, int64 [n].

    Args:
        pictures: what its placeholders are to stand for, in order.

    Raises:
        InputError: a token outside the vocabulary, other placeholders than pictures, no text, or too much.
    """
    counts, kinds = manifest.counts, kinds_of(manifest, prompt)
    ids = np.asarray(prompt, np.int64).reshape(-1)
    vocab = manifest.embedding.vocab
    outside = ids[((ids < 0) | (ids >= vocab)) & ~np.isin(ids, list(manifest.placeholders))]
    if outside.size:
        raise InputError(f"prompt: token {outside[0]} is outside the vocabulary of {vocab}; use this model's tokenizer")
    for kind in MEDIA:
        named, given = kinds.count(kind), sum(picture.kind == kind for picture in pictures)
        _check_count(manifest, named, "prompt", kind)
        if named != given:
            raise InputError(f"prompt: has {named} {kind} token(s), {given} {kind}(s) given; give one {kind} for each")
    if kinds != [picture.kind for picture in pictures]:
        raise InputError(
            "prompt: its image and video tokens stand in another order than pixel_values; give those in the prompt's"
        )
    text = len(ids) - len(kinds)
    if not text:
        raise InputError("prompt: has no text; ask something")
    if text > counts.text_tokens:
        raise InputError(
            f"prompt: has {text} text tokens, the bundle holds {counts.text_tokens}; shorten it, or export with "
            f"--max-text-tokens {text} or more"
        )
    return ids


def _check_count(manifest: Manifest, count: int, where: str, kind: str = "") -> None:
    """Raise InputError for another number of images or videos than a prompt may have.

    Args:
        kind: `image` or `video`; empty for both together.
    """
    planned = sum(kind in ("", picture.kind) for picture in manifest.pictures)
    if count == planned or (count < planned and manifest.fewer_pictures):
        return
    noun = kind or "/".join(dict.fromkeys(picture.kind for picture in manifest.pictures))
    if count == 0 and where == "pixel_values":
        raise InputError(
            f"pixel_values: is nothing, the bundle is planned for {planned} {noun}(s); see {_flags(manifest)}"
        )
    said = f"has {count} {noun}(s)" if where in ("prompt", "image_sizes") else f"{count} given"
    most = "at most " if manifest.fewer_pictures else ""
    flag = f"--num-{kind}s" if kind else "--" + _flags(manifest).replace("_", "-")
    raise InputError(
        f"{where}: {said}, the bundle is planned for {planned}; give {most}{planned}, or export with {flag} "
        f"{max(count, 1)}"
    )


def _flags(manifest: Manifest) -> str:
    """The settings that say how many images and videos a prompt has."""
    return " and ".join(f"num_{kind}s" for kind in dict.fromkeys(picture.kind for picture in manifest.pictures))


def kept_of(manifest: Manifest, visual: int) -> int:
    """Visual tokens that a method keeps of so many, as it counts them of a full prompt."""
    counts, config = manifest.counts, manifest.method_config
    if visual == counts.visual_tokens or not manifest.selects:
        return counts.kept_tokens if visual else 0
    if config.get("rank") == "per-image":
        return counts.kept_tokens * visual // counts.visual_tokens
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

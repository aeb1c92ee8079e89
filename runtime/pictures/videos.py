"""Where videos come from: files, folders of frames, and arrays; each is seen as a number of evenly spaced frames."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_edge.runtime.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from PIL.Image import Image

    from lvlm_edge.runtime.pictures.sources import Reading

ARRAY = "uint8 [frames, H, W, 3]"


def indices(total: int, count: int) -> list[int]:
    """Numbers of `count` evenly spaced frames of `total`, the first among them.

    Source: `default_sample_indices_fn` of transformers 5.23.
    """
    return [i * total // count for i in range(count)]


def frames(source: Any, count: int, reading: Reading) -> list[Image]:
    """Evenly spaced frames of a video.

    Args:
        source: an array uint8 [frames, H, W, 3], a `.npy` file of one, a folder of pictures, which are the frames in
            the order of their names (numbers in them by value), or a video file.
        count: of frames.
        reading: how pictures are read.

    Raises:
        InputError: the video cannot be read, or has fewer frames.
        UnsupportedError: PyAV is missing, which reads video files.
    """
    if isinstance(source, np.ndarray):
        return _of_array(source, "videos", count, reading)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"videos: one is of type {type(source).__name__}, expected a video file, a folder of frames or an array "
            f"{ARRAY}"
        )
    path = Path(source)
    if path.is_dir():
        found = _pictures(path)
        return [reading.open(found[i]) for i in _sampled(len(found), count, str(path))]
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a video file or a folder of frames")
    if path.suffix == ".npy":
        try:
            content = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path}: cannot be read ({error}), expected an array {ARRAY}") from error
        return _of_array(content, str(path), count, reading)
    return [reading.open(frame) for frame in _decoded(path, count)]


def _sampled(total: int, count: int, where: str) -> list[int]:
    if total < count:
        raise InputError(
            f"{where}: has {total} frame(s), the bundle is for {count}; give a longer video, or export with "
            f"--num-frames {max(total, 1)}"
        )
    return indices(total, count)


def _of_array(content: Any, where: str, count: int, reading: Reading) -> list[Image]:
    if content.dtype != np.uint8 or content.ndim != 4 or content.shape[3] != 3 or 0 in content.shape[1:]:
        raise InputError(f"{where}: an array is {content.dtype} {list(content.shape)}, expected {ARRAY}; convert it")
    return [reading.open(np.asarray(content[i])) for i in _sampled(len(content), count, where)]


def _pictures(folder: Path) -> list[Path]:
    """The pictures of a folder, by their names; numbers in names count by value."""
    from PIL import Image

    known = Image.registered_extensions()
    found = [path for path in folder.iterdir() if path.suffix.lower() in known and not path.name.startswith(".")]
    return sorted(found, key=lambda path: [(int(n or 0), text) for n, text in re.findall(r"(\d+)|(\D+)", path.name)])


def _decoded(path: Path, count: int) -> list[Image]:
    """Evenly spaced frames of a video file, whose frames are counted first."""
    wanted = _sampled(sum(1 for _ in _stream(path)), count, str(path))
    found = {}
    for i, frame in enumerate(_stream(path)):
        if i in wanted:
            found[i] = _picture(frame)
        if i == wanted[-1]:
            break
    return [found[i] for i in wanted]


def _stream(path: Path) -> Iterator[Any]:
    """The frames of a file's first video stream.

    Raises:
        InputError: it is no video, or damaged.
        UnsupportedError: PyAV is missing.
    """
    try:
        import av
    except ImportError as error:
        raise UnsupportedError(
            f"{path}: reading video files takes PyAV, which is not installed; pip install 'lvlm-edge[video]', or give "
            "a folder of frames"
        ) from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: has no video stream; give a video file or a folder of frames")
            container.streams.video[0].thread_type = "AUTO"
            yield from container.decode(video=0)
    except av.FFmpegError as error:
        raise InputError(
            f"{path}: cannot be read as a video ({error.strerror or error}); give a video file or a folder of frames"
        ) from error


def _picture(frame: Any) -> Image:
    """A decoded frame, upright, RGB."""
    from PIL import Image

    turned = np.rot90(frame.to_ndarray(format="rgb24"), round(getattr(frame, "rotation", 0) / 90) % 4)
    return Image.fromarray(np.ascontiguousarray(turned))

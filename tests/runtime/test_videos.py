"""Videos from wherever a program has them: arrays, folders of frames, files; what is no video, on one line."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvlm_edge.runtime import InputError, Reading
from lvlm_edge.runtime.errors import UnsupportedError
from lvlm_edge.runtime.pictures import videos

NOISE = np.random.default_rng(0).integers(0, 256, (12, 6, 8, 3), np.uint8)
THREE = [0, 4, 8]  # of 12


def frames(source: Any, count: int = 3, **reading: Any) -> Any:
    return np.stack([np.asarray(frame) for frame in videos.frames(source, count, Reading(**reading))])


def folder(path: Path, name: str = "frame{}.png") -> Path:
    path.mkdir()
    for i, frame in enumerate(NOISE):
        Image.fromarray(frame).save(path / name.format(i))
    return path


def film(path: Path, shades: Any) -> Path:
    """A video file of frames of one shade each; the right half is black."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 32, "yuv420p", 4_000_000
        for shade in shades:
            frame = np.full((32, 64, 3), shade, np.uint8)
            frame[:, 32:] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_frames_of_an_array_are_evenly_spaced():
    assert np.array_equal(frames(NOISE), NOISE[THREE])
    assert np.array_equal(frames(NOISE, 12), NOISE)
    assert np.array_equal(frames(NOISE[..., ::-1], bgr=True), NOISE[THREE])


def test_a_file_of_an_array_is_a_video(tmp_path):
    np.save(tmp_path / "noise.npy", NOISE)

    assert np.array_equal(frames(tmp_path / "noise.npy"), NOISE[THREE])


@pytest.mark.parametrize("name", ["{:04}.png", "frame{}.png", "{}-x.bmp"])
def test_frames_of_a_folder_stand_in_the_order_of_their_names(name, tmp_path):
    given = folder(tmp_path / "film", name)
    (given / "notes.txt").write_text("not a frame")
    (given / ".thumbnail.png").write_bytes(b"not a picture")

    assert np.array_equal(frames(str(given)), NOISE[THREE])


@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.avi"])
def test_frames_of_a_file_are_evenly_spaced(name, tmp_path):
    shades = np.arange(20) * 12 + 10

    found = frames(film(tmp_path / name, shades), 8)

    assert found.shape == (8, 32, 64, 3)
    assert found[:, :, 4:28].mean((1, 2, 3)) == pytest.approx(shades[[0, 2, 5, 7, 10, 12, 15, 17]], abs=4)
    assert found[:, :, 36:].max() < 12


def test_frames_of_a_telephone_are_upright(tmp_path):
    path = film(tmp_path / "film.mp4", [200, 200])
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # the matrix of ISO 14496-12: a quarter turn to the right
    content[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)

    found = frames(path, 1)[0]

    assert found.shape == (64, 32, 3)
    assert found[4:28].mean() > 180 and found[36:].mean() < 20  # what was left is on top


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: at / "none.mp4", "none.mp4: no such file"),
        (lambda at: at, r"has 0 frame\(s\), the bundle is for 3"),
        (lambda at: film(at / "film.mp4", [9, 9]), r"film.mp4: has 2 frame\(s\), .*--num-frames 2"),
        (lambda at: written(at / "a.mp4", b"no video"), "a.mp4: cannot be read as a video"),
        (lambda at: written(at / "a.npy", b"no array"), "a.npy: cannot be read"),
        (lambda at: written(at / "empty.mp4", b""), "empty.mp4: cannot be read as a video"),
        (lambda at: NOISE.astype(np.float32), r"an array is float32 \[12, 6, 8, 3\], expected uint8"),
        (lambda at: NOISE[0], r"an array is uint8 \[6, 8, 3\], expected uint8 \[frames, H, W, 3\]"),
        (lambda at: NOISE[:2], r"videos: has 2 frame\(s\), the bundle is for 3"),
        (lambda at: 5, "videos: one is of type int"),
        (lambda at: [NOISE], "videos: one is of type list"),
    ],
)
def test_what_is_no_video_is_refused_on_one_line(make, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        frames(make(tmp_path))

    assert "\n" not in str(caught.value)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_missing_reader_of_video_files_is_named(tmp_path, monkeypatch):
    path = film(tmp_path / "film.mp4", [9] * 3)
    monkeypatch.setitem(sys.modules, "av", None)

    with pytest.raises(UnsupportedError, match=r"takes PyAV, .*pip install 'lvlm-edge\[video\]'"):
        frames(path)

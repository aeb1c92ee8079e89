"""Pictures from wherever a program has them; large ones within limits; what is no picture, on one line."""

from __future__ import annotations

import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvlm_edge.runtime import InputError, Pipeline, Reading
from lvlm_edge.runtime.errors import UsageError
from lvlm_edge.runtime.pictures import sources
from tests import tiny

NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)


@pytest.fixture(scope="module")
def bundle(checkpoint_once, eager_once) -> Path:
    return tiny.bundle(checkpoint_once, eager_once, "fastv")


@pytest.fixture(scope="module")
def pipe(bundle) -> Pipeline:
    return Pipeline.load(bundle)


@pytest.fixture
def png(tmp_path) -> Path:
    Image.fromarray(NOISE).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_every_way_to_give_a_picture_gives_the_same_pixels(pipe, png):
    expected = pipe.prepare("w5", [str(png)])[1]
    ways = [
        *(str(png), png, png.read_bytes(), bytearray(png.read_bytes()), Image.open(png), NOISE, data_url(png)),
        *([png], (png,), iter([png]), NOISE[None], [NOISE]),
    ]

    for given in ways:
        np.testing.assert_array_equal(pipe.prepare("w5", given)[1], expected)


def test_frames_of_opencv_are_blue_first(bundle, pipe):
    swapped = Pipeline.load(bundle, bgr=True)

    found = swapped.prepare("w5", np.ascontiguousarray(NOISE[..., ::-1]))[1]

    np.testing.assert_array_equal(found, pipe.prepare("w5", NOISE)[1])
    assert not np.array_equal(found, pipe.prepare("w5", NOISE[..., ::-1])[1])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (NOISE.astype(np.float32), "float32 .*expected uint8"),
        (NOISE[..., 0], r"uint8 \[30, 40\], expected uint8 \[H, W, 3\]"),
        (np.zeros((30, 40, 4), np.uint8), r"\[30, 40, 4\]"),
        (np.zeros((0, 40, 3), np.uint8), r"\[0, 40, 3\]"),
        (3, "type int, expected a path"),
        ([None], "type NoneType"),
        ("data:image/png", "data URL of 14 characters: has no comma"),
        ("data:image/png;base64,%%%", "is not base64"),
        ("data:image/png;base64,AAAA", "picture of 3 bytes: not a picture"),
        ("https://user:secret@example.invalid/a.png?key=1", "https://example.invalid/a.png: is a URL, which is not"),
        ("http://[1/a.png", "its URL cannot be read"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_no_picture_is_said_on_one_line(pipe, given, said):
    with pytest.raises(InputError, match=said) as caught:
        pipe.prepare("w5", given)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_urls_are_fetched_where_they_are_asked_for(bundle, pipe, png):
    content = png.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}"
    try:
        asked = Pipeline.load(bundle, allow_url=True)
        np.testing.assert_array_equal(asked.prepare("w5", f"{home}/a.png")[1], pipe.prepare("w5", png)[1])
        with pytest.raises(InputError, match=r"/b\.png: cannot be fetched \(.*Not Found"):
            asked.prepare("w5", f"{home}/b.png")
    finally:
        server.shutdown()
        server.server_close()


def test_a_large_jpeg_is_decoded_at_a_fraction_and_others_are_refused(tmp_path):
    gradient = np.linspace(0, 255, 800, dtype=np.uint8)
    picture = Image.fromarray(np.repeat(np.tile(gradient, (600, 1))[..., None], 3, 2))
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "a.png")

    for limit, size in ((0.48, (800, 600)), (0.47, (400, 300)), (0.12, (400, 300)), (0.0076, (100, 75))):
        found = Reading(max_megapixels=limit).open(tmp_path / "a.jpg")
        assert found.size == size
        smaller = np.asarray(picture.resize(size, Image.Resampling.BOX), np.float32)
        assert np.abs(np.asarray(found, np.float32) - smaller).max() < 6
    for name, limit in (("a.jpg", 0.007), ("a.png", 0.47)):
        with pytest.raises(InputError, match=rf"expected at most {limit}; scale it down, or raise --max-megapixels"):
            Reading(max_megapixels=limit).open(tmp_path / name)
    assert Reading(max_megapixels=0.48).open(tmp_path / "a.png").size == (800, 600)


def test_the_limit_is_25_megapixels(tmp_path):
    Image.new("1", (5001, 5000)).save(tmp_path / "large.png")

    with pytest.raises(InputError, match=r"5001x5000, 25\.0 megapixels, expected at most 25"):
        Reading().open(tmp_path / "large.png")


def test_the_command_line_reads_standard_input_and_data_urls(bundle, png):
    from click.testing import CliRunner

    from lvlm_edge.exporter.commands.main import main

    def run(*images: str, content: bytes = b"") -> str:
        given = [part for image in images for part in ("--image", image)]
        done = CliRunner().invoke(main, ["run", str(bundle), "--prompt", "w5", *given], input=content)
        assert done.exit_code == (0 if len(images) == 1 else 2), done.output
        return done.output

    expected = run(str(png))
    assert run("-", content=png.read_bytes()) == run(data_url(png)) == expected
    assert "standard input is one image" in run("-", "-")
    assert expected.strip()


def test_a_picture_with_a_limit_is_drawn_as_it_was_read(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (255, 0, 0)).save(buffer, "JPEG")

    assert Reading(max_megapixels=0.001).open(buffer.getvalue()).size == (32, 24)


class Answer(io.BytesIO):
    """What a server answers."""

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("over", "said"), [(0, None), (1, r"^http://x\.invalid/a: has more than \d+ bytes, expected a")]
)
def test_a_server_may_send_as_much_as_the_limit_and_wait_half_a_minute(over, said, monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "PNG")
    content, waited = buffer.getvalue(), []

    def urlopen(url, timeout):
        waited.append((url, timeout))
        return Answer(content)

    monkeypatch.setattr(sources.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(sources, "MOST", len(content) - over)
    reading = Reading(allow_url=True)

    if said is None:
        assert reading.open("http://x.invalid/a?b").size == (40, 30)
    else:
        with pytest.raises(InputError, match=said):
            reading.open("http://x.invalid/a?b")
    assert waited == [("http://x.invalid/a?b", 30)]


@pytest.mark.parametrize("given", [0, -1, float("nan")])
def test_a_limit_is_above_0(given):
    with pytest.raises(UsageError, match=rf"^max_megapixels: is {given}, expected a number above 0$"):
        Reading(max_megapixels=given)


def test_pictures_are_read_as_the_documentation_says_where_nothing_is_asked_for():
    assert Reading() == Reading(max_megapixels=25.0, bgr=False, allow_url=False)
    assert sources.MOST == 50_000_000


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (NOISE, 1),
        (NOISE[..., 0], 1),
        (NOISE[None], 1),
        (np.stack([NOISE] * 3), 3),
        ("a", 1),
        (b"a", 1),
        (bytearray(b"a"), 1),
        (Path("a"), 1),
        (Image.fromarray(NOISE), 1),
        (("a", "b"), 2),
        ([], 0),
        (3, 1),
        (None, 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_picture_needs_no_list(given, count):
    found = sources.listed(given)

    assert type(found) is list and len(found) == count


@pytest.mark.parametrize("shape", [(3, 4, 3), (1, 1, 3)])
def test_an_array_of_any_size_above_0_is_a_picture(shape):
    assert Reading().open(np.zeros(shape, np.uint8)).size == (shape[1], shape[0])


@pytest.mark.parametrize("shape", [(3, 4, 2), (3, 4), (1, 3, 4, 3), (0, 4, 3), (4, 0, 3)])
def test_an_array_of_another_form_is_refused(shape):
    with pytest.raises(InputError, match=r"^images: an array is uint8 \[.*\], expected uint8 \[H, W, 3\]; convert it$"):
        Reading().open(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(("head", "body"), [("data:image/png;base64", None), ("data:image/png", "%")])
def test_data_urls_are_base64_or_escaped_bytes(head, body, png):
    content = png.read_bytes()
    escaped = "".join(f"%{byte:02x}" for byte in content)
    spaced = "\n".join(base64.encodebytes(content).decode().split()).replace("+", "%2B")

    found = Reading().open(f"{head},{escaped if body else spaced}")

    assert np.array_equal(np.asarray(found), NOISE)

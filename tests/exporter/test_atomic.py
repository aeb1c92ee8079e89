"""Writers touch nothing that is not theirs, and follow no link."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from lvlm_edge.exporter.bundles import atomic
from lvlm_edge.exporter.commands import run
from lvlm_edge.exporter.devices import engine
from lvlm_edge.runtime.bundle.replacing import replacing
from lvlm_edge.runtime.errors import BundleError, UsageError
from lvlm_edge.runtime.pictures import overlay
from tests.tiny import tree


@pytest.mark.parametrize("fails", [False, True])
def test_files_with_likely_names_survive(tmp_path, fails):
    (tmp_path / "poetry.lock").write_text("versions")
    for name in ("poetry.partial", "poetry.partial.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years")
    before = tree(tmp_path)

    with contextlib.suppress(KeyError), atomic.folder(tmp_path / "poetry") as new:
        (new / "file").write_text("x")
        if fails:
            raise KeyError

    assert (tmp_path / "poetry").exists() is not fails
    shutil.rmtree(tmp_path / "poetry", ignore_errors=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [
        lambda work: work.write_text("a file"),
        lambda work: work.symlink_to(work.parent / "home"),
        lambda work: (work.mkdir(), (work / "notes").write_text("mine")),
        lambda work: (work.mkdir(), (work / "lock").write_text("another program's")),
        lambda work: (work.mkdir(), (work / "lock").symlink_to(work.parent / "home" / "file")),
    ],
)
@pytest.mark.parametrize("way", [atomic.folder, atomic.inside])
def test_what_another_program_put_in_the_place_of_the_work_folder_stays(tmp_path, content, way):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "file").write_text("keep")
    (tmp_path / "bundle").mkdir()
    content(atomic.work_folder(tmp_path / "bundle"))
    before = tree(tmp_path)

    with pytest.raises((UsageError, atomic.LvlmEdgeError), match="lvlm-edge"), way(tmp_path / "bundle"):
        pytest.fail("it wrote")

    assert tree(tmp_path) == before


def test_a_link_is_no_output(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")

    with pytest.raises(UsageError, match="is a link"), atomic.folder(tmp_path / "link"):
        pytest.fail("it wrote")


def test_links_are_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine").write_text("keep")
    place = tmp_path / "certificate.json"
    place.symlink_to(tmp_path / "mine")
    (tmp_path / "certificate.json.partial").symlink_to(tmp_path / "mine")

    with replacing(place) as partial:
        partial.write_text("new")

    assert (tmp_path / "mine").read_text() == "keep"
    assert not place.is_symlink() and place.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["certificate.json", "certificate.json.partial", "mine"]


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    (tmp_path / "a.json").write_text("old")

    with contextlib.suppress(KeyError), replacing(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise KeyError

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]


def test_an_overlay_leaves_the_picture_named_like_its_partial_file(tmp_path, monkeypatch):
    (tmp_path / "kept.partial.png").write_bytes(b"mine")
    monkeypatch.setattr(overlay, "draw", lambda *_, **__: Image.new("RGB", (4, 4)))
    answered = SimpleNamespace(last=SimpleNamespace(pictures=(), kept_visual=None), reading=None)

    run._write_overlay(answered, (), (), tmp_path / "kept.png")

    assert (tmp_path / "kept.partial.png").read_bytes() == b"mine"
    assert Image.open(tmp_path / "kept.png").size == (4, 4)


@pytest.mark.parametrize("name", ["key", "key/trt-rtx"])
def test_linked_engines_are_refused(tmp_path, name):
    home, engines = tmp_path / "home", tmp_path / "engines"
    home.mkdir()
    (engines / name).parent.mkdir(parents=True)
    (engines / name).symlink_to(home)

    with pytest.raises(BundleError, match="is a link, expected a folder of engines"):
        engine._made(engines / "key" / "trt-rtx")

    assert not os.listdir(home)


def test_engines_are_for_their_user_alone(tmp_path):
    made = engine._made(tmp_path / "cache" / "key" / "trt-rtx")

    assert [made.stat().st_mode & 0o777, made.parent.stat().st_mode & 0o777] == [0o700] * 2


def test_the_mode_of_a_file_is_that_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a"):
            pass
        with replacing(tmp_path / "b", 0o600):
            pass
    finally:
        os.umask(before)

    assert [Path(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o640, 0o600]

"""The manifest is strict, and a bundle is opened only when its files are the ones it was written with."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from lvlm_edge.runtime import Pipeline, bundle
from lvlm_edge.runtime.bundle import MANIFEST, Bundle, open_bundle, save_manifest
from lvlm_edge.runtime.bundle import files as bundle_files
from lvlm_edge.runtime.errors import BundleError, LvlmEdgeError
from tests import checkpoints, tiny


@pytest.fixture(scope="module")
def good(checkpoint_once, export_once) -> Path:
    return tiny.bundle(checkpoint_once, export_once, "fastv")


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "bundle"))


def refused(folder: Path, *parts: str, verify: bool = True) -> str:
    with pytest.raises(BundleError) as caught:
        open_bundle(folder, verify=verify)
    message = str(caught.value)
    assert "; " in message, f"no advice: {message}"
    for part in parts:
        assert part in message
    return message


FILES = (
    "vision.onnx",
    "prefill_head.onnx",
    "select.onnx",
    "prefill_tail.onnx",
    "decode.onnx",
    "vision.onnxruntime",
    "prefill_head.onnxruntime",
    "prefill_tail.onnxruntime",
    "export.json",
    "weights.bin",
    "tokenizer.json",
    "chat_template.jinja",
)


def test_a_bundle_holds_these_files_and_no_others(good):
    assert {path.name for path in good.iterdir()} == {*FILES, MANIFEST}
    assert set(open_bundle(good).manifest.files) == set(FILES)


def test_a_saved_manifest_loads_as_it_was(good, tmp_path):
    manifest = open_bundle(good).manifest

    save_manifest(tmp_path, manifest)

    assert bundle.load_manifest(tmp_path) == manifest


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_found(name, folder):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)

    refused(folder, str(folder / name), "altered", "again")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_or_shortened_file_is_found_without_hashing_too(name, verify, folder):
    content = (folder / name).read_bytes()

    (folder / name).write_bytes(content[:-1])
    refused(folder, str(folder / name), f"has {len(content) - 1} bytes", f"says {len(content)}", verify=verify)
    (folder / name).unlink()
    refused(folder, str(folder / name), "is missing", verify=verify)
    (folder / name).mkdir()
    refused(folder, str(folder / name), "is missing", verify=verify)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_link_is_refused_even_when_it_leads_to_the_right_content(name, folder, good):
    (folder / name).unlink()
    (folder / name).symlink_to(good / name)

    refused(folder, verify=False)


def test_a_linked_folder_inside_the_bundle_is_refused(folder, tmp_path):
    (tmp_path / "outside").mkdir()
    shutil.move(folder / "weights.bin", tmp_path / "outside" / "weights.bin")
    (folder / "sub").symlink_to(tmp_path / "outside")
    rename(folder, "weights.bin", "sub/weights.bin")

    refused(folder, "is a link")


def test_a_linked_bundle_opens(good, tmp_path):
    (tmp_path / "link").symlink_to(good)

    assert open_bundle(tmp_path / "link").manifest.method == "fastv"


def cached(bundle: Path, home: Path) -> Path:
    """A bundle as Hugging Face's cache holds it: a snapshot of links into the repository's blobs."""
    blobs, snapshot = home / "models--a--b" / "blobs", home / "models--a--b" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in bundle.iterdir():
        name = bundle_files.sha256(path)
        shutil.copy(path, blobs / name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / name)
    return snapshot


def test_a_bundle_in_hugging_faces_cache_opens_and_runs(good, tmp_path):
    snapshot = cached(good, tmp_path)
    expected = Pipeline.load(good).generate_tokens(checkpoints.prompt(5, 2), checkpoints.pixels(28))

    found = Pipeline.load(snapshot).generate_tokens(checkpoints.prompt(5, 2), checkpoints.pixels(28))

    assert found.token_ids == expected.token_ids
    weights = (snapshot / "weights.bin").resolve()
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    refused(snapshot, "weights.bin: was altered")


@pytest.mark.parametrize("name", ["weights.bin", MANIFEST, "decode.onnx"])
def test_links_that_leave_the_cached_repository_are_refused(name, good, tmp_path):
    snapshot = cached(good, tmp_path)
    shutil.copy(good / name, tmp_path / "other")
    for target in (tmp_path / "other", Path("../../../other"), Path("../../blobs/missing")):
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(target)

        refused(snapshot, verify=False)


def test_other_files_in_the_folder_are_no_ones_business(folder):
    (folder / "notes.txt").write_text("mine")

    open_bundle(folder)


def rename(folder: Path, old: str, new: str) -> None:
    """Another name for a file everywhere in the manifest."""
    put(folder, (folder / MANIFEST).read_text().replace(f'"{old}"', '"' + new.replace("\\", "\\\\") + '"'))


def put(folder: Path, text: str) -> None:
    """Another manifest, with the digest of its fields."""
    content = json.loads(text)
    (folder / MANIFEST).write_text(text.replace(content["digest"], bundle.digest(content)))


@pytest.mark.parametrize("old", FILES)
@pytest.mark.parametrize("new", ["/etc/passwd", "../{}", "sub/../../{}", "..\\{}", "C:{}", "C:\\{}", "//host/{}"])
def test_a_name_that_leads_outside_is_refused(old, new, folder):
    shutil.copy(folder / old, folder.parent / old)
    rename(folder, old, new.format(old))

    refused(folder, "outside the bundle", "do not use")


@pytest.mark.parametrize("new", ["", "a\\u0000b", "a\\nb", "\\ud800", "x" * 300])
def test_a_name_that_is_none_is_refused(new, folder):
    put(folder, (folder / MANIFEST).read_text().replace('"vision.onnx"', f'"{new}"'))

    refused(folder)


@pytest.mark.parametrize("name", [".", "sub"])
def test_a_folder_is_no_file(name, folder):
    (folder / "sub").mkdir()
    rename(folder, "vision.onnx", name)

    refused(folder, "missing")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b"3", b'"x"', b'{"schema": 1, "x": NaN}', b"{}"],
    ids=["empty", "open", "binary", "deep", "null", "list", "number", "string", "nan", "object"],
)
def test_a_manifest_that_is_none_is_refused(content, folder):
    (folder / MANIFEST).write_bytes(content)

    refused(folder, str(folder / MANIFEST))


@pytest.mark.parametrize(
    ("schema", "said"),
    [(6, "newer"), (10**30, "newer"), (4, "expected 5"), (-1, "expected 5"), ("5", "expected 5"), (None, "expected 5")],
)
def test_another_schema_is_refused(schema, said, folder):
    content = tiny.read_json(folder / MANIFEST) | {"schema": schema}
    tiny.write_json(folder / MANIFEST, content)

    message = refused(folder, said)
    assert ("upgrade lvlm-edge" if said == "newer" else "make a new bundle: lvlm-edge export") in message


def test_places_that_are_no_bundle_are_told_apart(good, tmp_path):
    (tmp_path / "empty").mkdir()

    refused(tmp_path / "empty", "has no manifest.json")
    refused(tmp_path / "nowhere", "is no folder")
    refused(good / "weights.bin", "is no folder")


FIELDS = [
    *[(field.name,) for field in dataclasses.fields(bundle.Manifest)],
    ("counts", "kept_tokens"),
    ("graphs", 0, "role"),
    ("graphs", 4, "inputs", 0, "shape"),
    ("cache", 1, "dropped"),
    ("embedding", "columns"),
    ("pictures", 0, "token_id"),
    ("pictures", 0, "views", "canvas", "size"),
    ("pictures", 0, "views", "how", "crop"),
    ("pictures", 0, "runs", 0, "rows"),
    ("files", "weights.bin", "sha256"),
    ("text", "image_token"),
    ("provenance", "revision"),
]


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
@pytest.mark.parametrize("how", ["missing", "renamed", "another type"])
def test_a_field_missing_unknown_or_of_another_type_is_named(path, how, folder):
    content = tiny.read_json(folder / MANIFEST)
    *parents, name = path
    place = content
    for key in parents:
        place = place[key]
    if how == "another type":
        place[name] = [{}] if isinstance(place[name], bool) else True
    else:
        value = place.pop(name)
        if how == "renamed":
            place[f"{name}_"] = value
    tiny.write_json(folder / MANIFEST, content)

    refused(folder, name)


HUGE = 10**18


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("embedding", "offset"), -1),
        (("embedding", "offset"), HUGE),
        (("embedding", "vocab"), 161 * 1000),
        (("embedding", "vocab"), 0),
        (("embedding", "hidden"), -32),
        (("embedding", "file"), "vision.onnx"),
        (("embedding", "file"), "notes.txt"),
        (("weights",), "notes.txt"),
        (("dtype",), "float8"),
        (("counts", "num_images"), 0),
        (("counts", "num_images"), 3),
        (("counts", "visual_tokens"), HUGE),
        (("counts", "visual_tokens"), -4),
        (("counts", "kept_tokens"), 5),
        (("counts", "prompt_tokens"), 27),
        (("counts", "text_tokens"), HUGE),
        (("axes",), 2),
        (("axes",), 3),
        (("pictures",), []),
        (("pictures", 0, "graphs"), ["decode"]),
        (("pictures", 0, "graphs"), []),
        (("pictures", 0, "runs"), []),
        (("pictures", 0, "runs", 0, "kind"), "audio"),
        (("pictures", 0, "runs", 0, "kind"), "cached"),
        (("pictures", 0, "runs", 0, "rows"), 3),
        (("pictures", 0, "runs", 0, "rows"), HUGE),
        (("pictures", 0, "runs", 0, "leading"), -1),
        (("pictures", 0, "runs", 0, "missing"), 1),
        (("pictures", 0, "views", "canvas", "size"), [0, 28]),
        (("pictures", 0, "views", "canvas", "rule"), "some"),
        (("pictures", 0, "views", "tiles"), [1, 1]),
        (("graphs", 0, "name"), "decode"),
        (("graphs", 0, "role"), "decode"),
        (("graphs", 0, "role"), "vision"),
        (("graphs", 0, "inputs"), []),
        (("graphs", 0, "inputs", 0, "name"), "pixels"),
        (("graphs", 0, "inputs", 0, "shape"), [1, 1, 28, 28]),
        (("graphs", 0, "inputs", 0, "dtype"), "float8"),
        (("graphs", 0, "inputs", 0, "dtype"), "O"),
        (("graphs", 0, "outputs", 0, "shape"), [HUGE, HUGE]),
        (("graphs", 1, "inputs", 0, "shape"), [1, 28, 33]),
        (("graphs", 3, "outputs", 0, "shape"), [1, 1, 161]),
        (("graphs", 4, "outputs", 0, "name"), "logit"),
        (("pictures", 0, "runs", 0, "grid"), [0, 2]),
        (("pictures", 0, "runs", 0, "grid"), [2, 3]),
        (("pictures", 0, "views", "how", "rescale"), "1e999"),
        (("files", "weights.bin", "size"), HUGE),
        (("files", "weights.bin", "size"), -1),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused(path, value, folder):
    content = tiny.read_json(folder / MANIFEST)
    *parents, name = path
    place = content
    for key in parents:
        place = place[key]
    place[name] = value
    put(folder, tiny.dumps(content).replace('"1e999"', "1e999"))

    with pytest.raises(LvlmEdgeError):
        open_bundle(folder, verify=False)


def test_no_single_bit_of_the_manifest_changes_what_it_says(folder):
    """Every field: a flip is refused, or leaves all values as they were (white space, an escape written otherwise)."""
    good, right, dice = (folder / MANIFEST).read_bytes(), bundle.load_manifest(folder), random.Random(0)
    flips = dice.sample(range(len(good) * 8), 5000)
    refusals = 0
    for flip in flips:
        content = bytearray(good)
        content[flip // 8] ^= 1 << flip % 8
        (folder / MANIFEST).write_bytes(content)
        try:
            assert bundle.load_manifest(folder) == right, flip
        except BundleError:
            refusals += 1
    assert refusals > 4900


def test_random_damage_to_the_manifest_never_ends_in_a_traceback(folder):
    good, dice = (folder / MANIFEST).read_bytes(), random.Random(0)
    for _ in range(200):
        content = bytearray(good)
        for _ in range(dice.choice((2, 8))):
            content[dice.randrange(len(content))] = dice.randrange(256)
        (folder / MANIFEST).write_bytes(content)
        with contextlib.suppress(BundleError):
            open_bundle(folder, verify=False)


def test_values_changed_at_random_never_end_in_a_traceback_when_the_bundle_is_run(folder):
    good, dice = tiny.read_json(folder / MANIFEST), random.Random(1)
    values = (0, -1, 1, 3, 29, 10**6, 10**30, "", "x", "decode", "logits", "float16", None, [], {}, True, 0.5)
    codes = []
    for _ in range(N):
        content = copy.deepcopy(good)
        spoil(content, dice, values)
        tiny.write_json(folder / MANIFEST, content)
        try:
            pipe = Pipeline.load(folder, verify=False)
            pipe.generate_tokens(checkpoints.prompt(5, 2), checkpoints.pixels(28), max_new_tokens=2)
        except LvlmEdgeError as error:
            codes.append(error.exit_code)
    assert set(codes) <= {2, 4, 5}
    assert len(codes) > 100


N = 200


def spoil(content: object, dice: random.Random, values: tuple[object, ...]) -> None:
    """Another value somewhere in nested lists and objects."""
    while True:
        keys = list(content) if isinstance(content, dict) else range(len(content))  # type: ignore[arg-type, call-overload]
        key = dice.choice(keys)
        inner = content[key]  # type: ignore[index]
        if isinstance(inner, (dict, list)) and inner and dice.random() < 0.9:
            content = inner
            continue
        content[key] = dice.choice(values)  # type: ignore[index]
        return


def test_a_bundle_says_where_its_files_are(good):
    opened = open_bundle(good, verify=False)

    assert isinstance(opened, Bundle)
    assert opened.path("weights.bin") == good / "weights.bin"
    assert opened.manifest.graph("select").file == "select.onnx"
    assert os.path.getsize(opened.path("weights.bin")) == opened.manifest.files["weights.bin"].size


@pytest.mark.parametrize("field", ["mean", "std"])
def test_pictures_have_three_channels(field, folder):
    content = tiny.read_json(folder / MANIFEST)
    content["pictures"][0]["views"]["how"][field] = [0.5] * 4
    tiny.write_json(folder / MANIFEST, content)

    refused(folder, f"{field} has 4 entries, expected 3")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_embedding_ends_with_its_file_to_the_byte(dtype, folder):
    content = tiny.read_json(folder / MANIFEST)
    table, width = content["embedding"], {"float32": 4, "float16": 2}[dtype]
    table |= {"dtype": dtype}
    table["offset"] = content["files"][table["file"]]["size"] - table["vocab"] * table["hidden"] * width
    tiny.write_json(folder / MANIFEST, content)
    assert open_bundle(folder).manifest.embedding.offset == table["offset"]

    table["offset"] += 1
    tiny.write_json(folder / MANIFEST, content)

    refused(folder, "the embedding reaches past the end of weights.bin")

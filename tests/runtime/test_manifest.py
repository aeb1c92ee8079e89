"""What a manifest must say for a bundle to run: sizes below, at and above their limits, on one written here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lvlm_edge.runtime.bundle import files, schema
from lvlm_edge.runtime.bundle.kv_cache import Layout, coded_length
from lvlm_edge.runtime.bundle.manifest import (
    Cache,
    Counts,
    Embedding,
    FileInfo,
    Generation,
    Graph,
    Manifest,
    Provenance,
    TensorInfo,
    WeightFormats,
    problems,
)
from lvlm_edge.runtime.errors import BundleError, UsageError
from lvlm_edge.runtime.pictures.image import Preprocessing
from lvlm_edge.runtime.pictures.layout import Picture, Run
from lvlm_edge.runtime.pictures.views import Canvas, Views
from lvlm_edge.runtime.prompt import TextConfig

HIDDEN, VOCAB = 3, 11


def tensor(name: str, *shape: int, dtype: str = "float32") -> TensorInfo:
    return TensorInfo(name, dtype, shape)


VIEWS = Views(canvas=Canvas(size=(28, 14)), how=Preprocessing(resize_to=(14, 28)))
PICTURE = Picture(token_id=9, graphs=("vision",), views=VIEWS, runs=(Run(kind="visual", rows=8, grid=(2, 4)),))
GRAPHS = (
    Graph(
        name="vision",
        file="vision.onnx",
        role="image",
        inputs=(tensor("pixel_values", 1, 3, 14, 28),),
        outputs=(tensor("image_embeds", 1, 8, HIDDEN),),
        names={},
    ),
    Graph(
        name="prefill_head",
        file="prefill_head.onnx",
        role="prefill",
        inputs=(tensor("inputs_embeds", 1, 13, HIDDEN), tensor("last_index", 1, dtype="int64")),
        outputs=(tensor("hidden", 1, 13, HIDDEN),),
        names={},
    ),
    Graph(
        name="prefill_tail",
        file="prefill_tail.onnx",
        role="prefill",
        inputs=(tensor("hidden", 1, 13, HIDDEN),),
        outputs=(tensor("logits", 1, 1, VOCAB),),
        names={},
    ),
    *(
        Graph(
            name=f"decode.{i}",
            file=f"decode.{i}.onnx",
            role="decode",
            inputs=(
                tensor("inputs_embeds" if i == 0 else "decoded", 1, 1, HIDDEN),
                tensor("position_ids", 1, 1, dtype="int64"),
                tensor("cache_length", 1, dtype="int64"),
            ),
            outputs=(tensor("decoded", 1, 1, HIDDEN),) if i == 0 else (tensor("logits", 1, 1, VOCAB),),
            names={},
        )
        for i in (0, 1)
    ),
)
GOOD = Manifest(
    schema=5,
    model={},
    method="none",
    method_config={},
    dtype="float32",
    opset=24,
    lowering="modern",
    counts=Counts(num_images=1, visual_tokens=8, kept_tokens=8, text_tokens=5, prompt_tokens=13, new_tokens=2),
    axes=1,
    stages=(),
    graphs=GRAPHS,
    variants={},
    cache=tuple(Cache(name=str(i), heads=1, head_dim=2, capacity=15, dropped=0) for i in (0, 1)),
    embedding=Embedding(file="weights.bin", offset=8, vocab=VOCAB, hidden=HIDDEN, dtype="float32", columns=False),
    pictures=(PICTURE,),
    image_rows={"image_embeds": "inputs_embeds"},
    fewer_pictures=False,
    text=None,
    eos_token_ids=(2,),
    generation=Generation(),
    weights="weights.bin",
    formats=WeightFormats(),
    provenance=Provenance(source="x", revision=None, config_sha256="", versions={}),
    files={name: FileInfo(8 + 4 * VOCAB * HIDDEN, "") for name in ("weights.bin", *(g.file for g in GRAPHS))},
)
Change = Callable[[Manifest], Manifest]


def counts(**fields: int) -> Change:
    return lambda m: replace(m, counts=replace(m.counts, **fields))


def drawn(**fields: float) -> Change:
    return lambda m: replace(m, generation=Generation(**fields))


def canvas(**fields: Any) -> Change:
    changed = replace(VIEWS, canvas=replace(VIEWS.canvas, **fields))
    return lambda m: replace(m, pictures=(replace(PICTURE, views=changed),))


def views(**fields: Any) -> Change:
    return lambda m: replace(m, pictures=(replace(PICTURE, views=replace(VIEWS, **fields)),))


def tiles(*given: int) -> Change:
    return views(tiles=given)


def field(**fields: Any) -> Change:
    return lambda m: replace(m, **fields)


def runs(*given: Run) -> Change:
    return lambda m: replace(m, pictures=(replace(PICTURE, runs=given),))


def of_graph(index: int, **fields: Any) -> Change:
    return lambda m: replace(m, graphs=tuple(replace(g, **fields) if i == index else g for i, g in enumerate(m.graphs)))


def extra(*shape: int, dtype: str = "float32") -> Change:
    """An output more that nobody reads."""
    return of_graph(1, outputs=(*GRAPHS[1].outputs, tensor("more", *shape, dtype=dtype)))


TOP = 1 << 20  # pixels of a side
ABOVE_0 = [name for name in vars(GOOD.counts) if name not in ("kept_tokens", "num_videos")]
BELIEFS: list[tuple[Change, str, bool]] = [  # a change, words of what may be said of it, and whether they are said
    *((field(dtype=name), "dtype is", False) for name in ("float32", "float16", "bfloat16")),
    (field(dtype="int64"), "dtype is 'int64', expected one of float32, float16, bfloat16", True),
    *((counts(**{name: 0}), "expected numbers above 0", True) for name in ABOVE_0),
    *((counts(**{name: 1}), "expected numbers above 0", False) for name in vars(GOOD.counts)),
    (counts(kept_tokens=0), "expected numbers above 0", False),
    (counts(kept_tokens=-1), "expected numbers above 0", True),
    (counts(kept_tokens=8), "kept_tokens is", False),
    (counts(kept_tokens=9), "kept_tokens is 9 of 8 visual tokens", True),
    (counts(num_images=2), "1 pictures, expected 2", True),
    (field(pictures=(PICTURE, PICTURE)), "2 pictures, expected 1", True),
    (field(axes=3), "axes is", False),
    *((field(axes=axes), f"axes is {axes}, expected 1 or 3", True) for axes in (0, 2, 4)),
    (runs(), "is not made of whole runs", True),
    (runs(Run(kind="visual", rows=7, grid=(2, 4))), "is not made of whole runs", True),
    (runs(PICTURE.runs[0], Run(kind="text", rows=1)), "is not made of whole runs", True),
    (counts(visual_tokens=9), "9 visual tokens, the pictures have 8", True),
    (counts(prompt_tokens=12), "prompt_tokens is 12, not pictures and text (13)", True),
    (counts(prompt_tokens=14), "prompt_tokens is 14, not pictures and text (13)", True),
    (runs(Run(kind="visual", rows=1, grid=(2, 13), missing=25)), "more positions than the prompt", False),
    (field(axes=3), "more positions than the prompt", False),
    (lambda m: runs(Run(kind="visual", rows=8, grid=(1, 13), missing=5))(replace(m, axes=3)), "more positions", False),
    (lambda m: runs(Run(kind="visual", rows=8, grid=(1, 14), missing=6))(replace(m, axes=3)), "more positions", True),
    *((drawn(**{name: value}), "out of its range", False) for name, value in
      (("temperature", 0), ("top_k", 0), ("top_k", 1), ("top_p", 0.01), ("top_p", 1), ("repetition_penalty", 0.01))),
    *((drawn(**{name: value}), "out of its range", True) for name, value in
      (("temperature", -0.01), ("top_k", -1), ("top_p", 0), ("top_p", 1.01), ("repetition_penalty", 0))),
    (field(cache=(GOOD.cache[0],) * 2), "caches are 0, 0, expected different names", True),
    (canvas(size=(1, 1)), "impossible canvas", False),
    (canvas(size=(0, 1)), "impossible canvas", True),
    (canvas(size=(1, 0)), "impossible canvas", True),
    (canvas(size=(TOP, TOP)), "impossible canvas", False),
    (canvas(size=(TOP + 1, 1)), "impossible canvas", True),
    (canvas(size=(1, TOP + 1)), "impossible canvas", True),
    (canvas(factor=1), "impossible canvas", False),
    (canvas(factor=0), "impossible canvas", True),
    (canvas(factor=TOP + 1), "impossible canvas", True),
    (canvas(rule="multiple"), "impossible canvas", False),
    (canvas(rule="most"), "impossible canvas", True),
    (canvas(rule="pinpoints", among=((28, 14),)), "impossible canvas", False),
    (canvas(rule="pinpoints", among=((1, 1), (28, 14))), "impossible canvas", False),
    (canvas(rule="pinpoints", among=((0, 9), (28, 14))), "impossible canvas", True),
    (canvas(rule="pinpoints", among=((9, 0), (28, 14))), "impossible canvas", True),
    (canvas(rule="pinpoints", among=((14, 28),)), "impossible canvas", True),
    (canvas(rule="pinpoints"), "impossible canvas", True),
    (canvas(among=((0, 0),)), "impossible canvas", False),  # under a rule that does not read them
    (canvas(rule="ratio", among=((14, 28), (28, 14))), "impossible canvas", False),
    (canvas(rule="ratio", among=((14, 28),)), "impossible canvas", True),
    (canvas(rule="ceil", longest=TOP), "impossible canvas", False),
    (canvas(longest=TOP + 1), "impossible canvas", True),
    (canvas(longest=-1), "impossible canvas", True),
    (canvas(cells=(1, TOP)), "impossible canvas", False),  # which are not read without a picture
    (canvas(cells=(TOP + 1, 1)), "impossible canvas", True),
    (canvas(cells=(0, -1)), "impossible canvas", True),
    (canvas(picture=(0, -1)), "impossible canvas", True),
    (canvas(picture=(28, 14), cells=(4, 8)), "impossible canvas", False),
    (canvas(picture=(TOP, 1), cells=(8, 8)), "impossible canvas", True),  # which covers no whole cell
    (canvas(picture=(1, TOP), cells=(8, 8)), "impossible canvas", True),
    (canvas(picture=(28, 28), cells=(TOP, 1)), "impossible canvas", False),
    (canvas(picture=(TOP + 1, TOP), cells=(8, 8)), "impossible canvas", True),
    (canvas(picture=(0, 14), cells=(4, 8)), "impossible canvas", True),
    (canvas(picture=(28, 0), cells=(4, 8)), "impossible canvas", True),
    (canvas(picture=(28, 14), cells=(0, 8)), "impossible canvas", True),
    (canvas(picture=(28, 14), cells=(4, 0)), "impossible canvas", True),
    (views(fit="stretch"), "impossible canvas", False),
    (views(fit="fill"), "impossible canvas", True),
    *((views(whole=whole, tiles=(1, 1)), "impossible canvas", False) for whole in ("first", "last", "none")),
    (views(whole="middle"), "impossible canvas", True),
    (tiles(1, 1), "impossible canvas", False),
    (tiles(0, 1), "impossible canvas", True),
    (tiles(1, 0), "impossible canvas", True),
    (tiles(1, TOP + 1), "impossible canvas", True),
    (of_graph(1, name="vision"), "graphs are vision, vision, prefill_tail, decode.0, decode.1, expected", True),
    (of_graph(0, role="vision"), "expected image, prefill and decode", True),
    (field(pictures=(replace(PICTURE, graphs=()),)), "which are no image graphs", True),
    (field(pictures=(replace(PICTURE, graphs=("vision", "decode.0")),)), "which are no image graphs", True),
    *((extra(1, dtype=name), "no dtype or shape", False) for name in ("float32", "float16", "bfloat16", "int64")),
    (extra(1, dtype="int32"), "no dtype or shape of a tensor", True),
    (extra(1, 0), "no dtype or shape of a tensor", True),
    (extra(1, (1 << 40) - 1), "no dtype or shape of a tensor", False),
    (extra(1, 1 << 40), "no dtype or shape of a tensor", True),
    (lambda m: replace(m, variants={"ort": of_graph(0, role="x")(m).graphs}), "expected image, prefill and", True),
    (lambda m: replace(m, variants={"ort": m.graphs}), "expected", False),
]  # fmt: skip


def test_a_manifest_that_agrees_with_itself_has_no_problems():
    assert list(problems(GOOD)) == []


@pytest.mark.parametrize(("change", "words", "said"), BELIEFS, ids=[f"{i}-{b[1][:24]}" for i, b in enumerate(BELIEFS)])
def test_a_limit_is_kept_to_the_last_number(change, words, said):
    found = list(problems(change(GOOD)))

    assert any(words in problem for problem in found) == said, found


READ = [  # graph, whether an input, tensor: what the host writes and reads, of which every size is known
    (0, True, "pixel_values"),
    (0, False, "image_embeds"),
    (1, True, "inputs_embeds"),
    (2, False, "logits"),
    (3, True, "inputs_embeds"),
    (3, True, "position_ids"),
    (3, True, "cache_length"),
    (4, True, "position_ids"),
    (4, True, "cache_length"),
    (4, False, "logits"),
]


@pytest.mark.parametrize(("index", "is_input", "name"), READ)
def test_what_the_host_reads_and_writes_has_the_sizes_that_it_uses(index, is_input, name):
    side = "inputs" if is_input else "outputs"
    own = getattr(GRAPHS[index], side)
    (right,) = [t for t in own if t.name == name]
    others = tuple(t for t in own if t.name != name)
    shapes = [(*right.shape, 1), right.shape[:-1]]
    for axis, size in enumerate(right.shape):
        shapes += [(*right.shape[:axis], size + step, *right.shape[axis + 1 :]) for step in (-1, 1) if size + step > 0]

    for shape in shapes:
        wrong = {side: (*others, replace(right, shape=shape))}
        found = list(problems(of_graph(index, **wrong)(GOOD)))
        assert any(str(list(shape)[1:])[1:-1] in problem for problem in found), shape
        assert index == 0 or any(problem.startswith(f"{GRAPHS[index].name} has {name} of shape") for problem in found)
    assert list(problems(of_graph(index, **{side: others})(GOOD)))
    assert list(problems(of_graph(index, **{side: (*own, right)})(GOOD)))  # twice


@pytest.mark.parametrize(("rows", "views", "fits"), [(8, 1, True), (4, 2, False), (4, 5, False), (2, 4, False)])
def test_a_graph_that_runs_once_per_view_returns_a_views_share_of_the_rows(rows, views, fits):
    """`tiles` of n x m make n * m + 1 views; 8 rows are shared out among as many runs."""
    made = {1: None, 2: (1, 1), 4: (3, 1), 5: (2, 2)}[views]
    picture = replace(PICTURE, views=replace(VIEWS, tiles=made))
    found = of_graph(0, outputs=(tensor("image_embeds", 1, rows, HIDDEN),))(replace(GOOD, pictures=(picture,)))

    said = [problem for problem in problems(found) if "image_embeds has shape" in problem]

    assert (said == []) == (fits or rows * views == 8)
    assert all(f"expected 8 rows of 3 from {views} runs" in problem for problem in said)


def test_a_graph_without_pixels_returns_all_rows_at_once():
    encoder = replace(GRAPHS[0], name="encoder", outputs=(tensor("features", 1, 4, 5),))
    projector = replace(GRAPHS[0], inputs=(tensor("features", 1, 8, 5),))
    picture = replace(PICTURE, graphs=("encoder", "vision"), views=replace(VIEWS, tiles=(1, 1)))
    made = replace(GOOD, pictures=(picture,), graphs=(encoder, projector, *GRAPHS[1:]))

    assert list(problems(made)) == []


def test_views_runs_and_graphs_are_counted():
    tiled = replace(PICTURE, views=replace(VIEWS, tiles=(2, 3)))
    made = replace(GOOD, pictures=(PICTURE, tiled))

    assert made.views == 1 + 7
    assert [graph.name for graph in made.role("decode")] == ["decode.0", "decode.1"]
    assert made.graph("prefill_tail") is GRAPHS[2] and made.image_token_id == 9
    assert not made.selects
    kept = of_graph(1, outputs=(tensor("kept_visual", 4, dtype="int64"),))(made)
    assert kept.selects
    assert made.graphs_of("vision.onnx") == GRAPHS[:1]
    own = replace(made, variants={"ort": GRAPHS[:1]})
    assert own.for_backend("ort").graphs == GRAPHS[:1] and own.for_backend("trt").graphs == GRAPHS


@pytest.mark.parametrize(
    ("formats", "quantized"),
    [
        ({}, False),
        ({"decoder": "int8"}, True),
        ({"vision": "int4"}, True),
        ({"head": "int8"}, True),
        ({"block": 32}, False),
    ],
)
def test_a_bundle_is_quantised_where_any_part_is(formats, quantized):
    assert WeightFormats(**formats).quantized == quantized


def test_nothing_is_quantised_and_the_likeliest_token_is_taken_where_a_checkpoint_says_nothing():
    assert Generation() == Generation(temperature=0, top_k=0, top_p=1, repetition_penalty=1)
    assert WeightFormats() == WeightFormats(decoder="as-is", vision="as-is", head="as-is", block=128)


# Caches.


def test_caches_have_buffers_bytes_and_slots_as_exported_graphs_take_them():
    layout = Layout(
        (
            Cache(name="0", heads=2, head_dim=3, capacity=5, dropped=0),
            Cache(name="1.kept", heads=1, head_dim=3, capacity=4, dropped=4),
            Cache(name="2", heads=1, head_dim=3, capacity=4, dropped=-2),
        ),
        "float16",
    )

    assert layout.buffers()[0] == TensorInfo("past_key_values.0.key", "float16", (1, 2, 5, 3))
    assert [b.name for b in layout.buffers()[1:4]] == [
        f"past_key_values.{n}" for n in ("0.value", "1.kept.key", "1.kept.value")
    ]
    assert layout.bytes() == 2 * 2 * 3 * (2 * 5 + 4 + 4)
    assert replace(layout, dtype="float32").bytes() == 2 * layout.bytes()
    assert layout.lengths(7) == (7, 3, 9)
    assert (coded_length(7), coded_length(7, 3)) == (7, 7 + 3 * 2**24)  # bundles of older versions hold this number
    assert [layout.slot(f"present.{n}.key", 7) for n in ("0", "1.kept", "2")] == [7, 3, 9]
    assert [layout.slot(f"present.{n}.value", 7 + 3 * 2**24) for n in ("0", "1.kept", "2")] == [7, 6, 9]
    assert layout.slot("present.1.kept.key", 2) == 0  # before anything is left of what is dropped


# Files.


INSIDE = ("x" * 200, "a/b.onnx", "a..b")
OUTSIDE = ("x" * 201, "", "a:b", "a\\b", "/a", "a/..", "a\tb")


@pytest.mark.parametrize(("name", "fits"), [*((n, True) for n in INSIDE), *((n, False) for n in OUTSIDE)])
def test_a_name_of_a_file_stays_inside(name, fits):
    if fits:
        assert files.safe_name(name) == name
    else:
        with pytest.raises(BundleError, match=r"^manifest: "):
            files.safe_name(name)


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.5, "0.5"), (1.0, "1"), (0.25, "0.25"), (1 / 3, "0.3333333333333333"), (1e-7, "1e-07")]
)
def test_a_ratio_is_written_short_where_that_is_all_of_it(ratio, text):
    assert files.ratio_text(ratio) == text
    assert files.manifest_name(ratio) == f"manifest.keep-{text}.json"
    assert files.certificate_name(files.manifest_name(ratio)) == f"certificate.keep-{text}.json"


def test_the_first_manifest_in_a_name_is_replaced():
    assert files.certificate_name("manifest.keep-manifest.json") == "certificate.keep-manifest.json"


@pytest.mark.parametrize(("own", "found"), [(0.4, [0.4, 1.0, 0.25, 0.1]), (None, [])])
def test_keep_ratios_are_the_manifests_that_are_named_like_one(own, found, tmp_path, monkeypatch):
    for text in ("0.1", "1", "0.25", "0", "1.5", "-0.5", "0.50", "x", "nan", "1.0"):
        (tmp_path / f"manifest.keep-{text}.json").touch()
    config = {} if own is None else {"keep_ratio": own}
    monkeypatch.setattr(
        files, "load_manifest", lambda folder, name="manifest.json": SimpleNamespace(method_config=config)
    )

    assert files.keep_ratios(tmp_path) == found
    if own is None:
        with pytest.raises(UsageError, match=r"keeps every visual token, not 0\.5; choose one of them, or add it with"):
            files._held(tmp_path, 0.5)
    else:
        assert files._held(tmp_path, 0.25) == "manifest.keep-0.25.json"
        with pytest.raises(UsageError, match=r"holds keep ratio 0\.4, 1, 0\.25, 0\.1, not 0\.5; choose"):
            files._held(tmp_path, 0.5)


def test_a_digest_is_that_of_sorted_fields_without_spaces():
    said = hashlib.sha256(b'{"a":[1,{"x":2,"y":3}],"b":"c"}').hexdigest()

    assert files.digest({"b": "c", "digest": "anything", "a": [1, {"y": 3, "x": 2}]}) == said


def test_a_file_is_hashed_beyond_the_first_piece(tmp_path):
    content = bytes(range(256)) * (1 << 14)  # 4 MiB
    (tmp_path / "a").write_bytes(content + b"end")

    assert files.sha256(tmp_path / "a") == hashlib.sha256(content + b"end").hexdigest()


def test_a_graphs_bytes_are_the_listed_ones_and_read_the_weights_alone(tmp_path):
    content = b""  # a model of nothing
    listed = {"a.onnx": FileInfo(0, hashlib.sha256(content).hexdigest())}
    plain, verified = (files.Bundle(tmp_path, replace(GOOD, files=listed), verified=v) for v in (False, True))
    (tmp_path / "a.onnx").write_bytes(content)
    assert plain.graph("a.onnx") == verified.graph("a.onnx") == content

    with pytest.raises(BundleError, match=r"b\.onnx: cannot be read as ONNX \(.*No such file.*\); export or copy"):
        plain.graph("b.onnx")
    (tmp_path / "a.onnx").write_bytes(b"\x80")
    with pytest.raises(
        BundleError, match=r"a\.onnx: cannot be read as ONNX \(a number without end at byte 1\); export"
    ):
        plain.graph("a.onnx")
    (tmp_path / "a.onnx").write_bytes(b"\x08\x01")
    assert plain.graph("a.onnx") == b"\x08\x01"
    with pytest.raises(BundleError, match=r"a\.onnx: was altered \(its sha256 is not the manifest's\)"):
        verified.graph("a.onnx")


def test_a_bundle_is_verified_where_that_is_said_alone():
    assert not files.Bundle(Path("x"), GOOD).verified
    assert files.Bundle(Path("x"), GOOD).name == "manifest.json"


def checked(**changed: Any) -> None:
    """The references of a bundle whose embedding, or manifest, is another."""
    own = {f.name for f in dataclasses.fields(Embedding)}
    table = replace(GOOD.embedding, **{k: v for k, v in changed.items() if k in own})
    made = replace(GOOD, embedding=table, **{k: v for k, v in changed.items() if k not in own})
    files._check_references(files.Bundle(Path("x"), made))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"offset": 9}, "the embedding reaches past the end of weights.bin"),
        ({"offset": 0}, None),
        ({"offset": -1}, "reaches past the end"),
        ({"vocab": 1}, None),
        ({"vocab": 0}, "reaches past the end"),
        ({"hidden": 1}, None),
        ({"hidden": 0}, "reaches past the end"),
        ({"vocab": VOCAB + 1}, "reaches past the end"),
        ({"hidden": HIDDEN + 1}, "reaches past the end"),
        ({"dtype": "float16", "offset": 8 + 2 * VOCAB * HIDDEN}, None),
        ({"dtype": "bfloat16", "offset": 8 + 2 * VOCAB * HIDDEN}, None),
        ({"dtype": "bfloat16", "offset": 9 + 2 * VOCAB * HIDDEN}, "reaches past the end"),
        ({"dtype": "int8"}, "embedding dtype is 'int8', expected float32 or float16 or bfloat16"),
        ({"file": "none.bin"}, "names 'none.bin', which is not in its list of files"),
        ({"weights": "none.bin"}, "names 'none.bin'"),
        ({"variants": {"ort": (replace(GRAPHS[0], file="none.onnx"),)}}, "names 'none.onnx'"),
        ({"text": SimpleNamespace(tokenizer="weights.bin", chat_template="weights.bin")}, None),
        ({"text": SimpleNamespace(tokenizer="none", chat_template="weights.bin")}, "names 'none'"),
        ({"text": SimpleNamespace(tokenizer="weights.bin", chat_template="none")}, "names 'none'"),
    ],
    ids=str,
)
def test_what_a_manifest_names_is_listed_and_its_embedding_inside_its_file(changed, said):
    if said is None:
        checked(**changed)
    else:
        with pytest.raises(BundleError, match=said):
            checked(**changed)


# Fields.


@dataclass(frozen=True)
class Inner:
    size: int


@dataclass(frozen=True)
class Outer:
    name: str
    share: float
    pair: tuple[int, str]
    many: tuple[Inner, ...]
    by_name: Mapping[str, tuple[int, ...]]
    maybe: int | None
    anything: Any


RIGHT: dict[str, Any] = {
    "name": "a",
    "share": 1,
    "pair": [1, "b"],
    "many": [{"size": 1}, {"size": 2}],
    "by_name": {"x": [1], "y": []},
    "maybe": None,
    "anything": [{}],
}


def test_values_become_what_they_are_annotated_as():
    found = schema.parse(Outer, RIGHT | {"maybe": 3}, "outer")

    assert found == Outer("a", 1.0, (1, "b"), (Inner(1), Inner(2)), {"x": (1,), "y": ()}, 3, [{}])
    assert type(found.share) is float
    assert schema.parse(Outer, RIGHT, "outer").maybe is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": 3}, "outer.name is int, expected str"),
        ({"share": "1"}, "outer.share is str, expected float"),
        ({"share": True}, "outer.share is bool, expected float"),
        ({"share": math.inf}, "outer.share is inf, expected a finite number"),
        ({"share": math.nan}, "outer.share is nan, expected a finite number"),
        ({"pair": [1]}, "outer.pair has 1 entries, expected 2"),
        ({"pair": [1, "b", 2]}, "outer.pair has 3 entries, expected 2"),
        ({"pair": ["b", 1]}, "outer.pair[0] is str, expected int"),
        ({"pair": [1, 2]}, "outer.pair[1] is int, expected str"),
        ({"pair": "ab"}, "outer.pair is str, expected a list"),
        ({"many": [{"size": 1}, {"size": None}]}, "outer.many[1].size is NoneType, expected int"),
        ({"many": [{"size": 1}, 4]}, "outer.many[1] is int, expected an object"),
        ({"many": [{}]}, "outer.many[0] lacks size, has unknown nothing"),
        ({"many": [{"size": 1, "more": 2}]}, "outer.many[0] lacks nothing, has unknown more"),
        ({"by_name": []}, "outer.by_name is list, expected an object"),
        ({"by_name": {"x": [1, "2"]}}, "outer.by_name.x[1] is str, expected int"),
        ({"maybe": True}, "outer.maybe is bool, expected int"),
        ({"more": 1}, "outer lacks nothing, has unknown more"),
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_named(changed, said):
    with pytest.raises((TypeError, ValueError)) as caught:
        schema.parse(Outer, RIGHT | changed, "outer")

    assert str(caught.value) == said


def test_every_field_that_is_missing_is_named():
    with pytest.raises(
        TypeError, match=r"^outer lacks name, share, pair, many, by_name, maybe, anything, has unknown x$"
    ):
        schema.parse(Outer, {"x": 1}, "outer")
    with pytest.raises(TypeError, match=r"^outer is list, expected an object$"):
        schema.parse(Outer, [], "outer")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_in_json_is_refused(constant, tmp_path):
    content: dict[str, Any] = {"schema": 5, "model": {"x": "@"}}
    text = json.dumps(content | {"digest": files.digest(content)}).replace('"@"', constant)
    (tmp_path / "manifest.json").write_text(text)

    with pytest.raises(BundleError, match=rf"manifest\.json: is not JSON \({constant} is no number\); export or copy"):
        files.load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("schema_", "said"),
    [
        (6, r"schema 6 is newer than this version reads \(5\); upgrade"),
        (5, "was altered"),
        (4, "schema is 4, expected 5; make a new"),
        ("6", "schema is '6', expected 5"),
        (None, "schema is None, expected 5"),
    ],
)
def test_the_schema_is_the_first_thing_that_is_looked_at(schema_, said, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": schema_}))

    with pytest.raises(BundleError, match=said):
        files.load_manifest(tmp_path)


def test_what_two_ratios_share_is_counted_once(tmp_path, monkeypatch):
    sizes = {"weights.bin": 1000, "both": 20, "of 0.5": 3, "of 0.25": 4, "of 0.25 too": 5}
    own = {0.5: ["weights.bin", "both", "of 0.5"], 0.25: ["of 0.25", "weights.bin", "both", "of 0.25 too"]}

    def opened(folder: Path, *, verify: bool, keep_ratio: float) -> Any:
        assert (folder, verify) == (tmp_path, False)
        listed = {name: FileInfo(sizes[name], f"sha256 of {name}") for name in own[keep_ratio]}
        return SimpleNamespace(manifest=replace(GOOD, files=listed))

    monkeypatch.setattr(files, "open_bundle", opened)

    found = files.shared_files(tmp_path, [0.5, 0.25])

    assert found["beyond_weights"] == {"0.5": 20 + 3, "0.25": 4 + 5}
    assert found["files"]["both"] == {"size": 20, "sha256": "sha256 of both", "keep_ratios": [0.5, 0.25]}
    assert {name: entry["keep_ratios"] for name, entry in found["files"].items() if name.startswith("of")} == {
        "of 0.5": [0.5], "of 0.25": [0.25], "of 0.25 too": [0.25]
    }  # fmt: skip


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    files.save_manifest(tmp_path, GOOD)

    assert files.load_manifest(tmp_path) == GOOD
    assert json.loads((tmp_path / "manifest.json").read_text())["digest"] == files.digest(
        json.loads(json.dumps(dataclasses.asdict(GOOD)))
    )


def test_placeholders_are_one_for_images_and_those_of_the_tokenizer():
    text = TextConfig(
        tokenizer="t", chat_template="c", image_token="i", image_token_id=PICTURE.token_id, bos_token="", eos_token=""
    )
    words = "expected one for images, and another for videos"

    assert not list(problems(replace(GOOD, text=text)))
    for wrong in (
        replace(GOOD, text=replace(text, image_token_id=PICTURE.token_id + 1)),
        replace(GOOD, text=replace(text, video_token_id=PICTURE.token_id)),
        replace(GOOD, pictures=(PICTURE, replace(PICTURE, token_id=PICTURE.token_id + 1))),
    ):
        assert any(words in problem for problem in problems(wrong))

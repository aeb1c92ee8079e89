"""What the host makes of a prompt before and between graphs, against rows counted here; no graph runs."""

from __future__ import annotations

import inspect
import itertools
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.backends import Highest
from lvlm_edge.runtime.bundle import open_bundle
from lvlm_edge.runtime.errors import InputError, LvlmEdgeError, UnsupportedError, UsageError
from lvlm_edge.runtime.pictures.layout import Run, is_complete, lay_out, positions_of
from lvlm_edge.runtime.pictures.sources import Reading
from lvlm_edge.runtime.pipeline import decoder as decoding
from lvlm_edge.runtime.pipeline import inputs
from lvlm_edge.runtime.pipeline.decoder import Decoder, Result, Turn
from lvlm_edge.runtime.pipeline.sampling import Sampler, Sampling, StopStrings
from tests.runtime.test_manifest import GOOD, GRAPHS, HIDDEN, PICTURE, VIEWS, VOCAB, tensor

IMAGE = PICTURE.token_id
SMALL = replace(
    PICTURE, views=replace(VIEWS, how=replace(VIEWS.how, resize_to=(14, 14))), runs=(Run(kind="visual", rows=4),)
)
FEWER = replace(
    GOOD,
    pictures=(PICTURE, SMALL),
    counts=replace(GOOD.counts, num_images=2, visual_tokens=12, kept_tokens=6, prompt_tokens=17),
    fewer_pictures=True,
    method_config={"keep_ratio": 0.5, "keep_tokens": None},
)
SELECTS = replace(
    FEWER,
    graphs=(*GRAPHS, replace(GRAPHS[2], name="select", outputs=(tensor("kept_visual", 6, dtype="int64"),))),
)


# Messages.


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_an_empty_question_is_refused(prompt):
    with pytest.raises(InputError, match=r"^prompt: is empty; ask something$"):
        inputs.user_turn(prompt, 1, None)


def test_a_question_comes_after_its_images_and_the_system_message_before_both():
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": " a "}]}

    assert inputs.user_turn(" a ", 2, None) == [turn]
    assert inputs.user_turn(" a ", 2, {"role": "system", "content": ""}) == [{"role": "system", "content": ""}, turn]


def test_images_are_counted_in_lists_of_parts_alone():
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text"}, "image", {"type": "image"}]},
        {"role": "user", "content": "image"},
        {"role": "user"},
        {"role": "user", "content": {"type": "image"}},
        {"role": "user", "content": ({"type": "image"},)},
    ]

    inputs.check_named(messages, 3, 0)
    with pytest.raises(InputError, match=r"^messages: name 3 image\(s\), 2 given"):
        inputs.check_named(messages, 2, 0)


# Pixels.


def read_images(manifest: Any, images: list[Any], reading: Reading, *, fit: bool = False) -> Any:
    return inputs.read_media(manifest, ["image"] * len(images), images, [], reading, fit=fit)


def of(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [np.full(shape, i, np.float32) for i, shape in enumerate(shapes)]


LARGE, TINY = (1, 3, 14, 28), (1, 3, 14, 14)


@pytest.mark.parametrize(
    ("shapes", "planned"),
    [([LARGE, TINY], [PICTURE, SMALL]), ([TINY, LARGE], [SMALL, PICTURE]), ([TINY], [SMALL]), ([], [])],
)
def test_pixels_are_given_the_planned_picture_of_their_shape(shapes, planned):
    given = of(*shapes)

    found = inputs.media(FEWER, given)

    assert [one.picture for one in found] == planned
    assert all(np.array_equal(one.pixels, pixels) for one, pixels in zip(found, given, strict=True))
    assert inputs.media(FEWER, None) == ()


def test_pixels_of_several_pictures_of_one_size_are_taken_apart():
    tiled = replace(PICTURE, views=replace(VIEWS, tiles=(1, 1)))
    made = replace(FEWER, pictures=(PICTURE, tiled, PICTURE))
    whole = np.arange(4)[:, None, None, None] * np.ones((4, 3, 14, 28), np.float32)

    found = inputs.media(made, whole)

    assert [one.picture for one in found] == [PICTURE, tiled, PICTURE]
    assert [one.pixels[:, 0, 0, 0].tolist() for one in found] == [[0], [1, 2], [3]]
    assert len(inputs.media(made, whole[:3])) == 2  # fewer pictures than planned


@pytest.mark.parametrize(
    ("manifest", "given", "said"),
    [
        (GOOD, None, "pixel_values: is nothing, the bundle is planned for 1 image(s); see num_images"),
        (GOOD, [], "pixel_values: is nothing, the bundle is planned for 1 image(s); see num_images"),
        (GOOD, of(LARGE, LARGE), "pixel_values: 2 given, the bundle is planned for 1; give 1, or export with"),
        (FEWER, of(*[LARGE] * 3), "pixel_values: 3 given, the bundle is planned for 2; give at most 2, or export"),
        (FEWER, of(LARGE, LARGE), "pixel_values: is [1, 3, 14, 28], the bundle is planned for [1, 3, 14, 28] and ["),
        (GOOD, np.zeros((2, 3, 14, 28)), "pixel_values: is [2, 3, 14, 28], the bundle is planned for [1, 3, 14, 28];"),
        (GOOD, np.zeros((0, 3, 14, 28)), "pixel_values: is [0, 3, 14, 28], the bundle is planned for [1, 3, 14, 28];"),
        (GOOD, np.full(LARGE, np.nan), "pixel_values: holds values that are infinite or not a number"),
        (replace(GOOD, pictures=(PICTURE,) * 2), np.zeros(LARGE), "pixel_values: 1 given, the bundle is planned for 2"),
        (replace(GOOD, pictures=(PICTURE,) * 2), np.zeros((3, 3, 14, 28)), "is planned for [2, 3, 14, 28]; see"),
    ],
)  # fmt: skip
def test_pixels_of_another_number_or_shape_are_refused(manifest, given, said):
    with pytest.raises(InputError) as caught:
        inputs.media(manifest, given)

    assert said in str(caught.value)


def test_sizes_choose_among_planned_pictures():
    both = replace(VIEWS.canvas, rule="pinpoints", among=((28, 14), (14, 28)))
    pinned = replace(PICTURE, views=replace(VIEWS, canvas=both))
    made = replace(FEWER, pictures=(pinned, PICTURE))
    given = of(LARGE, LARGE)

    for sizes, planned in (
        ([(99, 5), (5, 99)], [pinned, PICTURE]),  # the first belongs on its own canvas, the second on any
        ([(5, 99), (99, 5)], [PICTURE, pinned]),
    ):
        assert [one.picture for one in inputs.media(made, given, sizes)] == planned
        assert [one.picture for one in inputs.media(made, np.concatenate(given), sizes)] == planned
    with pytest.raises(InputError, match=r"^picture: 5x99 is resized to 14x28, the bundle is for 28x14; give a pict"):
        inputs.media(replace(made, pictures=(pinned,)), given[:1], [(5, 99)])
    with pytest.raises(InputError, match=r"^image_sizes: has 3 image\(s\), the bundle is planned for 2; give"):
        inputs.media(made, given, [(9, 9)] * 3)


def test_there_is_a_size_of_each_picture():
    inputs.check_sizes([(1, 2), (3, 4)], 2)
    for sizes, images in (([(1, 2)], 2), ([(1, 2)] * 3, 2)):
        with pytest.raises(InputError, match=rf"^image_sizes: has {len(sizes)} entries, 2 image\(s\) given; give \(w"):
            inputs.check_sizes(sizes, images)
    with pytest.raises(InputError, match=r"^image_sizes: has 1 entries, 2 image\(s\) given; give \(width, height\)"):
        inputs.media(FEWER, np.zeros((2, 3, 14, 28), np.float32), [(28, 14)])


# Planned pictures of equal views that stand for different rows.

OTHER = replace(PICTURE, runs=(Run(kind="text", rows=1, ids=(4,)), *PICTURE.runs))
ALIKE = replace(FEWER, pictures=(PICTURE, OTHER))


def test_pixels_of_prepare_know_their_planned_picture():
    tall = replace(VIEWS.canvas, rule="pinpoints", among=((28, 14), (14, 28)))
    one = replace(PICTURE, views=replace(VIEWS, canvas=tall))
    made = replace(ALIKE, pictures=(one, OTHER))
    wide, high = np.zeros((14, 28, 3), np.uint8), np.zeros((28, 14, 3), np.uint8)

    pixels = read_images(made, [high, wide], Reading())

    assert isinstance(pixels, inputs.Pixels) and pixels.pictures == (OTHER, one)
    assert [found.picture for found in inputs.media(made, pixels)] == [OTHER, one]
    alone = read_images(made, [high], Reading())
    assert [found.picture for found in inputs.media(made, alone)] == [OTHER]
    assert [found.picture for found in inputs.media(made, [alone])] == [OTHER]
    assert [found.picture for found in inputs.media(made, [pixels[1:], pixels[:1]])] == [one, OTHER]
    assert (pixels * 1).pictures == ()  # what was computed of them may be anything


def test_pixels_of_another_bundle_are_those_of_planned_pictures_in_order():
    pixels = read_images(ALIKE, [np.zeros((14, 28, 3), np.uint8)] * 2, Reading())

    assert [one.picture for one in inputs.media(replace(ALIKE, pictures=(OTHER, OTHER)), pixels)] == [OTHER, OTHER]
    with pytest.raises(InputError, match=r"^pixel_values: is \[2, 3, 14, 28\], the bundle is planned for \[1, 3"):
        inputs.media(replace(ALIKE, pictures=(PICTURE,)), pixels)


@pytest.mark.parametrize("listed", [False, True])
def test_fewer_pictures_than_planned_that_might_be_several_are_refused(listed):
    (given,) = of(LARGE)

    with pytest.raises(InputError, match=r"^pixel_values: planned pictures of these views stand for different rows; g"):
        inputs.media(ALIKE, [given] if listed else given)

    both = [given, given] if listed else np.concatenate([given, given])
    assert [one.picture for one in inputs.media(ALIKE, both)] == [PICTURE, OTHER]
    sized = inputs.media(ALIKE, [given] if listed else given, [(28, 14)])
    assert [one.picture for one in sized] == [PICTURE]
    unlike = replace(FEWER, pictures=(PICTURE, replace(SMALL, runs=OTHER.runs)))
    assert len(inputs.media(unlike, [given] if listed else given)) == 1


# Prompts.


@pytest.mark.parametrize(
    ("manifest", "prompt", "images", "said"),
    [
        (GOOD, [IMAGE, 0], 1, None),
        (GOOD, [IMAGE, VOCAB - 1], 1, None),
        (GOOD, [IMAGE, VOCAB], 1, f"prompt: token {VOCAB} is outside the vocabulary of {VOCAB}; use"),
        (GOOD, [IMAGE, -1], 1, "prompt: token -1 is outside"),
        (GOOD, [*[5] * 5, IMAGE], 1, None),
        (GOOD, [*[5] * 6, IMAGE], 1, "prompt: has 6 text tokens, the bundle holds 5; shorten it, or export with --"),
        (GOOD, [IMAGE], 1, "prompt: has no text; ask something"),
        (GOOD, [5], 0, "prompt: has 0 image(s), the bundle is planned for 1; give 1, or export with --num-images 1"),
        (GOOD, [5], 1, "prompt: has 0 image(s)"),
        (GOOD, [5, IMAGE, IMAGE], 2, "prompt: has 2 image(s), the bundle is planned for 1; give 1, or export"),
        (FEWER, [5], 0, None),
        (FEWER, [5, IMAGE], 1, None),
        (FEWER, [5, IMAGE, IMAGE], 2, None),
        (FEWER, [5, IMAGE], 2, "prompt: has 1 image token(s), 2 image(s) given; give one image for each"),
        (FEWER, [5, *[IMAGE] * 3], 3, "prompt: has 3 image(s), the bundle is planned for 2; give at most 2, or export"),
    ],
)  # fmt: skip
def test_a_prompt_fits_to_the_last_token(manifest, prompt, images, said):
    if said is None:
        found = inputs.check_prompt(manifest, prompt, [PICTURE] * images)
        assert found.tolist() == prompt and found.dtype == np.int64
    else:
        with pytest.raises(InputError) as caught:
            inputs.check_prompt(manifest, prompt, [PICTURE] * images)
        assert str(caught.value).startswith(said)


def test_an_image_token_outside_of_the_vocabulary_is_no_mistake():
    made = replace(GOOD, pictures=(replace(PICTURE, token_id=-200),))

    assert inputs.check_prompt(made, [5, -200], made.pictures).tolist() == [5, -200]


@pytest.mark.parametrize(("asked", "found"), [(None, 2), (1, 1), (2, 2)])
def test_an_answer_is_as_long_as_asked_up_to_the_capacity(asked, found):
    assert inputs.limit(GOOD, asked) == found


@pytest.mark.parametrize(("asked", "said"), [(0, "is 0, expected 1..2; ask for at"), (3, "is 3, the bundle holds 2;")])
def test_an_answer_of_another_length_is_refused(asked, said):
    with pytest.raises(UsageError, match=f"^max_new_tokens: {said}"):
        inputs.limit(GOOD, asked)


@pytest.mark.parametrize(
    ("text", "before", "count", "expected"),
    [
        ([1, 2, 3], 0, 1, [9, 1, 2, 3]),
        ([1, 2, 3], 1, 2, [1, 9, 2, 9, 3]),
        ([1, 2, 3], 1, 3, [1, 9, 2, 9, 9, 3]),  # the last text token stays at the end
        ([1, 2], 2, 2, [1, 2, 9, 9]),
        ([1, 2], 1, 2, [1, 9, 9, 2]),
        ([1], 0, 0, [1]),
    ],
)
def test_images_are_placed_with_a_token_between_as_long_as_there_are_some(text, before, count, expected):
    assert inputs.placed(text, before, [9] * count) == expected


@pytest.mark.parametrize(
    ("manifest", "config", "visual", "kept"),
    [
        (FEWER, {"keep_ratio": 0.5}, 4, 6),  # nothing is selected: as planned
        (FEWER, {"keep_ratio": 0.5}, 0, 0),
        (SELECTS, {"keep_ratio": 0.5}, 12, 6),
        (SELECTS, {"keep_ratio": 0.3}, 5, 2),  # 1.5 rounds to 2
        (SELECTS, {"keep_ratio": 0.5}, 5, 2),  # and 2.5 too
        (SELECTS, {"keep_ratio": 0.5}, 0, 0),
        (SELECTS, {"keep_ratio": 0.5, "keep_tokens": None}, 4, 2),
        (SELECTS, {"keep_ratio": 0.5, "keep_tokens": 3}, 4, 3),
        (SELECTS, {"keep_ratio": 0.5, "keep_tokens": 5}, 4, 4),
    ],
)
def test_a_prompt_keeps_its_share_of_fewer_pictures(manifest, config, visual, kept):
    assert inputs.kept_of(replace(manifest, method_config=config), visual) == kept


# Rows.


@pytest.mark.parametrize(
    ("run", "whole"),
    [
        (Run(kind="visual", rows=1), True),
        (Run(kind="visual", rows=0), False),
        (Run(kind="visual", rows=7, grid=(2, 3), leading=1), True),
        (Run(kind="visual", rows=5, grid=(2, 3), missing=1), True),
        (Run(kind="visual", rows=5, grid=(2, 3), leading=-1), False),
        (Run(kind="visual", rows=7, grid=(2, 3), missing=-1), False),
        (Run(kind="visual", rows=9, grid=(2, 3), leading=1, row_ends=1), True),
        (Run(kind="visual", rows=12, grid=(2, 3), row_ends=3), True),
        (Run(kind="visual", rows=6, grid=(2, 3), row_ends=1), False),
        (Run(kind="visual", rows=4, grid=(2, 3), row_ends=-1), False),
        (Run(kind="visual", rows=6, grid=(2, 3), leading=-1, missing=-1), False),
        (Run(kind="text", rows=1, ids=(0,)), True),
        (Run(kind="text", rows=2, ids=(3, -1)), False),
        (Run(kind="text", rows=1, ids=(3, 4)), False),
        (Run(kind="cached", rows=6, grid=(2, 3)), True),
        (Run(kind="cached", rows=7, grid=(2, 3)), False),
        (Run(kind="sound", rows=1), False),
    ],
)
def test_a_run_fills_its_grid_and_its_ids_its_rows(run, whole):
    assert is_complete(run) == whole


def test_pictures_take_positions_by_the_longer_side_of_their_grids():
    runs = (
        Run(kind="text", rows=2, ids=(1, 2)),
        Run(kind="visual", rows=6, grid=(2, 3)),
        Run(kind="cached", rows=6, grid=(2, 3)),
        Run(kind="visual", rows=4),
        Run(kind="visual", rows=0, grid=(9, 9)),
    )
    made = replace(PICTURE, runs=runs)

    assert positions_of([made, made], 1) == 2 * (2 + 6 + 4)
    assert positions_of([made, made], 3) == 2 * (2 + 3 + 4)
    assert (made.rows(), made.visual_tokens, made.rows("cached"), made.rows("text", "visual")) == (12, 16, 6, 12)


# What is left out of a call.

DEFAULTS: dict[Any, dict[str, Any]] = {
    Pipeline.load: {"backend": "ort", "keep_ratio": None, "verify": True, "certified": False, "portable": False},
    Pipeline.__init__: {"portable": False},
    Pipeline.stream: {
        "images": (), "videos": (), "max_new_tokens": None, "sampling": None, "stop": (), "system": None, "fit": False
    },
    Pipeline.prepare: {"prompt": None, "images": (), "videos": (), "system": None, "messages": None, "fit": False},
    Pipeline.generate: {"images": (), "videos": ()},
    Pipeline.generate_tokens: {
        "max_new_tokens": None, "ignore_eos": False, "image_sizes": None, "sampling": None, "replace": None,
        "logits": True,
    },
    Pipeline.pixels: {"images": (), "videos": (), "fit": False},
    Pipeline.run_graph: {"length": None},
    Pipeline.prefill_inputs: {"pictures": None},
    inputs.read_media: {"fit": False},
    lay_out: {"axes": 1},
    open_bundle: {"verify": True, "keep_ratio": None},
}  # fmt: skip


@pytest.mark.parametrize("function", DEFAULTS, ids=lambda function: function.__qualname__)
def test_what_is_left_out_is_as_documented(function):
    parameters = inspect.signature(function).parameters.values()

    assert {p.name: p.default for p in parameters if p.default is not p.empty} == DEFAULTS[function]


def test_an_answer_and_a_turn_begin_empty():
    assert vars(Result()) == {
        "token_ids": [], "logits": None, "kept_visual": None, "text": "", "finish": "length", "prompt_tokens": 0,
        "pictures": (), "seconds": {},
    }  # fmt: skip
    turn = Turn([1], (), 2, Sampling())
    assert (turn.ignore_eos, turn.rows, turn.began, turn.replace) == (False, None, None, {})


# The decoder's own.

TABLE = np.arange(VOCAB * HIDDEN, dtype=np.float32).reshape(VOCAB, HIDDEN)


def decoder(manifest: Any, **more: Any) -> Any:
    """A decoder without graphs."""
    found: Any = object.__new__(Decoder)
    vars(found).update({"manifest": manifest, "_table": TABLE, "_begun": 0, "_restored": 0, "_next": 0} | more)
    return found


@pytest.mark.parametrize("axes", [1, 3])
def test_prompts_are_padded_and_rows_of_pictures_that_did_not_come_are_the_last_ones(axes):
    rows = lay_out([3, IMAGE, 4], [SMALL], axes)
    embeds = np.full((4, HIDDEN), 70, np.float32)
    made = replace(
        FEWER, axes=axes, image_rows={"image_embeds": "inputs_embeds", "deep": "deep_rows", "no": "left_out"}
    )

    found = decoder(made).prompt_tensors(rows, {"image_embeds": embeds, "deep": embeds + 1})

    zeros = np.zeros((17, HIDDEN))
    wanted, deep = zeros.copy(), zeros.copy()
    wanted[0], wanted[1:5], wanted[5] = TABLE[3], 70, TABLE[4]
    deep[1:5] = 71
    assert {name: found[name].tolist() for name in ("inputs_embeds", "deep_rows", "left_out")} == {
        "inputs_embeds": [wanted.tolist()], "deep_rows": [deep.tolist()], "left_out": [zeros.tolist()]
    }  # fmt: skip
    assert found["position_ids"].shape == (axes, 17)
    assert found["position_ids"][:, 6:].tolist() == [list(range(6, 17))] * axes
    assert found["position_ids"][:, :6].tolist() == rows.positions.tolist()
    visual = [1, 2, 3, 4, *range(9, 17)]  # 12 are planned, 4 came
    assert found["visual_index"].tolist() == visual
    assert found["text_index"].tolist() == [i for i in range(17) if i not in visual]
    assert {name: found[name].tolist() for name in ("last_index", "write_index", "cache_length")} == {
        "last_index": [5], "write_index": [0], "cache_length": [0]
    }  # fmt: skip


def test_a_prompt_of_all_planned_pictures_pads_none():
    rows = lay_out([3, IMAGE, IMAGE], [PICTURE, SMALL], 1)

    found = decoder(replace(FEWER, image_rows={})).prompt_tensors(rows, {})

    assert found["visual_index"].tolist() == list(range(1, 13))
    assert found["inputs_embeds"][0, 0].tolist() == TABLE[3].tolist()


@pytest.mark.parametrize(
    ("manifest", "visual", "restored"),
    [(FEWER, 4, 0), (SELECTS, 12, 0), (SELECTS, 8, 2), (SELECTS, 4, 4), (SELECTS, 0, 6)],
)
def test_rows_that_are_planned_to_drop_and_do_not_are_counted(manifest, visual, restored):
    assert decoder(manifest)._not_dropped(visual) == restored


class Held:
    """A buffer."""

    def __init__(self, values: Any) -> None:
        self.values = np.array(values, np.float32)

    def read(self) -> np.ndarray:
        return self.values

    def write(self, values: np.ndarray) -> None:
        self.values = values


def test_tokens_that_are_not_kept_are_ranked_behind_padding():
    score = Held([[0.1, 0.4, 0.4, 0.3, 0, 0, 0, 0]])

    decoder(SELECTS)._demote(score, 4)

    assert score.values.tolist() == [[-1, np.float32(0.4), np.float32(0.4), -1, 0, 0, 0, 0]]


@pytest.mark.parametrize("axes", [1, 3])
def test_a_token_more_has_the_next_position_and_the_coded_length(axes):
    written: list[Any] = []
    ran: list[Any] = []
    logits = Held(np.arange(VOCAB).reshape(1, 1, VOCAB))
    memory = SimpleNamespace(
        write=lambda graphs, given: written.append((graphs, given)),
        run=lambda graph, length: ran.append((graph.name, length)),
        buffer=lambda info: logits if info.name == "logits" else None,
    )
    graphs = tuple(
        replace(g, inputs=(*g.inputs, tensor("deep_rows", 1, 1, HIDDEN))) if g.role == "decode" else g for g in GRAPHS
    )
    rows = {"image_embeds": "inputs_embeds", "deep": "deep_rows"}
    made = decoder(replace(GOOD, axes=axes, graphs=graphs, image_rows=rows), memory=memory, _next=-5, _restored=2)

    made._decode(7, 20)

    ((of, given),) = written
    assert [graph.name for graph in of] == ["decode.0", "decode.1"]
    assert ran == [("decode.0", 20 + 2 * 2**24), ("decode.1", 20 + 2 * 2**24)]
    assert given["inputs_embeds"].tolist() == [[TABLE[7].tolist()]]
    assert given["position_ids"].tolist() == [[15]] * axes
    assert (given["cache_length"].tolist(), given["last_index"].tolist()) == ([20 + 2 * 2**24], [0])
    assert given["deep_rows"].tolist() == [[[0] * HIDDEN]]
    assert made._logits().tolist() == list(range(VOCAB))


def answering(monkeypatch, picks: list[int], logits: Any = 1.0) -> tuple[Any, list[list[int]], list[tuple[int, int]]]:
    """A decoder that answers with given tokens; what was seen before each, and what was decoded after which length."""
    seen: list[list[int]] = []
    decoded: list[tuple[int, int]] = []

    class Picks:
        def __init__(self, sampling: Sampling) -> None:
            self.left = list(picks)

        def pick(self, given: Any, before: list[int]) -> int:
            seen.append(list(before))
            return self.left.pop(0)

    monkeypatch.setattr(decoding, "Sampler", Picks)
    found = decoder(GOOD, bundle=SimpleNamespace(folder="folder"))
    found.lock = threading.RLock()

    def prefill(result: Result, turn: Turn) -> None:
        result.prompt_tokens = 10

    found._prefill, found._decode = prefill, lambda token, length: decoded.append((token, length))
    found._logits, found.memory = lambda: np.full(3, logits, np.float32), SimpleNamespace(finder=None)
    return found, seen, decoded


@pytest.fixture
def clock(monkeypatch) -> None:
    """A clock that goes on by a quarter of a second whenever it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 4)


@pytest.mark.parametrize(
    ("began", "limit", "seconds"),
    [
        (None, 1, {"first_token": 0.25}),
        (-7.0, 1, {"first_token": 7.0}),
        (None, 2, {"first_token": 0.25, "decode": 0.25}),
        (-7.0, 4, {"first_token": 7.0, "decode": 0.75}),
    ],
)
def test_the_first_token_and_all_others_are_timed(began, limit, seconds, monkeypatch, clock):
    made, _, _ = answering(monkeypatch, [4, 5, 6, 7])
    result = Result()

    assert len(list(made.tokens(result, Turn([0], (), limit, Sampling(), began=began)))) == limit

    assert result.seconds == seconds


def test_tokens_see_the_prompt_without_placeholders_and_the_answer_so_far(monkeypatch):
    made, seen, decoded = answering(monkeypatch, [4, 5, 6])
    result, rows = Result(), list[Any]()

    found = list(made.tokens(result, Turn([0, -200, 3], (), 3, Sampling(), rows=rows)))

    assert found == result.token_ids == [4, 5, 6]
    assert seen == [[0, 3], [0, 3, 4], [0, 3, 4, 5]]
    assert decoded == [(4, 10), (5, 11)]
    assert (result.finish, len(rows), sorted(result.seconds)) == ("length", 3, ["decode", "first_token"])


@pytest.mark.parametrize(("ignored", "tokens", "finish"), [(False, [4, 2], "eos"), (True, [4, 2, 6], "length")])
def test_an_answer_ends_with_the_end_of_sequence(ignored, tokens, finish, monkeypatch):
    made, _, _ = answering(monkeypatch, [4, 2, 6])
    result = Result()

    assert list(made.tokens(result, Turn([0], (), 3, Sampling(), ignore_eos=ignored))) == tokens
    assert result.finish == finish


@pytest.mark.parametrize("wanted", [False, True])
def test_logits_that_are_not_finite_are_an_error_where_nobody_wants_them(wanted, monkeypatch):
    made, _, _ = answering(monkeypatch, [4, 5], np.nan)
    turn = Turn([0], (), 2, Sampling(), rows=[] if wanted else None)

    if wanted:
        assert list(made.tokens(Result(), turn)) == [4, 5]
    else:
        with pytest.raises(
            LvlmEdgeError, match=r"^folder: logits of token 0 are not finite.* range of float32; export"
        ):
            list(made.tokens(Result(), turn))


@pytest.mark.parametrize(
    ("sampling", "highest", "wanted", "token", "read"),
    [
        (Sampling(), Highest(np.array([3, 8]), np.array([1, 5], np.float32)), False, 8, 0),
        (Sampling(), Highest(np.array([3, 8]), np.array([1, 5], np.float32)), True, 6, 1),  # somebody wants all
        (Sampling(), Highest(np.array([3, 8]), np.array([5, 5], np.float32)), False, 6, 1),  # others may be as high
        (Sampling(), None, False, 6, 1),  # one may not be finite
        (Sampling(repetition_penalty=0.5), Highest(np.array([3, 8]), np.ones(2, np.float32)), False, 6, 1),
    ],
)
def test_all_logits_are_read_where_the_highest_are_not_enough(sampling, highest, wanted, token, read):
    looked: list[Any] = []
    finder = SimpleNamespace(find=lambda: looked.append("highest") or highest)
    made = decoder(GOOD, memory=SimpleNamespace(finder=finder))
    rows: list[Any] | None = [] if wanted else None
    logits = np.zeros(VOCAB, np.float32)
    logits[6] = 7
    made._logits = lambda: looked.append("all") or logits

    assert made._pick(Sampler(sampling), [], rows, 0) == token

    assert looked.count("all") == read
    assert looked.count("highest") == int(not wanted and sampling.repetition_penalty == 1)
    assert rows is None or (len(rows) == 1 and rows[0] is not logits and rows[0].tolist() == logits.tolist())


def test_an_answer_cannot_go_on_after_another_prompt(monkeypatch):
    made, _, _ = answering(monkeypatch, [4, 5])
    first = made.tokens(Result(), Turn([0], (), 2, Sampling()))
    next(first)

    next(made.tokens(Result(), Turn([0], (), 2, Sampling())))

    with pytest.raises(UsageError, match="another prompt was begun on this Pipeline"):
        next(first)


def test_scores_follow_the_given_tokens(monkeypatch):
    made, _, decoded = answering(monkeypatch, [])
    made.features = None

    found = made.score(Turn([0], (), 3, Sampling()), [7, 8, 6])

    assert found.shape == (3, 3) and decoded == [(7, 10), (8, 11)]


def prefilled(manifest: Any, outputs: dict[str, Any], prompt: list[int], pictures: Any, **turn: Any) -> Any:
    """A decoder after `_prefill` on graphs that return given values; its result, logits and buffers."""
    buffers = {name: Held(values) for name, values in outputs.items()}
    ran: list[str] = []
    used: dict[str, int | None] = {}

    def run(graph: Any, *, rows: int | None) -> None:
        ran.append(graph.name)
        used[graph.name] = rows

    memory = SimpleNamespace(
        write=lambda graphs, given: ran.append("write"),
        run=run,
        buffer=lambda info: buffers[info.name],
    )
    features = SimpleNamespace(of=lambda media, seconds: seconds.update(vision=1.0) or {})
    made, result = decoder(manifest, memory=memory, features=features), Result()
    media = tuple(inputs.Media(picture, np.zeros(1)) for picture in pictures)
    made._prefill(result, Turn(prompt, media, 2, Sampling(), **turn))
    return SimpleNamespace(decoder=made, result=result, buffers=buffers, ran=ran, used=used)


HEAD = replace(GRAPHS[1], outputs=(*GRAPHS[1].outputs, tensor("score", 1, 12)))
SELECT = replace(GRAPHS[2], name="select", outputs=(tensor("kept_visual", 6, dtype="int64"),))
CHOOSES = replace(FEWER, graphs=(GRAPHS[0], HEAD, SELECT, *GRAPHS[2:]))
RETURNED = {"hidden": [0], "score": [np.arange(12)], "kept_visual": [0, 2, 3, 4, 9, 11], "logits": [[[7, 8]]]}


def test_a_whole_prompt_is_answered_as_the_graphs_choose(clock):
    found = prefilled(CHOOSES, RETURNED, [IMAGE, 3, IMAGE], (PICTURE, SMALL))

    assert found.ran == ["write", "prefill_head", "select", "prefill_tail"]
    assert found.decoder._logits().tolist() == [7, 8]
    assert found.result.kept_visual.tolist() == RETURNED["kept_visual"]
    assert found.buffers["score"].values.tolist() == [list(range(12))]
    assert (found.result.prompt_tokens, found.result.pictures) == (13, (PICTURE, SMALL))
    assert (found.decoder._next, found.decoder._restored) == (0, 0)
    assert found.result.seconds == {"vision": 1, "prefill_head": 0.25, "select": 0.25, "prefill_tail": 0.25}


def test_a_prompt_with_fewer_pictures_keeps_their_share_and_says_what_is_theirs():
    found = prefilled(CHOOSES, RETURNED, [3, IMAGE, 5], (SMALL,))

    assert found.buffers["score"].values.tolist() == [[-1, -1, 2, 3, *range(4, 12)]]  # 2 of 4 are kept
    assert found.result.kept_visual.tolist() == [0, 2, 3]
    assert found.decoder._restored == (12 - 6) - (4 - 2)
    assert found.result.prompt_tokens == 6


@pytest.mark.parametrize(
    ("shape", "count", "restored", "rows"),
    [
        ((1, 17, 3), 17, 0, 17),  # 12 visual tokens and 5 of text
        ((1, 17, 3), 15, 0, 15),  # 3 of text
        ((1, 11, 3), 15, 0, 9),  # 6 are kept
        ((1, 17, 3), 6, 4, 6),  # 4 visual tokens and 2 of text
        ((1, 11, 3), 6, 4, 4),  # 2 are kept, where 6 - 2 were dropped less than planned
        ((1, 17), 15, 0, None),
    ],
)
def test_rows_in_use_are_those_of_the_prompt_that_are_left(shape, count, restored, rows):
    made = decoder(CHOOSES)
    made._restored = restored

    assert made._in_use(replace(HEAD, inputs=(tensor("x", *shape),)), count) == rows


def test_prefill_graphs_are_told_the_rows_in_use():
    head = replace(HEAD, inputs=(tensor("inputs_embeds", 1, 17, 3),))
    tail = replace(GRAPHS[2], inputs=(tensor("hidden", 1, 11, 3),))
    manifest = replace(CHOOSES, graphs=(GRAPHS[0], head, tail, *GRAPHS[3:]))

    assert prefilled(manifest, RETURNED, [IMAGE, 3, IMAGE], (PICTURE, SMALL)).used == {
        "prefill_head": 13, "prefill_tail": 7
    }  # fmt: skip


def test_values_take_the_place_of_what_graphs_return():
    found = prefilled(CHOOSES, RETURNED, [IMAGE, 3, IMAGE], (PICTURE, SMALL), replace={"score": np.ones((1, 12))})

    assert found.buffers["score"].values.tolist() == [[1] * 12]


@pytest.mark.parametrize(("axes", "behind"), [(1, 0), (3, 4 - 8)])  # a grid of 2 x 4 takes 4 positions of 8 rows
def test_positions_behind_a_picture_of_three_axes_are_fewer_than_rows(axes, behind):
    outputs = {"hidden": [0], "logits": [[[1]]]}

    found = prefilled(replace(GOOD, axes=axes), outputs, [3, IMAGE, 5], (PICTURE,))

    assert (found.decoder._next, found.result.kept_visual) == (behind, None)


# The pipeline around it.


class Words:
    """A tokenizer of one word to a token, of which the last is known only at the end."""

    def __init__(self) -> None:
        self.held = ""

    def system_message(self, system: str) -> dict[str, Any]:
        return {"role": "system", "content": [system]}

    def encode_chat(self, messages: Any) -> list[int]:
        self.messages = messages
        return [5, IMAGE]

    def stream(self) -> Any:
        return Words()

    def push(self, token: int) -> str:
        shown, self.held = self.held, f"w{token} "
        return shown

    def flush(self) -> str:
        return self.held


def pipeline(tokens: list[int] | None = None, manifest: Any = GOOD) -> Any:
    """A pipeline whose model answers with given tokens."""
    found: Any = object.__new__(Pipeline)
    own = SimpleNamespace(lock=threading.RLock(), tokens=lambda result, turn: iter(tokens or []))
    vars(found).update(manifest=manifest, reading=Reading(), last=None, _text=Words(), _decoder=own)
    return found


@pytest.mark.parametrize(
    ("tokens", "stop", "pieces", "finish"),
    [
        ([7, 8], (), ["w7 ", "w8 "], "length"),
        ([7, 2, 8], (), ["w7 "], "length"),  # what comes behind the end of sequence, 2, is no text
        ([2], (), [], "length"),
        ([7, 8, 9], ("w8",), ["w7 "], "stop"),
        ([7, 8], ("w8",), ["w7 "], "length"),  # in the last piece
        ([7, 8], ("8 w",), ["w7 ", "w8 "], "length"),  # begun and never ended
    ],
)
def test_pieces_of_an_answer_are_its_text_up_to_its_end(tokens, stop, pieces, finish):
    made, result = pipeline(tokens), Result()

    stream = made._pieces(result, Turn([5], (), 9, Sampling()), StopStrings(stop))

    found = list(stream)
    assert (found, result.text, result.finish) == (pieces, "".join(pieces), finish)
    assert "" not in found


def test_a_stream_that_is_closed_is_cancelled():
    made, result = pipeline([7, 8, 9]), Result()
    stream = made._pieces(result, Turn([5], (), 9, Sampling()), StopStrings(()))
    next(stream)

    stream.close()

    assert (result.finish, result.text) == ("cancelled", "w7 ")
    other = made._pieces(Result(), Turn([5], (), 9, Sampling()), StopStrings(()))
    next(other)
    with pytest.raises(GeneratorExit):
        other.throw(GeneratorExit)


def test_the_last_result_is_that_of_the_last_call_to_end():
    made, result = pipeline(), Result(text="mine")

    def stream(prompt: str, images: Any, videos: Any, **options: Any) -> Any:
        made.last = Result(text="another's")
        yield "mine"
        return result

    made.stream = stream

    assert made.generate("w5") is result is made.last


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": "a", "messages": []}, "prepare: takes either a prompt or messages; leave out the prompt and the"),
        ({"system": "a", "messages": []}, "prepare: takes either a prompt or messages; leave out the prompt and the"),
        ({}, "prompt: is empty; ask something"),
        ({"messages": [{"content": [{"type": "image"}]}]}, "messages: name 1 image(s), 0 given; give one for each"),
        ({"messages": [{"content": "a"}], "images": "x.png"}, "messages: name 0 image(s), 1 given; give one for each"),
    ],
)
def test_a_conversation_names_the_images_that_are_given(given, said):
    with pytest.raises(InputError) as caught:
        pipeline(manifest=FEWER).prepare(**given)
    assert str(caught.value).startswith(said)


def prepared(made: Any, *given: Any, **options: Any) -> Any:
    """The messages that a tokenizer gets."""
    made.prepare(*given, **options)
    return made._text.messages


def test_what_is_prepared_are_tokens_and_pixels():
    made = pipeline()
    picture = np.zeros((14, 28, 3), np.uint8)

    ids, pixels = made.prepare("a", picture, system="b")

    assert (ids, pixels.shape) == ([5, IMAGE], LARGE)
    assert [message["role"] for message in made._text.messages] == ["system", "user"]
    assert made._text.messages[0]["content"] == ["b"]  # in the form that the template reads
    assert [message["role"] for message in prepared(made, "a", picture)] == ["user"]
    assert [views.shape for views in made.pixels([picture])] == [LARGE]


def test_pictures_are_taken_in_their_order_and_fitted_where_that_is_asked_for():
    both = replace(VIEWS.canvas, rule="pinpoints", among=((28, 14), (14, 28)))
    pinned = replace(PICTURE, views=replace(VIEWS, canvas=both))
    made = replace(GOOD, pictures=(pinned,))
    tall, wide = np.zeros((28, 14, 3), np.uint8), np.zeros((14, 28, 3), np.uint8)

    assert read_images(made, [wide], Reading()).shape == LARGE  # type: ignore[union-attr]
    assert read_images(made, [tall], Reading(), fit=True).shape == LARGE  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"^picture: 14x28 is resized to 14x28, the bundle is for 28x14; give a"):
        read_images(made, [tall], Reading())
    several = read_images(FEWER, [wide, tall], Reading())
    assert isinstance(several, list) and [views.shape for views in several] == [LARGE, TINY]
    with pytest.raises(InputError, match=r"^images: 2 given, the bundle is planned for 1; give 1, or export with"):
        read_images(GOOD, [wide, wide], Reading())


def test_planned_pictures_are_as_many_as_the_prompt_has():
    made: Any = object.__new__(Pipeline)
    given: list[Any] = []
    own = SimpleNamespace(
        prompt_tensors=lambda rows, images: given.append((rows.count, len(rows.visual), images)) or {}
    )
    vars(made).update(manifest=FEWER, _decoder=own)

    made.prefill_inputs([5, IMAGE, 3], {"x": 1})
    made.prefill_inputs([5, 3], {})
    made.prefill_inputs([5, IMAGE, 3], {}, [SMALL])

    assert given == [(10, 8, {"x": 1}), (2, 0, {}), (6, 4, {})]


def test_a_bundle_without_a_tokenizer_says_what_to_do():
    made = pipeline()
    vars(made).update(_text=None, bundle=SimpleNamespace(folder="folder"))

    for ask in (lambda: made.encode([]), lambda: made.prepare("a", np.zeros((14, 28, 3), np.uint8))):
        with pytest.raises(
            UnsupportedError, match=r"^folder: has no tokenizer, .* export again, or use generate_tokens$"
        ):
            ask()


def test_the_buffer_of_a_graphs_input_or_output_is_found_by_its_name():
    made = pipeline()
    made._decoder.memory = SimpleNamespace(buffer=lambda info: info)

    assert made.buffer("prefill_head", "last_index") is GRAPHS[1].inputs[1]
    assert made.buffer("prefill_head", "hidden") is GRAPHS[1].outputs[0]
    assert made.buffer("prefill_tail", "hidden") is GRAPHS[2].inputs[0]


@pytest.mark.parametrize("length", [None, 7])
def test_one_graph_reads_what_it_is_given_and_returns_copies(length):
    asked: list[Any] = []
    hidden = Held([1, 2])
    memory = SimpleNamespace(
        write=lambda graphs, given: asked.append(("write", [g.name for g in graphs], given)),
        run=lambda graph, length: asked.append(("run", graph.name, length)),
        buffer=lambda info: hidden,
    )
    made = decoder(GOOD, memory=memory, lock=threading.RLock())

    found = made.run_graph("prefill_head", {"x": 1}, length)

    assert asked == [("write", ["prefill_head"], {"x": 1}), ("run", "prefill_head", length)]
    hidden.values[:] = 9
    assert {name: values.tolist() for name, values in found.items()} == {"hidden": [1, 2]}
    assert made._begun == 1  # a stream cannot go on behind it

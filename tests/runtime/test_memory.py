"""Buffers between graphs, and what is kept of pictures: on a backend that notes what is asked of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lvlm_edge.runtime.bundle.manifest import Cache, Graph, Manifest, TensorInfo
from lvlm_edge.runtime.errors import BundleError, FitError
from lvlm_edge.runtime.pipeline.features import Features
from lvlm_edge.runtime.pipeline.inputs import Media
from lvlm_edge.runtime.pipeline.memory import Memory
from tests.runtime.test_inputs import SMALL
from tests.runtime.test_manifest import GOOD, HIDDEN, PICTURE, VIEWS, tensor

PAST, PRESENT = "past_key_values", "present"


class Buffer:
    """An array, and the rows that were copied into it."""

    def __init__(self, info: TensorInfo, host: bool) -> None:
        self.info, self.host, self.values = info, host, np.zeros(info.shape, np.float32)
        self.copied: list[tuple[str, int]] = []

    def write(self, values: np.ndarray) -> None:
        self.values[...] = values

    def read(self) -> np.ndarray:
        return self.values

    def copy_rows(self, rows: Any, slot: int) -> None:
        self.copied.append((rows.info.name, slot))


class Step:
    """Buffers that are filled all at once, and how often they were."""

    def __init__(self, buffers: dict[TensorInfo, Buffer]) -> None:
        self.buffers, self.written = buffers, 0

    def write(self, values: dict[TensorInfo, np.ndarray]) -> None:
        self.written += 1
        for info, given in values.items():
            self.buffers[info].write(given)


class Session:
    def __init__(self, backend: Any, graph: Graph, bound: dict[str, Buffer]) -> None:
        self.backend, self.graph, self.bound = backend, graph, bound

    def run(self, rows: int | None = None) -> None:
        self.backend.ran.append(self.graph.name)
        self.backend.compute(self.graph.name, self.bound)


class Backend:
    """Notes what it allocates and runs; `compute` is what its graphs do."""

    name = "fake"

    def __init__(self, compute: Callable[[str, dict[str, Buffer]], None] = lambda name, bound: None) -> None:
        self.compute, self.made, self.ran = compute, list[Buffer](), list[str]()

    def allocate(self, info: TensorInfo, *, host: bool = False) -> Any:
        self.made.append(Buffer(info, host))
        return self.made[-1]

    def together(self, infos: Any) -> Any:
        self.step = Step({info: self.allocate(info, host=True) for info in infos})
        return self.step

    def finder(self, bundle: Any, logits: Any) -> Any:
        return logits

    def open(self, bundle: Any, graph: Graph, buffers: Any) -> Any:
        return Session(self, graph, buffers)


def graph(name: str, role: str, inputs: list[TensorInfo], outputs: list[TensorInfo], **names: str) -> Graph:
    return Graph(name=name, file=name, role=role, inputs=tuple(inputs), outputs=tuple(outputs), names=names)


def cache(prefix: str, rows: int, name: str = "0", part: str = "key") -> TensorInfo:
    return tensor(f"{prefix}.{name}.{part}", 1, 2, rows, 4)


CACHES = (
    Cache(name="0", heads=2, head_dim=4, capacity=15, dropped=0),
    Cache(name="1", heads=2, head_dim=4, capacity=12, dropped=3),
)


LAST = graph("last", "decode", [], [tensor("logits", 1, 1, 7)])  # a manifest has one that returns logits


def memory(*graphs: Graph, backend: Any = None) -> tuple[Memory, Any]:
    made = backend or Backend()
    return Memory(None, replace(GOOD, cache=CACHES, graphs=(*graphs, LAST)), made), made  # type: ignore[arg-type]


def test_equal_names_and_shapes_are_one_buffer_and_caches_are_written_where_they_are_read():
    prefill = graph("prefill", "prefill", [tensor("x", 1, 3)], [cache(PRESENT, 15), tensor("hidden", 2)], x="renamed")
    decode = graph("decode", "decode", [cache(PAST, 15), tensor("x", 1, 1)], [cache(PRESENT, 15)])

    made, backend = memory(prefill, decode)

    assert made.buffer(cache(PRESENT, 15)) is made.buffer(cache(PAST, 15))
    assert made.buffer(tensor("x", 1, 3)) is not made.buffer(tensor("x", 1, 1))
    assert sorted((b.info.name, b.info.shape, b.host) for b in backend.made) == [
        ("hidden", (2,), True),
        ("logits", (1, 1, 7), True),
        (f"{PAST}.0.key", (1, 2, 15, 4), False),
        ("x", (1, 1), True),
        ("x", (1, 3), True),
    ]
    assert set(made._sessions["prefill"].bound) == {"renamed", f"{PRESENT}.0.key", "hidden"}  # type: ignore[attr-defined]


def test_what_graphs_read_and_the_host_has_is_written_and_nothing_else():
    one = graph("one", "prefill", [tensor("x", 2), tensor("y", 2)], [tensor("z", 2)])
    other = graph("other", "prefill", [tensor("x", 2), tensor("z", 2)], [])
    made, _ = memory(one, other)

    made.write([one], {"x": np.array([1, 2]), "z": np.array([3, 4]), "more": np.zeros(9)})

    assert made.buffer(tensor("x", 2)).read().tolist() == [1, 2]
    assert made.buffer(tensor("y", 2)).read().tolist() == made.buffer(tensor("z", 2)).read().tolist() == [0, 0]
    made.write([one, other], {"z": np.array([3, 4])})
    assert made.buffer(tensor("z", 2)).read().tolist() == [3, 4]


@pytest.mark.parametrize(
    ("role", "length", "copied"),
    [
        ("decode", 9, [(0, [(f"{PRESENT}.0.key", 9)]), (1, [(f"{PRESENT}.1.key", 6)])]),
        ("decode", 9 + 2 * 2**24, [(0, [(f"{PRESENT}.0.key", 9)]), (1, [(f"{PRESENT}.1.key", 8)])]),
        ("prefill", 0, [(0, [(f"{PRESENT}.0.key", 0)]), (1, [(f"{PRESENT}.1.key", 0)])]),
        ("image", 9, [(0, [(f"{PRESENT}.0.key", 0)]), (1, [(f"{PRESENT}.1.key", 0)])]),
        ("prefill", None, [(0, []), (1, [])]),
    ],
)
def test_rows_that_a_graph_returns_go_behind_those_that_went_by(role, length, copied):
    one = graph("one", role, [tensor("x", 1)], [cache(PRESENT, 1, "0"), cache(PRESENT, 1, "1"), tensor("hidden", 2)])
    made, backend = memory(one)

    made.run(one, length)

    assert backend.ran == ["one"]
    buffers = {b.info: b for b in backend.made}
    for i, expected in copied:
        found = buffers.get(TensorInfo(f"{PAST}.{i}.key", "float32", (1, 2, CACHES[i].capacity, 4)))
        assert (found.copied if found else []) == expected


def test_a_prompts_rows_go_to_the_start():
    one = graph("one", "prefill", [], [cache(PRESENT, 3, "0")])
    made, backend = memory(one)

    made.run(one)

    assert [buffer.copied for buffer in backend.made if buffer.copied] == [[(f"{PRESENT}.0.key", 0)]]


def test_a_whole_cache_is_not_copied_onto_itself():
    one = graph("one", "prefill", [], [cache(PRESENT, 15)])
    made, backend = memory(one)

    made.run(one)

    assert [buffer.copied for buffer in backend.made] == [[], []]


@pytest.mark.parametrize("info", [cache(PRESENT, 16), cache(PAST, 14), tensor(f"{PRESENT}.0.key", 1, 3, 1, 4)], ids=str)
def test_a_tensor_that_does_not_fit_its_cache_is_refused(info):
    with pytest.raises(BundleError, match=r"does not fit its cache, .*; export the bundle again"):
        memory(graph("one", "prefill", [info], []))


DECODE = graph("decode", "decode", [tensor("inputs_embeds", 1, 1, 2), tensor("cache_length", 1)], [tensor("x", 2)])


def test_what_the_host_hands_to_a_token_is_written_all_at_once():
    """Also the rows of images; not what one graph returns to the next, and not some of it."""
    more = graph("more", "decode", [tensor("x", 2), tensor("deep_rows", 1), tensor("cache_length", 1)], [])
    made = Backend()
    manifest = replace(
        GOOD, cache=CACHES, graphs=(DECODE, more, LAST), image_rows={"a": "inputs_embeds", "b": "deep_rows"}
    )
    found = Memory(None, manifest, made)  # type: ignore[arg-type]
    given = {"inputs_embeds": np.ones((1, 1, 2)), "cache_length": np.array([5]), "deep_rows": np.array([6])}

    assert {info.name for info in made.step.buffers} == {"inputs_embeds", "cache_length", "deep_rows"}
    found.write([DECODE, more], given)
    assert made.step.written == 1
    assert {name: found.buffer(info).read().reshape(-1).tolist() for name, info in STEP.items()} == {
        "inputs_embeds": [1, 1], "cache_length": [5], "deep_rows": [6]
    }  # fmt: skip
    found.write([DECODE], given | {"cache_length": np.array([9])})
    assert made.step.written == 1 and found.buffer(STEP["cache_length"]).read().tolist() == [9]


STEP = {"inputs_embeds": DECODE.inputs[0], "cache_length": DECODE.inputs[1], "deep_rows": tensor("deep_rows", 1)}


def test_the_highest_logits_are_looked_for_in_those_of_the_last_graph():
    made, _ = memory(graph("other", "decode", [], [tensor("logits", 1, 1, 9)]))

    assert made.finder is made.buffer(LAST.outputs[0])  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("error", [MemoryError(), ValueError("array is too big")])
def test_a_buffer_that_does_not_fit_is_named_with_its_shape(error):
    class Full(Backend):
        def allocate(self, info: TensorInfo, *, host: bool = False) -> Any:
            raise error

    with pytest.raises(
        FitError, match=r"^x: \[7, 8\] float32 does not fit into memory; export with a lower --max-text"
    ):
        memory(graph("one", "prefill", [tensor("x", 7, 8)], []), backend=Full())


# What graphs make of pictures.


@pytest.fixture
def clock(monkeypatch) -> None:
    """A clock that goes on by a quarter of a second whenever it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 4)


VISION = graph(
    "vision",
    "image",
    [tensor("pixel_values", 1, 3, 14, 28)],
    [tensor("image_embeds", 1, 8, HIDDEN), tensor("unread", 1)],
)
ENCODER = graph("encoder", "image", [tensor("pixel_values", 1, 3, 14, 14)], [tensor("states", 1, 2, 5)])
PROJECTOR = graph("projector", "image", [tensor("states", 1, 4, 5)], [tensor("image_embeds", 1, 4, HIDDEN)])
JOINED = graph("joined", "image", [tensor("image_embeds", 1, 12, HIDDEN), tensor("write_index", 1)], [])
TILED = replace(SMALL, graphs=("encoder", "projector"), views=replace(SMALL.views, tiles=(1, 1)))


def compute(name: str, bound: dict[str, Buffer]) -> None:
    """Rows that tell which view they are of, or the sum of what was read."""
    if name == "vision":
        bound["image_embeds"].values[...] = bound["pixel_values"].values[0, 0, 0, 0] + np.arange(8)[:, None]
    elif name == "encoder":
        bound["states"].values[...] = bound["pixel_values"].values[0, 0, 0, 0] + np.arange(2)[:, None]
    elif name == "projector":
        bound["image_embeds"].values[...] = 100 + bound["states"].values[0, :, :1]
    else:
        bound["write_index"].values += 1


def features(*graphs: Graph, pictures: Any = (PICTURE, TILED)) -> tuple[Features, Any]:
    manifest: Manifest = replace(GOOD, graphs=(*graphs, LAST), pictures=pictures, cache=())
    backend: Any = Backend(compute)
    return Features(manifest, Memory(None, manifest, backend)), backend  # type: ignore[arg-type]


def media(first: float = 10, tiles: tuple[float, float] = (20, 30)) -> tuple[Media, ...]:
    tiled = np.stack([np.full((3, 14, 14), value, np.float32) for value in tiles])
    return Media(PICTURE, np.full((1, 3, 14, 28), first, np.float32)), Media(TILED, tiled)


def test_every_view_runs_and_what_follows_runs_once_on_all_of_them(clock):
    made, backend = features(VISION, ENCODER, PROJECTOR)
    seconds: dict[str, float] = {}

    found = made.of(media(), seconds)

    assert backend.ran == ["vision", "encoder", "encoder", "projector"]
    assert list(found) == ["image_embeds"]
    assert found["image_embeds"][:, 0].tolist() == [*range(10, 18), 120, 121, 130, 131]
    assert seconds == {"vision": 0.25, "encoder": 0.25, "projector": 0.25}


def test_pictures_come_in_their_order_and_the_times_of_a_graph_add_up(clock):
    made, backend = features(VISION, pictures=(PICTURE, PICTURE))
    one, other = (media(first)[0] for first in (10, 50))
    seconds = {"vision": 5.0}

    found = made.of((other, one), seconds)

    assert found["image_embeds"][:, 0].tolist() == [*range(50, 58), *range(10, 18)]
    assert seconds == {"vision": 5.5} and backend.ran == ["vision", "vision"]


def test_a_graph_of_no_single_picture_reads_all_rows_at_once(clock):
    made, backend = features(VISION, ENCODER, PROJECTOR, JOINED)
    seconds: dict[str, float] = {}

    made.of(media(), seconds)

    assert backend.ran[-1] == "joined" and seconds["joined"] == 0.25
    read = next(b for b in backend.made if b.info == JOINED.inputs[0])
    assert read.values[0, :, 0].tolist() == [*range(10, 18), 120, 121, 130, 131]
    assert next(b for b in backend.made if b.info.name == "write_index").values.tolist() == [1]  # from 0
    assert made.of((), {}) == {}
    assert backend.ran.count("joined") == 1


@pytest.mark.parametrize(
    ("then", "again"),
    [
        (lambda: media(), False),
        (lambda: media(11), True),
        (lambda: media(10, (20, 31)), True),
        (lambda: media()[:1], True),
        (lambda: media()[::-1], True),
        (lambda: (Media(replace(PICTURE, views=replace(VIEWS, tiles=None)), media()[0].pixels), media()[1]), False),
        (lambda: (Media(replace(PICTURE, token_id=3), media()[0].pixels), media()[1]), True),
    ],
)
def test_the_last_pictures_are_remembered_to_the_bit(then, again):
    made, backend = features(VISION, ENCODER, PROJECTOR)
    made.of(media(), {})
    count, seconds = len(backend.ran), dict[str, float]()

    made.of(then(), seconds)

    assert (len(backend.ran) > count) == again == bool(seconds)


def test_pixels_that_change_in_place_and_pictures_that_are_forgotten_run_again():
    made, backend = features(VISION, pictures=(PICTURE,))
    given = media()[:1]
    made.of(given, {})

    given[0].pixels[...] = 40
    assert made.of(given, {})["image_embeds"][0, 0] == 40
    made.forget()
    made.of(given, {})

    assert len(backend.ran) == 3

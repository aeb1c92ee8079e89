"""Features of images: the graphs of role image, and a cache of what they made of the last pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from lvlm_edge.runtime.backends import Array
from lvlm_edge.runtime.bundle import Graph, Manifest
from lvlm_edge.runtime.pipeline.inputs import Media
from lvlm_edge.runtime.pipeline.memory import Memory

Seconds = dict[str, float]  # by graph


class Features:
    """Rows that the decoder reads of images, made once for the same pictures."""

    def __init__(self, manifest: Manifest, memory: Memory) -> None:
        self._manifest, self._memory = manifest, memory
        self._graphs = manifest.role("image")
        self._own = {name for picture in manifest.pictures for name in picture.graphs}  # those of single pictures
        later = {t.name for g in self._graphs for t in g.inputs}
        self._read = set(manifest.image_rows) | later  # outputs that are read
        self._seen: tuple[tuple[Media, ...], dict[str, Array]] | None = None

    def forget(self) -> None:
        """Clear the cache."""
        self._seen = None

    def of(self, media: tuple[Media, ...], seconds: Seconds) -> dict[str, Array]:
        """Rows of all images, [rows, D], by output of the image graphs.

        Empty where the decoder reads the encoder's features, from caches that are then filled.

        Args:
            seconds: gets the time of every graph that runs.
        """
        if self._seen is None or not _same(self._seen[0], media):
            self._seen = None
            kept = tuple(Media(one.picture, one.pixels.copy()) for one in media)
            self._seen = kept, self._made(media, seconds)
        return self._seen[1]

    def _made(self, media: Sequence[Media], seconds: Seconds) -> dict[str, Array]:
        """Run the graphs of each picture, then what follows once for all pictures."""
        found: dict[str, list[Array]] = {}
        for one in media:
            outputs: dict[str, list[Array]] = {}
            for graph in (g for g in self._graphs if g.name in one.picture.graphs):
                outputs |= self._run(graph, one.pixels, outputs, seconds)
            for name, values in outputs.items():
                found.setdefault(name, []).extend(values)
        joined = {name: np.concatenate(values) for name, values in found.items()}
        for graph in (g for g in self._graphs if g.name not in self._own and media):
            began = time.perf_counter()
            whole = {name: values[None] for name, values in joined.items()}
            self._memory.write([graph], whole | {"write_index": np.zeros(1, np.int64)})
            self._memory.run(graph)
            seconds[graph.name] = time.perf_counter() - began
        return {name: joined[name] for name in self._manifest.image_rows if name in joined}

    def _run(
        self, graph: Graph, views: Array, before: Mapping[str, list[Array]], seconds: Seconds
    ) -> dict[str, list[Array]]:
        """A picture's graph over its views, or once over what the graph before it returned; its outputs, [rows, D]."""
        began = time.perf_counter()
        if any(info.name == "pixel_values" for info in graph.inputs):
            given = [{"pixel_values": view[None]} for view in views]
        else:
            given = [{name: np.concatenate(values)[None] for name, values in before.items()}]
        outputs: dict[str, list[Array]] = {}
        for tensors in given:
            self._memory.write([graph], tensors)
            self._memory.run(graph)
            for info in (t for t in graph.outputs if t.name in self._read):
                outputs.setdefault(info.name, []).append(self._memory.buffer(info).read()[0].copy())
        seconds[graph.name] = seconds.get(graph.name, 0.0) + time.perf_counter() - began
        return outputs


def _same(seen: Sequence[Media], media: Sequence[Media]) -> bool:
    """Whether pictures are those of another prompt, to the bit."""
    return len(seen) == len(media) and all(
        a.picture == b.picture and np.array_equal(a.pixels, b.pixels) for a, b in zip(seen, media, strict=True)
    )

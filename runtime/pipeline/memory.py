"""Sessions and the buffers between them: equal name and shape are one buffer, and caches are written in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from lvlm_edge.runtime.backends import Array, Backend, Buffer, Inputs, Session, host_tensors
from lvlm_edge.runtime.bundle import Bundle, Graph, Manifest, TensorInfo, kv_cache
from lvlm_edge.runtime.errors import BundleError, FitError

STEP = frozenset({"inputs_embeds", "position_ids", "cache_length", "last_index"})  # of a token, beside rows of images


class Memory:
    """The graphs of a manifest, opened on a backend, with their inputs and outputs bound to buffers.

    Attributes:
        finder: of the highest logits, where the backend has one.

    Raises:
        BundleError: a tensor does not fit its cache.
        FitError: a buffer does not fit into memory.
    """

    def __init__(self, bundle: Bundle, manifest: Manifest, backend: Backend) -> None:
        kv_cache.check_layout(manifest.cache, manifest.counts)
        self._layout = kv_cache.Layout(manifest.cache, manifest.dtype)
        self._caches = {info.name: info for info in self._layout.buffers()}
        self._buffers: dict[TensorInfo, Buffer] = {}
        self._backend, self._host = backend, host_tensors(manifest.graphs)
        self._step = self._together(manifest)
        self._sessions: dict[str, Session] = {g.name: self._open(bundle, g) for g in manifest.graphs}
        logits = next(t for t in manifest.role("decode")[-1].outputs if t.name == "logits")
        self.finder = backend.finder(bundle, self.buffer(logits))

    def buffer(self, info: TensorInfo) -> Buffer:
        """The buffer behind a graph's input or output."""
        return self._buffers[self._key(info)]

    def write(self, graphs: Sequence[Graph], inputs: Mapping[str, Array]) -> None:
        """Fill the buffers that graphs read and the host provides, each once."""
        wanted = {self._key(info) for graph in graphs for info in graph.inputs if info.name in inputs}
        if wanted == self._step.buffers.keys():
            self._step.write({info: inputs[info.name] for info in wanted})
            return
        for info in wanted:
            self._buffers[info].write(inputs[info.name])

    def run(self, graph: Graph, length: int | None = 0, *, rows: int | None = None) -> None:
        """Run a graph.

        Args:
            length: rows that have gone by, behind which the rows that it returns go into the caches; None where they
                are not to go there.
            rows: of the prompt that are in use; None for all.
        """
        self._sessions[graph.name].run(rows)
        for info in graph.outputs if length is not None else ():
            cache = self._caches.get(kv_cache.shared_name(info.name))
            if cache is not None and cache.shape != info.shape:
                assert length is not None
                # What images leave in a cache comes before any row of the prompt.
                slot = 0 if graph.role == "image" else self._layout.slot(info.name, length)
                self._allocated(cache).copy_rows(self._buffers[info], slot)

    def _together(self, manifest: Manifest) -> Inputs:
        """Buffers of what the host hands to the graphs of every token."""
        names = self._host & {*STEP, *manifest.image_rows.values()}
        infos = (info for graph in manifest.role("decode") for info in graph.inputs if info.name in names)
        with _fitting("the inputs of decode"):
            step = self._backend.together(tuple(dict.fromkeys(map(self._key, infos))))
        self._buffers |= step.buffers
        return step

    def _open(self, bundle: Bundle, graph: Graph) -> Session:
        bound = {}
        for info in (*graph.inputs, *graph.outputs):
            bound[graph.names.get(info.name, info.name)] = self._allocated(self._key(info))
        return self._backend.open(bundle, graph, bound)

    def _allocated(self, info: TensorInfo) -> Buffer:
        if info not in self._buffers:
            with _fitting(f"{info.name}: {list(info.shape)} {info.dtype}"):
                self._buffers[info] = self._backend.allocate(info, host=info.name in self._host)
        return self._buffers[info]

    def _key(self, info: TensorInfo) -> TensorInfo:
        """The buffer of a tensor: a cache is written where it is read."""
        name = kv_cache.shared_name(info.name)
        cache = self._caches.get(name)
        if cache is None or cache == TensorInfo(name, info.dtype, info.shape):
            return TensorInfo(name, info.dtype, info.shape)
        if not kv_cache.are_rows(info, cache):
            raise BundleError(f"manifest: {info} does not fit its cache, {cache}; export the bundle again")
        return info


@contextlib.contextmanager
def _fitting(what: str) -> Iterator[None]:
    """Say of memory that is not there which flags ask for less."""
    try:
        yield
    except (MemoryError, ValueError) as error:  # numpy says ValueError to what no machine has
        raise FitError(
            f"{what} does not fit into memory; export with a lower --max-text-tokens or --max-new-tokens"
        ) from error

"""Runs the graphs a manifest names: vision per image, the prefill graphs in order, then decode token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_edge.runtime import kv_cache
from lvlm_edge.runtime.backends import Array, Backend, Buffer, Session, from_bfloat16, host_tensors, load, numpy_dtype
from lvlm_edge.runtime.bundle import Bundle, Graph, TensorInfo, open_bundle
from lvlm_edge.runtime.errors import BundleError, FitError, InputError, UsageError
from lvlm_edge.runtime.image import best_canvas, open_image, preprocess, tiled
from lvlm_edge.runtime.prompt import Text
from lvlm_edge.runtime.sampling import Sampler, Sampling, StopStrings


@dataclass(kw_only=True)
class Result:
    """An answer.

    Attributes:
        token_ids: generated tokens, the end-of-sequence token included when it was reached.
        logits: float32 [len(token_ids), vocab]; row t gave token t. None unless asked for.
        kept_visual: ascending indices among the visual tokens that survived, int64 [k]; None where none are dropped.
        text: the answer as text; empty when only tokens were asked for.
        finish: why it ended: `eos`, `stop` (a stop string) or `length`.
        seconds: time by step: `preprocess`, each graph, `first_token` (all before the first token),
            `decode` (all after it; absent for a single token).
    """

    token_ids: list[int] = field(default_factory=list)
    logits: Array | None = None
    kept_visual: Array | None = None
    text: str = ""
    finish: str = "length"
    prompt_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Pipeline:
    """A bundle, its sessions and its buffers. One prompt at a time; not safe for use from several threads at once."""

    def __init__(self, bundle: Bundle, backend: Backend, *, portable: bool = False) -> None:
        self.bundle, self.backend = bundle, backend
        self.manifest = bundle.manifest if portable else bundle.manifest.form(backend.name)
        kv_cache.check_layout(self.manifest.cache, self.manifest.counts)
        self._layout = kv_cache.Layout(self.manifest.cache, self.manifest.dtype)
        self._buffers: dict[TensorInfo, Buffer] = {}
        self._host = host_tensors(self.manifest.graphs)
        self._cache_names = {info.name: info for info in self._layout.buffers()}
        self._sessions: dict[str, Session] = {g.name: self._open(g) for g in self.manifest.graphs}
        self._table = _embedding(bundle)
        self._text: Text | None = None
        self._seen: tuple[Array, Array | None] | None = None  # pixels of the last pictures, and what came of them
        self.last: Result | None = None

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: str = "ort",
        *,
        keep_ratio: float | None = None,
        verify: bool = True,
        portable: bool = False,
        **options: Any,
    ) -> Pipeline:
        """Open a bundle for running.

        Args:
            bundle: folder made by `lvlm-edge export`.
            backend: `ort`, `trt` or `trt-rtx`.
            keep_ratio: one of those that the bundle holds; None for that of its export.
            verify: hash every file first.
            portable: run the graphs that are for every backend, even where the bundle has others for this one.
            options: the backend's own (`ort`: `threads`, `exact`).

        Raises:
            BundleError: the bundle is damaged, altered, or not for this version.
            UsageError: the bundle does not hold the keep ratio.
            UnsupportedError: unknown backend, or its packages are missing.
            DeviceError: the GPU cannot be used.
        """
        opened = open_bundle(bundle, verify=verify, keep_ratio=keep_ratio)
        return cls(opened, load(backend, **options), portable=portable)

    def stream(
        self,
        prompt: str,
        images: Sequence[Any] = (),
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        system: str | None = None,
    ) -> Iterator[str]:
        """The answer in pieces of whole characters; `self.last` holds the whole result once it has ended.

        Args:
            prompt: the user's text; an image placeholder typed in it stays text.
            images: paths, bytes or PIL images, as many as the bundle is planned for.
            max_new_tokens: at most the bundle's capacity, which is the default.
            stop: strings that end the answer and are not part of it.
            system: a system message, for templates that take one.

        Raises:
            InputError: wrong number of images, unreadable picture, or a prompt empty or too long for the bundle.
            BundleError: the bundle has no tokenizer.
        """
        result = self.last = Result()
        began = time.perf_counter()
        stops, pieces = StopStrings(stop), self._load_text().stream()
        ids, pixels = self.prepare(prompt, images, system=system)
        result.seconds["preprocess"] = time.perf_counter() - began
        for token in self._tokens(result, ids, pixels, max_new_tokens, sampling, began=began):
            if token in self.manifest.eos_token_ids:
                break
            piece, stopped = stops.push(pieces.push(token))
            result.text += piece
            if piece:
                yield piece
            if stopped:
                result.finish = "stop"
                return
        piece, stopped = stops.push(pieces.flush())
        piece += "" if stopped else stops.flush()
        result.text += piece
        if piece:
            yield piece

    def prepare(self, prompt: str, images: Sequence[Any], *, system: str | None = None) -> tuple[list[int], Array]:
        """What `generate_tokens` takes: prompt tokens with one image token per image, and pixels [crops, 3, H, W]."""
        if not prompt.strip():
            raise InputError("prompt: is empty; ask something")
        text, pixels = self._load_text(), self._pixels(images)
        parts: list[dict[str, str]] = [{"type": "image"} for _ in images]
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return text.encode_chat(messages), pixels

    def generate(self, prompt: str, images: Sequence[Any] = (), **options: Any) -> Result:
        """`stream` to its end; options as there."""
        for _ in self.stream(prompt, images, **options):
            pass
        assert self.last is not None
        return self.last

    def generate_tokens(
        self,
        prompt_token_ids: Sequence[int],
        pixel_values: Array | None,
        *,
        max_new_tokens: int | None = None,
        ignore_eos: bool = False,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        sampling: Sampling | None = None,
        replace: Mapping[str, Array] | None = None,
    ) -> Result:
        """Tokens and logits from tokens and pixels; needs no tokenizer.

        Args:
            prompt_token_ids: the image token stands once per image.
            pixel_values: float32 [images * crops, 3, H, W], preprocessed.
            max_new_tokens: at most the bundle's capacity, which is the default.
            ignore_eos: go on after end-of-sequence.
            image_sizes: (width, height) of the originals; a bundle with any-resolution tiles checks that they are
                what its tiles are for, others do not look at it.
            replace: values that take the place of prefill graphs' outputs, by name, before later graphs read them:
                another selection policy than the model's is `{"score": ...}`.

        Raises:
            InputError: tokens out of range, too many of them, or images that do not fit the bundle.
        """
        if image_sizes is not None:
            self._check_sizes(image_sizes)
        result = Result()
        rows: list[Array] = []
        for _ in self._tokens(
            result,
            prompt_token_ids,
            pixel_values,
            max_new_tokens,
            sampling,
            ignore_eos=ignore_eos,
            rows=rows,
            replace=replace,
        ):
            pass
        vocab = self.manifest.embedding.vocab
        result.logits = np.stack(rows) if rows else np.zeros((0, vocab), np.float32)
        return result

    def score_tokens(self, prompt_token_ids: Sequence[int], pixel_values: Array | None, tokens: Sequence[int]) -> Array:
        """Logits before each of some given tokens, as if the model had answered with them: float32 [n, vocab].

        Args:
            prompt_token_ids, pixel_values: as in `generate_tokens`.
            tokens: at most the bundle's capacity; row t is what comes after the prompt and `tokens[:t]`.

        Raises:
            InputError: see `generate_tokens`.
        """
        self._limit(len(tokens))
        result = Result()
        rows = [self._prefill(result, prompt_token_ids, pixel_values, {}).copy()]
        rows += [self._decode(token, result.prompt_tokens + i).copy() for i, token in enumerate(tokens[:-1])]
        return np.stack(rows)

    def buffer(self, graph: str, name: str) -> Buffer:
        """The buffer behind a graph's input or output, for checks and debugging."""
        found = self.manifest.graph(graph)
        return self._buffers[self._key(next(t for t in (*found.inputs, *found.outputs) if t.name == name))]

    def run_graph(self, graph: str, inputs: Mapping[str, Array], *, length: int | None = None) -> dict[str, Array]:
        """One graph on given inputs; copies of its outputs. Inputs not given keep what their buffers hold.

        Args:
            length: rows that went by before, after which the caches get those that the graph returns; None where they
                are not to have them.
        """
        for name, values in inputs.items():
            self.buffer(graph, name).write(values)
        if length is None:
            self._sessions[graph].run()
        else:
            self._run(self.manifest.graph(graph), length)
        return {t.name: self.buffer(graph, t.name).read().copy() for t in self.manifest.graph(graph).outputs}

    def prefill_inputs(self, prompt_token_ids: Sequence[int], image_embeds: Array | None) -> dict[str, Array]:
        """What the host hands to the prefill graphs, by name: the padded prompt and where its parts stand.

        Args:
            image_embeds: projected visual tokens and separators of all images in prompt order, [V, D]; None where
                images have no rows in the prompt.

        Raises:
            InputError: see `generate_tokens`.
        """
        ids, image = self._checked(prompt_token_ids), self.manifest.image_token_id
        counts = self.manifest.counts
        per_image = (counts.prompt_tokens - counts.text_tokens) // counts.num_images
        repeats = np.where(ids == image, per_image, 1)
        is_visual = np.repeat(ids == image, repeats)
        visual_index = np.flatnonzero(is_visual)
        rows = self._embedded(ids[ids != image])
        embeds = np.zeros((1, counts.prompt_tokens, self.manifest.embedding.hidden), rows.dtype)
        embeds[0, np.flatnonzero(~is_visual)] = rows
        if image_embeds is not None:
            embeds[0, visual_index] = image_embeds
        everywhere = np.arange(counts.prompt_tokens)
        return {
            "inputs_embeds": embeds,
            "position_ids": everywhere[None],
            "last_index": np.array([len(is_visual) - 1]),
            "write_index": np.zeros(1, np.int64),
            "cache_length": np.zeros(1, np.int64),
            "visual_index": visual_index,
            "text_index": np.setdiff1d(everywhere, visual_index),
        }

    # How one prompt runs.

    def _tokens(
        self,
        result: Result,
        prompt: Sequence[int],
        pixels: Array | None,
        max_new_tokens: int | None,
        sampling: Sampling | None,
        *,
        ignore_eos: bool = False,
        rows: list[Array] | None = None,
        began: float | None = None,
        replace: Mapping[str, Array] | None = None,
    ) -> Iterator[int]:
        limit = self._limit(max_new_tokens)
        sampler, seen = Sampler(sampling or Sampling()), [int(i) for i in prompt if i >= 0]
        began = time.perf_counter() if began is None else began
        logits = self._prefill(result, prompt, pixels, replace or {})
        length = result.prompt_tokens
        for step in range(limit):
            if rows is not None:
                rows.append(logits.copy())
            token = sampler.pick(logits, seen)
            seen.append(token)
            result.token_ids.append(token)
            ended = token in self.manifest.eos_token_ids and not ignore_eos
            if ended:
                result.finish = "eos"
            result.seconds["first_token" if step == 0 else "decode"] = time.perf_counter() - began
            if step == 0:
                began = time.perf_counter()
            yield token
            if ended or step + 1 == limit:
                break
            logits = self._decode(token, length + step)

    def _prefill(
        self, result: Result, prompt: Sequence[int], pixels: Array | None, replace: Mapping[str, Array]
    ) -> Array:
        self._checked(prompt)
        embeds = self._see(result, pixels)
        inputs = self.prefill_inputs(prompt, embeds)
        result.prompt_tokens = int(inputs["last_index"][0]) + 1
        graphs = [g for g in self.manifest.graphs if g.role == "prefill"]
        self._write(graphs, inputs)
        for graph in graphs:
            began = time.perf_counter()
            self._run(graph, 0)
            for info in graph.outputs:
                if info.name in replace:
                    self._buffers[self._key(info)].write(replace[info.name])
            result.seconds[graph.name] = time.perf_counter() - began
        for graph in graphs:
            if any(info.name == "kept_visual" for info in graph.outputs):
                result.kept_visual = self.buffer(graph.name, "kept_visual").read().copy()
        logits: Array = self.buffer(graphs[-1].name, "logits").read().reshape(-1)
        return logits

    def _see(self, result: Result, pixels: Array | None) -> Array | None:
        """Projected visual tokens of every crop of every image, separators among them, [V, D].

        None where the decoder reads the encoder's features, from caches that are then filled. Pictures that were
        just seen are not looked at again.
        """
        checked = self._checked_pixels(pixels)
        if self._seen is None or not np.array_equal(self._seen[0], checked):
            self._seen = None
            self._seen = checked.copy(), self._look(result, checked)
        return self._seen[1]

    def _look(self, result: Result, pixels: Array) -> Array | None:
        """Run the graphs of role image: the encoder once per crop, what follows it once for all crops."""
        graphs = [g for g in self.manifest.graphs if g.role == "image"]
        wanted = {"image_embeds"} | {info.name for graph in graphs[1:] for info in graph.inputs}
        found: dict[str, list[Array]] = {}
        for graph in graphs:
            began = time.perf_counter()
            if any(info.name == "pixel_values" for info in graph.inputs):
                for picture in pixels:
                    self.buffer(graph.name, "pixel_values").write(picture[None])
                    self._run(graph, 0)
                    for name in wanted & {info.name for info in graph.outputs}:
                        found.setdefault(name, []).append(self.buffer(graph.name, name).read()[0].copy())
            else:
                whole = {name: np.concatenate(values)[None] for name, values in found.items()}
                self._write([graph], whole | {"write_index": np.zeros(1, np.int64)})
                self._run(graph, 0)
            result.seconds[graph.name] = time.perf_counter() - began
        embeds = found.get("image_embeds")
        return None if embeds is None else np.concatenate(embeds)

    def forget_images(self) -> None:
        """Look at the next pictures even if they were just seen, as a measurement wants."""
        self._seen = None

    def _decode(self, token: int, length: int) -> Array:
        """Logits after one more token, `length` rows having gone by."""
        graphs = [g for g in self.manifest.graphs if g.role == "decode"]
        inputs = {
            "inputs_embeds": self._embedded(token).reshape(1, 1, -1),
            "position_ids": np.full((1, 1), length + self.manifest.decode_offset),
            "cache_length": np.full(1, length),
            "last_index": np.zeros(1, np.int64),
        }
        self._write(graphs, inputs)
        for graph in graphs:
            self._run(graph, length)
        logits: Array = self.buffer(graphs[-1].name, "logits").read().reshape(-1)
        return logits

    def _write(self, graphs: Sequence[Graph], inputs: Mapping[str, Array]) -> None:
        """Fill the buffers that graphs read and the host provides, each once."""
        wanted = {self._key(info) for graph in graphs for info in graph.inputs if info.name in inputs}
        for info in wanted:
            self._buffers[info].write(inputs[info.name])

    def _embedded(self, ids: Array | int) -> Array:
        """Rows of the token embedding, those of bfloat16 as float32."""
        rows: Array = self._table[ids]
        return from_bfloat16(rows) if self.manifest.embedding.dtype == "bfloat16" else rows

    # What is asked of the input.

    def _checked(self, prompt: Sequence[int]) -> Array:
        counts = self.manifest.counts
        ids = np.asarray(prompt, np.int64).reshape(-1)
        vocab = self.manifest.embedding.vocab
        image = self.manifest.image_token_id
        outside = ids[((ids < 0) | (ids >= vocab)) & (ids != image)]
        if outside.size:
            raise InputError(
                f"prompt: token {outside[0]} is outside the vocabulary of {vocab}; use this model's tokenizer"
            )
        images = int((ids == image).sum())
        if images != counts.num_images:
            raise InputError(
                f"prompt: has {images} image(s), the bundle is planned for {counts.num_images}; give "
                f"{counts.num_images}, or export with --num-images {max(images, 1)}"
            )
        text = len(ids) - images
        if not text:
            raise InputError("prompt: has no text; ask something")
        if text > counts.text_tokens:
            raise InputError(
                f"prompt: has {text} text tokens, the bundle holds {counts.text_tokens}; shorten it, or export with "
                f"--max-text-tokens {text} or more"
            )
        return ids

    def _checked_pixels(self, pixels: Array | None) -> Array:
        wanted = next(g for g in self.manifest.graphs if g.role == "image").inputs[0]
        shape = (self.manifest.counts.num_images * self.manifest.counts.crops, *wanted.shape[1:])
        found = None if pixels is None else np.asarray(pixels)
        if found is None or found.shape != shape:
            given = "nothing" if found is None else list(found.shape)
            raise InputError(f"pixel_values: is {given}, the bundle is planned for {list(shape)}; see num_images")
        if not np.isfinite(found).all():
            raise InputError("pixel_values: holds values that are infinite or not a number; check the preprocessing")
        return found

    def _pixels(self, images: Sequence[Any]) -> Array:
        planned = self.manifest.counts.num_images
        if len(images) != planned:
            raise InputError(
                f"images: {len(images)} given, the bundle is planned for {planned}; give {planned}, or export with "
                f"--num-images {max(len(images), 1)}"
            )
        return np.concatenate([self._views(open_image(image)) for image in images])

    def _views(self, picture: Any) -> Array:
        """What the encoder sees of one picture, [crops, 3, H, W]."""
        config = self.manifest.image
        if config.tiles is None or config.canvas is None:
            return preprocess(picture, config.preprocessing)
        self._check_canvas(picture.size)
        return tiled(picture, config.preprocessing, config.canvas, config.tiles)

    def _check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        if len(sizes) != self.manifest.counts.num_images:
            raise InputError(
                f"image_sizes: has {len(sizes)} entries, the bundle is planned for {self.manifest.counts.num_images} "
                "image(s); give (width, height) of each"
            )
        if self.manifest.image.tiles is not None:
            for width, height in sizes:
                self._check_canvas((width, height))

    def _check_canvas(self, size: tuple[int, int]) -> None:
        """Raise InputError for a picture that belongs on other tiles than the bundle's."""
        config = self.manifest.image
        if config.tiles is None or config.canvas is None:
            return
        if min(size) < 1:
            raise InputError(f"image_sizes: holds {size[0]}x{size[1]}, expected width and height of the picture")
        best = best_canvas(size, config.pinpoints)
        if best != config.canvas:
            tile = config.canvas[0] // config.tiles[1], config.canvas[1] // config.tiles[0]
            raise InputError(
                f"picture: {size[0]}x{size[1]} goes on tiles of {best[1] // tile[1]}x{best[0] // tile[0]}, the bundle "
                f"has {config.tiles[0]}x{config.tiles[1]} (rows x columns); export another with --image-size "
                f"{size[0]}x{size[1]}"
            )

    def _limit(self, max_new_tokens: int | None) -> int:
        room = self.manifest.counts.new_tokens
        if max_new_tokens is None:
            return room
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: is {max_new_tokens}, expected 1..{room}; ask for at least one token")
        if max_new_tokens > room:
            raise UsageError(
                f"max_new_tokens: is {max_new_tokens}, the bundle holds {room}; ask for fewer, or export with "
                f"--max-new-tokens {max_new_tokens}"
            )
        return max_new_tokens

    def _load_text(self) -> Text:
        if self._text is None:
            config = self.manifest.text
            if config is None:
                raise BundleError(
                    f"{self.bundle.folder}: has no tokenizer, since its checkpoint had none; put tokenizer.json beside "
                    "the checkpoint's config.json and export again, or use generate_tokens"
                )
            self._text = Text.load(self.bundle.folder, config)
        return self._text

    # How graphs and buffers come together.

    def _open(self, graph: Graph) -> Session:
        bound = {}
        for info in (*graph.inputs, *graph.outputs):
            bound[graph.names.get(info.name, info.name)] = self._allocated(self._key(info))
        return self.backend.open(self.bundle, graph, bound)

    def _allocated(self, info: TensorInfo) -> Buffer:
        if info not in self._buffers:
            try:
                self._buffers[info] = self.backend.allocate(info, host=info.name in self._host)
            except (MemoryError, ValueError) as error:  # numpy says ValueError to what no machine has
                raise FitError(
                    f"{info.name}: {list(info.shape)} {info.dtype} does not fit into memory; export with a lower "
                    "--max-text-tokens or --max-new-tokens"
                ) from error
        return self._buffers[info]

    def _run(self, graph: Graph, length: int) -> None:
        """Run a graph after `length` rows have gone by; rows that it returns go to the caches."""
        self._sessions[graph.name].run()
        for info in graph.outputs:
            cache = self._cache_names.get(kv_cache.shared_name(info.name))
            if cache is not None and cache.shape != info.shape:
                # What images leave in a cache comes before any row of the prompt.
                slot = 0 if graph.role == "image" else self._layout.slot(info.name, length)
                self._allocated(cache).copy_rows(self._buffers[info], slot)

    def _key(self, info: TensorInfo) -> TensorInfo:
        """The buffer of a tensor: equal name and shape are one buffer, and a cache is written where it is read."""
        name = kv_cache.shared_name(info.name)
        cache = self._cache_names.get(name)
        if cache is None or cache == TensorInfo(name, info.dtype, info.shape):
            return TensorInfo(name, info.dtype, info.shape)
        if not kv_cache.are_rows(info, cache):
            raise BundleError(f"manifest: {info} does not fit its cache, {cache}; export the bundle again")
        return info


def _embedding(bundle: Bundle) -> Array:
    """The token embedding [vocab, hidden], mapped, not read; bfloat16 as its bits."""
    e = bundle.manifest.embedding
    shape = (e.hidden, e.vocab) if e.columns else (e.vocab, e.hidden)
    table = np.memmap(bundle.path(e.file), numpy_dtype(e.dtype), "r", e.offset, shape)
    return table.T if e.columns else table

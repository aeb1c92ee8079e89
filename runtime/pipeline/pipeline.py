"""Runs the graphs a manifest names: vision per view, the prefill graphs in order, then decode token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_edge.runtime.backends import Array, Backend, Buffer, from_bfloat16, load, numpy_dtype
from lvlm_edge.runtime.bundle import Bundle, Graph, open_bundle
from lvlm_edge.runtime.bundle.kv_cache import coded_length
from lvlm_edge.runtime.errors import BundleError, InputError
from lvlm_edge.runtime.pictures.layout import Picture, Rows, lay_out
from lvlm_edge.runtime.pipeline import inputs
from lvlm_edge.runtime.pipeline.features import Features
from lvlm_edge.runtime.pipeline.inputs import Media
from lvlm_edge.runtime.pipeline.memory import Memory
from lvlm_edge.runtime.pipeline.sampling import Sampler, Sampling, StopStrings
from lvlm_edge.runtime.prompt import Text


@dataclass(kw_only=True)
class Result:
    """An answer.

    Attributes:
        token_ids: generated tokens, the end-of-sequence token included when it was reached.
        logits: float32 [len(token_ids), vocab]; row t gave token t. None unless asked for.
        kept_visual: ascending indices among the visual tokens that survived, int64 [k]; None where none are dropped.
        text: the answer as text; empty when only tokens were asked for.
        finish: why it ended: `eos`, `stop` (a stop string) or `length`.
        prompt_tokens: rows of the prompt, those of pictures included.
        pictures: what each image of the prompt stood for.
        seconds: time by step: `preprocess`, each graph, `first_token` (all before the first token),
            `decode` (all after it; absent for a single token).
    """

    token_ids: list[int] = field(default_factory=list)
    logits: Array | None = None
    kept_visual: Array | None = None
    text: str = ""
    finish: str = "length"
    prompt_tokens: int = 0
    pictures: tuple[Picture, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Turn:
    """One prompt and how it is answered.

    Attributes:
        limit: most new tokens.
        replace: values that take the place of prefill graphs' outputs.
        rows: where logits of every step go; None where nobody wants them.
        began: when the clock of the first token started.
    """

    prompt: Sequence[int]
    media: tuple[Media, ...]
    limit: int
    sampling: Sampling
    ignore_eos: bool = False
    rows: list[Array] | None = None
    began: float | None = None
    replace: Mapping[str, Array] = field(default_factory=dict)


class Pipeline:
    """A bundle, its sessions and its buffers. One prompt at a time; not safe for use from several threads at once."""

    def __init__(self, bundle: Bundle, backend: Backend, *, portable: bool = False) -> None:
        self.bundle, self.backend = bundle, backend
        self.manifest = bundle.manifest if portable else bundle.manifest.for_backend(backend.name)
        self._memory = Memory(bundle, self.manifest, backend)
        self._table = _embedding(bundle)
        self._text: Text | None = None
        self._features = Features(self.manifest, self._memory)
        self._restored = 0  # rows that the plan drops and the prompt at hand did not
        self._next = 0  # position of the first token behind the prompt, less the prompt's rows
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
        fit: bool = False,
    ) -> Iterator[str]:
        """The answer in pieces of whole characters; `self.last` holds the whole result once it has ended.

        Args:
            prompt: the user's text; an image placeholder typed in it stays text.
            images: paths, bytes or PIL images, as many as the bundle is planned for; fewer, where the method allows it.
            max_new_tokens: at most the bundle's capacity, which is the default.
            stop: strings that end the answer and are not part of it.
            system: a system message, for templates that take one.
            fit: resize pictures that belong on another canvas to the bundle's.

        Raises:
            InputError: wrong number of images, a picture unreadable or of another canvas, a prompt empty or too long.
            BundleError: the bundle has no tokenizer.
        """
        result = self.last = Result()
        began = time.perf_counter()
        stops, pieces = StopStrings(stop), self._load_text().stream()
        ids, pixels = self.prepare(prompt, images, system=system, fit=fit)
        result.seconds["preprocess"] = time.perf_counter() - began
        media = inputs.media(self.manifest, pixels)
        turn = _Turn(ids, media, inputs.limit(self.manifest, max_new_tokens), sampling or Sampling(), began=began)
        for token in self._tokens(result, turn):
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

    def prepare(
        self,
        prompt: str | None = None,
        images: Sequence[Any] = (),
        *,
        system: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        fit: bool = False,
    ) -> tuple[list[int], Array | list[Array] | None]:
        """What `generate_tokens` takes: prompt tokens with one image token per image, and the images' pixels.

        Args:
            prompt: the text of one user turn, which the images precede.
            images: paths, bytes or PIL images.
            system: a system message, for templates that take one.
            messages: instead of `prompt` and `system`, a conversation of `{"role": ..., "content": ...}`, whose
                content is a string or a list of `{"type": "image"}` and `{"type": "text", "text": ...}`; images in
                their order.
            fit: resize pictures that belong on another canvas to the bundle's.

        Returns:
            Token ids, and `pixel_values`: float32 [views, 3, H, W] where all pictures have one size, else a list of
            one such array per picture; None without pictures.

        Raises:
            InputError: see `stream`; or the messages name another number of images.
        """
        if messages is None:
            messages = inputs.user_turn(prompt or "", len(images), system)
        elif prompt is not None or system is not None:
            raise InputError("prepare: takes either a prompt or messages; leave out the prompt and the system message")
        named = inputs.count_images(messages)
        if named != len(images):
            raise InputError(f"messages: name {named} image(s), {len(images)} given; give one for each")
        text, pixels = self._load_text(), inputs.read_images(self.manifest, images, fit=fit)
        return text.encode_chat(list(messages)), pixels

    def generate(self, prompt: str, images: Sequence[Any] = (), **options: Any) -> Result:
        """`stream` to its end; options as there."""
        for _ in self.stream(prompt, images, **options):
            pass
        assert self.last is not None
        return self.last

    def generate_tokens(
        self,
        prompt_token_ids: Sequence[int],
        pixel_values: Any,
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
            pixel_values: float32 [views of all images, 3, H, W], preprocessed, or a list of one such array per image;
                None for text alone.
            max_new_tokens: at most the bundle's capacity, which is the default.
            ignore_eos: go on after end-of-sequence.
            image_sizes: (width, height) of the originals; checked against the canvases that the bundle is for.
            replace: values that take the place of prefill graphs' outputs, by name, before later graphs read them:
                another selection policy than the model's is `{"score": ...}`.

        Raises:
            InputError: tokens out of range, too many of them, or images that do not fit the bundle.
        """
        media = inputs.media(self.manifest, pixel_values)
        if image_sizes is not None:
            inputs.check_sizes(self.manifest, image_sizes, len(media))
        result, rows = Result(), list[Array]()
        turn = _Turn(
            prompt_token_ids,
            media,
            inputs.limit(self.manifest, max_new_tokens),
            sampling or Sampling(),
            ignore_eos=ignore_eos,
            rows=rows,
            replace=replace or {},
        )
        for _ in self._tokens(result, turn):
            pass
        vocab = self.manifest.embedding.vocab
        result.logits = np.stack(rows) if rows else np.zeros((0, vocab), np.float32)
        return result

    def score_tokens(self, prompt_token_ids: Sequence[int], pixel_values: Any, tokens: Sequence[int]) -> Array:
        """Logits before each of some given tokens, as if the model had answered with them: float32 [n, vocab].

        Args:
            prompt_token_ids, pixel_values: as in `generate_tokens`.
            tokens: at most the bundle's capacity; row t is what comes after the prompt and `tokens[:t]`.

        Raises:
            InputError: see `generate_tokens`.
        """
        limit = inputs.limit(self.manifest, len(tokens))
        turn = _Turn(prompt_token_ids, inputs.media(self.manifest, pixel_values), limit, Sampling())
        result = Result()
        rows = [self._prefill(result, turn).copy()]
        rows += [self._decode(token, result.prompt_tokens + i).copy() for i, token in enumerate(tokens[:-1])]
        return np.stack(rows)

    def forget_images(self) -> None:
        """Clear the cache of image features: the next prompt runs the vision encoder."""
        self._features.forget()

    def buffer(self, graph: str, name: str) -> Buffer:
        """The buffer behind a graph's input or output, for checks and debugging."""
        found = self.manifest.graph(graph)
        return self._memory.buffer(next(t for t in (*found.inputs, *found.outputs) if t.name == name))

    def run_graph(self, graph: str, given: Mapping[str, Array], *, length: int | None = None) -> dict[str, Array]:
        """One graph on given inputs; copies of its outputs. Inputs not given keep what their buffers hold.

        Args:
            length: rows that went by before, after which the caches get those that the graph returns; None where they
                are not to have them.
        """
        found = self.manifest.graph(graph)
        self._memory.write([found], given)
        self._memory.run(found, length)
        return {t.name: self._memory.buffer(t).read().copy() for t in found.outputs}

    def prefill_inputs(
        self,
        prompt_token_ids: Sequence[int],
        image_rows: Mapping[str, Array],
        pictures: Sequence[Picture] | None = None,
    ) -> dict[str, Array]:
        """What the host hands to the prefill graphs, by name: the padded prompt and where its parts stand.

        Args:
            image_rows: rows of all images in prompt order, [rows, D], by output of the image graphs (`image_embeds`);
                empty where images have no rows in the prompt.
            pictures: what the prompt's images stand for; by default the planned ones, as many as the prompt has.

        Raises:
            InputError: see `generate_tokens`.
        """
        image = self.manifest.image_token_id
        if pictures is None:
            pictures = self.manifest.pictures[: list(prompt_token_ids).count(image)]
        ids = inputs.check_prompt(self.manifest, prompt_token_ids, len(pictures))
        return self._prompt_tensors(lay_out(ids.tolist(), pictures, self.manifest.axes), image_rows)

    # How one prompt runs.

    def _prompt_tensors(self, rows: Rows, image_rows: Mapping[str, Array]) -> dict[str, Array]:
        counts, size = self.manifest.counts, self.manifest.embedding.hidden
        text = self._embedded(rows.ids)
        found: dict[str, Array] = {}
        for output, name in self.manifest.image_rows.items():
            found[name] = np.zeros((1, counts.prompt_tokens, size), text.dtype)
            if output in image_rows:
                found[name][0, rows.image] = image_rows[output]
        embeds = found.setdefault("inputs_embeds", np.zeros((1, counts.prompt_tokens, size), text.dtype))
        embeds[0, rows.text] = text
        everywhere = np.arange(counts.prompt_tokens)
        positions = np.tile(everywhere, (self.manifest.axes, 1))  # padding rows keep their numbers
        positions[:, : rows.count] = rows.positions
        # Rows of planned pictures that did not come are padding, whose scores are 0.
        planned = sum(picture.rows("visual", "separator") for picture in self.manifest.pictures)
        padding = everywhere[counts.prompt_tokens - (planned - len(rows.image)) :]
        visual = np.concatenate([rows.image, padding])
        return found | {
            "position_ids": positions,
            "last_index": np.array([rows.count - 1]),
            "write_index": np.zeros(1, np.int64),
            "cache_length": np.zeros(1, np.int64),
            "visual_index": visual,
            "text_index": np.setdiff1d(everywhere, visual),
        }

    def _tokens(self, result: Result, turn: _Turn) -> Iterator[int]:
        sampler, seen = Sampler(turn.sampling), [int(i) for i in turn.prompt if i >= 0]
        began = time.perf_counter() if turn.began is None else turn.began
        logits = self._prefill(result, turn)
        length = result.prompt_tokens
        for step in range(turn.limit):
            if turn.rows is not None:
                turn.rows.append(logits.copy())
            token = sampler.pick(logits, seen)
            seen.append(token)
            result.token_ids.append(token)
            ended = token in self.manifest.eos_token_ids and not turn.ignore_eos
            if ended:
                result.finish = "eos"
            result.seconds["first_token" if step == 0 else "decode"] = time.perf_counter() - began
            if step == 0:
                began = time.perf_counter()
            yield token
            if ended or step + 1 == turn.limit:
                break
            logits = self._decode(token, length + step)

    def _prefill(self, result: Result, turn: _Turn) -> Array:
        pictures = tuple(media.picture for media in turn.media)
        ids = inputs.check_prompt(self.manifest, turn.prompt, len(pictures))
        rows = lay_out(ids.tolist(), pictures, self.manifest.axes)
        given = self._prompt_tensors(rows, self._features.of(turn.media, result.seconds))
        result.prompt_tokens, result.pictures = rows.count, pictures
        visual = sum(picture.visual_tokens for picture in pictures)
        self._next, self._restored = rows.next - rows.count, self._not_dropped(visual)
        graphs = self.manifest.role("prefill")
        self._memory.write(graphs, given)
        for graph in graphs:
            began = time.perf_counter()
            self._memory.run(graph)
            for info in graph.outputs:
                if info.name in turn.replace:
                    self._memory.buffer(info).write(turn.replace[info.name])
                if info.name == "score" and visual < self.manifest.counts.visual_tokens:
                    self._demote(self._memory.buffer(info), visual)
            result.seconds[graph.name] = time.perf_counter() - began
        for graph in graphs:
            for info in (t for t in graph.outputs if t.name == "kept_visual"):
                kept = self._memory.buffer(info).read()
                result.kept_visual = kept[kept < visual].copy()
        logits: Array = self.buffer(graphs[-1].name, "logits").read().reshape(-1)
        return logits

    def _demote(self, score: Buffer, visual: int) -> None:
        """Rank the visual tokens that are not to be kept behind padding, which stands for pictures that did not come.

        A graph always selects as many rows as were planned, and padding has the score 0.
        """
        values = score.read().copy()
        order = np.argsort(-values[0, :visual], kind="stable")
        values[0, order[inputs.kept_of(self.manifest, visual) :]] = -1
        score.write(values)

    def _not_dropped(self, visual: int) -> int:
        """Rows that the plan drops from the caches and a prompt of so many visual tokens does not."""
        counts = self.manifest.counts
        if not self.manifest.selects:
            return 0
        return (counts.visual_tokens - counts.kept_tokens) - (visual - inputs.kept_of(self.manifest, visual))

    def _decode(self, token: int, length: int) -> Array:
        """Logits after one more token, `length` rows having gone by."""
        graphs = self.manifest.role("decode")
        coded = coded_length(length, self._restored)
        given = {
            "inputs_embeds": self._embedded(np.array(token)).reshape(1, 1, -1),
            "position_ids": np.full((self.manifest.axes, 1), length + self._next),
            "cache_length": np.full(1, coded),
            "last_index": np.zeros(1, np.int64),
        }
        self._memory.write(graphs, given | self._no_image_rows(graphs))
        for graph in graphs:
            self._memory.run(graph, coded)
        logits: Array = self.buffer(graphs[-1].name, "logits").read().reshape(-1)
        return logits

    def _no_image_rows(self, graphs: Sequence[Graph]) -> dict[str, Array]:
        """Zeros for what graphs that also serve prompts add at the rows of images."""
        names = set(self.manifest.image_rows.values()) - {"inputs_embeds"}
        return {t.name: np.zeros(t.shape, np.float32) for g in graphs for t in g.inputs if t.name in names}

    def _embedded(self, ids: Array) -> Array:
        """Rows of the token embedding, those of bfloat16 as float32."""
        rows: Array = self._table[ids]
        return from_bfloat16(rows) if self.manifest.embedding.dtype == "bfloat16" else rows

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


def _embedding(bundle: Bundle) -> Array:
    """The token embedding [vocab, hidden], mapped, not read; bfloat16 as its bits."""
    e = bundle.manifest.embedding
    shape = (e.hidden, e.vocab) if e.columns else (e.vocab, e.hidden)
    table = np.memmap(bundle.path(e.file), numpy_dtype(e.dtype), "r", e.offset, shape)
    return table.T if e.columns else table

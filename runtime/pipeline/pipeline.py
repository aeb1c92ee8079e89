"""Runs the graphs a manifest names: vision per view, the prefill graphs in order, then decode token by token."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_edge.runtime.backends import Array, Backend, Buffer, Highest, load
from lvlm_edge.runtime.bundle import Bundle, certificate, open_bundle
from lvlm_edge.runtime.errors import InputError, UnsupportedError
from lvlm_edge.runtime.pictures.layout import Picture, lay_out
from lvlm_edge.runtime.pictures.sources import Reading, listed
from lvlm_edge.runtime.pipeline import inputs
from lvlm_edge.runtime.pipeline.decoder import Decoder, Result, Turn
from lvlm_edge.runtime.pipeline.sampling import Sampling, StopStrings
from lvlm_edge.runtime.prompt import Text


class Pipeline:
    """A bundle, its sessions and its buffers, which answer one prompt at a time.

    Threads wait for each other's whole answers (`generate`, `generate_tokens`, `score_tokens`). A stream computes token
    by token: one that is asked for a token after another prompt was begun raises UsageError.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, portable: bool = False) -> None:
        self.bundle, self.backend = bundle, backend
        self.manifest = bundle.manifest if portable else bundle.manifest.for_backend(backend.name)
        self.reading = Reading()
        self._decoder = Decoder(bundle, self.manifest, backend)
        self._text: Text | None = None
        self.last: Result | None = None

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: str = "ort",
        *,
        keep_ratio: float | None = None,
        verify: bool = True,
        certified: bool | None = False,
        portable: bool = False,
        **options: Any,
    ) -> Pipeline:
        """Open a bundle for running.

        Logs a warning where the bundle's certificate speaks of another manifest, cannot be read, or says that the last
        check failed.

        Args:
            bundle: folder made by `lvlm-edge export`.
            backend: `ort`, `ort-cuda`, `trt` or `trt-rtx`.
            keep_ratio: one of those that the bundle holds; None for that of its export.
            verify: hash every file first.
            certified: refuse a bundle that has not passed `lvlm-edge check` as it is now. The certificate lies in the
                bundle: it guards against accidents, and not against who can write there. None: do not read it.
            portable: run the graphs that are for every backend, even where the bundle has others for this one.
            options: fields of `Reading` (`max_megapixels`, `bgr`, `allow_url`), and the backend's own (`ort`:
                `threads`, `exact`; `ort-cuda`: `capture`; `trt` and `trt-rtx`: `engines`, a folder).

        Raises:
            BundleError: the bundle is damaged, altered, not for this version, or not certified.
            UsageError: the bundle does not hold the keep ratio.
            UnsupportedError: unknown backend, or its packages are missing.
            DeviceError: the GPU cannot be used.
        """
        opened = open_bundle(bundle, verify=verify, keep_ratio=keep_ratio)
        if certified is not None:
            certificate.consult(opened.folder, opened.name, required=certified)
        reading = Reading(**{f.name: options.pop(f.name) for f in fields(Reading) if f.name in options})
        pipe = cls(opened, load(backend, **options), portable=portable)
        pipe.reading = reading
        opened.check_unchanged()
        return pipe

    def stream(
        self,
        prompt: str,
        images: Any = (),
        videos: Any = (),
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        system: str | None = None,
        fit: bool = False,
    ) -> Generator[str, None, Result]:
        """The answer in pieces of whole characters; the generator returns the result, which `self.last` holds too.

        Arguments are checked by the call. Only the stream of the newest prompt can go on.

        Args:
            prompt: the user's text; a placeholder typed in it stays text.
            images: as many as the bundle is planned for; fewer, where the method allows it. Paths, bytes, Pillow
                pictures, arrays uint8 [H, W, 3] or data URLs; one alone needs no list.
            videos: likewise. Video files, folders of frames (pictures in the order of their names), or arrays uint8
                [frames, H, W, 3], of which as many frames are seen as the bundle is planned for, evenly spaced.
            max_new_tokens: at most the bundle's capacity, which is the default.
            sampling: how tokens are drawn; by default as the checkpoint says, which `self.sampling` holds.
            stop: strings that end the answer and are not part of it.
            system: a system message, for templates that take one.
            fit: resize pictures that belong on another canvas to the bundle's.

        Raises:
            InputError: wrong number of images or videos, a picture unreadable or of another canvas, a video unreadable
                or too short, a prompt empty or too long.
            UnsupportedError: the bundle has no tokenizer, or the package is missing that reads video files.
            UsageError: while iterating: another prompt was begun.
            LvlmEdgeError: while iterating: the model's logits are not finite.
        """
        began = time.perf_counter()
        stops = StopStrings(stop)
        ids, pixels = self.prepare(prompt, images, videos=videos, system=system, fit=fit)
        result = Result(seconds={"preprocess": time.perf_counter() - began})
        media = inputs.media(self.manifest, pixels, prompt=ids)
        limit = inputs.limit(self.manifest, max_new_tokens)
        inputs.check_prompt(self.manifest, ids, [one.picture for one in media])
        self.last = result
        return self._pieces(result, Turn(ids, media, limit, sampling or self.sampling, began=began), stops)

    def _pieces(self, result: Result, turn: Turn, stops: StopStrings) -> Generator[str, None, Result]:
        try:
            return (yield from self._whole(result, turn, stops))
        except GeneratorExit:
            result.finish = "cancelled"
            raise

    def _whole(self, result: Result, turn: Turn, stops: StopStrings) -> Generator[str, None, Result]:
        pieces = self._load_text().stream()
        for token in self._decoder.tokens(result, turn):
            if token in self.manifest.eos_token_ids:
                break
            piece, stopped = stops.push(pieces.push(token))
            result.text += piece
            if piece:
                yield piece
            if stopped:
                result.finish = "stop"
                return result
        piece, stopped = stops.push(pieces.flush())
        piece += "" if stopped else stops.flush()
        result.text += piece
        if piece:
            yield piece
        return result

    def prepare(
        self,
        prompt: str | None = None,
        images: Any = (),
        videos: Any = (),
        *,
        system: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        fit: bool = False,
    ) -> tuple[list[int], Array | list[Array] | None]:
        """What `generate_tokens` takes: prompt tokens with one token per image and video, and pixels of these.

        Args:
            prompt: the text of one user turn, which the images and videos precede.
            images, videos: see `stream`.
            system: a system message, for templates that take one.
            messages: instead of `prompt` and `system`, a conversation of `{"role": ..., "content": ...}`, whose
                content is a string or a list of `{"type": "image"}`, `{"type": "video"}` and `{"type": "text",
                "text": ...}`; images and videos in their order.
            fit: resize pictures that belong on another canvas to the bundle's.

        Returns:
            Token ids, and `pixel_values`: float32 [views, 3, H, W] where all views have one size, else a list of one
            such array per image or video; None without any. They stand in the prompt's order; a frame is a view.

        Raises:
            InputError: see `stream`; or the messages name another number of images or videos.
        """
        images, videos = listed(images), listed(videos, axes=4)
        if messages is None:
            before = None if system is None else self._load_text().system_message(system)
            messages = inputs.user_turn(prompt or "", len(images), before, videos=len(videos))
        elif prompt is not None or system is not None:
            raise InputError("prepare: takes either a prompt or messages; leave out the prompt and the system message")
        inputs.check_named(messages, len(images), len(videos))
        ids = self.encode(messages)
        kinds = inputs.kinds_of(self.manifest, ids)
        return ids, inputs.read_media(self.manifest, kinds, images, videos, self.reading, fit=fit)

    def generate(self, prompt: str, images: Any = (), videos: Any = (), **options: Any) -> Result:
        """`stream` to its end; options as there."""
        pieces = self.stream(prompt, images, videos, **options)
        with self._decoder.lock:
            try:
                while True:
                    next(pieces)
            except StopIteration as end:
                result: Result = end.value
            self.last = result
        return result

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
        logits: bool = True,
    ) -> Result:
        """Tokens and logits from tokens and pixels; needs no tokenizer.

        Args:
            prompt_token_ids: the image token stands once per image, the video token once per video.
            pixel_values: float32 [views of all images, 3, H, W], preprocessed, or a list of one such array per image;
                None for text alone. A video is [frames, 3, H, W]; images and videos stand in the prompt's order.
            max_new_tokens: at most the bundle's capacity, which is the default.
            ignore_eos: go on after end-of-sequence.
            image_sizes: (width, height) of the originals; checked against the canvases that the bundle is for.
            replace: values that take the place of prefill graphs' outputs, by name, before later graphs read them:
                another selection policy than the model's is `{"score": ...}`.
            logits: whether the result has them; a GPU returns all of them only where somebody wants them.

        Raises:
            InputError: tokens out of range, too many of them, or images that do not fit the bundle.
            LvlmEdgeError: logits are not finite, where the result does not have them.
        """
        media = inputs.media(self.manifest, pixel_values, image_sizes, prompt=prompt_token_ids)
        if image_sizes is not None:
            inputs.check_sizes(image_sizes, sum(one.picture.kind == "image" for one in media))
        result, rows = Result(), list[Array]()
        turn = Turn(
            prompt_token_ids,
            media,
            inputs.limit(self.manifest, max_new_tokens),
            sampling or Sampling(),
            ignore_eos=ignore_eos,
            rows=rows if logits else None,
            replace=replace or {},
        )
        with self._decoder.lock:
            for _ in self._decoder.tokens(result, turn):
                pass
        if logits:
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
        media = inputs.media(self.manifest, pixel_values, prompt=prompt_token_ids)
        turn = Turn(prompt_token_ids, media, limit, Sampling())
        return self._decoder.score(turn, tokens)

    @property
    def sampling(self) -> Sampling:
        """How the checkpoint says that tokens are drawn: the default of `stream` and `generate`."""
        return Sampling(**dataclasses.asdict(self.manifest.generation))

    def forget_images(self) -> None:
        """Clear the cache of image features: the next prompt runs the vision encoder."""
        self._decoder.features.forget()

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, with one token per image and video; see `prepare`.

        Raises:
            InputError: the chat template refuses the messages.
            UnsupportedError: the bundle has no tokenizer.
        """
        return self._load_text().encode_chat(list(messages))

    def pixels(self, images: Any = (), videos: Any = (), *, fit: bool = False) -> list[Array]:
        """Pixels of pictures, then of videos, float32 [views, 3, H, W] each; see `prepare`.

        Raises:
            InputError: a picture or video is unreadable, a picture belongs on another canvas, or there are too many.
        """
        images, videos = listed(images), listed(videos, axes=4)
        kinds = ["image"] * len(images) + ["video"] * len(videos)
        found = inputs.read_media(self.manifest, kinds, images, videos, self.reading, fit=fit)
        return [media.pixels for media in inputs.media(self.manifest, found)]

    def embed(self, ids: Array) -> Array:
        """Rows of the token embedding, [n, D], in the bundle's precision; those of bfloat16 as float32."""
        return self._decoder.embedded(ids)

    def buffer(self, graph: str, name: str) -> Buffer:
        """The buffer behind a graph's input or output, for checks and debugging."""
        found = self.manifest.graph(graph)
        return self._decoder.memory.buffer(next(t for t in (*found.inputs, *found.outputs) if t.name == name))

    def highest(self) -> Highest | None:
        """The highest of the logits that were computed last, as the backend finds them; None where it does not."""
        finder = self._decoder.memory.finder
        return None if finder is None else finder.find()

    def run_graph(self, graph: str, given: Mapping[str, Array], *, length: int | None = None) -> dict[str, Array]:
        """One graph on given inputs; copies of its outputs. Inputs not given keep what their buffers hold.

        Args:
            length: rows that went by before, after which the caches get those that the graph returns; None where they
                are not to have them.
        """
        return self._decoder.run_graph(graph, given, length)

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
        if pictures is None:
            pictures = inputs.planned_for(self.manifest, prompt_token_ids)
        ids = inputs.check_prompt(self.manifest, prompt_token_ids, pictures)
        return self._decoder.prompt_tensors(lay_out(ids.tolist(), pictures, self.manifest.axes), image_rows)

    def _load_text(self) -> Text:
        if self._text is None:
            config = self.manifest.text
            if config is None:
                raise UnsupportedError(
                    f"{self.bundle.folder}: has no tokenizer, since its checkpoint had none; put tokenizer.json beside "
                    "the checkpoint's config.json and export again, or use generate_tokens"
                )
            self._text = Text.load(self.bundle.folder, config)
        return self._text

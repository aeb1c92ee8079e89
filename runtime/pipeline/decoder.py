"""How one prompt runs: the prompt's rows, the prefill graphs in order, then a token at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lvlm_edge.runtime.backends import Array, Backend, Buffer, from_bfloat16, numpy_dtype
from lvlm_edge.runtime.bundle import Bundle, Graph, Manifest
from lvlm_edge.runtime.bundle.kv_cache import coded_length
from lvlm_edge.runtime.errors import LvlmEdgeError, UsageError
from lvlm_edge.runtime.pictures.layout import Picture, Rows, lay_out
from lvlm_edge.runtime.pipeline import inputs
from lvlm_edge.runtime.pipeline.features import Features
from lvlm_edge.runtime.pipeline.inputs import Media
from lvlm_edge.runtime.pipeline.memory import Memory
from lvlm_edge.runtime.pipeline.sampling import Sampler, Sampling


@dataclass(kw_only=True)
class Result:
    """An answer.

    Attributes:
        token_ids: generated tokens, the end-of-sequence token included when it was reached.
        logits: float32 [len(token_ids), vocab]; row t gave token t. None unless asked for.
        kept_visual: ascending indices among the visual tokens that survived, int64 [k]; None where none are dropped.
        text: the answer as text; empty when only tokens were asked for.
        finish: why it ended: `eos`, `stop` (a stop string), `length`, or `cancelled` (a stream that was closed).
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
class Turn:
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


class Decoder:
    """Graphs, their buffers, and the state of the prompt that was begun last.

    Attributes:
        lock: held by who computes: for a whole answer, or for a token of a stream.
    """

    def __init__(self, bundle: Bundle, manifest: Manifest, backend: Backend) -> None:
        self.bundle, self.manifest = bundle, manifest
        self.memory = Memory(bundle, manifest, backend)
        self.features = Features(manifest, self.memory)
        self.lock = threading.RLock()
        self._table = _embedding(bundle)
        self._begun = 0  # prompts, so that a stream knows whether the buffers are still its own
        self._restored = 0  # rows that the plan drops and the prompt at hand did not
        self._next = 0  # position of the first token behind the prompt, less the prompt's rows

    def run_graph(self, graph: str, given: Mapping[str, Array], length: int | None) -> dict[str, Array]:
        """One graph on given inputs; copies of its outputs. See `Pipeline.run_graph`."""
        found = self.manifest.graph(graph)
        with self.lock:
            self._begun += 1
            self.memory.write([found], given)
            self.memory.run(found, length)
            return {t.name: self.memory.buffer(t).read().copy() for t in found.outputs}

    def score(self, turn: Turn, tokens: Sequence[int]) -> Array:
        """Logits before each of some given tokens, float32 [n, vocab]."""
        result = Result()
        with self.lock:
            self._begun += 1
            self._prefill(result, turn)
            rows = [self._logits().copy()]
            for i, token in enumerate(tokens[:-1]):
                self._decode(token, result.prompt_tokens + i)
                rows.append(self._logits().copy())
        return np.stack(rows)

    def prompt_tensors(self, rows: Rows, image_rows: Mapping[str, Array]) -> dict[str, Array]:
        """What the prefill graphs read, by name; see `Pipeline.prefill_inputs`."""
        counts, size = self.manifest.counts, self.manifest.embedding.hidden
        text = self.embedded(rows.ids)
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

    def tokens(self, result: Result, turn: Turn) -> Iterator[int]:
        """The tokens of an answer, which the result gets too.

        Raises:
            UsageError: another prompt was begun before this answer ended.
            LvlmEdgeError: logits are not finite, where nobody wants them.
        """
        sampler, seen = Sampler(turn.sampling), [int(i) for i in turn.prompt if i >= 0]
        began = time.perf_counter() if turn.began is None else turn.began
        number, token = 0, -1
        for step in range(turn.limit):
            with self.lock:
                if step == 0:
                    number = self._begun = self._begun + 1
                    self._prefill(result, turn)
                else:
                    self._check_newest(number)
                    self._decode(token, result.prompt_tokens + step - 1)
                token = self._pick(sampler, seen, turn.rows, step)
            seen.append(token)
            result.token_ids.append(token)
            ended = token in self.manifest.eos_token_ids and not turn.ignore_eos
            if ended:
                result.finish = "eos"
            result.seconds["first_token" if step == 0 else "decode"] = time.perf_counter() - began
            if step == 0:
                began = time.perf_counter()
            yield token
            if ended:
                break

    def _pick(self, sampler: Sampler, seen: Sequence[int], rows: list[Array] | None, step: int) -> int:
        """The next token, from the highest logits where these are enough."""
        finder = self.memory.finder
        if rows is None and finder is not None and sampler.few:
            highest = finder.find()
            token = None if highest is None else sampler.pick_among(highest, seen)
            if token is not None:
                return token
        logits = self._logits()
        if rows is None:
            self._check_finite(logits, step)
        else:
            rows.append(logits.copy())
        return sampler.pick(logits, seen)

    def _check_newest(self, number: int) -> None:
        if number != self._begun:
            raise UsageError(
                "stream: another prompt was begun on this Pipeline, so this answer cannot go on; end one answer before "
                "the next, or load a Pipeline for each"
            )

    def _check_finite(self, logits: Array, step: int) -> None:
        if not np.isfinite(logits).all():
            raise LvlmEdgeError(
                f"{self.bundle.folder}: logits of token {step} are not finite, so activations left the range of "
                f"{self.manifest.dtype}; export with --dtype bfloat16 or float32"
            )

    def _prefill(self, result: Result, turn: Turn) -> None:
        pictures = tuple(media.picture for media in turn.media)
        ids = inputs.check_prompt(self.manifest, turn.prompt, pictures)
        rows = lay_out(ids.tolist(), pictures, self.manifest.axes)
        given = self.prompt_tensors(rows, self.features.of(turn.media, result.seconds))
        result.prompt_tokens, result.pictures = rows.count, pictures
        visual = sum(picture.visual_tokens for picture in pictures)
        self._next, self._restored = rows.next - rows.count, self._not_dropped(visual)
        graphs = self.manifest.role("prefill")
        self.memory.write(graphs, given)
        for graph in graphs:
            began = time.perf_counter()
            self.memory.run(graph, rows=self._in_use(graph, rows.count))
            for info in graph.outputs:
                if info.name in turn.replace:
                    self.memory.buffer(info).write(turn.replace[info.name])
                if info.name == "score" and visual < self.manifest.counts.visual_tokens:
                    self._demote(self.memory.buffer(info), visual)
            result.seconds[graph.name] = time.perf_counter() - began
        for graph in graphs:
            for info in (t for t in graph.outputs if t.name == "kept_visual"):
                kept = self.memory.buffer(info).read()
                result.kept_visual = kept[kept < visual].copy()

    def _in_use(self, graph: Graph, count: int) -> int | None:
        """Rows of a prompt that a graph has to compute; None for a graph that reads no rows of it.

        Padding stands behind a prompt's rows, also where rows before it were dropped.

        Args:
            count: rows of the prompt.
        """
        whole, shape = self.manifest.counts.prompt_tokens, graph.inputs[0].shape
        if len(shape) != 3:
            return None
        return shape[1] - (whole - count) + (self._restored if shape[1] < whole else 0)

    def _demote(self, score: Buffer, visual: int) -> None:
        """Rank the visual tokens that are not to be kept behind padding, which stands for pictures that did not come.

        A graph always selects as many rows as were planned, and padding has the score 0. Where it does so picture by
        picture, padding is ranked by itself.
        """
        if self.manifest.method_config.get("rank") == "per-image":
            return
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

    def _decode(self, token: int, length: int) -> None:
        """Run one more token, `length` rows having gone by."""
        graphs = self.manifest.role("decode")
        coded = coded_length(length, self._restored)
        given = {
            "inputs_embeds": self.embedded(np.array(token)).reshape(1, 1, -1),
            "position_ids": np.full((self.manifest.axes, 1), length + self._next),
            "cache_length": np.full(1, coded),
            "last_index": np.zeros(1, np.int64),
        }
        self.memory.write(graphs, given | self._no_image_rows(graphs))
        for graph in graphs:
            self.memory.run(graph, coded)

    def _no_image_rows(self, graphs: Sequence[Graph]) -> dict[str, Array]:
        """Zeros for what graphs that also serve prompts add at the rows of images."""
        names = set(self.manifest.image_rows.values()) - {"inputs_embeds"}
        return {t.name: np.zeros(t.shape, np.float32) for g in graphs for t in g.inputs if t.name in names}

    def embedded(self, ids: Array) -> Array:
        """Rows of the token embedding, those of bfloat16 as float32."""
        rows: Array = self._table[ids]
        return from_bfloat16(rows) if self.manifest.embedding.dtype == "bfloat16" else rows

    def _logits(self) -> Array:
        """The logits of what ran last: prompts and tokens have one buffer for them."""
        info = next(t for t in self.manifest.role("decode")[-1].outputs if t.name == "logits")
        return self.memory.buffer(info).read().reshape(-1)


def _embedding(bundle: Bundle) -> Array:
    """The token embedding [vocab, hidden], mapped, not read; bfloat16 as its bits."""
    e = bundle.manifest.embedding
    shape = (e.hidden, e.vocab) if e.columns else (e.vocab, e.hidden)
    table = np.memmap(bundle.path(e.file), numpy_dtype(e.dtype), "r", e.offset, shape)
    return table.T if e.columns else table

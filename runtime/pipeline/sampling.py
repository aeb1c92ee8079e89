"""Logits to token ids, and the end of an answer at a stop string."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lvlm_edge.runtime.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lvlm_edge.runtime.backends import Highest

COLDEST = 1e-4  # temperature below which scores divided by it leave float32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        UsageError: a value is out of range.
    """

    temperature: float = 0.0  # 0 takes the likeliest token, and so does what is too small to divide by
    top_k: int = 0  # 0 keeps all tokens
    top_p: float = 1.0  # 1 keeps all tokens
    repetition_penalty: float = 1.0  # 1 has no effect, more discourages tokens already seen
    seed: int | None = None  # None draws a new one each time

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise _out_of_range("temperature", self.temperature, "a number from 0", "0 for the likeliest token")
        if self.top_k < 0:
            raise _out_of_range("top_k", self.top_k, "a whole number from 0", "0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise _out_of_range("top_p", self.top_p, "a number above 0 and up to 1", "1 to keep all tokens")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise _out_of_range("repetition_penalty", self.repetition_penalty, "a number above 0", "1 for no effect")
        if self.seed is not None and self.seed < 0:
            raise _out_of_range("seed", self.seed, "a whole number from 0", "none for a new one each time")


class Sampler:
    """Picks tokens one after the other; with a seed, the same ones each time it is created."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    @property
    def few(self) -> bool:
        """Whether the highest logits may be enough to pick from."""
        return (self.sampling.greedy or self.sampling.top_k > 0) and self.sampling.repetition_penalty >= 1

    def pick_among(self, highest: Highest, seen: Sequence[int]) -> int | None:
        """The token that `pick` takes of all logits, from the highest alone; None where others may count too.

        A logit that is not among them is at most as high as the lowest of them, and so it stays: a repetition penalty
        of 1 or more raises none.

        Args:
            seen: see `pick`.
        """
        ids, given, s = highest.ids, highest.scores, self.sampling
        count = 1 if s.greedy else s.top_k
        if not self.few or count >= len(ids):
            return None
        places = [] if s.repetition_penalty == 1 else np.flatnonzero(np.isin(ids, seen)).tolist()
        divisor = np.float32(1 if s.greedy else s.temperature)  # which makes equals of scores that were nearly so
        scores = _penalized(given.copy(), places, s.repetition_penalty) / divisor
        enough = np.partition(scores, -count)[-count] > given.min() / divisor
        return int(ids[self.pick(given, places)]) if enough else None

    def pick(self, logits: NDArray[np.float32], seen: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: scores of all tokens, [vocab], float32.
            seen: token ids of the prompt and of the answer so far.
        """
        scores = filtered(logits, seen, self.sampling)
        if self.sampling.greedy:
            return int(np.argmax(scores))  # the lowest index of equals, like torch.argmax
        candidates = np.flatnonzero(scores > -np.inf)
        cumulative = np.cumsum(_softmax(scores[candidates]))
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(candidates[min(int(drawn), len(candidates) - 1)])


def filtered(logits: NDArray[np.float32], seen: Sequence[int], sampling: Sampling) -> NDArray[np.float32]:
    """The scores after repetition penalty, temperature, top-k and top-p, in this order.

    Greedy choice (temperature 0) applies the repetition penalty alone, like `generate` in transformers.

    Args:
        logits: scores of all tokens, [vocab], float32; left as they are.
        seen: token ids of the prompt and of the answer so far; ids outside the vocabulary are passed over.
        sampling: the settings.

    Returns:
        [vocab], float32, -inf where a token was removed.
    """
    scores = _penalized(np.array(logits, dtype=np.float32), seen, sampling.repetition_penalty)
    if sampling.greedy:
        return scores
    if sampling.temperature != 1:
        scores = scores / np.float32(sampling.temperature)
    if sampling.top_k > 0:
        scores = _top_k(scores, sampling.top_k)
    if sampling.top_p < 1:
        scores = _top_p(scores, sampling.top_p)
    return scores


class StopStrings:
    """Ends a stream of text at the first of several stop strings.

    Text that may be the beginning of a stop string is held back until it is clear. How the text is cut into pieces
    makes no difference.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if "" in self._stops:
            raise UsageError("stop: a stop string is empty, expected at least one character; leave it out")
        self._held = ""
        self._stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string has come; it is not part of the text."""
        if self._stopped:
            return "", True
        text = self._held + piece
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stops if stop in text]
        if found:
            self._stopped = True
            self._held = ""
            return text[: min(found)[1]], True  # the one that is complete first, as if pieces were characters
        keep = len(text) - self._undecided(text)
        self._held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """The text held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for length in range(len(text), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def _penalized(scores: NDArray[np.float32], seen: Sequence[int], penalty: float) -> NDArray[np.float32]:
    """Scores of tokens already seen, made smaller by the penalty, whatever their sign. Source: arXiv:1909.05858."""
    if penalty == 1 or len(seen) == 0:
        return scores
    ids = np.unique(np.asarray(seen, dtype=np.int64))
    ids = ids[(ids >= 0) & (ids < len(scores))]
    score = scores[ids]
    scores[ids] = np.where(score < 0, score * np.float32(penalty), score / np.float32(penalty))
    return scores


def _top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """The k highest scores, and those equal to the last of them."""
    if k >= len(scores):
        return scores
    lowest = np.partition(scores, len(scores) - k)[len(scores) - k]
    return np.where(scores < lowest, np.float32(-np.inf), scores)


def _top_p(scores: NDArray[np.float32], p: float) -> NDArray[np.float32]:
    """The fewest tokens whose probabilities sum to p, at least one. Source: arXiv:1904.09751."""
    left = np.flatnonzero(scores > -np.inf)
    order = left[np.argsort(scores[left], kind="stable")]
    cumulative = np.cumsum(_softmax(scores[order])).astype(np.float32)  # ascending: the tail comes first
    removed = order[cumulative <= np.float32(1 - p)]
    out = scores.copy()
    out[removed[removed != order[-1]]] = -np.inf
    return out


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    weights = np.exp(scores.astype(np.float64) - scores.max())
    return np.asarray(weights / weights.sum())


def _out_of_range(name: str, value: object, expected: str, hint: str) -> UsageError:
    return UsageError(f"{name}: is {value}, expected {expected}; use {hint}")

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lvlm_edge.runtime.errors import UsageError
from lvlm_edge.runtime.pipeline.sampling import Sampler, Sampling, StopStrings, filtered

SETTINGS = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    for temperature, top_k, top_p, penalty in itertools.product(
        (0.2, 1.0, 2.0), (0, 1, 7, 5000), (0.01, 0.5, 0.9, 1.0), (0.8, 1.0, 1.3)
    )
]


def scores(seed: int, vocabulary: int = 1000) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 4, vocabulary).astype(np.float32)


def reference(logits: NDArray[np.float32], seen: list[int], sampling: Sampling) -> NDArray[np.float32]:
    """What `generate` of transformers does, with its own processors."""
    steps: list[Any] = []
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    out = LogitsProcessorList(steps)(torch.tensor([seen]), torch.from_numpy(logits)[None])
    return np.asarray(out[0].numpy(), dtype=np.float32)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_scores_are_filtered_as_in_transformers(sampling: Sampling) -> None:
    logits, seen = scores(3), [5, 5, 999, 0, 17]

    out = filtered(logits, seen, sampling)

    expected = reference(logits, seen, sampling)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(out), np.isneginf(expected))
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_equal_scores_at_the_edge_of_top_k_all_stay_as_in_transformers() -> None:
    logits = np.array([1, 3, 2, 2, 2, 0], dtype=np.float32)
    sampling = Sampling(temperature=1.0, top_k=2)

    out = filtered(logits, [0], sampling)

    np.testing.assert_array_equal(out, reference(logits, [0], sampling))
    assert np.isfinite(out).sum() == 4


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
def test_probabilities_that_sum_to_top_p_exactly_are_cut_as_in_transformers(top_p: float) -> None:
    logits = np.array([1, 1, -np.inf, 1, 1], dtype=np.float32)
    sampling = Sampling(temperature=1.0, top_p=top_p)

    out = filtered(logits, [0], sampling)

    np.testing.assert_array_equal(out, reference(logits, [0], sampling))
    assert np.isfinite(out).sum() == 4 * top_p


def test_filtering_leaves_the_logits_as_they_are() -> None:
    logits = scores(0)
    before = logits.copy()

    filtered(logits, [1, 2, 3], Sampling(temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=2.0))

    np.testing.assert_array_equal(logits, before)


def test_greedy_choice_takes_the_first_of_equal_scores() -> None:
    assert Sampler(Sampling()).pick(np.array([0, 7, 7, 1], dtype=np.float32), []) == 1


def test_greedy_choice_applies_the_repetition_penalty() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0))

    assert sampler.pick(np.array([0, 7, 6, 1], dtype=np.float32), [1]) == 2
    assert sampler.pick(np.array([-3, -2, -9], dtype=np.float32), [1]) == 0


def test_seen_ids_outside_the_vocabulary_are_passed_over() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0))

    assert sampler.pick(np.array([0, 7, 6], dtype=np.float32), [-200, 32000, 3]) == 1


def test_the_same_seed_gives_the_same_tokens() -> None:
    first, second, other = (Sampler(Sampling(temperature=1.0, seed=seed)) for seed in (4, 4, 5))

    picks = [[sampler.pick(scores(step), []) for step in range(30)] for sampler in (first, second, other)]

    assert picks[0] == picks[1] != picks[2]


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2, 1e-30], dtype=np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=0))

    counts = np.bincount([sampler.pick(logits, []) for _ in range(4000)], minlength=4)

    # Three standard deviations of a share of 4000 draws are below 0.024.
    np.testing.assert_allclose(counts / 4000, [0.5, 0.3, 0.2, 0], atol=0.024)


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-38, 1e-5])
def test_temperatures_near_0_take_the_likeliest_token(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, top_k=50, top_p=0.9, seed=0))

    assert [sampler.pick(scores(seed), []) for seed in range(20)] == [scores(seed).argmax() for seed in range(20)]


def test_removed_tokens_are_never_drawn() -> None:
    sampler = Sampler(Sampling(temperature=5.0, top_k=3, seed=1))
    best = set(np.argsort(scores(0))[-3:].tolist())

    assert {sampler.pick(scores(0), []) for _ in range(300)} == best


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_reported_with_its_name(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        Sampling(**values)


def test_values_at_the_ends_of_their_ranges_are_taken() -> None:
    made = Sampling(temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1e-9, seed=0)
    assert made.greedy and made == Sampling(repetition_penalty=1e-9, seed=0)
    assert Sampling() == Sampling(temperature=0, top_k=0, top_p=1, repetition_penalty=1, seed=None)
    assert Sampling(top_p=1e-9).top_p == 1e-9
    assert Sampling(temperature=9.9e-5).greedy and not Sampling(temperature=1e-4).greedy


@pytest.mark.parametrize("k", [3, 4, 5])
def test_as_many_as_there_are_or_more_all_stay(k: int) -> None:
    out = filtered(np.array([1, 2, 3, 4], dtype=np.float32), [], Sampling(temperature=1.0, top_k=k))

    assert np.isfinite(out).sum() == min(k, 4)


def test_a_top_p_of_1_keeps_what_has_no_probability() -> None:
    out = filtered(np.array([0, -5000], dtype=np.float32), [], Sampling(temperature=1.0, top_p=1.0))

    assert np.isfinite(out).all()


def test_the_penalty_of_2_is_one_too() -> None:
    out = filtered(np.array([4, -4, 4, -4], dtype=np.float32), [0, 1, 0], Sampling(repetition_penalty=2.0))

    assert out.tolist() == [2, -8, 4, -4]
    assert filtered(np.array([4, 2], dtype=np.float32), [1], Sampling(repetition_penalty=4.0)).tolist() == [4, 0.5]


class Draws:
    """A generator that gives one number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


@pytest.mark.parametrize(
    ("drawn", "token"), [(0.0, 1), (0.2499, 1), (0.25, 2), (0.5, 4), (0.7499, 4), (0.75, 5), (1, 5)]
)
def test_a_draw_falls_to_the_token_whose_share_it_is_in(drawn: float, token: int) -> None:
    """Of four equal ones; a draw that rounding puts at the end is the last token's."""
    logits = np.array([-np.inf, 0, 0, -np.inf, 0, 0], dtype=np.float32)
    sampler = Sampler(Sampling(temperature=1.0))
    sampler._random = Draws(drawn)  # type: ignore[assignment]

    assert sampler.pick(logits, []) == token


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """The whole text that is shown, and whether it was stopped."""
    watch, shown, stopped = StopStrings(stops), "", False
    for piece in pieces:
        text, stopped = watch.push(piece)
        shown += text
        if stopped:
            break
    return shown + watch.flush(), stopped


def test_text_ends_before_the_stop_string() -> None:
    assert run(["###"], ["Hello ", "wor", "ld#", "## more"]) == ("Hello world", True)


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    watch = StopStrings(["USER:"])

    assert watch.push("I am a US") == ("I am a ", False)
    assert watch.push("B port") == ("USB port", False)
    assert watch.push(" U") == (" ", False)
    assert watch.flush() == "U"


def test_nothing_is_shown_after_a_stop() -> None:
    watch = StopStrings(["."])
    watch.push("one. two")

    assert watch.push("three") == ("", True)
    assert watch.flush() == ""


def test_without_stop_strings_text_passes_through() -> None:
    assert run([], ["a", "", "b"]) == ("ab", False)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopStrings(["a", ""])


def test_pieces_of_any_length_stop_at_the_same_place() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(random.choice(list("ab."), 12))
        stops = ["".join(random.choice(list("ab."), random.integers(1, 5))) for _ in range(3)]
        cuts = [0, *sorted(random.integers(0, 12, 4).tolist()), 12]
        pieces = [text[first:last] for first, last in itertools.pairwise(cuts)]

        assert run(stops, pieces) == run(stops, list(text)) == run(stops, [text]), (text, stops, pieces)

"""The highest logits, found where the logits are: by the graph that a GPU runs, here on the CPU, and by what picks."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from lvlm_edge.runtime.backends import Highest
from lvlm_edge.runtime.backends.cuda import highest
from lvlm_edge.runtime.bundle import TensorInfo
from lvlm_edge.runtime.pipeline.sampling import Sampler, Sampling

VOCABULARIES = (65, 160, 1024, 1025, 4097, 32000, 151936)  # 151,936: Qwen2-VL's, whose last row is not full


def found(logits: np.ndarray) -> Highest | None:
    """What the graph finds, the session over arrays as a GPU has it over buffers."""
    session = onnxruntime.InferenceSession(highest.graph(len(logits)), providers=["CPUExecutionProvider"])
    row: list[np.ndarray] = []
    run = SimpleNamespace(run=lambda: row.append(session.run(None, {"logits": logits[None, None]})[0]))
    return highest.OnDevice(run, SimpleNamespace(read=lambda: row[0])).find()


def noise(vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, vocab).astype(np.float32)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_graph_is_onnx_and_finds_the_highest_with_their_tokens(vocab):
    logits = noise(vocab)
    onnx.checker.check_model(onnx.load_from_string(highest.graph(vocab)), full_check=True)

    best = found(logits)

    order = np.sort(np.argsort(-logits)[: highest.COUNT])
    assert best.ids.tolist() == order.tolist()
    np.testing.assert_array_equal(best.scores, logits[order])
    assert highest.row_of(TensorInfo("logits", "float32", (1, 1, vocab))).shape == (1, 2 * highest.COUNT + 1)


def test_the_last_token_of_the_largest_vocabulary_is_named():
    logits = np.zeros(highest.LARGEST - 1, np.float32)
    logits[[-1, -2, 0]] = 3, 2, 1

    assert found(logits).ids[-2:].tolist() == [highest.LARGEST - 3, highest.LARGEST - 2]


def test_logits_below_zero_are_above_what_fills_the_last_row():
    logits = np.full(1030, -3e38 / 1030, np.float32)

    assert (found(logits).ids < 1030).all()


@pytest.mark.parametrize("vocab", [160, 4097])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_noticed(vocab, place, value):
    logits = noise(vocab)
    logits[place] = value

    assert found(logits) is None


@pytest.mark.parametrize("vocab", [1, highest.COUNT, highest.LARGEST])
def test_other_vocabularies_are_read_whole(vocab):
    assert highest.row_of(TensorInfo("logits", "float32", (1, 1, vocab))) is None


SETTINGS = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, seed=5)
    for temperature, top_k, top_p, penalty in itertools.product(
        (0.0, 0.2, 1.0, 1.7), (0, 1, 7, 50, 63, 64), (0.3, 0.9, 1.0), (0.8, 1.0, 1.3)
    )
]
STEPS = (0, 0.25, 2)  # between scores that can be: 0.25 as in bfloat16, where many are equal


@pytest.mark.parametrize("step", STEPS)
def test_a_token_picked_among_the_highest_is_the_one_picked_of_all(step):
    decided = dict.fromkeys(SETTINGS, 0)
    for sampling, seed in itertools.product(SETTINGS, range(4)):
        logits = noise(3000, seed)
        logits = np.round(logits / step).astype(np.float32) * np.float32(step) if step else logits
        best = np.argpartition(-logits, highest.COUNT)[: highest.COUNT]  # equals as they come
        best.sort()
        seen = [5, -200, *best[::9].tolist(), 2999]
        among, of_all = Sampler(sampling), Sampler(sampling)
        token = among.pick_among(Highest(best, logits[best]), seen)
        if token is not None:
            decided[sampling] += 1
            assert token == of_all.pick(logits, seen), sampling
        else:  # and the next number of the generator is still the first
            assert among.pick(logits, seen) == of_all.pick(logits, seen)

    plain = [s for s in SETTINGS if s.repetition_penalty == 1 and (s.greedy or 0 < s.top_k < 64)]
    if step == 0:
        assert all(decided[s] == 4 for s in plain)
    for s in SETTINGS:
        if s.repetition_penalty < 1 or (not s.greedy and s.top_k in (0, 64)):
            assert decided[s] == 0
    assert sum(decided[s] for s in SETTINGS if s.repetition_penalty > 1) > 0


def test_equal_scores_at_the_top_are_the_first_token_and_too_many_are_read_whole():
    logits = np.zeros(3000, np.float32)
    logits[[2000, 17, 900]] = 5

    best = found(logits)
    assert Sampler(Sampling()).pick_among(best, []) == 17

    logits[100:200] = 5
    assert Sampler(Sampling()).pick_among(found(logits), []) is None
    logits[:] = 1
    assert Sampler(Sampling(temperature=1, top_k=3)).pick_among(found(logits), []) is None


@pytest.mark.parametrize(
    ("sampling", "scores", "token"),
    [
        (Sampling(), [1, 5], 4),  # the highest is above the lowest
        (Sampling(), [5, 5], None),  # another may be as high
        (Sampling(temperature=1, top_k=1), [1, 5], 4),
        (Sampling(temperature=1, top_k=2), [1, 5], None),  # another may be the second
        (Sampling(temperature=1, top_k=2, top_p=0.1), [1, 5, 4], 4),
        (Sampling(temperature=1, top_k=2), [1, 5, 1], None),
        (Sampling(repetition_penalty=1.25), [2, 5, 4], 4),  # token 4, seen, is as high as 5: the first of equals
        (Sampling(repetition_penalty=2.6), [2, 5, 1], 3),  # token 4 falls below 2
        (Sampling(repetition_penalty=2.6), [2, 5, 2], None),  # and below what others may have
    ],
)
def test_no_more_of_the_highest_are_needed_than_are_picked_from(sampling, scores, token):
    best = Highest(np.arange(len(scores)) + 3, np.array(scores, np.float32))

    assert Sampler(sampling).pick_among(best, [4]) == token


T = np.float32(1.5)


def above(score: np.float32) -> np.float32:
    return np.nextafter(score, np.float32(2))


def test_scores_that_the_temperature_makes_equal_are_read_whole():
    """So that top-k keeps more of them than it did before."""
    low = next(x for x in np.float32(1.75) + np.arange(9, dtype=np.float32) * 2**-23 if x / T == above(x) / T)
    logits = np.full(3000, low)
    logits[40] = above(low)
    sampling = Sampling(temperature=1.5, top_k=1, seed=0)

    assert Sampler(sampling).pick_among(found(logits), []) is None

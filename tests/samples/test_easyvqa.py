"""The trained sample: what it answers, and that its bundles answer the same."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lvlm_edge.exporter import export
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime import Pipeline
from tests import eager

pytestmark = pytest.mark.export

SAMPLE = Path(__file__).parents[2] / "samples" / "easyvqa"
CHECKPOINT, PICTURES = SAMPLE / "checkpoint", SAMPLE / "pictures"
SETTINGS = {"max_text_tokens": 32, "max_new_tokens": 64}


@pytest.fixture(scope="module")
def data():
    sys.path.insert(0, str(SAMPLE))
    try:
        import data

        return data
    finally:
        sys.path.remove(str(SAMPLE))


@pytest.fixture(scope="module")
def held_out(data):
    """Two hundred held-out questions: (question, answer, pixel_values)."""
    split = data.load("test")
    chosen = np.random.default_rng(7).permutation(len(split.questions))[:200]
    return [
        (question, answer, data.normalise(split.pictures[picture : picture + 1]))
        for question, answer, picture in (split.questions[i] for i in chosen)
    ]


@pytest.fixture(scope="module")
def model():
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Pipelines by (method, dtype)."""
    folder, opened = tmp_path_factory.mktemp("sample"), {}

    def bundle(method, dtype="float32", **options):
        """FastV's graphs are traced, those of the whole model run as bodies."""
        key = (method, dtype, *options.items())
        if key not in opened:
            path = folder / str(len(opened))
            write = eager.export if method == "none" else export
            opened[key] = Pipeline.load(write(CHECKPOINT, path, method=method, dtype=dtype, **options, **SETTINGS))
        return opened[key]

    with eager.running():
        yield bundle


def stock(model, prompt, pixels, steps):
    """Tokens and logits of transformers' generate, end-of-sequence ignored."""
    image, count = model.config.image_token_id, model.config.image_seq_length
    ids = torch.tensor([[t for i in prompt for t in ([i] * count if i == image else [i])]])
    model.generation_config.eos_token_id = None
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.from_numpy(pixels),
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits).numpy()


def encode(pipe, question):
    return pipe.prepare(question, [next(iter(sorted(PICTURES.glob("*.png"))))])[0]


def test_the_checkpoint_is_small_and_large_enough():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(CHECKPOINT)

    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 6e6
    assert config.image_seq_length >= 144
    assert config.text_config.num_hidden_layers >= 8


def test_sixty_four_tokens_equal_stock_generate(bundles, model, held_out):
    pipe = bundles("none")
    for question, _, pixels in held_out[:3]:
        prompt = encode(pipe, question)
        tokens, logits = stock(model, prompt, pixels, 64)

        found = pipe.generate_tokens(prompt, pixels, max_new_tokens=64, ignore_eos=True)

        assert found.token_ids == tokens
        np.testing.assert_allclose(found.logits, logits, atol=1e-3)


def test_float16_gives_the_same_tokens_and_nearly_the_same_logits(bundles, model, held_out):
    pipe = bundles("none", "float16")
    for question, _, pixels in held_out[:20]:
        prompt = encode(pipe, question)
        tokens, logits = stock(model, prompt, pixels, 2)

        found = pipe.generate_tokens(prompt, pixels, max_new_tokens=2, ignore_eos=True)

        assert found.token_ids == tokens
        np.testing.assert_allclose(found.logits, logits, atol=2e-2)


@pytest.mark.parametrize("method", ["none", "fastv"])
def test_held_out_questions_are_answered(bundles, held_out, method):
    options = {"prune_layer": 2, "keep_ratio": 0.25} if method == "fastv" else {}
    pipe = bundles(method, **options)
    text, right = pipe._load_text(), 0
    for question, answer, pixels in held_out:
        tokens = pipe.generate_tokens(encode(pipe, question), pixels, max_new_tokens=3).token_ids
        right += text.decode(tokens).strip() == answer

    assert right / len(held_out) >= 0.93  # the card says 0.95 or more on 2,000; this is a tenth of them


def test_a_picture_file_and_a_question_get_the_processors_answer(bundles, model):
    from tokenizers import Tokenizer
    from transformers import CLIPImageProcessorPil
    from transformers.image_utils import load_image

    pipe, processor = bundles("none"), CLIPImageProcessorPil.from_pretrained(CHECKPOINT)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    for path in sorted(PICTURES.glob("*.png")):
        pixels = processor(load_image(str(path)), return_tensors="np").pixel_values
        prompt = tokenizer.encode("USER: <image>\nwhat color is the shape? ASSISTANT:").ids
        tokens, _ = stock(model, prompt, pixels, 2)

        answer = pipe.generate("what color is the shape?", [path])

        assert answer.token_ids == tokens
        assert answer.finish == "eos"


def test_scores_given_from_outside_decide_which_tokens_stay(bundles, held_out):
    pipe = bundles("fastv", prune_layer=2, keep_ratio=0.25)
    scores = np.random.default_rng(0).random((1, pipe.manifest.counts.visual_tokens), np.float32)
    question, _, pixels = held_out[0]

    found = pipe.generate_tokens(encode(pipe, question), pixels, max_new_tokens=2, replace={"score": scores})

    assert found.kept_visual.tolist() == sorted(np.argsort(-scores[0])[:36].tolist())


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_clean_bundle_of_the_sample_passes_check(bundles, dtype):
    pipe = bundles("fastv", dtype, prune_layer=2, keep_ratio=0.25)
    question = ("what color is the shape?", [sorted(PICTURES.glob("*.png"))[0]])

    verdict = parity.check(pipe.bundle.folder, CHECKPOINT, question=question)

    assert verdict.passed, verdict.first_failure

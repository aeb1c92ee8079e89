"""The sample fine-tuned for each trained method: what is committed answers, and how it was made."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from lvlm_edge.exporter import references

pytestmark = pytest.mark.export

SAMPLES = Path(__file__).parents[2] / "samples"
SAMPLE = SAMPLES / "easyvqa"
DENSE = SAMPLE / "checkpoint"
METHODS = ["proxyv", "yopo", "himix"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # the model is too small for more


@pytest.fixture(scope="module")
def code():
    """The sample's scripts as modules."""
    paths = [str(SAMPLE), str(SAMPLES / "yopo")]
    sys.path[:0] = paths
    try:
        return SimpleNamespace(**{n: importlib.import_module(n) for n in ("data", "train", "evaluate", "head_mask")})
    finally:
        for path in paths:
            sys.path.remove(path)


@pytest.fixture(scope="module")
def split(code):
    """Eight noise pictures, each with a question of every kind."""
    asked = [("what shape is in the image?", "circle"), ("what color is the shape?", "red"),
             ("is there a circle?", "yes"), ("is there not a circle?", "no")]  # fmt: skip
    questions = [(question, answer, picture) for picture in range(8) for question, answer in asked]
    pictures = np.random.default_rng(0).integers(0, 256, (8, code.data.SIZE, code.data.SIZE, 3), np.uint8)
    return code.data.Split(pictures, questions, code.data._labels(questions, 8))


@pytest.fixture(scope="module")
def trained(code, split, tmp_path_factory):
    """Each method's model after two steps, in the precision it is stored in, and its checkpoint."""
    from transformers import LlavaForConditionalGeneration

    tokens, made = Tokenizer.from_file(str(DENSE / "tokenizer.json")), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code.train, "PICTURES_2", 2)
        for method in METHODS:
            model = LlavaForConditionalGeneration.from_pretrained(DENSE, dtype=torch.float32)
            options = {"head_mask": torch.rand(8, 4) > 0.5} if method == "yopo" else {}
            work = tmp_path_factory.mktemp(method)
            module = code.train.train_reduced(model, method, split, tokens, work, 5, 0, **options)
            for weight in module.parameters():  # not the rotary tables
                weight.data = weight.data.bfloat16().float()
            module.save(DENSE, work / "checkpoint")
            made[method] = module, work / "checkpoint"
    return made


@pytest.mark.slow  # trains
@pytest.mark.parametrize(("method", "semantics"), [("proxyv", None), ("yopo", 0), ("yopo", 1), ("himix", None)])
@torch.no_grad()
def test_what_is_trained_is_what_the_reference_runs(code, trained, split, method, semantics):
    module, folder = trained[method]
    options = {} if semantics is None else {"semantics": ("released", "dropped")[semantics]}
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prefix, image = code.train.head(tokens)
    ids = tokens.encode(code.data.prompt(split.questions[0][0])).ids
    asked = ids[len(prefix) :]
    pixels = torch.from_numpy(code.data.normalise(split.pictures[:1]))

    module.dropped = bool(semantics)
    features = module.tower(pixels).last_hidden_state[:, 1:]
    slots = torch.zeros(1, 8 * 16, dtype=torch.int64)
    slots[0, 3 * 16 : 3 * 16 + len(asked)] = torch.tensor(asked)  # the fourth question of the picture
    text = module.decoder.embed_tokens(torch.cat([module.fixed[None], slots], 1))
    row = module.reduce(features, text)[0, (3 - 8) * 16 + len(asked) - 1]
    found = module.lm_head(module.decoder.norm(row))

    given = [-200 if token == image else token for token in ids]
    config = code.evaluate.method_config(folder, method, options)
    expected = references.module(method).run(references.load(folder), config, given, pixels, 1).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # sums in another order


@pytest.mark.slow  # trains
@pytest.mark.parametrize("method", METHODS)
def test_training_changes_the_decoder_and_not_the_tower(trained, method):
    dense = references.load(DENSE)
    model = references.load(trained[method][1])

    for part, same in ((model.tower, True), (model.decoder, False)):
        theirs = dense.model.vision_tower if same else dense.model.language_model
        pairs = zip(part.state_dict().values(), theirs.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == same


@pytest.mark.parametrize("method", METHODS)
def test_committed_checkpoints_are_small_and_answer(code, method):
    folder, split = SAMPLE / method, code.data.load("test")
    chosen = np.random.default_rng(7).permutation(len(split.questions))[:60]
    semantics = [{"semantics": s} for s in ("released", "dropped")] if method == "yopo" else [{}]

    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 6e6
    for options in semantics:
        found = code.evaluate.reference_answers(folder, method, options, split, chosen, method)
        right = np.mean([a == split.questions[i][1] for a, i in zip(found, chosen, strict=True)])
        assert right >= 0.9  # the card says 0.95 or more on 2,000; this is a thirtieth of them


def test_a_head_mask_follows_the_papers_rule(code):
    samples = np.zeros((10, 4, 3))
    samples[:5, 2, 0] = 1  # above the threshold in half of the samples
    samples[:4, 2, 1] = 1  # in two fifths, which is not more than two fifths
    samples[:, 3, 2] = 0.2  # at the threshold

    kept = code.head_mask.mask(samples, 0.2, 0.4)

    assert kept.tolist() == [[True] * 3, [True] * 3, [True, False, False], [False] * 3]


@torch.no_grad()
def test_a_head_masks_ratios_are_attention_of_the_stock_model(code):
    model = references.load(DENSE)
    m = references.original.view(model)
    ids = Tokenizer.from_file(str(DENSE / "tokenizer.json")).encode(code.data.prompt("what color is the shape?")).ids
    pixels = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 96, 96)).astype(np.float32))

    found = code.head_mask.ratios(m, ids, pixels)

    at = ids.index(3)
    expanded = torch.tensor([[*ids[:at], *[3] * 144, *ids[at + 1 :]]])
    stock = model(input_ids=expanded, pixel_values=pixels, output_attentions=True).attentions
    for layer, attention in enumerate(stock):
        image = attention[0, :, :, at : at + 144].sum((1, 2))
        rest = attention[0].sum((1, 2)) - image
        np.testing.assert_allclose(found[layer], (image / rest).numpy(), rtol=1e-4)

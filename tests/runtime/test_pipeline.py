"""What the pipeline asks of its input, and what it promises about its results."""

from __future__ import annotations

import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lvlm_edge.runtime import Pipeline, Sampling
from lvlm_edge.runtime.errors import BundleError, FitError, InputError, LvlmEdgeError, UnsupportedError, UsageError
from tests import checkpoints, layouts, tiny
from tests.checkpoints import IMAGE
from tests.tiny import PROMPT, pixels


@pytest.fixture(scope="module")
def bundle(checkpoint_once, export_once) -> Path:
    return tiny.bundle(checkpoint_once, export_once, "fastv")


@pytest.fixture(scope="module")
def pipe(bundle) -> Pipeline:
    return Pipeline.load(bundle)


@pytest.fixture
def picture(tmp_path) -> Path:
    return tiny.picture(tmp_path / "picture.png")


def test_the_pieces_of_a_stream_are_the_answer(pipe, picture):
    pieces = list(pipe.stream("w5 w6", [picture]))

    assert len(pieces) > 1
    assert "".join(pieces) == pipe.last.text
    assert pipe.generate("w5 w6", [picture]).text == pipe.last.text


# One pipeline, many callers.


def test_interleaved_streams_go_on_or_say_so(pipe, picture):
    prompts = ["w5 w6", "w9 w8 w7", "w20"]
    alone = {prompt: pipe.generate(prompt, [picture]).text for prompt in prompts}
    assert len(set(alone.values())) == len(prompts)
    rng, open_, right, ended = np.random.default_rng(0), [], 0, 0

    for i in range(400):
        if not open_ or rng.random() < 0.1:
            prompt = prompts[i % len(prompts)]
            open_.append([prompt, pipe.stream(prompt, [picture]), ""])
        one = open_[rng.integers(len(open_))]
        prompt, stream, text = one
        try:
            one[2] = text = text + next(stream, "")
        except UsageError as error:
            text = str(error)
        if "another prompt was begun on this Pipeline" in text:
            ended += 1
            open_.remove(one)
        elif text == alone[prompt]:
            right += 1
            open_.remove(one)
        assert "another prompt" in text or alone[prompt].startswith(text)

    assert right > 5 and ended > 5


def test_threads_get_their_own_answers(pipe, picture):
    prompts = [f"w{i} w{i + 1}" for i in range(5, 13)]
    alone = {prompt: pipe.generate(prompt, [picture]).token_ids for prompt in prompts}

    def ask(i: int) -> bool:
        prompt = prompts[i % len(prompts)]
        if i % 2:
            return pipe.generate(prompt, [picture]).token_ids == alone[prompt]
        return pipe.generate_tokens(*pipe.prepare(prompt, [picture])).token_ids == alone[prompt]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(200)))


def test_a_stream_beside_a_thread_is_right_or_says_so(pipe, picture):
    alone = pipe.generate("w5 w6", [picture]).text

    def ask(i: int) -> str:
        try:
            return "".join(pipe.stream("w5 w6", [picture])) if i % 2 else pipe.generate("w5 w6", [picture]).text
        except UsageError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(100)))

    assert {text for text in found if "another prompt was begun" not in text} == {alone}
    assert all(text == alone for text in found[::2])


def test_a_stream_checks_its_arguments_at_once(pipe, picture):
    with pytest.raises(InputError):
        pipe.stream("w5", [picture, picture])
    with pytest.raises(InputError):
        pipe.stream("w5 " * 100, [picture])


def test_logits_that_are_not_finite_end_an_answer(pipe, picture, monkeypatch):
    right = pipe._decoder._decode
    logits = pipe.buffer(pipe.manifest.role("decode")[-1].name, "logits")
    monkeypatch.setattr(pipe._decoder, "_decode", lambda *given: (right(*given), logits.write(np.inf)))

    stream = pipe.stream("w5 w6", [picture])

    with pytest.raises(LvlmEdgeError, match=r"logits of token 1 are not finite.*float32; export with --dtype"):
        list(stream)


def test_a_stream_and_generate_tokens_give_the_same_tokens(pipe, picture):
    answer = pipe.generate("w5 w6", [picture])

    found = pipe.generate_tokens(*pipe.prepare("w5 w6", [picture]))

    assert found.token_ids == answer.token_ids
    assert found.logits.argmax(-1).tolist() == answer.token_ids
    assert found.logits.shape == (len(answer.token_ids), 160) and found.logits.dtype == np.float32
    assert np.array_equal(found.kept_visual, answer.kept_visual)


def test_a_stream_that_is_left_early_does_not_disturb_the_next(pipe, picture):
    whole = pipe.generate("w5 w6", [picture]).token_ids

    next(pipe.stream("w9 w8 w7", [picture]))

    assert pipe.generate("w5 w6", [picture]).token_ids == whole


def test_an_answer_ends_at_the_end_of_sequence_unless_it_is_ignored(bundle, pipe, tmp_path):
    free = pipe.generate_tokens(PROMPT, pixels(), ignore_eos=True).token_ids
    end = free[3]
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    tiny.change_json(copied / "manifest.json", eos_token_ids=[end])
    ended = Pipeline.load(copied)

    found = ended.generate_tokens(PROMPT, pixels())

    assert found.finish == "eos"
    assert found.token_ids == free[: free.index(end) + 1]
    assert ended.generate_tokens(PROMPT, pixels(), ignore_eos=True).token_ids == free


def test_the_end_of_sequence_is_no_part_of_the_text(bundle, pipe, picture, tmp_path):
    words = pipe.generate("w5 w6", [picture]).text.split()
    end = pipe.last.token_ids[2]
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    tiny.change_json(copied / "manifest.json", eos_token_ids=[end])

    found = Pipeline.load(copied).generate("w5 w6", [picture])

    assert found.text.split() == words[: pipe.last.token_ids.index(end)]


def test_a_placeholder_typed_by_a_user_stays_text(pipe, picture):
    ids, _ = pipe.prepare("<image> <image>", [picture])

    assert ids.count(IMAGE) == 1


def test_a_full_prompt_and_a_full_answer_fit(pipe):
    prompt = [IMAGE, *range(3, 27)]

    found = pipe.generate_tokens(prompt, pixels(), ignore_eos=True)

    assert (len(found.token_ids), found.prompt_tokens) == (8, 28)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "0 image"),
        ([IMAGE], "has no text"),
        ([5, 6], "0 image"),
        ([IMAGE, 5, IMAGE], "2 image"),
        ([IMAGE, *[5] * 25], "--max-text-tokens 25"),
        ([IMAGE, 160], "token 160 is outside the vocabulary of 160"),
        ([IMAGE, -1], "token -1 is outside"),
    ],
    ids=str,
)
def test_a_prompt_that_does_not_fit_is_refused(prompt, said, pipe):
    with pytest.raises(InputError, match=said):
        pipe.generate_tokens(prompt, pixels())


@pytest.mark.parametrize(
    "given",
    [
        np.zeros((3, 28, 28), np.float32),
        np.zeros((2, 3, 28, 28), np.float32),
        np.zeros((1, 3, 28, 29), np.float32),
        np.full((1, 3, 28, 28), np.nan, np.float32),
        np.full((1, 3, 28, 28), np.inf, np.float32),
    ],
    ids=["no batch", "two", "another size", "nan", "inf"],
)
def test_pixels_that_do_not_fit_are_refused(given, pipe):
    with pytest.raises(InputError, match="pixel_values"):
        pipe.generate_tokens(PROMPT, given)


def test_sizes_of_pictures_are_looked_at_where_they_are_given(pipe):
    found = pipe.generate_tokens(PROMPT, pixels(), image_sizes=[(300, 20)], max_new_tokens=1)
    assert found.token_ids == pipe.generate_tokens(PROMPT, pixels(), max_new_tokens=1).token_ids

    with pytest.raises(
        InputError, match=r"^image_sizes: has 2 image\(s\), the bundle is planned for 1; give at most 1"
    ):
        pipe.generate_tokens(PROMPT, pixels(), image_sizes=[(300, 20), (300, 20)])
    with pytest.raises(InputError, match=r"^image_sizes: has 0 entries, 1 image\(s\) given; give \(width, height\)"):
        pipe.generate_tokens(PROMPT, pixels(), image_sizes=[])


def test_a_picture_that_the_prompt_speaks_of_has_to_be_given(pipe):
    with pytest.raises(InputError, match=r"prompt: has 1 image token\(s\), 0 image\(s\) given"):
        pipe.generate_tokens(PROMPT, None)
    with pytest.raises(InputError, match=r"prompt: has 0 image token\(s\), 1 image\(s\) given"):
        pipe.generate_tokens([5, 6, 7], pixels())


@pytest.mark.parametrize("count", [0, -1, 9])
def test_a_number_of_new_tokens_out_of_range_is_refused(count, pipe):
    with pytest.raises(UsageError, match="max_new_tokens"):
        pipe.generate_tokens(PROMPT, pixels(), max_new_tokens=count)


def test_a_refused_prompt_leaves_the_pipeline_as_it_was(pipe):
    before = pipe.generate_tokens(PROMPT, pixels(), ignore_eos=True)

    with pytest.raises(InputError):
        pipe.generate_tokens([IMAGE, *[5] * 25], pixels())

    assert np.array_equal(pipe.generate_tokens(PROMPT, pixels(), ignore_eos=True).logits, before.logits)


def test_a_seed_decides_what_is_sampled(pipe):
    def sampled(seed: int) -> list[int]:
        sampling = Sampling(temperature=5.0, seed=seed)
        return list(pipe.generate_tokens(PROMPT, pixels(), sampling=sampling, ignore_eos=True).token_ids)

    assert sampled(1) == sampled(1)
    assert len({tuple(sampled(seed)) for seed in range(4)}) > 1


def test_an_unknown_backend_is_answered_with_the_known_ones(bundle):
    with pytest.raises(UnsupportedError, match="known: ort"):
        Pipeline.load(bundle, "tensorflow")


def test_scores_of_an_answer_are_the_logits_it_was_picked_from(bundle):
    pipe = Pipeline.load(bundle)
    answer = pipe.generate_tokens(PROMPT, pixels(), ignore_eos=True)

    scores = pipe.score_tokens(PROMPT, pixels(), answer.token_ids)

    np.testing.assert_array_equal(scores, answer.logits)


def test_scores_of_other_tokens_are_what_transformers_says(gqa, export_once):
    import torch
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(gqa, attn_implementation="eager").eval()
    prompt, picture, tokens = checkpoints.prompt(6, 2), checkpoints.pixels(), [7, 3, 50, 3]
    pipe = Pipeline.load(export_once(gqa))
    image, count = model.config.image_token_id, pipe.manifest.counts.visual_tokens
    ids = [i for token in [*prompt, *tokens[:-1]] for i in ([token] * count if token == image else [token])]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(picture)).logits[0, -4:].numpy()

    scores = pipe.score_tokens(prompt, picture, tokens)

    np.testing.assert_allclose(scores, wanted, atol=1e-4)


def test_a_graph_that_is_not_what_the_manifest_says_is_refused(bundle, tmp_path):
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = tiny.read_json(copied / "manifest.json")
    head = next(g for g in manifest["graphs"] if g["name"] == "prefill_head")
    score = next(t for t in head["outputs"] if t["name"] == "score")
    score["shape"] = [1, 5]
    tiny.write_json(copied / "manifest.json", manifest)

    with pytest.raises(BundleError, match=r"prefill_head.onnx: 'score' is .*4.*manifest says .*5"):
        Pipeline.load(copied, portable=True)


def test_a_cache_that_is_too_small_is_refused(bundle, tmp_path):
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = tiny.read_json(copied / "manifest.json")
    manifest["cache"][1]["capacity"] -= 1
    tiny.write_json(copied / "manifest.json", manifest)

    with pytest.raises(BundleError, match=r"name='1'.* cannot hold 36 rows"):
        Pipeline.load(copied)


def test_a_device_without_the_memory_is_told_which_flags_to_lower(bundle, monkeypatch):
    from lvlm_edge.runtime.backends.ort import OrtBackend

    def full(self, info, *, host):
        raise MemoryError

    monkeypatch.setattr(OrtBackend, "allocate", full)
    with pytest.raises(FitError, match="--max-text-tokens"):
        Pipeline.load(bundle)


@pytest.mark.parametrize("name", ["none", "fastv"])
def test_the_host_touches_no_buffer_but_those_allocated_for_it(checkpoint_once, export_once, monkeypatch, name):
    from lvlm_edge.runtime.backends.ort import HostBuffer, OrtBackend

    hosts, touched, allocate = {}, set(), OrtBackend.allocate

    def noted(self, info, *, host):
        buffer = allocate(self, info, host=host)
        hosts[id(buffer)] = info.name, host
        return buffer

    monkeypatch.setattr(OrtBackend, "allocate", noted)
    pipe = Pipeline.load(tiny.bundle(checkpoint_once, export_once, name))
    for verb in ("write", "read"):
        original = getattr(HostBuffer, verb)
        monkeypatch.setattr(
            HostBuffer, verb, lambda self, *rest, original=original: touched.add(id(self)) or original(self, *rest)
        )
    pipe.generate_tokens(PROMPT, pixels(), max_new_tokens=2)

    host = {tensor for tensor, is_host in hosts.values() if is_host}
    found = {hosts[each][0] for each in touched}
    assert host - found <= {"image_features"}  # an output that only `check` reads
    assert found <= host


@pytest.mark.parametrize("location", ["../weights.bin", "ABSOLUTE", "sub/../../weights.bin", "link.bin", "nowhere.bin"])
@pytest.mark.parametrize("name", ["decode.onnx", "prefill_tail.onnxruntime"])
def test_weights_outside_the_bundle_are_refused_even_when_every_hash_is_right(location, name, bundle, tmp_path, capfd):
    import onnx

    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    outside = shutil.copy(copied / "weights.bin", tmp_path / "weights.bin")
    (copied / "link.bin").symlink_to(outside)
    (copied / "sub").mkdir()
    path = copied / name
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(outside) if location == "ABSOLUTE" else location
    path.write_bytes(model.SerializeToString())
    tiny.sign(copied)

    with pytest.raises(BundleError, match=re.escape(name)):
        Pipeline.load(copied, portable=name == "decode.onnx")
    assert capfd.readouterr() == ("", "")


# What the loop hands to the choice of tokens, and to the text.


@pytest.fixture(scope="module")
def dense(checkpoint_once, eager_once) -> Pipeline:
    return Pipeline.load(tiny.bundle(checkpoint_once, eager_once, "none"))


def likeliest(logits: np.ndarray, seen: list[int], penalty: float) -> int:
    """The likeliest token under a repetition penalty, one score after the other."""
    scores = logits.tolist()
    for i in set(seen):
        scores[i] = scores[i] / penalty if scores[i] > 0 else scores[i] * penalty
    return scores.index(max(scores))


def test_a_repetition_penalty_sees_the_prompt_and_the_answer_so_far(dense):
    apart = {"prompt": 0, "answer": 0}

    for seed in range(4):
        words = np.random.default_rng(seed).integers(3, IMAGE, 20).tolist()
        sampling = Sampling(repetition_penalty=3.0)
        found = dense.generate_tokens([IMAGE, *words], pixels(), sampling=sampling, ignore_eos=True)

        for step, (token, logits) in enumerate(zip(found.token_ids, found.logits, strict=True)):
            before = found.token_ids[:step]
            assert token == likeliest(logits, [IMAGE, *words, *before], 3.0)
            apart["prompt"] += token != likeliest(logits, before, 3.0)
            apart["answer"] += token != likeliest(logits, [IMAGE, *words], 3.0)

    assert min(apart.values()) > 0  # else the prompts say nothing


def test_a_placeholder_that_is_no_token_is_not_penalised(original, eager_once):
    pipe = Pipeline.load(eager_once(original()))
    prompt, sampling = [5, -200, 9, 30], Sampling(repetition_penalty=3.0)
    picture = np.random.default_rng(0).normal(size=(1, 3, 56, 56)).astype(np.float32)

    found = pipe.generate_tokens(prompt, picture, sampling=sampling, ignore_eos=True)

    for step, (token, logits) in enumerate(zip(found.token_ids, found.logits, strict=True)):
        assert token == likeliest(logits, [5, 9, 30, *found.token_ids[:step]], 3.0)


def test_text_held_back_for_a_stop_string_that_never_comes_is_not_lost(dense, picture):
    whole = dense.generate("w5 w6", [picture]).text
    last = whole.split()[-1]

    for stop in (f"{last} and more", last[-1] + "!"):
        pieces = list(dense.stream("w5 w6", [picture], stop=[stop]))

        assert "".join(pieces) == dense.last.text == whole
        assert dense.last.finish == "length"


# What is kept of the last pictures.


def fresh(pipe: Pipeline, prompt: list[int], given: np.ndarray) -> np.ndarray:
    pipe.forget_images()
    return pipe.generate_tokens(prompt, given, max_new_tokens=1).logits


def assert_change_is_seen(pipe, prompt, first, second):
    """Logits after other pictures are those of a pipeline that saw no others before."""
    wanted = fresh(pipe, prompt, second)

    before = fresh(pipe, prompt, first)
    found = pipe.generate_tokens(prompt, second, max_new_tokens=1).logits

    assert np.array_equal(found, wanted)
    assert not np.array_equal(found, before)


@pytest.mark.parametrize("changed", [0, 1])
def test_another_picture_in_any_place_is_seen(changed, checkpoint_once, eager_once):
    pipe = Pipeline.load(tiny.bundle(checkpoint_once, eager_once, "none", num_images=2))
    prompt = [5, IMAGE, 6, IMAGE, 7]
    first = np.concatenate([pixels(), -pixels()])
    second = first.copy()
    second[changed] *= 0.5

    assert_change_is_seen(pipe, prompt, first, second)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_another_tile_is_seen(changed, tmp_path_factory, eager_once):
    folder = tmp_path_factory.mktemp("tiles") / "model"
    layouts.build(folder, image_aspect_ratio="anyres", image_grid_pinpoints=[[56, 112], [112, 56]])
    pipe = Pipeline.load(eager_once(folder, grid=(1, 2)))
    prompt = [5, layouts.IMAGE, 7]
    first = np.random.default_rng(0).normal(size=(3, 3, 56, 56)).astype(np.float32)
    second = first.copy()
    second[changed] *= 0.5

    assert_change_is_seen(pipe, prompt, first, second)


def test_the_same_pictures_are_encoded_once_and_pixels_changed_in_place_again(dense, monkeypatch):
    ran, right, given = [], dense._decoder.memory.run, pixels()
    monkeypatch.setattr(
        dense._decoder.memory,
        "run",
        lambda graph, *rest, **more: ran.append(graph.name) or right(graph, *rest, **more),
    )
    dense.forget_images()

    for _ in range(2):
        dense.generate_tokens(PROMPT, given, max_new_tokens=1)
    assert ran.count("vision") == 1
    given[0, 0, 0, 0] += 1
    dense.generate_tokens(PROMPT, given, max_new_tokens=1)
    assert ran.count("vision") == 2


def test_the_time_of_the_steps_is_within_that_of_the_first_token_and_of_the_call(checkpoint_once, eager_once, picture):
    pipe = Pipeline.load(tiny.bundle(checkpoint_once, eager_once, "fastv", num_images=2))
    began = time.perf_counter()
    seconds = pipe.generate("w5 w6", [picture, picture]).seconds
    whole = time.perf_counter() - began

    steps = ["preprocess", "vision", "prefill_head", "select", "prefill_tail"]
    assert list(seconds) == [*steps, "first_token", "decode"]
    assert min(seconds.values()) > 0
    assert sum(seconds[step] for step in steps) <= seconds["first_token"]
    assert seconds["first_token"] + seconds["decode"] <= whole


def test_one_token_has_no_time_of_decode_and_known_pictures_none_of_vision(dense):
    dense.generate_tokens(PROMPT, pixels(), max_new_tokens=1)

    assert list(dense.generate_tokens(PROMPT, pixels(), max_new_tokens=1).seconds) == ["prefill", "first_token"]


def test_what_the_host_hands_to_the_graphs_can_be_had_for_given_pictures_and_for_the_planned_ones(dense):
    rows = {"image_embeds": np.full((4, 32), 7, np.float32)}

    planned = dense.prefill_inputs(PROMPT, rows)
    given = dense.prefill_inputs(PROMPT, rows, dense.manifest.pictures)

    assert all(np.array_equal(planned[name], given[name]) for name in planned)
    assert (planned["inputs_embeds"][0, 1:5] == 7).all() and planned["last_index"].tolist() == [6]

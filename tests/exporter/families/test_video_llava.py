"""Video-LLaVA against stock transformers: a tower for pictures, another for the frames of videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lvlm_edge.exporter import plan, references
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.families import video_llava
from lvlm_edge.runtime import InputError, Pipeline
from lvlm_edge.runtime.errors import UnsupportedError, UsageError
from lvlm_edge.runtime.pictures import overlay
from tests import families, qwen, tiny
from tests.cases import both

FAMILY = "video_llava"
CONFIG: dict[str, Any] = {  # Video-LLaVA-7B-hf
    "model_type": "video_llava", "image_token_index": 32000, "video_token_index": 32001,
    "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 224,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
    },
}  # fmt: skip
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "VideoLlavaImageProcessor", "size": {"shortest_edge": 224}, "crop_size": 224, "resample": 3,
}  # fmt: skip
UNREAD = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024 + 2 * 1024  # CLIP's last layer and norm
BOTH = {"num_images": 1, "num_videos": 2, "num_frames": 3, "max_text_tokens": 96, "max_new_tokens": 24}
MIXED = [  # the template writes the images of a message first
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Then?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "And here?"}]},
]


def videos(oracles: Path, of: families.Case) -> list[Any]:
    """The video of a case, uint8 [frames, H, W, 3]."""
    name = of.data["video"]
    return [] if name is None else [np.load(oracles / "families" / FAMILY / name)]


def clip(count: int, seed: int = 0) -> Any:
    """A video of noise, uint8 [count, 60, 90, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, 60, 90, 3), np.uint8)


def bundle(export: Any, of: families.Case, **more: Any) -> Path:
    """The bundle of a case: for its picture or video, with its method."""
    options = {"num_videos": 1} if of.data["video"] else {"num_images": len(of.data["pictures"])}
    options |= {key: of.data[key] for key in ("prune_layer", "keep_ratio") if of.data[key] is not None}
    settings = {"max_text_tokens": 96, "max_new_tokens": 24, "method": of.data["method"]}
    path: Path = export(of.checkpoint, **settings, **options, **more)
    return path


@pytest.mark.parametrize(
    ("name", "exported"),
    both([(n,) for n in ("none_1", "none_2", "fastv_1", "none_video_1", "fastv_video_1")], {("fastv_video_1",)}),
    indirect=["exported"],
)
@pytest.mark.claims("equal", family=FAMILY)
def test_the_answers_are_those_of_stock_transformers(oracles, exported, name):
    of = families.case(oracles, FAMILY, name)
    pipe = Pipeline.load(bundle(exported, of))

    ids, pixels = pipe.prepare(messages=of.data["messages"], images=of.pictures, videos=videos(oracles, of))
    answer = pipe.generate_tokens(ids, np.array(pixels), max_new_tokens=24, ignore_eos=True)

    wanted = of.tensors["pixel_values_videos" if of.data["video"] else "pixel_values"]
    assert ids == of.data["prompt_token_ids"]
    assert np.array_equal(pixels, wanted.reshape(pixels.shape))
    assert pipe.manifest.counts.visual_tokens == of.data["num_visual_tokens"]
    assert answer.token_ids == of.data["expected_new_token_ids"]
    assert np.abs(answer.logits - of.tensors["step_logits"]).max() <= families.TOLERANCE
    if of.data["method"] == "fastv":
        assert answer.kept_visual.tolist() == of.data["kept_visual"]


@pytest.mark.parametrize("name", ["none_2", "none_video_1"])
def test_the_reference_expands_prompts_like_the_stock_processor(oracles, name):
    of = families.case(oracles, FAMILY, name)
    model = references.view(references.load(of.checkpoint))
    real = of.tensors["pixel_values_videos" if of.data["video"] else "pixel_values"]
    prompt = of.data["prompt_token_ids"]
    with torch.no_grad():
        counts = model.counts(model.of_prompt(prompt, torch.from_numpy(real.reshape(-1, *real.shape[-3:]))))

    assert model.expanded(prompt, counts) == of.data["input_ids"]


@torch.no_grad()
def stock(of: families.Case, ids: list[int], images: list[Any], frames: list[Any]) -> tuple[list[int], Any]:
    """Tokens and logits of stock `generate`, with 16 rows for an image and 17 for a frame.

    Args:
        images: [1, 3, H, W] each.
        frames: of every video, [frames, 3, H, W].
    """
    whole = references.view(references.load(of.checkpoint)).whole
    rows = {419: 16, 420: 17 * len(frames[0])} if frames else {419: 16}
    expanded = [t for i in ids for t in [i] * rows.get(i, 1)]
    given = {"input_ids": torch.tensor([expanded])}
    if images:
        given["pixel_values"] = torch.from_numpy(np.concatenate(images))
    if frames:
        given["pixel_values_videos"] = torch.from_numpy(np.stack(frames))
    tokens, logits = references.original.generated(whole, 8, given, len(expanded))
    return tokens, logits.numpy()


@pytest.mark.parametrize("method", ["none", "fastv"])
def test_a_conversation_with_a_picture_between_videos_is_answered_like_stock(oracles, eager_once, method):
    of = families.case(oracles, FAMILY, "none_1")
    options = BOTH | ({"method": "fastv", "prune_layer": 2, "keep_ratio": 1.0} if method == "fastv" else {})
    pipe = Pipeline.load(eager_once(of.checkpoint, **options))

    ids, pixels = pipe.prepare(messages=MIXED, images=[families.noise((97, 211))], videos=[clip(3, 1), clip(11, 2)])
    answer = pipe.generate_tokens(ids, pixels, max_new_tokens=8, ignore_eos=True)

    assert [i for i in ids if i in (419, 420)] == [420, 419, 420]
    assert pixels.shape == (3 + 1 + 3, 3, 28, 28)
    tokens, logits = stock(of, ids, [pixels[3:4]], [pixels[:3], pixels[4:]])
    assert answer.token_ids == tokens
    assert np.abs(answer.logits - logits).max() <= families.TOLERANCE
    parts = pipe.generate_tokens(ids, [np.array(p) for p in (pixels[:3], pixels[3:4], pixels[4:])], max_new_tokens=8)
    joined = pipe.generate_tokens(ids, np.array(pixels), max_new_tokens=8)  # the prompt tells which views are a video's
    assert parts.token_ids == joined.token_ids == tokens[: len(parts.token_ids)]


@pytest.mark.parametrize(("images", "shown"), [(1, 0), (0, 1), (0, 2), (0, 0)])
def test_fewer_pictures_and_videos_than_planned_are_answered_like_stock(oracles, eager_once, images, shown):
    of = families.case(oracles, FAMILY, "none_1")
    pipe = Pipeline.load(eager_once(of.checkpoint, **BOTH))
    pictures = [families.noise((97, 211))] * images

    ids, pixels = pipe.prepare("What?", pictures, [clip(3, seed) for seed in range(shown)])
    answer = pipe.generate_tokens(ids, pixels, max_new_tokens=8, ignore_eos=True)

    views = np.zeros((0, 3, 28, 28), np.float32) if pixels is None else np.array(pixels)
    tokens, logits = stock(of, ids, [views[:images]] * images, [views[3 * i : 3 * i + 3] for i in range(shown)])
    assert answer.token_ids == tokens
    assert np.abs(answer.logits - logits).max() <= families.TOLERANCE


def test_a_video_of_one_frame_is_no_picture(oracles, eager_once):
    of = families.case(oracles, FAMILY, "none_1")
    pipe = Pipeline.load(eager_once(of.checkpoint, **BOTH | {"num_frames": 1, "num_videos": 1}))
    frame = families.noise((97, 211))

    ids, pixels = pipe.prepare("What?", videos=np.asarray(frame)[None])
    found = pipe.generate_tokens(ids, np.array(pixels), max_new_tokens=4, ignore_eos=True)

    tokens, logits = stock(of, ids, [], [np.array(pixels)])
    assert found.token_ids == tokens[:4]
    assert np.abs(found.logits - logits[:4]).max() <= families.TOLERANCE


def test_frames_are_those_that_transformers_samples(oracles, eager_once):
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    from lvlm_edge.runtime.pictures.videos import indices

    for total in range(1, 60):
        for count in range(1, total + 1):
            wanted = default_sample_indices_fn(VideoMetadata(total_num_frames=total, fps=1), num_frames=count)
            assert indices(total, count) == wanted.tolist()

    pipe = Pipeline.load(eager_once(families.case(oracles, FAMILY, "none_1").checkpoint, **BOTH))
    video = clip(20)
    assert np.array_equal(pipe.pixels(videos=video)[0], pipe.pixels(videos=video[[0, 6, 13]])[0])


def test_pixels_of_frames_are_the_image_processors(oracles):
    from transformers import AutoImageProcessor

    from lvlm_edge.runtime.pictures import views

    checkpoint = families.case(oracles, FAMILY, "none_1").checkpoint
    sizes = [(28, 28), *families.random_sizes(11, 20, most=400)]
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", local_files_only=True)
    how = planned(checkpoint, num_videos=1)[0].views
    for seed, size in enumerate(sizes):
        picture = families.noise(size, seed)
        wanted = processor(picture, return_tensors="np", return_legacy_image_output=False)["pixel_values"]
        assert np.array_equal(views.pixels(picture, how), wanted), size


def planned(folder: Path, **capacity: Any) -> Any:
    """What the pictures and videos of a checkpoint stand for."""
    from lvlm_edge.exporter.bundles import plans
    from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
    from lvlm_edge.exporter.planning import Capacity

    return plans.model(Checkpoint.open(folder), Capacity(**capacity)).pictures


def test_the_released_settings_give_the_published_tokens_and_parameters(tmp_path):
    folder = qwen.published(tmp_path, CONFIG, PREPROCESSOR)
    settings = {"max_text_tokens": 64, "max_new_tokens": 1, "dtype": "float16"}
    picture, video = plan(folder, **settings), plan(folder, num_videos=1, **settings)
    each = plan(folder, num_images=1, num_videos=1, **settings)

    assert (picture["visual_tokens"], video["visual_tokens"], each["visual_tokens"]) == (256, 2056, 2312)
    assert (picture["num_images"], video["num_images"], video["num_videos"]) == (1, 0, 1)
    assert sum(each["parameters"].values()) + 2 * UNREAD == 7_366_279_168
    assert each["parameters"]["vision"] == 2 * picture["parameters"]["vision"] == 2 * video["parameters"]["vision"]
    assert video["flops"]["vision"] == 8 * picture["flops"]["vision"]
    pruned = plan(folder, method="fastv", prune_layer=3, keep_ratio=0.5, **settings)
    flops = [picture["flops"][part] / 1e9 for part in ("vision", "projector", "prefill")]
    assert [*flops, pruned["flops"]["prefill"] / 1e9] == pytest.approx([155.3, 10.74, 4198.6, 2665.0], rel=4e-4)
    assert each["weights_bytes"] - picture["weights_bytes"] == 2 * picture["parameters"]["vision"]


def test_a_tower_that_sees_nothing_is_not_in_the_bundle(oracles, eager_once):
    checkpoint = families.case(oracles, FAMILY, "none_1").checkpoint
    sizes = [
        (eager_once(checkpoint, **planned) / "weights.bin").stat().st_size
        for planned in ({}, {"num_videos": 1}, {"num_images": 1, "num_videos": 1})
    ]

    assert max(sizes[:2]) + 2 * 50_000 < sizes[2]  # 2 layers of 64 channels, float32


def test_a_tower_that_sees_nothing_may_be_missing(oracles, tmp_path, eager_once):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(families.case(oracles, FAMILY, "none_1").checkpoint, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "video_tower" not in k}, folder / "model.safetensors")

    assert Pipeline.load(eager_once(folder)).manifest.counts.num_images == 1
    with pytest.raises(CheckpointError, match="video"):
        eager_once(folder, num_videos=1)


def test_check_passes_and_finds_towers_that_are_swapped(oracles, tmp_path, eager_once):
    from lvlm_edge.exporter.proof import parity
    from tests import eager

    of = families.case(oracles, FAMILY, "none_1")
    options = BOTH | {"method": "fastv", "prune_layer": 2, "max_new_tokens": 8}
    good = eager_once(of.checkpoint, **options)

    def swapped(patch: pytest.MonkeyPatch) -> None:
        right = video_llava.rename
        names = {"vision.image": "vision.video", "vision.video": "vision.image"}
        wrong = lambda key: names.get(right(key)[:12], right(key)[:12]) + right(key)[12:]  # noqa: E731
        patch.setattr(video_llava, "rename", wrong)

    bad = eager.export(of.checkpoint, tmp_path / "bad", mistake=swapped, **options)

    assert parity.check(good, of.checkpoint, steps=4, store=False).passed
    with eager.running():
        verdict = parity.check(bad, of.checkpoint, steps=4, store=False)
    assert {row.stage for row in verdict.rows if not row.passed} >= {"weights", "vision", "projector"}


def test_check_takes_a_question_about_a_video(oracles, eager_once):
    from lvlm_edge.exporter.proof import parity

    of = families.case(oracles, FAMILY, "none_1")
    built = eager_once(of.checkpoint, **BOTH)

    verdict = parity.check(built, of.checkpoint, cases=[], question=("What?", [], [clip(5)]), steps=2, store=False)

    assert verdict.passed
    assert "tokens" in {row.stage for row in verdict.rows if row.case == "question"}


def test_bench_asks_about_images_and_videos(oracles, eager_once):
    from lvlm_edge.exporter.timing import contenders

    built = eager_once(families.case(oracles, FAMILY, "none_1").checkpoint, **BOTH)
    pipe = Pipeline.load(built)

    ids, pictures = contenders.prompt(pipe.manifest, 0, 9)
    pixels = contenders.pixels(pipe.manifest, pictures)
    answer = pipe.generate_tokens(ids, pixels, max_new_tokens=1)

    assert [len(views) for views in pixels] == [1, 3, 3]
    assert {"vision", "vision_video"} <= set(answer.seconds)
    assert "1 image(s), 2 video(s), 118 visual tokens" in tiny.cli("inspect", built).stdout


def test_the_command_line_answers_about_a_folder_of_frames(oracles, eager_once, tmp_path):
    of = families.case(oracles, FAMILY, "fastv_video_1")
    built, frames = bundle(eager_once, of), tmp_path / "frames"
    frames.mkdir()
    for i, frame in enumerate(videos(oracles, of)[0]):
        Image.fromarray(frame).save(frames / f"{i}.png")
    options = ("--prompt", of.data["prompt"], "--temperature", "0", "--overlay", tmp_path / "kept.png", "--json")

    done = tiny.cli("run", built, "--video", frames, *options)

    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    count = len(answer["token_ids"])
    assert answer["token_ids"] == of.data["expected_new_token_ids"][:count] and count
    assert answer["kept_visual"] == of.data["kept_visual"]
    assert Image.open(tmp_path / "kept.png").size == (8 * 450, 300)
    assert "no such file" in tiny.refused(2, "run", built, "--video", tmp_path / "none.mp4", "--prompt", "What?")


@pytest.mark.parametrize("exported", both([()], {()}), indirect=True)
def test_the_legacy_lowering_says_the_same(oracles, exported):
    of = families.case(oracles, FAMILY, "fastv_video_1")
    pipe = Pipeline.load(bundle(exported, of, lowering="legacy"))

    ids, pixels = pipe.prepare(messages=of.data["messages"], videos=videos(oracles, of))
    answer = pipe.generate_tokens(ids, pixels, max_new_tokens=24, ignore_eos=True)

    assert answer.token_ids == of.data["expected_new_token_ids"]
    assert answer.kept_visual.tolist() == of.data["kept_visual"]


def test_placeholders_that_a_user_types_stay_text(oracles, eager_once):
    of = families.case(oracles, FAMILY, "none_video_1")
    pipe = Pipeline.load(bundle(eager_once, of))

    assert not {419, 420} & set(pipe.encode([qwen.turn("<video> and <image>")]))
    assert pipe.prepare("<video>?", videos=clip(8))[0].count(420) == 1


def test_an_overlay_shows_frame_by_frame_what_was_kept(oracles, eager_once):
    of = families.case(oracles, FAMILY, "fastv_video_1")
    pipe = Pipeline.load(bundle(eager_once, of))
    (video,) = videos(oracles, of)
    ids, pixels = pipe.prepare(messages=of.data["messages"], videos=[video])
    answer = pipe.generate_tokens(ids, pixels, max_new_tokens=2)

    sheet = np.asarray(overlay.draw(answer.pictures, [], answer.kept_visual, videos=[video]))

    factor = -(-384 // 90)
    assert sheet.shape == (60 * factor, 8 * 90 * factor, 3)
    lit = 0
    for i, frame in enumerate(video):
        shown = sheet[:, i * 90 * factor : (i + 1) * 90 * factor].astype(int)
        for row in range(4):
            for column in range(4):
                x, y = 15 + 15 * column + 7, 15 * row + 7  # middles of the cells of the centre crop
                kept = 17 * i + 1 + 4 * row + column in answer.kept_visual
                same = np.abs(shown[y * factor + 2, x * factor + 2] - frame[y, x]).max() <= 1
                assert same == kept or frame[y, x].max() < 4, (i, row, column)
                lit += kept
    assert lit > 10


def test_what_does_not_fit_the_plan_is_refused(oracles, eager_once):
    of = families.case(oracles, FAMILY, "none_video_1")
    pipe = Pipeline.load(bundle(eager_once, of))
    with pytest.raises(InputError, match=r"videos: has 7 frame\(s\), the bundle is for 8; .*--num-frames 7"):
        pipe.prepare("What?", videos=clip(7))
    with pytest.raises(InputError, match="images: 1 given, the bundle is planned for 0"):
        pipe.prepare("What?", families.noise((30, 30)))
    with pytest.raises(InputError, match=r"videos: 2 given, the bundle is planned for 1; .*--num-videos 2"):
        pipe.prepare("What?", videos=[clip(8)] * 2)
    with pytest.raises(InputError, match=r"messages: name 0 video\(s\), 1 given"):
        pipe.prepare(messages=[qwen.turn("What?")], videos=clip(8))
    with pytest.raises(InputError, match=r"prompt: has 1 image\(s\), the bundle is planned for 0"):
        pipe.generate_tokens([1, 419, 5], None)
    with pytest.raises(InputError, match=r"prompt: has 0 video token\(s\), 1 video\(s\) given"):
        pipe.generate_tokens([1, 5], np.zeros((8, 3, 28, 28), np.float32))
    with pytest.raises(InputError, match=r"pixel_values: is \[4, 3, 28, 28\], the bundle is planned for \[8, 3"):
        pipe.generate_tokens([1, 420, 5], np.zeros((4, 3, 28, 28), np.float32))


def test_media_in_another_order_than_the_prompts_are_refused(oracles, eager_once):
    pipe = Pipeline.load(eager_once(families.case(oracles, FAMILY, "none_1").checkpoint, **BOTH))
    ids, pixels = pipe.prepare("What?", [families.noise((30, 30))], [clip(3)])
    at = ids.index(419), ids.index(420)
    ids[at[0]], ids[at[1]] = 420, 419

    with pytest.raises(InputError, match="stand in another order"):
        pipe.generate_tokens(ids, pixels)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_images": 0}, UsageError, "num_images is 0, expected at least 1"),
        ({"num_videos": -1}, UsageError, "num_videos is -1, expected at least 0"),
        ({"num_videos": 1, "num_frames": 0}, UsageError, "num_frames is 0, expected at least 1"),
        ({"num_frames": 4}, UsageError, "--num-frames is for videos"),
        ({"num_videos": 1, "num_images": 0, "image_size": (9, 9)}, UsageError, "--num-images is 0"),
        ({"grid": (2, 2)}, UsageError, "sees every picture as one crop"),
        ({"num_videos": 2}, UsageError, "make 4496 positions, but the model has 4096"),
        ({"num_videos": 1, "method": "yopo"}, UsageError, "yopo"),
    ],
)
def test_capacities_that_cannot_be_are_refused(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        plan(qwen.published(tmp_path, CONFIG, PREPROCESSOR), **options)


def test_a_family_without_videos_refuses_them(mha, tmp_path):
    message = tiny.refused(3, "plan", mha, "--num-videos", "1")

    assert "llava: videos are not supported for this family" in message


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"vision_config": {"model_type": "siglip_vision_model"}}, UnsupportedError, "the towers are"),
        ({"vision_feature_select_strategy": "all"}, UnsupportedError, "vision_feature_select_strategy is 'all'"),
        ({"video_token_index": 32000}, CheckpointError, "video_token_index is 32000"),
        ({"video_token_index": None}, CheckpointError, "video_token_index is None"),
        ({"vision_feature_layer": 30}, CheckpointError, "has 24 layers"),
    ],
)
def test_what_the_graphs_do_not_have_is_refused(config, error, message, tmp_path):
    with pytest.raises(error, match=message):
        plan(qwen.published(tmp_path, CONFIG | config, PREPROCESSOR))


def test_pictures_may_keep_their_class_token(oracles, tmp_path, eager_once):
    import shutil

    of = families.case(oracles, FAMILY, "none_1")
    folder = shutil.copytree(of.checkpoint, tmp_path / "m")
    tiny.change_json(folder / "config.json", vision_feature_select_strategy="full")
    pipe = Pipeline.load(eager_once(folder, **BOTH | {"num_videos": 1}))

    families.answers_like_stock(pipe, folder, families.CONVERSATIONS["text first"], [(97, 211)])

    assert [picture.visual_tokens for picture in pipe.manifest.pictures] == [17, 51]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("image_tower.vision_model.embeddings.class_embedding", "vision.image.class_embedding"),
        ("video_tower.vision_model.encoder.layers.3.self_attn.q_proj.bias", "vision.video.layers.3.q_proj.bias"),
        ("model.video_tower.vision_model.pre_layrnorm.weight", "vision.video.pre_layrnorm.weight"),
        ("model.image_tower.encoder.layers.0.mlp.fc1.weight", "vision.image.layers.0.fc1.weight"),
        ("multi_modal_projector.linear_1.weight", "projector.linear_1.weight"),
        ("model.language_model.layers.0.self_attn.q_proj.weight", "layers.0.q_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_of_all_layouts_are_known(key, name):
    assert video_llava.FAMILY.rename(key) == name


def test_missing_fields_mean_what_transformers_takes():
    from transformers import VideoLlavaConfig

    config = VideoLlavaConfig()
    own, tower = video_llava.DEFAULTS, config.vision_config.to_dict()

    assert (own["image_token_index"], own["video_token_index"]) == (config.image_token_id, config.video_token_id)
    for key in ("projector_hidden_act", "multimodal_projector_bias", "vision_feature_layer"):
        assert own[key] == getattr(config, key)
    assert own["vision_feature_select_strategy"] == config.vision_feature_select_strategy
    assert own["vision_config"] == {key: tower[key] for key in own["vision_config"]}

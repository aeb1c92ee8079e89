"""Bad input gets one clear line on stderr and the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter.bundles import atomic
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle import SCHEMA, open_bundle
from tests import tiny
from tests.tiny import CAPACITY, change_json, refused, tree, write_json


@pytest.fixture(scope="module")
def good(checkpoint_once) -> Path:
    return tiny.checkpoint(checkpoint_once)


@pytest.fixture(scope="module")
def none(checkpoint_once, export_once) -> Path:
    return tiny.bundle(checkpoint_once, export_once, "none")


@pytest.fixture(scope="module")
def fastv(checkpoint_once, export_once) -> Path:
    return tiny.bundle(checkpoint_once, export_once, "fastv")


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """A copy of the checkpoint, to spoil."""
    return Path(shutil.copytree(good, tmp_path / "checkpoint"))


@pytest.fixture
def picture(tmp_path) -> Path:
    return tiny.picture(tmp_path / "picture.png")


# What is asked of a bundle.


def test_a_prompt_that_is_too_long_names_the_flag_and_the_number(none, picture):
    message = refused(2, "run", none, "--image", picture, "--prompt", "w5 " * 30)

    needed = 30 + 4  # the family's template adds `USER`, `:` twice and `ASSISTANT`
    assert f"{needed} text tokens" in message and "holds 24" in message
    assert f"--max-text-tokens {needed}" in message


def test_there_may_be_no_more_pictures_than_planned(none, picture):
    two = refused(2, "run", none, "--prompt", "w5", "--image", picture, "--image", picture)
    assert "2 given" in two and "planned for 1; give at most 1" in two and "--num-images 2" in two
    assert tiny.cli("run", none, "--prompt", "w5").exit_code == 0


@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_an_empty_prompt_is_refused(prompt, none, picture):
    assert "empty" in refused(2, "run", none, "--image", picture, "--prompt", prompt)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-new-tokens", "0"], "expected 1..8"),
        (["--max-new-tokens", "9"], "holds 8"),
        (["--max-new-tokens", "-1"], "expected 1..8"),
        (["--temperature", "-1"], "temperature: is -1.0"),
        (["--temperature", "nan"], "temperature: is nan"),
        (["--temperature", "warm"], "--temperature"),
        (["--top-p", "0"], "top_p: is 0.0"),
        (["--top-p", "2"], "top_p: is 2.0"),
        (["--top-p", "nan"], "top_p: is nan"),
        (["--top-k", "-1"], "top_k: is -1"),
        (["--repetition-penalty", "0"], "repetition_penalty: is 0.0"),
        (["--repetition-penalty", "inf"], "repetition_penalty: is inf"),
        (["--seed", "-1"], "seed: is -1"),
        (["--stop", ""], "stop: a stop string is empty"),
        (["--threads", "0"], "--threads"),
        (["--promt", "x"], "'--prompt'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_of_run_out_of_range_is_named(options, said, none, picture):
    assert said in refused(2, "run", none, "--image", picture, "--prompt", "w5", *options)


def bomb() -> bytes:
    """A PNG that says it is 60,000 pixels wide and high, in a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


PICTURES = {
    "a missing file": (lambda path: None, "no such file"),
    "a folder": (Path.mkdir, "directory"),
    "an empty file": (Path.touch, "not a picture"),
    "text": (lambda path: path.write_text("hello"), "not a picture"),
    "a truncated PNG": (lambda path: cut(path, ".png"), "truncated"),
    "a truncated JPEG": (lambda path: cut(path, ".jpg"), "truncated"),
    "a decompression bomb": (lambda path: path.write_bytes(bomb()), "too large"),
}


def cut(path: Path, suffix: str) -> None:
    whole = tiny.picture(path.with_suffix(suffix)).read_bytes()
    path.with_suffix(suffix).unlink()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_that_cannot_be_used_is_named(kind, none, tmp_path):
    make, said = PICTURES[kind]
    make(tmp_path / "p.png")

    message = refused(2, "run", none, "--prompt", "w5", "--image", tmp_path / "p.png")

    assert str(tmp_path / "p.png") in message and said in message


@pytest.mark.parametrize("target", ["nowhere/kept.png", "kept.xyz", "kept", "folder.png"])
def test_an_overlay_that_cannot_be_written_is_refused_before_the_answer(target, fastv, picture, tmp_path):
    (tmp_path / "folder.png").mkdir()
    before = tree(tmp_path)

    message = refused(2, "run", fastv, "--image", picture, "--prompt", "w5", "--overlay", tmp_path / target)

    assert str(tmp_path / target) in message and ".png" in message
    assert tree(tmp_path) == before


def test_an_overlay_of_a_method_that_keeps_all_is_refused(none, picture, tmp_path):
    message = refused(2, "run", none, "--image", picture, "--prompt", "w5", "--overlay", tmp_path / "kept.png")

    assert "method none chooses none" in message
    assert not (tmp_path / "kept.png").exists()


def test_a_disk_that_is_full_leaves_the_old_overlay(fastv, picture, tmp_path, monkeypatch):
    from PIL import Image

    target = tmp_path / "kept.png"
    target.write_bytes(b"old")
    before = tree(tmp_path)

    def full(self, path, *_):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    done = tiny.cli("run", fastv, "--image", picture, "--prompt", "w5", "--overlay", target)

    assert done.exit_code == 2 and "No space left" in done.stderr
    assert tree(tmp_path) == before


@pytest.mark.export
def test_text_for_a_bundle_without_tokenizer_is_refused_and_says_what_else_works(folder, picture, tmp_path):
    (folder / "tokenizer.json").unlink()
    done = tiny.cli("export", folder, "-o", tmp_path / "bundle", *CAPACITY)
    assert (done.exit_code, len(done.stderr.splitlines())) == (0, 1)
    assert "has no tokenizer.json" in done.stderr

    message = refused(3, "run", tmp_path / "bundle", "--image", picture, "--prompt", "w5")

    assert "tokenizer.json" in message and "generate_tokens" in message
    found = Pipeline.load(tmp_path / "bundle").generate_tokens(
        tiny.PROMPT, tiny.pixels(), max_new_tokens=2, ignore_eos=True
    )
    assert len(found.token_ids) == 2


# Names and numbers of an export.


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ["exprot"], "did you mean export?"),
        (2, ["--jsn"], "--jsn"),
        (2, ["plan"], "CHECKPOINT"),
        (2, ["plan", "CHECKPOINT", "--mehtod", "none"], "'--method'"),
        (3, ["plan", "CHECKPOINT", "--method", "fastvv"], "did you mean fastv?"),
        (3, ["plan", "CHECKPOINT", "--device", "cpuu"], "did you mean cpu?"),
        (3, ["plan", "CHECKPOINT", "--dtype", "flot16"], "did you mean float16?"),
        (3, ["plan", "CHECKPOINT", "--dtype", "bfloat16"], "known: float16, float32"),
        (2, ["plan", "CHECKPOINT", "--prune-layer", "1"], "none: has no option --prune-layer"),
        (2, ["plan", "CHECKPOINT", "--num-images", "0"], "--num-images"),
        (2, ["plan", "CHECKPOINT", "--max-text-tokens", "0"], "--max-text-tokens"),
        (2, ["plan", "CHECKPOINT", "--max-text-tokens", "x"], "--max-text-tokens"),
        (2, ["plan", "CHECKPOINT", "--max-new-tokens", "100000"], "the model has 1024"),
        (2, ["export", "CHECKPOINT"], "--output"),
        (2, ["check", "BUNDLE"], "--against"),
        (2, ["check", "BUNDLE", "--against", "CHECKPOINT", "--prompt", "w5"], "--image and --prompt go together"),
        (2, ["check", "BUNDLE", "--against", "CHECKPOINT", "--steps", "0"], "--steps"),
        (2, ["check", "BUNDLE", "--against", "CHECKPOINT", "--seed", "-1"], "--seed"),
        (3, ["check", "BUNDLE", "--against", "CHECKPOINT", "--backend", "orrt"], "did you mean ort?"),
        (3, ["run", "BUNDLE", "--prompt", "w5", "--backend", "trtt"], "known: ort"),
        (5, ["check", "CHECKPOINT", "--against", "CHECKPOINT"], "has no manifest.json"),
        (5, ["inspect", "nowhere"], "is no folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_name_or_number_is_answered_with_what_was_meant(code, arguments, said, good, none):
    real = {"CHECKPOINT": str(good), "BUNDLE": str(none)}

    assert said in refused(code, *(real.get(a, a) for a in arguments))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prune-layer", "0"], "choose 1..1"),
        (["--prune-layer", "2"], "choose 1..1"),
        (["--prune-layer", "-1"], "choose 1..1"),
        (["--prune-layer", "1.5"], "--prune-layer"),
        (["--keep-ratio", "0"], "keep_ratio is 0"),
        (["--keep-ratio", "1.01"], "keep_ratio is 1.01"),
        (["--keep-ratio", "-0.5"], "keep_ratio is -0.5"),
        (["--keep-ratio", "nan"], "keep_ratio is nan"),
        (["--keep-ratio", "inf"], "keep_ratio is inf"),
        (["--keep-ratio", "0.001"], "keep 1..4"),
        (["--keep-tokens", "0"], "keep 1..4"),
        (["--keep-tokens", "5"], "keep 1..4"),
        (["--keep-tokens", "nan"], "--keep-tokens"),
        (["--keep-tokens", "inf"], "--keep-tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", [["plan"], ["export", "-o", "OUTPUT"]], ids=lambda command: command[0])
def test_a_setting_of_fastv_out_of_range_is_refused(command, options, said, good, tmp_path):
    verb, *rest = command
    layer = [] if "--prune-layer" in options else ["--prune-layer", "1"]
    output = [str(tmp_path / "new" / "bundle") if a == "OUTPUT" else a for a in rest]

    assert said in refused(2, verb, good, "--method", "fastv", *layer, *options, *output)

    assert tree(tmp_path) == {}


# Checkpoints.


def export_refused(folder: Path, *said: str, code: int = 1, options: tuple[str, ...] = ()) -> None:
    """An export that fails saying so, and leaves nothing beside where it would have been, or is."""
    place = folder.parent / "place"
    place.mkdir()
    message = refused(code, "export", folder, "-o", place / "new" / "bundle", *CAPACITY, *options)
    for part in said:
        assert part in message
    assert "; " in message, f"no advice: {message}"
    assert tree(place) == {}


def test_no_checkpoint_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()

    for name in ("nowhere", "/nowhere/at/all", "./no/where"):
        assert "Hugging Face id" in refused(1, "plan", name)
    assert "could not be downloaded" in refused(1, "plan", "nobody/nothing")
    assert "has no config.json" in refused(1, "plan", tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "said"), [("", "JSON"), ("{", "JSON"), ("[]", "list"), ("3", "int"), ("{}", "no model_type")]
)
def test_a_config_that_is_no_json_object(content, said, folder):
    (folder / "config.json").write_text(content)

    export_refused(folder, "config.json", said)


@pytest.mark.parametrize(
    ("code", "path", "value", "said"),
    [
        (3, "model_type", "lava", "did you mean llava?"),
        (3, "vision_config.model_type", "clip_vison_model", "did you mean clip_vision_model?"),
        (3, "text_config.model_type", "lama", "did you mean llama?"),
        (3, "text_config.hidden_act", "siluu", "did you mean silu?"),
        (3, "vision_config.hidden_act", "quik_gelu", "did you mean quick_gelu?"),
        (3, "projector_hidden_act", "gelo", "did you mean gelu?"),
        (3, "text_config.rope_parameters", {"rope_type": "liner", "rope_theta": 1e4}, "did you mean linear?"),
        (3, "text_config.rope_parameters", {"rope_type": "proportional", "rope_theta": 1e4}, "proportional"),
        pytest.param(  # found by transformers, when the graphs are there
            *(1, "text_config.rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "factor"),
            marks=pytest.mark.export,
        ),
        (1, "model_type", 3, "no model_type"),
        (1, "text_config", "llama", "text_config is str"),
        (1, "vision_config", [], "vision_config is list"),
        (1, "text_config.num_attention_heads", 3, "3 by 2"),
        (1, "vision_config.num_attention_heads", 3, "32 by 3"),
        (1, "text_config.num_key_value_heads", 3, "heads"),
        (1, "text_config.num_attention_heads", 0, "config.json"),
        (1, "text_config.num_key_value_heads", 0, "kv_heads 0"),
        (1, "text_config.hidden_size", -32, "hidden"),
        (1, "text_config.hidden_size", 0, "hidden"),
        (1, "text_config.hidden_size", "32", "hidden '32'"),
        (1, "text_config.hidden_size", 32.5, "hidden 32.5"),
        (1, "text_config.hidden_size", None, "hidden None"),
        (1, "text_config.rms_norm_eps", "x", "rms_norm_eps is 'x'"),
        (1, "vision_config.layer_norm_eps", None, "layer_norm_eps is None"),
        (1, "text_config.hidden_act", ["silu"], "hidden_act is ['silu']"),
        (1, "projector_hidden_act", 3, "projector_hidden_act is 3"),
        (1, "text_config.rope_parameters", {"rope_type": "default", "rope_theta": "x"}, "rope_theta is 'x'"),
        (1, "text_config.rope_parameters", "default", "rope_parameters is str"),
        (1, "text_config.head_dim", 15, "15 by 2"),
        (1, "text_config.intermediate_size", -4, "ffn -4"),
        (1, "text_config.num_hidden_layers", 0, "layers 0"),
        (1, "text_config.num_hidden_layers", -1, "layers -1"),
        (1, "text_config.vocab_size", 0, "vocab 0"),
        (1, "text_config.max_position_embeddings", 0, "max_positions 0"),
        (1, "vision_config.num_hidden_layers", 0, "0 layers"),
        (1, "vision_config.patch_size", 0, "patch_size 0"),
        (1, "vision_config.patch_size", 56, "patches of 56"),
        (1, "vision_config.image_size", 0, "image_size 0"),
        (1, "vision_config.image_size", [28, 28], "image_size [28, 28]"),
        (1, "vision_feature_layer", -9, "vision_feature_layer is -9"),
        (1, "vision_feature_layer", "last", "vision_feature_layer"),
        (3, "vision_feature_select_strategy", "some", "vision_feature_select_strategy"),
        (1, "projector_hidden_act", None, "projector_hidden_act is None"),
        (1, "image_token_index", -1, "image_token_index is -1"),
        (1, "image_token_index", "x", "image_token_index"),
        (1, "image_token_index", 500, "no added token with the id 500"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(code, path, value, said, folder):
    *parents, name = path.split(".")
    content = tiny.read_json(folder / "config.json")
    place = content
    for key in parents:
        place = place[key]
    place[name] = value
    write_json(folder / "config.json", content)

    export_refused(folder, said, code=code)


Q = "language_model.model.layers.0.self_attn.q_proj.weight"


def change_tensors(folder: Path, changed: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | changed
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def with_value(folder: Path, value: float) -> None:
    tensor = load_file(folder / "model.safetensors")[Q].clone()
    tensor[3, 3] = value
    change_tensors(folder, {Q: tensor})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({Q: None}, ("lacks tensors", "layers.0.q_proj.weight")),
        ({"language_model.lm_head.weight": None}, ("lacks tensors", "lm_head.weight")),
        ({"some.adapter.weight": torch.zeros(2)}, ("some.adapter.weight", "remove")),
        ({Q: torch.zeros(32, 33)}, (Q, "[32, 33]", "[32, 32]")),
        ({Q: torch.zeros(32)}, (Q, "[32]", "[32, 32]")),
        ({Q: torch.zeros(32, 32, dtype=torch.int8)}, (Q, "I8", "quantised")),
        ({Q: torch.zeros(32, 32, dtype=torch.uint8)}, (Q, "U8", "quantised")),
        ({Q: torch.zeros(32, 32, dtype=torch.float8_e4m3fn)}, (Q, "F8_E4M3", "quantised")),
        ({f"model.{Q}".replace("model.layers", "layers"): torch.zeros(32, 32)}, ("twice", Q)),
    ],
    ids=["missing", "no head", "extra", "misshapen", "flat", "int8", "uint8", "float8", "two prefixes"],
)
def test_tensors_that_do_not_fit_are_named(changed, said, folder):
    change_tensors(folder, changed)

    export_refused(folder, *said)


@pytest.mark.export
@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (float("nan"), "float32", "not a number"),
        (float("inf"), "float32", "infinite"),
        (1e6, "float16", "1e+06, too large for float16; export with --dtype float32"),
    ],
)
def test_a_value_that_the_bundle_cannot_hold_is_named_with_its_tensor(value, dtype, said, folder):
    with_value(folder, value)

    export_refused(folder, Q, said, options=("--dtype", dtype))


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[:-100], lambda raw: raw[:100], lambda raw: b"", lambda raw: b"\xff" * 400, lambda raw: raw + b"x"],
    ids=["truncated", "cut in the header", "empty", "garbage", "too long"],
)
def test_a_damaged_safetensors_file_is_named(damage, folder):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))

    export_refused(folder, str(path), "damaged or truncated")


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()

    export_refused(folder, "has no weights", "model.safetensors")


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        ("model-2.safetensors", "model-2.safetensors: is missing"),
        ("../x.safetensors", "outside the folder"),
        ("/x.safetensors", "outside the folder"),
        ("..", "outside the folder"),
        ("", "outside the folder"),
        (3, "weight_map"),
        (["a"], "weight_map"),
    ],
    ids=str,
)
def test_an_index_that_names_a_wrong_file_is_refused(shard, said, folder):
    path = folder / "model.safetensors"
    names = dict.fromkeys(load_file(path), "model-1.safetensors")
    path.rename(folder / "model-1.safetensors")
    shutil.copy(folder / "model-1.safetensors", folder.parent / "x.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": names | {Q: shard}})

    export_refused(folder, said)


def test_an_index_that_names_tensors_its_files_lack(folder):
    path = folder / "model.safetensors"
    names = dict.fromkeys([*load_file(path), "lost"], "model-1.safetensors")
    path.rename(folder / "model-1.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": names})

    export_refused(folder, "names lost")


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickled_checkpoint_is_never_run(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb(tmp_path / "executed")}, folder / "pytorch_model.bin")

    export_refused(folder, "pytorch_model.bin", "cannot be loaded safely", "safetensors")

    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_damaged_pickled_checkpoint_is_named(content, folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)

    export_refused(folder, "pytorch_model.bin")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", "{", "JSON"),
        ("tokenizer.json", "[]", "list"),
        ("tokenizer.json", "{}", "no added token with the id 159"),
        ("tokenizer.json", '{"added_tokens": 3}', "no added token"),
        ("tokenizer.json", '{"added_tokens": [{"id": 159, "content": "<image>"}], "model": {}}', "cannot be used"),
        ("tokenizer_config.json", "[]", "list"),
        ("chat_template.jinja", "{% if", "cannot be used"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id"),
        ("generation_config.json", '{"eos_token_id": [2, null]}', "eos_token_id"),
        ("generation_config.json", "{", "JSON"),
        ("preprocessor_config.json", "[]", "list"),
    ],
)
def test_a_damaged_text_file_is_named_before_the_weights_are_written(file, content, said, folder):
    (folder / file).write_text(content)

    export_refused(folder, said)


def test_a_tokenizer_that_does_not_know_the_image_token(folder):
    change_json(folder / "tokenizer.json", added_tokens=[])

    export_refused(folder, "tokenizer.json", "159", "belongs to this checkpoint")


@pytest.mark.parametrize(
    ("code", "changed", "said"),
    [
        (1, {"crop_size": 56}, "[3, 56, 56], config.json says [3, 28, 28]"),
        (1, {"crop_size": {"height": 28, "width": 42}}, "[3, 28, 42]"),
        (1, {"do_center_crop": False, "size": {"height": 56, "width": 56}}, "[3, 56, 56]"),
        (1, {"image_std": [0, 0, 0]}, "no finite picture"),
        (1, {"image_mean": [float("nan")] * 3}, "no finite picture"),
        (3, {"size": "x"}, "size"),
        (3, {"image_mean": [1, 2]}, "image_mean"),
        (3, {"image_mean": "abc"}, "image_mean"),
        (3, {"resample": 9}, "resample"),
        (3, {"image_processor_type": "Clip"}, "image_processor_type"),
    ],
    ids=str,
)
def test_picture_settings_that_do_not_fit_the_vision_encoder_are_refused(code, changed, said, folder):
    change_json(folder / "preprocessor_config.json", **changed)

    export_refused(folder, said, code=code)


# Where a bundle goes.


def no_room(path, free=1000):
    return namedtuple("usage", "total used free")(free, 0, free)


def fail(number):
    def raising(*_, **__):
        raise OSError(number, os.strerror(number))

    return raising


@pytest.fixture
def place(none, tmp_path) -> Path:
    """A folder with a bundle in it, `old`."""
    shutil.copytree(none, tmp_path / "place" / "old")
    return tmp_path / "place"


@pytest.mark.parametrize("output", ["old", "new", "deep/er/new"])
def test_a_full_disk_is_found_before_anything_is_written(output, good, place, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", no_room)
    before = tree(place)

    message = refused(1, "export", good, "-o", place / output, "--force", *CAPACITY)

    assert "MB free" in message and "choose another --output" in message
    assert tree(place) == before


@pytest.mark.parametrize(
    ("output", "number", "said"),
    [
        ("old", errno.ENOSPC, "no room"),
        ("deep/new", errno.ENOSPC, "no room"),
        ("old", errno.EDQUOT, "no room"),
        ("deep/new", errno.EIO, "cannot be written"),
    ],
)
def test_a_write_that_fails_leaves_the_old_bundle_and_nothing_else(output, number, said, good, place, monkeypatch):
    monkeypatch.setattr("lvlm_edge.exporter.bundles.weights_file.write", fail(number))
    before = tree(place)

    assert said in refused(1, "export", good, "-o", place / output, "--force", *CAPACITY)

    assert tree(place) == before


def test_an_output_that_exists_is_only_replaced_with_force(good, place):
    before = tree(place)

    assert "--force" in refused(2, "export", good, "-o", place / "old", *CAPACITY)

    assert tree(place) == before


def test_force_replaces_nothing_but_bundles(good, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "a web page has one too"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    before = tree(tmp_path)

    for name in ("file", "folder", "web", "broken", ".", ""):
        assert "not a bundle" in refused(2, "export", good, "-o", tmp_path / name, "--force", *CAPACITY)

    assert tree(tmp_path) == before


@pytest.mark.export
def test_force_takes_an_empty_folder(good, tmp_path):
    (tmp_path / "bundle").mkdir()

    assert tiny.cli("export", good, "-o", tmp_path / "bundle", "--force", *CAPACITY).exit_code == 0

    open_bundle(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_output_below_a_file_or_on_a_read_only_place_is_refused(good, tmp_path):
    (tmp_path / "file").write_text("mine")

    assert "cannot be written" in refused(1, "export", good, "-o", tmp_path / "file" / "bundle", *CAPACITY)
    assert "cannot be written" in refused(1, "export", good, "-o", "/proc/lvlm/bundle", *CAPACITY)


@pytest.mark.parametrize("output", [".", "..", "link"])
def test_the_checkpoint_is_never_replaced_by_its_bundle(output, folder, none, tmp_path):
    for path in none.iterdir():  # so that each of them would pass for a bundle
        for home in (folder, folder.parent):
            if not (home / path.name).exists():
                shutil.copy(path, home)
    (tmp_path / "link").symlink_to(folder)
    before = tree(tmp_path)
    target = tmp_path / "link" if output == "link" else folder / output

    assert "holds the checkpoint itself" in refused(2, "export", folder, "-o", target, "--force", *CAPACITY)

    assert tree(tmp_path) == before


# An export that is stopped.

FORKS = """
import json, os, shutil, signal, sys
import torch
from lvlm_edge.exporter.bundles import atomic, pack, weights_file
from lvlm_edge.exporter.graphs import trace
from lvlm_edge.exporter.commands.main import main
from tests import eager

trace.trace = eager.empty  # an export without its longest part
torch.set_num_threads(1)  # a fork has one thread
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    signal.signal(number, handler)  # whoever runs the tests in the background has them ignored
pack.export(*sys.argv[1:])  # everything is imported now
PLACES = {
    "before": (pack, "sources", False),
    "tracing": (trace, "trace", True),
    "writing": (weights_file, "write", False),
    "manifest": (pack.manifests, "save_manifest", True),
    "renaming": (atomic, "take_place", False),
    "renamed": (atomic, "take_place", True),
    "removing": (shutil, "rmtree", True),
}

def strike(module, name, after, number):
    real = getattr(module, name)
    def struck(*args, **kwargs):
        if not after:
            os.kill(os.getpid(), number)
        found = real(*args, **kwargs)
        if after:
            os.kill(os.getpid(), number)
        return found
    setattr(module, name, struck)

for line in sys.stdin:
    moment, by, arguments = json.loads(line)
    if not (child := os.fork()):
        os.dup2(os.memfd_create("out"), 1)
        os.dup2(1, 2)
        strike(*PLACES[moment], getattr(signal, by))
        code = 255
        try:
            main(arguments, prog_name="lvlm-edge")
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush(), sys.stderr.flush()
        printed = os.pread(1, 10000, 0).decode().splitlines()
        os._exit(code if printed == ["lvlm-edge: stopped"] else 254)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def struck(good, tmp_path_factory) -> Iterator[Callable[..., int]]:
    """Exit code of a command that sends itself a signal at a moment.

    254 says that what it printed was not the one line that is right. Commands are forks of one process, since imports
    take longer than an export.
    """
    command = [sys.executable, "-c", FORKS, str(good), str(tmp_path_factory.mktemp("first") / "bundle")]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(moment: str, by: str, *arguments: object) -> int:
            process.stdin.write(tiny.dumps([moment, by, list(map(str, arguments))]) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run
        process.stdin.close()


def test_an_export_killed_at_any_moment_leaves_the_old_bundle_or_the_new_one(struck, good, place):
    old = tree(place / "old")
    moments = ("before", "tracing", "writing", "manifest", "renaming", "renamed", "removing")
    over = {place / moment / "old": moment for moment in moments}
    fresh = {place / moment / "new": moment for moment in ("writing", "renamed")}
    for output in over:
        shutil.copytree(place / "old", output)

    for output, moment in (over | fresh).items():
        export = ("export", good, "-o", output, "--force", *CAPACITY, "--num-images", 2)
        assert struck(moment, "SIGKILL", *export) == -signal.SIGKILL
        if moment in ("renamed", "removing"):
            assert open_bundle(output).manifest.counts.num_images == 2
        elif output in over:
            assert tree(output) == old
        else:
            assert not output.exists()
        partial = atomic.work_folder(output) / "partial"
        if moment in ("before", "tracing", "writing"):
            assert "has no manifest.json" in refused(5, "inspect", partial)


@pytest.mark.parametrize("moment", ["writing", "renamed"])
def test_the_next_export_cleans_up_after_a_killed_one(moment, struck, good, place):
    export = ("export", good, "-o", place / "old", "--force", *CAPACITY, "-q")
    assert struck(moment, "SIGKILL", *export) == -signal.SIGKILL
    assert {path.name for path in place.iterdir()} == {"old", ".old.lvlm-edge"}

    assert tiny.cli(*export).exit_code == 0

    assert [path.name for path in place.iterdir()] == ["old"]
    open_bundle(place / "old")


@pytest.mark.parametrize(
    ("moment", "by", "output"),
    [
        ("tracing", "SIGINT", "old"),
        ("writing", "SIGTERM", "old"),
        ("writing", "SIGINT", "deep/new"),
        ("manifest", "SIGTERM", "deep/new"),
        ("manifest", "SIGHUP", "old"),
    ],
)
def test_an_export_that_is_asked_to_stop_removes_what_it_began(moment, by, output, struck, good, place):
    before = tree(place)

    assert struck(moment, by, "export", good, "-o", place / output, "--force", *CAPACITY) == 130

    assert tree(place) == before


@pytest.mark.slow
@pytest.mark.parametrize("force", [True, False])
def test_an_export_killed_at_random_leaves_the_old_bundle_or_the_new_one(force, good, place):
    old, dice = tree(place / "old"), random.Random(0)
    output = place / ("old" if force else "new")
    export = ("export", good, "-o", output, "--force", *CAPACITY)
    for part in range(6):
        process = subprocess.Popen([sys.executable, "-m", "lvlm_edge.exporter.commands.main", *map(str, export)])
        time.sleep(6 * (part + dice.random()) / 6)
        process.kill()
        process.wait()
        if output.exists() and tree(output) != old:
            open_bundle(output)

    assert tiny.cli(*export).exit_code == 0
    open_bundle(output)
    assert {path.name for path in place.iterdir()} == {"old", output.name}


@pytest.mark.export
def test_a_second_export_to_the_same_place_is_refused_while_the_first_one_writes(good, tmp_path, monkeypatch):
    from lvlm_edge.exporter.bundles import weights_file

    real, said = weights_file.write, []

    def slow(*args):
        said.append(refused(2, "export", good, "-o", tmp_path / "bundle", "--force", *CAPACITY))
        return real(*args)

    monkeypatch.setattr(weights_file, "write", slow)

    assert tiny.cli("export", good, "-o", tmp_path / "bundle", *CAPACITY, "-q").exit_code == 0

    assert len(said) == 1 and "another export" in said[0]
    open_bundle(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


# Bundles; every way to damage one is in runtime/test_bundle.py.


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "BUNDLE", "--image", "PICTURE", "--prompt", "w5"],
        ["inspect", "BUNDLE", "--verify"],
        ["check", "BUNDLE", "--against", "CHECKPOINT"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("damage", ["byte", "missing", "link", "outside", "newer"])
def test_every_command_refuses_a_damaged_bundle(damage, arguments, none, good, picture, tmp_path):
    bundle = Path(shutil.copytree(none, tmp_path / "bundle"))
    weights, manifest = bundle / "weights.bin", bundle / "manifest.json"
    if damage == "byte":
        content = bytearray(weights.read_bytes())
        content[1000] ^= 1
        weights.write_bytes(content)
    elif damage == "newer":
        change_json(manifest, schema=SCHEMA + 1)
    elif damage == "outside":
        write_json(manifest, json.loads(manifest.read_text().replace('"decode.onnx"', '"../decode.onnx"')))
    else:
        weights.unlink()
        if damage == "link":
            weights.symlink_to(none / "weights.bin")
    before = tree(bundle)
    real = {"BUNDLE": bundle, "PICTURE": picture, "CHECKPOINT": good}

    message = refused(5, *(real.get(a, a) for a in arguments))

    assert {"byte": "altered", "missing": "missing", "link": "link", "outside": "outside", "newer": "newer"}[
        damage
    ] in message
    assert tree(bundle) == before

"""Bad settings, weights and head masks of ProxyV, YOPO and HiMix get one line and the right exit code."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import plan
from lvlm_edge.exporter.planning import PlanError
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.errors import InputError
from tests import originals
from tests.tiny import CAPACITY, change_json, refused, tree


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[..., Path]:
    """A checkpoint of a method, made once and not to be changed."""
    found: dict[str, Path] = {}

    def build(method: str) -> Path:
        if method not in found:
            options = {"method": "proxyv", "learn_proxy": True} if method == "learnt" else {"method": method}
            found[method] = originals.build(tmp_path_factory.mktemp(method), **options)
        return found[method]

    return build


@pytest.fixture
def spoilt(made, tmp_path) -> Callable[[str], Path]:
    """A copy of a checkpoint, to spoil."""
    return lambda method: Path(shutil.copytree(made(method), tmp_path / "checkpoint"))


def export_refused(code: int, folder: Path, tmp_path: Path, *options: str) -> str:
    """An export that fails with this code, one line with advice, and nothing written."""
    (tmp_path / "place").mkdir()
    message = refused(code, "export", folder, "-o", tmp_path / "place" / "bundle", *options, *CAPACITY)
    assert "; " in message, f"no advice: {message}"
    assert tree(tmp_path / "place") == {}
    return message


# A checkpoint's tensors.

IMG = "language_model.model.layers"
TENSORS = {
    "the update of the start layer is missing": ("proxyv", "vision_mlp_layers.0.", None, "lacks tensors"),
    "the update of the last layer is missing": ("proxyv", "vision_mlp_layers.1.", None, "lacks tensors"),
    "a part of an update is missing": ("proxyv", "vision_mlp_layers.0.layernorm_post.weight", None, "lacks tensors"),
    "an update has another width": ("proxyv", "vision_mlp_layers.0.proj.0.weight", (16, 64), "[16, 64], config.json"),
    "updates of more layers": ("proxyv", "+vision_mlp_layers.2.proj.0.weight", (32, 64), "holds vision_mlp_layers.2"),
    "an update has a part more": ("proxyv", "+vision_mlp_layers.0.proj.1.weight", (32,), "does not speak of"),
    "the separator is missing": ("proxyv", "image_newline", None, "lacks tensors: projector.newline"),
    "the separator has another width": ("proxyv", "image_newline", (32,), "image_newline is [32]"),
    "learnt proxies are missing": ("learnt", "proxyv_initializer.", None, "lacks tensors: proxyv_initializer"),
    "too few learnt proxies": ("learnt", "proxyv_initializer.proxyv_tokens", (3, 32), "is [3, 32], config.json"),
    "image keys of a layer are missing": ("himix", f"{IMG}.1.self_attn.k_proj_img.weight", None, "lacks tensors"),
    "image keys are misshapen": ("himix", f"{IMG}.1.self_attn.k_proj_img.weight", (64, 64), "is [64, 64], config"),
    "the images' norm is missing": ("himix", f"{IMG}.3.input_layernorm_img.weight", None, "lacks tensors"),
    "the images' norm is misshapen": ("himix", f"{IMG}.3.input_layernorm_img.weight", (64,), "is [64], config.json"),
    "a bias more": ("himix", f"+{IMG}.1.self_attn.v_proj_img.bias", (64,), "does not speak of"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_contradict_the_config_are_named(name, spoilt, tmp_path):
    method, key, shape, said = TENSORS[name]
    folder = spoilt(method)
    tensors = load_file(folder / "model.safetensors")
    key = key.replace("vision_mlp", "model.vision_mlp").replace("image_newline", "model.image_newline")
    key = key.replace("proxyv_initializer", "model.proxyv_initializer")
    hit = [k for k in tensors if k.startswith(key)]
    assert hit or key.startswith("+")
    for k in hit:
        del tensors[k]
    if shape is not None:
        tensors[key.removeprefix("+")] = torch.ones(shape)
    save_file(tensors, folder / "model.safetensors")

    message = export_refused(1, folder, tmp_path, "--method", "proxyv" if method == "learnt" else method)

    assert said in message


def test_proxies_that_were_not_learnt_cannot_be_asked_for(made, tmp_path):
    message = export_refused(1, made("proxyv"), tmp_path, "--method", "proxyv", "--learn-proxy", "true")

    assert "lacks tensors: proxyv_initializer" in message


# A method that is not the checkpoint's.


@pytest.mark.parametrize(
    ("code", "checkpoint", "options", "said"),
    [
        (3, "plain", ["--method", "proxyv"], "no ProxyV weights"),
        (3, "plain", ["--method", "himix"], "no HiMix weights"),
        (3, "yopo", ["--method", "proxyv", "--start-layer", "1"], "no ProxyV weights"),
        (3, "proxyv", ["--method", "himix"], "no HiMix weights"),
        (3, "himix", ["--method", "proxyv"], "no ProxyV weights"),
        (3, "proxyv", ["--method", "yopo", *["--window", "3", "--cutoff", "2", "--ffn-ratio", "2"]], "has separators"),
        (3, "himix", ["--method", "yopo", *["--window", "3", "--cutoff", "2", "--ffn-ratio", "2"]], "has no projector"),
        (3, "proxyv", ["--method", "fastv", "--prune-layer", "1"], "separators"),
        (2, "plain", ["--method", "yopo"], "give --window, --cutoff, --ffn-ratio or --head-mask"),
        (2, "proxyv", ["--method", "proxyv", "--num-images", "2"], "2 images, but it is defined for one"),
        (2, "yopo", ["--method", "yopo", "--num-images", "2"], "2 images, but it is defined for one"),
        (3, "proxyv", ["--method", "proxyv", "--share-weights"], "leave out --share-weights"),
        (3, "yopo", ["--method", "yopo", "--share-weights"], "leave out --share-weights"),
        (3, "himix", ["--method", "himix", "--share-weights"], "leave out --share-weights"),
        (2, "yopo", ["--method", "yopo", "--grid", "1x2"], "any-resolution"),
        (2, "himix", ["--method", "himix", "--grid", "1x2"], "any-resolution"),
        (2, "proxyv", ["--method", "proxyv", "--grid", "4x4"], "choose one of 2x1"),
        (2, "proxyv", ["--method", "proxyv", "--window", "3"], "has no option --window"),
        (2, "himix", ["--method", "himix", "--start-layer", "3"], "has no option --start-layer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_method_that_does_not_fit_the_checkpoint_is_refused(code, checkpoint, options, said, made, tmp_path):
    assert said in refused(code, "plan", made(checkpoint), *options)
    assert said in export_refused(code, made(checkpoint), tmp_path, *options)


# Settings.


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("proxyv", ["--start-layer", "4"], "layers 0..3"),
        ("proxyv", ["--start-layer", "-1"], "layers 0..3"),
        ("proxyv", ["--start-layer", "x"], "--start-layer"),
        ("proxyv", ["--reduce-factor", "3"], "does not divide a grid of 16 tokens"),
        ("proxyv", ["--reduce-factor", "0"], "does not divide"),
        ("proxyv", ["--learn-proxy", "x"], "--learn-proxy"),
        ("yopo", ["--semantics", "droped"], "did you mean dropped?"),
        ("yopo", ["--window", "0"], "at least 1, or none"),
        ("yopo", ["--window", "2.5"], "--window"),
        ("yopo", ["--window", "off"], "window is 'off', expected a whole number, at least 1, or none"),
        ("yopo", ["--cutoff", "5"], "1..4"),
        ("yopo", ["--cutoff", "0"], "1..4"),
        ("yopo", ["--ffn-ratio", "0"], "1..128"),
        ("yopo", ["--ffn-ratio", "nan"], "1..128"),
        ("yopo", ["--ffn-ratio", "inf"], "1..128"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_out_of_range_is_refused(method, options, said, made, tmp_path):
    assert said in refused(2, "plan", made(method), "--method", method, *options)
    assert said in export_refused(2, made(method), tmp_path, "--method", method, *options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("proxyv", {"start_layer": "1"}),
        ("proxyv", {"start_layer": 1.5}),
        ("proxyv", {"reduce_factor": [2]}),
        ("yopo", {"window": 2.5}),
        ("yopo", {"cutoff": 1.5}),
        ("yopo", {"ffn_ratio": "2"}),
    ],
    ids=str,
)
def test_an_option_of_another_kind_is_refused_from_python_too(method, options, made):
    with pytest.raises(PlanError, match=next(iter(options))):
        plan(made(method), method=method, **options)


FIELDS: dict[str, dict[str, list[Any]]] = {
    "proxyv": {
        "proxyv": ["x", 3],
        "proxyv_start_layer": ["x", 2.5, -1, 4, True, [1]],
        "proxyv_reduce_factor": ["x", 0, -2, 2.0, [2]],
        "learn_proxy": ["false", 3],
        "num_of_vision_mlp_layers": [7, "x", 1],
    },
    "yopo": {
        "attncut_w": [2.5, "x", 0, -1, True, [3]],
        "layercut_num": [99, 0, "x", 1.5, [1]],
        "mlpcut_ratio": [0, -1, "x", 0.5, 1e9, float("inf")],
        "headcut_num": ["x", "*", 1.5, -1, [2]],
        "sprompt_len": ["x", -1, 2.5],
    },
}


@pytest.mark.parametrize(("method", "field"), [(m, field) for m, fields in FIELDS.items() for field in fields])
def test_a_field_that_no_checkpoint_can_have_is_named(method, field, spoilt, tmp_path):
    folder = spoilt(method)
    for value in FIELDS[method][field]:
        change_json(folder / "config.json", **{field: value})

        message = refused(1, "plan", folder, "--method", method)

        assert f"{field} is {value!r}" in message or f"{field} {value!r}" in message
        assert "correct" in message
    assert field in export_refused(1, folder, tmp_path, "--method", method)


@pytest.mark.parametrize(
    ("method", "field", "flag"),
    [
        ("proxyv", "proxyv_start_layer", "--start-layer"),
        ("yopo", "layercut_num", "--cutoff"),
        ("yopo", "mlpcut_ratio", "--ffn-ratio"),
    ],
)
def test_a_setting_that_the_config_lacks_is_asked_for(method, field, flag, spoilt, tmp_path):
    folder = spoilt(method)
    change_json(folder / "config.json", **{field: None})

    assert f"give {flag}" in export_refused(2, folder, tmp_path, "--method", method)
    assert plan(folder, method=method, **{flag[2:].replace("-", "_"): 2})["method"] == method


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"window": 3}, (3, 4, 1)),
        ({"window": "none"}, ("none", 4, 1)),
        ({"cutoff": 2}, ("none", 2, 1)),
        ({"ffn_ratio": 2.0}, ("none", 4, 2.0)),
        ({"head_mask": ("1010",) * 4}, ("none", 4, 1)),
    ],
    ids=str,
)
def test_without_training_what_is_not_given_is_off(given, expected, made):
    found = plan(made("plain"), method="yopo", **given)["config"]

    assert (found["window"], found["cutoff"], found["ffn_ratio"]) == expected
    assert found["head_mask"] == given.get("head_mask", ("1111",) * 4)


def test_a_window_of_a_trained_checkpoint_can_be_taken_off(made):
    assert plan(made("yopo"), method="yopo")["config"]["window"] == 3
    assert plan(made("yopo"), method="yopo", window="none")["config"]["window"] == "none"


# Head masks.


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _zipped(path: Path, _: bytes) -> None:
    np.savez(path.with_suffix(".npz"), mask=np.ones((4, 4), bool))
    path.with_suffix(".npz").rename(path)


def _array(array: Any) -> Callable[[Path, bytes], None]:
    return lambda path, _: np.save(path, array, allow_pickle=True)


MASKS: dict[str, tuple[Callable[[Path, bytes], None], str]] = {
    "another number of layers": (_array(np.ones((3, 4), bool)), "bool [3, 4], expected bool [4, 4]"),
    "heads by layers of another model": (_array(np.ones((4, 8), bool)), "bool [4, 8], expected bool [4, 4]"),
    "flat": (_array(np.ones(16, bool)), "bool [16], expected bool [4, 4]"),
    "numbers": (_array(np.ones((4, 4))), "float64 [4, 4], expected bool"),
    "objects": (_array(np.array([[{}] * 4] * 4, object)), "cannot be read as .npy"),
    "text": (lambda path, _: _write(path, b"1111"), "cannot be read as .npy"),
    "empty": (lambda path, _: _write(path, b""), "cannot be read as .npy"),
    "cut off": (lambda path, whole: _write(path, whole[:-3]), "cannot be read as .npy"),
    "cut off in its header": (lambda path, whole: _write(path, whole[:20]), "cannot be read as .npy"),
    "a damaged archive": (lambda path, _: _write(path, b"PK\x03\x04" + bytes(40)), "cannot be read as .npy"),
    "an archive": (_zipped, "expected bool [4, 4]"),
    "a folder": (lambda path, _: path.mkdir(), "file"),
    "missing": (lambda path, _: None, "file"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_head_mask_that_cannot_be_the_models_is_refused(kind, spoilt, tmp_path):
    make, said = MASKS[kind]
    folder = spoilt("yopo")
    whole = (folder / "headmask.npy").read_bytes()
    given = tmp_path / "given.npy"
    make(given, whole)
    said_of_flag = refused(2, "plan", folder, "--method", "yopo", "--head-mask", given)
    (folder / "headmask.npy").unlink()
    make(folder / "headmask.npy", whole)

    said_of_own = export_refused(1, folder, tmp_path, "--method", "yopo")

    assert str(given) in said_of_flag and said in said_of_flag and "--head-mask" in said_of_flag
    assert str(folder / "headmask.npy") in said_of_own and said in said_of_own and "--head-mask" in said_of_own


def test_a_missing_head_mask_is_no_matter_where_it_is_not_read(spoilt, made):
    folder = spoilt("yopo")
    (folder / "headmask.npy").unlink()

    assert plan(folder, method="none")["method"] == "none"
    given = plan(folder, method="yopo", head_mask=str(made("yopo") / "headmask.npy"))
    assert given["config"]["head_mask"][2] == "0000"
    for kept in (4, None):  # all heads, and nothing said
        change_json(folder / "config.json", headcut_num=kept)
        assert plan(folder, method="yopo")["config"]["head_mask"] == ("1111",) * 4


# Bundles.


def test_pictures_and_prompts_that_are_not_the_bundles_are_refused(made, eager_once):
    proxyv = Pipeline.load(eager_once(made("proxyv"), method="proxyv", grid=(1, 2)))
    himix = Pipeline.load(eager_once(made("himix"), method="himix"))
    prompt, three = originals.prompt(12, 5), originals.pixels(crops=3).numpy()

    with pytest.raises(InputError, match=r"100x100 goes on tiles of 2x2, the bundle has 1x2.*--image-size 100x100"):
        proxyv.generate_tokens(prompt, three, image_sizes=[(100, 100)])
    with pytest.raises(InputError, match=r"pixel_values: is \[1, 3, 56, 56\], the bundle is planned for \[3, "):
        proxyv.generate_tokens(prompt, three[:1])
    with pytest.raises(InputError, match=r"^pixel_values: is nothing, the bundle is planned for 1 image\(s\)"):
        proxyv.generate_tokens(prompt, None)
    with pytest.raises(InputError, match=r"^prompt: has 0 image\(s\), the bundle is planned for 1; give 1, or"):
        proxyv.generate_tokens(prompt[:5], three)
    with pytest.raises(InputError, match="2 image"):
        proxyv.generate_tokens(originals.prompt(12, 5, images=2), three)
    with pytest.raises(InputError, match="no text"):
        himix.generate_tokens([originals.IMAGE], three[:1])
    with pytest.raises(InputError, match="0 image"):
        himix.generate_tokens(prompt[:5], three[:1])


@pytest.mark.parametrize(
    ("code", "bundle", "checkpoint", "said"),
    [
        (3, "himix", "plain", "himix: this checkpoint has no HiMix weights"),
        (3, "proxyv", "yopo", "proxyv: this checkpoint has no ProxyV weights"),
        (1, "plain", "himix", "visual tokens: 15, the bundle has 16"),
        (1, "plain", "proxyv", "separators: True, the bundle has False"),
    ],
)
def test_check_refuses_a_checkpoint_that_was_not_exported(code, bundle, checkpoint, said, made, eager_once):
    folder = eager_once(made(bundle), method="none" if bundle == "plain" else bundle)

    assert said in refused(code, "check", folder, "--against", made(checkpoint))

    assert not (folder / "certificate.json").exists()


def test_another_start_layer_than_the_trained_one_can_be_planned_and_not_exported(made, tmp_path):
    assert plan(made("proxyv"), method="proxyv", start_layer=3)["stages"][0]["layers"] == [0, 2]

    message = export_refused(3, made("proxyv"), tmp_path, "--method", "proxyv", "--start-layer", "3")

    assert "trained from layer 2 on" in message


def test_a_plan_counts_with_the_heads_that_config_json_says_where_the_mask_is_missing(spoilt):
    folder = spoilt("yopo")
    (folder / "headmask.npy").unlink()
    kept = 2 / 4

    found = plan(folder, method="yopo")

    v, d, m = 16, 64, 128  # `originals.build`: window 3, cutoff 2 of 4 layers, half of the FFN
    cost = 2 * 2 * (kept * (4 * v * d**2 + 2 * v * 9 * d) + 3 * v * d * m / 2)
    assert found["paper"]["value"] * 1e12 == pytest.approx(cost)

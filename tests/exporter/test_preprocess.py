from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from lvlm_edge.exporter.checkpoints import preprocess
from lvlm_edge.runtime.errors import UnsupportedError
from lvlm_edge.runtime.pictures import image

REFERENCES = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
}
CONFIGS: list[dict[str, Any]] = [
    {"image_processor_type": "CLIPImageProcessor"},
    {"image_processor_type": "LlavaImageProcessor"},
    {"image_processor_type": "SiglipImageProcessor"},
    {"image_processor_type": "CLIPImageProcessor", "size": 96, "crop_size": 80},
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 90}, "crop_size": [70, 60]},
    {"image_processor_type": "CLIPImageProcessor", "size": {"height": 50, "width": 70}, "do_center_crop": False},
    {"image_processor_type": "CLIPImageProcessor", "size": [50, 70], "do_center_crop": False},
    {"image_processor_type": "CLIPImageProcessor", "size": 50, "default_to_square": True, "do_center_crop": False},
    {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "crop_size": {"height": 60, "width": 80}},
    {"image_processor_type": "CLIPImageProcessor", "do_normalize": False, "resample": 2},
    {"image_processor_type": "CLIPImageProcessor", "do_rescale": False, "resample": 0},
    {"image_processor_type": "CLIPImageProcessor", "rescale_factor": 1 / 127.5, "image_mean": 0.5, "image_std": 0.25},
    {"image_processor_type": "CLIPImageProcessor", "do_pad": None, "image_mean": None, "do_normalize": None},
    {"image_processor_type": "CLIPImageProcessor", "do_pad": True},
    {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
    {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": False},
    {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "image_mean": [0.1, 0.5, 0.999]},
    {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_normalize": False},
    {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_normalize": False, "image_mean": None},
    {"image_processor_type": "CLIPImageProcessor", "do_resize": None, "size": None, "resample": None},
    {"image_processor_type": "SiglipImageProcessor", "size": {"height": 84, "width": 70}},
    {"image_processor_type": "SiglipImageProcessor", "do_center_crop": True, "crop_size": 64},
]


def pixels(width: int, height: int) -> PIL.Image.Image:
    random = np.random.default_rng(0)
    return PIL.Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(130, 61), (61, 130)])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_config_gives_the_pixels_of_the_processor_it_names(config: dict[str, Any], size: tuple[int, int]) -> None:
    arguments = {key: value for key, value in config.items() if key != "image_processor_type"}
    processor = REFERENCES[config["image_processor_type"]](**arguments)
    made = pixels(*size)

    how = preprocess.read(config, default_size=224)

    reference = processor(images=made, return_tensors="np")["pixel_values"]
    # 1e-6 of the largest value: without rescaling, values are in the hundreds.
    tolerance = 1e-6 * max(1.0, float(np.abs(reference).max()))
    np.testing.assert_allclose(image.preprocess(made, how), reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_saved_processor_is_read_back(kind: str) -> None:
    saved = REFERENCES[kind]().to_dict()

    assert preprocess.read(saved, default_size=224) == preprocess.read({"image_processor_type": kind}, default_size=224)


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
@pytest.mark.parametrize("kind", REFERENCES)
def test_the_backend_in_the_name_makes_no_difference(kind: str, suffix: str) -> None:
    plain = preprocess.read({"image_processor_type": kind}, default_size=224)

    assert preprocess.read({"image_processor_type": kind + suffix}, default_size=224) == plain


def test_the_old_name_of_an_image_processor_is_understood() -> None:
    old = preprocess.read({"feature_extractor_type": "CLIPFeatureExtractor", "size": 64}, default_size=224)

    assert old == preprocess.read({"image_processor_type": "CLIPImageProcessor", "size": 64}, default_size=224)


def test_a_missing_size_is_that_of_the_vision_encoder() -> None:
    how = preprocess.read({"image_processor_type": "CLIPImageProcessor"}, default_size=336)

    assert (how.shortest_edge, how.crop) == (336, (336, 336))


def test_the_padding_colour_is_the_mean_rounded_down() -> None:
    how = preprocess.read({"image_processor_type": "LlavaImageProcessor", "do_pad": True}, default_size=224)

    assert how.pad_to_square == (122, 116, 104)


def test_without_a_config_the_defaults_of_the_vision_encoder_are_taken() -> None:
    clip = preprocess.for_config_only(336, "clip")
    siglip = preprocess.for_config_only(384, "siglip")

    assert clip == preprocess.read({"image_processor_type": "CLIPImageProcessor"}, default_size=336)
    assert siglip == preprocess.read({"image_processor_type": "SiglipImageProcessor"}, default_size=384)


def test_an_unknown_image_processor_is_reported_with_the_nearest_one() -> None:
    with pytest.raises(UnsupportedError, match="did you mean SiglipImageProcessor"):
        preprocess.read({"image_processor_type": "Siglip2ImageProcessor"}, default_size=224)


def test_an_unknown_vision_encoder_is_reported() -> None:
    with pytest.raises(UnsupportedError, match="known: clip, siglip"):
        preprocess.for_config_only(224, "dino")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": {"longest_edge": 300}}, "size is"),
        ({"size": {"shortest_edge": 300, "longest_edge": 400}}, "size is"),
        ({"size": "big"}, "size is"),
        ({"size": None}, "size is"),
        ({"crop_size": None}, "crop_size is"),
        ({"image_mean": None}, "expected a number"),
        ({"size": 0}, "above 0"),
        ({"size": True}, "above 0"),
        ({"size": {"height": 10.5, "width": 10}}, "whole number"),
        ({"size": [1, 2, 3]}, "size is"),
        ({"crop_size": {"shortest_edge": 224}}, "crop_size is"),
        ({"do_center_crop": False}, "depends on the picture"),
        ({"do_center_crop": False, "do_resize": False}, "depends on the picture"),
        ({"resample": 9}, "expected 0..5"),
        ({"image_mean": [0.5]}, "expected 3"),
        ({"image_std": "x"}, "expected a number"),
        ({"do_pad": True, "pad_size": {"height": 9, "width": 9}}, "pad_size"),
    ],
)
def test_a_config_that_cannot_be_used_is_reported_on_one_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says) as error:
        preprocess.read({"image_processor_type": "CLIPImageProcessor", **values}, default_size=224)

    assert "\n" not in str(error.value)

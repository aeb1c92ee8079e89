"""Checkpoints that are quantised already: what their integers stand for, and that bundles keep them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import export, plan
from lvlm_edge.exporter.bundles import ratios
from lvlm_edge.exporter.checkpoints import integers as prequantised
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError
from lvlm_edge.exporter.checkpoints.integers import compressed
from lvlm_edge.exporter.devices import engine
from lvlm_edge.exporter.devices.engine import Settings
from lvlm_edge.exporter.proof import parity
from lvlm_edge.exporter.references import stored
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle import WeightFormats, open_bundle
from tests import checkpoints, layouts, packed, tiny
from tests.packed import SCHEMES, Made
from tests.tiny import CAPACITY, refused

FASTV = {"method": "fastv", "prune_layer": 1, "keep_ratio": 0.5}
ROOM = {"max_text_tokens": 24, "max_new_tokens": 8}
Q = "language_model.model.layers.0.self_attn.q_proj"


def index_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint's names stand for, packed integers as one matrix."""
    return prequantised.index(Checkpoint(folder, json.loads((folder / "config.json").read_text("utf-8"))))


@pytest.fixture(scope="module")
def source(checkpoint_once) -> Path:
    """A checkpoint of two layers whose input channels are 64 and 128."""
    return checkpoint_once(
        seed=3,
        text={"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        vision={"image_size": 28, "num_hidden_layers": 2},
    )


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A quantised checkpoint beside its twin in floats, made once."""
    found: dict[str, Made] = {}

    def build(name: str, which: str = packed.DECODER, **config) -> Made:
        key = repr((name, which, config))
        if key not in found:
            scheme = replace(SCHEMES[name], config=SCHEMES[name].config | config)
            found[key] = packed.build(source, tmp_path_factory.mktemp("packed"), scheme, which)
        return found[key]

    return build


def same_tensors(folder: Path, name: str, pieces: dict[str, torch.Tensor], config: dict, wanted: list) -> None:
    """Both readers of the formats make the wanted matrix of some tensors."""
    folder.mkdir()
    save_file({f"{name}.{end}": tensor for end, tensor in pieces.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    matrix = index_of(folder)[f"{name}.weight"]
    assert prequantised.tensor(matrix).tolist() == wanted
    assert stored.state(folder)[f"{name}.weight"].tolist() == wanted


def int32(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


# What the formats' own libraries make of numbers, run once on these and written down.

SCALES = torch.tensor([[2.0 ** (-i % 5) for i in range(16)], [2.0 ** (i % 4 - 2) for i in range(16)]]).half()


def test_awq_is_read_as_autoawq_reads_it(tmp_path):
    """`awq.utils.packing_utils.dequantize_gemm` of AutoAWQ 0.2.9."""
    pieces = {
        "qweight": int32([[1985229328, -305419896], [253635900, -1], [324508639, 610839776], [-324508639, 1611526157]]),
        "qzeros": int32([[19088743, -1985229329], [-252645135, 1515852340]]),
        "scales": SCALES,
    }
    wanted = [
        [-7.0, 5.0, 3.5, 0.0], [16.0, 176.0, 3.5, 4.0], [-40.0, -24.0, -2.0, -13.0], [12.0, -4.0, -20.0, -10.0],
        [-6.0, 16.0, 2.75, 1.0], [5.0, 14.0, 1.5, 6.0], [-16.0, -32.0, -6.0, -9.0], [56.0, 0.0, -28.0, -2.0],
        [-28.0, 0.0, -1.0, 2.25], [0.0, 8.0, -1.0, 1.5], [-6.0, 1.0, 11.0, -3.0], [32.0, 80.0, 2.0, -10.0],
        [-32.0, 16.0, 2.5, -0.5], [16.0, 24.0, -3.0, -5.0], [-4.0, 6.0, 9.0, 14.0], [6.0, 7.0, -6.0, 2.0],
    ]  # fmt: skip

    same_tensors(tmp_path / "awq", "a", pieces, {"quant_method": "awq", "bits": 4, "group_size": 2}, wanted)


GPTQ = {
    "gptq": [
        [0.0, 1.0, 2.0, 3.0, 0.5, 0.75, 1.0, 1.25], [0.0, 0.0, 16.0, 32.0, 5.5, 6.0, 6.5, 7.0],
        [48.0, -24.0, 56.0, -32.0, 12.0, -1.0, 13.0, -2.0], [40.0, 40.0, 40.0, 40.0, 30.0, 30.0, 30.0, 30.0],
        [22.0, 18.0, 14.0, 10.0, 1.25, 0.75, 0.25, -0.25], [-3.0, 11.0, 9.0, 7.0, 4.0, 3.0, 2.0, 1.0],
        [-16.0, 0.0, 32.0, 64.0, 6.0, 8.0, 10.0, 12.0], [96.0, -8.0, -8.0, 112.0, 26.0, 0.0, 0.0, 12.0],
    ],
    "gptq_v2": [
        [-15.0, -14.0, -13.0, -12.0, 0.75, 1.0, 1.25, 1.5], [32.0, 32.0, 48.0, 64.0, -2.0, -1.5, -1.0, -0.5],
        [56.0, -16.0, 64.0, -24.0, 14.0, 1.0, 15.0, 0.0], [44.0, 44.0, 44.0, 44.0, 0.0, 0.0, 0.0, 0.0],
        [24.0, 20.0, 16.0, 12.0, 1.75, 1.25, 0.75, 0.25], [-2.0, 12.0, 10.0, 8.0, -3.5, -4.5, -5.5, -6.5],
        [0.0, 16.0, 48.0, 80.0, 8.0, 10.0, 12.0, 14.0], [104.0, 0.0, 0.0, 120.0, -4.0, -30.0, -30.0, -18.0],
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", GPTQ)
def test_gptq_is_read_as_gptqmodel_reads_it(form, tmp_path):
    """`convert_gptq_v1_to_v2_format_module` and `dequantize_weight` of GPTQModel 7.7.0; a zero point of 0 borrows."""
    words = [1985229328, -305419896, 253635900, -1, 324508639, 610839776, -324508639, 1611526157]
    pieces = {
        "qweight": int32([words]),
        "qzeros": int32([[19088751], [-252645135]]),
        "scales": SCALES[:, :8].contiguous(),
        "g_idx": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.int32),
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": 4, "sym": False, "checkpoint_format": form}

    same_tensors(tmp_path / "gptq", "a", pieces, config, GPTQ[form])


PACKED = {
    4: (
        [[1049950800, -1239649576], [1640443267, -380656373]],
        [
            [-8, -3, 2, 7, -4, 1, 6, -5, 0, 5, -6, -1, 4, -7, -2, 3],
            [-5, 0, 5, -6, -1, 4, -7, -2, 3, -8, -3, 2, 7, -4, 1, 6],
        ],
    ),
    8: (
        [[2052403211, 250201247], [-1568843725, 907144391]],
        [[-117, -80, -43, -6, 31, 68, 105, -114], [-77, -40, -3, 34, 71, 108, -111, -74]],
    ),
}


@pytest.mark.parametrize("bits", PACKED)
def test_packed_integers_are_those_of_compressed_tensors(bits, tmp_path):
    """`pack_to_int32` of compressed-tensors 0.20.0."""
    words, values = PACKED[bits]
    pieces = {
        "weight_packed": int32(words),
        "weight_scale": torch.tensor([[0.5], [2.0]]),
        "weight_shape": torch.tensor([2, len(values[0])]),
    }
    wanted = (np.array(values) * [[0.5], [2.0]]).tolist()

    same_tensors(tmp_path / "p", "a", pieces, packed.compressed("pack-quantized", bits, None), wanted)


def test_packed_zero_points_are_those_of_compressed_tensors(tmp_path):
    """`pack_to_int32(zero_point, 4, packed_dim=0)` of compressed-tensors 0.20.0."""
    zeros = np.array([[-8, 0], [3, 7], [1, -2]])
    pieces = {
        "weight_packed": int32([[-2004318072] * 8] * 3),  # 0 everywhere
        "weight_scale": torch.ones(3, 2),
        "weight_shape": torch.tensor([3, 64]),
        "weight_zero_point": int32([[2480, 1784]]),
    }

    config = packed.compressed("pack-quantized", 4, 32, False)
    same_tensors(tmp_path / "p", "a", pieces, config, (-zeros.repeat(32, 1)).astype(float).tolist())


# Whole checkpoints.


@pytest.mark.parametrize("name", SCHEMES)
def test_a_matrix_is_read_as_what_it_stands_for(name, made):
    one = made(name)
    index, reference = index_of(one.folder), stored.state(one.folder)
    twin = load_file(one.twin / "model.safetensors")

    assert set(index) == set(reference) == set(twin)
    for module, wanted in one.matrices.items():
        matrix = index[f"{module}.weight"]
        assert matrix.shape == wanted.weight.shape
        assert np.array_equal(prequantised.tensor(matrix).numpy(), wanted.weight)
        assert np.array_equal(reference[f"{module}.weight"].numpy(), wanted.weight)
        assert (prequantised.zero_points(matrix) is None) == one.scheme.symmetric


FULL = {
    "awq": FASTV,
    "gptq, zero points": {},
    "gptq of 8 bits, zero points": {"lowering": "legacy"},
    "packed": {},
    "packed, one scale per channel": FASTV,
    "int-quantized": {},
}


@pytest.fixture
def bundle(made, export_once):
    def build(name: str, **options) -> Path:
        return export_once(made(name).folder, **ROOM, **options)

    return build


def failed(verdict: parity.Verdict) -> set[str]:
    """Stages that did not pass; a checkpoint's twin in floats has another config.json, and nothing else."""
    return {row.stage for row in verdict.rows if not row.passed}


@pytest.mark.parametrize("name", FULL)
def test_a_bundle_says_what_stock_transformers_says_with_the_same_values(name, made, bundle):
    """Against the twin in floats, by stock `generate` where every token stays and by the reference of FastV."""
    folder, options = bundle(name, **FULL[name]), FULL[name]

    if "method" in options:
        assert failed(parity.check(folder, made(name).twin, steps=4, store=False)) == {"config"}
    else:
        ids, pixels = checkpoints.prompt(20, 5), checkpoints.pixels(28)
        tokens, logits = checkpoints.generate(made(name).twin, ids, pixels, 6)
        pipe = Pipeline.load(folder, portable=True, exact=True)
        found = pipe.generate_tokens(ids, pixels, max_new_tokens=6, ignore_eos=True)
        assert found.token_ids == tokens
        assert np.abs(found.logits - logits).max() < 1e-4  # rounding of sums in another order
    bits = SCHEMES[name].bits
    formats = open_bundle(folder).manifest.formats
    assert (formats.decoder, formats.vision, formats.head) == (f"int{bits}", "as-is", "as-is")


def part(module: str) -> str:
    """A decoder matrix's name in graphs."""
    return re.sub(r".*(layers.*)[.](self_attn|mlp)", r"\1", module) + ".weight"


def initializers(bundle: Path, graph: str = "decode") -> dict[str, np.ndarray]:
    """What a graph's file has under every name, as ONNX reads it."""
    model = onnx.load(bundle / f"{graph}.onnx")
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


@pytest.mark.parametrize("name", FULL)
def test_the_integers_and_scales_in_the_file_are_the_checkpoints_own(name, made, bundle):
    one, tensors = made(name), initializers(bundle(name, **FULL[name]))
    middle = 2 ** (one.scheme.bits - 1)
    for module, wanted in one.matrices.items():
        weight = part(module)
        integers, scale = tensors[weight].astype(np.int64), tensors[f"{weight}.scale"]
        assert np.array_equal(integers, wanted.integers.T - middle)
        scales = wanted.scales.astype(np.float32).T
        groups = scale if scale.ndim == 2 else scale[None]
        assert np.array_equal(groups, scales.repeat(len(groups) // len(scales), 0))
        assert (f"{weight}.shift" in tensors) == (not one.scheme.symmetric)
        if not one.scheme.symmetric:
            block = len(integers) // len(groups)
            shift = groups * (middle - wanted.zeros.T) * block
            assert np.array_equal(tensors[f"{weight}.shift"], shift.astype(np.float32))


@pytest.mark.parametrize("name", ["awq", "int-quantized"])
def test_check_reads_the_integers_by_itself(name, made, bundle):
    one = made(name)

    verdict = parity.check(bundle(name, **FULL[name]), one.folder, steps=4, store=False)

    assert verdict.passed, verdict.first_failure
    assert "loss" not in {row.stage for row in verdict.rows}  # nothing was rounded by the export


def test_a_changed_integer_is_caught(made, bundle, tmp_path):
    one = made("awq")
    folder = Path(shutil.copytree(one.folder, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.qzeros"][1, 2] ^= 0x70
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    assert not parity.check(bundle("awq", **FASTV), folder, steps=4, store=False).passed


@pytest.mark.parametrize(
    "more", [{"share_weights": True}, pytest.param({"dtype": "float16"}, marks=pytest.mark.slow)], ids=str
)
def test_zero_points_in_shared_and_float16_graphs(more, made, bundle):
    verdict = parity.check(bundle("awq", **FASTV, **more), made("awq").folder, steps=4, store=False)

    assert verdict.passed, verdict.first_failure


def test_another_keep_ratio_reads_the_same_integers(made, bundle, tmp_path):
    folder = Path(shutil.copytree(bundle("awq", **FASTV), tmp_path / "bundle"))

    ratios.add(folder, 0.25)

    verdict = parity.check(folder, made("awq").folder, steps=4, keep_ratio=0.25, store=False)
    assert verdict.passed, verdict.first_failure


@pytest.mark.parametrize("name", ["awq", "int-quantized"])
def test_float_makes_floats_of_them(name, made, export_once):
    folder = export_once(made(name).folder, **ROOM, weights="float")

    assert open_bundle(folder).manifest.formats == WeightFormats()
    weights = initializers(folder)
    module, wanted = next(iter(made(name).matrices.items()))
    weight = part(module)
    assert np.array_equal(weights[weight], wanted.weight.T)
    assert parity.check(folder, made(name).folder, steps=4, store=False).passed


def test_other_formats_are_rounded_anew(made, export_once):
    folder = export_once(made("awq").folder, **ROOM, weights="int8")

    verdict = parity.check(folder, made("awq").folder, steps=4, store=False)

    assert verdict.passed, verdict.first_failure
    assert "loss" in {row.stage for row in verdict.rows}
    assert open_bundle(folder).manifest.formats == WeightFormats(decoder="int8", head="int8")


def test_input_channels_in_another_order_are_read_but_not_kept(made, tmp_path):
    one, folder = made("gptq"), tmp_path / "checkpoint"
    shutil.copytree(one.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.g_idx"] = tensors[f"{Q}.g_idx"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    message = refused(3, "export", folder, "-o", tmp_path / "bundle", *CAPACITY)

    assert f"{Q}.weight" in message and "g_idx" in message and "--weights int8 or float" in message
    index, reference = index_of(folder), stored.state(folder)
    assert torch.equal(prequantised.tensor(index[f"{Q}.weight"]), reference[f"{Q}.weight"])


def test_empty_biases_of_autogptq_are_left_out_and_others_are_not(made, tmp_path):
    folder = Path(shutil.copytree(made("gptq").folder, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"{module}.bias": torch.zeros(len(one.weight)) for module, one in made("gptq").matrices.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    plain = set(index_of(made("gptq").folder))

    assert set(index_of(folder)) == set(stored.state(folder)) == plain
    tensors[f"{Q}.bias"] = torch.ones(64)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    others = {name for name in tensors if name.endswith("q_proj.bias") and "vision" not in name}
    assert set(index_of(folder)) == set(stored.state(folder)) == plain | others
    assert f"{Q}.bias" in refused(1, "export", folder, "-o", tmp_path / "bundle", *CAPACITY)


def test_activations_that_are_meant_to_be_rounded_are_not(made, tmp_path):
    """W8A8: the scales of activations, dynamic or static, are no weights."""
    folder = Path(shutil.copytree(made("int-quantized").folder, tmp_path / "checkpoint"))
    config = json.loads(json.dumps(made("int-quantized").scheme.config))
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "dynamic": False}
    tiny.change_json(folder / "config.json", quantization_config=config)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"{Q}.input_scale": torch.ones(1), f"{Q}.input_zero_point": torch.zeros(1, dtype=torch.int8)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    index, reference = index_of(folder), stored.state(folder)

    assert set(index) == set(reference) == set(load_file(made("int-quantized").twin / "model.safetensors"))


def test_pickled_checkpoints_are_read_too(made, tmp_path):
    one = made("gptq, zero points")
    shutil.copy(one.folder / "config.json", tmp_path)
    torch.save(load_file(one.folder / "model.safetensors"), tmp_path / "pytorch_model.bin")

    found = index_of(tmp_path)[f"{Q}.weight"]

    assert np.array_equal(prequantised.tensor(found).numpy(), one.matrices[Q].weight)


def test_a_zero_point_counts_where_config_says_that_there_are_none(made, tmp_path):
    one = made("gptq, zero points")
    folder = Path(shutil.copytree(one.folder, tmp_path / "checkpoint"))
    tiny.change_json(folder / "config.json", quantization_config=one.scheme.config | {"sym": True})

    found = index_of(folder)[f"{Q}.weight"]

    assert np.array_equal(prequantised.tensor(found).numpy(), one.matrices[Q].weight)
    assert prequantised.zero_points(found) is not None


def test_every_part_may_be_quantised_or_not(source, made, export_once):
    """Matrices that config.json lets be quantised but are floats stay so; those of the encoder and the head count."""
    few = made("packed", r"(layers\.1\.mlp\.\w+_proj|layers\.\d\.self_attn\.[qkv]_proj|lm_head|linear_[12])", ignore=[])
    assert any("vision_tower" in name for name in few.matrices)

    folder = export_once(few.folder, **ROOM)

    formats = open_bundle(folder).manifest.formats
    assert formats == WeightFormats(decoder="int4", vision="int4", head="int4", block=32)
    kinds = {name: values.dtype for name, values in initializers(folder).items()}
    assert kinds["layers.0.up_proj.weight"] == kinds["layers.0.o_proj.weight"] == np.float32
    assert str(kinds["layers.1.up_proj.weight"]) == str(kinds["lm_head.weight"]) == "int4"
    assert parity.check(folder, few.folder, steps=4, store=False).passed


@pytest.mark.export
@pytest.mark.parametrize("decoder", [pytest.param("llama", marks=pytest.mark.slow), "phi3"])
def test_llava_original_layout_and_its_fused_matrices(decoder, tmp_path):
    layouts.build(tmp_path / decoder, decoder=decoder)
    one = packed.build(tmp_path / decoder, tmp_path / f"{decoder}-awq", SCHEMES["awq"])
    bundle = export(one.folder, tmp_path / f"{decoder}-bundle", **ROOM, **FASTV)

    for folder in (one.folder, one.twin):
        verdict = parity.check(bundle, folder, steps=4, store=False)
        assert failed(verdict) == ({"config"} if folder == one.twin else set()), verdict.first_failure
    assert open_bundle(bundle).manifest.formats.decoder == "int4"


@pytest.mark.export
@pytest.mark.parametrize(
    ("method", "more"),
    [
        pytest.param("proxyv", {}, marks=pytest.mark.slow),
        ("yopo", {"semantics": "dropped"}),
        pytest.param("himix", {}, marks=pytest.mark.slow),
    ],
    ids=["proxyv", "yopo", "himix"],
)
def test_other_methods_have_zero_points_too(method, more, original, tmp_path):
    one = packed.build(original(method=method, side=8), tmp_path, SCHEMES["gptq, zero points"])
    bundle = export(one.folder, tmp_path / "bundle", method=method, **more, **ROOM)

    for folder in (one.folder, one.twin):
        verdict = parity.check(bundle, folder, steps=4, store=False)
        assert failed(verdict) == ({"config"} if folder == one.twin else set()), verdict.first_failure


@pytest.mark.parametrize("name", ["awq", "packed", "gptq of 8 bits, zero points"])
def test_a_plan_from_config_alone_has_the_bytes_of_the_file(name, made, bundle, tmp_path):
    shutil.copy(made(name).folder / "config.json", tmp_path)
    folder = bundle(name)
    counts = open_bundle(folder).manifest.counts
    tables = (counts.prompt_tokens + 8) * 16 * 4

    found = plan(tmp_path, **ROOM, device="cpu")

    size = (folder / "weights.bin").stat().st_size
    assert size == pytest.approx(found["weights_bytes"] + tables, rel=0.03)
    floats = plan(tmp_path, **ROOM, weights="float")
    assert found["weights_bytes"] < 0.6 * floats["weights_bytes"]


# What is refused.

W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
REFUSED = {
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
    "fp8": ({"quant_method": "fp8"}, "quant_method is 'fp8'"),
    "no method": ({"bits": 4}, "quant_method is None"),
    "awq gemv": ({"quant_method": "awq", "version": "gemv"}, "version is 'gemv'"),
    "awq of llm-awq": ({"quant_method": "awq", "backend": "llm-awq"}, "backend is 'llm-awq'"),
    "awq of 3 bits": ({"quant_method": "awq", "bits": 3}, "bits is 3"),
    "awq in groups of 16": ({"quant_method": "awq", "group_size": 16}, "per 16 input channels"),
    "gptq of 3 bits": ({"quant_method": "gptq", "bits": 3}, "bits is 3"),
    "gptq of 2 bits": ({"quant_method": "gptq", "bits": 2}, "bits is 2"),
    "gptq for marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is"),
    "gptq of marlin's": ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is_marlin_format is True"),
    "gptq of 8 bits in groups": ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "8-bit integers with a scale"),
    "gptq with other bits inside": (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}},
        "dynamic has {'bits': 8}",
    ),
    "float8": (packed.compressed("float-quantized", 8, None), "format is 'float-quantized'"),
    "nvfp4": (packed.compressed("nvfp4-pack-quantized", 4, 16), "format is 'nvfp4-pack-quantized'"),
    "marlin 2:4": (packed.compressed("marlin-24", 4, 32), "format is 'marlin-24'"),
    "3 bits": (packed.compressed("pack-quantized", 3, 32), "num_bits is 3"),
    "8 bits in groups": (packed.compressed("pack-quantized", 8, 32), "8-bit integers with a scale per 32"),
    "sparse": (
        packed.compressed("pack-quantized", 4, 32, sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config's format is 'sparse-24-bitmask'",
    ),
    "rotated": (
        packed.compressed("pack-quantized", 4, 32, transform_config={"config_groups": {"u": {}}}),
        "transform_config is",
    ),
    "not compressed": (
        packed.compressed("pack-quantized", 4, 32, quantization_status="frozen"),
        "quantization_status is 'frozen'",
    ),
    "caches too": (packed.compressed("pack-quantized", 4, 32, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is"),
    "two schemes": (
        packed.compressed("pack-quantized", 4, 32)
        | {"config_groups": {"a": {"weights": W8}, "b": {"weights": W8 | {"num_bits": 4}}}},
        "its 2 config_groups quantise weights in different ways",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_from_config_alone(name, made, tmp_path):
    config, said = REFUSED[name]
    shutil.copy(made("packed").folder / "config.json", tmp_path)
    tiny.change_json(tmp_path / "config.json", quantization_config=config)

    message = refused(3, "plan", tmp_path)

    assert "quantization_config" in message and said in message and "; " in message


def test_what_is_quantised_inside_the_text_config_is_found(made, tmp_path):
    one = made("packed")
    shutil.copytree(one.folder, tmp_path / "checkpoint")
    content = tiny.read_json(one.folder / "config.json")
    content["text_config"]["quantization_config"] = content.pop("quantization_config")
    tiny.write_json(tmp_path / "checkpoint" / "config.json", content)

    index, reference = index_of(tmp_path / "checkpoint"), stored.state(tmp_path / "checkpoint")

    assert isinstance(index[f"{Q}.weight"], prequantised.Packed)
    assert torch.equal(prequantised.tensor(index[f"{Q}.weight"]), reference[f"{Q}.weight"])
    assert plan(tmp_path / "checkpoint") == plan(one.folder)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("group_size", "32", "group_size is '32'"),
        ("group_size", 0, "group_size is 0"),
        ("zero_point", "yes", "zero_point is 'yes'"),
        (None, None, "has no quantization_config"),
        (None, 3, "quantization_config is int"),
    ],
)
def test_a_config_that_cannot_be_is_refused(key, value, said, made, tmp_path):
    folder = Path(shutil.copytree(made("awq").folder, tmp_path / "checkpoint"))
    config = made("awq").scheme.config | {key: value} if key else value
    tiny.change_json(folder / "config.json", quantization_config=config)

    assert said in refused(1, "export", folder, "-o", tmp_path / "bundle", *CAPACITY)
    assert not (tmp_path / "bundle").exists()


DAMAGES = {
    "no scales": ("awq", {"scales": None}, "lacks", f"{Q}.scales"),
    "no zero points": ("awq", {"qzeros": None}, "lacks", f"{Q}.qzeros"),
    "no integers": ("awq", {"qweight": None}, "without qweight", Q),
    "flat integers": ("awq", {"qweight": torch.zeros(64, dtype=torch.int32)}, f"{Q}.qweight is [64]", "matrix"),
    "short integers": ("awq", {"qweight": torch.zeros(64, 7, dtype=torch.int32)}, f"{Q}.qzeros", "[2, 7]"),
    "integers of 64 bits": ("awq", {"qweight": torch.zeros(64, 8, dtype=torch.int64)}, "int64", "int32"),
    "few zero points": ("awq", {"qzeros": torch.zeros(1, 8, dtype=torch.int32)}, f"{Q}.qzeros", "[2, 8]"),
    "whole scales": ("awq", {"scales": torch.zeros(2, 64, dtype=torch.int32)}, f"{Q}.scales", "int32"),
    "scales that are no numbers": ("awq", {"scales": torch.full((2, 64), torch.nan)}, f"{Q}.weight", "not a number"),
    "groups that are not": ("gptq", {"g_idx": torch.full((64,), 2, dtype=torch.int32)}, f"{Q}.g_idx", "group 2 of 2"),
    "no shape": ("packed", {"weight_shape": None}, "lacks", f"{Q}.weight_shape"),
    "a shape that is none": ("packed", {"weight_shape": torch.tensor([64, -1])}, f"{Q}.weight_shape", "no shape"),
    "another shape": ("packed", {"weight_shape": torch.tensor([64, 32])}, f"{Q}.weight_scale", "[64, 1]"),
    "a matrix of another model": (
        "int-quantized",
        {"weight": torch.zeros(64, 32, dtype=torch.int8)},
        f"{Q}.weight is [64, 32]",
        "config.json says [64, 64]",
    ),
    "scales of groups": ("int-quantized", {"weight_scale": torch.zeros(64, 2)}, f"{Q}.weight_scale", "[64, 1]"),
}


@pytest.mark.export
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_pieces_are_named(name, made, tmp_path):
    scheme, changed, *said = DAMAGES[name]
    folder = Path(shutil.copytree(made(scheme).folder, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors") | {f"{Q}.{end}": tensor for end, tensor in changed.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})

    message = refused(1, "export", folder, "-o", tmp_path / "bundle", *CAPACITY, "-q")

    assert all(part in message for part in said) and "; " in message, message
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"ignore": [3]},
        {"ignore": "lm_head"},
        {"ignore": ["re:("]},
        {"sparsity_config": "dense"},
        {"config_groups": [1]},
    ],
    ids=str,
)
def test_fields_of_compressed_tensors_of_the_wrong_kind_are_named(changed, made, tmp_path):
    shutil.copy(made("packed").folder / "config.json", tmp_path)
    tiny.change_json(tmp_path / "config.json", quantization_config=made("packed").scheme.config | changed)

    message = refused(1, "plan", tmp_path)

    assert f"quantization_config: {next(iter(changed))} is" in message and "; " in message


def test_a_config_that_speaks_of_integers_where_there_are_none(made, tmp_path):
    folder = Path(shutil.copytree(made("awq").twin, tmp_path / "checkpoint"))
    tiny.change_json(folder / "config.json", quantization_config=made("awq").scheme.config)

    assert "holds no qweight" in refused(1, "export", folder, "-o", tmp_path / "bundle", *CAPACITY)


def test_integers_of_4_bits_are_not_for_opset_18(made, tmp_path):
    message = refused(3, "export", made("awq").folder, "-o", tmp_path / "bundle", *CAPACITY, "--lowering", "legacy")

    assert "no INT4" in message and "int8" in message


# TensorRT-RTX

WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 2}


# Zero points cost more here than their bytes: 8 rows of them are too few for a product. Of 2048 channels it is 0.58.
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("awq, groups of 64", 0.85),
        pytest.param("packed", 0.7, marks=pytest.mark.slow),
        pytest.param("int-quantized", 1.1, marks=pytest.mark.slow),
    ],
)
def test_tensorrt_rtx_keeps_the_integers_small(name, most, checkpoint_once, export_once, tmp_path):
    checkpoint = checkpoint_once(text={**WIDE, "num_key_value_heads": 4, "head_dim": 64})
    one = random_integers(checkpoint, tmp_path, SCHEMES[name])
    sizes = {}
    for weights in ("as-is", "float"):
        bundle = export_once(one, dtype="float16", weights=weights)
        out = engine.build(
            bundle, Settings(backend="trt-rtx", compute_capabilities=("8.6",)), graphs=("prefill", "decode")
        )
        sizes[weights] = sum(path.stat().st_size for path in out.glob("*.engine"))
    matrices = 2 * 2 * (512 * (2 * 512 + 2 * 256) + 3 * 512 * 1536)  # two engines of two layers

    assert 2 - (sizes["float"] - sizes["as-is"]) / matrices <= most


def random_integers(source: Path, out: Path, scheme: packed.Scheme) -> Path:
    """A checkpoint whose matrices are integers drawn at random: as large as one likes."""
    rng, folder = np.random.default_rng(0), Path(shutil.copytree(source, out / "checkpoint"))
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if re.search(packed.DECODER + r"\.weight$", name)]:
        outputs, inputs = tensors.pop(name).shape
        groups, module = inputs // (scheme.group or inputs), name.removesuffix(".weight")
        scales = torch.from_numpy(rng.uniform(0.001, 0.01, (outputs, groups)).astype(np.float16))

        def words(*shape: int) -> torch.Tensor:
            return torch.from_numpy(rng.integers(-(2**31), 2**31, shape).astype(np.int32))

        if scheme.pack is packed.awq:
            pieces = {"qweight": words(inputs, outputs // 8), "qzeros": words(groups, outputs // 8)}
            pieces["scales"] = scales.t().contiguous()
        elif scheme.pack is packed.packed:
            pieces = {"weight_packed": words(outputs, inputs // 8), "weight_scale": scales}
            pieces["weight_shape"] = torch.tensor([outputs, inputs])
        else:
            pieces = {"weight": words(outputs, inputs // 4).view(torch.int8), "weight_scale": scales}
        tensors |= {f"{module}.{end}": tensor for end, tensor in pieces.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tiny.change_json(folder / "config.json", quantization_config=scheme.config)
    return folder


def test_a_pattern_that_does_not_end_is_refused(monkeypatch):
    monkeypatch.setattr(compressed, "SECONDS", 0.2)

    assert compressed._named("re:.*self_attn.*", ["model.layers.0.self_attn"])
    with pytest.raises(CheckpointError, match=r"the pattern '\(a\|aa\)\+\$' takes longer than 0\.2 s on 'aaa"):
        compressed._named("re:(a|aa)+$", ["a" * 60 + "b"])


MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
}


@pytest.mark.parametrize("command", ["plan", "export"])
def test_fp8_by_modelopt_is_named(command, checkpoint_once, tmp_path):
    folder = Path(shutil.copytree(checkpoint_once(), tmp_path / "checkpoint"))
    tiny.write_json(folder / "hf_quant_config.json", MODELOPT)
    output = ("-o", tmp_path / "bundle") if command == "export" else ()

    message = refused(3, command, folder, *output)

    assert "hf_quant_config.json: the checkpoint is quantised to FP8 by modelopt" in message
    assert "give the checkpoint that it was made from" in message
    assert not (tmp_path / "bundle").exists()


def test_fp8_by_modelopt_is_named_where_config_says_so(made, tmp_path):
    shutil.copy(made("packed").folder / "config.json", tmp_path)
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}}
    tiny.change_json(tmp_path / "config.json", quantization_config=config)

    assert "quantised to NVFP4 by modelopt" in refused(3, "plan", tmp_path)


def test_modelopts_file_of_a_checkpoint_that_it_left_in_floats(checkpoint_once, tmp_path):
    folder = Path(shutil.copytree(checkpoint_once(), tmp_path / "checkpoint"))
    tiny.write_json(folder / "hf_quant_config.json", MODELOPT | {"quantization": {"quant_algo": None}})

    assert tiny.cli("plan", folder).exit_code == 0


def test_fp8_that_no_file_speaks_of_is_named(checkpoint_once, tmp_path):
    folder = Path(shutil.copytree(checkpoint_once(), tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), name + "_scale": torch.ones(())}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    assert f"quantised to FP8 ({name} is F8_E4M3)" in refused(1, "export", folder, "-o", tmp_path / "bundle")

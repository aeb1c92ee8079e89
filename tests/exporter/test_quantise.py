"""Weights as small integers: what is in the file of weights, what the graphs make of it, and what TensorRT keeps."""

from __future__ import annotations

import copy
import itertools
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from lvlm_edge.exporter import export, plan
from lvlm_edge.exporter.checkpoints import quantise
from lvlm_edge.exporter.devices import engine
from lvlm_edge.exporter.devices.engine import Settings
from lvlm_edge.exporter.ort import form
from lvlm_edge.exporter.planning import PlanError
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.backends import ort
from lvlm_edge.runtime.bundle import open_bundle
from lvlm_edge.runtime.errors import UnsupportedError, UsageError
from tests import checkpoints
from tests.cases import some
from tests.tiny import sign

FASTV = {"method": "fastv", "prune_layer": 2, "keep_ratio": 0.5}
FORMATS = {
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "block_size": 32},
    "all int8": {"weights": "int8", "vision_weights": "int8"},
    "all int4, blocks of 128": {
        "weights": "int4", "vision_weights": "int4", "head_weights": "int4"
    },
    "head alone": {"head_weights": "int8"},
    "int4, prompts int8": {"weights": "int4", "block_size": 32, "prompt_weights": "int8"},
}  # fmt: skip


def weight(model: onnx.ModelProto, folder: Path, name: str) -> np.ndarray:
    """A weight [in, out] as a graph's file has it, from its integers and scales and nothing of ours."""
    (node,) = (n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == name)
    found = {a.name: a.i for a in node.attribute}
    tensors = {t.name: t for t in model.graph.initializer}
    raw = {}
    for key in node.input:
        where = {entry.key: entry.value for entry in tensors[key].external_data}
        with (folder / where["location"]).open("rb") as file:
            file.seek(int(where["offset"]))
            raw[key] = file.read(int(where["length"]))
    rows, columns = tensors[name].dims
    if tensors[name].data_type == onnx.TensorProto.INT4:
        packed = np.frombuffer(raw[name], np.uint8)
        halves = np.stack([packed & 15, packed >> 4], 1).reshape(-1).astype(np.int8)
        integers = np.where(halves > 7, halves - 16, halves).reshape(rows, columns)
        assert found["axis"] == 0
    else:
        integers = np.frombuffer(raw[name], np.int8).reshape(rows, columns)
        assert found["axis"] == 1 and "block_size" not in found
    scale = np.frombuffer(raw[node.input[1]], np.float32).reshape(tuple(tensors[node.input[1]].dims))
    return integers * (scale.repeat(found["block_size"], 0) if "block_size" in found else scale)


@pytest.mark.parametrize(("kind", "share"), [("int8", 1 / 127), ("int4", 1 / 6.5)])
def test_a_weight_is_no_farther_from_its_own_than_half_a_step(gqa, export_once, kind, share):
    from safetensors.numpy import load_file

    bundle = export_once(gqa, **FORMATS[kind])
    model = onnx.load(bundle / "decode.onnx", load_external_data=False)
    stored = load_file(gqa / "model.safetensors")
    (name,) = (n for n in stored if n.endswith("layers.1.mlp.down_proj.weight"))
    wanted = stored[name].T

    found = weight(model, bundle, "layers.1.down_proj.weight")

    blocks = (1, len(wanted)) if kind == "int8" else (len(wanted) // 32, 32)
    step = np.abs(wanted.reshape(*blocks, -1)).max(1) * share
    assert (np.abs(found - wanted).reshape(*blocks, -1).max(1) <= step * (0.501 if kind == "int8" else 1.0)).all()
    assert np.abs(found - wanted).max() > 0


def test_int4_takes_the_nearest_grid_of_each_block():
    torch.manual_seed(0)
    matrix = torch.randn(64, 24)
    how = quantise.Format(4, 32)

    scale = quantise.scales(matrix, how, torch.float32)

    plain = matrix.reshape(2, 32, 24).abs().amax(1) / 7
    nearest, rough = (
        (quantise.integers(matrix, s, how) * s.repeat_interleave(32, 0) - matrix).square().sum() for s in (scale, plain)
    )
    assert nearest < 0.97 * rough


def test_zeros_stay_zeros():
    for how in (quantise.Format(8), quantise.Format(4, 32)):
        matrix = torch.zeros(64, 8)
        scale = quantise.scales(matrix, how, torch.float16)
        packed = torch.cat(list(quantise.packed(matrix, how, scale)))
        assert scale.isfinite().all() and (scale > 0).all() and (packed == 0).all()


@pytest.mark.parametrize("name", [name for name in FORMATS if "prompts" not in name])  # which test_as_run.py has
def test_graphs_say_what_pytorch_says_with_the_rounded_weights(gqa, export_once, name):
    bundle = export_once(gqa, **FASTV, **FORMATS[name])

    verdict = parity.check(bundle, gqa, steps=8, store=False)

    assert verdict.passed, verdict.first_failure
    judged = [row for row in verdict.rows if row.bound is not None]
    told = [row for row in verdict.rows if row.bound is None]
    assert {row.stage for row in told} == {"loss"} and len(judged) > 20
    assert all(row.figure > 0 and " tokens are the checkpoint's" in row.note for row in told)


METHODS = {"proxyv": ("proxyv", {}), "himix": ("himix", {})}
METHODS |= {f"yopo, {semantics}": ("yopo", {"semantics": semantics}) for semantics in ("released", "dropped")}


@pytest.mark.parametrize(("name", "kind"), some(itertools.product(METHODS, ("int8", "int4")), {("proxyv", "int4")}))
def test_every_method_has_small_weights(original, export_once, name, kind):
    method, more = METHODS[name]
    checkpoint = original(method=method, side=8)
    bundle = export_once(checkpoint, method=method, vision_weights=kind, **more, **FORMATS[kind])

    verdict = parity.check(bundle, checkpoint, steps=4, store=False)

    assert verdict.passed, verdict.first_failure


@pytest.mark.parametrize(
    "more",
    [{"share_weights": True}, {"lowering": "legacy"}, pytest.param({"dtype": "float16"}, marks=pytest.mark.slow)],
)
def test_shared_legacy_and_float16_graphs_have_them_too(gqa, export_once, more):
    verdict = parity.check(export_once(gqa, **FASTV, **FORMATS["int8"], **more), gqa, steps=4, store=False)

    assert verdict.passed, verdict.first_failure


def overwrite(bundle: Path, graph: str, name: str, content: bytes) -> None:
    """Change the first bytes of a tensor that a graph reads from the file of weights, and the hashes with it."""
    model = onnx.load(bundle / graph, load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    offset = next(int(e.value) for e in tensor.external_data if e.key == "offset")
    with (bundle / "weights.bin").open("r+b") as file:
        file.seek(offset)
        file.write(content)
    sign(bundle)


def test_a_changed_scale_is_caught(gqa, export_once, tmp_path):
    bundle = Path(shutil.copytree(export_once(gqa, **FORMATS["int8"]), tmp_path / "bundle"))
    overwrite(bundle, "decode.onnx", "layers.1.q_proj.weight.scale", np.float32(1).tobytes())

    verdict = parity.check(bundle, gqa, steps=4, store=False)

    assert not verdict.passed
    assert verdict.first_failure.stage == "weights"
    assert verdict.first_failure.note.startswith("first in layers.1.q_proj.weight")
    assert {"prefill caches", "prefill logits"} & {row.stage for row in verdict.rows if not row.passed}


def to_8_bits(weight: torch.Tensor) -> torch.Tensor:
    step = weight.abs().amax(1, keepdim=True) / 127
    return torch.round(weight / step) * step


def test_prompts_are_computed_with_8_bits_and_tokens_with_4(gqa, export_once):
    """The first logits are those of 8 bits but for the rounding of activations."""
    bundle = export_once(gqa, **FORMATS["int4, prompts int8"])
    prompt, pixels = checkpoints.prompt(20, 5), checkpoints.pixels()
    pipe = Pipeline.load(bundle)
    found = pipe.generate_tokens(prompt, pixels, max_new_tokens=1).logits
    only = Pipeline.load(export_once(gqa, **FORMATS["int4"])).generate_tokens(prompt, pixels, max_new_tokens=1).logits
    model = copy.deepcopy(checkpoints.stock(gqa))
    for layer in model.model.language_model.layers:
        for module in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            module.weight.data = to_8_bits(module.weight.data)
    head = model.lm_head
    head.weight = torch.nn.Parameter(to_8_bits(head.weight.data))  # is the embedding's no longer, which stays

    image, each = model.config.image_token_id, pipe.manifest.counts.visual_tokens
    ids = torch.tensor([[t for i in prompt for t in ([i] * each if i == image else [i])]])
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=torch.from_numpy(pixels)).logits[0, -1].numpy()

    errors = [np.abs(one[0] - wanted).max() / np.abs(wanted).max() for one in (found, only)]
    assert errors[0] < min(0.04, errors[1] / 2), errors  # activations are rounded to 8 bits
    graphs = {g.role: onnx.load(bundle / g.file, load_external_data=False) for g in pipe.manifest.variants["ort"]}
    kinds = {
        role: {t.data_type for t in model.graph.initializer if "_proj.weight" in t.name and "scale" not in t.name}
        for role, model in graphs.items()
        if role != "image"
    }
    assert kinds == {"prefill": {onnx.TensorProto.INT8}, "decode": {onnx.TensorProto.INT4}}


def test_a_changed_matrix_of_prompts_is_caught(gqa, export_once, tmp_path):
    bundle = Path(shutil.copytree(export_once(gqa, **FORMATS["int4, prompts int8"]), tmp_path / "bundle"))
    overwrite(bundle, "prefill.onnxruntime", "layers.1.q_proj.weight.prompt", bytes(range(60, 70)))

    verdict = parity.check(bundle, gqa, steps=2, store=False)

    assert verdict.first_failure.stage == "weights"
    assert verdict.first_failure.note.startswith("first in layers.1.q_proj.weight.prompt")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"weights": "int8", "prompt_weights": "int8"}, PlanError, "is for INT4 matrices, the decoder's are int8"),
        ({"prompt_weights": "int8"}, PlanError, "the decoder's are as-is"),
        ({"weights": "int4", "prompt_weights": "int4"}, UnsupportedError, "'int4' is not supported; expected int8"),
        ({"weights": "int4", "prompt_weights": "int8", "dtype": "float16"}, PlanError, "--dtype float16"),
        ({"weights": "int4", "prompt_weights": "int8", "share_weights": True}, PlanError, "--share-weights"),
        ({"weights": "int4", "prompt_weights": "int8", "ort": False}, UsageError, "give ort=True"),
    ],
)
def test_a_format_for_prompts_that_cannot_be_is_refused(gqa, tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        export(gqa, tmp_path / "bundle", **options)

    assert not (tmp_path / "bundle").exists()


def test_other_methods_have_no_format_for_prompts(original, tmp_path):
    with pytest.raises(UnsupportedError, match="proxyv: its prompts read the formats of --weights alone"):
        export(original(method="proxyv"), tmp_path / "bundle", method="proxyv", weights="int4", prompt_weights="int8")


def test_what_blocks_do_not_divide_is_int8(checkpoint_once, export_once):
    checkpoint = checkpoint_once(text={"intermediate_size": 112})
    bundle = export_once(checkpoint, **FORMATS["int4"])
    model = onnx.load(bundle / "decode.onnx", load_external_data=False)

    kinds = {t.name: t.data_type for t in model.graph.initializer}

    assert kinds["layers.0.down_proj.weight"] == onnx.TensorProto.INT8
    assert kinds["layers.0.up_proj.weight"] == onnx.TensorProto.INT4
    assert parity.check(bundle, checkpoint, steps=4, store=False).passed


@pytest.mark.parametrize(
    ("name", "tied"),
    some(
        itertools.product(FORMATS, (True, False)),
        {(n, t) for n, t in itertools.product(FORMATS, (True, False)) if t or "prompts" not in n},
    ),
)
def test_the_file_of_weights_has_the_planned_bytes(checkpoint_once, eager_once, export_once, name, tied):
    checkpoint = checkpoint_once(text={"tie_word_embeddings": tied}, tie_word_embeddings=tied)
    found = plan(checkpoint, **FORMATS[name], max_text_tokens=64, max_new_tokens=16)
    bundle = (export_once if "prompts" in name else eager_once)(checkpoint, **FORMATS[name])
    counts = open_bundle(bundle).manifest.counts
    tables = (counts.prompt_tokens + 16) * 16 * 4

    assert (bundle / "weights.bin").stat().st_size == pytest.approx(found["weights_bytes"] + tables, rel=0.03)


def test_rows_are_rounded_by_their_own_size(tmp_path):
    """Small rows beside large ones keep their digits: a scale for all rows, or the first one's, would lose them."""
    rng = np.random.default_rng(0)
    size, wide, rows = 64, 48, (rng.standard_normal((1, 7, 64)) * 10.0 ** np.arange(-3, 4)[:, None]).astype(np.float32)
    integers, scale = rng.integers(-127, 128, (size, wide)).astype(np.int8), rng.random(wide, np.float32)
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1),
        onnx.helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    kind = onnx.TensorProto.FLOAT
    ends = [[onnx.helper.make_tensor_value_info(n, kind, [1, 7, k])] for n, k in (("x", size), ("y", wide))]
    constants = [onnx.numpy_helper.from_array(a, n) for a, n in ((integers, "q"), (scale, "s"))]
    graph = onnx.helper.make_graph(nodes, "g", *ends, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "plain")

    form.convert(tmp_path / "plain", tmp_path / "integer")

    (found,) = ort.load(onnxruntime, tmp_path / "integer").run(None, {"x": rows})
    wanted = rows @ (integers * scale)
    error = np.abs(found - wanted).max(-1) / np.abs(wanted).max(-1)
    assert (error > 1e-5).any() and (error < 0.02).all()
    operators = [n.op_type for n in onnx.load(tmp_path / "integer").graph.node]
    assert "MatMulIntegerToFloat" in operators and "DequantizeLinear" not in operators


def test_products_with_small_integers_are_computed_on_integers(gqa, export_once):
    bundle = export_once(gqa, **FASTV, **FORMATS["all int8"])
    products = 0
    for graph in open_bundle(bundle).manifest.variants["ort"]:
        if graph.role != "decode" and graph.name != "select":
            model = onnx.load(bundle / graph.file, load_external_data=False)
            products += sum(node.op_type == "MatMulIntegerToFloat" for node in model.graph.node)

    encoder, projector, decoder, head = 6 * 2, 2, 7 * 4, 1  # the encoder's last layer is not built
    assert products == encoder + projector + decoder + head


def test_exact_and_as_run_differ_but_little(gqa, export_once):
    bundle, prompt, pixels = export_once(gqa, **FORMATS["int4"]), checkpoints.prompt(20, 5), checkpoints.pixels()

    exact, quick = (
        Pipeline.load(bundle, exact=flag, portable=flag).generate_tokens(prompt, pixels, max_new_tokens=1)
        for flag in (True, False)
    )

    difference = np.abs(exact.logits - quick.logits).max() / np.abs(exact.logits).max()
    assert 1e-6 < difference < 0.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "int5"}, UnsupportedError, r"weights: 'int5' is not supported"),
        ({"head_weights": "fp8"}, UnsupportedError, r"head_weights: 'fp8' is not supported"),
        ({"weights": "int4", "block_size": 64}, PlanError, r"block_size: 64, expected 32 or 128"),
        ({"weights": "int4", "lowering": "legacy"}, UnsupportedError, r"legacy lowering, has no INT4"),
    ],
)
def test_formats_that_cannot_be_are_refused(gqa, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        export(gqa, tmp_path / "bundle", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.export
def test_values_that_are_no_numbers_are_refused(gqa, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(gqa, tmp_path / "checkpoint"))
    stored = load_file(folder / "model.safetensors")
    (name,) = (n for n in stored if n.endswith("layers.1.mlp.down_proj.weight"))
    stored[name][3, 4] = float("nan")
    save_file(stored, folder / "model.safetensors")

    with pytest.raises(Exception, match=r"down_proj.weight: holds values that are infinite or not a number"):
        export(folder, tmp_path / "bundle", weights="int8", max_text_tokens=64, max_new_tokens=16)
    assert not (tmp_path / "bundle").exists()


# A decoder large enough that an engine's own code does not count: 6.3 M weights in matrices.
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 2}


@pytest.mark.parametrize(("kind", "most"), [("int8", 1.1), ("int4", 0.62)])
def test_tensorrt_rtx_keeps_small_weights_small(checkpoint_once, export_once, kind, most):
    checkpoint = checkpoint_once(text={**WIDE, "num_key_value_heads": 4, "head_dim": 64})
    sizes = {}
    for weights in ("as-is", kind):
        bundle = export_once(checkpoint, dtype="float16", weights=weights, head_weights="as-is")
        out = engine.build(
            bundle, Settings(backend="trt-rtx", compute_capabilities=("8.6",)), graphs=("prefill", "decode")
        )
        sizes[weights] = sum(path.stat().st_size for path in out.glob("*.engine"))
    matrices = 2 * 2 * (512 * (2 * 512 + 2 * 256) + 3 * 512 * 1536)  # two engines of two layers

    saved = (sizes["as-is"] - sizes[kind]) / matrices

    assert 2 - saved <= most


def test_one_weight_of_two_products_is_stored_once(tmp_path):
    """As ONNX Runtime reads it: with weights outside the graph, and signed ones made unsigned where a CPU needs it."""
    rng = np.random.default_rng(0)
    integers, scale = rng.integers(-127, 128, (64, 48)).astype(np.int8), np.ones(48, np.float32)
    nodes = [onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1)]
    nodes += [onnx.helper.make_node("MatMul", [x, "w"], [y]) for x, y in (("a", "c"), ("b", "d"))]
    kind = onnx.TensorProto.FLOAT
    ends = [
        [onnx.helper.make_tensor_value_info(n, kind, [1, 7, k]) for n in names] for names, k in (("ab", 64), ("cd", 48))
    ]
    constants = [onnx.numpy_helper.from_array(a, n) for a, n in ((integers, "q"), (scale, "s"))]
    graph = onnx.helper.make_graph(nodes, "g", *ends, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, tmp_path / "plain", save_as_external_data=True, location="weights.bin", size_threshold=1024)
    size = (tmp_path / "weights.bin").stat().st_size

    form.convert(tmp_path / "plain", tmp_path / "integer")

    assert size == integers.nbytes == (tmp_path / "weights.bin").stat().st_size
    rows = [rng.integers(-127, 128, (1, 7, 64)).astype(np.float32) for _ in "ab"]
    for row in rows:
        row[..., 0] = 127  # so that a step is 1 and nothing is rounded
    found = ort.load(onnxruntime, tmp_path / "integer").run(None, dict(zip("ab", rows, strict=True)))
    for own, row in zip(found, rows, strict=True):
        np.testing.assert_allclose(own, row @ integers.astype(np.float32), rtol=1e-5, atol=0.05)

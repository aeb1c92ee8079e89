"""Quantised checkpoints: what folding leaves equal, what the library and transformers read back, what rounding costs.

The library is compressed-tensors, which vLLM reads such checkpoints with.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import export, planning, quantize, references
from lvlm_edge.exporter.bundles import plans
from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.planning import Capacity, Model
from lvlm_edge.exporter.proof import parity
from lvlm_edge.exporter.quantisation import calibrate, rounding, write
from lvlm_edge.exporter.quantisation.gather import gather
from lvlm_edge.exporter.quantisation.samples import Case, cases_of, read_samples
from lvlm_edge.exporter.quantisation.smooth import smooth
from lvlm_edge.exporter.references import original
from lvlm_edge.runtime.bundle import open_bundle
from lvlm_edge.runtime.errors import LvlmEdgeError, UnsupportedError, UsageError
from tests import checkpoints, layouts, originals, tiny
from tests.tiny import cli, refused, tree

pytestmark = pytest.mark.export

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
MATRIX = re.compile(r"(^|\.)layers\.\d+\.(self_attn\.(q|k|v|o|qkv)|mlp\.(gate|up|gate_up|down))_proj\.weight$")


def in_decoder(key: str) -> bool:
    return MATRIX.search(key) is not None and "vision" not in key


# Checkpoints whose channels differ in size, but which compute the same as without that.


def uneven(folder: Path, kv_heads: int, heads: int, by: float = 16.0) -> Path:
    """Every eleventh channel of what matrices read `by` times as large, and their columns smaller: no model is other.

    HiMix's images have values of their own, which o_proj reads too.
    """
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer in sorted({m[0] for key in tensors if (m := re.search(r"^.*layers\.\d+\.(?=input_layernorm\.)", key))}):
        part = {key.removeprefix(layer): tensors[key] for key in tensors if key.startswith(layer)}
        _scale(part, "input_layernorm", ("q_proj", "k_proj", "v_proj", "qkv_proj"), by)
        _scale(part, "post_attention_layernorm", ("gate_proj", "up_proj", "gate_up_proj"), by)
        _scale(part, "up_proj" if "mlp.up_proj.weight" in part else "gate_up_proj", ("down_proj",), by)
        maker, each = "v_proj" if "self_attn.v_proj.weight" in part else "qkv_proj", heads // kv_heads
        _scale(part, maker, ("o_proj",), by, each, heads)
    save_file(tensors, file, {"format": "pt"})
    return folder


def _scale(
    part: dict[str, Any], maker: str, readers: tuple[str, ...], by: float, each: int = 1, heads: int = 1
) -> None:
    """Larger gains or rows of the maker in place, the readers' columns smaller; `each` heads read the same rows."""
    columns = next(t for key, t in part.items() if key.endswith("weight") and key.split(".")[-2] in readers).shape[1]
    made = torch.ones(columns // each)
    made[::11] = by
    read = made.view(-1, 1, columns // heads).expand(-1, each, -1).reshape(-1) if each > 1 else made
    for key, tensor in part.items():
        module = key.split(".")[-2]
        if module in readers:
            if key.endswith("weight"):
                tensor /= read
        elif module == maker or (maker, module) == ("v_proj", "v_proj_img"):
            tensor[-len(made) :] *= made if tensor.dim() == 1 else made[:, None]


def talking(folder: Path, image: bool = True) -> Path:
    """With a tokenizer and picture settings of 28 x 28 or, for `layouts`, 56 x 56."""
    tiny.tokenizer().save(str(folder / "tokenizer.json"))
    tiny.write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    size = 28 if image else 56
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}, "crop_size": size}
    tiny.write_json(folder / "preprocessor_config.json", settings)
    return folder


def hub(folder: Path, kv_heads: int = 4, **changed: Any) -> Path:
    """A checkpoint in the hub's layout with uneven channels."""
    text = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": kv_heads}
    text |= changed.pop("text", {})
    vision = {"image_size": 28, "num_hidden_layers": 2}
    checkpoints.build(folder, text=text, vision=vision, **changed)
    return talking(uneven(folder, kv_heads, 4))


def original_layout(folder: Path, kv_heads: int = 4, decoder: str = "llama") -> Path:
    """One in LLaVA's original layout, its tower beside it."""
    layouts.build(folder, decoder=decoder, text={"num_key_value_heads": kv_heads})
    return talking(uneven(folder, kv_heads, 4), image=False)


LAYOUTS = {"hub": hub, "original": original_layout}


@pytest.fixture(scope="module", params=[("hub", 4), ("hub", 2), ("original", 4), ("original", 2)])
def uneven_one(request, tmp_path_factory) -> Path:
    """A checkpoint with uneven channels: each layout, MHA and GQA."""
    layout, kv_heads = request.param
    return LAYOUTS[layout](tmp_path_factory.mktemp("uneven") / f"{layout}-{kv_heads}", kv_heads)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return hub(tmp_path_factory.mktemp("one") / "checkpoint")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of noise pictures, and a file that is none."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


# What stock transformers says.


@torch.no_grad()
def logits(folder: Path, seed: int) -> NDArray[np.float32]:
    """Of a held-out picture of noise and a seeded prompt, [rows, vocab], by stock modules."""
    if tiny.read_json(folder / "config.json")["model_type"] == "llava":
        model = checkpoints.stock.__wrapped__(folder)
        ids = checkpoints.prompt(12, 4, seed=seed)
        count = 4
        expanded = torch.tensor([[t for i in ids for t in ([i] * count if i == checkpoints.IMAGE else [i])]])
        pixels = torch.from_numpy(checkpoints.pixels(28, seed=seed))
        mask = torch.ones_like(expanded)
        return model(input_ids=expanded, pixel_values=pixels, attention_mask=mask).logits[0].numpy()
    stock = layouts.load(folder)
    ids = layouts.prompt(seed=seed)
    embed = stock.decoder.get_input_embeddings()
    seen = stock.seen(checkpoints.pixels(56, seed=seed))
    rows = torch.cat([seen if i == layouts.IMAGE else embed(torch.tensor([i])) for i in ids])
    return stock.decoder(inputs_embeds=rows[None]).logits[0].numpy()


def error(found: Path, wanted: Path) -> float:
    """Root mean square of logits' differences on held-out pictures, over that of the logits."""
    pairs = [(logits(found, seed), logits(wanted, seed)) for seed in range(100, 104)]
    return float(np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)))


# What is in the files, by numpy alone.


def by_hand(tensors: dict[str, torch.Tensor], name: str) -> NDArray[np.float32]:
    """A packed matrix, integers times scales, [out, in]."""
    packed = tensors[f"{name}.weight_packed"].numpy().view(np.uint32)
    integers = ((packed[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15).astype(np.int64) - 8
    scale = tensors[f"{name}.weight_scale"].float().numpy()
    matrix = integers.reshape(len(packed), -1)
    assert list(matrix.shape) == tensors[f"{name}.weight_shape"].tolist()
    return (matrix * scale.repeat(matrix.shape[1] // scale.shape[1], 1)).astype(np.float32)


def unpacked(folder: Path, out: Path) -> Path:
    """A quantised checkpoint as a plain one."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    plain = {key: tensor for key, tensor in tensors.items() if ".weight_" not in key}
    for key in tensors:
        if key.endswith(".weight_packed"):
            name = key.removesuffix(".weight_packed")
            plain[f"{name}.weight"] = torch.from_numpy(by_hand(tensors, name))
    save_file(plain, out / "model.safetensors", {"format": "pt"})
    tiny.change_json(out / "config.json", quantization_config=None)
    return out


def nearest(folder: Path, out: Path, block: int) -> Path:
    """A checkpoint whose decoder matrices are rounded to nearest in blocks, the largest of a block to 7."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    for key in filter(in_decoder, tensors):
        rows = tensors[key].float().reshape(-1, block)
        scale = rows.abs().amax(1, keepdim=True) / 7
        tensors[key] = ((rows / scale).round() * scale).reshape(tensors[key].shape).to(tensors[key].dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


# Folding.


def folded(folder: Path, method: str, cases: list[Case], dtype: torch.dtype) -> tuple[set[str], float]:
    """Matrices with factors, and the largest difference of logits that folding alone makes to a method's reference."""
    model = references.load(folder)
    config = calibrate._method_config(model_of(folder), method)
    rows = gather(model, method, config, cases, 0, lambda *_: None)
    run = references.module(method).run
    before = [run(model, config, case.ids, case.pixels, 3).logits for case in cases]
    used = set()
    for i, layer in enumerate(original.view(model).decoder.layers):
        read = {name.split(".")[-1]: part for name, part in rows.items() if name.startswith(f"layers.{i}.")}
        used |= set(smooth(layer, read, 32, dtype, values_elsewhere=method == "himix"))
    after = [run(model, config, case.ids, case.pixels, 3).logits for case in cases]
    return used, max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_alone_leaves_logits_of_stock_transformers_as_they_are(uneven_one, dtype):
    hub_layout = "hub" in uneven_one.name
    prompts = checkpoints if hub_layout else layouts
    sized = checkpoints.pixels(28 if hub_layout else 56)
    ids = checkpoints.prompt(12, 4) if hub_layout else prompts.prompt()

    used, difference = folded(uneven_one, "none", [Case(ids, torch.from_numpy(sized))], dtype)

    assert {"q_proj", "o_proj", "gate_proj", "down_proj"} == used
    assert difference < 1e-4  # float32 sums in another order; logits are of size 10


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("none", {"method": "plain", "decoder": "phi3"}),
        ("none", {"method": "plain", "decoder": "qwen2", "kv_heads": 2}),
        ("proxyv", {"method": "proxyv"}),
        ("proxyv", {"method": "proxyv", "learn_proxy": True, "decoder": "phi3"}),
        ("yopo", {"method": "yopo"}),
        ("himix", {"method": "himix"}),
        ("himix", {"method": "himix", "decoder": "qwen2", "kv_heads": 2}),
    ],
)
def test_folding_alone_leaves_what_each_method_says_as_it_is(tmp_path, method, options):
    folder = originals.build(tmp_path / "checkpoint", **options)
    uneven(folder, options.get("kv_heads", 4), 4)
    cases = [Case(originals.prompt(12, 4, seed=s), originals.pixels(seed=s)) for s in range(2)]

    used, difference = folded(folder, method, cases, torch.bfloat16)

    wanted = {"q_proj", "gate_proj", "down_proj"} | ({"o_proj"} if method != "himix" else set())
    fused = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"} if options.get("decoder") == "phi3" else {}
    assert used == {fused.get(name, name) for name in wanted}
    assert difference < 1e-4


# Rounding.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_awq_answers_about_other_pictures_nearer_to_the_checkpoint_than_rounding_to_nearest(layout, tmp_path, pictures):
    folder = LAYOUTS[layout](tmp_path / "checkpoint", 2)

    report = quantize(folder, tmp_path / "awq", pictures=pictures, block_size=32, prompt="w5 w6 w7 w8")

    awq = error(unpacked(tmp_path / "awq", tmp_path / "plain"), folder)
    plain = error(nearest(folder, tmp_path / "nearest", 32), folder)
    assert set(report["smoothed"]) == {"q_proj", "o_proj", "gate_proj", "down_proj"}
    assert awq < 0.5 * plain, (awq, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gptq_is_nearer_than_rounding_to_nearest_on_other_rows_of_the_same_kind(dtype):
    torch.manual_seed(0)
    linears = {
        "q_proj": torch.nn.Linear(64, 48),
        "k_proj": torch.nn.Linear(64, 24),
        "down_proj": torch.nn.Linear(96, 32),
    }
    linears["v_proj"] = linears["k_proj"]
    mix = {"q_proj": torch.randn(12, 64), "down_proj": torch.randn(20, 96)}  # what models read hangs together

    def drawn() -> dict[str, torch.Tensor]:
        return {name: torch.randn(2000, len(m)) @ m + 0.3 * torch.randn(2000, m.shape[1]) for name, m in mix.items()}

    found = rounding.by_gptq(linears, drawn(), 32, dtype)

    for first, rows in drawn().items():
        for name in ("q_proj", "k_proj", "v_proj") if first == "q_proj" else (first,):
            weight = linears[name].weight.detach()
            integers, scale = found[name]
            blocks = weight.reshape(-1, 32)
            step = blocks.abs().amax(1, keepdim=True) / 7
            plain = ((blocks / step).round() * step).reshape(weight.shape)
            gptq = integers * scale.float().repeat_interleave(32, 1)
            assert (integers.dtype, scale.dtype) == (torch.int8, dtype)
            assert (rows @ (gptq - weight).T).norm() < 0.7 * (rows @ (plain - weight).T).norm()


# What is written.


@pytest.fixture(scope="module")
def written(one, pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("written") / "quantised"
    quantize(one, out, pictures=pictures, block_size=32)
    return out


@pytest.mark.parametrize("algorithm", ["awq", "gptq"])
def test_the_library_reads_integers_times_scales(one, pictures, tmp_path, algorithm):
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    quantize(one, tmp_path / "q", pictures=pictures, block_size=32, algorithm=algorithm)

    tensors = load_file(tmp_path / "q" / "model.safetensors")
    config = tiny.read_json(tmp_path / "q" / "config.json")["quantization_config"]
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    names = [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]
    assert len(names) == 14  # seven in each of two layers
    for name in names:
        parts = {key: tensors[f"{name}.{key}"] for key in ("weight_packed", "weight_scale", "weight_shape")}
        found = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        np.testing.assert_array_equal(found.numpy(), by_hand(tensors, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_those_of_pack_quantized_in_the_checkpoints_dtype(tmp_path, pictures, dtype):
    folder = hub(tmp_path / "checkpoint")
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    quantize(folder, tmp_path / "q", pictures=pictures, block_size=32)

    found = load_file(tmp_path / "q" / "model.safetensors")
    for key, tensor in tensors.items():
        if not in_decoder(key):
            assert found[key].dtype == dtype
            if "layernorm" not in key or "vision" in key:
                assert torch.equal(found[key], tensor), key
            continue
        rows, columns = tensor.shape
        assert key not in found
        assert (found[f"{key}_packed"].dtype, found[f"{key}_packed"].shape) == (torch.int32, (rows, columns // 8))
        assert (found[f"{key}_scale"].dtype, found[f"{key}_scale"].shape) == (dtype, (rows, columns // 32))
        assert (found[f"{key}_shape"].dtype, found[f"{key}_shape"].tolist()) == (torch.int64, [rows, columns])


def test_the_library_writes_the_same_config(written):
    from compressed_tensors.quantization import QuantizationConfig

    config = tiny.read_json(written / "config.json")["quantization_config"]

    again = QuantizationConfig.model_validate(config).model_dump(mode="json")

    assert {key: again[key] for key in config} == config
    assert {key for key, value in again.items() if value is not None} <= set(config)


def test_transformers_loads_it_and_says_what_the_unpacked_checkpoint_says(written, tmp_path):
    plain = unpacked(written, tmp_path / "plain")

    np.testing.assert_allclose(logits(written, 7), logits(plain, 7), atol=1e-4)


def test_a_matrix_that_128_does_not_divide_has_blocks_of_32_and_one_that_32_does_not_stays(tmp_path, pictures):
    folder = hub(tmp_path / "checkpoint", text={"hidden_size": 128, "intermediate_size": 96})
    odd = hub(tmp_path / "odd", text={"hidden_size": 128, "intermediate_size": 40})

    mixed = quantize(folder, tmp_path / "mixed", pictures=pictures)
    kept = quantize(odd, tmp_path / "kept", pictures=pictures)

    assert mixed["matrices"] == {"32": 2, "128": 12} and not mixed["kept"]
    groups = tiny.read_json(tmp_path / "mixed" / "config.json")["quantization_config"]["config_groups"]
    assert [group["weights"]["group_size"] for group in groups.values()] == [128, 32]
    assert kept["matrices"] == {"128": 12} and len(kept["kept"]) == 2
    assert set(kept["kept"]) <= set(tiny.read_json(tmp_path / "kept" / "config.json")["quantization_config"]["ignore"])
    for name in ("mixed", "kept"):
        found = logits(tmp_path / name, 7)
        np.testing.assert_allclose(found, logits(unpacked(tmp_path / name, tmp_path / f"{name}-plain"), 7), atol=1e-4)


@pytest.mark.parametrize("layout", ["hub", pytest.param("original", marks=pytest.mark.slow)])
def test_export_keeps_what_is_written_in_blocks_of_either_size(tmp_path, pictures, layout):
    text = {"text": {"hidden_size": 128, "intermediate_size": 160}} if layout == "hub" else {}
    source, out = LAYOUTS[layout](tmp_path / "source", **text), tmp_path / "out"
    quantize(source, out, pictures=pictures)
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert {group["weights"]["group_size"] for group in groups} == {128, 32}

    bundle = export(out, tmp_path / "bundle", method="fastv", prune_layer=1, max_text_tokens=16, max_new_tokens=8)

    formats = open_bundle(bundle).manifest.formats
    assert (formats.decoder, formats.head, formats.block) == ("int4", "as-is", 128)
    size = open_bundle(bundle).manifest.files["weights.bin"].size
    assert planning.weights_bytes(plan_of(out)) <= size <= 1.1 * planning.weights_bytes(plan_of(out))
    verdict = parity.check(bundle, out, steps=4, store=False)
    assert verdict.passed, verdict.first_failure


def plan_of(folder: Path) -> Any:
    options = {"prune_layer": 1, "max_text_tokens": 16, "max_new_tokens": 8}
    return plans.plan_of(Checkpoint.open(folder), method="fastv", options=options)


def model_of(folder: Path) -> Model:
    return plans.model(Checkpoint.open(folder), Capacity())


def test_every_other_file_is_copied_and_the_source_stays_as_it_was(tmp_path, pictures):
    folder = original_layout(tmp_path / "checkpoint", decoder="phi3")
    (folder / "README.md").write_text("of its makers")
    before = tree(folder)

    quantize(folder, tmp_path / "out" / "q", pictures=pictures, block_size=32)

    after = tree(tmp_path / "out" / "q")
    assert tree(folder) == before
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} == {"config.json", "model.safetensors"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["q"]
    config = tiny.read_json(tmp_path / "out/q/config.json")
    ignored = config.pop("quantization_config")["ignore"]
    assert ignored == ["lm_head", "model.mm_projector.0", "model.mm_projector.2", "re:.*vision_tower.*"]
    assert config == tiny.read_json(folder / "config.json")
    packed = [key for key in load_file(tmp_path / "out/q/model.safetensors") if key.endswith("packed")]
    assert sum("qkv_proj" in key for key in packed) == sum("gate_up_proj" in key for key in packed) == 2


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_checkpoint_in_shards_is_written_in_shards(tmp_path, pictures, written, one, suffix):
    folder = tmp_path / "checkpoint"
    shutil.copytree(one, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, keys in shards.items():
        part = {key: tensors[key] for key in keys}
        save_file(part, folder / file, {"format": "pt"}) if suffix == "safetensors" else torch.save(part, folder / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    tiny.write_json(folder / f"{stem}.{suffix}.index.json", index)

    quantize(folder, tmp_path / "q", pictures=pictures, block_size=32)

    found = {key: checkpoint.read(stored) for key, stored in checkpoint.index(tmp_path / "q").items()}
    wanted = load_file(written / "model.safetensors")
    assert sorted(path.name for path in (tmp_path / "q").glob("*model*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert set(found) == set(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_the_same_seed_writes_the_same_bytes(one, pictures, written, tmp_path):
    quantize(one, tmp_path / "again", pictures=pictures, block_size=32)

    assert tree(tmp_path / "again") == tree(written)


# Pictures.


def test_a_file_of_samples_brings_questions_and_answers(one, pictures, tmp_path):
    lines = [{"image": f"{i}.png", "prompt": "w5 w6"} | ({"answer": "w9 w10"} if i % 2 else {}) for i in range(6)]
    file = pictures / "samples.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = read_samples(file, "not asked", 4, 0)

    cases = cases_of(Checkpoint.open(one), model_of(one), found)

    assert len(cases) == 4 and all(case.pixels.shape == (1, 3, 28, 28) for case in cases)
    for sample, case in zip(found, cases, strict=True):
        answered = case.ids[-3:] == [9, 10, 2]  # the template closes an answer
        assert answered == (sample.answer is not None) and case.ids.count(checkpoints.IMAGE) == 1
    assert found != read_samples(file, "not asked", 4, 1)


BAD_LINES = ("{", "[]", '{"image": "0.png"}', '{"image": 3, "prompt": "w5"}', '{"image": "0.png", "prompt": " "}')


@pytest.mark.parametrize("line", [*BAD_LINES, '{"image": "0.png", "prompt": "w5", "answer": null}'])
def test_a_line_that_is_no_sample_is_named(one, pictures, tmp_path, line):
    file = tmp_path / "samples.jsonl"
    file.write_text(f'{{"image": "{pictures}/0.png", "prompt": "w5"}}\n{line}\n')

    said = refused(2, "quantize", one, "-o", tmp_path / "q", "--pictures", file)

    assert "samples.jsonl: line 2" in said
    assert not (tmp_path / "q").exists()


def test_pictures_that_cannot_be_used_end_the_command_with_code_2(one, pictures, tmp_path):
    empty, damaged, gone = (tmp_path / name for name in ("empty", "damaged", "gone.jsonl"))
    empty.mkdir()
    damaged.mkdir()
    (damaged / "a.png").write_bytes((pictures / "0.png").read_bytes()[:200])
    gone.write_text('{"image": "nowhere.png", "prompt": "w5"}')
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    ask = ("quantize", one, "-o", tmp_path / "q", "--pictures")

    assert "holds no pictures" in refused(2, *ask, empty)
    assert "no such folder or file" in refused(2, *ask, tmp_path / "nowhere")
    assert "a.png" in refused(2, *ask, damaged)
    assert "nowhere.png: no such file" in refused(2, *ask, gone)
    assert "cannot be read as text" in refused(2, *ask, binary)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary.jsonl", "damaged", "empty", "gone.jsonl"]


# Refusals.


def test_settings_out_of_range_are_refused(one, pictures, tmp_path):
    given = {"pictures": pictures}

    with pytest.raises(UnsupportedError, match="did you mean gptq"):
        quantize(one, tmp_path / "q", **given, algorithm="gptp")
    with pytest.raises(UsageError, match="block_size: 64, expected 32 or 128"):
        quantize(one, tmp_path / "q", **given, block_size=64)
    with pytest.raises(UsageError, match="samples: 0"):
        quantize(one, tmp_path / "q", **given, samples=0)
    with pytest.raises(UsageError, match="prompt: is empty"):
        quantize(one, tmp_path / "q", **given, prompt=" ")


def test_a_quantised_checkpoint_is_refused(written, pictures, tmp_path):
    unsaid = tmp_path / "unsaid"
    shutil.copytree(written, unsaid)
    tiny.change_json(unsaid / "config.json", quantization_config=None)

    for folder in (written, unsaid):
        said = refused(3, "quantize", folder, "-o", tmp_path / "q", "--pictures", pictures)
        assert "is quantised already" in said


def test_only_a_quantised_checkpoint_is_replaced_and_only_by_force(one, written, pictures, tmp_path):
    other, mine = tmp_path / "other", tmp_path / "mine"
    shutil.copytree(one, other)
    shutil.copytree(written, mine)
    before = tree(other), tree(mine)
    ask = ("quantize", one, "--pictures", pictures, "--block-size", 32)

    assert "exists" in refused(2, *ask, "-o", mine)
    assert "is no quantised checkpoint" in refused(2, *ask, "-o", other, "--force")
    assert "lie in one another" in refused(2, "quantize", other, "--pictures", pictures, "-o", other / "q")
    assert (tree(other), tree(mine)) == before

    done = cli(*ask, "-o", mine, "--force", "--samples", 2)

    assert done.exit_code == 0, done.output
    assert "INT4 matrices: 14 of blocks of 32" in done.stdout
    assert set(tree(mine)) == set(before[1])


def test_what_lacks_parts_or_is_nowhere_ends_with_code_1(one, pictures, tmp_path):
    mute = tmp_path / "mute"
    shutil.copytree(one, mute)
    (mute / "tokenizer.json").unlink()

    assert "has no tokenizer.json" in refused(1, "quantize", mute, "-o", tmp_path / "q", "--pictures", pictures)
    assert "is no folder" in refused(1, "quantize", tmp_path / "no", "-o", tmp_path / "q", "--pictures", pictures)


def test_a_checkpoint_that_answers_with_nan_is_refused(one, pictures, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(one, broken)
    tensors = load_file(broken / "model.safetensors")
    key = next(key for key in tensors if key.endswith("layers.0.mlp.down_proj.weight"))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})

    said = refused(1, "quantize", broken, "-o", tmp_path / "q", "--pictures", pictures)

    assert "not finite" in said
    assert not (tmp_path / "q").exists()


def test_without_modelopt_the_extra_is_named(one, pictures, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    monkeypatch.setitem(sys.modules, "modelopt.torch", None)

    said = refused(3, "quantize", one, "-o", tmp_path / "q", "--pictures", pictures)

    assert "pip install 'lvlm-edge[quantize]'" in said


def test_a_failure_while_writing_leaves_nothing(one, pictures, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "_copy", full)

    with pytest.raises(LvlmEdgeError, match="no room on the disk"):
        quantize(one, tmp_path / "q", pictures=pictures, samples=1)

    assert not list(tmp_path.iterdir())


def test_json_is_one_document_of_what_was_done(one, pictures, tmp_path):
    done = cli("quantize", one, "-o", tmp_path / "q", "--pictures", pictures, "--block-size", 32, "--json")

    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert (report["algorithm"], report["samples"], report["method"]) == ("awq", 12, "none")
    assert report["matrices"] == {"32": 14} and report["kept"] == []
    assert report["bytes"] == sum(len(content or b"") for content in tree(tmp_path / "q").values())


# The methods' own checkpoints.


@pytest.mark.parametrize("method", ["proxyv", "yopo", "himix"])
def test_a_methods_checkpoint_is_calibrated_as_the_method_runs_it(tmp_path, pictures, method):
    heads = {"heads": 4, "kv_heads": 4}
    folder = talking(originals.build(tmp_path / "checkpoint", method=method, **heads), image=False)
    uneven(folder, 4, 4)
    before = load_file(folder / "model.safetensors")

    report = quantize(folder, tmp_path / "q", pictures=pictures, block_size=32)

    assert report["method"] == method
    assert report["matrices"] == {"32": 28}  # seven in each of four layers
    assert ("o_proj" in report["smoothed"]) == (method != "himix")  # its images' values do not come from v_proj
    found = load_file(tmp_path / "q" / "model.safetensors")
    own = {key for key in before if not in_decoder(key) and not re.search(r"\d\.\w+_layernorm\.weight$", key)}
    assert any(re.search("proxyv|vision_mlp|_img", key) for key in own) == (method != "yopo")
    assert all(torch.equal(found[key], before[key]) for key in own)
    settings = calibrate._method_config(model_of(folder), method)
    plain = references.load(unpacked(tmp_path / "q", tmp_path / "plain"))
    rounded = references.load(nearest(folder, tmp_path / "nearest", 32))
    run, errors = references.module(method).run, []
    prompt, pixels = originals.prompt(12, 4, seed=9), originals.pixels(seed=9)
    wanted = run(references.load(folder), settings, prompt, pixels, 1).logits
    for model in (plain, rounded):
        errors.append(float((run(model, settings, prompt, pixels, 1).logits - wanted).norm() / wanted.norm()))
    assert errors[0] < 0.7 * errors[1], errors

"""Plans: the papers' figures, the FLOPs and bytes of what is really exported, and settings out of range."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from lvlm_edge.exporter import families, plan, planning
from lvlm_edge.exporter.bundles import plans
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError
from lvlm_edge.exporter.commands.main import main
from lvlm_edge.exporter.graphs import graph
from lvlm_edge.exporter.planning import PlanError
from lvlm_edge.runtime.errors import UnsupportedError, UsageError
from tests import checkpoints

# The hub's config.json of LLaVA-1.5, as far as it speaks of dimensions.
BASE: dict[str, Any] = {
    "model_type": "llava",
    "image_token_index": 32000,
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
TEXT = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064}
TEXT_13B = TEXT | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}


def written(folder: Path, text: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(BASE | {"text_config": text}))
    return folder


@pytest.fixture
def llava_7b(tmp_path):
    return written(tmp_path, TEXT)


@pytest.fixture
def llava_13b(tmp_path):
    return written(tmp_path, TEXT_13B)


# Table 1 of arXiv:2403.06764, rows that its own formula gives: prune layer, share removed, FLOPs ratio in percent.
RATIOS_7B = [
    (2, 0.90, 20),
    (2, 0.75, 33),
    (2, 0.50, 55),
    (3, 0.90, 23),
    (3, 0.75, 35),
    (3, 0.50, 57),
    (5, 0.90, 28),
    (5, 0.75, 40),
    (5, 0.50, 60),
]
# And for 13B: prune layer, share removed, ratio, GFLOPs.
ROWS_13B = [
    (2, 0.90, 19, 29.7),
    (2, 0.75, 32, 50.2),
    (2, 0.50, 55, 84.6),
    (3, 0.90, 21, 33.0),
    (3, 0.75, 34, 52.9),
    (3, 0.50, 56, 86.4),
    (5, 0.90, 26, 39.6),
    (5, 0.75, 38, 58.4),
    (5, 0.50, 58, 90.1),
]


def paper(folder: Path, layer: int, removed: float) -> dict[str, Any]:
    return plan(folder, method="fastv", prune_layer=layer, keep_ratio=round(1 - removed, 2))["paper"]


@pytest.mark.parametrize(("layer", "removed", "ratio"), RATIOS_7B)
def test_fastvs_published_ratios_for_7b_are_within_0_6_points(layer, removed, ratio, llava_7b):
    assert paper(llava_7b, layer, removed)["ratio"] * 100 == pytest.approx(ratio, abs=0.6)


@pytest.mark.parametrize(("layer", "removed", "ratio", "gflops"), ROWS_13B)
def test_fastvs_published_column_for_13b_is_within_0_1_gflops(layer, removed, ratio, gflops, llava_13b):
    found = paper(llava_13b, layer, removed)

    assert found["value"] == pytest.approx(gflops, abs=0.1)
    assert found["ratio"] * 100 == pytest.approx(ratio, abs=0.6)
    assert found["name"] == "FastV"


@pytest.mark.parametrize(("folder", "gflops"), [("llava_7b", 99.3), ("llava_13b", 154.6)])
def test_keeping_everything_costs_the_published_baseline(folder, gflops, request):
    found = paper(request.getfixturevalue(folder), 2, 0.0)

    assert found["value"] == pytest.approx(gflops, abs=0.1)
    assert found["ratio"] == 1


def test_the_baseline_has_no_published_column(llava_7b):
    assert plan(llava_7b)["paper"] is None


@pytest.mark.parametrize(("keep", "mebibytes"), [(1.0, 288), (0.5, 153), (0.25, 85.5)])
def test_cache_bytes_of_the_visual_tokens_are_those_of_7b_in_float16(keep, mebibytes, llava_7b):
    found = plan(llava_7b, method="fastv", prune_layer=2, keep_ratio=keep, dtype="float16")

    per_token = 512 * 1024  # 16 KiB in each of 32 layers
    others = found["text_tokens"] + found["new_tokens"]
    assert found["kv_cache_bytes"] - others * per_token == mebibytes * 2**20
    assert found["kv_cache_bytes_dense"] == (576 + others) * per_token


def test_7b_has_its_known_size_and_prefill_flops(llava_7b):
    found = plan(llava_7b, max_text_tokens=36, dtype="float16")

    assert found["weights_bytes"] / 2 == pytest.approx(7.06e9, rel=0.01)  # parameters of llava-1.5-7b-hf
    head = 2 * 4096 * 32064
    assert found["flops"]["prefill"] - head == pytest.approx(8.12e12, rel=0.002)  # all that is behind the "99.3 B"


def test_the_command_prints_one_document_with_the_promised_keys(llava_7b):
    done = CliRunner().invoke(main, ["plan", str(llava_7b), "--method", "fastv", "--keep-ratio", "0.25", "--json"])

    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {
        "method", "model", "visual_tokens", "stages", "weights_bytes", "kv_cache_bytes", "flops", "paper",
    } <= set(found)  # fmt: skip
    assert {"family", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab"} <= set(found["model"])
    assert set(found["flops"]) == {"vision", "projector", "prefill", "prefill_dense", "decode_per_token"}
    assert {"name", "unit", "value", "ratio"} <= set(found["paper"])
    assert [stage["layers"] for stage in found["stages"]] == [[0, 1], [2, 31]]
    full, reduced = 576 + 256, 144 + 256
    assert [(s["queries"], s["keys"], s["cached"]) for s in found["stages"]] == [(full,) * 3, (reduced,) * 3]
    assert found["visual_tokens"] == 576


def test_planning_reads_no_weights(llava_7b):
    assert [path.name for path in llava_7b.iterdir()] == ["config.json"]
    assert plan(llava_7b)["model"]["layers"] == 32


# What is exported costs what the plan says.


def counted(path: Path) -> int:
    """FLOPs of a graph, node by node, from the shapes in the file."""
    model = onnx.load(path, load_external_data=False).graph
    shapes = {t.name: tuple(t.dims) for t in model.initializer}
    for value in (*model.input, *model.value_info, *model.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    total = 0
    for node in model.node:
        if node.op_type == "MatMul":
            total += 2 * math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
        elif node.op_type == "Conv":
            total += 2 * math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type == "Attention":
            _, heads, rows, size = shapes[node.input[0]]
            total += 2 * heads * rows * shapes[node.input[1]][2] * 2 * size
        else:
            assert node.op_type not in ("Gemm", "Einsum", "ConvTranspose")
    return total


def planned(made: Any) -> planning.Plan:
    options = {"prune_layer": 2, "keep_ratio": 0.5} if made.method == "fastv" else {}
    options |= {"max_text_tokens": 64, "max_new_tokens": 16, "dtype": made.dtype}
    return plans.plan_of(Checkpoint.open(made.checkpoint), method=made.method, options=options)


def test_flops_counted_in_the_graphs_equal_the_plans_within_1_percent(made):
    flops = planning.report(planned(made))["flops"]
    manifest = json.loads((made.bundle / "manifest.json").read_text())
    by_role: dict[str, int] = {}
    for entry in manifest["graphs"]:
        found = counted(made.bundle / entry["file"])
        by_role[entry["role"]] = by_role.get(entry["role"], 0) + found
        assert graph.flops(made.bundle / entry["file"]) == found

    assert by_role["image"] == pytest.approx(flops["vision"] + flops["projector"], rel=0.01)
    assert by_role["prefill"] == pytest.approx(flops["prefill"], rel=0.01)
    assert by_role["decode"] == pytest.approx(flops["decode_per_token"], rel=0.01)


def test_the_weights_file_has_the_planned_bytes_and_rotary_tables(made):
    found = planned(made)
    tables = found.positions * found.spec.decoder.head_dim * planning.BYTES[made.dtype]

    size = (made.bundle / "weights.bin").stat().st_size

    assert size == pytest.approx(planning.weights_bytes(found) + tables, rel=0.02)


def test_the_parameters_of_the_checkpoint_are_the_planned_ones(mha):
    """Without what the tower's highest feature layer leaves out: the last layer and the norm after it."""
    model = checkpoints.stock(mha)
    unused = sum(
        p.numel() for name, p in model.named_parameters() if "post_layernorm" in name or "encoder.layers.2." in name
    )

    found = plan(mha, max_text_tokens=64, max_new_tokens=16)

    assert found["weights_bytes"] / 4 == sum(p.numel() for p in model.parameters()) - unused


# Settings out of range.


@pytest.mark.parametrize("layer", [0, 32, -1, 1000])
def test_a_prune_layer_outside_the_model_is_refused_with_the_range(layer, llava_7b):
    with pytest.raises(PlanError, match=rf"prune_layer is {layer}, .*layers 0\.\.31; choose 1\.\.31") as caught:
        plan(llava_7b, method="fastv", prune_layer=layer)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("ratio", [0.0, 1.5, -1.0, math.nan, math.inf])
def test_a_keep_ratio_that_is_no_share_is_refused(ratio, llava_7b):
    with pytest.raises(PlanError, match=r"keep_ratio is .*more than 0 and at most 1"):
        plan(llava_7b, method="fastv", keep_ratio=ratio)


def test_a_ratio_that_keeps_nothing_is_refused(llava_7b):
    with pytest.raises(PlanError, match=r"0 of 576 visual tokens.*keep 1\.\.576"):
        plan(llava_7b, method="fastv", keep_ratio=0.0001)


@pytest.mark.parametrize("count", [0, 577, -1])
def test_a_kept_count_that_the_picture_does_not_have_is_refused(count, llava_7b):
    with pytest.raises(PlanError, match=rf"{count} of 576 visual tokens.*keep 1\.\.576"):
        plan(llava_7b, method="fastv", keep_tokens=count)


@pytest.mark.parametrize("name", ["num_images", "max_text_tokens", "max_new_tokens"])
@pytest.mark.parametrize("value", [0, -5])
def test_a_capacity_below_one_is_refused_with_its_flag(name, value, llava_7b):
    with pytest.raises(PlanError, match=rf"{name} is {value}, .*--{name.replace('_', '-')}"):
        plan(llava_7b, **{name: value})


@pytest.mark.parametrize("name", ["num_images", "max_text_tokens", "max_new_tokens"])
def test_a_capacity_that_nothing_has_is_refused_with_its_flag(name, llava_7b):
    with pytest.raises(PlanError, match=rf"{name} is {10**11}, expected at most .*lower --{name.replace('_', '-')}"):
        plan(llava_7b, **{name: 10**11})


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text_config", "num_hidden_layers", 10**7),
        ("text_config", "hidden_size", 10**12),
        ("text_config", "vocab_size", 10**12),
        ("text_config", "max_position_embeddings", 10**30),
        ("vision_config", "num_hidden_layers", 10**7),
        ("vision_config", "image_size", 10**7),
    ],
)
def test_sizes_that_no_model_has_are_refused_at_once(part, field, value, tmp_path):
    content = BASE | {"text_config": dict(TEXT)}
    content = content | {part: content[part] | {field: value}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    began = time.perf_counter()

    with pytest.raises(CheckpointError, match=rf"config.json: {part} has .* {value}, expected at most"):
        plan(tmp_path)

    assert time.perf_counter() - began < 5


def test_more_positions_than_the_model_has_are_refused(llava_7b):
    with pytest.raises(PlanError, match=r"make 4097 positions, but the model has 4096; lower --max-text-tokens"):
        plan(llava_7b, max_text_tokens=4096 - 576 - 127, max_new_tokens=128)


def test_as_many_positions_as_the_model_has_are_planned(llava_7b):
    assert plan(llava_7b, max_text_tokens=4096 - 576 - 128, max_new_tokens=128)["text_tokens"] == 3392


def test_a_sliding_window_shorter_than_the_prompt_is_refused(tmp_path):
    folder = written(tmp_path, TEXT | {"model_type": "mistral", "sliding_window": 512})

    with pytest.raises(UnsupportedError, match=r"exceed the model's sliding window of 512"):
        plan(folder)


def test_a_window_that_the_pictures_alone_exceed_is_refused_with_what_helps(tmp_path):
    folder = written(tmp_path, TEXT | {"model_type": "mistral", "sliding_window": 577})

    with pytest.raises(UnsupportedError, match=r"576 of them of pictures, .*smaller or fewer pictures .*another"):
        plan(folder)


SLIDING = {
    "from the first": {"max_window_layers": 0},
    "in the last": {"max_window_layers": 31},
    "from a layer beyond the last": {"max_window_layers": 32},
    "from 28 on, which is the default": {},
    "in none of fewer": {"num_hidden_layers": 28},
    "not asked for": {"use_sliding_window": False, "max_window_layers": 0},
    "without a width": {"sliding_window": None, "max_window_layers": 0},
    "in none by name": {"layer_types": ["full_attention"] * 32, "max_window_layers": 0},
    "in one by name": {"layer_types": ["full_attention"] * 31 + ["sliding_attention"]},
}


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_layers_slide_that_slide_in_stock_transformers(kind, name, tmp_path):
    from transformers import Qwen2_5_VLTextConfig, Qwen2Config, Qwen2VLTextConfig

    text = {"num_hidden_layers": 32, "use_sliding_window": True, "sliding_window": 512} | SLIDING[name]
    stock = {"llava": Qwen2Config, "qwen2_vl": Qwen2VLTextConfig, "qwen2_5_vl": Qwen2_5_VLTextConfig}[kind](**text)
    content = {"model_type": kind, "text_config": text | {"model_type": "qwen2"}}
    if kind != "llava":
        content["vision_config"] = {"hidden_size" if kind == "qwen2_vl" else "out_hidden_size": 8192}
    (tmp_path / "config.json").write_text(json.dumps(content))

    window = families.read(Checkpoint.open(tmp_path)).decoder.window

    assert window == (stock.sliding_window if "sliding_attention" in stock.layer_types else None)


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [({"method": "fastvv"}, "did you mean fastv"), ({"dtype": "float61"}, "did you mean float16")],
)
def test_an_unknown_method_or_dtype_is_refused_with_the_nearest(arguments, nearest, llava_7b):
    with pytest.raises(UnsupportedError, match=nearest) as caught:
        plan(llava_7b, **arguments)
    assert caught.value.exit_code == 3


def test_an_option_that_the_method_does_not_have_is_refused_with_those_it_has(llava_7b):
    with pytest.raises(UsageError, match=r"fastv: has no option --keep-ratios; .*--keep-ratio\b"):
        plan(llava_7b, method="fastv", keep_ratios=0.5)


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lava"}))

    with pytest.raises(UnsupportedError, match=r"model_type is 'lava'.*did you mean llava"):
        plan(tmp_path)


def test_a_family_that_transformers_has_is_no_spelling_mistake(tmp_path):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    ours = set(families.names()) | set(families.ALIASES)
    for kind in sorted(set(CONFIG_MAPPING_NAMES) - ours):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))

        with pytest.raises(UnsupportedError) as caught:
            plan(tmp_path)

        assert "did you mean" not in str(caught.value), kind
        assert "known: " in str(caught.value) and "CONTRIBUTING.md" in str(caught.value)

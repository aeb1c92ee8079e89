"""`check` finds every wrong selector, and names the stage where the mistake is; a clean bundle never fails."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from lvlm_edge.exporter import export
from lvlm_edge.exporter.commands.main import main
from lvlm_edge.exporter.families import llava
from lvlm_edge.exporter.graphs import blocks, parts
from lvlm_edge.exporter.graphs.rotary import rotation
from lvlm_edge.exporter.methods import fastv
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime.bundle import sha256
from lvlm_edge.runtime.pipeline import decoder
from tests import eager, tiny
from tests.cases import some

MUTANT = {"method": "fastv", "prune_layer": 2, "keep_ratio": 0.6, "max_text_tokens": 48, "max_new_tokens": 8}
MUTATIONS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_clean_bundle_passes(made, seed):
    verdict = parity.check(made.bundle, made.checkpoint, seed=seed, store=False)

    assert verdict.passed, verdict.first_failure
    stages = {row.stage for row in verdict.rows}
    assert {"vision", "projector", "prefill logits", "decode logits", "tokens"} <= stages
    assert ({"head", "scores", "kept set", "kept order"} <= stages) == (made.method == "fastv")


# Mutations of the selector. Each rewrites a function of the exporter, so that the graphs come out wrong.


def mutation(stage: str) -> Callable[[Callable[[pytest.MonkeyPatch], None]], Callable[[pytest.MonkeyPatch], None]]:
    """Registers a mutation under its docstring, with the stage that `check` has to name."""

    def register(function: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
        assert function.__doc__ is not None
        MUTATIONS[function.__doc__.removesuffix(".")] = (stage, function)
        return function

    return register


def wrong_importance(patch: pytest.MonkeyPatch, wrong: Callable[..., Any]) -> None:
    """`wrong(right, query, key, last, visual)` in place of `right(query, key, last, visual)`."""
    right = fastv.importance
    patch.setattr(fastv, "importance", lambda *given: wrong(right, *given))


def wrong_select(patch: pytest.MonkeyPatch, wrong: Callable[..., Any]) -> None:
    """`wrong(outputs, inputs, plan)` changes what the right select graph gives."""
    right = fastv.select
    patch.setattr(fastv, "select", lambda p, plan, inputs: wrong(right(p, plan, inputs), inputs, plan))


def attention_of(query: Any, key: Any) -> Any:
    """Logits of every query row, [H, S, S]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (query.float() @ key.float().transpose(2, 3) * query.shape[3] ** -0.5)[0]


def logits_of_last(query: Any, key: Any, last: Any) -> Any:
    """Logits of the last real row, [H, S], padding hidden."""
    logits = attention_of(query, key).index_select(1, last)[:, 0]
    return logits.masked_fill(torch.arange(query.shape[2]) > last, float("-inf"))


@mutation("scores")
def _layer_before(patch):
    """scores from the layer before."""
    right = fastv.head

    def head(p, plan, inputs, *, subgraph):
        layers, x = range(plan.stages[0].layers.stop - 1), inputs["inputs_embeds"]
        _, (query, key), _ = blocks.prefill_layers(p, plan, layers, inputs, x, inputs["position_ids"])
        score = fastv.importance(query, key, inputs["last_index"], inputs["visual_index"])
        return right(p, plan, inputs, subgraph=subgraph) | {"score": score}

    patch.setattr(fastv, "head", head)


@mutation("scores")
def _layer_after(patch):
    """scores from the layer after."""
    right = fastv.head

    def head(p, plan, inputs, *, subgraph):
        found = right(p, plan, inputs, subgraph=subgraph)
        layer = p.layers[plan.stages[0].layers.stop]
        query, key, _ = blocks.project(p, layer, found["hidden"], rotation(p, inputs["position_ids"]))
        return found | {"score": fastv.importance(query, key, inputs["last_index"], inputs["visual_index"])}

    patch.setattr(fastv, "head", head)


@mutation("scores")
def _previous_row(patch):
    """scores of the row before the last."""
    wrong_importance(patch, lambda right, q, k, last, visual: right(q, k, last - 1, visual))


@mutation("scores")
def _first_row(patch):
    """scores of the first row."""
    wrong_importance(patch, lambda right, q, k, last, visual: right(q, k, last * 0, visual))


@mutation("scores")
def _padded_row(patch):
    """scores of the last row of the padded prompt."""
    wrong_importance(patch, lambda right, q, k, last, visual: right(q, k, last * 0 + q.shape[2] - 1, visual))


@mutation("scores")
def _padding_seen(patch):
    """padding inside the scores' softmax."""

    def wrong(right, q, k, last, visual):
        return attention_of(q, k).index_select(1, last)[:, 0].softmax(-1).mean(0)[None].index_select(1, visual)

    wrong_importance(patch, wrong)


@mutation("scores")
def _heads_first(patch):
    """heads averaged before the softmax."""

    def wrong(right, q, k, last, visual):
        return logits_of_last(q, k, last).mean(0).softmax(-1)[None].index_select(1, visual)

    wrong_importance(patch, wrong)


@mutation("scores")
def _heads_summed_first(patch):
    """heads summed before the softmax."""

    def wrong(right, q, k, last, visual):
        return logits_of_last(q, k, last).sum(0).softmax(-1)[None].index_select(1, visual)

    wrong_importance(patch, wrong)


@mutation("scores")
def _visual_softmax(patch):
    """softmax over the visual columns only."""

    def wrong(right, q, k, last, visual):
        return logits_of_last(q, k, last).index_select(1, visual).softmax(-1).mean(0)[None]

    wrong_importance(patch, wrong)


@mutation("scores")
def _max_head(patch):
    """the strongest head in place of the mean."""

    def wrong(right, q, k, last, visual):
        return logits_of_last(q, k, last).softmax(-1).amax(0)[None].index_select(1, visual)

    wrong_importance(patch, wrong)


@mutation("scores")
def _wrong_groups(patch):
    """query heads paired with the wrong key heads."""

    def wrong(right, q, k, last, visual):
        return right(q.reshape(1, -1, 2, *q.shape[2:]).transpose(1, 2).reshape(q.shape), k, last, visual)

    wrong_importance(patch, wrong)


@mutation("scores")
def _unscaled(patch):
    """scores without the scale of the attention."""
    wrong_importance(patch, lambda right, q, k, last, visual: right(q * q.shape[3] ** 0.5, k, last, visual))


@mutation("scores")
def _shifted_right(patch):
    """scores of the columns one to the right."""
    wrong_importance(patch, lambda right, q, k, last, visual: right(q, k, last, visual + 1))


@mutation("scores")
def _shifted_left(patch):
    """scores of the columns one to the left."""
    wrong_importance(patch, lambda right, q, k, last, visual: right(q, k, last, visual - 1))


@mutation("kept set")
def _lowest(patch):
    """the lowest scores kept."""
    right = fastv.select
    patch.setattr(fastv, "select", lambda p, plan, inputs: right(p, plan, inputs | {"score": -inputs["score"]}))


@mutation("counts")
def _truncated(patch):
    """the kept count truncated where it has to be rounded."""
    patch.setattr(fastv, "kept", lambda config, visual: int(visual * config.keep_ratio))  # 9.6 of 16


@mutation("kept order")
def _slots_right(patch):
    """kept tokens taken from one row to the right."""
    right = fastv.select

    def select(p, plan, inputs):
        return right(p, plan, inputs | {"visual_index": inputs["visual_index"] + 1})

    patch.setattr(fastv, "select", select)


@mutation("kept order")
def _slots_left(patch):
    """kept tokens taken from one row to the left."""
    right = fastv.select

    def select(p, plan, inputs):
        return right(p, plan, inputs | {"visual_index": inputs["visual_index"] - 1})

    patch.setattr(fastv, "select", select)


@mutation("kept order")
def _unsorted_report(patch):
    """kept tokens reported by score and not in sequence order."""

    def wrong(found, inputs, plan):
        return found | {"kept_visual": inputs["score"].topk(plan.kept_tokens).indices[0]}

    wrong_select(patch, wrong)


def _gathered(found, inputs, index):
    return found | {
        "kept_hidden": inputs["hidden"].index_select(1, index),
        "kept_position_ids": inputs["position_ids"].index_select(1, index),
    }


@mutation("kept order")
def _unsorted_rows(patch):
    """kept rows not in sequence order."""

    def wrong(found, inputs, plan):
        slots = inputs["visual_index"].index_select(0, inputs["score"].topk(plan.kept_tokens).indices[0])
        return _gathered(found, inputs, torch.cat([inputs["text_index"], slots]))

    wrong_select(patch, wrong)


@mutation("kept order")
def _renumbered(patch):
    """positions counted anew."""

    def wrong(found, inputs, plan):
        return found | {"kept_position_ids": torch.arange(plan.stages[1].queries)[None] + 0 * inputs["last_index"]}

    wrong_select(patch, wrong)


@mutation("kept order")
def _text_dropped(patch):
    """a text token dropped for one more visual token."""

    def wrong(found, inputs, plan):
        best = inputs["score"].topk(plan.kept_tokens + 1).indices[0]
        slots = torch.cat([inputs["text_index"][1:], inputs["visual_index"].index_select(0, best)])
        return _gathered(found, inputs, slots.topk(plan.stages[1].queries, largest=False).values)

    wrong_select(patch, wrong)


@mutation("kept order")
def _wrong_rows(patch):
    """right positions on the hidden states of the rows before."""

    def wrong(found, inputs, plan):
        index = (found["kept_position_ids"][0] - 1).clamp(min=0)
        return found | {"kept_hidden": inputs["hidden"].index_select(1, index)}

    wrong_select(patch, wrong)


@mutation("kept order")
def _wrong_last(patch):
    """the last kept row taken for the one before it."""
    wrong_select(patch, lambda found, inputs, plan: found | {"kept_last_index": found["kept_last_index"] - 1})


# Mistakes elsewhere.


def wrong_vision(patch: pytest.MonkeyPatch, wrong: Callable[[Any], Any]) -> None:
    """`wrong(vision)` in place of what the family reads of the encoder and the projector."""
    right = llava.FAMILY

    def read(checkpoint):
        spec = right.read(checkpoint)
        return dataclasses.replace(spec, vision=wrong(spec.vision))

    patch.setattr(llava, "FAMILY", dataclasses.replace(right, read=read))


@mutation("weights of graphs")
def _vision_layer(patch):
    """features of one vision layer too many."""

    def wrong(seen):
        layers = tuple(layer + 1 for layer in seen.encoder.feature_layers)
        return dataclasses.replace(seen, encoder=dataclasses.replace(seen.encoder, feature_layers=layers))

    wrong_vision(patch, wrong)


@mutation("projector")
def _projector_act(patch):
    """another activation in the projector."""
    wrong_vision(patch, lambda seen: dataclasses.replace(seen, projector_act="quick_gelu"))


@mutation("rotary")
def _theta(patch):
    """another rotary base."""
    right = parts.rope_tables

    def rope_tables(d, positions):
        parameters = d.rope["rope_parameters"] | {"rope_theta": 20000.0}
        return right(dataclasses.replace(d, rope=d.rope | {"rope_parameters": parameters}), positions)

    patch.setattr(parts, "rope_tables", rope_tables)


def _swap(patch, wanted):
    right = blocks.project

    def project(p, layer, x, turn):
        query, key, value = right(p, layer, x, turn)
        return (query, value, key) if layer is p.layers[wanted] else (query, key, value)

    patch.setattr(blocks, "project", project)


@mutation("head")
def _swapped_below(patch):
    """keys and values exchanged in a layer below the prune layer."""
    _swap(patch, 0)


@mutation("prefill logits")
def _swapped_above(patch):
    """keys and values exchanged in a layer above the prune layer."""
    _swap(patch, 2)


@mutation("decode logits")
def _decode_slot(patch):
    """decoding one row too far in the caches of the tail."""
    right = blocks._decode

    def decode(p, plan, inputs, *, subgraph):
        def shifted(layer):
            return tuple(dataclasses.replace(g, dropped=g.dropped - (g.dropped > 0)) for g in plan.groups(layer))

        seen = SimpleNamespace(groups=shifted, all_groups=plan.all_groups, method=plan.method)
        return right(p, seen, inputs, subgraph=subgraph)

    patch.setattr(blocks, "_decode", decode)


@pytest.fixture(scope="module")
def grouped(checkpoint_once) -> Path:
    """Three layers, the last above the prune layer; 8 query heads on 2 key heads."""
    return checkpoint_once(
        text={"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2},
        vision={"num_hidden_layers": 2},
    )


@pytest.mark.export
@pytest.mark.parametrize("wrong", MUTATIONS)
def test_check_names_the_stage_of(wrong, grouped, tmp_path):
    stage, mutate = MUTATIONS[wrong]
    bundle = eager.export(grouped, tmp_path / "bundle", mistake=mutate, **MUTANT)

    with eager.running():
        verdict = parity.check(bundle, grouped, steps=4, store=False)

    assert not verdict.passed
    assert verdict.first_failure is not None and verdict.first_failure.stage == stage


@pytest.mark.parametrize("wrong", some([(name,) for name in MUTATIONS], {("kept rows not in sequence order",)}))
def test_check_names_the_stage_of_a_mistake_in_traced_graphs(wrong, grouped, tmp_path, quick_tracing):
    stage, mutate = MUTATIONS[wrong]
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        bundle = export(grouped, tmp_path / "bundle", ort=False, **MUTANT)

    verdict = parity.check(bundle, grouped, steps=4, store=False)

    assert not verdict.passed
    assert verdict.first_failure is not None and verdict.first_failure.stage == stage


def altered(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a bundle with another manifest."""
    shutil.copytree(bundle, folder)
    manifest = tiny.read_json(folder / "manifest.json")
    change(manifest)
    tiny.write_json(folder / "manifest.json", manifest)
    return folder


def _next_embedding(manifest):
    manifest["embedding"]["offset"] -= 4 * manifest["embedding"]["hidden"]


def test_check_names_the_stage_of_a_wrong_manifest(grouped, export_once, tmp_path):
    bundle = altered(export_once(grouped, **MUTANT), tmp_path / "bundle", _next_embedding)

    verdict = parity.check(bundle, grouped, steps=4, store=False)

    assert verdict.first_failure is not None and verdict.first_failure.stage == "embedding"


@pytest.mark.parametrize("offset", [-1, -6], ids=["off by one", "from the pruned cache's length"])  # 10 of 16 are kept
def test_check_names_the_stage_of_a_wrong_position_of_the_next_token(offset, grouped, exported, monkeypatch):
    right = decoder.lay_out

    def lay_out(*given):
        rows = right(*given)
        return dataclasses.replace(rows, next=rows.next + offset)

    monkeypatch.setattr(decoder, "lay_out", lay_out)

    verdict = parity.check(exported(grouped, **MUTANT), grouped, steps=4, store=False)

    assert verdict.first_failure is not None and verdict.first_failure.stage == "decode logits"


# What is kept of a check.


def test_the_certificate_holds_figures_versions_and_hashes(grouped, export_once, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(export_once(grouped, **MUTANT), bundle)

    verdict = parity.check(bundle, grouped, steps=4, seed=3)

    content = json.loads((bundle / "certificate.json").read_text())
    assert content["passed"] is True and (content["steps"], content["seed"]) == ([4, 4, 8], 3)
    assert content["manifest_sha256"] == sha256(bundle / "manifest.json")
    assert content["against_config_sha256"] == sha256(grouped / "config.json")
    assert [(row["stage"], row["figure"], row["bound"]) for row in content["rows"]] == [
        (row.stage, row.figure, row.bound) for row in verdict.rows
    ]
    assert {"lvlm-edge", "torch", "transformers", "onnxruntime", "numpy"} <= set(content["versions"])
    assert content["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(case["prompt"] and len(case["pixels_sha256"]) == 64 for case in content["cases"])


def test_the_command_exits_with_0_on_a_clean_bundle_and_with_1_on_a_wrong_one(grouped, export_once, tmp_path):
    clean, wrong = tmp_path / "clean", tmp_path / "wrong"
    shutil.copytree(export_once(grouped, **MUTANT), clean)
    altered(clean, wrong, _next_embedding)
    run = CliRunner().invoke

    passed = run(main, ["check", str(clean), "--against", str(grouped), "--steps", "4"])
    failed = run(main, ["check", str(wrong), "--against", str(grouped), "--steps", "4", "--json"])

    assert (passed.exit_code, failed.exit_code) == (0, 1)
    assert "PASSED" in passed.stdout
    report = json.loads(failed.stdout)
    assert report["passed"] is False
    assert next(row for row in report["rows"] if not row["passed"])["stage"] == "embedding"
    assert json.loads((wrong / "certificate.json").read_text())["passed"] is False

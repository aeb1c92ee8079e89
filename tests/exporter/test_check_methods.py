"""`check` finds every mistake in ProxyV, YOPO and HiMix and names where it is; a clean bundle never fails."""

from __future__ import annotations
import __future__

import inspect
import json
import sys
import textwrap
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lvlm_edge.exporter import export
from lvlm_edge.exporter.graphs import blocks, encoders
from lvlm_edge.exporter.methods import _yopo_counts, himix, proxyv, yopo
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime.pipeline import decoder
from tests import eager
from tests.cases import both, some
from tests.tiny import cli

UNEVEN = ["1011", "0110", "1000", "0101"]  # within the groups of 2 key heads, too
CLEAN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "proxyv, one crop": ({"method": "proxyv"}, {"method": "proxyv"}),
    "proxyv, three crops": ({"method": "proxyv", "kv_heads": 2}, {"method": "proxyv", "grid": (1, 2)}),
    "proxyv, a graph per layer": ({"method": "proxyv"}, {"method": "proxyv", "grid": (2, 2), "max_graph_gb": 1e-6}),
    "proxyv, legacy": ({"method": "proxyv"}, {"method": "proxyv", "grid": (1, 2), "lowering": "legacy"}),
    "proxyv, float16": ({"method": "proxyv"}, {"method": "proxyv", "grid": (1, 2), "dtype": "float16"}),
    "proxyv, learnt": ({"method": "proxyv", "learn_proxy": True}, {"method": "proxyv", "grid": (1, 2)}),
    "yopo": ({"method": "yopo", "kv_heads": 2, "head_mask": UNEVEN}, {"method": "yopo"}),
    "yopo, dropped": (
        {"method": "yopo", "kv_heads": 2, "head_mask": UNEVEN},
        {"method": "yopo", "semantics": "dropped"},
    ),
    "yopo, dropped, legacy": ({"method": "yopo"}, {"method": "yopo", "semantics": "dropped", "lowering": "legacy"}),
    "yopo, float16": ({"method": "yopo"}, {"method": "yopo", "dtype": "float16"}),
    "yopo, dropped, float16": ({"method": "yopo"}, {"method": "yopo", "semantics": "dropped", "dtype": "float16"}),
    "himix": ({"method": "himix", "kv_heads": 2}, {"method": "himix"}),
    "himix, two images": ({"method": "himix"}, {"method": "himix", "num_images": 2}),
    "himix, legacy": ({"method": "himix"}, {"method": "himix", "num_images": 2, "lowering": "legacy"}),
    "himix, float16": ({"method": "himix"}, {"method": "himix", "dtype": "float16"}),
    "none with separators": ({"method": "proxyv"}, {"grid": (1, 2)}),
    "none, two images": ({}, {"num_images": 2}),
    "fastv, two images": ({}, {"method": "fastv", "num_images": 2, "dtype": "float16"}),
}


TRACED = {("proxyv, three crops",), ("yopo, float16",), ("himix, legacy",)}


@pytest.mark.parametrize(("name", "exported"), both([(name,) for name in CLEAN], TRACED), indirect=["exported"])
def test_a_clean_bundle_passes(name, original, exported):
    of, options = CLEAN[name]
    checkpoint = original(**of)
    bundle = exported(checkpoint, **options)

    for seed in range(3):
        verdict = parity.check(bundle, checkpoint, seed=seed, steps=6, store=False)

        assert verdict.passed, verdict.first_failure
    stages = {row.stage for row in verdict.rows}
    assert {"vision", "prefill logits", "decode logits", "tokens"} <= stages
    assert ("projector" in stages) == (of.get("method") != "himix")
    assert ("image K/V" in stages) == (options.get("method") == "himix")
    assert any(stage.endswith("caches") for stage in stages) == (options.get("method") in ("proxyv", "yopo", "himix"))


PUBLIC = (  # checkpoints of the oracles
    ("proxyv_f2", "--method proxyv"),
    ("proxyv_f2", "--method proxyv --grid 1x2"),
    ("yopo_w7", "--method yopo"),
    ("yopo_w7", "--method yopo --semantics dropped"),
    ("himix_mha", "--method himix"),
)


OFTEN = (*PUBLIC[1:4:2], PUBLIC[4])  # the rest: bodies above, tokens in test_methods


@pytest.mark.parametrize(("checkpoint", "options"), some(PUBLIC, OFTEN))
def test_the_command_passes_the_checkpoints_of_the_oracles(checkpoint, options, oracles, tmp_path, quick_tracing):
    folder, bundle = oracles / checkpoint, tmp_path / "bundle"
    capacity = ["--max-text-tokens", "64", "--max-new-tokens", "16"]
    assert cli("export", folder, "-o", bundle, *options.split(), *capacity, "-q").exit_code == 0

    done = cli("check", bundle, "--against", folder)

    assert done.exit_code == 0, done.output
    assert "PASSED" in done.stdout
    assert json.loads((bundle / "certificate.json").read_text())["passed"] is True


# Mutations. Each rewrites a function of the exporter, so that the graphs come out wrong.


@dataclass(frozen=True)
class Mutation:
    """A mistake: where `check` has to find it, and by which rewriting of sources it is made.

    Attributes:
        stage: of the first row that fails; with the layer that its note has to name.
        rewrites: (module, function, what is there, what comes in its place).
        checkpoint, bundle: options other than the method's usual ones.
    """

    stage: str
    layer: int | None
    rewrites: tuple[tuple[ModuleType, str, str, str], ...]
    checkpoint: dict[str, Any]
    bundle: dict[str, Any]

    def make(self, patch: pytest.MonkeyPatch) -> None:
        """Put the mistake in place."""
        for rewrite in self.rewrites:
            rewritten(patch, *rewrite)


def wrong(
    stage: str, *rewrites: tuple[ModuleType, str, str, str], of: dict[str, Any] | None = None, **bundle: Any
) -> Mutation:
    """A mutation; a stage ending in a number names a layer."""
    name, _, layer = stage.partition(" @")
    return Mutation(name, int(layer) if layer else None, rewrites, of or {}, bundle)


def rewritten(patch: pytest.MonkeyPatch, module: ModuleType, name: str, old: str, new: str) -> None:
    """Replace a function, or a method as `Class.name`, by itself with some of its source changed."""
    owner, _, function = name.rpartition(".")
    place = getattr(module, owner) if owner else module
    right = getattr(place, function)
    home = sys.modules[right.__module__]  # where it looks for names; others import it from there
    lines = getattr(right, "source", None) or inspect.getsource(right)
    source = textwrap.dedent(lines)
    assert source.count(old) == 1, f"{name} has {old!r} {source.count(old)} times"
    changed, found = source.replace(old, new), {}
    code = compile(changed, home.__file__, "exec", flags=__future__.annotations.compiler_flag)
    exec(code, home.__dict__, found)
    found[function].source = changed  # of code made here nobody else knows the source
    if home is not module:
        patch.setattr(home, name, found[function])
    patch_function(patch, module, place, right, found[function])


def patch_function(patch: pytest.MonkeyPatch, module: ModuleType, place: Any, right: Any, wrong: Any) -> None:
    """Put a function in the place of another, in its module or class and in the record of its method."""
    patch.setattr(place, right.__name__, wrong)
    record = vars(module).get("METHOD")
    held = [] if record is None else [f.name for f in fields(record) if getattr(record, f.name) is right]
    if held:
        patch.setattr(module, "METHOD", replace(record, **dict.fromkeys(held, wrong)))


TEXT = "_before(at.rest, at.visual, at.rest)"
GUIDES = "parts.ops.attend_where(query[:, :, :n], key, value, _before(at.proxies, at.proxies, at.rest))"
LATE = ("subgraph.layers.start == plan.config.start_layer", "subgraph.layers.start == plan.config.start_layer + 1")
LEARNT = {"learn_proxy": True}
PROXYV = {
    "proxies see visual tokens": wrong(
        "prefill_tail caches @2",
        (
            proxyv,
            "tail",
            GUIDES,
            (
                "parts.ops.attend_where(query[:, :, :n], *(blocks.concat(pair, 2) for pair in ((seen_key, key), "
                "(seen_value, value))), _before(at.proxies, at.visual, at.proxies, at.rest))"
            ),
        ),
    ),
    "text sees proxies": wrong(
        "prefill_tail caches @2",
        (
            proxyv,
            "tail",
            f"parts.ops.attend_where(query[:, :, n:], *stored, {TEXT})",
            (
                "parts.ops.attend_where(query[:, :, n:], *(blocks.concat(pair, 2) for pair in ((seen_key, key), "
                "(seen_value, value))), _before(at.rest, at.visual, *(() if last else (at.proxies,)), at.rest))"
            ),
        ),
    ),
    "proxies do not see separators": wrong(
        "prefill_tail caches @2",
        (
            proxyv,
            "tail",
            GUIDES,
            (
                "parts.ops.attend_where(query[:, :, :n], key, value, _before(at.proxies, at.proxies, at.rest) & "
                "((blocks.arange(key.shape[2]) - n - where.crops) * (blocks.arange(key.shape[2]) - n + 1) >= 0)[None])"
            ),
        ),
    ),
    "proxies see every proxy": wrong(
        "prefill_tail caches @2",
        (
            proxyv,
            "tail",
            "_before(at.proxies, at.proxies, at.rest)",
            "_before(at.proxies, at.proxies * 0, at.rest)",
        ),
    ),
    "separators are not causal": wrong(
        "prefill_tail caches @2",
        (proxyv, "tail", TEXT, f"{TEXT} | (blocks.arange(where.crops + plan.text_tokens) < where.crops)[:, None]"),
    ),
    "another separator": wrong(
        "prefill_head caches @0",
        (encoders, "Projector.forward", "self.newline[None, None]", "-self.newline[None, None]"),
    ),
    "separators of later crops stand in order": wrong(
        "prefill_head caches @0", (proxyv, "Layout.separator_positions", "max(0, crop - 1)", "crop")
    ),
    "the first separator does not see the second": wrong(
        "prefill_tail caches @1",
        (proxyv, "head", "_tied(parts, plan, inputs, attended, (query, key, value))", "attended"),
    ),
    "rows of later crops are not put in order": wrong(
        "prefill_head caches @0", (proxyv, "head", "several = crops_of(plan) > 1", "several = False")
    ),
    "proxies are means of whole blocks": wrong(
        "prefill_tail caches @2",
        (proxyv, "pooled", "(factor - 1) // 2, 2 - factor % 2", "0, factor"),
        of={"side": 8, "reduce_factor": 4},
    ),
    "proxies stand where their blocks begin": wrong(
        "prefill_tail caches @2",
        (
            proxyv,
            "places",
            "start + blocks.arange(where.crops * where.proxies)",
            "start + blocks.constant(where.visual()[:: where.each // where.proxies])",
        ),
    ),
    "visual tokens do not count separators": wrong(
        "prefill_tail caches @1",
        (proxyv, "places", "blocks.constant(where.visual())", "blocks.arange(where.crops * where.each)"),
    ),
    "an update by the proxy before its FFN": wrong(
        "prefill_tail caches @2",
        (
            proxyv,
            "tail",
            "asking = blocks.finish(parts, layer, asking, attended)",
            (
                "half = asking + layer.o_proj(blocks.join_heads(attended)); "
                "asking = blocks.finish(parts, layer, asking, attended)"
            ),
        ),
        (proxyv, "tail", "full, proxy, guide)", "full, half[:, :n], guide)"),
    ),
    "an update by the proxy that entered the layer": wrong(
        "prefill_tail caches @2",
        (proxyv, "tail", "proxy = asking[:, :n]", "before, proxy = proxy, asking[:, :n]"),
        (proxyv, "tail", "full, proxy, guide)", "full, before, guide)"),
    ),
    "an update that norms before and not after": wrong(
        "prefill_tail caches @2",
        (
            proxyv,
            "update",
            'parts.ops.rms_norm(total, mlp["layernorm_post"].weight, parts.spec.decoder.eps)',
            "total",
        ),
        (
            proxyv,
            "update",
            'mlp["input_proj"](full)',
            'mlp["input_proj"](parts.ops.rms_norm(full, mlp["layernorm_post"].weight, parts.spec.decoder.eps))',
        ),
    ),
    "an update without residual": wrong(
        "prefill_tail caches @2",
        (proxyv, "update", '(mlp["proj"]["0"](inside))) + full', '(mlp["proj"]["0"](inside)))'),
    ),
    "an update with the guidance first": wrong(
        "prefill_tail caches @2",
        (
            proxyv,
            "update",
            '[mlp["input_proj"](full), guide(mlp["context_proj"], proxy)]',
            '[guide(mlp["context_proj"], proxy), mlp["input_proj"](full)]',
        ),
    ),
    "an update by the next layer's MLP": wrong(
        "prefill_tail caches @2",
        (proxyv, "tail", "i - plan.config.start_layer, full", "i - plan.config.start_layer + 1, full"),
    ),
    "proxies repeated and not stretched": wrong(
        "prefill_tail caches @2",
        (
            proxyv,
            "_grid_guide",
            "reshape(crops * (rows // factor), 1, few, 1, width).expand(-1, factor, -1, factor, -1)",
            "reshape(crops * (rows // factor), 1, 1, few, width).expand(-1, factor, factor, -1, -1)",
        ),
    ),
    "proxies from one layer later on": wrong(
        "prefill_tail caches @2",
        (proxyv, "graphs", "plan.config.start_layer, plan", "plan.config.start_layer + 1, plan"),
        (proxyv, "tail", *LATE),
        (proxyv, "_tail_graph", *LATE),
    ),
    "keys of visual tokens one position late": wrong(
        "prefill_tail caches @1",
        (
            proxyv,
            "tail",
            "(positions, at.visual)",
            "(positions, at.visual + 1)",
        ),
    ),
    "logits of the row before the last": wrong(
        "prefill logits", (proxyv, "tail", "(where.crops - where.rows)", "(where.crops - where.rows - 1)")
    ),
    "learnt scores without their scale": wrong(
        "prefill_tail caches @2", (proxyv, "learnt", " * tokens.shape[1] ** -0.5", ""), of=LEARNT
    ),
    "learnt shares over tokens in place of proxies": wrong(
        "prefill_tail caches @2",
        (proxyv, "learnt", "scores.softmax(-1).to", "scores.softmax(1).to"),
        of=LEARNT,
    ),
}

KEPT = "row, each = plan.config.head_mask[layer]"
SEEN = {
    "window": wrong(" @1", (yopo, "seen", "(plan.config.window - 1) // 2", "(plan.config.window + 1) // 2")),
    "a window of rows alone": wrong(" @1", (yopo, "distances", "down.maximum(across)", "down")),
    "neighbours are causal": wrong(
        " @1", (yopo, "seen", "[apart, later]", "[apart + 1000 * (visual[None] > visual[:, None]), later]")
    ),
    "visual tokens see no text before them": wrong(
        " @1",
        (
            yopo,
            "seen",
            "(text[None] - visual[:, None]) * (reach + 1)",
            "(text[None] * 0 + 1) * (reach + 1) + visual[:, None]",
        ),
    ),
    "visual tokens see text after them": wrong(
        " @1", (yopo, "seen", "(text[None] - visual[:, None]) * (reach + 1)", "0 * (text[None] - visual[:, None])")
    ),
    "text does not see visual tokens": wrong(
        " @1", (yopo, "seen", "[visual, text])[None]", "[visual + 10**6, text])[None]")
    ),
    "text before the image sees it": wrong(" @1", (yopo, "seen", "[visual, text])[None]", "[visual * 0, text])[None]")),
    "every head stays": wrong(" @1", (yopo, "heads", KEPT, 'row, each = "1" * d.heads')),
    "the head mask of the layer before": wrong(
        " @1", (yopo, "heads", KEPT, "row, each = plan.config.head_mask[layer - 1]")
    ),
    "the head mask turned around": wrong(
        " @1", (yopo, "heads", KEPT, "row, each = plan.config.head_mask[layer][::-1]")
    ),
    "the last FFN channels": wrong(
        " @1",
        (yopo, "_first", "linear.weight[:, :count]", "linear.weight[:, -count:]"),
        (yopo, "_finish_visual", "down_proj.weight[:n]", "down_proj.weight[-n:]"),
    ),
    "one FFN channel too many": wrong(
        " @1",
        (yopo, "channels", "int(spec.decoder.ffn / config.ffn_ratio)", "int(spec.decoder.ffn / config.ffn_ratio) + 1"),
    ),
    "no feed-forward for visual tokens": wrong(
        " @1", (yopo, "_finish_visual", "return x + _biased(down", "return x + 0 * _biased(down")
    ),
    "logits of the row before the last": wrong(
        "prefill logits", (yopo, "run", "- plan.visual_tokens)", "- plan.visual_tokens - 1)")
    ),
}
OF_TEXT = "blocks.finish(parts, layer, text, of_text)"
COUNTED = "(value.abs().sum(-1, keepdim=True) > 0).to(value.dtype).expand_as(value)"
RELEASED = SEEN | {
    "attention renormalised without visual tokens": wrong(
        " @1",
        (
            yopo,
            "_released",
            OF_TEXT,
            OF_TEXT.replace("of_text", f"of_text / _attend(parts, plan, query, key, {COUNTED}, sees)[1]"),
        ),
    ),
    "text with the first FFN channels": wrong(
        " @1",
        (
            yopo,
            "_released",
            OF_TEXT,
            "_finish_visual(parts, plan, layer, text, of_text, every)",
        ),
    ),
    "visual rows of pruned heads are not zero": wrong(
        " @1", (yopo, "_released", "_flags([h in found.kept for h in every], of_visual)", "1")
    ),
    "visual rows zero in the kept heads too, behind the cutoff": wrong(
        " @3",
        (
            yopo,
            "_released",
            "_flags([h in found.kept for h in every], of_visual)",
            "_flags([h in found.kept and i < plan.config.cutoff for h in every], of_visual)",
        ),
        of={"cutoff": 2},
    ),
    "visual tokens seen in the cutoff layer": wrong(
        " @3",
        (yopo, "_released", "if i < plan.config.cutoff else", "if i <= plan.config.cutoff else"),
        (yopo, "cache_groups", "layer < plan.config.cutoff and", "layer <= plan.config.cutoff and"),
        of={"cutoff": 2},
    ),
    "text counted anew": wrong(
        " @0",
        (
            yopo,
            "turning",
            'inputs["text_index"]]',
            'blocks.arange(plan.text_tokens) + 0 * inputs["text_index"]]',
        ),
    ),
    "values cached that count for nothing": wrong(
        "decode logits",
        (yopo, "_released", "value = value * _flags(read", "whole, value = value, value * _flags(read"),
        (
            yopo,
            "_released",
            "parts.ops.store(inputs, group, key, value)",
            "parts.ops.store(inputs, group, key, whole)",
        ),
    ),
}
DROPPED = SEEN | {
    "text with the first FFN channels": wrong(
        " @1",
        (
            yopo,
            "_dropped",
            "blocks.feed_forward(parts, layer, text + _biased(projected, layer.o_proj))",
            "_finish_visual(parts, plan, layer, text + projected, None, found.kept)",
        ),
    ),
    "the output projection of other heads": wrong(
        " @1", (yopo, "_selected", "blocks.constant(order)", "blocks.constant(range(len(order)))")
    ),
    "the output projection of other heads, for visual tokens": wrong(
        " @1",
        (yopo, "_finish_visual", "_selected(plan, layer, kept)", "_selected(plan, layer, tuple(range(len(kept))))"),
    ),
    "the output projection of other heads, for text in the pruned": wrong(
        " @1", (yopo, "_dropped", "found.kept + found.pruned)", "found.kept + tuple(range(len(found.pruned))))")
    ),
    "pruned heads add nothing": wrong(
        " @1",
        (
            yopo,
            "_dropped",
            "[blocks.join_heads(x) for x in results]",
            "[blocks.join_heads(x * (not n or not found.kept)) for n, x in enumerate(results)]",
        ),
    ),
    "no visual tokens in the layer before the cutoff": wrong(
        "prefill_tail caches @3", (_yopo_counts, "_limit", "range(config.cutoff)", "range(config.cutoff - 1)")
    ),
    "visual tokens in the cutoff layer": wrong(
        "prefill_head caches @2",
        (_yopo_counts, "_limit", "range(config.cutoff)", "range(config.cutoff + 1)"),
        of={"cutoff": 2},
    ),
    "text counted anew behind the cutoff": wrong(
        "prefill_tail caches @3",
        (
            yopo,
            "run",
            'inputs["text_index"][None]',
            'blocks.arange(plan.text_tokens)[None] + 0 * inputs["text_index"][None]',
        ),
    ),
    "decode merges the wrong groups": wrong(
        "decode logits", (blocks, "merged", "if h == head and head in owned", "if h == head")
    ),
    "decode one row too far in pruned caches": wrong(
        "decode logits", (blocks, "_slots", "length - n if n", "length - n + 1 if n")
    ),
}
HIMIX = {
    "image keys are turned": wrong(
        "image K/V @0",
        (
            himix,
            "image_kv",
            "(group,) = plan.groups(i)",
            (
                "(group,) = plan.groups(i); key = parts.ops.rotate(key, parts.rope_cos, parts.rope_sin, "
                "blocks.arange(plan.visual_tokens)[None])"
            ),
        ),
    ),
    "keys and values exchanged": wrong(
        "image K/V @0",
        (himix, "image_kv", "(layer.k_proj_img, layer.v_proj_img)", "(layer.v_proj_img, layer.k_proj_img)"),
    ),
    "image values that are zero": wrong(
        "image K/V @0", (himix, "image_kv", "group, key, value)", "group, key, value * 0)")
    ),
    "the text's norm": wrong(
        "image K/V @0",
        (himix, "image_kv", "layer.input_layernorm_img.weight", "layer.input_layernorm.weight[: plan.spec.features]"),
    ),
    "features not normed": wrong(
        "image K/V @0",
        (
            himix,
            "image_kv",
            'parts.ops.rms_norm(inputs["image_features"], layer.input_layernorm_img.weight, d.eps)',
            'inputs["image_features"]',
        ),
    ),
    "the weights of the layer after": wrong(
        "image K/V @0",
        (himix, "image_kv", "enumerate(parts.layers)", "enumerate([*parts.layers[1:], *parts.layers[:1]])"),
    ),
    "the last layer has the first one's weights": wrong(
        "image K/V @2",
        (himix, "image_kv", "enumerate(parts.layers)", "enumerate([*parts.layers[:-1], *parts.layers[:1]])"),
    ),
    "keys one row from their values": wrong(
        "image K/V @0", (himix, "image_kv", "group, key, value)", "group, key.roll(1, 2), value)")
    ),
    "the first image twice": wrong(
        "image K/V @0",
        (
            himix,
            "image_kv",
            'rms_norm(inputs["image_features"]',
            'rms_norm(inputs["image_features"][:, : plan.visual_tokens // 2].repeat(1, 2, 1)',
        ),
    ),
    "image keys are causal": wrong(
        "prefill caches @1",
        (himix, "prefill", "blocks.constant([0] * plan.visual_tokens)", "blocks.arange(plan.visual_tokens)"),
    ),
    "the first image key hidden": wrong(
        "prefill caches @1",
        (himix, "prefill", "[0] * plan.visual_tokens", "[1 << 20] + [0] * (plan.visual_tokens - 1)"),
    ),
    "the second image hidden": wrong(
        "prefill caches @1",
        (himix, "prefill", "[0] * plan.visual_tokens", "([0] + [1 << 20]) * (plan.visual_tokens // 2)"),
    ),
    "positions count the images": wrong(
        "prefill caches @0",
        (himix, "prefill", "rotation(parts, positions)", "rotation(parts, positions + plan.visual_tokens)"),
    ),
    "text sees the token after": wrong(
        "prefill caches @1",
        (himix, "prefill", "<= positions[0][:, None]", "<= positions[0][:, None] + 1"),
    ),
    "text does not see the images in the last layer": wrong(
        "prefill logits",
        (
            himix,
            "prefill",
            "*rows, visible)",
            "*rows, visible & (blocks.arange(visible.shape[1]) >= (i == 2) * plan.visual_tokens)[None])",
        ),
    ),
    "image values of another layer": wrong(
        "prefill caches @2",
        (
            himix,
            "prefill",
            'inputs[f"{PAST}.{group.name}.{part}"]',
            "inputs[f\"{PAST}.{group.name if part == 'key' else 0}.{part}\"]",
        ),
    ),
    "logits of the row before the last": wrong(
        "prefill logits", (himix, "prefill", 'inputs["last_index"])', 'inputs["last_index"] - 1)')
    ),
    "decode over the last cached row": wrong(
        "decode logits", (blocks, "_slots", "length - n if n", "length - n - 1 if n")
    ),
}
USUAL: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Mutation]]] = {
    "proxyv": ({"start_layer": 1, "layers": 3}, {"grid": (2, 2), "max_text_tokens": 24}, PROXYV),
    "yopo released": ({"head_mask": UNEVEN, "cutoff": 3}, {"max_text_tokens": 24}, RELEASED),
    "yopo dropped": ({"head_mask": UNEVEN, "cutoff": 3}, {"semantics": "dropped", "max_text_tokens": 24}, DROPPED),
    "himix": ({"layers": 3}, {"num_images": 2, "max_text_tokens": 24, "max_new_tokens": 40}, HIMIX),
}


def test_there_are_ten_mutations_of_each_method():
    assert min(len(mutations) for _, _, mutations in USUAL.values()) >= 10


MUTATIONS = [(method, name) for method, (_, _, mutations) in USUAL.items() for name in mutations]
OFTEN = {(method, next(iter(USUAL[method][2]))) for method in ("yopo dropped",)}


@pytest.mark.export
@pytest.mark.parametrize(("method", "name"), MUTATIONS)
def test_check_names_the_stage_of(method, name, original, tmp_path):
    mutation = USUAL[method][2][name]
    checkpoint, settings = usual(original, method, mutation)
    bundle = eager.export(checkpoint, tmp_path / "bundle", mistake=mutation.make, **settings)

    with eager.running():
        found(mutation, method, parity.check(bundle, checkpoint, steps=4, store=False))


@pytest.mark.parametrize(("method", "name"), some(MUTATIONS, OFTEN))
def test_check_names_the_stage_of_a_mistake_in_traced_graphs(method, name, original, tmp_path, quick_tracing):
    mutation = USUAL[method][2][name]
    checkpoint, settings = usual(original, method, mutation)
    with pytest.MonkeyPatch.context() as patch:
        mutation.make(patch)
        bundle = export(checkpoint, tmp_path / "bundle", **settings)

    found(mutation, method, parity.check(bundle, checkpoint, steps=4, store=False))


def usual(original: Any, method: str, mutation: Mutation) -> tuple[Any, dict[str, Any]]:
    """A mutation's checkpoint, and what it is exported with."""
    of, options, _ = USUAL[method]
    checkpoint = original(method=method.split()[0], kv_heads=2, **(of | mutation.checkpoint))
    return checkpoint, {"method": method.split()[0], "max_new_tokens": 8} | options | mutation.bundle


def found(mutation: Mutation, method: str, verdict: parity.Verdict) -> None:
    """The first failure on a prompt is at the mutation's stage and layer; what was planned may differ before."""
    row = next(row for row in verdict.rows if not row.passed and row.case != "checkpoint")
    wanted = mutation.stage or ("prefill caches" if method == "yopo released" else "prefill_head caches")
    assert (row.stage, mutation.layer is None or f"layer {mutation.layer}" in row.note) == (wanted, True), row


def test_rows_in_another_order_are_compared_value_by_value():
    generator = np.random.default_rng(0)
    wanted = [generator.normal(size=(2, 6, 8)).astype(np.float32) for _ in range(2)]
    own = [part[:, [3, 0, 5, 1, 4, 2]].copy() for part in wanted]
    assert max(parity._unordered(own, wanted, 1e-4)) < 1e-4

    silent = [own[0], own[1] * (np.arange(6) > 1)[:, None]]
    assert max(parity._unordered(silent, wanted, 1e-4)) < 1e-4  # zero where a value counts for nothing

    for part, name in ((0, "keys"), (1, "values")):
        spoilt = [each.copy() for each in own]
        spoilt[part][1, 4] *= 1.5
        errors = parity._unordered(spoilt, wanted, 1e-4)
        assert errors[part] > 0.1, name


@pytest.mark.parametrize("method", USUAL)
@pytest.mark.parametrize("offset", [-1, 10])
def test_check_finds_a_wrong_position_of_the_next_token(method, offset, original, exported, monkeypatch):
    of, options, _ = USUAL[method]
    checkpoint = original(method=method.split()[0], kv_heads=2, **of)
    bundle = exported(checkpoint, method=method.split()[0], **options)
    right = decoder.lay_out

    def lay_out(*given: Any) -> Any:
        rows = right(*given)
        return replace(rows, next=rows.next + offset)

    monkeypatch.setattr(decoder, "lay_out", lay_out)

    verdict = parity.check(bundle, checkpoint, steps=4, store=False)

    assert verdict.first_failure is not None
    # behind the longest prompt, 10 positions on is behind the last rotary row
    assert verdict.first_failure.stage == "decode logits" or (offset, verdict.first_failure.stage) == (10, "runs")

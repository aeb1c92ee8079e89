"""The pieces of ProxyV, YOPO and HiMix, each against a slow and plain reference written here."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lvlm_edge.exporter.bundles import plans
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.graphs import blocks
from lvlm_edge.exporter.graphs.parts import Parts
from lvlm_edge.exporter.lowerings import legacy
from lvlm_edge.exporter.methods import himix, proxyv, yopo


def planned(folder, method, **options):
    settings = {"max_text_tokens": 12, "max_new_tokens": 4, "lowering": "legacy"}
    return plans.plan_of(Checkpoint.open(folder), method=method, options=settings | options)


def filled(plan):
    """The plan's parts with random weights, for calling their functions outside a graph."""
    torch.manual_seed(0)
    parts = Parts(plan).requires_grad_(False)
    for parameter in parts.parameters():
        parameter.normal_(0, 0.2)
    return parts


# ProxyV.


@pytest.mark.parametrize(("side", "factor"), [(4, 1), (4, 2), (6, 3), (24, 4), (24, 6), (10, 5), (24, 8)])
def test_pooled_proxies_are_the_bilinear_interpolation_of_each_crop(side, factor):
    full = torch.randn(1, 3 * side * side, 5)

    found = proxyv.pooled(full, 3, (side, side), factor)

    for crop, rows in enumerate(full[0].reshape(3, side, side, 5)):
        small = F.interpolate(
            rows.permute(2, 0, 1)[None], scale_factor=1 / factor, mode="bilinear", align_corners=False
        )
        expected = small[0].permute(1, 2, 0).reshape(-1, 5)
        count = (side // factor) ** 2
        torch.testing.assert_close(found[0, crop * count : (crop + 1) * count], expected, atol=1e-6, rtol=0)


def test_an_even_factor_takes_the_four_tokens_in_the_middle_of_a_block():
    full = torch.arange(64.0).reshape(1, 64, 1)

    found = proxyv.pooled(full, 1, (8, 8), 4)

    assert found[0, 0, 0] == (9 + 10 + 17 + 18) / 4


@pytest.mark.parametrize(
    ("crops", "separators", "suffix"),
    [
        (1, [611], 612),
        (3, [611, 611, 1188], 1766),
        (4, [611, 611, 1188, 1765], 2343),
        (5, [611, 611, 1188, 1765, 2342], 2920),
    ],
)
def test_separators_stand_where_the_released_code_counts_them(crops, separators, suffix):
    layout = proxyv.Layout(crops, 576, 36)

    assert [35 + position for position in layout.separator_positions()] == separators
    assert 35 + layout.rows == suffix


@pytest.mark.parametrize("crops", [1, 3, 5])
def test_rows_in_order_have_positions_that_ascend(crops):
    layout = proxyv.Layout(crops, 9, 1)
    positions = list(range(layout.rows))
    for row, position in zip(layout.separators(), layout.separator_positions(), strict=True):
        positions[row] = position

    found = [positions[row] for row in layout.order()]

    assert found == sorted(found) and sorted(layout.order()) == list(range(layout.rows))
    ties = [i for i in range(1, len(found)) if found[i] == found[i - 1]]
    assert ties == ([] if crops == 1 else [10])  # the second separator comes right after the first


def test_the_guided_update_is_that_of_the_paper_row_by_row(original):
    plan = planned(original(method="proxyv"), "proxyv", grid=(1, 2))
    parts, width = filled(plan), plan.spec.decoder.hidden
    full, proxies = torch.randn(1, 3 * 16, width), torch.randn(1, 3 * 4, width)

    found = proxyv.update(parts, 1, full, proxies, lambda context, rows: proxyv._grid_guide(plan, context, rows))

    mlp = parts.vision_mlp_layers[1]
    wi, wc = mlp["input_proj"].weight.t(), mlp["context_proj"].weight.t()
    w1, w2 = mlp["proj"]["0"].weight.t(), mlp["proj"]["2"].weight.t()
    for crop in range(3):
        for row in range(4):
            for column in range(4):
                x = full[0, crop * 16 + row * 4 + column]
                proxy = proxies[0, crop * 4 + row // 2 * 2 + column // 2]
                inner = w1 @ torch.cat([wi @ x, wc @ proxy])
                y = w2 @ (inner * torch.sigmoid(inner)) + x
                y = y / (y.square().mean() + plan.spec.decoder.eps).sqrt() * mlp["layernorm_post"].weight
                torch.testing.assert_close(found[0, crop * 16 + row * 4 + column], y, atol=1e-4, rtol=1e-4)


def test_learnt_proxies_mix_raw_tokens_and_spread_by_the_same_scores(original):
    plan = planned(original(method="proxyv", learn_proxy=True), "proxyv")
    parts, width = filled(plan), plan.spec.decoder.hidden
    full = torch.randn(1, 16, width)

    proxies, share = proxyv.learnt(parts, full)

    tokens, key = parts.proxyv_initializer.proxyv_tokens, parts.proxyv_initializer.Wk.weight.t()
    for p in range(4):
        scores = torch.stack([tokens[p] @ (key @ full[0, v]) for v in range(16)]) / math.sqrt(tokens.shape[1])
        weights = scores.exp() / scores.exp().sum()
        expected = sum(weights[v] * full[0, v] for v in range(16))
        torch.testing.assert_close(proxies[0, p], expected, atol=1e-4, rtol=1e-4)
    for v in range(16):
        scores = torch.stack([tokens[p] @ (key @ full[0, v]) for p in range(4)]) / math.sqrt(tokens.shape[1])
        torch.testing.assert_close(share[0, v], scores.softmax(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("hidden", "width"), [(1022, 511), (1024, 256), (4096, 1024)])
def test_the_guided_update_is_a_quarter_as_wide_as_a_decoder_of_1024_or_more(hidden, width):
    assert proxyv.narrow(SimpleNamespace(hidden=hidden)) == width


# YOPO.


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 6])
def test_visual_tokens_see_neighbours_and_text_sees_what_came_before(window, original):
    plan = planned(original(method="yopo", layers=2), "yopo", window=window)
    visual, text = torch.arange(3, 19), torch.cat([torch.arange(3), torch.arange(19, 28)])

    found = yopo.seen(plan, {"visual_index": visual, "text_index": text})

    rows = [*visual.tolist(), *text.tolist()]
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            if i < 16 and j < 16:
                sees = max(abs(i // 4 - j // 4), abs(i % 4 - j % 4)) <= (window - 1) / 2
            else:
                sees = b <= a
            assert bool(found[i, j]) == sees, (i, j)


@pytest.mark.parametrize(("ratio", "count"), [(1, 128), (2, 64), (3, 42), (1.3, 98), (128, 1)])
def test_channels_of_visual_tokens_are_cut_to_a_whole_number(ratio, count, original):
    plan = planned(original(method="yopo", layers=2), "yopo", ffn_ratio=ratio)

    assert yopo.channels(plan.spec, plan.config) == count == math.floor(128 / ratio)


def square(side):
    """(row, column) of the cells of a square."""
    return [(i, j) for i in range(side) for j in range(side)]


@pytest.mark.parametrize(("side", "window"), [(24, 5), (4, 3), (5, 1), (6, 4), (4, 9)])
def test_neighbours_are_at_most_half_a_window_apart_in_rows_and_columns(side, window):
    found = yopo.distances(torch.arange(side**2), square(side)) <= (window - 1) // 2

    for a in range(side**2):
        for b in range(side**2):
            apart = max(abs(a // side - b // side), abs(a % side - b % side))
            assert bool(found[a, b]) == (apart <= int((window - 1) / 2))


def test_a_window_of_5_on_24_by_24_has_the_known_counts():
    found = yopo.distances(torch.arange(576), square(24)) <= 2

    counts = found.sum(1)
    assert set(counts.tolist()) == {9, 12, 15, 16, 20, 25}
    assert counts.float().mean() == 22.5625
    assert bool((found == found.t()).all())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("row", ["1010", "1100", "0111", "0001", "1111", "0000"])
def test_every_head_reads_its_own_keys_whatever_heads_are_pruned(original, row, kv_heads):
    folder = original(method="yopo", layers=2, kv_heads=kv_heads, cutoff=1, head_mask=[row, "1111"])
    plan = planned(folder, "yopo", semantics="dropped")
    keys = torch.arange(float(kv_heads)).reshape(1, kv_heads, 1, 1).expand(1, kv_heads, 3, 8)

    groups = plan.groups(0)

    results = []
    for group in groups:
        cached = blocks.pick(keys, group.kv_heads)
        per = len(group.queries) // len(group.kv_heads)
        results.append(torch.cat([cached[:, i // per : i // per + 1, :1] for i in range(len(group.queries))], 1))
    found = blocks.merged(groups, results)
    assert found[0, :, 0, 0].tolist() == [h // (4 // kv_heads) for h in range(4)]
    sees_images = {h for group in groups if group.dropped == 0 for h in group.owned}
    assert sees_images == {h for h in range(4) if row[h] == "1"}


@pytest.mark.parametrize("row", ["11101000", "11110000", "10001000", "11111111", "01100110", "11111110", "00001011"])
def test_kept_heads_read_their_own_keys_where_groups_keep_different_numbers(row, original):
    plan = planned(original(method="yopo", layers=2, heads=8, kv_heads=2, cutoff=1, head_mask=[row, "1" * 8]), "yopo")
    kept = tuple(h for h in range(8) if row[h] == "1")
    heads = tuple(sorted({h // 4 for h in kept}))
    keys = torch.tensor(heads).float().reshape(1, -1, 1, 1)

    found = yopo._per_query(plan, keys, kept, heads)

    each = len(kept) // found.shape[1]
    assert [float(x) for x in found[0, :, 0, 0].repeat_interleave(each)] == [h // 4 for h in kept]


@pytest.mark.parametrize("bias", [{}, {"attention_bias": True, "mlp_bias": True}], ids=str)
def test_a_visual_token_uses_the_first_channels_and_the_kept_heads_alone(bias, original):
    folder = original(method="yopo", layers=2, cutoff=1, head_mask=["1010", "1111"], ffn_ratio=2, **bias)
    plan = planned(folder, "yopo", semantics="dropped")
    parts, d = filled(plan), plan.spec.decoder
    layer, x = parts.layers[0], torch.randn(1, 5, d.hidden)
    attended = torch.randn(1, 2, 5, d.head_dim)

    found = yopo._finish_visual(parts, plan, layer, x, attended, (0, 2))

    whole = torch.zeros(5, d.heads, d.head_dim)
    whole[:, 0], whole[:, 2] = attended[0, 0], attended[0, 1]
    y = x[0] + linear(layer.o_proj, whole.reshape(5, -1))
    normed = y / (y.square().mean(-1, keepdim=True) + d.eps).sqrt() * layer.post_attention_layernorm.weight
    inner = F.silu(linear(layer.gate_proj, normed)) * linear(layer.up_proj, normed)
    inner[:, d.ffn // 2 :] = 0
    torch.testing.assert_close(found[0], y + linear(layer.down_proj, inner), atol=1e-4, rtol=1e-4)


def linear(of, x):
    """The product with a weight [in, out], and the bias where there is one."""
    return x @ of.weight if of.bias is None else x @ of.weight + of.bias


def test_text_goes_through_the_output_projection_in_the_order_of_its_heads(original):
    folder = original(method="yopo", layers=2, cutoff=1, head_mask=["1010", "1111"], attention_bias=True)
    plan = planned(folder, "yopo", semantics="dropped")
    layer, d, found = filled(plan).layers[0], plan.spec.decoder, yopo.heads(plan, 0)
    attended, order = torch.randn(7, d.heads, d.head_dim), found.kept + found.pruned
    assert order == (0, 2, 1, 3) and layer.o_proj.bias is not None

    rows = attended[:, order].reshape(7, -1) @ yopo._selected(plan, layer, order)

    expected = linear(layer.o_proj, attended.reshape(7, -1))
    torch.testing.assert_close(yopo._biased(rows, layer.o_proj), expected, atol=1e-5, rtol=1e-5)


def test_the_papers_cost_without_any_reduction_is_that_of_a_dense_model(original):
    """A window of as many keys as there are visual tokens, every head, channel and layer."""
    folder = original(method="yopo", layers=3, head_mask=["1111"] * 3, cutoff=3, ffn_ratio=1, window=4)
    plan = planned(folder, "yopo")
    d, v = plan.spec.decoder, 16

    found = yopo.paper(plan)

    layer = 4 * v * d.hidden * d.hidden + 2 * v * v * d.hidden + 3 * v * d.hidden * d.ffn
    assert found["ratio"] == pytest.approx(1, abs=1e-12)
    assert found["value"] == pytest.approx(2 * 3 * layer / 1e12, rel=1e-12)
    half = yopo.paper(planned(folder, "yopo", cutoff=2, ffn_ratio=2.0))
    assert half["value"] == pytest.approx(2 * 2 * (layer - 1.5 * v * d.hidden * d.ffn) / 1e12, rel=1e-12)


# HiMix.


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
def test_image_keys_and_values_are_a_norm_and_a_projection_of_every_layers_own(original, decoder):
    plan = planned(original(method="himix", kv_heads=2, decoder=decoder), "himix")
    parts, d = filled(plan), plan.spec.decoder
    features = torch.randn(1, 15, 32)

    found = himix.image_kv(parts, plan, {"image_features": features})

    assert len(found) == 2 * d.layers
    for i, layer in enumerate(parts.layers):
        for name, linear in (("key", layer.k_proj_img), ("value", layer.v_proj_img)):
            for n, x in enumerate(features[0]):
                normed = x / (x.square().mean() + d.eps).sqrt() * layer.input_layernorm_img.weight
                y = normed @ linear.weight + (linear.bias if decoder == "qwen2" else 0)
                rows = found[f"present.{i}.{name}"][0, :, n]  # no rotary embedding
                torch.testing.assert_close(rows, y.reshape(2, d.head_dim), atol=1e-4, rtol=1e-4)


def test_the_legacy_attention_with_a_mask_is_a_softmax_over_what_is_visible():
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    visible = torch.tensor([[1, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]]).bool()

    found = legacy.attend_where(query, key, value, visible)

    for h in range(4):
        for row in range(3):
            seen = [j for j in range(5) if visible[row, j]]
            weights = torch.stack([query[0, h, row] @ key[0, h // 2, j] / math.sqrt(8) for j in seen]).softmax(0)
            expected = sum(w * value[0, h // 2, j] for w, j in zip(weights, seen, strict=True))
            torch.testing.assert_close(found[0, h, row], expected)


def test_few_heads_attend_like_many():
    from lvlm_edge.exporter.lowerings import modern

    query, key, value = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)

    found = modern._few(query, key, value, torch.tensor([3]))

    group = SimpleNamespace(name="0", dropped=0)
    inputs = {"past_key_values.0.key": key[:, :, :3], "past_key_values.0.value": value[:, :, :3]}
    expected, _ = legacy.append(inputs, group, query, key[:, :, 3:4], value[:, :, 3:4], torch.tensor([3]))
    torch.testing.assert_close(found, expected)


def test_himix_counts_the_head_on_every_row_and_image_keys_and_values_in_every_layer(original):
    plan = planned(original(method="himix", kv_heads=2), "himix")
    d, features, n, m = plan.spec.decoder, 32, 15, 64
    dkv, head = d.kv_heads * d.head_dim, 2 * d.hidden * d.vocab
    row = 2 * (2 * d.hidden * d.hidden + 2 * d.hidden * dkv + 3 * d.hidden * d.ffn)  # of all products with weights
    pair = 4 * d.hidden  # of a query and a key

    found = himix.paper(plan)

    assert plan.pictures[0].visual_tokens == n
    cost = d.layers * (m * row + m * (n + m) * pair + 2 * n * features * 2 * dkv) + m * head
    dense = d.layers * ((n + m) * row + (n + m) ** 2 * pair) + (n + m) * head
    assert found["value"] == pytest.approx(cost / 1e9, rel=1e-12)
    assert found["ratio"] == pytest.approx(cost / dense, rel=1e-12)

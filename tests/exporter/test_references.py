"""The references of `check`: against released code's outputs, and against second formulations of the methods."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import references
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.references import original, proxyv, yopo
from tests import checkpoints, originals, qwen, tiny

ORACLES = [("proxyv", "proxyv_f2"), ("yopo", "yopo_w7"), ("himix", "himix_mha")]
GQA = {"heads": 4, "kv_heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def answer(folder, method, prompt, pixels, steps=1, double=False, **changed):
    model = references.load(folder)
    config = originals.method_config(folder, **changed)
    return references.module(method).run(model.double() if double else model, config, prompt, pixels, steps)


def rewritten(source, folder, change):
    """A copy of a checkpoint, its tensors and its config changed by `change(tensors, config)`."""
    folder.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            (folder / path.name).mkdir()
            for file in path.iterdir():
                (folder / path.name / file.name).write_bytes(file.read_bytes())
        elif path.suffix == ".npy":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    tensors = change(tensors, config) or tensors
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Released code.


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize(("method", "checkpoint"), ORACLES)
def test_released_code_gives_the_same_tokens_and_logits(oracles, method, checkpoint, case):
    told = json.loads((oracles / method / f"{method}_{case}.json").read_text())
    tensors = load_file(oracles / method / f"{method}_{case}.safetensors")

    found = answer(oracles / checkpoint, method, told["prompt_token_ids"], tensors["pixel_values"], 16)

    assert found.tokens == told["expected_new_token_ids"]
    assert (found.logits - tensors["step_logits"]).abs().max() < 1e-4  # rounding, seen at 2e-5
    if method == "proxyv":
        assert [k.shape[1] for k, _ in found.cache] == told["cache_lengths_after_prefill"]


# ProxyV.


@pytest.mark.parametrize(
    ("crops", "newlines", "suffix"),
    [
        (1, [611], 612),
        (3, [611, 611, 1188], 1766),
        (4, [611, 611, 1188, 1765], 2343),
        (5, [611, 611, 1188, 1765, 2342], 2920),
    ],
)
def test_proxyv_positions_of_newlines_and_suffix(crops, newlines, suffix):
    place = proxyv.positions(35, 4, crops, 576, 36)

    assert place["newline"].tolist() == newlines
    assert place["text"].tolist() == [*range(35), *range(suffix, suffix + 4)]
    assert place["full"][::576].tolist() == [35 + 577 * crop for crop in range(crops)]
    assert place["proxy"].tolist() == list(range(35, 35 + 36 * crops))


def test_proxyv_five_crops_see_what_the_released_mask_lets_them():
    place = proxyv.positions(35, 4, 5, 576, 36)

    def seen(query, key):
        return proxyv.visible([query], [key], place)

    assert seen("newline", "full").sum(1).tolist() == [576, 576, 1152, 1728, 2304]
    assert seen("proxy", "text").sum(1).tolist() == [35] * 180
    assert seen("proxy", "proxy").equal(torch.ones(180, 180, dtype=torch.bool).tril())
    assert not seen("proxy", "newline").any()
    assert not seen("proxy", "full").any()
    assert not seen("text", "proxy").any()
    assert not seen("newline", "proxy").any()


def test_proxyv_proxies_see_newlines_at_positions_up_to_their_own():
    place = proxyv.positions(35, 4, 5, 576, 144)

    seen = proxyv.visible(["proxy"], ["newline"], place)

    for j, row in enumerate(seen.tolist()):
        assert row == [at <= 35 + j for at in (611, 611, 1188, 1765, 2342)]
    assert seen.any()


class Slow:
    """A Llama or Qwen2 decoder in float64 on a checkpoint's tensors, without transformers."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.w = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name, x):
        return F.rms_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.config["rms_norm_eps"])

    def turned(self, x, at):
        """[heads, n, d] at positions [n], channel pairs as complex numbers."""
        half = x.shape[-1] // 2
        angle = at[:, None] * 10000.0 ** (-torch.arange(half) / half)
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    def qkv(self, i, x, at):
        """Of un-normed rows; one key head per query head."""
        normed, heads = self.norm(f"model.layers.{i}.input_layernorm", x), self.config["num_attention_heads"]
        q, k, v = (self.linear(f"model.layers.{i}.self_attn.{n}_proj", normed) for n in "qkv")
        size = q.shape[-1] // heads
        q, k, v = (t.view(len(x), -1, size).transpose(0, 1) for t in (q, k, v))
        each = torch.arange(heads) * len(k) // heads
        return self.turned(q, at.double()), self.turned(k, at.double())[each], v[each]

    def finish(self, i, x, heads, channels=None):
        """Rows after the layer, from what attention gave [heads, n, d]."""
        name = f"model.layers.{i}."
        x = x + self.linear(name + "self_attn.o_proj", heads.transpose(0, 1).flatten(1))
        normed = self.norm(name + "post_attention_layernorm", x)
        w = [self.w[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up", "down")]
        gate, up, down = w[0][:channels], w[1][:channels], w[2][:, :channels]
        return x + (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T

    def logits(self, x):
        return self.linear("lm_head", self.norm("model.norm", x))


def attention(q, k, v, sees):
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~sees, float("-inf"))
    return scores.softmax(-1) @ v


def two_blocks(folder, prompt, embeds, crops):
    """ProxyV's first logits with two attentions per layer and rules in words instead of one mask of positions."""
    m, place = Slow(folder), prompt.index(originals.IMAGE)
    each, r, s = len(embeds) // crops, m.config["proxyv_reduce_factor"], m.config["proxyv_start_layer"]
    side, per = int(each**0.5), each // r**2
    few = side // r
    words = [token for token in prompt if token != originals.IMAGE]
    prefix, suffix = torch.arange(len(words)) < place, torch.arange(len(words)) >= place
    text, newline = m.w["model.embed_tokens.weight"][words], m.w["model.image_newline"].expand(crops, -1)
    full = embeds.double()
    text_at = torch.arange(len(words)) + suffix * (crops * (each + 1))
    full_at = place + torch.cat([torch.arange(each) + crop * (each + 1) for crop in range(crops)])
    newline_at = place + each + (each + 1) * torch.tensor([max(0, crop - 1) for crop in range(crops)])
    proxy_at = place + torch.arange(crops * per)

    def cells(*blocks):
        return torch.cat([torch.cat(row, 1) for row in blocks])

    def ones(a, b):
        return torch.ones(a, b, dtype=torch.bool)

    # Newline k sees the crops before it, newline 0 its own crop; newlines 0 and 1 share a position.
    crop_of = torch.arange(crops * each) // each
    newline_full = crop_of[None] <= (torch.arange(crops) - 1).clamp(min=0)[:, None]
    newline_newline = newline_at[:, None] >= newline_at[None]
    text_text = ones(len(words), len(words)).tril()
    for i in range(m.config["num_hidden_layers"]):
        fq, fk, fv = m.qkv(i, full, full_at)
        nq, nk, nv = m.qkv(i, newline, newline_at)
        tq, tk, tv = m.qkv(i, text, text_at)
        block = cells(
            [newline_full, newline_newline, prefix.expand(crops, -1)],
            [suffix[:, None] & ones(1, crops * each), suffix[:, None] & ones(1, crops), text_text],
        )
        keys, values = torch.cat([fk, nk, tk], 1), torch.cat([fv, nv, tv], 1)
        others = attention(torch.cat([nq, tq], 1), keys, values, block)
        if i < s:
            newline_seen = full_at[:, None] > newline_at[None]
            block = cells([ones(crops * each, crops * each).tril(), newline_seen, prefix.expand(crops * each, -1)])
            full = m.finish(i, full, attention(fq, keys, values, block))
        else:
            if i == s and not m.config["learn_proxy"]:
                grid = full.view(crops, few, r, few, r, -1)
                middle = slice(r // 2, r // 2 + 1) if r % 2 else slice(r // 2 - 1, r // 2 + 1)
                proxy = grid[:, :, middle][:, :, :, :, middle].mean((2, 4)).flatten(0, 2)
            elif i == s:
                asked = m.w["model.proxyv_initializer.proxyv_tokens"]
                score = asked @ (full.view(crops, each, -1) @ m.w["model.proxyv_initializer.Wk.weight"].T).mT
                score = score / asked.shape[1] ** 0.5
                proxy = (score.softmax(2) @ full.view(crops, each, -1)).flatten(0, 1)
            pq, pk, pv = m.qkv(i, proxy, proxy_at)
            block = cells([
                ones(crops * per, crops * per).tril(), proxy_at[:, None] >= newline_at[None],
                prefix.expand(crops * per, -1),
            ])  # fmt: skip
            heads = attention(pq, torch.cat([pk, nk, tk], 1), torch.cat([pv, nv, tv], 1), block)
            proxy = m.finish(i, proxy, heads)
            name = f"model.vision_mlp_layers.{i - s}."
            if m.config["learn_proxy"]:
                spread = (score.softmax(1).mT @ proxy.view(crops, per, -1)).flatten(0, 1)
            else:
                row, column = torch.arange(each) // side, torch.arange(each) % side
                block_of = torch.cat([crop * per + row // r * few + column // r for crop in range(crops)])
                spread = proxy[block_of]
            inside = torch.cat([m.linear(name + "input_proj", full), m.linear(name + "context_proj", spread)], 1)
            full = m.norm(
                name + "layernorm_post", full + m.linear(name + "proj.2", F.silu(m.linear(name + "proj.0", inside)))
            )
        joined = m.finish(i, torch.cat([newline, text]), others)
        newline, text = joined[:crops], joined[crops:]
    return m.logits(text[-1])


PROXYV = {
    "one crop": {},
    "three crops": {"crops": 3},
    "gqa": {"crops": 3, **GQA},
    "learnt proxies": {"crops": 3, "learn_proxy": True},
    "start layer 0": {"crops": 3, "start_layer": 0},
    "the last layer alone": {"start_layer": 3},
    "factor 4": {"side": 8, "reduce_factor": 4},
    "odd factor": {"side": 6, "reduce_factor": 3, "crops": 3},
    "factor 1": {"reduce_factor": 1},
    "proxies see newlines": {"crops": 5, "side": 4, "reduce_factor": 2},
    "learnt proxies see newlines": {"crops": 5, "learn_proxy": True, "start_layer": 0, **GQA},
    "qwen2": {"crops": 3, "decoder": "qwen2"},
}


@pytest.mark.parametrize("name", PROXYV)
def test_proxyv_with_one_mask_equals_two_attentions(tmp_path, name):
    options = dict(PROXYV[name])
    crops, side = options.pop("crops", 1), options.get("side", 4)
    folder = originals.build(tmp_path / "model", method="proxyv", **options)
    prompt, pixels = originals.prompt(12, 5), originals.pixels(side, crops=crops)

    found = answer(folder, "proxyv", prompt, pixels, double=True)

    # transformers turns heads and the tower's features by float32 tables even in float64
    torch.testing.assert_close(
        found.logits[0], two_blocks(folder, prompt, found.image_embeds, crops), atol=1e-5, rtol=0
    )


def test_proxyv_without_the_newlines_of_proxies_is_something_else(tmp_path, monkeypatch):
    folder = originals.build(tmp_path / "model", method="proxyv", start_layer=0)
    case = originals.prompt(12, 5), originals.pixels(crops=5)
    right, whole = answer(folder, "proxyv", *case), proxyv.visible

    def blind(queries, keys, place):
        place = place | {"newline": place["newline"] + 10_000 * ("proxy" in keys and queries == ["proxy"])}
        return whole(queries, keys, place)

    def without(queries, keys, place):
        return torch.cat([blind([q], keys, place) for q in queries])

    monkeypatch.setattr(proxyv, "visible", without)
    assert (answer(folder, "proxyv", *case).logits - right.logits).abs().max() > 1e-3


@pytest.mark.parametrize("factor", [2, 4, 6])
def test_proxyv_interpolates_the_middle_of_each_block(factor):
    grid = torch.randn(2, 12, 12, 3, dtype=torch.float64)
    middle = grid.view(2, 12 // factor, factor, 12 // factor, factor, 3)
    middle = middle[:, :, factor // 2 - 1 : factor // 2 + 1, :, factor // 2 - 1 : factor // 2 + 1].mean((2, 4))

    torch.testing.assert_close(proxyv._pooled_proxies(grid, factor), middle.flatten(0, 2))


def test_proxyv_guided_update_of_width_4096_has_the_papers_parameters():
    assert sum(np.prod(shape) for shape in originals._proxyv(4096, 24, 4, False, 1).values()) == 14_684_160


# YOPO.


def test_yopo_neighbours_on_the_released_grid():
    near = yopo.neighbours([(24, 24)], 5)

    assert set(near.sum(1).tolist()) == {9, 12, 15, 16, 20, 25}
    assert near.sum(1).double().mean() == 22.5625
    assert near.equal(near.T)
    assert near.diagonal().all()
    assert yopo.neighbours([(24, 24)], 6).equal(near)


def before_the_softmax(q, k, sees, removed):
    return original.softmax(q, k, sees & ~removed)


YOPO = {
    "mha": {},
    "gqa": GQA,
    "qwen2": {"decoder": "qwen2", **GQA},
    "cutoff 1": {"cutoff": 1},
    "no cutoff": {"cutoff": 4},
    "window of the grid": {"window": 47},
    "window 1": {"window": 1},
    "no head in a layer": {"head_mask": ["1111", "0000", "0100", "1111"], "cutoff": 3},
    "nothing pruned": {"head_mask": ["1111"] * 4, "cutoff": 4},
    "ffn ratio 3": {"ffn_ratio": 3},
    "ffn ratio 1": {"ffn_ratio": 1},
}


@pytest.mark.parametrize("name", YOPO)
def test_yopo_dropped_is_released_with_dropped_keys_masked_before_the_softmax(tmp_path, monkeypatch, name):
    folder = originals.build(tmp_path / "model", method="yopo", **YOPO[name])
    case = originals.prompt(12, 5), originals.pixels(), 6
    dropped = answer(folder, "yopo", *case, semantics="dropped")
    released = answer(folder, "yopo", *case)

    monkeypatch.setattr(yopo, "released_probabilities", before_the_softmax)
    masked = answer(folder, "yopo", *case)

    torch.testing.assert_close(dropped.logits, masked.logits, atol=1e-5, rtol=0)
    same = bool((dropped.logits - released.logits).abs().max() < 1e-5)
    assert same == (name == "nothing pruned")


def two_streams(folder, prompt, embeds, window, cutoff, channels, head_mask):
    """`dropped`: first logits from a stream of visual rows and one of text rows, a query at a time over its keys."""
    m, place = Slow(folder), prompt.index(originals.IMAGE)
    words = [token for token in prompt if token != originals.IMAGE]
    text, visual, side = m.w["model.embed_tokens.weight"][words], embeds.double(), int(len(embeds) ** 0.5)
    text_at = torch.arange(len(words)) + (torch.arange(len(words)) >= place) * len(embeds)
    visual_at = place + torch.arange(len(embeds))
    for i in range(m.config["num_hidden_layers"]):
        tq, tk, tv = m.qkv(i, text, text_at)
        vq, vk, vv = m.qkv(i, visual, visual_at)
        text_out, visual_out = torch.zeros_like(tq), torch.zeros_like(vq)
        for h, kept in enumerate(head_mask[i]):
            for t in range(len(words)):
                keys, values = tk[h, : t + 1], tv[h, : t + 1]
                if kept == "1" and i < cutoff and t >= place:
                    keys, values = torch.cat([keys, vk[h]]), torch.cat([values, vv[h]])
                text_out[h, t] = attention(tq[h, t : t + 1], keys, values, torch.tensor(True))[0]
            for j in range(len(embeds)) if kept == "1" else ():
                near = [
                    n for n in range(len(embeds))
                    if max(abs(n // side - j // side), abs(n % side - j % side)) <= (window - 1) // 2
                ]  # fmt: skip
                keys, values = torch.cat([tk[h, :place], vk[h, near]]), torch.cat([tv[h, :place], vv[h, near]])
                visual_out[h, j] = attention(vq[h, j : j + 1], keys, values, torch.tensor(True))[0]
        text, visual = m.finish(i, text, text_out), m.finish(i, visual, visual_out, channels)
    return m.logits(text[-1])


@pytest.mark.parametrize("name", YOPO)
def test_yopo_dropped_equals_two_streams(tmp_path, name):
    folder = originals.build(tmp_path / "model", method="yopo", **YOPO[name])
    prompt, config = originals.prompt(12, 5), originals.method_config(folder)
    settings = config["window"], config["cutoff"], int(128 / config["ffn_ratio"]), config["head_mask"]

    found = answer(folder, "yopo", prompt, originals.pixels(), double=True, semantics="dropped")

    expected = two_streams(folder, prompt, found.image_embeds, *settings)
    torch.testing.assert_close(found.logits[0], expected, atol=1e-5, rtol=0)


def test_yopo_dropped_caches_no_visual_tokens_from_the_cutoff_on(tmp_path):
    folder = originals.build(tmp_path / "model", method="yopo", cutoff=3)

    found = answer(folder, "yopo", originals.prompt(12, 5), originals.pixels(), semantics="dropped")

    assert [k.shape[1] for k, _ in found.cache] == [28, 28, 28, 12]


# HiMix.


def test_himix_knows_no_order_of_images_and_no_place_in_the_prompt(tmp_path):
    folder = originals.build(tmp_path / "model", method="himix", **GQA)
    pixels = originals.pixels(crops=3)

    found = answer(folder, "himix", originals.prompt(12, 5, images=3), pixels, 4)

    moved = answer(folder, "himix", originals.prompt(12, 0, images=3), pixels[[2, 0, 1]], 4)
    torch.testing.assert_close(found.logits, moved.logits, atol=1e-5, rtol=0)
    other = answer(folder, "himix", originals.prompt(12, 5, images=3), pixels.flip(-1), 4)
    assert (found.logits - other.logits).abs().max() > 1e-3
    assert found.image_kv.shape == (4, 2, 2, 45, 16)


# What all have in common.


@pytest.mark.parametrize("method", ["proxyv", "yopo", "dropped", "himix", "plain"])
def test_decoding_equals_a_longer_prompt(tmp_path, method):
    changed = {"yopo": {"semantics": "released"}, "dropped": {"semantics": "dropped"}}.get(method, {})
    layout, name = ("yopo", "yopo") if method == "dropped" else (method, method.replace("plain", "none"))
    name = "yopo" if method == "dropped" else name
    folder = originals.build(tmp_path / "model", method=layout, **GQA)
    prompt, pixels = originals.prompt(9, 4), originals.pixels(crops=3 if method == "proxyv" else 1)
    found = answer(folder, name, prompt, pixels, 4, **changed)

    for t in range(4):
        longer = answer(folder, name, [*prompt, *found.tokens[:t]], pixels, 1, **changed)

        torch.testing.assert_close(found.logits[t], longer.logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
@pytest.mark.parametrize("method", ["proxyv", "yopo", "himix", "plain"])
def test_shared_key_heads_are_key_heads_twice(tmp_path, method, decoder):
    def twice(tensors, config):
        text = config.get("text_config", config)
        for name, tensor in tensors.items():
            if any(f"self_attn.{part}_proj" in name for part in "kv") and "vision_tower" not in name:
                heads = tensor.view(text["num_key_value_heads"], -1, *tensor.shape[1:])
                tensors[name] = heads.repeat_interleave(2, 0).flatten(0, 1)
        text["num_key_value_heads"] *= 2

    folder = originals.build(tmp_path / "gqa", method=method, decoder=decoder, **GQA)
    mha = rewritten(folder, tmp_path / "mha", twice)
    name, case = method.replace("plain", "none"), (originals.prompt(9, 4), originals.pixels(), 3)

    torch.testing.assert_close(answer(folder, name, *case).logits, answer(mha, name, *case).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["proxyv", "yopo", "plain"])
def test_fused_projections_are_their_parts(tmp_path, method):
    def split(tensors, config):
        config |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
        for name in list(tensors):
            for fused, parts, sizes in (
                ("qkv_proj", ("q_proj", "k_proj", "v_proj"), (64, 32, 32)),
                ("gate_up_proj", ("gate_proj", "up_proj"), (128, 128)),
            ):
                if fused in name:
                    for part, tensor in zip(parts, tensors.pop(name).split(sizes), strict=True):
                        tensors[name.replace(fused, part)] = tensor

    folder = originals.build(tmp_path / "phi3", method=method, decoder="phi3", **GQA)
    llama = rewritten(folder, tmp_path / "llama", split)
    name, case = method.replace("plain", "none"), (originals.prompt(9, 4), originals.pixels(), 3)

    torch.testing.assert_close(answer(folder, name, *case).logits, answer(llama, name, *case).logits, atol=1e-5, rtol=0)


def test_the_models_class_names_the_decoder_where_model_type_is_anothers(tmp_path):
    folder = originals.build(tmp_path / "model", decoder="phi3", model_type="llava_llama")

    assert references.load(folder).language.config.model_type == "phi3"


def test_tinyllava_may_have_a_connector(tmp_path):
    def connected(tensors, config):
        llava = load_file(tmp_path / "llava" / "model.safetensors")
        names = {n: n.replace("model.mm_projector", "connector._connector") for n in llava if "mm_projector" in n}
        config["connector_type"] = "mlp2x_gelu"
        kept = {n: t for n, t in tensors.items() if "_img" not in n}
        return kept | {names[n]: t for n, t in llava.items() if n in names}

    originals.build(tmp_path / "llava")
    folder = rewritten(originals.build(tmp_path / "himix", method="himix"), tmp_path / "tinyllava", connected)

    found = answer(folder, "none", originals.prompt(9, 4), originals.pixels(), 2)

    assert found.image_embeds.shape == (15, 64)


@pytest.fixture
def plain(tmp_path):
    return originals.build(tmp_path / "plain")


@pytest.mark.parametrize("place", ["absolute", "inside"])
def test_the_tower_may_lie_elsewhere(plain, tmp_path, place):
    def change(tensors, config):
        home = plain / config["mm_vision_tower"]
        if place == "absolute":
            config["mm_vision_tower"] = str(home)
            return tensors
        tower = load_file(home / "model.safetensors")
        return tensors | {f"model.vision_tower.vision_tower.{k}": v for k, v in tower.items()}

    other = rewritten(plain, tmp_path / "other", change)
    (other / "clip-tiny-56" / "model.safetensors").unlink()
    case = originals.prompt(9, 4), originals.pixels(), 2

    assert answer(other, "none", *case).logits.equal(answer(plain, "none", *case).logits)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.mm_projector.2.bias", "lm_head.weight"])
def test_a_tensor_that_is_missing_is_said(plain, tmp_path, name):
    def change(tensors, config):
        return {k: v for k, v in tensors.items() if k != name}

    with pytest.raises(CheckpointError, match=name.removeprefix("model.mm_projector.")):
        references.load(rewritten(plain, tmp_path / "other", change))


def test_a_tensor_that_nothing_takes_is_said(plain, tmp_path):
    other = rewritten(plain, tmp_path / "other", lambda tensors, config: tensors | {"model.what": torch.ones(1)})
    with pytest.raises(CheckpointError, match="what"):
        references.load(other)


def test_the_hubs_layout_of_the_same_weights_answers_alike(plain):
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    m = references.load(plain)
    config = LlavaConfig(
        vision_config=m.tower.config.to_dict(), text_config=m.language.config.to_dict(), image_token_index=159,
        vision_feature_layer=-2, tie_word_embeddings=False,
    )  # fmt: skip
    hub = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    hub.model.vision_tower.load_state_dict(m.tower.state_dict())
    hub.model.language_model.load_state_dict(m.decoder.state_dict())
    hub.lm_head.load_state_dict(m.language.lm_head.state_dict())
    for mine, theirs in (("0", "linear_1"), ("2", "linear_2")):
        part = getattr(hub.model.multi_modal_projector, theirs)
        part.load_state_dict(getattr(m.projector, mine).state_dict())
    prompt, pixels = originals.prompt(9, 4, images=2, vocab=159), originals.pixels(crops=2)
    given = [159 if token == originals.IMAGE else token for token in prompt]

    for method, options in (("none", {}), ("fastv", {"prune_layer": 2, "keep_ratio": 0.5, "keep_tokens": None})):
        run = references.module(method).run
        mine, theirs = run(m, options, prompt, pixels, 4), run(hub, options, given, pixels, 4)

        torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(mine.image_embeds, theirs.image_embeds, atol=1e-5, rtol=0)
    one, at = [given[:5] + given[7:], prompt[:5] + prompt[7:]], pixels[:1]
    config = {"semantics": "dropped", "window": 3, "cutoff": 2, "ffn_ratio": 2, "head_mask": ["1010"] * 4}
    torch.testing.assert_close(
        yopo.run(hub, config, one[0], at, 3).logits, yopo.run(m, config, one[1], at, 3).logits, atol=1e-5, rtol=0
    )


def test_a_newline_follows_every_crop_in_none_and_fastv(tmp_path):
    folder = originals.build(tmp_path / "model", newline=True)
    prompt, pixels, m = originals.prompt(9, 4), originals.pixels(crops=3), references.load(folder)

    _, embeds, rows, visual = m.read(prompt, pixels)

    assert visual.nonzero()[:, 0].tolist() == list(range(4, 4 + 3 * 17))
    for crop in range(3):
        at = 4 + 17 * crop
        assert rows[at : at + 16].equal(embeds[16 * crop : 16 * (crop + 1)])
        assert rows[at + 16].equal(m.newline)
    every = {"prune_layer": 2, "keep_ratio": 1.0, "keep_tokens": None}
    none, fastv = (references.module(n).run(m, every, prompt, pixels, 4) for n in ("none", "fastv"))
    torch.testing.assert_close(none.logits, fastv.logits, atol=1e-5, rtol=0)


def test_references_share_nothing_with_the_graphs():
    folder = Path(references.__file__).parent
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    for module in ("blocks", "parts", "methods", "lowerings", "families"):
        assert f"exporter.{module}" not in text and f"exporter import {module}" not in text


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_an_image_token_outside_of_the_embedding_stands_for_its_features(kind, oracles, tmp_path):
    if kind == "llava":
        folder, ids, seen = checkpoints.build(tmp_path / "m"), checkpoints.prompt(6, 2), checkpoints.pixels()
        inside, field = checkpoints.IMAGE, "image_token_index"
        tokens, logits = checkpoints.generate(folder, ids, seen, 4)
    else:
        of = qwen.case(oracles, kind, "none_1")
        folder = Path(shutil.copytree(of.checkpoint, tmp_path / "m"))
        inside, field = tiny.read_json(folder / "config.json")["image_token_id"], "image_token_id"
        ids, seen = [5, inside, 6, 7], np.random.default_rng(0).standard_normal((1, 3, 56, 56)).astype(np.float32)
        tokens, logits = qwen.generate(folder, ids, [seen], 4)
    config = tiny.read_json(folder / "config.json")
    outside = (config.get("text_config") or config)["vocab_size"] + 5
    tiny.change_json(folder / "config.json", **{field: outside})
    moved = [outside if i == inside else i for i in ids]

    model = references.load(folder)
    found = references.module("none").run(model, {}, moved, references.pixels(seen), 4)
    pruned = references.module("fastv").run(
        model, {"prune_layer": 1, "keep_tokens": None, "keep_ratio": 1.0}, moved, references.pixels(seen), 4
    )
    first, _ = references.view(model).prefill(moved, references.pixels(seen))

    assert found.tokens == pruned.tokens == tokens
    for rows in (found.logits, pruned.logits):
        assert np.abs(rows.numpy() - logits).max() < 1e-3
    assert np.abs(first.logits[0, -1].numpy() - logits[0]).max() < 1e-3

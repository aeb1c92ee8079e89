"""YOPO in both semantics, on full sequences with full masks.

`released` is the released code, a simulation: visual columns are zeroed after the softmax, in pruned heads and, from
the cutoff on, in all. For Qwen2-VL the release masks them from the cutoff on before the softmax, for the text behind
the picture, which it looks for as many rows too early as there are before the picture; here it is where it is.
`dropped` is what either stands for: those keys are gone before the softmax, and so are the visual tokens from the
cutoff on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lvlm_edge.exporter.references import Reference, original
from lvlm_edge.exporter.references.original import Cache, Original


@torch.no_grad()
def run(
    model: Any,
    method_config: dict[str, Any],
    prompt: Sequence[int],
    pixels: Tensor,
    steps: int,
    kept: Tensor | None = None,
) -> Reference:
    """Greedy tokens with YOPO, end-of-sequence ignored.

    Args:
        method_config: `semantics`, `window`, `cutoff`, `ffn_ratio`, and `head_mask`, a string per layer in which 1
            is a head that stays for visual tokens.
        prompt: with exactly one image.
    """
    m = original.view(model)
    read = m.lay_out(prompt, pixels)
    assert list(prompt).count(m.image_token_id) == 1 and sum(r * c for r, c in read.grids) == int(read.images.sum())
    forward = {"released": _released, "dropped": _dropped}[method_config["semantics"]]
    head_mask = torch.tensor([[c == "1" for c in row] for row in method_config["head_mask"]])
    sees = visible(read.images, read.grids, method_config["window"])
    settings = method_config | {"head_mask": head_mask, "sees": sees, "visual": read.images}

    cache: Cache = []
    last = forward(m, settings, read.rows, read.positions, cache)
    prefill = original.stored(m, cache)
    logits, tokens = [m.logits(last)], []
    for step in range(steps):
        tokens.append(int(logits[-1].argmax()))
        if step + 1 < steps:
            logits.append(m.logits(forward(m, settings, m.embed(tokens[-1:]), m.at(read.next + step), cache)))
    return Reference(
        image_features=read.features,
        image_embeds=read.embeds,
        logits=torch.stack(logits),
        tokens=tokens,
        cache=prefill,
    )


def neighbours(grids: Sequence[tuple[int, int]], window: int) -> Tensor:
    """Which visual tokens see each other: those at most half a window apart in rows and in columns, [V, V].

    Args:
        grids: (rows, columns) of each tile; tokens of two tiles are no neighbours.
    """
    reach = int((window - 1) / 2)
    tile, row, column = [], [], []
    for number, (rows, columns) in enumerate(grids):
        for i in range(rows * columns):
            tile.append(number)
            row.append(i // columns)
            column.append(i % columns)
    same, down, across = (torch.tensor(x)[:, None] - torch.tensor(x)[None] for x in (tile, row, column))
    return (same == 0) & (down.abs() <= reach) & (across.abs() <= reach)


def visible(visual: Tensor, grids: Sequence[tuple[int, int]], window: int | str) -> Tensor:
    """Causal, but for visual tokens among themselves, who see their neighbours on either side, [n, n].

    Args:
        window: `none` for visual tokens that see all before them.
    """
    n, where = len(visual), visual.nonzero()[:, 0]
    sees = torch.ones(n, n, dtype=torch.bool).tril()
    if window != "none":
        sees[where[:, None], where[None]] = neighbours(grids, int(window))
    return sees


def channels(m: Original, settings: dict[str, Any]) -> int:
    """FFN channels that visual tokens use."""
    return int(m.language.config.intermediate_size / settings["ffn_ratio"])


def released_probabilities(q: Tensor, k: Tensor, sees: Tensor, removed: Tensor) -> Tensor:
    """Probabilities [H, queries, keys] with removed keys [H, 1, keys] set to zero after the softmax."""
    return original.softmax(q, k, sees).masked_fill(removed, 0)


def _released(m: Original, settings: dict[str, Any], rows: Tensor, at: Tensor, cache: Cache) -> Tensor:
    """The whole prompt, or one token after it: rows of the last layer.

    Args:
        settings: the method's, with `head_mask`, bool [L, H]; and of the prompt's rows `visual`, which are visual
            tokens, and `sees`, [n, n].
        at: positions of the rows, as `Read` has them.
    """
    prefill, visual = not cache, settings["visual"]
    new = visual if prefill else torch.tensor([False])  # visual rows among the rows at hand
    before_softmax = len(at) == 3  # the release for Qwen2-VL
    for i, layer in enumerate(m.decoder.layers):
        q, k, v = original.qkv(layer, layer.input_layernorm(rows))
        q, k = original.rope(m.decoder, q, at), original.rope(m.decoder, k, at)
        if not prefill:
            k, v = torch.cat([cache[i][0], k], 1), torch.cat([cache[i][1], v], 1)
        cache[i : i + 1] = [(k, v)]
        columns = torch.cat([visual, torch.zeros(k.shape[1] - len(visual), dtype=torch.bool)])
        sees = settings["sees"] if prefill else torch.ones(1, len(columns), dtype=torch.bool)
        pruned = ~settings["head_mask"][i][:, None, None]  # [H, 1, 1]
        dropped = torch.tensor(i >= settings["cutoff"])
        if before_softmax:
            sees = sees & ~(dropped & columns & ~new[:, None])
            dropped = torch.tensor(False)
        removed = (pruned | dropped) & columns
        heads = released_probabilities(q, k, sees, removed) @ v
        heads = heads.masked_fill(pruned & new[:, None], 0)  # visual rows of pruned heads
        rows = rows + original.join(layer, heads)
        few = original.feed_forward(layer, rows, channels(m, settings))
        rows = torch.where(new[:, None], few, original.feed_forward(layer, rows))
    return rows


def _dropped(m: Original, settings: dict[str, Any], rows: Tensor, at: Tensor, cache: Cache) -> Tensor:
    """The whole prompt, or one token after it: text rows of the last layer. Arguments as of `_released`."""
    prefill, visual, sees = not cache, settings["visual"], settings["sees"]
    new = visual if prefill else torch.tensor([False])
    for i, layer in enumerate(m.decoder.layers):
        if i == settings["cutoff"]:  # visual tokens leave
            rows, at, sees = rows[~new], at[..., ~new], sees[~visual][:, ~visual]
            new, visual = torch.zeros(len(rows), dtype=torch.bool), torch.zeros(int((~visual).sum()), dtype=torch.bool)
        q, k, v = original.qkv(layer, layer.input_layernorm(rows))
        q, k = original.rope(m.decoder, q, at), original.rope(m.decoder, k, at)
        if not prefill:
            k, v = torch.cat([cache[i][0], k], 1), torch.cat([cache[i][1], v], 1)
        cache[i : i + 1] = [(k, v)]
        columns = torch.cat([visual, torch.zeros(k.shape[1] - len(visual), dtype=torch.bool)])
        heads = []
        for h, keeps in enumerate(settings["head_mask"][i]):
            allowed = sees if prefill else torch.ones(1, len(columns), dtype=torch.bool)
            if not keeps:
                allowed = allowed & ~columns[None]
            out = torch.zeros_like(q[h])
            asks = ~new if not keeps else torch.ones_like(new)  # a visual row of a pruned head is zero
            out[asks] = (original.softmax(q[h : h + 1, asks], k[h : h + 1], allowed[asks]) @ v[h : h + 1])[0]
            heads.append(out)
        rows = rows + original.join(layer, torch.stack(heads))
        few = original.feed_forward(layer, rows, channels(m, settings))
        rows = torch.where(new[:, None], few, original.feed_forward(layer, rows))
    return rows

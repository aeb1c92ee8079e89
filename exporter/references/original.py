"""A model in parts, on transformers' modules, and the steps of a decoder layer that the references write out.

The steps are for one sequence, on those modules' weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Read:
    """What the decoder reads of a prompt, and where its rows are. All in the model's precision.

    Attributes:
        features: what the projector reads, [images, V, D_v], or of all images together [V, D_v].
        embeds: what the decoder reads of it, without separators, [images * V, D].
        rows: the decoder's rows in logical order, [n, D].
        images: which of them are the images', bool [n].
        positions: as the decoder's rotary embedding takes them: [1, n], or [3, 1, n].
        next: position of the first generated token.
        grids: (rows, columns) of the cells that the images' rows lie on, one grid after the other; empty where they lie
            on none.
        injected: what is added to the images' rows after decoder layers 0, 1, ..., [rows of images, D] each.
    """

    features: Tensor
    embeds: Tensor
    rows: Tensor
    images: Tensor
    positions: Tensor
    next: int
    grids: tuple[tuple[int, int], ...] = ()
    injected: tuple[Tensor, ...] = ()


class Original:
    """A model in parts.

    Attributes:
        image_token_id: what stands in a prompt where an image goes.
        tower: CLIPVisionModel or SiglipVisionModel.
        projector: linear, GELU, linear; None where the decoder reads the features themselves.
        language: transformers' causal model: `.model` is the decoder, `.lm_head` its head.
        extra: tensors of a method, by the names they have in the checkpoint, less its prefix `model.` and the like.
        select: hidden states of the tower that are read, concatenated, as in the config.
        drop_first: token 0 of them is removed.
        sizes: (width, height) of a prompt's pictures, for models whose rows depend on them.
        processed: options of transformers' image processor for the checkpoint; None where it has none.
    """

    def __init__(
        self,
        *,
        image_token_id: int,
        tower: Any,
        projector: Any,
        language: Any,
        extra: dict[str, Tensor],
        select: Sequence[int],
        drop_first: bool,
    ) -> None:
        self.image_token_id = image_token_id
        self.tower, self.projector, self.language = tower, projector, language
        self.extra, self.select, self.drop_first = extra, select, drop_first
        self.sizes: tuple[tuple[int, int], ...] = ()

    processed: ClassVar[dict[str, Any] | None] = None

    def as_processor(self, views: Tensor) -> Tensor:
        """Views of a picture, [views, 3, H, W], as transformers' image processor returns them; `processed` only."""
        return views

    @property
    def decoder(self) -> Any:
        return self.language.model

    @property
    def newline(self) -> Tensor | None:
        """What follows every crop, [D]."""
        return self.extra.get("image_newline")

    def double(self) -> Original:
        """The same model, in float64 from here on."""
        for module in (self.tower, self.projector, self.language):
            if module is not None:
                module.double()
        self.extra = {name: tensor.double() for name, tensor in self.extra.items()}
        return self

    def see(self, pixels: Any) -> tuple[Tensor, Tensor]:
        """Features [crops, V, D_v], and what the decoder reads of them without newlines, [crops * V, D]."""
        weight = self.language.lm_head.weight
        states = self.tower(pixels.to(weight.dtype), output_hidden_states=True).hidden_states
        features = torch.cat([states[i] for i in self.select], -1)
        features = features[:, 1:] if self.drop_first else features
        embeds = features if self.projector is None else self.projector(features)
        return features, embeds.flatten(0, 1)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Rows of text tokens, [n, D]."""
        rows: Tensor = self.decoder.embed_tokens(torch.tensor(list(ids), dtype=torch.int64))
        return rows

    def read(self, prompt: Sequence[int], pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features, embeddings, the decoder's rows [n, D] in logical order, and which of them are the images' [n].

        Every image has as many crops as the others; a newline follows each where there is one, and is the image's.
        """
        features, embeds = self.see(pixels)
        images = list(prompt).count(self.image_token_id)
        shares = embeds.view(*features.shape[:2], -1)  # [crops * images, V, D]
        if self.newline is not None:
            shares = torch.cat([shares, self.newline.expand(len(shares), 1, -1)], 1)
        blocks = list(shares.flatten(0, 1).view(images, -1, shares.shape[-1])) if images else []
        rows, visual = [], []
        for token in prompt:
            row = blocks.pop(0) if token == self.image_token_id else self.embed([token])
            rows.append(row)
            visual += [token == self.image_token_id] * len(row)
        return features, embeds, torch.cat(rows), torch.tensor(visual)

    def lay_out(self, prompt: Sequence[int], pixels: Any) -> Read:
        """A prompt as the decoder reads it; positions are numbers of rows."""
        features, embeds, rows, images = self.read(prompt, pixels)
        return Read(
            features=features,
            embeds=embeds,
            rows=rows,
            images=images,
            positions=torch.arange(len(rows))[None],
            next=len(rows),
            grids=() if self.newline is not None else squares(len(features), features.shape[1]),
        )

    def at(self, position: int) -> Tensor:
        """The position of one generated token, as the decoder's rotary embedding takes it."""
        return torch.tensor([[position]])

    def answer(self, prompt: Sequence[int], pixels: Any, steps: int) -> tuple[list[int], Tensor]:
        """Greedy tokens of stock `generate`, end-of-sequence ignored, and their logits [steps, vocab]."""
        rows = self.lay_out(prompt, pixels).rows
        return generated(self.language, steps, {"inputs_embeds": rows[None]}, len(rows))

    @property
    def answers(self) -> bool:
        """Whether transformers can run the model as a whole."""
        return self.projector is not None

    def attend_with(self, implementation: str) -> None:
        """Choose transformers' implementation of attention."""
        for part in (self.tower, self.language):
            part.set_attn_implementation(implementation)

    def prefill(self, prompt: Sequence[int], pixels: Any) -> tuple[Any, Any]:
        """Stock output for a prompt, and a function of (token [1, 1], cache) that gives that of one more token."""
        rows = self.lay_out(prompt, pixels).rows
        out = self.language(inputs_embeds=rows[None], use_cache=True, logits_to_keep=1)
        return out, lambda token, cache: self.language(input_ids=token, past_key_values=cache, use_cache=True)

    def logits(self, row: Tensor) -> Tensor:
        """Logits of the last of some rows, [vocab]."""
        found: Tensor = self.language.lm_head(self.decoder.norm(row[-1]))
        return found


class Hub(Original):
    """The parts of a `LlavaForConditionalGeneration`, which sees pictures its own way."""

    processed: ClassVar[dict[str, Any] | None] = {}

    def __init__(self, model: Any) -> None:
        language = nn.Module()
        language.model, language.lm_head = model.model.language_model, model.lm_head
        language.config = model.config.text_config
        super().__init__(
            image_token_id=model.config.image_token_id,
            tower=model.model.vision_tower,
            projector=model.model.multi_modal_projector,
            language=language,
            extra={},
            select=(),
            drop_first=False,
        )
        self.whole = model

    def see(self, pixels: Any) -> tuple[Tensor, Tensor]:
        with recorded(self.projector, lambda i, o: i[0]) as features:
            embeds = torch.cat(list(self.whole.model.get_image_features(pixels).pooler_output))
        return features[0], embeds

    def answer(self, prompt: Sequence[int], pixels: Any, steps: int) -> tuple[list[int], Tensor]:
        ids = self._expanded(prompt, pixels)
        return generated(self.whole, steps, {"input_ids": ids, "pixel_values": pixels}, ids.shape[1])

    def attend_with(self, implementation: str) -> None:
        self.whole.set_attn_implementation(implementation)

    def prefill(self, prompt: Sequence[int], pixels: Any) -> tuple[Any, Any]:
        ids = self._expanded(prompt, pixels)
        out = self.whole(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)
        return out, lambda token, cache: self.whole(input_ids=token, past_key_values=cache, use_cache=True)

    def _expanded(self, prompt: Sequence[int], pixels: Any) -> Tensor:
        """Token ids with the image token once per visual token, [1, n]."""
        vision = self.whole.config.vision_config
        each = (vision.image_size // vision.patch_size) ** 2 + (vision.model_type == "clip_vision_model")
        each -= self.whole.config.vision_feature_select_strategy == "default"
        return torch.tensor([[t for i in prompt for t in ([i] * each if i == self.image_token_id else [i])]])


def generated(model: Any, steps: int, given: dict[str, Any], rows: int) -> tuple[list[int], Tensor]:
    """Greedy tokens of stock `generate` and their logits [steps, vocab], end-of-sequence ignored."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()
    settings = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    out = model.generate(**given, attention_mask=torch.ones(1, rows, dtype=torch.int64), generation_config=settings)
    return out.sequences[0, -steps:].tolist(), torch.cat(out.logits)


def view(model: Any) -> Original:
    """The parts of what `references.load` gives."""
    return model if isinstance(model, Original) else Hub(model)


@contextmanager
def recorded(module: Any, pick: Any) -> Iterator[list[Tensor]]:
    """`pick(inputs, output)` of every call of a module inside the block."""
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, inputs, output: found.append(pick(inputs, output).detach()))
    try:
        yield found
    finally:
        handle.remove()


def squares(views: int, rows: int) -> tuple[tuple[int, int], ...]:
    """The grid of so many views of so many visual tokens each, which fill a square; none where they do not."""
    side = math.isqrt(rows)
    return ((side, side),) * views if side**2 == rows else ()


# One sequence through the pieces of a decoder layer: rows are [n, D], heads [heads, n, d].


def qkv(layer: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of normed rows, before RoPE; a key head for every query head."""
    attention, config = layer.self_attn, layer.self_attn.config
    if hasattr(attention, "qkv_proj"):
        width = attention.head_dim * config.num_key_value_heads
        parts = attention.qkv_proj(rows).split([attention.head_dim * config.num_attention_heads, width, width], -1)
    else:
        parts = attention.q_proj(rows), attention.k_proj(rows), attention.v_proj(rows)
    q, k, v = (part.view(len(rows), -1, attention.head_dim).transpose(0, 1) for part in parts)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q, repeat(k, len(q)), repeat(v, len(q))


def repeat(heads: Tensor, count: int) -> Tensor:
    """Each key head as often as query heads share it."""
    return heads.repeat_interleave(count // len(heads), 0)


def rope(decoder: Any, heads: Tensor, positions: Tensor) -> Tensor:
    """Heads turned to their positions; a partial rotation leaves the last channels alone.

    Args:
        positions: [n], or as `Read` has them.
    """
    tables: tuple[Tensor, Tensor] = decoder.rotary_emb(heads, positions[None] if positions.dim() == 1 else positions)
    cos, sin = (table[0] for table in tables)
    width = cos.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    left, right = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-right, left], -1) * sin, rest], -1)


def rms_norm(rows: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Rows by their root mean square, times a gain."""
    found: Tensor = rows * (rows.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * gain
    return found


def softmax(q: Tensor, k: Tensor, sees: Tensor) -> Tensor:
    """Attention probabilities [heads, queries, keys] over the keys each query sees, [queries, keys] or per head."""
    scores: Tensor = q @ k.transpose(-1, -2) * float(q.shape[-1]) ** -0.5
    return torch.softmax(scores.masked_fill(~sees, float("-inf")), -1)


def stored(m: Original, cache: Cache) -> Cache:
    """A cache with each key head once, as it would be stored, [H_kv, n, d]."""
    config = m.language.config
    each = config.num_attention_heads // config.num_key_value_heads
    return [(k[::each], v[::each]) for k, v in cache]


def join(layer: Any, heads: Tensor) -> Tensor:
    """Heads [heads, n, d] through the output projection, [n, D]."""
    found: Tensor = layer.self_attn.o_proj(heads.transpose(0, 1).flatten(1))
    return found


def feed_forward(layer: Any, rows: Tensor, channels: int | None = None) -> Tensor:
    """The layer's second half with its residual; only the first `channels` of the hidden ones where given."""
    mlp, normed = layer.mlp, layer.post_attention_layernorm(rows)
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(normed).chunk(2, -1)
        inside = mlp.activation_fn(gate) * up
    else:
        inside = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
    if channels is not None:
        inside = torch.cat([inside[:, :channels], torch.zeros_like(inside[:, channels:])], -1)
    found: Tensor = rows + mlp.down_proj(inside)
    return found

"""Checkpoints in the layouts of the methods' own releases, on transformers' modules: LLaVA's original, and TinyLLaVA's.

A layout is a config and names of tensors; the modules are transformers' own, in float32 with eager attention. The few
steps of a decoder layer that the references write out are here too, for one sequence, on those modules' weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, read_json
from lvlm_edge.exporter.references import stored as stored_tensors

DECODERS = {
    "llava": "llama",  # the first releases; the hub's layout, which has the name now, is not read here
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_phi": "phi3",
    "llava_phi3": "phi3",
    "llava_qwen": "qwen2",
}
CLASSES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaPhiForCausalLM": "phi3",
    "LlavaPhi3ForCausalLM": "phi3",
    "LlavaQwenForCausalLM": "qwen2",
}
OWN = ("image_newline", "vision_mlp_layers.", "proxyv_initializer.")  # tensors of `model.` that no module here takes
HIMIX = ("k_proj_img", "v_proj_img", "input_layernorm_img")
IMAGE = -200  # LLaVA's placeholder; its configs do not say so
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
        injected: what is added to the images' rows after decoder layers 0, 1, ..., [rows of images, D] each.
    """

    features: Tensor
    embeds: Tensor
    rows: Tensor
    images: Tensor
    positions: Tensor
    next: int
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
        positions = torch.arange(len(rows))[None]
        return Read(features=features, embeds=embeds, rows=rows, images=images, positions=positions, next=len(rows))

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
    return q, repeat(k, len(q)), repeat(v, len(q))


def repeat(heads: Tensor, count: int) -> Tensor:
    """Each key head as often as query heads share it."""
    return heads.repeat_interleave(count // len(heads), 0)


def rope(decoder: Any, heads: Tensor, positions: Tensor) -> Tensor:
    """Heads turned to their positions; a partial rotation leaves the last channels alone."""
    tables: tuple[Tensor, Tensor] = decoder.rotary_emb(heads, positions[None])
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


# Loading.


def known(config: dict[str, Any]) -> bool:
    """Whether a config.json is of one of the layouts read here."""
    kind = config.get("model_type")
    return kind == "tinyllava" or (kind in DECODERS and (kind != "llava" or "mm_vision_tower" in config))


def load(folder: Path) -> Original:
    """A checkpoint with every tensor accounted for; its config must be `known`.

    Raises:
        CheckpointError: tensors are missing, unknown or misshapen, or transformers does not know a part.
    """
    config = stored_tensors.plain(read_json(folder / "config.json"))
    state = {k: v for k, v in stored_tensors.state(folder).items() if not k.endswith("rotary_emb.inv_freq")}
    model = _tinyllava(folder, config, state) if config["model_type"] == "tinyllava" else _llava(folder, config, state)
    if state:
        raise CheckpointError(f"{folder}: holds tensors that nothing takes: {', '.join(sorted(state)[:4])}")
    return model


def _llava(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Original:
    extra: dict[str, Tensor] = {}
    for prefix in OWN:
        extra |= {prefix + name: tensor for name, tensor in _take(state, "model." + prefix).items()}
    tower = _tower(folder, config["mm_vision_tower"], _take(state, "model.vision_tower.vision_tower."))
    sizes = config["hidden_size"], config["mm_hidden_size"]
    projector = _projector(folder, config["mm_projector_type"], *sizes, _take(state, "model.mm_projector."))
    named = [CLASSES[name] for name in config.get("architectures") or () if name in CLASSES]
    kind = named[0] if named else DECODERS[config["model_type"]]  # releases exist whose model_type is another's
    language = _module(folder, config | {"model_type": kind}, _take(state, ""))
    siglip = tower.config.model_type == "siglip_vision_model"  # LLaVA takes its last layer off, and drops no token
    return Original(
        image_token_id=config.get("image_token_index", IMAGE),
        tower=tower,
        projector=projector,
        language=language,
        extra=extra,
        select=[-2 if siglip else config.get("mm_vision_select_layer", -2)],
        drop_first=not siglip and config.get("mm_vision_select_feature", "patch") == "patch",
    )


def _tinyllava(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Original:
    text = _take(state, "language_model.")
    extra = {name.removeprefix("model."): text.pop(name) for name in list(text) if any(own in name for own in HIMIX)}
    tower = _module(folder, config["vision_config"], _vision(_take(state, "vision_tower._vision_tower.")))
    connector = _take(state, "connector._connector.")
    wide, narrow = config["text_config"]["hidden_size"], config["vision_config"]["hidden_size"]
    return Original(
        image_token_id=config.get("image_token_index", IMAGE),
        tower=tower,
        projector=_projector(folder, config.get("connector_type"), wide, narrow, connector) if connector else None,
        language=_module(folder, config["text_config"], text),
        extra=extra,
        select=[config.get("vision_feature_layer", -2)],
        drop_first=config.get("vision_feature_select_strategy", "patch") == "patch",
    )


def _take(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, by the rest of their names; they leave the state."""
    return {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}


def _vision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tower's tensors, of a vision model or of the two-sided model it is half of."""
    vision = {k.removeprefix("vision_model."): v for k, v in state.items() if k.startswith("vision_model.")}
    return {k: v for k, v in (vision or state).items() if not k.endswith("position_ids")}


def _tower(folder: Path, source: str, inside: dict[str, Tensor]) -> Any:
    """The vision tower: its config from the folder or id that is named, its weights from there or from inside."""
    beside = folder / source  # an absolute path stays what it is
    home = beside if beside.is_dir() else checkpoint.resolve(source, weights=not inside)
    config = stored_tensors.plain(read_json(home / "config.json"))
    if not inside:
        inside = stored_tensors.state(home)
    return _module(home, config.get("vision_config", config), _vision(inside))


def _projector(folder: Path, kind: Any, wide: int, narrow: int, state: dict[str, Tensor]) -> nn.Module:
    if kind != "mlp2x_gelu":
        raise CheckpointError(f"{folder}: the projector is {kind!r}, expected 'mlp2x_gelu'")
    projector = nn.Sequential(nn.Linear(narrow, wide), nn.GELU(), nn.Linear(wide, wide))
    try:
        projector.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the projector does not fit its config ({error})") from error
    return projector.eval()


def _module(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """Transformers' module of a config with exactly these weights."""
    import transformers

    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
        "clip_vision_model": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
        "siglip_vision_model": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
    }
    name = config.get("model_type")
    if name not in kinds:
        raise CheckpointError(f"{folder}: a part has model_type {name!r}, expected one of {', '.join(kinds)}")
    settings, kind = kinds[name]
    try:
        model, report = kind.from_pretrained(
            None,
            config=settings.from_dict(config),
            state_dict=state,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many types; the first line says what is wrong
        raise CheckpointError(f"{folder}: transformers cannot load it ({str(error).splitlines()[0]})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = ", ".join(sorted(map(str, report[problem]))[:4])
            raise CheckpointError(f"{folder}: {name} has {problem.replace('_', ' ')}: {names}")
    return model.eval()

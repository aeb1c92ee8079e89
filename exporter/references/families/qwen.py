"""Qwen-VL-Chat: the decoder on transformers' Qwen2, encoder and resampler written out on PyTorch's own modules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvlm_edge.exporter.checkpoints import text
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, read_json
from lvlm_edge.exporter.references import original, stored
from lvlm_edge.exporter.references.original import Read

PREFIX = "transformer.visual."
NAMES = {
    r"transformer\.wte": "model.embed_tokens",
    r"transformer\.ln_f": "model.norm",
    r"transformer\.h\.(\d+)\.ln_1": r"model.layers.\1.input_layernorm",
    r"transformer\.h\.(\d+)\.ln_2": r"model.layers.\1.post_attention_layernorm",
    r"transformer\.h\.(\d+)\.attn\.c_proj": r"model.layers.\1.self_attn.o_proj",
    r"transformer\.h\.(\d+)\.attn\.c_attn": r"model.layers.\1.self_attn.c_attn",
    r"transformer\.h\.(\d+)\.mlp\.w1": r"model.layers.\1.mlp.up_proj",
    r"transformer\.h\.(\d+)\.mlp\.w2": r"model.layers.\1.mlp.gate_proj",
    r"transformer\.h\.(\d+)\.mlp\.c_proj": r"model.layers.\1.mlp.down_proj",
}


class Tower(nn.Module):
    """The encoder, from its tensors by their names in the checkpoint."""

    def __init__(self, tensors: dict[str, Tensor], heads: int, patch: int) -> None:
        super().__init__()
        self.tensors, self.heads, self.patch = tensors, heads, patch
        self.layers = 1 + max(int(found[1]) for key in tensors if (found := re.search(r"resblocks\.(\d+)\.", key)))

    def forward(self, pixels: Tensor) -> Tensor:
        t = self.tensors
        x = F.conv2d(pixels, t["conv1.weight"], stride=self.patch)
        side = x.shape[-1]
        x = self.norm("ln_pre", x.flatten(2).transpose(1, 2) + places(t["positional_embedding"], side))
        for i in range(self.layers):
            at = f"transformer.resblocks.{i}."
            rows = F.linear(self.norm(at + "ln_1", x), t[at + "attn.in_proj.weight"], t[at + "attn.in_proj.bias"])
            q, k, v = rows.view(*rows.shape[:2], self.heads, -1).transpose(1, 2).chunk(3, -1)
            seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + F.linear(seen, t[at + "attn.out_proj.weight"], t[at + "attn.out_proj.bias"])
            inside = F.linear(self.norm(at + "ln_2", x), t[at + "mlp.c_fc.weight"], t[at + "mlp.c_fc.bias"])
            x = x + F.linear(F.gelu(inside), t[at + "mlp.c_proj.weight"], t[at + "mlp.c_proj.bias"])
        return x

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.tensors[name + ".weight"], self.tensors[name + ".bias"], 1e-6)


class Resampler(nn.Module):
    """256 learned queries over the features."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        width = len(tensors["proj"])
        self.attention = nn.MultiheadAttention(width, width // 128, batch_first=True)
        names = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
        self.attention.load_state_dict({name: tensors["attn_pool.attn." + name] for name in names})

    def forward(self, features: Tensor) -> Tensor:
        t = self.tensors
        joined = t.get("attn_pool.kv_proj.weight")
        x = self.norm("attn_pool.ln_kv", features if joined is None else F.linear(features, joined))
        place = t["attn_pool.pos_embed"]
        asked = (self.norm("attn_pool.ln_q", t["attn_pool.query"]) + place).expand(len(x), -1, -1)
        keys = x + places(place, int(x.shape[1] ** 0.5))
        rows = self.attention(asked, keys, x, need_weights=False)[0]
        return self.norm("ln_post", rows) @ t["proj"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.tensors[name + ".weight"], self.tensors[name + ".bias"], 1e-6)


def places(table: Tensor, side: int) -> Tensor:
    """A table of 16 x 16 places at side x side of them, as the release resizes it."""
    square = table.view(1, 16, 16, -1).permute(0, 3, 1, 2)
    if side != 16:
        square = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    return square.permute(0, 2, 3, 1).flatten(0, 2)


class QwenVl(original.Original):
    """The parts of a model, whose pictures stand between two tokens.

    Attributes:
        around: the two tokens.
    """

    def __init__(self, around: list[int], **parts: Any) -> None:
        super().__init__(extra={}, select=(), drop_first=False, **parts)
        self.around = around

    def see(self, pixels: Any) -> tuple[Tensor, Tensor]:
        features = self.tower(pixels.to(self.language.lm_head.weight.dtype))
        return features, self.projector(features).flatten(0, 1)

    def lay_out(self, prompt: Sequence[int], pixels: Any) -> Read:
        features, embeds = self.see(pixels)
        ids = torch.tensor(self.expanded(prompt))
        images = ids == self.image_token_id
        rows = self.decoder.embed_tokens(ids).clone()
        rows[images] = embeds
        positions = torch.arange(len(ids))[None]
        return Read(features=features, embeds=embeds, rows=rows, images=images, positions=positions, next=len(ids))

    def expanded(self, prompt: Sequence[int]) -> list[int]:
        """Token ids with everything that pictures bring."""
        whole = [self.around[0], *[self.image_token_id] * 256, self.around[1]]
        return [t for token in prompt for t in (whole if token == self.image_token_id else [token])]

    def attend_with(self, implementation: str) -> None:
        self.language.set_attn_implementation(implementation)


def load(folder: Path) -> QwenVl:
    """A checkpoint's weights.

    Raises:
        CheckpointError: its tensors are not the decoder's.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    given, state = read_json(folder / "config.json"), stored.state(folder)
    seen = {key.removeprefix(PREFIX): state.pop(key).float() for key in list(state) if key.startswith(PREFIX)}
    config = Qwen2Config(
        hidden_size=given["hidden_size"],
        num_hidden_layers=given["num_hidden_layers"],
        num_attention_heads=given["num_attention_heads"],
        num_key_value_heads=given["num_attention_heads"],
        intermediate_size=given["intermediate_size"] // 2,
        vocab_size=given["vocab_size"],
        rms_norm_eps=given["layer_norm_epsilon"],
        rope_theta=given.get("rotary_emb_base", 10000),
        tie_word_embeddings=False,
    )
    language, report = Qwen2ForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=_decoder(state),
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = ", ".join(sorted(map(str, report[problem]))[:4])
            raise CheckpointError(f"{folder}: it has {problem.replace('_', ' ')}: {names}")
    return QwenVl(
        [i for token in ("<img>", "</img>") for i in text.encoded(folder, token) or ()],
        image_token_id=(text.encoded(folder, "<imgpad>") or (0,))[0],
        tower=Tower(seen, given["visual"]["heads"], given["visual"]["patch_size"]),
        projector=Resampler(seen),
        language=language.eval(),
    )


def _decoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's tensors by transformers' names."""
    found = {}
    for key, tensor in state.items():
        for pattern, to in NAMES.items():
            key, changed = re.subn(rf"^{pattern}(?=\.)", to, key)
            if changed:
                break
        if ".c_attn." in key:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[key.replace("c_attn", f"{part}_proj")] = rows.clone()
        elif not key.endswith("rotary_emb.inv_freq"):
            found[key] = tensor
    return found

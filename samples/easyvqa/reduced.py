"""The sample's decoder with ProxyV, YOPO or HiMix in it, as training needs it: batched, differentiable, packed.

Several questions share one picture's visual tokens, as in `train.Packed`. Each model starts from the dense sample, and
`save` writes it in the layout of its method's own releases. The vision tower stays as it is.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import rotate_half

SLOTS, SLOT = 8, 16  # questions per picture in a sequence, tokens per question with answer and end
PLACEHOLDER = -200


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], gain, eps).to(x.dtype)


class Reduced(nn.Module):
    """What the three have in common. `reduce` runs the layers and returns the rows of the questions."""

    extra: tuple[str, ...] = ()  # what the names of a method's own parameters begin with
    dropped = False  # YOPO's semantics: removed keys leave before the softmax, not after it

    def __init__(self, model: LlavaForConditionalGeneration, prefix: list[int], image_token: int, between: int) -> None:
        """`between`: how many positions the image takes between the tokens around it."""
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.decoder, self.lm_head, self.config = model.model.language_model, model.lm_head, model.config
        self.tower.requires_grad_(False)
        at, asked = prefix.index(image_token), torch.arange(SLOTS * SLOT)
        head, self.side = len(prefix) - 1, math.isqrt(self.config.image_seq_length)
        self.before = at
        own = torch.cat([torch.full((head,), -1), asked // SLOT])  # which question a text token belongs to
        order = torch.cat([torch.arange(head), head + asked % SLOT])
        self.register_buffer("fixed", torch.tensor(prefix[:at] + prefix[at + 1 :]), False)
        self.register_buffer("sees", (order[:, None] >= order) & ((own[:, None] == own) | (own == -1)), False)
        self.register_buffer("after", order >= at, False)  # text tokens after the image
        self.register_buffer("at", order + between * (order >= at), False)  # positions of text tokens

    @property
    def eps(self) -> float:
        return self.config.text_config.rms_norm_eps

    def forward(self, pixels: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy of the answer token, as `train.Packed`."""
        with torch.no_grad():
            features = self.tower(pixels).last_hidden_state[:, 1:]
        fixed = self.fixed.expand(len(pixels), -1)
        text = self.decoder.embed_tokens(torch.cat([fixed, ids.flatten(1)], 1))
        rows = self.reduce(features, text)[:, -SLOTS * SLOT :]
        chosen = labels.flatten(1) >= 0
        target = labels.flatten(1)[chosen]
        logits = self.lm_head(self.decoder.norm(rows[chosen])).float()
        words = target != 2
        return F.cross_entropy(logits, target), (logits.argmax(-1) == target)[words].float().mean()

    def reduce(self, features: Tensor, text: Tensor) -> Tensor:
        raise NotImplementedError

    def qkv(self, i: int, x: Tensor, at: Tensor) -> list[Tensor]:
        """Queries, keys and values of un-normed rows [B, n, D], turned to positions [n]; a key head per query head."""
        attention, layer = self.decoder.layers[i].self_attn, self.decoder.layers[i]
        normed = layer.input_layernorm(x)
        parts = [p(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                 for p in (attention.q_proj, attention.k_proj, attention.v_proj)]  # fmt: skip
        cos, sin = self.decoder.rotary_emb(x, at[None])
        parts[:2] = [p * cos[:, None] + rotate_half(p) * sin[:, None] for p in parts[:2]]
        return [parts[0], *(self.shared(p) for p in parts[1:])]

    def shared(self, heads: Tensor) -> Tensor:
        return heads.repeat_interleave(self.decoder.layers[0].self_attn.num_key_value_groups, 1)

    def after_attention(self, i: int, x: Tensor, heads: Tensor) -> Tensor:
        """Rows with attention's result [B, H, n, d] added."""
        return x + self.decoder.layers[i].self_attn.o_proj(heads.transpose(1, 2).flatten(2))

    def feed(self, i: int, x: Tensor, channels: int | None = None) -> Tensor:
        """Rows after the FFN's first channels."""
        layer, mlp = self.decoder.layers[i], self.decoder.layers[i].mlp
        normed = layer.post_attention_layernorm(x)
        inside = F.silu(F.linear(normed, mlp.gate_proj.weight[:channels]))
        inside = inside * F.linear(normed, mlp.up_proj.weight[:channels])
        return x + F.linear(inside, mlp.down_proj.weight[:, :channels])

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Parameters to train, those that are new at a higher rate."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        new = [p for n, p in named if n.startswith(self.extra)]
        old = [p for n, p in named if not n.startswith(self.extra)]
        return [{"params": old, "lr": rate}, {"params": new, "lr": 4 * rate}] if new else [{"params": old, "lr": rate}]

    # What a checkpoint holds.

    def text_config(self) -> dict[str, Any]:
        text = self.config.text_config.to_dict()
        names = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "attention_bias",
                 "mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
        theta = text["rope_parameters"]["rope_theta"]
        return {n: text[n] for n in names} | {"rope_theta": theta, "rope_scaling": None, "tie_word_embeddings": False}

    def vision_config(self) -> dict[str, Any]:
        vision = self.config.vision_config.to_dict()
        names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps",
                 "projection_dim")  # fmt: skip
        return {n: vision[n] for n in names}

    def method_fields(self) -> dict[str, Any]:
        return {}

    def method_tensors(self) -> dict[str, Tensor]:
        return {}

    def save(self, source: Path, out: Path) -> None:
        """Write the checkpoint in LLaVA's original layout, weights in bfloat16, with the dense sample's tokenizer."""
        out.mkdir(parents=True, exist_ok=True)
        (out / "tower").mkdir(exist_ok=True)
        self._write(self._tower(), out / "tower" / "model.safetensors")
        vision = {"architectures": ["CLIPVisionModel"], **self.vision_config()}
        (out / "tower" / "config.json").write_text(json.dumps(vision, indent=2) + "\n")
        projector = self.projector.state_dict().items()
        tensors = {f"model.{n}": t for n, t in self.decoder.state_dict().items()}
        tensors |= {f"model.mm_projector.{'0' if '1' in n else '2'}.{n.split('.')[1]}": t for n, t in projector}
        tensors |= {"lm_head.weight": self.lm_head.weight}
        self._write(tensors | self.method_tensors(), out / "model.safetensors")
        config = {
            "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", **self.text_config(),
            "torch_dtype": "bfloat16", "mm_vision_tower": "tower", "mm_hidden_size": self.tower.config.hidden_size,
            "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -1, "mm_vision_select_feature": "patch",
            "image_aspect_ratio": "pad", **self.method_fields(),
        }  # fmt: skip
        self._files(config, source, out)

    def _tower(self) -> dict[str, Tensor]:
        return {f"vision_model.{n.removeprefix('vision_model.')}": t for n, t in self.tower.state_dict().items()}

    def _write(self, tensors: dict[str, Tensor], path: Path) -> None:
        kept = {n: t.detach().to(torch.bfloat16).contiguous() for n, t in tensors.items()}
        save_file(kept, path, {"format": "pt"})

    def _files(self, config: dict[str, Any], source: Path, out: Path) -> None:
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
                     "generation_config.json"):  # fmt: skip
            shutil.copyfile(source / name, out / name)


class ProxyV(Reduced):
    """From `start` on a proxy per block of `factor` x `factor` visual tokens attends for them."""

    extra = ("newline", "updates")

    def __init__(self, model: LlavaForConditionalGeneration, prefix: list[int], image_token: int,
                 start: int = 2, factor: int = 4) -> None:  # fmt: skip
        visual = model.config.image_seq_length
        super().__init__(model, prefix, image_token, visual + 1)
        self.start, self.factor = start, factor
        wide = self.config.text_config.hidden_size
        narrow = wide // 4 if wide >= 1024 else wide // 2
        self.newline = nn.Parameter(torch.randn(wide) * 0.02)
        self.updates = nn.ModuleList()
        for _ in self.decoder.layers[start:]:
            parts = {"context_proj": (wide, narrow), "input_proj": (wide, narrow), "proj_0": (2 * narrow, narrow),
                     "proj_2": (narrow, wide)}  # fmt: skip
            update = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in parts.items()})
            update["layernorm_post"] = nn.RMSNorm(wide, self.eps)
            nn.init.normal_(update["proj_2"].weight, std=0.002)  # nearly nothing at first
            self.updates.append(update)
        proxies, first = (self.side // factor) ** 2, self.before
        full_at = first + torch.arange(visual)
        newline_at, proxy_at = torch.tensor([first + visual]), first + torch.arange(proxies)
        self.register_buffer("places", torch.cat([full_at, proxy_at, newline_at, self.at]), False)
        kind = torch.cat([torch.full((n,), k) for k, n in enumerate((visual, proxies, 1, len(self.at)))])
        sees = self.places[:, None] >= self.places
        sees[-len(self.at) :, -len(self.at) :] = self.sees
        q, k = kind[:, None], kind[None]
        sees &= ~((q == 1) & (k == 0)) & ~((q != 1) & (k == 1))
        self.register_buffer("mask", sees, False)
        self.visual, self.proxies, self.scaled = visual, proxies, False

    def reduce(self, features: Tensor, text: Tensor) -> Tensor:
        full = self.projector(features)
        newline = self.newline.to(text.dtype).expand(len(text), 1, -1)
        proxy = full[:, :0]
        for i in range(len(self.decoder.layers)):
            if i == self.start:
                grid = full.transpose(1, 2).unflatten(2, (self.side, self.side))
                small = F.interpolate(grid.float(), scale_factor=1 / self.factor, mode="bilinear", align_corners=False)
                proxy = small.to(full.dtype).flatten(2).transpose(1, 2)
            rows = torch.cat([full, proxy, newline, text], 1)
            there = torch.ones(len(self.places), dtype=torch.bool)
            there[self.visual : self.visual + self.proxies] = i >= self.start
            asks = there.clone()
            asks[: self.visual] = i < self.start
            q, k, v = self.qkv(i, rows, self.places[there])
            q = q[:, :, asks[there]]
            heads = F.scaled_dot_product_attention(q, k, v, self.mask[asks][:, there])
            out = self.feed(i, self.after_attention(i, rows[:, asks[there]], heads))
            sizes = [self.visual if i < self.start else self.proxies, 1, len(self.at)]
            first, newline, text = out.split(sizes, 1)
            if i < self.start:
                full = first
            else:
                proxy, full = first, self.update(i - self.start, full, first)
        return text

    def update(self, j: int, full: Tensor, proxy: Tensor) -> Tensor:
        w = self.updates[j]
        few = self.side // self.factor
        guide = w["context_proj"](proxy).unflatten(1, (few, few))
        guide = guide.repeat_interleave(self.factor, 1).repeat_interleave(self.factor, 2).flatten(1, 2)
        inside = torch.cat([w["input_proj"](full), guide], -1)
        total = w["proj_2"](F.silu(w["proj_0"](inside))) + full
        if not self.scaled:  # the first batch sets the gains, so that visual tokens keep their size
            size = total.detach().float().pow(2).mean().sqrt()
            w["layernorm_post"].weight.data.fill_(float(size))
            self.scaled = j + 1 == len(self.updates)
        return norm(total, w["layernorm_post"].weight, self.eps)

    def method_fields(self) -> dict[str, Any]:
        return {
            "proxyv": True, "proxyv_start_layer": self.start, "proxyv_reduce_factor": self.factor,
            "per_crop_token_len": self.visual, "learn_proxy": False, "max_num_image_crops": 1,
            "num_of_vision_mlp_layers": len(self.updates), "mm_newline_position": "one_token",
        }  # fmt: skip

    def method_tensors(self) -> dict[str, Tensor]:
        found = {f"model.vision_mlp_layers.{n.replace('proj_0', 'proj.0').replace('proj_2', 'proj.2')}": t
                 for n, t in self.updates.state_dict().items()}  # fmt: skip
        return found | {"model.image_newline": self.newline}


class Yopo(Reduced):
    """Visual tokens see their neighbours, in some heads, with a part of the FFN, and nobody sees them from `cutoff`."""

    def __init__(self, model: LlavaForConditionalGeneration, prefix: list[int], image_token: int,
                 head_mask: Tensor, window: int = 5, cutoff: int = 4, ratio: float = 2) -> None:  # fmt: skip
        visual = model.config.image_seq_length
        super().__init__(model, prefix, image_token, visual)
        self.window, self.cutoff, self.ratio, self.visual = window, cutoff, ratio, visual
        self.register_buffer("kept", head_mask, False)
        first = self.before
        at = torch.cat([self.at[:first], first + torch.arange(visual), self.at[first:]])
        image = (at >= first) & (at < first + visual)
        sees = torch.zeros(len(at), len(at), dtype=torch.bool)
        sees[(~image).nonzero(), (~image).nonzero()[:, 0]] = self.sees
        sees[(~image).nonzero(), image.nonzero()[:, 0]] = self.after[:, None]
        row, column = torch.arange(visual) // self.side, torch.arange(visual) % self.side
        near = ((row[:, None] - row).abs() <= window // 2) & ((column[:, None] - column).abs() <= window // 2)
        sees[image.nonzero(), image.nonzero()[:, 0]] = near
        sees[image.nonzero(), torch.arange(first)] = True
        self.register_buffer("places", at, False)
        self.register_buffer("image", image, False)
        self.register_buffer("mask", sees, False)

    def reduce(self, features: Tensor, text: Tensor) -> Tensor:
        rows = torch.cat([text[:, : self.before], self.projector(features), text[:, self.before :]], 1)
        channels = int(self.config.text_config.intermediate_size / self.ratio)
        for i in range(len(self.decoder.layers)):
            q, k, v = self.qkv(i, rows, self.places)
            pruned = ~self.kept[i][:, None, None]  # [H, 1, 1]
            removed = (pruned | torch.tensor(i >= self.cutoff)) & self.image
            sees = self.mask & ~removed if self.dropped else self.mask
            scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
            probabilities = scores.masked_fill(~sees, float("-inf")).softmax(-1).masked_fill(removed, 0).to(v.dtype)
            heads = (probabilities @ v).masked_fill(pruned & self.image[:, None], 0)
            rows = self.after_attention(i, rows, heads)
            ends = self.before, self.before + self.visual
            rows = torch.cat([
                self.feed(i, rows[:, : ends[0]]), self.feed(i, rows[:, ends[0] : ends[1]], channels),
                self.feed(i, rows[:, ends[1] :]),
            ], 1)  # fmt: skip
        return rows

    def method_fields(self) -> dict[str, Any]:
        return {
            "attncut_w": self.window, "layercut_num": self.cutoff, "mlpcut_ratio": self.ratio,
            "headcut_num": round(float(self.kept.sum(1).float().mean())), "sprompt_len": self.before,
        }  # fmt: skip

    def save(self, source: Path, out: Path) -> None:
        super().save(source, out)
        np.save(out / "headmask.npy", self.kept.numpy())


class HiMix(Reduced):
    """Every layer has keys and values of its own of the vision features, which never enter the stack."""

    extra = ("images",)

    def __init__(self, model: LlavaForConditionalGeneration, prefix: list[int], image_token: int) -> None:
        super().__init__(model, prefix, image_token, 0)
        self.projector = None
        seen, first = self.tower.config.hidden_size, self.decoder.layers[0].self_attn
        self.images = nn.ModuleList()
        for _ in self.decoder.layers:
            parts = {n: nn.Linear(seen, p.out_features, bias=False)
                     for n, p in (("k_proj_img", first.k_proj), ("v_proj_img", first.v_proj))}  # fmt: skip
            self.images.append(nn.ModuleDict(parts | {"input_layernorm_img": nn.RMSNorm(seen, self.eps)}))

    def reduce(self, features: Tensor, text: Tensor) -> Tensor:
        visual = features.shape[1]
        mask = torch.cat([torch.ones(len(self.at), visual, dtype=torch.bool), self.sees], 1)
        for i, w in enumerate(self.images):
            normed = norm(features, w["input_layernorm_img"].weight, self.eps)
            q, k, v = self.qkv(i, text, self.at)
            size = q.shape[-1]
            image = [self.shared(w[n](normed).unflatten(-1, (-1, size)).transpose(1, 2))
                     for n in ("k_proj_img", "v_proj_img")]  # fmt: skip
            keys, values = torch.cat([image[0].to(k.dtype), k], 2), torch.cat([image[1].to(v.dtype), v], 2)
            heads = F.scaled_dot_product_attention(q.to(k.dtype), keys, values, mask)
            text = self.feed(i, self.after_attention(i, text, heads))
        return text

    def save(self, source: Path, out: Path) -> None:
        """Write the checkpoint in TinyLLaVA's layout."""
        out.mkdir(parents=True, exist_ok=True)
        tensors = {f"vision_tower._vision_tower.{n}": t for n, t in self._tower().items()}
        tensors |= {f"language_model.model.{n}": t for n, t in self.decoder.state_dict().items()}
        tensors["language_model.lm_head.weight"] = self.lm_head.weight
        for i, w in enumerate(self.images):
            for name in ("k_proj_img", "v_proj_img", "input_layernorm_img"):
                inside = "" if "norm" in name else "self_attn."
                tensors[f"language_model.model.layers.{i}.{inside}{name}.weight"] = w[name].weight
        self._write(tensors, out / "model.safetensors")
        seen = self.tower.config.hidden_size
        config = {
            "architectures": ["TinyLlavaForConditionalGeneration"], "model_type": "tinyllava",
            "text_config": {**self.text_config(), "model_type": "llama", "vision_hidden_size": seen},
            "vision_config": self.vision_config(), "vision_feature_layer": -1,
            "vision_feature_select_strategy": "patch", "image_aspect_ratio": "square",
            "image_token_index": PLACEHOLDER, "hidden_size": self.config.text_config.hidden_size,
            "vision_hidden_size": seen, "vocab_size": self.config.text_config.vocab_size, "torch_dtype": "bfloat16",
        }  # fmt: skip
        self._files(config, source, out)


METHODS = {"proxyv": ProxyV, "yopo": Yopo, "himix": HiMix}

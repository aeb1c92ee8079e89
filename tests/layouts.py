"""Checkpoints in LLaVA's original layout, and what stock transformers' decoders and towers say of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

IMAGE = -200
TOWER = "tower"  # the vision encoder's folder inside every checkpoint made here
SEEN = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
SEEN |= {"image_size": 56, "patch_size": 14}
SPOKEN = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SPOKEN |= {"num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 1024}
SPOKEN |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NAMES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "phi3": ("llava_phi", "LlavaPhiForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}


@dataclass
class Stock:
    """A model in parts that transformers and torch bring: decoder, vision encoder, projector, separator."""

    decoder: Any
    tower: Any
    projector: torch.nn.Sequential
    newline: torch.Tensor | None = None
    siglip: bool = False

    @torch.no_grad()
    def seen(self, pixels: NDArray[np.float32]) -> torch.Tensor:
        """Rows of all crops, [crops * V, D], with a separator after each crop's where the model has one."""
        states = self.tower(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
        tokens = self.projector(states[-2] if self.siglip else states[-2][:, 1:])
        if self.newline is not None:
            tokens = torch.cat([tokens, self.newline.expand(len(tokens), 1, -1)], 1)
        return tokens.flatten(0, 1)

    @torch.no_grad()
    def generate(
        self, ids: Sequence[int], pixels: NDArray[np.float32], steps: int, crops: int = 1
    ) -> tuple[list[int], NDArray[np.float32]]:
        """Greedy tokens and their logits [steps, vocab]; `crops` of the pixels belong to each image."""
        images = iter(self.seen(pixels).chunk(len(pixels) // crops))
        embed = self.decoder.get_input_embeddings()
        rows = torch.cat([next(images) if i == IMAGE else embed(torch.tensor([i])) for i in ids])[None]
        logits, tokens, cache = [], [], None
        for _ in range(steps):
            out = self.decoder(inputs_embeds=rows, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[:, -1])
            tokens.append(int(logits[-1].argmax()))
            rows = embed(torch.tensor([tokens[-1:]]))
        return tokens, torch.cat(logits).numpy()


def build(folder: Path, *, decoder: str = "llama", tower: str = "clip", seed: int = 0, **fields: Any) -> Stock:
    """A small random checkpoint with its vision encoder beside it.

    Args:
        fields: of config.json, over the decoder's own; `text` are the decoder's.
    """
    torch.manual_seed(seed)
    text, newline = fields.pop("text", {}), "proxyv" in fields
    model, eyes = _decoder(decoder, SPOKEN | text), _tower(tower)
    wide = model.config.hidden_size
    projector = torch.nn.Sequential(
        torch.nn.Linear(SEEN["hidden_size"], wide), torch.nn.GELU(), torch.nn.Linear(wide, wide)
    )
    for part in (model, eyes, projector):
        _randomise(part)
    stock = Stock(model, eyes, projector, torch.randn(wide) if newline else None, tower == "siglip")
    save(folder, stock, decoder, **fields)
    return stock


def save(folder: Path, stock: Stock, decoder: str, **fields: Any) -> None:
    """Write a model in original layout."""
    (folder / TOWER).mkdir(parents=True)
    stock.tower.save_pretrained(folder / TOWER)
    tensors = {k: v.contiguous().clone() for k, v in stock.decoder.state_dict().items()}
    if stock.decoder.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    tensors |= {f"model.mm_projector.{k}": v for k, v in stock.projector.state_dict().items()}
    if stock.newline is not None:
        tensors["model.image_newline"] = stock.newline
    save_file(tensors, folder / "model.safetensors")
    name, architecture = NAMES[decoder]
    config = stock.decoder.config.to_dict() | {
        "model_type": name,
        "architectures": [architecture],
        "mm_vision_tower": TOWER,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": SEEN["hidden_size"],
        "mm_vision_select_layer": -2,
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def load(folder: Path) -> Stock:
    """A checkpoint of a Llama decoder with a CLIP tower beside it, in stock modules."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    config = json.loads((folder / "config.json").read_text("utf-8"))
    tensors = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    beside = folder / config["mm_vision_tower"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    kept = {k: config[k] for k in (*names, "vocab_size", "rms_norm_eps", "max_position_embeddings")}
    decoder = LlamaForCausalLM(LlamaConfig(**kept, attn_implementation="eager")).eval()
    wide, projected = config["hidden_size"], config["mm_hidden_size"]
    projector = torch.nn.Sequential(torch.nn.Linear(projected, wide), torch.nn.GELU(), torch.nn.Linear(wide, wide))
    start = "model.mm_projector."
    projector.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    decoder.load_state_dict({k: tensors[k] for k in decoder.state_dict()})
    tower = CLIPVisionModel(CLIPVisionConfig.from_pretrained(beside)).eval()
    seen = {k: v.float() for k, v in load_file(beside / "model.safetensors").items()}
    own = set(tower.state_dict())
    tower.load_state_dict({k if k in own else k.removeprefix("vision_model."): v for k, v in seen.items()})
    return Stock(decoder, tower, projector.eval(), tensors.get("model.image_newline"))


def as_hub(stock: Stock, image: int) -> Any:
    """The same model as transformers' LLaVA, whose image token is `image`."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=stock.tower.config,
        text_config=stock.decoder.config,
        image_token_index=image,
        attn_implementation="eager",
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(stock.decoder.model.state_dict())
    model.lm_head.load_state_dict(stock.decoder.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(stock.tower.state_dict())
    projector = model.model.multi_modal_projector
    projector.linear_1.load_state_dict(stock.projector[0].state_dict())
    projector.linear_2.load_state_dict(stock.projector[2].state_dict())
    return model


def prompt(text: int = 12, before: int = 4, images: int = 1, seed: int = 0) -> list[int]:
    """Seeded token ids with the images after the first `before`."""
    ids = np.random.default_rng(seed).integers(3, SPOKEN["vocab_size"], text).tolist()
    return [*ids[:before], *[IMAGE] * images, *ids[before:]]


def _decoder(kind: str, fields: dict[str, Any]) -> Any:
    import transformers

    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[kind]
    return model(config(**fields, attn_implementation="eager")).eval()


def _tower(kind: str) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**SEEN)).eval()
    return SiglipVisionModel(SiglipVisionConfig(**SEEN)).eval()


@torch.no_grad()
def _randomise(part: Any) -> None:
    """Matrices that keep the size of what goes through them, and gains and biases that are not 1 and 0."""
    for name, weight in part.named_parameters():
        if name.endswith("embed_tokens.weight"):
            weight.normal_(0, 0.5)
        elif weight.dim() > 1:
            weight.normal_(0, 1.3 * weight[0].numel() ** -0.5)
        else:
            weight.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)

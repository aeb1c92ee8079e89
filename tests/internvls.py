"""Small random InternVL checkpoints, with the tokenizer and processor of a stored one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

BESIDE = ("chat_template.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json")


def build(
    folder: Path, source: Path, *, decoder: str = "qwen2", text: Any = None, vision: Any = None, **top: Any
) -> Path:
    """A checkpoint of the parts of another, with weights large enough that attention is not flat.

    Args:
        source: whose config is changed.
        decoder: `qwen2`, `qwen3` or `llama`.
        top: fields of the config; those of a part under `text` and `vision`.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import AutoConfig

    config = {"tie_word_embeddings": False} | json.loads((source / "config.json").read_text("utf-8")) | top
    config["text_config"] |= {"model_type": decoder, "num_hidden_layers": 2} | (text or {})
    config["vision_config"] |= {"num_hidden_layers": 2} | (vision or {})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5 if "embed" in name else weight.shape[-1] ** -0.5)
            else:
                weight.normal_(float("norm" in name and name.endswith("weight")), 0.1)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    for name in (*BESIDE, "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder
